"""How sure is a number? Confidence intervals of metrics, by drawing the test images again.

A test set is a sample; another one of the same size would give other numbers. The bootstrap draws
images from it with replacement, many times, and looks at how much a metric moves.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from pandas import DataFrame
from torch import Tensor

from diffad_ref.evaluation import Report
from diffad_ref.metrics import Ranking
from diffad_ref.tools import tables


def intervals(
    report: Report, draws: int = 1000, level: float = 0.95, seed: int = 0, bins: int = 1000
) -> dict[str, list[float]]:
    """Confidence intervals of a report's means over its categories, as `redrawn` finds them.

    `level` is the share of the draws that lie inside. Returns the lowest and the highest value of
    AUROC and AP, of images and of pixels.
    """
    found = redrawn(report, draws, seed, bins)
    return {name: _middle(values, level) for name, values in found.items()}


def difference(
    report: Report,
    other: Report,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    bins: int = 1000,
) -> dict[str, list[float]]:
    """By how much a report leads another on the same images: [lead, lowest, highest] by metric.

    Both are judged on the same draws: the paired bootstrap. A draw that holds many hard images
    pulls both down, so an interval is often narrower than those of the two reports together.
    Raises ValueError if they were not judged on the same images; the order does not matter.
    """
    tables.require_same_images({"one report": report, "the other": other})
    report, other = _sorted(report), _sorted(other)
    if not report.images["path"].equals(other.images["path"]):
        raise ValueError("the reports were not judged on the same images: their paths differ")
    one, two = (redrawn(r, draws, seed, bins) for r in (report, other))
    leads = {name: report.mean[name] - other.mean[name] for name in one}
    return {name: [leads[name], *_middle(one[name] - two[name], level)] for name in one}


def table(reports: dict[str, Report], **options) -> tables.Shown:
    """Means over the categories with their `intervals`, one row a report."""
    rows = {}
    for name, report in reports.items():
        rows[name] = {
            tables.HEADERS[m]: f"{100 * report.mean[m]:.1f} ({100 * low:.1f} to {100 * high:.1f})"
            for m, (low, high) in intervals(report, **options).items()
        }
    return tables.Shown(DataFrame.from_dict(rows, orient="index").rename_axis("method"))


def _middle(values: np.ndarray, level: float) -> list[float]:
    return np.percentile(values, [50 * (1 - level), 50 * (1 + level)]).tolist()


def _sorted(report: Report) -> Report:
    """The same with its images in the order of their names."""
    images = report.images.reset_index(drop=True)
    order = images.sort_values(["category", "path"]).index.to_numpy(copy=True)
    parts = {n: None if (v := getattr(report, n)) is None else v[order] for n in ("maps", "masks")}
    return replace(report, images=images.iloc[order].reset_index(drop=True), **parts)


def redrawn(
    report: Report, draws: int = 1000, seed: int = 0, bins: int = 1000
) -> dict[str, np.ndarray]:
    """A report's means over its categories, in many draws of its images.

    Good and defective images of each category are drawn again separately. Pixels are not: those
    of one image say nearly the same. Reports on the same images, in the same order, get the same
    draws for the same seed; for two of them there is `difference`.

    Parameters
    ----------
    report : Report
        With its maps and masks, as `evaluate` returns it.
    draws, seed : int
    bins : int
        Pixel values are sorted into bins between so many quantiles of the defective and as many
        of the normal pixels, so that each draw costs a matrix product and no sorting.

    Returns
    -------
    dict
        The values (draws,) of AUROC and AP, of images and of pixels, where they are defined.
    """
    if report.maps is None:
        raise ValueError("the report has no maps: they are not saved, evaluate again")
    rng, found = np.random.default_rng(seed), {}
    category = report.images["category"].to_numpy()
    score, bad = report.images["score"].to_numpy(), report.images["label"].to_numpy() == 1
    for name in sorted(set(category)):
        mine = category == name
        times = _draw(bad[mine], draws, rng)  # (draws, images)
        for metric, values in _judge(
            score[mine], bad[mine], report.maps[mine], report.masks[mine], times, bins
        ).items():
            found.setdefault(metric, []).append(values)
    return {metric: np.mean(values, 0) for metric, values in found.items()}


def _draw(bad: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """How often each image is in each draw (draws, images)."""
    times = np.zeros((draws, len(bad)))
    for group in (np.flatnonzero(bad), np.flatnonzero(~bad)):
        if len(group):
            times[:, group] = rng.multinomial(len(group), [1 / len(group)] * len(group), draws)
    return times


def _judge(score, bad, maps: Tensor, masks: Tensor, times, bins: int) -> dict[str, np.ndarray]:
    """Metrics (draws,) of one category."""
    found = {}
    if bad.any() and not bad.all():
        _, place = np.unique(score, return_inverse=True)
        own = np.eye(place.max() + 1)[place]  # (images, places): where each image's score stands
        counts = times @ (own * bad[:, None]), times @ (own * ~bad[:, None])
        found |= dict(zip(("image_auroc", "image_ap"), _areas(*counts), strict=True))
    maps, masks = maps.flatten(1).numpy(), masks.flatten(1).numpy()
    known = ~bad | masks.any(1)  # pixel metrics leave out images whose mask is missing
    if masks.any() and not masks.all():
        steps = np.linspace(0, 1, bins)
        edges = np.union1d(*(np.quantile(maps[masks == side], steps) for side in (True, False)))
        place = np.searchsorted(edges, maps, side="right")
        counts = [
            np.stack(
                [
                    np.bincount(p[m == side], minlength=len(edges) + 1)
                    for p, m in zip(place[known], masks[known], strict=True)
                ]
            )
            for side in (True, False)
        ]
        areas = _areas(*(times[:, known] @ count for count in counts))
        found |= dict(zip(("pixel_auroc", "pixel_ap"), areas, strict=True))
    return found


def _areas(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision (draws,) from counts (draws, places), places rising."""
    rankings = [ranking_of_counts(*counts) for counts in zip(positive, negative, strict=True)]
    found = [(ranking.auroc(), ranking.average_precision()) for ranking in rankings]
    return tuple(np.array(found).T)


def ranking_of_counts(positives: np.ndarray, negatives: np.ndarray) -> Ranking:
    """A ranking from how many there are at each of K scores, rising; counts may be weights."""
    positive, negative = positives[::-1], negatives[::-1]
    hits, found = positive.cumsum(), negative.cumsum()
    at = positive > 0  # only the scores of positives are thresholds
    return Ranking(hits[at], (found - negative)[at], found[at], positive.sum(), negative.sum())
