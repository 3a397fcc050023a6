"""Anomaly maps: SciPy's numbers at every size, borders and edges included."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from diffad_ref.maps import clip_and_scale, enlarge, feature_distance, gaussian_filter


def random_maps(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# ------------------------------------------------------------------------------------- smoothing


@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0, 3.0, 4.5])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 5), (8, 33), (64, 64)])
def test_smoothing_has_the_numbers_of_scipy_also_when_the_kernel_is_larger(shape, sigma):
    maps = random_maps(2, *shape)
    expected = [ndimage.gaussian_filter(m, sigma) for m in maps.numpy()]
    np.testing.assert_allclose(gaussian_filter(maps, sigma), expected, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.integers(1, 20), st.floats(0.05, 8))
def test_smoothing_has_the_numbers_of_scipy_at_any_size_and_sigma(height, width, sigma):
    maps = random_maps(height, width)
    expected = ndimage.gaussian_filter(maps.numpy(), sigma)
    np.testing.assert_allclose(gaussian_filter(maps, sigma), expected, atol=1e-12)


def test_smoothing_with_sigma_0_changes_nothing():
    maps = random_maps(2, 7, 5)
    assert torch.equal(gaussian_filter(maps, 0), maps)


def test_smoothing_keeps_the_sum_of_a_map_because_its_borders_are_mirrors():
    maps = torch.zeros(9, 9, dtype=torch.float64)
    maps[0, 8] = 1  # in a corner, where a kernel cut off would lose three quarters
    assert gaussian_filter(maps, 2.0).sum().item() == pytest.approx(1)


def test_each_map_of_a_batch_is_smoothed_alone_and_in_its_own_precision():
    maps = random_maps(2, 3, 6, 6).float()
    found = gaussian_filter(maps, 1.0)
    assert found.dtype == torch.float32 and found.shape == maps.shape
    assert torch.allclose(found[1, 2], gaussian_filter(maps[1, 2], 1.0))


# -------------------------------------------------------------------------------------- enlarging


def zoomed(maps, size):
    """SciPy's linear interpolation between the centres of cells."""
    factors = [size / n for n in maps.shape]
    return ndimage.zoom(maps.numpy(), factors, order=1, mode="mirror", grid_mode=True)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 31, 64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 2), (3, 7), (8, 8)])
def test_enlarging_has_the_numbers_of_scipy_also_for_a_single_cell(shape, size):
    maps = random_maps(*shape)
    np.testing.assert_allclose(enlarge(maps, size), zoomed(maps, size), atol=1e-12)


def test_map_of_one_cell_becomes_an_even_map():
    assert torch.equal(enlarge(torch.full((3, 1, 1), 0.7), 4), torch.full((3, 4, 4), 0.7))


def test_enlarging_two_cells_by_pencil():
    """Four pixels stand at -1/4, 1/4, 3/4, 5/4 cells; beyond a centre the way leads back."""
    row = enlarge(torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]), 4)[0, 0]
    assert row.tolist() == pytest.approx([0.25, 0.25, 0.75, 0.75])


def test_enlarging_to_the_same_size_changes_nothing():
    maps = random_maps(2, 6, 6)
    assert torch.allclose(enlarge(maps, 6), maps, atol=1e-12)


# --------------------------------------------------------------------------------------- clipping


def test_differences_beyond_the_limit_count_as_1_and_the_others_in_proportion():
    found = clip_and_scale(torch.tensor([0.0, 0.1, 0.2, 0.4, 7.0]), 0.4)
    assert found.tolist() == pytest.approx([0, 0.25, 0.5, 1, 1])


# -------------------------------------------------------------------------------- feature distance


def pyramid(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, c, n, n, generator=generator) for c, n in ((3, 8), (5, 4))]


@pytest.mark.parametrize("fusion", ["sum", "product"])
def test_levels_of_one_size_and_channel_by_pencil(fusion):
    """One channel: the distances are 3 and 4."""
    ours = [torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 1.0)]
    theirs = [torch.full((1, 1, 4, 4), 3.0), torch.full((1, 1, 4, 4), -3.0)]
    found = feature_distance(ours, theirs, 4, fusion=fusion)
    assert torch.equal(found, torch.full((1, 4, 4), {"sum": 7.0, "product": 12.0}[fusion]))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_features_lie_at_distance_0_from_themselves(distance):
    found = feature_distance(pyramid(0), pyramid(0), 16, distance)
    assert found.shape == (2, 16, 16) and found.abs().max() < 1e-6


def test_cosine_distance_does_not_see_how_large_features_are():
    larger = [3 * level for level in pyramid(0)]
    assert feature_distance(pyramid(0), larger, 16, "cosine").abs().max() < 1e-6
    assert feature_distance(pyramid(0), larger, 16, "euclidean").min() > 0


@pytest.mark.parametrize("words", [{"distance": "taxi"}, {"fusion": "mean"}])
def test_unknown_distance_and_fusion_are_refused(words):
    with pytest.raises(ValueError, match=f"not '{next(iter(words.values()))}'"):
        feature_distance(pyramid(0), pyramid(1), 16, **words)
