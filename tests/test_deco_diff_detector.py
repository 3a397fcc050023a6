"""DeCo-Diff, the detector: what it learns, what it says, what it refuses, and its sizes."""

from dataclasses import replace

import pytest
import torch

from diffad_ref.checkpoints import load, save
from diffad_ref.codecs import CodecConfig
from diffad_ref.deco_diff import SIZES, Config, Corruption, DecoDiff, correct
from diffad_ref.detector import Rate, Stage
from diffad_ref.training import fit

TIMES = (8, 6, 4, 2, 0)
PCA = CodecConfig("pca", channels=6, factor=4)
FEW = {"width": 8, "multipliers": (1, 2), "heads": 1, "context": 8, "norm_groups": 4}
SMALL = Config.tiny(32, codec=PCA, classes=2, **FEW)


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


# --------------------------------------------------------------------------------------- training


def test_loss_is_finite_and_trains_the_corrector_alone(awake):
    detector = awake(build())
    assert [group["name"] for group in detector.parameter_groups()] == ["corrector"]
    loss = detector.training_loss(batch_of(), seeded())["loss"]
    loss.backward()
    assert loss.isfinite() and loss > 0
    assert all(p.grad is not None for p in detector.corrector.unet.parameters())
    assert detector.corrector.embedding.weight.grad.any()


def test_no_gradient_and_no_step_reaches_an_autoencoder():
    torch.manual_seed(0)
    kl = CodecConfig(widths=(8, 16), factor=2, layers=1, norm_groups=4)
    detector = DecoDiff(replace(SMALL, codec=kl, corruption=Corruption.of_side(16)))
    codec = detector.codec
    codec.ready.fill_(True)
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    assert not any(p.requires_grad for p in detector.codec.parameters())
    fit(detector, Images(), 2, 4, progress=False, device="cpu")
    assert all(torch.equal(value, before[name]) for name, value in codec.state_dict().items())
    found = detector.predict(batch_of(2)["image"], torch.tensor([0, 1]))
    assert found.parts["z_0"].shape == (2, 4, 16, 16) and found.score.isfinite().all()


def test_a_short_training_is_better_than_finding_nothing(monkeypatch):
    """Everything is corrupted, by noise alone; the last word is a batch that was not trained on."""
    stage = Stage("short", 25, 6, {"corrector": Rate(8e-3)}, clip=1.0)
    noise = Corruption((1,), (1.0,), (1.0, 1.0), (0.0, 0.0))
    detector = build(width=24, multipliers=(1,), corruption=noise, stages=(stage,))

    @torch.no_grad()
    def loss():
        return detector.training_loss(batch_of(32), seeded())["loss"].item()

    fit(detector, Images(16), progress=False, device="cpu")
    trained = loss()
    monkeypatch.setattr(detector.corrector, "forward", lambda z, t, c: torch.zeros_like(z))
    assert trained < 0.8 * loss()


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


def test_class_of_an_image_changes_its_prediction(awake):
    detector, images = awake(build()), batch_of(1)["image"]
    a, b = (detector.predict(images, torch.tensor([k])).parts["z_hat"] for k in (0, 1))
    assert not torch.allclose(a, b, atol=1e-4)


def test_corrector_that_finds_nothing_gives_a_map_of_zeros_however_poor_the_codec(monkeypatch):
    detector, images = build(codec=replace(PCA, channels=1)), torch.rand(2, 3, 32, 32)
    monkeypatch.setattr(detector.corrector, "forward", lambda z, t, c: torch.zeros_like(z))
    found = detector.predict(images, torch.tensor([0, 1]))
    assert not found.anomaly_map.any()
    assert not torch.allclose(found.reconstruction, images, atol=0.1)


@pytest.mark.parametrize(
    ("words", "visited"),
    [({}, [8, 6, 4, 2, 0]), ({"times": (9, 3)}, [9, 3]), ({"times": (2,)}, [2])],
)
def test_time_steps_of_a_correction_can_be_chosen(monkeypatch, words, visited):
    detector, seen = build(), []
    monkeypatch.setattr(detector.corrector, "forward", lambda z, t, c: seen.append(t.tolist()) or z)
    states = detector.reconstruct(randn(2, 6, 8, 8), torch.tensor([0, 1]), **words)
    assert seen == [[t, t] for t in visited] and len(states) == len(visited)


def test_rescaled_correction_can_be_chosen():
    detector, z, c = build(), randn(2, 6, 8, 8), torch.tensor([0, 1])
    released, exact = (detector.reconstruct(z, c, rescale=on) for on in (False, True))
    model = detector.corrector
    expected = correct(lambda z, t: model(z, t, c), z, detector.schedule, TIMES, rescale=True)
    assert torch.equal(exact[-1], expected[-1])
    assert not torch.allclose(released[-1], exact[-1], atol=1e-4)


def test_prediction_is_encoding_correcting_and_comparing():
    detector, (x, c) = build(), (batch_of(2)["image"], torch.tensor([0, 1]))
    z = detector.codec.encode(x)
    by_hand, found = detector.compare(z, detector.reconstruct(z, c)[-1]), detector.predict(x, c)
    assert torch.equal(found.anomaly_map, by_hand.anomaly_map)
    assert torch.equal(found.reconstruction, by_hand.reconstruction)


def test_fusion_of_two_maps_can_be_chosen():
    detector = build()
    z_0, z_hat = randn(2, 6, 8, 8), randn(2, 6, 8, 8) + 0.1 * randn(2, 6, 8, 8, seed=1)
    maps = {
        name: detector.compare(z_0, z_hat, name).anomaly_map
        for name in ("geometric", "arithmetic", "image", "latent")
    }
    default = detector.compare(z_0, z_hat)
    assert torch.equal(maps["geometric"], default.anomaly_map)
    assert torch.allclose(maps["geometric"] ** 2, maps["image"] * maps["latent"], atol=1e-6)
    assert torch.allclose(2 * maps["arithmetic"], maps["image"] + maps["latent"], atol=1e-6)
    assert not torch.allclose(maps["image"], maps["latent"], atol=1e-3)
    assert torch.equal(maps["image"], default.parts["image_discrepancy"])
    assert torch.equal(maps["latent"], default.parts["latent_discrepancy"])


def test_everything_comes_back_from_disk(tmp_path):
    detector = build()
    detector.categories = ("across", "down")
    loaded = load(save(detector, tmp_path / "weights"), method="DecoDiff")
    assert loaded.config == detector.config and loaded.categories == ("across", "down")
    arguments = batch_of(2)["image"], torch.tensor([0, 1])
    a, b = (d.predict(*arguments).anomaly_map for d in (detector, loaded))
    assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------ classes


@pytest.fixture(scope="module")
def named():
    detector = build()
    detector.categories = ("bottle", "carpet")
    return detector


@pytest.mark.parametrize("name", ["predict", "loss"])
@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (None, "say which category each image is of"),
        (torch.tensor([0, 2]), r"a category index is unknown: \[0, 2\]"),
        (torch.tensor([-1, 0]), r"a category index is unknown: \[-1, 0\]"),
        (torch.tensor([0]), "expected 2 category indices"),
        (torch.tensor(0), "expected 2 category indices"),
        (torch.tensor([[0], [1]]), "expected 2 category indices"),
        (torch.tensor([0.0, 1.0]), "expected 2 category indices"),
    ],
    ids=repr,
)
def test_class_that_cannot_be_meant_is_refused_with_those_that_are_known(
    named, name, classes, words
):
    x = torch.rand(2, 3, 32, 32)
    batch = {"image": x} | ({} if classes is None else {"category_index": classes})
    with pytest.raises(ValueError, match=rf"(?s){words}.* 2 classes: \['bottle', 'carpet'\]"):
        named.predict(x, classes) if name == "predict" else named(batch)


def test_classes_may_be_a_list_or_numbers_of_fewer_bytes():
    detector, x = build(), torch.rand(2, 3, 32, 32)
    expected = detector.predict(x, torch.tensor([0, 1])).anomaly_map
    for classes in ([0, 1], torch.tensor([0, 1], dtype=torch.int32)):
        assert torch.equal(detector.predict(x, classes).anomaly_map, expected)


def test_more_categories_than_classes_are_refused_before_training():
    torch.manual_seed(0)
    detector, many = DecoDiff(SMALL), Images()
    many.categories = ("a", "b", "c")
    with pytest.raises(ValueError, match="3 categories do not fit into a table of 2 classes"):
        detector.prepare(many)
    assert not detector.codec.is_ready()


# ------------------------------------------------------------------------------------------ configs


@pytest.mark.parametrize(
    ("size", "changes", "words"),
    [
        (36, {}, "image_size must be a multiple of 8, not 36"),
        (30, {}, "image_size must be a multiple of 8, not 30"),
        (40, {"multipliers": (1, 2, 2)}, "a multiple of 16, not 40"),
        (4, {"multipliers": (1,)}, "not divide latents of 1 cells"),
        (
            32,
            {"corruption": Corruption((1, 3), (0.5, 0.5))},
            r"\(1, 3\).*not divide latents of 8 cells",
        ),
        (32, {"fusion": "mean"}, "should be 'geometric', 'arithmetic'"),
        (32, {"schedule": "square"}, "unknown schedule 'square'"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(size, changes, words):
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        DecoDiff(Config.tiny(size, **{"codec": PCA, **FEW, **changes}))


def test_network_has_the_channels_of_the_codec_that_the_config_names():
    kl = CodecConfig(channels=5, widths=(8, 16, 16), factor=4, layers=1, norm_groups=4)
    with torch.device("meta"):
        detector = DecoDiff(Config.tiny(32, **FEW, codec=kl))
    assert detector.codec.config == kl
    assert detector.corrector.unet.config.in_channels == 5


def test_unknown_size_of_the_paper_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown size 'XXL'; there are XS, S, M, L, XL"):
        DecoDiff.paper(size="XXL")


# -------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("size", SIZES)
def test_a_head_is_as_wide_at_every_level(size):
    width, heads, _ = SIZES[size]
    codec = CodecConfig("pca", factor=8)  # the autoencoder plays no part
    with torch.device("meta"):
        unet = DecoDiff.paper(size=size, codec=codec, blocks=1).corrector.unet
    for block, multiplier in zip(unet.down_blocks, (1, 2, 4), strict=True):
        attention = block.attentions[0].transformer_blocks[0].attn1
        assert attention.heads == width * multiplier // (width // heads)


@pytest.mark.parametrize("size", [128, 256, 512])
def test_paper_profile_of_another_image_size_keeps_the_margin_of_its_crop(size):
    config = Config.paper(image_size=size)
    assert config.resize / size == 288 / 256
    assert all((size // 8) % patch == 0 for patch in config.corruption.patch_sizes)


def test_tiny_profile_is_small():
    with torch.device("meta"):
        assert 1.5e6 < sum(p.numel() for p in DecoDiff.tiny().parameters()) < 2e6


@pytest.mark.parametrize("size", [32, 64, 96, 128])
def test_tiny_profile_works_on_images_of_every_size_it_is_offered_for(size):
    torch.manual_seed(0)
    detector = DecoDiff(Config.tiny(size, codec=PCA, **FEW))
    detector.prepare(Images(8, size))
    found = detector.predict(torch.rand(1, 3, size, size), torch.tensor([1]))
    assert found.anomaly_map.shape == (1, size, size)


@pytest.fixture(scope="module")
def paper():
    """The paper's network, with shapes and no numbers."""
    with torch.device("meta"):
        return DecoDiff.paper()


def test_paper_profile_learns_on_tensors_without_memory(paper):
    classes = torch.zeros(2, dtype=torch.long, device="meta")
    batch = {"image": torch.rand(2, 3, 288, 288, device="meta"), "category_index": classes}
    paper.training_loss(batch, seeded())["loss"].backward()
    assert all(p.grad.shape == p.shape for p in paper.corrector.parameters())
    assert all(p.grad is None for p in paper.codec.parameters())


@torch.no_grad()
def test_paper_profile_predicts_on_tensors_without_memory(paper):
    x, classes = torch.rand(2, 3, 256, 256, device="meta"), torch.zeros(2, device="meta").long()
    z_0 = paper.codec.encode(x)
    found = paper.compare(z_0, paper.reconstruct(z_0, classes, times=(8,))[-1])
    assert found.anomaly_map.shape == (2, 256, 256) and found.score.shape == (2,)
    assert found.reconstruction.shape == (2, 3, 256, 256)
    assert found.parts["z_hat"].shape == (2, 4, 32, 32)
