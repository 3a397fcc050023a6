"""Golden cases 1f (image score), 1h, 2g and 3i (what the released evaluations compute)."""

import json

import numpy as np
import pytest
from golden_files import FOLDER, arrays

from diffad_ref.diffusion_ad import top_k_mean
from diffad_ref.metrics import image_metrics, pixel_metrics
from diffad_ref.tools.protocols import (
    POOLED,
    aupro_deco_diff,
    aupro_diffusion_ad,
    metrics_one_for_more,
    pooled_score,
    pro_curve_deco_diff,
    pro_curve_diffusion_ad,
)

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def score():
    """1f: predicted masks, labels, and the scores of the released evaluation."""
    return arrays("diffusionad_1f_image_score")


@pytest.fixture(scope="module")
def case():
    """1h: masks, maps, and the overlap curves of the released evaluation."""
    return arrays("diffusionad_1h_aupro")


def test_image_score_is_the_mean_of_the_50_largest_pixels(score):
    np.testing.assert_allclose(top_k_mean(score["masks"]), score["scores"], atol=1e-5, rtol=1e-4)


def test_image_auroc_of_these_scores_is_the_printed_one(score):
    auroc = image_metrics(top_k_mean(score["masks"]), score["labels"])["image_auroc"]
    expected = float(score["image_auroc_rounded_percent"])
    assert round(auroc, 3) * 100 == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("dtype", "name", "atol"),
    [(np.float64, "pixel_pro_f64", 1e-6), (np.float32, "pixel_pro_f32", 1e-4)],
)
def test_released_aupro(case, dtype, name, atol):
    found = aupro_diffusion_ad(case["maps"].astype(dtype), case["masks"])
    assert found == pytest.approx(float(case[name]), abs=atol)


def test_released_overlap_curve(case):
    fpr, pro = pro_curve_diffusion_ad(case["maps"].astype(np.float64), case["masks"])
    np.testing.assert_allclose(fpr, case["curve_fpr_rescaled"], atol=1e-6)
    np.testing.assert_allclose(pro, case["curve_pro"], atol=1e-5)


def test_released_aupro_of_a_ring_exceeds_1_and_ours_does_not(case):
    ring = int(case["ring_index"])
    maps, masks = case["maps"][ring].astype(np.float64), case["masks"][ring]
    fpr, pro = pro_curve_diffusion_ad(maps, masks)
    np.testing.assert_allclose(fpr, case["ring_curve_fpr_rescaled"], atol=1e-6)
    np.testing.assert_allclose(pro, case["ring_curve_pro"], atol=1e-5)
    released = aupro_diffusion_ad(maps, masks)
    assert released == pytest.approx(float(case["ring_pixel_pro_f64"]), abs=1e-5)
    assert released > 1 >= pixel_metrics(maps, masks)["aupro"]


def test_soft_ground_truth_is_truncated(case):
    soft, truncated = case["soft_gt"], case["soft_gt_as_int"]
    maps = np.linspace(1, 0, 4 * soft.size).reshape(4, -1)
    rows, expected = np.zeros_like(maps), np.zeros(maps.shape, dtype=int)
    rows[0], expected[0] = soft, truncated
    rows[2, 0], expected[2, 0] = 1, 1
    assert aupro_diffusion_ad(maps, rows) == aupro_diffusion_ad(maps, expected)


def test_pixel_auroc_and_ap(case):
    found = pixel_metrics(case["maps"], case["masks"])
    assert found["pixel_auroc"] == pytest.approx(float(case["pixel_auroc"]), abs=1e-9)
    assert found["pixel_ap"] == pytest.approx(float(case["pixel_ap"]), abs=1e-9)


# ---------------------------------------------------------------------------- 2g, of DeCo-Diff


@pytest.fixture(scope="module")
def deco():
    """2g: masks, maps, and the overlap curve of the released evaluation."""
    return arrays("deco_2g_compute_pro")


def test_released_aupro_of_deco_diff(deco):
    maps, masks = deco["maps"].astype(np.float64), deco["masks"]
    assert aupro_deco_diff(maps, masks) == pytest.approx(float(deco["compute_pro_f64"]), abs=1e-6)
    single = aupro_deco_diff(deco["maps"], masks)
    assert single == pytest.approx(float(deco["compute_pro_f32"]), abs=1e-4)


def test_released_aupro_of_deco_diff_with_other_numbers_of_thresholds(deco):
    maps, masks = deco["maps"].astype(np.float64), deco["masks"]
    found = [name for name in deco if name.endswith("_thresholds_f64")]
    assert found
    for name in found:
        steps = int(name.split("_")[2])
        assert aupro_deco_diff(maps, masks, steps) == pytest.approx(float(deco[name]), abs=1e-6)


def test_released_overlap_curve_of_deco_diff(deco):
    fpr, pro = pro_curve_deco_diff(deco["maps"].astype(np.float64), deco["masks"])
    np.testing.assert_allclose(fpr, deco["curve_fpr_rescaled_f64"], atol=1e-6)
    np.testing.assert_allclose(pro, deco["curve_pro_f64"], atol=1e-6)
    kept = len(pro_curve_deco_diff(deco["maps"], deco["masks"])[0])
    assert abs(kept - int(deco["n_thresholds_below_limit_f32"])) <= 1


def test_the_other_metrics_of_deco_diff_are_ours(deco):
    found = pixel_metrics(deco["maps"], deco["masks"])
    assert found["pixel_ap"] == pytest.approx(float(deco["pixel_ap"]), abs=1e-9)
    for name in ("pixel_auroc", "pixel_f1max"):
        assert found[name] == pytest.approx(float(deco[f"sklearn_{name}"]), abs=1e-6)
    np.testing.assert_array_equal(deco["maps"].max((1, 2)), deco["image_scores"])
    np.testing.assert_array_equal(deco["masks"].max((1, 2)) > 0, deco["image_labels"] > 0)
    found = image_metrics(deco["image_scores"], deco["image_labels"])
    assert found["image_ap"] == pytest.approx(float(deco["image_ap"]), abs=1e-9)
    for name in ("image_auroc", "image_f1max"):
        assert found[name] == pytest.approx(float(deco[f"sklearn_{name}"]), abs=1e-6)


# --------------------------------------------------------------------------- 3i, of One-for-More


@pytest.fixture(scope="module")
def one():
    """3i: masks, maps as float64, and the scores of the released evaluation."""
    case = dict(arrays("cdad_3i_metric_inputs"))
    return {**case, "maps": case["maps"].astype(np.float64)}


def performances():
    return json.loads((FOLDER / "cdad_3i_performances.json").read_text())


def metrics_by_class(maps, masks):
    """Our metrics under the recorded names, with the plain mean over the classes."""
    classes = np.array(performances()["classes"])
    found = {
        name: metrics_one_for_more(maps[classes == name], masks[classes == name])
        for name in np.unique(classes)
    }
    named = {f"{c}_{m}_auc": value for c, values in found.items() for m, value in values.items()}
    for metric in next(iter(found.values())):
        named[f"mean_{metric}_auc"] = np.mean([values[metric] for values in found.values()])
    return named


def compare(found, recorded):
    """Both by name; areas under precision and recall may differ in the fourth digit, by one."""
    for name, value in recorded.items():
        assert found[name] == pytest.approx(value, abs=1.01e-4 if "_aupr" in name else 1e-6), name


def test_metrics_of_each_class_and_their_mean(one):
    found, recorded = metrics_by_class(one["maps"], one["masks"]), performances()["metrics"]
    assert found.keys() == recorded.keys()
    compare(found, recorded)


def test_maps_turned_upside_down_keep_their_auroc(one):
    negated = metrics_by_class(one["maps"].max() - one["maps"], one["masks"])
    compare(negated, performances()["metrics_of_negated_maps"])


def test_the_faintest_pixel_of_a_mask_is_a_defect(one):
    masks = one["masks"].astype(np.float64)
    masks[0, :2, :2] = 0.004  # the file does not say which four: these give the recorded values
    compare(metrics_by_class(one["maps"], masks), performances()["metrics_with_soft_mask_pixel"])


def test_image_scores_of_one_for_more(one):
    np.testing.assert_array_equal(one["masks"].any((1, 2)), one["image_label"] > 0)
    np.testing.assert_array_equal(one["maps"].max((1, 2)), one["image_score_max"])
    for metric, sizes in {"ap": POOLED, "f1": POOLED, "aupr": (*POOLED, 2)}.items():
        recorded = one[f"image_score_{metric}"]
        np.testing.assert_allclose(pooled_score(one["maps"], sizes), recorded, atol=1e-9, rtol=0)


def test_maps_that_averaging_uses_up_are_refused(one):
    side = 1 + sum(size - 1 for size in POOLED)
    assert pooled_score(one["maps"][:, :side, :side]).shape == one["image_label"].shape
    with pytest.raises(ValueError, match=f"{side} x {side} pixels or more"):
        pooled_score(one["maps"][:, : side - 1])


def test_released_aupro_of_one_for_more_is_that_of_deco_diff(one):
    found = aupro_deco_diff(one["maps"], one["masks"])
    assert found == pytest.approx(float(one["compute_pro_all_f64"]), abs=1e-6)
    fpr, pro = pro_curve_deco_diff(one["maps"], one["masks"])
    np.testing.assert_allclose(fpr, one["curve_fpr_rescaled_f64"], atol=1e-6)
    np.testing.assert_allclose(pro, one["curve_pro_f64"], atol=1e-6)
