"""One `fit` for all methods.

Every random number of a step is a function of (seed, stage, step, process), and the learning rate
a function of the step: a run that was killed continues to the numbers of one that was not. Nothing
in a step waits for a GPU; what it computed is read every so many steps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState, utils
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

from diffad_ref import checkpoints
from diffad_ref.data import Feed
from diffad_ref.detector import Detector, Stage, arithmetic, precision_on, said_by, tf32_unless
from diffad_ref.diffusion import seeded

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
STATE = "training.safetensors"
READ_EVERY = 20  # steps after which losses are fetched from a GPU


@dataclass
class History:
    """Losses of a run: one row a step, with the stage's name and every scalar of the loss."""

    rows: list[dict] = field(default_factory=list)

    def column(self, name: str, stage: str | None = None) -> list[float]:
        """One scalar over the steps at which it was computed."""
        return [r[name] for r in self.rows if name in r and stage in (None, r["stage"])]

    def ending(self, steps: int = 100) -> dict[str, float]:
        """The mean of every scalar of the last stage over its last steps."""
        names = [name for name in self.rows[-1] if name not in ("step", "stage")]
        return {name: float(np.mean(self.column(name)[-steps:])) for name in names}


def fit(
    detector: Detector,
    dataset: Dataset,
    steps: int | None = None,
    batch_size: int | None = None,
    *,
    rate: float = 1.0,
    accumulate: int | None = None,
    checkpointing: bool = False,
    precision: str = "auto",
    compile: bool = False,
    ema: float | None = None,
    out: str | os.PathLike | None = None,
    save_every: int = 500,
    seed: int = 0,
    device: str | torch.device | None = None,
    num_workers: int | None = None,
    progress: bool = True,
    on_optimizer: Callable[[torch.optim.Optimizer], None] | None = None,
) -> History:
    """Train a detector, in place, by the stages of its config; it ends in evaluation mode.

    Raises ValueError for empty data, a loss that is not finite, a precision that the device lacks,
    an `out` of another run or that another process writes to, and a GPU whose memory is too small.

    Parameters
    ----------
    dataset, steps, rate
        Normal images, as samples of `AnomalyFolder`; a data set of your own without a method
        `fingerprint` is known by its length alone. Steps of the whole run, which the stages share
        in proportion, and their warm-ups with them; learning rates, as a share of theirs.
    batch_size, accumulate, checkpointing
        Instead of the stages': images at a time and process; see `Stage`.
    precision, compile
        "auto", "float32", "tf32", "bf16" or "fp16": see `precision_on`; see `Detector.compile`.
    ema : float, optional
        Decay of a moving average of the weights, with which each stage then ends.
    out : path, optional
        Folder for checkpoints, every `save_every` steps. A run goes on from it, on any device.
    seed : int
        Equal seeds lead from equal weights (`torch.manual_seed` before a detector is built) to
        equal weights, on the same CPU and number of threads. On a GPU they do so up to rounding, or
        under `torch.use_deterministic_algorithms(True)`, which may ask for an environment variable.
    device, num_workers, on_optimizer
        By default a GPU, if there is one; processes that load images, by default as `Feed` needs;
        what gets the optimiser of each stage before its first step, to attach hooks.
    """
    if len(dataset) == 0:
        raise ValueError("there is nothing to train on: the data set is empty")
    if ema is not None and not 0 < ema < 1:
        raise ValueError(f"ema is a decay between 0 and 1, such as 0.999, not {ema}")
    if not 0 <= rate < math.inf or min(1 if steps is None else steps, save_every) < 1:
        found = f"rate {rate}, steps {steps}, save_every {save_every}"
        raise ValueError(f"rate is a number from 0, steps and save_every from 1: {found}")
    there = meet(device).device
    device = torch.device(device or there)
    world, rank = processes()
    chosen = precision_on(device, precision)
    wanted = {"batch_size": batch_size, "accumulate": accumulate}
    wanted["checkpointing"] = checkpointing or None
    wanted = {name: value for name, value in wanted.items() if value is not None}
    stages = plan_stages(detector.stages, len(dataset), world, steps, rate, **wanted)
    held = checkpoints.claimed(Path(out)) if out and rank == 0 else nullcontext()
    with held, torch.random.fork_rng(None if device.type == "cuda" else []):
        try:
            detector.to(device)
        except (AssertionError, RuntimeError) as error:  # no such device, or none at all
            raise ValueError(f"cannot train on {device}: {error}") from error
        categories = _numbered(detector, said_by(dataset, "categories", ()))
        run = _Run(detector, Path(out) / STATE if out else None, writes=rank == 0)
        run.resume(
            method=type(detector).__name__,
            stages=[asdict(stage) for stage in stages],
            config=asdict(detector.config),
            categories=categories,
            data=said_by(dataset, "fingerprint", dataset.__len__)(),
            **({"part": [*map(int, dataset.indices)]} if isinstance(dataset, Subset) else {}),
            **{"seed": seed, "precision": precision, "ema": ema, "processes": world},
            **detector.identity(),
        )
        detector.categories = categories
        if run.stage == run.step == 0:
            detector.prepare(dataset)
        if compile:
            detector.compile()
        feed = Feed(dataset, device, num_workers, progress and rank == 0)
        for number in range(run.stage, len(stages)):
            stage, key = stages[number], [seed, number]
            optimizer = run.begin(number, stage, ema, chosen)
            if on_optimizer is not None:
                on_optimizer(optimizer)
            count = stage.steps * stage.accumulate
            ahead = batch_numbers(len(dataset), stage.batch_size, count, key)
            batches = feed.batches(ahead[run.step * stage.accumulate :])
            training = _train(run, stage, optimizer, batches, seed, chosen)
            bar = {"desc": stage.name, "initial": run.step, "total": stage.steps}
            bar["disable"] = not (progress and rank == 0)
            for losses in (shown := tqdm(training, **bar)):
                shown.set_postfix({name: f"{value:.4f}" for name, value in losses.items()})
                if run.step % save_every == 0:
                    run.save(optimizer)
            run.end_stage()
            if world > 1:
                distributed.barrier()
    detector.eval()
    return run.history


def _numbered(detector: Detector, names: Sequence[str]) -> tuple[str, ...]:
    """The categories that a detector knows, and those that it will learn, in their order."""
    known, names = tuple(detector.categories), tuple(names)
    if getattr(detector.config, "classes", None) and names and names[: len(known)] != known:
        ways = "set the data set's categories to these and then yours, or detector.categories to ()"
        raise ValueError(f"this model's classes are {', '.join(known)}, in this order: {ways}")
    return known + tuple(name for name in names if name not in known)


def _train(run: _Run, stage: Stage, optimizer, batches: Iterator[dict], seed: int, precision: str):
    """The steps of a stage from where the run is; yields the latest losses that were read."""
    device, scaler, (world, rank) = run.detector.device, run.scaler, processes()
    model = DistributedDataParallel(run.detector) if world > 1 else run.detector
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(run.step, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.lr[group["name"]].at(step, stage.steps)
        for micro in range(stage.accumulate):
            generator = seeded(device, seed, run.stage, step, micro, rank)
            torch.manual_seed(generator.initial_seed())  # of dropout
            alone = world > 1 and micro < stage.accumulate - 1
            with model.no_sync() if alone else nullcontext(), _costly(run, stage, precision):
                with arithmetic(run.detector, precision):
                    losses = model(next(batches), generator)
                scaler.scale(losses["loss"] / stage.accumulate).backward()
            run.note(losses, 1 / stage.accumulate)
        if device.type == "cpu":  # where reading is free, nothing moves by a loss that is broken
            run.read()
        if stage.clip is not None:
            scaler.unscale_(optimizer)
            clip_grad_norm_(learning, stage.clip)
        with _costly(run, stage, precision):  # averages and bases come to the device with it
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run.after_step()
        if run.step % READ_EVERY == 0 or run.step == stage.steps:
            run.read()
        yield run.latest


@contextmanager
def _costly(run: _Run, stage: Stage, precision: str):
    """Backward passes and protected steps may use TF32, too; say what helps if a GPU is too small.

    Projected in TF32, a step keeps 0.0004 of what it should lose. A memory itself lacks more of old
    inputs: sqrt(1 - gamma) of their length, 0.01 at 0.9999.
    """
    try:
        with tf32_unless(precision):
            yield
    except torch.cuda.OutOfMemoryError as error:
        half, ways = stage.batch_size // 2, "checkpointing=True, or fewer bits (precision)"
        if half:
            accumulate = stage.batch_size * stage.accumulate // half
            ways = f"batch_size={half} with accumulate={accumulate}, {ways}"
        size = torch.cuda.get_device_properties(run.detector.device).total_memory / 2**30
        found = f"{stage.batch_size} images at a time do not fit into {size:.0f} GiB of memory"
        raise ValueError(f"{found}: try {ways}" + run.kept("the last checkpoint is in")) from error


def restore(detector: Detector, out: str | os.PathLike) -> dict[str, Tensor]:
    """Give a detector the state of a run's last checkpoint, in full precision; and what it holds.

    Parts that come from elsewhere and never learn are in no checkpoint; they are loaded again.
    """
    tensors = checkpoints.read_tensors(path := Path(out) / STATE)
    for name in (names := _borrowed(detector)):
        getattr(detector, name).prepare(None)
    kept = {k: v for k, v in detector.state_dict().items() if k.split(".")[0] in names}
    checkpoints.load_weights(detector, kept | _under("model.", tensors), path)
    return tensors


def _borrowed(detector: Detector) -> list[str]:
    return [name for name, m in detector.named_children() if getattr(m, "borrowed", False)]


def meet(device: str | torch.device | None = None) -> PartialState:
    """Let processes meet, by default on GPUs, where there are any; ACCELERATE_USE_CPU forbids."""
    if processes()[0] == 1:
        PartialState._reset_state()  # it would keep to the first device that was asked for
    return PartialState(cpu=str(device) == "cpu" or utils.parse_flag_from_env("ACCELERATE_USE_CPU"))


def processes() -> tuple[int, int]:
    """How many processes train together, and which of them this is, from 0."""
    together = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_world_size(), distributed.get_rank()) if together else (1, 0)


def batch_numbers(images: int, size: int, count: int, key: list[int]) -> np.ndarray:
    """Image numbers (count, size) of batches: shuffled epochs, cut evenly, over all processes."""
    world, rank = processes()
    epochs = range(-(-count * world * size // images))
    orders = [np.random.default_rng([*key, epoch]).permutation(images) for epoch in epochs]
    order = np.concatenate([np.empty(0, int), *orders])[: count * world * size]
    return order.reshape(count, world, size)[:, rank]


def plan_stages(stages, images: int, world=1, steps=None, rate=1.0, **settings) -> list[Stage]:
    """The stages of a run on so many images, with other settings, shortened in proportion."""
    stages = [replace(stage, **settings).counted(images, world) for stage in stages]
    ends, plan = np.cumsum([stage.steps for stage in stages]), []
    if not ends[-1]:
        raise ValueError("the stages have no step: there is nothing to train")
    if steps is not None:
        ends = np.rint(ends * steps / ends[-1]).astype(int)
    for stage, count in zip(stages, np.diff(ends, prepend=0).tolist(), strict=True):
        share = count / max(1, stage.steps)
        lr = {
            name: replace(r, peak=r.peak * rate, warmup=round(r.warmup * share))
            for name, r in stage.lr.items()
        }
        plan.append(replace(stage, steps=count, lr=lr))
    return plan


class _Run:
    """Where a training run is, and how to come back to it."""

    def __init__(self, detector: Detector, path: Path | None, writes: bool):
        self.detector, self.path, self.writes = detector, path, writes
        self.stage = self.step = 0
        self.history, self.average, self.latest = History(), None, {}
        self._unread: list[dict[str, Tensor]] = []
        self._loaded: dict[str, Tensor] = {}
        self._scaler: dict = {}

    def resume(self, **identity) -> None:
        """Take up what `path` holds, if anything; refuse a run of another identity."""
        self.identity = identity
        if self.path is None or not self.path.exists():
            return
        text = checkpoints.read_metadata(self.path).get("state", "{}")
        kinds = {"identity": dict, "stage": int, "step": int, "scaler": dict}
        kinds["history"] = list[dict[str, int | float | str]]
        state = checkpoints.parse_json(text, self.path, **kinds)
        checkpoints.refuse_another(self.path.parent, state["identity"], identity)
        self.stage, self.step = state["stage"], state["step"]
        self._scaler, self.history = state["scaler"], History(state["history"])
        self._loaded = restore(self.detector, self.path.parent)

    def begin(self, number: int, stage: Stage, ema, precision: str) -> torch.optim.Optimizer:
        """Start a stage, or go on inside it; gives its optimiser."""
        if number != self.stage:
            self.stage, self.step = number, 0
        self.detector.enter(stage)
        groups, kind = self.detector.train().parameter_groups(), self.detector.device.type
        self.scaler = torch.amp.GradScaler(kind, enabled=precision == "fp16")
        if self._scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(self._scaler)
        decay, fused = stage.weight_decay, kind in ("cpu", "cuda")
        optimizer = OPTIMIZERS[stage.optimizer](groups, weight_decay=decay, fused=fused)
        plain = optimizer.state_dict() | {"state": {}}
        for name, value in _under("optimizer.", self._loaded).items():
            index, key = name.split(".", 1)
            plain["state"].setdefault(int(index), {})[key] = value
        optimizer.load_state_dict(plain)
        if ema is not None:
            from diffusers.training_utils import EMAModel

            self.average = EMAModel(self._learning(), decay=ema, foreach=True)
            self.average.optimization_step = self.step
            saved = _under("average.", self._loaded)
            for place, mean in enumerate(self.average.shadow_params):
                mean.copy_(saved.get(str(place), mean))
        self._loaded, self._scaler = {}, {}
        return optimizer

    def _learning(self) -> list[torch.nn.Parameter]:
        return [p for p in self.detector.parameters() if p.requires_grad]

    def note(self, losses: dict[str, Tensor], share: float) -> None:
        """Add the losses of a batch to those of the step, where they are."""
        if not self._unread or self._unread[-1]["step"] != self.step:
            self._unread.append({"step": self.step})
        row = self._unread[-1]
        for name, value in losses.items():
            row[name] = row.get(name, 0) + value.detach() * share

    def read(self) -> None:
        """Fetch the losses of the last steps, the mean of all processes; refuse NaN and infinity.

        So every process stops at a step that is broken, not one alone.
        """
        steps = [row.pop("step") for row in self._unread]
        if not steps:
            return
        table = torch.stack([torch.stack(list(row.values())).float() for row in self._unread])
        if (world := processes()[0]) > 1:
            distributed.all_reduce(table.div_(world))
        for step, names, values in zip(steps, self._unread, table.cpu().tolist(), strict=True):
            self.latest = dict(zip(names, values, strict=True))
            stage = self.detector.stage.name
            if not np.isfinite(self.latest["loss"]):
                where = f"the loss of step {step} in stage {stage!r}"
                raise ValueError(f"{where} is {self.latest}{self.kept('see')}")
            self.history.rows.append({"step": step, "stage": stage} | self.latest)
        self._unread = []

    def kept(self, words: str) -> str:
        """Where the last checkpoint is, if there is one."""
        return f"; {words} {self.path}" if self.path and self.path.exists() else ""

    def after_step(self) -> None:
        """Count a step, and average the weights."""
        self.step += 1
        if self.average is not None:
            self.average.step(self._learning())

    def end_stage(self) -> None:
        """The stage's average, if one was kept, becomes the weights."""
        if self.average is not None:
            self.average.copy_to(self._learning())
        self.average, self.stage, self.step = None, self.stage + 1, 0
        self.save(None)

    def save(self, optimizer) -> None:
        """Write what was learnt to one file, whole or not at all."""
        self.read()
        if self.path is None or not self.writes:
            return
        state, borrowed = self.detector.state_dict(), _borrowed(self.detector)
        tensors = {f"model.{k}": v for k, v in state.items() if k.split(".")[0] not in borrowed}
        if optimizer is not None:
            for index, values in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{key}": v for key, v in values.items()}
            means = self.average.shadow_params if self.average else ()
            tensors |= {f"average.{place}": mean for place, mean in enumerate(means)}
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        state = {"identity": self.identity, "stage": self.stage, "step": self.step}
        state |= {"scaler": self.scaler.state_dict() if optimizer else {}}
        text = json.dumps(state | {"history": self.history.rows})
        checkpoints.write_tensors(tensors, self.path, {"state": text})


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries whose name starts with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
