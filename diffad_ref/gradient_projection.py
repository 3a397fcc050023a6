"""Gradient projection memory: learn new things without disturbing what old inputs depend on.

A layer multiplies its input by a matrix W. If the inputs of old tasks lie in a subspace, then a
change of W that is orthogonal to it leaves W x as it was for every old x. So we keep a basis M of
that subspace for each layer, and take out of every later step what lies in it (G4, G5).

Saha, Garg, Roy, ICLR 2021, arXiv 2103.09762; Li et al., CVPR 2025, arXiv 2502.19848.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import isfinite

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffad_ref.iterative_svd import rank_below, rank_reaching

LARGE = 4096  # features; above, the square is float32: 2 GB for the paper's largest layer


def representation(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer multiplies its weights with, as a matrix (features, samples).

    For a Linear and x (..., features) a column is an input vector; for a Conv2d and x (B, C, H, W)
    what one output position sees: channels, kernel rows and columns, like the flattened weight.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]).T
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError(f"only zero padding given in pixels is supported, not {layer}")
    x = x[:, : layer.in_channels]  # behind them, something may travel along
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return patches.transpose(0, 1).flatten(1)  # (B, CKK, L) -> (CKK, B L)


def supported(layer: nn.Module) -> bool:
    """Whether a layer is one that can be protected: Linear, or Conv2d with groups = 1."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def extend_basis(
    memory: Tensor | None, matrix: Tensor, gamma, columns="singular", reach=True, squared=False
) -> Tensor:
    """Add to a memory M what a new task needs and the memory does not span (G1-G3).

    Parameters
    ----------
    memory : Tensor (features, r) or None
        M, orthonormal columns; None before the first task.
    matrix : Tensor (features, samples)
        R, representations of the task, or the `matrix` of an `IterativeSVD`; or, if `squared`,
        R Rᵀ, which is overwritten: its eigenvectors and values are all that the rules ask for.
    gamma : float
        Share of the representations' energy that M must span.
    columns, reach
        "singular" appends left singular vectors of the residual, which keeps M orthonormal;
        "residual", as released, its columns: M Mᵀ is then no projector. `IterativeSVD` has `reach`.
    """
    if columns not in ("singular", "residual"):
        raise ValueError(f"columns is 'singular' or 'residual', not {columns!r}")
    square = matrix if squared else matrix.double() @ matrix.double().T
    total = square.trace().double()
    memory = square[:, :0] if memory is None else memory.to(square)
    square -= memory @ (memory.T @ square)  # G2: R_hat = R - M Mᵀ R, from the left ...
    square -= (square @ memory) @ memory.T  # ... and from the right: R_hat R_hatᵀ
    squares, vectors = torch.linalg.eigh(square)
    squares, vectors = squares.flip(0).clamp(min=0).double(), vectors.flip(1)
    spanned = (total - squares.sum()).clamp(min=0)
    rank = rank_reaching(squares, gamma, total, spanned)  # G1, G3
    if not (reach or memory.shape[1]):
        rank = rank_below(squares, gamma, total)
    if columns == "residual":
        vectors = matrix.to(square) - memory @ (memory.T @ matrix.to(square))
    extended = torch.cat([memory, vectors[:, :rank]], 1)[:, : len(memory)]
    straight = columns == "residual" or not rank or not memory.shape[1]
    return extended if straight else torch.linalg.qr(extended).Q  # rounding tilts later vectors


def complement(basis: Tensor) -> Tensor:
    """An orthonormal basis (features, features - r) of what a basis (features, r) leaves free."""
    return torch.linalg.qr(basis, mode="complete").Q[:, basis.shape[1] :]


def project(step: Tensor, basis: Tensor, free: bool = False) -> Tensor:
    """Take out of a step (out, ...) what lies in the span of a memory (G4).

    The basis (features, r) is M, or, if it is `free`, of the complement: the same, and less work
    once the memory is more than half full.
    """
    flat = step.flatten(1)
    inside = (flat @ basis) @ basis.T
    return (inside if free else flat - inside).view_as(step)  # G4: 1 - M Mᵀ is N Nᵀ


class GradientProjectionMemory:
    """A basis for each layer of a network, and what keeps later training out of it.

    Gather while the network runs on the data of a task, extend, and protect every later optimiser:

    >>> memory = GradientProjectionMemory(network)
    >>> with memory.gather():
    ...     for batch in data_of_the_task:
    ...         network(batch)
    >>> memory.extend()
    >>> memory.protect(optimizer)

    By default all layers with trainable weights are protected; `choose(name, layer)` takes fewer.
    `gamma` is the share of a task's energy that the memory spans: 1 forbids every change that old
    inputs would feel, 0 allows all. The default is for small networks of your own: detectors have
    0.999 (One-for-More's `paper` size) or 0.9999 (all else, `continual.GAMMA`). A layer gathers R
    Rᵀ, as large for many columns as for few; if all layers together need more bytes than the
    `budget`, gather in `groups`. `bases` holds M of each layer (features, r), or, if that is more
    than half full and so in `free`, its complement. They rest on the CPU until a step needs them.
    `basis` gives M in any case.
    """

    def __init__(self, model: nn.Module, choose=None, gamma: float = 0.97, budget: float = 8e9):
        self.model, self.gamma, self.budget = model, gamma, budget
        choose = choose or (lambda name, layer: layer.weight.requires_grad)
        modules = model.named_modules()
        self.layers = {name: m for name, m in modules if supported(m) and choose(name, m)}
        if not self.layers:
            raise ValueError("the network has no layer to protect")
        self.bases, self.free, self.squares, self._before = {}, set(), {}, {}
        self.samples = dict.fromkeys(self.layers, 0)  # columns seen since the last `extend`

    def groups(self) -> list[list[str]]:
        """Names of layers whose squares fit into the budget together: one gathering each."""
        groups, room = [], 0.0
        empty = {name: square_of(layer, "meta").nbytes for name, layer in self.layers.items()}
        for name in sorted(empty, key=empty.get, reverse=True):
            if empty[name] > room:
                groups, room = [*groups, []], self.budget
            groups[-1].append(name)
            room -= empty[name]
        return groups

    @contextmanager
    def gather(self, names: list[str] | None = None) -> Iterator[None]:
        """Add up R Rᵀ of some layers, or all, while the network runs; the hooks go in any case.

        At the end, what all processes saw is added. Raises ValueError for NaN and infinity.
        """
        layers = {name: self.layers[name] for name in names or self.layers}
        self.bases = {name: basis.cpu() for name, basis in self.bases.items()}
        self.squares = {n: square_of(m, m.weight.device) for n, m in layers.items()}
        self.samples = dict.fromkeys(layers, 0)
        hooks = [m.register_forward_pre_hook(partial(self._see, n)) for n, m in layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        traces = torch.stack([from_all(s).trace().double() for s in self.squares.values()])
        counts = from_all(torch.tensor(list(self.samples.values()), device=traces.device))
        self.samples = dict(zip(layers, counts.tolist(), strict=True))
        for name, trace in zip(layers, traces.tolist(), strict=True):
            if not isfinite(trace):
                raise ValueError(f"layer {name!r}: the representations hold NaN or infinite values")

    @torch.no_grad()
    def _see(self, name: str, layer: nn.Module, inputs: tuple) -> None:
        columns = representation(layer, inputs[0]).to(self.squares[name].dtype)
        self.squares[name].addmm_(columns, columns.T)
        self.samples[name] += columns.shape[1]

    @torch.no_grad()
    def extend(self) -> dict[str, tuple[int, int]]:
        """Make what was gathered part of the memory.

        Returns for each layer how many of its directions are taken, and how many it has.
        """
        if silent := [name for name, count in self.samples.items() if not count]:
            raise ValueError(f"these layers did not run while gathering: {', '.join(silent)}")
        taken = {}
        for name in list(self.squares):
            square = self.squares.pop(name)  # the next decomposition needs the room
            basis = extend_basis(self.basis(name), square, self.gamma, squared=True)
            rank, features = taken[name] = tuple(basis.shape[::-1])
            if 2 * rank > features:
                basis = complement(basis)
                self.free.add(name)
            self.bases[name] = basis.to("cpu", self.layers[name].weight.dtype).contiguous()
        self.samples = dict.fromkeys(self.layers, 0)
        if full := [name for name, (rank, features) in taken.items() if rank == features]:
            words = f"no direction is left in {len(full)} layers, which learn no more: "
            warnings.warn(words + ", ".join(full[:5]), stacklevel=2)
        return taken

    def basis(self, name: str) -> Tensor:
        """M of a layer (features, r), on the layer's device; without a column at first."""
        weight = self.layers[name].weight.detach()
        held = self.bases.get(name, weight.new_zeros(weight[0].numel(), 0)).to(weight)
        return complement(held) if name in self.free else held

    def extend_by_nothing(self) -> None:
        """An empty basis for each layer: protects nothing, but the rest can be frozen."""
        for name in self.layers:
            self.bases.setdefault(name, self.basis(name))

    @torch.no_grad()
    def project_gradients(self, rest: str = "keep") -> None:
        """Project the gradients of protected layers (G4); before the first `extend`, nothing.

        Gradients of the `rest` stay ("keep"), are gone ("freeze"), so that an optimiser leaves
        these parameters alone, or become 0 ("zero"), as released: weight decay still moves them.
        """
        if rest not in ("keep", "freeze", "zero"):
            raise ValueError(f"rest is 'keep', 'freeze' or 'zero', not {rest!r}")
        protected = {self.layers[name].weight: name for name in self.bases}
        for parameter in self.model.parameters() if protected else ():
            if parameter.grad is None:
                continue
            if parameter in protected:
                parameter.grad = self._project(protected[parameter], parameter.grad)
            elif rest != "keep":
                parameter.grad = None if rest == "freeze" else parameter.grad.zero_()

    def _project(self, name: str, step: Tensor) -> Tensor:
        self.bases[name] = self.bases[name].to(step)  # the network may have moved
        return project(step, self.bases[name], name in self.free)

    def remember(self) -> None:
        """Copy the protected weights, from which the next `project_step` measures the step."""
        self._before = {n: self.layers[n].weight.detach().clone() for n in self.bases}

    @torch.no_grad()
    def project_step(self) -> None:
        """Take out of what changed since `remember` what old inputs would feel (G4).

        Adam rescales gradients and weight decay ignores them, so a projected gradient does not
        make a projected step; this does, whatever made it.
        """
        while self._before:
            name, old = self._before.popitem()
            weight = self.layers[name].weight
            weight.copy_(old + self._project(name, weight - old))  # G5: W x stays, x in span(M)

    def protect(self, optimizer: torch.optim.Optimizer, updates: bool = True, rest: str = "keep"):
        """From now on, project what goes into an optimiser's step and, with `updates`, the step.

        If the rest is frozen, so are running statistics: their layers stay in evaluation mode.
        """
        optimizer.register_step_pre_hook(lambda *_: self.project_gradients(rest))
        if updates:
            optimizer.register_step_pre_hook(lambda *_: self.remember())
            optimizer.register_step_post_hook(lambda *_: self.project_step())
        lost = []
        for name, module in self.model.named_modules() if rest == "freeze" else ():
            if getattr(module, "running_mean", None) is not None:
                module.eval()
            weight = getattr(module, "weight", None)
            learns = isinstance(weight, nn.Parameter) and weight.requires_grad and weight.ndim > 1
            known = supported(module) or isinstance(module, nn.Embedding)  # any token will do
            if learns and not known:
                lost.append(f"{name} ({type(module).__name__})")
        if lost:
            warnings.warn(f"cannot be protected, so frozen: {', '.join(lost[:5])}", stacklevel=2)

    def state_dict(self) -> dict[str, Tensor]:
        """What is held for each layer, on the CPU, as "name", or "name.free": the complement."""
        names = {name: f"{name}.free" if name in self.free else name for name in self.bases}
        return {names[name]: basis.cpu() for name, basis in self.bases.items()}

    def load_state_dict(self, bases: dict[str, Tensor]) -> None:
        """Take over the bases of a network of the same layers; ValueError for another."""
        free = {key.removesuffix(".free") for key in bases if key.endswith(".free")}
        bases = {key.removesuffix(".free"): basis for key, basis in bases.items()}
        if bases and bases.keys() != self.layers.keys():
            strange = sorted(bases.keys() ^ self.layers.keys())
            raise ValueError(f"the memory belongs to another network: {', '.join(strange[:5])}")
        for name, basis in bases.items():
            features, shape = self.layers[name].weight[0].numel(), tuple(basis.shape)
            if len(shape) != 2 or shape[0] != features or shape[1] > features:
                raise ValueError(f"layer {name!r} has {features} features, its memory is {shape}")
        self.bases, self.free = bases, free


def square_of(layer: nn.Module, device: torch.device | str) -> Tensor:
    """R Rᵀ (features, features) of a layer that has seen nothing yet."""
    features = layer.weight[0].numel()
    precision = torch.float32 if features > LARGE else torch.float64
    return torch.zeros(features, features, dtype=precision, device=device)


def from_all(tensor: Tensor) -> Tensor:
    """The sum, in place, of what all processes hold."""
    state = torch.distributed
    if state.is_available() and state.is_initialized():
        state.all_reduce(tensor)
    return tensor
