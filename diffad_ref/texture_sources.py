"""Where anomalies take their content from, and where on a product they may lie."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from skimage import data as photographs
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as vision
from tqdm.auto import tqdm

from diffad_ref.anomalies import crop_textures
from diffad_ref.images import read_image

# Photographs inside the scikit-image package. Brick, grass and gravel are not among them: the toy
# factory sells those, and a product's own texture is no anomaly.
BUILT_IN = (
    "astronaut", "camera", "cell", "chelsea", "coffee", "coins", "hubble_deep_field",
    "immunohistochemistry", "moon", "page", "retina", "rocket", "text",
)  # fmt: skip


def texture_bank(folder: str | os.PathLike | None = None, size: int = 256) -> Tensor:
    """Foreign textures as one tensor (K, 3, size, size), uint8.

    Parameters
    ----------
    folder : path, optional
        Any folder of images, such as DTD's `images`; searched with its sub-folders. Without one,
        the photographs that scikit-image and scikit-learn ship are cut into squares.
    size : int
        Side in pixels; the largest centred square of each image is scaled to it.

    Raises
    ------
    FileNotFoundError
        The folder does not exist or holds no image.
    ValueError
        An image is damaged.
    """
    if folder is None:
        return _built_in(size)
    root = Path(folder)
    suffixes = {".jpg", ".jpeg", ".png", ".webp"}
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in suffixes)
    if not paths:
        what = "holds no jpg, png or webp image" if root.is_dir() else "does not exist"
        raise FileNotFoundError(f"texture folder {root} {what}; DTD's is dtd/images")
    images = (read_image(path) for path in tqdm(paths, "textures", leave=False))
    return torch.stack([_square(vision.pil_to_tensor(image), size) for image in images])


@lru_cache(maxsize=2)
def _built_in(size: int) -> Tensor:
    images = [torch.from_numpy(getattr(photographs, name)()) for name in BUILT_IN]
    images += [torch.tensor(image) for image in load_sample_images().images]
    squares = []
    for image in images:
        image = image[..., None].expand(-1, -1, 3) if image.ndim == 2 else image[..., :3]
        squares.append(_square(image.permute(2, 0, 1), size))
    return torch.stack(squares)


class Photographs(Dataset):
    """Crops of the built-in photographs as training data, in the form of an `AnomalyFolder`.

    A network that learns to paint them knows no product. Every crop is another; equal arguments
    give equal ones.

    Parameters
    ----------
    size : int
        Side of the crops, in pixels.
    count : int
        How many.
    """

    categories = ("photographs",)

    def __init__(self, size: int, count: int = 6000):
        crops = crop_textures(texture_bank(), count, size, torch.Generator().manual_seed(0))
        self.crops = (crops * 255).round().to(torch.uint8)

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, i: int) -> dict:
        crop = self.crops[i].float() / 255
        return {
            "image": crop,
            "mask": torch.zeros_like(crop[:1]),
            "label": 0,
            "category": self.categories[0],
            "category_index": 0,
            "kind": "good",
            "path": f"photographs/{i}",
        }


def _square(image: Tensor, size: int) -> Tensor:
    """The largest centred square of an image (3, H, W), scaled to (3, size, size)."""
    image = vision.center_crop(image.contiguous(), [min(image.shape[-2:])])
    return vision.resize(image, [size, size], antialias=True)


def estimate_foreground(images: Tensor, bins: int = 64) -> Tensor:
    """Where the product is, guessed from the colour of the image's border.

    The background is taken to be what the border shows. Each pixel's distance from the border's
    median colour is cut by Otsu's threshold, and gaps are closed. If that gives almost nothing or
    almost everything, the whole image counts: then there is no background to speak of.

    Parameters
    ----------
    images : Tensor (B, 3, H, W), in [0, 1]

    Returns
    -------
    Tensor (B, 1, H, W), in {0, 1}
    """
    b, _, h, w = images.shape
    border = torch.cat(
        [images[:, :, [0, -1]].flatten(2), images[:, :, :, [0, -1]].flatten(2)], dim=2
    )
    background = border.median(2).values[..., None, None]
    distance = (images - background).abs().amax(1)  # (B, H, W)
    scaled = distance / distance.flatten(1).amax(1).clamp(min=1e-6)[:, None, None]
    product = (scaled > _otsu(scaled, bins)[:, None, None]).float()[:, None]
    reach = max(1, h // 24)
    grown = F.max_pool2d(product, 4 * reach + 1, 1, 2 * reach)  # close gaps, keep a margin
    closed = 1 - F.max_pool2d(1 - grown, 2 * reach + 1, 1, reach)
    share = closed.mean((1, 2, 3), keepdim=True)
    return torch.where((share < 0.05) | (share > 0.95), torch.ones_like(closed), closed)


def _otsu(values: Tensor, bins: int) -> Tensor:
    """Otsu's threshold of each image of a batch (B, H, W) in [0, 1]: best split of two classes."""
    index = (values.flatten(1) * bins).long().clamp(max=bins - 1)
    counts = torch.zeros(len(values), bins, device=values.device).scatter_add_(
        1, index, torch.ones_like(index, dtype=torch.float32)
    )
    centre = (torch.arange(bins, device=values.device) + 0.5) / bins
    below, mass = counts.cumsum(1), (counts * centre).cumsum(1)
    above = below[:, -1:] - below
    between = (mass[:, -1:] * below / below[:, -1:] - mass) ** 2 / (below * above).clamp(min=1)
    return (between.argmax(1) + 1) / bins
