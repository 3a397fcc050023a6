"""Light adaptation: brightness goes, what a surface reflects stays."""

import pytest
import torch

from diffad_ref.codecs import CodecConfig, build_codec, rebuild
from diffad_ref.light import adapted, unadapted


def images(count=3, size=8, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_dimmed_image_looks_the_same(share):
    assert torch.allclose(adapted(images() * share), adapted(images()), atol=1e-6)


def test_adapted_by_pencil():
    """The median is 0.2: it is seen as 1/2, nothing as 0, three times as much light as 3/4."""
    row = torch.tensor([0.0, 0.2, 0.2, 0.2, 0.6]).expand(1, 3, 1, 5)
    seen = torch.tensor([0, 0.5, 0.5, 0.5, 0.75]).expand(1, 3, 1, 5)
    assert torch.allclose(adapted(row), seen)


def test_each_image_of_a_batch_has_its_own_level():
    x = images() * torch.tensor([1, 0.3, 0.05]).view(3, 1, 1, 1)
    alone = torch.cat([adapted(one[None]) for one in x])
    assert torch.equal(adapted(x), alone)


def test_what_was_seen_comes_back_in_its_light():
    x = images() * 0.9
    assert torch.allclose(unadapted(adapted(x), x), x, atol=1e-5)


def test_black_image_is_seen_black_and_comes_back():
    black = torch.zeros(1, 3, 4, 4)
    assert not adapted(black).any() and not unadapted(adapted(black), black).any()


def test_glare_stays_in_range():
    """Something seen as 1 would need infinite light."""
    assert unadapted(torch.ones(1, 3, 4, 4), images(1, 4)).max() == 1


# ------------------------------------------------------------------------------ through a codec


class Samples(list):
    def __init__(self, x):
        super().__init__({"image": image} for image in x)


@pytest.fixture
def codec():
    codec = build_codec(CodecConfig("pca", channels=48, factor=4, adapted=True))
    codec.prepare(Samples(images(20)))
    return codec


def test_codec_that_adapts_gives_one_latent_in_any_light(codec):
    x = images(2, seed=1)
    bright, dim = (codec.encode(2 * light - 1) for light in (x, x * 0.25))
    assert torch.allclose(bright, dim, atol=1e-4)


def test_codec_that_adapts_rebuilds_what_it_sees(codec):
    x = 2 * images(2, seed=1) - 1
    assert torch.allclose(codec.decode(codec.encode(x)), codec.seen(x), atol=1e-4)
    assert not torch.allclose(codec.seen(x), x, atol=0.05)
    assert rebuild(codec, Samples(images(2, seed=1)), progress=False) > 60


def test_pictures_of_a_codec_that_adapts_are_in_the_light_of_the_images(codec):
    x = 0.9 * images(2, seed=1)
    decoded = codec.decode(codec.encode(2 * x - 1))
    assert torch.allclose(codec.picture(decoded, x), x, atol=1e-3)
    assert torch.allclose(codec.picture(decoded), adapted(x), atol=1e-3)
