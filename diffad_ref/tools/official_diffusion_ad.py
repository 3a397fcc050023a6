"""Import of DiffusionAD checkpoints that the authors' released code wrote.

Both networks are the same as here, weight for weight; only names differ, and how one convolution
holds queries, keys and values.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from torch import Tensor, nn

from diffad_ref.checkpoints import load_weights
from diffad_ref.diffusion_ad import Config, DiffusionAD
from diffad_ref.networks import adm_unet
from diffad_ref.tools.foreign_pickles import read_foreign, weights_under

UNET_KEY, SEGMENTER_KEY = "unet_model_state_dict", "seg_model_state_dict"

# Multipliers that the released code takes for an image size when it is given none.
MULTIPLIERS = {
    32: (1, 2, 3, 4),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
}

# Layers inside a residual block, an attention, or a convolution that resamples.
LAYERS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "embed_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "norm": "group_norm",
    "proj_out": "to_out.0",
    "downsample": "conv",
    "conv": "conv",
}

# Parts that every U-Net has once.
ENDS = {
    "time_embedding.1": "time_embedding.linear_1",
    "time_embedding.3": "time_embedding.linear_2",
    "down.0.0": "conv_in",
    "middle.0": "mid_block.resnets.0",
    "middle.1": "mid_block.attentions.0",
    "middle.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}

# Of the segmentation network.
STAGES = {
    **{f"block{i + 1}": f"encoder.{i}" for i in range(6)},
    **{f"up{name}": f"upward.{i}" for i, name in enumerate(("_b", *"1234"))},
    **{f"db{name}": f"decoder.{i}" for i, name in enumerate(("_b", *"1234"))},
    "fin_out": "head",
}

# Prefix of a part, layer in it, parameter.
NAME = re.compile(
    r"((?:down|up)\.\d+\.\d+|(?:middle|time_embedding|out)\.\d+)\.(?:(.+)\.)?(weight|bias)"
)

# ------------------------------------------------------------------------------------- whole file


def import_diffusion_ad(path: str | os.PathLike, config: Config | None = None) -> DiffusionAD:
    """Read a checkpoint of the released DiffusionAD code; nothing that it holds is executed.

    Parameters
    ----------
    path
        File that holds `unet_model_state_dict` and `seg_model_state_dict`, and anything else.
    config : DiffusionAD.Config, optional
        By default the paper's settings with the sizes that the weights show. Weights do not show
        the number of attention heads (the paper's 4) nor the image size: the first level with
        attention is taken for the one of 32 pixels, as it is by default.

    Returns
    -------
    DiffusionAD, in evaluation mode, on the CPU.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is damaged, lacks a network, or does not fit the config.
    """
    unet, segmenter = _networks(path)
    try:
        config = config or _config(unet, segmenter)
        state = {f"denoiser.{k}": v for k, v in denoiser_state(unet, config.heads).items()}
        state |= {f"segmenter.{k}": v for k, v in segmenter_state(segmenter).items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if config.predicts != "noise":
        raise ValueError("the released denoiser predicts noise; set predicts='noise'")
    detector = DiffusionAD(config)
    load_weights(detector, state, path)
    return detector.eval()


def _networks(path) -> tuple[dict, dict]:
    """The two state dicts of a checkpoint."""
    content = read_foreign(path)
    return weights_under(content, UNET_KEY, path), weights_under(content, SEGMENTER_KEY, path)


def _config(unet: dict[str, Tensor], segmenter: dict[str, Tensor]) -> Config:
    """The paper's config, with the sizes that weights show."""
    layout = _Layout.of(unet)
    official = {ours: theirs for theirs, ours in layout.places.items()}
    try:
        width = len(unet["down.0.0.bias"])
        first = [official[f"down_blocks.{level}.resnets.0"] for level in range(layout.levels)]
        widths = [len(unet[f"{block}.out_layers.3.bias"]) for block in first]
        segmentation_width = len(segmenter["encoder_segment.block1.0.bias"])
    except KeyError as error:
        raise ValueError(f"the weights lack {error}") from error
    return Config.paper(
        image_size=32 * 2 ** min(layout.attention_levels, default=3),
        width=width,
        multipliers=tuple(w // width for w in widths),
        blocks=layout.blocks,
        attention_levels=layout.attention_levels,
        segmentation_width=segmentation_width,
    )


# --------------------------------------------------------------------------------------- networks


def unet_from_settings(settings: dict) -> nn.Module:
    """Build the U-Net that constructor settings of the released code describe.

    Parameters
    ----------
    settings : dict
        `img_size`, `base_channels`, and if they differ from the default: `in_channels` 3,
        `n_heads` 1, `n_head_channels` -1 (not used), `channel_mults` (by image size),
        `num_res_blocks` 2, `attention_resolutions` "32,16,8", `biggan_updown` True.

    Raises
    ------
    ValueError
        The settings describe a network that this package cannot be: resampling without weights
        (`conv_resample` False), or a first multiplier other than 1, which their first
        convolution ignores.
    """
    size, updown = settings["img_size"], settings.get("biggan_updown", True)
    if not updown and not settings.get("conv_resample", True):
        raise ValueError("conv_resample=False resamples without weights: no network of the paper")
    multipliers = settings.get("channel_mults") or MULTIPLIERS.get(size)
    if multipliers is None:
        raise ValueError(f"no default channel_mults for {size} pixels; known: {list(MULTIPLIERS)}")
    if multipliers[0] != 1:
        raise ValueError(f"the first of channel_mults must be 1, not {multipliers[0]}")
    resolutions = settings.get("attention_resolutions", "32,16,8")
    if isinstance(resolutions, str):
        resolutions = resolutions.split(",")
    factors = {size // int(r) for r in resolutions}  # down-sampling of levels with attention
    head_width = settings.get("n_head_channels", -1)
    return adm_unet(
        settings.get("in_channels", 3),
        settings["base_channels"],
        tuple(multipliers),
        settings.get("num_res_blocks", 2),
        tuple(level for level in range(len(multipliers)) if 2**level in factors),
        settings.get("n_heads", 1) if head_width == -1 else None,
        None if head_width == -1 else head_width,
        updown,
    )


def denoiser_state(
    state: dict[str, Tensor], heads: int = 4, head_width: int | None = None
) -> dict[str, Tensor]:
    """Rename a released U-Net's weights to those of `Denoiser`; any depth and width.

    Parameters
    ----------
    state : dict
        Official names: `down.N.i…`, `middle.i…`, `up.N.i…`, `time_embedding.i…`, `out.i…`.
    heads, head_width : int
        Attention heads at every width, or else the width of each head; they decide which
        channels of `to_qkv` are queries, keys and values.

    Raises
    ------
    ValueError
        A name that no such network has, or entries that resample without weights.
    """
    places = _Layout.of(state).places
    renamed = {}
    for name, value in state.items():
        match = NAME.fullmatch(name)
        place, layer, parameter = match.groups() if match else (None, None, None)
        if place not in places or layer not in (None, "to_qkv", *LAYERS):
            raise ValueError(f"no U-Net of the released code has weights called {name!r}")
        place = f"unet.{places[place]}"
        if layer == "to_qkv":
            count = len(value) // 3 // head_width if head_width else heads
            for letter, part in zip("qkv", _split_qkv(value, count), strict=True):
                renamed[f"{place}.to_{letter}.{parameter}"] = part
        elif layer == "proj_out":  # a convolution of width 1 along a sequence is a matrix
            renamed[f"{place}.to_out.0.{parameter}"] = value.squeeze(-1)
        else:
            renamed[".".join(filter(None, (place, LAYERS.get(layer), parameter)))] = value
    return renamed


def _split_qkv(joint: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Cut channels ordered head -> (q, k, v) -> channel of the head into q, k and v."""
    channels = len(joint) // 3
    if len(joint) % (3 * heads):
        raise ValueError(f"{channels} channels of an attention do not divide into {heads} heads")
    joint = joint.reshape(heads, 3, channels // heads, *joint.shape[1:2])
    return tuple(part.flatten(0, 1) for part in joint.unbind(1))


def segmenter_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a released segmentation network's weights (or some of them) to `SegmentationNet`'s.

    Raises
    ------
    ValueError
        A name that no such network has.
    """
    renamed = {}
    for name, value in state.items():
        net, part, rest = (*name.split(".", 2), "", "")[:3]
        if net not in ("encoder_segment", "decoder_segment") or part not in STAGES:
            raise ValueError(f"no segmentation network of the released code has {name!r}")
        renamed[f"{STAGES[part]}.{rest.removeprefix('0.') if part == 'fin_out' else rest}"] = value
    return renamed


@dataclass(frozen=True)
class _Layout:
    """Where the parts of a released U-Net lie, read from names alone.

    Attributes
    ----------
    places : dict
        Official prefix of a part -> its prefix in `UNet2DModel`.
    """

    places: dict[str, str]
    levels: int
    blocks: int

    @classmethod
    def of(cls, state: dict[str, Tensor]) -> _Layout:
        """Entries on the way up tell the levels apart: each but the last ends by resampling."""
        places, level, block = dict(ENDS), 0, 0
        for first, *others in _entries(state, "up"):
            places[first] = f"up_blocks.{level}.resnets.{block}"
            resamples = False
            for part in others:
                resamples = f"{part}.to_qkv.weight" not in state
                kind = "upsamplers.0" if resamples else f"attentions.{block}"
                places[part] = f"up_blocks.{level}.{kind}"
            level, block = (level + 1, 0) if resamples else (level, block + 1)
        levels, blocks = level + 1, block - 1  # one block more a level than on the way down
        if blocks < 1:
            raise ValueError("the U-Net ends without a residual block")
        for n, (first, *others) in enumerate(_entries(state, "down")[1:]):
            level, block = divmod(n, blocks + 1)
            kind = f"resnets.{block}" if block < blocks else "downsamplers.0"
            places[first] = f"down_blocks.{level}.{kind}"
            for part in others:
                places[part] = f"down_blocks.{level}.attentions.{block}"
        return cls(places, levels, blocks)

    @property
    def attention_levels(self) -> tuple[int, ...]:
        """Levels whose residual blocks are followed by attention."""
        found = (re.match(r"down_blocks\.(\d+)\.attentions", p) for p in self.places.values())
        return tuple(sorted({int(m[1]) for m in found if m}))


def _entries(state: dict[str, Tensor], way: str) -> list[list[str]]:
    """Prefixes of the parts with weights, "up.3.0", "up.3.1", …, of each entry on a way."""
    found = {m.groups() for m in map(re.compile(rf"{way}\.(\d+)\.(\d+)\.").match, state) if m}
    entries = {}
    for n, i in sorted((int(n), int(i)) for n, i in found):
        entries.setdefault(n, []).append(f"{way}.{n}.{i}")
    if not entries or list(entries) != list(range(len(entries))):
        raise ValueError(
            f"the U-Net has weights in its {way} entries {list(entries)} alone; entries without "
            "weights (conv_resample=False) are no network of the paper"
        )
    return list(entries.values())
