"""Codecs: what comes back from a latent, what is prepared, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset

from diffad_ref.codecs import CodecConfig, PatchPCA, build_codec, draw_latent
from diffad_ref.tools.latents import codec_config_of, rebuild

PCA = CodecConfig("pca", channels=6, factor=4)
KL = CodecConfig(widths=(8, 16), factor=2, layers=1, norm_groups=4)
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Images(Dataset):
    """Images of a tensor, as samples."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"image": self.images[i]}


def images(count=80, size=16, seed=0):
    """Coloured gradients with some noise: patches that have more and less frequent shapes."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 3, 3, generator=generator)
    smooth = F.interpolate(coarse, size, mode="bilinear", align_corners=True)
    return (smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)


def fitted(x=None, **changes):
    codec = build_codec(replace(PCA, **changes))
    codec.prepare(Images(images() if x is None else x))
    return codec


def lost(codec, x):
    """What is lost of images: squared error in [-1, 1], where latents are."""
    return (codec.decode(codec.encode(x)) - (2 * x - 1)).square().mean().item()


def patches(x, factor=4):
    """Patches in rows (n, 3 f²), in [-1, 1], as NumPy has them."""
    x = 2 * x.double().numpy() - 1
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // factor, factor, w // factor, factor)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(-1, c * factor**2)


# --------------------------------------------------------------------------- principal components


def test_all_components_rebuild_every_image_exactly():
    x = images(8, seed=1)  # others than it learned from
    codec = fitted(channels=48)
    decoded = codec.decode(codec.encode(x))
    assert torch.allclose(decoded, 2 * x - 1, atol=1e-5)
    assert torch.allclose(codec.picture(decoded), x, atol=1e-5)


def test_picture_is_cut_to_what_an_image_may_hold():
    decoded = torch.tensor([-7.0, -1.0, -0.5, 0.0, 1.0, 1.5])
    assert build_codec(PCA).picture(decoded).tolist() == [0, 0, 0.25, 0.5, 1, 1]


@pytest.mark.parametrize("equalise", [0.0, 0.5, 1.0])
def test_what_few_components_lose_is_the_variance_of_the_others(equalise):
    """The squared error is the sum of the eigenvalues left out; the spread plays no part."""
    error = lost(fitted(equalise=equalise), images())
    values = np.linalg.eigvalsh(np.cov(patches(images()).T, bias=True))[::-1]
    assert error == pytest.approx(values[6:].sum() / 48, rel=1e-3)


def test_more_components_never_rebuild_worse():
    errors = [lost(fitted(channels=count), images()) for count in (1, 2, 3, 6, 12, 24, 48)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 2 * errors[3]


@pytest.mark.parametrize("equalise", [0.0, 0.5, 1.0])
def test_latents_have_variance_1_and_mean_0(equalise):
    z = fitted(equalise=equalise).encode(images())
    assert z.shape == (80, 6, 4, 4)
    assert z.mean((0, 2, 3)).abs().max() < 1e-4
    assert z.var((0, 2, 3), correction=0).mean().item() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("equalise", [0.0, 0.5, 1.0])
def test_variances_of_the_components_are_evened_out_by_a_power(equalise):
    values = np.linalg.eigvalsh(np.cov(patches(images()).T, bias=True))[::-1][:6]
    found = fitted(equalise=equalise).encode(images()).var((0, 2, 3), correction=0)
    expected = values ** (1 - equalise)
    np.testing.assert_allclose(found, expected / expected.mean(), rtol=2e-3)


def test_components_are_orthonormal_and_each_points_to_the_brighter_side():
    components = fitted(channels=48).components
    assert torch.allclose(components @ components.T, torch.eye(48), atol=1e-5)
    assert (components.sum(1) > -1e-5).all()


@pytest.mark.parametrize("seed", range(5))
def test_component_that_brightens_nothing_is_kept(seed):
    """Stripes: what varies is as much darker here as it is brighter there."""
    strength = torch.rand(20, generator=torch.Generator().manual_seed(seed)).round() / 4
    x = torch.full((20, 3, 4, 4), 0.5)
    x[..., ::2] += strength.view(-1, 1, 1, 1)
    x[..., 1::2] -= strength.view(-1, 1, 1, 1)
    codec = fitted(x, channels=1, factor=2)
    assert torch.allclose(codec.decode(codec.encode(x)), 2 * x - 1, atol=1e-5)


def test_images_that_are_all_alike_still_come_back():
    x = torch.full((3, 3, 8, 8), 0.25)
    codec = fitted(x)
    assert torch.allclose(codec.decode(codec.encode(x)), 2 * x - 1, atol=1e-5)


def test_patch_only_touches_its_own_cell():
    x, codec = images(1), fitted()
    changed = x.clone()
    changed[..., 4:8, 8:12] = 1 - changed[..., 4:8, 8:12]
    differs = (codec.encode(x) != codec.encode(changed)).any(1)[0]
    assert differs.nonzero().tolist() == [[1, 2]]


def test_learning_twice_gives_the_same_codec_bit_for_bit_and_the_first_lesson_stays():
    first, second = fitted(), fitted()
    first.prepare(Images(images(seed=5)))  # it is ready, and nothing happens
    for name, value in second.state_dict().items():
        assert torch.equal(first.state_dict()[name], value)


def test_pca_leaves_nothing_to_chance():
    codec, x = fitted(), images(2)
    mean, std = codec.posterior(x).chunk(2, 1)
    assert not std.any() and torch.equal(mean, codec.encode(x))
    assert torch.equal(codec.sample(x, torch.Generator()), mean)


@pytest.mark.parametrize("use", ["encode", "posterior", "sample"])
@pytest.mark.parametrize("config", [PCA, KL], ids=["pca", "kl"])
def test_codec_that_is_not_ready_refuses_to_work(config, use):
    codec, rest = build_codec(config), [torch.Generator()] * (use == "sample")
    assert not codec.is_ready()
    with pytest.raises(ValueError, match=r"knows nothing yet: call prepare\(dataset\), or fit"):
        getattr(codec, use)(images(1), *rest)


@pytest.mark.parametrize("config", [PCA, KL], ids=["pca", "kl"])
def test_codec_without_memory_counts_as_ready_because_nothing_in_it_has_a_value(config):
    with torch.device("meta"):
        codec, x = build_codec(config), torch.rand(2, 3, 16, 16)
        z, cells = codec.encode(x), 16 // config.factor
    assert z.is_meta and z.shape == (2, config.channels, cells, cells)
    assert codec.decode(z).shape == x.shape


@pytest.mark.parametrize("channels", [0, 49])
def test_number_of_components_that_a_patch_does_not_have_is_refused(channels):
    with pytest.raises(
        ValueError, match="patch of 4 pixels has 1 to 48 components|greater than or equal to 1"
    ):
        PatchPCA(replace(PCA, channels=channels))


def test_image_that_does_not_divide_into_cells_is_refused_wherever_it_comes():
    for shape in ((2, 3, 16, 18), (2, 3, 18, 16)):
        for use in (fitted().encode, fitted):  # fitted learns from it
            with pytest.raises(ValueError, match="18.* not divide into .*cells of 4 pixels"):
                use(torch.rand(shape))


def test_unknown_codec_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="Input should be 'kl' or 'pca'"):
        build_codec(CodecConfig("jpeg"))


# ---------------------------------------------------------------------------------------- sampling


def test_latent_of_training_is_drawn_from_the_posterior():
    posterior = torch.tensor([3.0, -1.0, 0.5, 2.0]).view(1, 4, 1, 1).expand(20_000, 4, 1, 1)
    z = draw_latent(posterior, torch.Generator().manual_seed(0))
    assert z.mean((0, 2, 3)).tolist() == pytest.approx([3, -1], abs=0.05)
    assert z.std((0, 2, 3)).tolist() == pytest.approx([0.5, 2], rel=0.03)


def test_latent_repeats_with_its_seed_and_without_spread_is_the_mean():
    posterior = torch.rand(2, 4, 3, 3)
    a, b, other = (draw_latent(posterior, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, other)
    posterior[:, 2:] = 0
    assert torch.equal(draw_latent(posterior, torch.Generator().manual_seed(1)), posterior[:, :2])


# ------------------------------------------------------------------------------ variational encoder


@pytest.fixture(scope="module")
def vae():
    """A tiny autoencoder of diffusers."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
    ).eval()


@pytest.fixture
def folder(vae, tmp_path):
    """It, saved as the hub has it."""
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def config_of(folder, **changes):
    return replace(KL, **{"pretrained": str(folder), "scale": 0.5, **changes})


def loaded(folder):
    codec = build_codec(config_of(folder))
    codec.prepare(None)
    return codec


@torch.no_grad()
def test_loaded_autoencoder_has_the_numbers_of_diffusers(vae, folder):
    codec, x = loaded(folder), images(2)
    posterior = vae.encode(2 * x - 1).latent_dist
    assert torch.allclose(codec.encode(x), 0.5 * posterior.mean, atol=1e-6)
    expected = 0.5 * torch.cat([posterior.mean, posterior.std], 1)
    assert torch.allclose(codec.posterior(x), expected, atol=1e-6)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(codec.decode(z), vae.decode(z / 0.5).sample, atol=1e-5)


@torch.no_grad()
def test_sample_of_an_autoencoder_spreads_around_its_mean_by_its_deviation(folder):
    codec, x = loaded(folder), images(1).expand(2000, 3, 16, 16)[..., :4, :4]
    mean, std = codec.posterior(x[:1]).chunk(2, 1)
    z = codec.sample(x, torch.Generator().manual_seed(0))
    assert torch.allclose(z.mean(0), mean[0], atol=0.15 * std.max().item())
    assert torch.allclose(z.std(0) / std[0], torch.ones_like(std[0]), atol=0.1)


def test_config_of_any_autoencoder_is_read_from_its_folder(folder):
    assert codec_config_of(folder) == config_of(folder)
    assert codec_config_of(folder.parent, "vae") == config_of(folder.parent, subfolder="vae")
    codec = build_codec(codec_config_of(folder))
    codec.prepare(None)
    assert codec.is_ready()


@torch.no_grad()
def test_codec_is_prepared_once_from_where_its_config_says(folder):
    codec, x = loaded(folder), images(2)
    expected = codec.encode(x)
    (folder / WEIGHTS).unlink()
    codec.prepare(None)  # it is ready, and nothing is read
    assert torch.equal(codec.encode(x), expected)


@pytest.mark.parametrize(
    "change", [{"scale": 0.18215}, {"norm_groups": 2}, {"layers": 2}, {"widths": (8, 8)}], ids=str
)
def test_autoencoder_of_another_kind_than_the_config_is_refused(folder, change):
    codec = build_codec(config_of(folder, **change))
    with pytest.raises(ValueError, match="vae' is another autoencoder than the config"):
        codec.prepare(None)
    assert not codec.is_ready()


def test_levels_must_make_the_factor():
    with pytest.raises(ValueError, match="2 levels make latents of 1/2 of the side"):
        build_codec(replace(KL, factor=8))


@pytest.mark.parametrize("missing", ["config.json", WEIGHTS])
def test_folder_that_lacks_a_file_is_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"no autoencoder in '{folder}'"):
        loaded(folder)


def test_folder_that_is_not_there_is_named(tmp_path):
    for use in (loaded, codec_config_of):
        with pytest.raises(FileNotFoundError, match=f"no autoencoder in '{tmp_path}/nothing'"):
            use(tmp_path / "nothing")


def test_name_that_cannot_be_reached_is_named(monkeypatch):
    def unreachable(name, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", unreachable)
    with pytest.raises(FileNotFoundError, match="no autoencoder in 'some/vae': no route to host"):
        loaded("some/vae")


def test_damaged_weights_are_named(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000])
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        loaded(folder)


def test_folder_without_one_of_the_weights_never_gets_random_ones_instead(folder):
    state = load_file(folder / WEIGHTS)
    del state["decoder.conv_out.weight"]
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="vae' is another autoencoder than the config"):
        loaded(folder)


def test_autoencoder_that_is_built_in_another_way_is_refused(folder):
    """The newer ones have no convolution beside the latent."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"use_quant_conv": False, "use_post_quant_conv": False}
    (folder / "config.json").write_text(json.dumps(config))
    state = {k: v for k, v in load_file(folder / WEIGHTS).items() if "quant_conv" not in k}
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="vae' is another autoencoder than the config"):
        loaded(folder)


# ----------------------------------------------------------------------------------------- quality


class Off(PatchPCA):
    """Rebuilds every picture a little too bright."""

    def decode(self, z):
        return super().decode(z) + 0.2


def test_an_error_of_a_tenth_of_the_range_is_20_db():
    codec, x = Off(replace(PCA, channels=48)), 0.8 * images()
    codec.prepare(Images(x))
    assert rebuild(codec, Images(x), progress=False) == pytest.approx(20, abs=1e-3)


def test_quality_over_a_data_set_is_that_of_all_its_pixels_whatever_the_batches():
    codec, x = fitted(), images()
    rebuilt = codec.picture(codec.decode(codec.encode(x)))
    expected = -10 * np.log10((rebuilt - x).square().mean().item())
    for size in (7, 80):
        found = rebuild(codec, Images(x), size, progress=False)
        assert found == pytest.approx(expected, abs=1e-3)
