"""Anomaly maps that look like a detector's: smooth noise, and hills where the defects are."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def anomaly_maps(
    count: int, size: int = 256, defective: float = 0.75, seed: int = 0, at_once: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Maps (count, size, size), float32, and their masks, bool; the first ones are defective.

    A defective image has three elliptical defects. Some rise far out of the noise, some hardly.
    """
    generator = torch.Generator().manual_seed(seed)
    maps = np.empty((count, size, size), np.float32)
    masks = np.zeros((count, size, size), bool)
    bad = round(count * defective)
    for start in range(0, count, at_once):  # in batches: the peak of memory is to be the metrics'
        batch = slice(start, min(start + at_once, count))
        drawn = _noise(batch.stop - start, size, generator)
        hills, inside = _defects(len(drawn), size, generator)
        wanted = torch.arange(start, batch.stop) < bad
        maps[batch] = (drawn + hills * wanted[:, None, None]).numpy()
        masks[batch] = (inside & wanted[:, None, None]).numpy()
    return maps, masks


def _noise(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Smooth noise (count, size, size) of two scales, about 0.2 high."""
    coarse, fine = (
        F.interpolate(
            torch.randn(count, 1, size // cell, size // cell, generator=generator),
            (size, size),
            mode="bicubic",
        )[:, 0]
        for cell in (16, 4)
    )
    return 0.2 + 0.06 * coarse + 0.02 * fine


def _defects(count: int, size: int, generator: torch.Generator, blobs: int = 3):
    """Hills (count, size, size) and the ellipses, bool, that they stand on."""
    axis = (torch.arange(size) + 0.5) / size
    hills, inside = torch.zeros(count, size, size), torch.zeros(count, size, size, dtype=torch.bool)
    for _ in range(blobs):
        x, y, a, b, turn, height = torch.rand(6, count, 1, 1, generator=generator)
        u, v = axis[None, None, :] - (0.15 + 0.7 * x), axis[None, :, None] - (0.15 + 0.7 * y)
        c, s = (math.pi * turn).cos(), (math.pi * turn).sin()
        along, across = (u * c + v * s) / (0.02 + 0.08 * a), (v * c - u * s) / (0.02 + 0.04 * b)
        distance = along.square() + across.square()
        hills += (0.05 + 0.4 * height) * torch.exp(-distance / 2)  # reaches over its mask's edge
        inside |= distance < 1
    return hills, inside
