"""Golden cases 1f (image score) and 1h (the released AUPRO of DiffusionAD)."""

import numpy as np
import pytest
from golden_files import arrays

from diffad_ref.metrics import (
    aupro_diffusion_ad,
    image_metrics,
    pixel_metrics,
    pro_curve_diffusion_ad,
    top_k_mean,
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
