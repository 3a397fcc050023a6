"""No step waits for a GPU, and nothing lies on two devices: shown without one."""

from collections import Counter

import pytest
import torch
from fake_card import fake_card
from torch.utils.data import Dataset

import diffad_ref as da
from diffad_ref import training

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
    detector = getattr(method, size)().to("cuda")
    for part in detector.modules():
        if hasattr(part, "is_ready"):
            part.is_ready()
    return detector


def train(detector, steps: int, **settings):
    side = detector.view("train")["image_size"]
    settings = {"device": "cuda", "progress": False, "num_workers": None} | settings
    return da.fit(detector, Held(side), steps, 2, **settings)


@pytest.fixture(
    params=[(m, s) for m in METHODS for s in SIZES], ids=lambda p: f"{p[0].__name__}-{p[1]}"
)
def on_card(request):
    """A fake card, and a detector on it."""
    with fake_card() as card:
        yield card, built(*request.param)


def test_between_two_readings_of_the_losses_a_training_waits_for_nothing(on_card, monkeypatch):
    """Two steps need as many waits as one and one reading; so a step needs none."""
    monkeypatch.setattr(training, "READ_EVERY", 1)
    (card, detector), waits = on_card, []
    detector.stages = detector.stages[-1:]
    for steps in (1, 2):
        card.waits.clear()
        train(detector, steps, precision="bf16")
        waits.append(Counter(card.waits))
    more = (waits[1] - waits[0]).elements()
    assert [wait.split(" ", 1)[1] for wait in more] == ["copies to the CPU"]
