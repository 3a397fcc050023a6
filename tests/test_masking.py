"""Contrast masking: what a surface's own roughness hides, and what it leaves alone."""

from dataclasses import replace

import pytest
import torch

from diffad_ref.codecs import CodecConfig
from diffad_ref.deco_diff import Config, DecoDiff
from diffad_ref.masking import local_contrast, visibility

SMALL = Config.tiny(
    32,
    codec=CodecConfig("pca", channels=48, factor=4),
    classes=1,
    width=8,
    multipliers=(1, 2),
    heads=1,
    context=8,
    norm_groups=4,
)


def stripes(height, side=32):
    """Columns that alternate between -height and height, (1, 3, side, side)."""
    return (height * (-1.0) ** torch.arange(side)).expand(1, 3, side, side)


def half_rough(side=64):
    """Smooth on the left, stripes on the right."""
    images = stripes(0.5, side).clone()
    images[..., : side // 2] = 0
    return images


def test_contrast_of_stripes_is_their_height():
    contrast = local_contrast(stripes(0.2, 64), 3)[..., 24:40]  # mirrored borders are out of reach
    assert torch.allclose(contrast, torch.tensor(0.2), atol=1e-3)


def test_contrast_is_local_and_does_not_ask_how_bright_a_place_is():
    contrast = local_contrast(half_rough(), 3)
    assert contrast.shape == (1, 1, 64, 64)
    assert contrast[..., :16].max() < 1e-3 and contrast[..., 48:].min() > 0.45
    assert torch.allclose(local_contrast(half_rough() + 0.3, 3), contrast, atol=1e-5)


def test_difference_counts_half_at_the_named_contrast_and_a_third_at_twice_it():
    for height, share in ((0.1, 1 / 2), (0.2, 1 / 3)):
        found = visibility(stripes(height, 64), 0.1, sigma=3)[..., 24:40]
        assert torch.allclose(found, torch.tensor(share), atol=5e-3)


def test_smooth_surface_hides_nothing_and_zero_masks_nothing():
    flat = torch.full((2, 3, 16, 16), 0.7)
    assert torch.allclose(visibility(flat, 0.1), torch.ones(2, 1, 16, 16), atol=1e-4)
    assert torch.equal(visibility(half_rough(), 0), torch.ones(1, 1, 64, 64))


def test_window_grows_with_the_image():
    assert torch.equal(visibility(half_rough(), 0.1), visibility(half_rough(), 0.1, sigma=4))


def test_visibility_is_given_for_each_pixel_of_a_batch_on_its_own():
    both = torch.cat([half_rough(), stripes(0.2, 64)])
    alone = torch.cat([visibility(one[None], 0.1) for one in both])
    assert torch.allclose(visibility(both, 0.1), alone, atol=1e-6)


# ----------------------------------------------------------------------------- through a detector


@pytest.fixture(scope="module")
def scene():
    """A detector, and latents of half-rough images with the same deviation everywhere."""
    torch.manual_seed(0)
    detector = DecoDiff(replace(SMALL, image_clip=9.0, latent_clip=9.0))
    noise = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    detector.prepare([{"image": image} for image in noise])
    z_0 = detector.encode((half_rough(32) + 1) / 2)
    return detector.eval(), z_0, z_0 + 0.05


def compare(scene, masking, fusion):
    detector, z_0, z_hat = scene
    detector.config = replace(detector.config, masking=masking)
    return detector.compare(z_0, z_hat, fusion).anomaly_map[0]


@pytest.mark.parametrize("fusion", ["image", "latent", "geometric", "arithmetic"])
def test_same_deviation_counts_less_where_the_corrected_image_is_rough(scene, fusion):
    plain, masked = compare(scene, 0.0, fusion), compare(scene, 0.1, fusion)
    left, right = slice(4, 8), slice(24, 28)  # columns, away from the border of the two
    kept = [masked[:, part].mean() / plain[:, part].mean() for part in (left, right)]
    assert kept[0] > 2 * kept[1]
    assert (masked <= plain + 1e-6).all()


def test_masking_changes_the_map_and_not_the_picture(scene):
    detector, z_0, z_hat = scene
    pictures = []
    for masking in (0.0, 0.1):
        detector.config = replace(detector.config, masking=masking)
        pictures.append(detector.compare(z_0, z_hat).reconstruction)
    assert torch.equal(*pictures)
