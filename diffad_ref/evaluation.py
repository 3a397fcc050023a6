"""Run a detector over a data set and put its numbers into tables.

Every method and baseline is judged here, by the same metrics over the same images. Numbers are
kept as fractions; `tools.tables` shows them in per cent.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffad_ref.metrics import METRICS, image_metrics, pixel_metrics

if TYPE_CHECKING:
    from pandas import DataFrame


class Exact:
    """The metrics as they should be; `tools.protocols` has them as the released codes make them."""

    name = "exact"

    def image_metrics(self, maps: Tensor, scores: np.ndarray, labels: np.ndarray) -> dict:
        """Of maps (N, H, W), scores and labels (N,)."""
        return image_metrics(scores, labels)

    def pixel_metrics(self, maps: Tensor, masks: Tensor) -> dict:
        """Of maps and masks (N, H, W)."""
        return pixel_metrics(maps, masks)


@dataclass(repr=False)
class Report:
    """What `evaluate` found. Metrics are fractions in [0, 1], NaN where they are not defined.

    Attributes
    ----------
    table : DataFrame
        A row for each category, and the "mean": n_good, n_defective, and the seven `METRICS`.
    kinds : DataFrame
        The same for each (category, kind) of defect, against the good images of its category.
    images : DataFrame
        path (inside the data set), category, kind, label and score of each image, in its order.
    detector, protocol : str
        Name of its class, and how the metrics were made.
    seconds_per_image : float
        Time spent in `predict`.
    maps, masks : Tensor (N, H, W) or None
        Anomaly maps (float32) and masks (bool) on the CPU; not saved.
    """

    table: DataFrame
    kinds: DataFrame
    images: DataFrame
    detector: str
    protocol: str = "exact"
    seed: int = 0
    seconds_per_image: float = float("nan")
    maps: Tensor | None = field(default=None, compare=False)
    masks: Tensor | None = field(default=None, compare=False)

    @property
    def mean(self) -> dict[str, float]:
        """Plain means over the categories for which a metric is defined; counts are sums."""
        return self.table.loc["mean"].to_dict()

    def __repr__(self) -> str:
        note = f"{self.detector}, {self.seconds_per_image:.3g} s per image, {self.protocol} metrics"
        return f"{self.table.to_string(float_format='{:.3f}'.format)}\n{note}"

    def _repr_html_(self) -> str:
        return self.table.to_html(float_format="{:.3f}".format)


def evaluate(
    detector,
    dataset,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
    protocol: Exact | None = None,
) -> Report:
    """Judge a detector on a data set with good and defective images.

    Parameters
    ----------
    detector : Detector
        Anything with its `predict` contract, used on its own device. If it names its `categories`,
        each image is passed with the index that its category has *there*.
    dataset : Dataset
        Gives samples as `AnomalyFolder` does. The masks of defective images may be empty or
        absent: then only image metrics are computed.
    seed : int
        Every batch draws its noise from a generator that follows from this and the batch's
        number, so the same seed and batch size give the same report on the same machine.
    protocol : optional
        Judges the same maps as a released code does, to compare with a paper's table like with
        like: one of `tools.protocols.PROTOCOLS`.

    Raises
    ------
    ValueError
        Empty data set; no defective or no good image at all; unlabelled images; a category that
        the detector does not know; NaN or a wrong shape in what the detector returns.
    """
    from pandas import DataFrame

    if len(dataset) == 0:
        raise ValueError("the data set is empty: there is nothing to evaluate")
    protocol = protocol or Exact()
    rows, maps, masks, seconds = _predict_all(detector, dataset, batch_size, seed, progress)
    images = DataFrame(rows)
    table, kinds = _tables(images, maps, masks, protocol)
    return Report(
        table,
        kinds,
        images,
        detector=type(detector).__name__,
        protocol=protocol.name,
        seed=seed,
        seconds_per_image=seconds / len(images),
        maps=maps,
        masks=masks,
    )


def _predict_all(detector, dataset, batch_size: int, seed: int, progress: bool):
    """Records of all images, maps (N, H, W), masks (N, H, W) and the seconds it took."""
    device, root = detector.device, getattr(dataset, "root", None)
    rows, maps, masks, seconds = [], [], [], 0.0
    batches = tqdm(DataLoader(dataset, batch_size), "evaluate", disable=not progress)
    for number, batch in enumerate(batches):
        if "unlabelled" in batch["kind"]:
            raise ValueError("the images are unlabelled: they can be predicted, not evaluated")
        x, index = batch["image"].to(device), _category_index(detector, batch).to(device)
        start = _now(device)
        prediction = detector.predict(x, index, batch_generator(device, seed, number))
        seconds += _now(device) - start
        _check(prediction, batch)
        maps.append(prediction.anomaly_map.float().cpu())
        masks.append(
            batch["mask"][:, 0] > 0.5 if "mask" in batch else torch.zeros_like(maps[-1]) > 0
        )
        columns = {name: batch[name] for name in ("path", "category", "kind") if name in batch}
        columns |= {"label": batch["label"].tolist(), "score": prediction.score.tolist()}
        rows += [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
    if root is not None:  # a report may travel
        for row in rows:
            row["path"] = Path(row["path"]).relative_to(root).as_posix()
    return rows, torch.cat(maps), torch.cat(masks), seconds


def _tables(images: DataFrame, maps: Tensor, masks: Tensor, protocol) -> tuple:
    """One row for each category and the mean, and one for each of its kinds of defect."""
    from pandas import DataFrame

    category, kind, score = (images[name].to_numpy() for name in ("category", "kind", "score"))
    bad, masked = (images["label"] == 1).to_numpy(), masks.flatten(1).any(1).numpy()
    if bad.all() or not bad.any():
        lack, names = "good" if bad.all() else "defective", ", ".join(sorted(set(category)))
        raise ValueError(
            f"no {lack} image among the {len(images)} of {names}: evaluation needs both; is this "
            "the test split?"
        )
    if (bad & ~masked).any() and masked.any():
        names = ", ".join(sorted(set(category[bad & ~masked])))
        warnings.warn(
            f"{(bad & ~masked).sum()} of {bad.sum()} defective images have no mask ({names}): "
            "pixel metrics leave them out",
            stacklevel=3,
        )

    def judge(chosen: np.ndarray, **row) -> dict:
        row |= {"n_good": (chosen & ~bad).sum(), "n_defective": (chosen & bad).sum()}
        row |= dict.fromkeys(METRICS, float("nan"))
        if row["n_good"] and row["n_defective"]:
            row |= protocol.image_metrics(maps[chosen], score[chosen], bad[chosen])
        known = chosen & (~bad | masked)
        if masks[known].any() and not masks[known].all():
            row |= protocol.pixel_metrics(maps[known], masks[known])
        return row

    names = sorted(set(category))
    table = DataFrame(judge(category == c, category=c) for c in names).set_index("category")
    mean = table.mean() | table[["n_good", "n_defective"]].sum()
    table.loc["mean"] = [mean[column] for column in table]
    kinds = []
    for c in names:
        for k in sorted(set(kind[bad & (category == c)])):
            rivals = (category == c) & (~bad | (kind == k))
            kinds.append(judge(rivals, category=c, kind=k))
    return table, DataFrame(kinds).set_index(["category", "kind"])


def _category_index(detector, batch: dict) -> Tensor:
    known = list(getattr(detector, "categories", ()))
    if not known:
        return torch.as_tensor(batch["category_index"])
    unknown = sorted(set(batch["category"]) - set(known))
    if unknown:
        raise ValueError(f"the detector never saw {unknown}; it knows {known}")
    return torch.tensor([known.index(category) for category in batch["category"]])


def _check(prediction, batch: dict) -> None:
    count, _, height, width = batch["image"].shape
    maps, scores = prediction.anomaly_map, prediction.score
    if maps.shape != (count, height, width) or scores.shape != (count,):
        raise ValueError(
            f"expected maps {(count, height, width)} and scores {(count,)}, the detector returned "
            f"{tuple(maps.shape)} and {tuple(scores.shape)}"
        )
    broken = (maps.flatten(1).isnan().any(1) | scores.isnan()).tolist()
    if any(broken):
        names = sorted({c for c, b in zip(batch["category"], broken, strict=True) if b})
        raise ValueError(f"the detector returned NaN for images of {', '.join(names)}")


def batch_generator(device, seed: int, number: int) -> torch.Generator:
    """Mix seed and number well: neighbouring seeds must not share batches of noise."""
    mixed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    return torch.Generator(device).manual_seed(mixed)


def _now(device: torch.device) -> float:
    """The clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
