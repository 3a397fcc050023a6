"""DiffusionAD: its formulas by pencil, its losses at their edges, its borders and its sizes."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from diffad_ref import diffusion_ad
from diffad_ref.anomalies import Synthesis, texture_bank
from diffad_ref.diffusion import Schedule, predict_x0
from diffad_ref.diffusion_ad import (
    DiffusionAD,
    focal_loss,
    mask_loss,
    noise_loss,
    noise_to_norm,
    top_k_mean,
)
from diffad_ref.tools.baselines import SegmentationOnly

SCHEDULE = Schedule.named("linear", 1000)
ALL_ANOMALOUS = Synthesis(p_normal=0.0, max_exponent=2, threshold=0.3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch_of(count, size=32):
    """Normal images, objects and textures in turn."""
    images = torch.rand(count, 3, size, size, generator=seeded())
    return {"image": images, "texture": torch.arange(count) % 2 == 1}


def build(config, seed=0, **changes):
    torch.manual_seed(seed)
    return DiffusionAD(replace(config, **changes))


def stage(detector, name):
    """Enter the stage of this name."""
    detector.enter(next(s for s in detector.stages if s.name == name))
    return detector


def gradient(part):
    """The largest gradient in a part of a detector; 0 if it has none."""
    return max(
        (p.grad.abs().max().item() for p in part.parameters() if p.grad is not None), default=0
    )


# ------------------------------------------------------------------------------------ noise to norm


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 2.0])
def test_guided_image_is_a_blend_of_the_two_estimates(w):
    """D4 to D6 in closed form: w (1 - abar) of the way from the small scale's to the large's."""
    x, noise_s, noise_b = torch.rand(3, 4, 3, 8, 8, generator=seeded()).unbind()
    t_s, t_b = torch.tensor([1, 50, 200, 299]), torch.tensor([300, 400, 700, 999])
    eps = torch.randn(8, 3, 8, 8, generator=seeded(1))
    steps = noise_to_norm(lambda x_t, t: eps, x, t_s, t_b, noise_s, noise_b, SCHEDULE, w)
    abar_s, abar_b = SCHEDULE.at(t_s), SCHEDULE.at(t_b)
    x0_s, x0_b = (
        predict_x0(*v) for v in ((steps.x_s, eps[:4], abar_s), (steps.x_b, eps[4:], abar_b))
    )
    blend = x0_s + w * (1 - abar_s) * (x0_b.clamp(-1, 1) - x0_s)
    assert torch.allclose(steps.x0_g, blend.clamp(-1, 1), atol=2e-5)
    assert (blend.abs() < 1).any()  # the clamp does not hide the comparison


def rebuilt(x0_s, x0_b, w=1.0):
    """What is made of estimates of one pixel at the paper's levels, t = 200 and 400."""
    x, t_s, t_b = torch.full((1, 1, 1, 1), 0.3), torch.tensor([200]), torch.tensor([400])
    abar = SCHEDULE.at(torch.cat([t_s, t_b]))

    def believes(x_t, t):
        return (x_t - abar.sqrt() * torch.tensor([x0_s, x0_b]).view(2, 1, 1, 1)) / (1 - abar).sqrt()

    noise = torch.tensor([0.7]).view(1, 1, 1, 1), torch.tensor([-1.1]).view(1, 1, 1, 1)
    return noise_to_norm(believes, x, t_s, t_b, *noise, SCHEDULE, w).x0_g.item()


def test_guidance_by_pencil_at_the_papers_levels():
    """34.4 % of the answer is the large scale's: abar at t = 200 is 0.6563."""
    abar = math.prod(1 - (1e-4 + (2e-2 - 1e-4) * t / 999) for t in range(201))
    assert abar == pytest.approx(0.6563, abs=2e-4)
    assert rebuilt(0.5, 0.1) == pytest.approx(abar * 0.5 + (1 - abar) * 0.1, abs=1e-5)


def test_large_scale_is_clamped_before_it_guides_and_small_scale_is_not():
    abar = math.prod(1 - (1e-4 + (2e-2 - 1e-4) * t / 999) for t in range(201))
    assert rebuilt(0.0, 3.0) == pytest.approx((1 - abar) * 1, abs=1e-5)
    w = 2.0 / (1 - abar) / 4  # half of the way: from 3 to -1, not from 1
    assert rebuilt(3.0, -1.0, w) == pytest.approx(1.0, abs=1e-5)
    assert rebuilt(2.5, -1.0, w) == pytest.approx(0.75, abs=1e-5)


def test_without_guidance_the_large_scale_is_ignored(small_config, awake):
    detector = awake(build(small_config))
    x, t_s, t_b = batch_of(2)["image"], torch.full((2,), 200), torch.full((2,), 400)
    noise, *others = torch.randn(3, 2, 3, 32, 32, generator=seeded()).unbind()
    with torch.no_grad():
        for w, same in ((0.0, True), (1.0, False)):
            a, b = (
                noise_to_norm(detector.denoiser, x, t_s, t_b, noise, other, SCHEDULE, w).x0_g
                for other in others
            )
            assert torch.allclose(a, b, atol=1e-5) == same


def test_perfect_noise_estimates_give_the_image_back_at_any_weight():
    x, noise_s, noise_b = torch.rand(3, 2, 3, 4, 4, generator=seeded()).unbind()
    t_s, t_b = torch.full((2,), 200), torch.full((2,), 400)
    oracle = torch.cat([noise_s, noise_b])
    for w in (0, 1, 3):
        steps = noise_to_norm(lambda x_t, t: oracle, x, t_s, t_b, noise_s, noise_b, SCHEDULE, w)
        assert torch.allclose(steps.x0_g, x, atol=1e-5)


def test_network_that_predicts_the_image_is_asked_for_the_noise_that_it_implies(small_config):
    detector = build(small_config)
    x_t, t = torch.randn(2, 3, 32, 32), torch.tensor([100, 600])
    with torch.no_grad():
        eps, image = detector.denoiser(x_t, t), detector.denoiser.unet(x_t, t).sample
    abar = SCHEDULE.abar[t].float().view(-1, 1, 1, 1)
    assert torch.allclose(abar.sqrt() * image + (1 - abar).sqrt() * eps, x_t, atol=1e-5)


# ------------------------------------------------------------------------------------------ losses


def test_noise_loss_is_the_mean_over_normal_images_only():
    zeros = torch.zeros(3, 3, 4, 4)
    eps_s = torch.tensor([1.0, 10.0, 2.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    eps_b = torch.tensor([3.0, 10.0, 0.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    loss = noise_loss(eps_s, eps_b, zeros, zeros, torch.tensor([0.0, 1.0, 0.0]))
    assert loss.item() == pytest.approx(((1 + 9) + (4 + 0)) / 2)


def test_noise_loss_of_a_batch_without_normal_images_is_zero_with_zero_gradients():
    eps = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = noise_loss(eps, eps, torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), torch.ones(2))
    loss.backward()
    assert loss.item() == 0 and not eps.grad.any()


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_noise_loss_that_diverged_shows_whatever_the_labels(label):
    eps, fine = torch.full((2, 3, 4, 4), math.nan), torch.zeros(2, 3, 4, 4)
    assert math.isnan(noise_loss(eps, fine, fine, fine, torch.full((2,), label)))


def test_mask_loss_by_pencil():
    """One pixel, prediction 0.8: cross-entropy -ln p, smooth L1 half the squared distance."""
    for truth, p in ((1.0, 0.8), (0.0, 0.2)):  # p: what the true class got
        found = mask_loss(torch.full((1, 1, 1, 1), 0.8), torch.full((1, 1, 1, 1), truth))
        focal = 0.5 * (1 - p) ** 4 * -math.log(p)
        assert found.item() == pytest.approx(5 * focal + 0.5 * (1 - p) ** 2, rel=1e-5)


def test_focal_loss_survives_a_prediction_that_is_certain_and_wrong():
    found = focal_loss(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))
    assert torch.isfinite(found).all() and (found > 10).all()


# ---------------------------------------------------------------------------------------- training


def test_total_is_the_sum_of_what_the_stage_learns(small_config):
    detector, names = build(small_config), {}
    for part in detector.stages:
        detector.enter(part)
        losses = detector.training_loss(batch_of(4), seeded())
        names[part.name] = set(losses) - {"loss"}
        assert losses["loss"].item() == pytest.approx(
            sum(losses[n].item() for n in names[part.name])
        )
    assert names == {"denoiser": {"noise"}, "segmentation": {"mask"}, "joint": {"noise", "mask"}}


@pytest.mark.parametrize("count", [1, 3])
def test_batch_of_only_anomalous_images_trains_without_a_noise_loss(small_config, count):
    detector = stage(build(small_config, synthesis=ALL_ANOMALOUS), "joint")
    losses = detector.training_loss(batch_of(count), seeded())
    losses["noise"].backward(retain_graph=True)
    assert losses["noise"].item() == 0 and gradient(detector) == 0
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"]) and 0 < gradient(detector) < math.inf


@pytest.mark.parametrize("predicts", ["image", "noise"])
def test_gradient_of_the_mask_loss_reaches_the_denoiser_in_a_joint_stage(small_config, predicts):
    detector = stage(build(small_config, predicts=predicts, synthesis=ALL_ANOMALOUS), "joint")
    detector.training_loss(batch_of(2), seeded())["mask"].backward()
    assert gradient(detector.denoiser) > 0 and gradient(detector.segmenter) > 0


def test_no_gradient_reaches_the_denoiser_while_only_the_segmenter_trains(small_config):
    detector = stage(build(small_config), "segmentation")
    detector.training_loss(batch_of(2), seeded())["loss"].backward()
    assert gradient(detector.denoiser) == 0 and gradient(detector.segmenter) > 0


def test_denoiser_stage_sees_no_anomalies_and_no_segmenter(small_config, monkeypatch):
    detector = stage(build(small_config), "denoiser")
    monkeypatch.setattr(diffusion_ad, "synthesize", None)
    monkeypatch.setattr(detector.segmenter, "forward", None)
    detector.training_loss(batch_of(2), seeded())["loss"].backward()
    assert gradient(detector.denoiser) > 0


def test_training_levels_cover_their_two_ranges(small_config, monkeypatch):
    detector, seen = stage(build(small_config), "denoiser"), []

    def recorded(denoiser, x, t_s, t_b, *rest):
        seen.append((t_s, t_b))
        return noise_to_norm(denoiser, x, t_s, t_b, *rest)

    monkeypatch.setattr(diffusion_ad, "noise_to_norm", recorded)
    monkeypatch.setattr(detector.denoiser, "forward", lambda x, t: x)
    detector.training_loss(batch_of(2000, 32), seeded())
    ((t_s, t_b),) = seen
    assert (t_s.min(), t_s.max(), t_b.min(), t_b.max()) == (100, 299, 300, 599)


def test_training_loss_depends_on_its_generator_and_not_on_the_global_seed(small_config):
    detector = stage(build(small_config), "joint")
    values = []
    for seed, global_seed in ((0, 0), (0, 1), (1, 1)):
        torch.manual_seed(global_seed)
        values.append(detector.training_loss(batch_of(2), seeded(seed))["loss"].item())
    assert values[0] == values[1] != values[2]


def test_anomalies_keep_to_the_foreground_of_the_batch(small_config, monkeypatch):
    detector = stage(build(small_config, synthesis=ALL_ANOMALOUS), "joint")
    batch, made = batch_of(4), []
    batch["foreground"] = torch.zeros(4, 1, 32, 32)
    batch["foreground"][..., 8:, :] = 1
    real = diffusion_ad.synthesize
    monkeypatch.setattr(diffusion_ad, "synthesize", lambda *a: made.append(real(*a)) or made[-1])
    detector.training_loss(batch, seeded())
    _, mask, _ = made[0]
    assert mask.any() and not mask[..., :8, :].any()


def test_anomalies_are_made_of_the_textures_that_are_set_or_else_of_the_photographs(small_config):
    black = Synthesis(p_normal=0.0, threshold=0.3, beta=(0.0, 0.0), p_self=0.0, n_augmentations=0)
    detector = build(small_config, synthesis=black)
    detector.textures = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    image, mask, label = detector.with_anomalies(batch_of(4), seeded())
    assert label.all() and not (image * mask).any()
    detector = build(small_config, synthesis=black)
    assert detector.with_anomalies(batch_of(4), seeded())[0].isfinite().all()
    assert torch.equal(detector.textures, texture_bank())


def test_surfaces_never_get_their_shuffled_selves(small_config):
    """Of black textures and with nothing shining through, what is not black is the image's own."""
    own = Synthesis(p_normal=0.0, threshold=0.3, beta=(0.0, 0.0), p_self=1.0, n_augmentations=0)
    detector = build(small_config, synthesis=own)
    detector.textures = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    image, mask, _ = detector.with_anomalies(batch_of(6), seeded())
    assert ((image * mask).flatten(1).amax(1) > 0).tolist() == [True, False] * 3


# -------------------------------------------------------------------------------------- prediction


def test_prediction_has_the_shapes_and_ranges_of_the_contract(small_config):
    found = build(small_config).eval().predict(batch_of(3)["image"])
    assert found.anomaly_map.shape == (3, 32, 32) and found.score.shape == (3,)
    assert found.reconstruction.shape == (3, 3, 32, 32)
    for values in (found.anomaly_map, found.reconstruction):
        assert values.min() >= 0 and values.max() <= 1
    assert {p.shape for p in found.parts.values()} == {(3, 3, 32, 32)}
    assert not found.anomaly_map.requires_grad


def test_score_is_the_mean_of_the_50_largest_pixels(small_config):
    found = build(small_config).eval().predict(batch_of(2)["image"])
    for score, pixels in zip(found.score.tolist(), found.anomaly_map.flatten(1), strict=True):
        assert score == pytest.approx(sum(sorted(pixels.tolist())[-50:]) / 50, rel=1e-5)


def test_prediction_repeats_with_the_seed_of_its_generator(small_config):
    detector, images = build(small_config).eval(), batch_of(2)["image"]
    a, b, other = (detector.predict(images, generator=seeded(s)) for s in (3, 3, 4))
    assert torch.equal(a.anomaly_map, b.anomaly_map)
    assert not torch.equal(a.parts["noised"], other.parts["noised"])


def test_levels_and_weight_of_a_reconstruction_can_be_chosen(small_config):
    detector, x = build(small_config), batch_of(1)["image"]
    with torch.no_grad():
        default, chosen, other = (
            detector.reconstruct(x, seeded(), *levels).x0_g
            for levels in ((), (200, 400, 1.0), (50, 400, 0.0))
        )
    assert torch.equal(default, chosen) and not torch.equal(default, other)


def test_reconstructions_of_several_draws_of_noise_are_averaged(small_config):
    detector, x = build(replace(small_config, draws=3)).eval(), batch_of(2)["image"]
    generator = seeded()
    with torch.no_grad():
        each = [detector.reconstruct(x, generator).x0_g for _ in range(3)]
    found = detector.predict(x, generator=seeded())
    expected = torch.stack(each).mean(0).clamp(0, 1)
    torch.testing.assert_close(found.reconstruction, expected)
    assert not torch.equal(each[0], each[1])


def test_paper_profile_draws_noise_once():
    assert DiffusionAD.Config.paper().draws == 1


def test_mean_of_more_pixels_than_there_are_is_that_of_all_and_of_none_is_refused():
    maps = torch.tensor([[[0.0, 1.0], [2.0, 5.0]], [[0.0, 0.0], [0.0, 4.0]]])
    assert top_k_mean(maps, 50).tolist() == [2, 1] and top_k_mean(maps, 1).tolist() == [5, 4]
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        top_k_mean(maps, 0)


# ---------------------------------------------------------------------------------------- ablation


def test_ablation_compares_with_zeros_and_has_no_denoiser(small_config):
    torch.manual_seed(0)
    detector = SegmentationOnly(small_config)
    assert {name.split(".")[0] for name, _ in detector.named_parameters()} == {"segmenter"}
    found = detector.predict(batch_of(2)["image"])
    assert not found.reconstruction.any() and found.parts == {}
    losses = detector(batch_of(2), seeded())
    losses["loss"].backward()
    assert set(losses) == {"loss", "mask"} and gradient(detector.segmenter) > 0


def test_ablation_learns_as_many_steps_as_the_segmenter_of_the_full_recipe():
    with torch.device("meta"):
        (alone,) = SegmentationOnly.tiny().stages
    full = DiffusionAD.Config.tiny().stages
    assert alone.steps == sum(s.steps for s in full if "segmenter" in s.lr)
    assert set(alone.lr) == {"segmenter"}


# ------------------------------------------------------------------------------- settings and sizes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 48}, "image_size must be a multiple of 32, not 48"),
        ({"image_size": 64, "patch_size": 64}, "image_size must be a multiple of 128, not 64"),
        ({"draws": 0}, "(?s)draws.*greater than or equal to 1"),
        ({"segmentation_norm": "layer"}, "should be 'batch' or 'group'"),
        ({"schedule": "square"}, "unknown schedule 'square'"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(small_config, changes, words):
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        build(small_config, **changes)


def count(part):
    return sum(p.numel() for p in part.parameters())


@pytest.fixture(scope="module")
def paper():
    """The paper's networks, with shapes and no numbers."""
    with torch.device("meta"):
        return DiffusionAD.paper().requires_grad_(False)


def test_paper_profile_counts_the_published_parameters(paper):
    assert count(paper.denoiser) == 131_654_403 and count(paper.segmenter) == 28_373_569


def test_tiny_profile_is_small():
    with torch.device("meta"):
        assert count(DiffusionAD.tiny()) < 3_100_000


def test_paper_profile_has_a_loss_on_tensors_without_memory(paper, monkeypatch):
    """Synthesis looks at numbers and is left out; there is no autocast for nothing, either."""
    x = torch.rand(2, 3, 256, 256, device="meta")
    made = x, x[:, :1], x[:, 0, 0, 0]
    monkeypatch.setattr(paper, "with_anomalies", lambda batch, generator: made)
    monkeypatch.setattr(torch, "autocast", lambda *words, **more: nullcontext())
    losses = paper.training_loss({"image": x}, seeded())
    assert all(losses[name].shape == () for name in ("loss", "noise", "mask"))


def test_paper_profile_learns_and_predicts_at_a_sixteenth_of_its_width():
    """All of its levels, batch statistics and anomalies, on numbers."""
    small = {"width": 8, "norm_groups": 4, "segmentation_width": 4}
    torch.manual_seed(0)
    detector = DiffusionAD.paper(image_size=64, built_in_textures=True, **small)
    detector(batch_of(3, 64), seeded())["loss"].backward()
    assert all(p.grad.isfinite().all() for p in detector.parameters())
    found = detector.predict(batch_of(2, 64)["image"])
    assert found.anomaly_map.shape == (2, 64, 64) and found.score.isfinite().all()


@pytest.mark.parametrize("size", [32, 64, 96, 128])
def test_tiny_profile_works_on_patches_of_every_size_it_is_offered_for(size):
    detector = DiffusionAD.tiny(image_size=size, width=8, norm_groups=4, segmentation_width=4)
    found = detector.predict(batch_of(1, size)["image"])
    assert found.anomaly_map.shape == (1, size, size)
