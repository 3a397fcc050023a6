"""Import of One-for-More weights under the names of its released code.

The U-Net has the names of latent diffusion, and `official_deco_diff.converted_unet` renames it.
The anomaly-masked network keeps queries, keys and values in one matrix, which is cut in three here.
"""

from __future__ import annotations

import re

from torch import Tensor

# Inside an encoder layer.
LAYERS = {
    "self_attn.out_proj": "to_out",
    **{n: n for n in ("linear1", "linear2", "norm1", "norm2")},
}


def condition_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename an anomaly-masked network's weights to those of `AnomalyMaskedNetwork`.

    Raises ValueError for a name that no such network has.
    """
    renamed = {}
    for name, value in state.items():
        convolution = re.fullmatch(r"input_hint_block\.(\d+)\.weight", name)
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+?)[._](weight|bias)", name)
        if convolution:
            renamed[f"convolutions.{convolution[1]}.weight"] = value
        elif layer and layer[2] == "self_attn.in_proj":
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                renamed[f"encoder.{layer[1]}.to_{letter}.{layer[3]}"] = part
        elif layer and layer[2] in LAYERS:
            renamed[f"encoder.{layer[1]}.{LAYERS[layer[2]]}.{layer[3]}"] = value
        else:
            raise ValueError(f"no anomaly-masked network of the released code has {name!r}")
    return renamed
