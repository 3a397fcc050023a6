"""All seven metrics against the packages that people use for them; neither is a requirement."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from bench.maps import anomaly_maps
from bench.table import Row
from bench.timing import best
from diffad_ref.diffusion_ad import top_k_mean
from diffad_ref.metrics import image_metrics, pixel_metrics

TOPIC = "metrics"
FASTER = 10  # than scikit-learn and anomalib's AUPRO together
SLOWER = 3  # than ADEval, which is approximate


def rows(device: torch.device, count: int = 60, size: int = 256, rounds: int = 3) -> list[Row]:
    """Time and agreement on the CPU, whatever the device."""
    maps, masks = anomaly_maps(count, size)
    scores, labels = top_k_mean(maps).numpy(), masks.any((1, 2))
    data = (maps, masks, scores, labels)
    calls = {"ours": partial(seven, *data), "scikit-learn": partial(by_sklearn, *data)}
    lacking = {}
    for name, make in (("anomalib", anomalib_aupro), ("ADEval", adeval_metrics)):
        try:
            calls[name] = make(*data)
            calls[name]()
        except ImportError:
            lacking[name] = f"{name} is not installed"
        except Exception as error:  # somebody else's package must not cost us the other rows
            lacking[name] = f"{name} does not run here: {error}"
        if name in lacking:
            calls.pop(name, None)
    seconds = dict(zip(calls, best(*calls.values(), rounds=rounds), strict=True))
    what = f"of {count} maps {size} x {size}"
    return [
        *speed(seconds, lacking, what),
        *agreement({name: call() for name, call in calls.items()}, lacking),
    ]


def speed(seconds: dict[str, float], lacking: dict[str, str], what: str) -> list[Row]:
    """Rows of the times that were measured, and of what could not be."""
    rival, there = "scikit-learn's six", seconds["scikit-learn"]
    if "anomalib" in seconds:
        rival, there = rival + " + anomalib's AUPRO", there + seconds["anomalib"]
    here, measured, there_too = seconds["ours"], f"seven metrics {what}", seconds.get("ADEval")
    note = lacking.get("anomalib", f"AUPRO {seconds.get('anomalib', 0):.2f} s of it")
    other = lacking.get("ADEval", "approximate, five of the seven; its F1max is no F1")
    return [
        Row(TOPIC, measured, here, "s", rival, there, FASTER, note),
        Row(TOPIC, measured, here, "s", "ADEval", there_too, 1 / SLOWER, other),
    ]


def agreement(values: dict[str, dict[str, float]], lacking: dict[str, str]) -> list[Row]:
    """Rows of the largest difference between our values and everybody else's."""
    allowed = {
        "scikit-learn": (1e-9, ""),
        "anomalib": (1e-3, "sums in single precision"),
        "ADEval": (None, "a thousand thresholds; trapezia under the precision-recall curve"),
    }
    out = []
    for name, (limit, note) in allowed.items():
        measured = f"largest difference to {name}"
        if name in values:
            apart = largest_difference(values["ours"], values[name])
            rival = "limit" if limit else ""
            target = 1 if limit else None
            out.append(Row(TOPIC, measured, apart, "", rival, limit, target, note))
        elif name in lacking:
            out.append(Row(TOPIC, measured, None, note=lacking[name]))
    return out


def largest_difference(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Over the metrics that both know."""
    return max(abs(ours[name] - theirs[name]) for name in theirs)


def seven(maps, masks, scores, labels) -> dict[str, float]:
    """Our own."""
    return image_metrics(scores, labels) | pixel_metrics(maps, masks)


def by_sklearn(maps, masks, scores, labels) -> dict[str, float]:
    """The six that scikit-learn knows."""
    values = {}
    for name, truth, score in (("image", labels, scores), ("pixel", masks.ravel(), maps.ravel())):
        values[f"{name}_auroc"] = roc_auc_score(truth, score)
        values[f"{name}_ap"] = average_precision_score(truth, score)
        precision, recall, _ = precision_recall_curve(truth, score)
        with np.errstate(invalid="ignore"):  # no hit at all: 0 / 0
            f1 = 2 * precision * recall / (precision + recall)
        values[f"{name}_f1max"] = np.nanmax(f1)
    return {name: float(value) for name, value in values.items()}


def anomalib_aupro(maps, masks, scores, labels) -> Callable[[], dict[str, float]]:
    """Only its AUPRO; ImportError without anomalib."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The public class wants anomalib's own batches; this is the metric inside it.
        from anomalib.metrics.aupro import _AUPRO

    def judge():
        metric = _AUPRO(fpr_limit=0.3)
        metric.update(torch.from_numpy(maps), torch.from_numpy(masks).int())
        return {"aupro": float(metric.compute())}

    return judge


def adeval_metrics(maps, masks, scores, labels) -> Callable[[], dict[str, float]]:
    """The five that it knows, on the CPU; ImportError without ADEval."""
    import adeval

    if not hasattr(np, "trapz"):
        np.trapz = np.trapezoid  # its name until numpy 2.4, by which ADEval calls it
    bytes_ = masks.astype(np.uint8)

    def judge():
        image = adeval.auroc_and_aupr(scores, labels)
        pixel = adeval.auroc_aupr_aupro(maps, bytes_)
        names = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro")
        return dict(zip(names, (*image, *pixel), strict=True))

    return judge
