"""The forward process and its inverses, against recursion, algebra and Bayes' rule."""

import math

import pytest
import torch

from diffad_ref.diffusion import (
    Draw,
    Schedule,
    add_noise,
    ddim_step,
    implied_noise,
    predict_x0,
    seeded,
)
from diffad_ref.tools.sampling import ddpm_step, iterative_x0, spaced_timesteps

NAMES = pytest.mark.parametrize("name", ["linear", "cosine", "scaled_linear"])


def scalar(value):
    """A number as the smallest batch of images."""
    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


# -------------------------------------------------------------------------------------- schedules


@NAMES
def test_signal_falls_at_every_step_and_noise_is_always_added(name):
    schedule = Schedule.named(name, 1000)
    assert (schedule.abar.diff() < 0).all() and schedule.abar[0] < 1
    assert (schedule.betas > 0).all() and (schedule.betas < 1).all()
    assert schedule.abar[-1] > 0 and schedule.abar.dtype == torch.float64


def test_linear_schedule_leaves_the_signal_that_the_paper_works_with():
    abar = 1.0
    for t in range(401):
        abar *= 1 - (1e-4 + t * (2e-2 - 1e-4) / 999)
        if t == 200:
            assert Schedule.named("linear", 1000).abar[200].item() == pytest.approx(abar, rel=1e-12)
            assert round(abar, 4) == 0.6563
    assert Schedule.named("linear", 1000).abar[400].item() == pytest.approx(abar, rel=1e-12)
    assert round(abar, 4) == 0.1936


@pytest.mark.parametrize("steps", [100, 250, 4000])
def test_any_number_of_linear_steps_ends_at_the_same_noise(steps):
    ends = [Schedule.named("linear", n).abar[-1].log().item() for n in (1000, steps)]
    assert ends[1] == pytest.approx(ends[0], rel=0.07)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_cosine_signal_is_the_squared_cosine_of_time_whatever_the_number_of_steps(share):
    def f(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    for steps in (100, 1000):
        found = Schedule.named("cosine", steps).abar[int(share * steps) - 1].item()
        assert found == pytest.approx(f(share) / f(0), rel=1e-9)


def test_scaled_linear_betas_are_linear_in_their_square_root():
    roots = Schedule.named("scaled_linear", 1000).betas.sqrt()
    assert torch.allclose(roots.diff(), roots.diff()[0].expand(999), atol=1e-12)
    assert roots[0].item() ** 2 == pytest.approx(0.00085)
    assert roots[-1].item() ** 2 == pytest.approx(0.012)


def test_unknown_schedule_lists_the_known_ones():
    with pytest.raises(ValueError, match="'sigmoid'.*linear, cosine, scaled_linear"):
        Schedule.named("sigmoid", 10)


def test_entries_are_rounded_to_float32_only_after_they_are_picked():
    schedule = Schedule.named("linear", 1000)
    found = schedule.at(torch.tensor([999, 0]))
    assert found.shape == (2, 1, 1, 1) and found.dtype == torch.float32
    exact = math.exp(sum(math.log1p(-b) for b in schedule.betas.tolist()))
    assert found[0].item() == pytest.approx(exact, rel=1e-7)  # a float32 product is off by 1e-5


# ---------------------------------------------------------------------------------- forward noise


@NAMES
def test_noising_step_by_step_has_the_mean_and_variance_of_the_jump(name):
    schedule = Schedule.named(name, 50)
    mean, variance = 1.0, 0.0  # of x_t given x_0 = 1
    for t, beta in enumerate(schedule.betas.tolist()):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        abar = schedule.abar[t]
        assert add_noise(scalar(1.0), scalar(0.0), abar).item() == pytest.approx(mean)
        assert add_noise(scalar(0.0), scalar(1.0), abar).item() ** 2 == pytest.approx(variance)


def test_adding_noise_guessing_the_image_and_guessing_the_noise_undo_each_other():
    x0, eps = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64).unbind()
    abar = torch.tensor([0.999, 0.6563, 0.1936, 4e-5], dtype=torch.float64).view(-1, 1, 1, 1)
    x_t = add_noise(x0, eps, abar)
    assert torch.allclose(predict_x0(x_t, eps, abar), x0)
    assert torch.allclose(implied_noise(x_t, x0, abar), eps)


# --------------------------------------------------------------------------------------- backward


def bayes(x0, x_t, beta, abar_prev):
    """Mean and variance of q(x_{t-1} | x_t, x_0): the prior N(√abar' x0, 1 - abar') meets the
    observation x_t = √(1-beta) x_{t-1} + N(0, beta). Precisions add."""
    prior, likelihood = 1 / (1 - abar_prev), (1 - beta) / beta
    variance = 1 / (prior + likelihood)
    seen = x_t / math.sqrt(1 - beta)
    return variance * (prior * math.sqrt(abar_prev) * x0 + likelihood * seen), variance


@NAMES
@pytest.mark.parametrize("t", [1, 10, 49])
def test_ancestral_step_draws_from_the_posterior_of_bayes_rule(name, t):
    schedule = Schedule.named(name, 50)
    beta, abar_prev = schedule.betas[t].item(), schedule.abar[t - 1].item()
    mean, variance = bayes(0.3, -1.2, beta, abar_prev)
    step = [
        ddpm_step(scalar(-1.2), scalar(0.3), torch.tensor([t]), schedule, noise).item()
        for noise in (None, scalar(0.0), scalar(1.0))
    ]
    assert step[0] == step[1] == pytest.approx(mean, abs=1e-6)
    assert (step[2] - step[1]) ** 2 == pytest.approx(variance, rel=1e-5)


def test_last_ancestral_step_is_the_estimate_itself_whatever_the_noise():
    schedule = Schedule.named("linear", 50)
    found = ddpm_step(scalar(-1.2), scalar(0.3), torch.tensor([0]), schedule, scalar(5.0))
    assert found.item() == pytest.approx(0.3, abs=1e-6)


def test_deterministic_step_keeps_the_noise_and_ends_at_the_estimate():
    x0, eps = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64).unbind()
    earlier = scalar(0.8)
    assert torch.allclose(implied_noise(ddim_step(x0, eps, earlier), x0, earlier), eps)
    assert torch.equal(ddim_step(x0, eps, scalar(1.0)), x0)


# ------------------------------------------------------------------------------------- time steps


def test_every_step_between_start_and_0_is_visited_when_all_are_asked_for():
    assert spaced_timesteps(400, 401) == list(range(400, -1, -1))


@pytest.mark.parametrize(("start", "count"), [(400, 50), (999, 20), (10, 10), (5, 2)])
def test_spaced_steps_run_evenly_from_start_to_0_without_repetition(start, count):
    times = spaced_timesteps(start, count)
    gaps = {a - b for a, b in zip(times, times[1:], strict=False)}
    assert (times[0], times[-1], len(times)) == (start, 0, count)
    assert max(gaps) - min(gaps) <= 1 and min(gaps) >= 1


def test_one_step_is_the_start():
    assert spaced_timesteps(400, 1) == [400]


@pytest.mark.parametrize(("start", "count"), [(400, 402), (400, 0), (0, 2)])
def test_more_steps_than_there_are_and_fewer_than_one_are_refused(start, count):
    with pytest.raises(ValueError, match=f"{count} steps do not fit between 0 and {start}"):
        spaced_timesteps(start, count)


# ------------------------------------------------------------------------------------ many steps


class Oracle:
    """Knows the clean image, so that its noise is exact; remembers when it was asked."""

    def __init__(self, x0, schedule):
        self.x0, self.schedule, self.times = x0, schedule, []

    def __call__(self, x_t, t):
        self.times.append(t.unique().item())
        return implied_noise(x_t, self.x0, self.schedule.at(t))


@pytest.mark.parametrize(
    ("method", "steps", "calls"), [("ddpm", None, 41), ("ddim", None, 50), ("ddim", 7, 7)]
)
def test_iterative_denoising_calls_the_network_once_a_step_and_returns_what_it_knows(
    method, steps, calls
):
    schedule, x = Schedule.named("linear", 1000), torch.rand(2, 3, 4, 4)
    start = 40 if method == "ddpm" else 400
    oracle = Oracle(x, schedule)
    found = iterative_x0(oracle, x, start, schedule, torch.Generator(), method, steps)
    assert len(oracle.times) == calls
    assert (oracle.times[0], oracle.times[-1]) == (start, 0)
    assert torch.allclose(found, x, atol=1e-4)


@pytest.mark.parametrize(("method", "calls"), [("ddpm", 7), ("ddim", 3)])
def test_iterative_denoising_ends_at_the_level_that_is_asked_for(method, calls):
    seen = []

    def oracle(x_t, t):
        seen.append(int(t[0]))
        return torch.zeros_like(x_t)

    schedule = Schedule.named("linear", 1000)
    generator = torch.Generator().manual_seed(0)
    iterative_x0(oracle, torch.rand(1, 3, 4, 4), 16, schedule, generator, method, calls, t_end=10)
    assert (seen[0], seen[-1], len(seen)) == (16, 10, calls)


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_iterative_denoising_repeats_with_the_seed_of_its_generator(method):
    schedule, x = Schedule.named("linear", 1000), torch.rand(1, 3, 4, 4)

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return iterative_x0(lambda x_t, t: 0.5 * x_t, x, 20, schedule, generator, method, 5)

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))


def test_unknown_way_of_denoising_is_refused():
    with pytest.raises(ValueError, match="'ddpm' or 'ddim', not 'euler'"):
        iterative_x0(None, torch.rand(1, 3, 4, 4), 5, None, torch.Generator(), "euler")


# --------------------------------------------------------------------------------- random numbers

KINDS = {
    "normal": lambda draw: draw.normal(2, 3),
    "uniform": lambda draw: draw.uniform(2, 3, low=-1, high=2),
    "integers": lambda draw: draw.integers(5, 90, 7),
    "orders": lambda draw: draw.orders(4, 20),
}


@pytest.mark.parametrize("kind", KINDS)
def test_random_numbers_come_from_the_generator_alone(kind):
    draws = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        draws.append(KINDS[kind](Draw(torch.Generator().manual_seed(7))))
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], KINDS[kind](Draw(torch.Generator().manual_seed(8))))


def test_random_numbers_have_the_range_that_is_asked_for():
    draw = Draw(torch.Generator().manual_seed(0))
    uniform, integers = draw.uniform(10_000, low=-1, high=2), draw.integers(5, 8, 1000)
    assert (uniform >= -1).all() and (uniform < 2).all()
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.05)
    assert set(integers.tolist()) == {5, 6, 7} and integers.dtype == torch.int64
    assert draw.normal(10_000).std().item() == pytest.approx(1, abs=0.05)


def test_orders_are_permutations_and_differ_from_row_to_row():
    orders = Draw(torch.Generator().manual_seed(0)).orders(4, 20)
    assert (orders.sort(1).values == torch.arange(20)).all()
    assert len({tuple(order) for order in orders.tolist()}) == 4


def test_neighbouring_seeds_and_places_share_no_noise_and_equal_ones_do():
    keys = [(seed, place) for seed in range(5) for place in range(5)]
    first = {Draw(seeded("cpu", *key)).normal(1).item() for key in keys}
    assert len(first) == len(keys)
    assert first == {Draw(seeded("cpu", *key)).normal(1).item() for key in keys}
