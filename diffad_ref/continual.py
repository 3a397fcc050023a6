"""Learning products one after the other, without keeping images of the old ones.

After each task the detector runs over its training images once more, the way it will at inference,
and what its layers see becomes part of a memory. The next task may then only move weights in
directions that the old inputs do not feel. How much is forgotten is measured, not assumed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffad_ref.checkpoints import (
    load_weights,
    read_tensors,
    save_checkpoint,
    write_tensors,
    write_text,
)
from diffad_ref.data import AnomalyFolder
from diffad_ref.detector import Detector, Stage
from diffad_ref.evaluation import batch_generator, evaluate
from diffad_ref.gradient_projection import GradientProjectionMemory
from diffad_ref.tables import HEADERS, Table
from diffad_ref.training import fit, trained_weights

# ----------------------------------------------------------------------------------------- tasks

_MVTEC = (
    *("bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut"),
    *("pill", "screw", "tile", "toothbrush", "transistor", "wood", "zipper"),
)
_MVTEC_LATE = ("tile", "toothbrush", "transistor", "wood", "zipper")
_MVTEC_EARLY = tuple(name for name in _MVTEC if name not in _MVTEC_LATE)
_VISA = (
    *("candle", "capsules", "cashew", "chewinggum", "fryum", "macaroni1", "macaroni2"),
    *("pcb1", "pcb2", "pcb3", "pcb4", "pipe_fryum"),
)

# The settings of the paper: which classes come in which task.
ORDERS = {
    "mvtec 14-1": (_MVTEC[:-1], _MVTEC[-1:]),
    "mvtec 10-5": (_MVTEC_EARLY, _MVTEC_LATE),
    "mvtec 3x5": tuple(_MVTEC[i : i + 3] for i in range(0, 15, 3)),
    "mvtec 10-1x5": (_MVTEC_EARLY, *((name,) for name in _MVTEC_LATE)),
    "visa 11-1": (_VISA[:-1], _VISA[-1:]),
    "visa 8-4": (_VISA[:8], _VISA[8:]),
    "visa 8-1x4": (_VISA[:8], *((name,) for name in _VISA[8:])),
    "toy": (("board", "brick"), ("capsule", "grass"), ("gear", "gravel")),
}


def check_tasks(tasks: Sequence[Sequence[str]]) -> None:
    """Refuse tasks that are empty or share a category."""
    if not tasks or not all(tasks):
        raise ValueError("every task needs at least one category")
    seen: set[str] = set()
    for task in tasks:
        if shared := sorted(seen & set(task)):
            raise ValueError(f"categories in more than one task: {', '.join(shared)}")
        seen |= set(task)


# -------------------------------------------------------------------------------------- measures


@dataclass
class Continual:
    """What a detector could do after each task.

    Attributes
    ----------
    tasks : list of list of str
        Categories in the order in which they were learned.
    rows : list of dict
        One for each task (from 0) and each category seen by then: its metrics and "loss", the
        training loss on test images without a defect.
    taken : list of dict
        After each task, for each layer: directions in memory, and directions there are.
    """

    tasks: list[list[str]]
    rows: list[dict] = field(default_factory=list)
    taken: list[dict] = field(default_factory=list)

    def values(self, metric: str, category: str) -> list[float]:
        """A metric of a category after each task, from the one in which it was learned."""
        return [row[metric] for row in self.rows if row["category"] == category]

    def a_metric(self, metric: str) -> float:
        """Mean over all categories after the last task (E1)."""
        last = [row[metric] for row in self.rows if row["task"] == len(self.tasks) - 1]
        return math.fsum(last) / len(last)  # E1

    def forgetting(self, metric: str) -> float:
        """Mean loss of a metric over the categories learned before the last task (E2).

        Best value in any earlier task, less the value after the last; for "loss", where small is
        good, the other way round. Negative if later tasks helped.
        """
        sign = -1 if metric == "loss" else 1
        drops = []
        for category in sum(self.tasks[:-1], []):
            *earlier, last = self.values(metric, category)
            drops.append(max(sign * value for value in earlier) - sign * last)  # E2
        if not drops:
            raise ValueError("forgetting needs at least two tasks")
        return math.fsum(drops) / len(drops)

    def plasticity(self, metric: str) -> float:
        """Mean over the categories of each task but the first, right after it was learned."""
        values = [self.values(metric, category)[0] for task in self.tasks[1:] for category in task]
        return math.fsum(values) / len(values)

    def table(self, metric: str = "image_auroc") -> Table:
        """One row a category, one column a task."""
        columns = [f"after task {k + 1}" for k in range(len(self.tasks))]
        rows = []
        for k, task in enumerate(self.tasks):
            for category in task:
                values = self.values(metric, category)
                row = dict.fromkeys(columns) | dict(zip(columns[k:], values, strict=False))
                rows.append({"category": category} | row)
        fractions = () if metric == "loss" else tuple(columns)
        return Table(("category", *columns), rows, fractions=fractions)

    def share_taken(self) -> list[float]:
        """After each task, the mean share of a layer's directions that memory has taken."""
        return [
            math.fsum(rank / of for rank, of in taken.values()) / max(1, len(taken))
            for taken in self.taken
        ]

    def to_dict(self) -> dict:
        """Everything, in types that JSON knows; `Continual(**record)` reads it back."""
        return {"tasks": self.tasks, "rows": self.rows, "taken": self.taken}


def summarise(
    results: dict[str, Continual], metrics: Sequence[str] = ("image_auroc", "pixel_ap")
) -> Table:
    """One row a run: A-metric (E1), forgetting FM (E2), plasticity ("new"), and FM by loss.

    "memory" is the mean share of a layer's directions that are taken after the last task.
    """
    rows, shown = [], []
    for metric in metrics:  # without masks there are no pixel metrics
        if all(row[metric] is not None for run in results.values() for row in run.rows):
            shown.append((metric, HEADERS[metric]))
    for name, run in results.items():
        row = {"training": name} | {f"A {label}": run.a_metric(m) for m, label in shown}
        if len(run.tasks) > 1:
            row |= {f"FM {label}": run.forgetting(m) for m, label in shown}
            row |= {f"new {label}": run.plasticity(m) for m, label in shown}
            row["FM loss"] = run.forgetting("loss")
        row["memory"] = run.share_taken()[-1] if run.taken[-1] else None
        rows.append(row)
    known = set().union(*rows)
    fractions = [f"{word} {label}" for _, label in shown for word in ("A", "FM", "new")]
    order = [c for c in ("training", *fractions, "FM loss", "memory") if c in known]
    return Table(tuple(order), rows, fractions=(*fractions, "memory"))


@torch.no_grad()
def held_out_loss(detector: Detector, data: AnomalyFolder, seed: int = 0) -> float:
    """Mean training loss on images that were not trained on, the same noise each time."""
    losses, detector = [], detector.eval()
    for number, batch in enumerate(DataLoader(data, batch_size=16)):
        batch = {k: v.to(detector.device) if hasattr(v, "to") else v for k, v in batch.items()}
        loss = detector.training_loss(batch, batch_generator(detector.device, seed, number))
        losses += [loss["noise" if "noise" in loss else "loss"].item()] * len(batch["image"])
    return math.fsum(losses) / len(losses)


# ------------------------------------------------------------------------------------------ loop

GAMMA = 0.9999  # share of an old task's energy that is protected
ENERGY = 0.99999  # share of it that the running SVD keeps: more, or gamma could not be reached

HARMLESS = ("save_every", "num_workers", "cpu")  # options of `fit` that may change in between

PROTECTIONS = {
    "none": "fine-tune on each task, as if the others had never been",
    "frozen": "train only convolutions and linear layers after the first task",
    "gradient": "project gradients on what old tasks do not need; freeze all else",
    "update": "project gradients and the optimiser's steps; freeze all else",
}


def fit_continual(
    detector: Detector,
    root: str | os.PathLike,
    tasks: Sequence[Sequence[str]],
    out: str | os.PathLike,
    *,
    protection: str = "update",
    gamma: float = GAMMA,
    energy: float = ENERGY,
    every: int = 1,
    later_rate: float = 1.0,
    later_steps: int | None = None,
    batch_size: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **options,
) -> Continual:
    """Train a detector on tasks one after the other, and judge it after each.

    Parameters
    ----------
    detector : Detector
        Trained in place.
    root : path
        Data in the MVTec layout.
    tasks : sequence of sequences of categories
        Such as `ORDERS["mvtec 10-5"]`.
    out : path
        Folder for the state after each task: "task_1/weights" and so on, for `load_checkpoint`.
        A run that was interrupted, between tasks or inside one, goes on from there; and so does
        one that is called again with more tasks.
    protection : str
        One of `PROTECTIONS`.
    gamma, energy
        Of the `GradientProjectionMemory`.
    every : int
        Gather over every so-manyth training image; released: 10.
    later_rate : float
        Learning rate of every task but the first, as a share of the recipe's. A network that
        starts from scratch must move far in its first task; later it should not.
    later_steps : int, optional
        Steps of every task but the first, instead of `steps`.
    batch_size, steps, seed, progress, options
        As for `fit`, for each task.

    Returns
    -------
    Continual

    Raises
    ------
    ValueError
        Tasks are empty or share a category, `out` holds another run, or as for `fit`.
    """
    check_tasks(tasks)
    if protection not in PROTECTIONS:
        raise ValueError(f"protection is one of {', '.join(PROTECTIONS)}, not {protection!r}")
    out = Path(out)
    result = Continual([list(task) for task in tasks])
    folders = [out / f"task_{number + 1}" for number in range(len(tasks))]
    ahead = [t for t, f in zip(tasks, folders, strict=True) if not (f / "result.json").exists()]
    if ahead:  # what is missing is better known now than hours later
        AnomalyFolder(root, "train", categories=sum(map(list, ahead), []), cache=False)
    settings = {"protection": protection, "gamma": gamma, "energy": energy, "every": every}
    settings |= {"later_rate": later_rate, "later_steps": later_steps}
    settings |= {"steps": steps, "batch_size": batch_size, "seed": seed}
    settings |= {name: value for name, value in options.items() if name not in HARMLESS}
    settings["config"] = asdict(detector.config)
    _same_run(out / "run.json", {"tasks": result.tasks, **settings})
    process = PartialState(cpu=options.get("cpu", False))
    detector.to(process.device)  # bases lie beside the weights
    detector.enter(detector.stages[-1])
    memory = GradientProjectionMemory(detector, gamma=gamma, energy=energy)
    stages = detector.stages

    def guard(optimizer):
        if protection != "none":
            memory.protect(optimizer, updates=protection == "update", rest="freeze")

    for number, task in enumerate(tasks):
        folder, seen = folders[number], sum(result.tasks[: number + 1], [])
        if not (folder / "result.json").exists():
            train = AnomalyFolder(root, "train", categories=task, **detector.training_view)
            train.categories = seen  # a class keeps its number for ever
            if number:
                detector.stages = tuple(_slower(stage, later_rate) for stage in stages)
            if number and protection == "update":
                memory.hold()
            history = fit(
                detector,
                train,
                (later_steps or steps) if number else steps,
                batch_size,
                out=folder,
                seed=seed + number,
                progress=progress,
                on_optimizer=guard if number else None,
                **options,
            )
            taken = {}
            if protection in ("gradient", "update"):
                gather(detector, memory, train, every, progress)
                taken = memory.extend()
            elif protection == "frozen":
                memory.extend_by_nothing()
            rows = [{"task": number} | row for row in judge(detector, root, seen, progress)]
            record = {
                "tasks": result.tasks[: number + 1],
                "seed": seed + number,
                "steps": len(history.rows),
                "data": {"images": len(train), "categories": list(task)},
                "final_losses": history.ending(),
            }
            if process.is_main_process:
                save_checkpoint(detector, folder / "weights", record, half=True)
                write_tensors(memory.state_dict(), folder / "memory.safetensors")
                write_text(json.dumps({"rows": rows, "taken": taken}), folder / "result.json")
            process.wait_for_everyone()
        load_weights(detector, trained_weights(folder), folder)
        detector.categories = tuple(seen)
        memory.load_state_dict(read_tensors(folder / "memory.safetensors"))
        done = json.loads((folder / "result.json").read_text("utf-8"))
        result.rows += done["rows"]
        result.taken.append(done["taken"])
    detector.stages = stages
    return result


def _slower(stage: Stage, share: float) -> Stage:
    """A stage with a share of its learning rates."""
    rates = {name: replace(rate, peak=rate.peak * share) for name, rate in stage.lr.items()}
    return replace(stage, lr=rates)


def _same_run(path: Path, settings: dict) -> None:
    """Write down what a folder's run is, or refuse to go on with another; tasks may be added."""
    settings = json.loads(json.dumps(settings))  # as it looks after a round trip
    before = json.loads(path.read_text("utf-8")) if path.exists() else settings
    known = len(before["tasks"])
    same = before | {"tasks": settings["tasks"]} == settings
    if same and before["tasks"] == settings["tasks"][:known]:
        write_text(json.dumps(settings, indent=1), path)
        return
    different = [name for name in settings if before.get(name) != settings[name]]
    raise ValueError(
        f"{path.parent} holds another run (different {', '.join(different)}); choose another "
        "folder, or delete it to start anew"
    )


@torch.no_grad()
def gather(
    detector: Detector, memory, data: AnomalyFolder, every: int = 1, progress: bool = True
) -> None:
    """Run a detector over a task's images as at inference, and let the memory watch.

    Every process takes its share of the images; `memory.extend` brings the shares together.
    """
    process = PartialState()
    share = range(0, len(data), every)[process.process_index :: process.num_processes]
    chosen = torch.utils.data.Subset(data, share)
    detector.eval()
    with memory.gather():
        batches = tqdm(DataLoader(chosen, 16), "gather", disable=not progress)
        for number, batch in enumerate(batches):
            generator = batch_generator(detector.device, 0, number)
            detector.predict(batch["image"], batch["category_index"], generator=generator)
            memory.compress()


def judge(detector: Detector, root, categories: Sequence[str], progress: bool = True) -> list[dict]:
    """Metrics and loss of each category on its test images, as rows of `Continual`."""
    rows = []
    for category in categories:
        test = AnomalyFolder(root, "test", categories=[category], **detector.view)
        report = evaluate(detector, test, progress=progress)
        test.categories = list(categories)
        test.samples = [sample for sample in test.samples if sample.kind == "good"]
        rows.append(report.rows[0] | {"loss": held_out_loss(detector, test)})
    return rows
