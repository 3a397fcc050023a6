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


def top_k_mean(maps, k: int = 50) -> torch.Tensor:
    """Score each image by the mean of its `k` largest pixels (D11).

    A single pixel is noise and the mean of all pixels forgets a small defect; this lies between.

    Parameters
    ----------
    maps : Tensor or array (B, H, W) or (B, 1, H, W)
    k : int
        Pixels to average; all of them when the map has fewer.

    Returns
    -------
    Tensor (B,)
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    pixels = torch.as_tensor(maps).flatten(1)
    return pixels.topk(min(k, pixels.shape[1]), dim=1).values.mean(dim=1)


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


def pixel_metrics(maps, masks, fpr_limit: float = 0.3, bins: int | None = None) -> dict[str, float]:
    """Judge anomaly maps against masks, over the pixels of all images together.

    Parameters
    ----------
    maps : Tensor or array (N, H, W) or (N, 1, H, W)
        Larger is more abnormal. A single (H, W) map will do as well.
    masks : Tensor or array of the same size, in {0, 1}
    fpr_limit : float in (0, 1]
        Where the PRO curve stops, see `aupro`.
    bins : int, optional
        Round the maps to that many equal steps between their smallest and largest value: faster
        for millions of pixels, and off by no more than `Ranking.rounding_error` says. A warning
        tells when that is more than 0.001. Without it the metrics are exact.

    Returns
    -------
    dict with pixel_auroc, pixel_ap, pixel_f1max and aupro, each in [0, 1]. A value that is not
    defined (no defective pixel; for the areas also no normal one) is NaN, with a warning.

    Raises
    ------
    ValueError
        Empty input, different sizes, NaN in a map, masks other than 0 and 1, a limit not in
        (0, 1]; with bins: infinite values, fewer than 2 bins.
    """
    maps, masks = paired_maps(maps, masks)
    ranking = Ranking.of(maps, masks, bins)
    ranking.warn_if_one_sided("pixel")
    regions = ranking.weighted(region_weights(masks))
    if bins is not None:
        _warn_if_coarse(ranking, regions, fpr_limit, bins)
    return {
        "pixel_auroc": ranking.auroc(),
        "pixel_ap": ranking.average_precision(),
        "pixel_f1max": ranking.f1max(),
        "aupro": regions.auroc(fpr_limit),
    }


def aupro(maps, masks, fpr_limit: float = 0.3) -> float:
    """Area under the per-region overlap curve, up to a false-positive rate.

    At each threshold, the overlap is the share of a defective region that is found, averaged over
    the regions (8-connected) of all images. The area up to `fpr_limit`, where the curve is
    interpolated, is divided by `fpr_limit`: 1 is perfect, a constant map gets ``fpr_limit / 2``.

    Parameters, errors and undefined cases are those of `pixel_metrics`.
    """
    maps, masks = paired_maps(maps, masks)
    ranking = Ranking.of(maps, masks)
    ranking.warn_if_one_sided("pixel")
    return ranking.weighted(region_weights(masks)).auroc(fpr_limit)


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
    thresholds : array (K,)
        Distinct scores of the positives, falling.
    hits : array (K,)
        Positives (or their weight) that score at least the threshold.
    above, at_least : array (K,)
        Negatives that score more than the threshold, and those that score at least that much.
    positives, negatives : number
        How many there are (for positives: their weight).
    order, last : array
        Sorting of the positives, and the last position of each threshold in it.
    """

    thresholds: np.ndarray
    hits: np.ndarray
    above: np.ndarray
    at_least: np.ndarray
    positives: float
    negatives: int
    order: np.ndarray
    last: np.ndarray

    @classmethod
    def of(cls, scores, labels, bins: int | None = None) -> Ranking:
        """Rank scores (any shape) with labels of the same shape in {0, 1}.

        With `bins`, the scores are first rounded down to one of so many equal steps between the
        smallest and the largest; thresholds are then numbers of steps.
        """
        scores, labels = _scores(scores), _binary(labels, "labels")
        if scores.shape != labels.shape:
            raise ValueError(f"{scores.shape} scores do not fit {labels.shape} labels")
        if bins is not None:
            scores = _steps(scores, bins)
        positive = scores[labels]
        order = np.argsort(-positive)
        falling = positive[order]
        last = np.flatnonzero(np.append(falling[1:] != falling[:-1], True)[: falling.size])
        thresholds = falling[last]
        if bins is None:
            less, up_to = _count_sorted(scores[~labels], thresholds)
        else:
            less, up_to = _count_steps(scores, positive, thresholds, bins)
        negatives = scores.size - positive.size
        return cls(
            thresholds=thresholds,
            hits=last + 1,
            above=negatives - up_to,
            at_least=negatives - less,
            positives=positive.size,
            negatives=negatives,
            order=order,
            last=last,
        )

    def rounding_error(self, fpr_limit: float = 1.0) -> dict[str, float]:
        """How far each metric can lie from that of the same scores without their ties.

        An AUROC counts a tie of a positive and a negative as half; it may be won or lost. For
        the others, which have no weights, the best and the worst order of a tie are bounded.
        """
        hits, before = self.hits, np.append(0, self.hits[:-1])
        won, tied = hits - before, self.at_least - self.above
        value = hits / (hits + self.at_least)
        best = hits / (hits + self.above)
        first = before + np.minimum(won, 1)
        worst = first / (first + self.at_least)
        f1max = np.max(2 * hits / (hits + self.above + self.positives))
        return {
            "auroc": won @ tied / (2 * self.positives * self.negatives * fpr_limit),
            "average_precision": won @ np.maximum(best - value, value - worst) / self.positives,
            "f1max": f1max - self.f1max(),
        }

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
            message = f"no {what} is defective: the {what} metrics are not defined (NaN)"
        elif not self.negatives:
            message = f"no {what} is normal: areas over the false-positive rate are NaN"
        else:
            return
        warnings.warn(message, stacklevel=3)

    def _corners(self) -> tuple[np.ndarray, np.ndarray]:
        """Counts of false and true positives where the ROC curve bends, from (0, 0)."""
        before = np.concatenate([[0], self.hits[:-1]])
        false = np.stack([self.above, self.at_least], axis=1).ravel()
        true = np.stack([before, self.hits], axis=1).ravel()
        return np.concatenate([[0], false, [self.negatives]]), np.concatenate(
            [[0], true, [self.positives]]
        )


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


def _count_sorted(negative: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Negatives below each threshold, and those up to it."""
    negative = np.sort(negative)
    return tuple(np.searchsorted(negative, thresholds, side) for side in ("left", "right"))


def _count_steps(
    steps: np.ndarray, positive: np.ndarray, thresholds: np.ndarray, bins: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same for scores that are numbers of steps: no sorting, a table of counts."""
    counts = -np.bincount(positive, minlength=bins)
    for part in np.atleast_2d(
        steps
    ):  # an image at a time: bincount copies what it counts into 64 bits
        counts += np.bincount(np.ravel(part), minlength=bins)
    up_to = np.cumsum(counts)
    return np.append(0, up_to)[thresholds], up_to[thresholds]


def _steps(scores: np.ndarray, bins: int) -> np.ndarray:
    """Number (int32) of the step, of `bins` between the smallest and the largest, of each score."""
    if bins < 2:
        raise ValueError(f"bins must be at least 2, got {bins}")
    low, high = float(scores.min()), float(scores.max())
    if not np.isfinite(high - low):
        raise ValueError("scores or maps with infinite values cannot be put into bins")
    scale = bins / (high - low) if high > low else 0.0
    steps = np.empty(scores.shape, np.int32)
    for part, out in zip(np.atleast_2d(scores), np.atleast_2d(steps), strict=True):
        out[...] = np.minimum((part - low) * scale, bins - 1)
    return steps


def _warn_if_coarse(pixels: Ranking, regions: Ranking, fpr_limit: float, bins: int) -> None:
    if pixels.positives and pixels.negatives:
        errors = [*pixels.rounding_error().values(), regions.rounding_error(fpr_limit)["auroc"]]
        if max(errors) > 1e-3:
            warnings.warn(
                f"with {bins} bins the metrics may be off by {max(errors):.2g}: take more bins, or "
                "none for exact values",
                stacklevel=3,
            )


def paired_maps(maps, masks) -> tuple[np.ndarray, np.ndarray]:
    maps, masks = _scores(as_images(maps)), _binary(as_images(masks), "masks")
    if maps.shape != masks.shape:
        raise ValueError(f"maps {maps.shape} and masks {masks.shape} differ in size")
    return maps, masks
