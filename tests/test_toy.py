"""The toy factory: that its masks tell the truth, and that its folder is whole or not there."""

import dataclasses
import os
import shutil
import signal
import types

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from diffad_ref.data import AnomalyFolder
from diffad_ref.tools import toy
from diffad_ref.tools.toy import CATEGORIES, KINDS, PHOTOGRAPHS, draw, draw_pair, toy_factory
from diffad_ref.tools.toy_objects import OBJECTS

SMALL = {"size": 32, "n_train": 2, "n_good": 2, "n_per_kind": 1, "progress": False}
ALL = [(category, kind) for category, kinds in KINDS.items() for kind in kinds]
FILES = 6 * (2 + 2 + 3 * (1 + 1)) + 1  # images, masks, and the settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small toy data set."""
    return toy_factory(tmp_path_factory.mktemp("toy"), **SMALL)


def contents(root):
    """Every file below a folder, with its bytes."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def changed(image, normal):
    """The largest difference of a channel, per pixel, in grey levels."""
    return np.abs(image.astype(int) - normal).max(-1)


# -------------------------------------------------------------------------------------- the folder


def test_there_are_six_categories_with_three_kinds_each_and_eight_kinds_in_all():
    assert len(CATEGORIES) == 6 and all(len(set(kinds)) == 3 for kinds in KINDS.values())
    assert len({kind for _, kind in ALL}) == 8
    assert set(CATEGORIES) == set(PHOTOGRAPHS) | set(OBJECTS)


def test_anomaly_folder_reads_it_with_the_counts_that_were_asked_for(folder):
    train, test = (AnomalyFolder(folder, split, 32) for split in ("train", "test"))
    assert train.categories == test.categories == sorted(CATEGORIES)
    for category in CATEGORIES:
        kinds = [s.kind for s in test.samples if s.category == category]
        assert sorted(kinds) == sorted(["good", "good", *KINDS[category]])
        assert [s.kind for s in train.samples if s.category == category] == ["good", "good"]
    assert len(train) == 12 and len(test) == 30
    assert test.has_labels and test.has_masks
    assert train.textures == set(PHOTOGRAPHS)


def test_default_counts_are_those_of_the_book(monkeypatch, tmp_path):
    drawn = []

    def note(category, split, kind, index, size, seed):
        drawn.append((category, split, kind))
        return np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1), np.uint8)

    monkeypatch.setattr(toy, "draw", note)
    monkeypatch.setattr(toy, "_save", lambda *_: None)
    toy_factory(tmp_path, progress=False)
    for category, kinds in KINDS.items():
        assert drawn.count((category, "train", "good")) == 200
        assert drawn.count((category, "test", "good")) == 40
        assert [drawn.count((category, "test", kind)) for kind in kinds] == [20, 20, 20]
    assert len(drawn) == 6 * 300


def test_every_defective_image_has_a_mask_and_no_good_one_has(folder):
    for sample in AnomalyFolder(folder, "test", 32):
        assert bool(sample["mask"].any()) == bool(sample["label"]) == (sample["kind"] != "good")
        assert not sample["mask"].all()
        assert sample["image"].shape == (3, 32, 32)


def test_files_are_lossless_copies_of_what_is_drawn(folder):
    for category, kind in ALL[::4]:
        image, mask = draw(category, "test", kind, 0, size=32)
        path = folder / category / "test" / kind / "000.png"
        assert np.array_equal(np.asarray(Image.open(path)), image)
        path = folder / category / "ground_truth" / kind / "000_mask.png"
        assert np.array_equal(np.asarray(Image.open(path)), mask)


def test_no_image_is_there_twice(folder):
    images = [p.read_bytes() for p in folder.rglob("*.png") if "ground_truth" not in p.parts]
    assert len(set(images)) == len(images) == 42


# ------------------------------------------------------------------------------------------- seeds


def test_equal_seeds_give_equal_files_whatever_was_drawn_before(folder, tmp_path):
    np.random.seed(1)
    assert contents(toy_factory(tmp_path, **SMALL)) == contents(folder)


def test_different_seeds_share_no_image(folder, tmp_path):
    other = toy_factory(tmp_path, **SMALL, seed=1)
    first, second = contents(folder), contents(other)
    assert first.keys() == second.keys()
    same = {name for name in first if first[name] == second[name]}
    assert not {name for name in same if "ground_truth" not in name}


def test_an_image_does_not_depend_on_how_many_others_there_are(folder, tmp_path):
    more = contents(toy_factory(tmp_path, **{**SMALL, "n_train": 3, "n_good": 1, "n_per_kind": 2}))
    few = contents(folder)
    shared = {n for n in few.keys() & more.keys() if n != "factory.json"}
    assert len(shared) == 6 * (2 + 1 + 3 * 2)
    assert all(few[name] == more[name] for name in shared)


@pytest.mark.parametrize(
    "change",
    [{"size": 16}, {"seed": 1}, {"n_train": 1}, {"n_good": 1}, {"n_per_kind": 2}],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_have_a_folder_of_their_own(folder, monkeypatch, change):
    monkeypatch.setattr(toy, "draw", lambda *_, **__: 1 / 0)  # so it wants to draw anew
    with pytest.raises(ZeroDivisionError):
        toy_factory(folder.parent, **{**SMALL, **change})


def test_drawing_changed_means_another_folder(folder, monkeypatch):
    monkeypatch.setattr(toy, "VERSION", toy.VERSION + 1)
    monkeypatch.setattr(toy, "draw", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        toy_factory(folder.parent, **SMALL)


# ------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize(("category", "kind"), ALL)
def test_outside_its_mask_a_defective_image_equals_its_normal_twin(category, kind, size):
    """Up to what the factory calls invisible, and one level of rounding."""
    for index in range(2):
        image, normal, mask = draw_pair(category, "test", kind, index, size)
        assert mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 255}
        difference = changed(image, normal)
        assert difference[mask == 0].max() <= 255 * toy.VISIBLE + 1
        assert difference[mask > 0].max() > 30  # and inside, somewhere, one cannot miss it


@pytest.mark.parametrize(("category", "kind"), ALL)
def test_mask_adds_to_the_changed_pixels_only_what_they_enclose_or_all_but_touch(category, kind):
    for index in range(2):
        image, normal, mask = draw_pair(category, "test", kind, index, 64)
        visible = changed(image, normal) >= 255 * toy.VISIBLE - 1
        near = ndimage.binary_dilation(visible, iterations=2)
        assert not ((mask > 0) & ~ndimage.binary_fill_holes(near)).any()


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_good_image_is_its_own_twin_and_has_no_mask(category, split):
    image, normal, mask = draw_pair(category, split, "good", 0, 32)
    assert np.array_equal(image, normal) and not mask.any()


def test_drawn_pair_and_drawn_image_are_the_same():
    image, mask = draw("gear", "test", "bent", 4, 32, seed=7)
    other, _, same = draw_pair("gear", "test", "bent", 4, 32, seed=7)
    assert np.array_equal(image, other) and np.array_equal(mask, same)


def test_defects_are_small_enough_to_be_defects():
    for category, kind in ALL:
        shares = [draw(category, "test", kind, i, 32)[1].mean() / 255 for i in range(4)]
        assert 0.003 < min(shares) and max(shares) < 0.3, (category, kind, shares)


@pytest.mark.parametrize("category", CATEGORIES)
def test_good_images_differ_from_one_another_in_more_than_noise(category):
    """An object that always lay the same would be solved by subtraction."""
    views = [draw(category, "train", "good", i, 32)[0] for i in range(4)]
    for i in range(1, 4):
        assert np.median(changed(views[0], views[i])) > 5 * 255 * 0.012 / 2


# ------------------------------------------------------------------------------------- photographs


@pytest.fixture(params=["train", "test"])
def halves(request, monkeypatch):
    """Photographs that are white where this split may look, and black elsewhere."""
    photo = np.zeros((512, 512), np.uint8)
    photo[(slice(None, 335) if request.param == "train" else slice(335, None))] = 255
    fake = {name: lambda: photo for name in PHOTOGRAPHS}
    monkeypatch.setattr(toy, "photographs", types.SimpleNamespace(**fake))
    return request.param


@pytest.mark.parametrize("category", PHOTOGRAPHS)
def test_training_and_test_images_come_from_disjoint_parts_of_a_photograph(halves, category):
    """Beyond the photograph PIL paints black, so no view reaches over its edge either."""
    other = {"train": "test", "test": "train"}[halves]
    for index in range(25):
        assert draw(category, halves, "good", index, 16)[0].min() > 64
        assert draw(category, other, "good", index, 16)[0].max() < 64


# ----------------------------------------------------------------------------------------- objects


@pytest.mark.parametrize("name", OBJECTS)
def test_a_broken_part_is_one_change_to_the_same_scene(name):
    for kind in KINDS[name]:
        scene = OBJECTS[name](np.random.default_rng(0))
        broken = scene.broken(kind, np.random.default_rng(1))
        if kind in toy.SURFACE_DEFECTS:
            assert broken is None
            continue
        fields = [f.name for f in dataclasses.fields(scene)]
        different = [f for f in fields if getattr(scene, f) is not getattr(broken, f)]
        assert len(different) == 1 and different != ["pose"]
        assert not np.array_equal(scene.render(64)[0], broken.render(64)[0])


@pytest.mark.parametrize("name", OBJECTS)
def test_surface_defects_stay_on_the_object(name):
    scene = OBJECTS[name](np.random.default_rng(3))
    image, region = scene.render(128)
    assert 0.1 < region.mean() < 0.9
    for kind in set(KINDS[name]) & set(toy.SURFACE_DEFECTS):
        for seed in range(5):
            rng = np.random.default_rng(seed)
            bad = toy.SURFACE_DEFECTS[kind](image, region, rng)
            assert np.array_equal(bad[~region], image[~region])
            assert not np.array_equal(bad[region], image[region])


def test_wrong_print_is_never_the_right_one():
    scene = OBJECTS["capsule"](np.random.default_rng(0))
    texts = {scene.broken("print", np.random.default_rng(i)).text for i in range(60)}
    assert scene.text not in texts and all(len(text) == len(scene.text) for text in texts)
    wrong = [sum(a != b for a, b in zip(text, scene.text, strict=True)) for text in texts]
    assert set(wrong) == {1} and len(texts) > 10


# ---------------------------------------------------------------------------------- whole or absent


def test_second_call_draws_nothing(folder, monkeypatch):
    monkeypatch.setattr(toy, "draw", lambda *_, **__: 1 / 0)
    assert toy_factory(folder.parent, **SMALL) == folder


def stop_after(monkeypatch, calls, error):
    """Make the drawing raise after some images."""
    real, count = toy.draw, iter(range(10**6))

    def draw_some(*args, **kwargs):
        if next(count) == calls:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(toy, "draw", draw_some)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("no space left on device")])
def test_interrupted_factory_leaves_nothing_and_the_next_call_is_complete(
    folder, tmp_path, monkeypatch, error
):
    with monkeypatch.context() as patch:
        stop_after(patch, 20, error)
        with pytest.raises(type(error)):
            toy_factory(tmp_path, **SMALL)
    assert os.listdir(tmp_path) == []
    assert contents(toy_factory(tmp_path, **SMALL)) == contents(folder)


def test_what_a_killed_factory_leaves_is_not_taken_for_complete(folder, tmp_path, monkeypatch):
    """Nothing is cleaned up after SIGKILL, so the folder's name must not exist before the end."""
    with monkeypatch.context() as patch:
        stop_after(patch, 20, KeyboardInterrupt())
        patch.setattr(toy.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            toy_factory(tmp_path, **SMALL)
    [left] = os.listdir(tmp_path)
    assert left.startswith(".") and len(contents(tmp_path)) > 10
    made = toy_factory(tmp_path, **SMALL)
    assert made.name == folder.name and contents(made) == contents(folder)
    assert len(contents(made)) == FILES


def die_in_the_middle(root):
    """Draw ten images, then be killed."""
    real, count = toy.draw, iter(range(10))
    toy.draw = lambda *args, **kwargs: (
        os.kill(os.getpid(), signal.SIGKILL) if next(count) == 9 else real(*args, **kwargs)
    )
    toy_factory(root, **SMALL)


def test_next_call_removes_what_factories_left_that_were_killed(folder, tmp_path, start):
    killed = start(die_in_the_middle, tmp_path)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL and len(contents(tmp_path)) > 5
    made = toy_factory(tmp_path, **SMALL)
    assert os.listdir(tmp_path) == [made.name] and contents(made) == contents(folder)


@pytest.mark.parametrize("name", ["elsewhere", "here"])
def test_what_another_factory_is_drawing_is_left_alone(folder, tmp_path, monkeypatch, name):
    """Whether a process on another machine lives cannot be seen from here."""
    with monkeypatch.context() as patch:
        patch.setattr(toy.shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(toy.platform, "node", lambda: name)
        patch.setattr(toy.os, "getpid", {"here": os.getppid, "elsewhere": lambda: 2**22 + 1}[name])
        stop_after(patch, 20, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            toy_factory(tmp_path, **SMALL)
    monkeypatch.setattr(toy.platform, "node", lambda: "here")
    [left] = os.listdir(tmp_path)
    made = toy_factory(tmp_path, **SMALL)
    assert set(os.listdir(tmp_path)) == {left, made.name}


def test_two_factories_at_once_give_one_whole_folder(folder, tmp_path, monkeypatch):
    """The slower one finds the folder of the faster, and takes it."""
    real = toy.draw

    def draw_late(*args, **kwargs):
        monkeypatch.setattr(toy, "draw", real)
        shutil.copytree(folder, tmp_path / folder.name)
        return real(*args, **kwargs)

    monkeypatch.setattr(toy, "draw", draw_late)
    made = toy_factory(tmp_path, **SMALL)
    assert os.listdir(tmp_path) == [folder.name] and contents(made) == contents(folder)


def test_cache_folder_is_the_one_that_the_variable_names(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFAD_CACHE", str(tmp_path / "not yet" / "there"))
    made = toy_factory(**SMALL)
    assert made == tmp_path / "not yet" / "there" / folder.name
    monkeypatch.delenv("DIFFAD_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert toy.cache_folder() == tmp_path / ".cache" / "diffad_ref"


# ----------------------------------------------------------------------------------- refused, named


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("apple", "test", "good", 0), "unknown toy category 'apple'; there are board, brick"),
        (("gear", "test", "stain", 0), "gear has the kinds bent, crack, missing, not 'stain'"),
    ],
)
def test_unknown_category_or_kind_is_answered_with_the_known_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(*arguments)


def test_size_too_small_to_see_anything_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 16 pixels, not 8"):
        toy_factory(tmp_path, size=8)
    assert os.listdir(tmp_path) == []
