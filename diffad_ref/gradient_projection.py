"""Gradient projection memory: learn new things without disturbing what old inputs depend on.

A layer multiplies its input by a matrix W. If the inputs of old tasks lie in a subspace, then a
change of W that is orthogonal to it leaves W x as it was for every old x. So we keep a basis M of
that subspace for each layer, and take out of every later step what lies in it (G4, G5).

Saha, Garg, Roy, ICLR 2021, arXiv 2103.09762; Li et al., CVPR 2025, arXiv 2502.19848.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffad_ref.iterative_svd import IterativeSVD, left_singular, rank_below, rank_reaching


def representation(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer multiplies its weights with, as a matrix (features, samples).

    For a Linear and x (..., features) a column is an input vector; for a Conv2d and x (B, C, H, W)
    what one output position sees: channels, kernel rows and columns, like the flattened weight.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]).T
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError(f"only zero padding given in pixels is supported, not {layer}")
    x = x[:, : layer.in_channels]  # what lies behind them is added to the output
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return patches.transpose(0, 1).flatten(1)  # (B, CKK, L) -> (CKK, B L)


def supported(layer: nn.Module) -> bool:
    """Whether a layer is one that can be protected: Linear, or Conv2d with groups = 1."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def extend_basis(
    memory: Tensor | None, matrix: Tensor, gamma: float, columns: str = "singular", reach=True
) -> Tensor:
    """Add to a memory M what a new task needs and the memory does not span (G1-G3).

    Parameters
    ----------
    memory : Tensor (features, r) or None
        M, orthonormal columns; None before the first task.
    matrix : Tensor (features, samples)
        Representations of the task, or the `matrix` of an `IterativeSVD`.
    gamma : float
        Share of the representations' energy that M must span.
    columns, reach
        "singular" appends left singular vectors of the residual, which keeps M orthonormal;
        "residual", as released, its columns: M Mᵀ is then no projector. `IterativeSVD` has `reach`.
    """
    matrix = matrix.double()
    total = matrix.square().sum()
    if total == 0:
        return matrix[:, :0] if memory is None else memory
    if memory is None:
        vectors, values = left_singular(matrix)
        rule = rank_reaching if reach else rank_below
        return vectors[:, : rule(values.square(), gamma, total)]  # G1
    memory = memory.double()
    residual = matrix - memory @ (memory.T @ matrix)  # G2
    vectors, values = left_singular(residual)
    squares = values.square()
    rank = rank_reaching(squares, gamma, total, total - squares.sum())  # G3
    added = {"singular": vectors, "residual": residual}[columns][:, :rank]
    extended = torch.cat([memory, added], 1)[:, : len(memory)]
    if columns == "singular" and rank:  # rounding tilts later vectors; a QR step straightens them
        extended = torch.linalg.qr(extended).Q
    return extended


def project(step: Tensor, memory: Tensor) -> Tensor:
    """Take out of a step (out, ...) what lies in the span of a memory (features, r) (G4)."""
    flat = step.flatten(1)
    return (flat - (flat @ memory) @ memory.T).view_as(step)  # G4


class GradientProjectionMemory:
    """A basis for each layer of a network, and what keeps later training out of it.

    Gather while the network runs on the data of a task, extend, and protect every later optimiser:

    >>> memory = GradientProjectionMemory(network)
    >>> with memory.gather():
    ...     for batch in data_of_the_task:
    ...         network(batch)
    ...         memory.compress()
    >>> memory.extend()
    >>> memory.protect(optimizer)

    By default all layers with trainable weights are protected; `choose(name, layer)` takes fewer.
    `gamma` is the share of a task's energy that the memory spans: 1 forbids every change that old
    inputs would feel, 0 allows all. The rest is as in `IterativeSVD` and `extend_basis`. `bases`
    holds M of each layer (features, r), float32, on the layer's device; it is empty at first.
    """

    def __init__(
        self,
        model: nn.Module,
        choose: Callable[[str, nn.Module], bool] | None = None,
        gamma: float = 0.97,
        energy: float = 0.999,
        keep_values: bool = True,
        reach: bool = True,
        columns: str = "singular",
    ):
        if columns not in ("singular", "residual"):
            raise ValueError(f"columns is 'singular' or 'residual', not {columns!r}")
        self.model, self.gamma, self.columns, self.reach = model, gamma, columns, reach
        self._svd = lambda: IterativeSVD(energy, keep_values, reach)
        choose = choose or (lambda name, layer: layer.weight.requires_grad)
        modules = model.named_modules()
        self.layers = {name: m for name, m in modules if supported(m) and choose(name, m)}
        if not self.layers:
            raise ValueError("the network has no layer to protect")
        self.bases, self.seen, self._columns, self._anchors = {}, {}, {}, {}

    @contextmanager
    def gather(self) -> Iterator[None]:
        """Record what the layers see while the network runs; the hooks go in any case."""
        self.seen = {name: self._svd() for name in self.layers}
        self._columns = {name: [] for name in self.layers}
        layers = self.layers.items()
        hooks = [m.register_forward_pre_hook(partial(self._record, name)) for name, m in layers]
        try:
            yield
            self.compress()
        finally:
            for hook in hooks:
                hook.remove()

    def _record(self, name: str, layer: nn.Module, inputs: tuple) -> None:
        self._columns[name].append(representation(layer, inputs[0].detach()))

    def compress(self) -> None:
        """Fold what was recorded since the last call into each layer's iterative SVD."""
        for name, columns in self._columns.items():
            if columns:
                try:
                    self.seen[name].update(torch.cat(columns, 1))
                except ValueError as error:
                    raise ValueError(f"layer {name!r}: {error}") from error
                columns.clear()

    def extend(self) -> dict[str, tuple[int, int]]:
        """Make the gathered task, of all processes, part of the memory.

        Returns for each layer how many of its directions are taken, and how many it has.
        """
        ran = [name for name, svd in self.seen.items() if svd.basis is not None]
        if silent := [name for name in self.layers if name not in ran]:
            raise ValueError(f"these layers did not run while gathering: {', '.join(silent)}")
        taken = {}
        for name, layer in self.layers.items():
            old, matrix = self.bases.get(name), _together(self.seen[name].matrix)
            basis = extend_basis(old, matrix, self.gamma, self.columns, self.reach)
            self.bases[name], taken[name] = basis.to(layer.weight), tuple(basis.shape[::-1])
        self.seen, self._anchors = {}, {}
        if full := [name for name, (rank, features) in taken.items() if rank == features]:
            words = f"no direction is left in {len(full)} layers, which learn no more: "
            warnings.warn(words + ", ".join(full[:5]), stacklevel=2)
        return taken

    def extend_by_nothing(self) -> None:
        """An empty basis for each layer: protects nothing, but the rest can be frozen."""
        for name, layer in self.layers.items():
            empty = layer.weight.detach().new_zeros(layer.weight[0].numel(), 0)
            self.bases.setdefault(name, empty)

    @torch.no_grad()
    def project_gradients(self, rest: str = "keep") -> None:
        """Project the gradients of protected layers (G4); before the first `extend`, nothing.

        Gradients of the `rest` stay ("keep"), are gone ("freeze"), so that an optimiser leaves
        these parameters alone, or become 0 ("zero"), as released: weight decay still moves them.
        """
        if rest not in ("keep", "freeze", "zero"):
            raise ValueError(f"rest is 'keep', 'freeze' or 'zero', not {rest!r}")
        protected = {self.layers[name].weight: basis for name, basis in self.bases.items()}
        for parameter in self.model.parameters() if protected else ():
            if parameter.grad is None:
                continue
            if parameter in protected:
                parameter.grad = project(parameter.grad, protected[parameter])
            elif rest != "keep":
                parameter.grad = None if rest == "freeze" else parameter.grad.zero_()

    @torch.no_grad()
    def hold(self) -> None:
        """Remember W M of every protected layer: what `project_updates` restores (G5)."""
        weights = {name: self.layers[name].weight.flatten(1) for name in self.bases}
        self._anchors = {name: weights[name] @ basis for name, basis in self.bases.items()}

    @torch.no_grad()
    def project_updates(self) -> None:
        """Undo what a step did to W M, whatever made the step.

        Adam rescales gradients and weight decay ignores them, so a projected gradient does not
        make a projected step; this does, and errors do not add up over the steps.
        """
        for name, anchor in self._anchors.items():
            weight, basis = self.layers[name].weight, self.bases[name]
            drift = weight.flatten(1) @ basis - anchor
            weight -= (drift @ basis.T).view_as(weight)  # G5: W x stays for every x in span(M)

    def protect(self, optimizer: torch.optim.Optimizer, updates: bool = True, rest: str = "keep"):
        """From now on, project what goes into an optimiser's step and, with `updates`, the step.

        W M is held as it is now, unless `hold` has been called since the last `extend`.
        """
        self.bases = {k: v.to(self.layers[k].weight) for k, v in self.bases.items()}  # it may move
        optimizer.register_step_pre_hook(lambda *_: self.project_gradients(rest))
        if updates:
            if not self._anchors:
                self.hold()
            optimizer.register_step_post_hook(lambda *_: self.project_updates())

    def state_dict(self) -> dict[str, Tensor]:
        """The basis of each layer, by its name, on the CPU."""
        return {name: basis.cpu().contiguous() for name, basis in self.bases.items()}

    def load_state_dict(self, bases: dict[str, Tensor]) -> None:
        """Take over the bases of a network of the same layers; ValueError for another."""
        if bases and bases.keys() != self.layers.keys():
            strange = sorted(bases.keys() ^ self.layers.keys())
            raise ValueError(f"the memory belongs to another network: {', '.join(strange[:5])}")
        for name, basis in bases.items():
            features, shape = self.layers[name].weight[0].numel(), tuple(basis.shape)
            if len(shape) != 2 or shape[0] != features or shape[1] > features:
                raise ValueError(f"layer {name!r} has {features} features, its memory is {shape}")
        self.bases = {k: v.to(self.layers[k].weight) for k, v in bases.items()}
        self._anchors = {}


def _together(matrix: Tensor) -> Tensor:
    """The matrices (features, r) of all processes, side by side."""
    state = torch.distributed
    if not (state.is_available() and state.is_initialized()):
        return matrix
    parts = [None] * state.get_world_size()
    state.all_gather_object(parts, matrix.cpu())
    return torch.cat(parts, 1).to(matrix.device)
