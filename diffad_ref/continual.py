"""Learning products one after the other, without keeping images of the old ones.

After each task the detector runs over its images once more, as at inference, and what its layers
see becomes part of a memory. The next task may only move weights where old inputs do not feel it.
"""

import json
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from typing_extensions import TypedDict

from diffad_ref import checkpoints
from diffad_ref.data import AnomalyFolder
from diffad_ref.detector import Count, Detector, Natural, arithmetic, precision_on
from diffad_ref.diffusion import seeded
from diffad_ref.evaluation import evaluate
from diffad_ref.gradient_projection import GradientProjectionMemory
from diffad_ref.metrics import METRICS
from diffad_ref.training import fit, meet, restore

GAMMA = 0.9999  # share of an old task's energy that is protected, if the config does not say

PROTECTIONS = {
    "none": "fine-tune on each task, as if the others had never been",
    "frozen": "train only convolutions and linear layers after the first task",
    "gradient": "project gradients on what old tasks do not need; freeze all else",
    "update": "project gradients and the optimiser's steps; freeze all else",
}

# What is known of a category after a task; metrics are None where they are not defined.
ROW = TypedDict(
    "ROW",
    {"task": int, "category": str, "loss": float} | dict.fromkeys(METRICS, float | None),
)
TAKEN = dict[str, tuple[Natural, Count]]
HARMLESS = ("save_every", "num_workers", "device")  # options of `fit` that may change in between


@dataclass
class Continual:
    """What a detector could do after each task."""

    tasks: list[list[str]]  # categories in the order in which they were learned
    # A task (from 0), a category seen by then, its metrics, and its "loss" on good test images.
    rows: list[dict] = field(default_factory=list)
    taken: list[dict] = field(default_factory=list)  # by layer: directions in memory, and in all

    def values(self, metric: str, category: str) -> list[float]:
        """A metric of a category after each task, from the one in which it was learned.

        NaN where it is not defined, as without masks.
        """
        found = [row[metric] for row in self.rows if row["category"] == category]
        return [math.nan if value is None else value for value in found]

    def a_metric(self, metric: str) -> float:
        """Mean over all categories after the last task (E1)."""
        return fmean(self.values(metric, c)[-1] for task in self.tasks for c in task)  # E1

    def forgetting(self, metric: str) -> float:
        """Mean of best earlier value less last one, of categories before the last task (E2).

        For "loss", where small is good, the other way round. Negative if later tasks helped.
        """
        sign, drops = -1 if metric == "loss" else 1, []
        for category in sum(self._two_or_more()[:-1], []):
            *earlier, last = (sign * value for value in self.values(metric, category))
            drops.append(max(earlier) - last)  # E2
        return fmean(drops)

    def plasticity(self, metric: str) -> float:
        """Mean over the categories of each task but the first, right after it was learned."""
        later = sum(self._two_or_more()[1:], [])
        return fmean(self.values(metric, category)[0] for category in later)

    def _two_or_more(self) -> list[list[str]]:
        if len(self.tasks) < 2:
            raise ValueError("forgetting and plasticity need at least two tasks")
        return self.tasks

    def share_taken(self) -> list[float]:
        """After each task, the mean share of a layer's directions that memory has taken."""
        return [fmean([rank / of for rank, of in layers.values()] or [0]) for layers in self.taken]


def fit_continual(
    detector: Detector,
    root: str | os.PathLike,
    tasks: Sequence[Sequence[str]],
    out: str | os.PathLike,
    *,
    protection: str = "update",
    gamma: float | None = None,
    every: int | None = None,
    later_rate: float | None = None,
    later_steps: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **options,
) -> Continual:
    """Train a detector, in place, on tasks one after the other, and judge it after each.

    Raises ValueError if tasks are empty or share a category, a number out of range, or as `fit`.

    Parameters
    ----------
    root, tasks
        Data in the MVTec layout, and categories: `tools.protocols.ORDERS["mvtec 10-5"]`, say.
    out : path
        Folder for the state after each task: "task_1/weights" and so on, for `load`. A run that
        was interrupted goes on from there, and so does one that is called with more tasks.
    protection, gamma, every
        One of `PROTECTIONS`; the share of an old task's energy that is protected; to gather over
        every so-manyth training image. By default as in the config, or else `GAMMA` and 1.
    later_rate, later_steps
        `rate` and `steps` of `fit` in every task but the first, in which a network must move far;
        by default they are the same in all.
    seed, progress, options
        As for `fit`, for each task.
    """
    check_tasks(tasks)
    if "on_optimizer" in options:
        raise ValueError("on_optimizer is what protects old tasks: it cannot be another")
    if protection not in PROTECTIONS:
        raise ValueError(f"protection is one of {', '.join(PROTECTIONS)}, not {protection!r}")
    gamma = getattr(detector.config, "gamma", GAMMA) if gamma is None else gamma
    every = getattr(detector.config, "every", 1) if every is None else every
    later_rate = options.get("rate", 1.0) if later_rate is None else later_rate
    if not (0 <= gamma <= 1 and 0 <= later_rate < math.inf and every >= 1):
        found = f"{gamma}, {later_rate} and {every}"
        raise ValueError(f"gamma is a share, later_rate from 0 and every from 1, not {found}")
    result = Continual([list(task) for task in tasks])
    settings = {"tasks": result.tasks, "protection": protection, "gamma": gamma, "every": every}
    settings |= {"later_rate": later_rate, "later_steps": later_steps}
    settings |= {"seed": seed, "config": asdict(detector.config)}
    settings |= {name: value for name, value in options.items() if name not in HARMLESS}
    settings |= detector.identity()
    settings["data"] = [_images_of(detector, root, task) for task in result.tasks]
    folders = [Path(out) / f"task_{number + 1}" for number in range(len(tasks))]
    todo = [number for number, f in enumerate(folders) if not (f / "result.json").exists()]
    process = meet(options.get("device"))
    with checkpoints.claimed(Path(out)) if process.is_main_process else nullcontext():
        _same_run(Path(out) / "run.json", settings)
        detector.to(options.get("device") or process.device)
        detector.enter(detector.stages[-1])
        memory = GradientProjectionMemory(detector, gamma=gamma)
        for number, folder in enumerate(folders):
            if number in todo:
                own = options | {"out": folder, "seed": seed + number, "progress": progress}
                if number:
                    own |= {"rate": later_rate, "steps": later_steps or options.get("steps")}
                _learn(detector, memory, root, result.tasks[: number + 1], protection, every, own)
                process.wait_for_everyone()
            restore(detector, folder)
            detector.categories = tuple(sum(result.tasks[: number + 1], []))
            memory.load_state_dict(checkpoints.read_tensors(folder / "memory.safetensors"))
            done = checkpoints.read_json(folder / "result.json", rows=list[ROW], taken=TAKEN)
            if tuple(row["category"] for row in done["rows"]) != detector.categories:
                raise ValueError(f"{folder / 'result.json'} is damaged: it judges other categories")
            result.rows += done["rows"]
            result.taken.append(done["taken"])
    return result


def _learn(detector, memory, root, tasks, protection: str, every: int, options: dict) -> None:
    """The last of some tasks: train, gather, extend the memory, judge; results come to `out`."""
    *before, task = tasks
    seen, folder, bar = sum(tasks, []), options["out"], options["progress"]
    train = detector.folder(root, "train", categories=task)
    as_judged = detector.folder(root, "train", categories=task, **detector.view("test"))
    train.categories = as_judged.categories = seen  # a class keeps its number for ever

    def guard(optimizer):
        if before and protection != "none":
            memory.protect(optimizer, updates=protection == "update", rest="freeze")

    history, taken = fit(detector, train, on_optimizer=guard, **options), {}
    if protection in ("gradient", "update"):
        taken = gather(detector, memory, as_judged, every, bar)
    elif protection == "frozen":
        memory.extend_by_nothing()
    rows = [{"task": len(before)} | row for row in judge(detector, root, seen, bar)]
    record = {"tasks": tasks, "seed": options["seed"], "steps": len(history.rows)}
    record |= {"data": {"images": len(train), "categories": task}}
    record["precision"] = precision_on(detector.device, options.get("precision", "auto"))
    if meet().is_main_process:
        checkpoints.save(
            detector, folder / "weights", record | {"final_losses": history.ending()}, half=True
        )
        checkpoints.write_tensors(memory.state_dict(), folder / "memory.safetensors")
        checkpoints.write_text(json.dumps({"rows": rows, "taken": taken}), folder / "result.json")


def check_tasks(tasks: Sequence[Sequence[str]]) -> None:
    """Refuse tasks that are empty or share a category."""
    if not tasks or not all(tasks) or any(isinstance(task, str) for task in tasks):
        raise ValueError('every task needs at least one category: [["bottle"], ["cable"]], say')
    names = [name for task in tasks for name in task]
    if shared := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"categories in more than one task: {', '.join(shared)}")


def _images_of(detector: Detector, root, task: Sequence[str]) -> dict:
    """What tells a task's images from others; what they lack is better missed now than later."""
    found = {}
    for split in ("train", "test"):
        data = detector.folder(root, split, categories=task, cache=False)
        found[split] = data.fingerprint()
    labels = {name: {s.label for s in data.samples if s.category == name} for name in task}
    if lacking := [name for name, there in labels.items() if there != {0, 1}]:
        raise ValueError(f"good and defective test images are needed, also of {', '.join(lacking)}")
    return found


def _same_run(path: Path, settings: dict) -> None:
    """Write down what a folder's run is, or refuse to go on with another; tasks may be added."""
    if path.exists():
        before = checkpoints.read_json(path, tasks=list[list[str]])
        now = settings | {n: settings[n][: len(before["tasks"])] for n in ("tasks", "data")}
        checkpoints.refuse_another(path.parent, before, now)
    checkpoints.write_text(json.dumps(settings, indent=1), path)


def gather(
    detector: Detector, memory, data: AnomalyFolder, every: int = 1, progress: bool = True
) -> dict[str, tuple[int, int]]:
    """Run over a process's share of a task's images as at inference, and extend the memory.

    Once for each of its `groups`, with the same noise. Returns what `extend` does, of all layers.
    """
    process, taken = meet(detector.device), {}
    share = range(0, len(data), every)[process.process_index :: process.num_processes]
    batches = DataLoader(Subset(data, share), 16)
    for group in memory.groups():
        # Compiled networks would not call the hooks that gather.
        with memory.gather(group), torch.compiler.set_stance("force_eager"):
            for batch in tqdm(batches, "gather", disable=not progress):
                noise = seeded("cpu", 0)  # the same on every device
                detector.predict(batch["image"], batch["category_index"], noise)
        taken |= memory.extend()
    return {name: taken[name] for name in memory.layers}


def judge(detector: Detector, root, categories: Sequence[str], progress: bool = True) -> list[dict]:
    """Metrics and loss of each category on its test images, as rows of `Continual`."""
    rows = []
    for category in categories:
        test = detector.folder(root, "test", categories=[category])
        found = evaluate(detector, test, progress=progress).mean
        values = {name: None if math.isnan(found[name]) else found[name] for name in METRICS}
        test.categories = list(categories)
        test.samples = [sample for sample in test.samples if sample.kind == "good"]
        rows.append({"category": category, **values, "loss": held_out_loss(detector, test)})
    return rows


@torch.no_grad()
def held_out_loss(detector: Detector, data: AnomalyFolder, seed: int = 0) -> float:
    """Mean training loss on images that were not trained on, the same noise each time."""
    losses, detector = [], detector.eval()
    for number, batch in enumerate(DataLoader(data, batch_size=16)):
        batch = send_to_device(batch, detector.device)
        with arithmetic(detector, "float32"):
            loss = detector(batch, seeded("cpu", seed, number))
        losses += [loss["noise" if "noise" in loss else "loss"].item()] * len(batch["image"])
    return fmean(losses)
