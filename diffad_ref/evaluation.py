"""Run a detector over a data set and put its numbers, as fractions, into tables."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffad_ref.data import AnomalyFolder, loading
from diffad_ref.detector import demand, said_by
from diffad_ref.diffusion import seeded
from diffad_ref.metrics import METRICS, image_metrics, pixel_metrics

if TYPE_CHECKING:
    from pandas import DataFrame  # loaded where it is used: it takes its time


@dataclass(repr=False, eq=False)
class Report:
    """What `evaluate` found. Metrics are fractions in [0, 1], NaN where they are not defined."""

    table: DataFrame  # by category, and the "mean": n_good, n_defective, and the seven METRICS
    kinds: DataFrame  # the same by (category, kind) of defect, against the category's good images
    images: DataFrame  # path (inside the data set), category, kind, label, score
    detector: str  # name of its class
    protocol: str = "exact"  # how the metrics were made
    seed: int = 0
    precision: str = "float32"
    seconds_per_image: float = float("nan")  # spent in `predict`
    maps: Tensor | None = None  # (N, H, W) on the CPU; not saved
    masks: Tensor | None = None  # (N, H, W), bool

    @property
    def mean(self) -> dict[str, float]:
        """Plain means over the categories for which a metric is defined; counts are sums."""
        return self.table.loc["mean"].to_dict()

    def __repr__(self) -> str:
        return self.table.to_string(float_format="{:.3f}".format)

    def _repr_html_(self) -> str:
        return self.table.to_html(float_format="{:.3f}".format)


def evaluate(
    detector, dataset, batch_size=32, seed=0, progress=True, protocol=None, precision="float32"
) -> Report:
    """Judge a detector on a data set with good and defective images.

    Raises ValueError for no or unlabelled images, only good or only defective ones, a category that
    the detector does not know, and as `judged`.

    Parameters
    ----------
    detector : Detector
        Anything with its `predict` contract, used on its own device. If it names its `categories`,
        each image is passed with the index that its category has *there*.
    dataset : Dataset
        Samples as of `AnomalyFolder`; without masks only image metrics are computed.
    seed, protocol, precision
        Of the noise; the batch size has no say, see `Detector.predict`. One of
        `tools.protocols.PROTOCOLS`: judge as a released code does. See `precision_on`.
    """
    if protocol is not None:
        dataset = protocol.with_its_masks(dataset)
    if len(dataset) == 0:
        raise ValueError("the data set is empty: there is nothing to evaluate")
    way = {"seed": seed, "precision": precision, "progress": progress}
    images, maps, masks, seconds = _predict_all(detector, dataset, batch_size, way)
    tables = _tables(images, maps, masks, protocol)
    name, way = type(detector).__name__, protocol.name if protocol else "exact"
    return Report(*tables, images, name, way, seed, precision, seconds / len(images), maps, masks)


def judged(
    detector, dataset, batch_size=32, index_of=None, seed=0, precision="float32", progress=True
):
    """Predict the images of a data set; yields each batch, the `Prediction`, and its seconds.

    `index_of` a batch are the classes of its images, for detectors that must know. Raises
    ValueError for NaN, infinity or a wrong shape in what the detector returns.
    """
    device, bits = detector.device, {} if precision == "float32" else {"precision": precision}
    batches = DataLoader(dataset, batch_size, **loading(device))
    for batch in tqdm(batches, "judge", disable=not progress):
        demand(batch, "image")
        x, index = batch["image"].to(device), index_of(batch) if index_of else None
        start = _now(device)
        prediction = detector.predict(x, index, seeded("cpu", seed), **bits)
        seconds = _now(device) - start
        _check(prediction, batch)
        yield batch, prediction, seconds


def _predict_all(detector, dataset, batch_size: int, way: dict):
    """A row for each image, maps (N, H, W), masks (N, H, W) and the seconds it took."""
    from pandas import DataFrame, concat

    known = list(getattr(detector, "categories", ()))
    rows, maps, masks, total = [], [], [], 0.0

    def index_of(batch: dict) -> Tensor | None:
        demand(batch, "label", "category", "kind")
        if "unlabelled" in batch["kind"]:
            raise ValueError("the images are unlabelled: they can be predicted, not evaluated")
        if strange := sorted(set(batch["category"]) - set(known or batch["category"])):
            raise ValueError(f"the detector never saw {strange}; it knows {known}")
        if not known:
            return batch.get("category_index")
        return torch.tensor([known.index(c) for c in batch["category"]], device=detector.device)

    if isinstance(dataset, AnomalyFolder):  # what its files say is refused before the work
        names, samples = ("label", "category", "kind"), dataset.samples
        index_of(whole := {name: [getattr(s, name) for s in samples] for name in names})
        _two_sided(whole["category"], np.array(whole["label"]) == 1)
    for batch, prediction, seconds in judged(detector, dataset, batch_size, index_of, **way):
        total += seconds
        maps.append(prediction.anomaly_map.float().cpu())
        masks.append(batch.get("mask", 0 * maps[-1][:, None])[:, 0] > 0.5)
        row = {name: batch[name] for name in ("path", "category", "kind") if name in batch}
        rows.append(row | {"label": batch["label"], "score": prediction.score.cpu()})
    images = concat([DataFrame(row) for row in rows], ignore_index=True)
    root, paths = said_by(dataset, "root"), [Path(path) for path in images.get("path", ())]
    if root and paths:  # a report may travel
        inside = [p.relative_to(root) if p.is_relative_to(root) else p for p in paths]
        images["path"] = [path.as_posix() for path in inside]
    return images, torch.cat(maps), torch.cat(masks), total


def _two_sided(category: Sequence[str], bad: np.ndarray) -> None:
    """Refuse what no table can be made of."""
    names = sorted(set(category))
    if bad.all() or not bad.any():
        lack = f"no {'good' if bad.all() else 'defective'} image among the {len(bad)}"
        raise ValueError(f"{lack} of {', '.join(names)}: is this the test split?")
    if "mean" in names:
        raise ValueError("a category cannot be called 'mean': the table has a row of that name")


def _tables(images: DataFrame, maps: Tensor, masks: Tensor, protocol) -> tuple:
    """One row for each category and the mean, and one for each of its kinds of defect."""
    from pandas import DataFrame

    category, kind, score = (images[name].to_numpy() for name in ("category", "kind", "score"))
    bad, masked = (images["label"] == 1).to_numpy(), masks.flatten(1).any(1).numpy()
    if protocol and protocol.labels_from_masks:
        bad = masked
    names, lost = sorted(set(category)), bad & ~masked
    _two_sided(category, bad)
    if lost.any() and masked.any():
        where = ", ".join(sorted(set(category[lost])))
        words = f"{lost.sum()} of {bad.sum()} defective images have no mask ({where})"
        warnings.warn(f"{words}: pixel metrics leave them out", stacklevel=3)

    def judge(chosen: np.ndarray, **row) -> dict:
        row |= {"n_good": (chosen & ~bad).sum(), "n_defective": (chosen & bad).sum()}
        row |= dict.fromkeys(METRICS, float("nan"))
        if row["n_good"] and row["n_defective"]:
            of_maps = protocol and protocol.image_metrics(maps[chosen], score[chosen], bad[chosen])
            row |= of_maps or image_metrics(score[chosen], bad[chosen])
        known = chosen & ~lost
        if masks[known].any() and not masks[known].all():
            of_pixels = protocol.pixel_metrics if protocol else pixel_metrics
            row |= of_pixels(maps[known], masks[known])
        return row

    table = DataFrame(judge(category == c, category=c) for c in names).set_index("category")
    table.loc["mean"] = table.mean().where(~table.columns.str.startswith("n_"), table.sum())
    kinds = [
        judge((category == c) & (~bad | (kind == k)), category=c, kind=k)
        for c in names
        for k in sorted(set(kind[bad & (category == c)]))
    ]
    return table, DataFrame(kinds).set_index(["category", "kind"])


def _check(prediction, batch: dict) -> None:
    count, _, height, width = batch["image"].shape
    maps, scores = prediction.anomaly_map, prediction.score
    if maps.shape != (count, height, width) or scores.shape != (count,):
        found = f"maps {tuple(maps.shape)} and scores {tuple(scores.shape)}"
        raise ValueError(f"the detector returned {found}; expected maps {(count, height, width)}")
    if "mask" in batch and batch["mask"].shape != (wanted := (count, 1, height, width)):
        raise ValueError(f"masks of a batch are {wanted}, not {tuple(batch['mask'].shape)}")
    whole = (maps.flatten(1).isfinite().all(1) & scores.isfinite()).tolist()
    if not all(whole):
        names = sorted({c for c, good in zip(batch["category"], whole, strict=True) if not good})
        found = f"NaN or infinity for images of {', '.join(names)}"
        raise ValueError(f"the detector returned {found}: are its weights whole?")


def _now(device: torch.device) -> float:
    """The clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
