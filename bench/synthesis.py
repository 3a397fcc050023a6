"""Perlin masks: a batch at once against a numpy loop over images."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import rotate

from bench.table import Row
from bench.timing import best
from diffad_ref.anomalies import perlin_masks


def rows(device: torch.device, batch: int = 32, size: int = 256, few: int = 8) -> list[Row]:
    """Milliseconds an image."""
    generator, rng = torch.Generator(device).manual_seed(0), np.random.default_rng(0)
    batched, looped = best(
        lambda: perlin_masks(batch, size, generator, device),
        lambda: [mask_by_numpy(size, rng) for _ in range(few)],
    )
    what = f"Perlin mask {size} x {size}, in batches of {batch}"
    here, there = 1000 * batched / batch, 1000 * looped / few
    return [Row("synthesis", what, here, "ms", "a numpy loop over images", there, 10)]


def mask_by_numpy(size: int, rng: np.random.Generator, threshold: float = 0.5) -> np.ndarray:
    """One mask as it is usually made: gradients spread over all pixels, then a rotation."""
    while True:
        noise = np.zeros((size, size))
        cells = 2 ** rng.integers(0, 6, 2)
        angle = 2 * np.pi * rng.random(cells + 1)
        gradient = np.stack([np.cos(angle), np.sin(angle)], -1)
        y, x = (np.arange(size) * c / size for c in cells)
        row, column = y.astype(int), x.astype(int)
        v, u = np.meshgrid(y - row, x - column, indexing="ij")
        fade_v, fade_u = (w**3 * (w * (6 * w - 15) + 10) for w in (v, u))
        for i in (0, 1):
            for j in (0, 1):
                corner = gradient[row + i][:, column + j]
                weight = (fade_v if i else 1 - fade_v) * (fade_u if j else 1 - fade_u)
                noise += weight * (corner[..., 0] * (v - i) + corner[..., 1] * (u - j))
        turned = rotate(noise * 2**0.5, rng.uniform(-90, 90), reshape=False, order=1)
        mask = turned > threshold
        if mask.any():
            return mask
