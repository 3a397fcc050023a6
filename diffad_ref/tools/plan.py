"""What a run will cost, before it is started: weights, arithmetic, memory, hours.

A fake tensor has a shape, a type and a storage of so many bytes, and no numbers. So a training step
of any size runs on any machine, by the very code that trains; every allocation is followed, and
the most that is ever held at once is the memory that a card must have. GB are 2³⁰ bytes, as on a
card. Hours stand on measurements: nobody reaches a card's peak.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from pandas import DataFrame
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from diffad_ref.deco_diff import DecoDiff
from diffad_ref.detector import Detector
from diffad_ref.diffusion_ad import DiffusionAD
from diffad_ref.gradient_projection import GradientProjectionMemory
from diffad_ref.one_for_more import OneForMore
from diffad_ref.tools.tables import Shown, rows
from diffad_ref.training import OPTIMIZERS

ATEN, CPU, GB = torch.ops.aten, torch.device("cpu"), 2**30
# Dense 16-bit matrix arithmetic in TFLOP/s, the same in float32, and memory in GB, as the maker
# states them. A T4 has no bf16, and takes fp16.
GPUS = {"T4": (65, 8.1, 16), "A100 80 GB": (312, 19.5, 80), "H100 SXM": (989, 67, 80)}
# The share of the 16-bit peak that a bf16 training step reached on an H100, at the paper's size and
# the recipe's batch: arithmetic over seconds (16 images in 0.526 s, 128 latents in 0.264 s, 12
# images in 0.357 s; PyTorch 2.11, nothing compiled). Other cards are assumed to reach the same.
SHARES = {"DiffusionAD": 0.11, "DecoDiff": 0.30, "OneForMore": 0.03}
MATRIX_SHARE = 0.5  # of the float32 peak, of products of large matrices: assumed, not measured
PRECISIONS = {"float32": None, "bf16": torch.bfloat16}  # fp16 needs what bf16 does
BLOCK = 512  # bytes: PyTorch's allocator on a card hands out multiples


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
        For each of `PRECISIONS`, moments of a step at which memory can be highest, as bytes that
        are held in any case and bytes an image.
    steps, batch_size : int
        Of the whole recipe; of its last stage.
    images : int
        Images that the whole recipe shows the network, repetitions counted.
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

    def memory(self, batch_size: int | None = None, precision: str = "float32") -> float:
        """GB that a training step allocates at most; its batch is by default the recipe's.

        Weights, gradients, Adam's averages, 16-bit copies and all that lives between: no context
        of CUDA (half a GB), and no gaps between allocations.
        """
        n = batch_size or self.batch_size
        return max(fixed + n * each for fixed, each in self.peaks[precision]) / GB

    def largest_batch(self, gigabytes: float, precision: str = "float32") -> int:
        """The most images a step that so much memory holds; 0 if not even one fits."""
        room = [(gigabytes * GB - fixed, each) for fixed, each in self.peaks[precision]]
        if any(free < 0 for free, _ in room):
            return 0
        return int(min(free // each for free, each in room if each))

    def hours(self, gpu: str, share: float | None = None) -> float:
        """Of the whole recipe on one of `GPUS`, at its share of the peak in 16 bit."""
        share = SHARES.get(self.method) if share is None else share
        if share is None or not 0 < share <= 1:
            raise ValueError(f"utilisation is a share in (0, 1], not {share}")
        return self.step_flops * self.images / (GPUS[gpu][0] * 1e12 * share) / 3600


def plan(detector: Detector, latents: bool = False) -> Plan:
    """Count what one image costs a detector, in the last stage of its recipe.

    The detector stays as it is: a copy of it is made of fake tensors. With `latents` it learns
    from posteriors that the codec has computed before.
    """
    detector = deepcopy(detector).to("meta")
    detector.enter(stage := detector.stages[-1])
    weights, category = list(detector.parameters()), torch.zeros(1, dtype=torch.long, device="meta")
    image = torch.zeros(1, 3, *[detector.config.image_size] * 2, device="meta")
    with FlopCounterMode(display=False) as prediction, torch.no_grad():
        deepcopy(detector).eval().judge(image, category, torch.Generator())
    step_flops, peaks = _step(detector.train(), latents)
    return Plan(
        type(detector).__name__,
        sum(p.numel() for p in weights),
        sum(p.numel() for p in weights if p.requires_grad),
        step_flops,
        prediction.get_total_flops(),
        peaks,
        sum(stage.steps * stage.batch_size * stage.accumulate for stage in detector.stages),
        sum(stage.steps for stage in detector.stages),
        stage.batch_size,
    )


# ---------------------------------------------------------------------------------- a step's memory


class Allocations(TorchDispatchMode):
    """Bytes of all storages that are alive, after each operation that made one, in `held`.

    Whoever asks for a value of a fake tensor gets 1, or True: all of a batch are chosen.
    """

    def __init__(self):
        super().__init__()
        self.held, self._alive, self._now = [], set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:
            return CPU
        if function is ATEN._local_scalar_dense.default:
            return 1
        if function in (ATEN.index.Tensor, ATEN.index_put_.default):
            args = (args[0], [_all_of(index) for index in args[1]], *args[2:])
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return made

    def _hold(self, storage) -> None:
        if (place := storage._cdata) in self._alive:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._alive.add(place)
        self._now += size
        self.held.append(self._now)
        weakref.finalize(storage, self._free, place, size)

    def _free(self, place: int, size: int) -> None:
        self._alive.remove(place)
        self._now -= size


def _all_of(index: Tensor | None) -> Tensor | None:
    if index is None or index.dtype is not torch.bool:
        return index
    return torch.zeros(index.numel(), dtype=torch.long, device=index.device)


def _step(detector: Detector, latents: bool) -> tuple[int, dict]:
    """Arithmetic of a training step for one image, and `Plan.peaks`; the detector becomes fake.

    The tensors say that they are on the CPU: for others PyTorch's backward pass asks for a driver.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _as_on_a_card(), Allocations() as memory:
        detector.to_empty(device="cpu")
        if hasattr(detector, "textures"):  # else real ones, of which a fake copy would be kept
            detector.textures = torch.zeros(15, 3, 256, 256, dtype=torch.uint8)
        groups, stage = detector.parameter_groups(), detector.stage
        kind, decay = OPTIMIZERS[stage.optimizer], stage.weight_decay
        optimizer = kind(groups, weight_decay=decay, fused=True)
        for p in detector.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()  # the averages are there from now on

        def held(count: int, dtype: torch.dtype | None) -> list[int]:
            optimizer.zero_grad()
            memory.held = []
            batch = _batch(detector, count, latents)
            with torch.autocast("cpu", dtype) if dtype else nullcontext():
                loss = detector.training_loss(batch, torch.Generator())["loss"]
            loss.backward()
            optimizer.step()
            return memory.held

        peaks = {name: _peaks(held(2, t), held(4, t)) for name, t in PRECISIONS.items()}
        with FlopCounterMode(display=False) as counter:
            held(2, None)
    return counter.get_total_flops() // 2, peaks


def _batch(detector: Detector, count: int, latents: bool) -> dict[str, Tensor]:
    side = detector.view("train")["image_size"]
    batch = {"category_index": torch.zeros(count, dtype=torch.long)}
    batch["texture"] = torch.zeros(count, dtype=torch.bool)
    if not latents:
        return batch | {"image": torch.zeros(count, 3, side, side)}
    codec, size = detector.codec.config, detector.config.image_size
    return batch | {
        "posterior": torch.zeros(count, 2 * codec.channels, *[size // codec.factor] * 2)
    }


def _peaks(two: list[int], four: list[int]) -> tuple[tuple[int, int], ...]:
    """The moments that are highest at some batch size, from batches of 2 and of 4.

    What is held at a moment is a straight line over the batch size.
    """
    each = np.subtract(four, two) // 2
    fixed = np.array(two) - 2 * each
    highest = {int(np.argmax(fixed + n * each)) for n in range(1, 1025)}
    return tuple(sorted((int(fixed[i]), int(each[i])) for i in highest))


def _as_on_a_card() -> ExitStack:
    """A context in which functions allocate on the CPU what they allocate on a GPU."""
    stack = ExitStack()
    for name, instead in (
        ("scaled_dot_product_attention", _fused_attention),
        ("dropout", _fused_dropout),
        ("group_norm", _in_float32(F.group_norm)),
        ("layer_norm", _in_float32(F.layer_norm)),
    ):
        stack.enter_context(patch.object(F, name, instead))
    return stack


def _fused_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """The kernels that never form the matrix of attention: flash, or with a mask the other."""
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
    if attn_mask is None and q.dtype is not torch.float32:
        flash = ATEN._scaled_dot_product_flash_attention
        return flash(q, k, v, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    efficient = ATEN._scaled_dot_product_efficient_attention
    return efficient(q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


def _fused_dropout(x, p=0.5, training=True, inplace=False):
    """Keeps a byte a number, where the CPU keeps a number."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


def _in_float32(function: Callable) -> Callable:
    """Autocast on a GPU copies what these get to float32; on the CPU it does not."""

    def copied(x, *arguments, **options):
        if not torch.is_autocast_enabled("cpu"):
            return function(x, *arguments, **options)
        with torch.autocast("cpu", enabled=False):
            return function(x.float(), *arguments, **options)

    return copied


# ------------------------------------------------------------------------------------------ tables


@cache
def paper_plans() -> tuple[Plan, ...]:
    """The three methods at the size of their papers; DeCo-Diff learns from latents."""
    with torch.device("meta"):
        detectors = [method.paper() for method in (DiffusionAD, DecoDiff, OneForMore)]
    return tuple(plan(detector, isinstance(detector, DecoDiff)) for detector in detectors)


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
    """GB of a training step by batch size and precision, one row a method and precision.

    Besides the batches that are asked for, each method has its recipe's, and the largest that a
    card of 80 GB holds, of which it leaves 78 to tensors.
    """
    found, all_sizes = [], sorted({*batches, *(p.batch_size for p in plans)})
    for p in plans:
        sizes = {*batches, p.batch_size}
        for precision in PRECISIONS:
            memory = {
                f"batch {n}, GB": p.memory(n, precision) if n in sizes else None for n in all_sizes
            }
            found.append({"method": p.method, "precision": precision} | memory)
            found[-1]["largest batch in 80 GB"] = p.largest_batch(78, precision)
    return Shown(DataFrame(found).set_index(["method", "precision"]))


def hours_table(plans: Sequence[Plan], utilisation: float | None = None) -> Shown:
    """Hours of the whole recipe by GPU, one row a method; by default at the `SHARES`."""
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
    """What a plain and an iterative SVD have to hold, layer by layer.

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
        For each layer its features, the columns that one image gives, and the bytes of the whole
        matrix ("plain") and of one image's chunk with the basis before it ("iterative").
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
        bill.append(row | {"iterative": features * min(held, chunk * images) * itemsize})
    return bill
