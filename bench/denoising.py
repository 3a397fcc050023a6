"""One guided step against walks of many; the time does not depend on the weights."""

from __future__ import annotations

import torch

from bench.table import Row
from bench.timing import best
from diffad_ref import DiffusionAD
from diffad_ref.tools.sampling import iterative_x0


def rows(
    device: torch.device, batch: int = 4, level: int = 400, calls: int = 50, rounds: int = 2
) -> list[Row]:
    """Milliseconds an image; the guided step calls the network twice."""
    detector = DiffusionAD.tiny().to(device).eval()
    size = detector.config.image_size
    images = torch.rand(batch, 3, size, size, device=device)

    def seeded():
        return torch.Generator().manual_seed(0)

    @torch.no_grad()
    def one():
        detector.reconstruct(images, seeded())

    @torch.no_grad()
    def many(method):
        walk = detector.denoiser, images, level, detector.schedule, seeded(), method
        iterative_x0(*walk, steps=calls)

    seconds = best(one, lambda: many("ddim"), lambda: many("ddpm"), rounds=rounds)
    step, ddim, ddpm = (1000 * taken / batch for taken in seconds)
    what, start = f"one guided step, tiny, {size} pixels", f" from t = {level}"
    return [
        Row("denoising", what, step, "ms", f"DDIM{start}", ddim, note=f"{calls} calls"),
        Row("denoising", what, step, "ms", f"DDPM{start}", ddpm, 100, f"{level + 1} calls"),
    ]
