"""Gradient projection memory on small networks of any kind."""

import warnings
import weakref

import pytest
import torch
from fake_card import DRIVERLESS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from diffad_ref import gradient_projection
from diffad_ref.gradient_projection import (
    GradientProjectionMemory,
    complement,
    extend_basis,
    project,
    representation,
)
from diffad_ref.iterative_svd import IterativeSVD, left_singular, rank_below, rank_reaching


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def low_rank(count, features, rank, seed=0):
    """Samples (count, features) from a random subspace."""
    generator = seeded(seed)
    basis = torch.randn(rank, features, generator=generator)
    return torch.randn(count, rank, generator=generator) @ basis


# -------------------------------------------------------------------------------- representations


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 5, 3, padding=1),
        nn.Conv2d(3, 5, 3, stride=2),
        nn.Conv2d(3, 5, (3, 1), padding=(1, 0)),
        nn.Conv2d(3, 5, 3, padding=2, dilation=2),
        nn.Conv2d(3, 5, 1, bias=False),
    ],
    ids=repr,
)
def test_weights_times_representation_is_the_output_of_a_convolution(layer):
    x = torch.randn(2, 3, 8, 7, generator=seeded())
    out = layer.weight.flatten(1) @ representation(layer, x)
    if layer.bias is not None:
        out = out + layer.bias[:, None]
    expected = layer(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_weights_times_representation_is_the_output_of_a_linear_layer():
    layer, x = nn.Linear(4, 3, bias=False), torch.randn(2, 5, 4, generator=seeded())
    expected = layer(x).flatten(0, 1).T
    torch.testing.assert_close(layer.weight @ representation(layer, x), expected)


@pytest.mark.parametrize(
    "padding", [{"padding": "same"}, {"padding_mode": "reflect", "padding": 1}], ids=str
)
def test_padding_that_is_not_zeros_in_pixels_is_refused(padding):
    with pytest.raises(ValueError, match="zero padding"):
        representation(nn.Conv2d(1, 1, 3, **padding), torch.zeros(1, 1, 4, 4))


def test_channels_behind_those_of_a_layer_are_not_its_inputs():
    layer, x = nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 7, 4, 4, generator=seeded())
    assert torch.equal(representation(layer, x), representation(layer, x[:, :3]))


def test_grouped_convolutions_are_not_watched():
    network = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 2, 1))
    assert list(GradientProjectionMemory(network).layers) == ["1"]


# ------------------------------------------------------------------------------------ singular


@given(st.integers(2, 12), st.integers(1, 60), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_left_singular_vectors_rebuild_the_square_of_wide_and_tall_matrices(rows, columns, seed):
    matrix = torch.randn(rows, columns, generator=seeded(seed), dtype=torch.float64)
    vectors, values = left_singular(matrix)
    torch.testing.assert_close((vectors * values**2) @ vectors.T, matrix @ matrix.T)
    assert (values[:-1] >= values[1:] - 1e-12).all()


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8), st.floats(0.05, 1.0))
@settings(max_examples=60, deadline=None)
def test_the_rank_is_the_smallest_that_reaches_and_the_released_one_falls_short(values, wanted):
    squares = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    total = squares.sum()
    rank = rank_reaching(squares, wanted, total)
    assert squares[:rank].sum() >= wanted * total * (1 - 1e-9)
    assert rank == 0 or squares[: rank - 1].sum() < wanted * total
    assert rank_below(squares, wanted, total) in (rank - 1, rank)


@given(st.integers(1, 6), st.integers(2, 6), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_chunks_give_what_the_whole_gives(rank, chunks, seed):
    whole = low_rank(40 * chunks, 10, rank, seed).T
    svd = IterativeSVD(energy=1 - 1e-10)
    for chunk in whole.chunk(chunks, 1):
        svd.update(chunk)
    exact = left_singular(whole.double())[0][:, : svd.basis.shape[1]]
    gap = svd.basis @ svd.basis.T - exact @ exact.T
    assert gap.abs().max() < 1e-4
    assert svd.samples == whole.shape[1]


def test_the_energy_that_was_wanted_is_kept_over_many_chunks():
    generator, svd, total = seeded(), IterativeSVD(0.9), 0.0
    chunks = [torch.randn(30, 25, generator=generator) for _ in range(30)]
    for chunk in chunks:
        svd.update(chunk)
        total += chunk.square().sum().item()
    whole = torch.cat(chunks, 1).double()
    kept = (svd.basis.T @ whole).square().sum().item()
    assert kept >= 0.9 * total


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_and_the_layer_is_named(broken):
    with pytest.raises(ValueError, match="NaN"):
        IterativeSVD().update(torch.full((3, 4), broken))
    network = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3))
    memory = GradientProjectionMemory(network)
    with torch.no_grad():
        network[0].weight.fill_(broken)
    with pytest.raises(ValueError, match="layer '1'.*NaN"), memory.gather():
        network(torch.ones(2, 3))


# --------------------------------------------------------------------------------------- basis


@given(st.integers(1, 4), st.integers(1, 4), st.floats(0.5, 1.0), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_an_extended_basis_is_orthonormal_and_spans_what_was_wanted(first, second, gamma, seed):
    old, new = low_rank(50, 12, first, seed).T, low_rank(50, 12, second, seed + 1).T
    basis = extend_basis(extend_basis(None, old, gamma), new, gamma)
    unit = torch.eye(basis.shape[1], dtype=torch.float64)
    torch.testing.assert_close(basis.T @ basis, unit, atol=1e-8, rtol=0)
    spanned = (basis.T @ new.double()).square().sum()
    assert spanned >= gamma * new.double().square().sum() * (1 - 1e-6)


def test_a_basis_never_has_more_columns_than_rows():
    basis = None
    for seed in range(4):
        basis = extend_basis(basis, torch.randn(6, 50, generator=seeded(seed)), 1.0)
    assert basis.shape == (6, 6)


def test_representations_of_zeros_take_no_direction():
    assert extend_basis(None, torch.zeros(5, 9), 0.9).shape == (5, 0)
    old = torch.eye(5)[:, :2]
    assert torch.equal(extend_basis(old, torch.zeros(5, 9), 0.9), old.double())


def test_columns_that_are_no_option_are_refused():
    with pytest.raises(ValueError, match="columns is 'singular' or 'residual', not 'all'"):
        extend_basis(None, torch.ones(2, 3), 0.9, "all")


# ------------------------------------------------------------------------------------- gathering


def falling(features, columns, seed=0):
    """A matrix (features, columns) whose singular values fall, with a mean that outweighs all."""
    generator = seeded(seed)
    turn = torch.linalg.qr(torch.randn(features, features, generator=generator)).Q
    mixed = (
        turn / torch.arange(1, features + 1) @ torch.randn(features, columns, generator=generator)
    )
    return mixed + 2 * turn[:, -1:]


@pytest.mark.parametrize(("large", "lost"), [(4096, 1e-12), (8, 1e-5)], ids=["double", "single"])
@given(st.integers(20, 120), st.floats(0.9, 0.9999), st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_gathered_memory_has_the_energy_of_a_plain_svd_of_equal_rank(
    large, lost, features, gamma, seed
):
    """And the rank that G1 asks for; in single precision it may err by the last direction."""
    matrix, layer = falling(features, 300, seed), nn.Linear(features, 1)
    memory = GradientProjectionMemory(layer, gamma=gamma)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(gradient_projection, "LARGE", large)
        with memory.gather():
            for chunk in matrix.T.split(50):
                layer(chunk)
        ((rank, of),) = memory.extend().values()
    vectors, values = left_singular(matrix.double())
    shares = torch.cumsum(values.square(), 0) / values.square().sum()
    assert of == features and abs(rank - int((shares < gamma).sum()) - 1) <= (large < of)
    basis = memory.basis("").double()
    assert basis.shape == (features, rank)
    spanned = (basis.T @ matrix.double()).square().sum() / values.square().sum()
    assert spanned >= shares[rank - 1] - lost - 1e-6  # bases are stored in single precision


@given(st.integers(1, 5), st.integers(1, 5), st.floats(0.5, 1.0), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_square_of_a_matrix_extends_a_basis_as_the_matrix_does(first, second, gamma, seed):
    old, new = low_rank(50, 12, first, seed).T, low_rank(50, 12, second, seed + 1).T.double()
    memory = extend_basis(None, old, 0.9)
    bases = extend_basis(memory, new, gamma), extend_basis(memory, new @ new.T, gamma, squared=True)
    assert torch.equal(*bases)


def recorded(budget=8e9):
    """A convolution and two linear layers, and a memory of them."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(128, 20), nn.Linear(20, 2)
    network = nn.Sequential(*layers)
    return network, GradientProjectionMemory(network, budget=budget)


def test_groups_hold_no_more_than_the_budget_and_each_layer_once():
    _, memory = recorded(budget=8 * (20**2 + 27**2))
    assert memory.groups() == [["2"], ["0", "3"]]
    _, memory = recorded()
    assert memory.groups() == [["2", "0", "3"]]


def test_no_more_is_held_than_the_budget_and_one_chunk_however_long_a_gathering_is(monkeypatch):
    network, memory = recorded(budget=8 * (20**2 + 27**2))
    real, alive, most = gradient_projection.representation, weakref.WeakSet(), []

    def watched(layer, x):
        columns = real(layer, x)
        alive.add(columns)
        most.append((len(alive), sum(square.nbytes for square in memory.squares.values())))
        return columns

    monkeypatch.setattr(gradient_projection, "representation", watched)
    for group in memory.groups()[1:]:  # the largest layer alone exceeds it
        with memory.gather(group), torch.no_grad():
            for seed in range(20):
                network(torch.randn(4, 3, 4, 4, generator=seeded(seed)))
        memory.extend()
    assert len(most) == 40 and max(most) <= (1, memory.budget)
    assert not memory.squares


def test_groups_one_after_the_other_give_what_all_layers_at_once_give():
    memories = []
    for budget in (1, 8e9):
        network, memory = recorded(budget)
        for group in memory.groups():
            with memory.gather(group), torch.no_grad():
                network(torch.randn(40, 3, 4, 4, generator=seeded()))
            memory.extend()
        memories.append(memory)
    first, second = memories
    assert len(first.groups()) == 3 and first.bases.keys() == second.bases.keys()
    assert all(torch.equal(basis, second.bases[name]) for name, basis in first.bases.items())


@DRIVERLESS
def test_nothing_in_the_hooks_waits_for_a_device():
    """A fake tensor has no value to wait for: asking for one raises."""
    with FakeTensorMode(), torch.device("cuda"):
        network, memory = recorded()
        ran = False
        with pytest.raises(DataDependentOutputException), memory.gather():
            network(torch.zeros(2, 3, 4, 4))
            ran = True  # only what comes at the end may ask
        assert ran


# --------------------------------------------------------------------------------- protection


def network_of(kind, seed):
    torch.manual_seed(seed)
    if kind == "linear":
        return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 12))
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3, stride=2, padding=1)
    )


def inputs_of(kind, seed):
    if kind == "linear":
        return low_rank(60, 12, 3, seed)
    coarse = torch.randn(6, 2, 2, 2, generator=seeded(seed))
    return nn.functional.interpolate(coarse, scale_factor=4)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
@given(seed=st.integers(0, 500))
@settings(max_examples=8, deadline=None)
def test_old_inputs_of_a_protected_layer_feel_nothing(kind, optimizer, seed):
    """G5, with everything that G1 leaves out set to nothing."""
    network, old, new = network_of(kind, seed), inputs_of(kind, seed), inputs_of(kind, seed + 1)
    if kind == "convolution":
        old[:, 1] = 0  # what the second channel says is new
    memory = GradientProjectionMemory(network, gamma=1 - 1e-9)
    with memory.gather(), torch.no_grad():
        network(old)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a small layer may be full: then it just stays
        memory.extend()
    before = network[0](old).detach()
    weights = network[0].weight.detach().clone()
    chosen = OPTIMIZERS[optimizer](network.parameters())
    memory.protect(chosen, rest="freeze")
    for _ in range(30):
        chosen.zero_grad()
        (network(new) - 1).square().mean().backward()
        chosen.step()
    change = (network[0](old) - before).norm() / before.norm()
    assert change < 1e-4
    assert (network[0].weight - weights).norm() > 1e-3  # and yet it has learned


def protected_step(optimizer, updates):
    """How much one protected step moves what old inputs feel."""
    network, old = network_of("linear", 0), inputs_of("linear", 0)
    memory = GradientProjectionMemory(network, lambda name, layer: name == "0", 0.9999)
    with memory.gather(), torch.no_grad():
        network(old)
    memory.extend()
    before = network[0](old).detach()
    chosen = optimizer(network.parameters())
    memory.protect(chosen, updates, rest="freeze")
    for _ in range(20):
        chosen.zero_grad()
        (network(torch.randn(60, 12, generator=seeded(1))) - 1).square().mean().backward()
        chosen.step()
    return ((network[0](old) - before).norm() / before.norm()).item()


def test_a_projected_gradient_is_enough_for_plain_descent_but_not_for_adam():
    assert protected_step(lambda p: torch.optim.SGD(p, 0.05), updates=False) < 1e-2
    assert protected_step(lambda p: torch.optim.AdamW(p, 0.02), updates=False) > 0.05
    assert protected_step(lambda p: torch.optim.AdamW(p, 0.02), updates=True) < 1e-2


@pytest.mark.parametrize("rest", ["keep", "freeze", "zero"])
def test_what_happens_to_unprotected_parameters(rest):
    network = network_of("linear", 0)
    memory = GradientProjectionMemory(network)
    with memory.gather(), torch.no_grad():
        network(inputs_of("linear", 0))
    memory.extend()
    network(inputs_of("linear", 1)).square().mean().backward()
    memory.project_gradients(rest)
    grad = network[0].bias.grad
    assert {"keep": grad is not None and grad.any(), "freeze": grad is None,
            "zero": grad is not None and not grad.any()}[rest]  # fmt: skip


def test_before_the_first_extension_gradients_stay():
    network = network_of("linear", 0)
    memory = GradientProjectionMemory(network)
    network(inputs_of("linear", 1)).square().mean().backward()
    before = [p.grad.clone() for p in network.parameters()]
    memory.project_gradients("zero")
    assert all(torch.equal(a, p.grad) for a, p in zip(before, network.parameters(), strict=True))


@given(st.integers(2, 30), st.floats(0, 1), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_complement_is_what_the_memory_leaves(features, share, seed):
    matrix = torch.randn(features, round(share * features), generator=seeded(seed))
    basis = torch.linalg.qr(matrix.double()).Q
    free = complement(basis)
    unit = torch.eye(features, dtype=torch.float64)
    assert free.shape == (features, features - basis.shape[1])
    torch.testing.assert_close(free @ free.T, unit - basis @ basis.T, atol=1e-12, rtol=0)
    step = torch.randn(4, features, generator=seeded(seed)).double()
    same = project(step, free, free=True), project(step, basis)
    torch.testing.assert_close(*same, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rank", [3, 50, 64])
def test_a_projected_step_moves_nothing_in_the_span_whatever_made_it(rank):
    """To the precision of a weight, at each of many steps."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    memory = GradientProjectionMemory(layer, gamma=1 - 1e-9)
    inputs = low_rank(200, 64, rank)
    with memory.gather(), torch.no_grad():
        layer(inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rank 64 it is full
        assert memory.extend() == {"": (rank, 64)}
    assert memory.free == ({""} if rank > 32 else set())
    start, span = layer.weight.detach().clone(), memory.basis("")
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-3, weight_decay=0.1)
    memory.protect(optimizer)
    for seed in range(50):
        optimizer.zero_grad()
        layer(torch.randn(8, 64, generator=seeded(seed))).square().sum().backward()
        optimizer.step()
    moved = (layer.weight - start).detach()
    assert (moved @ span).norm() < 1e-6 * start.norm()
    assert (moved.norm() > 1e-2 * start.norm()) == (rank < 64)


def as_tf32(x):
    """A float32 tensor rounded to TF32: 10 bits of mantissa."""
    return ((x.view(torch.int32) + 2**12) & ~(2**13 - 1)).view(torch.float32)


@pytest.mark.parametrize("rank", [40, 160])
def test_a_step_that_is_projected_in_tf32_keeps_little_of_what_it_should_lose(rank):
    torch.manual_seed(0)
    memory, step = torch.linalg.qr(torch.randn(200, rank)).Q, torch.randn(50, 200)
    free = 2 * rank > len(memory)
    basis = as_tf32(complement(memory) if free else memory)
    products = as_tf32(as_tf32(step) @ basis) @ basis.T
    left = (products if free else step - products) @ memory
    kept = left.norm() / (step @ memory).norm()
    assert 1e-5 < kept < 4.5e-4


def test_bases_follow_a_network_that_moves_after_it_is_protected():
    """To the meta device here; a basis elsewhere would not multiply."""
    network, memory = recorded()
    with memory.gather(), torch.no_grad():
        network(torch.randn(40, 3, 4, 4, generator=seeded()))
    memory.extend()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    memory.protect(optimizer)
    network.to("meta")
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    memory.protect(optimizer)
    network(torch.zeros(2, 3, 4, 4, device="meta")).sum().backward()
    optimizer.step()
    assert {basis.device.type for basis in memory.bases.values()} == {"meta"}


def test_running_statistics_stay_if_the_rest_is_frozen():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1))
    images = inputs_of("convolution", 0)
    memory = GradientProjectionMemory(network, gamma=1.0)
    with memory.gather(), torch.no_grad():
        network.eval()(images)
    with pytest.warns(UserWarning, match="no direction is left"):
        memory.extend()
    before = network(images)
    network.train()  # as `fit` does, before it hands out its optimiser
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    memory.protect(optimizer, rest="freeze")
    for _ in range(3):
        optimizer.zero_grad()
        network(5 * images + 1).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(network.eval()(images), before, atol=1e-5, rtol=0)


def test_projection_is_idempotent_and_orthogonal_to_the_memory():
    basis = torch.linalg.qr(torch.randn(9, 4, generator=seeded())).Q
    step = torch.randn(5, 1, 3, 3, generator=seeded(1))
    once = project(step, basis)
    torch.testing.assert_close(project(once, basis), once, atol=1e-6, rtol=1e-5)
    assert (once.flatten(1) @ basis).abs().max() < 1e-5


# --------------------------------------------------------------------------------------- refusals


def test_hooks_are_gone_after_an_error():
    network = network_of("linear", 0)
    memory = GradientProjectionMemory(network)
    with pytest.raises(RuntimeError, match="on purpose"), memory.gather():
        raise RuntimeError("on purpose")
    assert not any(layer._forward_pre_hooks for layer in network.modules())


def test_a_layer_that_never_ran_is_named():
    network = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    memory = GradientProjectionMemory(network)
    with memory.gather():
        network["used"](torch.ones(2, 3))
    with pytest.raises(ValueError, match="did not run.*unused"):
        memory.extend()


def test_extending_without_gathering_is_refused():
    with pytest.raises(ValueError, match="did not run while gathering"):
        GradientProjectionMemory(nn.Linear(2, 2)).extend()


def test_a_full_memory_says_which_layers_learn_no_more():
    network = nn.Sequential(nn.Linear(3, 2))
    memory = GradientProjectionMemory(network, gamma=1.0)
    with memory.gather():
        network(torch.randn(20, 3, generator=seeded()))
    with pytest.warns(UserWarning, match="no direction is left in 1 layers.*: 0"):
        assert memory.extend() == {"0": (3, 3)}


def test_a_network_without_layers_is_refused():
    with pytest.raises(ValueError, match="no layer"):
        GradientProjectionMemory(nn.ReLU())


def test_a_memory_of_another_network_is_refused():
    memory = GradientProjectionMemory(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(ValueError, match="another network: .*other"):
        memory.load_state_dict({"other": torch.zeros(3, 1)})
    with pytest.raises(ValueError, match="layer '0'.*3 features"):
        memory.load_state_dict({"0": torch.zeros(4, 1)})


def test_a_saved_memory_protects_as_the_original_does():
    """One layer less than half full, one more; and a file that holds M of that one, as old ones."""
    network = network_of("linear", 0)
    memory = GradientProjectionMemory(network, gamma=0.99)
    with memory.gather(), torch.no_grad():
        network(torch.cat([inputs_of("linear", seed) for seed in range(2)]))
    memory.extend()
    assert memory.free == {"2"} and memory.bases.keys() == {"0", "2"}
    old = {name: memory.basis(name) for name in memory.bases}
    step = {n: torch.randn(m.weight.shape, generator=seeded()) for n, m in memory.layers.items()}
    for state in (memory.state_dict(), old):
        copy = GradientProjectionMemory(network)
        copy.load_state_dict(state)
        for name, other in step.items():
            both = memory._project(name, other), copy._project(name, other)
            torch.testing.assert_close(*both, atol=1e-5, rtol=0)
            torch.testing.assert_close(copy.basis(name), old[name], atol=0, rtol=0)


@pytest.mark.parametrize("seed", range(20))
def test_a_share_of_zero_takes_no_direction_whatever_rounding_says(seed):
    matrix = torch.randn(30, 50, generator=torch.Generator().manual_seed(seed))
    assert extend_basis(None, matrix, 0.0).shape == (30, 0)
