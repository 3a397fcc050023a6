"""The command line with DeCo-Diff: classes, cached latents, changed settings, and refusals."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from golden_files import OWN, weights
from PIL import Image
from safetensors.torch import load_file

from diffad_ref.__main__ import main
from diffad_ref.checkpoints import load_checkpoint, read_description
from diffad_ref.data import AnomalyFolder
from diffad_ref.evaluation import evaluate

SETTINGS = ["width=8", "multipliers=[1,2]", "heads=1", "context=8", "norm_groups=4"]
SMALL = [word for setting in SETTINGS for word in ("--set", setting)]
SHORT = ["--image-size", "32", "--steps", "2", "--batch-size", "2", *SMALL]


def command(*words):
    """Run the command line in this process; words may be paths."""
    return main([str(word) for word in words])


def train(data, out, *words):
    return command("train", data, "--method", "DecoDiff", "--out", out, *SHORT, *words)


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail as one fails for people; returns its message."""

    def run(function, *words):
        capsys.readouterr()
        assert function(*words) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said and said.count("diffad_ref: ") == 1
        return said[said.index("diffad_ref: ") :]

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a finished training run on noise, two categories as in `mvtec_root`."""
    root = tmp_path_factory.mktemp("deco_diff")
    rng = np.random.default_rng(0)
    for category in ("bottle", "carpet"):
        folder = root / "data" / category / "train" / "good"
        folder.mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    assert train(root / "data", root / "run") == 0
    return root / "run"


# ------------------------------------------------------------------------------------------- train


def test_trained_detector_has_a_class_for_each_category_and_the_settings_that_were_asked_for(run):
    detector = load_checkpoint(run / "weights", method="DecoDiff")
    assert detector.categories == ("bottle", "carpet") and detector.config.classes == 2
    config = detector.config
    assert (config.image_size, config.width, config.multipliers) == (32, 8, (1, 2))
    assert detector.codec.components.any()
    assert read_description(run / "weights")["record"]["steps"] == 2


def test_setting_inside_another_is_changed_and_its_neighbours_stay(mvtec_root, tmp_path):
    changes = ["--set", "corruption.mask_ratio=[0, 0.3]", "--set", "codec.channels=5"]
    assert train(mvtec_root, tmp_path, *changes) == 0
    config = load_checkpoint(tmp_path / "weights").config
    assert config.corruption.mask_ratio == (0, 0.3)
    assert config.corruption.foreign_ratio == (0.0, 0.3)
    assert (config.codec.channels, config.codec.factor) == (5, 4)


def test_larger_images_are_cropped_as_the_config_says(mvtec_root, tmp_path, capsys):
    assert train(mvtec_root, tmp_path, "--set", "resize=36") == 0
    capsys.readouterr()
    assert command("evaluate", tmp_path / "weights", mvtec_root, "--json") == 0
    printed = json.loads(capsys.readouterr().out)["rows"]
    data = AnomalyFolder(mvtec_root, "test", 36, crop=32)
    expected = evaluate(load_checkpoint(tmp_path / "weights"), data, progress=False)
    assert printed == json.loads(json.dumps(expected.to_dict()))["rows"]


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
    printed = json.loads(capsys.readouterr().out)["rows"]
    data = AnomalyFolder(mvtec_root, "test", 32)
    expected = evaluate(load_checkpoint(run / "weights"), data, progress=False).to_dict()
    assert printed == json.loads(json.dumps(expected))["rows"]


def test_evaluate_with_a_changed_setting_gives_other_numbers(run, mvtec_root, capsys):
    found = []
    for words in ((), ("--set", 'fusion="latent"'), ("--set", "times=[4, 0]")):
        assert command("evaluate", run / "weights", mvtec_root, "--json", *words) == 0
        found.append(json.dumps(json.loads(capsys.readouterr().out)["rows"]))
    assert len(set(found)) == 3


def scores(folder):
    with open(folder / "scores.csv", newline="") as file:
        return [float(row["score"]) for row in csv.DictReader(file)]


def test_predict_judges_images_as_of_the_category_that_is_named(run, mvtec_root, tmp_path):
    images = mvtec_root / "bottle" / "train" / "good"
    data = AnomalyFolder.from_folders(good=images, image_size=32)
    batch = torch.stack([sample["image"] for sample in data])
    for index, category in enumerate(("bottle", "carpet")):
        out = tmp_path / category
        assert (
            command("predict", run / "weights", images, "--out", out, "--category", category) == 0
        )
        expected = load_checkpoint(run / "weights").predict(batch, torch.full((3,), index)).score
        assert scores(out) == pytest.approx(expected.tolist(), abs=2e-6)
    assert scores(tmp_path / "bottle") != scores(tmp_path / "carpet")


def test_predict_without_a_category_asks_for_one_of_those_it_knows(
    run, mvtec_root, tmp_path, fails
):
    words = ["predict", run / "weights", mvtec_root / "bottle" / "test", "--out", tmp_path / "out"]
    message = fails(command, *words)
    assert "say which category" in message and "['bottle', 'carpet']" in message
    message = fails(command, *words, "--category", "gear")
    assert "unknown category 'gear'; known: bottle, carpet" in message
    assert not (tmp_path / "out" / "scores.csv").exists()


def test_evaluate_of_a_category_that_was_not_trained_is_refused(run, mvtec_root, fails):
    (mvtec_root / "carpet").rename(mvtec_root / "gear")
    message = fails(command, "evaluate", run / "weights", mvtec_root)
    assert "never saw ['gear']; it knows ['bottle', 'carpet']" in message


# ----------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("wheels=4", "Config has no setting wheels"),
        ("codec.wheels=4", "CodecConfig has no setting wheels"),
        ("wheels.count=4", "there are no settings under 'wheels'"),
        ("width.count=4", "there are no settings under 'width'"),
        ("stages.0.steps=4", "there are no settings under 'stages'"),
        ("dropout", "--set dropout: expected NAME=VALUE, value as JSON"),
        ("dropout=", "--set dropout=: expected NAME=VALUE, value as JSON"),
        ("fusion=latent", "--set fusion=latent: expected NAME=VALUE, value as JSON"),
        ('width="wide"', "expected int, got 'wide'"),
        ("multipliers=2", "--set .*multipliers=2: "),
        ("codec=2", "--set .*codec=2: "),
        ("codec.channels=0", "has 1 to 48 components"),
        ('codec.kind="jpeg"', "unknown codec 'jpeg'"),
        ("resize=34", "34 pixels does not divide into latent cells"),
    ],
)
def test_setting_that_makes_no_sense_is_answered_in_words(
    mvtec_root, tmp_path, fails, setting, words
):
    assert re.search(words, fails(train, mvtec_root, tmp_path / "out", "--set", setting))
    assert not (tmp_path / "out" / "weights.safetensors").exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("times=[2,4]", "must fall"),
        ("times=[10]", "must fall"),
        ('fusion="sum"', "unknown fusion"),
        ("codec.channels=5", "with --set"),  # other weights would be needed
    ],
)
def test_setting_of_an_evaluation_that_makes_no_sense_is_refused(
    run, mvtec_root, fails, setting, words
):
    assert words in fails(command, "evaluate", run / "weights", mvtec_root, "--set", setting)


def test_record_of_weights_under_other_settings_is_refused(run, mvtec_root, fails):
    before = (run / "weights.json").read_bytes()
    words = ["evaluate", run / "weights", mvtec_root, "--record", "--set", 'fusion="latent"']
    assert "--record is for the weights as they are" in fails(command, *words)
    assert (run / "weights.json").read_bytes() == before


@pytest.mark.parametrize("words", [["--record"], ["--set", "times=[4, 0]"]])
def test_baselines_have_neither_settings_nor_a_record(mvtec_root, fails, words):
    message = fails(command, "evaluate", "template", mvtec_root, *words)
    assert "--set, --with and --record are for weights" in message


def test_latents_of_another_codec_are_refused(mvtec_root, tmp_path, fails):
    path = tmp_path / "latents.safetensors"
    assert train(mvtec_root, tmp_path / "a", "--latents", path) == 0
    changes = ["--latents", path, "--set", "codec.channels=5"]
    message = fails(train, mvtec_root, tmp_path / "b", *changes)
    assert f"{path} holds latents of other codec weights; delete it" in message
    message = fails(train, mvtec_root, tmp_path / "c", "--latents", path, "--categories", "carpet")
    assert "holds latents of other codec weights and images; delete it" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--textures", "folder"], "--textures is not for DecoDiff"),
        (["--no-reconstruction"], "DecoDiff is nothing without its reconstruction"),
        (["--imagenet", "nothing.ckpt"], "there is no checkpoint nothing.ckpt"),
    ],
)
def test_option_that_does_not_fit_the_method_is_refused(
    mvtec_root, tmp_path, fails, words, message
):
    assert message in fails(train, mvtec_root, tmp_path / "out", *words)


@pytest.mark.parametrize("option", ["latents", "imagenet"])
def test_option_of_deco_diff_is_refused_for_another_method(mvtec_root, tmp_path, fails, option):
    words = ["train", mvtec_root, "--out", tmp_path / "out", f"--{option}", tmp_path / "file"]
    assert f"--{option} is not for DiffusionAD" in fails(command, *words)


# ---------------------------------------------------------------------------------- light and grid


def test_weights_that_see_in_equal_light_say_so_and_can_be_judged_with_more_spins(
    mvtec_root, tmp_path
):
    assert train(mvtec_root, tmp_path, "--set", "codec.adapted=true") == 0
    detector = load_checkpoint(tmp_path / "weights")
    assert detector.config.codec.adapted and detector.config.spins == 1
    x, index = 0.2 + 0.6 * torch.rand(1, 3, 32, 32), torch.tensor([0])
    bright, dim = (detector.predict(light * x, index) for light in (1, 0.5))
    assert torch.allclose(bright.anomaly_map, dim.anomaly_map, atol=1e-3)
    report = tmp_path / "report.json"
    words = ["evaluate", tmp_path / "weights", mvtec_root, "--set", "spins=2", "--save", report]
    assert command(*words) == 0 and json.loads(report.read_text())["report"]["mean"]


def test_number_of_spins_that_does_not_divide_a_cell_is_refused(run, fails, mvtec_root):
    words = ["evaluate", run / "weights", mvtec_root, "--set", "spins=3"]
    assert "a cell of 4 pixels does not divide into spins=3 places" in fails(command, *words)


def test_adapting_is_an_option_of_baselines_and_a_setting_of_weights(run, fails, mvtec_root):
    assert command("evaluate", "PCA", mvtec_root, "--image-size", 32, "--adapt") == 0
    assert command("evaluate", "PCA", mvtec_root, "--image-size", 32, "--masking", 0.1) == 0
    for words in (["--adapt"], ["--masking", 0.1]):
        said = fails(command, "evaluate", run / "weights", mvtec_root, *words)
        assert "--adapt and --masking are for template and PCA" in said
