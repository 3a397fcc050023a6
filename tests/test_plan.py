"""What a plan says, against what a small detector really does."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffad_ref.deco_diff import DecoDiff
from diffad_ref.diffusion_ad import DiffusionAD
from diffad_ref.gradient_projection import GradientProjectionMemory, project, representation
from diffad_ref.one_for_more import OneForMore, paste
from diffad_ref.tools import plan as planning
from diffad_ref.tools.plan import GPUS, Plan, plan

SMALL = {
    DiffusionAD: {"width": 8, "multipliers": (1,), "attention_levels": (0,), "draws": 2}
    | {"segmentation_width": 4},
    DecoDiff: {"resize": 36, "classes": 2, "width": 16, "multipliers": (1,), "times": (4, 2)},
    OneForMore: {"width": 8, "window": (3, 3), "condition_layers": 1},
}


@pytest.fixture(scope="module", params=SMALL, ids=lambda method: method.__name__)
def planned(request):
    """A small detector that knows enough to be used, at random, and its plan."""
    torch.manual_seed(0)
    small = request.param.tiny(image_size=32, **SMALL[request.param])
    small.textures = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    for name, buffer in small.named_buffers():
        if name in ("codec.components", "extractor.filters"):
            buffer.normal_()
    return small, plan(small)


def counted(work):
    """Arithmetic, and the bytes kept for the backward pass by storage, of what really runs.

    Attention forms its matrix, as in the plan; of the CPU's own kernel nothing is counted.
    """
    kept, alive = {}, []

    def keep(tensor):
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            work()
    return counter.get_total_flops(), kept


def seeded():
    return torch.Generator().manual_seed(0)


def test_a_plan_is_exactly_what_a_real_step_and_a_real_prediction_take(planned):
    detector, found = planned
    assert all(p.device.type == "cpu" and p.grad is None for p in detector.parameters())
    images = torch.rand(1, 3, *[detector.view("train")["image_size"]] * 2)
    batch = {"image": images, "category_index": torch.tensor([1]), "texture": torch.tensor([False])}
    step, kept = counted(lambda: detector.training_loss(batch, seeded())["loss"].backward())
    if isinstance(detector, DiffusionAD):  # making anomalies is not the networks' work
        step -= counted(lambda: detector.with_anomalies(batch, seeded()))[0]
    if isinstance(detector, OneForMore):
        step -= counted(lambda: paste(images, detector.config.pasting, seeded()))[0]
    weights = {p.untyped_storage().data_ptr() for p in detector.parameters()}
    prediction, _ = counted(
        lambda: detector.predict(images[..., :32, :32], batch["category_index"])
    )
    assert found.step_flops == step
    assert found.predict_flops == prediction
    assert found.kept_bytes == sum(size for place, size in kept.items() if place not in weights)
    assert found.weights == sum(p.numel() for p in detector.parameters())
    assert found.learning == sum(p.numel() for p in detector.parameters() if p.requires_grad)
    assert found.images == sum(stage.steps * stage.batch_size for stage in detector.stages)


@pytest.mark.parametrize("planned", [OneForMore], indirect=True)
def test_planning_needs_no_memory_for_weights(planned):
    with torch.device("meta"):
        bare = OneForMore.tiny(image_size=32, **SMALL[OneForMore])
    assert plan(bare) == planned[1]


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        (DiffusionAD, {"denoiser": 131_654_403, "segmenter": 28_373_569}),
        (DecoDiff, {"corrector": 394_991_876}),  # network L, and a table of 15 classes
        (OneForMore, {"unet": 859_520_964, "condition": 9_641_656}),
    ],
)
def test_networks_of_the_papers_size_have_the_papers_number_of_weights(method, parts):
    with torch.device("meta"):
        paper = method.paper()
    counts = {name: sum(p.numel() for p in getattr(paper, name).parameters()) for name in parts}
    assert counts == parts


# ------------------------------------------------------------------------------------------ tables

HAND = Plan("hand", 10**9, 10**8, 2 * 10**12, 10**12, 10**9, 720_000, 8)


def test_memory_is_weights_gradients_averages_and_what_is_kept():
    assert HAND.memory() == pytest.approx(4 + 1.2 + 8)
    assert HAND.memory(2) == pytest.approx(4 + 1.2 + 2)
    assert HAND.memory(2, half=True) == pytest.approx(4 + 1.2 + 1)


def test_hours_are_arithmetic_over_what_a_gpu_gets_done():
    seconds = 2e12 * 720_000 / (GPUS["A100 80 GB"][0] * 1e12 * 0.5)
    assert HAND.hours("A100 80 GB", 0.5) == pytest.approx(seconds / 3600)


@pytest.mark.parametrize("share", [0, -0.1, 1.1])
def test_utilisation_is_a_share(share):
    with pytest.raises(ValueError, match="utilisation is a share"):
        HAND.hours("T4", share)


def test_tables_have_a_row_for_each_method_and_a_column_for_each_choice():
    assert list(planning.size_table([HAND]).frame.index) == ["hand"]
    assert list(planning.hours_table([HAND]).frame) == [f"{gpu}, h" for gpu in GPUS]
    memory = planning.memory_table([HAND], (2, 16)).frame
    assert list(memory) == ["batch 2, GB", "batch 8, GB", "batch 16, GB"]
    assert list(memory.index) == [("hand", "float32"), ("hand", "bf16 autocast")]


def test_memory_is_shown_for_the_batches_that_were_asked_for_and_the_methods_own():
    other = replace(HAND, method="other", batch_size=32)
    memory = planning.memory_table([HAND, other], (16,)).frame.isna()
    assert memory["batch 8, GB"].tolist() == [False, False, True, True]
    assert memory["batch 32, GB"].tolist() == [True, True, False, False]


def test_command_prints_the_tables(monkeypatch, capsys):
    from diffad_ref.__main__ import main

    monkeypatch.setattr(planning, "paper_plans", lambda: [HAND])
    assert main(["plan", "--utilisation", "0.5", "--batch-sizes", "2"]) == 0
    printed = capsys.readouterr().out
    assert "50% of the peak" in printed and "batch 2, GB" in printed
    assert main(["plan", "--utilisation", "2"]) == 2


# -------------------------------------------------------------------- gradient projection memory


def test_the_memory_bill_counts_the_columns_that_representations_have():
    network = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.Flatten(), nn.Linear(64, 5))
    layers, x = GradientProjectionMemory(network).layers, torch.zeros(1, 2, 8, 8)
    found = planning.memory_bill(layers, lambda: network(x), images=10)
    bill = {row["layer"]: row for row in found}
    assert bill["0"]["columns"] == representation(network[0], x).shape[1] == 16
    assert bill["0"]["plain"] == 18 * 16 * 10 * 4
    assert bill["0"]["iterative"] == 18 * (16 + 18) * 4
    assert bill["2"]["features"] == 64 and bill["2"]["columns"] == 1
    assert bill["2"]["square"] == 64 * 64 * 8 and bill["2"]["memory"] == 64 * 32 * 4
    for name, layer in layers.items():
        step, half = layer.weight.detach(), bill[name]["features"] // 2
        with FlopCounterMode(display=False) as counted:
            project(step, torch.zeros(bill[name]["features"], half))
        assert bill[name]["flops"] == counted.get_total_flops()
