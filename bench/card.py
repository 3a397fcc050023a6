"""Each method at its paper's size on a GPU: steps, predictions, memory, what protection costs.

The targets are those of one H100; weights are as they were drawn, which changes no time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.data import Dataset

from bench.table import Row
from bench.timing import best
from diffad_ref import DecoDiff, DiffusionAD, OneForMore
from diffad_ref.continual import gather
from diffad_ref.detector import Detector, arithmetic
from diffad_ref.gradient_projection import GradientProjectionMemory
from diffad_ref.tools.memory import peak_memory

PRECISIONS = ("float32", "tf32", "bf16")
GATHERED = 8  # images, from which a task's 339 are extrapolated


@dataclass(frozen=True)
class Case:
    """A method, its batches, and what one H100 should reach in bf16."""

    method: type[Detector]
    batch: int  # of a training step
    seconds: float  # at most, for a step
    gigabytes: float | None  # at most, for a step
    predictions: dict[int, float]  # images at a time, and milliseconds an image at most


CASES = (
    Case(DiffusionAD, 16, 0.30, 40, {1: 23, 16: 9}),
    Case(DecoDiff, 128, 0.20, None, {1: 90, 16: 21}),
    Case(OneForMore, 12, 0.15, 16, {1: 250, 8: 60}),
)


class Pictures(Dataset):
    """Some images of noise, of one category."""

    def __init__(self, count: int, side: int):
        self.images = torch.rand(count, 3, side, side)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict:
        return {"image": self.images[i], "category_index": 0}


def rows(
    device: torch.device, size: str = "paper", rounds: int = 5, compiled: bool = True
) -> list[Row]:
    """Nothing on a CPU, for which these sizes are too large; `size` may be "tiny"."""
    if device.type != "cuda" and size == "paper":
        return []
    out = []
    for case in CASES:
        for row in _rows_of(case, device, size, rounds, compiled):
            print(json.dumps(row.to_dict()), file=sys.stderr, flush=True)  # should it break off
            out.append(row)
    return out


def _rows_of(case: Case, device, size: str, rounds: int, compiled: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    detector = getattr(case.method, size)().to(device)
    for part in detector.modules():  # nothing is loaded: that they are ready is only said
        if hasattr(part, "is_ready"):
            part._ready = True
    yield from _steps(detector, case, PRECISIONS, device, rounds)
    yield from _predictions(detector, case, ("float32", "bf16"), device, rounds)
    if case.method is OneForMore:
        yield from _protection(detector, case, device, rounds)
    if compiled:
        detector.compile()
        yield from _steps(detector, case, ("bf16",), device, rounds, ", compiled")
        yield from _predictions(detector, case, ("bf16",), device, rounds, ", compiled")


def _steps(detector, case: Case, precisions, device, rounds: int, how="") -> Iterator[Row]:
    for precision in precisions:
        step = training_step(detector, batch_for(detector, case.batch), precision)
        what = f"{case.method.__name__}: training step, batch {case.batch}, {precision}{how}"
        yield from measured(step, what, device, rounds, case.seconds, case.gigabytes)


def _predictions(detector, case: Case, precisions, device, rounds: int, how="") -> Iterator[Row]:
    for count, limit in case.predictions.items():
        x = torch.rand(count, 3, *[detector.config.image_size] * 2, device=device)
        index = torch.zeros(count, dtype=torch.long)
        for precision in precisions:
            call = partial(detector.predict, x, index, precision=precision)
            what = f"{case.method.__name__}: prediction of {count}, {precision}{how}, an image"
            yield from measured(call, what, device, rounds, limit / 1e3, None, count)


def batch_for(detector: Detector, count: int) -> dict:
    """A training batch: images, or latents where these are computed once."""
    device, side = detector.device, detector.view("train")["image_size"]
    index = torch.zeros(count, dtype=torch.long, device=device)
    batch = {"category_index": index, "texture": index.bool()}
    if isinstance(detector, DecoDiff):
        codec = detector.config.codec
        cells = detector.config.image_size // codec.factor
        return batch | {"posterior": torch.rand(count, 2 * codec.channels, cells, cells).to(device)}
    return batch | {"image": torch.rand(count, 3, side, side, device=device)}


def training_step(detector: Detector, batch: dict, precision: str, guard=None) -> Callable:
    """A bare step as `fit` takes it."""
    detector.train().enter(detector.stages[-1])
    optimizer = torch.optim.AdamW(detector.parameter_groups(), fused=True)
    if guard is not None:
        guard(optimizer)
    generator = torch.Generator(detector.device).manual_seed(0)

    def step():
        with arithmetic(detector, precision):
            loss = detector(batch, generator)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measured(
    call, what: str, device, rounds: int, seconds=None, gigabytes=None, images: int = 1
) -> Iterator[Row]:
    """Rows of time and of memory, or one that says that it did not fit."""
    try:
        with peak_memory(device) as peak:
            (taken,) = best(call, rounds=rounds)
    except torch.cuda.OutOfMemoryError:
        yield Row("card", what, note="out of memory")
        return
    target = None if seconds is None else 1.0
    yield Row("card", what, taken / images, "s", "goal" if target else "", seconds, target)
    if gigabytes is not None or images == 1:
        target = None if gigabytes is None else 1.0
        found = peak.bytes / 1e9
        yield Row(
            "card", f"{what}: memory", found, "GB", "goal" if target else "", gigabytes, target
        )


def _protection(detector: Detector, case: Case, device, rounds: int) -> Iterator[Row]:
    """Gathering over some images, extending, and a step that is projected."""
    plain = training_step(detector, batch_for(detector, case.batch), "bf16")
    (seconds,) = best(plain, rounds=rounds)
    memory = GradientProjectionMemory(detector, gamma=detector.config.gamma)
    data = Pictures(GATHERED, detector.config.image_size)
    name = f"{case.method.__name__}: gathering over {len(data)} images and extending"
    once = partial(gather, detector, memory, data, progress=False)
    yield from measured(once, name, device, 1, 900 * len(data) / 339, 17)
    guarded = training_step(
        detector,
        batch_for(detector, case.batch),
        "bf16",
        lambda o: memory.protect(o, rest="freeze"),
    )
    (projected,) = best(guarded, rounds=rounds)
    what = f"{case.method.__name__}: projected training step"
    yield Row("card", what, projected, "s", "plain step", seconds, 1 / 1.5)
