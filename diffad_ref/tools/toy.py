"""The toy factory: six products, eight ways to break them, exact masks.

Three textures are cut from real photographs that scikit-image ships; three objects are rendered.
Every image is drawn four times too large and then averaged down, so that edges are smooth and a
mask can be *measured*: it marks the pixels that the defect changed. The folder has the layout of
MVTec AD, so that whatever reads the toy reads the real thing.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import psutil
from PIL import Image, ImageDraw
from scipy import ndimage
from skimage import data as photographs
from tqdm.auto import tqdm

from diffad_ref.tools.toy_objects import OBJECTS

KINDS = {
    "board": ("bent", "missing", "stain"),
    "brick": ("crack", "patch", "stain"),
    "capsule": ("hole", "print", "scratch"),
    "gear": ("bent", "crack", "missing"),
    "grass": ("hole", "patch", "scratch"),
    "gravel": ("hole", "scratch", "stain"),
}
CATEGORIES = tuple(KINDS)
PHOTOGRAPHS = ("brick", "grass", "gravel")

OVERSAMPLING = 4  # scenes are drawn this much larger, then averaged
VISIBLE = 10 / 255  # a pixel is defective if the defect changed a channel by more than this
VERSION = 2  # part of the cache key: raise it when the drawing changes


def toy_factory(
    root: str | os.PathLike | None = None,
    size: int = 64,
    seed: int = 0,
    n_train: int = 200,
    n_good: int = 40,
    n_per_kind: int = 20,
    progress: bool = True,
) -> Path:
    """Write the toy data set once and return its folder.

    Parameters
    ----------
    root : path, optional
        Folder that holds data sets; default is the cache folder (`DIFFAD_CACHE` or `~/.cache`).
    size : int
        Side of the square images, in pixels.
    seed : int
        Equal seeds give equal files; different seeds share no draw.
    n_train, n_good, n_per_kind : int
        Per category: training images, good test images, test images of each kind of defect.
    progress : bool
        Show a progress bar while drawing.

    Returns
    -------
    Path
        A folder in the MVTec layout, complete: it appears under its name only when finished.
    """
    if size < 16:
        raise ValueError(f"toy images need a size of at least 16 pixels, not {size}")
    settings = {
        "size": size,
        "seed": seed,
        "n_train": n_train,
        "n_good": n_good,
        "n_per_kind": n_per_kind,
        "version": VERSION,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    folder = Path(root or cache_folder()) / f"toy-{size}-{seed}-{key}"
    if folder.exists():
        return folder

    folder.parent.mkdir(parents=True, exist_ok=True)
    hidden = _hidden_folder(folder.parent)
    unfinished = hidden / folder.name  # within, because mkdtemp's own folder is for one user only
    unfinished.mkdir()
    try:
        jobs = [
            (category, split, kind, i)
            for category in CATEGORIES
            for split, kind, n in (
                ("train", "good", n_train),
                ("test", "good", n_good),
                *(("test", kind, n_per_kind) for kind in KINDS[category]),
            )
            for i in range(n)
        ]
        for category, split, kind, i in tqdm(
            jobs, "toy factory", disable=not progress, leave=False
        ):
            image, mask = draw(category, split, kind, i, size=size, seed=seed)
            _save(image, unfinished / category / split / kind / f"{i:03d}.png")
            if kind != "good":
                _save(mask, unfinished / category / "ground_truth" / kind / f"{i:03d}_mask.png")
        (unfinished / "factory.json").write_text(json.dumps(settings, indent=2))
        os.replace(unfinished, folder)
    except OSError:
        if not folder.exists():  # another process may have finished the same folder first
            raise
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return folder


def _hidden_folder(parent: Path) -> Path:
    """A new folder for unfinished work; those that killed processes have left are removed.

    Its name says whose it is. A machine that shares the disk looks after its own.
    """
    ours = f".toy-{platform.node()}-"
    for left in parent.iterdir():
        process = re.fullmatch(re.escape(ours) + r"([0-9]{1,9})-.*", left.name)
        if process and not psutil.pid_exists(int(process[1])):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{ours}{os.getpid()}-", dir=parent))


def draw(
    category: str, split: str, kind: str, index: int, size: int = 64, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image, uint8 (size, size, 3), and its mask, uint8 (size, size) in {0, 255}."""
    image, _, mask = draw_pair(category, split, kind, index, size, seed)
    return image, mask


def draw_pair(
    category: str, split: str, kind: str, index: int, size: int = 64, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw an image with its defect, the same without it, and the mask of the difference.

    Both have the same pose, light and camera noise, so the second is what a perfect detector would
    reconstruct from the first. The mask is where the two differ visibly, with its gaps closed.

    Returns
    -------
    image, normal : uint8 (size, size, 3)
    mask : uint8 (size, size), 0 or 255
    """
    if category not in KINDS:
        raise ValueError(f"unknown toy category {category!r}; there are {', '.join(CATEGORIES)}")
    if kind != "good" and kind not in KINDS[category]:
        raise ValueError(f"{category} has the kinds {', '.join(KINDS[category])}, not {kind!r}")
    name = f"{seed}/{category}/{split}/{kind}/{index}"
    rng = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))
    large = size * OVERSAMPLING

    while True:
        if category in PHOTOGRAPHS:
            good, region = _cut(category, split, large, rng), np.ones((large, large), bool)
            part_defect = None
        else:
            scene = OBJECTS[category](rng)
            good, region = scene.render(large)
            part_defect = scene.broken(kind, rng)
        if kind == "good":
            bad = good
        elif part_defect is not None:
            bad, _ = part_defect.render(large)
        else:
            bad = SURFACE_DEFECTS[kind](good, region, rng)

        light = _light(large, rng)
        good, bad = (_shrink(np.clip(image * light, 0, 1)) for image in (good, bad))
        mask = np.abs(bad - good).max(-1) > VISIBLE
        mask = _close(mask, radius=1 if kind in SURFACE_DEFECTS else 2)
        if (
            kind == "good" or mask.sum() >= (size / 64) ** 2 * 14
        ):  # else: hardly visible, draw again
            break

    noise = rng.normal(0, 0.012, bad.shape)
    return _to_uint8(bad + noise), _to_uint8(good + noise), mask.astype(np.uint8) * 255


def cache_folder() -> Path:
    """Where data that can be made again is kept: `DIFFAD_CACHE`, else `~/.cache/diffad_ref`."""
    return Path(os.environ.get("DIFFAD_CACHE") or Path.home() / ".cache" / "diffad_ref")


# ---------------------------------------------------------------------------------------- scenes


def _cut(category: str, split: str, large: int, rng: np.random.Generator) -> np.ndarray:
    """A random view of a photograph; the training and the test region are disjoint."""
    photo = getattr(photographs, category)()  # (512, 512) grey
    photo = photo[:330] if split == "train" else photo[340:]
    side = rng.uniform(92, 112)  # pixels of the photograph that one image shows
    turn = np.deg2rad(rng.uniform(-6, 6) if category == "brick" else rng.uniform(-180, 180))
    reach = side / 2 * (abs(np.cos(turn)) + abs(np.sin(turn))) + 1
    cx = rng.uniform(reach, photo.shape[1] - reach)
    cy = rng.uniform(reach, photo.shape[0] - reach)
    c, s = np.cos(turn) * side / large, np.sin(turn) * side / large
    half = large / 2
    affine = (c, -s, cx - c * half + s * half, s, c, cy - s * half - c * half)
    view = Image.fromarray(photo).transform(
        (large, large), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR
    )
    base = {"brick": (1.05, 0.85, 0.75), "grass": (0.8, 1.0, 0.65), "gravel": (0.95, 0.95, 1.0)}
    tint = np.array(base[category]) * rng.uniform(0.93, 1.07, 3)
    contrast = rng.uniform(0.85, 1.1)
    grey = 0.45 + contrast * (np.asarray(view, np.float64) / 255 - 0.45)
    return np.clip(grey[..., None] * tint, 0, 1)


def _light(large: int, rng: np.random.Generator) -> np.ndarray:
    """A lamp somewhere: brightness times a linear ramp, (large, large, 1)."""
    angle, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.12)
    v, u = np.mgrid[-1 : 1 : large * 1j, -1 : 1 : large * 1j]
    ramp = 1 + slope * (u * np.cos(angle) + v * np.sin(angle))
    return (rng.uniform(0.9, 1.08) * ramp)[..., None]


# ------------------------------------------------------------------------------- surface defects


def _anchor(region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random point (x, y) well inside the product, as a share of the image."""
    inside = ndimage.binary_erosion(region, iterations=max(1, region.shape[0] // 24))
    rows, cols = np.nonzero(inside if inside.any() else region)
    i = rng.integers(len(rows))
    return np.array([cols[i], rows[i]]) / region.shape[0]


def _paint(image, alpha, colour):
    """Blend a colour (3,) or an image over `image` where alpha (H, W) says so."""
    return image * (1 - alpha[..., None]) + alpha[..., None] * colour


def _line_alpha(paths, width, large, region):
    """Soft coverage (H, W) of polylines; width is a share of the image."""
    layer = Image.new("L", (large, large))
    pen = ImageDraw.Draw(layer)
    for path in paths:
        pixels = [tuple(p) for p in np.asarray(path) * large]
        pen.line(pixels, fill=255, width=max(1, round(width * large)), joint="curve")
    return np.asarray(layer) / 255 * region


def _scratch(image, region, rng):
    """A long, slightly bent line, lighter or darker than its surroundings."""
    large = image.shape[0]
    start, angle = _anchor(region, rng), rng.uniform(0, 2 * np.pi)
    length, bend = rng.uniform(0.3, 0.6), rng.uniform(-0.8, 0.8)
    s = np.linspace(-0.5, 0.5, 24)[:, None] * length
    path = start + s * [np.cos(angle), np.sin(angle)]
    path = path + bend * s**2 * np.array([-np.sin(angle), np.cos(angle)])
    alpha = _line_alpha([path], rng.uniform(0.018, 0.032), large, region)
    dark = image[alpha > 0].mean() > 0.55 if (alpha > 0).any() else True
    grey = rng.uniform(0.02, 0.12) if dark else rng.uniform(0.9, 1.0)
    return _paint(image, alpha * rng.uniform(0.75, 0.95), np.full(3, grey))


def _crack(image, region, rng):
    """A dark, jagged walk with one branch."""
    large = image.shape[0]

    def walk(start, angle, n):
        angles = angle + np.cumsum(rng.normal(0, 0.45, n))
        steps = rng.uniform(0.03, 0.06, n)[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
        return start + np.concatenate([[[0, 0]], np.cumsum(steps, 0)])

    trunk = walk(_anchor(region, rng), rng.uniform(0, 2 * np.pi), rng.integers(7, 12))
    branch = walk(trunk[len(trunk) // 2], rng.uniform(0, 2 * np.pi), 4)
    alpha = _line_alpha([trunk, branch], rng.uniform(0.016, 0.028), large, region)
    return _paint(image, alpha * rng.uniform(0.85, 1.0), np.full(3, rng.uniform(0.0, 0.1)))


def _blob(large, centre, radius, rng, softness):
    """A wobbly disc: coverage 1 inside, falling to 0 over `softness` (share of the radius)."""
    v, u = np.mgrid[0:large, 0:large] / large
    dx, dy = u - centre[0], v - centre[1]
    angle = np.arctan2(dy, dx)
    edge = 1 + sum(
        rng.uniform(0, 0.22 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5)
    )
    return np.clip((edge - np.hypot(dx, dy) / radius) / softness, 0, 1)


def _stain(image, region, rng):
    """A translucent, coloured blob."""
    large = image.shape[0]
    alpha = _blob(large, _anchor(region, rng), rng.uniform(0.09, 0.17), rng, softness=0.35) * region
    colours = ((0.30, 0.16, 0.05), (0.05, 0.08, 0.25), (0.75, 0.70, 0.30), (0.35, 0.05, 0.10))
    return _paint(image, alpha * rng.uniform(0.5, 0.75), np.array(colours[rng.integers(4)]))


def _hole(image, region, rng):
    """A dark, round hole with a light rim on one side."""
    large = image.shape[0]
    centre, radius = _anchor(region, rng), rng.uniform(0.05, 0.1)
    rim = _blob(large, centre + rng.uniform(-0.015, 0.015, 2), radius * 1.2, rng, 0.2) * region
    hole = _blob(large, centre, radius, rng, softness=0.15) * region
    image = _paint(image, rim * 0.6, np.full(3, rng.uniform(0.75, 0.95)))
    return _paint(image, hole, np.full(3, rng.uniform(0.0, 0.12)))


def _patch(image, region, rng):
    """A piece of another photograph, pasted as a turned rectangle."""
    large = image.shape[0]
    centre, turn = _anchor(region, rng), rng.uniform(0, np.pi)
    half = rng.uniform(0.08, 0.17, 2)
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    layer = Image.new("L", (large, large))
    ImageDraw.Draw(layer).polygon(
        [tuple(p) for p in (corners @ rotation + centre) * large], fill=255
    )
    foreign = _cut(str(rng.choice(PHOTOGRAPHS)), "test", large, rng)
    foreign = np.clip(foreign * rng.uniform(0.5, 1.5, 3), 0, 1)
    return _paint(image, np.asarray(layer) / 255 * region, foreign)


SURFACE_DEFECTS = {
    "scratch": _scratch,
    "crack": _crack,
    "stain": _stain,
    "hole": _hole,
    "patch": _patch,
}


# ------------------------------------------------------------------------------------- to pixels


def _shrink(image: np.ndarray) -> np.ndarray:
    """Average blocks of OVERSAMPLING x OVERSAMPLING pixels."""
    n, k = image.shape[0] // OVERSAMPLING, OVERSAMPLING
    return image.reshape(n, k, n, k, -1).mean((1, 3))


def _close(mask: np.ndarray, radius: int) -> np.ndarray:
    """Close gaps up to twice the radius and fill enclosed holes."""
    disc = np.hypot(*np.mgrid[-radius : radius + 1, -radius : radius + 1]) <= radius + 0.3
    padded = np.pad(mask, radius + 1)
    closed = ndimage.binary_closing(padded, disc)[
        radius + 1 : -radius - 1, radius + 1 : -radius - 1
    ]
    return ndimage.binary_fill_holes(closed | mask)


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _save(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
