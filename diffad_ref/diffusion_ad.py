"""DiffusionAD: noise erases a defect, one denoising step rebuilds the normal image.

Noise turns a defective image and a normal one into nearly the same thing; a diffusion model that
has seen only normal images turns it back into a normal one ("noise-to-norm"). One step is enough:
a small noise level keeps detail but may keep the defect, a large one loses both, and norm guidance
blends the two. A segmentation network then compares the image with its reconstruction.

Zhang, Wang, Zeng, Wu, Jiang: *DiffusionAD*, TPAMI 2025, arXiv 2303.08730. Formulas D1-D12 are
numbered as in the book; D1 and D2 stand in `diffusion.py`, D12 in `anomalies.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffad_ref.anomalies import Synthesis, synthesize
from diffad_ref.backbones import Denoiser, SegmentationNet, adm_unet
from diffad_ref.data import is_texture
from diffad_ref.detector import Detector, Prediction, Rate, Stage
from diffad_ref.diffusion import Schedule, add_noise, draw_noise, draw_times, predict_x0
from diffad_ref.metrics import top_k_mean
from diffad_ref.texture_sources import estimate_foreground, texture_bank

# ---------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class Config:
    """Sizes and settings; the defaults are the paper's (or its released code's)."""

    image_size: int = 256  # pixels
    # Denoiser: an ADM U-Net.
    width: int = 128  # channels of its first level
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4, 4)  # of the width, one a level
    blocks: int = 2  # residual blocks a level
    attention_levels: tuple[int, ...] = (3, 4, 5)  # levels with attention: 32, 16 and 8 pixels
    heads: int = 4  # attention heads at every width
    norm_groups: int = 32  # of the group normalisation
    patch_size: int = 1  # pixels packed into channels, per axis
    predicts: str = "noise"  # what its U-Net puts out: "noise" (paper) or the clean "image"
    # Segmentation network.
    segmentation_width: int = 64  # channels of its first stage
    segmentation_norm: str = "batch"  # "batch" (paper) or "group"
    # Noise.
    schedule: str = "linear"
    steps: int = 1000  # T
    t_s_range: tuple[int, int] = (0, 300)  # small scale in training: 0 .. tau - 1
    t_b_range: tuple[int, int] = (300, 1000)  # large scale in training: tau .. T - 1
    t_s: int = 200  # small scale at inference
    t_b: int = 400  # large scale at inference
    w: float = 1.0  # guidance weight
    draws: int = 1  # of the noise at inference; their reconstructions are averaged (paper: one)
    # Anomalies and scoring.
    synthesis: Synthesis = field(default_factory=Synthesis)
    foreground: str = "whole"  # "whole" image, or "estimate" the product of object categories
    top_k: int = 50  # pixels whose mean is the image score
    reconstruct: bool = True  # False: the ablation that compares with an empty image
    stages: tuple[Stage, ...] = (
        # 3000 epochs: 40 000 steps for a category of some 210 images.
        Stage("joint", 40_000, 16, {"denoiser": Rate(1e-4), "segmenter": Rate(1e-5, "cycle")}),
    )

    @classmethod
    def paper(cls, **changes) -> Config:
        """The published size and settings: 131.7 M + 28.4 M parameters."""
        return replace(cls(), **changes)

    @classmethod
    def tiny(cls, image_size: int = 64, **changes) -> Config:
        """Two CPU cores: a denoiser on 32 x 32 patches, trained first; then the comparison."""
        tiny = cls(
            image_size=image_size,
            width=32,
            multipliers=(1, 2, 3),
            blocks=1,
            attention_levels=(2,),
            heads=4,
            norm_groups=8,
            patch_size=max(1, image_size // 32),
            predicts="image",  # few channels cannot carry noise
            segmentation_width=12,
            segmentation_norm="group",  # a batch is small
            t_s_range=(100, 300),  # what is less noisy keeps every defect
            t_b_range=(300, 600),  # what is noisier shows nothing of a 64-pixel image
            draws=8,  # few pixels, so a single draw is noisy
            synthesis=Synthesis(max_exponent=3, threshold=0.4, p_match=0.4, p_flat=0.2),
            foreground="estimate",
            stages=(
                Stage("denoiser", 4500, 8, {"denoiser": Rate(5e-4, "cosine", 100)}, clip=1.0),
                Stage("segmentation", 2000, 16, {"segmenter": Rate(1e-3, "cosine", 50)}, clip=1.0),
                Stage(
                    "joint",
                    400,
                    8,
                    {"denoiser": Rate(2e-5, "cosine", 20), "segmenter": Rate(2e-4, "cosine", 20)},
                    clip=1.0,
                ),
            ),
        )
        return replace(tiny, **changes)

    def without_reconstruction(self) -> Config:
        """The ablation: the segmentation network alone, with as many steps to learn."""
        steps = sum(stage.steps for stage in self.stages if "segmenter" in stage.lr)
        stage = next(stage for stage in self.stages if "segmenter" in stage.lr)
        alone = replace(stage, steps=steps, lr={"segmenter": stage.lr["segmenter"]})
        return replace(self, reconstruct=False, stages=(alone,))


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
    denoiser: nn.Module,
    x: Tensor,
    t_s: Tensor,
    t_b: Tensor,
    noise_s: Tensor,
    noise_b: Tensor,
    schedule: Schedule,
    w: float = 1.0,
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


def norm_guided_x0(
    x_s: Tensor,
    x_b: Tensor,
    eps_s: Tensor,
    eps_b: Tensor,
    abar_s: Tensor,
    abar_b: Tensor,
    w: float = 1.0,
) -> Tensor:
    """Blend two one-step estimates of the normal image (D4-D6 in closed form).

    A small noise level keeps detail but may keep the defect; a large one loses both. Guidance
    moves the small-scale estimate towards the large-scale one.

    Parameters
    ----------
    x_s, x_b : Tensor (B, C, H, W)
        The image noised at the small and at the large level.
    eps_s, eps_b : Tensor (B, C, H, W)
        The noise that the model predicts in each.
    abar_s, abar_b : Tensor (B, 1, 1, 1)
        Cumulative alpha at each level, in (0, 1].
    w : float
        Guidance weight; 0 ignores the large scale.

    Returns
    -------
    Tensor (B, C, H, W), clamped to [-1, 1].

    Source: DiffusionAD, norm-guided denoising.
    """
    x0_s = predict_x0(x_s, eps_s, abar_s)  # D2
    x0_b = predict_x0(x_b, eps_b, abar_b).clamp(-1, 1)  # D2
    return (x0_s + w * (1 - abar_s) * (x0_b - x0_s)).clamp(-1, 1)  # D6


# ---------------------------------------------------------------------------------------- losses


def noise_loss(
    eps_s: Tensor, eps_b: Tensor, noise_s: Tensor, noise_b: Tensor, label: Tensor
) -> Tensor:
    """Squared error of the predicted noise at both scales, over normal images only (D8).

    An image with a synthetic anomaly must not teach the denoiser what is normal. A batch without
    a normal image gives 0, with gradients that are 0; a loss that diverges still shows as NaN.

    Parameters
    ----------
    label : Tensor (B,)
        0 for normal images, 1 for anomalous ones.
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
    return 5 * focal_loss(prediction, mask).mean() + F.smooth_l1_loss(prediction, mask)  # D9


# -------------------------------------------------------------------------------------- detector


class DiffusionAD(Detector):
    """Noise-to-norm reconstruction and segmentation, trained on normal images alone.

    Parameters
    ----------
    config : DiffusionAD.Config
        `Config.tiny()` or `Config.paper()`.
    textures : Tensor (K, 3, S, S), uint8, optional
        Foreign textures for synthetic anomalies; by default the built-in photographs.
    """

    Config = Config

    def __init__(self, config: Config | None = None, textures: Tensor | None = None):
        super().__init__()
        self.config = config = config or Config.paper()
        _check(config)
        self.schedule = Schedule.named(config.schedule, config.steps)
        if config.reconstruct:
            self.denoiser = _denoiser(config, self.schedule)
        self.segmenter = SegmentationNet(6, config.segmentation_width, config.segmentation_norm)
        self.stages = config.stages
        self.textures = textures
        self.enter(self.stages[-1])

    def training_loss(self, batch, generator=None):
        """Scalars "loss", "noise" and "mask" for a batch of normal images (D10)."""
        images = batch["image"]
        self.check(images)
        generator = generator or torch.Generator().manual_seed(torch.randint(2**62, ()).item())
        if "segmenter" in self.stage.lr:
            synthetic = self._synthesize(batch, generator)
            x, mask, label = synthetic.image, synthetic.mask, synthetic.label
        else:
            x, mask, label = images, None, images.new_zeros(len(images))

        losses = {}
        noise_s, noise_b = draw_noise(x, generator), draw_noise(x, generator)
        if self.config.reconstruct:
            t_s = draw_times(self.config.t_s_range, x, generator)  # D3
            t_b = draw_times(self.config.t_b_range, x, generator)
            with torch.set_grad_enabled("denoiser" in self.stage.lr):
                steps = noise_to_norm(
                    self.denoiser, x, t_s, t_b, noise_s, noise_b, self.schedule, self.config.w
                )
            x0 = steps.x0_g
        else:
            x0 = torch.zeros_like(x)
        if "denoiser" in self.stage.lr:
            losses["noise"] = noise_loss(steps.eps_s, steps.eps_b, noise_s, noise_b, label)
        if "segmenter" in self.stage.lr:
            prediction = self.segmenter(torch.cat([x, x0], 1))  # D7
            with torch.autocast(x.device.type, enabled=False):
                losses["mask"] = mask_loss(prediction.float(), mask)
        return {"loss": sum(losses.values()), **losses}  # D10

    @torch.no_grad()
    def predict(self, images, category_index=None, generator=None):
        """Anomaly map, score and reconstruction of images (B, 3, H, W) in [0, 1].

        One model judges every category, so `category_index` is not looked at. Without a
        generator the noise comes from seed 0. The parts are those of the first draw of noise.
        """
        self.check(images)
        x = images.to(self.device)
        generator = generator or torch.Generator().manual_seed(0)
        parts = {}
        x0 = torch.zeros_like(x)
        if self.config.reconstruct:
            steps = self.reconstruct(x, generator)
            more = [self.reconstruct(x, generator).x0_g for _ in range(self.config.draws - 1)]
            x0 = torch.stack([steps.x0_g, *more]).mean(0)
            parts = {"noised": steps.x_s, "noised_large": steps.x_b, "estimate_large": steps.x0_b}
        return self.compare(x, x0, parts)

    def reconstruct(self, x, generator, t_s=None, t_b=None, w=None) -> NoiseToNorm:
        """The normal version of images; levels and weight default to the config's."""

        def level(t):
            return torch.full((len(x),), t, device=x.device)

        config = self.config
        t_s, t_b = (config.t_s if t_s is None else t_s), (config.t_b if t_b is None else t_b)
        w = config.w if w is None else w
        noise_s, noise_b = draw_noise(x, generator), draw_noise(x, generator)
        return noise_to_norm(
            self.denoiser, x, level(t_s), level(t_b), noise_s, noise_b, self.schedule, w
        )

    @torch.no_grad()
    def compare(self, x, x0, parts=None) -> Prediction:
        """Segment the difference between images and reconstructions."""
        mask = self.segmenter(torch.cat([x, x0], 1))  # D7
        return Prediction(
            anomaly_map=mask[:, 0],
            score=top_k_mean(mask[:, 0], self.config.top_k),  # D11
            reconstruction=x0.clamp(0, 1),
            parts=parts or {},
        )

    def _synthesize(self, batch, generator):
        images = batch["image"]
        if self.textures is None:
            self.textures = texture_bank()
        if self.textures.device != images.device:
            self.textures = self.textures.to(images.device)
        textures = torch.tensor([is_texture(c) for c in batch["category"]], device=images.device)
        foreground = batch.get("foreground")
        if foreground is None and self.config.foreground == "estimate":
            whole = torch.ones_like(images[:, :1])
            foreground = torch.where(
                textures[:, None, None, None], whole, estimate_foreground(images)
            )
        return synthesize(
            images, textures, self.textures, self.config.synthesis, generator, foreground
        )


def _check(config: Config) -> None:
    """Each level of a network halves the image, so its size must divide."""
    denoiser = config.patch_size * 2 ** (len(config.multipliers) - 1)
    multiple = math.lcm(denoiser, 2**5)  # the segmentation network has six levels
    if config.image_size % multiple:
        raise ValueError(f"image_size must be a multiple of {multiple}, not {config.image_size}")
    if config.draws < 1:
        raise ValueError(f"draws must be at least 1, not {config.draws}")


def _denoiser(config: Config, schedule: Schedule) -> Denoiser:
    unet = adm_unet(
        3 * config.patch_size**2,
        config.width,
        config.multipliers,
        config.blocks,
        config.attention_levels,
        config.heads,
        norm_groups=config.norm_groups,
    )
    return Denoiser(
        unet, config.patch_size, {"noise": None, "image": schedule.abar}[config.predicts]
    )
