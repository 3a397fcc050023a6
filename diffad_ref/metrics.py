"""Exact scores of anomaly maps: image, pixel and region metrics.

All of them ask one question: how many normal pixels (or images) score at least as high as each
defective one? One sort answers it for every threshold at once, ties included. The PRO curve is
the ROC curve with each defective pixel weighted by one over the area of its region, so that a
scratch counts as much as a stain.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage
from scipy.integrate import trapezoid

EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)  # pixels that touch at a corner are one region

# What is measured, in the order of every table.
METRICS = (
    *("image_auroc", "image_ap", "image_f1max"),
    *("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro"),
)


def image_metrics(scores, labels) -> dict[str, float]:
    """Judge image scores against image labels.

    Parameters
    ----------
    scores : Tensor or array (N,)
        Larger is more abnormal.
    labels : Tensor or array (N,) in {0, 1}
        1 marks a defective image.

    Returns
    -------
    dict with image_auroc, image_ap and image_f1max, each in [0, 1]. A value that is not defined
    (no defective image; for the AUROC also no good one) is NaN, with a warning.

    Raises
    ------
    ValueError
        Empty input, different lengths, NaN scores, labels other than 0 and 1.
    """
    ranking = Ranking.of(scores, labels)
    ranking.warn_if_one_sided("image")
    return {
        "image_auroc": ranking.auroc(),
        "image_ap": ranking.average_precision(),
        "image_f1max": ranking.f1max(),
    }


def pixel_metrics(maps, masks, fpr_limit: float = 0.3) -> dict[str, float]:
    """Judge anomaly maps against masks, over the pixels of all images together.

    Parameters
    ----------
    maps : Tensor or array (N, H, W) or (N, 1, H, W)
        Larger is more abnormal. A single (H, W) map will do as well.
    masks : Tensor or array of the same size, in {0, 1}
    fpr_limit : float in (0, 1]
        Where the PRO curve stops. At each threshold, the overlap is the share of a defective
        region that is found, averaged over the regions (8-connected) of all images. The area up
        to the limit is divided by it: 1 is perfect, a constant map gets `fpr_limit / 2`.

    Returns
    -------
    dict with pixel_auroc, pixel_ap, pixel_f1max and aupro, each in [0, 1]. A value that is not
    defined (no defective pixel; for the areas also no normal one) is NaN, with a warning.

    Raises
    ------
    ValueError
        Empty input, different sizes, NaN in a map, masks other than 0 and 1, a limit not in
        (0, 1].
    """
    maps, masks = paired_maps(maps, masks)
    ranking = Ranking.of(maps, masks)
    ranking.warn_if_one_sided("pixel")
    return {
        "pixel_auroc": ranking.auroc(),
        "pixel_ap": ranking.average_precision(),
        "pixel_f1max": ranking.f1max(),
        "aupro": ranking.weighted(region_weights(masks)).auroc(fpr_limit),
    }


def aupro(maps, masks, fpr_limit: float = 0.3) -> float:
    """Area under the per-region overlap curve alone: see `pixel_metrics`."""
    return pixel_metrics(maps, masks, fpr_limit)["aupro"]


def region_weights(masks: np.ndarray) -> np.ndarray:
    """Weigh each defective pixel by one over the area of its region, in the order of `masks`.

    Returns
    -------
    array (number of defective pixels,); its sum is the number of regions.
    """
    weights = [np.empty(0)]
    for mask in masks:
        if mask.any():
            regions, _ = ndimage.label(mask, EIGHT_NEIGHBOURS)
            region = regions[mask]
            weights.append(1 / np.bincount(region)[region])
    return np.concatenate(weights)


@dataclass(frozen=True)
class Ranking:
    """Where each positive stands among the negatives: all that the metrics need.

    Between two scores of positives only false positives are added, so it is enough to look at
    the K distinct scores of positives, here from the highest to the lowest.

    Attributes
    ----------
    hits : array (K,)
        Positives (or their weight) that score at least the threshold.
    above, at_least : array (K,)
        Negatives that score more than the threshold, and those that score at least that much.
    positives, negatives : number
        How many there are (for positives: their weight).
    order, last : array
        Sorting of the positives, and the last position of each threshold in it.
    """

    hits: np.ndarray
    above: np.ndarray
    at_least: np.ndarray
    positives: float
    negatives: float
    order: np.ndarray | None = None
    last: np.ndarray | None = None

    @classmethod
    def of(cls, scores, labels) -> Ranking:
        """Rank scores (any shape) with labels of the same shape in {0, 1}."""
        scores, labels = _scores(scores), _binary(labels, "labels")
        if scores.shape != labels.shape:
            raise ValueError(f"{scores.shape} scores do not fit {labels.shape} labels")
        positive, negative = scores[labels], np.sort(scores[~labels])
        order = np.argsort(-positive)
        falling = positive[order]
        last = np.flatnonzero(np.append(falling[1:] != falling[:-1], True)[: falling.size])
        less, up_to = (np.searchsorted(negative, falling[last], s) for s in ("left", "right"))
        return cls(
            hits=last + 1,
            above=negative.size - up_to,
            at_least=negative.size - less,
            positives=positive.size,
            negatives=negative.size,
            order=order,
            last=last,
        )

    @classmethod
    def of_counts(cls, positives: np.ndarray, negatives: np.ndarray) -> Ranking:
        """The same from how many there are at each of K scores, rising; counts may be weights."""
        positive, negative = positives[::-1], negatives[::-1]
        hits, found = positive.cumsum(), negative.cumsum()
        at = positive > 0  # only the scores of positives are thresholds
        return cls(hits[at], (found - negative)[at], found[at], positive.sum(), negative.sum())

    def weighted(self, weights: np.ndarray) -> Ranking:
        """Count each positive with its weight, given in the order of the labels."""
        total = np.cumsum(weights[self.order])
        return replace(self, hits=total[self.last], positives=total[-1] if total.size else 0)

    def roc(self) -> tuple[np.ndarray, np.ndarray]:
        """False- and true-positive rates at the corners of the ROC curve, both rising to 1."""
        if not self.positives or not self.negatives:
            raise ValueError("a ROC curve needs defective and normal samples")
        false, true = self._corners()
        return false / self.negatives, true / self.positives

    def precision_recall(self) -> tuple[np.ndarray, np.ndarray]:
        """Precision and recall at each threshold; recall rises to 1."""
        if not self.positives:
            raise ValueError("a precision-recall curve needs defective samples")
        return self.hits / (self.hits + self.at_least), self.hits / self.positives

    def auroc(self, fpr_limit: float = 1.0) -> float:
        """Area under the ROC curve up to a false-positive rate, divided by that rate."""
        if not 0 < fpr_limit <= 1:
            raise ValueError(f"fpr_limit must lie in (0, 1], got {fpr_limit}")
        if not self.positives or not self.negatives:
            return float("nan")
        false, true = self._corners()
        limit = fpr_limit * self.negatives
        inside = np.searchsorted(false, limit, side="right")
        if inside < false.size:  # cut the segment that crosses the limit
            (x0, x1), (y0, y1) = false[inside - 1 : inside + 1], true[inside - 1 : inside + 1]
            false = np.append(false[:inside], limit)
            true = np.append(true[:inside], y0 + (limit - x0) / (x1 - x0) * (y1 - y0))
        return min(float(trapezoid(true, false) / (limit * self.positives)), 1.0)

    def average_precision(self) -> float:
        """Precision averaged over the steps of recall (no interpolation)."""
        if not self.positives:
            return float("nan")
        precision, _ = self.precision_recall()
        return min(float(np.diff(self.hits, prepend=0) @ precision / self.positives), 1.0)

    def f1max(self) -> float:
        """Best F1 score of all thresholds."""
        if not self.positives:
            return float("nan")
        return float(np.max(2 * self.hits / (self.hits + self.at_least + self.positives)))

    def warn_if_one_sided(self, what: str) -> None:
        """Say why a metric will be NaN."""
        if not self.positives:
            warnings.warn(
                f"no {what} is defective: the {what} metrics are not defined (NaN)", stacklevel=3
            )
        elif not self.negatives:
            warnings.warn(
                f"no {what} is normal: areas over the false-positive rate are NaN", stacklevel=3
            )

    def _corners(self) -> tuple[np.ndarray, np.ndarray]:
        """Counts of false and true positives where the ROC curve bends, from (0, 0)."""
        before = np.append(0, self.hits[:-1])[: self.hits.size]
        false = np.stack([self.above, self.at_least], axis=1).ravel()
        true = np.stack([before, self.hits], axis=1).ravel()
        return np.r_[0, false, self.negatives], np.r_[0, true, self.positives]


def _array(values) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
    return np.asarray(values)


def _scores(values) -> np.ndarray:
    """Check scores and keep float32 or float64, whichever they fit without loss."""
    values = _array(values)
    if values.dtype not in (np.float32, np.float64):
        values = values.astype(np.float32 if values.dtype == np.float16 else np.float64)
    if values.size == 0:
        raise ValueError("nothing to judge: the input is empty")
    if np.isnan(values).any():
        raise ValueError("scores or maps hold NaN")
    return values


def _binary(values, name: str) -> np.ndarray:
    """Check that there is nothing but 0 and 1, and make it bool."""
    values = _array(values)
    if values.dtype == bool:
        return values
    ones = values == 1
    if np.count_nonzero(ones) != np.count_nonzero(values):
        strange = values[~ones & (values != 0)].flat[0]
        raise ValueError(f"{name} must hold only 0 and 1, found {strange}; binarise them first")
    return ones


def as_images(values) -> np.ndarray:
    """Bring (H, W), (N, H, W) or (N, 1, H, W) to (N, H, W)."""
    values = _array(values)
    if values.ndim == 4 and values.shape[1] == 1:
        return values[:, 0]
    if values.ndim not in (2, 3):
        raise ValueError(f"expected (N, H, W) or (N, 1, H, W), got shape {values.shape}")
    return values if values.ndim == 3 else values[None]


def paired_maps(maps, masks) -> tuple[np.ndarray, np.ndarray]:
    """Maps and masks (N, H, W), checked: of one size, without NaN, masks bool."""
    maps, masks = _scores(as_images(maps)), _binary(as_images(masks), "masks")
    if maps.shape != masks.shape:
        raise ValueError(f"maps {maps.shape} and masks {masks.shape} differ in size")
    return maps, masks
