"""Golden cases of One-for-More: arrays by pattern, and the released networks with our names."""

import json

import torch
from golden_files import FOLDER, arrays, settings, weights

from diffad_ref.anomaly_masked import AnomalyMaskedNetwork
from diffad_ref.backbones import ControlledUNet
from diffad_ref.diffusion import Schedule
from diffad_ref.official_deco_diff import converted_unet
from diffad_ref.official_one_for_more import condition_state


def tensor(case, name):
    return torch.from_numpy(case[name])


def recorded_json(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def schedule():
    """With as many steps as case 3c records."""
    return Schedule.named("scaled_linear", len(arrays("cdad_3c_ddim")["betas_f64"]))


def variational_weights(s):
    """Of the squared error at each step, in the variational bound; the first would be infinite."""
    found = s.betas.square() / (2 * s.posterior_variance * (1 - s.betas) * (1 - s.abar))
    return torch.cat([found[1:2], found[1:]])


def guided(model, x, t, conditions):
    """What the released sampler makes of both halves of a doubled batch, unconditional first."""
    without, given = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat(conditions)).chunk(2)
    return without + 9 * (given - without)


# ---------------------------------------------------------------------------------------- networks


def build_condition(name, **changes):
    """Our network with the recorded weights, converted; changes replace recorded settings."""
    given = {"nhead": 8, "dim_feedforward": 1025, "neighbor_size": (7, 7)}
    given |= settings(name) | changes
    network = AnomalyMaskedNetwork(
        given["model_channels"],
        given["num_encoder_layers"],
        given["nhead"],
        given["dim_feedforward"],
        window=given["neighbor_size"] and tuple(given["neighbor_size"]),
    )
    network.load_state_dict(condition_state(weights(name)))
    return network.eval()


def build_unet(name, context):
    """Our network with the recorded weights, converted, and a text context (1 or B, n, C)."""
    given, levels = settings(name), len(settings(name)["channel_mult"])
    attention = [2**level in given["attention_resolutions"] for level in range(levels)]
    assert all(attention[:-1])  # ours has a choice in the last level only
    network = ControlledUNet(
        given["in_channels"],
        given["model_channels"],
        tuple(given["channel_mult"]),
        given["num_res_blocks"],
        given["num_heads"],
        context.shape[1:],
        last_attention=attention[-1],
    )
    network.unet.load_state_dict(converted_unet(weights(name), given["num_res_blocks"]))
    network.prompt = context
    return network.eval()


# ------------------------------------------------------------------------------------------- names


def unet_names(names, blocks):
    """Our names, as in a `ControlledUNet`, by the released ones of its parameters."""
    converted = converted_unet({name: name for name in names}, blocks)
    return {theirs: f"unet.{ours}" for ours, theirs in converted.items()}


def condition_names(name):
    """Our names of a released parameter: three for the projections of an attention."""
    return list(condition_state({name: torch.zeros(3)}))


def condition_layers(module):
    """Our names of a released layer: an attention is three of them, queries first."""
    weight = "in_proj_weight" if module.endswith("self_attn") else "weight"
    return [name.removesuffix(".weight") for name in condition_names(f"{module}.{weight}")]


def condition_gradient(network, name):
    """Of a parameter with a released name; the projections of an attention in one."""
    parts = dict(network.named_parameters())
    return torch.cat([parts[ours].grad for ours in condition_names(name)])
