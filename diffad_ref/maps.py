"""Anomaly maps: smoothing and enlarging, as the released codes do it.

Both act on each axis alone and are linear, so each is a matrix, and a batch of maps costs two
products on whatever device it lies. The numbers are those of SciPy's filters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gaussian_filter(maps: Tensor, sigma: float) -> Tensor:
    """Smooth maps (..., H, W); borders are mirrored and the kernel ends at 4 sigma.

    Parameters
    ----------
    sigma : float
        Width of the Gaussian in pixels; 0 leaves the maps as they are.
    """
    if sigma == 0:
        return maps
    rows, columns = (_blur_matrix(n, sigma).to(maps) for n in maps.shape[-2:])
    return rows @ maps @ columns.mT


def enlarge(maps: Tensor, size: int) -> Tensor:
    """Interpolate maps (..., h, w) linearly to (..., size, size).

    A value stands for a cell and lies at its centre. Beyond the outermost centres the map is
    mirrored about them, where PyTorch's bilinear interpolation repeats the last value.
    """
    rows, columns = (_linear_matrix(n, size).to(maps) for n in maps.shape[-2:])
    return rows @ maps @ columns.mT


def _blur_matrix(length: int, sigma: float) -> Tensor:
    """Weight (length, length) of each input pixel in each output pixel."""
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    places = (torch.arange(length)[:, None] + offsets) % (2 * length)  # (length, 2 radius + 1)
    mirrored = torch.where(places < length, places, 2 * length - 1 - places)
    matrix = torch.zeros(length, length, dtype=torch.float64)
    return matrix.scatter_add_(1, mirrored, (kernel / kernel.sum()).expand(length, -1))


def _linear_matrix(length: int, size: int) -> Tensor:
    """Weight (size, length) of each input cell in each output cell."""
    place = (torch.arange(size, dtype=torch.float64) + 0.5) * length / size - 0.5
    last = max(length - 1, 0)
    place = last - (last - place.abs()).abs()  # mirrored about the first and the last centre
    below = place.floor().clamp(0, max(last - 1, 0)).long()
    share = (place - below)[:, None]
    matrix = torch.zeros(size, length, dtype=torch.float64)
    matrix.scatter_(1, below[:, None], 1 - share)
    return matrix.scatter_add_(1, (below[:, None] + 1).clamp(max=last), share)


def clip_and_scale(maps: Tensor, limit: float) -> Tensor:
    """Cut maps at a limit, beyond which a difference is simply large, and scale them to [0, 1]."""
    return maps.clamp(0, limit) / limit


def feature_distance(
    features: list[Tensor],
    others: list[Tensor],
    size: int,
    distance: str = "euclidean",
    fusion: str = "sum",
) -> Tensor:
    """How far two images' features lie apart, level by level, as one map (B, size, size) (O3).

    Parameters
    ----------
    features, others : list of Tensor (B, C, h, w)
        A pyramid of each image; levels may differ in size and channels.
    distance : "euclidean" or "cosine"
        Over the channels of a place: the norm of the difference, or 1 - cosine similarity.
    fusion : "sum" or "product"
        Of the levels.
    """
    levels = []
    for a, b in zip(features, others, strict=True):
        if distance == "euclidean":
            gap = (a - b).square().sum(1, keepdim=True).sqrt()
        elif distance == "cosine":
            gap = 1 - F.cosine_similarity(a, b, dim=1)[:, None]
        else:
            raise ValueError(f"distance is 'euclidean' or 'cosine', not {distance!r}")
        levels.append(F.interpolate(gap, size, mode="bilinear", align_corners=True)[:, 0])
    if fusion not in ("sum", "product"):
        raise ValueError(f"fusion is 'sum' or 'product', not {fusion!r}")
    stacked = torch.stack(levels)
    return stacked.sum(0) if fusion == "sum" else stacked.prod(0)
