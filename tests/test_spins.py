"""Cycle spinning: where images go, and that their maps come back to the pixel."""

from dataclasses import replace

import pytest
import torch

from diffad_ref.codecs import CodecConfig
from diffad_ref.deco_diff import Config, DecoDiff
from diffad_ref.spins import grid_moves, mean_in_place, move

SMALL = Config.tiny(
    32,
    codec=CodecConfig("pca", channels=6, factor=4),
    classes=1,
    width=8,
    multipliers=(1, 2),
    heads=1,
    context=8,
    norm_groups=4,
)


def images(count=2, size=32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def build(**changes):
    torch.manual_seed(0)
    detector = DecoDiff(replace(SMALL, **changes))
    detector.prepare([{"image": image} for image in images(16)])
    return detector.eval()


def test_moves_spread_evenly_over_a_cell_and_the_first_is_none():
    assert grid_moves(4, 1) == [(0, 0)]
    assert grid_moves(4, 2) == [(0, 0), (0, 2), (2, 0), (2, 2)]
    assert sorted(grid_moves(4, 4)) == [(i, j) for i in range(4) for j in range(4)]


def test_pixels_move_down_and_to_the_right_and_the_border_is_mirrored():
    rows = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8]])[None, None].float()
    assert move(rows, 1, 0)[0, 0].tolist() == [[3, 4, 5], [0, 1, 2], [3, 4, 5]]
    assert move(rows, 0, 1)[0, 0].tolist() == [[1, 0, 1], [4, 3, 4], [7, 6, 7]]
    assert torch.equal(move(rows, 0, 0), rows)


def test_map_of_a_moved_image_comes_back_to_its_place():
    """Where a map says what the image is, the mean is the image, but for what left the frame."""
    x, moves = images(), grid_moves(4, 2)
    mean = mean_in_place([move(x, *way)[:, 0] for way in moves], moves)
    assert torch.allclose(mean[:, :-2, :-2], x[:, 0, :-2, :-2], atol=1e-6)


def test_one_spin_is_the_method_of_the_paper():
    detector, x, classes = build(), images(), torch.tensor([0, 0])
    z_0 = detector.encode(x)
    plain = detector.compare(z_0, detector.reconstruct(z_0, classes)[-1])
    found = detector.predict(x, classes)
    assert torch.equal(found.anomaly_map, plain.anomaly_map)
    assert torch.equal(found.score, plain.score)


def test_spun_map_is_the_mean_of_the_maps_at_each_place_of_the_grid():
    once, twice = build(), build(spins=2)
    x, classes = images(), torch.tensor([0, 0])
    at = [
        move(once.predict(move(x, i, j), classes).anomaly_map, -i, -j)
        for i in (0, 2)
        for j in (0, 2)
    ]
    found = twice.predict(x, classes)
    assert torch.allclose(found.anomaly_map, sum(at) / 4, atol=1e-6)
    assert not torch.allclose(found.anomaly_map, at[0], atol=1e-3)
    assert found.score.tolist() == found.anomaly_map.flatten(1).amax(1).tolist()
    assert torch.equal(found.reconstruction, once.predict(x, classes).reconstruction)


@pytest.mark.parametrize("spins", [0, 3, 8])
def test_places_that_do_not_divide_a_cell_are_refused(spins):
    with pytest.raises(ValueError, match=f"4 pixels does not divide into spins={spins} places"):
        DecoDiff(replace(SMALL, spins=spins))
