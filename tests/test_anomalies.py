"""Synthetic anomalies: where they lie, what they are made of, and that a seed decides all of it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as vision

from diffad_ref import anomalies
from diffad_ref.anomalies import (
    BUILT_IN,
    Synthesis,
    augment,
    blend,
    crop_textures,
    match_statistics,
    own_colour,
    perlin_masks,
    perlin_noise,
    shuffle_grid,
    shuffle_strips,
    synthesize,
    texture_bank,
)
from diffad_ref.diffusion import Draw
from diffad_ref.tools.photographs import Photographs


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=4, size=16, seed=0):
    return torch.rand(count, 3, size, size, generator=seeded(seed))


BANK = torch.randint(0, 256, (3, 3, 16, 16), generator=seeded(9), dtype=torch.uint8)
EVERY = Synthesis(p_normal=0.0, max_exponent=2, threshold=0.3)  # no image stays normal


# ------------------------------------------------------------------------------------ Perlin noise


def perlin_by_pixel(angles, rows, columns, height, width):
    """Perlin noise as it is told: at each pixel, four ramps blended twice."""

    def fade(u):
        return 6 * u**5 - 15 * u**4 + 10 * u**3

    def ramp(i, j, dy, dx):
        return math.cos(angles[i][j]) * dy + math.sin(angles[i][j]) * dx

    noise = torch.zeros(height, width, dtype=torch.float64)
    for r in range(height):
        for c in range(width):
            y, x = r * rows / height, c * columns / width
            i, j = int(y), int(x)
            dy, dx = y - i, x - j
            top = ramp(i, j, dy, dx) * (1 - fade(dx)) + ramp(i, j + 1, dy, dx - 1) * fade(dx)
            low = ramp(i + 1, j, dy - 1, dx)
            low = low * (1 - fade(dx)) + ramp(i + 1, j + 1, dy - 1, dx - 1) * fade(dx)
            noise[r, c] = math.sqrt(2) * (top * (1 - fade(dy)) + low * fade(dy))
    return noise


def test_perlin_noise_of_a_mixed_batch_is_that_of_a_loop_over_pixels():
    cells = torch.tensor([[1, 1], [1, 4], [4, 2], [8, 8]])
    angles = 2 * math.pi * torch.rand(4, 9, 9, generator=seeded(), dtype=torch.float64)
    found = perlin_noise(angles, cells, 24, 16)
    for noise, angle, (rows, columns) in zip(found, angles, cells.tolist(), strict=True):
        expected = perlin_by_pixel(angle.tolist(), rows, columns, 24, 16)
        assert torch.allclose(noise, expected, atol=1e-12)


def test_perlin_noise_is_zero_at_every_lattice_point():
    angles = 2 * math.pi * torch.rand(1, 5, 5, generator=seeded())
    assert perlin_noise(angles, torch.tensor([[4, 2]]), 16, 16)[0, ::4, ::8].abs().max() < 1e-6


# ------------------------------------------------------------------------------------------- masks


def test_no_mask_is_empty_though_one_draw_often_is(monkeypatch):
    draws = []
    real = anomalies._draw_masks

    def recorded(*arguments):
        draws.append(real(*arguments))
        return draws[-1]

    monkeypatch.setattr(anomalies, "_draw_masks", recorded)
    masks = perlin_masks(64, 16, seeded())
    assert masks.shape == (64, 1, 16, 16) and masks.unique().tolist() == [0, 1]
    for i, mask in enumerate(masks):
        first = next(drawn[i] for drawn in draws if drawn[i].any())
        assert torch.equal(mask, first)
    assert len(draws) > 1


def test_masks_lie_inside_the_foreground():
    foreground = torch.zeros(32, 1, 16, 16)
    foreground[:, :, 4:9, 6:16] = 1
    masks = perlin_masks(32, 16, seeded(), foreground=foreground)
    assert masks.flatten(1).any(1).all() and not (masks * (1 - foreground)).any()


def test_a_foreground_too_small_for_any_draw_becomes_the_mask():
    foreground = torch.zeros(1, 1, 16, 16)
    foreground[..., 0, 0] = 1  # noise is 0 at this lattice point
    masks = perlin_masks(1, 16, seeded(), threshold=0.99, foreground=foreground, attempts=3)
    assert torch.equal(masks, foreground)


def test_an_empty_foreground_counts_as_the_whole_image():
    whole = perlin_masks(8, 16, seeded())
    assert torch.equal(perlin_masks(8, 16, seeded(), foreground=torch.zeros(8, 1, 16, 16)), whole)


# ----------------------------------------------------------------------------------- texture bank


def test_built_in_bank_holds_the_photographs_of_both_packages():
    bank = texture_bank(size=32)
    assert bank.shape == (len(BUILT_IN) + 2, 3, 32, 32) and bank.dtype == torch.uint8
    assert (bank.float().std((1, 2, 3)) > 10).all()  # no blank one
    assert len({image.numpy().tobytes() for image in bank}) == len(bank)


def test_built_in_bank_holds_nothing_that_the_toy_factory_sells():
    assert not {"brick", "grass", "gravel"} & set(BUILT_IN)


def test_photographs_are_equal_crops_for_equal_arguments_and_all_others_differ():
    crops, again = Photographs(32, 5), Photographs(32, 5)
    assert len(crops) == 5 and crops.categories == ("photographs",)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(crops, again, strict=True))
    assert len({sample["image"].numpy().tobytes() for sample in crops}) == 5
    batch = torch.utils.data.default_collate([crops[i] for i in range(5)])
    assert batch["image"].shape == (5, 3, 32, 32) and batch["mask"].shape == (5, 1, 32, 32)
    assert 0 <= batch["image"].min() and batch["image"].max() <= 1 and not batch["label"].any()


def test_folder_is_searched_through_and_each_image_cut_to_its_centre(tmp_path, write):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = (10, 200, 30)  # the centred square
    write(tmp_path / "deep/er/a.png", wide)
    write(tmp_path / "b.png", np.full((8, 8), 77, np.uint8))  # grey
    (tmp_path / "notes.txt").write_text("no image")
    bank = texture_bank(tmp_path, size=16)
    assert bank.shape == (2, 3, 16, 16) and bank.dtype == torch.uint8
    assert (bank[0] == 77).all()
    inside = bank[1, :, :, 1:-1]  # the outermost columns see their neighbours
    assert (inside == torch.tensor([10, 200, 30])[:, None, None]).all()


def test_missing_texture_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; DTD's is dtd/images"):
        texture_bank(tmp_path / "nowhere")


def test_texture_folder_without_images_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path.name} holds no jpg, png or webp"):
        texture_bank(tmp_path)


def test_damaged_texture_is_named(tmp_path, write):
    path = write(tmp_path / "half.png", np.eye(64, dtype=np.uint8) * 255)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="half.png"):
        texture_bank(tmp_path, size=16)


# ----------------------------------------------------------------------------------------- sources


def tiles(image, grid):
    """The tiles of an image (C, H, W) as hashable values, in reading order."""
    rows = [row.chunk(grid, -1) for row in image.chunk(grid, -2)]
    return [tuple(tile.flatten().tolist()) for row in rows for tile in row]


def test_shuffled_grid_keeps_every_tile_whole_and_once():
    image = images(2)
    found = shuffle_grid(image, seeded(), grid=8)
    for before, after in zip(image, found, strict=True):
        assert sorted(tiles(after, 8)) == sorted(tiles(before, 8))
        assert tiles(after, 8) != tiles(before, 8)


def test_shuffled_strips_keep_every_strip_together():
    image = images(1)
    found = shuffle_strips(image, seeded())
    assert sorted(tiles(found[0], 8)) == sorted(tiles(image[0], 8))
    numbers = torch.arange(16.0).expand(1, 1, 16, 16)  # each column holds its own number
    columns = shuffle_strips(numbers, seeded())[0, 0]
    assert (columns == columns[0]).all()
    strips = columns[0].view(8, 2)[:, 0] / 2
    assert sorted(strips[:4].tolist()) == [0, 2, 4, 6]  # evens first, as in the released code


@pytest.mark.parametrize("shuffle", [shuffle_grid, shuffle_strips])
def test_each_image_of_a_batch_is_shuffled_in_its_own_way(shuffle):
    found = shuffle(images(1).expand(4, -1, -1, -1), seeded())
    assert not any(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("shuffle", [shuffle_grid, shuffle_strips])
def test_an_image_that_does_not_divide_into_parts_is_refused(shuffle):
    with pytest.raises(ValueError, match="8 parts do not divide an image of 20 x 20"):
        shuffle(images(1, 20), seeded())


def test_crops_lie_inside_their_texture():
    ramp = torch.arange(256, dtype=torch.uint8).expand(3, 64, 256)[:, :, ::4]
    bank = torch.stack([ramp, ramp]).contiguous()  # (2, 3, 64, 64), 0 to 252 from left to right
    crops = crop_textures(bank, 50, 16, seeded())
    assert crops.shape == (50, 3, 16, 16)
    assert crops.min() >= 0 and crops.max() <= 252 / 255 + 1e-6
    step = crops.diff(dim=-1)[:, :, :, 1:-1]
    assert (step > 0).all()  # never past the edge, where grid_sample would put zeros
    zoom = step.mean((1, 2, 3)) * 255 / 4  # texture pixels per pixel of the crop
    assert zoom.min() >= 1 - 1e-3 and zoom.max() <= 4 + 1e-3 and zoom.std() > 0.3


def test_a_texture_smaller_than_the_crop_is_shown_whole():
    bank = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8, generator=seeded())
    found = crop_textures(bank, 1, 16, seeded())
    expected = torch.nn.functional.interpolate(bank.float() / 255, size=16, mode="bilinear")
    assert torch.allclose(found[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1], atol=1e-6)


@pytest.mark.parametrize("number", range(10))
def test_each_augmentation_keeps_shape_and_range_and_changes_something(monkeypatch, number):
    chosen = (torch.arange(10) + number) % 10
    monkeypatch.setattr(Draw, "orders", lambda self, rows, count: chosen.expand(rows, count))
    before = (images(2, 16) * 200).round() / 255
    after = augment(before, seeded(1), count=1)
    assert after.shape == before.shape and after.dtype == torch.float32
    assert after.min() >= 0 and after.max() <= 1 and not torch.equal(after, before)


def test_augmented_textures_stay_images():
    before = images(16, 16)
    after = augment(before, seeded())
    assert after.dtype == torch.float32 and after.shape == before.shape
    assert after.min() >= 0 and after.max() <= 1


def test_equal_images_are_augmented_by_strengths_of_their_own(monkeypatch):
    monkeypatch.setattr(Draw, "orders", lambda self, rows, n: torch.arange(n).expand(rows, n))
    brighter = augment(images(1).expand(8, -1, -1, -1), seeded(), count=1)
    assert len({image.numpy().tobytes() for image in brighter}) == 8


@pytest.mark.parametrize("count", [0, 1, 3, 10])
def test_each_image_gets_so_many_augmentations(monkeypatch, count):
    monkeypatch.setattr(anomalies, "WAYS", ((lambda x: x + 1,),) * 10)
    found = 255 * augment(torch.zeros(40, 3, 8, 8), seeded(), count)
    assert torch.allclose(found, torch.full_like(found, count))


def test_no_augmentation_comes_more_often_than_another(monkeypatch):
    ways = [(lambda x, i=i: x + (torch.arange(10).view(10, 1) == i),) for i in range(10)]
    monkeypatch.setattr(anomalies, "WAYS", tuple(ways))  # each marks a row of its own
    shares = 255 * augment(torch.zeros(1000, 3, 10, 8), seeded(), 3).mean((0, 1, 3))
    assert (shares - 0.3).abs().max() < 4 * math.sqrt(0.3 * 0.7 / 1000)


def _posterize(image, bits):
    return vision.posterize(image, int(bits))


def _colours(image, hue, saturation):
    return vision.adjust_saturation(vision.adjust_hue(image, hue), saturation)


def _gamma(image, *gammas):
    return torch.cat([vision.adjust_gamma(c[None], g) for c, g in zip(image, gammas, strict=True)])


def _brightness(image, factor, offset):  # in one, as the sum may leave the levels only once
    return (factor * image.float() + offset).clamp(0, 255)


THEIRS = (_gamma, _brightness, vision.adjust_sharpness, _colours)
THEIRS += (vision.solarize, _posterize, vision.rotate, vision.invert)
THEIRS += (vision.autocontrast, vision.equalize)


@pytest.mark.parametrize("number", range(10))
def test_each_augmentation_of_a_batch_is_that_of_torchvision_for_each_image(number):
    """Within two grey levels: torchvision cuts off where we round, and rounds in between."""
    (change, *ranges), theirs = anomalies.WAYS[number], THEIRS[number]
    levels = texture_bank(size=64)
    draw, n = Draw(seeded(number)), len(levels)
    strengths = [draw.uniform(n, c, 1, 1, low=low, high=high) for low, high, c in ranges]
    found = change(levels.float(), *strengths).clamp(0, 255).round()
    expected = [
        theirs(image, *(v for s in strengths for v in s[i].flatten().tolist()))
        for i, image in enumerate(levels)
    ]
    gap = (found - torch.stack(expected).float()).abs()
    assert gap.max() <= 2 and (gap > 1).float().mean() < 0.01


def test_matched_source_is_about_as_bright_as_its_image():
    dark, light = 0.1 + 0.05 * images(200, 8), 0.8 + 0.1 * images(200, 8, seed=1)
    found = match_statistics(light, dark, Draw(seeded()))
    offset = (found - dark).mean((1, 2, 3))
    assert offset.abs().max() < 0.21 + 0.05 and abs(offset.mean()) < 0.06
    assert found.min() >= 0 and found.max() <= 1


def test_flat_source_is_a_colour_of_its_own_image():
    image = images(6)
    for flat, one in zip(own_colour(image, Draw(seeded())), image, strict=True):
        colour = flat[:, 0, 0]
        assert (flat == colour[:, None, None]).all()
        assert (one == colour[:, None, None]).all(0).any()


# ---------------------------------------------------------------------------------------- together


def test_blend_at_its_extremes_is_the_source_or_the_image():
    image, source, mask = images(1), images(1, seed=1), (images(1, seed=2)[:, :1] > 0.5).float()
    zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    pasted = torch.where(mask.bool(), source, image)
    assert torch.equal(blend(image, source, mask, zero), pasted)
    assert torch.equal(blend(image, source, mask, one), image)
    assert torch.allclose(blend(image, source, mask, one / 2), (image + pasted) / 2)


def test_outside_the_mask_the_image_is_untouched_and_inside_it_is_not():
    image = images(8)
    made, mask, _ = synthesize(image, torch.ones(8).bool(), BANK, EVERY, seeded())
    changed = (made != image).any(1, keepdim=True)
    assert not (changed & (mask == 0)).any()
    assert changed[mask == 1].float().mean() > 0.9
    assert made.min() >= 0 and made.max() <= 1


def test_labels_say_whether_a_mask_marks_anything():
    surface = torch.ones(64).bool()
    _, mask, label = synthesize(images(64), surface, BANK, Synthesis(), seeded())
    assert torch.equal(label, mask.flatten(1).amax(1)) and 0 < label.sum() < 64


@pytest.mark.parametrize("p_normal", [0.0, 0.25, 0.5, 1.0])
def test_so_many_images_stay_normal(p_normal):
    n, settings = 400, replace(EVERY, p_normal=p_normal, n_augmentations=0)
    image = images(n, 8)
    made, _, label = synthesize(image, torch.ones(n).bool(), BANK, settings, seeded())
    normal = label == 0
    deviation = math.sqrt(p_normal * (1 - p_normal) / n)
    assert abs(normal.float().mean().item() - p_normal) <= 4 * deviation
    assert torch.equal(made[normal], image[normal])


@pytest.mark.parametrize("shuffle", ["grid", "strips"])
def test_objects_take_their_shuffled_selves_and_textures_never_do(shuffle):
    """The bank is black and the images are not, so what is not black comes from the image."""
    black = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    settings = replace(EVERY, beta=(0.0, 0.0), n_augmentations=0, p_self=0.5, shuffle=shuffle)
    image = 0.2 + 0.8 * images(200)
    is_texture = torch.arange(200) < 100
    made, mask, _ = synthesize(image, is_texture, black, settings, seeded())
    from_itself = (made * mask).flatten(1).amax(1) > 0
    assert not from_itself[is_texture].any()
    assert abs(from_itself[~is_texture].float().mean().item() - 0.5) <= 4 * 0.05


def test_grey_image_gets_a_grey_source():
    colourful = torch.tensor([[255, 0, 0], [0, 255, 0]], dtype=torch.uint8)
    bank = colourful[:, :, None, None].expand(2, 3, 16, 16).contiguous()
    image = images(12)
    image[:6] = image[:6].mean(1, keepdim=True)
    made, _, _ = synthesize(image, torch.ones(12).bool(), bank, EVERY, seeded())
    spread = (made.amax(1) - made.amin(1)).flatten(1).amax(1)
    assert (spread[:6] < 1e-5).all() and (spread[6:] > 0.1).all()


def test_the_same_generator_gives_the_same_anomalies_whatever_the_global_seed():
    settings = Synthesis(p_match=0.4, p_flat=0.2)
    mixed = torch.tensor([True, False] * 4)
    made = []
    for seed in (0, 0, 1):
        torch.rand(3)  # the global generator has moved on
        made.append(synthesize(images(8), mixed, BANK, settings, seeded(seed)))
    assert all(torch.equal(a, b) for a, b in zip(made[0], made[1], strict=True))
    assert not torch.equal(made[0][0], made[2][0])


def test_source_images_are_not_written_to():
    image = images(8)
    before = image.clone()
    synthesize(image, torch.zeros(8).bool(), BANK, replace(EVERY, p_match=0.5), seeded())
    assert torch.equal(image, before)
