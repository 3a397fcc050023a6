"""Images and latents cut into square patches: masks by patch, shuffled patches.

Patches are numbered image by image, then row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor

ODDS = (0.3, 0.25, 0.2, 0.15, 0.1)  # DeCo-Diff's, of patches of 1, 2, 4, 8 and 16 latent cells


def cut(images: Tensor, height: int, width: int) -> Tensor:
    """The patches (B, n, C, height, width) of images (B, C, H, W), which they must divide."""
    b, c, h, w = images.shape
    if h % height or w % width:
        raise ValueError(f"patches of {height} x {width} do not divide {h} x {w}")
    patches = images.reshape(b, c, h // height, height, w // width, width)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def join(patches: Tensor, h: int, w: int) -> Tensor:
    """Images (B, C, h, w) of their patches (B, n, C, height, width)."""
    b, _, c, height, width = patches.shape
    grid = patches.unflatten(1, (h // height, w // width))
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def shuffle_patches(z: Tensor, patch: int, order: Tensor) -> Tensor:
    """Shuffle the patches of a whole batch (B, C, H, W): they wander from image to image.

    Parameters
    ----------
    order : Tensor (B n,), long
        Patch i of the result is patch order[i] of z.
    """
    patches = cut(z, patch, patch)  # (B, n, C, patch, patch)
    return join(patches.flatten(0, 1)[order].view_as(patches), *z.shape[-2:])


def patch_mask(kept: Tensor, order: Tensor, patch: int, side: int) -> Tensor:
    """Masks (B, 1, side, side) in {0, 1} that keep some patches of each image.

    Parameters
    ----------
    kept : Tensor (B,), long
        How many patches are kept.
    order : Tensor (B, n), long
        A permutation of the n patches of each image; the first are kept.
    """
    stays = (torch.arange(order.shape[1], device=order.device) < kept[:, None]).float()
    mask = torch.zeros_like(stays).scatter(1, order, stays)
    return join(mask[..., None, None, None].expand(-1, -1, 1, patch, patch), side, side)


def patch_table(side: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Patch sizes for latents of so many cells a side, and their odds.

    Powers of 2 up to half the side, with the published odds: 32 cells have all five. A size that
    does not divide the side is left out.
    """
    table = [(2**k, p) for k, p in enumerate(ODDS) if 2 * 2**k <= side and side % 2**k == 0]
    total = sum(p for _, p in table)
    return tuple(size for size, _ in table), tuple(p / total for _, p in table)
