"""Metrics against scikit-learn, against a slow loop, and against what algebra says."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from diffad_ref.diffusion_ad import top_k_mean
from diffad_ref.metrics import Ranking, aupro, image_metrics, pixel_metrics
from diffad_ref.tools.intervals import ranking_of_counts


def random_case(seed, shape=(3, 8, 8), levels=6):
    """Maps with many ties, and masks with at least one pixel of each kind."""
    rng = np.random.default_rng(seed)
    masks = (ndimage.uniform_filter(rng.random(shape), (1, 3, 3)) > 0.55).astype(np.uint8)
    masks.flat[0], masks.flat[-1] = 1, 0
    maps = rng.integers(0, levels, shape) + rng.integers(0, 2, shape) * masks
    return maps.astype(np.float32), masks


def sklearn_f1max(labels, scores):
    precision, recall, _ = precision_recall_curve(labels, scores)
    with np.errstate(invalid="ignore"):
        return np.nanmax(2 * precision * recall / (precision + recall))


def slow_aupro(maps, masks, limit):
    """One threshold after the other, one region after the other."""
    points = [(0.0, 0.0)]
    for threshold in sorted(set(maps.ravel()), reverse=True):
        found = maps >= threshold
        overlaps = []
        for hit, mask in zip(found, masks, strict=True):
            regions, count = ndimage.label(mask, np.ones((3, 3)))
            overlaps += [hit[regions == k].mean() for k in range(1, count + 1)]
        points.append((found[masks == 0].mean(), np.mean(overlaps)))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x1 > limit:
            if x0 < limit:
                y_limit = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
                area += (limit - x0) * (y0 + y_limit) / 2
            break
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


FOUR_MASKS = np.zeros((2, 64, 64), dtype=np.uint8)
FOUR_MASKS[0, 10:30, 10:30] = 1
FOUR_MASKS[1, 40:44, 5:60] = 1
NOISE = np.random.default_rng(0).random(FOUR_MASKS.shape)


@pytest.mark.parametrize("seed", range(5))
def test_pixel_metrics_with_ties_equal_scikit_learn(seed):
    maps, masks = random_case(seed, shape=(4, 32, 32), levels=9)
    found = pixel_metrics(maps, masks)
    labels, scores = masks.ravel(), maps.ravel()
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    assert found["pixel_ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-9)
    assert found["pixel_f1max"] == pytest.approx(sklearn_f1max(labels, scores), abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_image_metrics_equal_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    labels = np.append([0, 1], rng.integers(0, 2, 40))
    scores = np.round(rng.random(42) + 0.3 * labels, 1)
    found = image_metrics(scores, labels)
    assert found["image_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    assert found["image_ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-9)
    assert found["image_f1max"] == pytest.approx(sklearn_f1max(labels, scores), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), levels=st.integers(1, 40), limit=st.floats(0.01, 1))
def test_aupro_equals_a_loop_over_thresholds_and_regions(seed, levels, limit):
    maps, masks = random_case(seed, levels=levels)
    assert aupro(maps, masks, limit) == pytest.approx(slow_aupro(maps, masks, limit), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), levels=st.integers(1, 40))
def test_all_metrics_lie_between_0_and_1(seed, levels):
    maps, masks = random_case(seed, levels=levels)
    assert all(0 <= value <= 1 for value in pixel_metrics(maps, masks).values())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_metrics_ignore_an_increasing_change_of_scale(seed):
    maps, masks = random_case(seed)
    maps = maps.astype(np.float64)
    assert pixel_metrics(np.exp(maps) - 7, masks) == pixel_metrics(maps, masks)


def test_perfect_map_has_every_metric_1():
    assert set(pixel_metrics(FOUR_MASKS.astype(float), FOUR_MASKS).values()) == {1.0}


def test_constant_map_has_auroc_half_and_aupro_half_the_limit():
    found = pixel_metrics(np.full(FOUR_MASKS.shape, 0.7), FOUR_MASKS)
    share = FOUR_MASKS.mean()
    assert found["pixel_auroc"] == 0.5
    assert found["aupro"] == pytest.approx(0.15, abs=1e-12)
    assert found["pixel_ap"] == pytest.approx(share, abs=1e-12)
    assert found["pixel_f1max"] == pytest.approx(2 * share / (1 + share), abs=1e-12)


def test_random_map_scores_near_a_constant_one():
    found = pixel_metrics(NOISE, FOUR_MASKS)
    assert found["pixel_auroc"] == pytest.approx(0.5, abs=0.05)
    assert found["aupro"] == pytest.approx(0.15, abs=0.05)
    assert found["pixel_ap"] == pytest.approx(FOUR_MASKS.mean(), abs=0.05)


def test_inverted_map_stays_below_half():
    maps = FOUR_MASKS + 0.5 * NOISE
    upright, inverted = pixel_metrics(maps, FOUR_MASKS), pixel_metrics(-maps, FOUR_MASKS)
    assert inverted["pixel_auroc"] == pytest.approx(1 - upright["pixel_auroc"], abs=1e-12)
    assert inverted["pixel_auroc"] == 0 and inverted["aupro"] == 0


def test_small_region_counts_as_much_as_a_large_one():
    masks = np.zeros((1, 20, 20), dtype=int)
    masks[0, :10, :10], masks[0, 15, 15] = 1, 1
    maps = masks.astype(float)
    maps[0, 15, 15] = -1  # the single pixel is found last
    assert aupro(maps, masks) == pytest.approx(0.5, abs=1e-12)
    assert pixel_metrics(maps, masks)["pixel_auroc"] == pytest.approx(100 / 101, abs=1e-12)


def test_squares_that_touch_at_a_corner_are_one_region():
    masks = np.zeros((1, 8, 8), dtype=int)
    masks[0, 0, 0], masks[0, 1:4, 1:4] = 1, 1
    maps = masks.astype(float)
    maps[0, 0, 0] = -1
    assert aupro(maps, masks) == pytest.approx(0.9, abs=1e-12)


def test_overlap_is_interpolated_exactly_at_the_limit():
    masks = np.zeros((1, 1, 11), dtype=int)
    masks[0, 0, 0] = 1
    maps = np.zeros((1, 1, 11))  # one diagonal from (0, 0) to (1, 1)
    for limit in (0.05, 0.123, 0.3, 1.0):
        assert aupro(maps, masks, limit) == pytest.approx(limit / 2, abs=1e-12)


def test_limit_1_with_one_region_is_the_auroc():
    rng = np.random.default_rng(3)
    masks = np.zeros((1, 16, 16), dtype=int)
    masks[0, 3:9, 4:12] = 1
    maps = np.round(rng.random((1, 16, 16)) + 0.2 * masks, 1)
    found = roc_auc_score(masks.ravel(), maps.ravel())
    assert aupro(maps, masks, 1.0) == pytest.approx(found, abs=1e-12)


def test_torch_half_and_channel_axis_give_what_numpy_gives():
    maps, masks = random_case(0)
    expected = pixel_metrics(maps, masks)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        tensor = torch.tensor(maps, requires_grad=True).to(dtype)[:, None]
        assert pixel_metrics(tensor, torch.tensor(masks)[:, None].bool()) == expected


def test_no_defective_image_gives_nan_and_says_so():
    with pytest.warns(UserWarning, match="no image is defective"):
        assert np.isnan(list(image_metrics([0.1, 0.2], [0, 0]).values())).all()


def test_no_good_image_gives_nan_auroc_but_a_defined_precision():
    with pytest.warns(UserWarning, match="no image is normal"):
        found = image_metrics([0.1, 0.2], [1, 1])
    assert np.isnan(found["image_auroc"]) and found["image_ap"] == found["image_f1max"] == 1


def test_masks_without_a_defect_give_nan_and_say_so():
    with pytest.warns(UserWarning, match="no pixel is defective"):
        found = pixel_metrics(NOISE, np.zeros_like(FOUR_MASKS))
    assert np.isnan(list(found.values())).all()


def test_masks_without_a_normal_pixel_give_nan_areas():
    with pytest.warns(UserWarning, match="no pixel is normal"):
        found = pixel_metrics(NOISE, np.ones_like(FOUR_MASKS))
    assert np.isnan(found["pixel_auroc"]) and np.isnan(found["aupro"])


def test_usual_input_raises_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixel_metrics(NOISE, FOUR_MASKS)


def test_one_defective_pixel_is_enough():
    masks = np.zeros((1, 4, 4), dtype=int)
    masks[0, 2, 2] = 1
    maps = np.arange(16.0).reshape(1, 4, 4)  # five normal pixels of fifteen score higher
    found = pixel_metrics(maps, masks)
    assert found["pixel_auroc"] == pytest.approx(10 / 15, abs=1e-12)
    assert found["pixel_ap"] == pytest.approx(1 / 6, abs=1e-12)
    assert found["aupro"] == 0  # 5/15 false positives come before it, more than 0.3


@pytest.mark.parametrize(
    ("maps", "masks", "words"),
    [
        (np.zeros((1, 4, 4)), np.zeros((1, 4, 5)), "differ in size"),
        (np.full((1, 4, 4), np.nan), np.eye(4)[None], "NaN"),
        (np.zeros((1, 4, 4)), 255 * np.eye(4)[None], "found 255"),
        (np.zeros((0, 4, 4)), np.zeros((0, 4, 4)), "empty"),
        (np.zeros((1, 3, 4, 4)), np.zeros((1, 3, 4, 4)), "got shape"),
    ],
)
def test_wrong_maps_or_masks_are_named(maps, masks, words):
    with pytest.raises(ValueError, match=words):
        pixel_metrics(maps, masks)


@pytest.mark.parametrize("limit", [0, -0.1, 1.01, 30])
def test_limit_outside_0_to_1_is_refused(limit):
    with pytest.raises(ValueError, match="fpr_limit"):
        aupro(NOISE, FOUR_MASKS, limit)


def test_labels_other_than_0_and_1_are_refused():
    with pytest.raises(ValueError, match="found 2"):
        image_metrics([0.1, 0.2, 0.3], [0, 1, 2])


def test_roc_corners_follow_the_definition():
    false, true = Ranking.of([3, 2, 2, 1, 0], [1, 1, 0, 1, 0]).roc()
    assert false.tolist() == [0, 0, 0, 0, 0.5, 0.5, 0.5, 1]
    assert true.tolist() == [0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1]


@pytest.mark.parametrize("size", [1, 2**16, 2**32, 2**40])
def test_a_billion_billion_pairs_of_pixels_are_counted_without_overflow(size):
    """A quarter of the positives stand above all negatives, the rest among their upper half."""
    hits, above, at_least = np.array([[1, 4], [0, 0], [0, 2]]) * size
    ranking = Ranking(hits, above, at_least, 4 * size, 4 * size)
    assert ranking.auroc() == 0.5 * (1 + 4) / 2 / 4 + 0.5
    assert ranking.auroc(0.25) == (0.25 + 0.625) / 2
    assert ranking.average_precision() == 1 / 4 + 3 / 4 * 4 / 6
    assert ranking.f1max() == 2 * 4 / (4 + 2 + 4)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), levels=st.integers(1, 40))
def test_a_ranking_of_counts_judges_as_one_of_scores(seed, levels):
    maps, masks = random_case(seed, levels=levels)
    labels = masks.astype(bool)
    scores, place = np.unique(maps, return_inverse=True)
    place = place.reshape(maps.shape)  # numpy 1 returns it flat
    counts = [np.bincount(place[labels == s], minlength=len(scores)) for s in (True, False)]
    exact, counted = Ranking.of(maps, labels), ranking_of_counts(*counts)
    for metric in (Ranking.auroc, Ranking.average_precision, Ranking.f1max):
        assert metric(counted) == pytest.approx(metric(exact), abs=1e-12)


def test_top_k_mean_averages_the_largest_pixels():
    maps = torch.arange(200.0).reshape(2, 10, 10)
    assert top_k_mean(maps, k=4).tolist() == [97.5, 197.5]


def test_top_k_mean_of_a_small_map_is_its_mean():
    assert top_k_mean(torch.arange(4.0).reshape(1, 1, 2, 2), k=50).tolist() == [1.5]


def test_top_k_mean_refuses_k_below_1():
    with pytest.raises(ValueError, match="at least 1"):
        top_k_mean(torch.zeros(1, 4, 4), k=0)
