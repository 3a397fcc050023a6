"""DeCo-Diff: its formulas by algebra, its steps with models that are perfect, and its borders."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffad_ref.checkpoints import load_checkpoint, save_checkpoint
from diffad_ref.codecs import CodecConfig, KLCodec
from diffad_ref.deco_diff import (
    Config,
    DecoDiff,
    correct,
    corrupt,
    deviation,
    image_discrepancy,
    latent_discrepancy,
)
from diffad_ref.detector import Rate, Stage
from diffad_ref.diffusion import Schedule, ddim_step
from diffad_ref.patches import Corruption
from diffad_ref.training import fit

SCHEDULE = Schedule.named("cosine", 10)
TIMES = (8, 6, 4, 2, 0)
SMALL = Config.tiny(
    32,
    codec=CodecConfig("pca", channels=6, factor=4),
    classes=2,
    width=8,
    multipliers=(1, 2),
    heads=1,
    context=8,
    norm_groups=4,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


class Images(list):
    """Samples of two categories: coloured ramps, one along each axis."""

    categories = ("across", "down")

    def __init__(self, count=8, size=32):
        ramp, generator = torch.linspace(0, 0.8, size).expand(size, size), seeded()
        for i in range(count):
            tint = torch.rand(3, 1, 1, generator=generator) * 0.2
            self.append({"image": (ramp if i % 2 == 0 else ramp.T) + tint, "category_index": i % 2})


def batch_of(count=8, size=32):
    return torch.utils.data.default_collate(Images(count, size))


def build(seed=0, **changes):
    """A small detector whose codec is ready."""
    torch.manual_seed(seed)
    detector = DecoDiff(replace(SMALL, **changes))
    detector.prepare(Images(16))
    return detector.eval()


def alphas(*values):
    return torch.tensor(values).view(-1, 1, 1, 1)


# ------------------------------------------------------------------------------------- corruption


@settings(deadline=None)
@given(st.floats(0, 0.999), st.floats(-50, 50), st.floats(-50, 50), st.sampled_from([0.0, 1.0]))
def test_corrupted_latent_is_the_clean_one_plus_its_deviation(abar, z, eps, mask):
    """C4, for one cell."""
    z_0, eps, mask = (torch.full((1, 1, 1, 1), v, dtype=torch.float64) for v in (z, eps, mask))
    abar = torch.tensor(abar, dtype=torch.float64).view(1, 1, 1, 1)
    z_t, eta = corrupt(z_0, eps, mask, abar), deviation(z_0, eps, mask, abar)
    assert z_t.item() == pytest.approx((z_0 + (1 - abar).sqrt() * eta).item(), abs=1e-9)


def test_where_the_mask_is_1_nothing_is_corrupted_and_nothing_deviates():
    z_0, eps, mask = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), torch.zeros(2, 1, 8, 8)
    mask[..., 2:5, 3:] = 1
    z_t, eta = (f(z_0, eps, mask, alphas(0.3, 0.9)) for f in (corrupt, deviation))
    kept = mask.bool().expand_as(z_0)
    assert torch.equal(z_t[kept], z_0[kept]) and not eta[kept].any()
    assert (z_t[~kept] != z_0[~kept]).all() and (eta[~kept] != 0).all()


def test_deviation_by_pencil():
    """abar 0.64: the root is 0.8, the noise's share 0.6, and z loses 0.2 / 0.6 of itself."""
    z_0, eps, mask = (torch.full((1, 1, 1, 1), v) for v in (3.0, -1.0, 0.0))
    assert corrupt(z_0, eps, mask, alphas(0.64)).item() == pytest.approx(0.8 * 3 - 0.6)
    assert deviation(z_0, eps, mask, alphas(0.64)).item() == pytest.approx(-1 - 3 / 3)


# ------------------------------------------------------------------------------------- correction


@pytest.mark.parametrize("t", range(10))
def test_exact_deviation_corrects_in_one_step_from_every_level(t):
    z_0, eps = randn(2, 4, 8, 8).double(), randn(2, 4, 8, 8, seed=1).double()
    mask = (torch.rand(2, 1, 8, 8, generator=seeded()) < 0.5).double()
    abar = SCHEDULE.abar[t].view(1, 1, 1, 1)
    eta = deviation(z_0, eps, mask, abar)
    (found,) = correct(lambda z, t: eta, corrupt(z_0, eps, mask, abar), SCHEDULE, [t])
    assert torch.allclose(found, z_0, atol=1e-9)


def test_rescaled_correction_of_a_wholly_corrupted_latent_follows_ddim_at_every_step():
    """A model that knows the noise; the steps as released leave the path."""
    z_0, eps = randn(2, 4, 8, 8).double(), randn(2, 4, 8, 8, seed=1).double()
    everywhere = torch.zeros(2, 1, 8, 8).double()

    def exact(z, t):
        return deviation(z_0, eps, everywhere, SCHEDULE.abar[t].view(-1, 1, 1, 1))

    start = corrupt(z_0, eps, everywhere, SCHEDULE.abar[8].view(1, 1, 1, 1))
    levels = [*SCHEDULE.abar[list(TIMES[1:])].view(-1, 1, 1, 1, 1), torch.ones(1, 1, 1, 1)]
    expected = [ddim_step(z_0, eps, abar) for abar in levels]
    states = correct(exact, start, SCHEDULE, TIMES, rescale=True)
    for state, wanted in zip(states, expected, strict=True):
        assert torch.allclose(state, wanted, atol=1e-9)
    released = correct(exact, start, SCHEDULE, TIMES)
    assert not torch.allclose(released[0], expected[0], atol=1e-2)


def test_rescaled_correction_follows_ddim_whatever_the_model_says():
    """With x0 and eps as DDIM reads them from z = x0 + sqrt(1 - abar) eta."""

    def model(z, t):
        return torch.tanh(z) * (1 + t.view(-1, 1, 1, 1))

    z = start = randn(2, 4, 8, 8).double()
    states = correct(model, start, SCHEDULE, TIMES, rescale=True)
    for state, t, t_next in zip(states, TIMES, [*TIMES[1:], None], strict=True):
        abar = SCHEDULE.abar[t]
        x0 = z - (1 - abar).sqrt() * model(z, torch.full((2,), t))
        eps = (z - abar.sqrt() * x0) / (1 - abar).sqrt()
        z = ddim_step(x0, eps, torch.ones(()) if t_next is None else SCHEDULE.abar[t_next])
        assert torch.allclose(state, z, atol=1e-9)


def test_model_that_sees_no_deviation_leaves_the_latent_as_it_is():
    z = randn(2, 4, 8, 8)
    states = correct(lambda z, t: torch.zeros_like(z), z, SCHEDULE, TIMES)
    assert len(states) == 5 and all(torch.equal(state, z) for state in states)


@pytest.mark.parametrize("times", [(), (0, 2, 4), (4, 4), (10, 5), (3, -1)])
def test_time_steps_that_do_not_fall_within_the_schedule_are_refused(times):
    with pytest.raises(ValueError, match="time steps must fall, from 9 at most"):
        correct(lambda z, t: z, randn(1, 4, 8, 8), SCHEDULE, times)


# ------------------------------------------------------------------------------------ discrepancy


def test_image_discrepancy_takes_the_channel_that_differs_most_and_clips_at_the_limit():
    x_0 = torch.zeros(3, 3, 8, 8)
    x_hat = torch.tensor([[0.1, -0.2, 0.0], [0.4, 0.1, 0.1], [-2.0, 0.0, 0.0]])
    found = image_discrepancy(x_hat[..., None, None].expand(3, 3, 8, 8), x_0)
    assert torch.allclose(found, alphas(0.5, 1.0, 1.0)[:, 0].expand(3, 8, 8))


def test_latent_discrepancy_takes_the_mean_of_the_channels_at_the_size_of_the_image():
    z_0, z_hat = torch.zeros(2, 4, 4, 4), torch.tensor([[0.1, -0.1, 0.2, 0.0], [1.0, 0, 0, 0]])
    found = latent_discrepancy(z_hat[..., None, None].expand(2, 4, 4, 4), z_0, 16)
    assert torch.allclose(found, alphas(0.5, 1.0)[:, 0].expand(2, 16, 16))


# --------------------------------------------------------------------------------------- training


def test_loss_is_finite_and_trains_the_corrector_alone():
    detector = build()
    assert [group["name"] for group in detector.parameter_groups()] == ["corrector"]
    loss = detector.training_loss(batch_of(), seeded())["loss"]
    loss.backward()
    assert loss.isfinite() and loss > 0
    assert all(p.grad is not None for p in detector.corrector.unet.parameters())
    assert detector.corrector.embedding.weight.grad.any()


def test_no_gradient_and_no_step_reaches_an_autoencoder():
    torch.manual_seed(0)
    codec = KLCodec(CodecConfig(widths=(8, 16), factor=2, layers=1, norm_groups=4))
    codec.ready.fill_(True)
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    detector = DecoDiff(replace(SMALL, corruption=Corruption.of_side(16)), codec)
    assert not any(p.requires_grad for p in detector.codec.parameters())
    fit(detector, Images(), 2, 4, progress=False, cpu=True)
    assert all(torch.equal(value, before[name]) for name, value in codec.state_dict().items())
    found = detector.predict(batch_of(2)["image"], torch.tensor([0, 1]))
    assert found.parts["z_0"].shape == (2, 4, 16, 16) and found.score.isfinite().all()


def test_a_short_training_is_better_than_finding_nothing(monkeypatch):
    """Everything is corrupted, by noise alone; the last word is a batch that was not trained on."""
    stage = Stage("short", 30, 8, {"corrector": Rate(5e-3)}, clip=1.0)
    noise = Corruption((1,), (1.0,), (1.0, 1.0), (0.0, 0.0))
    detector = build(width=32, multipliers=(1,), corruption=noise, stages=(stage,))

    @torch.no_grad()
    def loss():
        return detector.training_loss(batch_of(32), seeded())["loss"].item()

    fit(detector, Images(16), progress=False, cpu=True)
    trained = loss()
    monkeypatch.setattr(detector.corrector, "forward", lambda z, t, c: torch.zeros_like(z))
    assert trained < 0.8 * loss()


def test_loss_depends_on_its_generator_and_not_on_the_global_seed():
    detector, values = build(), []
    for seed, global_seed in ((0, 0), (0, 1), (1, 1)):
        torch.manual_seed(global_seed)
        values.append(detector.training_loss(batch_of(), seeded(seed))["loss"].item())
    assert values[0] == values[1] != values[2]


def crops(monkeypatch, size, shift, count=64):
    """The crops that training takes of images of a size, and these images."""
    detector, seen = build(resize=40, shift=shift), []
    real = detector.codec.posterior
    monkeypatch.setattr(detector.codec, "posterior", lambda x: seen.append(x / 2 + 0.5) or real(x))
    monkeypatch.setattr(detector.corrector, "forward", lambda z, t, c: z)
    images = torch.rand(count, 3, size, size, generator=seeded())
    classes = torch.zeros(count, dtype=torch.long)
    detector.training_loss({"image": images, "category_index": classes}, seeded())
    return seen[0], images


@pytest.mark.parametrize("size", [32, 40])
def test_crop_of_training_that_may_not_move_is_the_middle(monkeypatch, size):
    found, images = crops(monkeypatch, size, shift=0)
    margin = (size - 32) // 2
    assert torch.equal(found, images[..., margin : margin + 32, margin : margin + 32])


def test_crop_of_training_moves_by_the_shift_at_most_in_every_second_image(monkeypatch):
    found, images = crops(monkeypatch, 40, shift=2, count=400)
    places = {}
    for crop, image in zip(found, images, strict=True):
        windows = image.unfold(1, 32, 1).unfold(2, 32, 1)  # (3, 9, 9, 32, 32)
        same = (windows == crop[:, None, None]).all(-1).all(-1).all(0)
        y, x = (same.nonzero()[0] - 4).tolist()
        places[y, x] = places.get((y, x), 0) + 1
    assert {y for y, _ in places} == {x for _, x in places} == {-2, -1, 0, 1, 2}
    assert 0.44 < places[0, 0] / 400 < 0.6  # half of them, and 1 / 25 of the others


def test_image_without_a_margin_is_mirrored_where_its_crop_moves_out(monkeypatch):
    found, images = crops(monkeypatch, 32, shift=4, count=100)
    padded = torch.nn.functional.pad(images, [4] * 4, mode="reflect")
    for crop, image in zip(found, padded, strict=True):
        windows = image.unfold(1, 32, 1).unfold(2, 32, 1)
        assert (windows == crop[:, None, None]).all(-1).all(-1).all(0).any()


@pytest.mark.parametrize("shape", [(30, 30), (40, 32), (32, 40)])
def test_images_that_are_too_small_or_not_square_are_not_cropped(shape):
    got = f"{shape[0]} x {shape[1]}"
    with pytest.raises(ValueError, match=f"cannot crop 32 x 32 pixels from images of {got}"):
        build().training_loss({"image": torch.rand(2, 3, *shape)}, seeded())


# ------------------------------------------------------------------------------------- prediction


def test_prediction_has_the_shapes_and_ranges_of_the_contract():
    found = build().predict(batch_of(3)["image"], torch.tensor([0, 1, 1]))
    assert found.anomaly_map.shape == (3, 32, 32) and found.score.shape == (3,)
    assert found.reconstruction.shape == (3, 3, 32, 32)
    parts = {name: tuple(part.shape) for name, part in found.parts.items()}
    assert parts["decoded"] == (3, 3, 32, 32)
    assert parts["image_discrepancy"] == parts["latent_discrepancy"] == (3, 32, 32)
    assert parts["z_0"] == parts["z_hat"] == (3, 6, 8, 8)
    for values in (found.anomaly_map, found.reconstruction):
        assert values.min() >= 0 and values.max() <= 1 and not values.requires_grad


def test_two_predictions_are_equal_bit_for_bit_whatever_the_seeds():
    detector, images, classes = build(), batch_of(2)["image"], torch.tensor([0, 1])
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(detector.predict(images, classes, generator=seeded(seed)))
    assert torch.equal(found[0].anomaly_map, found[1].anomaly_map)


def test_score_is_the_largest_value_of_the_map():
    found = build().predict(batch_of(3)["image"], torch.tensor([0, 1, 1]))
    assert found.score.tolist() == [max(pixels.flatten().tolist()) for pixels in found.anomaly_map]


def test_class_of_an_image_changes_its_prediction():
    detector, images = build(), batch_of(1)["image"]
    a, b = (detector.predict(images, torch.tensor([k])).parts["z_hat"] for k in (0, 1))
    assert not torch.allclose(a, b, atol=1e-4)


def test_corrector_that_finds_nothing_gives_a_map_of_zeros_however_poor_the_codec(monkeypatch):
    detector, images = (
        build(codec=CodecConfig("pca", channels=1, factor=4)),
        torch.rand(2, 3, 32, 32),
    )
    monkeypatch.setattr(detector.corrector, "forward", lambda z, t, c: torch.zeros_like(z))
    found = detector.predict(images, torch.tensor([0, 1]))
    assert not found.anomaly_map.any() and not torch.allclose(
        found.reconstruction, images, atol=0.1
    )


@pytest.mark.parametrize(
    ("words", "visited"),
    [
        ({}, [8, 6, 4, 2, 0]),
        ({"times": (9, 3)}, [9, 3]),
        ({"steps": 2}, [5, 0]),
        ({"steps": 10, "start": 3}, [2, 1, 0]),
        ({"start": 2}, [2, 0]),
    ],
)
def test_time_steps_of_a_prediction_can_be_chosen(monkeypatch, words, visited):
    detector, seen = build(), []
    monkeypatch.setattr(detector.corrector, "forward", lambda z, t, c: seen.append(t.tolist()) or z)
    detector.predict(batch_of(2)["image"], torch.tensor([0, 1]), **words)
    assert seen == [[t, t] for t in visited]


def test_fusion_of_a_prediction_can_be_chosen():
    detector, arguments = build(), (batch_of(2)["image"], torch.tensor([0, 1]))
    maps = {
        name: detector.predict(*arguments, fusion=name).anomaly_map
        for name in ("geometric", "arithmetic", "image", "latent")
    }
    assert torch.equal(maps["geometric"], detector.predict(*arguments).anomaly_map)
    assert torch.allclose(maps["geometric"] ** 2, maps["image"] * maps["latent"], atol=1e-6)
    assert torch.allclose(2 * maps["arithmetic"], maps["image"] + maps["latent"], atol=1e-6)
    assert not torch.allclose(maps["image"], maps["latent"], atol=1e-3)
    assert torch.equal(maps["image"], detector.predict(*arguments).parts["image_discrepancy"])


def test_everything_comes_back_from_disk(tmp_path):
    detector = build()
    detector.categories = ("across", "down")
    loaded = load_checkpoint(save_checkpoint(detector, tmp_path / "weights"), method="DecoDiff")
    assert loaded.config == detector.config and loaded.categories == ("across", "down")
    arguments = batch_of(2)["image"], torch.tensor([0, 1])
    a, b = (d.predict(*arguments).anomaly_map for d in (detector, loaded))
    assert torch.equal(a, b)
