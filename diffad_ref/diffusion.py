"""Noise schedules and the closed-form mathematics that all methods share.

Time steps count from 0: `abar[t]` is the share of signal left after step t. Schedules are made in
float64; whoever uses them picks entries first and casts then, so that nothing is lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

# ------------------------------------------------------------------------------------- schedules


def linear_betas(steps: int = 1000) -> Tensor:
    """Betas from 1e-4 to 2e-2, scaled so that any number of steps ends at the same noise (1a)."""
    scale = 1000 / steps
    return torch.linspace(scale * 1e-4, scale * 2e-2, steps, dtype=torch.float64)


def cosine_betas(steps: int = 1000) -> Tensor:
    """Squared-cosine schedule: abar(u) falls like cos² of the time, betas capped at 0.999."""
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def scaled_linear_betas(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """Betas linear in their square root, as in latent diffusion."""
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2


@dataclass(frozen=True)
class Schedule:
    """Everything that follows from the betas of a forward process.

    Attributes
    ----------
    betas, abar, abar_prev : Tensor (T,), float64
        Noise added at each step; signal left after it and before it.
    """

    betas: Tensor
    abar: Tensor
    abar_prev: Tensor

    @classmethod
    def from_betas(cls, betas: Tensor) -> Schedule:
        """Cumulate betas (T,), each in (0, 1), in float64."""
        betas = betas.double()
        abar = torch.cumprod(1 - betas, 0)
        return cls(betas, abar, torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]]))

    @classmethod
    def named(cls, name: str, steps: int) -> Schedule:
        """ "linear", "cosine" or "scaled_linear" with so many steps."""
        makers = {
            "linear": linear_betas,
            "cosine": cosine_betas,
            "scaled_linear": scaled_linear_betas,
        }
        if name not in makers:
            raise ValueError(f"unknown schedule {name!r}; there are {', '.join(makers)}")
        return cls.from_betas(makers[name](steps))

    def respaced(self, kept: list[int]) -> Schedule:
        """The process that visits only some steps, rising: what is left at each is unchanged."""
        abar = self.abar[kept]
        before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        return Schedule(1 - abar / before, abar, before)

    def __len__(self) -> int:
        return len(self.betas)

    def at(self, t: Tensor) -> Tensor:
        """abar of time steps t (B,), long, as float32 (B, 1, 1, 1) on the device of t."""
        return pick(self.abar, t)

    @property
    def posterior_variance(self) -> Tensor:
        """Variance of q(x_{t-1} | x_t, x_0), (T,)."""
        return self.betas * (1 - self.abar_prev) / (1 - self.abar)

    @property
    def posterior_log_variance_clipped(self) -> Tensor:
        """Its logarithm; the first entry, which is -inf, is replaced by the second."""
        variance = self.posterior_variance
        return torch.log(torch.cat([variance[1:2], variance[1:]]))

    @property
    def posterior_mean_coefs(self) -> tuple[Tensor, Tensor]:
        """Weights (T,) of x_0 and of x_t in the mean of q(x_{t-1} | x_t, x_0)."""
        of_x0 = self.betas * self.abar_prev.sqrt() / (1 - self.abar)
        of_xt = (1 - self.abar_prev) * (1 - self.betas).sqrt() / (1 - self.abar)
        return of_x0, of_xt


def pick(values: Tensor, t: Tensor) -> Tensor:
    """Entries t (B,) of a float64 table (T,), rounded to float32 last, as (B, 1, 1, 1)."""
    picked = values[t.cpu()].float().to(t.device)
    return picked.reshape(-1, 1, 1, 1)


# ----------------------------------------------------------------------------------- closed form


def add_noise(x0: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """Jump from a clean image to step t at once.

    Parameters
    ----------
    x0, eps : Tensor (B, C, H, W)
        Clean image and standard Gaussian noise.
    abar : Tensor (B, 1, 1, 1)
        Signal left at the wanted step, in (0, 1].

    Source: DiffusionAD, forward process.
    """
    return abar.sqrt() * x0 + (1 - abar).sqrt() * eps  # D1


def predict_x0(x_t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """Undo `add_noise` in one step, given the noise (B, C, H, W) that a model predicts.

    Not clamped. Source: DiffusionAD, one-step denoising.
    """
    return (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()  # D2


def implied_noise(x_t: Tensor, x0: Tensor, abar: Tensor) -> Tensor:
    """The noise that turns x0 into x_t (all (B, C, H, W)); abar (B, 1, 1, 1) below 1."""
    return (x_t - abar.sqrt() * x0) / (1 - abar).sqrt()  # D1, solved for eps


def ddpm_step(
    x_t: Tensor, x0: Tensor, t: Tensor, schedule: Schedule, noise: Tensor | None
) -> Tensor:
    """One ancestral step: draw x_{t-1} from q(x_{t-1} | x_t, x_0), x_0 being an estimate.

    Parameters
    ----------
    x_t, x0 : Tensor (B, C, H, W)
    t : Tensor (B,), long
    noise : Tensor (B, C, H, W) or None
        Standard Gaussian noise; it has no effect at t = 0. None gives the mean.

    Source: Ho et al. 2020, equations 6 and 7.
    """
    of_x0, of_xt = schedule.posterior_mean_coefs
    mean = pick(of_x0, t) * x0 + pick(of_xt, t) * x_t
    if noise is None:
        return mean
    return mean + pick(schedule.posterior_variance.sqrt(), t) * noise


def ddim_step(x0: Tensor, eps: Tensor, abar_prev: Tensor) -> Tensor:
    """One deterministic step (eta = 0): the estimate, noised again to the earlier level.

    Parameters
    ----------
    x0, eps : Tensor (B, C, H, W)
        Estimated image and estimated noise at the current level.
    abar_prev : Tensor (B, 1, 1, 1)
        Signal left at the earlier level; 1 ends at the estimate itself.

    Source: Song et al. 2021, equation 12.
    """
    return add_noise(x0, eps, abar_prev)


def spaced_timesteps(start: int, count: int, end: int = 0) -> list[int]:
    """`count` steps from `start` down to `end`, evenly spaced, without repetition."""
    if not 1 <= count <= start - end + 1:
        raise ValueError(f"{count} steps do not fit between {end} and {start}")
    return [int(t) for t in torch.linspace(start, end, count, dtype=torch.float64).round()]


def respaced(total: int, count: int) -> list[int]:
    """`count` of `total` steps, from 0 in equal strides; 5 of 10 are 0, 2, 4, 6, 8.

    Raises ValueError for a count that no whole stride gives.
    """
    for stride in range(1, total):
        if len(range(0, total, stride)) == count:
            return list(range(0, total, stride))
    raise ValueError(f"no stride makes {count} of {total} steps")


def ddim_times(total: int, count: int) -> list[int]:
    """Time steps of latent diffusion's sampler, falling: 901, 801, ..., 1 for 10 of 1000.

    The stride is total // count; a count that does not divide the total gives more steps.
    """
    if not 1 <= count <= total:
        raise ValueError(f"{count} steps do not fit into {total}")
    return [t + 1 for t in range(0, total, total // count)][::-1]


# -------------------------------------------------------------------------------- many small steps


@torch.no_grad()
def iterative_x0(
    denoiser: nn.Module,
    x: Tensor,
    t_start: int,
    schedule: Schedule,
    generator: torch.Generator,
    method: str = "ddpm",
    steps: int | None = None,
    t_end: int = 0,
    progress: bool = False,
) -> Tensor:
    """Noise an image to t_start and walk back step by step: what one-step denoising replaces.

    Parameters
    ----------
    x : Tensor (B, 3, H, W), in [0, 1]
    method : "ddpm" or "ddim"
        Ancestral sampling through every step, or a deterministic walk through `steps` of them.
    steps : int, optional
        Calls of the network for "ddim"; default 50.
    t_end : int
        Where the walk ends, with the estimate of the image from there: the lowest level that the
        network was trained for. Below it, errors add up from step to step.

    Returns
    -------
    Tensor (B, 3, H, W), clamped to [-1, 1].
    """
    if method not in ("ddpm", "ddim"):
        raise ValueError(f"method is 'ddpm' or 'ddim', not {method!r}")
    count = t_start - t_end + 1 if method == "ddpm" else steps or 50
    times = spaced_timesteps(t_start, count, t_end)

    def level(t):
        return torch.full((len(x),), t, device=x.device)

    x_t = add_noise(x, draw_noise(x, generator), schedule.at(level(t_start)))
    for t, t_next in zip(
        tqdm(times, method, disable=not progress, leave=False), [*times[1:], None], strict=True
    ):
        eps = denoiser(x_t, level(t))
        x0 = predict_x0(x_t, eps, schedule.at(level(t))).clamp(-1, 1)
        if t_next is None:
            return x0
        if method == "ddpm":
            x_t = ddpm_step(x_t, x0, level(t), schedule, draw_noise(x, generator))
        else:
            x_t = ddim_step(x0, eps, schedule.at(level(t_next)))


@torch.no_grad()
def ddim_walk(
    denoiser: Callable[[Tensor, Tensor], Tensor],
    x_t: Tensor,
    schedule: Schedule,
    times: Sequence[int],
    abar_end: float = 1.0,
) -> tuple[list[Tensor], list[Tensor]]:
    """Walk deterministically from noise to an image (or latent).

    Parameters
    ----------
    denoiser : callable (x_t, t) -> eps
    x_t : Tensor (B, C, H, W)
        Noised to the first of the times.
    times : sequence of int
        Time steps, falling.
    abar_end : float
        Signal left after the last step: 1 ends at the estimate itself; latent diffusion ends at
        the first level of its schedule.

    Returns
    -------
    states, estimates : lists of Tensor
        x after each step, and the clean x estimated in it.
    """
    states, estimates = [], []
    for i, t in enumerate(times):
        t = torch.full((len(x_t),), t, device=x_t.device)
        eps = denoiser(x_t, t)
        x0 = predict_x0(x_t, eps, schedule.at(t))
        after = x0.new_full((1, 1, 1, 1), abar_end)
        if i + 1 < len(times):
            after = schedule.at(torch.full_like(t, times[i + 1]))
        x_t = ddim_step(x0, eps, after)
        states.append(x_t)
        estimates.append(x0)
    return states, estimates


def draw_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard Gaussian noise; drawn on the generator's device, so a seed means one thing."""
    return torch.randn(like.shape, generator=generator, device=generator.device).to(like.device)


def draw_times(limits: tuple[int, int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Time steps (B,), long, one for each sample of a batch: low <= t < high of the limits."""
    return torch.randint(*limits, (len(like),), generator=generator, device=generator.device).to(
        like.device
    )
