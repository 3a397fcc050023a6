"""Import of DeCo-Diff checkpoints, and of the ImageNet weights that its authors start from.

Both hold a U-Net under the names of latent diffusion; diffusers knows how to rename them. A class
table comes with it: its rows belong to the classes of one data set, in an order of their own.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import Tensor

from diffad_ref.checkpoints import load_weights
from diffad_ref.deco_diff import SIZES, Config, DecoDiff
from diffad_ref.tools.foreign_pickles import read_foreign, weights_under

LDM_UNET = "model.diffusion_model."  # where the converter, and ImageNet checkpoints, have it
TABLE = "cond_stage_model.embedding.weight"

# Classes of the published checkpoints, in the order of their tables.
MVTEC = (
    *("capsule", "bottle", "grid", "leather", "metal_nut", "tile", "transistor", "zipper"),
    *("cable", "carpet", "hazelnut", "pill", "screw", "toothbrush", "wood"),
)
VISA = (
    *("candle", "cashew", "fryum", "macaroni2", "pcb2", "pcb4"),
    *("capsules", "chewinggum", "macaroni1", "pcb1", "pcb3", "pipe_fryum"),
)


def import_deco_diff(path: str | os.PathLike, config: Config | None = None) -> DecoDiff:
    """Read a checkpoint of the released DeCo-Diff code; nothing that it holds is executed.

    Parameters
    ----------
    path
        File that holds `model`, and anything else.
    config : DecoDiff.Config, optional
        By default the paper's settings with the sizes that the weights show. Weights do not show
        the number of attention heads: it is taken from the published size of the same width.

    A checkpoint holds no autoencoder: call `detector.codec.prepare(None)`, which loads the one
    that the config names, before you predict.

    Returns
    -------
    DecoDiff, in evaluation mode, on the CPU; with 15 classes its categories are those of MVTec
    AD, with 12 VisA's.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is damaged, lacks the network, or does not fit the config.
    """
    state = weights_under(read_foreign(path), "model", path)
    try:
        config = config or _config(state)
        converted = corrector_state(state, config.blocks)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} holds no network of DeCo-Diff: {error}") from error
    detector = DecoDiff(config)
    load_weights(detector.corrector, converted, path)
    tables = {len(MVTEC): MVTEC, len(VISA): VISA}
    detector.categories = tables.get(config.classes, ())
    return detector.eval()


def corrector_state(state: dict[str, Tensor], blocks: int = 2) -> dict[str, Tensor]:
    """Rename a released U-Net's weights, and its table, to those of `LatentUNet`.

    Parameters
    ----------
    blocks : int
        Residual blocks a level.

    Raises
    ------
    ValueError
        A name that no such network has.
    """
    unet = converted_unet({k: v for k, v in state.items() if k != TABLE}, blocks)
    found = {f"unet.{name}": value for name, value in unet.items()}
    if TABLE in state:
        found["embedding.weight"] = state[TABLE]
    return found


def converted_unet(state: dict[str, Tensor], blocks: int = 2) -> dict[str, Tensor]:
    """Rename a latent-diffusion U-Net's weights to those of diffusers' `UNet2DConditionModel`.

    diffusers' converter passes over names that it does not know; here they raise ValueError.
    """
    renamed = convert_ldm_unet_checkpoint(
        {LDM_UNET + name: name for name in state}, {"layers_per_block": blocks}
    )  # first the names alone, to see that none is lost
    lost = sorted(set(state) - set(renamed.values()))
    if lost:
        raise ValueError(f"no U-Net of latent diffusion has {lost[:3]} ({len(lost)} such names)")
    return {ours: state[theirs] for ours, theirs in renamed.items()}


def start_from_imagenet(detector: DecoDiff, path: str | os.PathLike) -> list[str]:
    """Start a detector's network from a class-conditional latent-diffusion model of ImageNet.

    Its U-Net has the published size L. Its classes are not ours: as in the released code, the class
    table begins as the first rows of its own. With another latent size the first and the last
    convolution stay as they are.

    Returns
    -------
    list of str
        Weights that were not in the file or did not fit, and kept their random start. The caller
        sees them: a failed import never goes unnoticed.

    Raises
    ------
    ValueError
        The file holds no such network, or hardly any of its weights fit.
    """
    content = read_foreign(path)
    if "state_dict" in content:
        content = weights_under(content, "state_dict", path)
    state = {
        name.removeprefix(LDM_UNET): value
        for name, value in content.items()
        if isinstance(name, str) and name.startswith(LDM_UNET) and isinstance(value, Tensor)
    }
    if not state:
        raise ValueError(f"{path} has no weights whose names begin with {LDM_UNET!r}")
    try:
        found = corrector_state(state, detector.config.blocks)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} holds no network of latent diffusion: {error}") from error
    own = detector.corrector.state_dict()
    if isinstance(table := content.get(TABLE), Tensor) and len(table) >= detector.config.classes:
        found["embedding.weight"] = table[: detector.config.classes]
    fitting = {k: v for k, v in found.items() if k in own and own[k].shape == v.shape}
    if len(fitting) < len(own) / 2:
        raise ValueError(f"only {len(fitting)} of {len(own)} weights in {path} fit this network")
    detector.corrector.load_state_dict(fitting, strict=False)
    detector.started_from = [Path(path).name, Path(path).stat().st_size]
    return sorted(set(own) - set(fitting))


def _config(state: dict[str, Tensor]) -> Config:
    """The paper's config, with the sizes that weights show."""
    width, channels = state["input_blocks.0.0.weight"].shape[:2]
    classes, context = state[TABLE].shape
    outputs = {
        int(m[1]): len(state[m[0]])
        for m in map(re.compile(r"input_blocks\.(\d+)\.0\.out_layers\.3\.bias").match, state)
        if m
    }
    entries = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("input_blocks."))
    levels = 1 + sum(name.endswith(".0.op.bias") for name in state)
    blocks = (entries - levels) // levels
    multipliers = tuple(outputs[1 + level * (blocks + 1)] // width for level in range(levels))
    known = {w: (heads, c) for w, heads, c in SIZES.values()}
    if known.get(width, (None, None))[1] != context:
        raise ValueError(
            f"width {width} with tokens of {context} is no published size; give a config"
        )
    config = Config.paper(
        width=width,
        heads=known[width][0],
        context=context,
        multipliers=multipliers,
        blocks=blocks,
        classes=classes,
    )
    if channels != config.codec.channels:
        raise ValueError(f"latents have {channels} channels; give a config with their codec")
    return config


def respaced(total: int, count: int) -> list[int]:
    """The steps that "ddim<count>" of the released code keeps: 5 of 10 are 0, 2, 4, 6, 8.

    From 0 in equal strides; raises ValueError for a count that no whole stride gives.
    """
    for stride in range(1, total):
        if len(range(0, total, stride)) == count:
            return list(range(0, total, stride))
    raise ValueError(f"no stride makes {count} of {total} steps")
