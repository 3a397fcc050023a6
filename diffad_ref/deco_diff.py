"""DeCo-Diff: the anomaly is the noise, and the model predicts the way back to normal.

Standard diffusion drowns the whole image in noise and rebuilds all of it. Here only some patches
of a latent are corrupted in training, and what is learned is the deviation of each place from its
normal state: zero where nothing is wrong. At inference no noise is added at all. The image itself
is the starting point, its defect takes the place of the corruption, and a few correction steps
remove it; normal regions stay. One model serves all classes.

Beizaee, Lodygensky, Desrosiers, Dolz: *Correcting Deviations from Normality*, CVPR 2025,
arXiv 2503.19357. Formulas C1-C10 are numbered as in the book.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from diffad_ref.backbones import LatentUNet
from diffad_ref.codecs import Codec, CodecConfig, build_codec, draw_latent
from diffad_ref.detector import Detector, Prediction, Rate, Stage, check_categories, class_indices
from diffad_ref.diffusion import Schedule, draw_times, respaced
from diffad_ref.images import check_images, moved_crop
from diffad_ref.maps import clip_and_scale, enlarge, gaussian_filter
from diffad_ref.masking import visibility
from diffad_ref.patches import Corruption, draw_corruption
from diffad_ref.spins import grid_moves, mean_in_place, move

# ---------------------------------------------------------------------------------------- config

# Width, heads and context of the five published networks.
SIZES = {
    "XS": (64, 4, 128),
    "S": (128, 4, 256),
    "M": (192, 6, 384),
    "L": (256, 8, 512),
    "XL": (320, 12, 640),
}


@dataclass(frozen=True)
class Config:
    """Sizes and settings; the defaults are the paper's (or its released code's)."""

    image_size: int = 256  # pixels
    resize: int = 288  # pixels of the images that are cropped to image_size
    shift: int = 4  # pixels by which every second training crop may move, on each axis
    classes: int = 15  # rows of the class table
    codec: CodecConfig = field(default_factory=CodecConfig)
    # Network.
    width: int = 256
    multipliers: tuple[int, ...] = (1, 2, 4)
    blocks: int = 2  # residual blocks a level
    heads: int = 8  # of the first level
    context: int = 512  # width of a class token
    dropout: float = 0.4
    norm_groups: int = 32
    # Corruption.
    schedule: str = "cosine"
    steps: int = 10  # T
    corruption: Corruption = field(default_factory=Corruption)
    # Correction.
    times: tuple[int, ...] = (8, 6, 4, 2, 0)  # time steps of the correction: 5 of the 10
    rescale: bool = False  # fit the direction to the next noise level between steps
    spins: int = 1  # places of the codec's grid, on each axis, that a map is averaged over
    # Scoring.
    fusion: str = "geometric"  # or "arithmetic", "image", "latent"
    image_clip: float = 0.4  # of a difference of images in [-1, 1]
    image_sigma: float = 3.0  # pixels
    latent_clip: float = 0.2
    latent_sigma: float = 1.0  # latent cells
    masking: float = 0.0  # contrast, of images in [-1, 1], that halves a difference; 0 none
    # 800 epochs of MVTec AD's 3,629 images; the cosine would reach 0 after 1,200.
    stages: tuple[Stage, ...] = (
        Stage(
            "correction",
            22_700,
            128,
            {"corrector": Rate(1e-4, "cosine", warmup=284, horizon=1.5)},
            optimizer="adamw",
            weight_decay=1e-4,
        ),
    )

    @classmethod
    def paper(cls, size: str = "L", image_size: int = 256, **changes) -> Config:
        """The published settings with one of the five networks; L, the paper's, has 395 M."""
        if size not in SIZES:
            raise ValueError(f"unknown size {size!r}; there are {', '.join(SIZES)}")
        width, heads, context = SIZES[size]
        paper = cls(
            width=width,
            heads=heads,
            context=context,
            image_size=image_size,
            resize=image_size * 9 // 8,
            corruption=Corruption.of_side(image_size // CodecConfig().factor),
        )
        return replace(paper, **changes)

    @classmethod
    def tiny(cls, image_size: int = 64, **changes) -> Config:
        """Two CPU cores: latents of 4 x 4 patches, a network of 1.8 M parameters."""
        codec = CodecConfig("pca", channels=12, factor=4)
        tiny = cls(
            image_size=image_size,
            resize=image_size,
            classes=6,
            codec=codec,
            width=32,
            multipliers=(1, 2, 2),
            blocks=1,
            heads=2,
            context=64,
            dropout=0.0,  # a small network has nothing to spare
            norm_groups=8,
            corruption=Corruption.of_side(image_size // codec.factor),
            image_sigma=1.0,
            latent_sigma=0.5,
            latent_clip=0.3,
            stages=(
                Stage(
                    "correction",
                    12_000,
                    16,
                    {"corrector": Rate(5e-4, "cosine", warmup=200)},
                    optimizer="adamw",
                    weight_decay=1e-4,
                    clip=1.0,
                ),
            ),
        )
        return replace(tiny, **changes)


# ------------------------------------------------------------------------------------- corruption


def corrupt(z_0: Tensor, eps: Tensor, mask: Tensor, abar: Tensor) -> Tensor:
    """Corrupt a latent where its mask is 0.

    Parameters
    ----------
    z_0, eps : Tensor (B, C, h, w)
        Clean latent and what disturbs it.
    mask : Tensor (B, 1, h, w)
        1 keeps a place as it is.
    abar : Tensor (B, 1, 1, 1)
        Signal left in a corrupted place, in [0, 1].
    """
    return mask * z_0 + (1 - mask) * (abar.sqrt() * z_0 + (1 - abar).sqrt() * eps)  # C1


def deviation(z_0: Tensor, eps: Tensor, mask: Tensor, abar: Tensor) -> Tensor:
    """Direction in which a corrupted latent deviates from normal; 0 where it does not.

    It is made so that z_t = z_0 + sqrt(1 - abar) eta everywhere (C4). Arguments as for `corrupt`.
    """
    return (1 - mask) * (eps - signal_share(abar) * z_0)  # C3


def signal_share(abar: Tensor | float) -> Tensor | float:
    """How much of z_0 a deviation takes away: (1 - sqrt(abar)) / sqrt(1 - abar)."""
    return (1 - abar**0.5) / (1 - abar) ** 0.5


# ------------------------------------------------------------------------------------- correction


@torch.no_grad()
def correct(
    model: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    schedule: Schedule,
    times: Sequence[int],
    rescale: bool = False,
) -> list[Tensor]:
    """Lead latents back to normal, step by step; no noise is ever added (C6).

    Parameters
    ----------
    model : callable (z, t) -> eta
        Predicts the deviation of z (B, C, h, w) at time steps t (B,).
    z : Tensor (B, C, h, w)
        Latents as they are: what deviates in them takes the place of the corruption.
    times : sequence of int
        Time steps, falling.
    rescale : bool
        The deviation of a corrupted place depends on the noise level (C3). False, as released,
        takes the same direction to the next level. True fits it, which is exact where everything
        is corrupted: the steps are then those of DDIM.

    Returns
    -------
    list of Tensor (B, C, h, w)
        The latents after every step; the last is the corrected one.
    """
    falling = [len(schedule), *times, -1]
    if not times or falling != sorted(set(falling), reverse=True):
        raise ValueError(f"time steps must fall, from {len(schedule) - 1} at most, not {times}")
    states = []
    abars = [*schedule.abar[list(times)].tolist(), 1.0]  # no deviation is left at the end
    for t, abar, abar_prev in zip(times, abars, abars[1:], strict=False):
        eta = model(z, torch.full((len(z),), t, device=z.device))
        z_hat = z - (1 - abar) ** 0.5 * eta  # C4, solved for z_0
        if rescale and abar_prev < 1:
            eta = eta + (signal_share(abar) - signal_share(abar_prev)) * z_hat
        z = z_hat + (1 - abar_prev) ** 0.5 * eta  # C6
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
    """How far latents (B, C, h, w) lie apart, at the image's size: map (B, size, size) in [0, 1].

    Smoothed before it is enlarged; `sigma` counts latent cells.
    """
    difference = (z_hat - z_0).abs().mean(1)
    return enlarge(gaussian_filter(clip_and_scale(difference, clip), sigma), size)  # C8


FUSIONS = {
    "geometric": lambda image, latent: (image * latent).sqrt(),  # C9
    "arithmetic": lambda image, latent: (image + latent) / 2,
    "image": lambda image, latent: image,
    "latent": lambda image, latent: latent,
}


def image_score(anomaly_map: Tensor) -> Tensor:
    """How abnormal an image is: the largest value (B,) of its map (B, H, W)."""
    return anomaly_map.flatten(1).amax(1)  # C10


# -------------------------------------------------------------------------------------- detector


class DecoDiff(Detector):
    """Deviation correction in the latent space of a codec, one model for many classes.

    Parameters
    ----------
    config : DecoDiff.Config
        `Config.tiny()` or `Config.paper()`.
    codec : Codec, optional
        Ready for use; by default the config's, which `fit` trains or loads first.
    """

    Config = Config

    def __init__(self, config: Config | None = None, codec: Codec | None = None):
        super().__init__()
        config = config or Config.paper()
        self.config = config = replace(config, codec=codec.config) if codec else config
        self.schedule = Schedule.named(config.schedule, config.steps)
        self.codec = codec or build_codec(config.codec)
        size, factor = config.image_size, config.codec.factor
        self.codec.check(size)
        self.moves = grid_moves(factor, config.spins)
        config.corruption.check(size // factor)
        multiple = factor * 2 ** (len(config.multipliers) - 1)
        if size % multiple:
            raise ValueError(f"image_size must be a multiple of {multiple}, not {size}")
        self.corrector = LatentUNet(
            config.codec.channels,
            config.classes,
            config.width,
            config.multipliers,
            config.blocks,
            config.heads,
            config.context,
            config.dropout,
            config.norm_groups,
        )
        self.stages = config.stages
        self.enter(self.stages[-1])

    def prepare(self, dataset) -> None:
        """Train or load the codec, before the first step of a training run."""
        check_categories(getattr(dataset, "categories", ()), self.config.classes)
        self.codec.prepare(dataset)

    def training_loss(self, batch, generator=None):
        """Scalar "loss" for a batch of normal images, or of their latents (C5)."""
        generator = generator or torch.Generator().manual_seed(torch.randint(2**62, ()).item())
        with torch.no_grad():
            if (posterior := batch.get("posterior")) is None:
                check_images(batch["image"])
                x = moved_crop(batch["image"], self.config.image_size, self.config.shift, generator)
                posterior = self.codec.posterior(x * 2 - 1)
            z_0 = draw_latent(posterior, generator)
            category = self._classes(batch.get("category_index"), len(z_0))
            t = draw_times((0, len(self.schedule)), z_0, generator)
            abar = self.schedule.at(t)
            mask, eps = draw_corruption(z_0, self.config.corruption, generator)
            z_t, eta = corrupt(z_0, eps, mask, abar), deviation(z_0, eps, mask, abar)
        return {"loss": F.mse_loss(self.corrector(z_t, t, category).float(), eta)}  # C5

    @torch.no_grad()
    def predict(
        self,
        images,
        category_index=None,
        generator=None,
        *,
        steps: int | None = None,
        start: int | None = None,
        times: Sequence[int] | None = None,
        rescale: bool | None = None,
        fusion: str | None = None,
    ):
        """Anomaly map, score and corrected image of images (B, 3, H, W) in [0, 1].

        Nothing is random here: the generator is not used.

        Parameters
        ----------
        category_index : Tensor (B,), long
            Class of each image, as in `self.categories`.
        steps, start : int
            Steps kept of the T, and how many of those are taken: the least noisy; default all.
        times, rescale, fusion
            Instead of the config's.
        """
        self.check(images)
        images, found = images.to(self.device), []
        for x in (move(images, *way) for way in self.moves):
            z_0 = self.encode(x)
            states = self.reconstruct(z_0, category_index, steps, start, times, rescale)
            found.append(self.compare(z_0, states[-1], fusion, x))
        anomaly_map = mean_in_place([f.anomaly_map for f in found], self.moves)
        return replace(found[0], anomaly_map=anomaly_map, score=image_score(anomaly_map))

    def encode(self, images: Tensor) -> Tensor:
        """Mean latent (B, C, h, w) of images (B, 3, H, W) in [0, 1]."""
        return self.codec.encode(images * 2 - 1)

    def reconstruct(
        self, z, category_index, steps=None, start=None, times=None, rescale=None
    ) -> list[Tensor]:
        """Latents (B, C, h, w) after each correction step; arguments as in `predict`."""
        category = self._classes(category_index, len(z))
        if times is None:
            times = self.config.times
            if steps is not None or start is not None:
                kept = respaced(len(self.schedule), len(times) if steps is None else steps)
                times = kept[:start][::-1]
        rescale = self.config.rescale if rescale is None else rescale
        return correct(
            lambda z, t: self.corrector(z, t, category), z, self.schedule, times, rescale
        )

    @torch.no_grad()
    def compare(self, z_0, z_hat, fusion: str | None = None, images=None) -> Prediction:
        """Judge corrected latents beside the original ones, both (B, C, h, w).

        Pictures are in the light of `images`, or else as the codec sees them.
        """
        fusion, config = fusion or self.config.fusion, self.config
        if fusion not in FUSIONS:
            raise ValueError(f"unknown fusion {fusion!r}; there are {', '.join(FUSIONS)}")
        # The codec's own loss is in both, and so in neither's difference.
        x_0, x_hat = self.codec.decode(torch.cat([z_0, z_hat])).chunk(2)
        seen = visibility(x_hat, config.masking)
        image = image_discrepancy(seen * x_hat, seen * x_0, config.image_clip, config.image_sigma)
        seen = F.adaptive_avg_pool2d(seen, z_0.shape[-2:])
        limits = config.image_size, config.latent_clip, config.latent_sigma
        latent = latent_discrepancy(seen * z_hat, seen * z_0, *limits)
        anomaly_map = FUSIONS[fusion](image, latent)
        return Prediction(
            anomaly_map=anomaly_map,
            score=image_score(anomaly_map),
            reconstruction=self.codec.picture(x_hat, images),
            parts={
                "decoded": self.codec.picture(x_0, images),
                "image_discrepancy": image,
                "latent_discrepancy": latent,
                "z_0": z_0,
                "z_hat": z_hat,
            },
        )

    def _classes(self, category_index, count: int) -> Tensor:
        return class_indices(
            category_index, count, self.config.classes, self.categories, self.device
        )
