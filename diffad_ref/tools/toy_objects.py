"""The three rendered products of the toy factory: gear, capsule and circuit board.

A product is a frozen set of drawn numbers (pose, colours, and what is broken); `render` turns it
into pixels. Breaking a part changes one number, so that the same scene can be drawn with and
without the defect. Coordinates run from -1 to 1 over the image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

Point = tuple[float, float]


class Canvas:
    """A square image and a mask of what belongs to the product, drawn in one pose."""

    def __init__(self, size: int, background: np.ndarray, pose: Pose):
        self.size, self.pose = size, pose
        self.image = Image.new("RGB", (size, size), _rgb(background))
        self.product = Image.new("1", (size, size))
        self._pens = [ImageDraw.Draw(self.image), ImageDraw.Draw(self.product)]

    def polygon(self, points: np.ndarray, colour: np.ndarray) -> None:
        """Fill a polygon (N, 2) given in the product's own coordinates."""
        pixels = [tuple(p) for p in (self.pose.place(np.asarray(points)) + 1) / 2 * self.size]
        self._pens[0].polygon(pixels, fill=_rgb(colour))
        self._pens[1].polygon(pixels, fill=1)

    def disc(self, centre: Point, radius: float, colour: np.ndarray) -> None:
        """Fill a circle."""
        a = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        self.polygon(centre + radius * np.stack([np.cos(a), np.sin(a)], 1), colour)

    def box(self, centre: Point, half: Point, colour: np.ndarray, turn: float = 0.0) -> None:
        """Fill a rectangle of half-widths `half`, turned about its centre."""
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half
        self.polygon(corners @ _rotation(turn) + centre, colour)

    def stroke(self, path: np.ndarray, width: float, colour: np.ndarray) -> None:
        """Draw a polyline with round ends."""
        path = np.asarray(path, float)
        for a, b in zip(path[:-1], path[1:], strict=True):
            along = (b - a) / np.hypot(*(b - a)) * width / 2
            across = np.array([-along[1], along[0]])
            self.polygon(np.array([a + across, b + across, b - across, a - across]), colour)
        for point in path:
            self.disc(tuple(point), width / 2, colour)

    def pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """The image (size, size, 3) in [0, 1] and the product's mask (size, size)."""
        return np.asarray(self.image, np.float64) / 255, np.asarray(self.product)


@dataclass(frozen=True)
class Pose:
    """Where the product lies: turned, scaled, then shifted."""

    turn: float
    scale: float
    shift: Point

    def place(self, points: np.ndarray) -> np.ndarray:
        return points @ _rotation(self.turn) * self.scale + self.shift

    @staticmethod
    def draw(rng: np.random.Generator, turn: float, scale: Point, shift: float) -> Pose:
        """A random pose: up to `turn` degrees, a range of scales, up to `shift` per axis."""
        dx, dy = rng.uniform(-shift, shift, 2)
        return Pose(np.deg2rad(rng.uniform(-turn, turn)), rng.uniform(*scale), (dx, dy))


@dataclass(frozen=True)
class Gear:
    """Nine teeth, a bore with a keyway and one marked hole: no two directions look alike."""

    pose: Pose
    metal: np.ndarray
    bench: np.ndarray
    missing: tuple[int, ...] = ()  # teeth that broke off
    bent: tuple[int, float] | None = None  # a tooth and how far it leans, in radians

    TEETH = 9

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Gear:
        metal = np.array([0.66, 0.62, 0.52]) * rng.uniform(0.85, 1.1) + rng.uniform(-0.04, 0.04, 3)
        bench = np.array([0.13, 0.16, 0.22]) + rng.uniform(-0.04, 0.04, 3)
        return cls(Pose.draw(rng, 180, (0.86, 1.0), 0.08), metal, bench)

    def broken(self, kind: str, rng: np.random.Generator) -> Gear | None:
        tooth = int(rng.integers(self.TEETH))
        if kind == "missing":
            second = ((tooth + 1) % self.TEETH,) if rng.random() < 0.5 else ()
            return replace(self, missing=(tooth, *second))
        if kind == "bent":
            return replace(self, bent=(tooth, rng.choice([-1, 1]) * rng.uniform(0.5, 0.8)))
        return None

    def render(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        canvas = Canvas(size, self.bench, self.pose)
        for i in range(self.TEETH):
            if i in self.missing:
                continue
            lean = self.bent[1] if self.bent and self.bent[0] == i else 0.0
            tooth = np.array([[0.5, -0.17], [0.88, -0.12], [0.88, 0.12], [0.5, 0.17]])
            foot = np.array([0.6, 0.0])
            tooth = (tooth - foot) @ _rotation(lean) + foot
            canvas.polygon(tooth @ _rotation(2 * np.pi * i / self.TEETH), self.metal * 0.92)
        canvas.disc((0, 0), 0.64, self.metal)
        canvas.disc((0, 0), 0.50, self.metal * 0.8)
        canvas.disc((0, 0), 0.24, self.bench * 0.8)
        canvas.box((0.26, 0), (0.07, 0.07), self.bench * 0.8)  # keyway
        for i, colour in enumerate(([0.85, 0.25, 0.15], self.metal * 0.45, self.metal * 0.45)):
            a = 2 * np.pi * (i + 0.5) / 3
            canvas.disc((0.38 * np.cos(a), 0.38 * np.sin(a)), 0.085, np.asarray(colour))
        return canvas.pixels()


# Glyphs as strokes on a 2 x 4 grid: no font file, the same pixels everywhere.
GLYPHS = {
    "A": [[(0, 4), (0, 1), (1, 0), (2, 1), (2, 4)], [(0, 2.4), (2, 2.4)]],
    "7": [[(0, 0), (2, 0), (0.7, 4)]],
    "K": [[(0, 0), (0, 4)], [(2, 0), (0.1, 2.1), (2, 4)]],
    "E": [[(2, 0), (0, 0), (0, 4), (2, 4)], [(0, 2), (1.6, 2)]],
    "O": [[(0, 0), (2, 0), (2, 4), (0, 4), (0, 0)]],
    "X": [[(0, 0), (2, 4)], [(2, 0), (0, 4)]],
    "H": [[(0, 0), (0, 4)], [(2, 0), (2, 4)], [(0, 2), (2, 2)]],
    "T": [[(0, 0), (2, 0)], [(1, 0), (1, 4)]],
    "L": [[(0, 0), (0, 4), (2, 4)]],
}


@dataclass(frozen=True)
class Capsule:
    """Two coloured halves with the print A7K."""

    pose: Pose
    halves: np.ndarray  # (2, 3)
    table: np.ndarray
    text: str = "A7K"

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Capsule:
        halves = np.array([[0.86, 0.45, 0.32], [0.92, 0.88, 0.78]])
        halves = halves + rng.uniform(-0.05, 0.05, (2, 3))
        table = np.array([0.32, 0.36, 0.42]) + rng.uniform(-0.05, 0.05, 3)
        return cls(Pose.draw(rng, 25, (0.88, 1.0), 0.08), halves, table)

    def broken(self, kind: str, rng: np.random.Generator) -> Capsule | None:
        if kind != "print":
            return None
        place = int(rng.integers(3))
        others = [g for g in GLYPHS if g not in "A7K"] + [" "]
        wrong = str(rng.choice(others))
        return replace(self, text=self.text[:place] + wrong + self.text[place + 1 :])

    def render(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        canvas = Canvas(size, self.table, self.pose)
        (left, right), r, reach = self.halves, 0.42, 0.46
        canvas.disc((-reach, 0), r, left)
        canvas.box((-reach / 2, 0), (reach / 2, r), left)
        canvas.disc((reach, 0), r, right)
        canvas.box((reach / 2, 0), (reach / 2, r), right)
        canvas.box((0, -0.27), (reach, 0.05), np.minimum((left + right) / 2 + 0.12, 1))  # gloss
        for letter, x in zip(self.text, (-0.5, 0.0, 0.5), strict=True):
            for path in GLYPHS.get(letter, []):
                points = (np.array(path, float) - [1, 2]) * [0.13, 0.11] + [x, 0.07]
                canvas.stroke(points, 0.085, np.array([0.12, 0.10, 0.18]))
        return canvas.pixels()


@dataclass(frozen=True)
class Board:
    """A small circuit board with five parts on their pads."""

    pose: Pose
    green: np.ndarray
    tray: np.ndarray
    shades: np.ndarray  # (5,) brightness of each part
    missing: int | None = None
    bent: tuple[int, float] | None = None  # a part and how far it is turned, in radians

    # centre, half-widths, colour of each part
    PARTS = (
        ((-0.33, -0.22), (0.28, 0.28), (0.10, 0.10, 0.12)),  # chip
        ((0.42, -0.40), (0.19, 0.19), (0.55, 0.60, 0.85)),  # capacitor
        ((0.42, 0.10), (0.26, 0.12), (0.80, 0.62, 0.40)),  # resistor
        ((-0.42, 0.46), (0.20, 0.12), (0.85, 0.82, 0.78)),  # crystal
        ((0.25, 0.50), (0.34, 0.12), (0.93, 0.93, 0.90)),  # connector
    )

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Board:
        green = np.array([0.10, 0.38, 0.22]) + rng.uniform(-0.05, 0.05, 3)
        tray = np.array([0.55, 0.54, 0.52]) + rng.uniform(-0.06, 0.06, 3)
        pose = Pose.draw(rng, 15, (0.92, 1.08), 0.1)
        return cls(pose, green, tray, rng.uniform(0.88, 1.08, len(cls.PARTS)))

    def broken(self, kind: str, rng: np.random.Generator) -> Board | None:
        if kind == "missing":
            return replace(self, missing=int(rng.integers(len(self.PARTS))))
        if kind == "bent":
            part = int(rng.choice([0, 2, 3, 4]))  # a turned disc would look the same
            angle = rng.choice([-1, 1]) * rng.uniform(0.4, 0.8)
            return replace(self, bent=(part, angle))
        return None

    def render(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        canvas = Canvas(size, self.tray, self.pose)
        canvas.box((0, 0), (0.82, 0.72), self.green)
        for x, y in ((-0.72, -0.62), (0.72, -0.62), (-0.72, 0.62), (0.72, 0.62)):
            canvas.disc((x, y), 0.05, np.array([0.85, 0.72, 0.30]))
        for i, (centre, half, colour) in enumerate(self.PARTS):
            for side in (-1, 1):  # the pads stay when a part is lost
                pad = (centre[0] + side * half[0], centre[1])
                canvas.box(pad, (0.06, half[1] * 0.7), np.array([0.80, 0.70, 0.35]))
            if i == self.missing:
                continue
            turn = self.bent[1] if self.bent and self.bent[0] == i else 0.0
            self._part(canvas, i, np.array(centre), half, np.array(colour) * self.shades[i], turn)
        return canvas.pixels()

    @staticmethod
    def _part(canvas, i, centre, half, colour, turn):
        if i == 1:
            canvas.disc(tuple(centre), half[0], colour)
            canvas.disc(tuple(centre), half[0] * 0.6, colour * 0.75)
            return
        canvas.box(tuple(centre), half, colour, turn)

        def mark(x, y, w, h, paint):
            offset = np.array([x, y]) @ _rotation(turn)
            canvas.box(tuple(centre + offset), (w, h), np.asarray(paint), turn)

        if i == 0:
            mark(-0.16, -0.16, 0.05, 0.05, (0.85, 0.85, 0.85))
        if i == 2:
            mark(-0.11, 0, 0.03, half[1], (0.55, 0.15, 0.10))
            mark(0.05, 0, 0.03, half[1], (0.15, 0.15, 0.40))
        if i == 4:
            for x in (-0.2, 0.0, 0.2):
                mark(x, 0, 0.05, 0.05, (0.25, 0.25, 0.28))


OBJECTS = {"gear": Gear.draw, "capsule": Capsule.draw, "board": Board.draw}


def _rotation(angle: float) -> np.ndarray:
    """Matrix that turns row vectors (N, 2) by an angle in radians."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, s], [-s, c]])


def _rgb(colour: np.ndarray) -> tuple[int, int, int]:
    r, g, b = np.round(np.clip(colour, 0, 1) * 255).astype(int)
    return int(r), int(g), int(b)
