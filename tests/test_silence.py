"""What once gave a wrong answer without a word, or a traceback: judged as meant, or refused."""

import csv
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from diffad_ref import AnomalyFolder, DiffusionAD, OneForMore, fit, fit_continual, save
from diffad_ref.__main__ import main
from diffad_ref.anomalies import texture_bank
from diffad_ref.checkpoints import UNFINISHED, claimed, write_tensors, write_text
from diffad_ref.data import read_image, read_mask
from diffad_ref.tools.latents import CachedLatents
from diffad_ref.training import STATE

SETTINGS = ["width=8", "norm_groups=4", "multipliers=[1,1]", "attention_levels=[1]", "heads=2"]
SMALL = [word for setting in SETTINGS for word in ("--set", setting)]
SHORT = ["--image-size", "32", "--steps", "2", "--batch-size", "2", *SMALL]


def command(*words):
    """Run the command line in this process; words may be paths."""
    return main([str(word) for word in words])


def scores(folder):
    with open(folder / "scores.csv", newline="", errors="surrogateescape") as file:
        return {row["path"]: float(row["score"]) for row in csv.DictReader(file)}


def visible(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.name[0] != ".")


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.fixture
def weights(small_config, tmp_path):
    torch.manual_seed(0)
    return save(DiffusionAD(small_config), tmp_path / "w" / "weights")


@pytest.fixture
def photos(tmp_path, write):
    """Three loose images, one in a sub-folder, one a level deeper, and two files that are none."""
    folder = tmp_path / "photos"
    for number, name in enumerate(["a.png", "b.jpg", "c.bmp", "new/d.png", "new/far/e.png"]):
        write(folder / name, picture(number))
    (folder / "notes.txt").write_text("no image")
    write(folder / "scan.gif", picture(9))
    return folder


# ---------------------------------------------------------------------------- predict: which images


def test_loose_and_nested_images_are_all_judged_and_the_rest_is_told(weights, photos, capsys):
    assert command("predict", weights, photos, "--out", photos.parent / "out") == 0
    printed = capsys.readouterr()
    assert len(scores(photos.parent / "out")) == 5 and "judged: 5" in printed.out
    assert "not judged are 2 files: notes.txt, scan.gif" in printed.err


@pytest.mark.parametrize("out", ["photos/out", "photos", "photos/new", "."])
def test_a_second_prediction_judges_the_same_images_and_no_heat_map(weights, photos, out):
    out, found = photos.parent / out, []
    for _ in range(2):
        assert command("predict", weights, photos, "--out", out) == 0
        found.append(scores(out))
    assert found[0] == found[1] and len(found[0]) == (3 if out.name == "new" else 5)


def test_a_folder_of_nothing_but_heat_maps_is_refused(weights, tmp_path, write, fails):
    write(tmp_path / "maps" / "a.png_map.png", picture())
    message = fails("predict", weights, tmp_path / "maps", "--out", tmp_path / "out")
    assert "nothing but heat maps" in message


def test_loose_images_beside_folders_of_kinds_are_told(mvtec_root, write):
    write(mvtec_root / "bottle" / "test" / "stray.png", picture())
    with pytest.warns(UserWarning, match="bottle: not used are 1 files: test/stray.png"):
        AnomalyFolder(mvtec_root, "test", categories=["bottle"])


def test_no_bytes_of_an_image_start_another_program(tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("it ran"))
    path = tmp_path / "a.png"
    Image.fromarray(picture()).save(path, "EPS")
    with pytest.raises(ValueError, match="cannot read the image .*a.png"):
        read_image(path)


def test_textures_are_files_that_can_be_seen(tmp_path, write):
    write(tmp_path / "sub" / "a.png", picture())
    (tmp_path / "._b.png").write_bytes(b"what a Mac leaves")
    (tmp_path / "c.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "d.png").mkdir()
    assert len(texture_bank(tmp_path)) == 1


def test_foreground_masks_that_are_nowhere_are_missed_even_by_surfaces(mvtec_root):
    with pytest.raises(FileNotFoundError, match="no folder nowhere of foreground masks"):
        AnomalyFolder(mvtec_root, categories=["carpet"], foreground="nowhere")


# ------------------------------------------------------------------------- predict: what is written


def test_weights_with_nan_are_not_believed(weights, photos, small_config, fails):
    detector = DiffusionAD(small_config)
    with torch.no_grad():
        next(detector.segmenter.parameters()).fill_(float("nan"))
    save(detector, weights)
    message = fails("predict", weights, photos / "new", "--out", photos.parent / "out")
    assert "NaN or infinity" in message and visible(photos.parent / "out") == []


def test_no_name_of_a_file_is_a_formula(weights, tmp_path, write, monkeypatch):
    write(tmp_path / "in" / "=cmd|'calc'!A0.png", picture())
    monkeypatch.chdir(tmp_path / "in")
    assert command("predict", weights, ".", "--out", tmp_path / "out") == 0
    (name,) = scores(tmp_path / "out")
    assert name == "./=cmd|'calc'!A0.png" and Path(name).is_file()


def test_a_name_may_be_any_bytes(weights, tmp_path):
    path = os.fsencode(tmp_path / "in") + b"/caf\xe9.png"
    os.makedirs(tmp_path / "in")
    with open(path, "wb") as file:
        Image.fromarray(picture()).save(file, "PNG")
    assert command("predict", weights, tmp_path / "in", "--out", tmp_path / "out") == 0
    assert path in (tmp_path / "out" / "scores.csv").read_bytes()
    assert b"caf%E9.png_map.png" in (tmp_path / "out" / "sheet.html").read_bytes()


@pytest.mark.parametrize("name", ["scores.csv", "sheet.html"])
def test_what_cannot_be_written_is_known_before_anything_is_judged(
    weights, photos, fails, monkeypatch, name
):
    (photos.parent / "out" / name).mkdir(parents=True)
    monkeypatch.setattr(DiffusionAD, "predict", lambda *_, **__: pytest.fail("too late"))
    message = fails("predict", weights, photos / "new", "--out", photos.parent / "out")
    assert f"{name}: it is a folder" in message


@pytest.mark.parametrize("word", ["--save", "--pictures"])
def test_a_report_that_could_not_be_written_is_not_made(weights, mvtec_root, fails, tmp_path, word):
    (tmp_path / "taken").write_text("a file")
    message = fails("evaluate", weights, mvtec_root, word, tmp_path / "taken" / "report")
    assert f"cannot write {tmp_path / 'taken'}" in message and "evaluate" not in message


# ----------------------------------------------------------------------- two writers, and dead ones


def test_a_folder_belongs_to_one_run_at_a_time(noise_root, tmp_path, fails, start):
    process = start(hold, tmp_path / "out", tmp_path / "held")
    while not (tmp_path / "held").exists():
        time.sleep(0.05)
    message = fails("train", noise_root, "--out", tmp_path / "out", *SHORT)
    assert f"{tmp_path / 'out'}: another run is writing to it" in message
    process.kill()  # whoever held it is gone, and the next may
    process.join()
    assert command("train", noise_root, "--out", tmp_path / "out", *SHORT) == 0


def hold(folder, sign):
    with claimed(folder):
        sign.touch()
        time.sleep(60)


def test_what_killed_writers_left_goes_with_the_next_one(tmp_path, noise_root):
    script = f"""
import torch
from pathlib import Path
from diffad_ref.checkpoints import write_tensors
while True:
    write_tensors({{"x": torch.zeros(4_000_000)}}, Path({str(tmp_path / "out" / STATE)!r}))
"""
    left = 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", script])
        while not (tmp_path / "out").is_dir() or not any((tmp_path / "out").iterdir()):
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        left += len(list((tmp_path / "out").glob(f"{UNFINISHED}*")))
    print(f"{left} unfinished files were left by 3 kills")
    (tmp_path / "out" / f"{UNFINISHED}{process.pid}-1").touch()  # one at least
    (tmp_path / "out" / STATE).unlink(missing_ok=True)
    assert command("train", noise_root, "--out", tmp_path / "out", *SHORT) == 0
    assert list((tmp_path / "out").glob(f"{UNFINISHED}*")) == []


def test_what_a_killed_prediction_left_goes_with_the_next_one(weights, photos):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    out = photos.parent / "out"
    out.mkdir()
    (out / f"{UNFINISHED}{process.pid}-1").touch()
    assert command("predict", weights, photos / "new", "--out", out) == 0
    assert not list(out.glob(f"{UNFINISHED}*"))


def test_what_living_writers_are_writing_stays(tmp_path):
    (tmp_path / f"{UNFINISHED}{os.getppid()}-1").touch()
    write_tensors({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert (tmp_path / f"{UNFINISHED}{os.getppid()}-1").exists()


def test_a_disk_that_is_full_is_named_and_nothing_half_written_is_left(noise_root, tmp_path, write):
    """Files may not grow beyond 30 kB here: enough for texts, not for weights."""
    write(tmp_path / "in" / "a.png", picture())
    words = ["train", noise_root, "--out", tmp_path / "out", *SHORT]
    run = [sys.executable, "-m", "diffad_ref", *map(str, words)]

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    done = subprocess.run(run, capture_output=True, text=True, preexec_fn=small_disk)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert said.startswith(f"diffad_ref: cannot write {tmp_path / 'out'}") and "MB are free" in said
    assert visible(tmp_path / "out") == [] and not list((tmp_path / "out").glob(f"{UNFINISHED}*"))


# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ema", 2], "ema is a decay between 0 and 1"),
        (["--ema", -1], "ema is a decay between 0 and 1"),
        (["--ema", "nan"], "ema is a decay between 0 and 1"),
        (["--set", "width=0"], "width: Input should be greater than or equal to 1, not 0"),
        (["--set", "steps=0"], "steps: Input should be greater"),
        (["--set", "steps=5"], "a linear schedule needs more than 20 steps, not 5"),
        (["--set", "stages=[]"], "stages: Tuple should have at least 1 item"),
        (["--set", "t_s_range=[300,0]"], "t_s and t_s_range, which rises, must lie"),
        (["--set", "t_b=-1"], "t_b: Input should be greater than or equal to 0, not -1"),
        (["--set", "t_s=5000"], "must lie in the schedule's 1000 steps"),
        (["--set", 'predicts="x"'], "predicts: Input should be 'noise' or 'image', not 'x'"),
        (["--set", "attention_levels=[9]"], "attention_levels (9,) are not among the 2 levels"),
        (["--set", "heads=3"], "heads must divide the widths"),
        (["--set", "norm_groups=3"], "norm_groups must divide the widths"),
        (["--set", "w=NaN"], "w: Input should be a finite number"),
        (["--set", "synthesis.beta=[0.8,0.2]"], "a range ends above where it begins"),
        (["--set", "width=true"], "width: Input should be a valid integer, not True"),
        (["--set", "wheels=4"], "wheels: Unexpected keyword argument"),
        (["--set", "width=" + "[" * 100_000], "expected NAME=VALUE, value as JSON"),
        (["--set", 'foreground="x"'], "no folder x of foreground masks"),
    ],
    ids=lambda value: "_".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_number_that_makes_no_sense_is_refused_before_training(
    noise_root, tmp_path, fails, words, said
):
    message = fails("train", noise_root, "--out", tmp_path / "out", *SHORT, *words)
    assert said in message and message.count("\n") <= 9
    assert not (tmp_path / "out" / STATE).exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--threads", 100_000], "must be at most 1024"),
        (["--seed", -1], "must be at least 0"),
        (["--seed", 2**64], "must be at most"),
        (["--batch-size", 10**30], "must be at most"),
    ],
)
def test_numbers_beyond_any_use_are_refused(weights, mvtec_root, capsys, words, said):
    with pytest.raises(SystemExit) as error:
        command("evaluate", weights, mvtec_root, *words)
    assert error.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [{"gamma": 2.0}, {"gamma": float("nan")}, {"gamma": -0.1}, {"later_rate": -1.0}, {"every": 0}],
    ids=str,
)
def test_a_continual_run_refuses_shares_that_are_none(changes, mvtec_root, tmp_path):
    with torch.device("meta"):
        detector = OneForMore.tiny(start=None)
    with pytest.raises(ValueError, match="gamma is a share, later_rate from 0 and every from 1"):
        fit_continual(detector, mvtec_root, [["bottle"]], tmp_path, **changes)


# ---------------------------------------------------------------------------------- files of others


@pytest.mark.parametrize(
    "text", ["", "[]", "7", "null", '{"tasks": 3}', "[" * 100_000, "{}", "\xff"]
)
@pytest.mark.parametrize("name", ["run.json", "task_1/result.json"])
def test_files_of_a_continual_run_that_say_something_else_are_named(
    text, name, mvtec_root, tmp_path
):
    torch.manual_seed(0)
    detector = OneForMore.tiny(image_size=32, start=None)
    out = tmp_path / "run"
    write_text(text, out / name)
    if name != "run.json":
        write_tensors({}, out / "task_1" / STATE)
    with pytest.raises((ValueError, OSError)) as error:
        fit_continual(detector, mvtec_root, [["bottle"]], out, steps=1, progress=False)
    assert str(out) in str(error.value)


@pytest.mark.parametrize("plain", [[], 7, {"report": []}, {"report": {"table": 3}}, {"mean": 1}])
def test_compare_names_a_file_that_is_no_report(plain, tmp_path, fails):
    write_text(json.dumps(plain), tmp_path / "x.json")
    assert f"{tmp_path / 'x.json'} is no report" in fails("compare", tmp_path / "x.json")


@pytest.mark.parametrize(
    "tensors", [{}, {"other": torch.zeros(3, 2)}, {"posterior": torch.zeros(1)}]
)
def test_a_file_of_latents_with_other_rows_is_refused(tensors, mvtec_root, tmp_path):
    from diffad_ref.codecs import CodecConfig, build_codec
    from diffad_ref.tools.latents import fingerprint

    data = AnomalyFolder(mvtec_root, image_size=32, categories=["bottle"])
    codec = build_codec(CodecConfig("pca", channels=4, factor=4))
    codec.prepare(data)
    write_tensors(tensors, tmp_path / "l.safetensors", fingerprint(data, codec))
    with pytest.raises(ValueError, match=f"holds no latents of {len(data)} images"):
        CachedLatents(data, codec, tmp_path / "l.safetensors")


# ---------------------------------------------------------------------------------------- the shell


def test_a_reader_that_has_seen_enough_ends_a_command_quietly(mvtec_root):
    script = f"{sys.executable} -m diffad_ref data {mvtec_root} --json | head -n 0"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stderr == ""


def test_an_interruption_while_the_package_is_loaded_is_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import time; print(1, flush=True); time.sleep(60)")
    place = {"PYTHONPATH": str(tmp_path)}
    run = [sys.executable, "-m", "diffad_ref", "data", "toy"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(run, env=os.environ | place, **pipes)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == b"" and process.returncode == -signal.SIGINT


# ------------------------------------------------------------------- other data, and other files


TASKS = ["--tasks", "bottle", "carpet", "--set", "start=null", "--image-size", 32]
CONTINUAL = [*TASKS, "--steps", 1, "--batch-size", 2]


@pytest.fixture
def learned(mvtec_root, tmp_path):
    """A finished run of two tasks."""
    assert command("continual", mvtec_root, "--out", tmp_path / "learned", *CONTINUAL) == 0
    return tmp_path / "learned"


def test_a_finished_run_is_not_one_of_other_data(learned, mvtec_root, tmp_path, fails):
    record = learned / "task_1" / "weights.json"
    before = record.read_bytes()
    fails("continual", tmp_path / "nowhere", "--out", learned, *CONTINUAL)
    other = shutil.copytree(mvtec_root, tmp_path / "other")
    for path in other.glob("*/t*/*/*.png"):
        Image.new("RGB", Image.open(path).size).save(path)
    message = fails("continual", other, "--out", learned, *CONTINUAL)
    assert "holds another run (different data)" in message
    again = "continual", mvtec_root, "--out", learned, *CONTINUAL, "--save", tmp_path / "x.json"
    assert command(*again) == 0 and record.read_bytes() == before


def test_a_task_without_test_images_is_missed_before_the_first_is_trained(
    mvtec_root, tmp_path, fails
):
    for path in (mvtec_root / "carpet" / "test" / "cut").iterdir():
        path.unlink()
    message = fails("continual", mvtec_root, "--out", tmp_path / "out", *CONTINUAL)
    assert "also of carpet" in message and not (tmp_path / "out" / "task_1").exists()


@pytest.mark.parametrize("save", ["w/weights.json", "w/weights.safetensors", "pipe", "link"])
def test_a_report_replaces_neither_weights_nor_devices(weights, mvtec_root, tmp_path, fails, save):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(weights.with_suffix(".json"))
    before = weights.with_suffix(".json").read_bytes()
    message = fails("evaluate", weights, mvtec_root, "--save", tmp_path / save)
    assert "cannot write" in message and (tmp_path / "pipe").is_fifo()
    assert weights.with_suffix(".json").read_bytes() == before


def test_two_files_are_not_written_into_one(weights, mvtec_root, tmp_path, fails, learned):
    both = "--save", tmp_path / "a", "--pictures", tmp_path / "a"
    assert "two files at once" in fails("evaluate", weights, mvtec_root, *both)
    inside = "continual", mvtec_root, "--out", learned, *CONTINUAL, "--save", learned / "run.json"
    assert "belongs to weights" in fails(*inside)


def test_a_link_stays_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text("words", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "words"


def test_a_run_does_not_go_on_as_if_products_were_surfaces(small_config, noise_root, tmp_path):
    detector = DiffusionAD(small_config)
    settings = {"steps": 1, "batch_size": 2, "out": tmp_path / "out", "progress": False}
    fit(detector, detector.folder(noise_root, "train", textures=[]), **settings)
    with pytest.raises(ValueError, match="different data.textures"):
        fit(detector, detector.folder(noise_root, "train"), **settings)


def test_images_behind_a_link_are_judged_and_what_leads_nowhere_is_told(
    weights, photos, tmp_path, write, capsys
):
    write(tmp_path / "elsewhere" / "f.png", picture(7))
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    (photos / "linked" / "round").symlink_to(photos)
    (photos / "gone.png").symlink_to(tmp_path / "nothing")
    assert command("predict", weights, photos, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert "judged: 6" in printed.out and "3 files: gone.png, notes.txt, scan.gif" in printed.err


@pytest.mark.filterwarnings("ignore:.*marks no pixel")
def test_files_that_are_not_used_are_told(mvtec_root, write):
    write(mvtec_root / "bottle" / "train" / "good" / "sub" / "b.png", picture())
    write(mvtec_root / "bottle" / "ground_truth" / "crack" / "of_none.png", picture())
    with pytest.warns(UserWarning, match=r"not used are 1 files: train/good/sub/b\.png"):
        AnomalyFolder(mvtec_root, "train", categories=["bottle"])
    with pytest.warns(UserWarning, match=r"not used are 1 files: ground_truth/crack/of_none\.png"):
        AnomalyFolder(mvtec_root, "test", categories=["bottle"])


def test_heat_maps_are_no_images_to_learn_from(mvtec_root, write):
    folder = mvtec_root / "bottle" / "train" / "good"
    count = len(AnomalyFolder(mvtec_root, "train", categories=["bottle"]))
    write(folder / "000.png_map.png", picture())
    with pytest.warns(UserWarning, match="not used are 1 files"):
        assert len(AnomalyFolder(mvtec_root, "train", categories=["bottle"])) == count


def test_folders_that_mean_two_things_are_refused(mvtec_root, write):
    (mvtec_root / "carpet" / "test" / "good").rename(mvtec_root / "carpet" / "test" / "Good")
    with pytest.raises(ValueError, match="good images lie in good"):
        AnomalyFolder(mvtec_root, "test")
    write(mvtec_root / "train" / "good" / "a.png", picture())
    with pytest.raises(ValueError, match="has train/ or test/, and also the categories bottle"):
        AnomalyFolder(mvtec_root, "train")


def test_a_prediction_has_its_folder_alone(weights, photos, tmp_path, fails):
    with claimed(tmp_path / "out"):
        start = [sys.executable, "-m", "diffad_ref", "predict", weights, photos]
        found = subprocess.run([*start, "--out", tmp_path / "out"], capture_output=True, text=True)
    assert found.returncode == 2 and "another run is writing to it" in found.stderr


def test_what_a_killed_prediction_left_in_a_sub_folder_goes_too(weights, photos, tmp_path):
    left = tmp_path / "out" / "new" / f"{UNFINISHED}999999999-1"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    assert command("predict", weights, photos, "--out", tmp_path / "out") == 0
    assert not left.exists()


def test_a_name_too_long_for_a_heat_map_is_refused_before_anything_is_judged(
    weights, photos, write, tmp_path, fails
):
    write(photos / "new" / f"{'a' * 245}.png", picture())
    message = fails("predict", weights, photos / "new", "--out", tmp_path / "out")
    assert "too long" in message and not visible(tmp_path / "out")


def test_a_link_to_itself_is_no_traceback(weights, photos, tmp_path, fails):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    fails("predict", weights, photos / "new", "--out", tmp_path / "loop")


def test_an_evaluation_refuses_before_it_judges(weights, mvtec_root, monkeypatch, fails):
    monkeypatch.setattr(DiffusionAD, "judge", lambda *_: pytest.fail("judged"))
    (mvtec_root / "carpet").rename(mvtec_root / "mean")
    assert "cannot be called 'mean'" in fails("evaluate", weights, mvtec_root)
    for kind in ("crack", "hole"):
        for path in (mvtec_root / "bottle" / "test" / kind).iterdir():
            path.unlink()
    message = fails("evaluate", weights, mvtec_root, "--categories", "bottle")
    assert "no defective image" in message


def test_reports_on_other_images_are_not_compared(weights, mvtec_root, tmp_path, fails):
    assert command("evaluate", weights, mvtec_root, "--save", tmp_path / "a.json") == 0
    for path in (mvtec_root / "bottle" / "test" / "crack").iterdir():
        path.rename(path.with_name(f"other_{path.name}"))
    for path in (mvtec_root / "bottle" / "ground_truth" / "crack").iterdir():
        path.rename(path.with_name(f"other_{path.name}"))
    assert command("evaluate", weights, mvtec_root, "--save", tmp_path / "b.json") == 0
    message = fails("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert "not evaluated on the same images" in message


@pytest.mark.parametrize("record", ["words", [1]])
def test_a_record_that_is_none_is_damage(weights, mvtec_root, fails, record):
    beside = weights.with_suffix(".json")
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"record": record}))
    assert "record: Input should be a valid dictionary" in fails("evaluate", weights, mvtec_root)


@pytest.mark.parametrize("name", ["template", "PCA", "nearest"])
def test_a_baseline_needs_some_pixels(mvtec_root, fails, name):
    assert "16 pixels or more" in fails("evaluate", name, mvtec_root, "--image-size", 8)


def test_an_empty_word_names_nothing(weights, mvtec_root, fails):
    assert "names no weights" in fails("evaluate", "", mvtec_root)
    assert "name of the data is empty" in fails("evaluate", weights, "")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("you can't allocate memory")])
def test_a_computer_that_is_too_small_says_so(weights, mvtec_root, fails, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(DiffusionAD, "judge", full)
    assert "the computer's memory is too small" in fails("evaluate", weights, mvtec_root)


def test_output_may_be_closed_or_know_few_letters(weights, mvtec_root, tmp_path):
    (root := tmp_path / "d\u00e9").mkdir()
    (mvtec_root / "bottle").rename(root / "bottle")
    few = os.environ | {"PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-m", "diffad_ref", "data", root]
    assert b"\\xe9" in subprocess.run(words, env=few, capture_output=True, check=True).stdout
    shell = f"{shlex.join(map(str, words))} >&-"
    assert subprocess.run(shell, shell=True, capture_output=True).returncode == 0


def test_images_of_unclear_range_or_number_are_refused(tmp_path, write):
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path / "deep.tif")
    pages = [Image.new("L", (4, 4), level) for level in (0, 255)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    for name, words in {"deep.tif": "no known range", "pages.tif": "holds 2 images"}.items():
        with pytest.raises(ValueError, match=words):
            read_image(tmp_path / name)


def test_what_is_transparent_in_a_mask_marks_nothing(tmp_path):
    mask = np.full((8, 8, 4), 255, np.uint8)
    mask[..., 3] = 0
    mask[2:4, 2:4, 3] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png").sum() == 4
