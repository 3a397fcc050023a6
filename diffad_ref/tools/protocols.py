"""How the papers measure: their released metrics, and their tasks for continual learning.

`metrics` holds what the names promise. These are not: each says what it does differently.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from scipy.integrate import trapezoid

from diffad_ref.data import AnomalyFolder, resize_image
from diffad_ref.diffusion_ad import top_k_mean
from diffad_ref.metrics import (
    EIGHT_NEIGHBOURS,
    Ranking,
    as_images,
    image_metrics,
    paired_maps,
    pixel_metrics,
)

# ------------------------------------------------------------------------------------ DiffusionAD


def pro_curve_diffusion_ad(maps, masks) -> tuple[np.ndarray, np.ndarray]:
    """Compute the overlap curve as the released evaluation of DiffusionAD does.

    It differs from `aupro` in five facts, kept here to compare numbers like with like:
    masks are truncated to integers (of a resized mask, only pixels equal to 1 count); there are
    1000 equal steps from the largest value towards the smallest, which is never reached, and a
    pixel is found when it lies *above* the threshold; the overlap counts found pixels in the
    region *with its holes filled* but divides by the area without them, so it can exceed 1;
    thresholds with a false-positive rate above 0.3 are dropped without interpolation; and the
    rates that stay are stretched to [0, 1] by their own smallest and largest value.

    Parameters
    ----------
    maps : Tensor or array (N, H, W) or (N, 1, H, W), finite
    masks : Tensor or array of the same size, in [0, 1]

    Returns
    -------
    fpr, pro : arrays (K,)
        Stretched false-positive rate and mean overlap at the thresholds that stay.

    Raises
    ------
    ValueError
        Sizes differ, or there is no defective pixel, no normal one, or a map without contrast.
    """
    truncated = as_images(masks).astype(np.int64)
    maps, masks = paired_maps(maps, truncated)
    _check_contrast(maps, masks)
    highest, lowest = maps.max(), maps.min()
    thresholds = highest - np.arange(1000) * (highest - lowest) / 1000
    found = _share_above(maps[~masks], thresholds)
    overlap = np.mean(
        [_share_above(inside, thresholds) * inside.size / area
         for inside, area in _filled_regions(maps, masks)],
        axis=0,
    )  # fmt: skip
    keep = found <= 0.3
    fpr, pro = found[keep], overlap[keep]
    width = fpr.max() - fpr.min()
    return (fpr - fpr.min()) / (width if width > 0 else 1.0), pro


def aupro_diffusion_ad(maps, masks) -> float:
    """Area under `pro_curve_diffusion_ad`; unlike `aupro` it is not bounded by 1."""
    fpr, pro = pro_curve_diffusion_ad(maps, masks)
    return float(trapezoid(pro, fpr))


def _filled_regions(maps: np.ndarray, masks: np.ndarray):
    """Yield for each region the map inside its filled outline, and its area without holes."""
    for values, mask in zip(maps, masks, strict=True):
        regions, count = ndimage.label(mask, EIGHT_NEIGHBOURS)
        for number in range(1, count + 1):
            region = regions == number
            filled = ndimage.binary_fill_holes(region, EIGHT_NEIGHBOURS)
            yield values[filled], region.sum()


# ------------------------------------------------------------------- DeCo-Diff and One-for-More


def pro_curve_deco_diff(maps, masks, steps: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Compute the overlap curve as the released evaluations of DeCo-Diff and One-for-More do.

    It differs from `aupro` in two facts: there are `steps` equal thresholds from the smallest
    value on, the largest left out; and those with a false-positive rate of 0.3 or more are
    dropped without interpolation, after which the rates are divided by the largest that stays.

    Parameters, returned values and errors as for `pro_curve_diffusion_ad`; the masks hold only
    0 and 1, and the rates fall.
    """
    maps, masks = paired_maps(maps, masks)
    _check_contrast(maps, masks)
    thresholds = np.arange(steps) * ((maps.max() - maps.min()) / steps) + maps.min()
    found = _share_above(maps[~masks], thresholds)
    overlap = np.mean(
        [_share_above(inside, thresholds) for inside in _regions(maps, masks)], axis=0
    )
    keep = found < 0.3
    fpr, pro = found[keep], overlap[keep]
    return fpr / (fpr.max() or 1.0), pro  # a perfect map has no false positive


def aupro_deco_diff(maps, masks, steps: int = 200) -> float:
    """Area under `pro_curve_deco_diff`."""
    fpr, pro = pro_curve_deco_diff(maps, masks, steps)
    return float(-trapezoid(pro, fpr))


def _regions(maps: np.ndarray, masks: np.ndarray):
    """Yield the map inside each region of the masks."""
    for values, mask in zip(maps, masks, strict=True):
        regions, count = ndimage.label(mask, EIGHT_NEIGHBOURS)
        for number in range(1, count + 1):
            yield values[regions == number]


# ---------------------------------------------------------------------------------- One-for-More

POOLED = (8,) * 8  # averages that come before the image score


def metrics_one_for_more(maps, masks) -> dict[str, float]:
    """Judge the maps of one category as the released evaluation of One-for-More does.

    Any mask value above 0 counts as a defect, of a resized mask also the faintest. An AUROC below
    0.5 is replaced by 1 minus itself, so a detector that is wrong throughout looks right. And the
    image score of AP and F1 is another one than that of the AUROC, see `pooled_score`.

    Parameters
    ----------
    maps : Tensor or array (N, H, W) or (N, 1, H, W), at least 58 pixels high and wide
    masks : Tensor or array of the same size

    Returns
    -------
    dict with the released names. AUROC of images by their "max", "mean" and "std", and of
    "pixel"; AP "apsp" and "appx", best F1 "f1sp" and "f1px", area under the precision-recall
    curve "auprsp" and "auprpx", each of images and of pixels; AUPRO "pro" as for DeCo-Diff.

    Raises
    ------
    ValueError
        Too small maps, and what `pro_curve_diffusion_ad` raises.
    """
    maps, masks = paired_maps(maps, as_images(masks) > 0)
    labels = masks.any((1, 2))
    images, pixels = Ranking.of(pooled_score(maps), labels), Ranking.of(maps, masks)
    return {
        "max": folded_auroc(maps.max((1, 2)), labels),
        "mean": folded_auroc(maps.mean((1, 2)), labels),
        "std": folded_auroc(maps.std((1, 2)), labels),
        "pixel": folded_auroc(maps, masks),
        "pro": aupro_deco_diff(maps, masks),
        "apsp": images.average_precision(),
        "appx": pixels.average_precision(),
        "f1sp": images.f1max(),
        "f1px": pixels.f1max(),
        "auprsp": sampled_aupr(pooled_score(maps, (*POOLED, 2)), labels),
        "auprpx": sampled_aupr(maps, masks),
    }


def pooled_score(maps, sizes: tuple[int, ...] = POOLED) -> np.ndarray:
    """Score images by the maximum of their maps, averaged over and over without a border.

    Parameters
    ----------
    maps : array (N, H, W)
    sizes : tuple of int
        Pixels, in height and in width, of each average.

    Returns
    -------
    array (N,)
    """
    pooled = torch.as_tensor(maps)[:, None]
    smallest = 1 + sum(size - 1 for size in sizes)
    if min(pooled.shape[-2:]) < smallest:
        raise ValueError(f"maps must have {smallest} x {smallest} pixels or more to be averaged")
    for size in sizes:
        pooled = F.avg_pool2d(pooled, size, stride=1)
    return pooled.flatten(1).amax(1).numpy()


def folded_auroc(scores, labels) -> float:
    """AUROC, or 1 minus it where that is larger."""
    auroc = Ranking.of(scores, labels).auroc()
    return max(auroc, 1 - auroc)


def sampled_aupr(scores, labels, steps: int = 200) -> float:
    """Area under the precision-recall curve, by trapezia, rounded to 4 digits.

    What lies *above* a threshold is found. There are `steps` thresholds in equal distances from
    the largest score of a defect to the smallest, one that finds nothing, with precision 1, and
    one that finds everything.
    """
    scores, labels = np.ravel(scores), np.ravel(labels).astype(bool)
    defects = np.sort(scores[labels])
    thresholds = [np.inf, *np.linspace(defects[-1], defects[0], steps), -np.inf]
    hits = _share_above(defects, thresholds) * defects.size
    found = _share_above(scores, thresholds) * scores.size
    precision = np.divide(hits, found, out=np.ones_like(hits), where=found > 0)
    return round(float(trapezoid(precision, hits / defects.size)), 4)


# ---------------------------------------------------------------------------------- by their names


@dataclass(frozen=True)
class Protocol:
    """How a released code makes the seven metrics of maps; for `evaluate(..., protocol=...)`.

    Attributes
    ----------
    name : str
    score : callable
        Image scores (N,) of maps (N, H, W), for the AUROC.
    aupro : callable
        Of maps and masks.
    other_score : callable, optional
        Image scores for AP and F1max, where those are others.
    folded : bool
        An AUROC below 0.5 is replaced by 1 minus itself.
    shade : str
        Which pixels of a mask count that was resized as its image is: those that are "full"
        defect, or "any" that is not quite normal.
    labels_from_masks : bool
        An image whose mask is empty, such as one whose defect is cropped away, counts as normal.
    """

    name: str
    score: Callable
    aupro: Callable
    other_score: Callable | None = None
    folded: bool = False
    shade: str = "any"
    labels_from_masks: bool = False

    def with_its_masks(self, dataset):
        """The same samples with masks by the protocol's rule, made from the original ones."""
        if not isinstance(dataset, AnomalyFolder):
            return dataset
        if self.labels_from_masks and not dataset.has_masks:
            raise ValueError(f"{self.name} reads labels from masks: a defective image has none")
        dataset = copy(dataset)
        settings = {"resample": dataset.resample, "shade": self.shade}
        dataset.resize_mask, dataset._cache = partial(shaded_mask, **settings), {}
        return dataset

    def image_metrics(self, maps, scores, labels) -> dict[str, float]:
        """As `metrics.image_metrics`, but of maps; what the detector scored is not looked at."""
        maps = as_images(maps)
        found = image_metrics(self.score(maps), labels)
        if self.other_score is not None:
            auroc = found["image_auroc"]
            found = image_metrics(self.other_score(maps), labels) | {"image_auroc": auroc}
        return self._folded(found, "image_auroc")

    def pixel_metrics(self, maps, masks) -> dict[str, float]:
        """As `metrics.pixel_metrics`, with the protocol's AUPRO."""
        found = pixel_metrics(maps, masks) | {"aupro": self.aupro(maps, masks)}
        return self._folded(found, "pixel_auroc")

    def _folded(self, found: dict[str, float], name: str) -> dict[str, float]:
        return found | {name: max(found[name], 1 - found[name])} if self.folded else found


def shaded_mask(mask: np.ndarray, size: tuple[int, int], resample: str, shade: str) -> np.ndarray:
    """Resize a binary mask (H, W) as an image, and keep its "full" pixels, or "any" above 0."""
    grey = Image.fromarray(255 * mask).convert("RGB")
    least = {"full": 255, "any": 1}[shade]
    return (resize_image(grey, size, resample)[..., 0] >= least).astype(np.uint8)


def _largest(maps: np.ndarray) -> np.ndarray:
    """Score images by their largest pixel (C10, O4)."""
    return maps.max((1, 2))


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("diffusion_ad", top_k_mean, aupro_diffusion_ad, shade="full"),
        Protocol("deco_diff", _largest, aupro_deco_diff, labels_from_masks=True),
        Protocol("one_for_more", _largest, aupro_deco_diff, pooled_score, folded=True),
    )
}


# ------------------------------------------------------------------------------------------ both


def _share_above(values: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Share of the values that lie above each threshold."""
    return 1 - np.searchsorted(np.sort(values), thresholds, side="right") / values.size


def _check_contrast(maps: np.ndarray, masks: np.ndarray) -> None:
    highest, lowest = maps.max(), maps.min()
    if not masks.any() or masks.all() or not np.isfinite(highest - lowest) or highest == lowest:
        raise ValueError(
            "this protocol needs defective and normal pixels and finite maps that vary"
        )


# -------------------------------------------------------------------------------------- tasks

MVTEC = (
    *("bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut"),
    *("pill", "screw", "tile", "toothbrush", "transistor", "wood", "zipper"),
)
_LATE = ("tile", "toothbrush", "transistor", "wood", "zipper")
_EARLY = tuple(name for name in MVTEC if name not in _LATE)
VISA = (
    *("candle", "capsules", "cashew", "chewinggum", "fryum", "macaroni1", "macaroni2"),
    *("pcb1", "pcb2", "pcb3", "pcb4", "pipe_fryum"),
)

# The settings of the paper: which classes come in which task; and three tasks of the toy factory.
ORDERS = {
    "mvtec 14-1": (MVTEC[:-1], MVTEC[-1:]),
    "mvtec 10-5": (_EARLY, _LATE),
    "mvtec 3x5": tuple(MVTEC[i : i + 3] for i in range(0, 15, 3)),
    "mvtec 10-1x5": (_EARLY, *((name,) for name in _LATE)),
    "visa 11-1": (VISA[:-1], VISA[-1:]),
    "visa 8-4": (VISA[:8], VISA[8:]),
    "visa 8-1x4": (VISA[:8], *((name,) for name in VISA[8:])),
    "toy": (("board", "brick"), ("capsule", "grass"), ("gear", "gravel")),
}
