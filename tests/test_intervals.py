"""Confidence intervals by drawing the test images again."""

import numpy as np
import pytest
import torch
from pandas import DataFrame

from diffad_ref.evaluation import Report
from diffad_ref.metrics import image_metrics, pixel_metrics
from diffad_ref.tools.intervals import intervals, redrawn


def report_of(n, shift, seed=0, categories=("a",), size=8):
    """A report on n good and n defective random images of each category."""
    rng = np.random.default_rng(seed)
    images, maps, masks = [], [], []
    for category in categories:
        for label in [0] * n + [1] * n:
            mask = np.zeros((size, size), bool)
            if label:
                mask[: size // 2, : size // 2] = True
            values = rng.normal(size=(size, size)) + shift * mask
            score = float(values.max())
            images.append({"category": category, "kind": "k", "label": label, "score": score})
            maps.append(values)
            masks.append(mask)
    maps, masks = torch.from_numpy(np.stack(maps)).float(), torch.from_numpy(np.stack(masks))
    none = DataFrame()
    return Report(none, none, DataFrame(images), "Some", maps=maps, masks=masks)


def test_the_interval_encloses_the_value_and_narrows_with_more_images():
    widths = []
    for n in (10, 160):
        report = report_of(n, 0.7)
        found = intervals(report, draws=300)
        exact = image_metrics(report.images["score"], report.images["label"])
        exact |= pixel_metrics(report.maps, report.masks)
        for metric, (low, high) in found.items():
            assert low < exact[metric] < high, metric
        widths.append(np.diff(found["image_auroc"]).item())
    assert widths[1] < widths[0] / 2


def test_binned_pixel_areas_are_close_to_exact_ones():
    """One draw that takes every image once is the test set itself."""
    report = report_of(20, 1.0, size=16)
    exact = pixel_metrics(report.maps, report.masks)
    low, high = intervals(report, draws=1000)["pixel_ap"]
    assert (low + high) / 2 == pytest.approx(exact["pixel_ap"], abs=0.01)


def test_it_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(40):
        report = report_of(40, 0.7, seed)
        low, high = intervals(report, draws=80, seed=seed, bins=100)["pixel_auroc"]
        truth = 0.5 * (1 + float(torch.erf(torch.tensor(0.7 / 2))))  # of two shifted Gaussians
        covered += low < truth < high
    assert covered >= 33


def test_equal_seeds_give_equal_intervals():
    report = report_of(10, 0.7, categories=("a", "b"))
    assert intervals(report, 50, seed=3) == intervals(report, 50, seed=3)
    assert intervals(report, 50, seed=3) != intervals(report, 50, seed=4)


def test_metrics_that_are_not_defined_are_left_out():
    report = report_of(5, 1.0)
    report.masks = torch.zeros_like(report.masks)
    assert set(intervals(report, 20)) == {"image_auroc", "image_ap"}


def test_a_saved_report_has_no_maps_to_draw_from():
    report = report_of(5, 1.0)
    report.maps = None
    with pytest.raises(ValueError, match="evaluate again"):
        intervals(report)


def test_reports_on_the_same_images_get_the_same_draws():
    worse, better = (report_of(20, shift, categories=("a", "b")) for shift in (0.4, 1.5))
    one, other = (redrawn(report, draws=200) for report in (worse, better))
    again = redrawn(worse, draws=200)
    assert all((one[name] == again[name]).all() for name in one)
    for name in one:
        lead, shuffled = other[name] - one[name], other[name] - np.roll(one[name], 1)
        assert lead.std() < shuffled.std(), name  # pairs vary less than strangers
    low, high = intervals(worse, draws=200)["pixel_ap"]
    assert low == np.percentile(one["pixel_ap"], 2.5) < high
