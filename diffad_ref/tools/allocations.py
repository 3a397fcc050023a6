"""What a training step allocates on a GPU, followed on a machine without one.

A fake tensor has a shape, a type and a storage of so many bytes, and no numbers. So a step of any
size runs anywhere, by the very code that trains, and each storage is noted when it comes and goes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from diffad_ref.detector import Detector, arithmetic
from diffad_ref.training import OPTIMIZERS

ATEN, CPU = torch.ops.aten, torch.device("cpu")
PRECISIONS = "float32", "bf16"
LEAN = "bf16, checkpointing"
GB = 2**30  # bytes, as on a card
BLOCK = 512  # bytes: PyTorch's allocator on a card hands out multiples


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


def training_step(detector: Detector, latents: bool) -> tuple[int, dict]:
    """Arithmetic of a training step for one image, and `plan.Plan.peaks`.

    The detector, which is on the meta device and has entered a stage, becomes fake. Its tensors say
    that they are on the CPU: for others PyTorch's backward pass asks for a driver.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _as_on_a_card(), Allocations() as memory:
        detector.to_empty(device="cpu")
        if hasattr(detector, "textures"):  # else real ones, of which a fake copy would be kept
            detector.textures = torch.zeros(15, 3, 256, 256, dtype=torch.uint8)
        groups, stage = detector.parameter_groups(), detector.stage
        kind, decay = OPTIMIZERS[stage.optimizer], stage.weight_decay
        optimizer = kind(groups, weight_decay=decay, fused=True)  # as `fit` does

        def held(count: int, precision: str) -> list[int]:
            optimizer.zero_grad()
            memory.held = []
            batch = _batch(detector, count, latents)
            with arithmetic(detector, precision):
                loss = detector.training_loss(batch, torch.Generator())["loss"]
            loss.backward()
            optimizer.step()
            return memory.held

        with FlopCounterMode(display=False) as counter:
            held(2, "float32")  # after this first step, Adam's averages are there
        peaks = {name: _peaks(held(2, name), held(4, name)) for name in PRECISIONS}
        detector.enter(replace(stage, checkpointing=True))
        peaks[LEAN] = _peaks(held(2, "bf16"), held(4, "bf16"))
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
