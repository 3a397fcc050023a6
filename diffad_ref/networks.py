"""The U-Nets of two papers, from diffusers at any size, and what a third takes from a hub.

The mathematics of the methods does not care what is inside; here is what is inside. diffusers
takes longer to load than all else together, so it is loaded where a network is built.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn


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
) -> nn.Module:
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
    return unet


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
    width, multipliers, blocks, norm_groups
        As in `adm_unet`; there is attention at every level.
    heads : int
        Attention heads of the first level.
    context : int
        Width of a token.
    dropout : float
        Inside residual blocks, in training.

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
        from diffusers import UNet2DConditionModel

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


# ------------------------------------------------------------------------------ Stable Diffusion


@torch.no_grad()
def stable_diffusion(source: str | os.PathLike) -> tuple[dict[str, Tensor], Tensor]:
    """The weights of a pipeline's U-Net, and its embedding (1, tokens, channels) of no prompt.

    One-for-More's text never changes, so the text encoder runs once, here.

    Parameters
    ----------
    source
        Name on the hub, or a folder with `unet`, `text_encoder` and `tokenizer` in it.

    Raises
    ------
    FileNotFoundError
        Something is missing, or the hub cannot be reached.
    ImportError
        The text encoder needs `transformers`, an extra: `pip install "diffad_ref[paper]"`.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = load_part(CLIPTokenizer, source, "tokenizer")
    encoder = load_part(CLIPTextModel, source, "text_encoder").eval()
    if len(tokenizer) != encoder.config.vocab_size:  # a folder without files makes an empty one
        raise FileNotFoundError(f"no tokenizer in {str(source)!r} that fits its text encoder")
    length = encoder.config.max_position_embeddings
    tokens = tokenizer("", padding="max_length", max_length=length, return_tensors="pt")
    prompt = encoder(tokens.input_ids).last_hidden_state.float()
    return load_part(UNet2DConditionModel, source, "unet").state_dict(), prompt


def load_part(kind: type, source: str | os.PathLike, part: str = "", what: str = ""):
    """One model of a pipeline, by a name on the hub or from a folder, or FileNotFoundError."""
    try:
        return kind.from_pretrained(str(source), subfolder=part or None)
    except OSError as error:
        raise FileNotFoundError(f"no {what or part} in {str(source)!r}: {error}") from error
