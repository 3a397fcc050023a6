"""Images and latents cut into square patches, and latents corrupted patch by patch.

DeCo-Diff learns from latents in which some patches are replaced by Gaussian noise or by patches
of other images. Patches are numbered image by image, then row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffad_ref.diffusion import draw_noise

ODDS = (0.3, 0.25, 0.2, 0.15, 0.1)  # of patches of 1, 2, 4, 8 and 16 latent cells


@dataclass(frozen=True)
class Corruption:
    """How latents are corrupted; the defaults are the paper's, for 32 x 32 cells."""

    patch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)  # latent cells; one is drawn a batch
    patch_odds: tuple[float, ...] = ODDS
    mask_ratio: tuple[float, float] = (0.0, 0.7)  # share of patches that are corrupted
    foreign_ratio: tuple[float, float] = (0.0, 0.3)  # share of patches that are foreign, not noise

    def __post_init__(self):
        if len(self.patch_odds) != len(self.patch_sizes):
            raise ValueError(
                f"{len(self.patch_sizes)} patch sizes, but {len(self.patch_odds)} odds for them"
            )

    @classmethod
    def of_side(cls, side: int) -> Corruption:
        """For latents of so many cells a side: powers of 2 up to half of it, with their odds.

        A size that does not divide the side is left out.
        """
        table = [(2**k, p) for k, p in enumerate(ODDS) if 2 * 2**k <= side and side % 2**k == 0]
        total = sum(p for _, p in table)
        return cls(tuple(size for size, _ in table), tuple(p / total for _, p in table))

    def check(self, side: int) -> None:
        """Refuse patches that do not divide latents of so many cells a side."""
        bad = [patch for patch in self.patch_sizes if side % patch]
        if bad or not self.patch_sizes:
            raise ValueError(f"patches of {bad} cells do not divide latents of {side} cells")


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


def mix_noise(gaussian: Tensor, foreign: Tensor, n: Tensor) -> Tensor:
    """Gaussian noise where n (B, 1, h, w) is 1, foreign content elsewhere (all (B, C, h, w))."""
    return n * gaussian + (1 - n) * foreign  # C2


def draw_corruption(
    z_0: Tensor, settings: Corruption, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw what disturbs a batch of latents, and where.

    Parameters
    ----------
    z_0 : Tensor (B, C, side, side)

    Returns
    -------
    mask : Tensor (B, 1, side, side)
        1 where a latent stays clean.
    eps : Tensor (B, C, side, side)
        Gaussian noise, or patches of the batch.
    """
    b, side, device = len(z_0), z_0.shape[-1], generator.device
    odds = torch.tensor(settings.patch_odds, device=device)
    patch = settings.patch_sizes[torch.multinomial(odds, 1, generator=generator).item()]
    count = (side // patch) ** 2  # patches of a latent

    def mask(limits: tuple[float, float]) -> Tensor:
        low, high = limits
        draw = torch.rand(b, generator=generator, device=device, dtype=torch.float64)
        kept = (count * (1 - low - (high - low) * draw)).long()
        order = torch.rand(b, count, generator=generator, device=device).argsort(1)
        return patch_mask(kept, order, patch, side).to(z_0.device)

    m, n = mask(settings.mask_ratio), mask(settings.foreign_ratio)
    order = torch.randperm(b * count, generator=generator, device=device).to(z_0.device)
    return m, mix_noise(draw_noise(z_0, generator), shuffle_patches(z_0, patch, order), n)
