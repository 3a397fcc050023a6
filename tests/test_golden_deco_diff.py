"""Golden cases 2a-2f: the mathematics and the network of DeCo-Diff."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_files import FOLDER, arrays, close, matching, names, settings, shifted, weights

from diffad_ref.deco_diff import (
    FUSIONS,
    SIZES,
    Config,
    DecoDiff,
    correct,
    corrupt,
    deviation,
    image_discrepancy,
    latent_discrepancy,
    mix_noise,
    patch_mask,
    shuffle_patches,
    signal_share,
)
from diffad_ref.diffusion import Schedule
from diffad_ref.networks import LatentUNet
from diffad_ref.tools.official_deco_diff import corrector_state, respaced

pytestmark = pytest.mark.golden


def fake_model(d=3.0, scale=1.0):
    """The closed form that stands in for a network, with a list of the time steps it was given."""
    seen = []

    def model(z, t):
        seen.append(t.clone())
        return scale * torch.tanh(0.5 * z) * torch.cos(t.float() / d)[:, None, None, None]

    return model, seen


# ---------------------------------------------------------------------------------- 2a schedules

QUANTITIES = {
    "betas": lambda s: 1 - s.abar / shifted(s.abar),
    "alphas_cumprod": lambda s: s.abar,
    "alphas_cumprod_prev": lambda s: shifted(s.abar),
    "sqrt_alphas_cumprod": lambda s: s.abar.sqrt(),
    "sqrt_one_minus_alphas_cumprod": lambda s: (1 - s.abar).sqrt(),
    "deviation_coeff": lambda s: signal_share(s.abar),
}


def kept_steps(steps, respacing):
    """What a re-spacing such as "ddim5" keeps of so many steps; ValueError if no stride does."""
    count = steps if respacing == "full" else int(respacing.removeprefix("ddim"))
    return respaced(steps, count)


def length_of(processes):
    """Steps of the schedule behind a case, of the lengths in case 2a and those the case names.

    Told by the time values that the case's models got: `processes` holds for each re-spacing the
    indices of its steps and those values. Where several fit, one that is kept whole is the length.
    """
    recorded = {int(m[1]) for m, _ in matching("deco_2a_schedules", r"steps(\d+)_\w+_timestep_map")}
    named = {int(name.removeprefix("ddim")) for name, _, _ in processes if name != "full"}

    def fits(steps):
        try:
            kept = [(kept_steps(steps, name), i, t) for name, i, t in processes]
        except ValueError:
            return False
        return all(i.max() < len(k) and np.array_equal(np.array(k)[i], t) for k, i, t in kept)

    found = [steps for steps in sorted(recorded | named) if fits(steps)]
    found = [steps for steps in found if steps in named] or found
    assert len(found) == 1, f"the case fits schedules of {found} steps"
    return found[0]


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_schedules_and_what_respacing_leaves_of_them(quantity):
    for match, recorded in matching("deco_2a_schedules", rf"steps(\d+)_([a-z0-9]+)_{quantity}"):
        steps = int(match[1])
        abar = Schedule.named("cosine", steps).abar[kept_steps(steps, match[2])]
        found = QUANTITIES[quantity](SimpleNamespace(abar=abar))
        close(found, recorded, atol=0, rtol=1e-9)


def test_which_steps_are_kept():
    for match, recorded in matching("deco_2a_schedules", r"steps(\d+)_([a-z0-9]+)_timestep_map"):
        assert kept_steps(int(match[1]), match[2]) == recorded.tolist()


def test_which_numbers_of_steps_are_possible():
    for match, recorded in matching("deco_2a_schedules", r"ddimN_accepted_for_(\d+)_steps"):
        for count, accepted in enumerate(recorded, start=1):
            if accepted:
                assert len(respaced(int(match[1]), count)) == count
            else:
                with pytest.raises(ValueError, match="stride"):
                    respaced(int(match[1]), count)


# ----------------------------------------------------------------------------------- 2b training


def training_case():
    """Every recorded process of case 2b, with its inputs as tensors."""
    case = arrays("deco_2b_training")
    inputs = [torch.from_numpy(case[name]) for name in ("x_start", "noise", "mask")]
    found = matching("deco_2b_training", r"(ddim\d+|full)_t")
    steps = length_of([(match[1], t, case[f"{match[1]}_model_t"]) for match, t in found])
    for match, t in found:
        t = torch.tensor(kept_steps(steps, match[1]))[torch.from_numpy(t)]
        yield case, match[1], inputs, t, Schedule.named("cosine", steps)


def test_corruption_and_its_target():
    for case, process, inputs, t, schedule in training_case():
        abar = schedule.at(t)
        close(corrupt(*inputs, abar), case[f"{process}_x_t"], atol=1e-6, rtol=0)
        close(deviation(*inputs, abar), case[f"{process}_target"], atol=1e-6, rtol=0)
        assert t.tolist() == case[f"{process}_model_t"].tolist()


def test_loss_and_its_gradient():
    for case, process, inputs, t, schedule in training_case():
        abar, scale = schedule.at(t), torch.ones((), requires_grad=True)
        model, _ = fake_model(scale=scale)
        error = (deviation(*inputs, abar) - model(corrupt(*inputs, abar), t)).square()
        close(error.mean((1, 2, 3)), case[f"{process}_loss_per_sample"])
        close(error.mean(), case[f"{process}_loss"])
        error.mean().backward()
        close(scale.grad, case[f"{process}_grad_scale"], atol=0)


# --------------------------------------------------------------------------------- 2c correction


def test_every_intermediate_state_of_the_correction():
    case = arrays("deco_2c_sampling")
    found = matching("deco_2c_sampling", r"((ddim\d+|full)_start(\d+))_samples")
    steps = length_of(
        [(m[2], case[f"{m[1]}_index"], case[f"{m[1]}_model_t"][:, 0]) for m, _ in found]
    )
    for match, recorded in found:
        kept = kept_steps(steps, match[2])[: int(match[3])]
        model, seen = fake_model()
        z, schedule = torch.from_numpy(case["z"]), Schedule.named("cosine", steps)
        close(torch.stack(correct(model, z, schedule, kept[::-1])), recorded)
        assert torch.stack(seen).tolist() == case[f"{match[1]}_model_t"].tolist()
        assert list(range(len(kept)))[::-1] == case[f"{match[1]}_index"].tolist()


# ------------------------------------------------------------------------------------ 2d patches


def test_patches_wander_through_the_whole_batch():
    x = torch.from_numpy(arrays("deco_2d_patches")["x"])
    for match, order in matching("deco_2d_patches", r"p(\d+)_shuffle_perm"):
        shuffled = shuffle_patches(x, int(match[1]), torch.from_numpy(order).long())
        assert np.array_equal(shuffled, arrays("deco_2d_patches")[f"p{match[1]}_shuffled"])


def test_masks_keep_whole_patches():
    case = arrays("deco_2d_patches")
    ratios = torch.from_numpy(case["mask_ratios"])
    for match, order in matching("deco_2d_patches", r"p(\d+)_mask_perm"):
        kept = (order.shape[1] * (1 - ratios)).long()
        side = case["x"].shape[-1]
        mask = patch_mask(kept, torch.from_numpy(order).long(), int(match[1]), side)
        recorded = case[f"p{match[1]}_mask"]
        assert np.array_equal(mask.expand(recorded.shape), recorded)


def test_noise_mixes_gaussian_and_foreign_content():
    case = arrays("deco_2d_patches")
    for match, recorded in matching("deco_2d_patches", r"mix_noise_p(\d+)"):
        gaussian, foreign, n = (
            torch.from_numpy(case[name]).float()
            for name in ("mix_gaussian", f"p{match[1]}_shuffled", f"p{match[1]}_mask")
        )
        close(mix_noise(gaussian, foreign, n), recorded, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------ 2e network

NETWORKS = names("deco_2e_unet_*")


def build(name):
    """Our network with the recorded weights, converted."""
    given = settings(name)
    network = LatentUNet(
        weights(name)["input_blocks.0.0.weight"].shape[1],
        given["ncls"],
        given["model_channels"],
        tuple(given["channel_mult"]),
        given["num_res_blocks"],
        given["num_heads"],
        given["context_dim"],
        dropout=0.4,
        norm_groups=32,
    )
    network.load_state_dict(corrector_state(weights(name), given["num_res_blocks"]))
    return network.eval()


def run(network, x, t, category, sinusoid=None):
    """Output and the intermediate results that are recorded; may replace the sinusoid."""
    unet, seen = network.unet, {}

    def keep(name, pick=lambda output: output):
        def hook(module, inputs, output):
            seen[name] = pick(output)

        return hook

    def replace_or_keep(module, inputs, output):
        seen["t_sinusoid"] = output
        return sinusoid

    first = unet.down_blocks[0].attentions[0]
    hooks = [
        unet.time_proj.register_forward_hook(replace_or_keep),
        unet.time_embedding.register_forward_hook(keep("time_embed")),
        unet.mid_block.register_forward_hook(keep("middle")),
        first.register_forward_pre_hook(
            lambda module, inputs: seen.update(spatial_transformer_in=inputs[0])
        ),
        first.register_forward_hook(keep("spatial_transformer_out", lambda output: output[0])),
    ]
    with torch.no_grad():
        seen["output"] = network(x, t, category)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", NETWORKS)
def test_network_and_its_intermediate_results(name):
    case = arrays(f"{name}_io")
    x, t = torch.from_numpy(case["x"]), torch.from_numpy(case["t"])
    found = run(build(name), x, t, torch.from_numpy(case["context"])[:, 0].long())
    close(found["t_sinusoid"], case["t_sinusoid"], atol=1e-5)
    for part in ("output", "time_embed", "spatial_transformer_in", "spatial_transformer_out"):
        close(found[part], case[part], atol=5e-5)
    close(found["middle"], case["middle"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_network_in_float64(name):
    case = arrays(f"{name}_io")
    x, t = torch.from_numpy(case["x"]).double(), torch.from_numpy(case["t"])
    category = torch.from_numpy(case["context"])[:, 0].long()
    sinusoid = torch.from_numpy(case["t_sinusoid"]).double()
    found = run(build(name).double(), x, t, category, sinusoid)
    close(found["output"], case["output_float64"], atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_class_changes_the_output(name):
    case = arrays(f"{name}_io")
    x, t = torch.from_numpy(case["x"]), torch.from_numpy(case["t"])
    following = (torch.from_numpy(case["context"])[:, 0].long() + 1) % settings(name)["ncls"]
    found = run(build(name), x, t, following)
    close(found["output"], case["output_next_class"], atol=5e-5)


def test_parameter_counts_of_all_five_sizes():
    recorded = json.loads((FOLDER / "deco_names_official.json").read_text())["n_params"]
    assert {name.removeprefix("UNet_") for name in recorded} == set(SIZES)
    for name, count in recorded.items():
        with torch.device("meta"):
            detector = DecoDiff(Config.paper(name.removeprefix("UNet_")))
        assert sum(p.numel() for p in detector.corrector.parameters()) == count


def test_every_weight_of_the_released_network_has_its_place():
    recorded = json.loads((FOLDER / "deco_names_official.json").read_text())["UNet_L"]
    with torch.device("meta"):
        theirs = {name: torch.empty(shape) for name, shape in recorded.items()}
        ours = DecoDiff.paper().corrector.state_dict()
    found = corrector_state(theirs)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in ours.items()}


# ------------------------------------------------------------------------------- 2f anomaly maps


def test_discrepancies_and_their_fusions():
    case = arrays("deco_2f_anomaly_maps")
    given = {name: torch.from_numpy(case[name]) for name in case if case[name].ndim}
    image = image_discrepancy(given["recon"], given["x0"])
    size = int(case["center_size"])
    latent = latent_discrepancy(given["latent_recon"], given["encoded"], size)
    close(image, case["image_discrepancy"])
    close(latent, case["latent_discrepancy"])
    for fusion in ("geometric", "arithmetic"):
        close(FUSIONS[fusion](image, latent), case[fusion])
