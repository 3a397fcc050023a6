"""The U-Nets of the papers, from diffusers at any size, and what One-for-More takes from a hub.

diffusers takes longer to load than all else together: it is loaded where a network is built.
"""

import os

import torch
from torch import Tensor, nn


def _like(x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    return [None if p is None else p.to(x) for p in parameters]


class _GroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        affine, size = _like(x, self.weight, self.bias), (*x.shape[:2], x[0, 0].numel())
        return torch.native_group_norm(x.contiguous(), *affine, *size, self.num_groups, self.eps)[0]


class _LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        affine = _like(x, self.weight, self.bias)
        return torch.native_layer_norm(x, self.normalized_shape, *affine, self.eps)[0]


def lean(network: nn.Module) -> None:
    """From now on, a network's normalisations take 16-bit tensors, and give them.

    Autocast would keep float32 copies of both; it does not know the native functions, which compute
    means and variances in float32 anyway.
    """
    kinds = {nn.GroupNorm: _GroupNorm, nn.LayerNorm: _LayerNorm}
    for module in network.modules():
        module.__class__ = kinds.get(type(module), type(module))


def adm_unet(
    channels=3,
    width=128,
    multipliers=(1, 1, 2, 2, 4, 4),
    blocks=2,
    attention_levels=(3, 4, 5),
    heads=4,
    head_width=None,
    resample_by_blocks=True,
    norm_groups=32,
) -> nn.Module:
    """The U-Net of *Diffusion Models Beat GANs*, at any size; the defaults are DiffusionAD's.

    Channels of a level are `width * multiplier`; each level halves the resolution. There are so
    many residual blocks a level on the way down, one more on the way up, followed by self-attention
    on some levels (0 is full resolution), with so many heads at every width, or else heads of one
    width. Resampling happens inside residual blocks, or by a convolution. The groups of each
    group normalisation must divide every width.
    """
    from diffusers import UNet2DModel
    from diffusers.models.attention_processor import Attention

    kind, resample = (
        ("Resnet{}sampleBlock2D", "resnet") if resample_by_blocks else ("{}Block2D", "conv")
    )
    levels = range(len(multipliers))
    kinds = ["Attn{}Block2D" if level in attention_levels else kind for level in levels]
    unet = UNet2DModel(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(width * m for m in multipliers),
        layers_per_block=blocks,
        down_block_types=tuple(kind.format("Down") for kind in kinds),
        up_block_types=tuple(kind.format("Up") for kind in reversed(kinds)),
        downsample_type=resample,
        upsample_type=resample,
        attention_head_dim=head_width or width,  # divides every width
        norm_num_groups=norm_groups,
        norm_eps=1e-5,
        flip_sin_to_cos=False,
        freq_shift=0,
    )
    if head_width is None:  # diffusers fixes the width of the heads; the paper fixes their number
        for module in unet.modules():
            if isinstance(module, Attention):
                module.heads, module.scale = heads, (module.inner_dim // heads) ** -0.5
    return start_at_zero(unet, "to_out.0")


def start_at_zero(unet: nn.Module, *projections: str) -> nn.Module:
    """Let every residual branch begin by adding nothing, and the network by putting out zeros.

    So the papers' networks start. `projections` are the last layers of their attention, by name.
    """
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "conv_out", *projections)):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return unet


def latent_unet(
    channels, widths, blocks, heads, context, norm_groups, attention_levels, dropout=0.0
) -> nn.Module:
    """The U-Net of latent diffusion, with spatial transformers on some levels.

    `widths` are the channels of its levels, `heads` the number of attention heads, of all or of
    each; cross-attention looks at tokens that are `context` wide. Source: Rombach et al. 2022.
    """
    from diffusers import UNet2DConditionModel

    kinds = ["CrossAttn" if level in attention_levels else "" for level in range(len(widths))]
    return UNet2DConditionModel(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(widths),
        layers_per_block=blocks,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        attention_head_dim=heads,  # called so, but it is their number
        cross_attention_dim=context,
        dropout=dropout,
        norm_num_groups=norm_groups,
    )


class LatentUNet(nn.Module):
    """A latent U-Net with attention at every level, to one learned token, `context` wide, a class.

    The width of a head is the same everywhere: wider levels have more `heads` than the first.
    """

    def __init__(
        self, channels, classes, width, multipliers, blocks, heads, context, dropout, norm_groups
    ):
        super().__init__()
        widths, levels = [width * m for m in multipliers], range(len(multipliers))
        sizes = channels, widths, blocks, tuple(w // (width // heads) for w in widths)
        unet = latent_unet(*sizes, context, norm_groups, levels, dropout)
        self.unet = start_at_zero(unet, "proj_out")
        self.embedding = nn.Embedding(classes, context)

    def forward(self, z: Tensor, t: Tensor, category: Tensor) -> Tensor:
        """Output (B, C, h, w) for latents z, time steps t (B,) and class indices (B,), long."""
        return self.unet(z, t, self.embedding(category)[:, None]).sample


@torch.no_grad()
def stable_diffusion(source: str | os.PathLike) -> dict[str, Tensor]:
    """State of One-for-More's `ControlledUNet`: a pipeline's U-Net, and its empty prompt.

    The text never changes, so the text encoder runs once, here. `source` is a name on the hub, or
    a folder with `unet`, `text_encoder` and `tokenizer`; FileNotFoundError if something is missing.
    Needs `transformers`, an extra: `pip install "diffad_ref[paper]"`.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = load_part(CLIPTokenizer, source, "tokenizer")
    encoder = load_part(CLIPTextModel, source, "text_encoder").eval()
    if len(tokenizer) != encoder.config.vocab_size:  # a folder without files makes an empty one
        raise FileNotFoundError(f"no tokenizer in {str(source)!r} that fits its text encoder")
    length = encoder.config.max_position_embeddings
    tokens = tokenizer("", padding="max_length", max_length=length, return_tensors="pt")
    prompt = encoder(tokens.input_ids).last_hidden_state.float()  # (1, tokens, channels)
    unet = load_part(UNet2DConditionModel, source, "unet").state_dict()
    there = {f"unet.{name}": value for name, value in unet.items() if not value.is_meta}
    return {"prompt": prompt} | there  # on the meta device is what the file lacks


def load_part(kind: type, source: str | os.PathLike, part: str = "", what: str = ""):
    """One model of a pipeline, by a name on the hub or from a folder, or FileNotFoundError."""
    try:
        return kind.from_pretrained(str(source), subfolder=part or None)
    except OSError as error:
        raise FileNotFoundError(f"no {what or part} in {str(source)!r}: {error}") from error
