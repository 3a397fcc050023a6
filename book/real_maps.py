"""Maps of all methods on MVTec AD, side by side, for whoever has the data set at hand.

Its licence keeps its images out of this repository, and weights that have learned from it. So the
picture is drawn when the book is built, if `DIFFAD_MVTEC` names the folder; a page says so if not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt

import diffad_ref as da
from diffad_ref.checkpoints import read_description
from diffad_ref.tools.baselines import PCA, NearestFeatures, Template
from generated import named

CATEGORIES = ("bottle", "transistor")
SOURCE = (
    "Images: MVTec AD, P. Bergmann, M. Fauser, D. Sattlegger, C. Steger, CVPR 2019 and IJCV 129 "
    "(2021), resized, [CC BY-NC-SA 4.0](https://creativecommons.org/licenses/by-nc-sa/4.0/); so is "
    "this picture."
)
ABSENT = (
    "The maps of all methods side by side are drawn where the data set is at hand: set "
    "`DIFFAD_MVTEC` to its folder and build the book again. A detector that `runs` holds for both "
    "categories is then in the picture, too.\n"
)


def map_pictures(root: Path, runs: Path, path: Path) -> str:
    """Draw them to `path`; gives the Markdown that shows them, or says how to get them."""
    if not all((root / category).is_dir() for category in CATEGORIES):
        return ABSENT
    rows = [row for category in CATEGORIES for row in _rows(root, runs, category)]
    columns = [name for name in rows[0] if all(name in row for row in rows)][3:]
    fig, axes = plt.subplots(len(rows), 1 + len(columns), squeeze=False)
    fig.set_size_inches(1.5 * (1 + len(columns)), 1.55 * len(rows))
    for row, line in zip(rows, axes, strict=True):
        line[0].imshow(row["image"])
        if row["mask"].any():
            line[0].contour(row["mask"], [0.5], colors="cyan", linewidths=0.8)
        line[0].set_ylabel(row["what"], fontsize=9)
        for name, axis in zip(columns, line[1:], strict=True):
            axis.imshow(row[name], "inferno", vmin=0, vmax=1)
    for axis, name in zip(axes[0], ["image", *columns], strict=True):
        axis.set_title(name, fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    fig.tight_layout(pad=0.3)
    fig.savefig(path, dpi=110)
    plt.close(fig)
    words = "Maps of a good image, of the defect that *nearest* finds easiest, and of the hardest"
    words += ". A thin line goes around a true defect. Each method has one scale a category"
    alt = words.replace("*", "")
    return f"```{{figure}} _generated/{path.name}\n:alt: {alt}.\n\n{words}. {SOURCE}\n```\n"


def _rows(root: Path, runs: Path, category: str) -> list[dict]:
    """A good, an easy and a hard image of a category, with the map of each method in [0, 1]."""
    judges = _judges(root, runs, category)
    images = da.evaluate(*judges["nearest"], progress=False).images
    bad = np.flatnonzero(images["label"])
    order = bad[np.argsort(images["score"].to_numpy()[bad])]
    chosen = {"good": np.flatnonzero(images["label"] == 0)[0], "easy": order[-1], "hard": order[0]}
    shown = da.AnomalyFolder(root, "test", 128, [category])
    rows = [
        {
            "what": f"{category}, {word}",
            "image": shown[i]["image"].permute(1, 2, 0),
            "mask": shown[i]["mask"].squeeze(0).numpy(),
        }
        for word, i in chosen.items()
    ]
    for name, (judge, test) in judges.items():
        x = torch.stack([test[i]["image"] for i in chosen.values()])
        index = torch.full((len(x),), list(judge.categories).index(category))
        maps = judge.predict(x, index).anomaly_map
        for row, one in zip(rows, maps / maps.max().clamp(min=1e-12), strict=True):
            row[name] = one
    return rows


def _judges(root: Path, runs: Path, category: str) -> dict:
    """Baselines that learn here, and detectors that were trained before, with their test sets."""
    found = {}
    for name, kind in (("template", Template), ("PCA", PCA), ("nearest", NearestFeatures)):
        train, test = (da.AnomalyFolder(root, s, 256, [category]) for s in ("train", "test"))
        found[name] = kind().fit(train), test
    for path in sorted(runs.rglob("weights.safetensors")):
        if category in read_description(path)["categories"]:
            detector = da.load(path)
            test = detector.folder(root, "test", categories=[category])
            found[named(type(detector).__name__)] = detector, test
    return found
