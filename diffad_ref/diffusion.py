"""Noise schedules, and the closed forms that all methods share (D1, D2).

Time steps count from 0: `abar[t]` is the share of signal left after step t. Schedules are made in
float64, and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Draw:
    """Random numbers of a generator, drawn where it lives, so that a seed means one thing.

    Or of several, one an image: then a batch (B, ...) holds for each what its own would draw alone.
    """

    generator: torch.Generator | Sequence[torch.Generator]
    device: torch.device | str = "cpu"

    def normal(self, *shape: int) -> Tensor:
        """Standard Gaussian noise."""
        return self._of(torch.randn, shape)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Numbers from low to high."""
        return low + (high - low) * self._of(torch.rand, shape)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers, long, low <= n < high."""
        return self._of(torch.randint, low, high, shape)

    def orders(self, rows: int, count: int) -> Tensor:
        """Independent permutations (rows, count) of 0 .. count - 1, long."""
        return self._of(torch.rand, (rows, count)).argsort(1)

    def _of(self, kind: Callable, *arguments) -> Tensor:
        if isinstance(self.generator, torch.Generator):
            where = self.generator.device
            drawn = kind(*arguments, generator=self.generator, device=where)
            return drawn.to(self.device, non_blocking=where.type == "cpu")
        *others, (count, *shape) = arguments
        if count != len(self.generator):
            raise ValueError(f"{len(self.generator)} images cannot share a draw of {count} rows")
        alone = (Draw(g, self.device)._of(kind, *others, (1, *shape)) for g in self.generator)
        return torch.cat(list(alone))


def seeded(device, *key: int) -> torch.Generator:
    """A generator for a seed and a place in the work, well mixed: neighbours share no noise."""
    mixed = key[0] if len(key) == 1 else int(np.random.SeedSequence(key).generate_state(1)[0])
    return torch.Generator(device).manual_seed(mixed)


def linear_betas(steps: int = 1000) -> Tensor:
    """Betas from 1e-4 to 2e-2, scaled so that any number of steps ends at the same noise."""
    if steps <= 20:
        raise ValueError(f"a linear schedule needs more than 20 steps, not {steps}: betas below 1")
    scale = 1000 / steps
    return torch.linspace(scale * 1e-4, scale * 2e-2, steps, dtype=torch.float64)


def cosine_betas(steps: int = 1000) -> Tensor:
    """Squared-cosine schedule: abar(u) falls like cos² of the time, betas capped at 0.999."""
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def scaled_linear_betas(steps: int = 1000) -> Tensor:
    """Betas linear in their square root, from 0.00085 to 0.012, as in latent diffusion."""
    return torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2


SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas, "scaled_linear": scaled_linear_betas}


class Schedule(nn.Module):
    """A forward process of T steps, of betas (T,), each in (0, 1).

    `betas`, the noise added at each step, and `abar`, the signal left after it, are (T,), float64,
    on the CPU. What `at` looks up lies on the device of the detector that the schedule is part of.
    """

    def __init__(self, betas: Tensor):
        super().__init__()
        self.betas = betas.double()
        self.abar = torch.cumprod(1 - self.betas, 0)
        self.register_buffer("levels", self.abar.float(), persistent=False)

    @classmethod
    def named(cls, name: str, steps: int) -> Schedule:
        """One of `SCHEDULES` with so many steps."""
        if name not in SCHEDULES:
            raise ValueError(f"unknown schedule {name!r}; there are {', '.join(SCHEDULES)}")
        return cls(SCHEDULES[name](steps))

    def __len__(self) -> int:
        return len(self.betas)

    def at(self, t: Tensor) -> Tensor:
        """abar of time steps t (B,), long, as float32 (B, 1, 1, 1) on the device of t."""
        return self.levels.to(t.device)[t].float().view(-1, 1, 1, 1)


def add_noise(x0: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """Jump from a clean image to step t at once.

    x0 and eps are a clean image and standard Gaussian noise (B, C, H, W), abar (B, 1, 1, 1) the
    signal left at that step, in (0, 1]. Source: DiffusionAD, forward process.
    """
    return abar.sqrt() * x0 + (1 - abar).sqrt() * eps  # D1


def predict_x0(x_t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """Undo `add_noise` in one step, given the predicted noise (B, C, H, W); not clamped."""
    return (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()  # D2


def implied_noise(x_t: Tensor, x0: Tensor, abar: Tensor) -> Tensor:
    """The noise that turns x0 into x_t (all (B, C, H, W)); abar (B, 1, 1, 1) below 1."""
    return (x_t - abar.sqrt() * x0) / (1 - abar).sqrt()  # D1, solved for eps


def ddim_step(x0: Tensor, eps: Tensor, abar_prev: Tensor) -> Tensor:
    """One deterministic step (eta = 0): the estimate, noised again to the earlier level.

    Both are (B, C, H, W), at the current level; `abar_prev` (B, 1, 1, 1) is the signal left at the
    earlier one, 1 ends at the estimate itself. Source: Song et al. 2021, equation 12.
    """
    return add_noise(x0, eps, abar_prev)


def ddim_times(total: int, count: int) -> list[int]:
    """Latent diffusion's time steps, falling by total // count: 901, 801, ..., 1 for 10 of 1000."""
    if not 1 <= count <= total:
        raise ValueError(f"{count} steps do not fit into {total}")
    return [t + 1 for t in range(0, total, total // count)][::-1]


@torch.no_grad()
def ddim_walk(
    denoiser: Callable, x_t: Tensor, schedule: Schedule, times: Sequence[int], abar_end: float = 1.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Walk deterministically from noise to an image (or latent).

    `denoiser` (x_t, t) -> eps is asked at the falling `times`; x_t (B, C, H, W) is noised to the
    first of them. After the last step `abar_end` of the signal is left: 1 ends at the estimate
    itself, latent diffusion at the first level of its schedule. Returns x after each step, and the
    clean x estimated in it.
    """
    levels = [torch.full((len(x_t),), t, device=x_t.device) for t in times]
    abars = [schedule.at(t) for t in levels]
    ends, states, estimates = [*abars[1:], torch.full_like(abars[0], abar_end)], [], []
    for t, abar, after in zip(levels, abars, ends, strict=True):
        eps = denoiser(x_t, t)
        estimates.append(predict_x0(x_t, eps, abar))
        x_t = ddim_step(estimates[-1], eps, after)
        states.append(x_t)
    return states, estimates
