"""Cycle spinning: a codec cuts images along a grid, and where the grid lies is chance.

A scratch in the middle of a cell is seen, the same one on the border of two is half lost in each.
So an image is judged at several places of the grid, and the maps are moved back and averaged
(Coifman and Donoho 1995, who removed noise in this way).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grid_moves(factor: int, spins: int) -> list[tuple[int, int]]:
    """Moves (down, right) in pixels that spread evenly over a cell; the first is none.

    Parameters
    ----------
    factor : int
        Side of a cell in pixels.
    spins : int
        Places on each axis: there are spins² moves.

    Raises
    ------
    ValueError
        A cell does not divide into so many places.
    """
    if spins < 1 or factor % spins:
        raise ValueError(f"a cell of {factor} pixels does not divide into spins={spins} places")
    steps = range(0, factor, factor // spins)
    return [(down, right) for down in steps for right in steps]


def move(images: Tensor, down: int, right: int) -> Tensor:
    """Move images or maps (..., H, W) by whole pixels; what comes in is mirrored at the border."""
    h, w = images.shape[-2:]
    reach = max(abs(down), abs(right))
    padded = F.pad(images.reshape(1, -1, h, w), [reach] * 4, mode="reflect")
    moved = padded[..., reach - down : reach - down + h, reach - right : reach - right + w]
    return moved.reshape(images.shape)


def mean_in_place(maps: list[Tensor], moves: list[tuple[int, int]]) -> Tensor:
    """The mean (B, H, W) of maps (B, H, W) of images that were moved, each moved back."""
    back = [move(m, -down, -right) for m, (down, right) in zip(maps, moves, strict=True)]
    return torch.stack(back).mean(0)
