"""A GPU that is not there: tensors that say `cuda`, and a list of what a real card would wait for.

Under PyTorch's fake tensors every operation checks shapes, types and devices, and computes nothing.
So code that mixes devices fails here as it would on a card. What would make the program wait for
the card (reading a number, copying without `non_blocking`, shapes that depend on values) is noted,
with the line of the package that asked, and answered with a made-up value.
"""

import traceback
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import diffad_ref
from diffad_ref import anomalies, continual, data, detector, evaluation, maps, training

PACKAGE = Path(diffad_ref.__file__).parent
ATEN = torch.ops.aten
PLAIN = {"generator": "default", "low_generator": "low"}  # a generator cannot be fake
DRIVERLESS = pytest.mark.skipif(
    torch.__version__ < (2, 10),
    reason="before PyTorch 2.10 a fake tensor of a GPU needs its driver",
)
COUNTING = (ATEN.nonzero.default, ATEN.masked_select.default, ATEN.unique_dim.default)


class Card(TorchDispatchMode):
    """Notes each wait, as "file.py:line what", in `waits`."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, tensors = dict(kwargs or {}), [a for a in args if isinstance(a, torch.Tensor)]
        if kwargs.get("generator") is not None and not tensors:
            kwargs["device"] = torch.device("cuda")  # where a real training draws
            function = getattr(function.overloadpacket, PLAIN[function._overloadname])
            del kwargs["generator"]
        if function is ATEN._local_scalar_dense.default:
            if tensors[0].is_cuda:
                self.note("reads a number")
            return {torch.bool: tensors[0].is_cuda, torch.long: 1}.get(tensors[0].dtype, 0.5)
        if function in COUNTING:
            self.note("asks how many")
            return tensors[0].new_zeros(tensors[0].numel(), tensors[0].ndim, dtype=torch.long)
        if function in (ATEN.index.Tensor, ATEN.index_put_.default, ATEN.index_put.default):
            self.look_at_indices(args[0], [i for i in args[1] if i is not None])
        if function is ATEN._to_copy.default and kwargs.get("device") is not None:
            self.look_at_copy(
                tensors[0], torch.device(kwargs["device"]), kwargs.get("non_blocking")
            )
        if function is ATEN.copy_.default and len(tensors) == 2:
            lazy = args[2] if len(args) > 2 else kwargs.get("non_blocking")
            self.look_at_copy(tensors[1], tensors[0].device, lazy)
        return function(*args, **kwargs)

    def look_at_indices(self, indexed, indices):
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            self.note("asks how many")
        if not indexed.is_cuda and any(i.is_cuda for i in indices):
            raise RuntimeError(f"{self.place()}: a tensor on the CPU is indexed from the card")
        if indexed.is_cuda and not all(i.is_cuda for i in indices):
            self.note("indexes from the CPU")

    def look_at_copy(self, source, device, lazy):
        if (device.type == "cuda") != source.is_cuda and not (lazy and device.type == "cuda"):
            self.note(f"copies to the {'card' if device.type == 'cuda' else 'CPU'}")

    def note(self, what: str) -> None:
        """Remember a wait, and whose it is."""
        self.waits.append(f"{self.place()} {what}")

    def place(self) -> str:
        """The line of the package that is being run."""
        for frame in reversed(traceback.extract_stack()):
            if PACKAGE in Path(frame.filename).parents:
                return f"{Path(frame.filename).name}:{frame.lineno}"
        return "test"


class Alone:
    """A pool of threads without threads, which would know nothing of fake tensors."""

    map = staticmethod(map)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def move(module, device, *_):
    """What `module.to(device)` does, in a way that fake tensors allow."""
    for part in module.modules():
        for kind in (part._parameters, part._buffers):
            for name, old in kind.items():
                if old is not None and old.device.type != torch.device(device).type:
                    new = torch.empty(old.shape, dtype=old.dtype, device=device)
                    learns = old.requires_grad
                    kind[name] = (
                        torch.nn.Parameter(new, learns) if kind is part._parameters else new
                    )
    return module


def backward(loss, *_, **__):
    """Made-up gradients of every weight behind a loss; PyTorch's engine would ask for a driver."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaf.grad = torch.zeros_like(leaf)
        todo += [before for before, _ in node.next_functions]


@contextmanager
def fake_card(bf16: bool = True):
    """Inside, `device="cuda"` works everywhere, and nothing is computed; gives a `Card`."""
    card, stack = Card(), ExitStack()
    answers = {
        "is_bf16_supported": lambda *_, **__: bf16,
        "get_device_name": lambda *_: "Fake card",
        "mem_get_info": lambda *_: (80 * 10**9, 80 * 10**9),
        "synchronize": lambda *_: card.note("waits for all"),
    }
    for name, answer in answers.items():
        stack.enter_context(patch.object(torch.cuda, name, answer))
    stack.enter_context(patch.object(torch.nn.Module, "to", move))
    stack.enter_context(patch.object(torch.Tensor, "backward", backward))
    available = torch.cuda.amp.common
    stack.enter_context(patch.object(available, "amp_definitely_not_available", lambda: False))
    for room in (training, evaluation, continual):
        stack.enter_context(patch.object(room, "seeded", lambda *_: torch.Generator()))
    stack.enter_context(patch.object(detector, "for_each", lambda images, g: g))  # no pixel is real
    stack.enter_context(patch.object(data, "ThreadPoolExecutor", Alone))
    kept = (
        maps._blur,
        maps._zoom,
        anomalies._built_in,
    )  # what they keep is real here, and fake there
    for function in kept:
        function.cache_clear()
    with stack, FakeTensorMode(allow_non_fake_inputs=False), card:
        yield card
    for function in kept:
        function.cache_clear()
