"""Features in which two images are compared.

Pixels of a reconstruction differ everywhere a little; features ask whether the same *things* are
there. The paper takes a ResNet-50 that knows ImageNet. Where that is too large, principal
components of patches of photographs, at several scales, stand in for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, resnet50

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels


class ResNetFeatures(nn.Module):
    """Some stages of a ResNet-50: 0 is the stem, 1 to 4 are its layers.

    Parameters
    ----------
    stages : tuple of int
        1, 2, 3 for MVTec AD and 0, 2, 4 for VisA in the released code.
    """

    def __init__(self, stages: tuple[int, ...] = (1, 2, 3)):
        super().__init__()
        if not stages or not set(stages) <= set(range(5)):
            raise ValueError(f"stages are some of 0 to 4, not {stages}")
        self.stages = stages
        network = resnet50(weights=None)
        network.fc = nn.Identity()
        self.network = network.requires_grad_(False).eval()
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))

    def prepare(self) -> None:
        """Load torchvision's ImageNet weights; from its cache, or else over the network."""
        if self.ready:
            return
        state = ResNet50_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
        self.network.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
        self.ready.fill_(True)

    def train(self, mode: bool = True) -> ResNetFeatures:
        """Stay in evaluation mode: its normalisation must not learn."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps (B, C, h, w) of images (B, 3, H, W) in [0, 1], one a stage."""
        if not self.ready.is_meta and not self.ready:
            raise ValueError("the features have no weights yet: call prepare()")
        net = self.network
        mean, deviation = (images.new_tensor(v)[:, None, None] for v in (MEAN, DEVIATION))
        x = net.relu(net.bn1(net.conv1((images - mean) / deviation)))
        found = [x]
        x = net.maxpool(x)
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = layer(x)
            found.append(x)
        return [found[stage] for stage in self.stages]


class PatchFeatures(nn.Module):
    """Principal components of small patches, at several scales, all of equal strength.

    Parameters
    ----------
    scales : tuple of int
        By which the image is shrunk.
    patch : int
        Side of a patch in pixels of the shrunk image.
    channels : int
        Components kept at each scale, the mean of the patch among them.
    """

    def __init__(self, scales: tuple[int, ...] = (1, 2, 4), patch: int = 5, channels: int = 12):
        super().__init__()
        self.scales, self.patch = scales, patch
        values = 3 * patch**2
        self.register_buffer("mean", torch.zeros(len(scales), values))
        self.register_buffer("filters", torch.zeros(len(scales), channels, values))

    @torch.no_grad()
    def prepare(self, photographs: Tensor) -> None:
        """Learn from photographs (N, 3, H, W) in [0, 1], unless it has learnt before."""
        if self.filters.any():
            return
        for i, x in enumerate(self._pyramid(photographs)):
            patches = F.unfold(x, self.patch, stride=2).transpose(0, 1).flatten(1).double()
            mean = patches.mean(1, keepdim=True)
            covariance = (patches - mean) @ (patches - mean).T / patches.shape[1]
            values, vectors = torch.linalg.eigh(covariance)
            kept = self.filters.shape[1]
            filters = vectors.flip(1)[:, :kept] / values.flip(0)[:kept].sqrt()
            self.mean[i], self.filters[i] = mean[:, 0], filters.T

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps (B, channels, h, w) of images (B, 3, H, W), one a scale."""
        if not self.filters.any():
            raise ValueError("the features have learned nothing yet: call prepare(photographs)")
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
