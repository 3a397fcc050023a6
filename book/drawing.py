"""A language for drawings: boxes, pictures, arrows and words, each a piece of SVG.

A drawing has 400 units across, which is about a phone's width. Lines and words have the colour of
the page around them, so that they can be read on a light page and on a dark one.
"""

from __future__ import annotations

import re
from xml.sax.saxutils import escape

# The methods by their letters, and the memory G; each has a contrast of 3 : 1 to either page.
COLOURS = {"D": "#2484c6", "C": "#d9741a", "O": "#0f9d74", "G": "#b4619f", "": "currentColor"}
SMALL, SIDE = 11, 56  # the smallest letters, and the side of a picture


def words(x, y, *lines, at="middle", size=13, bold=False) -> str:
    """Lines of text; `$x_0$` is mathematics, the first baseline is at y."""
    weight = ' font-weight="600"' if bold else ""
    return "".join(
        f'<text x="{x:g}" y="{y + 15 * k:g}" text-anchor="{at}" font-size="{size}"{weight}>'
        f"{_rich(line)}</text>"
        for k, line in enumerate(lines)
    )


def _rich(line: str) -> str:
    """Outside of dollar signs as it is; inside, letters in italics, and `_` and `^` shift."""
    found, back = "", 0
    for k, part in enumerate(line.split("$")):
        pieces = re.findall(r"([_^]?)(?:\{(.+?)\}|([^_^]+?(?=[_^]|$)|.))", part) if k % 2 else []
        for mark, group, run in pieces or [("", "", part)]:
            one, rest = (run[:1], run[1:]) if mark and not group else (group or run, "")
            for text, shift in ((one, {"_": 3, "^": -4, "": 0}[mark]), (rest, 0)):
                if text:
                    found += _shifted(text, shift - back, bool(shift), k % 2)
                    back = shift
    return found


def _shifted(text: str, by: int, small: bool, slanted: int) -> str:
    found = ""
    for k, piece in enumerate(re.split(r"([^\W\d_][\u0300-\u036f]*)", text) if slanted else [text]):
        look = (f' dy="{by}"' if by else "") + (f' font-size="{SMALL}"' if small else "")
        look += ' font-style="italic"' if k % 2 else ""
        if piece:
            found, by = (
                found + (f"<tspan{look}>{escape(piece)}</tspan>" if look else escape(piece)),
                0,
            )
    return found


def box(x, y, width, height, *lines, kind="", size=13, bold=False) -> str:
    """A rectangle with lines of text in its middle; the kind is a method's letter."""
    colour = COLOURS[kind]
    middle = y + height / 2 + 4.5 - 7.5 * (len(lines) - 1)
    first = words(x + width / 2, middle, *lines[:1], size=size, bold=bold)
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{colour}" '
        f'fill-opacity="{0.16 if kind else 0.06}" stroke="{colour}"/>'
        + first
        + words(x + width / 2, middle + 15, *lines[1:], size=size)
    )


def picture(x, y, name, label="", where="above") -> str:
    """A picture around (x, y) with a label above or below it; `put_in` replaces its name."""
    half = SIDE / 2
    label_y = y - half - 6 if where == "above" else y + half + 14
    place = f'x="{x - half:g}" y="{y - half:g}" width="{SIDE}" height="{SIDE}"'
    return (
        f'<image {place} href="picture:{name}"/><rect {place} fill="none" '
        f'stroke="currentColor" stroke-opacity="0.4"/>'
        + (words(x, label_y, label) if label else "")
    )


def arrow(way, label="", at=None, kind="", anchor="middle", dashed=False) -> str:
    """A line along a way such as "66 70 H94 V40", with a tip at its end, and a label beside it."""
    x, y = map(float, way.split()[:2])
    for step, a, b in re.findall(r"([HVL])(-?[\d.]+) ?(-?[\d.]+)?", way):
        before, a = (x, y), float(a)
        x, y = (a, y) if step == "H" else (x, a) if step == "V" else (a, float(b))
    length = ((x - before[0]) ** 2 + (y - before[1]) ** 2) ** 0.5
    u, v = (x - before[0]) / length, (y - before[1]) / length
    wings = [(x - 7 * u - s * 3.5 * v, y - 7 * v + s * 3.5 * u) for s in (1, -1)]
    tip = " ".join(f"{p:.1f},{q:.1f}" for p, q in [(x, y), *wings])
    colour = COLOURS[kind]
    look = ' stroke-dasharray="4 3"' if dashed else ""
    return (
        f'<path d="M{way}" fill="none" stroke="{colour}" stroke-width="1.4"{look}/>'
        f'<polygon points="{tip}" fill="{colour}"/>'
        + (words(*at, label, at=anchor, size=12) if at else "")
    )


def title(y, text) -> str:
    """What the part of the drawing below it is about; a line sets it apart from the one above."""
    line = f'<path d="M6 {y - 20} H394" stroke="currentColor" stroke-opacity="0.25"/>'
    return (line if y > 20 else "") + words(6, y, text, at="start", size=14, bold=True)


def block(x, y, width, height, label="", kind="") -> str:
    """A matrix, as high as it has rows and as wide as it has columns."""
    return box(x, y, width, height, *([label] if label else []), kind=kind).replace(
        'rx="6"', 'rx="1"'
    )


def svg(parts, width, height, name) -> str:
    """A drawing that may stand in a page or alone."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'font-family="sans-serif" fill="currentColor"><title>{escape(name)}</title>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def put_in(drawing: str, pictures: dict[str, str]) -> str:
    """A drawing with the addresses of its pictures in place of their names."""
    return re.sub(r"picture:(\w+)", lambda found: pictures[found[1]], drawing)
