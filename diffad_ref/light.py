"""Light adaptation: how bright a photograph is says nothing about the product.

A surface reflects a share of the light that falls on it, so the same scratch is a small difference
in a dark photograph and a large one in a bright one. Eyes do not care, because a photoreceptor
answers to light relative to what it has adapted to (Naka and Rushton 1966). Where a data set was
taken under many lightings, a model should see it so.
"""

from __future__ import annotations

from torch import Tensor


def adapted(images: Tensor) -> Tensor:
    """What an eye adapted to each image's median sees of it: x / (x + median).

    Twice as much light on an image changes nothing. The median is seen as 0.5.

    Parameters
    ----------
    images : Tensor (B, C, H, W), in [0, 1]

    Returns
    -------
    Tensor (B, C, H, W), in [0, 1)
    """
    return images / (images + _level(images))


def unadapted(seen: Tensor, images: Tensor) -> Tensor:
    """The light of which something (B, C, H, W), in [0, 1], is seen; clamped to [0, 1].

    Parameters
    ----------
    images : Tensor (B, C, H, W), in [0, 1]
        What the eye has adapted to.
    """
    return (_level(images) * seen / (1 - seen).clamp(min=1e-3)).clamp(0, 1)


def _level(images: Tensor) -> Tensor:
    """Median (B, 1, 1, 1) of each image, one grey level at least."""
    return images.flatten(1).median(1).values.clamp(min=1 / 255)[:, None, None, None]
