"""Left singular vectors of a matrix that is too large to hold.

Whatever a chunk of it spans is spanned by the chunk's singular vectors, times their values, as
well; so the chunks can go, one after the other, and one basis stays (G6).

Li et al.: *One-for-More*, CVPR 2025, arXiv 2502.19848.
"""

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
    """Smallest k: `covered` and the k largest squares reach `wanted` of `total` (G1, G3)."""
    reached = covered + torch.cumsum(squares, 0)
    missing = wanted * total * (1 - 1e-12)  # rounding must not cost a direction
    return 0 if covered >= missing else min(len(squares), int((reached < missing).sum()) + 1)


def rank_below(squares: Tensor, wanted: float, total: Tensor | float) -> int:
    """How many leading squares have a running share *below* `wanted`: released, one fewer."""
    return int((torch.cumsum(squares, 0) / total < wanted).sum())


class IterativeSVD:
    """Left singular vectors of a matrix that arrives in chunks of columns (G6).

    `energy`, gamma_0, is the share of the squared singular values of what was seen that is kept.
    The basis must re-enter with its singular values (`keep_values`) to stand for the chunks it came
    from; without them, as released, a large chunk can push all of it out. The kept energy reaches
    gamma_0 (`reach`); the released rule falls short, and loses one direction at every call.

    `basis` (features, r) has orthonormal columns, float64, `values` (r,) their singular values.
    """

    def __init__(self, energy: float = 0.999, keep_values: bool = True, reach: bool = True):
        if not 0 < energy <= 1:
            raise ValueError(f"energy must lie in (0, 1], not {energy}")
        self.energy, self.keep_values, self.reach = energy, keep_values, reach
        self.basis: Tensor | None = None
        self.values = torch.zeros(0, dtype=torch.float64)
        self.total, self.samples = 0.0, 0  # energy and number of all columns seen

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
        self.total = self.total + chunk.square().sum() if self.keep_values else squares.sum()
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
