"""The house: which rooms the package has, who imports whom, and a drawing of it for the book.

Everything is read from the code at hand, so the page *Design* cannot drift from it, and
`tests/test_house.py` holds the house to its rules with the same functions.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "diffad_ref"
DOORS = ("__init__", "__main__")  # they lead in and out, and hold nothing


@dataclass(frozen=True)
class Room:
    """A file of the flat part: its lines, the rooms that it imports, and what it is for."""

    name: str
    lines: int
    imports: tuple[str, ...]
    purpose: str


def imports_of(path: Path) -> set[str]:
    """What a file of the package imports from the package, such as "data" or "tools.toy"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "diffad_ref":
                found |= {alias.name for alias in node.names}
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    inside = {name.removeprefix("diffad_ref.") for name in found if name.startswith("diffad_ref.")}
    return inside | {name for name in found if (PACKAGE / f"{name}.py").exists()}


def rooms() -> dict[str, Room]:
    """The rooms of the flat part, by name, without the doors."""
    found = {}
    for path in sorted(PACKAGE.glob("*.py")):
        if path.stem not in DOORS:
            text = path.read_text("utf-8")
            purpose = ast.get_docstring(ast.parse(text)).splitlines()[0]
            imports = tuple(sorted(imports_of(path)))
            found[path.stem] = Room(path.stem, len(text.splitlines()), imports, purpose)
    return found


def floors(house: dict[str, Room]) -> list[list[str]]:
    """Names by floor, from the ground: each room stands above all that it imports.

    Raises ValueError if some rooms import each other in a circle.
    """
    level: dict[str, int] = {}
    while len(level) < len(house):
        ready = [n for n, r in house.items() if n not in level and set(r.imports) <= level.keys()]
        if not ready:
            raise ValueError(f"a circle among {sorted(house.keys() - level.keys())}")
        below = dict(level)
        level |= {n: 1 + max((below[i] for i in house[n].imports), default=-1) for n in ready}
    return [sorted(n for n in level if level[n] == k) for k in range(1 + max(level.values()))]


BOX, HIGH, GAP, STOREY = 128, 46, 18, 104  # pixels


def drawing(house: dict[str, Room]) -> str:
    """The house as SVG: a box a room, an arrow from each room to what it imports."""
    storeys = floors(house)
    widest = max(map(len, storeys))
    width, height = widest * (BOX + GAP) + GAP, len(storeys) * STOREY + 16
    place = {}
    for floor, names in enumerate(storeys):
        left = (width - len(names) * (BOX + GAP) + GAP) / 2
        for k, name in enumerate(names):
            place[name] = left + k * (BOX + GAP), height - (floor + 1) * STOREY + STOREY - HIGH - 8
    arrows, boxes = [], []
    for name, room in house.items():
        x, y = place[name]
        for other in room.imports:
            to_x, to_y = place[other][0] + BOX / 2, place[other][1]
            from_x, from_y = x + BOX / 2, y + HIGH
            bend = (to_y - from_y) / 2
            arrows.append(
                f'<path d="M{from_x:.0f} {from_y:.0f} C{from_x:.0f} '
                f'{from_y + bend:.0f} {to_x:.0f} {to_y - bend:.0f} {to_x:.0f} {to_y:.0f}"/>'
            )
        middle = x + BOX / 2
        boxes.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX}" height="{HIGH}" rx="6"/>'
            f'<text x="{middle:.0f}" y="{y + 20:.0f}">{name}</text>'
            f'<text class="lines" x="{middle:.0f}" y="{y + 36:.0f}">{room.lines} lines</text>'
        )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" style="min-width:{width * 0.7:.0f}px" '
        'aria-label="The rooms of the package, floor by floor, and what each imports">'
        + "".join([*arrows, *boxes])
        + "</svg>"
    )


def house_page() -> str:
    """The drawing, and a table with one sentence a room, for the page *Design*."""
    house = rooms()
    lines = sum(len((PACKAGE / f"{n}.py").read_text("utf-8").splitlines()) for n in DOORS)
    lines += sum(room.lines for room in house.values())
    arrows = sum(len(room.imports) for room in house.values())
    rows = ["| Room | Lines | What it is for |", "| :-- | --: | :-- |"]
    for floor in reversed(floors(house)):
        rows += [
            f"| {{py:mod}}`~diffad_ref.{n}` | {house[n].lines} | {house[n].purpose} |"
            for n in floor
        ]
    return (
        f"{len(house)} rooms and two doors, {lines:,} lines, {arrows} imports, "
        f"{len(floors(house))} floors.\n\n"
        f'<div class="house">{drawing(house)}</div>\n\n' + "\n".join(rows) + "\n"
    )
