"""Tasks one after the other: measures by hand, what protections hold, and runs that break off."""

import json
import math
import shutil
from dataclasses import asdict, replace
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffad_ref import continual, one_for_more
from diffad_ref.checkpoints import load, read_description, read_tensors
from diffad_ref.codecs import CodecConfig
from diffad_ref.continual import (
    PROTECTIONS,
    Continual,
    check_tasks,
    fit_continual,
    gather,
    held_out_loss,
)
from diffad_ref.deco_diff import DecoDiff
from diffad_ref.diffusion import seeded
from diffad_ref.gradient_projection import GradientProjectionMemory
from diffad_ref.metrics import METRICS
from diffad_ref.one_for_more import Config, OneForMore
from diffad_ref.tools.photographs import Photographs
from diffad_ref.tools.protocols import ORDERS
from diffad_ref.tools.toy import CATEGORIES, toy_factory
from diffad_ref.training import STATE

SMALL = Config.tiny(
    32,
    start=None,
    width=8,
    norm_groups=4,
    window=(3, 3),
    feed_forward=16,
    condition_layers=1,
    walk=2,
)
TASKS = [["gear"], ["brick"]]
ALL = 1 - 1e-9  # of the energy: what an old task needs least is protected too

pytestmark = pytest.mark.filterwarnings("ignore:no direction is left")  # small layers fill up


photographs = lru_cache(Photographs)


def trained_weights(out):
    """The detector's state at the last checkpoint of a run."""
    state = read_tensors(out / STATE)
    return {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}


def build(config=SMALL):
    """A detector whose codec and features have learned before all tasks: from photographs."""
    torch.manual_seed(0)
    detector = OneForMore(config)
    detector.prepare(photographs(32, 60))
    return detector


def learn(root, out, protection):
    """Train on both tasks, two steps each; returns the detector and its result."""
    settings = {"gamma": ALL, "steps": 2, "batch_size": 2, "device": "cpu"}
    settings |= {"protection": protection, "progress": False}
    detector = build()
    return detector, fit_continual(detector, root, TASKS, out, **settings)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A small toy: two images to learn from in each category."""
    settings = {"size": 32, "n_train": 2, "n_good": 1, "n_per_kind": 1, "progress": False}
    return toy_factory(tmp_path_factory.mktemp("toy"), **settings)


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """Gives the finished run under a protection: its folder, detector and result."""

    @lru_cache
    def run(protection):
        folder = tmp_path_factory.mktemp(protection)
        detector, result = learn(root, folder, protection)
        return SimpleNamespace(folder=folder, detector=detector, result=result)

    return run


def after(run, task):
    """The detector as it was after a task, in full precision."""
    detector = build()
    detector.load_state_dict(trained_weights(run.folder / f"task_{task}"))
    return detector.eval()


# ------------------------------------------------------------------------------------- the tasks


def other_product(found):
    found["rows"][0]["category"] = "board"


def share_of_nothing(found):
    found["taken"] = {"layer": [0, 0]}


@pytest.mark.parametrize(
    "damage", [lambda found: found["rows"].clear(), other_product, share_of_nothing]
)
def test_results_that_no_table_could_show_are_named(finished, root, tmp_path, damage):
    out = shutil.copytree(finished("none").folder, tmp_path / "out")
    path = out / "task_1" / "result.json"
    damage(found := json.loads(path.read_text()))
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"task_1/result\.json is damaged"):
        learn(root, out, "none")


def test_orders_are_those_of_the_paper():
    early = "bottle cable capsule carpet grid hazelnut leather metal_nut pill screw".split()
    late = "tile toothbrush transistor wood zipper".split()
    boards = "candle capsules cashew chewinggum fryum macaroni1 macaroni2 pcb1".split()
    rest = "pcb2 pcb3 pcb4 pipe_fryum".split()
    mvtec = early + late
    expected = {
        "mvtec 14-1": [mvtec[:14], ["zipper"]],
        "mvtec 10-5": [early, late],
        "mvtec 3x5": [mvtec[0:3], mvtec[3:6], mvtec[6:9], mvtec[9:12], mvtec[12:15]],
        "mvtec 10-1x5": [early, *([name] for name in late)],
        "visa 11-1": [[*boards, *rest[:3]], ["pipe_fryum"]],
        "visa 8-4": [boards, rest],
        "visa 8-1x4": [boards, *([name] for name in rest)],
    }
    found = {name: [list(task) for task in tasks] for name, tasks in ORDERS.items()}
    assert sorted(sum(found.pop("toy"), [])) == sorted(CATEGORIES)
    assert found == expected
    for tasks in ORDERS.values():
        check_tasks(tasks)


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([], "every task needs at least one category"),
        ([["gear"], []], "every task needs at least one category"),
        ([["gear", "brick"], ["grass"], ["brick", "gear"]], "more than one task: brick, gear"),
    ],
)
def test_tasks_that_are_empty_or_share_a_category_are_refused(tmp_path, tasks, words):
    for use in (check_tasks, lambda tasks: fit_continual(build(), tmp_path, tasks, tmp_path)):
        with pytest.raises(ValueError, match=words):
            use(tasks)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------- the measures

AUROC = {"a": (0.9, 0.7, 0.75), "b": (0.8, 0.85, 0.5), "c": (0.6, 0.65), "d": (0.4,)}
LOSS = {"a": (0.1, 0.3, 0.2), "b": (0.2, 0.1, 0.4), "c": (0.5, 0.4), "d": (0.9,)}


def three_tasks():
    rows = []
    for task, categories in enumerate(("ab", "abc", "abcd")):
        for name in categories:
            k = task - {"a": 0, "b": 0, "c": 1, "d": 2}[name]
            row = {"task": task, "category": name, "image_auroc": AUROC[name][k]}
            rows.append(row | {"pixel_ap": AUROC[name][k], "loss": LOSS[name][k]})
    taken = [{"x": [1, 4], "y": [3, 6]}, {"x": [2, 4], "y": [6, 6]}, {"x": [4, 4], "y": [6, 6]}]
    return Continual([["a", "b"], ["c"], ["d"]], rows, taken)


def test_measures_by_hand():
    result = three_tasks()
    assert result.a_metric("image_auroc") == pytest.approx((0.75 + 0.5 + 0.65 + 0.4) / 4)
    assert result.forgetting("image_auroc") == pytest.approx((0.15 + 0.35 - 0.05) / 3)
    assert result.plasticity("image_auroc") == pytest.approx((0.6 + 0.4) / 2)
    assert result.share_taken() == pytest.approx([0.375, 0.75, 1])


def test_a_loss_that_grew_is_forgetting_and_one_that_fell_is_the_contrary():
    """From the best, which is the smallest: 0.1 to 0.2, 0.1 to 0.4, 0.5 to 0.4."""
    assert three_tasks().forgetting("loss") == pytest.approx((0.1 + 0.3 - 0.1) / 3)


def test_with_one_task_there_is_nothing_to_forget():
    one = Continual([["a"]], three_tasks().rows[:1], [{}])
    with pytest.raises(ValueError, match="forgetting and plasticity need at least two tasks"):
        one.forgetting("image_auroc")
    with pytest.raises(ValueError, match="forgetting and plasticity need at least two tasks"):
        one.plasticity("image_auroc")


def test_what_was_not_measured_is_no_number():
    """Without masks there is no pixel metric: neither a crash nor a zero."""
    run = three_tasks()
    run.rows = [row | {"pixel_ap": None} for row in run.rows]
    found = run.a_metric("pixel_ap"), run.forgetting("pixel_ap"), run.plasticity("pixel_ap")
    assert all(map(math.isnan, found))


class Counting(nn.Module):
    """Its loss is the mean of the images, and it runs a layer on them as they come."""

    def __init__(self):
        super().__init__()
        self.layer, self.device, self.seen = nn.Linear(1, 1), torch.device("cpu"), []
        self.runs = 0

    def forward(self, batch, generator):
        self.seen.append(torch.randn(1, generator=generator).item())
        return {"loss": torch.zeros(()), "noise": batch["image"].mean()}

    def predict(self, images, category_index=None, generator=None):
        self.layer(images)
        self.runs += 1


def numbers(count):
    return [{"image": torch.tensor([float(i)]), "category_index": 0} for i in range(count)]


def test_held_out_loss_is_the_mean_over_images_with_the_same_noise_each_time():
    """20 images are a batch of 16 and one of 4."""
    detector = Counting()
    assert held_out_loss(detector, numbers(20)) == pytest.approx(9.5)
    torch.manual_seed(5)
    held_out_loss(detector, numbers(20))
    assert detector.seen[:2] == detector.seen[2:] and detector.seen[0] != detector.seen[1]


@pytest.mark.parametrize(("every", "count"), [(1, 35), (2, 18), (10, 4)])
def test_gathering_takes_every_so_manyth_image(every, count, monkeypatch):
    detector, columns = Counting(), []
    memory = GradientProjectionMemory(detector)
    monkeypatch.setattr(memory, "_see", lambda name, layer, x: columns.append(len(x[0])))
    with pytest.raises(ValueError, match="did not run"):
        gather(detector, memory, numbers(35), every, progress=False)
    assert sum(columns) == count


def test_images_are_run_once_for_each_group_of_layers(monkeypatch):
    detector = Counting()
    detector.other = nn.Linear(1, 1)
    detector.layer.register_forward_hook(lambda layer, x, y: detector.other(y))
    for budget, runs in ((8e9, 3), (1, 6)):
        detector.runs, memory = 0, GradientProjectionMemory(detector, budget=budget)
        taken = gather(detector, memory, numbers(35), progress=False)
        assert detector.runs == runs and list(taken) == ["layer", "other"]


@pytest.mark.parametrize("asked", [{}, {"gamma": 0.5, "every": 3}])
def test_memory_is_set_as_the_config_says_unless_it_is_asked_for(
    root, tmp_path, asked, monkeypatch
):
    found = {}

    def stop(detector, memory, data, every, progress):
        found.update(gamma=memory.gamma, every=every)
        raise KeyboardInterrupt

    monkeypatch.setattr(continual, "gather", stop)
    detector = build(replace(SMALL, gamma=0.8, every=7))
    settings = {"steps": 1, "batch_size": 2, "device": "cpu", "progress": False}
    with pytest.raises(KeyboardInterrupt):
        fit_continual(detector, root, TASKS, tmp_path, **settings, **asked)
    assert found == {"gamma": 0.8, "every": 7} | asked


def test_settings_of_the_memory_are_the_released_ones_at_the_size_of_the_paper():
    paper, tiny = Config.paper(), Config.tiny()
    assert (paper.gamma, paper.every) == (0.999, 10) and (tiny.gamma, tiny.every) == (0.9999, 1)


# ------------------------------------------------------------------------------------ protections


def predict_old(detector, root):
    """The prediction for the first task's images that its memory was gathered from."""
    images = [sample["image"] for sample in detector.folder(root, categories=TASKS[0])]
    return detector.predict(torch.stack(images))


@torch.no_grad()
def changes_of_layers(run, root):
    """By layer: how much its output on old inputs changed in the second task, and its weight."""
    old, inputs, found = after(run, 1), {}, {}
    for name, layer in GradientProjectionMemory(old).layers.items():
        seen = inputs[name] = []
        layer.register_forward_pre_hook(lambda layer, x, seen=seen: seen.append(x[0]))
    predict_old(old, root)
    before, new = (GradientProjectionMemory(after(run, task)).layers for task in (1, 2))
    for name, seen in inputs.items():
        outputs = [torch.cat([layer(x) for x in seen]) for layer in (before[name], new[name])]
        weights = before[name].weight, new[name].weight
        found[name] = [
            ((b - a).norm() / a.norm().clamp(min=1e-9)).item() for a, b in (outputs, weights)
        ]
    return found


def test_projected_updates_change_weights_but_nothing_that_old_inputs_feel(finished, root):
    found = changes_of_layers(finished("update"), root)
    assert max(change for change, _ in found.values()) < 1e-4
    assert sum(moved > 1e-4 for _, moved in found.values()) >= 10
    taken = finished("update").result.taken[0]
    full = [name for name, (rank, of) in taken.items() if rank == of]
    assert full and all(found[name][1] < 1e-5 for name in full)  # these learn no more


@pytest.mark.parametrize("protection", ["none", "frozen", "gradient"])
def test_under_other_protections_old_inputs_feel_the_new_task(finished, root, protection):
    """Of a gradient that was projected, Adam makes a step that is not."""
    found = changes_of_layers(finished(protection), root)
    assert max(change for change, _ in found.values()) > 3e-4


def test_prediction_for_old_images_stays_under_projected_updates_alone(finished, root):
    gaps = {}
    for protection in PROTECTIONS:
        run = finished(protection)
        maps = [predict_old(after(run, task), root).anomaly_map for task in (1, 2)]
        gaps[protection] = ((maps[1] - maps[0]).norm() / maps[0].norm()).item()
    assert gaps.pop("update") < 1e-5 < 3e-5 < min(gaps.values())


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_norms_and_biases_move_in_the_second_task_only_without_protection(finished, protection):
    run = finished(protection)
    old, new = (after(run, task).state_dict() for task in (1, 2))
    protected = {f"{name}.weight" for name in GradientProjectionMemory(build()).layers}
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert len(moved & protected) > 20
    assert bool(moved - protected) is (protection == "none")
    assert ("condition.encoder.0.norm1.bias" in moved) is (protection == "none")


def test_first_task_is_the_same_under_every_protection(finished):
    first, *others = (after(finished(name), 1).state_dict() for name in PROTECTIONS)
    assert all(torch.equal(state[name], first[name]) for state in others for name in first)


def test_memory_grows_with_the_tasks_and_only_where_something_is_gathered(finished):
    first, second = finished("update").result.share_taken()
    assert 0 < first <= second <= 1
    for protection in ("none", "frozen"):
        assert finished(protection).result.taken == [{}, {}]


def test_unknown_protection_is_answered_with_the_known_ones(tmp_path, root):
    with pytest.raises(ValueError, match="one of none, frozen, gradient, update, not 'all'"):
        learn(root, tmp_path, "all")


def test_layer_whose_memory_is_full_learns_no_more():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    memory = GradientProjectionMemory(network, gamma=1.0)
    with memory.gather():
        network(torch.randn(5, 3, generator=seeded("cpu", 0)))
    with pytest.warns(UserWarning, match="no direction is left in 1 layers.*: 0"):
        memory.extend()
    before = [network[k].weight.detach().clone() for k in (0, 2)]
    optimizer = torch.optim.AdamW(network.parameters(), 0.05, weight_decay=0.1)
    memory.protect(optimizer, rest="freeze")
    for _ in range(5):
        network(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
    assert torch.allclose(network[0].weight, before[0], atol=1e-5)
    assert not torch.allclose(network[2].weight, before[1], atol=1e-2)


# ------------------------------------------------------------------------------ results and files


def test_result_has_a_row_for_each_task_and_category_seen_by_then(finished):
    result = finished("update").result
    keys = [(row["task"], row["category"]) for row in result.rows]
    assert keys == [(0, "gear"), (1, "gear"), (1, "brick")]
    assert all(0 <= row["image_auroc"] <= 1 and row["loss"] > 0 for row in result.rows)
    assert Continual(**asdict(result)) == result


def test_weights_of_each_task_load_as_a_detector_that_knows_the_tasks_so_far(finished):
    """In half precision; the run itself goes on in full."""
    run = finished("update")
    for task, categories in ((1, ("gear",)), (2, ("gear", "brick"))):
        path = run.folder / f"task_{task}" / "weights.safetensors"
        loaded, whole = load(path, method="OneForMore"), after(run, task).state_dict()
        assert loaded.categories == categories and loaded.config == SMALL
        for name, value in loaded.state_dict().items():
            assert torch.allclose(value, whole[name], atol=1e-4, rtol=1e-3), name
        assert read_description(path)["record"]["tasks"] == TASKS[:task]
    assert run.detector.categories == ("gear", "brick") and not run.detector.training
    assert all(torch.equal(v, whole[name]) for name, v in run.detector.state_dict().items())


def test_photographs_are_the_start_of_the_first_task_alone(root, tmp_path, monkeypatch):
    """A second task without a rate ends where the first one did, and not at the start."""
    loaded = []

    def load_shipped(detector, name, own):
        detector.load_state_dict(build().state_dict())
        loaded.append(name)

    monkeypatch.setattr(one_for_more, "load_shipped", load_shipped)
    settings = {"protection": "none", "later_rate": 0.0, "steps": 1, "batch_size": 2}
    config = replace(SMALL, start="photographs")
    fit_continual(
        OneForMore(config), root, TASKS, tmp_path, progress=False, device="cpu", **settings
    )
    first, second = (trained_weights(tmp_path / f"task_{task}") for task in (1, 2))
    start = build().state_dict()
    assert loaded == ["one_for_more_photographs"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], start[name]) for name in start)


def test_a_rate_holds_for_later_tasks_unless_they_have_their_own(root, tmp_path, monkeypatch):
    rates = []
    real = continual.fit

    def fit(*arguments, **options):
        rates.append(options.get("rate"))
        return real(*arguments, **options)

    monkeypatch.setattr(continual, "fit", fit)
    settings = {"protection": "none", "steps": 1, "batch_size": 2, "device": "cpu"}
    for name, own in {"same": {}, "other": {"later_rate": 0.5}}.items():
        fit_continual(
            build(), root, TASKS, tmp_path / name, progress=False, rate=0.1, **settings, **own
        )
    assert rates == [0.1, 0.1, 0.1, 0.5]


def test_detector_that_learns_from_larger_images_gathers_at_the_size_at_which_it_judges(
    root, tmp_path, monkeypatch
):
    codec, sizes = CodecConfig("pca", channels=6, factor=4), []
    small = {"width": 8, "multipliers": (1, 1), "heads": 1, "context": 8, "norm_groups": 4}
    detector = DecoDiff.tiny(image_size=32, resize=36, codec=codec, **small)
    real = detector.judge

    def judge(x, category_index, generator):
        sizes.append((len(x), x.shape[-1]))
        return real(x, category_index, generator)

    monkeypatch.setattr(detector, "judge", judge)
    settings = {"steps": 1, "batch_size": 2, "device": "cpu", "progress": False}
    result = fit_continual(detector, root, TASKS, tmp_path, **settings)
    assert len(sizes) == 2 + 3 and {size for _, size in sizes} == {32}
    assert sizes[0] == sizes[2] == (2, 32)  # gathered, before what is judged
    assert 0 < result.share_taken()[0] <= result.share_taken()[1] <= 1


def test_recipe_of_a_detector_stays_as_it_is_even_if_a_later_task_breaks_off(
    root, tmp_path, monkeypatch
):
    row = {"category": "gear", "loss": 0.0} | dict.fromkeys(METRICS)
    judged = iter([[row]])  # of the first task; in the second there is nothing to come
    monkeypatch.setattr(continual, "judge", lambda *_: next(judged))
    detector = build()
    settings = {"later_rate": 0.5, "steps": 1, "batch_size": 2, "device": "cpu", "progress": False}
    with pytest.raises(StopIteration):
        fit_continual(detector, root, TASKS, tmp_path, protection="none", **settings)
    assert (tmp_path / "task_2").exists() and detector.stages is detector.config.stages


# ----------------------------------------------------------------------------------- two processes


def projectors(rank=0, world=1):
    """What two tasks leave in a memory, of which a process sees its share of the images."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(48, 2))
    memory = GradientProjectionMemory(network, gamma=0.9)
    for task, count in enumerate((8, 1)):  # of the one image, the second process sees nothing
        coarse = torch.randn(count, 2, 2, 2, generator=seeded("cpu", task))
        images = nn.functional.interpolate(coarse, size=4, mode="bilinear")
        with memory.gather(), torch.no_grad():
            if len(images[rank::world]):
                network(images[rank::world])
        memory.extend()
    return {name: memory.basis(name) @ memory.basis(name).T for name in memory.layers}


def gather_a_share(rank, folder):
    """What one of two processes does."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    torch.save(projectors(rank, 2), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_gather_the_memory_of_one_that_sees_everything(tmp_path, both):
    both(gather_a_share, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    whole, share = projectors(), projectors(0, 2)
    assert all(torch.equal(first[name], second[name]) for name in ("0", "2"))
    assert all(torch.allclose(first[name], whole[name], atol=1e-4) for name in ("0", "2"))
    assert not torch.allclose(first["2"], share["2"], atol=1e-2)
