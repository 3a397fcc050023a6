"""Features for comparison: what is prepared, what is refused, and how strong they are."""

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import ResNet50_Weights, resnet50

from diffad_ref.anomalies import crop_textures
from diffad_ref.features import DEVIATION, MEAN, PatchFeatures, ResNetFeatures
from diffad_ref.texture_sources import texture_bank


@lru_cache
def photographs(count=150, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return crop_textures(texture_bank(), count, size, generator)


def prepared(**settings):
    features = PatchFeatures(**settings)
    features.prepare(photographs())
    return features


# ----------------------------------------------------------------------------------------- patches


def test_patch_features_must_be_prepared():
    with pytest.raises(ValueError, match=r"learned nothing yet: call prepare\(photographs\)"):
        PatchFeatures()(torch.rand(1, 3, 32, 32))


def test_second_preparation_changes_nothing():
    features = prepared()
    before = {name: value.clone() for name, value in features.state_dict().items()}
    features.prepare(photographs(60, 32, 1))
    assert all(torch.equal(value, before[name]) for name, value in features.state_dict().items())


def test_on_photographs_components_have_unit_variance_and_are_uncorrelated():
    """Over the very patches that they were learned from: every second pixel, no padding."""
    features = prepared()
    for level, scale in zip(features(photographs()), features.scales, strict=True):
        side = 32 // scale
        learned = level[..., 2 : side - 2 : 2, 2 : side - 2 : 2].double()
        values = learned.transpose(0, 1).flatten(1)
        assert torch.allclose(values.mean(1), torch.zeros(12).double(), atol=1e-3)
        assert torch.allclose(torch.cov(values, correction=0), torch.eye(12).double(), atol=1e-3)


def test_on_other_photographs_the_strength_is_about_the_same():
    features = prepared()
    for level in features(photographs(150, 32, 1)):
        variance = level.transpose(0, 1).flatten(1).var(1)
        assert 0.25 < variance.min() and variance.max() < 4


def test_first_component_is_the_brightness_of_a_patch():
    """Of all patterns in photographs, light against dark varies most."""
    features = prepared()
    first = features.filters[0, 0]
    flat = torch.ones_like(first)
    assert F.cosine_similarity(first, flat, dim=0).abs() > 0.95


def test_feature_is_the_product_of_a_centred_patch_with_its_filter():
    features, image = prepared(), torch.rand(1, 3, 32, 32)
    patch = image[0, :, 10:15, 7:12].flatten()
    expected = features.filters[0] @ (patch - features.mean[0])
    assert torch.allclose(features(image)[0][0, :, 12, 9], expected, atol=1e-3)


def test_levels_have_the_size_of_the_shrunk_image():
    found = prepared(scales=(1, 2), patch=3, channels=5)(torch.rand(2, 3, 32, 24))
    assert [tuple(level.shape) for level in found] == [(2, 5, 32, 24), (2, 5, 16, 12)]


def test_equal_images_have_equal_features_and_a_change_shows_near_its_place_alone():
    features, image = prepared(), torch.rand(1, 3, 32, 32)
    other = image.clone()
    other[..., 16, 16] = 1 - other[..., 16, 16].round()
    assert all(torch.equal(a, b) for a, b in zip(features(image), features(image), strict=True))
    moved = (features(other)[0] != features(image)[0])[0].any(0).nonzero()
    assert moved.min() == 14 and moved.max() == 18


# ------------------------------------------------------------------------------------------ ResNet


def random_resnet(stages=(1, 2, 3)):
    """With random weights that pass for the published ones."""
    torch.manual_seed(0)
    features = ResNetFeatures(stages)
    features.ready.fill_(True)
    return features


def test_resnet_without_weights_is_refused():
    with pytest.raises(ValueError, match=r"no weights yet: call prepare\(\)"):
        ResNetFeatures()(torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize("stages", [(), (5,), (1, 2, 7), (-1, 1)])
def test_stages_that_a_resnet_does_not_have_are_refused(stages):
    with pytest.raises(ValueError, match="stages are some of 0 to 4, not"):
        ResNetFeatures(stages)


def test_stages_come_with_their_channels_and_sizes():
    with torch.no_grad():
        found = random_resnet((0, 1, 2, 3, 4))(torch.rand(2, 3, 64, 64))
    sizes = [(64, 32), (256, 16), (512, 8), (1024, 4), (2048, 2)]
    assert [tuple(stage.shape) for stage in found] == [(2, c, s, s) for c, s in sizes]


def test_stages_are_those_of_the_network_of_torchvision():
    features, images, seen = random_resnet((2,)), torch.rand(2, 3, 32, 32), []
    own = resnet50(weights=None).eval()
    own.fc = nn.Identity()
    own.load_state_dict(features.network.state_dict())
    own.layer2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (MEAN, DEVIATION))
    with torch.no_grad():
        own((images - mean) / deviation)
        [found] = features(images)
    assert torch.allclose(found, seen[0], atol=1e-5)


def test_resnet_stays_in_evaluation_mode_and_learns_nothing():
    features = random_resnet((1,))
    parent = nn.Sequential(features, nn.Flatten()).train()
    assert parent.training and not any(module.training for module in features.modules())
    assert not any(p.requires_grad for p in features.parameters())
    before = features.network.bn1.running_mean.clone()
    features(torch.rand(4, 3, 32, 32))
    assert torch.equal(features.network.bn1.running_mean, before)


def test_resnet_is_prepared_once_from_weights_of_torchvision(monkeypatch):
    """Its classifier is left behind, and the second time nothing is loaded."""
    torch.manual_seed(1)
    published, asked = resnet50(weights=None).state_dict(), []

    def give(self, **settings):
        asked.append((self, settings["check_hash"]))
        return published

    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", give)
    features = ResNetFeatures()
    features.prepare()
    features.prepare()
    assert asked == [(ResNet50_Weights.IMAGENET1K_V1, True)]
    own = features.network.state_dict()
    assert {name for name in published if name not in own} == {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, published[name]) for name, value in own.items())
