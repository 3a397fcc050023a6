"""DeCo-Diff: its formulas by algebra and by loops over slices, its steps with perfect models."""

import re

import pytest
import torch
import torch.nn.functional as F
from einops import EinopsError
from hypothesis import given, settings
from hypothesis import strategies as st

from diffad_ref.deco_diff import (
    ODDS,
    Corruption,
    correct,
    corrupt,
    deviation,
    draw_corruption,
    image_discrepancy,
    latent_discrepancy,
    mix_noise,
    moved_crop,
    patch_mask,
    shuffle_patches,
)
from diffad_ref.diffusion import Schedule, ddim_step

SCHEDULE = Schedule.named("cosine", 10)
TIMES = (8, 6, 4, 2, 0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def latents(b=3, side=8, channels=2):
    return randn(b, channels, side, side)


def alphas(*values):
    return torch.tensor(values).view(-1, 1, 1, 1)


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


# ------------------------------------------------------------------------------------- corruption


@settings(deadline=None)
@given(st.floats(0, 0.999), st.floats(-50, 50), st.floats(-50, 50), st.sampled_from([0.0, 1.0]))
def test_corrupted_latent_is_the_clean_one_plus_its_deviation(abar, z, eps, mask):
    """C4, for one cell."""
    z_0, eps, mask = (torch.full((1, 1, 1, 1), v, dtype=torch.float64) for v in (z, eps, mask))
    abar = torch.tensor(abar, dtype=torch.float64).view(1, 1, 1, 1)
    z_t, eta = corrupt(z_0, eps, mask, abar), deviation(z_0, eps, mask, abar)
    assert z_t.item() == pytest.approx((z_0 + (1 - abar).sqrt() * eta).item(), abs=1e-9)


def test_where_the_mask_is_1_nothing_is_corrupted_and_nothing_deviates():
    z_0, eps, mask = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), torch.zeros(2, 1, 8, 8)
    mask[..., 2:5, 3:] = 1
    z_t, eta = (f(z_0, eps, mask, alphas(0.3, 0.9)) for f in (corrupt, deviation))
    kept = mask.bool().expand_as(z_0)
    assert torch.equal(z_t[kept], z_0[kept]) and not eta[kept].any()
    assert (z_t[~kept] != z_0[~kept]).all() and (eta[~kept] != 0).all()


def test_deviation_by_pencil():
    """abar 0.64: the root is 0.8, the noise's share 0.6, and z loses 0.2 / 0.6 of itself."""
    z_0, eps, mask = (torch.full((1, 1, 1, 1), v) for v in (3.0, -1.0, 0.0))
    assert corrupt(z_0, eps, mask, alphas(0.64)).item() == pytest.approx(0.8 * 3 - 0.6)
    assert deviation(z_0, eps, mask, alphas(0.64)).item() == pytest.approx(-1 - 3 / 3)


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
    with pytest.raises(EinopsError):
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


@pytest.mark.parametrize(
    ("sizes", "odds"),
    [((1, 3, 16), (0.5, 0.25, 0.25)), ((), ()), ((1, 2), (1.0,)), ((1,), (0.5, 0.5))],
)
def test_patches_must_divide_the_latent_and_each_needs_its_odds(sizes, odds):
    words = rf"{re.escape(str(sizes))}.*{re.escape(str(odds))}.* latents of 8 cells"
    with pytest.raises(ValueError, match=words):
        Corruption(sizes, odds).check(8)


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


@pytest.mark.parametrize("odds", [(1.0, 0.0, 0.0), (0.0, 2.0, 0.0), (0.0, 0.0, 0.1)])
def test_patch_size_without_odds_never_comes(odds):
    size = (1, 2, 4)[odds.index(max(odds))]
    for seed in range(20):
        changes = {"patch_sizes": (1, 2, 4), "patch_odds": odds, "mask_ratio": (0.5, 0.5)}
        mask, _ = drawn(4, 8, seed, **changes)
        whole = by_slices(mask, size, size).flatten(2)
        larger = by_slices(mask, 2 * size, 2 * size).flatten(2)
        assert torch.equal(whole.amin(2), whole.amax(2))
        assert not torch.equal(larger.amin(2), larger.amax(2))


def test_same_generator_draws_the_same_corruption():
    for a, b in zip(drawn(seed=3), drawn(seed=3), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(drawn(seed=3)[1], drawn(seed=4)[1])


# ------------------------------------------------------------------------------------ moved crops


def places_of(crops, images, size=32):
    """Where in its image each crop lies: (row, column) of its corner."""
    places = []
    for crop, image in zip(crops, images, strict=True):
        windows = image.unfold(1, size, 1).unfold(2, size, 1)  # (3, rows, columns, size, size)
        same = (windows == crop[:, None, None]).all(-1).all(-1).all(0)
        places.append(tuple(same.nonzero()[0].tolist()))
    return places


@pytest.mark.parametrize("size", [32, 40])
def test_crop_that_may_not_move_is_the_middle(size):
    images, margin = torch.rand(4, 3, size, size, generator=seeded()), (size - 32) // 2
    found = moved_crop(images, 32, 0, seeded())
    assert torch.equal(found, images[..., margin : margin + 32, margin : margin + 32])


@pytest.mark.parametrize(("shift", "reach"), [(2, 2), (9, 4)])
def test_crop_moves_by_the_shift_at_most_and_within_its_image_in_every_second_image(shift, reach):
    images = torch.rand(400, 1, 40, 40, generator=seeded())
    places = places_of(moved_crop(images, 32, shift, seeded()), images)
    steps = set(range(4 - reach, 5 + reach))
    assert {y for y, _ in places} == {x for _, x in places} == steps
    assert 0.42 < places.count((4, 4)) / 400 < 0.6  # half of them, and a few of the others


def test_image_without_a_margin_is_mirrored_where_its_crop_moves_out():
    images = torch.rand(100, 1, 32, 32, generator=seeded())
    padded = F.pad(images, [4] * 4, mode="reflect")
    places = places_of(moved_crop(images, 32, 4, seeded()), padded)  # each is found somewhere
    assert {y for y, _ in places} == {x for _, x in places} == set(range(9))


# ------------------------------------------------------------------------------------- correction


@pytest.mark.parametrize("t", range(10))
def test_exact_deviation_corrects_in_one_step_from_every_level(t):
    z_0, eps = randn(2, 4, 8, 8).double(), randn(2, 4, 8, 8, seed=1).double()
    mask = (torch.rand(2, 1, 8, 8, generator=seeded()) < 0.5).double()
    abar = SCHEDULE.abar[t].view(1, 1, 1, 1)
    eta = deviation(z_0, eps, mask, abar)
    (found,) = correct(lambda z, t: eta, corrupt(z_0, eps, mask, abar), SCHEDULE, [t])
    assert torch.allclose(found, z_0, atol=1e-5)


def test_rescaled_correction_of_a_wholly_corrupted_latent_follows_ddim_at_every_step():
    """A model that knows the noise; the steps as released leave the path."""
    z_0, eps = randn(2, 4, 8, 8).double(), randn(2, 4, 8, 8, seed=1).double()
    everywhere = torch.zeros(2, 1, 8, 8).double()

    def exact(z, t):
        return deviation(z_0, eps, everywhere, SCHEDULE.abar[t].view(-1, 1, 1, 1))

    start = corrupt(z_0, eps, everywhere, SCHEDULE.abar[8].view(1, 1, 1, 1))
    levels = [*SCHEDULE.abar[list(TIMES[1:])].view(-1, 1, 1, 1, 1), torch.ones(1, 1, 1, 1)]
    expected = [ddim_step(z_0, eps, abar) for abar in levels]
    states = correct(exact, start, SCHEDULE, TIMES, rescale=True)
    for state, wanted in zip(states, expected, strict=True):
        assert torch.allclose(state, wanted, atol=1e-5)
    released = correct(exact, start, SCHEDULE, TIMES)
    assert not torch.allclose(released[0], expected[0], atol=1e-2)


def test_rescaled_correction_follows_ddim_whatever_the_model_says():
    """With x0 and eps as DDIM reads them from z = x0 + sqrt(1 - abar) eta."""

    def model(z, t):
        return torch.tanh(z) * (1 + t.view(-1, 1, 1, 1))

    z = start = randn(2, 4, 8, 8).double()
    states = correct(model, start, SCHEDULE, TIMES, rescale=True)
    for state, t, t_next in zip(states, TIMES, [*TIMES[1:], None], strict=True):
        abar = SCHEDULE.abar[t]
        x0 = z - (1 - abar).sqrt() * model(z, torch.full((2,), t))
        eps = (z - abar.sqrt() * x0) / (1 - abar).sqrt()
        z = ddim_step(x0, eps, torch.ones(()) if t_next is None else SCHEDULE.abar[t_next])
        assert torch.allclose(state, z, atol=1e-5)


def test_model_that_sees_no_deviation_leaves_the_latent_as_it_is():
    z = randn(2, 4, 8, 8)
    states = correct(lambda z, t: torch.zeros_like(z), z, SCHEDULE, TIMES)
    assert len(states) == 5 and all(torch.equal(state, z) for state in states)


@pytest.mark.parametrize("times", [(), (0, 2, 4), (4, 4), (10, 5), (3, -1)])
def test_time_steps_that_do_not_fall_within_the_schedule_are_refused(times):
    with pytest.raises(ValueError, match="time steps must fall, from 9 at most"):
        correct(lambda z, t: z, randn(1, 4, 8, 8), SCHEDULE, times)


# ------------------------------------------------------------------------------------ discrepancy


def test_image_discrepancy_takes_the_channel_that_differs_most_and_clips_at_the_limit():
    x_0 = torch.zeros(3, 3, 8, 8)
    x_hat = torch.tensor([[0.1, -0.2, 0.0], [0.4, 0.1, 0.1], [-2.0, 0.0, 0.0]])
    found = image_discrepancy(x_hat[..., None, None].expand(3, 3, 8, 8), x_0)
    assert torch.allclose(found, alphas(0.5, 1.0, 1.0)[:, 0].expand(3, 8, 8))


def test_latent_discrepancy_takes_the_mean_of_the_channels_at_the_size_of_the_image():
    z_0, z_hat = torch.zeros(2, 4, 4, 4), torch.tensor([[0.1, -0.1, 0.2, 0.0], [1.0, 0, 0, 0]])
    found = latent_discrepancy(z_hat[..., None, None].expand(2, 4, 4, 4), z_0, 16)
    assert torch.allclose(found, alphas(0.5, 1.0)[:, 0].expand(2, 16, 16))
