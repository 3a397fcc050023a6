"""Exact scores of anomaly maps: image, pixel and region metrics.

How many normal pixels (or images) score at least as high as each defective one? One sort answers
that for every threshold, ties included. The PRO curve is the ROC curve with each defective pixel
weighted by one over the area of its region, so that a scratch counts as much as a stain.
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
    """Image AUROC, AP and F1max, in [0, 1], of scores (N,) and labels (N,), 1 for a defect.

    A value that is not defined (no defective image; for the AUROC also no good one) is NaN, with a
    warning. Raises ValueError for empty input, different lengths, NaN, labels other than 0 and 1.
    """
    ranking = Ranking.of(scores, labels)
    ranking.warn_if_one_sided("image")
    values = ranking.auroc(), ranking.average_precision(), ranking.f1max()
    return dict(zip(METRICS[:3], values, strict=True))


def pixel_metrics(maps, masks, fpr_limit: float = 0.3) -> dict[str, float]:
    """Pixel AUROC, AP and F1max, and AUPRO, in [0, 1], over the pixels of all images together.

    Maps (larger is more abnormal) and masks, in {0, 1}, are (N, H, W), (N, 1, H, W) or (H, W). The
    PRO curve is, at each threshold, the share of a defective region that is found, averaged over
    the regions (8-connected) of all images. It stops at `fpr_limit`, and its area is divided by
    that: 1 is perfect, a constant map gets `fpr_limit / 2`. The rest is as for `image_metrics`.
    """
    maps, masks = paired_maps(maps, masks)
    ranking = Ranking.of(maps, masks)
    ranking.warn_if_one_sided("pixel")
    values = ranking.auroc(), ranking.average_precision(), ranking.f1max()
    area = ranking.weighted(region_weights(masks)).auroc(fpr_limit)  # M6
    return dict(zip(METRICS[3:], (*values, area), strict=True))


def aupro(maps, masks, fpr_limit: float = 0.3) -> float:
    """Area under the per-region overlap curve alone: see `pixel_metrics`."""
    return pixel_metrics(maps, masks, fpr_limit)["aupro"]


def region_weights(masks: np.ndarray) -> np.ndarray:
    """One over the area of its region, for each defective pixel of masks (N, H, W)."""
    weights = [np.empty(0)]
    for mask in masks:
        if mask.any():
            region = ndimage.label(mask, EIGHT_NEIGHBOURS)[0][mask]
            weights.append(1 / np.bincount(region)[region])  # M5
    return np.concatenate(weights)


@dataclass(frozen=True)
class Ranking:
    """Where each positive stands among the negatives, at the K distinct scores of positives.

    They fall from the highest; between two of them only false positives are added.
    """

    hits: np.ndarray  # (K,) positives (or their weight) that score at least the threshold
    above: np.ndarray  # (K,) negatives that score more than the threshold
    at_least: np.ndarray  # (K,) negatives that score at least as much
    positives: float  # how many there are (or their weight)
    negatives: float
    order: np.ndarray | None = None  # sorts the positives
    last: np.ndarray | None = None  # where in it each threshold ends

    @classmethod
    def of(cls, scores, labels) -> Ranking:
        """Rank scores (any shape) with labels of the same shape in {0, 1}."""
        scores, labels = _scores(scores), _binary(labels, "labels")
        if scores.shape != labels.shape:
            raise ValueError(f"{scores.shape} scores do not fit {labels.shape} labels")
        positive, negative = scores[labels], np.sort(scores[~labels])
        p, n, order = positive.size, negative.size, np.argsort(-positive)
        falling = positive[order]
        last = np.flatnonzero(np.append(falling[1:] != falling[:-1], True)[:p])
        less, up_to = (np.searchsorted(negative, falling[last], s) for s in ("left", "right"))
        return cls(last + 1, n - up_to, n - less, p, n, order, last)

    def weighted(self, weights: np.ndarray) -> Ranking:
        """Count each positive with its weight, given in the order of the labels."""
        total = np.cumsum(weights[self.order])
        return replace(self, hits=total[self.last], positives=total[-1] if total.size else 0)

    def roc(self) -> tuple[np.ndarray, np.ndarray]:
        """False- and true-positive rates at the corners of the ROC curve, both rising to 1."""
        if not self.positives or not self.negatives:
            raise ValueError("a ROC curve needs defective and normal samples")
        false, true = self._corners()
        return false / self.negatives, true / self.positives  # M1

    def precision_recall(self) -> tuple[np.ndarray, np.ndarray]:
        """Precision and recall at each threshold; recall rises to 1."""
        if not self.positives:
            raise ValueError("a precision-recall curve needs defective samples")
        return self.hits / (self.hits + self.at_least), self.hits / self.positives  # M2

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
        return min(float(trapezoid(true, false) / (limit * self.positives)), 1.0)  # M4

    def average_precision(self) -> float:
        """Precision averaged over the steps of recall (no interpolation)."""
        if not self.positives:
            return float("nan")
        precision, _ = self.precision_recall()
        return min(float(np.diff(self.hits, prepend=0) @ precision / self.positives), 1.0)  # M3

    def f1max(self) -> float:
        """Best F1 score of all thresholds."""
        if not self.positives:
            return float("nan")
        return float(np.max(2 * self.hits / (self.hits + self.at_least + self.positives)))  # M2

    def warn_if_one_sided(self, what: str) -> None:
        """Say why a metric will be NaN."""
        if not self.positives:
            warnings.warn(
                f"no {what} is defective: its metrics are not defined (NaN)", stacklevel=3
            )
        elif not self.negatives:
            warnings.warn(f"no {what} is normal: areas over the FPR are NaN", stacklevel=3)

    def _corners(self) -> tuple[np.ndarray, np.ndarray]:
        """Counts of false and true positives where the ROC curve bends, from (0, 0)."""
        before = np.append(0, self.hits)[:-1]
        false = np.stack([self.above, self.at_least], axis=1).ravel()
        true = np.stack([before, self.hits], axis=1).ravel()
        # As float64, because an area, a product of two counts, may be beyond int64.
        return np.r_[0.0, false, self.negatives], np.r_[0.0, true, self.positives]


def _scores(values) -> np.ndarray:
    """Check scores and keep float32 or float64, whichever they fit without loss."""
    values = _array(values)
    if values.dtype not in (np.float32, np.float64):
        values = values.astype(np.float32 if values.dtype == np.float16 else np.float64)
    if values.size == 0 or np.isnan(values).any():
        raise ValueError("nothing to judge: the input is empty, or scores or maps hold NaN")
    return values


def _binary(values, name: str) -> np.ndarray:
    """Check that there is nothing but 0 and 1, and make it bool."""
    values = _array(values)
    if not ((values == 0) | (values == 1)).all():
        strange = values[(values != 0) & (values != 1)].flat[0]
        raise ValueError(f"{name} must hold only 0 and 1, found {strange}; binarise them first")
    return values.astype(bool)


def _array(values) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
    return np.asarray(values)


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
