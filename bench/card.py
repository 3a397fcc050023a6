"""Each method at its paper's size on a GPU: steps, predictions, memory, what protection costs.

The targets are those of one H100; weights are as they were drawn, which changes no time.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.utils.data import Dataset

from bench.table import Row
from bench.timing import best, wait
from diffad_ref import DecoDiff, DiffusionAD, OneForMore
from diffad_ref.continual import gather
from diffad_ref.detector import Detector, arithmetic, tf32_unless
from diffad_ref.gradient_projection import GradientProjectionMemory
from diffad_ref.one_for_more import paste
from diffad_ref.tools.memory import peak_memory
from diffad_ref.training import fit

PRECISIONS = ("float32", "tf32", "bf16")
GATHERED, TASK = 16, 339  # images that are gathered, and those of a task, extrapolated from them


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


class Samples(Dataset):
    """So many samples of a batch, one by one, again and again."""

    def __init__(self, batch: dict, count: int):
        self.batch, self.count = {name: values.cpu() for name, values in batch.items()}, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict:
        return {name: values[i % len(values)] for name, values in self.batch.items()}


class TimedMemory(GradientProjectionMemory):
    """Counts the seconds in which a memory is extended."""

    seconds = 0.0

    def extend(self):
        """As always."""
        wait()
        start = time.perf_counter()
        taken = super().extend()
        wait()
        self.seconds += time.perf_counter() - start
        return taken


def rows(
    device: torch.device, size: str = "paper", rounds: int = 5, compiled: bool = True
) -> list[Row]:
    """Nothing on a CPU, for which these sizes are too large; `size` may be "tiny"."""
    if device.type != "cuda" and size == "paper":
        return []
    out, kinds = [], (_protection, _plain, _compiled) if compiled else (_protection, _plain)
    for kind in kinds:  # what is compiled comes last: it takes longest
        for case in CASES:
            for row in _kept(kind(_detector(case, size, device), case, device, rounds), case):
                print(json.dumps(row.to_dict()), file=sys.stderr, flush=True)  # should it break off
                out.append(row)
    return out


def _kept(found: Iterator[Row], case: Case) -> Iterator[Row]:
    """Rows up to the one for which memory is too small: what comes after can still be measured."""
    try:
        yield from found
    except torch.cuda.OutOfMemoryError:
        yield Row("card", f"{case.method.__name__}: what comes next", note="out of memory")


def _detector(case: Case, size: str, device: torch.device) -> Detector:
    torch.manual_seed(0)
    textures = {"built_in_textures": True} if case.method is DiffusionAD else {}
    with device:
        detector = getattr(case.method, size)(**textures)
    for part in detector.modules():  # nothing is loaded: that they are ready is only said
        if hasattr(part, "is_ready"):
            part._ready = True
    return detector.to(device)


def _plain(detector: Detector, case: Case, device, rounds: int) -> Iterator[Row]:
    yield from _steps(detector, case, PRECISIONS, device, rounds)
    yield from _predictions(detector, case, ("float32", "bf16"), device, rounds)
    yield from _anomalies(detector, case, device, rounds)
    yield _fit(detector, case, device, rounds)


def _compiled(detector: Detector, case: Case, device, rounds: int) -> Iterator[Row]:
    detector.compile()
    yield from _steps(detector, case, ("bf16",), device, rounds, ", compiled")
    yield from _predictions(detector, case, ("bf16",), device, rounds, ", compiled")


def _fit(detector: Detector, case: Case, device, rounds: int) -> Row:
    """A step of `fit`, from runs of two lengths, beside that of a bare loop."""
    batch = batch_for(detector, case.batch)
    step = training_step(detector, batch, "bf16")
    loops = [partial(_repeat, step, n * rounds) for n in (1, 3)]
    detector.stages = (replace(detector.stages[-1], batch_size=case.batch),)
    options = {"device": device, "precision": "bf16", "progress": False}
    data = Samples(batch, 4 * case.batch)
    runs = [partial(fit, detector, data, n * rounds, **options) for n in (1, 3)]
    few, many, short, long = best(*loops, *runs, rounds=1)
    what, steps = f"{case.method.__name__}: a step of fit, batch {case.batch}, bf16", 2 * rounds
    found, bare = (long - short) / steps, (many - few) / steps
    return Row("card", what, found, "s", "bare loop", bare, 1 / 1.05)


def _anomalies(detector: Detector, case: Case, device, rounds: int) -> Iterator[Row]:
    """What makes synthetic anomalies in a training batch, for the methods that do."""
    batch, generator = batch_for(detector, case.batch), torch.Generator(device).manual_seed(0)
    if isinstance(detector, DiffusionAD):
        call = partial(detector.with_anomalies, batch, generator)
    elif isinstance(detector, OneForMore):
        call = partial(paste, batch["image"], detector.config.pasting, generator)
    else:
        return
    (seconds,) = best(call, rounds=rounds)
    what = f"{case.method.__name__}: synthetic anomalies, batch {case.batch}"
    yield Row("card", what, 1000 * seconds, "ms")


def _repeat(step: Callable, count: int) -> None:
    for _ in range(count):
        step()


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
        detector.train()  # a `fit` in between ends in evaluation mode
        with tf32_unless(precision):
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
    if case.method is not OneForMore:
        return
    memory = TimedMemory(detector, gamma=detector.config.gamma)
    data = Samples(batch_for(detector, case.batch), GATHERED)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with peak_memory(device) as peak:
        start = time.perf_counter()
        taken = gather(detector, memory, data, progress=False)
        each = (time.perf_counter() - start - memory.seconds) / GATHERED
    task = TASK * each + memory.seconds
    yield Row("card", "OneForMore: gathering, an image", each)
    yield Row("card", f"OneForMore: extending after {GATHERED} images", memory.seconds)
    what = f"OneForMore: a task of {TASK} images, from these two"
    yield Row("card", what, task, "s", "goal", 900, 1.0)
    found = (peak.bytes - before) / 1e9
    yield Row("card", "OneForMore: memory beyond the model's", found, "GB", "goal", 17, 1.0)
    share = sum(rank / features for rank, features in taken.values()) / len(taken)
    plain = training_step(detector, batch_for(detector, case.batch), "bf16")
    (seconds,) = best(plain, rounds=rounds)
    protect = partial(memory.protect, rest="freeze")
    guarded = training_step(detector, batch_for(detector, case.batch), "bf16", protect)
    (projected,) = best(guarded, rounds=rounds)
    what = f"OneForMore: projected training step, {share:.0%} held"
    yield Row("card", what, projected, "s", "plain step", seconds, 1 / 1.5)
