"""DeCo-Diff: the anomaly is the noise, and the model predicts the way back to normal.

Standard diffusion drowns the whole image in noise and rebuilds all of it. Here only some patches
of a latent are corrupted in training, and what is learned is the deviation of each place from its
normal state: zero where nothing is wrong. At inference no noise is added at all: the image's defect
takes the place of the corruption, and a few correction steps remove it; normal regions stay.

Beizaee, Lodygensky, Desrosiers, Dolz: *Correcting Deviations from Normality*, CVPR 2025,
arXiv 2503.19357. Formulas C1-C10.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from diffad_ref.codecs import CodecConfig, build_codec, draw_latent
from diffad_ref.detector import (
    Count,
    Detector,
    Levels,
    Natural,
    NotNegative,
    Positive,
    Prediction,
    Range,
    Rate,
    Resample,
    Share,
    Sigma,
    Stage,
    Stages,
    checked,
    network_fits,
    said_by,
)
from diffad_ref.diffusion import Draw, Schedule
from diffad_ref.maps import clip_and_scale, enlarge, gaussian_filter
from diffad_ref.networks import LatentUNet

# Width, heads and context of the five published networks.
SIZES = {"XS": (64, 4, 128), "S": (128, 4, 256), "M": (192, 6, 384)}
SIZES |= {"L": (256, 8, 512), "XL": (320, 12, 640)}
ODDS = (0.3, 0.25, 0.2, 0.15, 0.1)  # of patches of 1, 2, 4, 8 and 16 latent cells
PAPER_RATE = Rate(1e-4, "cosine", warmup=130, horizon=1.5)  # 10 epochs of 13 steps


@checked
class Corruption:
    """How latents are corrupted; the defaults are the paper's, for 32 x 32 cells."""

    patch_sizes: tuple[Count, ...] = (1, 2, 4, 8, 16)  # latent cells; one is drawn a batch
    patch_odds: tuple[NotNegative, ...] = ODDS
    mask_ratio: Range = (0.0, 0.7)  # share of patches that are corrupted
    foreign_ratio: Range = (0.0, 0.3)  # share of patches that are foreign, not noise

    @classmethod
    def of_side(cls, side: int) -> "Corruption":
        """For latents of so many cells a side: powers of 2 that divide it, up to half of it."""
        table = {2**k: p for k, p in enumerate(ODDS) if 2 * 2**k <= side and side % 2**k == 0}
        return cls(tuple(table), tuple(p / sum(table.values()) for p in table.values()))

    def check(self, side: int) -> None:
        """Refuse patches that do not divide latents of so many cells a side."""
        sizes, odds = self.patch_sizes, self.patch_odds
        if not sum(odds) or len(sizes) != len(odds) or any(side % patch for patch in sizes):
            found = f"patches of {sizes} cells with odds {odds}"
            raise ValueError(f"{found} do not divide latents of {side} cells, or lack odds")


@checked
class Config:
    """Sizes and settings; the defaults are the paper's (or its released code's)."""

    image_size: Count = 256  # pixels
    resize: Count = 288  # pixels of the images that are cropped to image_size
    resample: Resample = "bicubic"  # how images shrink to it
    shift: Natural = 4  # pixels by which every second training crop may move, on each axis
    turned: Share = 0.0  # share of training crops that stand on their head; released: 0.5 for VisA
    classes: Count = 15  # rows of the class table
    codec: CodecConfig = CodecConfig()
    # Network.
    width: Count = 256
    multipliers: Levels = (1, 2, 4)
    blocks: Count = 2  # residual blocks a level
    heads: Count = 8  # of the first level
    context: Count = 512  # width of a class token
    dropout: Share = 0.4
    norm_groups: Count = 32
    # Corruption and correction.
    schedule: str = "cosine"
    steps: Count = 10  # T
    corruption: Corruption = Corruption()
    times: tuple[Natural, ...] = (8, 6, 4, 2, 0)  # time steps of the correction: 5 of the 10
    # Scoring.
    fusion: Literal["geometric", "arithmetic", "image", "latent"] = "geometric"
    image_clip: Positive = 0.4  # of a difference of images in [-1, 1]
    image_sigma: Sigma = 3.0  # pixels
    latent_clip: Positive = 0.2
    latent_sigma: Sigma = 1.0  # latent cells
    # 800 epochs of 13 steps of 256 images, a tenth of MVTec AD's being held out; the cosine would
    # reach 0 after 1,200.
    stages: Stages = (
        Stage("correction", 10_400, 128, {"corrector": PAPER_RATE}, "adamw", 1e-4, accumulate=2),
    )

    def __post_init__(self):
        network_fits(self, self.codec.factor * 2 ** (len(self.multipliers) - 1), ("corrector",))
        self.corruption.check(self.image_size // self.codec.factor)
        if self.resize < self.image_size or self.shift >= self.image_size:
            found = f"{self.image_size} pixels, moved by {self.shift}"
            raise ValueError(f"images of {self.resize} pixels cannot be cropped to {found}")
        check_times(self.times, self.steps)

    @classmethod
    def paper(cls, size: str = "L", image_size: int = 256, **changes) -> "Config":
        """The published settings with one of the five networks; L, the paper's, has 395 M."""
        if size not in SIZES:
            raise ValueError(f"unknown size {size!r}; there are {', '.join(SIZES)}")
        network = dict(zip(("width", "heads", "context"), SIZES[size], strict=True))
        corruption = Corruption.of_side(image_size // CodecConfig().factor)
        paper = cls(image_size, image_size * 9 // 8, corruption=corruption, **network)
        return replace(paper, **changes)

    @classmethod
    def tiny(cls, image_size: int = 64, **changes) -> "Config":
        """Two CPU cores: latents of 4 x 4 patches, a network of 1.8 M parameters."""
        rate = {"corrector": Rate(5e-4, "cosine", warmup=200)}
        network = {"width": 32, "multipliers": (1, 2, 2), "blocks": 1, "heads": 2, "context": 64}
        network |= {"dropout": 0.0, "norm_groups": 8}  # nothing to spare
        maps = {"image_sigma": 1.0, "latent_sigma": 0.5, "latent_clip": 0.3}
        tiny = dict(
            image_size=image_size,
            resize=image_size,  # no pixel to spare for a margin
            resample="antialiased",
            classes=6,
            codec=CodecConfig("pca", channels=12, factor=4),
            **network | maps,
            corruption=Corruption.of_side(image_size // 4),
            stages=(Stage("correction", 12_000, 16, rate, "adamw", 1e-4, clip=1.0),),
        )
        return cls(**tiny | changes)

    @classmethod
    def small(cls, image_size: int = 128, **changes) -> "Config":
        """Meant for a GPU and little time: latents of 4 x 4 patches, 11.2 M parameters."""
        rate = {"corrector": Rate(4e-4, "cosine", warmup=100)}
        network = {"width": 64, "multipliers": (1, 2, 3), "blocks": 1, "heads": 4, "context": 128}
        small = replace(
            cls.tiny(image_size),
            **network | {"dropout": 0.1, "norm_groups": 16},
            resize=image_size * 9 // 8,
            classes=15,
            codec=CodecConfig("pca", channels=16, factor=4),
            **{"image_sigma": 2.0, "latent_sigma": 1.0},
            stages=(Stage("correction", 3000, 64, rate, "adamw", 1e-4, clip=1.0),),
        )
        return replace(small, **changes)


# ------------------------------------------------------------------------------------- corruption
def corrupt(z_0: Tensor, eps: Tensor, m: Tensor, abar: Tensor) -> Tensor:
    """Corrupt a latent z_0 (B, C, h, w) with eps (B, C, h, w) where its mask m (B, 1, h, w) is 0.

    A place with m = 1 stays as it is; abar (B, 1, 1, 1) of the signal is left in the others.
    """
    return m * z_0 + (1 - m) * (abar.sqrt() * z_0 + (1 - abar).sqrt() * eps)  # C1


def deviation(z_0: Tensor, eps: Tensor, m: Tensor, abar: Tensor) -> Tensor:
    """Direction in which a latent, corrupted by `corrupt`, deviates from normal; 0 where m = 1.

    It is made so that z_t = z_0 + sqrt(1 - abar) eta everywhere (C4).
    """
    return (1 - m) * (eps - signal_share(abar) * z_0)  # C3


def signal_share(abar: Tensor) -> Tensor:
    """How much of z_0 a deviation takes away."""
    return (1 - abar.sqrt()) / (1 - abar).sqrt()


def mix_noise(gaussian: Tensor, foreign: Tensor, n: Tensor) -> Tensor:
    """Gaussian noise where n (B, 1, h, w) is 1, foreign content elsewhere (all (B, C, h, w))."""
    return n * gaussian + (1 - n) * foreign  # C2


def shuffle_patches(z: Tensor, patch: int, order: Tensor) -> Tensor:
    """Shuffle the patches of a whole batch (B, C, H, W): they wander from image to image.

    Patches are numbered image by image, then row by row; patch i becomes patch order[i] (B n,).
    """
    b, _, h, _ = z.shape
    patches = rearrange(z, "b c (i p) (j q) -> (b i j) c p q", p=patch, q=patch)
    return rearrange(patches[order], "(b i j) c p q -> b c (i p) (j q)", b=b, i=h // patch)


def patch_mask(kept: Tensor, order: Tensor, patch: int, side: int) -> Tensor:
    """Masks (B, 1, side, side): 1 in the first `kept` (B,) patches of an order (B, n)."""
    stays = (torch.arange(order.shape[1], device=order.device) < kept[:, None]).float()
    mask = torch.zeros_like(stays).scatter(1, order, stays).view(len(order), 1, side // patch, -1)
    return mask.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def draw_corruption(
    z_0: Tensor, settings: Corruption, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Where latents (B, C, h, h) stay clean, m (B, 1, h, h), and what disturbs them, eps (C2)."""
    b, side, draw = len(z_0), z_0.shape[-1], Draw(generator, z_0.device)
    ranges = settings.mask_ratio, settings.foreign_ratio
    kept = 1 - torch.cat([draw.uniform(b, low=low, high=high) for low, high in ranges])
    masks = kept.new_zeros(2 * b, 1, side, side)  # m, then n
    cells = place = torch.arange(b * side**2, device=z_0.device).view(b, 1, side, side)
    point = draw.uniform(1, high=sum(settings.patch_odds))
    starts = accumulate(settings.patch_odds, initial=0.0)
    for patch, start in zip(settings.patch_sizes, starts, strict=False):  # one start too many
        # Asking which size was drawn, a card would wait. All are made; the last that began stays.
        drawn, count = point >= start, (side // patch) ** 2  # patches of a latent
        made = patch_mask((count * kept).long(), draw.orders(2 * b, count), patch, side)
        masks = torch.where(drawn, made, masks)
        shuffled = shuffle_patches(cells, patch, draw.orders(1, b * count)[0])
        place = torch.where(drawn, shuffled, place)
    foreign = rearrange(z_0, "b c h w -> (b h w) c")[place[:, 0]].movedim(-1, 1)
    m, n = masks.chunk(2)
    return m, mix_noise(draw.normal(*z_0.shape), foreign, n)


def moved_crop(images: Tensor, size: int, shift: int, generator: torch.Generator) -> Tensor:
    """The middle (B, C, size, size) of images, moved in every second one; or mirrored."""
    if images.shape[-1] == size:  # no margin to move in
        images = F.pad(images, [shift] * 4, mode="reflect")
    b, margin = len(images), (images.shape[-1] - size) // 2
    reach, draw = min(shift, margin), Draw(generator, images.device)
    corner = margin + draw.integers(-reach, reach + 1, b, 2) * (draw.uniform(b, 1) < 0.5)
    places = images.unfold(2, size, 1).unfold(3, size, 1)  # (B, C, H - size + 1, …, size, size)
    return places[torch.arange(b, device=images.device), :, corner[:, 0], corner[:, 1]]


# ------------------------------------------------------------------------------------- correction
def check_times(times: Sequence[int], steps: int) -> None:
    """Refuse time steps that do not fall, or are not of a schedule of so many."""
    falling = [steps, *times, -1]
    if not times or falling != sorted(set(falling), reverse=True):
        raise ValueError(f"time steps must fall, from {steps - 1} at most, not {times}")


@torch.no_grad()
def correct(
    model: Callable, z: Tensor, schedule: Schedule, times: Sequence[int], rescale: bool = False
) -> list[Tensor]:
    """Lead latents back to normal, step by step; no noise is ever added (C6).

    Parameters
    ----------
    model : callable (z, t) -> eta
        Predicts the deviation of z (B, C, h, w) at time steps t (B,).
    z : Tensor (B, C, h, w)
        Latents as they are: what deviates in them takes the place of the corruption.
    times : sequence of int
        Time steps, falling. The latents after every one are returned.
    rescale : bool
        The deviation of a corrupted place depends on the noise level (C3). False, as released,
        keeps the direction. True fits it to the next level: the steps of DDIM, which are exact
        where everything is corrupted.
    """
    check_times(times, len(schedule))
    levels = [torch.full((len(z),), t, device=z.device) for t in times]
    abars, states = [schedule.at(t) for t in levels], []
    for t, abar, abar_prev in zip(levels, abars, [*abars[1:], None], strict=True):
        eta = model(z, t)
        z = z - (1 - abar).sqrt() * eta  # C6, first line: C4 solved for z_0
        if abar_prev is not None:
            if rescale:
                eta = eta + (signal_share(abar) - signal_share(abar_prev)) * z
            z = z + (1 - abar_prev).sqrt() * eta  # C6
        states.append(z)
    return states


# ------------------------------------------------------------------------------------ discrepancy
def image_discrepancy(x_hat: Tensor, x_0: Tensor, clip: float = 0.4, sigma: float = 3.0) -> Tensor:
    """How far decoded images (B, 3, H, W) in [-1, 1] lie apart: map (B, H, W) in [0, 1]."""
    difference = (x_hat - x_0).abs().amax(1)
    return gaussian_filter(clip_and_scale(difference, clip), sigma)  # C7


def latent_discrepancy(
    z_hat: Tensor, z_0: Tensor, size: int, clip: float = 0.2, sigma: float = 1.0
) -> Tensor:
    """How far latents (B, C, h, w) lie apart: map (B, size, size) in [0, 1]; sigma counts cells."""
    difference = (z_hat - z_0).abs().mean(1)
    return enlarge(gaussian_filter(clip_and_scale(difference, clip), sigma), size)  # C8


FUSIONS = {
    "geometric": lambda image, latent: (image * latent).sqrt(),  # C9
    "arithmetic": lambda image, latent: (image + latent) / 2,
    "image": lambda image, latent: image,
    "latent": lambda image, latent: latent,
}


# -------------------------------------------------------------------------------------- detector
class DecoDiff(Detector):
    """Deviation correction in the latent space of a codec, one model for many classes."""

    Config = Config
    started_from = None  # whose weights its network began with, if not with random ones

    def __init__(self, config: Config | None = None):
        super().__init__(config)
        c = self.config
        self.schedule = Schedule.named(c.schedule, c.steps)
        self.codec = build_codec(c.codec)
        network = (c.width, c.multipliers, c.blocks, c.heads, c.context, c.dropout, c.norm_groups)
        self.corrector = LatentUNet(c.codec.channels, c.classes, *network)
        self.enter(self.stages[-1])

    def prepare(self, dataset) -> None:
        """Train or load the codec, before the first step of a training run."""
        names, classes = said_by(dataset, "categories", ()), self.config.classes
        if len(names) > classes:
            found = f"{len(names)} categories do not fit into a table of {classes} classes"
            raise ValueError(f"{found}; build the detector with classes=...")
        if (theirs := said_by(dataset, "codec")) is None:
            return self.codec.prepare(dataset)
        pairs = zip(self.codec.state_dict().values(), theirs.state_dict().values(), strict=True)
        if theirs.config != self.codec.config or not all(a.equal(b.to(a)) for a, b in pairs):
            raise ValueError("these are latents of another codec than this detector's")

    def identity(self):
        """What it started from."""
        return {"imagenet": self.started_from}

    def training_loss(self, batch, generator):
        """Scalar "loss" for a batch of normal images, or of their latents (C5)."""
        with torch.no_grad():
            z_0 = self.latents(batch, generator)
            c, draw = batch["category_index"], Draw(generator, z_0.device)
            t = draw.integers(0, len(self.schedule), len(z_0))
            abar = self.schedule.at(t)
            m, eps = draw_corruption(z_0, self.config.corruption, generator)  # C2
            z_t, eta = corrupt(z_0, eps, m, abar), deviation(z_0, eps, m, abar)  # C1, C3
        return {"loss": F.mse_loss(self.corrector(z_t, t, c).float(), eta)}  # C5

    def latents(self, batch, generator) -> Tensor:
        """What is learned from: latents of moved crops, or of posteriors computed before."""
        if "posterior" in batch:
            return draw_latent(batch["posterior"], generator)
        config, x = self.config, batch["image"]
        x = moved_crop(x, config.image_size, config.shift, generator)
        if config.turned:
            turned = Draw(generator, x.device).uniform(len(x), 1, 1, 1) < config.turned
            x = torch.where(turned, x.flip(2, 3), x)
        return self.codec.sample(x, generator)

    def judge(self, x, category_index, generator):
        """Correct and compare; nothing is random here."""
        z_0 = self.codec.encode(x)
        return self.compare(z_0, self.reconstruct(z_0, category_index)[-1])

    def reconstruct(self, z, category_index, times=None, rescale: bool = False) -> list[Tensor]:
        """Latents (B, C, h, w) after each correction step; the steps default to the config's."""
        c = torch.as_tensor(category_index, device=z.device)
        times = self.config.times if times is None else times
        return correct(lambda z, t: self.corrector(z, t, c), z, self.schedule, times, rescale)

    @torch.no_grad()
    def compare(self, z_0, z_hat, fusion: str | None = None) -> Prediction:
        """Judge corrected latents beside the original ones, both (B, C, h, w)."""
        config = self.config
        # The codec's own loss is in both, and so in neither's difference.
        x_0, x_hat = self.codec.decode(torch.cat([z_0, z_hat])).chunk(2)
        image = image_discrepancy(x_hat, x_0, config.image_clip, config.image_sigma)
        limits = config.latent_clip, config.latent_sigma
        latent = latent_discrepancy(z_hat, z_0, config.image_size, *limits)
        anomaly_map = FUSIONS[fusion or config.fusion](image, latent)
        parts = {"image_discrepancy": image, "latent_discrepancy": latent}
        score = anomaly_map.flatten(1).amax(1)  # C10
        parts |= {"decoded": self.codec.picture(x_0), "z_0": z_0, "z_hat": z_hat}
        return Prediction(anomaly_map, score, self.codec.picture(x_hat), parts)
