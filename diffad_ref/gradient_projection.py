"""Gradient projection memory: learn new things without disturbing what old inputs depend on.

A layer multiplies its input by a matrix W. If the inputs of old tasks lie in a subspace, then a
change of W that is orthogonal to it leaves W x as it was for every old x. So we keep a basis M of
that subspace for each layer, and take out of every later step what lies in it (G4, G5).

What a layer sees is collected by an iterative SVD (`iterative_svd.py`).

Saha, Garg, Roy: *Gradient Projection Memory*, ICLR 2021, arXiv 2103.09762; Li et al.:
*One-for-More*, CVPR 2025, arXiv 2502.19848. Nothing here knows what the network is for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffad_ref.iterative_svd import IterativeSVD, left_singular, rank_below, rank_reaching

# -------------------------------------------------------------------------------- representations


def representation(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer multiplies its weights with, as a matrix (features, samples).

    For a linear layer the columns are its input vectors. For a convolution a column is what one
    output position sees: channels, kernel rows, kernel columns, like the flattened weight.

    Parameters
    ----------
    layer : Linear, or Conv2d with groups = 1
    x : Tensor
        Its input: (..., features), or (B, C, H, W).
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]).T
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError(f"only zero padding given in pixels is supported, not {layer}")
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return patches.transpose(0, 1).flatten(1)  # (B, CKK, L) -> (CKK, B L)


def supported(layer: nn.Module) -> bool:
    """Whether a layer is one that can be protected: Linear, or Conv2d with groups = 1."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


# ----------------------------------------------------------------------------------------- memory


def extend_basis(
    memory: Tensor | None, matrix: Tensor, gamma: float, columns: str = "singular", reach=True
) -> Tensor:
    """Add to a memory what a new task needs and the memory does not span (G1-G3).

    Parameters
    ----------
    memory : Tensor (features, r) or None
        M, orthonormal columns; None before the first task.
    matrix : Tensor (features, samples)
        Representations of the task, or the `matrix` of an `IterativeSVD`.
    gamma : float
        Share of the representations' energy that memory must span.
    columns : "singular" or "residual"
        Append left singular vectors of the residual, which keeps M orthonormal; or columns of the
        residual itself, as the released One-for-More does: M Mᵀ is then no projector.
    reach : bool
        The rule of the first task, as in `IterativeSVD`.

    Returns
    -------
    Tensor (features, r'), r' at most features.
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

    Parameters
    ----------
    model : Module
    choose : callable (name, layer) -> bool, optional
        Which of the supported layers to protect; by default all that have trainable weights.
    gamma : float
        Share of a task's energy that the memory spans: 1 forbids every change that old inputs
        would feel, 0 allows all.
    energy, keep_values, reach
        As in `IterativeSVD`.
    columns : "singular" or "residual"
        As in `extend_basis`.

    Attributes
    ----------
    bases : dict of Tensor
        M of each layer (features, r), float32, on the layer's device; empty before `extend`.
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
        self.layers = {
            name: layer
            for name, layer in model.named_modules()
            if supported(layer) and choose(name, layer)
        }
        if not self.layers:
            raise ValueError("the network has no layer to protect")
        self.bases: dict[str, Tensor] = {}
        self.seen: dict[str, IterativeSVD] = {}
        self._columns: dict[str, list[Tensor]] = {}
        self._anchors: dict[str, Tensor] = {}

    # ------------------------------------------------------------------------------------ gather

    @contextmanager
    def gather(self) -> Iterator[None]:
        """Record what the layers see while the network runs; the hooks go in any case."""
        self.seen = {name: self._svd() for name in self.layers}
        self._columns = {name: [] for name in self.layers}
        hooks = [
            layer.register_forward_pre_hook(self._recorder(name))
            for name, layer in self.layers.items()
        ]
        try:
            yield
            self.compress()
        finally:
            for hook in hooks:
                hook.remove()

    def _recorder(self, name: str):
        def record(layer, inputs):
            self._columns[name].append(representation(layer, inputs[0].detach()))

        return record

    def compress(self) -> None:
        """Fold what was recorded since the last call into each layer's iterative SVD."""
        for name, columns in self._columns.items():
            if columns:
                try:
                    self.seen[name].update(torch.cat(columns, 1))
                except ValueError as error:
                    raise ValueError(f"layer {name!r}: {error}") from error
            self._columns[name] = []

    # ------------------------------------------------------------------------------------ extend

    def extend(self) -> dict[str, tuple[int, int]]:
        """Make the gathered task part of the memory.

        Every process has gathered its own share of the data; here the shares come together.

        Returns
        -------
        dict
            For each layer how many of its directions are taken, and how many it has.

        Raises
        ------
        ValueError
            A layer did not run while gathering.
        """
        if not self.seen:
            raise ValueError("nothing was gathered: run the network inside `with memory.gather()`")
        silent = [name for name, svd in self.seen.items() if svd.basis is None]
        if silent:
            raise ValueError(f"these layers did not run while gathering: {', '.join(silent)}")
        taken = {}
        for name, layer in self.layers.items():
            old, matrix = self.bases.get(name), _together(self.seen[name].matrix)
            basis = extend_basis(old, matrix, self.gamma, self.columns, self.reach)
            self.bases[name] = basis.to(layer.weight)
            taken[name] = (basis.shape[1], basis.shape[0])
        self.seen, self._anchors = {}, {}
        full = [name for name, (rank, features) in taken.items() if rank == features]
        if full:
            warnings.warn(
                f"no direction is left in {len(full)} layers, which learn no more: "
                + ", ".join(full[:5]),
                stacklevel=2,
            )
        return taken

    def extend_by_nothing(self) -> None:
        """An empty basis for each layer: protects nothing, but the rest can be frozen."""
        for name, layer in self.layers.items():
            features = layer.weight[0].numel()
            self.bases.setdefault(name, layer.weight.detach().new_zeros(features, 0))

    # ----------------------------------------------------------------------------------- protect

    @torch.no_grad()
    def project_gradients(self, rest: str = "keep") -> None:
        """Project the gradients of protected layers (G4); before the first `extend`, nothing.

        Parameters
        ----------
        rest : "keep", "freeze" or "zero"
            Gradients of all other parameters: as they are; gone, so that an optimiser leaves the
            parameters alone; or 0, as released, with which weight decay still moves them.
        """
        if rest not in ("keep", "freeze", "zero"):
            raise ValueError(f"rest is 'keep', 'freeze' or 'zero', not {rest!r}")
        if not self.bases:
            return
        for name, basis in self.bases.items():
            weight = self.layers[name].weight
            if weight.grad is not None:
                weight.grad = project(weight.grad, basis)
        if rest != "keep":
            protected = {id(self.layers[name].weight) for name in self.bases}
            for parameter in self.model.parameters():
                if id(parameter) not in protected and parameter.grad is not None:
                    parameter.grad = None if rest == "freeze" else parameter.grad.zero_()

    @torch.no_grad()
    def hold(self) -> None:
        """Remember W M of every protected layer: what `project_updates` restores (G5)."""
        self._anchors = {
            name: self.layers[name].weight.flatten(1) @ basis for name, basis in self.bases.items()
        }

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

    def protect(
        self, optimizer: torch.optim.Optimizer, updates: bool = True, rest: str = "keep"
    ) -> None:
        """From now on, project what goes into an optimiser's step and, with `updates`, the step.

        W M is held as it is now, unless `hold` has been called since the last `extend`.

        Parameters
        ----------
        rest
            As in `project_gradients`.
        """
        optimizer.register_step_pre_hook(lambda *_: self.project_gradients(rest))
        if updates:
            if not self._anchors:
                self.hold()
            optimizer.register_step_post_hook(lambda *_: self.project_updates())

    # ------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Tensor]:
        """The basis of each layer, by its name, on the CPU."""
        return {name: basis.cpu().contiguous() for name, basis in self.bases.items()}

    def load_state_dict(self, bases: dict[str, Tensor]) -> None:
        """Take over the bases of a network of the same layers; ValueError for another."""
        if bases and bases.keys() != self.layers.keys():
            strange = sorted(bases.keys() ^ self.layers.keys())
            raise ValueError(f"the memory belongs to another network: {', '.join(strange[:5])}")
        for name, basis in bases.items():
            features = self.layers[name].weight[0].numel()
            if basis.ndim != 2 or len(basis) != features or basis.shape[1] > features:
                raise ValueError(
                    f"the memory of layer {name!r} has shape {tuple(basis.shape)}, but the layer "
                    f"has {features} features"
                )
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
