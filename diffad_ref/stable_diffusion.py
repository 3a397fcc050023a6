"""What One-for-More takes from Stable Diffusion: its U-Net's weights, and the empty prompt.

The text condition never changes, so the text encoder runs once, here, and only its answer is kept.
"""

from __future__ import annotations

import os

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from diffad_ref.backbones import ControlledUNet


@torch.no_grad()
def start_from_stable_diffusion(unet: ControlledUNet, source: str | os.PathLike) -> None:
    """Put a pipeline's U-Net and its embedding of the empty prompt into a `ControlledUNet`.

    Parameters
    ----------
    source
        Name on the hub, or a folder with `unet`, `text_encoder` and `tokenizer` in it.

    Raises
    ------
    FileNotFoundError
        Something is missing, or the hub cannot be reached.
    ValueError
        The U-Net, or the prompt, has another size.
    ImportError
        The text encoder needs `transformers`, an extra: `pip install "diffad_ref[paper]"`.
    """
    prompt = empty_prompt(source)
    if prompt.shape != unet.prompt.shape:
        raise ValueError(
            f"the prompt of {str(source)!r} has {tuple(prompt.shape[1:])} tokens and channels, "
            f"the U-Net was built for {tuple(unet.prompt.shape[1:])}"
        )
    loaded = _load(UNet2DConditionModel, source, "unet")
    try:
        unet.unet.load_state_dict(loaded.state_dict())
    except RuntimeError as error:  # names are missing, or shapes differ
        raise ValueError(f"the U-Net of {str(source)!r} is another than ours: {error}") from error
    unet.prompt.copy_(prompt)


@torch.no_grad()
def empty_prompt(source: str | os.PathLike) -> Tensor:
    """The text encoder's answer (1, tokens, channels) to an empty prompt."""
    from transformers import CLIPTextModel, CLIPTokenizer  # large, and for this alone

    tokenizer = _load(CLIPTokenizer, source, "tokenizer")
    encoder = _load(CLIPTextModel, source, "text_encoder").eval()
    if len(tokenizer) != encoder.config.vocab_size:  # a folder without files makes an empty one
        raise FileNotFoundError(f"no tokenizer in {str(source)!r} that fits its text encoder")
    length = encoder.config.max_position_embeddings
    tokens = tokenizer("", padding="max_length", max_length=length, return_tensors="pt")
    return encoder(tokens.input_ids).last_hidden_state.float()


def _load(kind: type, source: str | os.PathLike, part: str) -> nn.Module:
    try:
        return kind.from_pretrained(str(source), subfolder=part)
    except OSError as error:
        raise FileNotFoundError(f"no {part} in {str(source)!r}: {error}") from error
