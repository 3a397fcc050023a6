"""DeCo-Diff at its borders: what it refuses, and the sizes that it is made for."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffad_ref import deco_diff
from diffad_ref.backbones import count_parameters
from diffad_ref.codecs import CodecConfig, KLCodec
from diffad_ref.deco_diff import SIZES, Config, DecoDiff
from diffad_ref.diffusion import Schedule
from diffad_ref.patches import Corruption

LEVELS = Schedule.named("cosine", 10).abar.numpy()
PCA = CodecConfig("pca", channels=6, factor=4)
SMALL = {"width": 8, "multipliers": (1, 2), "heads": 1, "context": 8, "norm_groups": 4}


class Images(list):
    """Random images as samples, of so many categories."""

    def __init__(self, categories):
        self.categories = tuple(str(i) for i in range(categories))
        generator = torch.Generator().manual_seed(0)
        super().__init__({"image": torch.rand(3, 32, 32, generator=generator)} for _ in range(8))


def build(image_size=32, **changes):
    """A small detector of two classes whose codec is ready."""
    torch.manual_seed(0)
    detector = DecoDiff(Config.tiny(image_size, **{"codec": PCA, "classes": 2, **SMALL, **changes}))
    detector.prepare(Images(2))
    detector.categories = ("bottle", "carpet")
    return detector.eval()


def call(detector, name, images, classes):
    """`predict` or `training_loss` of images and classes."""
    if name == "predict":
        return detector.predict(images, classes)
    batch = {"image": images} | ({} if classes is None else {"category_index": classes})
    return detector.training_loss(batch, torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------ classes


@pytest.mark.parametrize("name", ["predict", "training_loss"])
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
def test_class_that_cannot_be_meant_is_refused_with_those_that_are_known(name, classes, words):
    with pytest.raises(ValueError, match=rf"(?s){words}.* 2 classes: \['bottle', 'carpet'\]"):
        call(build(), name, torch.rand(2, 3, 32, 32), classes)


def test_classes_may_be_a_list_or_numbers_of_fewer_bytes():
    detector, images = build(), torch.rand(2, 3, 32, 32)
    expected = detector.predict(images, torch.tensor([0, 1])).anomaly_map
    for classes in ([0, 1], torch.tensor([0, 1], dtype=torch.int32)):
        assert torch.equal(detector.predict(images, classes).anomaly_map, expected)


def test_more_categories_than_classes_are_refused_before_training():
    with pytest.raises(ValueError, match="3 categories do not fit into a table of 2 classes"):
        build().prepare(Images(3))


# ------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("name", ["predict", "training_loss"])
@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.rand(2, 3, 32, 32) * 255, "divide by 255"),
        (torch.full((2, 3, 32, 32), torch.nan), r"NaN or infinite pixels in image\(s\) \[0, 1\]"),
        (torch.rand(2, 3, 28, 28), "32 x 32.* 28 x 28"),
        (torch.rand(0, 3, 32, 32), "the batch is empty"),
        (torch.rand(2, 1, 32, 32), "expected shape"),
    ],
    ids=["bytes", "NaN", "small", "empty", "grey"],
)
def test_images_that_do_not_fit_are_refused_with_a_reason(name, images, words):
    with pytest.raises(ValueError, match=words):
        call(build(), name, images, torch.tensor([0, 1]))


def test_larger_images_are_cropped_in_training_but_not_in_prediction():
    images, classes = torch.rand(2, 3, 36, 36), torch.tensor([0, 1])
    assert call(build(), "training_loss", images, classes)["loss"].isfinite()
    with pytest.raises(ValueError, match="built for 32 x 32 images, not 36 x 36"):
        call(build(), "predict", images, classes)


# ------------------------------------------------------------------------------------------ configs


def test_patches_must_divide_the_latent():
    with pytest.raises(ValueError, match=r"patches of \[3, 16\] cells do not divide .* 8 cells"):
        build(corruption=Corruption((1, 3, 16), (0.5, 0.25, 0.25)))


def test_latent_of_one_cell_has_no_patches():
    with pytest.raises(ValueError, match=r"patches of \[\] cells do not divide .* of 1 cells"):
        build(4)


@pytest.mark.parametrize(
    ("size", "multiple"), [(36, r"a multiple of 8, not 36"), (30, "30 pixels does not divide")]
)
def test_image_size_that_the_codec_or_the_levels_do_not_divide_is_refused(size, multiple):
    with pytest.raises(ValueError, match=multiple):
        build(size)


def test_three_levels_need_a_latent_that_halves_twice():
    with pytest.raises(ValueError, match="a multiple of 16, not 40"):
        build(40, multipliers=(1, 2, 2))


def test_codec_that_is_given_decides_the_config():
    codec = KLCodec(CodecConfig(widths=(8, 16, 16), factor=4, layers=1, norm_groups=4))
    detector = DecoDiff(Config.tiny(32, **SMALL), codec)
    assert detector.config.codec == codec.config and detector.codec is codec
    assert detector.corrector.unet.config.in_channels == 4


def test_unknown_size_of_the_paper_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown size 'XXL'; there are XS, S, M, L, XL"):
        Config.paper("XXL")


@pytest.mark.parametrize("steps", [6, 7, 8, 9, 11])
def test_number_of_steps_that_no_stride_gives_is_refused(steps):
    with pytest.raises(ValueError, match=f"no stride makes {steps} of 10 steps"):
        build().predict(torch.rand(1, 3, 32, 32), torch.tensor([0]), steps=steps)


def test_unknown_fusion_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown fusion 'mean'; there are geometric, arithmetic"):
        build().predict(torch.rand(1, 3, 32, 32), torch.tensor([0]), fusion="mean")


# -------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("size", SIZES)
def test_a_head_is_as_wide_at_every_level(size):
    with torch.device("meta"):
        unet = DecoDiff(Config.paper(size)).corrector.unet
    width, heads, _ = SIZES[size]
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
        assert 1.5e6 < count_parameters(DecoDiff(Config.tiny())) < 2e6


@pytest.mark.parametrize("size", [32, 64, 96, 128])
def test_tiny_profile_works_on_images_of_every_size_it_is_offered_for(size):
    found = build(size).predict(torch.rand(1, 3, size, size), torch.tensor([1]))
    assert found.anomaly_map.shape == (1, size, size)


@pytest.fixture
def no_numbers(monkeypatch):
    """Tensors without memory have shapes alone: leave out whatever looks at numbers."""
    for module in ("detector", "deco_diff"):
        monkeypatch.setattr(f"diffad_ref.{module}.check_images", lambda images: None)
    monkeypatch.setattr(deco_diff, "class_indices", lambda classes, *rest: classes)
    monkeypatch.setattr(deco_diff, "draw_corruption", lambda z, *rest: (z[:, :1], z))
    monkeypatch.setattr(KLCodec, "_check_ready", lambda self: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield DecoDiff(Config.paper())


def test_paper_profile_learns_on_tensors_without_memory(no_numbers):
    batch = {"image": torch.rand(2, 3, 288, 288), "category_index": torch.tensor([0, 14])}
    no_numbers.training_loss(batch, torch.Generator().manual_seed(0))["loss"].backward()
    assert all(p.grad.shape == p.shape for p in no_numbers.corrector.parameters())
    assert all(p.grad is None for p in no_numbers.codec.parameters())


def test_paper_profile_predicts_on_tensors_without_memory(no_numbers):
    no_numbers.schedule = replace(no_numbers.schedule, abar=LEVELS)  # the steps need numbers
    found = no_numbers.eval().predict(torch.rand(2, 3, 256, 256), torch.tensor([0, 14]), times=(8,))
    assert found.anomaly_map.shape == (2, 256, 256) and found.score.shape == (2,)
    assert found.reconstruction.shape == (2, 3, 256, 256)
    assert found.parts["z_hat"].shape == (2, 4, 32, 32)
