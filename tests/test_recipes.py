"""Recipes as the papers and their released code have them: lengths, starts, images, anomalies."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffad_ref as da
from diffad_ref import anomalies, one_for_more
from diffad_ref.data import FILTERS, resize_image
from diffad_ref.detector import Rate, Stage
from diffad_ref.networks import LatentUNet, adm_unet
from diffad_ref.one_for_more import Pasting, paste
from diffad_ref.tools.baselines import SegmentationOnly
from diffad_ref.tools.reproduce import shortened
from diffad_ref.training import plan_stages

SAMPLE = Path(__file__).parents[2] / "shared/data/mvtec_ad_sample"
SAMPLE = Path(os.environ.get("DIFFAD_MVTEC", SAMPLE))
PAGE = Path(__file__).parents[1] / "book" / "paper_code_here.md"
real = pytest.mark.skipif(not SAMPLE.is_dir(), reason="no MVTec AD; DIFFAD_MVTEC names its folder")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize(
    ("method", "images", "steps"),
    [
        (da.DiffusionAD, 60, 9_000),  # toothbrush
        (da.DiffusionAD, 391, 72_000),  # hazelnut
        (da.DiffusionAD, 900, 168_000),  # VisA's candle
        (da.OneForMore, 3389, 141_500),  # the first task of 14-1
        (da.OneForMore, 240, 10_000),  # zipper
        (da.OneForMore, 60, 2_500),  # toothbrush
        (da.DecoDiff, 3629, 10_400),
    ],
)
def test_the_papers_recipes_are_as_long_as_the_released_ones(method, images, steps):
    (stage,) = plan_stages(method.Config.paper().stages, images)
    assert stage.steps == steps


def test_deco_diff_learns_from_256_images_a_step_and_warms_up_for_10_epochs():
    (stage,) = da.DecoDiff.Config.paper().stages
    assert stage.batch_size * stage.accumulate == 256
    rate = stage.lr["corrector"]
    assert rate.warmup == 130 and rate.horizon == 1.5
    assert rate.at(129, stage.steps) < rate.at(130, stage.steps) == rate.peak


def test_epochs_are_counted_over_all_processes_and_accumulated_batches():
    stage = Stage("s", None, 4, {"a": Rate(1.0)}, epochs=10, accumulate=2)
    assert stage.counted(33).steps == 10 * 5 and stage.counted(33, 2).steps == 10 * 3
    assert replace(stage, drop_last=True).counted(33).steps == 10 * 4
    assert replace(stage, drop_last=True).counted(3).steps == 10  # one batch at least
    assert replace(stage, steps=7).counted(33).steps == 7


def test_a_shortened_run_shortens_its_warm_ups_and_still_reaches_its_peak():
    rates = {"corrector": Rate(1e-4, "cosine", warmup=130, horizon=1.5)}
    (stage,) = plan_stages([Stage("s", 10_400, 128, rates)], 3629, steps=200)
    rate = stage.lr["corrector"]
    assert rate.warmup == 2 and stage.steps == 200
    found = [rate.at(step, 200) for step in range(200)]
    assert max(found) == rate.peak and found[-1] == pytest.approx(0.25 * rate.peak, rel=0.05)


@pytest.mark.parametrize("length", [{"steps": 1000}, {"steps": None, "epochs": 1000}])
def test_a_budget_shortens_warm_ups_too(length):
    stage = Stage("s", batch_size=4, lr={"a": Rate(1.0, warmup=100)}, **length)
    found = shortened(stage, 0.05)
    assert (found.steps or found.epochs) == 50 and found.lr["a"].warmup == 5


# ----------------------------------------------------------------------------------------- starts


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_a_network_that_starts_from_scratch_puts_out_zeros_and_still_learns(kind):
    torch.manual_seed(0)
    t, x = torch.tensor([3, 7]), torch.randn(2, 4, 16, 16)
    if kind == "pixels":
        network = adm_unet(4, 8, (1, 2), 1, (1,), 2, norm_groups=4)
        found = network(x, t).sample
    else:
        network = LatentUNet(4, 2, 8, (1, 2), 1, 2, 8, 0.0, 4)
        found = network(x, t, torch.tensor([0, 1]))
    assert not found.any()
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(3):  # the last layer moves first, then what lies before it
        optimizer.zero_grad()
        found = network(x, t, torch.tensor([0, 1])) if kind == "latents" else network(x, t).sample
        (found - x).square().mean().backward()
        optimizer.step()
    still = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # Attention to a single token weighs it with 1, whatever queries and keys say.
    assert all(".attn2." in name or ".norm2." in name for name in still), still


# ----------------------------------------------------------------------------------------- images


def test_images_shrink_by_pils_filters_or_as_opencv_does():
    levels = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    image = Image.fromarray(levels)
    for name, kind in (("antialiased", "BILINEAR"), ("bicubic", "BICUBIC")):
        expected = np.array(image.resize((10, 8), Image.Resampling[kind]))
        assert np.array_equal(resize_image(image, (8, 10), name), expected)
    found = resize_image(image, (8, 10), "linear")
    # A third of the size: the middle of three pixels lies where the small pixel does.
    assert np.array_equal(found, levels[1::3, 1::3])
    half = resize_image(image, (12, 15), "linear").astype(int)
    four = levels.reshape(12, 2, 15, 2, 3).astype(float).mean((1, 3))
    assert abs(half - four).max() <= 0.5


def test_each_method_resizes_as_its_released_code_and_tiny_as_it_was_trained(mvtec_root):
    paper = {m: m.Config.paper() for m in (da.DiffusionAD, da.DecoDiff)}
    assert [config.resample for config in paper.values()] == ["linear", "bicubic"]
    found = {}
    for name in FILTERS:
        data = da.DiffusionAD.tiny(image_size=32, resample=name).folder(mvtec_root, "test")
        found[name] = data[0]["image"]
    assert not torch.equal(found["linear"], found["antialiased"])
    assert not torch.equal(found["bicubic"], found["antialiased"])
    with pytest.raises(ValueError, match="resample is one of antialiased, bicubic, linear"):
        da.AnomalyFolder(mvtec_root, resample="nearest")


def test_half_of_the_crops_stand_on_their_head_if_the_config_says_so(monkeypatch):
    detector = da.DecoDiff.tiny(image_size=32, width=8, norm_groups=4, shift=0, turned=0.5)
    seen = []
    monkeypatch.setattr(detector.codec, "sample", lambda x, generator: seen.append(x))
    ramp = torch.linspace(0, 1, 32 * 32).view(1, 1, 32, 32).expand(400, 3, 32, 32)
    detector.latents({"image": ramp}, seeded())
    (found,) = seen
    turned = found[:, 0, 0, 0] > 0.5
    assert 0.4 < turned.float().mean() < 0.6
    assert torch.equal(found[turned], ramp[turned].flip(2, 3))
    assert torch.equal(found[~turned], ramp[~turned])


# -------------------------------------------------------------------------------------- anomalies


def test_a_self_shuffled_source_is_augmented_before_it_is_shuffled(monkeypatch):
    """Every image is an object and gets its own source; without augmentation it is its tiles."""
    settings = anomalies.Synthesis(p_normal=0.0, p_self=1.0, beta=(0.0, 0.0))
    images = torch.rand(8, 3, 64, 64, generator=seeded())
    images = (images * 0.5 * 255).round() / 255
    monkeypatch.setattr(anomalies, "perlin_masks", lambda n, s, *_: torch.ones(n, 1, s, s))
    bank, is_texture = anomalies.texture_bank(size=64), torch.zeros(8, dtype=torch.bool)

    def levels(count):
        own = replace(settings, n_augmentations=count)
        return (
            anomalies.synthesize(images, is_texture, bank, own, seeded(1))[0].flatten(1).sort()[0]
        )

    assert torch.allclose(levels(0), images.flatten(1).sort()[0], atol=1e-6)
    different = (levels(3) - images.flatten(1).sort()[0]).abs().mean(1)
    assert (different > 0.02).float().mean() > 0.7


def test_channels_have_a_gamma_of_their_own_and_brightness_an_offset():
    (gamma, of_gamma), (brightness, *ranges) = anomalies.WAYS[0], anomalies.WAYS[1]
    assert of_gamma == (0.5, 2.0, 3) and ranges == [(0.8, 1.2, 1), (-30, 30, 1)]
    grey = torch.full((1, 3, 4, 4), 100.0)
    found = gamma(grey, torch.tensor([0.5, 1.0, 2.0]).view(1, 3, 1, 1))
    assert len(found[0, :, 0, 0].unique()) == 3
    one = torch.ones(1, 1, 1, 1)
    assert torch.equal(brightness(grey, one, 20 * one), grey + 20)


def test_patches_come_from_the_same_class_or_from_the_image_itself(monkeypatch):
    monkeypatch.setattr(one_for_more, "paste_patch", lambda x, source, *_: source)
    greys = torch.arange(6).float() * 20 / 255
    images, classes = greys.view(6, 1, 1, 1).expand(6, 3, 16, 16), torch.tensor([0, 1, 0, 1, 0, 2])
    settings, seen = Pasting(share=1.0, most=1, source="class"), set()
    for seed in range(30):
        found = paste(images, settings, seeded(seed), classes)[:, 0, 0, 0] * 255 / 20
        seen |= set(zip(range(6), found.round().int().tolist(), strict=True))
    assert seen == {(0, 2), (0, 4), (2, 0), (2, 4), (4, 0), (4, 2), (1, 3), (3, 1), (5, 5)}


def test_a_paper_recipe_without_textures_says_where_they_come_from(mvtec_root):
    detector = da.DiffusionAD.tiny(image_size=32, width=8, norm_groups=4, built_in_textures=False)
    data = detector.folder(mvtec_root, "train")
    assert not da.DiffusionAD.Config.paper().built_in_textures
    with pytest.raises(ValueError, match=r"data_scripts/dtd.py.*--textures"):
        da.fit(detector, data, 1, progress=False)


def test_a_grey_product_gets_no_coloured_source_from_itself(monkeypatch):
    settings = anomalies.Synthesis(p_normal=0.0, p_self=1.0, beta=(0.0, 0.0))
    grey = torch.rand(32, 1, 64, 64, generator=seeded()).expand(-1, 3, -1, -1)
    bank, is_texture = anomalies.texture_bank(size=64), torch.zeros(32, dtype=torch.bool)
    found, _, _ = anomalies.synthesize(grey, is_texture, bank, settings, seeded(1))
    assert (found.amax(1) - found.amin(1)).max() < 1e-6


# --------------------------------------------------------------------------- effects on real images


@real
@pytest.mark.slow
def test_filters_differ_by_what_the_page_says():
    parts = {
        name: da.AnomalyFolder(SAMPLE, "train", 128, resample=name, cache=False) for name in FILTERS
    }
    some = range(0, len(parts["linear"]), 6)
    images = {n: torch.stack([data[i]["image"] for i in some]) for n, data in parts.items()}
    for name in ("linear", "bicubic"):
        gap = 255 * (images[name] - images["antialiased"]).abs().mean().item()
        assert f"differ by {gap:.1f} of 255 levels" in " ".join(PAGE.read_text().split())


@real
@pytest.mark.slow
def test_augmentation_changes_as_many_labelled_pixels_as_the_page_says():
    data = da.AnomalyFolder(SAMPLE, "train", 256, foreground=anomalies.estimate_foreground)
    batch = [data[i] for i in range(0, len(data), 6)]
    x, ground = (torch.stack([sample[n] for sample in batch]) for n in ("image", "foreground"))
    objects, bank = torch.zeros(len(x), dtype=torch.bool), anomalies.texture_bank()
    for count in (0, 3):
        settings, shares = anomalies.Synthesis(0.0, p_self=1.0, n_augmentations=count), []
        for seed in range(4):
            found, mask, _ = anomalies.synthesize(x, objects, bank, settings, seeded(seed), ground)
            same = 255 * (found - x).abs().amax(1, keepdim=True) <= 2
            shares.append((same & (mask > 0)).sum() / (mask > 0).sum())
        assert f"{100 * torch.stack(shares).mean():.1f} %" in PAGE.read_text()


# ------------------------------------------------------------------------------ the small profiles


@pytest.mark.parametrize("method", [da.DiffusionAD, SegmentationOnly, da.DecoDiff, da.OneForMore])
def test_small_profiles_keep_their_weights_small_and_learn(method, mvtec_root):
    whole = method.small()
    learning = [p for group in whole.parameter_groups() for p in group["params"]]
    assert sum(p.numel() for p in learning) <= 12e6
    torch.manual_seed(0)
    detector = method.small(image_size=64)
    data = detector.folder(mvtec_root, "train", categories=["bottle"])
    stages = len(detector.stages)
    history = da.fit(detector, data, stages, 2, progress=False, device="cpu")
    assert len(history.rows) >= stages - 1
    found = detector.predict(torch.rand(1, 3, 64, 64), torch.tensor([0]))
    assert found.anomaly_map.shape == (1, 64, 64) and found.score.isfinite().all()


# ------------------------------------------------------------------------------------- resumption


def trained(root, out, textures=0, **changes):
    changes = {"foreground": "estimate"} | changes
    size = {"width": 8, "norm_groups": 4, "segmentation_width": 4, "heads": 1}
    detector = da.DiffusionAD.tiny(image_size=32, **size, **changes)
    detector.textures = torch.full((2, 3, 64, 64), textures, dtype=torch.uint8)
    return da.fit(detector, detector.folder(root, "train"), 3, 2, out=out, progress=False)


def test_a_run_does_not_go_on_with_other_textures_images_or_foreground(mvtec_root, write, tmp_path):
    out = tmp_path / "run"
    masks = tmp_path / "masks"
    for path in mvtec_root.glob("*/train/good/*.png"):
        write(masks / path.relative_to(mvtec_root), np.full((20, 24), 255, np.uint8))
    trained(mvtec_root, out)
    trained(mvtec_root, out)  # goes on, and has nothing to do
    for change, different in (
        ({"textures": 1}, "textures"),
        ({"foreground": "whole"}, "config.foreground, data.read"),
        ({"foreground": str(masks)}, "config.foreground, data.foreground, data.read"),
    ):
        with pytest.raises(ValueError, match=rf"another run \(different {different}\)"):
            trained(mvtec_root, out, **change)
    other = mvtec_root / "bottle/train/good/000.png"
    write(other, np.zeros((20, 24, 3), np.uint8))
    with pytest.raises(ValueError, match=r"another run \(different data.images\)"):
        trained(mvtec_root, out)


def test_foreground_masks_may_lie_where_the_released_code_has_them(mvtec_root, write):
    for path in mvtec_root.glob("*/train/good/*.png"):
        inside = path.relative_to(path.parents[2] / "train")
        write(path.parents[2] / "DISthresh" / inside, np.full((20, 24), 255, np.uint8))
    detector = da.DiffusionAD.tiny(image_size=32, foreground="DISthresh")
    shutil.rmtree(mvtec_root / "carpet" / "DISthresh")  # a texture needs none
    data = detector.folder(mvtec_root, "train")
    assert (
        all(sample["foreground"].all() for sample in data)
        and len(data.fingerprint()["foreground"]) > 60
    )
    assert "foreground" not in detector.folder(mvtec_root, "test")[0]
    good = mvtec_root / "bottle/test/good"
    found = detector.from_folders(good=good, texture=False, **detector.view("test"))
    assert "foreground" not in found[0]  # as `predict` reads an image
    with pytest.raises(FileNotFoundError, match="thresh"):
        da.AnomalyFolder(mvtec_root, foreground="thresh")
