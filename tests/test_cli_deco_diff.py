"""The command line with DeCo-Diff: classes, cached latents, changed settings, and refusals."""

import csv
import json
import re

import pytest
import torch
from golden_files import OWN, weights
from safetensors.torch import load_file

from diffad_ref.__main__ import main
from diffad_ref.checkpoints import load, read_description
from diffad_ref.data import AnomalyFolder
from diffad_ref.evaluation import evaluate
from diffad_ref.tools import tables

pytestmark = pytest.mark.usefixtures("few_draws")

SETTINGS = ["width=8", "multipliers=[1,2]", "heads=1", "context=8", "norm_groups=4", "times=[5,1]"]
SMALL = [word for setting in SETTINGS for word in ("--set", setting)]
SHORT = ["--image-size", "32", "--steps", "2", "--batch-size", "2", *SMALL]


def command(*words):
    """Run the command line in this process; words may be paths."""
    return main([str(word) for word in words])


def to_train(data, out, *words):
    return ["train", data, "--method", "DecoDiff", "--out", out, *SHORT, *words]


def train(data, out, *words):
    return command(*to_train(data, out, *words))


@pytest.fixture(scope="module")
def run(noise_root, tmp_path_factory):
    """Folder of a finished training run on noise."""
    out = tmp_path_factory.mktemp("run")
    assert train(noise_root, out) == 0
    return out


@pytest.fixture(scope="module")
def cropped(noise_root, tmp_path_factory):
    """Weights of a detector that sees the middle 32 pixels of 36."""
    out = tmp_path_factory.mktemp("cropped")
    assert train(noise_root, out, "--set", "resize=36") == 0
    return out / "weights"


# ------------------------------------------------------------------------------------------- train


def test_trained_detector_has_a_class_for_each_category_and_the_settings_that_were_asked_for(run):
    detector = load(run / "weights", method="DecoDiff")
    assert detector.categories == ("bottle", "carpet") and detector.config.classes == 2
    config = detector.config
    assert (config.image_size, config.width, config.multipliers) == (32, 8, (1, 2))
    assert detector.codec.components.any()
    assert read_description(run / "weights")["record"]["steps"] == 2


def test_setting_inside_another_is_changed_and_its_neighbours_stay(mvtec_root, tmp_path):
    changes = ["--set", "corruption.mask_ratio=[0, 0.3]", "--set", "codec.channels=5"]
    assert train(mvtec_root, tmp_path, *changes) == 0
    config = load(tmp_path / "weights").config
    assert config.corruption.mask_ratio == (0, 0.3)
    assert config.corruption.foreign_ratio == (0.0, 0.3)
    assert (config.codec.channels, config.codec.factor) == (5, 4)


def test_larger_images_are_cropped_as_the_config_says(cropped, mvtec_root, capsys):
    assert command("evaluate", cropped, mvtec_root, "--json") == 0
    printed = json.loads(capsys.readouterr().out)["table"]
    data = AnomalyFolder(mvtec_root, "test", 36, crop=32)
    expected = evaluate(load(cropped), data, progress=False)
    assert printed == tables.to_plain(expected)["table"]


def test_one_image_and_its_folder_are_cropped_alike(cropped, mvtec_root, tmp_path):
    images, found = mvtec_root / "bottle" / "test" / "good", []
    for place in (images, sorted(images.iterdir())[0]):
        words = ["--category", "bottle", "--out", tmp_path, "--batch-size", 1]
        assert command("predict", cropped, place, *words) == 0
        found.append(scores(tmp_path)[0])
    assert found[0] == found[1]


def test_latents_are_computed_in_the_first_run_and_used_in_the_second(mvtec_root, tmp_path):
    path, states = tmp_path / "kept" / "latents.safetensors", []
    for name in ("first", "second"):
        assert train(mvtec_root, tmp_path / name, "--latents", path) == 0
        states.append((path.read_bytes(), load_file(tmp_path / name / "weights.safetensors")))
    (file, first), (same_file, second) = states
    assert file == same_file and load_file(path)["posterior"].shape == (6, 24, 8, 8)
    assert all(torch.equal(first[name], second[name]) for name in first)
    record = read_description(tmp_path / "first" / "weights")["record"]
    assert record["data"]["images"] == 6


def test_start_from_imagenet_says_which_weights_stay_random(mvtec_root, tmp_path, capsys):
    """The recorded network has width 32, tokens of 24 and latents of 4 channels; ours have 12."""
    unet = {f"model.diffusion_model.{k}": v for k, v in weights("deco_2e_unet_b", OWN).items()}
    torch.save({"state_dict": unet}, tmp_path / "imagenet.ckpt")
    like_it = ["width=32", "heads=2", "context=24", "norm_groups=32"]
    words = [word for setting in like_it for word in ("--set", setting)]
    out = tmp_path / "out"
    assert train(mvtec_root, out, *words, "--imagenet", tmp_path / "imagenet.ckpt") == 0
    [line] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("not in ")]
    kept = "embedding.weight, unet.conv_in.weight, unet.conv_out.bias, unet.conv_out.weight"
    assert line.endswith(f"imagenet.ckpt, or of another shape: {kept}")


# --------------------------------------------------------------------------- evaluate and predict


def test_evaluate_gives_the_report_of_the_library(run, mvtec_root, capsys):
    assert command("evaluate", run / "weights", mvtec_root, "--json") == 0
    printed = json.loads(capsys.readouterr().out)["table"]
    data = AnomalyFolder(mvtec_root, "test", 32)
    expected = evaluate(load(run / "weights"), data, progress=False)
    assert printed == tables.to_plain(expected)["table"]


def test_evaluate_with_a_changed_setting_gives_other_numbers(run, mvtec_root, capsys):
    found = []
    for words in ((), ("--set", 'fusion="latent"'), ("--set", "times=[4, 0]")):
        assert command("evaluate", run / "weights", mvtec_root, "--json", *words) == 0
        found.append(json.dumps(json.loads(capsys.readouterr().out)["table"]))
    assert len(set(found)) == 3


def scores(folder):
    with open(folder / "scores.csv", newline="") as file:
        return [float(row["score"]) for row in csv.DictReader(file)]


def test_predict_judges_images_as_of_the_category_that_is_named(run, mvtec_root, tmp_path):
    images = mvtec_root / "bottle" / "train" / "good"
    data = AnomalyFolder.from_folders(test=images, image_size=32)
    batch = torch.stack([sample["image"] for sample in data])
    for index, category in enumerate(("bottle", "carpet")):
        out = tmp_path / category
        assert (
            command("predict", run / "weights", images, "--out", out, "--category", category) == 0
        )
        expected = load(run / "weights").predict(batch, torch.full((3,), index)).score
        assert scores(out) == pytest.approx(expected.tolist(), abs=2e-6)
    assert scores(tmp_path / "bottle") != scores(tmp_path / "carpet")


def test_predict_without_a_category_asks_for_one_of_those_it_knows(
    run, mvtec_root, tmp_path, fails
):
    words = ["predict", run / "weights", mvtec_root / "bottle" / "test", "--out", tmp_path / "out"]
    message = fails(*words)
    assert "say which category" in message and "['bottle', 'carpet']" in message
    message = fails(*words, "--category", "gear")
    assert "unknown category 'gear'; known: bottle, carpet" in message
    assert not (tmp_path / "out" / "scores.csv").exists()


def test_evaluate_of_a_category_that_was_not_trained_is_refused(run, mvtec_root, fails):
    (mvtec_root / "carpet").rename(mvtec_root / "gear")
    message = fails("evaluate", run / "weights", mvtec_root)
    assert "never saw ['gear']; it knows ['bottle', 'carpet']" in message


# ----------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("wheels=4", "--set .*wheels: Unexpected keyword"),
        ("codec.wheels=4", "--set .*codec.wheels: Unexpected keyword"),
        ("wheels.count=4", "there are no settings under 'wheels'"),
        ("width.count=4", "there are no settings under 'width'"),
        ("stages.0.steps=4", "there are no settings under 'stages'"),
        ("dropout", "--set dropout: expected NAME=VALUE, value as JSON"),
        ("dropout=", "--set dropout=: expected NAME=VALUE, value as JSON"),
        ("fusion=latent", "--set fusion=latent: expected NAME=VALUE, value as JSON"),
        ('width="wide"', "width: Input should be a valid integer, not 'wide'"),
        ("multipliers=2", "--set .*multipliers=2: "),
        ("codec=2", "--set .*codec=2: "),
        ("codec.channels=0", "channels: Input should be greater than or equal to 1, not 0"),
        ('codec.kind="jpeg"', "kind: Input should be 'kl' or 'pca', not 'jpeg'"),
        ("resize=34", "divide into cells of 4 pixels"),
    ],
)
def test_setting_that_makes_no_sense_is_answered_in_words(
    noise_root, tmp_path, fails, setting, words
):
    assert re.search(words, fails(*to_train(noise_root, tmp_path / "out", "--set", setting)))
    assert not (tmp_path / "out" / "weights.safetensors").exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("times=[2,4]", "must fall"),
        ("times=[10]", "must fall"),
        ('fusion="sum"', "fusion: Input should be 'geometric'"),
        ("codec.channels=5", "with --set"),  # other weights would be needed
    ],
)
def test_setting_of_an_evaluation_that_makes_no_sense_is_refused(
    run, mvtec_root, fails, setting, words
):
    assert words in fails("evaluate", run / "weights", mvtec_root, "--set", setting)


def test_record_of_weights_under_other_settings_is_refused(run, mvtec_root, fails):
    before = (run / "weights.json").read_bytes()
    words = ["evaluate", run / "weights", mvtec_root, "--record", "--set", 'fusion="latent"']
    assert "--record is for the weights as they are" in fails(*words)
    assert (run / "weights.json").read_bytes() == before


@pytest.mark.parametrize("words", [["--record"], ["--set", "times=[4, 0]"]])
def test_baselines_have_neither_settings_nor_a_record(mvtec_root, fails, words):
    message = fails("evaluate", "template", mvtec_root, *words)
    assert "--set and --record are for weights" in message


def test_latents_of_another_codec_are_refused(mvtec_root, tmp_path, fails):
    path = tmp_path / "latents.safetensors"
    assert train(mvtec_root, tmp_path / "a", "--latents", path) == 0
    changes = ["--latents", path, "--set", "codec.channels=5"]
    message = fails(*to_train(mvtec_root, tmp_path / "b", *changes))
    assert f"{path} holds latents of other codec weights; delete it" in message
    words = ["--latents", path, "--categories", "carpet"]
    message = fails(*to_train(mvtec_root, tmp_path / "c", *words))
    assert "holds latents of other codec weights and images; delete it" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--textures", "folder"], "--textures is not for DecoDiff"),
        (["--no-reconstruction"], "--no-reconstruction is not for DecoDiff"),
        (["--imagenet", "nothing.ckpt"], "there is no checkpoint nothing.ckpt"),
    ],
)
def test_option_that_does_not_fit_the_method_is_refused(
    mvtec_root, tmp_path, fails, words, message
):
    assert message in fails(*to_train(mvtec_root, tmp_path / "out", *words))


@pytest.mark.parametrize("option", ["latents", "imagenet"])
def test_option_of_deco_diff_is_refused_for_another_method(mvtec_root, tmp_path, fails, option):
    words = ["train", mvtec_root, "--out", tmp_path / "out", f"--{option}", tmp_path / "file"]
    assert f"--{option} is not for DiffusionAD" in fails(*words)
