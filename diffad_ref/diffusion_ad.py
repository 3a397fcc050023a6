"""DiffusionAD: noise erases a defect, one denoising step rebuilds the normal image.

Noise turns a defective image and a normal one into nearly the same thing; a diffusion model that
has seen only normal images turns it back into a normal one ("noise-to-norm"). One step is enough:
a small noise level keeps detail but may keep the defect, a large one loses both, and norm guidance
blends the two. A segmentation network then compares the image with its reconstruction.

Zhang, Wang, Zeng, Wu, Jiang: *DiffusionAD*, TPAMI 2025, arXiv 2303.08730. Formulas D1-D12; D1 and
D2 stand in `diffusion.py`, D12 in `anomalies.py`.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffad_ref.anomalies import Synthesis, estimate_foreground, synthesize, texture_bank
from diffad_ref.detector import (
    Count,
    Detector,
    Levels,
    Natural,
    Number,
    Prediction,
    Rate,
    Resample,
    Stage,
    Stages,
    checked,
    divide,
    network_fits,
)
from diffad_ref.diffusion import Draw, Schedule, add_noise, implied_noise, predict_x0
from diffad_ref.networks import adm_unet

PAPER_RATES = {"denoiser": Rate(1e-4), "segmenter": Rate(1e-5, "cycle")}


@checked
class Config:
    """Sizes and settings; the defaults are the paper's (or its released code's)."""

    image_size: Count = 256  # pixels
    resample: Resample = "linear"  # how images shrink to it
    # Denoiser: an ADM U-Net.
    width: Count = 128  # channels of its first level
    multipliers: Levels = (1, 1, 2, 2, 4, 4)  # of the width, one a level
    blocks: Count = 2  # residual blocks a level
    attention_levels: tuple[Natural, ...] = (3, 4, 5)  # levels with attention: 32, 16 and 8 pixels
    heads: Count = 4  # attention heads at every width
    norm_groups: Count = 32  # of the group normalisation
    segmentation_width: Count = 64  # channels of the segmentation network's first stage
    # Noise.
    schedule: str = "linear"
    steps: Count = 1000  # T
    t_s_range: tuple[Natural, Natural] = (0, 300)  # small scale in training: 0 .. tau - 1
    t_b_range: tuple[Natural, Natural] = (300, 1000)  # large scale in training: tau .. T - 1
    t_s: Natural = 200  # small scale at inference
    t_b: Natural = 400  # large scale at inference
    w: Number = 1.0  # guidance weight
    # Anomalies and scoring.
    synthesis: Synthesis = Synthesis()
    foreground: str = "estimate"  # where anomalies lie; or a folder of masks, or "whole"
    top_k: Count = 50  # pixels whose mean is the image score
    stages: Stages = (
        Stage("joint", None, 16, PAPER_RATES, epochs=3000, drop_last=True),  # one model a category
    )
    # Only for tiny; the paper has the defaults.
    patch_size: Count = 1  # pixels packed into channels, per axis: costs patch_size² less
    predicts: Literal["noise", "image"] = "noise"  # the clean image: few channels carry no noise
    segmentation_norm: Literal["batch", "group"] = "batch"  # a tiny batch has poor statistics
    draws: Count = 1  # of the noise at inference, averaged: few pixels make a single draw noisy
    built_in_textures: bool = False  # 15 photographs in place of DTD: there without a download

    def __post_init__(self):
        packed = self.patch_size * 2 ** (len(self.multipliers) - 1)
        multiple = math.lcm(packed, 2**5)  # the segmentation network has six levels
        network_fits(self, multiple, ("denoiser", "segmenter"))
        divide([self.width * m for m in self.multipliers], heads=self.heads)
        for name, (first, end) in {"s": self.t_s_range, "b": self.t_b_range}.items():
            if not first < end <= self.steps or getattr(self, f"t_{name}") >= self.steps:
                found = f"t_{name} and t_{name}_range, which rises,"
                raise ValueError(f"{found} must lie in the schedule's {self.steps} steps")
        if self.t_s > self.t_b:
            raise ValueError(f"t_s {self.t_s} is the small scale: it lies below t_b {self.t_b}")
        if not set(self.attention_levels) <= set(range(len(self.multipliers))):
            found = f"attention_levels {self.attention_levels}"
            raise ValueError(f"{found} are not among the {len(self.multipliers)} levels, from 0")
        if self.segmentation_norm == "group" and self.segmentation_width % 4:
            raise ValueError(f"4 groups do not divide a width of {self.segmentation_width}")

    @classmethod
    def paper(cls, **changes) -> "Config":
        """The published size and settings: 131.7 M + 28.4 M parameters."""
        return replace(cls(), **changes)

    @classmethod
    def tiny(cls, image_size: int = 64, **changes) -> "Config":
        """Two CPU cores: a denoiser on 32 x 32 patches, trained first; then the comparison."""
        together = {"denoiser": Rate(2e-5, "cosine", 20), "segmenter": Rate(2e-4, "cosine", 20)}
        size = {"width": 32, "multipliers": (1, 2, 3), "blocks": 1, "attention_levels": (2,)}
        size |= {"norm_groups": 8, "segmentation_width": 12}
        tiny = dict(
            image_size=image_size,
            **size,
            t_s_range=(100, 300),  # what is less noisy keeps every defect
            t_b_range=(300, 600),  # what is noisier shows nothing of a 64-pixel image
            synthesis=Synthesis(max_exponent=3, threshold=0.4, p_match=0.4, p_flat=0.2),
            stages=(
                Stage("denoiser", 4500, 8, {"denoiser": Rate(5e-4, "cosine", 100)}, clip=1.0),
                Stage("segmentation", 2000, 16, {"segmenter": Rate(1e-3, "cosine", 50)}, clip=1.0),
                Stage("joint", 400, 8, together, clip=1.0),
            ),
            patch_size=max(1, image_size // 32),
            predicts="image",
            **{"segmentation_norm": "group", "draws": 8, "built_in_textures": True},
            resample="antialiased",  # or what is thin is lost between 64 pixels
        )
        return cls(**tiny | changes)

    @classmethod
    def small(cls, image_size: int = 128, **changes) -> "Config":
        """Meant for a GPU and little time: 10.5 M parameters, denoising packed 2 x 2 pixels."""
        tiny = cls.tiny(image_size)
        small = replace(
            tiny,
            **{"width": 40, "multipliers": (1, 2, 3, 4), "attention_levels": (3,)},
            **{"patch_size": 2, "segmentation_width": 24, "draws": 4},
            synthesis=replace(tiny.synthesis, max_exponent=4),
            stages=(
                Stage("denoiser", 1700, 16, {"denoiser": Rate(4e-4, "cosine", 50)}, clip=1.0),
                Stage("segmentation", 1100, 16, {"segmenter": Rate(8e-4, "cosine", 30)}, clip=1.0),
                Stage("joint", 200, 16, tiny.stages[-1].lr, clip=1.0),
            ),
        )
        return replace(small, **changes)


# -------------------------------------------------------------------------------------- networks
class Denoiser(nn.Module):
    """Predicts the noise in an image.

    With a patch size p the U-Net works on a p times smaller image with p² times the channels. With
    a schedule it puts out the clean image, and the noise follows from it: noise has no structure
    that a narrow network could squeeze through few channels; an image has.
    """

    def __init__(self, unet: nn.Module, patch_size: int = 1, schedule: Schedule | None = None):
        super().__init__()
        self.unet, self.patch_size, self.schedule = unet, patch_size, schedule

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Noise (B, 3, H, W) predicted in x_t (B, 3, H, W) at time steps t (B,), long."""
        packed = F.pixel_unshuffle(x_t, self.patch_size)  # (B, 3p², H/p, W/p)
        output = F.pixel_shuffle(self.unet(packed, t).sample, self.patch_size)
        return output if self.schedule is None else implied_noise(x_t, output, self.schedule.at(t))


class SegmentationNet(nn.Module):
    """U-Net with six encoder and five decoder stages that compares two images.

    The first stage has `width` channels, the others 2, 4, 8, 8 and 8 times as many; "batch" or
    "group" is the normalisation between convolution and ReLU.
    """

    def __init__(self, in_channels: int = 6, width: int = 64, norm: str = "batch"):
        super().__init__()
        kinds = {"batch": nn.BatchNorm2d, "group": lambda channels: nn.GroupNorm(4, channels)}
        if norm not in kinds:
            raise ValueError(f"norm is 'batch' or 'group', not {norm!r}")

        def conv(i: int, o: int) -> list[nn.Module]:
            return [nn.Conv2d(i, o, 3, padding=1), kinds[norm](o), nn.ReLU(inplace=True)]

        def twice(i: int, o: int) -> nn.Module:
            return nn.Sequential(*conv(i, o), *conv(o, o))

        def up(i: int, o: int) -> nn.Module:
            double = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            return nn.Sequential(double, *conv(i, o))

        w = [width * m for m in (1, 2, 4, 8, 8, 8)]
        outs, skips = (w[4], w[2], w[1], w[0], w[0]), w[-2::-1]
        self.encoder = nn.ModuleList(map(twice, (in_channels, *w[:-1]), w))
        self.upward = nn.ModuleList(map(up, (w[5], *outs[:-1]), outs))
        self.decoder = nn.ModuleList(twice(o + s, o) for o, s in zip(outs, skips, strict=True))
        self.head = nn.Conv2d(w[0], 1, 3, padding=1)

    def forward(self, pair: Tensor) -> Tensor:
        """Probability of a defect (B, 1, H, W) from image and reconstruction (B, 6, H, W)."""
        skips, features = [], pair
        for depth, stage in enumerate(self.encoder):
            features = stage(features if depth == 0 else F.max_pool2d(features, 2))
            skips.append(features)
        skips.pop()
        for upward, stage in zip(self.upward, self.decoder, strict=True):
            features = stage(torch.cat([upward(features), skips.pop()], 1))
        logits = self.head(features)  # in 16 bits a sigmoid is 1 early, and has no gradient
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()


# ---------------------------------------------------------------------------------- noise to norm
@dataclass
class NoiseToNorm:
    """All steps from an image to its normal version; every tensor is (B, 3, H, W)."""

    x_s: Tensor  # the image at the small noise level
    x_b: Tensor  # the image at the large noise level
    eps_s: Tensor  # noise predicted in each
    eps_b: Tensor
    x0_b: Tensor  # large-scale estimate, clamped
    xtilde: Tensor  # that estimate brought back to the small level
    eps_g: Tensor  # guided noise
    x0_g: Tensor  # guided reconstruction, clamped


def noise_to_norm(
    denoiser, x, t_s, t_b, noise_s, noise_b, schedule: Schedule, w: float = 1.0
) -> NoiseToNorm:
    """Rebuild the normal image from two noise levels, each in one step (D1-D6).

    Parameters
    ----------
    denoiser : callable (x_t, t) -> eps
    x : Tensor (B, 3, H, W)
        Image in [0, 1], defective or not.
    t_s, t_b : Tensor (B,), long
        Small and large noise level.
    noise_s, noise_b : Tensor (B, 3, H, W)
        Independent standard Gaussian noise.
    w : float
        Guidance weight; 0 ignores the large scale.
    """
    abar_s, abar_b = schedule.at(t_s), schedule.at(t_b)
    x_s = add_noise(x, noise_s, abar_s)  # D1
    x_b = add_noise(x, noise_b, abar_b)
    eps_s, eps_b = denoiser(torch.cat([x_s, x_b]), torch.cat([t_s, t_b])).chunk(2)
    x0_b = predict_x0(x_b, eps_b, abar_b).clamp(-1, 1)  # D2
    xtilde = add_noise(x0_b, eps_s, abar_s)  # D4
    eps_g = eps_s - (1 - abar_s).sqrt() * w * (xtilde - x_s)  # D5
    x0_g = predict_x0(x_s, eps_g, abar_s).clamp(-1, 1)  # D6
    return NoiseToNorm(x_s, x_b, eps_s, eps_b, x0_b, xtilde, eps_g, x0_g)


# ------------------------------------------------------------------------------ losses and score
def noise_loss(
    eps_s: Tensor, eps_b: Tensor, noise_s: Tensor, noise_b: Tensor, label: Tensor
) -> Tensor:
    """Squared error of the predicted noise at both scales, over images with label (B,) 0 (D8).

    An image with a synthetic anomaly must not teach the denoiser what is normal. A batch without
    a normal image gives 0, with gradients that are 0; a loss that diverges still shows as NaN.
    """
    error = (eps_s - noise_s).square().mean((1, 2, 3)) + (eps_b - noise_b).square().mean((1, 2, 3))
    normal = 1 - label
    return (error * normal).sum() / normal.sum().clamp(min=1)  # D8


def focal_loss(prediction: Tensor, mask: Tensor, alpha: float = 0.5, gamma: float = 4.0) -> Tensor:
    """Cross-entropy that counts easy pixels less; per pixel, same shape as its inputs."""
    bce = F.binary_cross_entropy(prediction, mask, reduction="none")
    return alpha * (1 - torch.exp(-bce)) ** gamma * bce


def mask_loss(prediction: Tensor, mask: Tensor) -> Tensor:
    """How far a predicted mask (B, 1, H, W) in [0, 1] is from the true one (D9)."""
    known = prediction.nan_to_num(0.5)  # cross-entropy refuses NaN; in the other term it shows
    return 5 * focal_loss(known, mask).mean() + F.smooth_l1_loss(prediction, mask)  # D9


def top_k_mean(maps: Tensor, k: int = 50) -> Tensor:
    """Score each image (B,) by the mean of the k largest pixels of its map (B, H, W) (D11)."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    pixels = torch.as_tensor(maps).flatten(1)
    return pixels.topk(min(k, pixels.shape[1]), dim=1).values.mean(dim=1)  # D11


# -------------------------------------------------------------------------------------- detector
class DiffusionAD(Detector):
    """Noise-to-norm reconstruction and segmentation, trained on normal images alone.

    `textures` (K, 3, S, S), uint8, for synthetic anomalies come from `anomalies.texture_bank`. Who
    trains by the paper's recipe sets them; the tiny one has built-in photographs.
    """

    Config = Config

    def __init__(self, config: Config | None = None):
        super().__init__(config)
        config, self.textures = self.config, None
        self.schedule = Schedule.named(config.schedule, config.steps)
        size = config.width, config.multipliers, config.blocks, config.attention_levels
        channels = 3 * config.patch_size**2
        unet = adm_unet(channels, *size, config.heads, norm_groups=config.norm_groups)
        behind = {"noise": None, "image": self.schedule}[config.predicts]
        self.denoiser = Denoiser(unet, config.patch_size, behind)
        self.segmenter = SegmentationNet(6, config.segmentation_width, config.segmentation_norm)
        self.enter(self.stages[-1])

    def view(self, split):
        """As for all methods; a training set says where the product is."""
        where = self.config.foreground
        found = {"estimate": estimate_foreground, "whole": None}.get(where, where)
        return super().view(split) | {"foreground": found if split == "train" else None}

    def identity(self):
        """Which textures; ValueError if there are none."""
        bank = self.bank()[:, :, ::8, ::8].flatten().cpu()  # enough to tell two sets apart
        return {"textures": hashlib.sha256(bank.numpy()).hexdigest()}

    def bank(self) -> Tensor:
        """The textures that are set, or else the built-in ones; ValueError if there are none."""
        if self.textures is None and not self.config.built_in_textures:
            where = "python data_scripts/dtd.py --out data/dtd"
            how = "--textures data/dtd/images, or detector.textures = texture_bank(folder)"
            raise ValueError(f"this recipe needs foreign textures: {where}, then {how}")
        return texture_bank() if self.textures is None else self.textures

    def training_loss(self, batch, generator):
        """Scalars "loss", "noise" and "mask" for a batch of normal images (D10)."""
        x, learns, losses = batch["image"], self.stage.lr, {}
        label = x.new_zeros(len(x))
        if "segmenter" in learns:
            x, mask, label = self.with_anomalies(batch, generator)
        draw = Draw(generator, x.device)
        t_s = draw.integers(*self.config.t_s_range, len(x))  # D3
        t_b = draw.integers(*self.config.t_b_range, len(x))
        noise_s, noise_b = draw.normal(*x.shape), draw.normal(*x.shape)
        with torch.set_grad_enabled("denoiser" in learns):
            steps = self.rebuild(x, t_s, t_b, noise_s, noise_b)
        if "denoiser" in learns:
            losses["noise"] = noise_loss(steps.eps_s, steps.eps_b, noise_s, noise_b, label)
        if "segmenter" in learns:
            losses["mask"] = self.comparison_loss(x, steps.x0_g, mask)
        return {"loss": sum(losses.values()), **losses}  # D10

    def with_anomalies(self, batch, generator):
        """Images, masks and labels of a batch, half of it with synthetic anomalies."""
        x, foreground = batch["image"], batch.get("foreground")
        self.textures = bank = self.bank().to(x.device)
        surface, settings = batch["texture"].to(x.device), self.config.synthesis
        with torch.autocast(x.device.type, enabled=False):
            return synthesize(x, surface, bank, settings, generator, foreground)

    def rebuild(self, x, t_s, t_b, noise_s, noise_b, w=None) -> NoiseToNorm:
        """Every step to the normal version of images, by the own networks and weight."""
        w = self.config.w if w is None else w
        return noise_to_norm(self.denoiser, x, t_s, t_b, noise_s, noise_b, self.schedule, w)

    def comparison_loss(self, x, x0, mask) -> Tensor:
        """How wrong the segmentation network is about images and their reconstructions."""
        prediction = self.segmenter(torch.cat([x, x0], 1))  # D7
        with torch.autocast(x.device.type, enabled=False):
            return mask_loss(prediction, mask)

    def judge(self, x, category_index, generator):
        """Reconstruct and compare; one model judges every category. Parts: the first draw's."""
        draws = [self.reconstruct(x, generator) for _ in range(self.config.draws)]
        x0, first = torch.stack([steps.x0_g for steps in draws]).mean(0), draws[0]
        noised = {"noised": first.x_s, "noised_large": first.x_b, "estimate_large": first.x0_b}
        return replace(self.compare(x, x0), parts=noised)

    def reconstruct(self, x, generator, t_s=None, t_b=None, w=None) -> NoiseToNorm:
        """The normal version of images; levels and weight default to the config's."""
        draw, config = Draw(generator, x.device), self.config
        t_s, t_b = (
            torch.full((len(x),), own if t is None else t, device=x.device)
            for t, own in ((t_s, config.t_s), (t_b, config.t_b))
        )
        return self.rebuild(x, t_s, t_b, draw.normal(*x.shape), draw.normal(*x.shape), w)

    @torch.no_grad()
    def compare(self, x, x0) -> Prediction:
        """Segment the difference between images and reconstructions."""
        # A copy, because recorded launches (`compile`) would write the next mask over this one.
        mask = self.segmenter(torch.cat([x, x0], 1))[:, 0].clone()  # D7
        return Prediction(mask, top_k_mean(mask, self.config.top_k), x0.clamp(0, 1))
