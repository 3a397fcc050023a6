"""What a plan says, against what a small detector really does."""

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from diffad_ref.__main__ import main
from diffad_ref.deco_diff import DecoDiff
from diffad_ref.diffusion_ad import DiffusionAD
from diffad_ref.one_for_more import OneForMore
from diffad_ref.plan import GPUS, Plan, hours_table, memory_table, plan, size_table

BATCH = 4
SMALL = {
    DiffusionAD: DiffusionAD.Config.tiny(32, width=8, segmentation_width=4),
    DecoDiff: DecoDiff.Config.tiny(32, classes=1),
    OneForMore: OneForMore.Config.tiny(32, window=(3, 3)),
}


class Images(torch.utils.data.Dataset):
    """Random images, with everything that a training step asks for."""

    categories = ("noise",)

    def __init__(self, size):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(BATCH, 3, size, size, generator=generator)

    def __len__(self):
        return BATCH

    def __getitem__(self, i):
        return {"image": self.images[i], "category_index": 0, "category": "noise"}


@pytest.fixture(scope="module", params=SMALL, ids=lambda kind: kind.__name__)
def measured(request):
    """A small detector, its plan, and what four images cost in a real step and prediction."""
    torch.manual_seed(0)
    detector = request.param(SMALL[request.param])
    data = Images(getattr(detector.config, "resize", 32))
    detector.prepare(data)
    detector.enter(detector.stages[-1])
    detector.train()
    batch = torch.utils.data.default_collate([data[i] for i in range(BATCH)])
    own = {p.untyped_storage().data_ptr() for p in detector.parameters()}
    kept, alive = {}, []

    def keep(tensor):
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as step, saved_tensors_hooks(keep, lambda x: x):
        detector.training_loss(batch, torch.Generator().manual_seed(0))["loss"].backward()
    detector.eval()
    images = batch["image"][..., :32, :32]
    with FlopCounterMode(display=False) as prediction:
        detector.predict(images, batch["category_index"])
    real = (step.get_total_flops(), prediction.get_total_flops(), sum(kept.values()))
    return detector, plan(detector), [value / BATCH for value in real]


def test_arithmetic_is_what_a_real_step_and_prediction_take(measured):
    _, found, (step, prediction, _) = measured
    assert found.step_flops == pytest.approx(step, rel=0.02)
    assert found.predict_flops == pytest.approx(prediction, rel=0.02)


def test_what_is_kept_for_the_backward_pass_is_what_a_real_step_keeps(measured):
    """A batch shares what does not depend on the image, so four images keep a little less."""
    _, found, (_, _, kept) = measured
    assert found.kept_bytes == pytest.approx(kept, rel=0.1)


def test_numbers_of_the_recipe_and_the_network_are_the_detectors_own(measured):
    detector, found, _ = measured
    assert found.weights == sum(p.numel() for p in detector.parameters())
    assert found.learning == sum(p.numel() for p in detector.parameters() if p.requires_grad)
    assert found.images == sum(s.steps * s.batch_size for s in detector.config.stages)


def test_same_numbers_come_from_the_meta_device():
    """Nearly: of attention, which is little here, the CPU's own kernel is not counted."""
    config = replace(SMALL[DiffusionAD], predicts="noise", attention_levels=())
    with torch.device("meta"):
        meta = plan(DiffusionAD(config))
    real = plan(DiffusionAD(config))
    assert replace(meta, kept_bytes=0, step_flops=0, predict_flops=0) == replace(
        real, kept_bytes=0, step_flops=0, predict_flops=0
    )
    for name in ("step_flops", "predict_flops", "kept_bytes"):
        assert getattr(meta, name) == pytest.approx(getattr(real, name), rel=0.1), name


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
    assert [row["method"] for row in size_table([HAND]).rows] == ["hand"]
    memory = memory_table([HAND], (2, 16))
    assert memory.columns[2:] == ("batch 2, GB", "batch 8, GB", "batch 16, GB")
    assert [row["precision"] for row in memory.rows] == ["float32", "bf16 autocast"]
    assert set(hours_table([HAND]).columns) == {"method", *(f"{gpu}, h" for gpu in GPUS)}


def test_command_prints_the_tables(monkeypatch, capsys):
    monkeypatch.setattr("diffad_ref.plan.paper_plans", lambda: [HAND])
    assert main(["plan", "--utilisation", "0.5", "--batch-sizes", "2"]) == 0
    printed = capsys.readouterr().out
    assert "50% of the peak" in printed and "batch 2, GB" in printed
    assert main(["plan", "--utilisation", "2"]) == 2
