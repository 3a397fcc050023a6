"""From two images to a map: SciPy's numbers at every size, and features that can be compared."""

from functools import lru_cache

import numpy as np
import pytest
import skimage.data
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import nn
from torchvision.models import resnet50

from diffad_ref import maps
from diffad_ref.anomalies import crop_textures, texture_bank
from diffad_ref.maps import (
    PatchFeatures,
    PretrainedFeatures,
    clip_and_scale,
    enlarge,
    feature_distance,
    gaussian_filter,
)


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


def test_distances_of_the_levels_are_added_up():
    """One channel: they are 3 and 4."""
    ours = [torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 1.0)]
    theirs = [torch.full((1, 1, 4, 4), 3.0), torch.full((1, 1, 4, 4), -3.0)]
    assert torch.equal(feature_distance(ours, theirs, 4), torch.full((1, 4, 4), 7.0))


def test_distance_over_channels_is_euclidean():
    ours, theirs = torch.zeros(1, 2, 2, 2), torch.tensor([3.0, -4.0]).view(1, 2, 1, 1)
    found = feature_distance([ours], [theirs.expand(1, 2, 2, 2)], 2)
    assert torch.equal(found, torch.full((1, 2, 2), 5.0))


def test_level_is_stretched_so_that_its_corners_meet_those_of_the_map():
    gap = torch.tensor([[0.0, 3.0], [6.0, 9.0]]).view(1, 1, 2, 2)
    found = feature_distance([gap], [torch.zeros_like(gap)], 4)
    assert torch.allclose(found[0], torch.arange(4.0) + 2 * torch.arange(4.0)[:, None])


def test_features_lie_at_distance_0_from_themselves():
    found = feature_distance(pyramid(0), pyramid(0), 16)
    assert found.shape == (2, 16, 16) and not found.any()
    assert feature_distance(pyramid(0), pyramid(1), 16).min() > 0


def test_pyramids_of_different_height_are_not_compared():
    with pytest.raises(ValueError):
        feature_distance(pyramid(0), pyramid(0)[:1], 16)


# ------------------------------------------------------------------------------- patch features


@lru_cache
def photographs(count=150, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return crop_textures(texture_bank(), count, size, generator)


def samples(images):
    return [{"image": image} for image in images]


def prepared(**settings):
    features = PatchFeatures(**settings)
    features.prepare(samples(photographs()))
    return features


def test_patch_features_must_be_prepared():
    with pytest.raises(ValueError, match=r"learned nothing yet: call prepare\(dataset\)"):
        PatchFeatures()(torch.rand(1, 3, 32, 32))


def test_second_preparation_changes_nothing():
    features = prepared()
    before = {name: value.clone() for name, value in features.state_dict().items()}
    features.prepare(samples(photographs(60, 32, 1)))
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


# -------------------------------------------------------------------------- pretrained features


@lru_cache
def network():
    """A whole ResNet-50 with random weights, which pass for the published ones."""
    torch.manual_seed(0)
    return resnet50(weights=None).eval()


def published():
    """Its weights; timm calls them as torchvision does."""
    return {name: value for name, value in network().state_dict().items()}


@lru_cache
def random_resnet():
    """Features of all stages of that network."""
    features = PretrainedFeatures("resnet50", (0, 1, 2, 3, 4))
    features.network.load_state_dict({n: published()[n] for n in features.network.state_dict()})
    features.ready.fill_(True)
    return features


def test_features_without_weights_are_refused():
    with pytest.raises(ValueError, match=r"no weights yet: call prepare\(\)"):
        PretrainedFeatures("resnet50", (0,))(torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize("stages", [(), (5,), (1, 2, 7), (-1, 1)])
def test_stages_that_no_network_has_are_refused(stages):
    with pytest.raises(ValueError, match="stages are some of 0 to 4 of a timm model, not"):
        PretrainedFeatures("resnet50", stages)


def test_a_network_that_timm_does_not_know_is_refused():
    with pytest.raises(ValueError, match="of 'vgg'"):
        PretrainedFeatures("vgg")


def test_stages_come_with_their_channels_and_sizes():
    with torch.no_grad():
        found = random_resnet()(torch.rand(2, 3, 64, 64))
    sizes = [(64, 32), (256, 16), (512, 8), (1024, 4), (2048, 2)]
    assert [tuple(stage.shape) for stage in found] == [(2, c, s, s) for c, s in sizes]


def test_stages_are_those_of_the_network_of_torchvision():
    features, own, images, seen = random_resnet(), network(), torch.rand(2, 3, 32, 32), []
    layers = (own.relu, own.layer1, own.layer2, own.layer3, own.layer4)
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
        for layer in layers
    ]
    with torch.no_grad():
        own((images - features.mean) / features.std)
        found = features(images)
    for hook in hooks:
        hook.remove()
    assert len(found) == len(seen) == 5
    for ours, theirs in zip(found, seen, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_pretrained_features_stay_in_evaluation_mode_and_learn_nothing():
    features = random_resnet()
    parent = nn.Sequential(features, nn.Flatten()).train()
    assert parent.training and not any(module.training for module in features.modules())
    assert not any(p.requires_grad for p in features.parameters())
    before = features.network.bn1.running_mean.clone()
    features(torch.rand(4, 3, 32, 32))
    assert torch.equal(features.network.bn1.running_mean, before)


def test_features_are_prepared_once_and_what_lies_behind_them_is_left_out(monkeypatch):
    asked = []
    features = PretrainedFeatures()
    own = features.network.state_dict()

    def state(name, **settings):
        asked.append((name, settings["out_indices"]))
        return {n: published()[n] for n in own}

    monkeypatch.setattr(maps, "pretrained_state", state)
    features.prepare()
    features.prepare()
    assert asked == [("resnet50", (1, 2, 3))]
    left = {name for name in published() if name not in own}
    assert all(name.startswith(("layer4", "fc")) for name in left)
    assert all(torch.equal(value, published()[name]) for name, value in own.items())
    assert features.ready and features(torch.rand(1, 3, 32, 32))


def test_weights_come_from_the_hub_under_the_name_of_the_network(monkeypatch):
    asked = []

    def create(name, **settings):
        asked.append((name, settings))
        return network()

    monkeypatch.setattr(timm, "create_model", create)
    assert maps.pretrained_state("resnet50", out_indices=(1,)).keys() == published().keys()
    assert asked == [("resnet50", {"pretrained": True, "out_indices": (1,)})]


def test_without_a_hub_it_is_said_which_network_can_be_had(monkeypatch):
    def create(name, **settings):
        raise OSError("no route")

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(FileNotFoundError, match=r'install "diffad_ref\[pretrained\]".*no route'):
        maps.pretrained_state("resnet50")


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "convnext_atto"])
def test_features_of_any_network_of_timm_have_the_names_of_their_weights(name, monkeypatch):
    features = PretrainedFeatures(name, (1, 2))
    if name != "tf_efficientnet_lite0":
        own = timm.create_model
        monkeypatch.setattr(timm, "create_model", lambda n, pretrained=0, **s: own(n, **s))
    features.prepare()
    assert [x.shape[-1] for x in features(torch.rand(1, 3, 64, 64))] == [
        64 // r for r in features.network.feature_info.reduction()
    ]


def test_the_network_whose_weights_are_a_package_knows_a_cat():
    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict(maps.pretrained_state("tf_efficientnet_lite0"))
    cat = torch.from_numpy(skimage.data.chelsea()).permute(2, 0, 1)[None] / 127.5 - 1
    cat = torch.nn.functional.interpolate(cat, size=(224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        assert network(cat).argmax().item() in (281, 282, 285)  # tabby, tiger cat, Egyptian cat
