"""Left singular vectors of a matrix that is too large to hold.

Diffusion models run a layer at every step of every sample, and the matrix of all its inputs fills
any memory. But whatever a chunk of it spans is spanned by the chunk's singular vectors, times their
values, as well; so the chunks can go, one after the other, and one basis stays (G6).

Li et al.: *One-for-More*, CVPR 2025, arXiv 2502.19848.
"""

from __future__ import annotations

import torch
from torch import Tensor


def left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors (m, k) and values (k,) of a matrix (m, n), k = min(m, n).

    A wide matrix has the same vectors as its square R Rᵀ, which is small; values below 1e-8 of the
    largest are lost in it, and no rule of energy asks for them.
    """
    if matrix.shape[1] <= 2 * matrix.shape[0]:
        vectors, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        return vectors, values
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    return vectors.flip(1), squares.flip(0).clamp(min=0).sqrt()


def rank_reaching(
    squares: Tensor, wanted: float, total: Tensor | float, covered: Tensor | float = 0.0
) -> int:
    """Smallest k for which `covered` and the k largest squares reach `wanted` of `total` (G1, G3).

    Parameters
    ----------
    squares : Tensor (K,)
        Squared singular values, falling.
    wanted : float
        Share of the energy, gamma.
    """
    reached = covered + torch.cumsum(squares, 0)
    missing = wanted * total * (1 - 1e-12)  # rounding must not cost a direction
    return 0 if covered >= missing else min(len(squares), int((reached < missing).sum()) + 1)


def rank_below(squares: Tensor, wanted: float, total: Tensor | float) -> int:
    """How many leading squares have a running share *below* `wanted`: the released rule.

    One fewer than `rank_reaching`, so the kept energy falls short of what was wanted.
    """
    return int((torch.cumsum(squares, 0) / total < wanted).sum())


class IterativeSVD:
    """Left singular vectors of a matrix that arrives in chunks of columns (G6).

    Parameters
    ----------
    energy : float
        gamma_0: share of the squared singular values of all that was seen that is kept.
    keep_values : bool
        Whether the basis re-enters with its singular values, as it must to stand for the chunks
        it came from. Without them, as released, it enters with unit weight, and a large chunk
        can push all of it out.
    reach : bool
        Whether the kept energy reaches `energy` (`rank_reaching`); False is the released rule,
        which keeps at least one vector but loses one direction at every call.

    Attributes
    ----------
    basis : Tensor (features, r) or None
        Orthonormal columns, float64.
    values : Tensor (r,)
        Their singular values; ones without `keep_values`.
    samples : int
        Columns seen.
    """

    def __init__(self, energy: float = 0.999, keep_values: bool = True, reach: bool = True):
        if not 0 < energy <= 1:
            raise ValueError(f"energy must lie in (0, 1], not {energy}")
        self.energy, self.keep_values, self.reach = energy, keep_values, reach
        self.basis: Tensor | None = None
        self.values = torch.zeros(0, dtype=torch.float64)
        self.total = 0.0  # energy of everything seen
        self.samples = 0

    @torch.no_grad()
    def update(self, chunk: Tensor) -> Tensor:
        """Take in a chunk (features, samples); returns the singular values before the cut."""
        if not torch.isfinite(chunk).all():
            raise ValueError("the representations hold NaN or infinite values")
        chunk = chunk.double()
        self.samples += chunk.shape[1]
        stacked = chunk if self.basis is None else torch.cat([self.matrix, chunk], 1)  # G6
        vectors, values = left_singular(stacked)
        squares = values.square()
        if self.keep_values:
            self.total += chunk.square().sum()
        else:
            self.total = squares.sum()
        if self.reach:
            rank = rank_reaching(squares, self.energy, self.total)
        else:
            rank = max(1, rank_below(squares, self.energy, self.total))
        self.basis = vectors[:, :rank]
        self.values = values[:rank] if self.keep_values else torch.ones_like(values[:rank])
        return values

    @property
    def matrix(self) -> Tensor:
        """A matrix (features, r) with the same left singular vectors as all that was seen."""
        return self.basis * self.values.to(self.basis.device)
