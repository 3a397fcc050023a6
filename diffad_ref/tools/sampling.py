"""Many small steps: the walks that DiffusionAD's one step replaces, for chapters 2 and 4."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffad_ref.diffusion import Draw, Schedule, add_noise, ddim_step, predict_x0


def posterior(schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    """Variance of q(x_{t-1} | x_t, x_0), and the weights of x_0 and x_t in its mean; each (T,)."""
    betas, abar = schedule.betas, schedule.abar
    before = torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
    variance = betas * (1 - before) / (1 - abar)
    of_x0 = betas * before.sqrt() / (1 - abar)
    of_xt = (1 - before) * (1 - betas).sqrt() / (1 - abar)
    return variance, of_x0, of_xt


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
    variance, of_x0, of_xt = (
        table.to(t.device)[t].float().view(-1, 1, 1, 1) for table in posterior(schedule)
    )
    mean = of_x0 * x0 + of_xt * x_t
    return mean if noise is None else mean + variance.sqrt() * noise


def spaced_timesteps(start: int, count: int, end: int = 0) -> list[int]:
    """`count` steps from `start` down to `end`, evenly spaced, without repetition."""
    if not 1 <= count <= start - end + 1:
        raise ValueError(f"{count} steps do not fit between {end} and {start}")
    return [int(t) for t in torch.linspace(start, end, count, dtype=torch.float64).round()]


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
    times, draw = spaced_timesteps(t_start, count, t_end), Draw(generator, x.device)

    def level(t):
        return torch.full((len(x),), t, device=x.device)

    x_t = add_noise(x, draw.normal(*x.shape), schedule.at(level(t_start)))
    for t, t_next in zip(
        tqdm(times, method, disable=not progress, leave=False), [*times[1:], None], strict=True
    ):
        eps = denoiser(x_t, level(t))
        x0 = predict_x0(x_t, eps, schedule.at(level(t))).clamp(-1, 1)
        if t_next is None:
            return x0
        if method == "ddpm":
            x_t = ddpm_step(x_t, x0, level(t), schedule, draw.normal(*x.shape))
        else:
            x_t = ddim_step(x0, eps, schedule.at(level(t_next)))
