"""Contrast masking: rough texture hides a difference that would be plain on a smooth surface.

A network rebuilds a smooth surface almost exactly and is always a little wrong about grain, so
its errors in the grain of a good product outshine a faint defect on smooth ground. The eye meets
the same trouble: the difference that it needs in order to notice something grows with the contrast
around it (Legge and Foley 1980).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffad_ref.maps import gaussian_filter


def local_contrast(images: Tensor, sigma: float) -> Tensor:
    """How much images (B, C, H, W) vary around each pixel: a standard deviation (B, 1, H, W).

    Parameters
    ----------
    sigma : float
        Width in pixels of the Gaussian window.
    """
    variance = gaussian_filter((images - gaussian_filter(images, sigma)).square(), sigma)
    return variance.mean(1, keepdim=True).sqrt()


def visibility(images: Tensor, half: float, sigma: float | None = None) -> Tensor:
    """Share (B, 1, H, W), in [0, 1], of a difference that counts at each pixel.

    Parameters
    ----------
    images : Tensor (B, C, H, W)
    half : float
        Contrast, in units of the images, at which a difference counts half; 0 masks nothing.
    sigma : float
        Width in pixels of the window in which contrast is measured; by default a sixteenth of the
        images' height.
    """
    if half == 0:
        return torch.ones_like(images[:, :1])
    sigma = images.shape[-2] / 16 if sigma is None else sigma
    return 1 / (1 + local_contrast(images, sigma) / half)
