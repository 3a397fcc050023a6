"""What all detectors share: how they are built, what they refuse, and the data that fits them."""

from copy import deepcopy
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from diffad_ref.codecs import CodecConfig
from diffad_ref.deco_diff import DecoDiff
from diffad_ref.detector import Detector, check_images
from diffad_ref.diffusion_ad import DiffusionAD
from diffad_ref.networks import lean
from diffad_ref.one_for_more import OneForMore

METHODS = {"DiffusionAD": DiffusionAD, "DecoDiff": DecoDiff, "OneForMore": OneForMore}
PCA = CodecConfig("pca", channels=6, factor=4)
# Small, but with what acts otherwise in training: batch statistics, dropout.
SMALL = {
    "DiffusionAD": {
        "width": 8,
        "multipliers": (1, 1),
        "attention_levels": (1,),
        "heads": 2,
        "segmentation_width": 4,
        "segmentation_norm": "batch",
        "draws": 1,
    },
    "DecoDiff": {
        "codec": PCA,
        "classes": 2,
        "width": 8,
        "multipliers": (1, 2),
        "heads": 1,
        "context": 8,
        "dropout": 0.5,
    },
    "OneForMore": {
        "codec": PCA,
        "start": None,
        "width": 8,
        "window": (3, 3),
        "feed_forward": 16,
        "condition_layers": 1,
        "dropout": 0.5,
    },
}


def images(count=2, size=32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def build(method, **changes):
    """A small detector for images of 32 pixels whose codec and features are ready."""
    torch.manual_seed(0)
    detector = METHODS[method].tiny(
        **{"image_size": 32, "norm_groups": 4} | SMALL[method] | changes
    )
    detector.prepare([{"image": image} for image in images(16)])
    return detector.eval()


@lru_cache
def paper(method):
    with torch.device("meta"):
        return METHODS[method].paper()


def predict(detector, x):
    return detector.predict(x, torch.zeros(len(x), dtype=torch.long))


# --------------------------------------------------------------------------------- how it is built


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("given", [(), (None,), ("tiny",), (64,)], ids=repr)
def test_constructor_without_a_config_says_which_sizes_there_are(method, given):
    words = rf"how large\? {method}.tiny\(\) .*{method}.paper\(\) .*{method}\(config\)"
    with pytest.raises(TypeError, match=words):
        METHODS[method](*given)


@pytest.mark.parametrize("method", METHODS)
def test_config_of_another_method_is_no_config(method):
    for other in METHODS.values():
        if other is not METHODS[method]:
            with pytest.raises(TypeError, match=f"takes any {method}.Config"):
                METHODS[method](other.Config.tiny())


@pytest.mark.parametrize("method", METHODS)
def test_tiny_and_paper_build_what_their_configs_say(method):
    kind = METHODS[method]
    assert paper(method).config == kind.Config.paper() and paper(method).config.image_size == 256
    with torch.device("meta"):
        assert kind.tiny().config == kind.Config.tiny()
        detector = kind.tiny(image_size=96, schedule="cosine")
    assert (detector.config.image_size, detector.config.schedule) == (96, "cosine")
    assert detector.stages == kind.Config.tiny().stages


def test_every_subclass_is_known_by_its_name():
    assert METHODS.items() <= Detector.methods.items()

    class Guess(Detector):
        pass

    assert Detector.methods.pop("Guess") is Guess


def test_stage_that_trains_a_part_that_is_not_there_is_refused():
    detector = build("DiffusionAD")
    stage = detector.stages[0]
    wrong = type(stage)("odd", 1, 1, {"decoder": stage.lr["denoiser"]})
    with pytest.raises(ValueError, match=r"'odd' trains unknown parts \['decoder'\]"):
        detector.enter(wrong)


# -------------------------------------------------------------------------------------- prediction


@pytest.mark.parametrize("method", METHODS)
def test_prediction_is_made_in_evaluation_mode_and_gives_the_mode_back(method):
    detector, x = build(method), images()
    expected = predict(detector, x).anomaly_map
    assert not detector.training
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    found = predict(detector.train(), x).anomaly_map
    assert torch.equal(found, expected)
    assert detector.training and all(part.training for part in detector.children())
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())


def test_mode_is_given_back_after_a_prediction_that_failed():
    detector = build("DecoDiff").train()
    with pytest.raises(ValueError, match="say which category"):
        detector.predict(images())
    assert detector.training and detector.corrector.training


@pytest.mark.parametrize("method", METHODS)
def test_prediction_has_no_gradient_and_follows_its_generator_alone(method):
    detector, classes, found = build(method), torch.zeros(2, dtype=torch.long), []
    for global_seed, seed in ((0, None), (1, 0), (2, 3), (3, 3)):
        torch.manual_seed(global_seed)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        found.append(detector.predict(images(), classes, generator))
    assert not any(p.score.requires_grad for p in found)
    assert torch.equal(found[0].anomaly_map, found[1].anomaly_map)  # without one: of seed 0
    assert torch.equal(found[2].anomaly_map, found[3].anomaly_map)


# ------------------------------------------------------------------------------------ what it loses


@pytest.mark.parametrize("method", METHODS)
def test_samples_of_its_own_folder_train_it(method, mvtec_root):
    detector = build(method)
    batch = next(iter(DataLoader(detector.folder(mvtec_root), batch_size=4)))
    loss = detector(batch, torch.Generator().manual_seed(0))["loss"]
    assert loss.ndim == 0 and loss.isfinite()


@pytest.mark.parametrize("method", METHODS)
def test_loss_depends_on_its_generator_and_not_on_the_global_seed(method):
    detector, losses = build(method).eval(), []  # dropout is the one thing that may
    batch = {
        "image": images(),
        "texture": torch.tensor([True, False]),
        "category_index": torch.zeros(2, dtype=torch.long),
    }
    for seed, global_seed in ((0, 0), (0, 1), (1, 1)):
        torch.manual_seed(global_seed)
        generator = torch.Generator().manual_seed(seed)
        losses.append(detector.training_loss(batch, generator)["loss"].item())
    assert losses[0] == losses[1] != losses[2]


def test_loss_without_a_generator_follows_the_global_seed():
    detector, losses = build("DiffusionAD"), []
    batch = {"image": images(), "texture": torch.tensor([True, False])}
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(detector(batch)["loss"].item())
    assert losses[0] == losses[1] != losses[2]


WRONG = {
    "bytes": (images() * 255, "divide by 255"),
    "NaN": (
        torch.full((2, 3, 32, 32), torch.nan),
        r"NaN or infinite pixels in image\(s\) \[0, 1\]",
    ),
    "small": (images(size=28), "built for 32 x 32 images, not 28 x 28"),
    "large": (images(size=40), "built for 32 x 32 images, not 40 x 40"),
    "not square": (torch.rand(2, 3, 32, 40), "built for 32 x 32 images, not 32 x 40"),
    "empty": (torch.rand(0, 3, 32, 32), "the batch is empty"),
    "grey": (torch.rand(2, 1, 32, 32), "expected shape"),
    "alone": (torch.rand(3, 32, 32), r"images\[None\]"),
    "integers": (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "got torch.uint8"),
}


@pytest.fixture(scope="module")
def detectors():
    return {method: build(method) for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", WRONG)
def test_images_that_do_not_fit_are_refused_with_a_reason(detectors, method, case):
    detector, (x, words) = detectors[method], WRONG[case]
    classes = torch.zeros(len(x), dtype=torch.long)
    with pytest.raises(ValueError, match=words):
        detector.predict(x, classes)
    with pytest.raises(ValueError, match=words):
        detector({"image": x, "category_index": classes, "texture": classes.bool()})


def test_larger_images_are_cropped_in_training_but_not_in_prediction():
    detector, classes = build("DecoDiff", resize=36), torch.tensor([0, 1])
    for size in (32, 36):
        batch = {"image": images(size=size), "category_index": classes}
        assert detector(batch)["loss"].isfinite()
    with pytest.raises(ValueError, match="built for 36 x 36 or 32 x 32 images, not 40 x 40"):
        detector({"image": images(size=40), "category_index": classes})
    with pytest.raises(ValueError, match="built for 32 x 32 images, not 36 x 36"):
        detector.predict(images(size=36), classes)


# --------------------------------------------------------------------------------- data that fits


def shapes(dataset):
    """What a sample holds that has a size, and which."""
    sample = dataset[0]
    return {k: tuple(v.shape[1:]) for k, v in sample.items() if isinstance(v, torch.Tensor)}


def test_paper_of_deco_diff_learns_from_a_margin_and_judges_the_middle(mvtec_root):
    detector = paper("DecoDiff")
    train, test = (detector.folder(mvtec_root, split) for split in ("train", "test"))
    assert shapes(train) == {"image": (288, 288), "mask": (288, 288)}
    assert shapes(test) == {"image": (256, 256), "mask": (256, 256)}
    whole = detector.folder(mvtec_root, "test", crop=None)[0]
    assert torch.equal(test[0]["image"], whole["image"][:, 16:272, 16:272])
    assert torch.equal(test[0]["mask"], whole["mask"][:, 16:272, 16:272])


def test_plain_folders_come_at_the_same_sizes(mvtec_root):
    detector, folder = paper("DecoDiff"), mvtec_root / "bottle/test/crack"
    good = detector.from_folders(good=folder, texture=False)
    test = detector.from_folders(test=folder)
    assert (good.split, test.split) == ("train", "test")
    assert shapes(good)["image"] == (288, 288) and shapes(test)["image"] == (256, 256)
    assert torch.equal(test[1]["image"], good[1]["image"][:, 16:272, 16:272])


def test_tiny_of_diffusion_ad_looks_for_the_product_in_training_alone(mvtec_root):
    with torch.device("meta"):
        tiny = DiffusionAD.tiny()
    plain = {"image": (64, 64), "mask": (64, 64)}
    assert shapes(tiny.folder(mvtec_root)) == plain | {"foreground": (64, 64)}
    assert shapes(tiny.folder(mvtec_root, foreground=None)) == plain
    assert shapes(tiny.folder(mvtec_root, "test")) == plain
    folder = mvtec_root / "bottle/train/good"
    assert "foreground" in shapes(tiny.from_folders(good=folder, texture=False))
    assert shapes(tiny.from_folders(test=folder)) == plain


@pytest.mark.parametrize("method", ["DiffusionAD", "OneForMore"])
def test_papers_without_a_margin_take_images_as_they_are(method, mvtec_root):
    detector = paper(method)
    for split in ("train", "test"):
        found = detector.folder(mvtec_root, split)
        assert shapes(found)["image"] == (256, 256) and found.crop is None
        where = method == "DiffusionAD" and split == "train"
        assert ("foreground" in shapes(found)) == where


def test_folder_takes_what_a_data_set_takes_and_that_comes_first(mvtec_root):
    found = build("DecoDiff").folder(
        mvtec_root, "test", categories=["carpet"], textures=[], image_size=24, crop=8
    )
    assert found.categories == ["carpet"] and not found[0]["texture"]
    assert shapes(found)["image"] == (8, 8)


# -------------------------------------------------------------------------------- the border check


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.rand(3, 8, 8), r"\(3, 8, 8\).*images\[None\]"),
        (torch.rand(2, 1, 8, 8), r"\(B, 3, H, W\), got \(2, 1, 8, 8\)"),
        (torch.rand(2, 8, 8, 3), r"got \(2, 8, 8, 3\)"),
        (torch.rand(0, 3, 8, 8), "batch is empty"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "float32.*torch.uint8.*255"),
        (torch.full((1, 3, 8, 8), 255.0), r"found \[255, 255\]; divide by 255"),
        (torch.full((1, 3, 8, 8), -1.0), r"found \[-1, -1\]; is it still in \[-1, 1\]"),
        (torch.full((1, 3, 8, 8), float("inf")), "NaN or infinite"),
        (np.zeros((1, 3, 8, 8)), "expected a tensor.*ndarray"),
    ],
)
def test_what_is_no_batch_of_images_is_refused_with_a_hint(images, words):
    with pytest.raises(ValueError, match=words):
        check_images(images)


def test_the_image_with_nan_pixels_is_counted():
    images = torch.rand(4, 3, 8, 8)
    images[2, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"^images: NaN.*\[2\]"):
        check_images(images)


def test_images_from_zero_to_one_inclusive_pass():
    assert check_images(torch.linspace(0, 1, 3 * 4).view(1, 3, 2, 2)) is None


@pytest.mark.parametrize(
    "norm",
    [
        nn.GroupNorm(2, 4, affine=False),
        nn.LayerNorm(8, bias=False),
        nn.LayerNorm(8, elementwise_affine=False),
    ],
    ids=str,
)
def test_normalisations_without_weights_take_16_bits_too(norm):
    x, plain = torch.rand(2, 4, 8), deepcopy(norm)
    lean(norm)
    found = norm(x.bfloat16())
    assert found.dtype == torch.bfloat16 and torch.allclose(found.float(), plain(x), atol=0.05)
