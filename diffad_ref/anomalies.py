"""Synthetic anomalies for training: where (Perlin noise), what (a foreign texture), how much.

A detector that has never seen a defect learns from invented ones. They need not look real; they
must be irregular in shape and foreign in content (D12). Everything is batched and stays on the
device of the images; every random number comes from the generator that the caller passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from diffad_ref.patches import cut, join

# ----------------------------------------------------------------------------- where: Perlin masks


def perlin_noise(angles: Tensor, cells: Tensor, height: int, width: int) -> Tensor:
    """Two-dimensional Perlin noise, a batch at once, as two matrix products.

    In each lattice cell the noise blends four ramps, one per corner gradient. The blend weights
    and the ramps factor into a part of the row and a part of the column, so the whole image is
    bilinear in the gradients: no pixel is ever looped over, and no corner ever gathered.

    Parameters
    ----------
    angles : Tensor (B, L, L)
        Direction of the gradient at each lattice point, in radians. Of a sample with r0 x r1
        cells the first (r0 + 1) x (r1 + 1) points are used.
    cells : Tensor (B, 2), long
        Lattice cells along rows and along columns, each at most L - 1.
    height, width : int
        Size of the image in pixels.

    Returns
    -------
    Tensor (B, height, width), about within [-1, 1].

    Source: Perlin 2002, with the scaling of golden case 1g.
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
    count: int,
    size: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    max_exponent: int = 5,
    threshold: float = 0.5,
    foreground: Tensor | None = None,
    attempts: int = 20,
) -> Tensor:
    """Irregular masks (count, 1, size, size) in {0, 1}, none of them empty (M of D12).

    Perlin noise with 2^k cells per axis, k ~ U{0..max_exponent}, turned by U(-90°, 90°) and cut at
    `threshold`; what lies outside the foreground is removed, and empty masks are drawn again.

    Parameters
    ----------
    foreground : Tensor (count, 1, size, size), optional
        Where anomalies may lie; soft values make soft masks, as in the released code.
    attempts : int
        Redraws before a stubborn mask (a tiny foreground, say) becomes its whole foreground.
    """
    masks = torch.zeros(count, 1, size, size, device=device)
    todo = torch.arange(count, device=device)
    for _ in range(attempts):
        drawn = _draw_masks(len(todo), size, generator, device, max_exponent, threshold)
        if foreground is not None:
            drawn = drawn * foreground[todo]
        masks[todo] = drawn
        todo = todo[drawn.flatten(1).amax(1) == 0]
        if len(todo) == 0:
            return masks
    whole = torch.ones_like(masks[todo]) if foreground is None else foreground[todo]
    empty = whole.flatten(1).amax(1) == 0
    masks[todo] = torch.where(empty[:, None, None, None], torch.ones_like(whole), whole)
    return masks


def _draw_masks(count, size, generator, device, max_exponent, threshold) -> Tensor:
    """One draw of turned, thresholded noise (count, 1, size, size); may be empty."""
    exponent = torch.randint(
        0, max_exponent + 1, (count, 2), generator=generator, device=generator.device
    )
    points = 2**max_exponent + 1
    angles = (
        2
        * math.pi
        * torch.rand(count, points, points, generator=generator, device=generator.device)
    )
    turn = (torch.rand(count, generator=generator, device=generator.device) - 0.5) * math.pi
    noise = perlin_noise(angles.to(device), (2**exponent).to(device), size, size)
    turned = F.grid_sample(
        noise[:, None], _turned_grid(turn.to(device), size), align_corners=False
    )  # zero outside
    return (turned > threshold).float()


def _turned_grid(turn: Tensor, size: int) -> Tensor:
    """Pixel centres in [-1, 1]², turned by an angle (B,): (B, size, size, 2), x before y.

    What `affine_grid` makes, but that multiplies a 3-vector a pixel; here a pixel costs two sums.
    """
    centres = (torch.arange(size, device=turn.device) + 0.5) * 2 / size - 1
    c, s = turn.cos()[:, None] * centres, turn.sin()[:, None] * centres  # (B, size)
    grid = torch.empty(len(turn), size, size, 2, device=turn.device)
    torch.sub(c[:, None, :], s[:, :, None], out=grid[..., 0])
    torch.add(s[:, None, :], c[:, :, None], out=grid[..., 1])
    return grid


# ------------------------------------------------------------------------ what: sources of texture


def shuffle_grid(images: Tensor, generator: torch.Generator, grid: int = 8) -> Tensor:
    """Cut each image (B, C, H, W) into grid x grid tiles and shuffle them (the paper's source)."""
    h, w = images.shape[-2:]
    _check_divides(grid, h, w)
    tiles = cut(images, h // grid, w // grid)  # (B, grid², C, H/grid, W/grid)
    order = (
        torch.rand(len(images), grid * grid, generator=generator, device=generator.device)
        .argsort(1)
        .to(images.device)
    )
    return join(tiles[torch.arange(len(images), device=images.device)[:, None], order], h, w)


def shuffle_strips(
    images: Tensor, generator: torch.Generator | None, strips: int = 8, draws: list | None = None
) -> Tensor:
    """Shuffle columns, then rows, keeping even and odd strips together (the released source).

    Columns: even and odd strips are permuted apart and joined evens first. Rows: all are permuted,
    split into even and odd places, permuted again and joined evens first.

    Parameters
    ----------
    images : Tensor (B, C, H, W)
    draws : list of five permutations, optional
        For the columns (evens, odds) and the rows (all, evens, odds), where new[i] = old[perm[i]];
        drawn when not given.
    """
    _check_divides(strips, *images.shape[-2:])
    half = strips // 2
    if draws is None:
        sizes = (half, half, strips, half, half)
        draws = [torch.randperm(n, generator=generator, device=generator.device) for n in sizes]
    evens, odds, rows, evens_again, odds_again = draws
    number = torch.arange(strips)
    columns = torch.cat([number[0::2][evens], number[1::2][odds]])
    rows = torch.cat([number[rows][0::2][evens_again], number[rows][1::2][odds_again]])
    return _reorder(_reorder(images, columns, -1), rows, -2)


def _reorder(images: Tensor, order: Tensor, dim: int) -> Tensor:
    """Put equal strips along `dim` into a new order."""
    strips = images.unflatten(dim, (len(order), -1))
    return strips.index_select(dim - 1, order.to(images.device)).flatten(dim - 1, dim)


def _check_divides(parts: int, height: int, width: int) -> None:
    if height % parts or width % parts:
        raise ValueError(f"{parts} parts do not divide an image of {height} x {width} pixels")


def crop_textures(bank: Tensor, count: int, size: int, generator: torch.Generator) -> Tensor:
    """Random square crops (count, 3, size, size) in [0, 1] from a bank (K, 3, S, S), uint8."""
    which = torch.randint(len(bank), (count,), generator=generator, device=generator.device)
    share = min(1.0, size / bank.shape[-1])
    zoom = share + (1 - share) * torch.rand(
        count, generator=generator, device=generator.device
    )  # crop side over S
    shift = (1 - zoom)[:, None] * (
        2 * torch.rand(count, 2, generator=generator, device=generator.device) - 1
    )
    affine = torch.zeros(count, 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = zoom
    affine[:, :, 2] = shift
    images = bank[which.to(bank.device)].float() / 255
    grid = F.affine_grid(affine.to(bank.device), [count, 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _between(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator, device=generator.device).item()


# Ten ways to make a texture less familiar; each takes uint8 images (N, 3, H, W) and a generator.
AUGMENTATIONS = (
    lambda x, g: vision.adjust_gamma(x, _between(0.5, 2.0, g)),
    lambda x, g: vision.adjust_brightness(x, _between(0.8, 1.2, g)),
    lambda x, g: vision.adjust_sharpness(x, _between(0.2, 3.0, g)),
    lambda x, g: vision.adjust_saturation(
        vision.adjust_hue(x, _between(-0.3, 0.3, g)), _between(0.5, 1.5, g)
    ),
    lambda x, g: vision.solarize(x, _between(32, 128, g)),
    lambda x, g: vision.posterize(x, int(_between(2, 6, g))),
    lambda x, g: vision.invert(x),
    lambda x, g: vision.autocontrast(x),
    lambda x, g: vision.equalize(x),
    lambda x, g: vision.rotate(x, _between(-45, 45, g)),
)


def augment(images: Tensor, generator: torch.Generator, count: int = 3) -> Tensor:
    """Apply `count` of the ten augmentations to each image (B, 3, H, W) in [0, 1].

    Each image draws its own set; images that share an augmentation share its strength, so that
    each augmentation runs once a batch.
    """
    chosen = torch.rand(
        len(images), len(AUGMENTATIONS), generator=generator, device=generator.device
    ).argsort(1)[:, :count]
    out = (images * 255).round().to(torch.uint8)
    for i, change in enumerate(AUGMENTATIONS):
        mine = (chosen == i).any(1).nonzero().flatten().to(images.device)
        if len(mine):
            out[mine] = change(out[mine], generator)
    return out.float() / 255


def match_statistics(source: Tensor, image: Tensor, generator: torch.Generator) -> Tensor:
    """Give each source the mean and spread of its image, up to a random gain and offset.

    A source that is far from the product's own colours is found by its colour alone; such a
    detector fails on defects that are not colourful.
    """
    n = len(source)
    gain = (0.5 + torch.rand(n, 1, 1, 1, generator=generator, device=generator.device)).to(source)
    offset = (
        0.4 * (torch.rand(n, 1, 1, 1, generator=generator, device=generator.device) - 0.5)
    ).to(source)
    spread = source.std((2, 3), keepdim=True).clamp(min=0.02)
    unit = (source - source.mean((2, 3), keepdim=True)) / spread
    wanted = image.std((2, 3), keepdim=True).clamp(min=0.05) * gain
    return (unit * wanted + image.mean((2, 3), keepdim=True) + offset).clamp(0, 1)


def own_colour(images: Tensor, generator: torch.Generator) -> Tensor:
    """One colour picked from each image (B, 3, H, W), as a flat image: a part painted over."""
    flat = images.flatten(2)
    place = torch.randint(
        flat.shape[2], (len(images), 1, 1), generator=generator, device=generator.device
    )
    colour = flat.gather(2, place.to(images.device).expand(-1, 3, 1))
    return colour[..., None].expand_as(images)


# --------------------------------------------------------------------------------------- together


def blend(image: Tensor, source: Tensor, mask: Tensor, beta: Tensor) -> Tensor:
    """Put a source into an image where the mask says so, beta of the image shining through.

    Parameters
    ----------
    image, source : Tensor (B, 3, H, W), in [0, 1]
        N and A of the paper.
    mask : Tensor (B, 1, H, W), in [0, 1]
    beta : Tensor (B, 1, 1, 1), in [0, 1]

    Source: DiffusionAD, synthetic anomalies.
    """
    return beta * mask * image + (1 - beta) * mask * source + (1 - mask) * image  # D12


@dataclass(frozen=True)
class Synthesis:
    """Settings of the synthetic anomalies; the defaults are the paper's."""

    p_normal: float = 0.5  # share of images that stay as they are
    max_exponent: int = 5  # Perlin cells per axis: 2^k, k ~ U{0..max_exponent}
    threshold: float = 0.5  # of the noise
    beta: tuple[float, float] = (0.2, 0.8)  # share of the image that shines through
    p_self: float = 0.5  # share of objects whose source is the object itself, shuffled
    shuffle: str = "grid"  # "grid": 8 x 8 tiles (paper); "strips": the released code
    n_augmentations: int = 3  # of ten, on texture sources
    p_match: float = 0.0  # share of texture sources in the product's own colours (not in the paper)
    p_flat: float = 0.0  # share of sources that are one colour of the image (not in the paper)


@dataclass
class Synthetic:
    """A batch after synthesis: image (B, 3, H, W), mask (B, 1, H, W), label (B,) in {0, 1}."""

    image: Tensor
    mask: Tensor
    label: Tensor


def synthesize(
    images: Tensor,
    is_texture: Tensor,
    bank: Tensor,
    settings: Synthesis,
    generator: torch.Generator,
    foreground: Tensor | None = None,
) -> Synthetic:
    """Turn normal images into a training batch for the segmentation network (D12).

    Parameters
    ----------
    images : Tensor (B, 3, H, W), in [0, 1]
        Normal images; square.
    is_texture : Tensor (B,), bool
        Textures always get a foreign source; objects get their shuffled selves at times.
    bank : Tensor (K, 3, S, S), uint8
        Foreign textures, see `texture_sources.texture_bank`.
    foreground : Tensor (B, 1, H, W), optional
        Where an anomaly may lie.
    """
    b, size = len(images), images.shape[-1]
    draw = torch.rand(4, b, generator=generator, device=generator.device).to(images.device)
    source = augment(crop_textures(bank, b, size, generator), generator, settings.n_augmentations)
    grey = (images.amax(1) - images.amin(1)).flatten(1).amax(1) < 0.02
    source = _where(grey, source.mean(1, keepdim=True).expand_as(source), source)
    matched = match_statistics(source, images, generator)
    source = _where(draw[1] < settings.p_match, matched, source)
    if settings.p_self:
        shuffle = {"grid": shuffle_grid, "strips": shuffle_strips}[settings.shuffle]
        source = _where(
            ~is_texture & (draw[2] < settings.p_self), shuffle(images, generator), source
        )
    if settings.p_flat:
        source = _where(draw[3] < settings.p_flat, own_colour(images, generator), source)

    mask = perlin_masks(
        b, size, generator, images.device, settings.max_exponent, settings.threshold, foreground
    )
    low, high = settings.beta
    beta = (
        low + (high - low) * torch.rand(b, 1, 1, 1, generator=generator, device=generator.device)
    ).to(images.device)
    label = (draw[0] >= settings.p_normal).float()
    mask = mask * label[:, None, None, None]
    return Synthetic(blend(images, source, mask, beta), mask, label)


def _where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`torch.where` with one condition (B,) per image."""
    return torch.where(condition[:, None, None, None], a, b)
