"""Somebody's own images: which of a folder's are judged, and what is written about them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from pandas import DataFrame
from torch import Tensor

from diffad_ref.checkpoints import write_text
from diffad_ref.data import AnomalyFolder, files_under, is_heat_map
from diffad_ref.detector import Detector
from diffad_ref.evaluation import judged
from diffad_ref.tools.plots import save_heat_map
from diffad_ref.tools.sheet import write_sheet


def images_to_judge(detector: Detector, images: Path, out: Path) -> tuple[AnomalyFolder, Path]:
    """An image, or all of a folder, as a detector judges them; and the folder that names them.

    What a prediction wrote itself is left out: part.png_map.png, and anything in the folder `out`
    below the images. Other files are told on stderr.
    """
    if images.is_file():
        folder = images.parent  # it may have others: an image alone has no kind
        data = detector.from_folders(good=folder, texture=False, **detector.view("test"))
        data.samples = [sample for sample in data.samples if sample.path == images]
        if not data.samples:
            raise ValueError(f"{images} does not end as an image does")
        return data, folder
    data, (root, out) = detector.from_folders(test=images), map(_real, (images, out))

    def is_own(path: Path) -> bool:
        return is_heat_map(path) or (root in out.parents and out in _real(path).parents)

    data.samples = [sample for sample in data.samples if not is_own(sample.path)]
    if not data.samples:
        raise ValueError(f"{images} holds nothing but heat maps")
    kept = {sample.path for sample in data.samples}
    if ignored := sorted(p.name for p in files_under(images) if p not in kept):
        names = ", ".join(ignored[:3]) + ", ..." * (len(ignored) > 3)
        print(f"diffad_ref: not judged are {len(ignored)} files: {names}", file=sys.stderr)
    return data, images


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # `resolve` stumbles over a link to itself


def places_of_maps(data, folder: Path, out: Path) -> list[Path]:
    """Where the heat map of each image will lie; ValueError for a name that is too long."""
    places = []
    for sample in data.samples:
        name = sample.path.relative_to(folder)  # two folders may hold equal names
        places.append(out / name.with_name(f"{name.name}_map.png"))
        if len(os.fsencode(places[-1].name)) > 255:
            raise ValueError(f"{sample.path}: its name is too long for that of a heat map")
    return places


def maps_and_scores(detector: Detector, data, category: str | None, **way) -> tuple[Tensor, list]:
    """Maps (N, H, W) and N scores of images that all show one category; `way` as of `judged`."""
    known, maps, scores = list(detector.categories), [], []
    if category is not None and category not in known:
        raise ValueError(f"unknown category {category!r}; known: {', '.join(known)}")

    def index_of(batch: dict):
        count = len(batch["image"])
        return None if category is None else torch.full((count,), known.index(category))

    for _, prediction, _ in judged(detector, data, index_of=index_of, **way):
        maps.append(prediction.anomaly_map.half().cpu())
        scores += prediction.score.tolist()
    return torch.cat(maps).float(), scores


def write_about(
    data, maps: Tensor, scores: list, places: list[Path], table: Path, sheet: Path
) -> list[dict]:
    """A table of scores, a heat map for each image, and a page; a row of what is where for each."""
    paths = [str(sample.path) for sample in data.samples]
    frame = DataFrame({"path": map(_no_formula, paths), "score": scores})
    write_text(frame.to_csv(index=False, float_format="%.6f"), table)
    limits, rows = (0.0, max(1.0, maps.max().item())), []  # one scale; most methods end at 1
    for sample, anomaly_map, score, place in zip(data, maps, scores, places, strict=True):
        save_heat_map(sample["image"], anomaly_map, place, limits)
        place = place.relative_to(table.parent)
        name = place.with_name(place.name.removesuffix("_map.png"))
        rows.append({"path": sample["path"], "name": name, "score": score, "map": place})
    write_sheet(rows, sheet, f"{len(rows)} images, {data.root.name}")
    return [{key: row[key] for key in ("path", "score", "map")} for row in rows]


def _no_formula(path: str) -> str:
    """A path as a spreadsheet may show it: what begins with such a sign would be computed."""
    return f"./{path}" if path[0] in "=+-@\t\r" else path
