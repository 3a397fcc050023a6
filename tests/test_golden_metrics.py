"""Golden cases 1f (image score), 1h and 2g (the released AUPROs of DiffusionAD and DeCo-Diff)."""

import numpy as np
import pytest
from golden_files import arrays

from diffad_ref.metrics import image_metrics, pixel_metrics, top_k_mean
from diffad_ref.protocols import (
    aupro_deco_diff,
    aupro_diffusion_ad,
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
