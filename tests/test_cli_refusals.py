"""The command line, when the input is at fault: exit status 2 and one message, no traceback."""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from diffad_ref import DiffusionAD, OneForMore, evaluation
from diffad_ref.__main__ import main
from diffad_ref.checkpoints import read_description, save
from diffad_ref.tools import reproduce
from diffad_ref.training import STATE

SETTINGS = ["width=8", "norm_groups=4", "multipliers=[1,1]", "attention_levels=[1]", "heads=2"]
SMALL = [word for setting in SETTINGS for word in ("--set", setting)]
SHORT = ["--image-size", "32", "--steps", "2", "--batch-size", "2", *SMALL]


def command(*words):
    """Run the command line in this process; words may be paths."""
    return main([str(word) for word in words])


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def weights(small_config, tmp_path):
    """An untrained detector on disk that knows the categories of `mvtec_root`."""
    detector = DiffusionAD(small_config)
    detector.categories = ("bottle", "carpet")
    return save(detector, tmp_path / "weights")


@pytest.fixture(scope="module")
def trained(noise_root, tmp_path_factory):
    """Folder of a finished training run."""
    out = tmp_path_factory.mktemp("trained")
    assert command("train", noise_root, "--out", out, *SHORT) == 0
    return out


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of it that a test may spoil."""
    return shutil.copytree(trained, tmp_path / "run")


# --------------------------------------------------------------------------------- refused: folders

ON_DATA = ["data", "train", "evaluate"]


@pytest.fixture
def words(weights, tmp_path):
    """A command with everything that it needs but the data set's folder, which comes last."""
    return {
        "data": ["data"],
        "train": ["train", "--out", tmp_path / "out", *SHORT],
        "evaluate": ["evaluate", weights],
        "predict": ["predict", weights, "--out", tmp_path / "out"],
    }


@pytest.mark.parametrize("name", [*ON_DATA, "predict"])
def test_wrong_root_is_named_with_what_is_there_instead(words, fails, mvtec_root, tmp_path, name):
    message = fails(*words[name], mvtec_root.parent / "mvtek")
    assert f"no folder {mvtec_root.parent / 'mvtek'}" in message
    assert "holds: mvtec/" in message
    assert not (tmp_path / "out" / "scores.csv").exists()


@pytest.mark.parametrize("name", ON_DATA)
def test_folder_without_the_layout_is_told_the_layout(words, fails, mvtec_root, name):
    message = fails(*words[name], mvtec_root / "bottle" / "train")
    assert "no category" in message and "<category>/" in message and "holds: good/" in message


@pytest.mark.parametrize("name", ON_DATA)
def test_empty_category_is_named(words, fails, mvtec_root, name):
    folder = mvtec_root / "carpet" / ("test" if name == "evaluate" else "train/good")
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        path.unlink()
    message = fails(*words[name], mvtec_root)
    assert "category 'carpet' is empty" in message


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_unknown_category_is_answered_with_the_known_ones(words, fails, mvtec_root, name):
    message = fails(*words[name], mvtec_root, "--categories", "bottle", "apple")
    assert "unknown categories ['apple']" in message and "known: bottle, carpet" in message


def test_category_that_the_detector_never_saw_is_named(words, fails, mvtec_root):
    (mvtec_root / "carpet").rename(mvtec_root / "apple")
    message = fails(*words["evaluate"], mvtec_root)
    assert "never saw ['apple']; it knows ['bottle', 'carpet']" in message


@pytest.mark.parametrize("name", ["train", "evaluate", "predict"])
def test_truncated_image_is_named(words, fails, mvtec_root, tmp_path, name):
    folder = mvtec_root / "bottle" / ("train/good" if name == "train" else "test/crack")
    paths = sorted(folder.iterdir())
    for path in paths:  # a short training need not come to every one
        truncate(path)
    message = fails(
        *words[name], mvtec_root / "bottle" / "test" if name == "predict" else mvtec_root
    )
    assert any(f"cannot read the image {path}" in message for path in paths)
    assert not (tmp_path / "out" / "scores.csv").exists()
    assert not (tmp_path / "out" / "weights.safetensors").exists()


def test_what_a_loading_process_says_is_said_without_its_history(
    words, fails, mvtec_root, monkeypatch
):
    (path, *_) = sorted((mvtec_root / "bottle" / "test" / "crack").iterdir())
    truncate(path)
    monkeypatch.setattr(evaluation, "loading", lambda device: {"num_workers": 1})  # as for a GPU
    assert fails(*words["evaluate"], mvtec_root).startswith(
        f"diffad_ref: cannot read the image {path}"
    )


def test_evaluation_needs_good_and_defective_images(words, fails, mvtec_root):
    shutil.rmtree(mvtec_root / "carpet" / "test" / "cut")
    message = fails(*words["evaluate"], mvtec_root, "--categories", "carpet")
    assert "no defective image" in message


def test_file_that_is_no_image_is_not_predicted(words, fails, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    assert "notes.txt" in fails(*words["predict"], tmp_path / "notes.txt")


@pytest.mark.parametrize("name", ["train", "predict"])
def test_file_where_the_output_folder_should_be_is_named(words, fails, mvtec_root, tmp_path, name):
    (tmp_path / "out").write_text("in the way")
    data = mvtec_root / "bottle" / "train" / "good" if name == "predict" else mvtec_root
    assert str(tmp_path / "out") in fails(*words[name], data)
    assert (tmp_path / "out").read_text() == "in the way"


# --------------------------------------------------------------------------------- refused: weights


@pytest.fixture(params=["evaluate", "predict"])
def judge(request, fails, mvtec_root, tmp_path):
    """Runs either command that reads weights and expects it to fail; returns the message."""

    def run(weights):
        if request.param == "evaluate":
            return fails("evaluate", weights, mvtec_root, "--record")
        return fails("predict", weights, mvtec_root / "bottle/test", "--out", tmp_path / "out")

    return run


def test_missing_weights_are_named(judge, tmp_path):
    assert f"{tmp_path / 'nothing.json'} is missing" in judge(tmp_path / "nothing")


def test_weights_without_their_description_are_named(judge, weights):
    weights.with_suffix(".json").unlink()
    assert "weights.json is missing" in judge(weights)


SAID = {".safetensors": "damaged", ".json": "damaged, or of another kind"}


@pytest.mark.parametrize("suffix", SAID)
def test_damaged_checkpoint_is_named(judge, weights, suffix):
    truncate(weights.with_suffix(suffix))
    assert f"weights{suffix} is {SAID[suffix]}" in judge(weights)


def test_checkpoint_of_another_method_is_named_with_the_known_ones(judge, weights):
    path = weights.with_suffix(".json")
    path.write_text(json.dumps({**read_description(path), "method": "PatchCore"}))
    message = judge(weights)
    assert "holds 'PatchCore'; of methods, only " in message and "DiffusionAD, " in message


def test_weights_of_another_network_are_refused(judge, weights, small_config):
    other = save(DiffusionAD(replace(small_config, width=16)), weights.with_name("other"))
    other.replace(weights)
    assert "do not fit" in judge(weights)


def test_folder_of_another_run_is_refused_and_left_alone(fails, finished, noise_root):
    files = [finished / name for name in ("weights.safetensors", "weights.json", STATE)]
    before = [path.read_bytes() for path in files]
    words = ["train", noise_root, "--out", finished, *SHORT, "--seed", 4]
    assert "holds another run (different seed)" in fails(*words)
    assert [path.read_bytes() for path in files] == before


def test_damaged_state_of_a_run_is_named(fails, finished, noise_root):
    truncate(finished / STATE)
    assert f"{STATE} is damaged" in fails("train", noise_root, "--out", finished, *SHORT)


# ---------------------------------------------------------------------------------- refused: words


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["paint"],
        ["train", "folder"],
        ["evaluate", "weights"],
        ["train", "folder", "--out", "x", "--method", "PatchCore"],
        ["train", "folder", "--out", "x", "--steps", "many"],
    ],
    ids=" ".join,
)
def test_words_that_make_no_command_are_answered_with_where_the_words_stand(words, capsys):
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert "python -m diffad_ref" in said and "--help" in said and "Traceback" not in said


@pytest.mark.parametrize(
    "name", ["", *"data train continual evaluate compare plan predict".split()]
)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as error:
        main([*filter(None, [name]), "--help"])
    assert error.value.code == 0
    assert f"usage: python -m diffad_ref {name}".strip() in capsys.readouterr().out


# -------------------------------------------------------------------------- a GPU that is too small


@pytest.fixture
def full_card(monkeypatch):
    """No step and no prediction finds room, on a card of 3 GB; what is only planned takes none."""

    def full(method):
        def run(self, x, *others):
            images = x["image"] if isinstance(x, dict) else x
            if images.is_meta or isinstance(images, FakeTensor):
                return method(self, x, *others)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

        return run

    card = SimpleNamespace(total_memory=3 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    for kind in (DiffusionAD, OneForMore):
        for name in ("training_loss", "judge"):
            monkeypatch.setattr(kind, name, full(getattr(kind, name)))


def test_a_training_says_how_many_images_the_card_holds(words, fails, mvtec_root, full_card):
    message = fails(*words["train"], mvtec_root, "--batch-size", "4096")
    assert "4096 images at a time do not fit into 3 GiB" in message
    count = int(re.search(r"By its size, a step has room for at most (\d+) images", message)[1])
    assert 200 < count < 4096


def test_a_card_that_holds_no_image_is_told_so(words, fails, mvtec_root, full_card, monkeypatch):
    tiny = SimpleNamespace(total_memory=2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: tiny)
    assert "room for not even one image" in fails(*words["train"], mvtec_root)


def test_so_does_a_continual_run(fails, mvtec_root, tmp_path, full_card):
    continual = "continual", mvtec_root, "--tasks", "bottle", "carpet", "--image-size", "32"
    message = fails(*continual, "--set", "start=null", "--steps", "2", "--out", tmp_path / "c")
    assert "do not fit into 3 GiB" in message and "room for at most " in message


def test_so_does_a_reproduction(fails, mvtec_root, tmp_path, full_card, monkeypatch):
    monkeypatch.setattr(reproduce, "IMAGES", {})
    monkeypatch.setattr(reproduce, "TESTED", {})
    paper = "reproduce", "diffusion_ad", "mvtec", "--data", mvtec_root, "--only", "bottle"
    way = "--profile", "tiny", "--image-size", "32", "--set", "width=8", "--set", "norm_groups=4"
    message = fails(*paper, *way, "--set", "multipliers=[1,1,1]", "--out", tmp_path / "r")
    assert "do not fit into 3 GiB" in message and "room for at most " in message


def test_a_prediction_says_what_helps(words, fails, mvtec_root, full_card):
    message = fails(*words["evaluate"], mvtec_root)
    assert "the GPU's memory is too small" in message and "--batch-size" in message
