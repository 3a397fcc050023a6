"""Baselines on data whose template and principal components are known; and the ablation."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import Subset

from diffad_ref.checkpoints import load, save
from diffad_ref.data import AnomalyFolder
from diffad_ref.detector import Detector
from diffad_ref.diffusion_ad import Config, DiffusionAD
from diffad_ref.evaluation import evaluate
from diffad_ref.tools.baselines import (
    PCA,
    NearestFeatures,
    SegmentationOnly,
    Template,
    far_apart,
    without_denoiser,
)
from diffad_ref.training import fit


class Plates(torch.utils.data.Dataset):
    """Grey plates ("dark" or "light") that vary along one pattern; defects are white squares."""

    def __init__(self, count=12, defects=0, seed=0):
        self.rng = torch.Generator().manual_seed(seed)
        pattern = torch.linspace(-1, 1, 16).expand(3, 16, 16)
        self.items = []
        for i in range(2 * count):
            category, level = (("dark", 0.3), ("light", 0.6))[i % 2]
            image = level + 0.1 * torch.randn((), generator=self.rng) * pattern
            mask = torch.zeros(1, 16, 16)
            if i < defects:
                mask[:, 6:10, 6:10] = 1
            image = (image + 0.3 * mask).clamp(0, 1)
            index = ("dark", "light").index(category)
            self.items.append(
                {
                    "image": image,
                    "mask": mask,
                    "label": int(mask.any()),
                    "category": category,
                    "category_index": index,
                    "kind": "square" if mask.any() else "good",
                    "path": f"{i}.png",
                }
            )

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


BASELINES = pytest.mark.parametrize("make", [Template, PCA])


@BASELINES
def test_a_white_square_is_found(make):
    report = evaluate(make().fit(Plates()), Plates(defects=12, seed=1), progress=False)
    assert report.mean["pixel_auroc"] > 0.95 and report.mean["image_auroc"] > 0.8


def test_template_learns_mean_and_deviation_of_each_category():
    data = Plates()
    template = Template().fit(data)
    dark = torch.stack([data[i]["image"] for i in range(0, len(data), 2)])
    assert template.categories == ("dark", "light")
    assert torch.allclose(template.mean[0], dark.mean(0))
    assert torch.allclose(template.std[0], dark.std(0, unbiased=False), atol=1e-6)


def test_template_map_is_the_deviation_in_units_of_the_spread():
    template = Template(eps=0.1, sigma=0.01).fit(Plates())
    images = (template.mean[:1] + 0.2).clamp(0, 1)
    found = template.predict(images, torch.tensor([0])).anomaly_map
    expected = (0.2 / (template.std[:1] + 0.1)).mean(1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_pca_rebuilds_what_varies_in_training_and_nothing_else():
    pca = PCA().fit(Plates())
    good, bad = Plates(seed=3)[0]["image"], Plates(seed=3, defects=1)[0]["image"]
    found = pca.predict(torch.stack([good, bad]), torch.tensor([0, 0]))
    assert found.anomaly_map[0].max() < 1e-6
    assert found.anomaly_map[1, 7, 7] > 0.01
    assert torch.allclose(found.reconstruction[0], good, atol=1e-4)


def test_one_model_for_all_categories_needs_no_index():
    pca = PCA(per_category=False).fit(Plates())
    images = torch.stack([Plates(seed=3)[i]["image"] for i in (0, 1)])
    assert pca.predict(images).anomaly_map.max() < 1e-6


@BASELINES
def test_each_image_is_judged_by_its_own_category(make):
    model = make().fit(Plates())
    images = torch.stack([Plates(seed=3)[i]["image"] for i in (0, 1)])
    right = model.predict(images, torch.tensor([0, 1])).score
    swapped = model.predict(images, torch.tensor([1, 0])).score
    assert (swapped > right).all()


@BASELINES
def test_image_score_is_the_mean_of_the_50_largest_pixels(make):
    found = make().fit(Plates()).predict(Plates(defects=1)[0]["image"][None], torch.tensor([0]))
    expected = found.anomaly_map.flatten().sort(descending=True).values[:50].mean()
    assert found.score.item() == pytest.approx(expected.item(), rel=1e-6)


@BASELINES
def test_prediction_keeps_the_shapes_of_the_contract(make):
    found = make().fit(Plates()).predict(torch.rand(3, 3, 16, 16), torch.tensor([0, 1, 1]))
    assert found.anomaly_map.shape == (3, 16, 16) and found.score.shape == (3,)
    assert found.reconstruction.shape == (3, 3, 16, 16)
    assert found.reconstruction.min() >= 0 and found.reconstruction.max() <= 1


def test_fewer_images_than_components_are_enough():
    assert PCA(n_components=80).fit(Plates(count=3)).mean.shape == (2, 3, 16, 16)


@BASELINES
def test_prediction_before_fit_is_refused(make):
    with pytest.raises(ValueError, match="call fit"):
        make().predict(torch.rand(1, 3, 16, 16), torch.tensor([0]))


@BASELINES
def test_defective_training_images_are_refused(make):
    with pytest.raises(ValueError, match="good images only"):
        make().fit(Plates(defects=1))


@BASELINES
@pytest.mark.parametrize(
    ("images", "index", "words"),
    [
        (torch.rand(1, 3, 8, 8), [0], "fitted on images"),
        (torch.rand(1, 3, 16, 16), None, "which category"),
        (torch.rand(1, 3, 16, 16), [2], r"1 indices of \['dark', 'light'\], got \[2\]"),
        (torch.rand(1, 3, 16, 16) * 255, [0], "255"),
        (torch.full((1, 3, 16, 16), float("nan")), [0], "NaN"),
    ],
)
def test_input_that_does_not_fit_is_named(make, images, index, words):
    model = make().fit(Plates())
    with pytest.raises(ValueError, match=words):
        model.predict(images, None if index is None else torch.tensor(index))


# --------------------------------------------------------------------------- without a denoiser


@pytest.fixture
def alone(small_config):
    """The ablation, made small, with a few textures."""
    torch.manual_seed(0)
    detector = SegmentationOnly(small_config)
    detector.textures = (255 * torch.rand(4, 3, 64, 64)).to(torch.uint8)
    return detector


def products(count=4):
    g = torch.Generator().manual_seed(0)
    return [{"image": torch.rand(3, 32, 32, generator=g), "texture": False} for _ in range(count)]


def test_recipe_of_the_ablation_is_one_stage_with_all_steps_that_segmentation_has():
    config = Config.tiny()
    (stage,) = without_denoiser(config).stages
    assert stage == replace(config.stages[1], steps=2000 + 400)
    (stage,) = without_denoiser(Config.paper()).stages
    assert (stage.epochs, set(stage.lr)) == (3000, {"segmenter"})
    with pytest.raises(ValueError, match="no stage of the recipe trains the segmenter"):
        SegmentationOnly(replace(config, stages=config.stages[:1]))
    with torch.device("meta"):
        assert SegmentationOnly.tiny(image_size=32).config == without_denoiser(Config.tiny(32))
        assert SegmentationOnly.paper().config == without_denoiser(Config.paper())


def test_ablation_is_a_detector_without_a_denoiser(alone, small_config):
    assert Detector.methods["SegmentationOnly"] is SegmentationOnly
    full = DiffusionAD(small_config).state_dict().keys()
    rest = {name for name in full if not name.startswith("denoiser.")}
    assert alone.state_dict().keys() == rest < full


def test_ablation_compares_an_image_with_nothing(alone):
    x = torch.stack([product["image"] for product in products()])
    seen, real = [], alone.segmenter.forward

    def forward(pair):
        seen.append(pair)
        return real(pair)

    alone.segmenter.forward = forward
    alone.eval()
    found = alone.predict(x)
    loss = alone({"image": x, "texture": torch.zeros(4, dtype=torch.bool)})
    assert torch.equal(seen[0], torch.cat([x, 0 * x], 1)) and not seen[1][:, 3:].any()
    assert not torch.equal(seen[1][:, :3], x)  # in training there are anomalies in it
    assert not found.reconstruction.any() and loss["loss"] == loss["mask"]


def test_ablation_needs_no_noise(alone):
    x = torch.stack([product["image"] for product in products()])
    one, two = (alone.predict(x, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    assert torch.equal(one.anomaly_map, two.anomaly_map)


def test_ablation_trains_and_comes_back_from_disk(alone, tmp_path):
    before = [p.clone() for p in alone.parameters()]
    history = fit(alone, products(), steps=2, batch_size=2, device="cpu", progress=False)
    assert [row["stage"] for row in history.rows] == ["segmentation"] * 2
    assert not any(map(torch.equal, before, alone.parameters()))
    loaded = load(save(alone, tmp_path / "alone"), method="SegmentationOnly")
    x = torch.stack([product["image"] for product in products()])
    assert torch.equal(loaded.predict(x).anomaly_map, alone.predict(x).anomaly_map)


# -------------------------------------------------------------------------------- nearest features

SAMPLE = Path(
    os.environ.get("DIFFAD_MVTEC")
    or Path(__file__).parents[2] / "shared" / "data" / "mvtec_ad_sample"
)
RECORDS = Path(__file__).parents[1] / "book" / "records" / "mvtec"


@pytest.fixture(scope="module")
def nearest():
    """The rival, which keeps few patches of two kinds of plates."""
    return NearestFeatures(memory=20, candidates=100).fit(plates(8))


def plates(count, defects=0, seed=0):
    """The plates, four times as large: a network looks at patches of 8 pixels."""
    found = [dict(item) for item in Plates(count, defects, seed)]
    for item in found:
        for name in ("image", "mask"):
            item[name] = item[name].repeat_interleave(4, 1).repeat_interleave(4, 2)
    return found


def test_patches_that_were_never_seen_are_far_from_those_that_were(nearest):
    report = evaluate(nearest, plates(8, defects=8, seed=1), progress=False)
    assert report.mean["pixel_auroc"] > 0.95 and report.mean["image_auroc"] > 0.9


def test_the_memory_is_as_large_as_was_asked_for_in_each_category(nearest):
    assert nearest.patches.shape == (2, 20, 152) and nearest.categories == ("dark", "light")
    few = NearestFeatures(memory=200).fit(plates(2))  # 2 images of 8 x 8 patches each
    assert few.patches.shape == (2, 200, 152)
    assert torch.equal(few.patches[:, 128:], few.patches[:, :72])  # from the start again


def test_what_is_far_apart_is_chosen_before_what_is_near():
    points = torch.cat([torch.zeros(50, 3), torch.eye(3), torch.full((1, 3), 5.0)])
    points = points + 1e-3 * torch.rand(points.shape, generator=torch.Generator().manual_seed(0))
    chosen = far_apart(points, 5, torch.Generator().manual_seed(1))
    assert sum(i < 50 for i in chosen.tolist()) == 1
    assert len(far_apart(points, 99, torch.Generator())) == len(points)


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no MVTec AD; DIFFAD_MVTEC names its folder")
def test_broken_bottles_are_found_from_some_good_ones():
    train = Subset(AnomalyFolder(SAMPLE, "train", 256, ["bottle"]), range(0, 209, 10))
    test = AnomalyFolder(SAMPLE, "test", 256, ["bottle"])
    test.samples = test.samples[::4]
    report = evaluate(NearestFeatures(memory=500, candidates=5000).fit(train), test, progress=False)
    assert report.mean["image_auroc"] > 0.98 and report.mean["pixel_ap"] > 0.6


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no MVTec AD; DIFFAD_MVTEC names its folder")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("template", Template),
        ("PCA", PCA),
        pytest.param("nearest", NearestFeatures, marks=pytest.mark.long),
    ],
)
def test_results_on_transistors_come_out_as_they_are_recorded(name, kind):
    train, test = (AnomalyFolder(SAMPLE, split, 256, ["transistor"]) for split in ("train", "test"))
    found = evaluate(kind().fit(train), test, progress=False).mean
    record = json.loads((RECORDS / f"{name}.json").read_text())
    (row,) = (r for r in record["report"]["table"] if r["category"] == "transistor")
    for metric in ("image_auroc", "pixel_ap"):
        assert found[metric] == pytest.approx(row[metric], abs=0.01)  # or images of 900 pixels
