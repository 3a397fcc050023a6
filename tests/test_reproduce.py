"""One command a paper: what it trains, how it goes on, what it refuses, and the table it writes."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mvtec_ad
import numpy as np
import pytest
import torch
import visa
from PIL import Image

import diffad_ref as da
from diffad_ref.__main__ import main
from diffad_ref.data import AnomalyFolder
from diffad_ref.evaluation import evaluate
from diffad_ref.tools import plan, reproduce
from diffad_ref.tools.protection import Protection
from diffad_ref.tools.protocols import MVTEC, ORDERS, PROTOCOLS, VISA, pro_curve_deco_diff
from diffad_ref.tools.settings import (
    IMAGES,
    SETTINGS,
    TESTED,
    images_of,
    only,
    plan_table,
    recipe,
    setting_of,
)
from diffad_ref.training import plan_stages

SAMPLE = Path(__file__).parents[2] / "shared/data/mvtec_ad_sample"
SAMPLE = Path(os.environ.get("DIFFAD_MVTEC", SAMPLE))
real = pytest.mark.skipif(not SAMPLE.is_dir(), reason="no MVTec AD; DIFFAD_MVTEC names its folder")
TINY = ("--profile", "tiny", "--image-size", "32", "--steps", "2", "--set", "width=8")
TINY += ("--set", "norm_groups=4")


# --------------------------------------------------------------------------------------- settings


def test_the_data_sets_have_the_numbers_of_training_images_that_their_scripts_check():
    stated = {name: train for name, (train, _) in (mvtec_ad.NUMBERS | visa.NUMBERS).items()}
    assert IMAGES == stated and len(MVTEC) == 15 and len(VISA) == 12
    good = {name: good for name, (_, good) in visa.NUMBERS.items()}
    tested = {name: test for name, (_, test) in mvtec_ad.NUMBERS.items()}
    assert TESTED == tested | {name: count + 100 for name, count in good.items()}
    assert sum(IMAGES[name] for name in MVTEC) == 3629


def test_every_order_of_one_for_more_is_a_setting_and_diffusion_ad_has_a_model_a_category():
    assert {n for p, n in SETTINGS if p == "one_for_more"} == set(ORDERS) - {"toy"}
    assert SETTINGS["diffusion_ad", "mvtec"].groups == tuple((name,) for name in MVTEC)
    assert SETTINGS["deco_diff", "visa"].groups == (VISA,)


@pytest.mark.parametrize(
    ("paper", "name", "category", "steps"),
    [
        ("diffusion_ad", "mvtec", "toothbrush", 9_000),
        ("diffusion_ad", "mvtec", "hazelnut", 72_000),
        ("diffusion_ad", "visa", "candle", 168_000),
        ("one_for_more", "mvtec 14-1", "zipper", 10_000),
        ("one_for_more", "mvtec 10-1x5", "toothbrush", 2_500),
        ("one_for_more", "visa 11-1", "pipe_fryum", 8_500),  # 200 images a class
    ],
)
def test_a_model_or_task_is_as_long_as_the_released_one(paper, name, category, steps):
    setting = only(SETTINGS[paper, name], [category])
    with torch.device("meta"):
        stages = recipe(paper, setting).stages
    assert sum(s.steps for s in plan_stages(stages, images_of(setting)[0])) == steps


def test_deco_diff_makes_800_epochs_of_nine_tenths_of_the_images():
    for name, steps in (("mvtec", 10_400), ("visa", 24_800)):
        with torch.device("meta"):
            (stage,) = recipe("deco_diff", SETTINGS["deco_diff", name]).stages
        assert stage.steps == steps
        assert stage.lr["corrector"].warmup == 10 * steps / 800


def test_visa_has_variants_of_its_own():
    with torch.device("meta"):
        deco = recipe("deco_diff", SETTINGS["deco_diff", "visa"]).config
        one = recipe("one_for_more", SETTINGS["one_for_more", "visa 8-4"]).config
    assert deco.turned == 0.5 and deco.classes == 12
    assert one.pasting.share == 2 / 3 and one.pasting.source == "class"
    assert one.stages_compared == (0, 2, 4)
    with torch.device("meta"):
        mvtec = recipe("one_for_more", SETTINGS["one_for_more", "mvtec 14-1"]).config
    assert mvtec.pasting.source == "itself" and mvtec.pasting.share == 0.5
    assert images_of(SETTINGS["one_for_more", "visa 11-1"]) == [2200, 200]


def test_of_each_category_of_visa_so_many_images_are_learned_from(mvtec_root, monkeypatch):
    few = replace(SETTINGS["one_for_more", "visa 8-4"], most=2)
    detector = recipe("one_for_more", few, "tiny")
    train, test = (detector.folder(mvtec_root, split) for split in ("train", "test"))
    assert [sample.path.name for sample in train.samples] == ["000.png", "001.png"] * 2
    assert len(test) == len(da.AnomalyFolder(mvtec_root, "test"))


def test_a_part_keeps_the_order_of_the_setting_and_its_tasks():
    tasks = only(setting_of("one_for_more", "mvtec 10-5"), ["wood", "cable", "bottle"])
    assert tasks.groups == (("bottle", "cable"), ("wood",))
    with pytest.raises(ValueError, match="--only shoe: the setting has bottle"):
        only(setting_of("diffusion_ad", "mvtec"), ["shoe"])
    with pytest.raises(ValueError, match="no setting 'mvtec'; there are 'mvtec 14-1'"):
        setting_of("one_for_more", "mvtec")


def test_the_plan_adds_up_what_each_model_takes(monkeypatch):
    cost = Protection(10**9, 10**9, 10**9, 2**30, 2**30, 1)
    hand = plan.Plan("DiffusionAD", 10**9, 10**9, 10**12, 10**11, {}, 1, 1, 8, cost)
    bare = replace(hand, protection=None)
    monkeypatch.setattr(plan, "recipe_plans", lambda: (bare, bare, replace(hand)))
    frame = plan_table().frame
    assert len(frame) == len(SETTINGS)
    ad = frame.loc["diffusion_ad", "mvtec"]
    expected = sum(3000 * (IMAGES[name] // 16) for name in MVTEC)
    assert ad["models"] == 15 and ad["training images"] == 3629 and ad["steps"] == expected
    seconds = expected * 16 * 1e12 / (plan.GPUS["T4"][0] * 1e12 * plan.SHARES["DiffusionAD"])
    assert ad["T4, h"] == pytest.approx(seconds / 3600)
    assert ad["disk, GB"] == pytest.approx((15 * 6 + 8) * 1e9 / 2**30)
    one = frame.loc["one_for_more", "mvtec 14-1"]
    assert (one["tasks"], one["steps"]) == (2, 151_500)
    assert one["disk, GB"] == pytest.approx(2 * (6e9 / 2**30 + 1) + 8e9 / 2**30)
    first, later = (
        replace(hand, steps=n, images=12 * n, protection=replace(cost, images=k // 10))
        for n, k in ((141_500, 3389), (10_000, 240))
    )
    hours = first.hours("T4") + first.gathering_hours("T4") + later.protected_hours("T4")
    assert one["T4, h"] == pytest.approx(hours)
    part = plan_table([("diffusion_ad", "mvtec")], ["bottle"]).frame
    assert part["steps"].tolist() == [39_000]
    assert frame.loc["diffusion_ad", "dagm"].isna()["steps"]  # its numbers are not stated


# ------------------------------------------------------------------------------------------- runs


@pytest.fixture
def root(mvtec_root, monkeypatch):
    """The small data set under two names of MVTec AD, with as many images as are stated."""
    (mvtec_root / "carpet").rename(mvtec_root / "transistor")
    monkeypatch.setattr(reproduce, "IMAGES", {"bottle": 3, "transistor": 3})
    monkeypatch.setattr(reproduce, "TESTED", {})
    return mvtec_root


def words(paper, name, root, out, *more):
    part = () if "--only" in more else ("--only", "bottle", "transistor")
    return [str(w) for w in ("reproduce", paper, name, "--data", root, "--out", out, *part, *more)]


def table(out):
    return json.loads((out / "table.json").read_text())


def test_diffusion_ad_trains_a_model_for_each_category(root, tmp_path, capsys):
    out = tmp_path / "run"
    more = (*TINY, "--set", "segmentation_width=4", "--set", "heads=1")
    assert main(words("diffusion_ad", "mvtec", root, out, *more)) == 0
    printed = capsys.readouterr().out
    assert "| image AUROC" in printed and "published" in printed and "99.7" in printed
    assert "categories: 2 of 15" in printed and "see steps" in printed
    assert (out / "table.md").read_text().strip() == printed.strip()
    found = table(out)
    assert found["steps"] == 4 and found["profile"] == "tiny"
    assert found["images"] == "complete, by the counts that the data set states"
    for category in ("bottle", "transistor"):
        assert da.load(out / category / "weights").categories == (category,)
    assert [row["category"] for row in found["categories here"]] == ["bottle", "transistor"]
    means = [row["image_auroc"] for row in found["categories here"]]
    assert found["mean"]["here"]["image_auroc"] == pytest.approx(sum(means) / 2)
    assert found["mean"]["protocol"]["aupro"] != found["mean"]["here"]["aupro"]


def test_a_table_says_where_nobody_knows_how_many_images_there_are(mvtec_root, tmp_path):
    (mvtec_root / "bottle").rename(mvtec_root / "tubes")
    out = tmp_path / "run"
    more = ("--only", "tubes", *TINY, "--set", "segmentation_width=4", "--set", "heads=1")
    assert main(words("diffusion_ad", "mpdd", mvtec_root, out, *more)) == 0
    assert "images: as found; how many there are of tubes is not" in (out / "table.md").read_text()


def test_a_run_goes_on_where_it_was_stopped(root, tmp_path, monkeypatch):
    out, fit, trained = tmp_path / "run", da.fit, []
    more = (*TINY, "--set", "segmentation_width=4", "--set", "heads=1")

    def counted(model, data, **settings):
        trained.append(data.categories)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return fit(model, data, **settings)

    monkeypatch.setattr(da, "fit", counted)
    assert main(words("diffusion_ad", "mvtec", root, out, *more)) == 130
    assert not (out / "table.json").exists()
    assert main(words("diffusion_ad", "mvtec", root, out, *more)) == 0
    assert trained == [["bottle"], ["transistor"], ["transistor"]]
    whole = tmp_path / "whole"
    monkeypatch.setattr(da, "fit", fit)
    assert main(words("diffusion_ad", "mvtec", root, whole, *more)) == 0
    assert table(out)["mean"] == table(whole)["mean"]


def test_deco_diff_trains_one_model_for_all(root, tmp_path):
    out = tmp_path / "run"
    more = (*TINY, "--set", "context=8", "--set", "heads=1")
    assert main(words("deco_diff", "mvtec", root, out, *more)) == 0
    model = da.load(out / "all" / "weights")
    assert model.categories == ("bottle", "transistor") and model.config.classes == 2
    assert table(out)["steps"] == 2


def test_one_for_more_learns_task_after_task_and_says_what_it_forgot(root, tmp_path, capsys):
    out = tmp_path / "run"
    more = ("--profile", "tiny", "--image-size", "64", "--steps", "1", "--batch-size", "2")
    assert main(words("one_for_more", "mvtec 10-5", root, out, *more)) == 0
    assert (out / "task_2" / "weights.safetensors").is_file()
    found = table(out)
    assert found["steps"] == 2 and set(found["forgetting"]) == set(found["mean"]["here"])
    assert "forgotten here" in capsys.readouterr().out


def test_a_budget_shortens_the_recipe_and_the_table_says_by_how_much(root, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(reproduce, "_seconds_a_step", lambda *_: 1.0)
    more = ("--profile", "tiny", "--image-size", "32", "--set", "width=8", "--set", "norm_groups=4")
    more += ("--set", "context=8", "--set", "heads=1", "--budget", "2min")
    assert main(words("deco_diff", "mvtec", root, out, *more)) == 0
    assert table(out)["share of the recipe"] == 0.01 and table(out)["steps"] == 120


def test_seconds_of_a_step_do_not_count_the_reading_of_images(mvtec_root, monkeypatch):
    detector = da.DecoDiff.tiny(image_size=32, width=8, norm_groups=4, context=8, heads=1)
    data, read = detector.folder(mvtec_root, "train"), AnomalyFolder._decode

    def slowly(self, record):
        time.sleep(0.2)
        return read(self, record)

    monkeypatch.setattr(AnomalyFolder, "_decode", slowly)
    found = reproduce._seconds_a_step(detector, data, "auto", detector.stages[0])
    assert 0.001 < found < 1


def test_two_processes_share_a_run(root, tmp_path):
    """What is written is written once; every process reads it."""
    out = tmp_path / "run"
    more = (*TINY, "--set", "context=8", "--set", "heads=1", "--batch-size", "1")
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom diffad_ref.__main__ import main\nfrom diffad_ref.tools import reproduce\n"
        "reproduce.IMAGES = {'bottle': 3, 'transistor': 3}\nreproduce.TESTED = {}\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    call += ["--master_port", str(free_port()), str(script)]
    call += words("deco_diff", "mvtec", root, out, *more)
    done = subprocess.run(call, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert table(out)["steps"] == 2 and (out / "all" / "result.json").is_file()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def test_an_imagenet_start_says_what_it_did_not_find(root, tmp_path, monkeypatch, capsys):
    from diffad_ref.tools import official_deco_diff

    def start(detector, path):
        detector.started_from = [path.name, 4]
        return ["embedding.weight"]

    monkeypatch.setattr(official_deco_diff, "start_from_imagenet", start)
    checkpoint = tmp_path / "imagenet.ckpt"
    checkpoint.write_bytes(b"1234")
    more = (*TINY, "--set", "context=8", "--set", "heads=1", "--imagenet", checkpoint)
    assert main(words("deco_diff", "mvtec", root, tmp_path / "run", *more)) == 0
    assert "or of another shape: embedding.weight" in capsys.readouterr().err
    kept = json.loads((tmp_path / "run" / "reproduce.json").read_text())["identity"]
    assert kept["imagenet"] == ["imagenet.ckpt", 4]


# ------------------------------------------------------------------------------------- bad input


def test_a_root_without_some_categories_is_refused_with_what_it_has(root, fails, tmp_path):
    said = fails("reproduce", "deco_diff", "mvtec", "--data", root, "--out", tmp_path / "run")
    assert "lacks cable, capsule" in said and "--only bottle transistor" in said


def test_half_a_category_is_refused(root, fails, tmp_path, monkeypatch):
    (root / "bottle/train/good/000.png").unlink()
    call = words("deco_diff", "mvtec", root, tmp_path / "run", *TINY)
    assert "lacks training images of bottle (2 of 3)" in fails(*call)
    shutil.rmtree(root / "bottle/test")
    assert "bottle" in fails(*call) and not (tmp_path / "run").exists()


def test_half_a_test_set_is_refused_before_anything_is_trained(root, fails, tmp_path, monkeypatch):
    call = words("deco_diff", "mvtec", root, tmp_path / "run", *TINY)
    monkeypatch.setattr(reproduce, "TESTED", {"bottle": 83})
    assert "lacks test images of bottle (" in fails(*call)
    monkeypatch.setattr(reproduce, "TESTED", {})
    masks = root / "bottle/ground_truth"
    masks.rename(root / "kept")
    assert "lacks masks of defective images of bottle (" in fails(*call)
    (root / "kept").rename(masks)
    shutil.rmtree(root / "transistor/test/good")
    assert "test images are needed, also of transistor" in fails(*call)
    assert not (tmp_path / "run").exists()


def test_a_step_is_timed_without_what_comes_before_it(root, monkeypatch):
    """The first step of a run, which reads and prepares, takes three seconds here."""
    detector = recipe("deco_diff", only(SETTINGS["deco_diff", "mvtec"], ["bottle"]), "tiny", 32)
    data, real = detector.folder(root, "train", categories=["bottle"]), da.fit

    def fit(*arguments, **options):
        time.sleep(3)
        return real(*arguments, **options)

    monkeypatch.setattr(da, "fit", fit)
    found = reproduce._seconds_a_step(
        detector, data, "auto", replace(detector.stages[0], batch_size=1)
    )
    assert 0 < found < 1


def test_maps_too_small_for_the_papers_protocol_are_refused_before(root, fails, tmp_path):
    said = fails(
        *words("one_for_more", "mvtec 14-1", root, tmp_path / "run", *TINY, "--only", "bottle")
    )
    assert "57 x 57 pixels or more" in said and not (tmp_path / "run").exists()


def test_the_papers_textures_are_asked_for_before_anything_is_trained(root, fails, tmp_path):
    said = fails(*words("diffusion_ad", "mvtec", root, tmp_path / "run"))
    assert "data_scripts/dtd.py" in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--budget", "soon"), "a budget is a time such as 90s, 10min or 2h"),
        (("--budget", "1min", "--steps", "3"), "give --budget or --steps, not both"),
        (("--textures", "here"), "here is for diffusion_ad, not for deco_diff"),
        (("--only", "shoe"), "--only shoe"),
        (("--plan", "--budget", "1h"), "--plan counts the paper's recipe"),
        (("--plan", "--image-size", "128"), "--plan counts the paper's recipe"),
    ],
)
def test_words_that_make_no_sense_are_refused(root, fails, tmp_path, more, said):
    assert said in fails(*words("deco_diff", "mvtec", root, tmp_path / "run", *more))


def test_a_budget_that_is_too_short_for_an_epoch_says_what_one_takes(
    root, fails, tmp_path, monkeypatch
):
    monkeypatch.setattr(reproduce, "_seconds_a_step", lambda *_: 10.0)
    more = ("--profile", "tiny", "--image-size", "32", "--set", "width=8", "--set", "norm_groups=4")
    said = fails(*words("deco_diff", "mvtec", root, tmp_path / "run", *more, "--budget", "9s"))
    assert "a budget of 9s is too short" in said and "10 s" in said


def test_a_folder_of_another_run_is_refused(root, fails, tmp_path, write):
    out = tmp_path / "run"
    more = (*TINY, "--set", "context=8", "--set", "heads=1")
    assert main(words("deco_diff", "mvtec", root, out, *more)) == 0
    for change, different in (
        (("--set", "shift=2"), "config.shift"),
        (("--only", "bottle"), "config.classes, data.bottle, data.group 1, groups, test.bottle"),
        (("--seed", "3"), "training.seed"),
    ):
        said = fails(*words("deco_diff", "mvtec", root, out, *more, *change))
        assert f"holds another run (different {different}" in said
    write(root / "bottle/train/good/000.png", np.zeros((20, 24, 3), np.uint8))
    assert "(different data.group 1.images)" in fails(
        *words("deco_diff", "mvtec", root, out, *more)
    )


def test_without_a_setting_it_is_said_what_is_needed(fails):
    assert "reproduce PAPER SETTING --data FOLDER" in fails("reproduce", "deco_diff")


# -------------------------------------------------------------------------------------- protocols


class Grey:
    """A detector whose map is how bright an image is."""

    device = torch.device("cpu")

    def predict(self, images, category_index=None, generator=None):
        grey = images.mean(1)
        return da.Prediction(grey, grey.flatten(1).amax(1), images)


def test_protocols_make_masks_from_the_original_ones(mvtec_root, write):
    """A defect of 8 x 6 in 24 x 20 pixels, at half the size 12 x 10: some pixels are half in it."""
    for path in mvtec_root.glob("*/ground_truth/*/*.png"):
        mask = np.zeros((20, 24), np.uint8)
        mask[5:11, 7:16] = 255
        write(path, mask)
    data = AnomalyFolder(mvtec_root, "test", (10, 12), resample="linear")
    defect = next(i for i, sample in enumerate(data.samples) if sample.label)
    sizes = {}
    for name, protocol in PROTOCOLS.items():
        sizes[name] = int(protocol.with_its_masks(data)[defect]["mask"].sum())
    assert (
        int(data[defect]["mask"].sum()) == 4 * 5 - 2
    )  # half of an edge pixel is enough, a quarter is not
    assert sizes == {"diffusion_ad": 2 * 4, "deco_diff": 4 * 5, "one_for_more": 4 * 5}


def test_deco_diffs_protocol_takes_an_image_whose_defect_is_cropped_away_for_normal(mvtec_root):
    data = AnomalyFolder(mvtec_root, "test", 40, categories=["bottle"], crop=8)
    report = evaluate(Grey(), data, progress=False)
    assert report.table.loc["bottle", "n_defective"] == 4
    near = AnomalyFolder(mvtec_root, "test", 40, categories=["bottle"], crop=8)
    paths = {sample.mask_path for sample in near.samples if sample.label}
    first = sorted(paths)[0]
    Image.fromarray(np.eye(1, dtype=np.uint8) * 255).resize((24, 20)).save(first)  # all of it
    for path in paths - {first}:
        mask = np.zeros((20, 24), np.uint8)
        mask[0, 0] = 255  # a corner, which is cropped away
        Image.fromarray(mask).save(path)
    report = evaluate(Grey(), near, progress=False, protocol=PROTOCOLS["deco_diff"])
    assert report.table.loc["bottle", ["n_good", "n_defective"]].tolist() == [5, 1]


def test_labels_are_not_read_from_masks_that_are_not_there(mvtec_root):
    next(mvtec_root.glob("*/ground_truth/*/*.png")).unlink()
    data = AnomalyFolder(mvtec_root, "test", 40)
    with pytest.raises(ValueError, match="deco_diff reads labels from masks"):
        evaluate(Grey(), data, progress=False, protocol=PROTOCOLS["deco_diff"])


def test_a_map_without_false_positives_has_a_curve_all_the_same():
    maps = np.zeros((1, 8, 8))
    maps[0, 2:5, 2:5] = 1
    fpr, pro = pro_curve_deco_diff(maps, maps.astype(int))
    assert not fpr.any() and (pro == 1).all()


# ---------------------------------------------------------------------------------- the real thing


@real
@pytest.mark.slow
def test_bottles_and_transistors_of_mvtec_ad_go_through_a_run(tmp_path):
    more = ("--profile", "tiny", "--image-size", "32", "--steps", "2", "--set", "width=8")
    more += ("--set", "norm_groups=4", "--set", "context=8", "--set", "heads=1")
    out = tmp_path / "run"
    assert main(words("deco_diff", "mvtec", SAMPLE, out, *more)) == 0
    rows = {row["category"]: row for row in table(out)["categories here"]}
    assert {name: (r["n_good"], r["n_defective"]) for name, r in rows.items()} == {
        "bottle": (20, 63),
        "transistor": (60, 40),
    }


@real
@pytest.mark.slow
def test_masks_of_mvtec_ad_grow_and_shrink_by_the_rule_of_the_protocol():
    data = AnomalyFolder(SAMPLE, "test", 128, ["bottle"], resample="linear")
    data.samples = [sample for sample in data.samples if sample.label][::6]
    area = {"exact": sum(float(item["mask"].sum()) for item in data)}
    for name, protocol in PROTOCOLS.items():
        area[name] = sum(float(s["mask"].sum()) for s in protocol.with_its_masks(data))
    assert area["diffusion_ad"] < area["exact"] < area["deco_diff"] == area["one_for_more"]
