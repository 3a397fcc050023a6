"""The magnetic tiles in the MVTec layout: nothing lost, nothing leaked."""

import os
import shutil
from pathlib import Path

import mtd
import numpy as np
import pytest
from PIL import Image

from diffad_ref.data import AnomalyFolder

SAMPLE = Path(
    os.environ.get("DIFFAD_MTD")
    or Path(__file__).parents[2] / "shared" / "data" / "magnetic_tile_sample"
)


@pytest.fixture
def source(tmp_path, write):
    """Twenty good tiles under two lightings each, and two defective tiles of each kind."""
    root = tmp_path / "source"
    rng = np.random.default_rng(0)
    number = 1000
    for kind, tiles in {"Free": 20, **{kind.capitalize(): 2 for kind in mtd.KINDS}}.items():
        for _ in range(tiles):
            number += 1000
            for lighting in (1, 2) if kind == "Free" else (1,):
                path = root / f"MT_{kind}/Imgs/exp{lighting}_num_{number + 30 * lighting}.jpg"
                write(path, rng.integers(0, 256, (30, 20), dtype=np.uint8))
                mask = np.zeros((30, 20), np.uint8)
                if kind != "Free":
                    mask[2:9, 3:12], mask[9, 3:12] = 253, 100
                write(path.with_suffix(".png"), mask)
    return root


def names(folder):
    """The file names in a folder."""
    return {path.name for path in folder.iterdir()}


def test_result_is_a_category_that_anomaly_folder_reads(source, tmp_path):
    mtd.convert(source, tmp_path / "out")
    train = AnomalyFolder(tmp_path / "out")
    test = AnomalyFolder(tmp_path / "out", "test", image_size=None)
    assert train.categories == ["magnetic_tile"] and test.has_masks
    assert (len(train), len(test)) == (28, 12 + 10)  # 30 % of 40, and two of each kind
    assert {record.kind for record in test.samples} == {"good", *mtd.KINDS}


def test_every_photograph_is_copied_byte_for_byte_into_one_split_only(source, tmp_path):
    done = mtd.convert(source, tmp_path / "out")
    train, test = names(done / "train/good"), names(done / "test/good")
    assert not train & test
    assert train | test == {p.name for p in source.glob("MT_Free/Imgs/*.jpg")}
    for path in done.rglob("*.jpg"):
        original = next(source.glob(f"MT_*/Imgs/{path.name}"))
        assert path.read_bytes() == original.read_bytes() and not path.is_symlink()


def test_lightings_of_one_tile_stay_on_one_side_of_the_split(source, tmp_path):
    done = mtd.convert(source, tmp_path / "out")
    thousands = [
        {int(name.split("_")[2][:-4]) // 1000 for name in names(done / folder)}
        for folder in ("train/good", "test/good")
    ]
    assert not thousands[0] & thousands[1]


def test_good_photographs_beside_a_defective_one_are_never_trained_on(source, tmp_path, write):
    defective = next(source.glob("MT_Crack/Imgs/*.jpg"))
    number = int(defective.stem.split("_")[2])
    pixels = np.zeros((30, 20), np.uint8)
    write(source / f"MT_Free/Imgs/exp2_num_{number + 150}.jpg", pixels)
    done = mtd.convert(source, tmp_path / "out", test_good=0.01)
    assert names(done / "test/good") == {f"exp2_num_{number + 150}.jpg"}


def test_gap_in_the_running_numbers_begins_a_new_group():
    groups = mtd.tile_groups(["exp2_num_1200", "exp1_num_1000", "exp6_num_1401", "exp1_num_50"])
    assert groups == {
        "exp1_num_50": 0,
        "exp1_num_1000": 1,
        "exp2_num_1200": 1,  # 200 further: may be the same tile
        "exp6_num_1401": 2,  # 201 further: another
    }


def test_seed_decides_the_split(source, tmp_path):
    first, same, other = (
        names(mtd.convert(source, tmp_path / out, seed=seed) / "test/good")
        for out, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == same and first != other


def test_masks_are_strictly_black_or_white(source, tmp_path):
    done = mtd.convert(source, tmp_path / "out")
    masks = [np.asarray(Image.open(path)) for path in done.rglob("*_mask.png")]
    assert len(masks) == 10
    assert all(np.unique(mask).tolist() == [0, 255] for mask in masks)
    assert all((mask == 255).sum() == 7 * 9 for mask in masks)  # the rows of 253, not of 100


def test_finished_folder_is_left_alone(source, tmp_path, capsys):
    done = mtd.convert(source, tmp_path / "out")
    shutil.rmtree(source)
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*")}
    assert mtd.convert(source, tmp_path / "out") == done
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*")} == before
    assert "already" in capsys.readouterr().out


def test_failed_run_leaves_no_category_and_the_next_one_begins_anew(source, tmp_path):
    mask = next(source.glob("MT_Uneven/Imgs/*.png"))
    data = mask.read_bytes()
    mask.unlink()
    with pytest.raises(FileNotFoundError, match=f"{mask.stem}.jpg has no mask {mask.name}"):
        mtd.convert(source, tmp_path / "out")
    assert not (tmp_path / "out/magnetic_tile").exists()
    (tmp_path / "out/.magnetic_tile.partial/test/good/stray.jpg").write_bytes(b"")
    mask.write_bytes(data)
    assert "stray.jpg" not in names(mtd.convert(source, tmp_path / "out") / "test/good")
    assert names(tmp_path / "out") == {"magnetic_tile"}


def test_defective_image_whose_mask_marks_nothing_is_left_out_and_named(
    source, tmp_path, write, capsys
):
    mask = next(source.glob("MT_Uneven/Imgs/*.png"))
    write(mask, np.zeros((30, 20), np.uint8))
    done = mtd.convert(source, tmp_path / "out")
    assert f"{mask.stem}.jpg" not in names(done / "test/uneven")
    assert f"{mask.stem}.jpg: filed as defective" in capsys.readouterr().out


def test_mask_of_another_size_is_named(source, tmp_path, write):
    mask = next(source.glob("MT_Break/Imgs/*.png"))
    write(mask, np.full((20, 30), 255, np.uint8))
    with pytest.raises(ValueError, match=mask.name):
        mtd.convert(source, tmp_path / "out")


def test_missing_folder_shows_the_expected_tree_and_what_is_there(source, tmp_path):
    shutil.rmtree(source / "MT_Fray")
    with pytest.raises(FileNotFoundError) as error:
        mtd.convert(source, tmp_path / "out")
    assert "MT_Fray" in str(error.value) and "holds: MT_Blowhole" in str(error.value)
    assert mtd.EXPECTED_TREE in str(error.value)


def test_photograph_without_a_running_number_is_refused(source, tmp_path):
    path = next(source.glob("MT_Free/Imgs/*.jpg"))
    path.rename(path.with_name("tile.jpg"))
    with pytest.raises(ValueError, match="'tile' is not named like"):
        mtd.convert(source, tmp_path / "out")


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_share_of_test_images_must_leave_both_splits_something(source, tmp_path, share):
    with pytest.raises(ValueError, match="between 0 and 1"):
        mtd.convert(source, tmp_path / "out", test_good=share)


def test_command_line_prints_the_citation_and_that_no_licence_is_stated(source, tmp_path, capsys):
    mtd.main([str(source), str(tmp_path / "out"), "--test-good", "0.5", "--seed", "3"])
    printed = capsys.readouterr().out
    assert "no licence" in printed and "Surface Defect Saliency" in printed
    assert len(names(tmp_path / "out/magnetic_tile/test/good")) == 20  # half of 40


def test_command_line_ends_with_an_error_in_one_breath(tmp_path):
    with pytest.raises(SystemExit, match="error: no images in"):
        mtd.main([str(tmp_path), str(tmp_path / "out")])


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no magnetic tiles; DIFFAD_MTD names their folder")
def test_real_tiles_are_laid_out_whole_and_without_leaks(tmp_path):
    done = mtd.convert(SAMPLE, tmp_path)
    train = [record.path for record in AnomalyFolder(tmp_path, "train").samples]
    test = AnomalyFolder(tmp_path, "test", image_size=64)
    assert test.has_masks
    assert all(test[i]["mask"].any() == bool(test[i]["label"]) for i in range(len(test)))
    good = len(list(SAMPLE.glob("MT_Free/Imgs/*.jpg")))
    assert len(train) + len(names(done / "test/good")) == good
    numbers = [int(path.stem.split("_")[2]) for path in train]
    others = [int(record.path.stem.split("_")[2]) for record in test.samples]
    distance = np.abs(np.subtract.outer(numbers, others))
    assert distance.min() > 192  # the widest pair of photographs that shows one tile
