"""Images and masks: from whatever a file holds to what the methods eat.

Bit depths, alpha and palettes are settled here, once; and so is what counts as a batch of images.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})


# ---------------------------------------------------------------------------------------- batches


def check_images(images: Tensor, name: str = "images") -> None:
    """Refuse what is not a batch of images, in words that say what to do.

    Parameters
    ----------
    images : Tensor (B, 3, H, W), floating point, in [0, 1]
    name : str
        What the caller calls them; begins the message.

    Raises
    ------
    ValueError
        For another type, shape or dtype, an empty batch, NaN or infinite pixels, and values
        outside [0, 1] (up to 1e-4, which resampling may cost).
    """
    if not isinstance(images, Tensor):
        raise ValueError(f"{name}: expected a tensor (B, 3, H, W), got {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] != 3:
        hint = "; add the batch dimension with images[None]" if images.ndim == 3 else ""
        raise ValueError(f"{name}: expected shape (B, 3, H, W), got {tuple(images.shape)}{hint}")
    if images.numel() == 0:
        raise ValueError(f"{name}: the batch is empty, shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(
            f"{name}: expected float32 in [0, 1], got {images.dtype}; "
            "convert with images.float() / 255 if these are bytes"
        )
    if not torch.isfinite(images).all():
        bad = [i for i, image in enumerate(images) if not torch.isfinite(image).all()]
        raise ValueError(f"{name}: NaN or infinite pixels in image(s) {bad} of the batch")
    low, high = images.min().item(), images.max().item()
    if low < -1e-4 or high > 1 + 1e-4:
        hint = "; divide by 255" if high > 1.5 else "; is it still in [-1, 1]?" if low < 0 else ""
        raise ValueError(f"{name}: values must lie in [0, 1], found [{low:.4g}, {high:.4g}]{hint}")


def moved_crop(images: Tensor, size: int, shift: int, generator: torch.Generator) -> Tensor:
    """The middle (B, C, size, size) of images, moved by a few pixels in every second one.

    Parameters
    ----------
    images : Tensor (B, C, H, H)
        Images of `size` have no margin to move in: their borders are mirrored.
    shift : int
        Largest move on each axis, in pixels; no larger than the margin.
    """
    b, device = len(images), generator.device
    if images.shape[-1] != images.shape[-2] or images.shape[-1] < size:
        got = f"{images.shape[-2]} x {images.shape[-1]}"
        raise ValueError(f"cannot crop {size} x {size} pixels from images of {got}")
    if images.shape[-1] == size:
        images = F.pad(images, [shift] * 4, mode="reflect")
    margin = (images.shape[-1] - size) // 2
    reach = min(shift, margin)
    moves = torch.randint(-reach, reach + 1, (b, 2, 1), generator=generator, device=device)
    moved = torch.rand(b, 1, 1, generator=generator, device=device) < 0.5
    corner = (margin + moves * moved).to(images.device)
    rows, columns = (corner + torch.arange(size, device=images.device)).unbind(1)  # (B, size)
    image = torch.arange(b, device=images.device)[:, None, None]
    pixels = images.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None]]
    return pixels.permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------ files


def _open(path: Path) -> Image.Image:
    """Decode fully, upright, with depths above 8 bits scaled to 8."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
    except Exception as error:  # PIL's decoders raise half a dozen unrelated types
        raise ValueError(f"cannot read the image {path}: {error}") from error
    if image.mode == "F":
        raise ValueError(f"{path}: floating-point images have no known range; save 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray(np.round(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    return image


def read_image(path: str | Path) -> Image.Image:
    """Read any supported image file as 8-bit RGB, alpha composited over white.

    Raises ValueError, naming the file, if it is damaged or holds floating-point pixels.
    """
    image = _open(Path(path))
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def read_mask(path: str | Path) -> np.ndarray:
    """Read a mask file as uint8 (H, W) in {0, 1}: 1 where it exceeds half of full scale."""
    image = _open(Path(path))
    if image.mode in ("LA", "RGBA", "P", "PA"):
        image = image.convert("RGB")  # a palette's colours count, not its indices
    return (np.asarray(image.convert("L")) > 127).astype(np.uint8)


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a binary mask (H, W) to `size` (height, width) so that it stays binary.

    A pixel is 1 if at least half of its area is. A mask too thin for that anywhere keeps the
    pixels that it covers most, so that no defective image loses its mask.
    """
    coverage = Image.fromarray(mask.astype(np.float32))
    coverage = np.asarray(coverage.resize((size[1], size[0]), Image.Resampling.BOX))
    threshold = min(0.5, float(coverage.max()))
    return ((coverage >= threshold - 1e-6) & (coverage > 0)).astype(np.uint8)
