"""Pasted patches: which images change, where the mask lies, and what the generator decides."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffad_ref import nsa
from diffad_ref.nsa import Pasting, paste, paste_patches

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


# --------------------------------------------------------------------------------------- how many


def test_without_a_share_nothing_is_touched():
    images = pictures()
    changed, mask = paste(images, Pasting(share=0.0), seeded())
    assert torch.equal(changed, images) and not mask.any()


def test_with_the_whole_share_most_images_change():
    """All of them, save those whose patch is too small to be blended."""
    images = pictures(60, 64)
    changed, mask = paste(images, ALWAYS, seeded())
    assert (changes(changed, images) > 0).flatten(1).any(1).sum() >= 57
    assert mask.flatten(1).any(1).sum() >= 45


def test_about_half_of_the_images_change_by_default():
    images = pictures(150, 64)
    changed, mask = paste(images, Pasting(), seeded())
    same = (changed == images).flatten(1).all(1)  # bit for bit: any other is rounded to 8 bits
    assert 0.4 < same.float().mean() < 0.6
    assert mask[~same].any() and not mask[same].any()


def count_patches(monkeypatch, settings, images=300):
    """How many patches each of many images gets."""
    counts, real = [], paste_patches

    def counting(image, source, settings, rng):
        counts.append(0)
        return real(image, source, settings, rng)

    def one(image, source, settings, rng):
        counts[-1] += 1
        return image

    monkeypatch.setattr(nsa, "paste_patches", counting)
    monkeypatch.setattr(nsa, "_paste_one", one)
    paste(pictures(images, 16), settings, seeded())
    return np.array(counts)


def test_each_patch_but_the_first_comes_with_probability_one_half(monkeypatch):
    counts = count_patches(monkeypatch, ALWAYS)
    shares = [np.mean(counts == k) for k in (1, 2, 3, 4)]
    assert sum(shares) == 1
    assert np.allclose(shares, [1 / 2, 1 / 4, 1 / 8, 1 / 8], atol=0.08)


def test_no_image_gets_more_patches_than_the_most(monkeypatch):
    assert set(count_patches(monkeypatch, replace(ALWAYS, most=2))) == {1, 2}


# ------------------------------------------------------------------------------------ where, what


def test_mask_is_where_a_channel_changed_by_more_than_one_grey_level():
    """Up to its specks: a pixel with few of its kind among the 25 around it follows the others."""
    images = pictures(16)
    changed, mask = paste(images, ALWAYS, seeded())
    assert mask.shape == (16, 1, 32, 32) and set(mask.unique().tolist()) == {0, 1}
    differs = (changes(changed, images) > 1).float()[:, None]
    around = torch.nn.functional.pad(differs, [2] * 4, mode="reflect").unfold(2, 5, 1)
    share = around.unfold(3, 5, 1).mean((-1, -2))[..., 2:-2, 2:-2]  # borders have their own rule
    inner = mask[..., 2:-2, 2:-2]
    assert mask.any() and torch.equal(inner == 1, share > 0.5)


def test_outside_of_its_patches_an_image_stays_up_to_eight_bits(monkeypatch):
    """Where a patch was blended in is told by a blending that leaves a mark."""
    images = pictures(4)
    monkeypatch.setattr(nsa.cv2, "seamlessClone", marked)
    changed, mask = paste(images, replace(ALWAYS, most=1), seeded())
    moved = changes(changed, images) > 0
    assert moved.any() and not moved.all()
    assert (changed - images).abs().amax(1)[~moved].max() <= 0.5 / 255 + 1e-6
    assert moved[mask[:, 0] == 1].float().mean() > 0.9


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

    monkeypatch.setattr(nsa.cv2, "seamlessClone", see)
    paste(pictures(100, size), ALWAYS, seeded())
    assert min(sides) >= 6 and max(sides) <= min(size - 4, 1.3 * 0.8 * size)
    assert max(sides) > 0.7 * size and min(sides) <= max(6, 0.15 * size)


@pytest.mark.parametrize("size", [16, 32])
def test_patch_of_the_same_grey_as_its_ground_shows_nowhere(size):
    flat = torch.full((4, 3, size, size), 0.5)
    changed, mask = paste(flat, ALWAYS, seeded())
    assert torch.allclose(changed, flat, atol=1.5 / 255) and not mask.any()


def test_images_of_32_pixels_get_patches_too():
    images = pictures(20, 32)
    changed, mask = paste(images, ALWAYS, seeded())
    assert (changes(changed, images) > 0).flatten(1).any(1).sum() >= 15
    assert 0.02 < mask.mean() < 0.3


def test_values_stay_between_black_and_white():
    images = (pictures(16) > 0.5).float()
    changed, _ = paste(images, ALWAYS, seeded())
    assert changed.min() == 0 and changed.max() == 1


# ----------------------------------------------------------------------------------------- sources


def sources(monkeypatch, settings, count):
    """Pairs (image, source) of a batch in which every image is of another grey."""
    pairs = []

    def see(image, source, settings, rng):
        pairs.append((image[0, 0, 0].item(), source[0, 0, 0].item()))
        return image

    monkeypatch.setattr(nsa, "paste_patches", see)
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
    changed, mask = paste(pictures(1, 64), ALWAYS, seeded())
    assert changed.shape == (1, 3, 64, 64) and mask.shape == (1, 1, 64, 64) and mask.any()


# --------------------------------------------------------------------------------------- the chance


def test_same_generator_same_patches_whatever_the_global_seeds():
    found = []
    for seed, global_seed in ((0, 0), (0, 1), (1, 1)):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)
        found.append(paste(pictures(), Pasting(), seeded(seed)))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not torch.equal(found[0][0], found[2][0])


def test_generator_goes_on_from_batch_to_batch():
    generator = seeded()
    first, second = (paste(pictures(), ALWAYS, generator)[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_input_is_left_as_it_was():
    images = pictures()
    before = images.clone()
    paste(images, ALWAYS, seeded())
    assert torch.equal(images, before)
