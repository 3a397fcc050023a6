"""DiffusionAD: its formulas by pencil, its losses at their edges, its borders and its sizes."""

import math
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffad_ref import diffusion_ad
from diffad_ref.anomalies import Synthesis, Synthetic
from diffad_ref.backbones import count_parameters
from diffad_ref.diffusion import Schedule
from diffad_ref.diffusion_ad import (
    Config,
    DiffusionAD,
    focal_loss,
    mask_loss,
    noise_loss,
    noise_to_norm,
    norm_guided_x0,
)

SCHEDULE = Schedule.named("linear", 1000)
ALL_ANOMALOUS = Synthesis(p_normal=0.0, max_exponent=2, threshold=0.3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch_of(count, size=32):
    """Normal images, objects and textures in turn."""
    images = torch.rand(count, 3, size, size, generator=seeded())
    return {"image": images, "category": [("gear", "brick")[i % 2] for i in range(count)]}


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
def test_closed_form_is_what_the_three_formulas_of_guidance_give(w):
    x, noise_s, noise_b = torch.rand(3, 4, 3, 8, 8, generator=seeded()).unbind()
    t_s, t_b = torch.tensor([1, 50, 200, 299]), torch.tensor([300, 400, 700, 999])
    eps = torch.randn(8, 3, 8, 8, generator=seeded(1))
    steps = noise_to_norm(lambda x_t, t: eps, x, t_s, t_b, noise_s, noise_b, SCHEDULE, w)
    closed = norm_guided_x0(
        steps.x_s, steps.x_b, *eps.chunk(2), SCHEDULE.at(t_s), SCHEDULE.at(t_b), w
    )
    assert torch.allclose(closed, steps.x0_g, atol=2e-5)
    assert (closed.abs() < 1).any()  # the clamp does not hide the comparison


def test_guidance_by_pencil_at_the_papers_levels():
    """One pixel: 34.4 % of the answer is the large scale's."""
    abar_s, abar_b = (torch.full((1, 1, 1, 1), a) for a in (0.6563, 0.1936))
    x0_s, x0_b = 0.5, 0.1  # what the two noise estimates stand for
    x_s, x_b = torch.full((2, 1, 1, 1, 1), 0.3).unbind()
    eps_s = (x_s - abar_s.sqrt() * x0_s) / (1 - abar_s).sqrt()
    eps_b = (x_b - abar_b.sqrt() * x0_b) / (1 - abar_b).sqrt()
    found = norm_guided_x0(x_s, x_b, eps_s, eps_b, abar_s, abar_b)
    assert found.item() == pytest.approx((1 - 0.3437) * 0.5 + 0.3437 * 0.1, abs=1e-6)


def test_large_scale_is_clamped_before_it_guides_and_small_scale_is_not():
    one, abar = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 0.5)
    zero = 0 * one
    x_t = abar.sqrt() * one  # without noise, an estimate of 1
    found = norm_guided_x0(0 * x_t, 3 * x_t, zero, zero, abar, abar)
    assert found.item() == pytest.approx(0.5)  # 0 + (1 - 0.5) * (clamp(3) - 0)
    found = norm_guided_x0(3 * x_t, -x_t, zero, zero, abar, abar, w=1.5)
    assert found.item() == pytest.approx(0.0, abs=1e-6)  # 3 + 1.5 * 0.5 * (-1 - 3), not 1 - 1.5


def test_without_guidance_the_large_scale_is_ignored(small_config):
    detector = build(small_config)
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
    assert made[0].mask.any() and not made[0].mask[..., :8, :].any()


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


def test_prediction_without_a_generator_is_that_of_seed_0(small_config):
    detector, images = build(small_config).eval(), batch_of(2)["image"]
    a, b = detector.predict(images), detector.predict(images, generator=seeded(0))
    assert torch.equal(a.anomaly_map, b.anomaly_map)


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


def test_no_draw_at_all_is_refused(small_config):
    with pytest.raises(ValueError, match="draws must be at least 1, not 0"):
        build(replace(small_config, draws=0))


def test_paper_profile_draws_noise_once():
    assert Config.paper().draws == 1


def test_ablation_compares_with_zeros_and_has_no_denoiser(small_config):
    detector = build(small_config.without_reconstruction()).eval()
    assert [name for name, _ in detector.named_children()] == ["segmenter"]
    found = detector.predict(batch_of(2)["image"])
    assert not found.reconstruction.any() and found.parts == {}
    losses = detector.training_loss(batch_of(2), seeded())
    losses["loss"].backward()
    assert set(losses) == {"loss", "mask"} and gradient(detector.segmenter) > 0


def test_ablation_learns_as_many_steps_as_the_segmenter_of_the_full_recipe():
    (alone,) = Config.tiny().without_reconstruction().stages
    full = Config.tiny().stages
    assert alone.steps == sum(s.steps for s in full if "segmenter" in s.lr)
    assert set(alone.lr) == {"segmenter"}


# ----------------------------------------------------------------------------------------- borders


@pytest.mark.parametrize("call", ["predict", "training_loss"])
@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.rand(2, 3, 32, 32) * 255, "divide by 255"),
        (torch.full((2, 3, 32, 32), math.nan), r"NaN or infinite pixels in image\(s\) \[0, 1\]"),
        (torch.rand(2, 3, 48, 32), "built for 32 x 32 images, not 48 x 32"),
        (torch.rand(0, 3, 32, 32), "the batch is empty"),
        (torch.rand(2, 1, 32, 32), "expected shape"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "got torch.uint8"),
    ],
)
def test_images_that_do_not_fit_are_refused_with_a_reason(small_config, call, images, words):
    detector = build(small_config)
    argument = images if call == "predict" else {"image": images, "category": ["gear"] * 2}
    with pytest.raises(ValueError, match=words):
        getattr(detector, call)(argument)


def test_stage_that_trains_a_part_that_is_not_there_is_refused(small_config):
    detector = build(small_config)
    wrong = replace(
        detector.stages[0], name="odd", lr={"decoder": detector.stages[0].lr["denoiser"]}
    )
    with pytest.raises(ValueError, match=r"'odd' trains unknown parts \['decoder'\]"):
        detector.enter(wrong)


# ------------------------------------------------------------------------------------------- sizes


def test_paper_profile_counts_the_published_parameters():
    with torch.device("meta"):
        detector = DiffusionAD(Config.paper())
    assert count_parameters(detector.denoiser) == 131_654_403
    assert count_parameters(detector.segmenter) == 28_373_569


def test_tiny_profile_is_small():
    with torch.device("meta"):
        assert count_parameters(DiffusionAD(Config.tiny())) < 3_100_000


def test_paper_profile_learns_and_predicts_on_tensors_without_memory(monkeypatch):
    """Shapes only: no number is computed, so checks and synthesis, which look at them, are out."""
    monkeypatch.setattr("diffad_ref.detector.check_images", lambda images: None)
    monkeypatch.setattr(
        diffusion_ad,
        "synthesize",
        lambda images, *rest: Synthetic(images, images[:, :1], images[:, 0, 0, 0]),
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        detector = DiffusionAD(Config.paper(), textures=torch.zeros(1, 3, 8, 8))
        images = torch.rand(2, 3, 256, 256)
        batch = {"image": images, "category": ["bottle", "carpet"]}
        detector.training_loss(batch, seeded())["loss"].backward()
        assert all(p.grad.shape == p.shape for p in detector.parameters())
        found = detector.eval().predict(images, generator=seeded())
    assert found.anomaly_map.shape == (2, 256, 256) and found.score.shape == (2,)


@pytest.mark.parametrize("size", [32, 64, 96, 128])
def test_tiny_profile_works_on_patches_of_every_size_it_is_offered_for(size):
    config = Config.tiny(size, width=8, norm_groups=4, segmentation_width=4)
    found = build(config).eval().predict(batch_of(1, size)["image"])
    assert found.anomaly_map.shape == (1, size, size)
