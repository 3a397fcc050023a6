"""Draw the pictures of the README and of the landing page: `python book/story.py`.

What can be computed is computed, by the shipped detectors on products of the toy factory: the
picture of the README, the correction under a slider, and the pictures on the cards of the chapters.
"""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import diffad_ref as da
from diffad_ref.deco_diff import corrupt, draw_corruption
from diffad_ref.diffusion import Schedule, add_noise
from diffad_ref.one_for_more import paste
from diffad_ref.tools.pages import slider

IMAGES = Path(__file__).parent / "images"
SHOWN = {("gear", "missing", 0): "a tooth is missing", ("capsule", "print", 0): "a wrong letter"}
TITLES = ("what the camera sees", "under noise", "what should be there", "where they differ")
SEED = 3  # of what is drawn for pictures of training
# One defect of each product, for the correction; the kinds are said in the page's caption.
DEFECTS = (
    ("board", "missing", 0),
    ("brick", "patch", 1),
    ("capsule", "hole", 0),
    ("gear", "missing", 1),
    ("grass", "scratch", 0),
    ("gravel", "stain", 1),
)


def products(defects) -> Tensor:
    """Images (N, 3, 64, 64) of (category, kind, number); the kind "good" is no defect."""
    drawn = [da.toy.draw_pair(category, "test", kind, i)[0] for category, kind, i in defects]
    return torch.stack([torch.from_numpy(p).movedim(-1, 0) / 255 for p in drawn])


def heat(maps: Tensor) -> Tensor:
    """Anomaly maps (N, H, W) in colours, (N, 3, H, W), on one scale from 0 to the largest value."""
    colours = plt.get_cmap(da.plots.MAP_COLOURS)((maps / maps.max()).numpy())[..., :3]
    return torch.from_numpy(colours).movedim(-1, 1).float()


def grid(images, columns: int, larger: int = 2, gap: int = 2) -> Image.Image:
    """Images (3, H, W) side by side with a transparent gap, each so many times larger."""
    side = images[0].shape[-1] * larger
    rows = -(-len(images) // columns)
    size = (columns * (side + gap) - gap, rows * (side + gap) - gap)
    sheet = Image.new("RGBA", size)
    for k, image in enumerate(images):
        pixels = (image.clamp(0, 1) * 255).round().byte().movedim(0, -1)
        picture = Image.fromarray(pixels.numpy())
        place = (k % columns) * (side + gap), (k // columns) * (side + gap)
        sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), place)
    return sheet


def webp(picture: Image.Image, quality: int = 82) -> bytes:
    """A picture as it is written into a page."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=quality, method=6)
    return buffer.getvalue()


def inline(picture: Image.Image, quality: int = 82) -> str:
    """A picture as the address of itself."""
    return "data:image/webp;base64," + base64.b64encode(webp(picture, quality)).decode()


# ------------------------------------------------------------------------- what the detectors see
def seen_by_diffusion_ad(x: Tensor) -> dict[str, Tensor]:
    """Every step of noise-to-norm for images (N, 3, 64, 64), with one draw, and the map."""
    detector = da.pretrained("diffusion_ad_toy")
    with torch.no_grad():
        steps = detector.reconstruct(x, torch.Generator().manual_seed(0))
    found = detector.predict(x)
    abar = detector.schedule.at(torch.full((len(x),), detector.config.t_s))
    small = (steps.x_s - (1 - abar).sqrt() * steps.eps_s) / abar.sqrt()
    return vars(steps) | {"x": x, "x0_s": small, "map": heat(found.anomaly_map)}


def seen_by_deco_diff(x: Tensor, categories) -> dict[str, Tensor | list]:
    """Decoded latents of images (N, 3, 64, 64) at the start and after each step, and the maps."""
    detector = da.pretrained("deco_diff_toy")
    index = torch.tensor([detector.categories.index(name) for name in categories])
    with torch.no_grad():
        z_0 = detector.codec.encode(x)
        states = [z_0, *detector.reconstruct(z_0, index)]
        found = detector.compare(z_0, states[-1])
        shown = [detector.codec.picture(detector.codec.decode(z)).clamp(0, 1) for z in states]
    parts = {name: heat(found.parts[f"{name}_discrepancy"]) for name in ("image", "latent")}
    return {"x": x, "states": shown, "map": heat(found.anomaly_map)} | parts


def seen_by_one_for_more(x: Tensor) -> dict[str, Tensor]:
    """What the condition's walk starts from and paints, and the maps, for images (N, 3, 64, 64)."""
    detector = da.pretrained("one_for_more_toy_3")
    found = detector.predict(x, generator=torch.Generator().manual_seed(0))
    codec, noise = detector.codec, torch.Generator().manual_seed(0)
    with torch.no_grad():
        z_0 = codec.encode(x)
        level = detector.schedule.at(torch.full((len(x),), 501))
        z_t = add_noise(z_0, torch.randn(z_0.shape, generator=noise), level)
        noised = codec.picture(codec.decode(z_t)).clamp(0, 1)
    decoded = found.parts["decoded"]
    seen = {"z": decoded, "z_T": noised, "rebuilt": found.reconstruction}
    return seen | {"x": x, "decoded": decoded, "map": heat(found.anomaly_map)}


def pictures() -> dict[str, Image.Image]:
    """What `schematics.py` puts into its drawings, by the names that these use."""
    gear, brick, board = ("gear", "missing", 0), ("brick", "patch", 1), ("board", "missing", 0)
    good = products([(category, "good", 0) for category, _, _ in (gear, brick, board)])
    a = {f"a_{k}": v[0] for k, v in seen_by_diffusion_ad(products([gear])).items()}
    c, train = seen_by_deco_diff(products([brick]), ["brick"]), in_training_of_deco_diff(good)
    o = {f"o_{k}": v[0] for k, v in seen_by_one_for_more(products([board])).items()}
    pair, mask = a_synthetic_defect(good[0])
    a |= {"a_normal": good[0], "a_pasted": pair, "a_mask": mask}
    c = {"c_defect": c["x"][0], "c_start": c["states"][0][0], "c_corrected": c["states"][-1][0]} | {
        f"c_{name}": c[name][0] for name in ("image", "latent", "map")
    }
    c |= {f"c_{name}": image for name, image in train.items()}
    o |= {f"o_{name}": image for name, image in in_training_of_one_for_more(good).items()}
    return {name: grid([image], 1, larger=1).convert("RGB") for name, image in (a | c | o).items()}


def a_synthetic_defect(x: Tensor) -> tuple[Tensor, Tensor]:
    """A normal image (3, 64, 64) with an anomaly, and its mask, as DiffusionAD trains (D12)."""
    detector, generator = da.pretrained("diffusion_ad_toy"), torch.Generator().manual_seed(SEED)
    surface = torch.zeros(64, dtype=torch.bool)
    batch = {"image": x.expand(64, -1, -1, -1), "texture": surface}
    images, masks, _ = detector.with_anomalies(batch, generator)
    most = int((images - x).abs().flatten(1).sum(1).argmax())
    return images[most], masks[most].expand(3, -1, -1)


def in_training_of_deco_diff(x: Tensor) -> dict[str, Tensor]:
    """Image, mask, disturbance and corrupted latent of a brick, decoded (C1, C2)."""
    detector, generator = da.pretrained("deco_diff_toy"), torch.Generator().manual_seed(SEED)
    codec = detector.codec
    with torch.no_grad():
        z_0 = codec.encode(x)
        settings = replace(
            detector.config.corruption, mask_ratio=(0.4, 0.4), patch_odds=(0, 0, 1, 0)
        )
        m, eps = draw_corruption(z_0, settings, generator)
        z_t = corrupt(z_0, eps, m, detector.schedule.at(torch.full((len(x),), 6)))
        shown = {
            k: codec.picture(codec.decode(z)) for k, z in dict(z_0=z_0, eps=eps, z_t=z_t).items()
        }
    shown |= {"x": x, "m": F.interpolate(m, x.shape[-2:]).expand(-1, 3, -1, -1)}
    return {name: images[1] for name, images in shown.items()}


def in_training_of_one_for_more(x: Tensor) -> dict[str, Tensor]:
    """Image, pasted image, latent and noised latent of a board, decoded."""
    detector, generator = da.pretrained("one_for_more_toy_3"), torch.Generator().manual_seed(SEED)
    codec = detector.codec
    pasted = paste(x, replace(detector.config.pasting, share=1.0, size=(0.15, 0.25)), generator)
    with torch.no_grad():
        z_0 = codec.encode(x)
        z_t = add_noise(
            z_0,
            torch.randn(z_0.shape, generator=generator),
            detector.schedule.at(torch.full((len(x),), 300)),
        )
        shown = {k: codec.picture(codec.decode(z)) for k, z in dict(z_0=z_0, z_t=z_t).items()}
    shown |= {"normal": x, "pasted": pasted}
    return {name: images[2] for name, images in shown.items()}


# ----------------------------------------------------------------------------------- the pictures
def readme_picture() -> None:
    """Two products of the toy factory, as DiffusionAD sees them."""
    detector = da.pretrained("diffusion_ad_toy")
    images = products(SHOWN)
    found = detector.predict(images)
    rows = torch.stack(
        [images, found.parts["noised"], found.reconstruction, heat(found.anomaly_map)], 1
    )
    with plt.rc_context(da.plots.STYLE):
        figure, axes = plt.subplots(2, 4, figsize=(8.8, 4.7), layout="constrained")
    plt.close(figure)
    for line, pictures, words in zip(axes, rows, SHOWN.values(), strict=True):
        line[0].set_ylabel(words, fontsize=12)
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture.clamp(0, 1).movedim(0, -1))
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    for axis, title in zip(axes[0], TITLES, strict=True):
        axis.set_title(title, fontsize=12)
    figure.savefig(IMAGES / "story.png", dpi=110, metadata={"Software": None})


def correction() -> None:
    """DeCo-Diff at work on a defect of each product, step by step, under a slider."""
    seen = seen_by_deco_diff(products(DEFECTS), [category for category, _, _ in DEFECTS])
    labels = ["start", *(f"after t = {t}" for t in (8, 6, 4, 2, 0)), "map"]
    frames = [grid(shown, 3, larger=1) for shown in [*seen["states"], seen["map"]]]
    page = slider([np.asarray(frame) / 255 for frame in frames], labels, "Correction, step by step")
    (IMAGES / "correction.html").write_text(page.text + "\n")


def card_pictures() -> None:
    """Three small pictures for each chapter that has pictures; `schematics.py` draws the others."""
    gear, board = ("gear", "missing", 1), ("board", "missing", 0)
    pair = da.toy.draw_pair("gear", "test", "missing", 1)
    image, normal = products([gear, board]), torch.from_numpy(pair[1]).movedim(-1, 0) / 255
    mask = torch.from_numpy(pair[2] / 255).expand(3, -1, -1)
    a = seen_by_diffusion_ad(torch.cat([products(SHOWN), image]))
    c = seen_by_deco_diff(products(DEFECTS), [category for category, _, _ in DEFECTS])
    o = seen_by_one_for_more(image)
    noisier = [noised(image[1:], t)[0] for t in (300, 60)]
    marked = (c["map"][0].mean(0) > 0.4).float().expand(3, -1, -1)
    strips = {
        1: [normal, image[0], mask],
        2: [*noisier, image[1]],
        3: [a["x"][0], a["x_s"][0], a["x0_s"][0]],
        4: [a["x0_s"][1], a["x0_b"][1], a["x0_g"][1]],
        5: [c["states"][k][0] for k in (0, 3, 5)],
        8: [image[1], o["rebuilt"][1], o["map"][1]],
        9: [c["x"][0], c["map"][0], marked],
        10: [a["map"][3], c["map"][0], o["map"][1]],
    }
    for number, pictures in strips.items():
        (IMAGES / f"card_{number:02}.webp").write_bytes(webp(grid(pictures, 3), 70))


def noised(x: Tensor, t: int) -> Tensor:
    """Images at a level of DiffusionAD's schedule (D1)."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return add_noise(x, noise, Schedule.named("linear", 1000).at(torch.full((len(x),), t)))


def main() -> None:
    """Write all of them into `book/images`."""
    IMAGES.mkdir(exist_ok=True)
    readme_picture()
    correction()
    card_pictures()


if __name__ == "__main__":
    main()
