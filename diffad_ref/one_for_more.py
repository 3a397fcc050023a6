"""One-for-More: a diffusion model that learns products one after the other.

A model that rebuilds an image from almost pure noise has no defect to copy; what it needs to know
of the image comes through a condition that learns to overlook one (`anomaly_masked.py`). When a new
product arrives, the directions that the old ones need are protected (`gradient_projection.py`,
`continual.py`). This file is the detector: how it is trained, how it rebuilds, how it compares.

Li et al.: *One-for-More: Continual Diffusion Model for Anomaly Detection*, CVPR 2025,
arXiv 2502.19848. Formulas O1-O4.
"""

import math
from dataclasses import replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from diffad_ref.anomaly_masked import AnomalyMaskedNetwork, anomaly_masked_loss
from diffad_ref.checkpoints import load_shipped, load_weights
from diffad_ref.codecs import CodecConfig, build_codec
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
    Share,
    Sigma,
    Stage,
    Stages,
    checked,
    network_fits,
    ordered,
)
from diffad_ref.diffusion import Draw, Schedule, add_noise, ddim_times, ddim_walk, implied_noise
from diffad_ref.maps import feature_distance, features_of, gaussian_filter
from diffad_ref.networks import latent_unet, stable_diffusion

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PHOTOGRAPHS = "photographs"  # the tiny profile's stand-in for it: shipped, trained on photographs
PAPER_RATES = {"unet": Rate(1e-5), "condition": Rate(1e-5)}


@checked
class Pasting:
    """How patches are pasted; the defaults are those of One-for-More."""

    share: Share = 0.5  # of images that get any patch
    most: Count = 4  # patches an image; the first always, each further one with p = 0.5
    size: Range = (0.03, 0.4)  # half-width of a patch, as a share of the side
    scale: Annotated[tuple[Positive, Positive], ordered] = (0.7, 1.3)  # by which it is resized
    # Patches come from another image of it, or of the same class, or from the image itself.
    source: Literal["batch", "class", "itself"] = "batch"


@checked
class Config:
    """Sizes and settings; the defaults are the paper's (or its released code's)."""

    image_size: Count = 256  # pixels
    start: str | None = STABLE_DIFFUSION  # a name, a folder, PHOTOGRAPHS; None: from scratch
    codec: CodecConfig = CodecConfig(pretrained=STABLE_DIFFUSION, subfolder="vae")
    # U-Net: Stable Diffusion 1.5.
    width: Count = 320
    multipliers: Levels = (1, 2, 4, 4)
    blocks: Count = 2  # residual blocks a level
    heads: Count = 8  # at every level
    prompt: tuple[Count, Count] = (77, 768)  # tokens and channels of the empty prompt's embedding
    norm_groups: Count = 32
    # Anomaly-masked network.
    condition_layers: Count = 8
    condition_heads: Count = 8
    feed_forward: Count = 1025
    dropout: Share = 0.1
    window: tuple[Count, Count] | None = (7, 7)  # that attention may not see; None: it sees all
    condition_channels: tuple[Count, ...] = (16, 16, 32, 32, 96, 96, 256)
    condition_strides: tuple[Count, ...] = (1, 1, 2, 1, 2, 1, 2, 1)
    masked_weight: NotNegative = 1.0  # of the anomaly-masked loss
    pasting: Pasting = Pasting()
    # Diffusion.
    schedule: str = "scaled_linear"
    steps: Count = 1000  # T
    walk: Count = 10  # steps of the reconstruction
    level: Natural | None = None  # to which z is noised; None: the walk's first. Released: 999
    end_clean: bool = True  # end at the estimate itself; released: at the schedule's first level
    # Comparison.
    stages_compared: tuple[Annotated[Natural, Field(le=4)], ...] = (1, 2, 3)  # of the ResNet
    sigma: Sigma = 5.0  # pixels, of the map's smoothing
    gamma: Share = 0.999  # share of a task's energy that the memory protects
    every: Count = 10  # the memory gathers over every so-manyth training image
    features: str = "resnet50"  # or any other network that timm has pretrained; or "patches"
    stages: Stages = (Stage("task", None, 12, PAPER_RATES, "adamw", weight_decay=1e-2, epochs=500),)
    # Only for tiny; the paper has the defaults.
    predicts: Literal["noise", "latent"] = "noise"  # the clean one: few channels carry no noise

    def __post_init__(self):
        factor, width = self.codec.factor, self.width
        network_fits(self, factor * 2 ** (len(self.multipliers) - 1), ("unet", "condition"))
        if math.prod(self.condition_strides) != factor:
            raise ValueError(f"the product of condition_strides must be {factor}")
        if len(self.condition_strides) != len(self.condition_channels) + 1:
            raise ValueError("condition_strides has one more than condition_channels: the width's")
        if width % self.condition_heads or width % 2:
            raise ValueError(f"condition_heads, and 2, must divide the width of {width}")
        if self.multipliers[0] != 1:
            raise ValueError(f"multipliers begin with 1, as the condition, not {self.multipliers}")
        if ddim_times(self.steps, self.walk)[0] >= self.steps:
            raise ValueError(f"a walk of {self.walk} steps would leave the schedule's {self.steps}")
        if self.level is not None and self.level >= self.steps:
            raise ValueError(f"level must be below the schedule's {self.steps} steps")
        if self.features == "patches" and self.image_size < 20:
            raise ValueError("patches are compared in images of 20 pixels or more")

    @classmethod
    def paper(cls, **changes) -> "Config":
        """The published size and settings: 859.5 M + 9.6 M parameters."""
        return replace(cls(), **changes)

    @classmethod
    def tiny(cls, image_size: int = 64, **changes) -> "Config":
        """Two CPU cores: latents of 4 x 4 patches, 0.5 M parameters in all."""
        parts = dict.fromkeys(("unet", "condition"), Rate(2e-3, "cosine", warmup=50))
        unet = {"width": 24, "multipliers": (1, 2), "blocks": 1, "heads": 1, "prompt": (1, 8)}
        condition = {"condition_layers": 2, "condition_heads": 1, "feed_forward": 48}
        condition |= {"condition_channels": (12, 12, 24, 24, 32, 32, 32), "dropout": 0.0}
        tiny = dict(
            image_size=image_size,
            start=PHOTOGRAPHS,
            codec=CodecConfig("pca", channels=12, factor=4),
            **unet | condition | {"norm_groups": 8, "sigma": 2.0, "gamma": 0.9999, "every": 1},
            condition_strides=(1, 1, 2, 1, 2, 1, 1, 1),
            walk=2,  # starts at t = 501: a small network cannot paint all from 901
            stages=(Stage("task", 5000, 16, parts, "adamw", weight_decay=1e-4, clip=1.0),),
            predicts="latent",
            features="patches",  # principal components, learned in a second
        )
        return cls(**tiny | changes)

    @classmethod
    def small(cls, image_size: int = 128, **changes) -> "Config":
        """Meant for a GPU and little time: 3.3 M parameters, and features that know ImageNet."""
        parts = dict.fromkeys(("unet", "condition"), Rate(1e-3, "cosine", warmup=50))
        small = replace(
            cls.tiny(image_size),
            start=None,
            **{"width": 64, "heads": 2, "condition_layers": 4, "sigma": 4.0},
            codec=CodecConfig("pca", channels=16, factor=4),
            features="tf_efficientnet_lite0",
            stages=(Stage("task", 2500, 32, parts, "adamw", weight_decay=1e-4, clip=1.0),),
        )
        return replace(small, **changes)


# ----------------------------------------------------------------------------------------- U-Net
class ConditionedConv(nn.Conv2d):
    """A convolution that adds to its output what comes behind its own channels, if anything."""

    def forward(self, x: Tensor) -> Tensor:
        z, f = x.tensor_split([self.in_channels], 1)
        return super().forward(z) + f if f.shape[1] else super().forward(z)


class ControlledUNet(nn.Module):
    """Stable Diffusion's U-Net, at any size, with condition features and a constant prompt.

    The prompt is (tokens, channels) of the text embedding. It is that of the empty prompt
    throughout, so it is a constant; zeros, until it is set, switch the text's influence off. There
    is attention at all levels but the last, unless they are named. The rest as in `adm_unet`.
    """

    def __init__(
        self, channels, width, multipliers, blocks, heads, prompt, norm_groups, attention_levels=()
    ):
        super().__init__()
        widths, levels = [width * m for m in multipliers], range(len(multipliers))
        levels = attention_levels or levels[:-1]
        self.unet = latent_unet(channels, widths, blocks, heads, prompt[1], norm_groups, levels)
        self.unet.conv_in.__class__ = ConditionedConv
        self.register_buffer("prompt", torch.zeros(1, *prompt))

    def forward(self, z: Tensor, t: Tensor, f: Tensor | None = None) -> Tensor:
        """Output (B, C, h, w) for latents z, time steps t (B,) and features f (B, width, h, w).

        The condition is added right after the first convolution, before anything branches off.
        """
        both = z if f is None else torch.cat([z, f], 1)
        return self.unet(both, t, self.prompt.expand(len(z), -1, -1)).sample


def learns(name: str, parameter: nn.Parameter) -> bool:
    """Whether a weight is trained: no bias, no normalisation, no layer of the time embedding."""
    return name.endswith("weight") and parameter.ndim > 1 and "time_emb" not in name


# ------------------------------------------------------------------- natural synthetic anomalies
# A pasted rectangle is found by its edges. Poisson blending keeps the gradients of the patch and
# takes the colours from around it, so that only its content is wrong (Schlüter et al., ECCV 2022).


def paste(images: Tensor, settings: Pasting, generator: torch.Generator, classes=None) -> Tensor:
    """Paste blended patches into some images (B, 3, H, H), in [0, 1], of a batch.

    `classes` (B,) are asked for if patches come from the same class; an image that is alone in its
    class gives them to itself.
    """
    b, draw, pasted = len(images), Draw(generator, images.device), images.clone()
    source = everyone = torch.arange(b, device=images.device)
    if settings.source == "batch" and b > 1:
        source = (everyone + draw.integers(1, b, b)) % b
    elif settings.source == "class":
        other = (classes[:, None] == classes) & (everyone[:, None] != everyone)
        source = torch.where(other.any(1), (other * draw.uniform(b, b)).argmax(1), everyone)
    more = draw.uniform(settings.most, b) < 0.5
    more[:1] = draw.uniform(b) < settings.share
    for gets in more.cumprod(0).bool():
        # A card would wait to be asked which these are; it is sooner done with everyone.
        some = everyone[gets] if images.device.type == "cpu" else everyone
        drawn = paste_patch(pasted[some], images[source[some]], settings, draw)
        drawn = (drawn * 255).round() / 255
        pasted[some] = torch.where(gets[some, None, None, None], drawn, pasted[some])
    return pasted


def paste_patch(images: Tensor, sources: Tensor, settings: Pasting, draw: Draw) -> Tensor:
    """Cut a rectangle from each source, resize it, blend it in elsewhere; all (B, 3, H, H)."""
    side, shape = images.shape[-1], (len(images), 2, 1)  # rows and columns
    (low, high), (smallest, largest) = settings.size, settings.scale
    half = (side * draw.uniform(*shape, low=low, high=high)).long().clamp(2, side // 2 - 2)
    size = (2 * half * draw.uniform(*shape, low=smallest, high=largest)).long()
    size = size.clamp(6, side - 4)  # less is hardly seen; more has no ground around it
    start = (draw.uniform(*shape) * (side - 2 * half)).long()
    corner = 1 + (draw.uniform(*shape) * (side - 1 - size)).long()
    place = torch.arange(side, device=images.device) - corner  # (B, 2, H)
    origin = torch.minimum(((place + 0.5) * (2 * half / size)).clamp(min=0.5), 2 * half - 0.5)
    y, x = (2 * (start + origin) / side - 1).unbind(1)
    grid = torch.stack(torch.broadcast_tensors(x[:, None], y[:, :, None]), -1)
    return poisson(images, F.grid_sample(sources, grid, align_corners=False), corner, size)


def poisson(images: Tensor, patches: Tensor, corner: Tensor, size: Tensor) -> Tensor:
    """Blend a rectangle of patches into images, all (B, 3, H, H) in [0, 1].

    Inside the rectangle, `size` (B, 2, 1) pixels from its `corner` (B, 2, 1), the result has the
    Laplacian of the patch; its outermost pixels, none at an edge, stay those of the image. So
    patch and result differ by a membrane, held along the border where image and patch differ. It
    is a sum of sine waves, each as high as it is pulled, and less the more it curves.
    """
    place = torch.arange(images.shape[-1], device=size.device) - corner  # (B, 2, H)
    last = size - 1  # where the border is, besides 0
    rows, columns = ((place > 0) & (place < last)).split(1, 1)
    inside = rows[..., None] & columns[..., None, :]  # (B, 1, H, H), for pixels and for waves
    turns = place[..., None] * place[..., None, :] % (2 * last[..., None])  # halves, exact
    sines = (2 / last[..., None]).sqrt() * (math.pi / last[..., None] * turns).sin()
    rows, columns = sines.split(1, 1)  # (B, 1, H, H), each its own inverse
    high, wide = (2 - 2 * (math.pi / last * place).cos()).split(1, 1)

    gap = torch.where(inside, 0, images - patches)
    pull = sum(gap.roll(step, axis) for step in (-1, 1) for axis in (2, 3)) * inside
    waves = rows @ pull @ columns / (high[..., None] + wide[..., None, :])
    membrane = rows @ torch.where(inside, waves, 0) @ columns
    return torch.where(inside, patches + membrane, images).clamp(0, 1)


# -------------------------------------------------------------------------------------- detector
class OneForMore(Detector):
    """The continual diffusion detector; `continual.fit_continual` trains it task by task."""

    Config = Config

    def __init__(self, config: Config | None = None):
        super().__init__(config)
        c = self.config
        self.schedule = Schedule.named(c.schedule, c.steps)
        self.codec = build_codec(c.codec)
        size = c.width, c.multipliers, c.blocks, c.heads, c.prompt, c.norm_groups
        self.unet = ControlledUNet(c.codec.channels, *size)
        layers = c.condition_layers, c.condition_heads, c.feed_forward, c.dropout, c.window
        shape = c.condition_channels, c.condition_strides
        self.condition = AnomalyMaskedNetwork(c.width, *layers, *shape)
        self.condition.look_at(*[c.image_size // c.codec.factor] * 2)
        self.extractor = features_of(c.features, c.stages_compared)
        self.enter(self.stages[-1])

    @torch.no_grad()
    def prepare(self, dataset) -> None:
        """Load what comes before all tasks; or learn codec and features from a `dataset`."""
        if self.codec.is_ready():
            return  # a later task
        start, own = self.config.start, ["extractor"] * (self.config.features != "patches")
        if start == PHOTOGRAPHS:
            load_shipped(self, "one_for_more_photographs", own)
        elif start is not None:
            load_weights(self.unet, stable_diffusion(start), f"Stable Diffusion {start!r}")
        self.codec.prepare(dataset)
        self.extractor.prepare(dataset)

    def enter(self, stage: Stage) -> None:
        """Besides the parts, freeze what a U-Net that has learned before keeps: see `learns`."""
        super().enter(stage)
        if "unet" in stage.lr and self.config.start is not None:
            for name, parameter in self.unet.named_parameters():
                parameter.requires_grad_(learns(name, parameter))

    def training_loss(self, batch, generator):
        """Scalars "loss", "noise" and "masked" for a batch of normal images (O1)."""
        x, draw = batch["image"], Draw(generator, batch["image"].device)
        with torch.no_grad():
            with torch.autocast(x.device.type, enabled=False):  # bf16 would blend grey levels away
                x_tilde = paste(x, self.config.pasting, generator, batch.get("category_index"))
            z_0 = self.codec.sample(x, generator)
            eps = draw.normal(*z_0.shape)
            t = draw.integers(0, len(self.schedule), len(x))
            z_t = add_noise(z_0, eps, self.schedule.at(t))
        f = self.condition(x_tilde)  # A2
        output = self.unet(z_t, t, f).float()
        target = {"noise": eps, "latent": z_0}[self.config.predicts]
        noise = F.mse_loss(output, target)
        masked = anomaly_masked_loss(f, self.condition.features(x))  # A3
        total = noise + self.config.masked_weight * masked  # O1
        return {"loss": total, "noise": noise, "masked": masked}

    def judge(self, x, category_index, generator):
        """Rebuild and compare; one model judges every category."""
        z_0 = self.codec.encode(x)
        z_hat = self.reconstruct(x, z_0, generator)[-1]
        decoded, rebuilt = (self.codec.picture(self.codec.decode(z)) for z in (z_0, z_hat))
        anomaly_map = self.compare(decoded, rebuilt)
        score = anomaly_map.flatten(1).amax(1)  # O4
        return Prediction(anomaly_map, score, rebuilt, {"decoded": decoded})

    @torch.no_grad()
    def reconstruct(self, x: Tensor, z_0: Tensor, generator, walk: int | None = None) -> list:
        """Latents (B, C, h, w) after each step of the walk back from almost pure noise (O2).

        The condition describes the image x (B, 3, H, W), in [0, 1], the walk starts at its latent
        z_0; the number of its steps defaults to the config's.
        """
        config, schedule = self.config, self.schedule
        times = ddim_times(len(schedule), walk or config.walk)
        level = times[0] if config.level is None else config.level
        t = torch.full((len(z_0),), level, device=z_0.device)
        eps = Draw(generator, z_0.device).normal(*z_0.shape)
        # The condition stays the same all the way. Guidance between two equal conditions, which
        # the released code computes, changes nothing and is left out. A copy, because recorded
        # launches (`compile`) would write the next output over this one.
        f = self.condition(x).clone()  # A2
        end = 1.0 if config.end_clean else schedule.abar[0].item()
        z_t = add_noise(z_0, eps, schedule.at(t))
        return ddim_walk(lambda z, t: self.noise(z, t, f), z_t, schedule, times, end)[0]  # O2

    def noise(self, z_t: Tensor, t: Tensor, f: Tensor) -> Tensor:
        """The noise (B, C, h, w) that the U-Net sees in latents at time steps t (B,)."""
        output = self.unet(z_t, t, f)
        if self.config.predicts == "noise":
            return output
        return implied_noise(z_t, output, self.schedule.at(t))

    @torch.no_grad()
    def compare(self, decoded: Tensor, rebuilt: Tensor) -> Tensor:
        """Map (B, H, W) of where two images (B, 3, H, W) in [0, 1] have other features (O3)."""
        features = ([f.clone() for f in self.extractor(x)] for x in (decoded, rebuilt))
        distance = feature_distance(*features, self.config.image_size)
        return gaussian_filter(distance, self.config.sigma)  # O3
