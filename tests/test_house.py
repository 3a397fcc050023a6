"""The house keeps its rules: few rooms, one wall, no circle, short walks, a quick door."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import diffad_ref as da
from diffad_ref.codecs import CodecConfig
from diffad_ref.tools.photographs import Photographs
from house import PACKAGE, floors, imports_of, rooms

PAGE = Path(__file__).parents[1] / "book" / "design.md"
METHODS = {"diffusion_ad": da.DiffusionAD, "deco_diff": da.DecoDiff, "one_for_more": da.OneForMore}
HOUSE = rooms()


# ------------------------------------------------------------------------------------ size and wall


def test_the_flat_part_has_at_most_20_files_and_5000_lines():
    lines = {path.name: len(path.read_text().splitlines()) for path in PACKAGE.glob("*.py")}
    # 4,300 held all that runs on a GPU. Whole recipes and small profiles came after that, then
    # configs that check themselves, noise that is each image's own, one writer and reader, and what
    # is said to people with data sets and detectors of their own.
    print(f"{len(lines)} files, {sum(lines.values())} lines, the longest {max(lines.values())}")
    assert len(lines) <= 20 and sum(lines.values()) <= 5000 and max(lines.values()) <= 460


@pytest.mark.parametrize("name", HOUSE)
def test_no_room_imports_anything_from_behind_the_wall(name):
    assert not [i for i in imports_of(PACKAGE / f"{name}.py") if i.split(".")[0] == "tools"]


def test_no_circle_and_at_most_five_floors():
    storeys = floors(HOUSE)
    print(f"{sum(len(r.imports) for r in HOUSE.values())} imports on {len(storeys)} floors")
    assert len(storeys) <= 5


def test_imports_run_in_one_direction():
    ground = {"diffusion", "data", "maps", "metrics", "iterative_svd", "anomaly_masked"}
    first = {"detector", "networks", "codecs", "anomalies", "gradient_projection"}
    papers = {*METHODS, "checkpoints"}
    order = [ground, first, papers, {"training", "evaluation"}, {"continual"}]
    assert set().union(*order) == HOUSE.keys()
    for level, names in enumerate(order):
        allowed = set().union(*order[: level + 1])
        for name in names:
            assert set(HOUSE[name].imports) <= allowed, name
    assert not any(HOUSE[name].imports for name in ground)


@pytest.mark.parametrize("name", HOUSE)
def test_every_room_says_in_its_first_sentence_what_it_is_for(name):
    assert HOUSE[name].purpose.endswith(".")


# ------------------------------------------------------------------------- options of the papers

# Where in the paper, or in its released code, each setting has its value.
PAPER = {
    "diffusion_ad": {
        "image_size resample width multipliers blocks attention_levels heads norm_groups": "U-Net",
        "segmentation_width": "the segmentation network",
        "schedule steps t_s_range t_b_range t_s t_b w": "D1-D6",
        "synthesis foreground": "D12",
        "top_k": "D11",
        "stages": "training settings",
    },
    "deco_diff": {
        "image_size resize resample shift turned": "training settings",
        "classes width multipliers blocks heads context dropout norm_groups": "the network",
        "codec": "z_0",
        "schedule steps corruption times": "C1-C6",
        "fusion image_clip image_sigma latent_clip latent_sigma": "C7-C9",
        "stages": "training settings",
    },
    "one_for_more": {
        "image_size start codec": "Stable Diffusion 1.5",
        "width multipliers blocks heads prompt norm_groups": "its U-Net",
        "condition_layers condition_heads feed_forward dropout window": "A1, A2",
        "condition_channels condition_strides": "A2",
        "masked_weight": "A3",
        "pasting": "natural synthetic anomalies",
        "schedule steps walk level end_clean": "O2",
        "features stages_compared sigma": "O3",
        "gamma every": "G1, G3",
        "stages": "training settings",
    },
}
TINY = re.compile(r"\n    # Only for tiny; the paper has the defaults\.\n((?:    \w.*\n)+)")


@pytest.mark.parametrize("name", METHODS)
def test_every_option_stands_in_the_paper_or_in_the_block_for_tiny(name):
    text = (PACKAGE / f"{name}.py").read_text()
    block = TINY.search(text)
    tiny = {line.split(":")[0].strip(): line for line in block[1].splitlines()} if block else {}
    known = set(" ".join(PAPER[name]).split())
    own = {field.name for field in fields(METHODS[name].Config)}
    print(f"{name}: {len(known)} options of the paper, {len(tiny)} for tiny")
    assert own == known | tiny.keys() and not known & tiny.keys()
    assert all("  # " in line for line in tiny.values()), "each with its reason"
    paper, small = METHODS[name].Config.paper(), METHODS[name].Config.tiny()
    assert all(getattr(paper, n) != getattr(small, n) for n in tiny), "only tiny needs it"


def test_the_codec_of_the_paper_is_that_of_stable_diffusion():
    assert da.DecoDiff.Config.paper().codec == CodecConfig()


# ------------------------------------------------------------------------------------------ walks


def walk(call) -> list[str]:
    """The rooms of the flat part that a call enters, in the order of the first visit."""
    entered, files = [], {str(path): path.stem for path in PACKAGE.glob("*.py")}

    def look(frame, event, argument):
        room = files.get(frame.f_code.co_filename)
        if event == "call" and room and room not in entered:
            entered.append(room)

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


def batch_of(size=64):
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.rand(2, 3, size, size, generator=generator),
        "texture": torch.tensor([True, False]),
        "category_index": torch.zeros(2, dtype=torch.long),
    }


def inside(detector, batch: dict) -> tuple[list[str], list[str]]:
    """The ways of a training batch and of a test image through a method."""
    generator = torch.Generator().manual_seed(0)
    x, c = batch["image"], batch["category_index"]
    with torch.no_grad():
        return (
            walk(lambda: detector.training_loss(batch, generator)),
            walk(lambda: detector.judge(x, c, generator)),
        )


def from_a_folder(detector, root: Path, out: Path) -> tuple[list[str], list[str]]:
    """The same two, from the folder of a data set to the weights and to the metrics."""

    def train():
        data = detector.folder(root, "train", categories=["gear"])
        da.fit(detector, data, len(detector.stages), 2, out=out, progress=False)

    def judge():
        test = detector.folder(root, "test", categories=["gear"])
        da.evaluate(detector, test, progress=False)

    return walk(train), walk(judge)


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """For each method: a training batch and a test image, inside it and from a folder."""
    root = da.toy_factory(tmp_path_factory.mktemp("toy"), 64, 0, 20, 2, 2, progress=False)
    found = {}
    for name, method in METHODS.items():
        detector = method.tiny()
        detector.prepare(Photographs(64, 128))
        found[name] = (*inside(detector, batch_of()), *from_a_folder(detector, root, root / name))
    return found


@pytest.mark.parametrize("name", METHODS)
def test_inside_a_method_five_rooms_are_entered_at_most_and_from_a_folder_ten(walks, name):
    for kind, way in zip(
        ("batch", "image", "batch, folder", "image, folder"), walks[name], strict=True
    ):
        print(f"{name}, {kind}: {' '.join(way)}")
    *inside, train, judge = walks[name]
    assert all(len(way) <= 5 for way in inside)
    assert len(train) <= 10 and len(judge) <= 10


@pytest.mark.parametrize("name", METHODS)
def test_the_walks_on_the_design_page_are_those_that_are_taken(walks, name):
    rows = re.findall(rf"^\| {METHODS[name].__name__} \| .+? \| (.+?) \|$", PAGE.read_text(), re.M)
    written = [re.findall(r"`(\w+)`", row) for row in rows]
    assert [sorted(way) for way in written] == [sorted(way) for way in walks[name]]


# ------------------------------------------------------------------------------------------- door


def seconds(statement: str) -> float:
    """Of processor time, of a fresh process that runs a statement."""
    before = os.times()
    subprocess.run([sys.executable, "-c", statement], check=True)
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])  # of children: others' work does not count


def test_importing_takes_less_than_12_tenths_of_the_time_of_torch_and_diffusers():
    theirs, ours = seconds("import torch, diffusers"), seconds("import diffad_ref")
    print(f"diffad_ref {ours:.1f} s, torch and diffusers {theirs:.1f} s")
    assert ours < 1.2 * theirs


def test_what_lies_behind_the_wall_is_there_on_demand():
    assert da.plots.__name__ == "diffad_ref.tools.plots"
    assert da.toy_factory.__module__ == "diffad_ref.tools.toy"
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = da.nothing_of_the_kind
