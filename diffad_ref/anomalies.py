"""Synthetic anomalies for training: where (Perlin noise), what (a foreign texture), how much.

A detector that has never seen a defect learns from invented ones. They need not look real; they
must be irregular in shape and foreign in content (D12).
"""

import math
import os
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from pydantic import Field
from torch import Tensor
from tqdm.auto import tqdm

from diffad_ref.data import images_under, read_image
from diffad_ref.detector import Natural, Number, Range, Share, checked
from diffad_ref.diffusion import Draw


def perlin_noise(angles: Tensor, cells: Tensor, height: int, width: int) -> Tensor:
    """Two-dimensional Perlin noise (B, height, width), about in [-1, 1], as two matrix products.

    In each lattice cell the noise blends four ramps, one per corner gradient. The blend weights
    and the ramps factor into a part of the row and a part of the column, so the whole image is
    bilinear in the gradients: no pixel is ever looped over, and no corner ever gathered.

    `angles` (B, L, L) are the directions of the gradients at the lattice points, in radians, of
    which a sample with (r0, r1) = `cells` (B, 2), long, uses the first (r0 + 1) x (r1 + 1).
    Source: Perlin 2002, with the scaling of DiffusionAD's released code.
    """
    blend_r, ramp_r = _lattice_weights(cells[:, 0], height, angles.shape[1], angles)  # (B, H, L)
    blend_c, ramp_c = _lattice_weights(cells[:, 1], width, angles.shape[2], angles)  # (B, W, L)
    along_rows = ramp_r @ angles.cos() @ blend_c.mT
    along_columns = blend_r @ angles.sin() @ ramp_c.mT
    return math.sqrt(2) * (along_rows + along_columns)


def _lattice_weights(cells: Tensor, length: int, points: int, like: Tensor):
    """How much each lattice point of an axis counts at each pixel: blend and blend times offset."""
    position = torch.arange(length, device=like.device, dtype=like.dtype) * cells[:, None] / length
    lattice = torch.arange(points, device=like.device, dtype=like.dtype)
    offset = position[..., None] - lattice  # (B, length, points): 0 at the point, 1 a cell further
    distance = offset.abs().clamp(max=1)  # points further than a cell have no say
    fade = distance**3 * (distance * (6 * distance - 15) + 10)  # 6u^5 - 15u^4 + 10u^3
    blend = 1 - fade
    return blend, blend * offset


def perlin_masks(
    count, size, generator, device="cpu", max_exponent=5, threshold=0.5, foreground=None, attempts=6
) -> Tensor:
    """Irregular masks (count, 1, size, size) in {0, 1}, none of them empty (M of D12).

    Perlin noise with 2^k cells per axis, k ~ U{0..max_exponent}, turned by U(-90°, 90°) and cut at
    `threshold`. What lies outside the foreground (count, 1, size, size) is removed; a soft one
    makes soft masks, as in the released code. One draw in 20 is empty, one in 3 if a tenth of the
    image is foreground. A mask that is empty after all `attempts` becomes its whole foreground.
    """
    draw, whole = Draw(generator, device), torch.ones(count, 1, size, size, device=device)
    ground = whole if foreground is None else _where(_empty(foreground), whole, foreground)
    masks = torch.zeros_like(ground)
    for _ in range(attempts):
        drawn = _draw_masks(count, size, draw, max_exponent, threshold) * ground
        masks = _where(_empty(masks), drawn, masks)
        if masks.device.type == "cpu" and not _empty(masks).any():
            break  # to ask a card costs more than to draw again
    return _where(_empty(masks), ground, masks)


def _empty(masks: Tensor) -> Tensor:
    """Which masks (B, 1, H, W) mark nothing."""
    return masks.flatten(1).amax(1) == 0


def _draw_masks(count: int, size: int, draw: Draw, max_exponent: int, threshold: float) -> Tensor:
    """One draw of turned, thresholded noise (count, 1, size, size); may be empty."""
    cells = 2 ** draw.integers(0, max_exponent + 1, count, 2)
    points = 2**max_exponent + 1
    angles = draw.uniform(count, points, points, high=2 * math.pi)
    noise = perlin_noise(angles, cells, size, size)
    turn = draw.uniform(count, 1, 1, 1, low=-90, high=90)
    return (_turned(noise[:, None], turn, "bilinear") > threshold).float()


def _turned(images: Tensor, degrees: Tensor, mode: str = "nearest") -> Tensor:
    """Square images (B, C, H, H), turned counter-clockwise by (B, 1, 1, 1); 0 comes in."""
    angle = degrees.flatten().deg2rad()
    c, s, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    affine = torch.stack([c, -s, zero, s, c, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode, align_corners=False)


def estimate_foreground(image: np.ndarray) -> np.ndarray:
    """Where the product is, uint8 (H, W) in {0, 1}, guessed from an image, uint8 (H, W, 3).

    Each pixel's distance from the border's median colour is cut by Otsu's threshold, and gaps are
    closed. If that gives almost nothing or almost everything, the whole image counts.
    """
    from scipy import ndimage
    from skimage.filters import threshold_otsu

    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    distance = np.abs(image - np.median(border, axis=0)).max(-1)
    reach = max(1, len(image) // 24)
    product = ndimage.maximum_filter(distance > threshold_otsu(distance), 4 * reach + 1)
    product = ndimage.minimum_filter(product, 2 * reach + 1)  # gaps are closed, a margin is kept
    whole = not 0.05 <= product.mean() <= 0.95
    return np.ones_like(product, np.uint8) if whole else product.astype(np.uint8)


# Photographs in scikit-image, without those that the toy factory sells: brick, grass, gravel.
BUILT_IN = (
    *("astronaut", "camera", "cell", "chelsea", "coffee", "coins", "hubble_deep_field"),
    *("immunohistochemistry", "moon", "page", "retina", "rocket", "text"),
)


def texture_bank(folder: str | os.PathLike | None = None, size: int = 256) -> Tensor:
    """Foreign textures (K, 3, size, size), uint8: the largest centred square of each image.

    The folder, such as DTD's `images`, is searched with its sub-folders; without one, the
    photographs that scikit-image and scikit-learn ship are taken. Raises FileNotFoundError if it
    does not exist or holds no image, and ValueError for a damaged one.
    """
    if folder is None:
        return _built_in(size)
    root = Path(folder)
    paths = images_under(root, {".jpg", ".jpeg", ".png", ".webp"})
    if not paths:
        what = "holds no jpg, png or webp image" if root.is_dir() else "does not exist"
        raise FileNotFoundError(f"texture folder {root} {what}; DTD's is dtd/images")
    return _squares([read_image(path) for path in tqdm(paths, "textures", leave=False)], size)


@lru_cache(maxsize=2)
def _built_in(size: int) -> Tensor:
    from skimage import data
    from sklearn.datasets import load_sample_images

    arrays = [*(getattr(data, name)() for name in BUILT_IN), *load_sample_images().images]
    return _squares([Image.fromarray(array).convert("RGB") for array in arrays], size)


def _squares(images: list[Image.Image], size: int) -> Tensor:
    squares = [ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR) for image in images]
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()


def crop_textures(bank: Tensor, count: int, size: int, generator: torch.Generator) -> Tensor:
    """Random square crops (count, 3, size, size) in [0, 1] from a bank (K, 3, S, S), uint8."""
    draw = Draw(generator, bank.device)
    which = draw.integers(0, len(bank), count)
    zoom = draw.uniform(count, low=min(1.0, size / bank.shape[-1]))  # crop side over S
    affine = torch.zeros(count, 2, 3, device=bank.device)
    affine[:, 0, 0] = affine[:, 1, 1] = zoom
    affine[:, :, 2] = (1 - zoom)[:, None] * draw.uniform(count, 2, low=-1)
    grid = F.affine_grid(affine, [count, 3, size, size], align_corners=False)
    return F.grid_sample(bank[which].float() / 255, grid, align_corners=False)


def shuffle_grid(images: Tensor, generator: torch.Generator, grid: int = 8) -> Tensor:
    """Cut each image (B, C, H, W) into grid x grid tiles and shuffle them (the paper's source)."""
    _check_divides(grid, *images.shape[-2:])
    tiles = rearrange(images, "b c (i h) (j w) -> b (i j) c h w", i=grid, j=grid)
    order = Draw(generator, images.device).orders(len(images), grid * grid)
    tiles = tiles[torch.arange(len(images), device=images.device)[:, None], order]
    return rearrange(tiles, "b (i j) c h w -> b c (i h) (j w)", i=grid)


def shuffle_strips(
    images: Tensor, generator: torch.Generator | None, strips: int = 8, draws: list | None = None
) -> Tensor:
    """Shuffle columns, then rows, keeping even and odd strips together (the released source).

    Columns: even and odd strips are permuted apart and joined evens first. Rows: all are permuted,
    split into even and odd places, permuted again and joined evens first. `draws` are these five
    permutations, (n,) or of each image (B, n), new[i] = old[perm[i]], unless they are to be drawn.
    """
    _check_divides(strips, *images.shape[-2:])
    half = strips // 2
    if draws is None:
        draw = Draw(generator, images.device)
        draws = [draw.orders(len(images), n) for n in (half, half, strips, half, half)]
    evens, odds, rows, evens_again, odds_again = (d.expand(len(images), -1) for d in draws)
    columns = torch.cat([2 * evens, 2 * odds + 1], 1)
    halves = rows[:, 0::2].gather(1, evens_again), rows[:, 1::2].gather(1, odds_again)
    images = _reorder(images, columns, "h (n w)")
    return _reorder(images, torch.cat(halves, 1), "(n h) w")


def _reorder(images: Tensor, order: Tensor, place: str) -> Tensor:
    """Put the equal strips n of each image, at their `place`, into its own order (B, n)."""
    strips = rearrange(images, f"b c {place} -> b n c h w", n=order.shape[1])
    strips = strips[torch.arange(len(images), device=images.device)[:, None], order]
    return rearrange(strips, f"b n c h w -> b c {place}")


def _check_divides(parts: int, height: int, width: int) -> None:
    if height % parts or width % parts:
        raise ValueError(f"{parts} parts do not divide an image of {height} x {width} pixels")


def augment(images: Tensor, generator: torch.Generator, count: int = 3) -> Tensor:
    """Change each image (B, 3, H, H), in [0, 1], in `count` of ten ways, on 8-bit levels."""
    b, draw = len(images), Draw(generator, images.device)
    chosen, levels = draw.orders(b, len(WAYS)) < count, (images * 255).round()
    for i, (change, *ranges) in enumerate(WAYS):  # all images: a card waits to be asked
        strengths = [draw.uniform(b, n, 1, 1, low=low, high=high) for low, high, n in ranges]
        levels = _where(chosen[:, i], change(levels, *strengths).clamp_(0, 255).round_(), levels)
    return levels / 255


def _sharpened(x: Tensor, strength: Tensor) -> Tensor:
    """Add to what deviates from a 3 x 3 mean, whose middle counts five times; 1 adds nothing."""
    rows = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
    around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    detail = (9 * x[..., 1:-1, 1:-1] - around) / 13
    return x + (strength - 1) * F.pad(detail, [1] * 4)


def _recoloured(x: Tensor, turn: Tensor, saturation: Tensor) -> Tensor:
    """Turn the hue, by a share of HSV's circle, then multiply the distance from grey."""
    (red, green, blue), high = x.split(1, 1), x.amax(1, keepdim=True)
    span = high - x.amin(1, keepdim=True)
    beside = torch.where(high == green, 2 * span + blue - red, 4 * span + red - green)
    hue = torch.where(high == red, green - blue, beside) / span.clamp(min=1) + 6 * turn
    place = (hue + torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)) % 6
    x = high - span * torch.minimum(place, 4 - place).clamp(0, 1)
    red, green, blue = x.split(1, 1)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    return grey + saturation * (x - grey)


def _stretched(x: Tensor) -> Tensor:
    """Make the darkest level of each channel 0 and the lightest 255, unless they are one."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) * 255 / (high - low).clamp(min=1), x)


def _equalized(x: Tensor) -> Tensor:
    """Make the levels of each channel equally frequent."""
    from torchvision.transforms.v2 import functional

    return functional.equalize(x.to(torch.uint8)).float()


# Of whole levels (B, 3, H, H), 0 to 255, and strengths: (B, 1, 1, 1), or (B, 3, 1, 1) by channel.
WAYS = (
    (lambda x, gamma: 255 * (x / 255) ** gamma, (0.5, 2.0, 3)),
    (lambda x, factor, offset: factor * x + offset, (0.8, 1.2, 1), (-30, 30, 1)),  # brightness
    (_sharpened, (0.2, 3.0, 1)),
    (_recoloured, (-0.3, 0.3, 1), (0.5, 1.5, 1)),
    (lambda x, threshold: torch.where(x < threshold, x, 255 - x), (32, 128, 1)),  # solarize
    (lambda x, bits: x - x % 2 ** (8 - bits.floor()), (2, 6, 1)),  # posterize
    *((_turned, (-45, 45, 1)), (lambda x: 255 - x,), (_stretched,), (_equalized,)),
)


@checked
class Synthesis:
    """Settings of the synthetic anomalies; the defaults are the paper's."""

    p_normal: Share = 0.5  # share of images that stay as they are
    max_exponent: Annotated[Natural, Field(le=8)] = 5  # Perlin cells per axis: 2^k, k ~ U{0..this}
    threshold: Number = 0.5  # of the noise
    beta: Range = (0.2, 0.8)  # share of the image that shines through
    p_self: Share = 0.5  # share of objects whose source is the object itself, shuffled
    shuffle: Literal["grid", "strips"] = "grid"  # 8 x 8 tiles (paper), or the released code's
    n_augmentations: Natural = 3  # of ten, on every source; of a self-shuffled one before that
    # Only for tiny: with few textures and short training, a source is found by its colour alone.
    p_match: Share = 0.0  # share of texture sources in the product's own colours
    p_flat: Share = 0.0  # share of sources that are one colour of the image: a part painted over


def blend(image: Tensor, source: Tensor, mask: Tensor, beta: Tensor) -> Tensor:
    """Put a source into an image where the mask says so, beta of the image shining through.

    Image N and source A are (B, 3, H, W), the mask M is (B, 1, H, W), beta (B, 1, 1, 1), all in
    [0, 1]. Source: DiffusionAD, synthetic anomalies.
    """
    return beta * mask * image + (1 - beta) * mask * source + (1 - mask) * image  # D12


def synthesize(
    images: Tensor, is_texture, bank: Tensor, settings: Synthesis, generator, foreground=None
) -> tuple[Tensor, Tensor, Tensor]:
    """Images, masks and labels to train a segmentation network with, from normal images (D12).

    `images` (B, 3, H, W) are square, in [0, 1]. Textures, as `is_texture` (B,) says, always get a
    foreign source from the `bank` (K, 3, S, S) of `texture_bank`; objects get their shuffled selves
    at times. An anomaly lies in the `foreground` (B, 1, H, W), if there is one.
    """
    b, size, draw = len(images), images.shape[-1], Draw(generator, images.device)
    normal, match, shuffled, flat = draw.uniform(4, b)
    both = torch.cat([crop_textures(bank, b, size, generator), images])
    both = augment(both, generator, settings.n_augmentations)
    grey = (images.amax(1) - images.amin(1)).flatten(1).amax(1) < 0.02
    both = _where(grey.repeat(2), both.mean(1, keepdim=True).expand_as(both), both)
    source, own = both.chunk(2)
    if settings.p_match:
        source = _where(match < settings.p_match, match_statistics(source, images, draw), source)
    shuffle = {"grid": shuffle_grid, "strips": shuffle_strips}[settings.shuffle]
    itself = ~is_texture & (shuffled < settings.p_self)
    source = _where(itself, shuffle(own, generator), source)
    if settings.p_flat:
        source = _where(flat < settings.p_flat, own_colour(images, draw), source)

    shape = settings.max_exponent, settings.threshold
    label = (normal >= settings.p_normal).float()
    mask = perlin_masks(b, size, generator, images.device, *shape, foreground)
    mask = mask * label[:, None, None, None]
    low, high = settings.beta
    return blend(images, source, mask, draw.uniform(b, 1, 1, 1, low=low, high=high)), mask, label


def _where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`torch.where` with one condition (B,) per image."""
    return torch.where(condition[:, None, None, None], a, b)


def match_statistics(source: Tensor, image: Tensor, draw: Draw) -> Tensor:
    """Give each source the mean and spread of its image, up to a random gain and offset."""
    gain = draw.uniform(len(source), 1, 1, 1, low=0.5, high=1.5)
    offset = draw.uniform(len(source), 1, 1, 1, low=-0.2, high=0.2)
    spread = source.std((2, 3), keepdim=True).clamp(min=0.02)
    unit = (source - source.mean((2, 3), keepdim=True)) / spread
    wanted = image.std((2, 3), keepdim=True).clamp(min=0.05) * gain
    return (unit * wanted + image.mean((2, 3), keepdim=True) + offset).clamp(0, 1)


def own_colour(images: Tensor, draw: Draw) -> Tensor:
    """One colour picked from each image (B, 3, H, W), as a flat image: a part painted over."""
    pixels = images.flatten(2)
    place = draw.integers(0, pixels.shape[2], len(images), 1, 1)
    return pixels.gather(2, place.expand(-1, 3, 1))[..., None].expand_as(images)
