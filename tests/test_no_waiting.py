"""No step waits for a GPU, and nothing lies on two devices: shown without one."""

from collections import Counter
from functools import partial

import pytest
import torch
from fake_card import DRIVERLESS, fake_card
from torch.utils.data import Dataset

import diffad_ref as da
from diffad_ref import continual, evaluation, training
from diffad_ref.detector import check_images, precision_on
from diffad_ref.gradient_projection import GradientProjectionMemory

pytestmark = DRIVERLESS
METHODS = da.DiffusionAD, da.DecoDiff, da.OneForMore
SIZES = "tiny", "paper"


class Held(Dataset):
    """Pictures as bytes that lie on the card as a whole, as those of a folder do."""

    categories, raw = ("one", "two"), False

    def __init__(self, side: int, count: int = 4):
        self.side, self.count = side, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return {
            "image": torch.zeros(3, self.side, self.side, dtype=torch.uint8),
            "category": self.categories[i % 2],
            "category_index": i % 2,
            "texture": i % 2 == 0,
        }


def built(method, size: str):
    """A detector on the card, with everything that it learns or loads before its first step."""
    short = {"walk": 1} if method is da.OneForMore else {}
    detector = getattr(method, size)(**short).to("cuda")
    detector.identity = dict  # it is asked before the first step
    if method is da.DiffusionAD:
        detector.textures = torch.zeros(2, 3, 256, 256, dtype=torch.uint8)
    for part in detector.modules():
        if hasattr(part, "is_ready"):
            part.is_ready()
    return detector


def train(detector, steps: int, **settings):
    side = detector.view("train")["image_size"]
    settings = {"device": "cuda", "progress": False, "num_workers": None} | settings
    return da.fit(detector, Held(side), steps, 2, **settings)


LONG = {"tiny": (), "paper": pytest.mark.long}
CASES = [
    pytest.param((m, s), id=f"{m.__name__}-{s}", marks=LONG[s]) for m in METHODS for s in SIZES
]


@pytest.fixture(params=CASES)
def on_card(request):
    """A fake card, and a detector on it."""
    with fake_card() as card:
        yield card, built(*request.param)


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16"},
        pytest.param({"precision": "float32"}, marks=pytest.mark.long),
        pytest.param({"precision": "fp16"}, marks=pytest.mark.long),
        pytest.param({"accumulate": 2, "ema": 0.9, "checkpointing": True}, marks=pytest.mark.long),
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_between_two_readings_of_the_losses_a_training_waits_for_nothing(
    on_card, settings, monkeypatch
):
    """Two steps need as many waits as one and one reading; so a step needs none."""
    monkeypatch.setattr(training, "READ_EVERY", 1)
    (card, detector), waits = on_card, []
    detector.stages = detector.stages[-1:]
    for steps in (1, 2):
        card.waits.clear()
        train(detector, steps, **settings)
        waits.append(Counter(card.waits))
    more = (waits[1] - waits[0]).elements()
    assert [wait.split(" ", 1)[1] for wait in more] == ["copies to the CPU"]


@pytest.mark.long
def test_a_prediction_of_images_from_the_cpu_waits_for_nothing(on_card):
    card, detector = on_card
    side = detector.config.image_size
    images, index = torch.rand(2, 3, side, side), torch.tensor([0, 1])
    for _ in range(2):  # the first makes the matrices of the blur
        card.waits.clear()
        found = detector.predict(images, index, torch.Generator(), "bf16")
    assert card.waits == []
    assert found.anomaly_map.is_cuda and found.anomaly_map.shape == (2, side, side)
    assert {found.anomaly_map.dtype, found.score.dtype} == {torch.float32}


class Floats(Held):
    """The same as a loader gives them, with what an evaluation asks for."""

    def __getitem__(self, i):
        found = super().__getitem__(i) | {"label": i % 2, "kind": ("good", "hole")[i % 2]}
        return found | {"image": torch.zeros(3, self.side, self.side)}


@pytest.mark.parametrize("size", ["tiny", pytest.param("paper", marks=pytest.mark.long)])
def test_memory_is_gathered_and_extended_on_the_card_and_a_protected_step_waits_for_nothing(
    size, monkeypatch
):
    monkeypatch.setattr(training, "READ_EVERY", 1)
    waits = []
    with fake_card() as card:
        detector = built(da.OneForMore, size)
        memory = GradientProjectionMemory(detector, gamma=0.9)
        data = Floats(detector.config.image_size, 2)
        taken = continual.gather(detector, memory, data, progress=False)
        assert taken.keys() == memory.layers.keys()
        assert {basis.device.type for basis in memory.bases.values()} == {"cpu"}
        for steps in (1, 2):
            card.waits.clear()
            train(detector, steps, on_optimizer=partial(memory.protect, rest="freeze"))
            waits.append(Counter(card.waits))
    more = (waits[1] - waits[0]).elements()
    assert [wait.split(" ", 1)[1] for wait in more] == ["copies to the CPU"]


def test_an_evaluation_lies_on_one_device(monkeypatch):
    with fake_card():
        for method in METHODS:
            detector = built(method, "tiny")
            data = Floats(detector.config.image_size)
            monkeypatch.setattr(evaluation, "_check", lambda *_: None)  # it looks at values
            monkeypatch.setattr(evaluation, "loading", lambda _: {})  # processes know no fakes

            def index_of(batch):
                return batch["category_index"]

            for _, found, _ in evaluation.judged(detector, data, 2, index_of, progress=False):
                assert found.anomaly_map.is_cuda and found.score.is_cuda


def test_images_on_the_card_are_looked_at_before_they_are_judged_and_in_no_step():
    with fake_card() as card:
        images = torch.rand(2, 3, 8, 8, device="cuda")
        card.waits.clear()
        check_images(images, wait=False)
        assert card.waits == []
        check_images(images)
        assert card.waits and all("detector.py" in wait for wait in card.waits)


def test_a_step_that_reads_a_number_is_found(monkeypatch):
    """The test above can fail: a loss that is looked at makes a wait a step."""
    with fake_card() as card:
        detector = built(da.DecoDiff, "tiny")
        loss = detector.training_loss

        def looked_at(batch, generator):
            losses = loss(batch, generator)
            losses["loss"].item()
            return losses

        monkeypatch.setattr(detector, "training_loss", looked_at)
        card.waits.clear()
        train(detector, 3)
        assert len([wait for wait in card.waits if "reads a number" in wait]) >= 3


def test_what_lies_on_two_devices_is_refused():
    with fake_card():
        detector = built(da.DecoDiff, "tiny")
        z, t = torch.zeros(1, 12, 16, 16), torch.zeros(1, dtype=torch.long, device="cuda")
        with pytest.raises(Exception, match="device"):
            detector.corrector(z, t, t)
        with pytest.raises(RuntimeError, match="indexed from the card"):
            _ = torch.zeros(4)[t]


@pytest.mark.parametrize("bf16", [True, False])
def test_precision_is_chosen_by_the_card(bf16):
    with fake_card(bf16):
        card, cpu = torch.device("cuda"), torch.device("cpu")
        assert precision_on(card) == ("bf16" if bf16 else "fp16")
        assert precision_on(cpu) == "float32" and precision_on(cpu, "bf16") == "bf16"
        if not bf16:
            with pytest.raises(ValueError, match="Fake card has no bf16: take fp16"):
                precision_on(card, "bf16")
        with pytest.raises(ValueError, match="precision is one of auto, float32"):
            precision_on(card, "half")
