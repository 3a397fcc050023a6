"""A committee: each member sees its own size, and what is averaged is what the members say."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from diffad_ref.__main__ import main
from diffad_ref.committee import Committee
from diffad_ref.detector import Prediction


@dataclass(frozen=True)
class Settings:
    image_size: int


class Member(nn.Module):
    """Says that everything is as abnormal as `value`, and keeps the images that it was shown."""

    def __init__(self, size, value, categories=("bolt",)):
        super().__init__()
        self.config, self.value, self.categories = Settings(size), value, categories
        self.weight = nn.Parameter(torch.zeros(()))
        self.view = {"image_size": size, "crop": None}
        self.device = torch.device("cpu")

    def check(self, images):
        if images.shape[-1] != self.config.image_size:
            raise ValueError("wrong size")

    def predict(self, images, category_index=None, generator=None):
        self.check(images)
        self.seen, self.asked = images, category_index
        count, _, h, w = images.shape
        maps, score = torch.full((count, h, w), self.value), torch.full((count,), self.value)
        return Prediction(maps, score, images)


class Other(Member):
    pass


def images(size=16):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_maps_and_scores_are_means_at_the_size_of_the_largest():
    committee = Committee([Member(8, 0.2), Member(16, 0.6), Member(12, 1.0)])
    found = committee.predict(images(), torch.tensor([0, 0]))
    assert torch.allclose(found.anomaly_map, torch.full((2, 16, 16), 0.6))
    assert torch.allclose(found.score, torch.tensor([0.6, 0.6]))
    assert found.parts["maps"].shape == (2, 3, 16, 16)
    assert torch.equal(found.reconstruction, images())


def test_each_member_sees_the_images_at_its_own_size_and_is_told_the_category():
    small, large = Member(8, 0.0), Member(16, 0.0)
    index = torch.tensor([0, 0])
    Committee([small, large]).predict(images(), index)
    assert torch.equal(large.seen, images()) and small.asked is large.asked is index
    means = images().unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1))
    assert small.seen.shape == (2, 3, 8, 8)
    assert (small.seen - means).abs().mean() < 0.1  # smoothed, not every second pixel
    assert torch.allclose(small.seen.mean(), images().mean(), atol=0.02)


def test_committee_of_one_says_what_its_member_says():
    member = Member(16, 0.3)
    alone, found = member.predict(images()), Committee([member]).predict(images())
    assert torch.equal(found.anomaly_map, alone.anomaly_map)
    assert torch.equal(found.score, alone.score)


def test_images_come_as_the_largest_member_wants_them():
    committee = Committee([Member(8, 0.0), Member(16, 0.0)])
    assert committee.view["image_size"] == committee.config.image_size == 16
    with pytest.raises(ValueError, match="wrong size"):
        committee.predict(images(8))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "a committee needs members"),
        ([Member(8, 0.0), Other(8, 0.0)], "different methods"),
        ([Member(8, 0.0), Member(8, 0.0, ("nut",))], "different categories"),
    ],
)
def test_members_that_do_not_fit_are_refused(members, message):
    with pytest.raises(ValueError, match=message):
        Committee(members)


# ------------------------------------------------------------------------------ from the terminal

SMALL = [
    "--method", "DecoDiff", "--steps", 2, "--batch-size", 2, "--seed", 3,
    "--set", "width=8", "--set", "norm_groups=4", "--set", "heads=1", "--set", "blocks=1",
    "--set", "context=8",
]  # fmt: skip


def command(*words):
    return main([str(word) for word in words])


@pytest.fixture
def two_sizes(mvtec_root, tmp_path):
    """Weights for 48 and for 32 pixels."""
    for size in (48, 32):
        out = tmp_path / f"at_{size}"
        assert command("train", mvtec_root, "--out", out, "--image-size", size, *SMALL) == 0
    return [tmp_path / f"at_{size}" / "weights" for size in (48, 32)]


def test_evaluate_averages_weights_and_its_record_tells_how_all_were_made(
    two_sizes, mvtec_root, tmp_path
):
    first, second = two_sizes
    report = tmp_path / "report.json"
    words = ["evaluate", second, mvtec_root, "--with", first, "--set", "masking=0.1"]
    assert command(*words, "--save", report) == 0
    saved = json.loads(report.read_text())
    assert saved["report"]["detector"] == "Committee"
    assert [line.split()[3] for line in saved["commands"]] == ["train", "train", "evaluate"]
    assert "at_32" in saved["commands"][0] and "at_48" in saved["commands"][1]


def test_weights_that_cannot_judge_with_others_are_refused(two_sizes, mvtec_root, capsys):
    first, second = two_sizes
    for words, message in (
        (["PCA", mvtec_root, "--with", first], "--with and --record are for weights"),
        ([first, mvtec_root, "--with", second, "--record"], "leave --set and --with out"),
        ([first, mvtec_root, "--with", "nowhere"], "nowhere"),
    ):
        assert command("evaluate", *words) != 0
        assert message in capsys.readouterr().err
