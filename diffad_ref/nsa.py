"""Natural synthetic anomalies: patches of other images, blended in without a seam.

A pasted rectangle is found by its edges, and a network that learns to find edges has learnt
nothing about defects. Poisson blending keeps the gradients of the patch and takes the colours from
around it, so that only its content is wrong.

Schlüter et al.: *Natural Synthetic Anomalies*, ECCV 2022; settings as in One-for-More.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from scipy.ndimage import median_filter
from torch import Tensor


@dataclass(frozen=True)
class Pasting:
    """How patches are pasted; the defaults are those of One-for-More."""

    share: float = 0.5  # of images that get any patch
    most: int = 4  # patches an image; the first always, each further one with p = 0.5
    size: tuple[float, float] = (0.03, 0.4)  # half-width of a patch, as a share of the side
    scale: tuple[float, float] = (0.7, 1.3)  # by which it is resized
    from_others: bool = True  # from another image of the batch, or from the image itself


def paste(images: Tensor, settings: Pasting, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Paste blended patches into some images of a batch.

    Parameters
    ----------
    images : Tensor (B, 3, H, W), in [0, 1]

    Returns
    -------
    images : Tensor (B, 3, H, W)
        Some of them changed; on the device of the input.
    mask : Tensor (B, 1, H, W)
        1 where a pixel changed by more than one grey level, specks removed.
    """
    seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
    rng = np.random.default_rng(seed)
    pixels = (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()
    changed, masks = images.clone(), torch.zeros_like(images[:, :1])
    for i in range(len(pixels)):  # blending solves an equation for each patch, on the CPU
        if rng.random() >= settings.share:
            continue
        other = i
        if settings.from_others and len(pixels) > 1:
            other = (i + rng.integers(1, len(pixels))) % len(pixels)
        pasted = paste_patches(pixels[i], pixels[other], settings, rng)
        mask = np.abs(pasted.astype(int) - pixels[i]).max(-1) > 1
        mask = median_filter(mask.astype(np.uint8), 5)
        changed[i] = torch.from_numpy(pasted).permute(2, 0, 1) / 255
        masks[i, 0] = torch.from_numpy(mask)
    return changed, masks


def paste_patches(
    image: np.ndarray, source: np.ndarray, settings: Pasting, rng: np.random.Generator
) -> np.ndarray:
    """One to `most` patches of a source in an image, both uint8 (H, W, 3)."""
    result = image
    for number in range(settings.most):
        if number and rng.random() < 0.5:
            break
        result = _paste_one(result, source, settings, rng)
    return result


def _paste_one(image, source, settings: Pasting, rng) -> np.ndarray:
    """Cut a rectangle from the source, resize it, and blend it in somewhere else."""
    side = np.array(image.shape[:2])
    half = np.clip(rng.uniform(*settings.size, 2) * side, 2, side // 2 - 2).astype(int)
    top, left = rng.integers(half, side - half) - half
    patch = source[top : top + 2 * half[0], left : left + 2 * half[1]]
    new = (2 * half * rng.uniform(*settings.scale)).astype(int)
    new = np.clip(new, 6, side - 4)  # less is nothing to blend; more has no ground around it
    patch = cv2.resize(patch, (int(new[1]), int(new[0])))
    reach = (new + 1) // 2 + 1
    y, x = rng.integers(reach, side - reach + 1)
    inside = np.full(patch.shape[:2], 255, np.uint8)
    return cv2.seamlessClone(patch, image, inside, (int(x), int(y)), cv2.NORMAL_CLONE)
