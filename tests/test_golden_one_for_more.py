"""Golden cases 3a-3c, 3h, 3j, 3k: condition, sampler, comparison, networks of One-for-More."""

from itertools import product

import numpy as np
import pytest
import torch
from golden_files import arrays, close, matching, numbered, settings
from golden_one_for_more import (
    build_condition,
    build_unet,
    condition_gradient,
    condition_layers,
    condition_names,
    gradients,
    guided,
    near,
    recorded_json,
    schedule,
    tensor,
    unet_names,
    variational_weights,
)

from diffad_ref.anomaly_masked import anomaly_masked_loss, neighbour_mask, sine_positions
from diffad_ref.diffusion import add_noise, ddim_times, ddim_walk
from diffad_ref.gradient_projection import GradientProjectionMemory
from diffad_ref.maps import feature_distance, gaussian_filter
from diffad_ref.one_for_more import OneForMore, learns
from diffad_ref.tools.official_deco_diff import converted_unet
from diffad_ref.tools.official_one_for_more import condition_state

pytestmark = pytest.mark.golden


# -------------------------------------------------------------------------------- 3a the condition

VARIANT = r"h(\d+)_n(?:omask|(\d+)x(\d+))"


def variant(match):
    """The network of case 3a with the heads and the window that an array's name tells."""
    heads, *window = match.group(1, 2, 3)
    window = tuple(map(int, window)) if window[0] else None
    return build_condition("cdad_3a_amn", nhead=int(heads), neighbor_size=window)


def test_condition_under_every_window_and_number_of_heads():
    hint = tensor(arrays("cdad_3ab_amn_io"), "hint")
    for match, recorded in matching("cdad_3ab_amn_io", rf"{VARIANT}_re_true"):
        close(variant(match)(hint), recorded, atol=5e-5)


def test_features_before_the_transformer():
    case, network = arrays("cdad_3ab_amn_io"), build_condition("cdad_3a_amn")
    close(network.features(tensor(case, "hint")), case["re_false"], atol=5e-5)
    normal = network.features(tensor(case, "normal_image"))
    close(normal, case["normal_image_re_false"], atol=5e-5)


def test_tokens_inside_the_transformer():
    hint = tensor(arrays("cdad_3ab_amn_io"), "hint")
    for match, recorded in matching("cdad_3ab_amn_io", rf"{VARIANT}_layer(\d+)_tokens"):
        network, seen = variant(match), []
        network.encoder[int(match[4])].register_forward_hook(
            lambda module, inputs, output, seen=seen: seen.append(output)
        )
        network(hint)
        close(seen[0].transpose(0, 1), recorded, atol=5e-5)  # recorded tokens first, then images


def test_positions():
    case = arrays("cdad_3ab_amn_io")
    channels, height, width = case["re_false"].shape[1:]
    close(sine_positions(height, width, channels), case["pos_embed"])


def test_condition_in_float64(monkeypatch):
    case = arrays("cdad_3ab_amn_io")
    hint, positions = tensor(case, "hint").double(), tensor(case, "pos_embed").double()
    monkeypatch.setattr("diffad_ref.anomaly_masked.sine_positions", lambda *sizes: positions)
    for match, recorded in matching("cdad_3ab_amn_io", rf"{VARIANT}_re_true_float64"):
        network = variant(match).double()
        close(network(hint), recorded, atol=1e-8, rtol=0)
        close(network.features(hint), case["re_false_float64"], atol=1e-8, rtol=0)


def test_which_places_attention_may_not_see():
    grid = arrays("cdad_3ab_amn_io")["re_false"].shape[-2:]
    for match, recorded in matching("cdad_3ab_amn_io", r"mask_n(\d+)x(\d+)"):
        mask = neighbour_mask(*grid, (int(match[1]), int(match[2])))
        assert np.array_equal(mask, recorded)


def blind_places(side, window):
    """From how many places of a square grid a window hides everything, counted one by one."""
    places = list(product(range(side), repeat=2))

    def near(a, b):
        return all(abs(p - q) <= size // 2 for p, q, size in zip(a, b, window, strict=True))

    return sum(all(near(a, b) for b in places) for a in places)


def test_a_window_that_hides_the_whole_grid_is_refused():
    pattern = r"fully_masked_rows_(\d+)x(\d+)_for_sizes_(\d+)_to_(\d+)"
    for match, recorded in matching("cdad_3ab_amn_io", pattern):
        *window, first, last = map(int, match.groups())
        for side, count in zip(range(first, last + 1), recorded, strict=True):
            assert blind_places(side, window) == count
            if count:
                with pytest.raises(ValueError, match="hides the whole grid"):
                    neighbour_mask(side, side, window)
            else:
                neighbour_mask(side, side, window)


# ------------------------------------------------------------------------------------- 3b its loss


def loss_of(network):
    """The recorded loss, of a network in evaluation mode."""
    case, kind = arrays("cdad_3ab_amn_io"), network.convolutions[0].weight.dtype
    condition = network(tensor(case, "hint").to(kind))
    return anomaly_masked_loss(condition, network.features(tensor(case, "normal_image").to(kind)))


@pytest.fixture
def trained():
    """The network whose loss is recorded: the one whose recorded condition gives it."""
    case = arrays("cdad_3ab_amn_io")
    clean = case["normal_image_re_false"]
    return variant(
        min(
            matching("cdad_3ab_amn_io", rf"{VARIANT}_re_true"),
            key=lambda found: abs(np.square(found[1] - clean).mean() - case["re_loss"]),
        )[0]
    )


def test_loss_of_the_condition(trained):
    close(loss_of(trained), arrays("cdad_3ab_amn_io")["re_loss"])


def test_its_gradients_flow_into_both_sides(trained):
    network = trained.double()  # so that only the recorded numbers are rounded
    parts = gradients(network, network, lambda: loss_of(network))
    for match, recorded in matching("cdad_3ab_amn_io", r"re_loss_grad__(.+)"):
        near(*(condition_gradient(part, match[1]) for part in parts), recorded)
    for match, recorded in matching("cdad_3ab_amn_io", r"re_loss_grad_row(\d+)__(.+)"):
        row = int(match[1])
        near(*(condition_gradient(part, match[2])[row] for part in parts), recorded)
    for match, recorded in matching("cdad_3ab_amn_io", r"re_loss_grad_norm__(.+)"):
        near(*(condition_gradient(part, match[1]).norm() for part in parts), recorded)


# ------------------------------------------------------------------------- 3c schedule and sampler


@pytest.fixture(scope="module")
def sampler():
    return arrays("cdad_3c_ddim")


QUANTITIES = {
    "betas": lambda s: s.betas,
    "alphas_cumprod": lambda s: s.abar,
    "sqrt_alphas_cumprod": lambda s: s.abar.sqrt(),
    "sqrt_one_minus_alphas_cumprod": lambda s: (1 - s.abar).sqrt(),
    "lvlb_weights": variational_weights,
}


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_schedule(sampler, quantity):
    found = QUANTITIES[quantity](schedule())
    for match, recorded in matching("cdad_3c_ddim", rf"{quantity}_f(32|64)"):
        rtol = 1e-3 if quantity == "lvlb_weights" else 1e-9 if match[1] == "64" else 1e-6
        close(found, recorded, atol=0, rtol=rtol)


def test_which_steps_the_sampler_visits(sampler):
    for match, recorded in matching("cdad_3c_ddim", r"ddim(\d+)_timesteps"):
        times = ddim_times(len(sampler["betas_f64"]), int(match[1]))
        assert times[::-1] == recorded.tolist()


def test_signal_left_at_these_steps_and_after_them(sampler):
    abar = schedule().abar
    for match, recorded in matching("cdad_3c_ddim", r"ddim(\d+)_alphas"):
        times = ddim_times(len(abar), int(match[1]))
        close(abar[times[::-1]], recorded, atol=0, rtol=1e-6)
        # Without noise, a step takes the estimate to the signal that is left after it.
        states, estimates = ddim_walk(
            lambda x, t: torch.zeros_like(x),
            torch.ones(1, 1, 1, 1, dtype=torch.float64),
            schedule(),
            times,
            abar[0].item(),
        )
        after = torch.cat(states[::-1]).flatten() / torch.cat(estimates[::-1]).flatten()
        close(after.square(), sampler[f"{match[0]}_prev"], atol=0, rtol=1e-6)


def test_the_walk_starts_from_the_last_level(sampler):
    last = schedule().abar[-1].float()
    found = add_noise(tensor(sampler, "z"), tensor(sampler, "noise"), last)
    close(found, sampler["x_noisy"])


def walk(case, *conditions):
    """States, estimates, and what the model saw; guided where there are two conditions."""
    times, seen = case["traj_model_t"][:, 0].tolist(), []
    conditions = [tensor(case, name) for name in conditions]

    def fake(x, t, condition):
        seen.append(t)
        x_part, t_part = torch.tanh(0.5 * x), torch.cos(t / 100)
        return x_part * t_part[:, None, None, None] + condition[:, None, None, None]

    def model(x, t):
        return guided(fake, x, t, conditions) if conditions[1:] else fake(x, t, *conditions)

    start, end = tensor(case, "x_noisy"), schedule().abar[0].item()
    states, estimates = ddim_walk(model, start, schedule(), times, end)
    return torch.stack([start, *states]), torch.stack([start, *estimates]), seen


def test_states_and_estimates_of_the_walk(sampler):
    states, estimates, _ = walk(sampler, "cond")
    close(states, sampler["traj_x"], atol=1e-3)
    close(estimates, sampler["traj_pred_x0"], atol=1e-3)


def test_the_model_is_told_the_steps_of_the_walk(sampler):
    times, total = sampler["traj_model_t"], len(sampler["betas_f64"])
    assert times[:, 0].tolist() in [ddim_times(total, n) for n in range(1, len(times) + 1)]
    assert torch.stack(walk(sampler, "cond")[2]).tolist() == times.tolist()


def test_noise_at_the_steps_of_the_walk_which_adds_none(sampler):
    times = torch.from_numpy(sampler["traj_model_t"][::-1, 0].copy())
    noise = (1 - schedule().at(times)).sqrt().flatten()
    close(noise, sampler["sampler_sqrt_one_minus_alphas"], atol=0, rtol=1e-6)
    assert not sampler["sampler_sigmas"].any()


def test_guidance_between_equal_conditions_changes_nothing_and_costs_double(sampler):
    states, _, seen = walk(sampler, "cond", "cond")
    close(states, sampler["guided_same_cond_traj_x"], atol=1e-3)
    close(states[-1], sampler["guided_same_cond_final"], atol=1e-3)
    change = (states - walk(sampler, "cond")[0]).abs().max()
    close(change, sampler["max_abs_diff_guided_same_vs_unguided"], atol=1e-4)
    assert {len(t) for t in seen} == {int(sampler["guided_model_batch"])}


def test_guidance_between_other_conditions_would_act(sampler):
    states = walk(sampler, "uncond_other", "cond")[0]
    close(states[-1], sampler["guided_other_cond_final"], atol=1e-3)
    change = (states[-1] - walk(sampler, "cond")[0][-1]).abs().max()
    close(change, sampler["max_abs_diff_guided_other_vs_unguided"], atol=0, rtol=1e-3)


# -------------------------------------------------------------------------------- 3h anomaly map


def test_distance_of_features_and_its_smoothing():
    case = arrays("cdad_3h_anomaly_map")
    pyramids = [
        [tensor(case, name).double() for name in numbered(case, pattern)]
        for pattern in (r"a(\d+)", r"b(\d+)")
    ]
    found = feature_distance(*pyramids, int(case["out_size"]))
    for match, recorded in matching("cdad_3h_anomaly_map", r"a_eucl(?:_smoothed_sigma(\d+))?"):
        close(gaussian_filter(found, float(match[1] or 0)), recorded, rtol=1e-5)


# ---------------------------------------------------------------------- 3j what learns, and names


@pytest.fixture(scope="module")
def official():
    """The detector of the paper's size, without numbers."""
    with torch.device("meta"):
        return OneForMore.paper()


@pytest.fixture(scope="module", params=["small", "official"])
def learning(request, official):
    """What is recorded of a pair of networks, our names of the U-Net's parameters, and the pair."""
    recorded = recorded_json(f"cdad_3j_trained_names_{request.param}")
    unet, condition, blocks = official.unet, official.condition, official.config.blocks
    if request.param == "small":
        blocks = settings("cdad_3k_unet")["num_res_blocks"]
        unet = build_unet("cdad_3k_unet", tensor(arrays("cdad_3k_unet_io"), "context"))
        condition = build_condition("cdad_3k_amn")
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(learns(name, parameter))
    names = unet_names(recorded["trained_parameters"] + recorded["frozen_parameters"], blocks)
    return recorded, names, unet, condition


def test_which_weights_of_the_unet_learn(learning):
    recorded, names, unet, _ = learning
    assert set(names.values()) == {name for name, _ in unet.named_parameters()}
    ours = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    once = recorded["trained_first_task_but_zeroed_later"]
    assert ours == {names[name] for name in set(recorded["trained_parameters"]) - set(once)}


def test_the_scale_of_the_last_norm_learns_in_the_released_first_task_and_never_here(learning):
    recorded, names, unet, _ = learning
    once = recorded["trained_first_task_but_zeroed_later"]
    assert [names[name] for name in once] == ["unet.conv_norm_out.weight"]
    assert not unet.get_parameter("unet.conv_norm_out.weight").requires_grad


def test_all_of_the_condition_learns(learning):
    recorded, _, _, condition = learning
    ours = {name for name, parameter in condition.named_parameters() if parameter.requires_grad}
    theirs = recorded["control"]["all_parameters"]
    assert ours == {name for official in theirs for name in condition_names(official)}


def test_which_layers_are_watched_and_protected(learning):
    """Of an attention the released code watches the queries; ours also keys and values."""
    recorded, names, unet, condition = learning
    theirs = recorded["modules_whose_hook_records"]
    ours = {f"{name}.weight" for name in GradientProjectionMemory(unet).layers}
    assert ours == {names[f"{module}.weight"] for module in theirs}
    theirs = recorded["control"]["modules_whose_hook_records"]
    ours = set(GradientProjectionMemory(condition).layers)
    assert ours == {name for module in theirs for name in condition_layers(module)}


def test_what_of_the_condition_learns_in_the_first_task_only(learning):
    recorded, _, _, condition = learning
    protected = {f"{name}.weight" for name in GradientProjectionMemory(condition).layers}
    once = recorded["control"]["trained_first_task_but_zeroed_later"]
    rest = {name for name, _ in condition.named_parameters()} - protected
    assert rest == {name for official in once for name in condition_names(official)}


def test_parameter_counts_of_the_published_size(official):
    recorded = recorded_json("cdad_3j_trained_names_official")["parameter_counts"]
    numbers = {name: p.numel() for name, p in official.unet.named_parameters()}
    assert sum(numbers.values()) == recorded["unet"]
    assert sum(p.numel() for p in official.condition.parameters()) == recorded["amn"]
    learning = [name for name, p in official.unet.named_parameters() if p.requires_grad]
    learning.append("unet.conv_norm_out.weight")  # in the released first task: see above
    assert sum(numbers[name] for name in learning) == recorded["unet_trained"]


def test_every_weight_of_the_released_networks_has_its_place(official):
    recorded = recorded_json("cdad_names_official")
    for part, convert, network in (
        ("controlled_unet", converted_unet, official.unet.unet),
        ("amn", condition_state, official.condition),
    ):
        theirs = {n: torch.empty(shape, device="meta") for n, shape in recorded[part].items()}
        found, ours = convert(theirs), network.state_dict()
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in ours.items()}


# ------------------------------------------------------------------------------ 3k the whole U-Net


def run(case, dtype, sinusoid=None, control=True):
    """Output, sinusoid (which may be replaced) and features of the first convolution."""
    network, seen = build_unet("cdad_3k_unet", tensor(case, "context")).to(dtype), {}

    def see(name, replacement=None):
        def hook(module, inputs, output):
            seen[name] = output
            return replacement

        return hook

    network.unet.time_proj.register_forward_hook(see("sinusoid", sinusoid))
    network.unet.conv_in.register_forward_hook(see("first"))
    x, features = (tensor(case, name).to(dtype) for name in ("x", "control"))
    with torch.no_grad():
        return network(x, tensor(case, "t"), features if control else None), seen


def test_unet_under_control():
    case = arrays("cdad_3k_unet_io")
    output, seen = run(case, torch.float32)
    close(output, case["output"], atol=5e-5)
    close(seen["sinusoid"], case["t_sinusoid"], atol=1e-4)


def test_unet_without_control():
    case = arrays("cdad_3k_unet_io")
    close(run(case, torch.float32, control=False)[0], case["output_without_control"], atol=5e-5)


def test_control_is_added_after_the_first_convolution():
    case = arrays("cdad_3k_unet_io")
    before = run(case, torch.float32)[1]["first"] - tensor(case, "control")
    close(before, case["first_block_output_before_control"], atol=5e-5)


def test_unet_under_control_in_float64():
    case = arrays("cdad_3k_unet_io")
    output, _ = run(case, torch.float64, tensor(case, "t_sinusoid").double())
    close(output, case["output_float64"], atol=1e-8, rtol=0)
