"""Builds the networks that a config asks for, from diffusers where it has them.

The mathematics of the methods does not care what is inside; here is what is inside.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from diffad_ref.diffusion import implied_noise, pick


def adm_unet(
    channels: int = 3,
    width: int = 128,
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4, 4),
    blocks: int = 2,
    attention_levels: tuple[int, ...] = (3, 4, 5),
    heads: int | None = 4,
    head_width: int | None = None,
    resample_by_blocks: bool = True,
    norm_groups: int = 32,
) -> UNet2DModel:
    """The U-Net of *Diffusion Models Beat GANs*, at any size; the defaults are DiffusionAD's.

    Parameters
    ----------
    channels : int
        Of input and output.
    width, multipliers
        Channels of a level are `width * multiplier`; each level halves the resolution.
    blocks : int
        Residual blocks a level on the way down, one more on the way up.
    attention_levels
        Levels (0 is full resolution) whose residual blocks are followed by self-attention.
    heads, head_width : int
        Attention heads at every width, or else the width of each head.
    resample_by_blocks : bool
        Resample inside residual blocks; otherwise by a convolution.
    norm_groups : int
        Groups of each group normalisation; must divide every width.
    """
    widths = tuple(width * m for m in multipliers)
    resnet = resample_by_blocks
    down, up = [], []
    for level in range(len(widths)):
        if level in attention_levels:
            down.append("AttnDownBlock2D")
            up.append("AttnUpBlock2D")
        else:
            down.append("ResnetDownsampleBlock2D" if resnet else "DownBlock2D")
            up.append("ResnetUpsampleBlock2D" if resnet else "UpBlock2D")
    unet = UNet2DModel(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=blocks,
        down_block_types=tuple(down),
        up_block_types=tuple(reversed(up)),
        downsample_type="resnet" if resnet else "conv",
        upsample_type="resnet" if resnet else "conv",
        attention_head_dim=head_width or width,  # divides every width
        norm_num_groups=norm_groups,
        norm_eps=1e-5,
        flip_sin_to_cos=False,
        freq_shift=0,
    )
    if head_width is None:
        _set_heads(unet, heads)
    return unet


def _set_heads(unet: nn.Module, heads: int) -> None:
    """Give every attention the same number of heads; diffusers fixes their width instead."""
    for module in unet.modules():
        if isinstance(module, Attention):
            module.heads = heads
            module.scale = (module.inner_dim // heads) ** -0.5


class Denoiser(nn.Module):
    """Predicts the noise in an image; a patch of pixels may be packed into channels first.

    Parameters
    ----------
    unet : UNet2DModel
        With 3 p² channels in and out.
    patch_size : int
        p: the U-Net works on a p times smaller image with p² times the channels, which costs
        about p² times less. The paper's network has p = 1.
    abar : Tensor (T,), optional
        If given, the U-Net predicts the clean image and the noise follows from it (D1 solved for
        eps). Noise has no structure that a narrow network could squeeze through few channels; an
        image has, and what is lost of it is only detail. The loss stays the same.
    """

    def __init__(self, unet: UNet2DModel, patch_size: int = 1, abar: Tensor | None = None):
        super().__init__()
        self.unet, self.patch_size, self.abar = unet, patch_size, abar

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Noise (B, 3, H, W) predicted in x_t (B, 3, H, W) at time steps t (B,), long."""
        packed = F.pixel_unshuffle(x_t, self.patch_size)  # (B, 3p², H/p, W/p)
        output = F.pixel_shuffle(self.unet(packed, t).sample, self.patch_size)
        return output if self.abar is None else implied_noise(x_t, output, pick(self.abar, t))


class LatentUNet(nn.Module):
    """Latent-diffusion U-Net with spatial transformers, conditioned on a class.

    One learned token a class is what the cross-attention of every level looks at. The width of an
    attention head is the same everywhere, so wider levels have more heads.

    Parameters
    ----------
    channels : int
        Of input and output: those of a latent.
    classes : int
        Rows of the table of tokens.
    width, multipliers, blocks
        As in `adm_unet`; there is attention at every level.
    heads : int
        Attention heads of the first level.
    context : int
        Width of a token.
    dropout : float
        Inside residual blocks, in training.
    norm_groups : int
        Groups of each group normalisation; must divide every width.

    Source: Rombach et al. 2022; sizes as in DeCo-Diff.
    """

    def __init__(
        self,
        channels: int = 4,
        classes: int = 15,
        width: int = 256,
        multipliers: tuple[int, ...] = (1, 2, 4),
        blocks: int = 2,
        heads: int = 8,
        context: int = 512,
        dropout: float = 0.0,
        norm_groups: int = 32,
    ):
        super().__init__()
        widths = tuple(width * m for m in multipliers)
        self.unet = UNet2DConditionModel(
            in_channels=channels,
            out_channels=channels,
            block_out_channels=widths,
            layers_per_block=blocks,
            down_block_types=("CrossAttnDownBlock2D",) * len(widths),
            up_block_types=("CrossAttnUpBlock2D",) * len(widths),
            # Called so, but it is the number of heads; their width is what follows from it.
            attention_head_dim=tuple(w // (width // heads) for w in widths),
            cross_attention_dim=context,
            dropout=dropout,
            norm_num_groups=norm_groups,
        )
        self.embedding = nn.Embedding(classes, context)

    def forward(self, z: Tensor, t: Tensor, category: Tensor) -> Tensor:
        """Output (B, C, h, w) for latents z, time steps t (B,) and class indices (B,), long."""
        return self.unet(z, t, self.embedding(category)[:, None]).sample


class ControlledUNet(nn.Module):
    """Stable Diffusion's U-Net, at any size, with condition features and a constant prompt.

    Parameters
    ----------
    channels : int
        Of input and output: those of a latent.
    width, multipliers, blocks
        As in `adm_unet`; every level but the last has attention, as in Stable Diffusion.
    heads : int
        Attention heads at every level.
    prompt : (int, int)
        Tokens and channels of the text embedding. It is that of the empty prompt throughout, so
        it is a constant; zeros until it is set, which switches the text's influence off.
    norm_groups : int
        Groups of each group normalisation.
    """

    def __init__(
        self,
        channels: int = 4,
        width: int = 320,
        multipliers: tuple[int, ...] = (1, 2, 4, 4),
        blocks: int = 2,
        heads: int = 8,
        prompt: tuple[int, int] = (77, 768),
        norm_groups: int = 32,
        last_attention: bool = False,
    ):
        super().__init__()
        levels = len(multipliers)
        down = ["CrossAttnDownBlock2D"] * (levels - 1)
        up = ["CrossAttnUpBlock2D"] * (levels - 1)
        down.append("CrossAttnDownBlock2D" if last_attention else "DownBlock2D")
        up.insert(0, "CrossAttnUpBlock2D" if last_attention else "UpBlock2D")
        self.unet = UNet2DConditionModel(
            in_channels=channels,
            out_channels=channels,
            block_out_channels=tuple(width * m for m in multipliers),
            layers_per_block=blocks,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            attention_head_dim=heads,  # called so, but it is their number
            cross_attention_dim=prompt[1],
            norm_num_groups=norm_groups,
        )
        self.register_buffer("prompt", torch.zeros(1, *prompt))

    def forward(self, z: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Output (B, C, h, w) for latents z, time steps t (B,) and features (B, width, h, w).

        The condition is added right after the first convolution, before anything branches off.
        """

        def add(module, inputs, output):
            return output if condition is None else output + condition

        hook = self.unet.conv_in.register_forward_hook(add)
        try:
            return self.unet(z, t, self.prompt.expand(len(z), -1, -1)).sample
        finally:
            hook.remove()


class SegmentationNet(nn.Module):
    """U-Net with six encoder and five decoder stages that compares two images.

    Parameters
    ----------
    in_channels : int
        Two RGB images: 6.
    width : int
        Channels of the first stage; the others have 2, 4, 8, 8 and 8 times as many.
    norm : "batch" or "group"
        Batch normalisation is the paper's; group normalisation works with small batches.
    """

    def __init__(self, in_channels: int = 6, width: int = 64, norm: str = "batch"):
        super().__init__()
        w = [width * m for m in (1, 2, 4, 8, 8, 8)]
        inputs = [in_channels, *w[:-1]]
        self.encoder = nn.ModuleList(
            nn.Sequential(*_conv(i, o, norm), *_conv(o, o, norm))
            for i, o in zip(inputs, w, strict=True)
        )
        skips = w[-2::-1]  # 8, 8, 4, 2, 1 times the width
        outs = [w[4], w[2], w[1], w[0], w[0]]
        below = [w[5], *outs[:-1]]
        self.upward = nn.ModuleList(
            nn.Sequential(
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
                *_conv(i, o, norm),
            )
            for i, o in zip(below, outs, strict=True)
        )
        self.decoder = nn.ModuleList(
            nn.Sequential(*_conv(o + s, o, norm), *_conv(o, o, norm))
            for o, s in zip(outs, skips, strict=True)
        )
        self.head = nn.Conv2d(w[0], 1, 3, padding=1)

    def forward(self, pair: Tensor) -> Tensor:
        """Probability of a defect (B, 1, H, W) from image and reconstruction (B, 6, H, W)."""
        skips = []
        features = pair
        for depth, stage in enumerate(self.encoder):
            features = stage(features if depth == 0 else F.max_pool2d(features, 2))
            skips.append(features)
        skips.pop()
        for upward, stage in zip(self.upward, self.decoder, strict=True):
            features = stage(torch.cat([upward(features), skips.pop()], 1))
        return self.head(features).sigmoid()


def _conv(inputs: int, outputs: int, norm: str) -> list[nn.Module]:
    """Convolution, normalisation, ReLU."""
    if norm not in ("batch", "group"):
        raise ValueError(f"norm is 'batch' or 'group', not {norm!r}")
    normalise = nn.BatchNorm2d(outputs) if norm == "batch" else nn.GroupNorm(4, outputs)
    return [nn.Conv2d(inputs, outputs, 3, padding=1), normalise, nn.ReLU(inplace=True)]


def count_parameters(module: nn.Module) -> int:
    """Number of trainable and frozen weights; works on the meta device."""
    return sum(p.numel() for p in module.parameters())
