"""What a run will cost, before it is started: weights, arithmetic, memory, hours.

A training step runs as it is, on tensors without numbers: its arithmetic is counted, and every
allocation is followed (`allocations.py`). The most that is ever held at once is what a card must
have. GB are 2³⁰ bytes, as on a card. Hours stand on measurements: nobody reaches a card's peak.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from pandas import DataFrame
from torch.utils.flop_counter import FlopCounterMode

from diffad_ref.deco_diff import DecoDiff
from diffad_ref.detector import Detector, precision_on
from diffad_ref.diffusion_ad import DiffusionAD
from diffad_ref.one_for_more import OneForMore
from diffad_ref.tools.allocations import GB, training_step
from diffad_ref.tools.protection import Protection, protection
from diffad_ref.tools.tables import Shown, rows


class Peak(NamedTuple):
    """Dense matrix arithmetic of a card, in TFLOP/s, as its maker states it."""

    half: float  # 16 bits: bf16, or on a T4, which has no bf16, fp16
    tf32: float  # on a T4, which has none, float32
    single: float  # float32
    double: float  # float64


GPUS = {
    "T4": Peak(65, 8.1, 8.1, 0.25),
    "A100 80 GB": Peak(312, 156, 19.5, 19.5),
    "H100 SXM": Peak(989, 494, 67, 67),
}
CARDS = (16, 24, 80)  # GB that many cards have
# The share of the 16-bit peak that a bf16 training step reached on an H100, at the paper's size and
# the recipe's batch: arithmetic over seconds (16 images in 0.441 s, 128 latents in 0.251 s, 12
# images in 0.153 s; PyTorch 2.11, nothing compiled). Other cards are assumed to reach the same.
SHARES = {"DiffusionAD": 0.133, "DecoDiff": 0.178, "OneForMore": 0.073}
SAME = {"fp16": "bf16", "tf32": "float32"}  # in bytes
CONTEXT = 1.0  # GB of a card that tensors do not get: of CUDA, and gaps between allocations
MATRIX_SHARE = 0.5  # of the peak, of products of large matrices: assumed, not measured


@dataclass(frozen=True)
class Plan:
    """The cost of one method at one size.

    Attributes
    ----------
    weights, learning : int
        Numbers in all networks, and those that are trained.
    step_flops, predict_flops : int
        Arithmetic for one image: of a training step, forward and backward, and of a prediction.
        A multiplication and an addition are two.
    peaks : dict
        For each of `allocations.PRECISIONS`, and for bf16 with checkpointing, moments of a step at
        which memory can be highest: bytes that are held in any case, and bytes an image.
    steps, batch_size : int
        Of the whole recipe; of its last stage.
    images : int
        Images that the whole recipe shows the network, repetitions counted.
    protection : Protection, optional
        Of a method that learns tasks one after the other, what its memory costs besides.
    """

    method: str
    weights: int
    learning: int
    step_flops: int
    predict_flops: int
    peaks: dict[str, tuple[tuple[int, int], ...]]
    images: int
    steps: int
    batch_size: int
    protection: Protection | None = None

    def memory(self, batch_size: int | None = None, precision: str = "float32") -> float:
        """GB that a training step allocates at most; its batch is by default the recipe's.

        Weights, gradients, Adam's averages, 16-bit copies and all that lives between: no context
        of CUDA (half a GB), and no gaps between allocations.
        """
        n = batch_size or self.batch_size
        return (
            max(fixed + n * each for fixed, each in self.peaks[SAME.get(precision, precision)]) / GB
        )

    def largest_batch(self, gigabytes: float, precision: str = "float32") -> int:
        """The most images a step that so much memory holds; 0 if not even one fits."""
        peaks = self.peaks[SAME.get(precision, precision)]
        room = [(gigabytes * GB - fixed, each) for fixed, each in peaks]
        if any(free < 0 for free, _ in room):
            return 0
        return int(min(free // each for free, each in room if each))

    def hours(self, gpu: str, share: float | None = None) -> float:
        """Of the whole recipe on one of `GPUS`, at its share of the peak in 16 bit."""
        share = SHARES.get(self.method) if share is None else share
        if share is None or not 0 < share <= 1:
            raise ValueError(f"utilisation is a share in (0, 1], not {share}")
        return self.step_flops * self.images / (GPUS[gpu].half * 1e12 * share) / 3600

    def protected_hours(self, gpu: str, share: float | None = None) -> float:
        """Of a task after the first: the recipe, every step projected, and then the gathering."""
        projecting = _matrix_hours(self.protection.project_flops * self.steps, GPUS[gpu].tf32)
        return self.hours(gpu, share) + projecting + self.gathering_hours(gpu, share)

    def gathering_hours(self, gpu: str, share: float | None = None) -> float:
        """Of what comes after any task: walks over its images, squares, eigenvectors."""
        cost = self.protection
        walks = cost.passes * cost.images * self.predict_flops / (self.step_flops * self.images)
        every = cost.decompose_flops + cost.images * cost.square_flops
        double = cost.decompose_double + cost.images * cost.square_double
        matrices = _matrix_hours(every - double, GPUS[gpu].single)
        return self.hours(gpu, share) * walks + matrices + _matrix_hours(double, GPUS[gpu].double)


def _matrix_hours(flops: float, peak: float) -> float:
    """Of products of large matrices, on a card with such a peak in TFLOP/s."""
    return flops / (peak * 1e12 * MATRIX_SHARE * 3600)


def plan(detector: Detector, latents: bool = False, images: int = 209) -> Plan:
    """Count what one image costs a detector, in the last stage of its recipe.

    The detector stays as it is: a copy of it is made of fake tensors. With `latents` it learns
    from posteriors that the codec has computed before. The recipe's epochs are those of so many
    `images`, by default MVTec AD's bottles.
    """
    detector = deepcopy(detector).to("meta")
    stages = [stage.counted(images) for stage in detector.stages]
    detector.enter(stage := detector.stages[-1])
    weights, category = list(detector.parameters()), torch.zeros(1, dtype=torch.long, device="meta")
    image = torch.zeros(1, 3, *[detector.config.image_size] * 2, device="meta")
    with FlopCounterMode(display=False) as prediction, torch.no_grad():
        deepcopy(detector).eval().judge(image, category, torch.Generator())
    step_flops, peaks = training_step(detector.train(), latents)
    return Plan(
        type(detector).__name__,
        sum(p.numel() for p in weights),
        sum(p.numel() for p in weights if p.requires_grad),
        step_flops,
        prediction.get_total_flops(),
        peaks,
        sum(stage.steps * stage.batch_size * stage.accumulate for stage in stages),
        sum(stage.steps for stage in stages),
        stage.batch_size,
    )


@contextmanager
def what_fits(detector: Detector, precision: str = "auto") -> Iterator[None]:
    """If a GPU is too small for a training step, say what `fit` says, and how many images fit."""
    try:
        yield
    except ValueError as error:
        if not isinstance(error.__cause__, torch.cuda.OutOfMemoryError):
            raise
        with torch.device("meta"):  # a copy, for which the GPU needs no room
            copy = type(detector)(replace(detector.config, stages=(detector.stage,)))
        room = torch.cuda.get_device_properties(detector.device).total_memory / GB - CONTEXT
        count = plan(copy).largest_batch(room, precision_on(detector.device, precision))
        found = f"at most {count} images" if count else "not even one image"
        raise ValueError(f"{error}. By its size, a step has room for {found}") from error


# ------------------------------------------------------------------------------------------ tables


@cache
def paper_plans() -> tuple[Plan, ...]:
    """The three methods at the size of their papers, on MVTec AD; DeCo-Diff learns from latents.

    The recipes are one model's of DiffusionAD, for bottles, the one model of DeCo-Diff, and the
    first task of One-for-More's 14-1, of 3,389 images.
    """
    with torch.device("meta"):
        detectors = [method.paper() for method in (DiffusionAD, DecoDiff, OneForMore)]
    ad, deco, one = detectors
    first = plan(one, images=3389)
    return plan(ad), plan(deco, latents=True), replace(first, protection=protection(one))


@cache
def recipe_plans() -> tuple[Plan, ...]:
    """The same where all learn from images, as the papers' recipes do: see `reproduce`."""
    ad, _, one = paper_plans()
    with torch.device("meta"):
        deco = DecoDiff.paper()
    return ad, plan(deco), one


def size_table(plans: Sequence[Plan]) -> Shown:
    """Weights and arithmetic, one row a method."""
    return rows(
        [
            {
                "method": p.method,
                "weights, M": p.weights / 1e6,
                "that learn, M": p.learning / 1e6,
                "TFLOP a training image": p.step_flops / 1e12,
                "TFLOP a predicted image": p.predict_flops / 1e12,
                "training images, M": p.images / 1e6,
            }
            for p in plans
        ]
    )


def memory_table(plans: Sequence[Plan], batches: tuple[int, ...] = (1, 4, 16)) -> Shown:
    """GB of a training step by batch size, one row a method and way to compute.

    Besides the batches that are asked for, each method has its recipe's.
    """
    found, all_sizes = [], sorted({*batches, *(p.batch_size for p in plans)})
    for p in plans:
        sizes = {*batches, p.batch_size}
        for way in p.peaks:
            memory = {f"batch {n}, GB": p.memory(n, way) if n in sizes else None for n in all_sizes}
            found.append({"method": p.method, "precision": way} | memory)
    return Shown(DataFrame(found).set_index(["method", "precision"]))


def room_table(plans: Sequence[Plan]) -> Shown:
    """The most images of a training step on cards of several sizes, one row a method and way.

    2 GB of a card are left to CUDA, to other programs, and to gaps between allocations.
    """
    found = [
        {"method": p.method, "precision": way, "recipe's batch": p.batch_size}
        | {f"{size} GB": p.largest_batch(size - 2, way) for size in CARDS}
        for p in plans
        for way in p.peaks
    ]
    return Shown(DataFrame(found).set_index(["method", "precision"]))


def hours_table(plans: Sequence[Plan], utilisation: float | None = None) -> Shown:
    """Hours of the whole recipe by GPU, one row a method; by default at the `SHARES`.

    A method that protects old tasks has a second row, for a task after the first.
    """
    found = []
    for p in plans:
        found.append({"method": p.method} | {f"{g}, h": p.hours(g, utilisation) for g in GPUS})
        if p.protection:
            hours = {f"{g}, h": p.protected_hours(g, utilisation) for g in GPUS}
            found.append({"method": f"{p.method}, protected"} | hours)
    return rows(found)
