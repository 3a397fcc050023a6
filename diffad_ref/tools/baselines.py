"""Honest rivals: what can be had without a diffusion model, and without its reconstruction.

`Template` asks how far a pixel lies from its usual value, `PCA` whether a few principal pictures
can rebuild the image. A method that does not beat them has not earned its cost. `NearestFeatures`
is what you would take instead today: it looks for each place's nearest neighbour in what a
pretrained network saw in good images. `SegmentationOnly` is DiffusionAD's ablation: the comparison
with nothing to compare with.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA as SklearnPCA
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import gaussian_blur

from diffad_ref.detector import Prediction, check_images
from diffad_ref.diffusion_ad import Config, DiffusionAD, top_k_mean
from diffad_ref.maps import PretrainedFeatures


class Baseline(nn.Module):
    """What all share: learning per category from good images, and the score of an image.

    The image score is the mean of the 50 largest pixels of the map, as in DiffusionAD (D11), so
    that only the maps differ; or of the 50 largest patches, where patches are compared. Parameters
    are those of the subclasses.
    """

    def __init__(self, per_category: bool = True, sigma: float = 1.0):
        super().__init__()
        self.per_category, self.sigma = per_category, sigma
        self.categories: tuple[str, ...] = ()
        self.register_buffer("mean", None)

    @property
    def device(self) -> torch.device:
        """Where the fitted numbers live."""
        return torch.device("cpu") if self.mean is None else self.mean.device

    def fit(self, dataset):
        """Learn from the good images of a data set, all of one size.

        All images are held in memory at once (12 bytes a pixel).

        Returns
        -------
        self

        Raises
        ------
        ValueError
            The data set is empty or holds defective images.
        """
        if len(dataset) == 0:
            raise ValueError("the data set is empty: there is nothing to learn from")
        batches = list(DataLoader(dataset, batch_size=64))
        images = torch.cat([batch["image"] for batch in batches])
        if any(batch["label"].any() for batch in batches):
            raise ValueError("baselines learn from good images only; use the train split")
        names = [name for batch in batches for name in batch["category"]]
        if self.per_category:
            self.categories = tuple(sorted(set(names)))
            groups = [[n == category for n in names] for category in self.categories]
        else:
            self.categories, groups = (), [[True] * len(names)]
        learned = [self._learn(images[torch.tensor(group)]) for group in groups]
        for name, values in zip(self._learned, zip(*learned, strict=True), strict=True):
            self.register_buffer(name, torch.stack(values))
        return self

    @torch.no_grad()
    def predict(
        self,
        images: Tensor,
        category_index: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Prediction:
        """Judge images (B, 3, H, W) in [0, 1]; the generator is not used.

        Raises
        ------
        ValueError
            Not fitted; images of another size than in training; a category index that is
            missing or unknown.
        """
        check_images(images)
        if self.mean is None:
            raise ValueError("the baseline knows nothing yet: call fit(dataset) first")
        if images.shape[1:] != self.mean.shape[1:]:
            raise ValueError(
                f"fitted on images {tuple(self.mean.shape[1:])}, got {tuple(images.shape[1:])}"
            )
        group = self._group(len(images), category_index)
        normal = self._rebuild(images, group)
        difference = self._difference(images, normal, group)[:, None]  # of pixels, or of patches
        anomaly = F.interpolate(difference, size=images.shape[-2:], mode="bilinear")
        size = 2 * round(4 * self.sigma) + 1
        anomaly = gaussian_blur(anomaly, [size, size], [self.sigma, self.sigma])
        judged = anomaly if difference.shape == anomaly.shape else difference
        return Prediction(anomaly[:, 0], top_k_mean(judged, k=50), normal.clamp(0, 1))

    def _group(self, count: int, category_index: Tensor | None) -> Tensor:
        """Which of the fitted groups each image belongs to."""
        if not self.per_category:
            return torch.zeros(count, dtype=torch.long, device=self.device)
        known, wanted = len(self.categories), f"{count} indices of {list(self.categories)}"
        if category_index is None:
            raise ValueError(f"say which category each image is of (category_index): {wanted}")
        index = torch.as_tensor(category_index, device=self.device)
        if index.shape != (count,) or not ((index >= 0) & (index < known)).all():
            raise ValueError(f"expected {wanted}, got {index.tolist()}")
        return index.long()


class Template(Baseline):
    """Per-pixel mean and deviation of the good images.

    The map is ``mean over channels of |x - mean| / (std + eps)``, lightly smoothed.

    Parameters
    ----------
    eps : float
        Deviation, in grey levels of [0, 1], that any pixel is allowed: without it, a pixel that
        never changed in training would drown all others.
    per_category : bool
        One template for each category; else one for all images.
    sigma : float
        Width in pixels of the Gaussian that smooths the map.
    """

    _learned = ("mean", "std")

    def __init__(self, eps: float = 0.05, per_category: bool = True, sigma: float = 1.0):
        super().__init__(per_category, sigma)
        self.eps = eps
        self.register_buffer("std", None)

    def _learn(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.mean(0), images.std(0, correction=0)

    def _rebuild(self, images: Tensor, group: Tensor) -> Tensor:
        return self.mean[group]

    def _difference(self, images: Tensor, normal: Tensor, group: Tensor) -> Tensor:
        return ((images - normal).abs() / (self.std[group] + self.eps)).mean(1)


class PCA(Baseline):
    """Rebuild an image from the principal components of the good ones (scikit-learn's PCA).

    The map is the mean over channels of the squared residual, lightly smoothed.

    Parameters
    ----------
    n_components : int
        Components a group; fewer where it has too few images.
    per_category : bool
        As for `Template`.
    sigma : float
        As for `Template`; 3 was the best of 1, 1.5, 2 and 3 on the factory of seed 1.
    """

    _learned = ("mean", "components")

    def __init__(self, n_components: int = 80, per_category: bool = True, sigma: float = 3.0):
        super().__init__(per_category, sigma)
        self.n_components = n_components
        self.register_buffer("components", None)

    def _learn(self, images: Tensor) -> tuple[Tensor, Tensor]:
        count = min(self.n_components, len(images) - 1)
        pca = SklearnPCA(count, random_state=0).fit(images.flatten(1).numpy())
        components = torch.zeros(self.n_components, images[0].numel())  # all groups alike
        components[:count] = torch.from_numpy(pca.components_)
        return torch.from_numpy(pca.mean_).reshape(images.shape[1:]), components

    def _rebuild(self, images: Tensor, group: Tensor) -> Tensor:
        centred = (images - self.mean[group]).flatten(1)
        normal = torch.empty_like(images)
        for number in group.unique():  # gathering components per image would cost their size
            chosen = group == number
            basis = self.components[number]
            rebuilt = (centred[chosen] @ basis.T) @ basis
            normal[chosen] = self.mean[number] + rebuilt.reshape(-1, *images.shape[1:])
        return normal

    def _difference(self, images: Tensor, normal: Tensor, group: Tensor) -> Tensor:
        return (images - normal).square().mean(1)


class NearestFeatures(Baseline):
    """Nearest neighbours in the features of a network that was trained on ImageNet.

    What a patch looks like is the mean, over 3 x 3 places, of the features of strides 8 and 16. The
    memory keeps patches of good images that lie far from one another. The map is the distance of
    each patch to the nearest that is kept, enlarged and smoothed; nothing is trained. The idea is
    PatchCore's (Roth et al., CVPR 2022, arXiv 2106.08265). Its image score is that of one patch; of
    1, 5, 20 and 50 patches, 50 told best which of MVTec AD's bottles and transistors, held back
    from training, had synthetic defects.

    Parameters
    ----------
    network : str
        Name of a timm model with such strides; see `maps.pretrained_state`.
    memory, candidates : int
        Patches that are kept of each category, and the random ones among which they are chosen.
    per_category, sigma
        As for `Template`.
    """

    _learned = ("mean", "patches")

    def __init__(
        self,
        network: str = "tf_efficientnet_lite0",
        memory: int = 10_000,
        candidates: int = 50_000,
        per_category: bool = True,
        sigma: float = 4.0,
    ):
        super().__init__(per_category, sigma)
        self.memory, self.candidates = memory, candidates
        self.network = PretrainedFeatures(network, stages=(2, 3))
        self.network.prepare()
        self.register_buffer("patches", None)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """What patches look like (B, C, H/8, W/8), for images (B, 3, H, W) in [0, 1]."""
        maps = self.network(images)
        fine, coarse = (F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) for x in maps)
        coarse = F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear")
        return torch.cat([fine, coarse], 1)

    def _learn(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = [self.features(x).permute(0, 2, 3, 1).flatten(0, 2) for x in images.split(16)]
        patches, generator = torch.cat(found), torch.Generator().manual_seed(0)
        some = torch.randperm(len(patches), generator=generator)[: self.candidates]
        kept = patches[some][far_apart(patches[some], self.memory, generator)]
        # All categories alike: where there are too few, some are there twice.
        return images.mean(0), kept[torch.arange(self.memory) % len(kept)]

    def _rebuild(self, images: Tensor, group: Tensor) -> Tensor:
        return self.mean[group]

    def _difference(self, images: Tensor, normal: Tensor, group: Tensor) -> Tensor:
        features = self.features(images)
        nearest = torch.empty_like(features[:, :1])
        for number in group.unique():
            wanted = features[chosen := group == number].permute(0, 2, 3, 1)
            distances = [torch.cdist(x.flatten(0, 1), self.patches[number]) for x in wanted]
            least = torch.stack([d.amin(1) for d in distances])
            nearest[chosen] = least.view(-1, 1, *features.shape[2:])
        return nearest[:, 0]


def far_apart(points: Tensor, count: int, generator: torch.Generator, width: int = 64) -> Tensor:
    """Numbers (count,), or all, of points (N, C) that lie far from one another.

    Greedily: each is the one that is farthest from all before. Distances are measured in a random
    projection to `width` dimensions, which changes them little.
    """
    directions = torch.randn(points.shape[1], width, generator=generator) / width**0.5
    x = points @ directions.to(points)
    squares, least = x.square().sum(1), torch.full_like(x[:, 0], torch.inf)
    chosen = [torch.randint(len(x), (), generator=generator).to(x.device)]
    for _ in range(min(count, len(x)) - 1):
        last = chosen[-1]
        least = torch.minimum(least, squares + squares[last] - 2 * (x @ x[last]))
        chosen.append(least.argmax())
    return torch.stack(chosen)


class SegmentationOnly(DiffusionAD):
    """DiffusionAD's ablation: the segmentation network sees an empty reconstruction.

    Of the recipe of its config remains what trains this network: see `without_denoiser`.
    """

    def __init__(self, config: Config | None = None):
        super().__init__(without_denoiser(config) if isinstance(config, Config) else config)
        del self.denoiser

    def training_loss(self, batch, generator):
        """Scalar "loss" for a batch of normal images, alone and as "mask"."""
        x, mask, _ = self.with_anomalies(batch, generator)
        loss = self.comparison_loss(x, torch.zeros_like(x), mask)
        return {"loss": loss, "mask": loss}

    def judge(self, x, category_index, generator):
        """Compare images with nothing."""
        return self.compare(x, torch.zeros_like(x))


def without_denoiser(config: Config) -> Config:
    """The recipe of the ablation: one stage for the segmentation network, with as many steps."""
    stages = [stage for stage in config.stages if "segmenter" in stage.lr]
    if not stages:
        raise ValueError("no stage of the recipe trains the segmenter")
    alone = {"segmenter": stages[0].lr["segmenter"]}
    steps = None if stages[0].steps is None else sum(stage.steps for stage in stages)
    return replace(config, stages=(replace(stages[0], steps=steps, lr=alone),))
