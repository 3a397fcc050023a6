"""The weights that ship with the package do what their records say."""

import json
import shlex
from pathlib import Path

import pytest
import torch

from diffad_ref import AnomalyFolder, evaluate, pretrained, toy_factory
from diffad_ref.checkpoints import SHIPPED, read_description, read_tensors
from diffad_ref.continual import Continual

NAMES = sorted(path.stem for path in SHIPPED.glob("*.safetensors"))
START = "one_for_more_photographs"  # knows no product, and is judged by none
JUDGED = [name for name in NAMES if name != START]
RECORDS = Path(__file__).parent.parent / "book" / "records" / "toy"
TOY = ("diffusion_ad_toy", "diffusion_ad_toy_segmentation_only")


def by_kind(name: str, metric: str) -> dict[tuple[str, str], float]:
    report = read_description(SHIPPED / name)["record"]["report"]
    return {(row["category"], row["kind"]): row[metric] for row in report["kinds"]}


def test_the_toy_detector_and_its_ablation_are_shipped():
    assert set(TOY) <= set(NAMES)


def test_all_shipped_weights_together_are_small_and_in_half_precision():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 16e6
    for name in NAMES:
        state = read_tensors(SHIPPED / f"{name}.safetensors")
        assert {value.dtype for value in state.values() if value.is_floating_point()} == {
            torch.float16
        }


@pytest.mark.parametrize("name", NAMES)
def test_a_record_says_how_the_weights_came_to_be(name):
    record = read_description(SHIPPED / name)["record"]
    words = shlex.split(record["command"])
    assert words[:3] == ["python", "-m", "diffad_ref"] and words[3] in ("train", "continual")
    assert {"seed", "steps", "data", "versions", "final_losses"} <= set(record)
    assert ("report" in record) == (name in JUDGED)
    steps = sum(stage.steps for stage in pretrained(name).config.stages)
    if len(record.get("tasks", [])) > 1:
        steps = int(words[words.index("--later-steps") + 1])
    assert record["steps"] == steps


@pytest.mark.slow
@pytest.mark.parametrize("name", JUDGED)
def test_shipped_weights_reach_the_numbers_of_their_record(name):
    recorded, detector = read_description(SHIPPED / name)["record"]["report"], pretrained(name)
    images = AnomalyFolder(toy_factory(progress=False), "test", categories=detector.categories)
    found = json.loads(evaluate(detector, images, progress=False).to_json())
    for metric, value in recorded["mean"].items():
        if isinstance(value, float):
            assert found["mean"][metric] == pytest.approx(value, abs=0.005), metric
    for was, now in zip(recorded["kinds"], found["kinds"], strict=True):
        assert (was["category"], was["kind"]) == (now["category"], now["kind"])
        assert now["pixel_ap"] == pytest.approx(was["pixel_ap"], abs=0.02)


def test_the_recorded_means_do_not_fall_behind_what_was_reached():
    mean = read_description(SHIPPED / TOY[0])["record"]["report"]["mean"]
    assert mean["image_auroc"] >= 0.91
    assert mean["pixel_auroc"] >= 0.94
    assert mean["pixel_ap"] >= 0.65


def test_deco_diff_is_one_model_that_beats_a_pca_of_each_texture():
    record = read_description(SHIPPED / "deco_diff_toy")["record"]["report"]
    assert record["mean"]["image_auroc"] >= 0.98
    assert record["mean"]["pixel_auroc"] >= 0.97
    assert record["mean"]["pixel_ap"] >= 0.8
    pca = json.loads((RECORDS / "PCA.json").read_text())["report"]
    ours, theirs = ({r["category"]: r for r in report["rows"]} for report in (record, pca))
    for texture in ("brick", "grass", "gravel"):
        for metric in ("image_auroc", "pixel_auroc", "pixel_ap"):
            assert ours[texture][metric] > theirs[texture][metric], (texture, metric)


@pytest.mark.parametrize(
    "kind", [("gear", "missing"), ("board", "missing"), ("capsule", "print")], ids="-".join
)
def test_what_only_a_reconstruction_can_see_is_lost_without_it(kind):
    full, alone = (by_kind(name, "pixel_ap") for name in TOY)
    assert full[kind] > alone[kind] + 0.1


@pytest.mark.parametrize("metric", ["image_auroc", "pixel_auroc", "pixel_ap"])
def test_the_full_method_beats_its_ablation_in_the_mean(metric):
    full, alone = (read_description(SHIPPED / name)["record"]["report"]["mean"] for name in TOY)
    assert full[metric] > alone[metric]


def test_protection_forgets_a_third_and_ends_near_joint_training():
    runs = read_description(SHIPPED / "one_for_more_toy_3")["record"]["runs"]
    kinds = ("none", "update", "joint")
    none, update, joint = (Continual(**runs[name]["continual"]) for name in kinds)
    for metric in ("image_auroc", "pixel_ap", "loss"):
        assert update.forgetting(metric) <= none.forgetting(metric) / 3, metric
    for metric, least in (("image_auroc", 0.75), ("pixel_ap", 0.25)):
        assert update.a_metric(metric) > max(least, none.a_metric(metric))
    assert update.a_metric("image_auroc") >= 0.9 * joint.a_metric("image_auroc")
