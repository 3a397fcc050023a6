"""Three ways to the singular vectors of what layers see, as in chapter 7, on random data."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.table import Row
from bench.timing import best
from diffad_ref.iterative_svd import IterativeSVD, left_singular

# Features, and columns that two images of ten steps give, of three layers of the tiny network: a
# convolution of latents, one of the level below, an attention's projection.
LAYERS = ((216, 5120), (432, 1280), (48, 1280))
SMALLER = 9  # times: what the iterative way must save
KEPT = 0.995  # energy, of what a plain basis of the same rank captures


def rows(
    device: torch.device,
    layers: tuple[tuple[int, int], ...] = LAYERS,
    chunks: int = 20,
    rounds: int = 2,
) -> list[Row]:
    """Time, bytes held and energy; plain and iterative decompose by the same routine."""
    data = [activations(*layer, chunks, device) for layer in layers]
    plain = [[torch.cat(chunk, 1)] for chunk in data]
    once, folded, added = best(
        lambda: [fold(chunk) for chunk in plain],
        lambda: [fold(chunk) for chunk in data],
        lambda: [add_up(chunk, torch.float64) for chunk in data],
        rounds=rounds,
    )
    exact, running = [fold(chunk) for chunk in plain], [fold(chunk) for chunk in data]
    whole, held = sum(bytes_ for _, bytes_ in exact), sum(bytes_ for _, bytes_ in running)
    kept = min(
        energy_kept(svd.basis, all_at_once)
        for (svd, _), (all_at_once, _) in zip(running, exact, strict=True)
    )
    single = min(
        energy_kept(add_up(chunk, torch.float32).double()[:, : svd.basis.shape[1]], svd)
        for chunk, (svd, _) in zip(data, exact, strict=True)
    )
    what, rival = f"iterative SVD, {len(layers)} layers, {chunks} chunks", "plain SVD"
    sums = f"adding up R Rᵀ, {len(layers)} layers, {chunks} chunks"
    note = "of what a plain basis of equal rank captures, worst layer"
    return [
        Row("svd", f"{what}: time", folded, "s", rival, once),
        Row("svd", f"{what}: bytes held", held / 1e6, "MB", rival, whole / 1e6, SMALLER),
        Row("svd", f"{what}: energy lost", 1 - kept, "", "limit", 1 - KEPT, 1, note),
        Row("svd", f"{sums}: time", added, "s", "iterative SVD", folded, 1),
        Row(
            "svd", f"{sums}: energy lost", 1 - single, "", "limit", 1 - KEPT, 1, "float32; as above"
        ),
    ]


def activations(features: int, columns: int, chunks: int, device: torch.device) -> list[Tensor]:
    """Chunks (features, columns) of random data whose singular values fall by 300 from end to end.

    Each chunk has its own strength, so that no chunk speaks for all.
    """
    generator = torch.Generator().manual_seed(features)
    turn, _ = torch.linalg.qr(torch.randn(features, features, generator=generator))
    mixing = turn * torch.logspace(0, -2.5, features)
    strengths = 0.5 + torch.rand(chunks, generator=generator)
    return [
        (s * mixing @ torch.randn(features, columns, generator=generator)).to(device)
        for s in strengths
    ]


def fold(chunks: list[Tensor]) -> tuple[IterativeSVD, int]:
    """Take in chunks, and the bytes of columns and basis held at the worst moment."""
    svd, peak = IterativeSVD(), 0
    for chunk in chunks:
        before = 0 if svd.basis is None else svd.basis.nbytes
        peak = max(peak, chunk.nbytes + before)
        svd.update(chunk)
    return svd, peak


def add_up(chunks: list[Tensor], precision: torch.dtype) -> Tensor:
    """Eigenvectors (features, features) of the sum of R Rᵀ over chunks, the largest first."""
    square = sum(chunk.to(precision) @ chunk.to(precision).T for chunk in chunks)
    return torch.linalg.eigh(square)[1].flip(1)


def energy_kept(basis: Tensor, plain: IterativeSVD) -> float:
    """Share of what the plain basis of equal rank captures, of a matrix that stands for all."""
    exact = plain.matrix
    captured = (basis.T @ exact).square().sum()
    return (captured / left_singular(exact)[1].square()[: basis.shape[1]].sum()).item()
