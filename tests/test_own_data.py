"""Data sets and detectors of one's own: understood as meant, or refused with what is missing."""

from dataclasses import asdict, replace

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

import diffad_ref as da
from diffad_ref.continual import check_tasks
from diffad_ref.detector import Count, Stages, checked
from diffad_ref.gradient_projection import GradientProjectionMemory
from diffad_ref.tools import intervals
from diffad_ref.tools.latents import CachedLatents

QUIET = {"device": "cpu", "progress": False}
ONE = {"steps": 1, "batch_size": 2, **QUIET}


@checked
class Small:
    image_size: Count = 32
    stages: Stages = (da.Stage("all", 4, 2, {"net": da.Rate(1e-2)}),)


class Mean(da.Detector):
    """Rebuilds an image by a blur that it learns."""

    Config = Small

    def __init__(self, config):
        super().__init__(config)
        self.net = nn.Conv2d(3, 3, 5, padding=2)
        self.enter(self.stages[-1])

    def training_loss(self, batch, generator):
        x = batch["image"]
        return {"loss": (self.net(x) - x).square().mean()}

    def judge(self, x, category_index, generator):
        rebuilt = self.net(x).clamp(0, 1)
        gap = (rebuilt - x).abs().mean(1)
        return da.Prediction(gap, gap.flatten(1).amax(1), rebuilt)


@pytest.fixture
def mean():
    torch.manual_seed(0)
    return Mean(Small())


def samples(count=4, dtype=torch.float32, **changes):
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        mask = torch.zeros(1, 32, 32)
        mask[:, 4:9, 4:9] = number % 2
        image = torch.rand(3, 32, 32, generator=generator).to(dtype)
        own = {"image": image, "mask": mask, "label": number % 2, "category": "own"}
        kind = ("good", "hole")[number % 2]
        found.append({k: v for k, v in (own | {"kind": kind} | changes).items() if v is not None})
    return found


@pytest.fixture
def good():
    return samples(label=0, kind="good")


@pytest.fixture
def deco():
    torch.manual_seed(0)
    small = {"width": 8, "heads": 1, "context": 8, "norm_groups": 4, "multipliers": (1, 1)}
    return da.DecoDiff.tiny(32, classes=2, **small)


# ---------------------------------------------------------------------------------------- data sets


def test_a_list_of_samples_is_learned_from_and_judged(mean, good):
    assert len(da.fit(mean, good, **QUIET).rows) == 4
    report = da.evaluate(mean, samples(), progress=False)
    assert report.mean["n_defective"] == 2 and 0 <= report.mean["pixel_ap"] <= 1


def test_images_of_64_bits_are_taken_as_they_are_in_predict(mean, good):
    before = {name: value.clone() for name, value in mean.state_dict().items()}
    da.fit(mean, samples(dtype=torch.float64, label=0), **ONE)
    once = mean.state_dict()["net.weight"].clone()
    mean.load_state_dict(before)
    da.fit(mean, good, **ONE)
    assert torch.equal(mean.state_dict()["net.weight"], once)


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda m: da.fit(m, samples(), **QUIET), "defective images to learn from"),
        (lambda m: da.fit(m, [(torch.rand(3, 32, 32), 0)] * 2, **ONE), "samples are dicts"),
        (lambda m: da.fit(m, samples(image=None, label=0), **ONE), "a sample is a dict with image"),
        (lambda m: da.evaluate(m, samples(kind=None)), "with label, category, kind, not .*'mask'"),
        (lambda m: da.evaluate(m, [(torch.rand(3, 32, 32), 0)]), "a sample is a dict with image"),
        (lambda m: da.evaluate(m, samples(mask=torch.ones(32, 32))), "masks of a batch are"),
    ],
)
def test_what_a_sample_lacks_is_said(mean, use, words):
    with pytest.raises(ValueError, match=words):
        use(mean)


def test_diffusion_ad_says_that_it_must_know_what_is_a_surface(small_config, good):
    detector = da.DiffusionAD(small_config)
    detector.stages = detector.stages[1:2]
    with pytest.raises(ValueError, match="a sample is a dict with texture"):
        da.fit(detector, good, **ONE)


def test_a_data_set_with_a_root_may_have_samples_without_a_path(mean, tmp_path):
    class Own(list):
        root = tmp_path

    report = da.evaluate(mean, Own(samples()), progress=False)
    assert "path" not in report.images
    elsewhere = Own(samples(path="/somewhere/else.png"))
    assert set(da.evaluate(mean, elsewhere, progress=False).images["path"]) == {
        "/somewhere/else.png"
    }


def test_a_folder_called_any_is_no_obstacle(mean, good, tmp_path):
    (tmp_path / "any").mkdir()
    da.fit(mean, good, out=tmp_path, **ONE)
    assert (tmp_path / "training.safetensors").exists()


def test_a_refused_run_leaves_the_names_of_the_classes(mean, mvtec_root, tmp_path):
    data = mean.folder(mvtec_root, "train", categories=["carpet"])
    da.fit(mean, data, out=tmp_path, **ONE)
    with pytest.raises(ValueError, match="holds another run"):
        da.fit(mean, mean.folder(mvtec_root, "train"), out=tmp_path, **ONE)
    assert mean.categories == ("carpet",)


def test_the_test_split_is_not_learned_from(deco, mvtec_root):
    with pytest.raises(ValueError, match="is this the test split"):
        da.fit(deco, deco.folder(mvtec_root, "test"), **ONE)


def test_a_subset_keeps_the_names_of_its_whole(deco, mvtec_root, tmp_path):
    whole = deco.folder(mvtec_root, "train")
    part = Subset(whole, [0, 3])
    da.fit(deco, part, out=tmp_path, **ONE)
    assert deco.categories == ("bottle", "carpet")
    with pytest.raises(ValueError, match="different part"):
        da.fit(deco, Subset(whole, [0, 4]), out=tmp_path, **ONE)
    test = deco.folder(mvtec_root, "test")
    report = da.evaluate(deco, Subset(test, range(len(test))), progress=False)
    assert report.images["path"].str.startswith("bottle/test").any()


def test_classes_keep_their_numbers(deco, mvtec_root):
    da.fit(deco, deco.folder(mvtec_root, "train"), **ONE)
    only = deco.folder(mvtec_root, "train", categories=["carpet"])
    with pytest.raises(ValueError, match="classes are bottle, carpet, in this order"):
        da.fit(deco, only, **ONE)
    only.categories = list(deco.categories)
    da.fit(deco, only, **ONE)
    assert deco.categories == ("bottle", "carpet")


def test_a_model_without_classes_knows_what_it_learned_before(mean, mvtec_root):
    for name in ("carpet", "bottle"):
        da.fit(mean, mean.folder(mvtec_root, "train", categories=[name]), **ONE)
    assert mean.categories == ("carpet", "bottle")
    da.evaluate(mean, mean.folder(mvtec_root, "test"), progress=False)


def test_latents_of_another_codec_are_refused(deco, mvtec_root, tmp_path):
    still = deco.folder(mvtec_root, "train", cache=False)
    deco.prepare(still)
    latents = CachedLatents(still, deco.codec, tmp_path / "latents")
    other = da.DecoDiff(deco.config)
    with pytest.raises(ValueError, match="latents of another codec"):
        da.fit(other, latents, **ONE)
    other.codec.load_state_dict(deco.codec.state_dict())
    da.fit(other, latents, **ONE)


# ---------------------------------------------------------------------------------------- detectors


def test_a_detector_of_ones_own_comes_back_and_goes_on(mean, good, tmp_path):
    da.fit(mean, good, **QUIET)
    loaded = da.load(da.save(mean, tmp_path / "own"))
    assert loaded.config == mean.config
    da.fit(loaded, good, **ONE)


def test_stages_are_those_of_the_config(mean, good):
    two = replace(mean.stages[0], steps=2)
    mean.config = replace(mean.config, stages=(two,))
    assert mean.stages == (two,) and len(da.fit(mean, good, **QUIET).rows) == 2
    mean.stages = [replace(two, steps=3)]
    assert mean.config.stages[0].steps == 3


def test_stages_that_are_none_are_refused():
    config = replace(Small())
    object.__setattr__(config, "stages", (asdict(config.stages[0]),))
    with pytest.raises(ValueError, match="stages must be `Stage`s"):
        Mean(config)


@pytest.mark.parametrize("loss", [torch.tensor(1.0), {"noise": torch.tensor(1.0)}, {"loss": 1.0}])
def test_a_loss_must_be_a_dict_of_scalars(mean, good, monkeypatch, loss):
    monkeypatch.setattr(Mean, "training_loss", lambda *_: loss)
    with pytest.raises(ValueError, match="training_loss gives a dict of scalars"):
        da.fit(mean, good, **ONE)


def test_a_judgement_must_be_a_prediction(mean, monkeypatch):
    monkeypatch.setattr(Mean, "judge", lambda self, x, *_: (x, x))
    with pytest.raises(ValueError, match="judge gives a Prediction, not a tuple"):
        mean.predict(torch.rand(1, 3, 32, 32))


def test_sizes_may_be_given_by_place():
    assert da.DiffusionAD.Config.tiny(96) == da.DiffusionAD.tiny(96).config


def test_the_small_scale_is_below_the_large_one():
    with pytest.raises(ValueError, match="t_s 500 is the small scale"):
        da.DiffusionAD.tiny(t_s=500, t_b=100)


def test_a_task_is_a_list():
    with pytest.raises(ValueError, match="every task needs"):
        check_tasks(["gear", "brick"])


def test_what_cannot_be_protected_is_named(mvtec_root, tmp_path):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ConvTranspose2d(2, 1, 3), nn.LayerNorm(3))
    memory = GradientProjectionMemory(network)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    with pytest.warns(UserWarning, match=r"frozen: 1 \(ConvTranspose2d\)$"):
        memory.protect(optimizer, rest="freeze")
    with pytest.raises(ValueError, match="on_optimizer is what protects"):
        da.fit_continual(Mean(Small()), mvtec_root, [["bottle"]], tmp_path, on_optimizer=print)


# ---------------------------------------------------------------------------------------- intervals


def test_a_difference_is_one_of_pairs_whatever_the_order_of_the_images(mean):
    test = samples(24)
    test = [sample | {"path": f"own/{number}"} for number, sample in enumerate(test)]
    there = da.evaluate(mean, test, progress=False)
    back = da.evaluate(mean, test[::-1], progress=False)
    same = intervals.difference(there, back)
    assert all(abs(value) < 1e-12 for values in same.values() for value in values)
    for fewer in (test[:-2], [sample | {"path": "own/0"} for sample in test]):
        with pytest.raises(ValueError, match="on the same images"):
            intervals.difference(there, da.evaluate(mean, fewer, progress=False))


def test_reports_stand_in_a_table_with_their_intervals(mean):
    report = da.evaluate(mean, samples(24), progress=False)
    table = intervals.table({"mean": report}, draws=50)
    shown = table.frame.loc["mean", "image AUROC"]
    low, high = intervals.intervals(report, draws=50)["image_auroc"]
    assert shown == f"{100 * report.mean['image_auroc']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


# ------------------------------------------------------------------------------- what is left over


def test_a_class_is_a_number_and_no_truth_value(deco):
    with pytest.raises(ValueError, match="expected 2 category indices"):
        deco.predict(torch.rand(2, 3, 32, 32), torch.tensor([True, False]))


def test_weights_that_name_a_category_twice_are_damaged(mean, tmp_path):
    mean.categories = ("gear", "gear")
    with pytest.raises(ValueError, match="a category stands twice"):
        da.load(da.save(mean, tmp_path / "own"))
