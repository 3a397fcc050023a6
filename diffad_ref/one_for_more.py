"""One-for-More: a diffusion model that learns products one after the other.

A model that rebuilds an image from almost pure noise has no defect to copy; what it needs to know
of the image comes through a condition that cannot copy one either (`anomaly_masked.py`). When a new
product arrives, the directions that the old ones need are protected (`gradient_projection.py`,
`continual.py`). This file is the detector: how it is trained, how it rebuilds, how it compares.

Li et al.: *One-for-More: Continual Diffusion Model for Anomaly Detection*, CVPR 2025,
arXiv 2502.19848. Formulas O1-O4; A1-A3 and G1-G6 stand in the rooms named above.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffad_ref.anomalies import crop_textures
from diffad_ref.anomaly_masked import AnomalyMaskedNetwork, anomaly_masked_loss
from diffad_ref.backbones import ControlledUNet
from diffad_ref.codecs import CodecConfig, build_codec, draw_latent
from diffad_ref.detector import Detector, Prediction, Rate, Stage
from diffad_ref.diffusion import (
    Schedule,
    add_noise,
    ddim_times,
    ddim_walk,
    draw_noise,
    draw_times,
    implied_noise,
)
from diffad_ref.features import PatchFeatures, ResNetFeatures
from diffad_ref.maps import feature_distance, gaussian_filter
from diffad_ref.nsa import Pasting, paste
from diffad_ref.stable_diffusion import start_from_stable_diffusion
from diffad_ref.texture_sources import texture_bank

# ---------------------------------------------------------------------------------------- config


STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PHOTOGRAPHS = "photographs"  # the tiny profile's stand-in for it: shipped, trained on photographs


@dataclass(frozen=True)
class Config:
    """Sizes and settings; the defaults are the paper's (or its released code's)."""

    image_size: int = 256  # pixels
    start: str | None = STABLE_DIFFUSION  # a name, a folder, PHOTOGRAPHS; None: from scratch
    codec: CodecConfig = field(
        default_factory=lambda: CodecConfig(pretrained=STABLE_DIFFUSION, subfolder="vae")
    )
    # U-Net: Stable Diffusion 1.5.
    width: int = 320
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2  # residual blocks a level
    heads: int = 8  # at every level
    prompt: tuple[int, int] = (77, 768)  # tokens and channels of the empty prompt's embedding
    norm_groups: int = 32
    predicts: str = "noise"  # what the U-Net puts out: "noise" (paper) or the clean "latent"
    # Anomaly-masked network.
    condition_layers: int = 8
    condition_heads: int = 8
    feed_forward: int = 1025
    dropout: float = 0.1
    window: tuple[int, int] | None = (7, 7)  # neighbourhood that attention may not see
    condition_channels: tuple[int, ...] = (16, 16, 32, 32, 96, 96, 256)
    condition_strides: tuple[int, ...] = (1, 1, 2, 1, 2, 1, 2, 1)
    masked_weight: float = 1.0  # of the anomaly-masked loss
    pasting: Pasting = field(default_factory=Pasting)
    # Diffusion.
    schedule: str = "scaled_linear"
    steps: int = 1000  # T
    walk: int = 10  # steps of the reconstruction
    level: int | None = None  # to which z is noised; None: the walk's first. Released: 999
    end_clean: bool = True  # end at the estimate itself; released: at the schedule's first level
    # Comparison.
    features: str = "resnet50"  # or "patches"
    stages_compared: tuple[int, ...] = (1, 2, 3)  # of the ResNet
    sigma: float = 5.0  # pixels, of the map's smoothing
    # One task: 500 epochs of some 1,000 images.
    stages: tuple[Stage, ...] = (
        Stage(
            "task",
            40_000,
            12,
            {"unet": Rate(1e-5), "condition": Rate(1e-5)},
            optimizer="adamw",
            weight_decay=1e-2,
        ),
    )

    @classmethod
    def paper(cls, **changes) -> Config:
        """The published size and settings: 859.5 M + 9.6 M parameters."""
        return replace(cls(), **changes)

    @classmethod
    def tiny(cls, image_size: int = 64, **changes) -> Config:
        """Two CPU cores: latents of 4 x 4 patches, 0.5 M parameters in all."""
        tiny = cls(
            image_size=image_size,
            start=PHOTOGRAPHS,
            codec=CodecConfig("pca", channels=12, factor=4),
            width=24,
            multipliers=(1, 2),
            blocks=1,
            heads=1,
            prompt=(1, 8),
            norm_groups=8,
            predicts="latent",  # few channels cannot carry noise
            walk=2,  # starts at t = 501: a small network cannot paint all from 901
            condition_layers=2,
            condition_heads=1,
            feed_forward=48,
            dropout=0.0,
            condition_channels=(12, 12, 24, 24, 32, 32, 32),
            condition_strides=(1, 1, 2, 1, 2, 1, 1, 1),
            features="patches",
            sigma=2.0,
            stages=(
                Stage(
                    "task",
                    5000,
                    16,
                    {"unet": Rate(2e-3, "cosine", 50), "condition": Rate(2e-3, "cosine", 50)},
                    optimizer="adamw",
                    weight_decay=1e-4,
                    clip=1.0,
                ),
            ),
        )
        return replace(tiny, **changes)


# -------------------------------------------------------------------------------------- detector


class OneForMore(Detector):
    """The continual diffusion detector; `continual.fit_continual` trains it task by task.

    Parameters
    ----------
    config : OneForMore.Config
        `Config.tiny()` or `Config.paper()`.
    """

    Config = Config

    def __init__(self, config: Config | None = None):
        super().__init__()
        self.config = config = config or Config.paper()
        _check(config)
        self.schedule = Schedule.named(config.schedule, config.steps)
        self.codec = build_codec(config.codec)
        self.unet = ControlledUNet(
            config.codec.channels,
            config.width,
            config.multipliers,
            config.blocks,
            config.heads,
            config.prompt,
            config.norm_groups,
        )
        self.condition = AnomalyMaskedNetwork(
            config.width,
            config.condition_layers,
            config.condition_heads,
            config.feed_forward,
            config.dropout,
            config.window,
            config.condition_channels,
            config.condition_strides,
        )
        if config.features == "resnet50":
            self.extractor = ResNetFeatures(config.stages_compared)
        else:
            self.extractor = PatchFeatures()
        self.stages = config.stages
        self.enter(self.stages[-1])
        if config.start == PHOTOGRAPHS:
            start_from_photographs(self)

    def prepare(self, dataset) -> None:
        """Load or learn what comes before all tasks: from photographs, never from their data."""
        if self.config.start not in (None, PHOTOGRAPHS) and not self.unet.prompt.any():
            start_from_stable_diffusion(self.unet, self.config.start)
        size = self.config.image_size
        learns_codec = self.config.codec.kind == "pca"
        self.codec.prepare([{"image": x} for x in photographs(size)] if learns_codec else None)
        if isinstance(self.extractor, PatchFeatures):
            self.extractor.prepare(photographs(size).to(self.device))
        else:
            self.extractor.prepare()

    def enter(self, stage: Stage) -> None:
        """Besides the parts, freeze what a U-Net that has learned before keeps: see `learns`."""
        super().enter(stage)
        if "unet" in stage.lr and self.config.start is not None:
            for name, parameter in self.unet.named_parameters():
                parameter.requires_grad_(learns(name, parameter))

    def training_loss(self, batch, generator=None):
        """Scalars "loss", "noise" and "masked" for a batch of normal images (O1)."""
        x = batch["image"]
        self.check(x)
        generator = generator or torch.Generator().manual_seed(torch.randint(2**62, ()).item())
        with torch.no_grad():
            x_tilde, _ = paste(x, self.config.pasting, generator)
            z_0 = draw_latent(self.codec.posterior(x * 2 - 1), generator)
            eps = draw_noise(z_0, generator)
            t = draw_times((0, len(self.schedule)), x, generator)
            z_t = add_noise(z_0, eps, self.schedule.at(t))
        condition = self.condition(x_tilde)  # A2
        clean = self.condition.features(x)
        losses = {
            "noise": self._error(z_t, t, condition, z_0, eps),
            "masked": self.config.masked_weight * anomaly_masked_loss(condition, clean),  # A3
        }
        return {"loss": sum(losses.values()), **losses}  # O1

    def _error(self, z_t, t, condition, z_0, eps) -> Tensor:
        """Squared error of what the U-Net predicts."""
        output = self.unet(z_t, t, condition).float()
        return F.mse_loss(output, {"noise": eps, "latent": z_0}[self.config.predicts])

    @torch.no_grad()
    def predict(self, images, category_index=None, generator=None):
        """Anomaly map, score and reconstruction of images (B, 3, H, W) in [0, 1].

        One model judges every category, so `category_index` is not looked at. Without a
        generator the noise comes from seed 0.
        """
        self.check(images)
        generator = generator or torch.Generator().manual_seed(0)
        x = images.to(self.device)
        z_0 = self.codec.encode(x * 2 - 1)
        z_hat = self.reconstruct(x, z_0, generator)[-1]
        decoded, rebuilt = (self.codec.picture(self.codec.decode(z), x) for z in (z_0, z_hat))
        anomaly_map = self.compare(decoded, rebuilt)
        return Prediction(
            anomaly_map=anomaly_map,
            score=anomaly_map.flatten(1).amax(1),  # O4
            reconstruction=rebuilt,
            parts={"decoded": decoded},
        )

    @torch.no_grad()
    def reconstruct(self, x: Tensor, z_0: Tensor, generator, level: int | None = None) -> list:
        """Latents (B, C, h, w) after each step of the walk back from almost pure noise (O2).

        Parameters
        ----------
        x : Tensor (B, 3, H, W), in [0, 1]
            The image that the condition describes.
        z_0 : Tensor (B, C, h, w)
            Its latent.
        level : int, optional
            Time step to whose noise it is taken, instead of the config's.
        """
        config, times = self.config, ddim_times(len(self.schedule), self.config.walk)
        level = config.level if level is None else level
        t = torch.full((len(z_0),), times[0] if level is None else level, device=z_0.device)
        z_t = add_noise(z_0, draw_noise(z_0, generator), self.schedule.at(t))
        # The condition stays the same all the way. Guidance between two equal conditions, which
        # the released code computes, changes nothing and is left out.
        condition = self.condition(x)
        end = 1.0 if config.end_clean else self.schedule.abar[0].item()
        states, _ = ddim_walk(
            lambda z, t: self.noise(z, t, condition), z_t, self.schedule, times, end
        )  # O2
        return states

    def noise(self, z_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The noise (B, C, h, w) that the U-Net sees in latents at time steps t (B,)."""
        output = self.unet(z_t, t, condition)
        if self.config.predicts == "noise":
            return output
        return implied_noise(z_t, output, self.schedule.at(t))

    @torch.no_grad()
    def compare(self, decoded: Tensor, rebuilt: Tensor) -> Tensor:
        """Map (B, H, W) of where two images (B, 3, H, W) in [0, 1] have other features."""
        features = (self.extractor(x) for x in (decoded, rebuilt))
        return gaussian_filter(
            feature_distance(*features, self.config.image_size), self.config.sigma
        )  # O3


@lru_cache(maxsize=1)
def photographs(size: int, count: int = 1000) -> Tensor:
    """Crops (count, 3, size, size) of the built-in photographs, in [0, 1]; no product is on any."""
    return crop_textures(texture_bank(), count, size, torch.Generator().manual_seed(0))


def start_from_photographs(detector: OneForMore) -> None:
    """Begin where the shipped network ended, which has learned to paint from photographs alone.

    What Stable Diffusion is to the paper's network. It does not fit other networks than the tiny
    profile's: ValueError.
    """
    from diffad_ref.checkpoints import SHIPPED, load_weights, read_tensors  # which knows this class

    path = SHIPPED / "one_for_more_photographs.safetensors"
    try:
        load_weights(detector, read_tensors(path), path)
    except ValueError as error:
        raise ValueError(f"{error}; start=None begins from scratch at any size") from error


def learns(name: str, parameter: nn.Parameter) -> bool:
    """Whether a weight of the U-Net is trained: those of convolutions, projections, attention.

    Biases, normalisations and the layers of the time embedding stay as they are.
    """
    return (
        name.endswith("weight")
        and parameter.ndim > 1
        and "time_emb" not in name  # time_embedding and each block's time_emb_proj
    )


def _check(config: Config) -> None:
    """The condition must fit the U-Net's first features, and the latent its levels."""
    factor = config.codec.factor
    if math.prod(config.condition_strides) != factor:
        raise ValueError(
            f"the condition is 1/{math.prod(config.condition_strides)} of the image, latents are "
            f"1/{factor}: choose condition_strides whose product is {factor}"
        )
    multiple = factor * 2 ** (len(config.multipliers) - 1)
    if config.image_size % multiple:
        raise ValueError(f"image_size must be a multiple of {multiple}, not {config.image_size}")
    if ddim_times(config.steps, config.walk)[0] >= config.steps:
        raise ValueError(
            f"a walk of {config.walk} steps would start outside of the schedule's {config.steps}: "
            "choose a number that divides it"
        )
    if config.features not in ("resnet50", "patches"):
        raise ValueError(f"features are 'resnet50' or 'patches', not {config.features!r}")
    if config.predicts not in ("noise", "latent"):
        raise ValueError(f"predicts is 'noise' or 'latent', not {config.predicts!r}")
