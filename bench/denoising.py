"""One guided step against walks of many; the time does not depend on the weights."""

from __future__ import annotations

import torch

from bench.table import Row
from bench.timing import best
from diffad_ref import DiffusionAD
from diffad_ref.diffusion import iterative_x0


def rows(device: torch.device, batch: int = 4, level: int = 400) -> list[Row]:
    """Milliseconds an image; the guided step calls the network twice."""
    detector = DiffusionAD(DiffusionAD.Config.tiny()).to(device).eval()
    size = detector.config.image_size
    images = torch.rand(batch, 3, size, size, device=device)

    def seeded():
        return torch.Generator().manual_seed(0)

    @torch.no_grad()
    def one():
        detector.reconstruct(images, seeded())

    @torch.no_grad()
    def many(method):
        iterative_x0(detector.denoiser, images, level, detector.schedule, seeded(), method)

    seconds = best(one, lambda: many("ddim"), lambda: many("ddpm"), rounds=2)
    step, ddim, ddpm = (1000 * taken / batch for taken in seconds)
    what = f"one guided step, tiny, {size} pixels"
    return [
        Row("denoising", what, step, "ms", f"DDIM from t = {level}", ddim, note="50 calls"),
        Row(
            "denoising", what, step, "ms", f"DDPM from t = {level}", ddpm, 100, f"{level + 1} calls"
        ),
    ]
