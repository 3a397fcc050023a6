"""Golden case 3l: loss, walk and memory of One-for-More, with the small networks of case 3k."""

from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from golden_files import arrays, close, matching, numbered, settings, weights
from golden_one_for_more import (
    build_condition,
    build_unet,
    condition_gradient,
    condition_layers,
    gradients,
    guided,
    near,
    recorded_json,
    schedule,
    tensor,
    unet_names,
    variational_weights,
)
from torch import nn

from diffad_ref.anomaly_masked import anomaly_masked_loss
from diffad_ref.diffusion import add_noise, ddim_times, ddim_walk
from diffad_ref.gradient_projection import GradientProjectionMemory, representation
from diffad_ref.iterative_svd import IterativeSVD
from diffad_ref.one_for_more import OneForMore, learns

pytestmark = pytest.mark.golden

MARGIN = 1e-5  # of a share of the energy to 0.999, above which rounding cannot change a rank
LARGEST = 300  # features of a watched layer; singular vectors of the few larger ones take a minute


@pytest.fixture(scope="module")
def case():
    return arrays("cdad_3l_pipeline")


@pytest.fixture(scope="module")
def networks(case):
    """Both networks, in evaluation mode."""
    unet = build_unet("cdad_3k_unet", tensor(case, "text_context"))
    return nn.ModuleDict({"unet": unet, "condition": build_condition("cdad_3k_amn")})


def latents(case):
    """z of each batch."""
    return OneForMore.Config.paper().codec.scale * tensor(case, "latents")


@cache
def our_unet_names():
    blocks = settings("cdad_3k_unet")["num_res_blocks"]
    return unet_names(weights("cdad_3k_unet"), blocks)


# ---------------------------------------------------------------------------------------- training


def losses_of(case, networks):
    """The losses of the first batch."""
    t, noise, levels = tensor(case, "train_t"), tensor(case, "noise")[0], schedule()
    z_t = add_noise(latents(case)[0], noise, levels.at(t))
    condition = networks["condition"](tensor(case, "hints")[0])
    clean = networks["condition"].features(tensor(case, "normal_images")[0])
    error = (noise - networks["unet"](z_t, t, condition)).square().mean((1, 2, 3))
    losses = SimpleNamespace(
        simple=error.mean(),
        masked=anomaly_masked_loss(condition, clean),
        variational=(variational_weights(levels)[t] * error).mean(),
    )
    losses.total = losses.simple + losses.masked
    return losses


@pytest.fixture(scope="module")
def losses(case, networks):
    with torch.no_grad():
        return losses_of(case, networks)


def test_noise_and_condition_make_the_loss(case, losses):
    close(losses.simple, case["train_loss_simple"])
    close(losses.masked, case["train_re_loss"])
    close(losses.total, case["train_loss"])


def test_the_variational_loss_is_no_part_of_it(case, losses):
    close(losses.variational, case["train_loss_vlb"], atol=0, rtol=1e-3)


def test_the_released_log_calls_the_total_the_loss(case, losses):
    close(losses.total, case["train_logged_loss"])


def test_gradients_of_the_total(case, networks):
    def total():
        return losses_of(case, networks).total

    parts, names = gradients(networks, networks["condition"], total), our_unet_names()
    for match, recorded in matching("cdad_3l_pipeline", r"train_grad__(unet|amn)\.(.+)"):
        if match[1] == "amn":
            found = (condition_gradient(part, match[2], "condition.") for part in parts)
        else:
            found = (part[f"unet.{names[match[2]]}"] for part in parts)
        near(*found, recorded)


# ------------------------------------------------------------------------------- walk and memory


def layer_of(module):
    """Our layer for a released module; of an attention, the one that sees what is recorded."""
    name = our_unet_names().get(f"{module}.weight")
    if name:
        return f"unet.{name.removesuffix('.weight')}"
    return f"condition.{condition_layers(module)[0]}"


@pytest.fixture(scope="module")
def ranks():
    """What is recorded of matrices whose rank rounding cannot change, by our layer and by batch."""
    recorded = recorded_json("cdad_3l_pipeline_ranks")
    batches = [recorded[name] for name in numbered(recorded, r"after_batch(\d+)")]
    found = {
        layer_of(module): [batch[module] for batch in batches]
        for module, first in batches[0].items()
        if first["matrix_shape_before_svd"][0] <= LARGEST
        and all(batch[module]["margin"] > MARGIN for batch in batches)
    }
    assert found
    return found


def memory_of(networks, choose=lambda name: True):
    """Watches what learns."""
    return GradientProjectionMemory(
        networks, lambda name, layer: learns(f"{name}.weight", layer.weight) and choose(name)
    )


@contextmanager
def released(layers):
    """Iterative SVDs in the released way, and the columns since the last update, while it lasts."""
    svds = {name: IterativeSVD(0.999, keep_values=False, reach=False) for name in layers}
    columns = {name: [] for name in layers}

    def recorder(name):
        return lambda layer, inputs: columns[name].append(representation(layer, inputs[0].detach()))

    hooks = [layer.register_forward_pre_hook(recorder(name)) for name, layer in layers.items()]
    yield svds, columns
    for hook in hooks:
        hook.remove()


@pytest.fixture(scope="module")
def walked(case, networks, ranks):
    """Each batch's walk, and what the memory holds after it, layer by layer."""
    levels, hints, found = schedule(), tensor(case, "hints"), []

    def model(x, t, hint):  # the released code makes the condition anew at every step
        return networks["unet"](x, t, networks["condition"](hint))

    layers = memory_of(networks, ranks.__contains__).layers
    with released(layers) as (svds, columns):
        for batch, name in enumerate(numbered(case, r"batch(\d+)_x_inter")):
            last = torch.full((len(hints[batch]),), len(levels) - 1)
            start = add_noise(latents(case)[batch], tensor(case, "noise")[batch], levels.at(last))
            states, estimates = ddim_walk(
                lambda x, t, hint=hints[batch]: guided(model, x, t, [hint, hint]),
                start,
                levels,
                ddim_times(len(levels), len(case[name]) - 1),
                levels.abar[0].item(),
            )
            for layer, svd in svds.items():
                svd.update(torch.cat(columns[layer], 1))
                columns[layer].clear()
            found.append(
                SimpleNamespace(
                    name=name.removesuffix("x_inter"),
                    states=torch.stack([start, *states]),
                    estimates=torch.stack([start, *estimates]),
                    samples={layer: svd.samples for layer, svd in svds.items()},
                    bases={layer: svd.basis for layer, svd in svds.items()},
                )
            )
    return found


def test_states_and_estimates_of_every_walk(case, walked):
    for batch in walked:
        close(batch.states, case[f"{batch.name}x_inter"], atol=1e-3)
        close(batch.estimates, case[f"{batch.name}pred_x0"], atol=1e-3)


def test_the_last_state_is_the_sample(case, walked):
    for batch in walked:
        close(batch.states[-1], case[f"{batch.name}sample_latent"], atol=1e-3)


def test_every_module_that_records_is_watched(networks):
    recorded, ours = recorded_json("cdad_3l_pipeline_ranks"), memory_of(networks).layers
    assert ours.keys() >= {layer_of(m) for m in recorded["recorded_modules"]}
    assert not ours.keys() & {layer_of(m) for m in recorded["hooked_but_nothing_recorded"]}


def test_every_column_of_the_first_walk_is_recorded(ranks, walked):
    """Both halves of the doubled batch, and the condition at every step."""
    for layer, (recorded, *_) in ranks.items():
        shape = [len(walked[0].bases[layer]), walked[0].samples[layer]]
        assert recorded["matrix_shape_before_svd"] == shape, layer


def test_later_matrices_begin_with_the_basis_so_far(ranks, walked):
    for layer, (_, *later) in ranks.items():
        for recorded, before, batch in zip(later, walked[:-1], walked[1:], strict=True):
            new = batch.samples[layer] - before.samples[layer]
            shape = [len(batch.bases[layer]), before.bases[layer].shape[1] + new]
            assert recorded["matrix_shape_before_svd"] == shape, layer


def test_ranks_after_every_batch(ranks, walked):
    for layer, recorded in ranks.items():
        found = [batch.bases[layer].shape[1] for batch in walked]
        assert found == [matrix["rank"] for matrix in recorded], layer


def test_what_the_first_task_leaves_in_the_memory(ranks, walked):
    recorded = {layer_of(m[1]): b for m, b in matching("cdad_3l_pipeline", r"project__(.+)")}
    compared = recorded.keys() & ranks.keys()
    assert compared
    for layer in compared:
        found, basis = walked[-1].bases[layer], recorded[layer].astype(float)
        close(found @ found.T, basis @ basis.T, atol=1e-3, rtol=0)
