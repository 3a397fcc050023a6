"""Golden cases of One-for-More: the released networks with our names, and their gradients."""

import json

import torch
from golden_files import FOLDER, arrays, settings, weights

from diffad_ref.anomaly_masked import AnomalyMaskedNetwork
from diffad_ref.diffusion import Schedule
from diffad_ref.one_for_more import ControlledUNet
from diffad_ref.tools.official_deco_diff import converted_unet
from diffad_ref.tools.official_one_for_more import condition_state
from diffad_ref.tools.sampling import posterior


def tensor(case, name):
    return torch.from_numpy(case[name])


def recorded_json(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def schedule():
    """With as many steps as case 3c records."""
    return Schedule.named("scaled_linear", len(arrays("cdad_3c_ddim")["betas_f64"]))


def variational_weights(s):
    """Of the squared error at each step, in the variational bound; the first would be infinite."""
    found = s.betas.square() / (2 * posterior(s)[0] * (1 - s.betas) * (1 - s.abar))
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
    given = settings(name)
    levels = range(len(given["channel_mult"]))
    network = ControlledUNet(
        given["in_channels"],
        given["model_channels"],
        tuple(given["channel_mult"]),
        given["num_res_blocks"],
        given["num_heads"],
        context.shape[1:],
        norm_groups=32,
        attention_levels=tuple(n for n in levels if 2**n in given["attention_resolutions"]),
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


# --------------------------------------------------------------------------------------- gradients

# Over 60 random networks and inputs, float32 gradients were off from float64 ones by up to 4e-6 of
# the largest in a tensor, with one thread and with two, as long as every ReLU was on the same side.
# What a ReLU sees was off by up to 1.5e-5; where that decides on its side, a unit's whole share of
# the gradient comes or goes, up to 8e-4 of the largest. So the tolerance is ten times the rounding,
# and the shares of the few units that float32 may have on the other side.
ROUNDING, UNDECIDED = 4e-5, 2e-5


def gradients(network, condition, loss):
    """Gradients of `loss()` by the names of parameters, and the undecided shares in each.

    `condition` is the part of the network that has ReLUs, or the network itself.
    """
    seen = {}

    def run(*hooks):
        network.zero_grad()
        loss().backward()
        for hook in hooks:
            hook.remove()
        return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}

    def see(layer, inputs, output):
        seen[layer] = output.detach()

    found = run(*(layer.linear1.register_forward_hook(see) for layer in condition.encoder))
    undecided = {name: torch.zeros_like(gradient) for name, gradient in found.items()}
    for layer, sums in seen.items():
        for place in map(tuple, (sums.abs() < UNDECIDED).nonzero()):
            push = torch.zeros_like(sums)
            push[place] = 2 * UNDECIDED * (-1 if sums[place] > 0 else 1)
            other = run(layer.register_forward_hook(lambda _, i, output, push=push: output + push))
            for name, gradient in other.items():
                undecided[name] += (gradient - found[name]).abs()
    return found, undecided


def condition_gradient(gradients, name, prefix=""):
    """Of a parameter with a released name; the projections of an attention in one."""
    return torch.cat([gradients[prefix + ours] for ours in condition_names(name)])


def near(found, undecided, recorded):
    """Compare a gradient with the recorded one."""
    recorded = torch.from_numpy(recorded)
    excess = (found - recorded).abs() - undecided - ROUNDING * recorded.abs().max()
    assert excess.max() <= 0, f"up to {excess.max():.2g} too far apart"
