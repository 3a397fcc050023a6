"""Draw the methods, their memory and the book as SVG: `python book/schematics.py`.

Each drawing is a list of boxes, pictures, arrows and words. Every arrow is one of the code: what
leaves its box goes into the other one, by the formula beside it.
"""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

from drawing import arrow, block, box, picture, put_in, svg, title, words
from generated import headline

IMAGES = Path(__file__).parent / "images"


# fmt: off
# -------------------------------------------------------------------------------------- the methods
DIFFUSION_AD = [
    title(16, "From image to map"),
    picture(38, 114, "a_x", "image $x$"),
    arrow("66 114 H94 V70 H122", "D1", (108, 64)),
    arrow("66 114 H94 V158 H122", "D1", (108, 152)),
    picture(150, 70, "a_x_b", "$x_b$, $t_b$ = 400"),
    picture(150, 158, "a_x_s", "$x_s$, $t_s$ = 200"),
    arrow("178 70 H204"),
    arrow("178 158 H204"),
    box(204, 42, 68, 144, "denoiser", "$ε_θ(x, t)$", "a U-Net", kind="D"),
    arrow("272 70 H324", "D2", (297, 64)),
    picture(352, 70, "a_x0_b", "$x̂_{0,b}$"),
    arrow("150 186 V222"),
    arrow("238 186 V222", "$ε_θ(x_s, t_s)$", (244, 209), anchor="start"),
    arrow("352 98 V222"),
    box(118, 222, 276, 40, "norm guidance, $w$ = 1", "D4, D5, D6", kind="D"),
    arrow("150 262 V294"),
    picture(150, 322, "a_x0_g"),
    words(116, 326, "$x_{0,g}$", at="end"),
    arrow("178 322 H203"),
    arrow("38 142 V372 H251 V350", "image and normal version", (244, 366), anchor="end"),
    box(203, 294, 96, 56, "segmentation", "network", "D7", kind="D"),
    arrow("299 322 H328"),
    picture(356, 322, "a_map", "map $M̂$"),
    arrow("356 350 V374"),
    words(394, 388, "score: mean of the 50 largest pixels (D11)", at="end"),
    title(424, "Training, on normal images"),
    picture(38, 482, "a_normal", "normal $N$"),
    arrow("66 482 H122", "D12", (92, 476)),
    picture(150, 482, "a_pasted", "$x$ = $S$, or $N$"),
    arrow("324 482 H178"),
    words(251, 461, "half of the images", "get a source $A$"),
    words(251, 499, "where $M$ = 1"),
    picture(352, 482, "a_mask", "mask $M$"),
    arrow("150 510 V534"),
    box(10, 534, 294, 42, "the same way, D1 to D7, at random levels:",
        "$t_s$ from 0…299, $t_b$ from 300…999 (D3)", kind="D"),
    arrow("352 510 V612", "$M$", (358, 560), anchor="start"),
    arrow("104 576 V612", "$ε_θ$ at both levels", (110, 598), anchor="start"),
    arrow("270 576 V612", "$M̂$", (276, 598), anchor="start"),
    box(10, 612, 188, 56, "$L_{noise}$ (D8): error of the", "predicted noise, only in",
        "images that stayed normal"),
    box(206, 612, 188, 56, "$L_{mask}$ (D9): of $M̂$ and $M$,", "5 × focal loss",
        "+ smooth $L_1$"),
    arrow("104 668 V694"),
    arrow("300 668 V694"),
    box(10, 694, 384, 42, "$L$ = $L_{noise}$ + $L_{mask}$ (D10)",
        "the mask's gradient reaches both networks"),
]
DECO_DIFF = [
    title(16, "Training, on normal images"),
    words(109, 64, "$m$ = 1 keeps,", "$m$ = 0 corrupts", at="end"),
    picture(143, 70, "c_m", "mask $m$"),
    picture(248, 70, "c_eps", "$ε$ (C2)"),
    words(284, 57, "noise, and patches", "from anywhere in", "the batch", at="start"),
    arrow("171 70 H194 V154 H212"),
    arrow("248 98 V140"),
    picture(38, 164, "c_x", "image $x$"),
    arrow("66 164 H115", "encode", (90, 158)),
    picture(143, 164, "c_z_0", "$z_0$"),
    arrow("171 172 H212"),
    box(212, 140, 72, 48, "corrupt", "at level $t$"),
    arrow("284 164 H324", "C1", (303, 158)),
    picture(352, 164, "c_z_t", "$z_t$"),
    arrow("352 192 V228"),
    box(290, 228, 104, 44, "U-Net", "$η_θ(z_t, t, c)$", kind="C"),
    arrow("240 188 V208 H132 V228", "deviation $η_t$ (C3)", (180, 204)),
    arrow("290 250 H212", "$η_θ$", (251, 244)),
    box(52, 228, 160, 44, "loss (C5):", "mean of ($η_t$ − $η_θ$)²"),
    words(394, 288, "$t$: one of ten levels, $c$: which product", at="end"),
    title(324, "Inference: no noise is added"),
    picture(38, 396, "c_defect", "image $x$"),
    arrow("66 396 H115", "encode", (90, 390)),
    picture(143, 396, "c_start", "$z_0$"),
    arrow("171 396 H202"),
    box(202, 374, 92, 44, "correct (C6)", "$η_θ(z, t, c)$", kind="C"),
    arrow("282 374 V360 H214 V374", "$t$ = 8, 6, 4, 2, 0", (248, 354)),
    arrow("294 396 H324"),
    picture(352, 396, "c_corrected", "$ẑ$"),
    arrow("143 424 V450"),
    arrow("352 424 V450"),
    box(115, 450, 279, 26, "compare: decoded, and as latents"),
    arrow("143 476 V510", "C7", (149, 497), anchor="start"),
    arrow("248 476 V510", "C8", (254, 497), anchor="start"),
    picture(143, 538, "c_image", "$I$, of images", where="below"),
    words(195, 543, "∘", size=16),
    picture(248, 538, "c_latent", "$Λ$, of latents", where="below"),
    arrow("276 538 H324", "C9", (299, 532)),
    picture(352, 538, "c_map", "$A$ = √($I$ ∘ $Λ$)", where="below"),
    words(394, 600, "score: largest value of $A$ (C10)", at="end"),
]
ONE_FOR_MORE = [
    title(16, "Training, on normal images of a task"),
    picture(48, 70, "o_normal", "image $x$"),
    arrow("76 70 H122", "encode", (98, 64)),
    picture(150, 70, "o_z_0", "$z_0$"),
    arrow("178 70 H224", "D1", (200, 64)),
    picture(252, 70, "o_z_t", "$z_t$"),
    arrow("280 70 H308"),
    box(308, 42, 84, 150, "U-Net", "$ε_θ(z_t, t, f)$", kind="O"),
    arrow("48 98 V136", "paste", (54, 121), anchor="start"),
    picture(48, 164, "o_pasted", "$x̃$", where="below"),
    arrow("76 164 H122"),
    box(122, 136, 130, 56, "AMN: convolutions,", "then attention,", "blind nearby (A1)",
        kind="O"),
    arrow("252 164 H308", "$f$ (A2)", (280, 158)),
    arrow("20 70 H8 V248 H122"),
    box(122, 226, 90, 44, "AMN's own", "convolutions", kind="O"),
    arrow("212 248 H240"),
    arrow("279 164 V226"),
    box(240, 226, 78, 44, "$L_{masked}$", "(A3)"),
    arrow("279 270 V296"),
    arrow("358 192 V296", "$ε_θ$", (364, 252), anchor="start"),
    box(122, 296, 270, 28, "$L$ = mean of ($ε$ − $ε_θ$)² + $L_{masked}$ (O1)"),
    title(358, "Inference"),
    picture(48, 456, "o_x", "image $x$", where="below"),
    arrow("48 428 V396 H122"),
    box(122, 382, 130, 28, "AMN", kind="O"),
    arrow("252 396 H350 V428", "$f$ (A2)", (300, 390)),
    arrow("76 456 H122", "encode", (98, 450)),
    picture(150, 456, "o_z", "$z_0$"),
    arrow("178 456 H224", "D1", (200, 450)),
    picture(252, 456, "o_z_T", "$z_T$"),
    arrow("280 456 H308"),
    box(308, 428, 84, 56, "U-Net", "DDIM (O2)", "ten steps", kind="O"),
    arrow("150 484 V522", "decode", (156, 507), anchor="start"),
    arrow("350 484 V522", "$ẑ$, decode", (344, 507), anchor="end"),
    picture(150, 550, "o_decoded", "what the codec keeps", where="below"),
    picture(350, 550, "o_rebuilt", "normal version", where="below"),
    arrow("178 550 H204"),
    arrow("322 550 H296"),
    box(204, 522, 92, 56, "compare", "features", "(O3)"),
    arrow("250 578 V612"),
    picture(250, 640, "o_map"),
    words(216, 644, "map $A$", at="end"),
    words(284, 637, "score: largest", "value of $A$ (O4)", at="start"),
    title(702, "From task to task"),
    box(8, 716, 162, 58, "train; no step may", "have a part along $M$",
        "(G4; $M$ is empty at first)", kind="G"),
    arrow("170 736 H228"),
    box(228, 716, 164, 58, "run on its images,", "gather $R$, extend $M$", "(G1; later G2, G3)",
        kind="G"),
    arrow("228 756 H170", "next task", (199, 770)),
]
GRADIENT_PROJECTION = [
    title(16, "A step stays clear of $M$"),
    '<path d="M30 222 L262 129.2" stroke="#b4619f" stroke-width="2" fill="none"/>',
    *(
        f'<circle cx="{90 + d:g}" cy="{198 - 0.4 * d:g}" r="3.4" fill="#b4619f"/>'
        for d in (22, 41, 96, 150)
    ),
    arrow("90 198 L180 60"),
    words(190, 58, "$Δ$: a row of the step", at="start"),
    arrow("90 198 L215.2 147.9", kind="G", dashed=True),
    words(222, 172, "$ΔMM^⊤$: the part", "along $M$, taken out", at="start"),
    arrow("90 198 L54.8 110.1", kind="D"),
    words(8, 62, "$Δ − ΔMM^⊤$:", "what is kept (G4)", at="start"),
    '<path d="M180 60 L215.2 147.9 M180 60 L54.8 110.1" stroke="currentColor" stroke-opacity="0.4" '
    'stroke-dasharray="2 3" fill="none"/>',
    words(212, 92, "dots: inputs $x$ of old tasks;", "then ($W$ + $Δ$)$x$ = $Wx$ (G5)",
        at="start"),
    title(252, "$M$ grows after each task"),
    block(20, 270, 70, 52, "$R$", kind="O"),
    words(55, 338, "task 1"),
    arrow("90 296 H196", "SVD, keep $k$", (143, 290)),
    words(143, 312, "by energy (G1)"),
    block(196, 270, 22, 52, "$M$", kind="G"),
    block(20, 354, 70, 52, "$R$", kind="C"),
    words(55, 422, "task 2"),
    arrow("90 380 H196", "less $MM^⊤R$ (G2)", (143, 374)),
    arrow("207 322 V354"),
    block(196, 354, 70, 52, "$R̂$"),
    arrow("266 380 H310 V424 H380 V406", "SVD, keep $k$ by G3", (392, 438), anchor="end"),
    arrow("218 296 H363 V354"),
    block(352, 354, 22, 52, "$M$", kind="G"),
    block(374, 354, 12, 52, kind="C"),
    title(468, "If $R$ is too large: one chunk at a time"),
    words(53, 496, "[ $U_iΣ_i$, $R_{i+1}$ ]"),
    block(14, 504, 22, 52, kind="G"),
    block(36, 504, 56, 52, "$R_{i+1}$", kind="O"),
    arrow("92 530 H140"),
    box(140, 510, 56, 40, "SVD", "(G6)"),
    arrow("196 530 H244"),
    block(244, 504, 22, 52, kind="G"),
    block(266, 504, 56, 52, "cut"),
    words(272, 496, "at $γ_0$", at="start"),
    '<path d="M266 490 V564" stroke="currentColor" stroke-width="2"/>',
    words(255, 576, "$U_{i+1}Σ_{i+1}$"),
    arrow("255 584 V602 H25 V558", "next chunk; $R_{i+1}$ is thrown away", (30, 618),
        anchor="start"),
    arrow("255 602 H284"),
    box(284, 574, 110, 56, "at the end", "it stands for $R$", "in G1 to G3"),
]
# fmt: on


# ----------------------------------------------------------------------------------------- the book
PLACES = {  # of the chapters: left edge, top, width, and the method's letter
    1: (18, 6, 116, ""), 2: (158, 6, 224, ""), 3: (18, 88, 116, "D"), 5: (142, 88, 116, "C"),
    6: (266, 88, 116, "O"), 4: (18, 170, 116, "D"), 7: (266, 170, 116, "O"),
    8: (266, 252, 116, "O"), 9: (18, 334, 116, ""), 10: (158, 334, 224, ""),
}  # fmt: skip
NEEDS = {  # which chapter needs which: the way of the arrow from it
    (3, 2): "178 62 V75 H76 V88", (5, 2): "200 62 V88", (8, 2): "382 34 H392 V280 H382",
    (4, 3): "76 144 V170", (7, 6): "324 144 V170", (8, 7): "324 226 V252",
    (9, 1): "18 34 H8 V362 H18", (10, 4): "76 226 V317 H180 V334", (10, 5): "200 144 V334",
    (10, 8): "324 308 V334", (10, 9): "134 362 H158",
}  # fmt: skip
METHODS = {"D": "DiffusionAD", "C": "DeCo-Diff", "O": "One-for-More"}


def whole_book(titles: dict[int, str], pages: dict[int, str]) -> list[str]:
    """The chapters, by number, with links to their pages, and an arrow from each that is needed."""
    parts = [arrow(way) for way in NEEDS.values()]
    for number, (x, y, width, kind) in PLACES.items():
        lines = textwrap.wrap(f"{number} {titles[number].split(':')[0]}", width // 7)
        drawn = box(x, y, width, 56, *lines, kind=kind)
        parts.append(f'<a href="../notebooks/{pages[number]}.html">{drawn}</a>')
    for k, (kind, name) in enumerate(METHODS.items()):
        parts += [box(18 + 124 * k, 412, 12, 12, kind=kind)]
        parts += [words(36 + 124 * k, 422, name, at="start")]
    return parts


CARD_6 = [
    '<path d="M30 58 L164 12" stroke="#b4619f" stroke-width="2"/>',
    arrow("54 50 L104 10"),
    arrow("54 50 L126.3 25.2", kind="G", dashed=True),
    arrow("54 50 L41 17", kind="D"),
]
CARD_7 = [
    block(20, 10, 14, 44, kind="G"), block(34, 10, 40, 44, kind="O"),
    arrow("82 32 H118", kind="D"),
    block(126, 10, 18, 44, kind="G"), block(144, 10, 30, 44, kind="D"),
]  # fmt: skip


# ------------------------------------------------------------------------------------- the emblem
ACCENT, ACCENT_DARK, BETWEEN = "#0b7285", "#5cc5d9", "#1a8ba1"  # on light, on dark, on either
TAB = f"{ACCENT} }} @media (prefers-color-scheme: dark) {{ svg {{ fill: {ACCENT_DARK} }}"
NOISE = ((47, 14, 2.6), (52, 9, 1.7), (54, 16, 1.9), (46, 8, 1.4), (58, 11, 1.2), (51, 21, 1.3))


def emblem(look: str) -> list[str]:
    """A gear of eight teeth, of which one is still noise; the look is its colours."""
    around = []
    for tooth in range(8):
        far = 21 if tooth == 7 else 29
        for turn, radius in ((-14, 21), (-10, far), (10, far), (14, 21)):
            angle = math.radians(45 * tooth + turn)
            around.append(
                f"{32 + radius * math.cos(angle):.1f} {32 + radius * math.sin(angle):.1f}"
            )
    hole = "M32 23 a9 9 0 1 0 0.01 0 Z"
    dots = [f'<circle cx="{x}" cy="{y}" r="{r}"/>' for x, y, r in NOISE]
    gear = f'<path fill-rule="evenodd" d="M{" L".join(around)} Z {hole}"/>'
    return [f"<style>svg {{ fill: {look} }}</style>", gear, *dots]


# ------------------------------------------------------------------------------------ all drawings
def drawings() -> dict[str, str]:
    """File name and text of each drawing; the address of a picture in it is its name."""
    notebooks = sorted(Path(__file__).parents[1].glob("notebooks/[0-9]*.ipynb"))
    titles = {int(n.name[:2]): headline(n)[0] for n in notebooks}
    pages = {int(n.name[:2]): n.stem for n in notebooks}
    return {
        "diffusion_ad.svg": svg(DIFFUSION_AD, 400, 742, "DiffusionAD, from image to map"),
        "deco_diff.svg": svg(DECO_DIFF, 400, 606, "DeCo-Diff, training and inference"),
        "one_for_more.svg": svg(ONE_FOR_MORE, 400, 796, "One-for-More, training and inference"),
        "gradient_projection.svg": svg(GRADIENT_PROJECTION, 400, 638, "Gradient projection"),
        "whole_book.svg": svg(whole_book(titles, pages), 400, 430, "The chapters of the book"),
        "card_06.svg": svg(CARD_6, 194, 64, "A step and its two parts"),
        "../static/logo.svg": svg(emblem(BETWEEN), 64, 64, "A gear, one tooth still noise"),
        "../static/favicon.svg": svg(emblem(TAB), 64, 64, "A gear, one tooth still noise"),
        "card_07.svg": svg(CARD_7, 194, 64, "A basis takes in a chunk"),
    }


def main() -> None:
    """Write them into `book/images`, with the pictures that the shipped detectors see."""
    from story import inline, pictures

    seen = {name: inline(image) for name, image in pictures().items()}
    for name, text in drawings().items():
        (IMAGES / name).write_text(put_in(text, seen))


if __name__ == "__main__":
    main()
