"""Latents kept on disk: they equal what would be computed, and never belong to something else."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffad_ref import checkpoints
from diffad_ref.codecs import CodecConfig, KLCodec, build_codec
from diffad_ref.data import AnomalyFolder
from diffad_ref.deco_diff import Config, DecoDiff
from diffad_ref.tools.latents import CachedLatents
from diffad_ref.training import fit

PCA = CodecConfig("pca", channels=4, factor=4)


def data_of(root, size=16, **options):
    return AnomalyFolder(root, "train", size, **options)


@pytest.fixture
def data(mvtec_root):
    """Three images each of bottle and carpet, 16 pixels a side."""
    return data_of(mvtec_root)


@pytest.fixture
def codec(data):
    codec = build_codec(PCA)
    codec.prepare(data)
    return codec


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "latents.safetensors"


def cache(data, codec, path, **options):
    return CachedLatents(data, codec, path, progress=False, **options)


def fail(*_, **__):
    raise AssertionError("this was not to be called")


# ------------------------------------------------------------------------------------ what is kept


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_kept_posterior_equals_the_computed_one(data, codec, path, batch_size):
    kept = cache(data, codec, path, batch_size=batch_size)
    assert len(kept) == len(data) == 6
    for sample, original in zip((kept[i] for i in range(6)), data, strict=True):
        expected = codec.posterior(original["image"][None])[0]
        assert torch.allclose(sample["posterior"], expected, atol=1e-6)


def test_samples_say_the_same_of_themselves_as_those_of_the_data_set(data, codec, path):
    kept = cache(data, codec, path)
    assert kept.categories == data.categories
    for i in range(6):
        for name in ("label", "category", "category_index", "path"):
            assert kept[i][name] == data[i][name]


def test_mean_and_spread_of_an_autoencoder_are_both_kept(data, path):
    torch.manual_seed(0)
    vae = KLCodec(CodecConfig(widths=(8, 16), factor=2, layers=1, norm_groups=4))
    vae.ready.fill_(True)
    found = cache(data, vae, path)[0]["posterior"]
    with torch.no_grad():
        expected = vae.posterior(data[0]["image"][None])[0]
    assert found.shape == (8, 8, 8) and (found[4:] > 0).all()
    assert torch.allclose(found, expected, atol=1e-5)


def test_second_time_nothing_is_computed_and_no_image_is_decoded(data, codec, path, monkeypatch):
    first, written = cache(data, codec, path), path.read_bytes()
    monkeypatch.setattr(type(codec), "posterior", fail)
    monkeypatch.setattr(AnomalyFolder, "_decode", fail)
    second = cache(data_of(data.root, cache=False), codec, path)
    assert torch.equal(first.posteriors, second.posteriors)
    assert path.read_bytes() == written


def test_latents_follow_the_data_to_another_folder(data, codec, path, tmp_path):
    first = cache(data, codec, path)
    data.root.rename(tmp_path / "elsewhere")
    second = cache(data_of(tmp_path / "elsewhere"), codec, path)
    assert torch.equal(first.posteriors, second.posteriors)
    assert second[0]["path"].startswith(str(tmp_path / "elsewhere"))


def test_middle_of_larger_images_is_what_a_crop_keeps(data, codec, path):
    found = cache(data_of(data.root, 24, crop=16), codec, path)[0]["posterior"]
    whole = codec.posterior(data_of(data.root, 24)[0]["image"][None])[0]
    assert torch.allclose(found, whole[:, 1:5, 1:5], atol=1e-6)  # the margin is one cell


# ------------------------------------------------------------------------------- refused when stale


def test_other_codec_weights_are_named(data, codec, path):
    cache(data, codec, path)
    codec.mean += 1e-6
    with pytest.raises(ValueError, match="latents of other codec weights; delete it"):
        cache(data, codec, path)


def test_other_codec_settings_count_as_other_weights(data, codec, path):
    cache(data, codec, path)
    codec.config = replace(codec.config, scale=1.0)
    with pytest.raises(ValueError, match="latents of other codec weights; delete it"):
        cache(data, codec, path)


def test_changed_image_is_noticed(data, codec, path, write):
    cache(data, codec, path)
    write(data.samples[3].path, np.zeros((20, 24, 3), np.uint8))
    with pytest.raises(ValueError, match="latents of other images; delete it"):
        cache(data_of(data.root), codec, path)


@pytest.mark.parametrize("change", ["one more", "one less", "renamed", "another order"])
def test_other_images_are_noticed(data, codec, path, change):
    cache(data, codec, path)
    image = data.samples[3].path
    if change == "one more":
        image.with_name("new.png").write_bytes(image.read_bytes())
    elif change == "one less":
        image.unlink()
    elif change == "renamed":
        image.rename(image.with_name("0000.png"))  # still the first of its folder
    order = data.categories[::-1] if change == "another order" else data.categories
    with pytest.raises(ValueError, match="latents of other images; delete it"):
        cache(data_of(data.root, categories=order), codec, path)


@pytest.mark.parametrize(("size", "crop"), [(20, None), (20, 16), (24, 16)])
def test_other_size_or_crop_is_noticed(data, codec, path, size, crop):
    cache(data_of(data.root, 24, crop=12), codec, path)
    with pytest.raises(ValueError, match="latents of other image size; delete it"):
        cache(data_of(data.root, size, crop=crop), codec, path)


def test_everything_that_changed_is_named_together(data, codec, path):
    cache(data, codec, path)
    codec.mean += 1
    with pytest.raises(ValueError, match="other codec weights and images and image size; delete"):
        cache(data_of(data.root, 20, categories=["carpet"]), codec, path)


def test_damaged_file_is_named(data, codec, path):
    cache(data, codec, path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="latents.safetensors is damaged"):
        cache(data, codec, path)


def test_file_of_something_else_is_refused_and_left_alone(data, codec, path):
    checkpoints.write_tensors({"x": torch.ones(1)}, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="latents of other codec weights and images and image"):
        cache(data, codec, path)
    assert path.read_bytes() == before


def test_codec_that_is_not_ready_leaves_no_file(data, path):
    with pytest.raises(ValueError, match="the codec knows nothing yet"):
        cache(data, build_codec(PCA), path)
    assert not path.exists()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_interrupted_writing_leaves_nothing_behind(data, codec, path, monkeypatch, error):
    def interrupted(state, file, metadata=None):
        with open(file, "wb") as half:
            half.write(b"half of it")
        raise error

    monkeypatch.setattr(checkpoints, "save_file", interrupted)
    with pytest.raises(error):
        cache(data, codec, path)
    assert os.listdir(path.parent) == []


# ------------------------------------------------------------------------------------- in training


def small(root, **changes):
    """A detector of 16-pixel images with few weights."""
    torch.manual_seed(0)
    few = {"width": 8, "multipliers": (1, 2), "heads": 1, "context": 8, "norm_groups": 4}
    return DecoDiff(Config.tiny(16, codec=PCA, classes=2, **few, **changes))


def test_loss_from_latents_is_that_of_images_of_this_size(data, codec, path, monkeypatch):
    """The crop of an image asks the generator for its place; without it both see one sequence."""
    detector = small(data.root).eval()
    detector.codec = codec
    kept = cache(data, codec, path)
    monkeypatch.setattr("diffad_ref.deco_diff.moved_crop", lambda images, *rest: images)
    losses = []
    for samples in (data, kept):
        batch = torch.utils.data.default_collate([samples[i] for i in range(6)])
        generator = torch.Generator().manual_seed(1)
        losses.append(detector.training_loss(batch, generator)["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_detector_learns_from_latents_alone(data, path, monkeypatch):
    detector = small(data.root)
    detector.prepare(data)
    kept = cache(data, detector.codec, path)
    monkeypatch.setattr(AnomalyFolder, "__getitem__", fail)
    monkeypatch.setattr(type(detector.codec), "posterior", fail)
    before = detector.corrector.unet.conv_out.weight.clone()
    history = fit(detector, kept, 3, 4, progress=False, device="cpu")
    assert np.isfinite(history.column("loss")).all() and len(history.rows) == 3
    assert not torch.equal(detector.corrector.unet.conv_out.weight, before)
    assert detector.categories == ("bottle", "carpet")


def compute_a_share(rank, root, folder):
    """What one of two processes does; it leaves a file if it computes latents."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    data, codec = data_of(root), build_codec(PCA)
    codec.prepare(data)
    real = codec.posterior

    def posterior(images):
        (folder / f"{rank}.computed").touch()
        return real(images)

    codec.posterior = posterior
    assert len(cache(data, codec, folder / "latents.safetensors")) == 6
    (folder / f"{rank}.read").touch()
    torch.distributed.destroy_process_group()


def test_of_two_processes_one_computes_and_both_read(mvtec_root, tmp_path, both):
    both(compute_a_share, mvtec_root, tmp_path)
    left = sorted(path.name for path in tmp_path.glob("[01].*"))
    assert left == ["0.computed", "0.read", "1.read"]
