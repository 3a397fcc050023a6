"""`fit`: what interrupts it, what it averages, and what it refuses.

Most tests train `Line`, two weights and a bias, so that a run takes milliseconds.
"""

import math
import os
import signal
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import nn

from diffad_ref import training
from diffad_ref.checkpoints import read_tensors
from diffad_ref.detector import Detector, Rate, Stage
from diffad_ref.diffusion_ad import DiffusionAD
from diffad_ref.gradient_projection import GradientProjectionMemory
from diffad_ref.tools.memory import peak_memory
from diffad_ref.training import STATE, fit, restore

BOTH = {"slope": Rate(0.05, "cosine", 2), "offset": Rate(0.02)}
ONE_STAGE = (Stage("line", 8, 2, BOTH),)


@dataclass(frozen=True)
class LineConfig:
    stages: tuple[Stage, ...]
    noise: float
    image_size: int = 1


class Line(Detector):
    """y = slope · x + offset, with a mean squared error; x are the channels of a single pixel.

    Noise on x comes from the generator.
    """

    Config = LineConfig

    def __init__(self, stages=ONE_STAGE, noise=0.0):
        super().__init__(LineConfig(stages, noise))
        torch.manual_seed(0)
        self.slope, self.offset = nn.Linear(2, 1, bias=False), nn.Linear(1, 1)
        self.seen, self.weights, self.prepared = [], [], []

    def prepare(self, dataset):
        self.prepared.append(len(dataset))

    def training_loss(self, batch, generator):
        self.seen.append(batch["number"].tolist())
        self.weights.append(state(self))
        x = coordinates(batch["image"])
        x = x + self.config.noise * torch.randn(x.shape, generator=generator)
        error = self.slope(x) + self.offset(torch.ones(len(x), 1)) - batch["y"]
        return {"loss": error.square().mean()}

    def judge(self, x, category_index, generator):
        raise NotImplementedError


def coordinates(pixels):
    """Red and green of pixels (N, 3, 1, 1), as points (N, 2) in [-2, 2]."""
    return 4 * pixels[:, :2, 0, 0] - 2


class Points(torch.utils.data.Dataset):
    """Points near a plane."""

    def __init__(self, count=7):
        g = torch.Generator().manual_seed(1)
        self.pixels = torch.rand(count, 3, 1, 1, generator=g)
        self.y = coordinates(self.pixels) @ torch.tensor([[2.0], [-1.0]]) + 0.5
        self.y += 0.3 * torch.randn(count, 1, generator=g)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return {"image": self.pixels[i], "y": self.y[i], "number": i}


class Pictures(torch.utils.data.Dataset):
    """Six normal images of two categories."""

    categories = ["brick", "gear"]

    def __init__(self, size=32):
        self.size = size

    def __len__(self):
        return 6

    def __getitem__(self, i):
        image = torch.rand(3, self.size, self.size, generator=torch.Generator().manual_seed(i))
        return {"image": image, "category": self.categories[i % 2], "texture": i % 2 == 0}


def state(detector):
    """A copy of all weights, as one vector."""
    return torch.cat([v.detach().flatten().clone() for v in detector.state_dict().values()])


def diffusion_ad(config, steps, seed=0):
    """A detector whose stages have so many steps, with a few textures."""
    stages = tuple(replace(stage, steps=steps, batch_size=2) for stage in config.stages)
    torch.manual_seed(seed)
    detector = DiffusionAD(replace(config, stages=stages))
    detector.textures = (255 * torch.rand(4, 3, 64, 64)).to(torch.uint8)
    return detector


def train(detector, data=None, **settings):
    return fit(
        detector,
        Points() if data is None else data,
        **{"device": "cpu", "progress": False, **settings},
    )


# ----------------------------------------------------------------------------------------- it works


def test_it_finds_the_least_squares_plane():
    rates = dict.fromkeys(BOTH, Rate(0.3, "cosine"))
    detector, data = Line((Stage("line", 200, 7, rates),)), Points()
    train(detector, data)
    design = torch.cat([coordinates(data.pixels), torch.ones(len(data), 1)], 1)
    expected = torch.linalg.lstsq(design, data.y).solution.flatten()
    found = [*detector.slope.weight[0], detector.offset.weight[0, 0] + detector.offset.bias[0]]
    assert torch.allclose(torch.stack(found), expected, atol=1e-3)


def test_history_has_a_row_for_each_step_of_each_stage():
    first, second = Stage("a", 3, 2, {"slope": Rate(0.1)}), Stage("b", 2, 2, {"offset": Rate(0.1)})
    history = train(Line((first, second)))
    assert [(r["stage"], r["step"]) for r in history.rows] == [
        ("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)
    ]  # fmt: skip
    assert history.column("loss", "b") == [r["loss"] for r in history.rows[3:]]
    assert len(history.column("loss")) == 5 and history.column("noise") == []


def test_only_the_parts_that_a_stage_names_change():
    detector = Line((Stage("a", 3, 2, {"offset": Rate(0.1)}),))
    slope, offset = detector.slope.weight.clone(), detector.offset.bias.clone()
    train(detector)
    assert torch.equal(detector.slope.weight, slope)
    assert not torch.equal(detector.offset.bias, offset)


def test_what_must_be_known_before_is_prepared_once_and_not_again_when_a_run_goes_on(tmp_path):
    first, again = Line(), Line()
    stop_at(first, 6)
    with pytest.raises(Killed):
        train(first, out=tmp_path, save_every=2)
    train(again, out=tmp_path, save_every=2)
    assert first.prepared == [7] and again.prepared == []


@pytest.mark.parametrize("steps", [None, 4])
def test_stages_without_a_step_are_refused(steps):
    detector = Line((Stage("line", 0, 7, dict.fromkeys(BOTH, Rate(0.3))),))
    with pytest.raises(ValueError, match="the stages have no step"):
        fit(detector, Points(), steps, progress=False)


def test_detector_ends_in_evaluation_mode_and_knows_its_categories(small_config):
    detector = diffusion_ad(small_config, 1)
    train(detector, Pictures())
    assert not detector.training and detector.categories == ("brick", "gear")


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(None, [12, 6, 2]), (10, [6, 3, 1]), (40, [24, 12, 4]), (3, [2, 1, 0])],
)
def test_number_of_steps_is_shared_in_the_proportion_of_the_stages(steps, expected):
    stages = tuple(Stage(str(n), n, 1, {"offset": Rate(0.0)}) for n in (12, 6, 2))
    rows = train(Line(stages), steps=steps).rows
    assert [sum(r["stage"] == s.name for r in rows) for s in stages] == expected


def test_learning_rate_follows_its_curve():
    """With plain numbers: Adam's first step is as long as its rate."""
    for warmup, first in ((0, 0.1), (3, 0.1 / 4)):
        detector = Line((Stage("a", 4, 7, {"slope": Rate(0.1, "cosine", warmup)}),))
        train(detector)
        before, after = (w[:2] for w in detector.weights[:2])
        assert torch.allclose((after - before).abs(), torch.full((2,), first), rtol=1e-3)


def test_rates_may_be_a_share_of_the_recipes_and_the_recipe_stays():
    half, low = (
        Line(),
        Line((Stage("line", 8, 2, {"slope": Rate(0.025, "cosine", 2), "offset": Rate(0.01)}),)),
    )
    train(half, rate=0.5)
    train(low)
    assert torch.equal(state(half), state(low)) and half.stages == ONE_STAGE


@pytest.mark.parametrize(
    ("schedule", "step", "share"),
    [
        ("constant", 99, 1.0),
        ("cosine", 0, 1.0),
        ("cosine", 50, 0.5),
        ("cycle", 0, 1.0),
        ("cycle", 5, 0.5),
        ("cycle", 10, 0.0),
        ("cycle", 20, 1.0),
    ],
)
def test_rate_at_a_step_is_this_share_of_its_peak(schedule, step, share):
    assert Rate(2.0, schedule).at(step, 100) == pytest.approx(2 * share, abs=1e-12)


def test_cosine_with_a_horizon_of_one_and_a_half_stages_ends_at_a_quarter_of_its_peak():
    """At two thirds of the half wave: (1 + cos 120°) / 2."""
    assert Rate(2.0, "cosine", horizon=1.5).at(100, 100) == pytest.approx(2 / 4)


def test_unknown_schedule_of_a_rate_is_refused():
    with pytest.raises(ValueError, match="should be 'constant', 'cosine' or 'cycle'"):
        Rate(1.0, "linear")


def test_gradient_is_clipped_to_its_largest_norm():
    """SGD would show the norm; Adam hides it, but with a tiny clip its epsilon does not."""
    free, clipped = (
        Line((Stage("a", 1, 7, {"slope": Rate(0.1)}, clip=clip),)) for clip in (None, 1e-8)
    )
    moves = []
    for detector in (free, clipped):
        before = detector.slope.weight.clone()
        train(detector)
        moves.append((detector.slope.weight - before).norm().item())
    assert moves[1] < 0.75 * moves[0]  # |g| / (|g| + 1e-8) is at most a half per axis


# ------------------------------------------------------------------------------- which images, when


def test_every_image_is_seen_once_an_epoch_in_a_new_order():
    detector = Line((Stage("a", 7, 2, BOTH),))  # 14 images: two epochs of seven
    train(detector)
    order = [n for batch in detector.seen for n in batch]
    first, second = order[:7], order[7:]
    assert sorted(first) == sorted(second) == list(range(7)) and first != second


def test_a_batch_may_be_larger_than_the_data():
    detector = Line((Stage("a", 1, 16, BOTH),))
    train(detector)
    assert sorted(detector.seen[0]) == sorted([*range(7), *range(7), *detector.seen[0][14:]])


def test_equal_seeds_give_equal_weights_and_others_do_not(small_config):
    ends = []
    for seed in (0, 0, 1):
        detector = diffusion_ad(small_config, 1)
        torch.manual_seed(len(ends))  # the state of the global generator does not matter
        train(detector, Pictures(), seed=seed)
        ends.append(state(detector))
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    detector = Line(noise=0.1)
    torch.manual_seed(5)
    train(detector)
    assert torch.equal(torch.rand(3), expected)


# -------------------------------------------------------------------------------------- averaging


def test_accumulated_batches_are_one_larger_batch():
    ends = []
    for batch_size, accumulate in ((4, 1), (2, 2), (1, 4)):
        detector = Line()
        history = train(detector, batch_size=batch_size, accumulate=accumulate)
        ends.append((state(detector), torch.tensor(history.column("loss"))))
    for weights, losses in ends[1:]:
        assert torch.allclose(weights, ends[0][0], atol=1e-6)
        assert torch.allclose(losses, ends[0][1], atol=1e-6)


def test_average_of_the_weights_is_the_recursion_by_hand():
    plain, averaged = Line(), Line()
    train(plain)
    train(averaged, ema=0.4)
    weights = [*plain.weights, state(plain)]  # before each step, and after the last
    mean = weights[0]
    for k, now in enumerate(weights[1:], 1):
        decay = min(0.4, k / (k + 9)) if k > 1 else 0.0  # soon forgets where it began
        mean = decay * mean + (1 - decay) * now
    assert torch.allclose(state(averaged), mean, atol=1e-6)
    assert not torch.allclose(state(plain), mean, atol=1e-3)


def test_next_stage_starts_from_the_average_of_the_last():
    stages = (Stage("a", 4, 2, BOTH), Stage("b", 4, 2, BOTH))
    one, two = Line(stages[:1]), Line(stages)
    train(one, ema=0.5)
    train(two, ema=0.5)
    assert torch.equal(two.weights[4], state(one))


# ---------------------------------------------------------------------------- broken off, continued


class Killed(BaseException):
    """What no handler catches."""


def stop_at(detector, call):
    """Make the detector's training loss raise at its n-th call, counted from 0."""
    real, calls = detector.training_loss, iter(range(10**9))

    def loss(batch, generator):
        if next(calls) == call:
            raise Killed
        return real(batch, generator)

    detector.training_loss = loss


TWO = (
    Stage("a", 4, 2, {"slope": Rate(0.05, "cosine", 2)}, "adamw", 0.01, 1.0),
    Stage("b", 5, 3, BOTH),
)


@pytest.fixture(scope="module")
def unbroken():
    """A run of two stages, and its losses."""
    detector = Line(TWO, noise=0.1)
    return detector, train(detector, accumulate=2, ema=0.9)


@pytest.mark.parametrize("call", range(18))
def test_a_run_stopped_at_any_batch_ends_with_the_weights_of_an_unbroken_one(
    tmp_path, unbroken, call
):
    settings = {"accumulate": 2, "ema": 0.9, "save_every": 2}
    unbroken, history = unbroken
    stopped, resumed = Line(TWO, noise=0.1), Line(TWO, noise=0.1)
    stop_at(stopped, call)
    with pytest.raises(Killed):
        train(stopped, out=tmp_path, **settings)
    assert train(resumed, out=tmp_path, **settings).rows == history.rows
    assert torch.equal(state(resumed), state(unbroken))
    assert len(resumed.seen) >= 18 - call  # and at most one checkpoint's distance more
    assert len(resumed.seen) <= 18 - call + 2 * 2


def test_a_diffusion_ad_stopped_in_every_stage_resumes_bit_for_bit(tmp_path, small_config):
    """Two steps a stage, stopped in the second of each; the first step is not trained again."""
    settings = {"ema": 0.9, "save_every": 1}
    unbroken = diffusion_ad(small_config, 2)
    history = train(unbroken, Pictures(), **settings)
    for attempt, call in enumerate((1, 2, 2, None)):
        detector = diffusion_ad(small_config, 2, seed=attempt)
        detector.textures = unbroken.textures  # the first weights of a resumed run do not matter
        stop_at(detector, call)
        if call is not None:
            with pytest.raises(Killed):
                train(detector, Pictures(), out=tmp_path, **settings)
    assert train(detector, Pictures(), out=tmp_path, **settings).rows == history.rows
    assert torch.equal(state(detector), state(unbroken))


class Slow(Line):
    """A line that takes its time."""

    def training_loss(self, batch, generator):
        time.sleep(0.01)
        return super().training_loss(batch, generator)


Slow.__name__ = "Line"  # a run is known by the name of its method


def train_slowly(stages, settings):
    """What a process does that will be killed."""
    torch.set_num_threads(1)
    train(Slow(stages, noise=0.1), **settings)


def test_a_process_killed_without_warning_resumes_bit_for_bit(tmp_path, start):
    stages, settings = (Stage("line", 60, 2, BOTH),), {"save_every": 1, "ema": 0.9}
    process = start(train_slowly, stages, settings | {"out": tmp_path})
    while not (tmp_path / STATE).exists():
        assert process.is_alive()
        time.sleep(0.01)
    time.sleep(0.1)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    unbroken, resumed = Line(stages, noise=0.1), Line(stages, noise=0.1)
    history = train(unbroken, ema=0.9)
    assert train(resumed, out=tmp_path, **settings).rows == history.rows
    assert torch.equal(state(resumed), state(unbroken))
    assert 0 < len(resumed.seen) < 60


@pytest.mark.parametrize(
    ("device", "flag", "cpu"),
    [(None, "false", False), ("cuda", "false", False), ("cpu", "false", True), (None, "1", True)],
)
def test_processes_meet_on_a_cpu_only_if_that_is_asked_for(monkeypatch, device, flag, cpu):
    monkeypatch.setenv("ACCELERATE_USE_CPU", flag)

    def state(cpu):
        return cpu

    state._reset_state = lambda: None
    monkeypatch.setattr(training, "PartialState", state)
    assert training.meet(device) == cpu


def test_a_device_that_was_asked_for_once_is_not_kept(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert [training.meet(d).device.type for d in ("cpu", None, "cpu")] == ["cpu", "cuda", "cpu"]
    monkeypatch.undo()
    training.meet("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="cannot train on cuda: "):
        train(Line(), device="cuda")


def test_a_finished_run_is_loaded_and_not_trained_again(tmp_path):
    first, again = Line(), Line()
    history = train(first, out=tmp_path)
    assert train(again, out=tmp_path).rows == history.rows
    assert torch.equal(state(again), state(first)) and again.seen == []


@pytest.mark.parametrize(
    ("other", "different"),
    [
        ({"seed": 1}, "seed"),
        ({"ema": 0.9}, "ema"),
        ({"precision": "bf16"}, "precision"),
        ({"accumulate": 2}, "stages"),
        ({"checkpointing": True}, "stages"),
        ({"steps": 4}, "stages"),
        ({"batch_size": 3}, "stages"),
        ({"rate": 0.5}, "stages"),
        ({"data": Points(8)}, "data"),
    ],
)
def test_folder_of_another_run_is_refused_and_left_as_it_is(tmp_path, other, different):
    train(Line(), out=tmp_path)
    before = (tmp_path / STATE).read_bytes()
    with pytest.raises(ValueError, match=rf"holds another run \(different {different}\)"):
        train(Line(), **{"out": tmp_path, **other})
    assert (tmp_path / STATE).read_bytes() == before


def test_damaged_state_of_a_run_is_named(tmp_path):
    train(Line(), out=tmp_path)
    path = tmp_path / STATE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{STATE} is damaged"):
        train(Line(), out=tmp_path)


# ----------------------------------------------------------------------------------- refused, named


def test_empty_data_is_refused():
    with pytest.raises(ValueError, match="the data set is empty"):
        train(Line(), torch.utils.data.Subset(Points(), []))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_names_stage_and_step_and_the_last_checkpoint(tmp_path, value):
    detector = Line((Stage("warm", 2, 2, BOTH), Stage("hot", 5, 2, BOTH)))
    real = detector.training_loss

    def loss(batch, generator):
        scale = value if len(detector.seen) == 5 else 1.0
        return {"loss": real(batch, generator)["loss"] * scale}

    detector.training_loss = loss
    with pytest.raises(ValueError, match=r"loss of step 3 in stage 'hot' is .*(nan|inf)") as error:
        train(detector, out=tmp_path)
    assert str(tmp_path / STATE) in str(error.value)
    assert torch.isfinite(state(detector)).all()


# ----------------------------------------------------------------------- precision, processes, size


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_train_every_stage_to_finite_losses(small_config, precision):
    """One after the other in one process, each stage with its own scale of the gradients."""
    history = train(diffusion_ad(small_config, 1), Pictures(), precision=precision)
    losses = torch.tensor(history.column("loss"))
    assert {row["stage"] for row in history.rows} == {s.name for s in small_config.stages}
    assert torch.isfinite(losses).all()


def test_fp16_goes_on_with_the_scale_that_it_had(small_config, tmp_path):
    unbroken, stopped = (diffusion_ad(small_config, 3) for _ in range(2))
    settings = {"precision": "fp16", "save_every": 1}
    history = train(unbroken, Pictures(), **settings)
    loss, calls = stopped.training_loss, []

    def breaks(batch, generator):
        calls.append(len(calls))
        if len(calls) in (3, 6):
            raise KeyboardInterrupt
        return loss(batch, generator)

    stopped.training_loss = breaks
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(stopped, Pictures(), out=tmp_path, **settings)
    assert train(stopped, Pictures(), out=tmp_path, **settings).rows == history.rows
    assert torch.equal(state(stopped), state(unbroken))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logit", [-12.0, -6.0, 0.0, 6.0, 12.0, 15.0])
@pytest.mark.parametrize("truth", [0.0, 1.0])
def test_a_saturated_mask_has_the_gradient_in_16_bits_that_it_has_in_32(dtype, logit, truth):
    """To 2 %: a false positive that is sure of itself must still be corrected."""
    from diffad_ref.diffusion_ad import SegmentationNet, mask_loss

    torch.manual_seed(0)
    network = SegmentationNet(6, 4).eval()
    torch.nn.init.constant_(network.head.bias, logit)
    torch.nn.init.normal_(network.head.weight, std=1e-3)
    pair, gradients, scale = torch.rand(1, 6, 32, 32), [], 1.0
    for narrow in (False, True):
        with torch.autocast("cpu", dtype, enabled=narrow):
            prediction = network(pair)
        loss = scale * mask_loss(prediction, torch.full_like(prediction, truth))
        gradients.append(torch.autograd.grad(loss, network.head.bias)[0] / scale)
        scale = 1 / gradients[0].abs().item()  # as a gradient scaler finds it for fp16
    assert prediction.dtype == torch.float32 and gradients[0] != 0
    assert torch.allclose(*gradients, rtol=0.02)


def test_a_card_that_is_too_small_says_what_helps(tmp_path, monkeypatch):
    def full(batch, generator):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=16 * 2**30)
    )
    detector = Line()
    detector.training_loss = full
    with pytest.raises(ValueError, match="2 images at a time do not fit into 16 GiB") as error:
        train(detector)
    assert "batch_size=1 with accumulate=2, checkpointing=True" in str(error.value)
    with pytest.raises(ValueError, match="1 images at a time .*: try checkpointing=True"):
        train(detector, batch_size=1)


def test_a_card_that_is_too_small_for_the_optimisers_averages_says_so(monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=16 * 2**30)
    )
    with pytest.raises(ValueError, match="2 images at a time do not fit into 16 GiB"):
        train(Line(), on_optimizer=lambda optimizer: optimizer.register_step_pre_hook(full))


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_a_whole_step_may_use_tf32_and_nothing_else_may(precision):
    """The backward pass and the projection of a step are products of matrices, too."""
    settings, seen = (torch.backends.cuda.matmul, torch.backends.cudnn), []
    before, detector = [s.allow_tf32 for s in settings], Line()
    plain = detector.training_loss

    def note(*_):
        seen.append([s.allow_tf32 for s in settings])

    def loss(batch, generator):
        losses = plain(batch, generator)
        losses["loss"].register_hook(note)
        return losses

    detector.training_loss = loss
    hooks = {"on_optimizer": lambda optimizer: optimizer.register_step_pre_hook(note)}
    train(detector, steps=1, precision=precision, **hooks)
    assert seen == [[precision != "float32"] * 2] * 2
    assert [s.allow_tf32 for s in settings] == before


def test_checkpointing_changes_nothing_but_what_is_kept(small_config):
    plain, lean = (diffusion_ad(small_config, 2) for _ in range(2))
    rows = [train(d, Pictures(), checkpointing=c).rows for d, c in ((plain, False), (lean, True))]
    assert rows[0] == rows[1] and torch.equal(state(plain), state(lean))


def test_what_never_learns_is_in_no_checkpoint_and_is_loaded_again(tmp_path):
    class Borrowed(nn.Linear):
        borrowed, loaded = True, 0

        def prepare(self, dataset):
            self.loaded += 1
            nn.init.constant_(self.weight, 3.0)

    class Reader(Line):
        def __init__(self):
            super().__init__()
            self.eye = Borrowed(1, 1)

    train(Reader(), out=tmp_path)
    assert not [name for name in read_tensors(tmp_path / STATE) if "eye" in name]
    again = Reader()
    restore(again, tmp_path)
    assert again.eye.loaded == 1 and again.eye.weight.item() == 3.0


def join(rank, folder):
    """Become one of two processes that `torchrun --nproc_per_node 2` starts."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)


def train_a_share(rank, folder):
    """What one of two processes does."""
    join(rank, folder)
    detector = Line()
    history = train(detector, out=folder / "run", accumulate=2)
    found = [state(detector), detector.seen, history.column("loss")]
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one_with_batches_twice_as_large(tmp_path, both):
    both(train_a_share, tmp_path)
    (first, seen, _), (second, also_seen, _) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)
    )
    one = Line()
    train(one, batch_size=4, accumulate=2)
    assert torch.equal(first, second)
    assert torch.allclose(first, state(one), atol=1e-6)
    assert [a + b for a, b in zip(seen, also_seen, strict=True)] == one.seen
    assert (tmp_path / "run" / STATE).exists()


def diverge_in_one(rank, folder):
    """A loss that is infinite in the second of two processes."""
    join(rank, folder)
    detector = Line()
    real = detector.training_loss

    def loss(batch, generator):
        return {"loss": real(batch, generator)["loss"] * (math.inf if rank else 1)}

    detector.training_loss = loss
    try:
        train(detector)
    except ValueError as error:
        (folder / f"{rank}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()


def test_a_loss_that_is_not_finite_in_one_process_stops_both(tmp_path, both):
    both(diverge_in_one, tmp_path)
    assert all("the loss of step 0" in (tmp_path / f"{k}.txt").read_text() for k in (0, 1))


def protect_a_share(rank, folder):
    """A step in each process, of which nothing may go along the first coordinate."""
    join(rank, folder)
    detector = Line()
    memory = GradientProjectionMemory(detector, lambda name, layer: name == "slope")
    memory.bases = {"slope": torch.tensor([[1.0], [0.0]])}
    before = detector.slope.weight.detach().clone()
    train(detector, on_optimizer=memory.protect)
    torch.save(detector.slope.weight.detach() - before, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_project_the_same_steps(tmp_path, both):
    both(protect_a_share, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    assert first[0, 0].abs() < 1e-7 and first[0, 1].abs() > 1e-3


@pytest.mark.parametrize("part", ["denoiser", "segmenter"])
def test_weights_that_are_no_numbers_are_told_as_a_loss_that_is_none(small_config, part):
    detector = diffusion_ad(small_config, 1)
    with torch.no_grad():
        next(getattr(detector, part).parameters()).fill_(math.nan)
    detector.stages = detector.stages[-1:]
    with pytest.raises(ValueError, match="the loss of step 0 in stage 'joint' is .*nan"):
        train(detector, Pictures())


def test_a_step_of_the_tiny_profile_in_which_all_learn_takes_less_than_a_gigabyte():
    detector = DiffusionAD.tiny()
    detector.stages = (replace(detector.stages[-1], steps=1),)
    assert set(detector.stages[0].lr) == {"denoiser", "segmenter"}
    before = psutil.Process().memory_info().rss
    with peak_memory(torch.device("cpu")) as peak:
        train(detector, Pictures(64))
    assert peak.bytes - before < 1e9


def test_peak_memory_covers_what_was_held_for_a_moment():
    before = psutil.Process().memory_info().rss
    with peak_memory(torch.device("cpu")) as peak:
        held = torch.ones(50_000_000)
        time.sleep(0.1)
        del held
    assert before + 150e6 < peak.bytes < before + 400e6
