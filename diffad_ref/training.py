"""One `fit` for all methods.

Every random number of a step is a function of (seed, stage, step, process), and the learning rate
a function of the step. So a run needs to remember weights, optimiser and where it was, nothing
else; and a run that was killed continues to exactly the numbers of one that was not.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from diffad_ref.checkpoints import load_weights, read_metadata, read_tensors, write_tensors
from diffad_ref.detector import Detector, Stage

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
        last = {name: self.column(name)[-steps:] for name in names}
        return {name: sum(values) / len(values) for name, values in last.items()}


def fit(
    detector: Detector,
    dataset: Dataset,
    steps: int | None = None,
    batch_size: int | None = None,
    *,
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
    """Train a detector by the stages of its config.

    Parameters
    ----------
    detector : Detector
        Trained in place; ends in evaluation mode.
    dataset : Dataset
        Samples as in `diffad_ref.data`; for these methods, normal images.
    steps : int, optional
        Length of the whole run; the stages share it in the proportion of the config.
    batch_size : int, optional
        Images a step and process, instead of each stage's own number.
    out : path, optional
        Folder for checkpoints. If it holds an unfinished run of the same config, data size and
        seed, that run is continued.
    seed : int
        Equal seeds give equal weights on the same machine and number of threads.
    accumulate : int
        Batches whose gradients are averaged into one step: more images than memory holds.
    mixed_precision : "no", "bf16" or "fp16"
    ema : float, optional
        Decay of an exponential moving average of the weights; a stage then ends with the average.
    save_every : int
        Steps between checkpoints.
    num_workers : int
        Processes that load images; 0 is right for notebooks and for small images.
    cpu : bool
        Stay on the CPU even where there is a GPU.
    on_optimizer : callable, optional
        Gets the optimiser of each stage before its first step, to attach hooks, such as those of
        `GradientProjectionMemory.protect`.

    Returns
    -------
    History

    Raises
    ------
    ValueError
        Empty data, a loss that is not finite, or an `out` folder that holds another run.
    """
    if len(dataset) == 0:
        raise ValueError("there is nothing to train on: the data set is empty")
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=cpu)
    stages = _plan(detector.stages, steps, batch_size)
    detector.to(accelerator.device)
    detector.categories = tuple(getattr(dataset, "categories", detector.categories))
    identity = {
        "method": type(detector).__name__,
        "stages": [dataclasses.asdict(stage) for stage in stages],
        "config": _plain_config(detector),
        "categories": list(detector.categories),
        "images": len(dataset),
        "settings": [seed, accumulate, mixed_precision, ema, accelerator.num_processes],
    }
    run = _Run(detector, identity, Path(out) / STATE if out else None)
    run.resume()
    if run.fresh:
        detector.prepare(dataset)

    with torch.random.fork_rng():
        for number in range(run.stage, len(stages)):
            stage = stages[number]
            detector.enter(stage)
            detector.train()
            groups = detector.parameter_groups()
            optimizer = OPTIMIZERS[stage.optimizer](groups, weight_decay=stage.weight_decay)
            run.begin(number, optimizer, ema)
            if on_optimizer is not None:
                on_optimizer(optimizer)
            model = accelerator.prepare_model(detector)
            optimizer = accelerator.prepare_optimizer(optimizer)
            batches = iter(
                DataLoader(
                    dataset,
                    batch_sampler=Steps(len(dataset), stage, number, run.step, accumulate, seed),
                    num_workers=num_workers,
                )
            )
            bar = tqdm(
                range(run.step, stage.steps),
                desc=stage.name,
                initial=run.step,
                total=stage.steps,
                disable=not (progress and accelerator.is_main_process),
            )
            for step in bar:
                for group in optimizer.param_groups:
                    group["lr"] = stage.lr[group["name"]].at(step, stage.steps)
                means: dict[str, float] = {}
                for micro in range(accumulate):
                    generator = step_generator(accelerator, seed, number, step, micro)
                    batch = _to_device(next(batches), accelerator.device)
                    with _synchronise(accelerator, model, micro == accumulate - 1):
                        with accelerator.autocast():
                            losses = model(batch, generator)
                        accelerator.backward(losses["loss"] / accumulate)
                    for name, value in losses.items():
                        means[name] = means.get(name, 0.0) + value.item() / accumulate
                _check_finite(means, stage, step, run)
                if stage.clip is not None:
                    accelerator.clip_grad_norm_(model.parameters(), stage.clip)
                optimizer.step()
                optimizer.zero_grad()
                run.after_step(step, {"stage": stage.name, **means}, ema)
                bar.set_postfix({name: f"{value:.4f}" for name, value in means.items()})
                if (step + 1) % save_every == 0 and accelerator.is_main_process:
                    run.save(optimizer)
            run.end_stage()
            if accelerator.is_main_process:
                run.save(None)
            accelerator.wait_for_everyone()
    detector.eval()
    return run.history


def trained_weights(out: str | os.PathLike) -> dict[str, Tensor]:
    """The detector's state at the last checkpoint of a run, in full precision."""
    return _under("model.", read_tensors(Path(out) / STATE))


class Steps(Sampler):
    """The image numbers of every batch from step `start` on: shuffled epochs, cut evenly.

    All processes see the same order and take their own share of each step.
    """

    def __init__(
        self, images: int, stage: Stage, number: int, start: int, accumulate: int, seed: int
    ):
        self.images, self.stage, self.number = images, stage, number
        self.start, self.accumulate, self.seed = start, accumulate, seed

    def __len__(self) -> int:
        return (self.stage.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        state = torch.distributed
        together = state.is_available() and state.is_initialized()
        world, rank = (state.get_world_size(), state.get_rank()) if together else (1, 0)
        size, epoch, order = self.stage.batch_size, -1, None
        for batch in range(self.start * self.accumulate, self.stage.steps * self.accumulate):
            numbers = []
            for place in range((batch * world + rank) * size, (batch * world + rank + 1) * size):
                if place // self.images != epoch:
                    epoch = place // self.images
                    order = np.random.default_rng([self.seed, self.number, epoch]).permutation(
                        self.images
                    )
                numbers.append(int(order[place % self.images]))
            yield numbers


def step_generator(
    accelerator: Accelerator, seed: int, stage: int, step: int, micro: int
) -> torch.Generator:
    """The randomness of one batch, on the device; also seeds torch itself, for dropout."""
    key = np.random.SeedSequence([seed, stage, step, micro, accelerator.process_index])
    number = int(key.generate_state(1, np.uint64)[0] >> 1)
    torch.manual_seed(number)
    return torch.Generator(accelerator.device).manual_seed(number)


def _plan(stages: tuple[Stage, ...], steps: int | None, batch_size: int | None) -> list[Stage]:
    """The stages of this run: shortened in proportion, with another batch size if wanted."""
    ends = np.cumsum([stage.steps for stage in stages])
    if steps is not None:
        ends = np.rint(ends * steps / ends[-1]).astype(int)
    return [
        dataclasses.replace(stage, steps=int(count), batch_size=batch_size or stage.batch_size)
        for stage, count in zip(stages, np.diff(ends, prepend=0), strict=True)
    ]


def _plain_config(detector: Detector) -> dict | None:
    config = getattr(detector, "config", None)
    return dataclasses.asdict(config) if dataclasses.is_dataclass(config) else None


def _synchronise(accelerator: Accelerator, model, last: bool):
    """Processes average their gradients only with the last batch of a step."""
    return torch.enable_grad() if last else accelerator.no_sync(model)


def _to_device(batch: dict, device: torch.device) -> dict:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _check_finite(losses: dict[str, float], stage: Stage, step: int, run: _Run) -> None:
    if not np.isfinite(losses["loss"]):
        kept = f"; the last checkpoint is {run.path}" if run.path and run.path.exists() else ""
        raise ValueError(f"the loss of step {step} in stage {stage.name!r} is {losses}{kept}")


class _Run:
    """Where a training run is, and how to come back to it."""

    def __init__(self, detector: Detector, identity: dict, path: Path | None):
        self.detector, self.path = detector, path
        self.identity = json.loads(json.dumps(identity))  # as it looks after a round trip
        self.stage = self.step = 0
        self.history = History()
        self.average: dict[str, Tensor] | None = None
        self._loaded: dict[str, Tensor] = {}

    @property
    def fresh(self) -> bool:
        """Whether nothing has been trained yet."""
        return not (self.stage or self.step)

    def resume(self) -> None:
        """Take up what `path` holds, if anything."""
        if self.path is None or not self.path.exists():
            return
        state = json.loads(read_metadata(self.path)["state"])
        if state["identity"] != self.identity:
            different = [k for k in self.identity if state["identity"].get(k) != self.identity[k]]
            raise ValueError(
                f"{self.path.parent} holds another run (different {', '.join(different)}); "
                "choose another folder, or delete it to start anew"
            )
        self.stage, self.step = state["stage"], state["step"]
        self.history = History(state["history"])
        self._loaded = read_tensors(self.path)
        load_weights(self.detector, _under("model.", self._loaded), self.path)

    def begin(self, number: int, optimizer: torch.optim.Optimizer, ema: float | None) -> None:
        """Start a stage, or go on inside it with the optimiser's state."""
        if number != self.stage:
            self.stage, self.step = number, 0
        learning = dict(self.detector.named_parameters())
        if ema is not None:
            self.average = {k: p.detach().clone() for k, p in learning.items() if p.requires_grad}
        saved = _under("optimizer.", self._loaded)
        if saved:
            plain = optimizer.state_dict()
            plain["state"] = {}
            for name, value in saved.items():
                index, key = name.split(".", 1)
                plain["state"].setdefault(int(index), {})[key] = value
            optimizer.load_state_dict(plain)
            for name, value in _under("average.", self._loaded).items():
                self.average[name].copy_(value)
        self._loaded = {}

    @torch.no_grad()
    def after_step(self, step: int, row: dict, ema: float | None) -> None:
        self.step = step + 1
        self.history.rows.append({"step": step, **row})
        if self.average is not None:
            learning = dict(self.detector.named_parameters())
            for name, mean in self.average.items():
                mean.lerp_(learning[name], 1 - min(ema, self.step / (self.step + 10)))

    @torch.no_grad()
    def end_stage(self) -> None:
        """The stage's average, if one was kept, becomes the weights."""
        if self.average is not None:
            learning = dict(self.detector.named_parameters())
            for name, mean in self.average.items():
                learning[name].copy_(mean)
        self.average = None
        self.stage, self.step = self.stage + 1, 0

    def save(self, optimizer) -> None:
        """Write everything to one file, whole or not at all."""
        if self.path is None:
            return
        tensors = {f"model.{k}": v for k, v in self.detector.state_dict().items()}
        if optimizer is not None:
            for index, values in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{key}": v for key, v in values.items()}
            tensors |= {f"average.{k}": v for k, v in (self.average or {}).items()}
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        state = {
            "identity": self.identity,
            "stage": self.stage,
            "step": self.step,
            "history": self.history.rows,
        }
        write_tensors(tensors, self.path, {"state": json.dumps(state)})


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries whose name starts with a prefix, without it."""
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
