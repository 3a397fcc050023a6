"""Patches cut, shuffled, masked and drawn, against loops over slices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffad_ref.patches import (
    ODDS,
    Corruption,
    cut,
    draw_corruption,
    join,
    mix_noise,
    patch_mask,
    shuffle_patches,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def latents(b=3, side=8, channels=2):
    return torch.randn(b, channels, side, side, generator=seeded())


def by_slices(images, height, width):
    """Patches as a loop finds them: row by row."""
    h, w = images.shape[-2:]
    return torch.stack(
        [
            images[..., y : y + height, x : x + width]
            for y in range(0, h, height)
            for x in range(0, w, width)
        ],
        1,
    )


# ------------------------------------------------------------------------------------ cut and join


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (4, 6), (8, 12)])
def test_patches_are_the_slices_of_the_image_row_by_row(height, width):
    images = torch.randn(2, 3, 8, 12, generator=seeded())
    assert torch.equal(cut(images, height, width), by_slices(images, height, width))


@settings(deadline=None)
@given(*[st.integers(1, 4)] * 6)
def test_joining_what_was_cut_gives_the_image_back(b, c, rows, columns, height, width):
    images = torch.randn(b, c, rows * height, columns * width, generator=seeded())
    assert torch.equal(join(cut(images, height, width), *images.shape[-2:]), images)


@pytest.mark.parametrize(("height", "width"), [(3, 4), (4, 3), (16, 16)])
def test_patches_that_do_not_divide_an_image_are_refused(height, width):
    with pytest.raises(ValueError, match=f"{height} x {width} do not divide 8 x 8"):
        cut(latents(), height, width)


# ----------------------------------------------------------------------------------------- shuffle


def test_order_that_counts_up_leaves_the_batch_as_it_is():
    assert torch.equal(shuffle_patches(latents(), 2, torch.arange(48)), latents())


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_shuffle_takes_patch_order_i_of_the_whole_batch_to_place_i(patch):
    z = latents()
    n = (8 // patch) ** 2
    order = torch.randperm(3 * n, generator=seeded(1))
    before, after = (
        by_slices(x, patch, patch).flatten(0, 1) for x in (z, shuffle_patches(z, patch, order))
    )
    for place, source in enumerate(order.tolist()):
        assert torch.equal(after[place], before[source])


def test_shuffle_loses_and_doubles_nothing():
    z = latents()
    found = shuffle_patches(z, 2, torch.randperm(48, generator=seeded(1)))
    assert torch.equal(found.flatten().sort().values, z.flatten().sort().values)


def test_shuffle_with_patches_that_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="3 x 3 do not divide 8 x 8"):
        shuffle_patches(latents(), 3, torch.arange(12))


# -------------------------------------------------------------------------------------------- mask


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_mask_keeps_exactly_so_many_whole_patches_of_each_image(patch):
    n = (8 // patch) ** 2
    kept = torch.tensor([0, 1, n // 2, n])
    order = torch.rand(4, n, generator=seeded()).argsort(1)
    mask = patch_mask(kept, order, patch, 8)
    assert mask.shape == (4, 1, 8, 8)
    patches = by_slices(mask, patch, patch).flatten(2)  # (4, n, patch²)
    assert torch.equal(patches.amin(2), patches.amax(2))  # a patch is kept as a whole
    assert patches.amax(2).sum(1).tolist() == kept.tolist()
    for image, count in enumerate(kept):
        places = patches[image, :, 0].nonzero().flatten().tolist()
        assert sorted(order[image, :count].tolist()) == places


def test_mix_takes_gaussian_noise_where_n_is_1_and_foreign_content_elsewhere():
    gaussian, foreign = latents(1), 100 + latents(1)
    n = torch.zeros(1, 1, 8, 8)
    n[..., :3, :] = 1
    found = mix_noise(gaussian, foreign, n)
    assert torch.equal(found[..., :3, :], gaussian[..., :3, :])
    assert torch.equal(found[..., 3:, :], foreign[..., 3:, :])


# ---------------------------------------------------------------------------------------- settings


def test_table_for_32_cells_is_the_papers():
    assert Corruption.of_side(32).patch_sizes == Corruption().patch_sizes == (1, 2, 4, 8, 16)
    assert Corruption.of_side(32).patch_odds == pytest.approx((0.3, 0.25, 0.2, 0.15, 0.1))
    assert Corruption().patch_odds == ODDS


@pytest.mark.parametrize(
    ("side", "sizes"),
    [
        (2, (1,)),
        (8, (1, 2, 4)),
        (12, (1, 2, 4)),
        (15, (1,)),
        (18, (1, 2)),
        (64, (1, 2, 4, 8, 16)),
        (96, (1, 2, 4, 8, 16)),
    ],
)
def test_table_of_another_side_has_what_divides_it_up_to_half_and_its_odds_sum_to_1(side, sizes):
    found = Corruption.of_side(side)
    assert found.patch_sizes == sizes
    assert sum(found.patch_odds) == pytest.approx(1)
    first = found.patch_odds[0]
    assert [p / first for p in found.patch_odds] == pytest.approx(
        [p / 0.3 for p in (0.3, 0.25, 0.2, 0.15, 0.1)][: len(sizes)]
    )


def test_every_patch_size_needs_its_odds():
    with pytest.raises(ValueError, match="2 patch sizes, but 1 odds"):
        Corruption(patch_sizes=(1, 2), patch_odds=(1.0,))


# ------------------------------------------------------------------------------------------ drawing


def drawn(b=64, side=8, seed=0, **changes):
    settings = {"patch_sizes": (2,), "patch_odds": (1.0,), **changes}
    z = torch.full((b, 1, side, side), 100.0) + torch.arange(b).view(-1, 1, 1, 1)
    return draw_corruption(z, Corruption(**settings), seeded(seed))


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 16), (0.25, 12), (0.5, 8), (1.0, 0)])
def test_mask_ratio_that_is_fixed_corrupts_that_share_of_the_patches_of_each_image(ratio, kept):
    mask, _ = drawn(mask_ratio=(ratio, ratio))
    assert mask.sum((1, 2, 3)).tolist() == [4 * kept] * 64


def test_mask_ratio_fills_its_range_and_stays_within():
    mask, _ = drawn(512, 16, mask_ratio=(0.0, 0.7), patch_sizes=(1,))
    corrupted = 1 - mask.mean((1, 2, 3))
    # As many patches are kept as fit wholly: up to one more is corrupted than the share says.
    assert corrupted.min() < 0.01 and 0.69 < corrupted.max() <= 0.7 + 1 / 256
    assert corrupted.mean().item() == pytest.approx(0.35, abs=0.03)


def test_foreign_ratio_0_gives_pure_gaussian_noise():
    _, eps = drawn(foreign_ratio=(0.0, 0.0))
    assert eps.abs().max() < 7  # the latents lie at 100 and above
    assert eps.mean().item() == pytest.approx(0, abs=0.06)
    assert eps.std().item() == pytest.approx(1, abs=0.06)


def test_foreign_ratio_1_gives_nothing_but_the_patches_of_the_batch():
    _, eps = drawn(foreign_ratio=(1.0, 1.0))
    counts = eps.long().flatten().bincount()[100:]
    assert counts.tolist() == [64] * 64  # each image's number as often as it has cells


def test_foreign_patches_come_from_other_images_too():
    _, eps = drawn(foreign_ratio=(1.0, 1.0))
    own = eps.long() - 100 == torch.arange(64).view(-1, 1, 1, 1)
    assert own.float().mean() < 0.1  # 1 / 64 of them by chance


def test_foreign_ratio_counts_whole_patches():
    _, eps = drawn(foreign_ratio=(0.25, 0.25))
    foreign = by_slices((eps > 50).float(), 2, 2).flatten(2)
    assert torch.equal(foreign.amin(2), foreign.amax(2))
    assert foreign.amax(2).sum(1).tolist() == [4] * 64


def test_patch_size_of_a_batch_follows_its_odds():
    """Of 300 draws, about 30 % have single cells; patches of two are never cut through."""
    single = 0
    for seed in range(300):
        mask, _ = drawn(
            2, 4, seed, patch_sizes=(1, 2), patch_odds=(0.3, 0.7), mask_ratio=(0.5, 0.5)
        )
        patches = by_slices(mask, 2, 2).flatten(2)
        single += bool((patches.amin(2) != patches.amax(2)).any())
    assert 0.3 * 300 - 25 < single < 0.3 * 300 + 25


def test_same_generator_draws_the_same_corruption():
    for a, b in zip(drawn(seed=3), drawn(seed=3), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(drawn(seed=3)[1], drawn(seed=4)[1])
