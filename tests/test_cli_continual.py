"""The command line task by task: tables, runs that break off, refusals; and One-for-More."""

import csv
import json
import re

import pytest
import torch
from safetensors.torch import load_file

import diffad_ref
from diffad_ref import continual
from diffad_ref.__main__ import main
from diffad_ref.checkpoints import load, read_description, read_metadata
from diffad_ref.continual import Continual
from diffad_ref.data import AnomalyFolder
from diffad_ref.deco_diff import DecoDiff
from diffad_ref.evaluation import evaluate
from diffad_ref.one_for_more import OneForMore
from diffad_ref.tools import photographs, tables
from diffad_ref.tools.protocols import ORDERS
from diffad_ref.tools.toy import toy_factory

SHORT = ["--image-size", "32", "--steps", "2", "--batch-size", "2", "--save-every", "1"]
SETTINGS = ["start=null", "width=8", "norm_groups=4", "window=[3,3]", "feed_forward=16"]
SETTINGS += ["condition_layers=1", "walk=2"]
SMALL = [word for setting in SETTINGS for word in ("--set", setting)]
DECO = ["width=8", "multipliers=[1,2]", "heads=1", "context=8", "norm_groups=4", "times=[4,0]"]
SMALL_DECO = [word for setting in DECO for word in ("--set", setting)]
METRICS = ("image AUROC", "pixel AUROC", "pixel AP")

pytestmark = [
    pytest.mark.usefixtures("few_draws"),
    pytest.mark.filterwarnings("ignore:no direction is left"),  # small layers fill up
]


def command(*words):
    """Run the command line in this process; words may be paths."""
    return main([str(word) for word in words])


def to_learn(root, out, *words, tasks=("gear", "brick")):
    return ["continual", root, "--out", out, "--tasks", *tasks, *SHORT, *SMALL, *words]


def learn(root, out, *words, **settings):
    return command(*to_learn(root, out, *words, **settings))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A small toy: four images to learn from in each category."""
    settings = {"size": 32, "n_train": 4, "n_good": 1, "n_per_kind": 1, "progress": False}
    return toy_factory(tmp_path_factory.mktemp("toy"), **settings)


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """Folder of a finished continual run, its results in `results.json`."""
    out = tmp_path_factory.mktemp("run")
    assert learn(root, out, "--save", out / "results.json") == 0
    return out


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """Weights of One-for-More, trained in the plain way on two categories."""
    out = tmp_path_factory.mktemp("trained")
    words = ["--categories", "brick", "gear", *SHORT, *SMALL]
    assert command("train", root, "--method", "OneForMore", "--out", out, *words) == 0
    return out / "weights"


# -------------------------------------------------------------------------------------- continual


def test_tables_of_three_metrics_and_a_summary_are_printed(root, run, capsys):
    assert learn(root, run) == 0  # again: nothing is trained, and everything printed
    said = capsys.readouterr().out
    for metric in METRICS:
        table = said[re.search(rf"^{metric}\n\n\| category +\| +after", said, re.M).start() :]
        gear, brick = table.splitlines()[4:6]
        assert re.fullmatch(r"\| gear +\| +\d+\.\d \| +\d+\.\d \|", gear)
        assert re.fullmatch(r"\| brick +\| +\| +\d+\.\d \|", brick)
    assert re.search(r"\| training +\| +A image AUROC .* \| +FM loss \| +memory \|", said)
    assert said.splitlines()[-1].startswith("| update ")


def test_saved_results_can_be_read_and_say_how_they_came_to_be(run):
    record = json.loads((run / "results.json").read_text())
    result = Continual(**record["continual"])
    assert result.tasks == [["gear"], ["brick"]] and len(result.rows) == 3
    assert result.forgetting("loss") == pytest.approx(
        result.rows[1]["loss"] - result.rows[0]["loss"]
    )
    assert record["gamma"] == OneForMore.Config.tiny().gamma and "torch" in record["versions"]
    [said] = record["commands"]
    assert said.startswith("python -m diffad_ref continual ") and "--tasks gear brick" in said


def test_rows_are_those_that_evaluate_finds_with_the_detector_of_the_last_task(root, run):
    """But for half precision, in which the weights are kept."""
    record = json.loads((run / "results.json").read_text())["continual"]
    detector = load(run / "task_2" / "weights", method="OneForMore")
    assert detector.categories == ("gear", "brick")
    for row in record["rows"][1:]:
        data = AnomalyFolder(root, "test", 32, categories=[row["category"]])
        found = evaluate(detector, data, progress=False).table.loc[row["category"]]
        assert found["pixel_auroc"] == pytest.approx(row["pixel_auroc"], abs=0.02)


@pytest.mark.parametrize("name", ["mvtec 3x5", "toy"])
def test_order_by_its_name_and_what_is_set_reach_the_training(monkeypatch, tmp_path, name):
    asked = {}

    def fit(detector, root, tasks, out, **settings):
        asked.update(settings, tasks=tasks, out=out, detector=type(detector))
        raise ValueError("enough")

    monkeypatch.setattr(diffad_ref, "fit_continual", fit)
    words = ["--protection", "frozen", "--gamma", "0.5", "--every", "10"]
    assert (
        command("continual", tmp_path, "--out", tmp_path, "--order", name, *words, *SHORT, *SMALL)
        == 2
    )
    expected = {"protection": "frozen", "gamma": 0.5, "every": 10}
    expected |= {
        "steps": 2,
        "save_every": 1,
        "tasks": ORDERS[name],
        "out": tmp_path,
        "detector": OneForMore,
    }
    assert {name: asked[name] for name in expected} == expected


def test_categories_of_a_task_are_divided_by_commas(monkeypatch, root, tmp_path):
    tasks = []
    fit = lambda detector, root, asked, out, **settings: tasks.extend(asked) or 1 / 0  # noqa: E731
    monkeypatch.setattr(diffad_ref, "fit_continual", fit)
    with pytest.raises(ZeroDivisionError):
        learn(root, tmp_path, tasks=("gear,brick", "grass"))
    assert tasks == [["gear", "brick"], ["grass"]]


def test_later_tasks_learn_at_the_share_of_the_rate_and_for_the_steps_that_are_asked_for(
    root, tmp_path
):
    words = ["--protection", "none", "--later-rate", "0.25", "--later-steps", "1"]
    assert learn(root, tmp_path, *words) == 0
    peaks, steps = [], []
    for task in ("task_1", "task_2"):
        state = json.loads(read_metadata(tmp_path / task / "training.safetensors")["state"])
        [stage] = state["identity"]["stages"]
        peaks.append({name: rate["peak"] for name, rate in stage["lr"].items()})
        steps.append(stage["steps"])
    assert peaks[1] == {name: peak / 4 for name, peak in peaks[0].items()} and steps == [2, 1]


# ---------------------------------------------------------------------- broken off, and continued


class Killed(BaseException):
    """What no handler catches."""


def stop_at(patch, owner, name, call, counts=lambda first: True):
    """Make a function raise at its n-th call, counted from 1."""
    real, calls = getattr(owner, name), []

    def stopping(*words, **settings):
        if counts(words[0]):
            calls.append(name)
            if len(calls) == call:
                raise Killed
        return real(*words, **settings)

    patch.setattr(owner, name, stopping)


def test_run_that_broke_off_goes_on_to_the_results_of_an_unbroken_one(root, run, tmp_path):
    """Inside the first task, then inside the second, then before the last results."""
    stops = [(OneForMore, "training_loss", 2), (OneForMore, "training_loss", 3)]
    for owner, name, call in [*stops, (continual, "judge", 1)]:
        learning = (lambda first: first.training) if owner is OneForMore else lambda first: True
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, owner, name, call, learning)
            with pytest.raises(Killed):
                learn(root, tmp_path)
        second = call != 2
        assert (tmp_path / "task_1" / "result.json").exists() == second
        assert (tmp_path / "task_2" / "training.safetensors").exists() == second
        assert not (tmp_path / "task_2" / "result.json").exists()
    assert learn(root, tmp_path, "--save", tmp_path / "results.json") == 0
    same_runs(tmp_path, run)
    saved = [json.loads((f / "results.json").read_text())["continual"] for f in (tmp_path, run)]
    assert saved[0] == saved[1]


def same_runs(*folders):
    """Bit for bit, with all that is kept after each task."""
    for task in ("task_1", "task_2"):
        first, second = ((folder / task / "result.json").read_text() for folder in folders)
        assert first == second
        for file in ("training", "weights", "memory"):
            first, second = (load_file(f / task / f"{file}.safetensors") for f in folders)
            assert first.keys() == second.keys()
            assert all(torch.equal(value, second[name]) for name, value in first.items()), file


def test_run_to_which_a_task_is_added_goes_on_as_if_it_had_been_there(root, run, tmp_path):
    assert learn(root, tmp_path, tasks=("gear",)) == 0
    assert not (tmp_path / "task_2").exists()
    assert learn(root, tmp_path) == 0
    same_runs(tmp_path, run)


def test_finished_run_is_loaded_and_not_trained_again(root, run, monkeypatch):
    stop_at(monkeypatch, continual, "fit", 1)
    assert learn(root, run) == 0


@pytest.mark.parametrize(
    ("words", "different"),
    [
        (["--gamma", "0.5"], "gamma"),
        (["--protection", "frozen"], "protection"),
        (["--every", "2"], "every"),
        (["--protection", "none", "--gamma", "0.5"], "gamma, protection"),
        (["--steps", "3"], "steps"),
        (["--seed", "1"], "seed"),
        (["--set", "walk=5"], "config.walk"),
    ],
)
def test_folder_of_another_run_is_refused_and_left_as_it_is(root, run, fails, words, different):
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    message = fails(*to_learn(root, run, *words))
    assert re.search(rf"{run} holds another run \(different {different}\)", message)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files


def test_folder_of_a_run_with_other_tasks_is_refused(root, run, fails):
    for tasks in (("gear", "grass"), ("gear",)):
        message = fails(*to_learn(root, run, tasks=tasks))
        assert f"{run} holds another run (different data, tasks)" in message


# --------------------------------------------------------------------------------------- DeCo-Diff


def test_deco_diff_learns_task_by_task_and_a_class_keeps_its_number(root, tmp_path, monkeypatch):
    """The numbers follow the order of the tasks, in training, gathering and judging."""
    seen = {"trained": [], "predicted": []}
    loss, predict = DecoDiff.training_loss, DecoDiff.predict

    def seeing_loss(self, batch, generator=None):
        if self.training:
            seen["trained"].append(set(batch["category_index"].tolist()))
        return loss(self, batch, generator)

    def seeing_predict(self, images, category_index=None, generator=None):
        seen["predicted"].append(set(category_index.tolist()))
        return predict(self, images, category_index, generator)

    monkeypatch.setattr(DecoDiff, "training_loss", seeing_loss)
    monkeypatch.setattr(DecoDiff, "predict", seeing_predict)
    words = ["--method", "DecoDiff", "--tasks", "grass", "brick", *SHORT, *SMALL_DECO]
    assert command("continual", root, "--out", tmp_path, *words, "--steps", 1) == 0
    assert seen["trained"] == [{0}, {1}]
    first, second = [{0}, {0}], [{1}, {0}, {1}]  # gathered, then judged one by one
    assert seen["predicted"] == first + second
    detector = load(tmp_path / "task_2" / "weights", method="DecoDiff")
    assert detector.config.classes == 2 and detector.categories == ("grass", "brick")
    assert load(tmp_path / "task_1" / "weights").categories == ("grass",)


# ----------------------------------------------------------------------------------------- refused


def test_tasks_that_share_a_category_are_refused_before_anything_is_made(root, tmp_path, fails):
    message = fails(*to_learn(root, tmp_path / "out", tasks=("gear,brick", "brick")))
    assert "categories in more than one task: brick" in message
    assert not (tmp_path / "out").exists()


def test_category_that_the_data_lack_is_answered_with_the_known_ones(root, tmp_path, fails):
    message = fails(*to_learn(root, tmp_path, tasks=("gear", "zipper")))
    assert f"unknown categories ['zipper'] in {root}; known: board, brick, capsule" in message
    assert not list(tmp_path.iterdir())  # before the first task is trained


def test_textures_are_for_diffusion_ad(root, tmp_path, fails):
    message = fails(*to_learn(root, tmp_path, tasks=("gear",)), "--textures", tmp_path)
    assert "--textures is not for OneForMore" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Missing required argument group: • --order, --tasks"),
        (["--order", "toy", "--tasks", "gear"], "are not allowed together"),
        (["--order", "mvtec 1-1"], "invalid choice 'mvtec 1-1' for argument '--order'"),
        (["--tasks", "gear", "--protection", "all"], "invalid choice 'all' for argument"),
        (["--tasks", "gear", "--every", "0"], "must be at least 1, not 0"),
        (["--tasks", "gear", "--latents", "folder"], "Unrecognized options"),
    ],
)
def test_words_that_make_no_command_are_named(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        command("continual", tmp_path, "--out", tmp_path, *words)
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())  # out of its frame
    assert message in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--textures", "folder"], "--textures is not for OneForMore"),
        (["--latents", "file"], "--latents is not for OneForMore"),
        (["--imagenet", "file"], "--imagenet is not for OneForMore"),
        (["--no-reconstruction"], "--no-reconstruction is not for OneForMore"),
        (["--set", "window=[15,15]"], "hides the whole grid of 8 x 8"),
        (["--set", "image_size=36"], "image_size must be a multiple of 8, not 36"),
        (["--set", 'predicts="all"'], "predicts: Input should be 'noise' or 'latent'"),
    ],
)
def test_option_that_does_not_fit_one_for_more_is_refused(root, tmp_path, fails, words, message):
    command_words = ["train", root, "--method", "OneForMore", "--out", tmp_path, *SHORT, *SMALL]
    assert message in fails(*command_words, *words)
    assert not (tmp_path / "weights.safetensors").exists()


# --------------------------------------------------------------------- train, evaluate and predict


def test_network_can_learn_on_photographs_before_any_task(tmp_path, monkeypatch):
    def crop(bank, count, size, generator):  # six thousand real ones take long to cut
        return torch.rand(count // 100, 3, size, size, generator=generator).repeat(100, 1, 1, 1)

    monkeypatch.setattr(photographs, "crop_textures", crop)
    words = ["--method", "OneForMore", "--out", tmp_path, *SHORT, *SMALL, "--set", "image_size=24"]
    assert command("train", "photographs", *words) == 0
    record = read_description(tmp_path / "weights")["record"]
    assert record["data"] == {"name": "photographs", "images": 6000, "categories": ["photographs"]}


def test_trained_one_for_more_has_the_settings_that_were_asked_for(trained):
    detector = load(trained, method="OneForMore")
    config = detector.config
    assert (config.image_size, config.width, config.window, config.walk) == (32, 8, (3, 3), 2)
    assert detector.categories == ("brick", "gear")
    losses = read_description(trained)["record"]["final_losses"]
    assert losses["loss"] == pytest.approx(losses["noise"] + losses["masked"])


def test_evaluate_gives_the_report_of_the_library_and_takes_other_settings(root, trained, capsys):
    found = []
    for words in ((), ("--set", "sigma=0.5"), ("--set", "level=999")):
        words = ["--json", "--categories", "brick", "gear", *words]
        assert command("evaluate", trained, root, *words) == 0
        found.append(json.loads(capsys.readouterr().out)["table"])
    data = AnomalyFolder(root, "test", 32, ["brick", "gear"])
    assert found[0] == tables.to_plain(evaluate(load(trained), data, progress=False))["table"]
    assert found[0] != found[1] and found[0] != found[2]


def test_weights_of_a_task_can_be_evaluated_on_what_was_learned_by_then(root, run, fails):
    weights = run / "task_1" / "weights"
    assert command("evaluate", weights, root, "--categories", "gear") == 0
    message = fails("evaluate", weights, root, "--categories", "gear", "brick")
    assert "never saw ['brick']; it knows ['gear']" in message


def test_predict_needs_no_category_and_gives_the_scores_of_the_library(root, trained, tmp_path):
    images, found = root / "gear" / "test", []
    for words in ((), ("--category", "gear"), ("--category", "brick")):
        assert command("predict", trained, images, "--out", tmp_path, *words) == 0
        with open(tmp_path / "scores.csv", newline="") as file:
            found.append([float(row["score"]) for row in csv.DictReader(file)])
    assert len(found[0]) == 4 and found[0] == found[1] == found[2]
    assert len(list(tmp_path.rglob("*_map.png"))) == 4
    data = AnomalyFolder.from_folders(test=images, image_size=32)
    report = evaluate(load(trained), data_known_as(data, "gear"), progress=False)
    assert found[0] == pytest.approx(report.images["score"].tolist(), abs=2e-6)


def data_known_as(data, category):
    """The same samples under a category that the detector knows."""
    return [{**sample, "category": category} for sample in data]


def test_weights_may_be_judged_with_the_features_of_another_network(root, run, tmp_path, capsys):
    call = ["evaluate", str(run / "task_1" / "weights"), str(root), "--categories", "gear"]
    table = {}
    for name in ("patches", "tf_efficientnet_lite0"):
        path = tmp_path / f"{name}.json"
        assert main([*call, "--set", f'features="{name}"', "--save", str(path)]) == 0
        table[name] = json.loads(path.read_text())["report"]["images"]
    scores = [[row["score"] for row in rows] for rows in table.values()]
    assert scores[0] != scores[1]


def test_patch_features_may_be_learned_anew_from_the_good_images(root, tmp_path):
    config = {"width": 8, "norm_groups": 4, "start": None, "features": "tf_efficientnet_lite0"}
    detector = OneForMore.tiny(image_size=64, **config)
    data = detector.folder(root, "train", categories=["gear"])
    diffad_ref.fit(detector, data, 1, 2, progress=False, device="cpu")
    diffad_ref.save(detector, tmp_path / "weights")
    call = ["evaluate", str(tmp_path / "weights"), str(root), "--categories", "gear"]
    assert main([*call, "--set", 'features="patches"']) == 0
