"""What is followed without a card, against the allocator of the CPU and a pencil."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from diffad_ref import one_for_more
from diffad_ref.deco_diff import DecoDiff
from diffad_ref.diffusion_ad import DiffusionAD
from diffad_ref.one_for_more import OneForMore
from diffad_ref.tools import allocations
from diffad_ref.tools.allocations import Allocations
from diffad_ref.tools.plan import GB, plan
from diffad_ref.training import OPTIMIZERS

SMALL = {
    DiffusionAD: {"width": 8, "multipliers": (1,), "attention_levels": (0,), "draws": 2}
    | {"segmentation_width": 4},
    DecoDiff: {"resize": 36, "classes": 2, "width": 16, "multipliers": (1,), "times": (4, 2)},
    OneForMore: {"width": 8, "window": (3, 3), "condition_layers": 1},
}


@pytest.fixture
def exact(monkeypatch):
    """Both sides count single bytes and whole matrices of attention, and invent no anomalies."""

    def with_anomalies(self, batch, generator):
        x = batch["image"].clone()
        return x, torch.zeros_like(x[:, :1]), x.new_zeros(len(x))

    monkeypatch.setattr(DiffusionAD, "with_anomalies", with_anomalies)
    monkeypatch.setattr(one_for_more, "paste", lambda images, *_: images.clone())
    monkeypatch.setattr(allocations, "BLOCK", 1)
    monkeypatch.setattr(allocations, "_fused_attention", F.scaled_dot_product_attention)
    with sdpa_kernel(SDPBackend.MATH):
        yield


def really_held(detector, count):
    """The most bytes that PyTorch's allocator on the CPU has given out during a second step."""
    stage = detector.stages[-1]
    detector.enter(stage)
    optimizer = OPTIMIZERS[stage.optimizer](detector.train().parameter_groups(), fused=True)
    side = detector.view("train")["image_size"]

    def step():
        batch = {"image": torch.rand(count, 3, side, side), "texture": torch.zeros(count).bool()}
        batch["category_index"] = torch.zeros(count, dtype=torch.long)
        detector.training_loss(batch, torch.Generator())["loss"].backward()
        optimizer.step()

    step()
    optimizer.zero_grad()
    owned = [*detector.parameters(), *detector.buffers()]
    owned += [x for state in optimizer.state.values() for x in state.values()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    changes = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())]
    now = most = sum(x.nbytes for x in owned)
    for change in changes:
        now += change
        most = max(most, now)
    return most


@pytest.mark.long
@pytest.mark.parametrize("method", SMALL, ids=lambda method: method.__name__)
def test_a_real_step_holds_what_was_planned_and_computes_as_much(exact, method):
    torch.manual_seed(0)
    small = method.tiny(image_size=32, **SMALL[method])
    for name, buffer in small.named_buffers():
        if name in ("codec.components", "extractor.filters"):
            buffer.normal_()
    found = plan(small)
    assert found.memory(3) * GB == pytest.approx(really_held(small, 3), rel=0.04)
    images = torch.rand(1, 3, *[small.view("train")["image_size"]] * 2)
    batch = {"image": images, "category_index": torch.tensor([1]), "texture": torch.tensor([False])}
    with FlopCounterMode(display=False) as step:
        small.training_loss(batch, torch.Generator())["loss"].backward()
    with FlopCounterMode(display=False) as prediction:
        small.predict(images[..., :32, :32], batch["category_index"])
    assert found.step_flops == step.get_total_flops()
    assert found.predict_flops == prediction.get_total_flops()


KB, MB = 2**10, 2**20


@pytest.mark.parametrize("mode", [FakeTensorMode, nullcontext], ids=["fake", "real"])
def test_a_layer_and_its_backward_pass_hold_what_a_pencil_says(mode):
    with mode(), Allocations() as memory:
        weight = torch.zeros(256, 256, requires_grad=True)
        x = torch.zeros(1024, 256)
        loss = (x @ weight).relu().sum()
        forward = list(memory.held)
        loss.backward()
    # The weight, x, the product, what ReLU keeps; then the sum, when the product is gone.
    assert forward == [KB * n for n in (256, 1280, 2304, 3328)] + [2304 * KB + 512]
    # Beside them the gradient of the loss, of the product, and of the weight, when ReLU's is gone.
    assert memory.held[len(forward) :] == [2305 * KB, 3329 * KB, 2305 * KB + 256 * KB]


def held_by(work):
    """MB that some work on 2 MB of 16-bit numbers keeps alive, with autocast, as on a card."""
    with FakeTensorMode(), allocations._as_on_a_card(), Allocations() as memory:
        x = torch.zeros(1, 4, 1024, 256, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            made = work(x)
        end = torch.zeros(1)
    return (memory.held[-1] - memory.held[0] - allocations.BLOCK) / MB, made, end


def test_attention_never_forms_its_matrix():  # 8 MB, for four heads
    held, *_ = held_by(lambda x: F.scaled_dot_product_attention(x, x, x))
    assert held == pytest.approx(2, rel=0.02)  # the result


def test_group_normalisation_copies_16_bit_numbers_to_32():
    held, made, _ = held_by(lambda x: F.group_norm(x, 2))
    assert made.dtype == torch.float32
    assert held == pytest.approx(4 + 4, rel=0.01)  # the copy and the result


def test_dropout_keeps_a_byte_a_number():
    held, *_ = held_by(lambda x: F.dropout(x, 0.4))
    assert held == pytest.approx(1 + 2, rel=0.01)  # what was kept, and the result
