"""Patches that One-for-More pastes: which images change, where, and what the generator decides."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffad_ref import one_for_more
from diffad_ref.one_for_more import Pasting, paste, paste_patch

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
    """How many patches each of many images gets; an image is known by its colour."""
    counts = Counter()

    def one(image, source, settings, rng):
        counts[tuple(image[0, 0])] += 1
        return image

    monkeypatch.setattr(one_for_more, "paste_patch", one)
    number = torch.arange(images)
    colours = torch.stack([number // 256, number % 256, 0 * number], 1) / 255
    paste(colours[..., None, None].expand(-1, 3, 16, 16), settings, seeded())
    assert len(counts) == images
    return np.array(list(counts.values()))


def test_each_patch_but_the_first_comes_with_probability_one_half(monkeypatch):
    counts = count_patches(monkeypatch, ALWAYS)
    shares = [np.mean(counts == k) for k in (1, 2, 3, 4)]
    assert set(counts) == {1, 2, 3, 4}
    assert np.allclose(shares, [1 / 2, 1 / 4, 1 / 8, 1 / 8], atol=0.08)


def test_no_image_gets_more_patches_than_the_most(monkeypatch):
    assert set(count_patches(monkeypatch, replace(ALWAYS, most=2))) == {1, 2}


# ------------------------------------------------------------------------------------ where, what


def test_outside_of_its_patches_an_image_stays_up_to_eight_bits(monkeypatch):
    """Where a patch was blended in is told by a blending that leaves a mark."""
    images = pictures(4)
    monkeypatch.setattr(one_for_more.cv2, "seamlessClone", marked)
    changed = paste(images, replace(ALWAYS, most=1), seeded())
    moved = changes(changed, images) > 0
    assert moved.flatten(1).any(1).all() and not moved.flatten(1).all(1).any()
    assert (changed - images).abs().amax(1)[~moved].max() <= 0.5 / 255 + 1e-6


def marked(patch, image, inside, centre, kind):
    """Puts a patch in its place as it is, twenty grey levels lighter or darker."""
    (x, y), (height, width), result = centre, patch.shape[:2], image.copy()
    place = result[y - height // 2 :, x - width // 2 :][:height, :width]
    assert place.shape == patch.shape  # no patch hangs over the edge
    place += np.where(place < 128, 20, -20).astype(np.uint8)
    return result


@pytest.mark.parametrize("size", [16, 32, 33, 64])
def test_patches_have_the_size_that_the_settings_allow_and_lie_inside(monkeypatch, size):
    """Half-widths of 3 to 40 per cent, scaled by 0.7 to 1.3, with ground all around."""
    sides = []

    def see(patch, image, inside, centre, kind):
        sides.extend(patch.shape[:2])
        return marked(patch, image, inside, centre, kind)

    monkeypatch.setattr(one_for_more.cv2, "seamlessClone", see)
    paste(pictures(100, size), ALWAYS, seeded())
    assert min(sides) >= 6 and max(sides) <= min(size - 4, 1.3 * 0.8 * size)
    assert max(sides) > 0.7 * size and min(sides) <= max(6, 0.15 * size)


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
    pairs = []

    def see(image, source, settings, rng):
        pairs.append((image[0, 0, 0].item(), source[0, 0, 0].item()))
        return image

    monkeypatch.setattr(one_for_more, "paste_patch", see)
    greys = torch.arange(count) * 20 / 255
    for seed in range(20):
        paste(greys.view(-1, 1, 1, 1).expand(-1, 3, 16, 16), settings, seeded(seed))
    return pairs


@pytest.mark.parametrize("count", [2, 4])
def test_patches_come_from_every_other_image_of_the_batch(monkeypatch, count):
    pairs = set(sources(monkeypatch, ALWAYS, count))
    greys = range(0, 20 * count, 20)
    assert pairs == {(a, b) for a in greys for b in greys if a != b}


def test_image_alone_in_its_batch_is_its_own_source(monkeypatch):
    assert set(sources(monkeypatch, ALWAYS, 1)) == {(0, 0)}


def test_patches_come_from_the_image_itself_where_the_settings_say_so(monkeypatch):
    own = replace(ALWAYS, from_others=False)
    assert all(image == source for image, source in sources(monkeypatch, own, 4))


def test_a_batch_of_one_gets_patches_too():
    images = pictures(1, 64)
    changed = paste(images, ALWAYS, seeded())
    assert changed.shape == (1, 3, 64, 64) and mask_of(changed, images).any()


def test_one_patch_changes_one_place_and_leaves_its_arguments_alone():
    image, source = (255 * pictures(2, 64)).byte().permute(0, 2, 3, 1).numpy().copy()
    before = image.copy(), source.copy()
    found = paste_patch(image, source, ALWAYS, np.random.default_rng(0))
    assert found.dtype == np.uint8 and found.shape == image.shape
    assert 0 < np.mean((found != image).any(-1)) < 0.8
    assert np.array_equal(image, before[0]) and np.array_equal(source, before[1])


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
