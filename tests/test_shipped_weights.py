"""The weights that ship with the package, and the records of the book, say what the code does."""

import json
import shlex
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from diffad_ref import DiffusionAD, evaluate, pretrained
from diffad_ref.checkpoints import SHIPPED, read_description, read_tensors
from diffad_ref.continual import Continual
from diffad_ref.metrics import METRICS, image_metrics
from diffad_ref.tools.baselines import PCA, SegmentationOnly, Template
from diffad_ref.tools.tables import from_plain
from diffad_ref.tools.toy import CATEGORIES, KINDS, draw

NAMES = sorted(path.stem for path in SHIPPED.glob("*.safetensors"))
START = "one_for_more_photographs"  # knows no product, and is judged by none
JUDGED = [name for name in NAMES if name != START]
TOY = ("diffusion_ad_toy", "diffusion_ad_toy_segmentation_only")
RECORDS = Path(__file__).parent.parent / "book" / "records"
# Of runs of several tasks, of what `reproduce` found, and of what a mask lets through.
OTHERS = ("continual", "reproduce", "gaps")
REPORTS = [
    path
    for path in RECORDS.glob("*/*.json")
    if not path.parent.name.endswith(OTHERS) and path.stem not in OTHERS
]
BOOK = sorted(str(path.relative_to(RECORDS).with_suffix("")) for path in REPORTS)


def recorded(name):
    """The report of a record of the book, or of shipped weights."""
    if name in NAMES:
        return from_plain(read_description(SHIPPED / name)["record"]["report"])
    return from_plain(json.loads((RECORDS / f"{name}.json").read_text("utf-8"))["report"])


# -------------------------------------------------------------------------------------- the files


def test_the_toy_detector_and_its_ablation_are_shipped():
    assert set(TOY) <= set(NAMES)
    assert type(pretrained(TOY[1])) is SegmentationOnly


def test_all_shipped_weights_together_are_small_and_in_half_precision():
    assert sum(path.stat().st_size for path in SHIPPED.glob("*.safetensors")) <= 16e6
    for name in NAMES:
        state = read_tensors(SHIPPED / f"{name}.safetensors")
        assert {value.dtype for value in state.values() if value.is_floating_point()} == {
            torch.float16
        }


@pytest.mark.parametrize("name", NAMES)
def test_a_record_says_how_the_weights_came_to_be(name):
    detector, record = pretrained(name), read_description(SHIPPED / name)["record"]
    words = shlex.split(record["command"])
    assert words[:3] == ["python", "-m", "diffad_ref"] and words[3] in ("train", "continual")
    assert {"seed", "steps", "data", "versions", "final_losses"} <= set(record)
    assert ("report" in record) == (name in JUDGED)
    steps = sum(stage.steps for stage in detector.stages)
    if len(record.get("tasks", [])) > 1:
        steps = int(words[words.index("--later-steps") + 1])
    assert record["steps"] == steps and not detector.training


# ------------------------------------------------------------------- the code gives these numbers
# An image's noise follows from its pixels, so that a few can be judged again without the others.
# Rounding moves a score by 1e-6 of itself; other noise, or weights that are not half-precision
# numbers, by far more than 1e-4.

ORDER = [
    (category, kind, i)
    for category in CATEGORIES
    for kind in sorted(("good", *KINDS[category]))
    for i in range(40 if kind == "good" else 20)
]
PLACES = [0, 16, 384, 400]  # boards; broken gears and good grass


@lru_cache
def sample(place):
    """An image of the toy test set, drawn anew."""
    category, kind, i = ORDER[place]
    image, mask = draw(category, "test", kind, i)
    return {
        "image": torch.from_numpy(image).permute(2, 0, 1) / 255,
        "mask": torch.from_numpy(mask)[None] / 255,
        "label": int(kind != "good"),
        "category": category,
        "category_index": CATEGORIES.index(category),
        "kind": kind,
        "path": f"{category}/test/{kind}/{i:03}.png",
    }


def diffusion_ad(**changes):
    shipped = pretrained("diffusion_ad_toy")
    detector = DiffusionAD(replace(shipped.config, **changes))
    detector.load_state_dict(shipped.state_dict())
    return detector


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("DiffusionAD", diffusion_ad),
        ("DiffusionAD,_one_draw", lambda: diffusion_ad(draws=1)),
        ("segmentation_only", lambda: pretrained(TOY[1])),
        ("DeCo-Diff", lambda: pretrained("deco_diff_toy")),
    ],
)
def test_recorded_scores_of_single_images_come_out_again(name, build):
    images, detector = recorded(f"toy/{name}").images, build()
    batch = torch.utils.data.default_collate([sample(place) for place in PLACES])
    assert batch["path"] == images["path"][PLACES].tolist()
    found = detector.predict(batch["image"], batch["category_index"]).score
    expected = torch.tensor(images["score"][PLACES].to_numpy()).float()
    assert torch.allclose(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", [n for n in JUDGED if n.startswith("one_for_more_toy")])
def test_recorded_metrics_of_a_kind_come_out_again(name):
    """Of the first: its images and the good ones of its category fill the first two batches."""
    found = evaluate(pretrained(name), [sample(i) for i in range(64)], progress=False)
    assert ORDER[59] == ("board", "good", 39)
    found, expected = (r.kinds.loc["board", "bent"] for r in (found, recorded(name)))
    for metric in METRICS:
        assert found[metric] == pytest.approx(expected[metric], abs=0.002), metric
    assert (found["n_good"], found["n_defective"]) == (40, 20)


@pytest.fixture(scope="module")
def gears():
    """The good gears that baselines learn from."""
    images = [draw("gear", "train", "good", i)[0] for i in range(200)]
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    return [{"image": image, "category": "gear", "label": 0} for image in images]


@pytest.mark.parametrize(("name", "kind"), [("template", Template), ("PCA", PCA)])
def test_recorded_scores_of_a_baseline_come_out_again(gears, name, kind):
    baseline, images = kind().fit(gears), recorded(f"toy/{name}").images
    places = range(384, 400)
    x = torch.stack([sample(place)["image"] for place in places])
    found = baseline.predict(x, torch.zeros(16, dtype=torch.long)).score
    expected = torch.tensor(images["score"][places].to_numpy()).float()
    assert torch.allclose(found, expected, rtol=1e-4, atol=0)


# --------------------------------------------------------------------- records agree in themselves


@pytest.mark.parametrize("name", BOOK)
def test_recorded_tables_follow_from_the_recorded_scores(name):
    report = recorded(name)
    images, found = report.images, {}
    for category, mine in images.groupby("category"):
        found[category] = image_metrics(mine["score"], mine["label"])
        for kind in set(mine["kind"]) - {"good"}:
            rivals = mine[mine["kind"].isin(["good", kind])]
            counts = {"n_good": sum(rivals["label"] == 0), "n_defective": sum(rivals["label"])}
            expected = image_metrics(rivals["score"], rivals["label"]) | counts
            assert report.kinds.loc[category, kind][list(expected)].to_dict() == pytest.approx(
                expected
            )
    assert len(report.kinds) == len(images[images["label"] == 1].groupby(["category", "kind"]))
    for category, expected in found.items():
        row = report.table.loc[category]
        assert row[list(expected)].to_dict() == pytest.approx(expected)
        assert row["n_good"] + row["n_defective"] == sum(images["category"] == category)
    rows = report.table.drop("mean")
    assert sorted(rows.index) == sorted(found)
    for metric in METRICS:
        assert report.mean[metric] == pytest.approx(rows[metric].mean())
    for count in ("n_good", "n_defective"):
        assert report.mean[count] == rows[count].sum()


@pytest.mark.parametrize(
    ("name", "weights"),
    [("DiffusionAD", TOY[0]), ("segmentation_only", TOY[1]), ("DeCo-Diff", "deco_diff_toy")],
)
def test_book_and_weights_record_the_same_tables(name, weights):
    book, shipped = recorded(f"toy/{name}"), recorded(weights)
    assert book.table.equals(shipped.table) and book.kinds.equals(shipped.kinds)


# -------------------------------------------------------------------------- what the numbers say


def test_the_recorded_means_do_not_fall_behind_what_was_reached():
    mean = recorded(TOY[0]).mean
    assert mean["image_auroc"] >= 0.91
    assert mean["pixel_auroc"] >= 0.94
    assert mean["pixel_ap"] >= 0.65


def test_deco_diff_is_one_model_that_beats_a_pca_of_each_texture():
    ours, theirs = recorded("deco_diff_toy"), recorded("toy/PCA")
    assert ours.mean["image_auroc"] >= 0.98
    assert ours.mean["pixel_auroc"] >= 0.97
    assert ours.mean["pixel_ap"] >= 0.8
    for texture in ("brick", "grass", "gravel"):
        for metric in ("image_auroc", "pixel_auroc", "pixel_ap"):
            assert ours.table.loc[texture, metric] > theirs.table.loc[texture, metric]


@pytest.mark.parametrize(
    "kind", [("gear", "missing"), ("board", "missing"), ("capsule", "print")], ids="-".join
)
def test_what_only_a_reconstruction_can_see_is_lost_without_it(kind):
    full, alone = (recorded(name).kinds["pixel_ap"][kind] for name in TOY)
    assert full > alone + 0.1


@pytest.mark.parametrize("metric", ["image_auroc", "pixel_auroc", "pixel_ap"])
def test_the_full_method_beats_its_ablation_in_the_mean(metric):
    full, alone = (recorded(name).mean[metric] for name in TOY)
    assert full > alone


def test_protection_forgets_a_third_and_ends_near_joint_training():
    runs = read_description(SHIPPED / "one_for_more_toy_3")["record"]["runs"]
    kinds = ("none", "update", "joint")
    none, update, joint = (Continual(**runs[name]["continual"]) for name in kinds)
    for metric in ("image_auroc", "pixel_ap", "loss"):
        assert update.forgetting(metric) <= none.forgetting(metric) / 3, metric
    for metric, least in (("image_auroc", 0.75), ("pixel_ap", 0.25)):
        assert update.a_metric(metric) > max(least, none.a_metric(metric))
    assert update.a_metric("image_auroc") >= 0.9 * joint.a_metric("image_auroc")
