"""The command line: what it writes. What it refuses stands in `test_cli_refusals.py`."""

import csv
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import diffad_ref
from diffad_ref.__main__ import main
from diffad_ref.checkpoints import load, read_description, read_metadata, save
from diffad_ref.data import AnomalyFolder
from diffad_ref.diffusion_ad import DiffusionAD
from diffad_ref.evaluation import evaluate
from diffad_ref.tools import commands, tables
from diffad_ref.tools.baselines import SegmentationOnly
from diffad_ref.tools.toy import CATEGORIES, toy_factory
from diffad_ref.training import STATE

SIZE = ["--image-size", "32"]
SETTINGS = ["width=8", "norm_groups=4", "multipliers=[1,1]", "attention_levels=[1]", "heads=2"]
SETTINGS += ["segmentation_width=4", "draws=1"]
SMALL = [word for setting in SETTINGS for word in ("--set", setting)]
SHORT = [*SIZE, "--steps", "3", "--batch-size", "2", *SMALL]

pytestmark = pytest.mark.usefixtures("few_draws")


def command(*words):
    """Run the command line in this process; words may be paths."""
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def run(noise_root, tmp_path_factory):
    """Folder of a finished training run on noise."""
    out = tmp_path_factory.mktemp("run")
    assert command("train", noise_root, "--out", out, *SHORT, "--seed", 3) == 0
    return out


@pytest.fixture
def weights(run, tmp_path):
    """A copy of that run's weights that a test may spoil."""
    for suffix in (".safetensors", ".json"):
        shutil.copy(run / f"weights{suffix}", tmp_path / f"weights{suffix}")
    return tmp_path / "weights.safetensors"


def history(folder):
    """Rows of the history that a run's state holds."""
    return json.loads(read_metadata(folder / STATE)["state"])["history"]


# -------------------------------------------------------------------------------------------- data


def test_data_says_what_a_folder_holds(mvtec_root, capsys):
    assert command("data", mvtec_root) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(mvtec_root),
        "  bottle: 3 train; test crack 2, good 2, hole 2",
        "  carpet: 3 train; test cut 2, good 2",
    ]


def test_data_toy_draws_the_toy_with_the_size_and_seed_that_are_asked_for(
    tmp_path, monkeypatch, capsys
):
    def small(size, seed):
        return toy_factory(tmp_path, size, seed, 2, 1, 1, progress=False)

    monkeypatch.setattr(diffad_ref, "toy_factory", small)
    assert command("data", "toy", *SIZE, "--seed", 5) == 0
    folder, *lines = capsys.readouterr().out.splitlines()
    assert json.loads((tmp_path / folder / "factory.json").read_text())["seed"] == 5
    assert [line.split(":")[0].strip() for line in lines] == list(CATEGORIES)
    assert AnomalyFolder(folder, "train", None)[0]["image"].shape == (3, 32, 32)


# ------------------------------------------------------------------------------------------- train


def test_train_writes_weights_that_load_and_a_record_that_says_how(run):
    detector = load(run / "weights", method="DiffusionAD")
    assert detector.categories == ("bottle", "carpet")
    assert detector.config.image_size == 32
    record = read_description(run / "weights")["record"]
    assert record["seed"] == 3 and record["steps"] == len(history(run))
    assert record["data"] == {"name": "data", "images": 6, "categories": ["bottle", "carpet"]}
    assert record["versions"]["torch"] == torch.__version__
    assert np.isfinite(list(record["final_losses"].values())).all() and record["final_losses"]


def test_recorded_command_makes_the_same_weights_again(run, tmp_path):
    program, words = read_description(run / "weights")["record"]["command"].split("-m diffad_ref ")
    words = shlex.split(words)
    words[words.index("--out") + 1] = str(tmp_path / "again")
    assert program == "python " and main(words) == 0
    first, second = (load_file(f / "weights.safetensors") for f in (run, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_train_json_prints_the_record_and_where_the_weights_are(mvtec_root, tmp_path, capsys):
    words = ["--categories", "carpet", "--out", tmp_path / "run", *SHORT, "--json"]
    assert command("train", mvtec_root, *words) == 0
    printed = json.loads(capsys.readouterr().out)
    weights = Path(printed.pop("weights"))
    assert weights.is_file() and load(weights)
    assert printed == json.loads(weights.with_suffix(".json").read_text())["record"]


def test_train_takes_only_the_categories_that_are_named(mvtec_root, tmp_path):
    assert command("train", mvtec_root, "--out", tmp_path, *SHORT, "--categories", "carpet") == 0
    description = read_description(tmp_path / "weights")
    assert description["categories"] == ["carpet"]
    assert description["record"]["data"]["images"] == 3


def test_train_without_reconstruction_is_the_ablation(mvtec_root, tmp_path):
    assert command("train", mvtec_root, "--out", tmp_path, *SHORT, "--no-reconstruction") == 0
    detector = load(tmp_path / "weights")
    assert isinstance(detector, SegmentationOnly)
    assert not detector.predict(torch.rand(1, 3, 32, 32)).reconstruction.any()


def test_train_with_a_folder_of_textures_uses_these_alone(mvtec_root, tmp_path, monkeypatch):
    seen = []
    real = DiffusionAD.training_loss

    def look(self, *rest):
        seen.append(self.textures)
        return real(self, *rest)

    monkeypatch.setattr(DiffusionAD, "training_loss", look)
    folder = mvtec_root / "bottle" / "train" / "good"
    out = ["--out", tmp_path / "run"]
    assert command("train", mvtec_root, *out, *SHORT, "--textures", folder) == 0
    assert {tuple(textures.shape) for textures in seen} == {(3, 3, 256, 256)}


def test_interrupted_training_goes_on_to_the_weights_of_an_unbroken_one(
    mvtec_root, tmp_path, monkeypatch
):
    words = ["train", mvtec_root, *SHORT, "--steps", 6, "--save-every", 1, "--ema", 0.9, "--out"]
    assert command(*words, tmp_path / "unbroken") == 0

    real, seen = DiffusionAD.training_loss, []

    def count(self, *rest):
        if len(seen) == 4 and not (tmp_path / "stopped" / "weights.json").exists():
            seen.append("stop")
            raise KeyboardInterrupt
        seen.append("step")
        return real(self, *rest)

    monkeypatch.setattr(DiffusionAD, "training_loss", count)
    assert command(*words, tmp_path / "stopped") == 130
    assert (tmp_path / "stopped" / STATE).exists()
    assert not (tmp_path / "stopped" / "weights.safetensors").exists()
    assert command(*words, tmp_path / "stopped") == 0
    steps = len(history(tmp_path / "unbroken"))
    assert seen.count("step") == steps == len(history(tmp_path / "stopped"))
    first, second = (
        load_file(tmp_path / f / "weights.safetensors") for f in ("unbroken", "stopped")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    took = [
        read_description(tmp_path / f / "weights")["record"]["training_seconds"]
        for f in ("unbroken", "stopped")
    ]
    assert took[0] >= 0 and took[1] is None  # of the whole run, or not known
    assert command(*words, tmp_path / "unbroken") == 0  # nothing is left to do
    record = read_description(tmp_path / "unbroken" / "weights")["record"]
    assert record["training_seconds"] == took[0]
    save(load(tmp_path / "stopped" / "weights"), tmp_path / "stopped" / "weights")  # no record
    assert command(*words, tmp_path / "stopped") == 0


# ---------------------------------------------------------------------------------------- evaluate


def test_evaluate_prints_a_row_for_each_category_and_the_mean(run, mvtec_root, capsys):
    assert command("evaluate", run / "weights", mvtec_root) == 0
    names = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[:5]]
    assert names[:1] + names[2:] == ["category", "bottle", "carpet", "mean"]


def test_evaluate_json_prints_the_report_that_the_library_gives(run, mvtec_root, capsys):
    words = ["evaluate", run / "weights", mvtec_root, "--json", "--seed", 2, "--batch-size", 3]
    assert command(*words) == 0
    printed = json.loads(capsys.readouterr().out)
    data = AnomalyFolder(mvtec_root, "test", 32)
    report = evaluate(load(run / "weights"), data, 3, 2, progress=False)
    expected = tables.to_plain(report) | {"intervals": commands.intervals(report)}
    for changing in (printed, expected):
        del changing["seconds_per_image"]  # of one moment
    assert printed == json.loads(json.dumps(expected))


def test_evaluate_of_one_category_leaves_the_others_out(run, mvtec_root, capsys):
    words = ["evaluate", run / "weights", mvtec_root, "--json", "--categories", "carpet"]
    assert command(*words) == 0
    table = json.loads(capsys.readouterr().out)["table"]
    assert [row["category"] for row in table] == ["carpet", "mean"]


def test_evaluate_record_adds_the_report_and_leaves_the_weights_alone(weights, mvtec_root, capsys):
    before, description = weights.read_bytes(), read_description(weights)
    assert command("evaluate", weights, mvtec_root, "--json", "--record") == 0
    report = json.loads(capsys.readouterr().out)
    assert weights.read_bytes() == before
    after = read_description(weights)
    del report["images"]
    assert after["record"].pop("intervals") == report.pop("intervals")
    assert after["record"].pop("report") == report
    assert after == description


def test_saved_report_says_how_it_came_to_be_and_can_be_compared(run, mvtec_root, tmp_path, capsys):
    for name, seed in (("first", 0), ("second", 1)):
        words = ["--save", tmp_path / f"{name}.json", "--seed", seed]
        assert command("evaluate", run / "weights", mvtec_root, *words) == 0
    saved = json.loads((tmp_path / "first.json").read_text())
    trained, evaluated = saved["commands"]
    record = read_description(run / "weights")["record"]
    assert trained == record["command"]
    assert saved["cost"]["training seconds"] == record["training_seconds"] is not None
    assert evaluated.startswith("python -m diffad_ref evaluate ")
    assert evaluated.endswith(shlex.join(["--save", str(tmp_path / "first.json"), "--seed", "0"]))
    assert saved["versions"]["torch"] == torch.__version__
    low, high = saved["intervals"]["pixel_auroc"]
    assert 0 <= low <= high <= 1
    capsys.readouterr()
    assert command("compare", *(tmp_path / f"{name}.json" for name in ("first", "second"))) == 0
    assert "| first " in capsys.readouterr().out


def test_evaluate_without_record_writes_nothing(weights, mvtec_root):
    before = weights.read_bytes(), weights.with_suffix(".json").read_bytes()
    assert command("evaluate", weights, mvtec_root) == 0
    assert (weights.read_bytes(), weights.with_suffix(".json").read_bytes()) == before


# ----------------------------------------------------------------------------------------- predict


def scores(folder):
    """Rows of scores.csv."""
    with open(folder / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_predict_writes_a_heat_map_and_a_score_for_each_image(run, mvtec_root, tmp_path):
    images, out = mvtec_root / "bottle" / "train" / "good", tmp_path / "deep" / "maps"
    assert command("predict", run / "weights", images, "--out", out) == 0
    paths = sorted(images.iterdir())
    rows = scores(out)
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    assert len(list(out.glob("*_map.png"))) == len(paths) == 3
    for path in out.glob("*_map.png"):
        assert Image.open(path).size == (64, 32)  # the image, and its map beside it
    data = AnomalyFolder.from_folders(test=images, image_size=32)
    batch = torch.stack([sample["image"] for sample in data])
    expected = load(run / "weights").predict(batch).score
    found = torch.tensor([float(row["score"]) for row in rows])
    assert torch.allclose(found, expected, atol=2e-6)


def test_predict_gives_images_of_equal_name_in_two_folders_a_map_each(run, tmp_path, write):
    rng = np.random.default_rng(0)
    names = ["good/0.png", "crack/0.png", "crack/0.bmp"]
    for name in names:
        write(tmp_path / "in" / name, rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    assert command("predict", run / "weights", tmp_path / "in", "--out", tmp_path / "out") == 0
    maps = [p.read_bytes() for p in (tmp_path / "out").rglob("*_map.png")]
    assert len(set(maps)) == len(scores(tmp_path / "out")) == len(names)


@pytest.mark.filterwarnings("error:.*taken for an object")  # nobody is to be told what it shows
def test_predict_of_one_image_judges_it_alone(run, mvtec_root, tmp_path):
    image = mvtec_root / "bottle" / "train" / "good" / "001.png"
    assert command("predict", run / "weights", image, "--out", tmp_path / "out") == 0
    assert [row["path"] for row in scores(tmp_path / "out")] == [str(image)]
    names = {path.name for path in (tmp_path / "out").iterdir() if path.name[0] != "."}
    assert names == {"001.png_map.png", "scores.csv", "sheet.html"}


def test_scores_can_be_read_when_a_name_has_a_comma(run, tmp_path, write):
    path = write(tmp_path / "in" / 'left, "new".png', np.zeros((32, 32, 3), np.uint8))
    assert command("predict", run / "weights", tmp_path / "in", "--out", tmp_path / "out") == 0
    [row] = scores(tmp_path / "out")
    assert row["path"] == str(path) and 0 <= float(row["score"]) <= 1


def test_predict_gives_the_same_scores_again_and_others_for_another_seed(run, mvtec_root, tmp_path):
    images, found = mvtec_root / "bottle" / "train" / "good", []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        words = ["--out", out, "--seed", seed, "--batch-size", 2]
        assert command("predict", run / "weights", images, *words) == 0
        found.append((out / "scores.csv").read_bytes())
    assert found[0] == found[1] != found[2]


def test_data_json_counts_images_of_each_kind(mvtec_root, capsys):
    capsys.readouterr()
    assert command("data", mvtec_root, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    train, test = (AnomalyFolder(mvtec_root, split) for split in ("train", "test"))
    assert found["root"] == str(mvtec_root)
    assert sum(c["train"] for c in found["categories"].values()) == len(train)
    assert sum(sum(c["test"].values()) for c in found["categories"].values()) == len(test)


def test_predict_json_prints_the_scores_of_the_csv(run, mvtec_root, tmp_path, capsys):
    images, out = mvtec_root / "bottle" / "train" / "good", tmp_path / "out"
    capsys.readouterr()
    assert command("predict", run / "weights", images, "--out", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {r["path"]: f"{r['score']:.6f}" for r in found} == {
        row["path"]: row["score"] for row in scores(out)
    }
    assert all((out / record["map"]).is_file() for record in found)


def test_evaluate_can_judge_as_a_released_code_and_show_the_best_and_the_worst(
    run, mvtec_root, tmp_path, capsys
):
    picture = tmp_path / "images.png"
    words = ("--protocol", "diffusion_ad", "--pictures", picture)
    assert command("evaluate", run / "weights", mvtec_root, *words) == 0
    assert "diffusion_ad metrics" in capsys.readouterr().out
    assert Image.open(picture).size[0] > 500


def test_interrupted_command_ends_with_code_130(mvtec_root, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(diffad_ref, "AnomalyFolder", interrupted)
    assert command("data", mvtec_root) == 130
    assert "a training goes on where it was saved" in capsys.readouterr().err
