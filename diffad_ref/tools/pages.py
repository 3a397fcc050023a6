"""What a page shows beside figures: a slider over pictures, and code of the package.

Pictures become SVG that takes the colours of the page around it, light or dark, and that no
browser has to fetch.
"""

from __future__ import annotations

import base64
import html
import inspect
import io
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
_COLOURS = {"#000000": "currentColor", "#ffffff": "var(--pst-color-background, #fff)"}
_PNG = re.compile(r"data:image/png;base64,([^\"]+)")


@dataclass(frozen=True)
class Page:
    """A piece of HTML that notebooks and the book display."""

    text: str = field(repr=False)

    def _repr_html_(self) -> str:
        return self.text


@dataclass(frozen=True)
class Listing:
    """Python code that notebooks and the book display in their own colours."""

    text: str = field(repr=False)

    def _repr_markdown_(self) -> str:
        return f"```python\n{self.text}\n```"


def source(*objects) -> Listing:
    """Show the source of functions or classes: a page that shows it cannot drift from it."""
    parts, last = [], None
    for thing in objects:
        file = Path(inspect.getsourcefile(thing)).relative_to(ROOT).as_posix()
        parts += [inspect.getsource(thing).rstrip()] if file == last else []
        parts += [] if file == last else [f"# {file}\n{inspect.getsource(thing).rstrip()}"]
        last = file
    return Listing("\n\n\n".join(parts))


def slider(frames, labels, title: str = "", start: int = 0) -> Page:
    """Leaf through pictures with a slider that works in a page without a kernel.

    Parameters
    ----------
    frames : sequence of Figure, or of images (3, H, W), (1, H, W) or (H, W) in [0, 1]
        All are embedded, so keep them few and small.
    labels : sequence of str
        What each frame shows, such as "t = 200"; also its text for screen readers.
    title : str
        Stands above, and names the slider for screen readers.
    start : int
        The frame that is shown first.

    Returns
    -------
    Page
        Displays itself at the end of a cell. Arrow keys move the slider; there is no script
        beyond the slider's own handler, and without it the first frame is shown.

    Raises
    ------
    ValueError
        No frames, not one label for each, or no frame `start`.
    """
    frames, labels = list(frames), [html.escape(str(label)) for label in labels]
    if not frames or len(frames) != len(labels):
        found = f"{len(frames)} frames, {len(labels)} labels"
        raise ValueError(f"need one label for each frame: {found}")
    if not 0 <= start < len(frames):
        raise ValueError(f"start is the number of a frame, from 0 to {len(frames) - 1}")
    name, pictures = html.escape(title or "frame"), []
    for i, (frame, label) in enumerate(zip(frames, labels, strict=True)):
        text = f"{html.escape(title)}: {label}" if title else label
        hidden = "" if i == start else " hidden"
        pictures.append(f'<div data-label="{label}"{hidden}>{picture(frame, text)}</div>')
    heading = f'<div class="slider-title" style="text-align:center"><b>{name}</b></div>'
    return Page(
        '<div class="diffad-slider" style="max-width:100%;margin:0.5em 0">'
        f"{heading if title else ''}"
        f'<div class="frames">{"".join(pictures)}</div>'
        '<div style="display:flex;gap:1em;align-items:center;max-width:640px;margin:0.4em auto">'
        f'<input type="range" min="0" max="{len(frames) - 1}" step="1" value="{start}" '
        f'autocomplete="off" aria-label="{name}" aria-valuetext="{labels[start]}" '
        f'style="flex:1;height:2.2em" oninput="{_HANDLER}">'
        f'<output style="min-width:7em;font-variant-numeric:tabular-nums">{labels[start]}</output>'
        "</div></div>"
    )


# `this` is the slider: it finds its own frames, so any number of them can stand on a page.
_HANDLER = (
    "const box=this.closest('.diffad-slider'),shown=+this.value;"
    "box.querySelectorAll('.frames > div').forEach((frame,i)=>{"
    "frame.hidden=i!==shown;"
    "if(i===shown){this.setAttribute('aria-valuetext',frame.dataset.label);"
    "box.querySelector('output').textContent=frame.dataset.label;}});"
)


def picture(frame, text: str) -> str:
    """A figure or an image as HTML that carries its picture in it; `text` describes it."""
    if isinstance(frame, Figure):
        buffer = io.StringIO()
        with plt.rc_context({"svg.hashsalt": "diffad_ref"}):
            frame.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        return themed(buffer.getvalue(), text)
    pixels = np.asarray(frame.detach().cpu() if hasattr(frame, "detach") else frame)
    pixels = pixels.transpose(1, 2, 0) if pixels.ndim == 3 and pixels.shape[0] in (1, 3) else pixels
    image = Image.fromarray((pixels.squeeze().clip(0, 1) * 255).round().astype(np.uint8))
    look = "display:block;margin:0 auto;width:20em;max-width:100%;image-rendering:pixelated"
    return f'<img src="{_encoded(image)}" alt="{text}" style="{look}">'


def themed(svg: str, text: str) -> str:
    """A matplotlib figure, as SVG, in the colours of the page that it is put into.

    Black becomes the colour of text, white that of the page. The picture is as wide as its
    column allows, up to a size at which its labels are as large as text.
    """
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = _PNG.sub(lambda found: _smaller(found[1]), svg)
    for colour, name in _COLOURS.items():
        svg = svg.replace(colour, name)
    wide, high = re.search(r'viewBox="[\d.e-]+ [\d.e-]+ ([\d.]+) ([\d.]+)"', svg).groups()
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    own = f"f{zlib.crc32(svg.encode()):08x}-"  # two pictures of a page share no id
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{own}{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{own}", svg)
    look = f"display:block;margin:0 auto;width:100%;height:auto;max-width:{1.6 * float(wide):.0f}px"
    role = "group" if "<a " in svg else "img"  # of what can be clicked, a reader wants the parts
    head = f'<svg class="figure" role="{role}" aria-label="{text}" style="{look}" '
    head += f'viewBox="0 0 {wide} {high}" fill="currentColor" xmlns="http://www.w3.org/2000/svg" '
    head += 'xmlns:xlink="http://www.w3.org/1999/xlink">'
    return re.sub(r">\s+<", "><", head + svg[svg.index(">") + 1 :])


def _smaller(encoded: str) -> str:
    """A PNG of a picture as WebP; what has few colours stays exact."""
    data = base64.b64decode(re.sub(r"\s|%0A", "", encoded))
    image = Image.open(io.BytesIO(data))
    found = _encoded(image)
    return found if len(found) < len(encoded) + 22 else f"data:image/png;base64,{encoded}"


def _encoded(image: Image.Image) -> str:
    buffer = io.BytesIO()
    few = image.convert("RGBA").getcolors(64) is not None
    image.save(buffer, "WEBP", quality=90, lossless=few, method=6)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
