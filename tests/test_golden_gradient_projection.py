"""Golden cases 3d-3g: representations, iterative SVD, memory and projection."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_files import FOLDER, arrays, close, matching, numbered
from torch import nn

from diffad_ref.gradient_projection import (
    GradientProjectionMemory,
    extend_basis,
    representation,
)
from diffad_ref.iterative_svd import IterativeSVD, left_singular

pytestmark = pytest.mark.golden


def tensor(case, name):
    return torch.from_numpy(case[name])


def gram(basis):
    return basis @ basis.T


# ------------------------------------------------------------------------------ 3d representations


def layer_of(name, x, matrix):
    """The layer that a case's name and shapes describe; its weights play no part."""
    if x.ndim != 4:
        return nn.Linear(x.shape[-1], 1)
    kernel, stride = re.match(r"conv(\d+)(?:_s(\d+))?", name).groups()
    kernel, stride = int(kernel), int(stride or 1)
    assert len(matrix) == x.shape[1] * kernel**2
    return nn.Conv2d(x.shape[1], 1, kernel, stride, padding=kernel // 2)


def test_representations_of_layers():
    case = arrays("cdad_3d_activations")
    for name in {match[1] for match, _ in matching("cdad_3d_activations", r"(.+)_input\d+")}:
        inputs = [tensor(case, call) for call in numbered(case, rf"{name}_input(\d+)")]
        layer = layer_of(name, inputs[0], case[f"{name}_matrix"])
        matrix = torch.cat([representation(layer, x) for x in inputs], 1)
        close(matrix, case[f"{name}_matrix"])


def test_representations_of_attention_projections():
    """Attention is four linear layers; ours records all of them, the released code two."""
    case = arrays("cdad_3d_activations")
    source, place = tensor(case, "mha_src"), tensor(case, "mha_pos")
    width = source.shape[-1]
    maps = {}
    weights = tensor(case, "mha_in_proj_weight").chunk(3)
    biases = tensor(case, "mha_in_proj_bias").chunk(3)
    for name, weight, bias in zip("qkv", weights, biases, strict=True):
        maps[name] = nn.Linear(width, width)
        maps[name].load_state_dict({"weight": weight, "bias": bias})
    out = nn.Linear(width, width)
    out.load_state_dict(
        {"weight": tensor(case, "mha_out_proj_weight"), "bias": tensor(case, "mha_out_proj_bias")}
    )
    query = source + place
    close(representation(maps["q"], query), case["mha_matrix"])
    fitting = 0
    for heads in range(1, width + 1):  # the file does not say how many there are
        if width % heads:
            continue
        q, k, v = (
            maps[name](x).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
            for name, x in zip("qkv", (query, query, source), strict=True)
        )  # (B, heads, tokens, width of a head)
        joined = F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).flatten(2)
        if np.allclose(out(joined).detach(), case["mha_output"], atol=1e-5, rtol=1e-4):
            close(representation(out, joined), case["mha_out_proj_matrix"])
            fitting += 1
    assert fitting == 1


# --------------------------------------------------------------------------------- 3e iterative SVD


def released():
    return IterativeSVD(keep_values=False, reach=False)


def test_released_iterative_svd():
    case = arrays("cdad_3e_isvd")
    for run in {match[1] for match, _ in matching("cdad_3e_isvd", r"(.+)_step\d+_chunk")}:
        svd = released()
        for chunk in numbered(case, rf"{run}_step(\d+)_chunk"):
            step, values = chunk.removesuffix("_chunk"), svd.update(tensor(case, chunk).T)
            recorded = case[f"{step}_singular_values"]
            close(values, recorded, atol=1e-5 * recorded.max(), rtol=1e-4)
            share = torch.cumsum(values.square(), 0) / values.square().sum()
            close(share, case[f"{step}_cumulative_energy"], atol=1e-5)
            assert svd.basis.shape[1] == int(case[f"{step}_rank"])
            close(gram(svd.basis), case[f"{step}_projector"], atol=1e-3)
            close(gram(svd.basis), gram(case[f"{step}_basis"].astype(float)), atol=1e-3)


def test_without_singular_values_a_large_chunk_pushes_the_old_basis_out():
    case, svd = arrays("cdad_3e_isvd"), released()
    svd.update(tensor(case, "forget_chunk0").T)
    first = svd.basis
    assert first.shape[1] == int(case["forget_step0_rank"])
    close(gram(first), gram(case["forget_first_basis"].astype(float)), atol=1e-3)
    recorded = case["forget_step1_singular_values"]
    close(svd.update(tensor(case, "forget_chunk1").T), recorded, atol=1e-5 * recorded.max())
    close(gram(svd.basis), case["forget_step1_projector"], atol=1e-3)
    kept = (svd.basis.T @ first).square().sum() / first.shape[1]
    close(kept, case["forget_fraction_of_first_basis_kept"], atol=1e-6)


def test_with_singular_values_the_old_basis_stays():
    case, svd = arrays("cdad_3e_isvd"), IterativeSVD()
    svd.update(tensor(case, "forget_chunk0").T)
    first = svd.basis
    svd.update(tensor(case, "forget_chunk1").T)
    assert (svd.basis.T @ first).square().sum() / first.shape[1] > 0.999


def test_the_released_rule_loses_one_direction_at_every_call():
    case, svd = arrays("cdad_3e_isvd"), released()
    chunk, ranks = tensor(case, "erode_chunk0").T, []
    for call in range(len(case["erode_ranks"])):
        svd.update(chunk if call == 0 else torch.zeros_like(chunk))
        ranks.append(svd.basis.shape[1])
    assert ranks == case["erode_ranks"].tolist()


def test_ours_loses_none():
    case, svd = arrays("cdad_3e_isvd"), IterativeSVD()
    chunk, ranks = tensor(case, "erode_chunk0").T, set()
    for call in range(len(case["erode_ranks"])):
        svd.update(chunk if call == 0 else torch.zeros_like(chunk))
        ranks.add(svd.basis.shape[1])
    assert len(ranks) == 1


# -------------------------------------------------------------------------------------- 3f memory

GAMMA = 0.5  # released, for every further task


def test_released_extension_by_columns_of_the_residual():
    case = arrays("cdad_3f_basis_extension")
    before = None
    for data in numbered(case, r"task(\d+)_data"):
        task, svd = data.removesuffix("_data"), released()
        svd.update(tensor(case, data).T)
        close(gram(svd.basis), case[f"{task}_act_projector"], atol=1e-3)
        act = tensor(case, f"{task}_act").double()
        # The first task's compressed basis is the memory; the threshold is for later ones.
        after = act if before is None else extend_basis(before, act, GAMMA, "residual")
        if before is not None:
            residual = act - before @ (before.T @ act)
            close(residual, case[f"{task}_act_hat"], atol=1e-5)
            values = left_singular(residual)[1]
            close(values, case[f"{task}_act_hat_singular_values"], atol=1e-5)
            total = act.square().sum()
            covered = (total - values.square().sum()) / total
            close(covered, case[f"{task}_energy_already_covered"], atol=1e-5)
            assert after.shape[1] - before.shape[1] == int(case[f"{task}_added"])
        recorded = tensor(case, f"{task}_project_after").double()
        close(after, recorded, atol=1e-5)
        close(gram(after), case[f"{task}_gram_after"], atol=1e-4)
        before = recorded


def test_columns_of_the_residual_make_no_projector_and_singular_vectors_do():
    case = arrays("cdad_3f_basis_extension")
    old, act = tensor(case, "fixed_project_before"), tensor(case, "fixed_act")
    after = extend_basis(old, act, GAMMA, "residual")
    close(after, case["fixed_project_after"], atol=1e-5)
    assert after.shape[1] - old.shape[1] == int(case["fixed_added"])
    unit = torch.eye(after.shape[1], dtype=torch.float64)
    close(
        (after.T @ after - unit).abs().max(), case["fixed_max_abs_gram_minus_identity"], rtol=1e-3
    )
    square = gram(after) @ gram(after)
    close((square - gram(after)).abs().max(), case["fixed_max_abs_P2_minus_P"], rtol=1e-3)
    ours = extend_basis(old, act, GAMMA)
    close(gram(ours) @ gram(ours), gram(ours), atol=1e-6)


def test_gradient_projection_memory_over_tasks():
    case = arrays("cdad_3f_basis_extension")
    found = matching("cdad_3f_basis_extension", r"gpm_task\d+_layer(\d+)_mat")
    for place, layer in enumerate(sorted({int(match[1]) for match, _ in found})):
        basis = None
        for matrix in numbered(case, rf"gpm_task(\d+)_layer{layer}_mat"):
            name = matrix.removesuffix("_mat")
            gamma = float(case[name.replace(f"layer{layer}", "threshold")][place])
            basis = extend_basis(basis, tensor(case, matrix), gamma, reach=False)
            assert basis.shape[1] == int(case[f"{name}_rank"])
            close(gram(basis), case[f"{name}_projector"], atol=1e-6)
            close(gram(basis), gram(case[f"{name}_basis"]), atol=1e-3)


# ---------------------------------------------------------------------------------- 3g projection


def modules_of(case):
    """Layers with the recorded gradients, under the recorded names."""
    shapes = {}
    for name in case:
        if name.startswith("grad_before__"):
            name_here = name.removeprefix("grad_before__").replace(".in_proj_", ".in_proj.")
            path, kind = name_here.rsplit(".", 1)
            shapes.setdefault(path, {})[kind] = tensor(case, name)
    network = nn.Module()
    for path, grads in shapes.items():
        weight = grads["weight"]
        if weight.ndim == 4:
            layer = nn.Conv2d(weight.shape[1], len(weight), weight.shape[2:], bias="bias" in grads)
        elif weight.ndim == 2:
            layer = nn.Linear(weight.shape[1], len(weight), bias="bias" in grads)
        else:
            layer = nn.LayerNorm(len(weight))
        for kind, grad in grads.items():
            getattr(layer, kind).grad = grad.clone()
        parent = network
        *outer, last = path.split(".")
        for part in outer:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(last, layer)
    return network


def recorded_name(name):
    return name.replace(".in_proj.", ".in_proj_")


def test_projected_and_zeroed_gradients():
    case = arrays("cdad_3g_gradient_projection")
    zeroed = json.loads((FOLDER / "cdad_3g_zeroed_names.json").read_text())
    network = modules_of(case)
    projected, bases = set(zeroed["projected"]), {}
    names = [n for n, _ in network.named_modules() if recorded_name(f"{n}.weight") in projected]
    for match, basis in matching("cdad_3g_gradient_projection", r"basis__(.+?)"):
        layer = match[1] + (".in_proj" if match[1].endswith(".self_attn") else "")
        (found,) = [name for name in names if name.split(".", 1)[-1] == layer]
        bases[found] = torch.from_numpy(basis)
    memory = GradientProjectionMemory(network, lambda name, layer: name in bases)
    memory.project_gradients()  # in the first task there is nothing to project on
    for name, parameter in network.named_parameters():
        close(parameter.grad, case[f"grad_before__{recorded_name(name)}"], atol=0, rtol=0)

    memory.load_state_dict(bases)
    memory.project_gradients(rest="zero")
    for name, parameter in network.named_parameters():
        close(parameter.grad, case[f"grad_after__{recorded_name(name)}"])
    gone = {recorded_name(n) for n, p in network.named_parameters() if not p.grad.any()}
    assert gone >= set(zeroed["zeroed"])
    assert {recorded_name(f"{name}.weight") for name in bases} == projected
