"""What a run will cost, before it is started: weights, arithmetic, memory, hours.

On PyTorch's meta device a tensor has a shape and no numbers, so a method of any size can be sent
through a training step on any machine, by the very code that trains it. The arithmetic is counted
operation by operation, and so is what is kept for the backward pass. Only the hours are an
estimate: nobody reaches a GPU's peak, and which share is reached has to be assumed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from unittest.mock import patch

import torch
from pandas import DataFrame
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from diffad_ref import one_for_more
from diffad_ref.deco_diff import DecoDiff
from diffad_ref.detector import Detector
from diffad_ref.diffusion_ad import DiffusionAD
from diffad_ref.gradient_projection import square_of
from diffad_ref.one_for_more import OneForMore
from diffad_ref.tools.tables import Shown, rows

# Dense 16-bit matrix arithmetic in TFLOP/s, and memory in GB, as the maker states them.
GPUS = {"T4": (65, 16), "A100 80 GB": (312, 80), "H100 SXM": (989, 80)}
UTILISATION = 0.25  # share of the peak; a guess, better measured on the machine at hand


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
    kept_bytes : int
        What one image leaves in memory between forward and backward, in float32.
    images : int
        Images that the whole recipe shows the network, repetitions counted.
    batch_size : int
        Of the recipe's last stage.
    """

    method: str
    weights: int
    learning: int
    step_flops: int
    predict_flops: int
    kept_bytes: int
    images: int
    batch_size: int

    def memory(self, batch_size: int | None = None, half: bool = False) -> float:
        """GB of a training step: weights, gradients, Adam's two averages, and what is kept.

        Parameters
        ----------
        batch_size : int, optional
            Images a step; by default the recipe's.
        half : bool
            bf16 autocast: what is kept counts half. Weights and averages stay float32.
        """
        kept = self.kept_bytes * (batch_size or self.batch_size) * (0.5 if half else 1)
        return (4 * self.weights + 12 * self.learning + kept) / 1e9

    def hours(self, gpu: str, utilisation: float = UTILISATION) -> float:
        """Of the whole recipe on one of `GPUS`."""
        if not 0 < utilisation <= 1:
            raise ValueError(f"utilisation is a share in (0, 1], not {utilisation}")
        return self.step_flops * self.images / (GPUS[gpu][0] * 1e12 * utilisation) / 3600


def plan(detector: Detector) -> Plan:
    """Count what one image costs a detector, in the last stage of its recipe.

    The detector stays as it is: a copy of it goes to the meta device. The synthesis of anomalies,
    which asks for values, is left out and costs nothing.
    """
    detector = deepcopy(detector).to("meta")
    detector.enter(detector.stages[-1])
    weights, generator = list(detector.parameters()), torch.Generator()
    category = torch.zeros(1, dtype=torch.long, device="meta")

    def image(side: int) -> Tensor:
        return torch.zeros(1, 3, side, side, device="meta")

    batch = {"image": image(detector.view("train")["image_size"]), "category_index": category}
    keep = _Kept(weights)
    with _without_values():
        with FlopCounterMode(display=False) as step, saved_tensors_hooks(keep, lambda kept: kept):
            detector.train().training_loss(batch, generator)["loss"].backward()
        with FlopCounterMode(display=False) as prediction, torch.no_grad():
            detector.eval().judge(image(detector.config.image_size), category, generator)
    return Plan(
        type(detector).__name__,
        sum(p.numel() for p in weights),
        sum(p.numel() for p in weights if p.requires_grad),
        step.get_total_flops(),
        prediction.get_total_flops(),
        keep.bytes,
        sum(stage.steps * stage.batch_size for stage in detector.stages),
        detector.stages[-1].batch_size,
    )


class _Kept:
    """What the backward pass will need, in bytes; each storage counts once, a weight's never."""

    def __init__(self, weights: list[Tensor]):
        self.bytes, self._seen = 0, {p.untyped_storage()._cdata for p in weights}
        self._alive = []  # else a storage's name could be given to another

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


def _without_values() -> ExitStack:
    """A context in which nothing asks for values, of which a meta tensor has none."""

    def with_anomalies(self, batch, generator):
        x = batch["image"].clone()
        return x, torch.zeros_like(x[:, :1]), x.new_zeros(len(x))

    stack = ExitStack()
    for place, name, instead in (
        (DiffusionAD, "with_anomalies", with_anomalies),
        (one_for_more, "paste", lambda images, *_: images.clone()),
        (torch, "autocast", lambda *_, **__: nullcontext()),  # knows no meta device
    ):
        stack.enter_context(patch.object(place, name, instead))
    return stack


# ------------------------------------------------------------------------------------------ tables


def paper_plans() -> list[Plan]:
    """The three methods at the size of their papers, without memory for their weights."""
    with torch.device("meta"):
        detectors = [method.paper() for method in (DiffusionAD, DecoDiff, OneForMore)]
    return [plan(detector) for detector in detectors]


def size_table(plans: list[Plan]) -> Shown:
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


def memory_table(plans: list[Plan], batches: tuple[int, ...] = (1, 4, 16)) -> Shown:
    """GB of a training step by batch size and precision, one row a method and precision.

    Besides the batches that are asked for, each method has its recipe's.
    """
    found, all_sizes = [], sorted({*batches, *(p.batch_size for p in plans)})
    for p in plans:
        sizes = {*batches, p.batch_size}
        for half, precision in ((False, "float32"), (True, "bf16 autocast")):
            memory = {
                f"batch {n}, GB": p.memory(n, half) if n in sizes else None for n in all_sizes
            }
            found.append({"method": p.method, "precision": precision} | memory)
    return Shown(DataFrame(found).set_index(["method", "precision"]))


def hours_table(plans: list[Plan], utilisation: float = UTILISATION) -> Shown:
    """Hours of the whole recipe by GPU, one row a method."""
    return rows(
        [
            {"method": p.method} | {f"{gpu}, h": p.hours(gpu, utilisation) for gpu in GPUS}
            for p in plans
        ]
    )


# -------------------------------------------------------------------- gradient projection memory


def memory_bill(
    layers: dict[str, nn.Module], run: Callable[[], object], images: int, itemsize: int = 4
) -> list[dict]:
    """What three ways to the singular vectors have to hold, and what a memory holds then, by layer.

    Nothing is computed beyond the run itself, which may be on the meta device: a network of any
    size can be asked on any machine.

    Parameters
    ----------
    layers : dict
        The layers to watch, by name; such as `GradientProjectionMemory.layers`.
    run : callable
        Sends one image through the network, as at inference.
    images : int
        Images of a task.
    itemsize : int
        Bytes a number.

    Returns
    -------
    list of dict
        For each layer its features, the columns that one image gives, and bytes: of the whole
        matrix ("plain"), of one image's chunk with the basis before it ("iterative"), of R Rᵀ
        ("square"), and of the largest basis that a memory keeps, of half the directions ("memory").
        "flops" are those of projecting a step on it.
    """
    columns = dict.fromkeys(layers, 0)

    def counter(name: str):
        def count(layer, inputs, output):
            columns[name] += output.numel() // layer.weight.shape[0]

        return count

    hooks = [layer.register_forward_hook(counter(name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    bill = []
    for name, layer in layers.items():
        features, chunk = layer.weight[0].numel(), columns[name]
        held = chunk + min(features, chunk * images)
        row = {"layer": name, "features": features, "columns": chunk}
        row["plain"] = features * chunk * images * itemsize
        row["iterative"] = features * min(held, chunk * images) * itemsize
        row["square"] = square_of(layer, "meta").nbytes
        row["memory"] = features * (features // 2) * itemsize
        bill.append(row | {"flops": 4 * layer.weight.numel() * (features // 2)})
    return bill
