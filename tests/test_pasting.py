"""Patches that One-for-More pastes: which images change, where, and what the generator decides."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.sparse.linalg import spsolve

from diffad_ref import one_for_more
from diffad_ref.diffusion import Draw
from diffad_ref.one_for_more import Pasting, paste, paste_patch, poisson

ALWAYS = Pasting(share=1.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count=8, size=32, seed=0):
    """Coarse coloured blots: a patch from elsewhere differs from its new ground."""
    coarse = torch.rand(count, 3, 5, 5, generator=seeded(seed))
    return torch.nn.functional.interpolate(coarse, size, mode="bilinear")


def changes(changed, images):
    """The largest change of a channel, per pixel, in grey levels (B, H, W)."""
    levels = [(x * 255).round() for x in (changed, images)]
    return (levels[0] - levels[1]).abs().amax(1)


def mask_of(changed, images):
    """Where a channel changed by more than one grey level (B, 1, H, W)."""
    return changes(changed, images)[:, None] > 1


# --------------------------------------------------------------------------------------- how many


def test_without_a_share_nothing_is_touched():
    images = pictures()
    assert torch.equal(paste(images, Pasting(share=0.0), seeded()), images)


def test_with_the_whole_share_most_images_change():
    """All of them, save those whose patch is too small to be blended."""
    images = pictures(60, 64)
    changed = paste(images, ALWAYS, seeded())
    assert (changes(changed, images) > 0).flatten(1).any(1).sum() >= 57
    assert mask_of(changed, images).flatten(1).any(1).sum() >= 45


def test_about_half_of_the_images_change_by_default():
    images = pictures(150, 64)
    changed = paste(images, Pasting(), seeded())
    same = (changed == images).flatten(1).all(1)  # bit for bit: any other is rounded to 8 bits
    assert 0.4 < same.float().mean() < 0.6
    assert mask_of(changed, images)[~same].flatten(1).any(1).float().mean() > 0.75


def count_patches(monkeypatch, settings, images=300):
    """How many patches each of many black images gets; a patch makes it a grey level lighter."""
    monkeypatch.setattr(one_for_more, "paste_patch", lambda x, *_: x + 1 / 255)
    black = torch.zeros(images, 3, 16, 16)
    return (255 * paste(black, settings, seeded())[:, 0, 0, 0]).round().int().numpy()


def test_each_patch_but_the_first_comes_with_probability_one_half(monkeypatch):
    counts = count_patches(monkeypatch, ALWAYS)
    shares = [np.mean(counts == k) for k in (1, 2, 3, 4)]
    assert set(counts) == {1, 2, 3, 4}
    assert np.allclose(shares, [1 / 2, 1 / 4, 1 / 8, 1 / 8], atol=0.08)


def test_no_image_gets_more_patches_than_the_most(monkeypatch):
    assert set(count_patches(monkeypatch, replace(ALWAYS, most=2))) == {1, 2}


# ------------------------------------------------------------------------------------ where, what


def rectangles(monkeypatch):
    """A list that fills with the corners and sizes, (B, 2), of all patches."""
    places = []

    def seen(images, patches, corner, size):
        places.append((corner[..., 0], size[..., 0]))
        return poisson(images, patches, corner, size)

    monkeypatch.setattr(one_for_more, "poisson", seen)
    return places


def test_outside_of_its_patches_an_image_stays_up_to_eight_bits(monkeypatch):
    images, places = pictures(8), rectangles(monkeypatch)
    changed = paste(images, replace(ALWAYS, most=1), seeded())
    ((corner, size),) = places
    for old, new, (y, x), (height, width) in zip(images, changed, corner, size, strict=True):
        inside = torch.zeros(32, 32, dtype=torch.bool)
        inside[y + 1 : y + height - 1, x + 1 : x + width - 1] = True
        gap = (new - old).abs().amax(0)
        assert gap[~inside].max() <= 0.5 / 255 + 1e-6
        assert gap[inside].max() > 1 / 255


@pytest.mark.parametrize("size", [16, 32, 33, 64])
def test_patches_have_the_size_that_the_settings_allow_and_lie_inside(monkeypatch, size):
    """Half-widths of 3 to 40 per cent, scaled by 0.7 to 1.3, with ground all around."""
    places = rectangles(monkeypatch)
    paste(pictures(100, size), ALWAYS, seeded())
    corner, sides = (torch.cat(parts) for parts in zip(*places, strict=True))
    assert corner.min() == 1 and (corner + sides).max() == size - 1
    assert sides.min() >= 6 and sides.max() <= min(size - 4, 1.3 * 0.8 * size)
    assert sides.max() > 0.7 * size and sides.min() <= max(6, 0.15 * size)


def test_patch_that_keeps_its_size_comes_pixel_by_pixel_from_its_source(monkeypatch):
    monkeypatch.setattr(one_for_more, "poisson", lambda images, patches, *place: (patches, *place))
    row = torch.arange(32.0).expand(2, 1, 32, 32)
    source = torch.cat([row, row.mT, 0 * row], 1)  # each pixel knows its place
    settings = replace(ALWAYS, scale=(1.0, 1.0), size=(0.2, 0.3))
    patches, corner, size = paste_patch(source, source, settings, Draw(seeded()))
    for patch, (y, x), (height, width) in zip(patches, corner, size, strict=True):
        columns, rows, _ = patch[:, y : y + height, x : x + width]
        assert torch.allclose(columns.diff(dim=1), torch.ones(height, width - 1), atol=1e-4)
        assert torch.allclose(rows.diff(dim=0), torch.ones(height - 1, width), atol=1e-4)
        assert torch.allclose(columns, columns.round(), atol=1e-4)
        assert columns.min() > -1e-4 and columns.max() < 31 + 1e-4


def test_enlarged_patch_shows_its_whole_rectangle_and_nothing_beside_it(monkeypatch):
    monkeypatch.setattr(one_for_more, "poisson", lambda images, patches, *place: (patches, *place))
    row = torch.arange(64.0).expand(20, 3, 64, 64)
    settings = replace(ALWAYS, scale=(1.25, 1.25), size=(0.125, 0.125))  # 16 pixels become 20
    patches, corner, size = paste_patch(row, row, settings, Draw(seeded()))
    assert (size == 20).all()
    for patch, (y, x) in zip(patches, corner[..., 0], strict=True):
        line = patch[0, y, x : x + 20]
        assert line[0] == pytest.approx(line[0].round().item(), abs=1e-4)  # the edge repeats itself
        assert line[19] - line[0] == pytest.approx(15, abs=1e-4)
        assert torch.allclose(line[1:-1].diff(), torch.full((17,), 16 / 20), atol=1e-4)


@pytest.mark.parametrize("size", [16, 32])
def test_patch_of_the_same_grey_as_its_ground_shows_nowhere(size):
    flat = torch.full((4, 3, size, size), 0.5)
    assert torch.allclose(paste(flat, ALWAYS, seeded()), flat, atol=1.5 / 255)


def test_images_of_32_pixels_get_patches_too():
    images = pictures(20, 32)
    changed = paste(images, ALWAYS, seeded())
    assert (changes(changed, images) > 0).flatten(1).any(1).sum() >= 15
    assert 0.02 < mask_of(changed, images).float().mean() < 0.3


def test_values_stay_between_black_and_white():
    images = (pictures(16) > 0.5).float()
    changed = paste(images, ALWAYS, seeded())
    assert changed.min() == 0 and changed.max() == 1


# ----------------------------------------------------------------------------------------- sources


def sources(monkeypatch, settings, count):
    """Pairs (image, source) of a batch in which every image is of another grey."""
    monkeypatch.setattr(one_for_more, "paste_patch", lambda x, source, *_: source)
    greys, pairs = torch.arange(count) * 20, []
    for seed in range(20):
        flat = (greys / 255).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
        found = 255 * paste(flat, settings, seeded(seed))[:, 0, 0, 0]
        pairs += zip(greys.tolist(), found.round().int().tolist(), strict=True)
    return pairs


@pytest.mark.parametrize("count", [2, 4])
def test_patches_come_from_every_other_image_of_the_batch(monkeypatch, count):
    pairs = set(sources(monkeypatch, ALWAYS, count))
    greys = range(0, 20 * count, 20)
    assert pairs == {(a, b) for a in greys for b in greys if a != b}


def test_image_alone_in_its_batch_is_its_own_source(monkeypatch):
    assert set(sources(monkeypatch, ALWAYS, 1)) == {(0, 0)}


def test_patches_come_from_the_image_itself_where_the_settings_say_so(monkeypatch):
    own = replace(ALWAYS, source="itself")
    assert all(image == source for image, source in sources(monkeypatch, own, 4))


def test_a_batch_of_one_gets_patches_too():
    images = pictures(1, 64)
    changed = paste(images, ALWAYS, seeded())
    assert changed.shape == (1, 3, 64, 64) and mask_of(changed, images).any()


def test_one_patch_changes_one_place_and_leaves_its_arguments_alone():
    image, source = pictures(2, 64).split(1)
    before = image.clone(), source.clone()
    found = paste_patch(image, source, ALWAYS, Draw(seeded()))
    assert found.shape == image.shape
    assert 0 < (found != image).any(1).float().mean() < 0.9
    assert torch.equal(image, before[0]) and torch.equal(source, before[1])


# ---------------------------------------------------------------------------------------- blending


def laplacian(x):
    """Of everything but the outermost pixels: neighbours less four times the middle."""
    beside = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]
    return beside - 4 * x[..., 1:-1, 1:-1]


def solved(image, patch):
    """Poisson's equation (H, W) by elimination: the patch's Laplacian, the image at the border."""
    height, width = (n - 2 for n in image.shape)
    rows, columns = (sparse.diags([-1.0, 2.0, -1.0], [-1, 0, 1], (n, n)) for n in (height, width))
    border = image.double().clone()
    border[1:-1, 1:-1] = 0
    right = laplacian(border) - laplacian(patch.double())
    inner = spsolve(sparse.kronsum(columns, rows, "csc"), right.flatten().numpy())
    border[1:-1, 1:-1] = torch.from_numpy(inner).view(height, width)
    return border


def test_a_batch_of_rectangles_is_what_a_sparse_solver_finds_for_each():
    images, patches = 0.2 + 0.1 * pictures(6, 40), 0.5 + 0.1 * pictures(6, 40, seed=1)
    size = torch.tensor([[6, 6], [36, 36], [38, 7], [9, 38], [21, 30], [17, 16]])
    corner = torch.tensor([[1, 33], [3, 1], [1, 20], [30, 1], [10, 5], [22, 23]])
    found = poisson(images, patches, corner[..., None], size[..., None])
    for i, ((y, x), (height, width)) in enumerate(zip(corner.tolist(), size.tolist(), strict=True)):
        expected, place = images[i].double(), np.s_[y : y + height, x : x + width]
        for channel in range(3):
            expected[channel][place] = solved(images[i, channel][place], patches[i, channel][place])
        assert torch.allclose(found[i].double(), expected, atol=1e-5)


def test_a_patch_as_smooth_as_a_ramp_lets_any_ramp_through():
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    corner, size = torch.tensor([[[3], [5]]]), torch.tensor([[[20], [15]]])
    assert torch.allclose(poisson(ramp, 1 - ramp.mT, corner, size), ramp, atol=1e-5)


def test_opencv_takes_one_pixel_less_on_each_side_and_the_images_gradients_along_the_border():
    """It blends in the same way, in the rectangle that its mask leaves: four pixels further in."""
    cv2 = pytest.importorskip("cv2")
    image, source = (255 * (0.3 + 0.4 * pictures(2, 64))).round().byte().permute(0, 2, 3, 1).numpy()
    patch, inside = source[20:50, 10:50].copy(), np.full((30, 40), 255, np.uint8)
    cloned = cv2.seamlessClone(patch, image, inside, (30, 35), cv2.NORMAL_CLONE)
    changed = np.argwhere((cloned != image).any(-1))
    assert changed.min(0).tolist() == [22, 12] and changed.max(0).tolist() == [47, 47]
    theirs, ours = (torch.tensor(x).permute(2, 0, 1).float() for x in (cloned, source))
    difference = laplacian(theirs) - laplacian(ours)  # of numbers that are rounded
    assert difference[:, 25:44, 15:44].abs().mean() < 2


# --------------------------------------------------------------------------------------- the chance


def test_same_generator_same_patches_whatever_the_global_seeds():
    found = []
    for seed, global_seed in ((0, 0), (0, 1), (1, 1)):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)
        found.append(paste(pictures(), Pasting(), seeded(seed)))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_generator_goes_on_from_batch_to_batch():
    generator = seeded()
    first, second = (paste(pictures(), ALWAYS, generator) for _ in range(2))
    assert not torch.equal(first, second)


def test_input_is_left_as_it_was():
    images = pictures()
    before = images.clone()
    paste(images, ALWAYS, seeded())
    assert torch.equal(images, before)
