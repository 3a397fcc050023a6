"""One `fit` for all methods.

Every random number of a step is a function of (seed, stage, step, process), and the learning rate
a function of the step: a run that was killed continues to the numbers of one that was not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from diffad_ref.checkpoints import load_weights, read_metadata, read_tensors, write_tensors
from diffad_ref.detector import Detector, Stage
from diffad_ref.diffusion import seeded

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
STATE = "training.safetensors"


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
    out: str | os.PathLike | None = None,
    seed: int = 0,
    accumulate: int = 1,
    mixed_precision: str = "no",
    ema: float | None = None,
    save_every: int = 500,
    num_workers: int = 0,
    cpu: bool = False,
    progress: bool = True,
    on_optimizer: Callable[[torch.optim.Optimizer], None] | None = None,
) -> History:
    """Train a detector, in place, by the stages of its config; it ends in evaluation mode.

    Parameters
    ----------
    dataset : Dataset
        Normal images, as samples of `diffad_ref.data`.
    steps, batch_size : int, optional
        Of the whole run, shared by the stages in proportion; images a step and process.
    rate : float
        Learning rates, as a share of the config's.
    out : path, optional
        Folder for checkpoints, every `save_every` steps, from which an unfinished run goes on.
    seed : int
        Equal seeds give equal weights on the same machine and number of threads.
    accumulate : int
        Batches whose gradients are averaged into one step: more images than memory holds.
    mixed_precision : "no", "bf16" or "fp16"
    ema : float, optional
        Decay of a moving average of the weights, with which each stage then ends.
    num_workers, cpu
        Processes that load images, 0 in notebooks; stay on the CPU even where there is a GPU.
    on_optimizer : callable, optional
        Gets the optimiser of each stage before its first step, to attach hooks.

    Raises ValueError for empty data, a loss that is not finite, or an `out` of another run.
    """
    if len(dataset) == 0:
        raise ValueError("there is nothing to train on: the data set is empty")
    accelerator = Accelerator(
        mixed_precision=mixed_precision, cpu=cpu, gradient_accumulation_steps=accumulate
    )
    stages = _plan(detector.stages, steps, batch_size, rate)
    detector.to(accelerator.device)
    detector.categories = tuple(getattr(dataset, "categories", detector.categories))
    run = _Run(detector, Path(out) / STATE if out else None, accelerator.is_main_process)
    run.resume(
        method=type(detector).__name__,
        stages=[asdict(stage) for stage in stages],
        config=asdict(detector.config),
        categories=detector.categories,
        images=len(dataset),
        settings=[seed, accumulate, mixed_precision, ema, accelerator.num_processes],
    )
    if run.stage == run.step == 0:
        detector.prepare(dataset)
    with torch.random.fork_rng():
        for number in range(run.stage, len(stages)):
            stage = stages[number]
            optimizer = run.begin(number, stage, ema)
            if on_optimizer is not None:
                on_optimizer(optimizer)
            count, key = stage.steps * accumulate, [seed, number]
            ahead = batch_numbers(len(dataset), stage.batch_size, count, key)
            ahead = ahead[run.step * accumulate :]
            loader = DataLoader(dataset, batch_sampler=ahead, num_workers=num_workers)
            training = _train(accelerator, run, stage, optimizer, iter(loader), seed)
            bar = {"desc": stage.name, "initial": run.step, "total": stage.steps}
            bar["disable"] = not (progress and accelerator.is_main_process)
            for losses in (shown := tqdm(training, **bar)):
                shown.set_postfix({name: f"{value:.4f}" for name, value in losses.items()})
                if run.step % save_every == 0:
                    run.save(optimizer)
            run.end_stage()
            accelerator.wait_for_everyone()
    detector.eval()
    return run.history


def _train(accelerator, run: _Run, stage: Stage, optimizer, batches: Iterator, seed: int):
    """The steps of a stage from where the run is; yields the losses of each."""
    model, micros = accelerator.prepare_model(run.detector), accelerator.gradient_accumulation_steps
    optimizer = accelerator.prepare_optimizer(optimizer)
    for step in range(run.step, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.lr[group["name"]].at(step, stage.steps)
        means: dict[str, float] = {}
        for micro in range(micros):
            key = seed, run.stage, step, micro, accelerator.process_index
            generator = seeded(accelerator.device, *key)
            torch.manual_seed(generator.initial_seed())  # of dropout
            batch = send_to_device(next(batches), accelerator.device)
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    losses = model(batch, generator)
                accelerator.backward(losses["loss"])
                for name, value in losses.items():
                    means[name] = means.get(name, 0.0) + value.item() / micros
                if accelerator.sync_gradients:
                    run.check_finite(means)
                    if stage.clip is not None:
                        accelerator.clip_grad_norm_(model.parameters(), stage.clip)
                optimizer.step()
                optimizer.zero_grad()
        run.after_step({"step": step, "stage": stage.name, **means})
        yield means


def trained_weights(out: str | os.PathLike) -> dict[str, Tensor]:
    """The detector's state at the last checkpoint of a run, in full precision."""
    return _under("model.", read_tensors(Path(out) / STATE))


def batch_numbers(images: int, size: int, count: int, key: list[int]) -> list[list[int]]:
    """Image numbers of `count` batches: shuffled epochs, cut evenly, shared by all processes."""
    state = torch.distributed
    together = state.is_available() and state.is_initialized()
    world, rank = (state.get_world_size(), state.get_rank()) if together else (1, 0)
    epochs = range(-(-count * world * size // images))
    orders = [np.random.default_rng([*key, epoch]).permutation(images) for epoch in epochs]
    order = np.concatenate([np.empty(0, int), *orders])[: count * world * size]
    return order.reshape(count, world, size)[:, rank].tolist()


def _plan(stages: tuple[Stage, ...], steps, batch_size, rate: float) -> list[Stage]:
    """The stages of this run: shortened in proportion, with other batches and rates if wanted."""
    ends = np.cumsum([stage.steps for stage in stages])
    if steps is not None:
        ends = np.rint(ends * steps / ends[-1]).astype(int)
    plan = []
    for stage, count in zip(stages, np.diff(ends, prepend=0).tolist(), strict=True):
        lr = {name: replace(r, peak=r.peak * rate) for name, r in stage.lr.items()}
        size = batch_size or stage.batch_size
        plan.append(replace(stage, steps=count, batch_size=size, lr=lr))
    return plan


class _Run:
    """Where a training run is, and how to come back to it."""

    def __init__(self, detector: Detector, path: Path | None, writes: bool):
        self.detector, self.path, self.writes = detector, path, writes
        self.stage = self.step = 0
        self.history, self.average = History(), None
        self._loaded: dict[str, Tensor] = {}

    def resume(self, **identity) -> None:
        """Take up what `path` holds, if anything; refuse a run of another identity."""
        self.identity = json.loads(json.dumps(identity))  # as it looks after a round trip
        if self.path is None or not self.path.exists():
            return
        state = json.loads(read_metadata(self.path)["state"])
        different = [k for k, v in self.identity.items() if state["identity"].get(k) != v]
        if different:
            found = f"{self.path.parent} holds another run (different {', '.join(different)})"
            raise ValueError(f"{found}; choose another folder, or delete it to start anew")
        self.stage, self.step = state["stage"], state["step"]
        self.history, self._loaded = History(state["history"]), read_tensors(self.path)
        load_weights(self.detector, _under("model.", self._loaded), self.path)

    def begin(self, number: int, stage: Stage, ema: float | None) -> torch.optim.Optimizer:
        """Start a stage, or go on inside it; gives its optimiser."""
        if number != self.stage:
            self.stage, self.step = number, 0
        self.detector.enter(stage)
        groups = self.detector.train().parameter_groups()
        optimizer = OPTIMIZERS[stage.optimizer](groups, weight_decay=stage.weight_decay)
        plain = optimizer.state_dict() | {"state": {}}
        for name, value in _under("optimizer.", self._loaded).items():
            index, key = name.split(".", 1)
            plain["state"].setdefault(int(index), {})[key] = value
        optimizer.load_state_dict(plain)
        if ema is not None:
            from diffusers.training_utils import EMAModel

            self.average = EMAModel(self._learning(), decay=ema)
            self.average.optimization_step = self.step
            saved = _under("average.", self._loaded)
            for place, mean in enumerate(self.average.shadow_params):
                mean.copy_(saved.get(str(place), mean))
        self._loaded = {}
        return optimizer

    def _learning(self) -> list[torch.nn.Parameter]:
        return [p for p in self.detector.parameters() if p.requires_grad]

    def check_finite(self, losses: dict[str, float]) -> None:
        """Refuse to go on with a loss that is NaN or infinite."""
        if not np.isfinite(losses["loss"]):
            kept = f"; see {self.path}" if self.path and self.path.exists() else ""
            name = self.detector.stage.name
            raise ValueError(f"the loss of step {self.step} in stage {name!r} is {losses}{kept}")

    def after_step(self, row: dict) -> None:
        """Note the losses of a step, and average the weights."""
        self.step += 1
        self.history.rows.append(row)
        if self.average is not None:
            self.average.step(self._learning())

    def end_stage(self) -> None:
        """The stage's average, if one was kept, becomes the weights."""
        if self.average is not None:
            self.average.copy_to(self._learning())
        self.average, self.stage, self.step = None, self.stage + 1, 0
        self.save(None)

    def save(self, optimizer) -> None:
        """Write everything to one file, whole or not at all."""
        if self.path is None or not self.writes:
            return
        tensors = {f"model.{k}": v for k, v in self.detector.state_dict().items()}
        if optimizer is not None:
            for index, values in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{key}": v for key, v in values.items()}
            means = self.average.shadow_params if self.average else ()
            tensors |= {f"average.{place}": mean for place, mean in enumerate(means)}
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        state = {"identity": self.identity, "stage": self.stage, "step": self.step}
        text = json.dumps(state | {"history": self.history.rows})
        write_tensors(tensors, self.path, {"state": text})


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries whose name starts with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
