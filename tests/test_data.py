"""What comes out of a folder of images, and what is said when it cannot."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from diffad_ref.data import AnomalyFolder, is_texture
from diffad_ref.images import check_images, read_image, resize_mask

FIRST_CRACK = 0  # kinds are sorted, so "crack" precedes "good"


# What a sample is


def test_sample_has_the_fields_of_the_contract(mvtec_root):
    sample = AnomalyFolder(mvtec_root, "test", image_size=16)[FIRST_CRACK]
    assert sample["image"].shape == (3, 16, 16) and sample["image"].dtype == torch.float32
    assert sample["mask"].shape == (1, 16, 16) and sample["mask"].dtype == torch.float32
    assert {name: value for name, value in sample.items() if name not in ("image", "mask")} == {
        "label": 1,
        "category": "bottle",
        "category_index": 0,
        "kind": "crack",
        "path": str(mvtec_root / "bottle/test/crack/005.png"),
    }


def test_default_collate_makes_batches_that_pass_the_border_check(mvtec_root):
    batch = next(iter(DataLoader(AnomalyFolder(mvtec_root, "test", image_size=8), batch_size=5)))
    check_images(batch["image"])
    assert batch["label"].tolist() == [1, 1, 0, 0, 1]
    assert batch["kind"] == ["crack", "crack", "good", "good", "hole"]


def test_training_images_are_good_and_sorted_by_category_and_name(mvtec_root):
    samples = AnomalyFolder(mvtec_root).samples
    names = [path.relative_to(mvtec_root).as_posix() for path in (r.path for r in samples)]
    assert names == [f"{c}/train/good/00{i}.png" for c in ("bottle", "carpet") for i in range(3)]
    assert all(record.label == 0 and record.kind == "good" for record in samples)


def test_chosen_categories_keep_the_order_they_were_asked_in(mvtec_root):
    dataset = AnomalyFolder(mvtec_root, categories=["carpet", "bottle"])
    assert dataset.categories == ["carpet", "bottle"]
    assert (dataset[0]["category"], dataset[0]["category_index"]) == ("carpet", 0)
    assert (dataset[-1]["category"], dataset[-1]["category_index"]) == ("bottle", 1)


def test_one_category_folder_is_a_root_too(mvtec_root):
    dataset = AnomalyFolder(mvtec_root / "bottle", "test")
    assert dataset.categories == ["bottle"] and len(dataset) == 6


def test_own_size_is_kept_and_pixels_are_exact_without_image_size(mvtec_root):
    sample = AnomalyFolder(mvtec_root, "test", image_size=None)[FIRST_CRACK]
    pixels = np.asarray(Image.open(sample["path"]))
    assert np.array_equal(sample["image"].numpy() * 255, pixels.transpose(2, 0, 1))
    assert sample["mask"].sum() == 5 * 6  # the rectangle that the fixture draws


def test_mixed_sizes_become_one_height_and_width(mvtec_root, write):
    write(mvtec_root / "bottle/train/good/900.png", np.zeros((7, 90, 3), np.uint8))
    dataset = AnomalyFolder(mvtec_root, image_size=(12, 18))
    assert {dataset[i]["image"].shape for i in range(len(dataset))} == {(3, 12, 18)}


def test_shrinking_averages_instead_of_dropping_pixels(mvtec_root, write):
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    write(mvtec_root / "bottle/train/good/000.png", stripes)
    image = AnomalyFolder(mvtec_root, image_size=8)[0]["image"]
    assert torch.allclose(image, torch.full_like(image, 0.5), atol=0.02)


def test_cache_gives_the_same_sample_without_reading_the_file_again(mvtec_root):
    dataset = AnomalyFolder(mvtec_root, "test", image_size=16)
    first = dataset[0]
    first["image"].zero_()  # a careless caller must not change what is kept
    shutil.rmtree(mvtec_root)
    fresh = dataset[0]
    assert fresh["image"].max() > 0.5 and torch.equal(fresh["mask"], first["mask"])


def test_without_cache_every_access_reads_the_file(mvtec_root):
    dataset = AnomalyFolder(mvtec_root, image_size=16, cache=False)
    dataset[0]
    shutil.rmtree(mvtec_root)
    with pytest.raises(ValueError, match="000.png"):
        dataset[0]


def test_dataset_can_be_sent_to_worker_processes(mvtec_root):
    dataset = AnomalyFolder(mvtec_root, "test", image_size=8)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[3]["image"], dataset[3]["image"])


def test_foreground_folder_adds_its_mask_by_place_and_name(mvtec_root, write):
    foreground = mvtec_root.parent / "foreground"
    for i in range(3):
        mask = np.zeros((20, 24), np.uint8)
        mask[: 5 * i + 5] = 255
        write(foreground / f"bottle/train/good/00{i}.bmp", mask)
    dataset = AnomalyFolder(mvtec_root, "train", None, ["bottle"], foreground)
    assert [dataset[i]["foreground"].sum().item() for i in range(3)] == [120, 240, 360]


def test_missing_foreground_mask_is_named(mvtec_root, write):
    foreground = mvtec_root.parent / "foreground"
    write(foreground / "bottle/train/good/000.png", np.zeros((20, 24), np.uint8))
    with pytest.raises(FileNotFoundError, match=r"001\.\* \(2 missing\)"):
        AnomalyFolder(mvtec_root, categories=["bottle"], foreground=foreground)


def test_textures_fill_the_image_and_objects_do_not():
    textures = ["carpet", "zipper", "brick", "magnetic_tile", "Class10"]
    assert all(is_texture(category) for category in textures)
    assert not any(is_texture(category) for category in ["bottle", "gear", "capsule", "board"])


# How files are read


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "PNG", "TIFF"])
def test_lossless_formats_give_the_same_pixels(tmp_path, write, suffix):
    pixels = np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    write(tmp_path / f"a.{suffix}", pixels)
    image = AnomalyFolder.from_folders(good=tmp_path, image_size=None)[0]["image"]
    assert np.array_equal(image.numpy() * 255, pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", ["jpg", "JPEG"])
def test_jpeg_is_read_within_its_compression_error(tmp_path, write, suffix):
    write(tmp_path / f"a.{suffix}", np.full((16, 16, 3), (200, 100, 50), np.uint8))
    pixels = np.asarray(read_image(tmp_path / f"a.{suffix}")).reshape(-1, 3)
    assert np.allclose(pixels, (200, 100, 50), atol=3)


def test_grey_image_gets_three_equal_channels(tmp_path, write):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    read = np.asarray(read_image(write(tmp_path / "a.png", pixels)))
    assert all(np.array_equal(read[..., channel], pixels) for channel in range(3))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled_by_its_full_range(tmp_path, write, suffix):
    pixels = np.array([[0, 257, 51400, 65535]], np.uint16)
    read = np.asarray(read_image(write(tmp_path / f"a.{suffix}", pixels)))
    assert read[0, :, 0].tolist() == [0, 1, 200, 255]  # 65535 = 257 * 255


def test_transparent_pixels_become_white_whatever_colour_lies_beneath(tmp_path, write):
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], np.uint8)
    read = np.asarray(read_image(write(tmp_path / "a.png", pixels)))
    assert read[0].tolist() == [[10, 20, 30], [255, 255, 255], [204, 204, 204]]  # 255 (1 - 51/255)


def test_palette_image_shows_its_colours(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([250, 0, 0, 0, 120, 0])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png")
    assert np.asarray(read_image(tmp_path / "a.png"))[0].tolist() == [[250, 0, 0], [0, 120, 0]]


def test_rotation_noted_by_the_camera_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    Image.new("RGB", (30, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (10, 30)


def test_files_that_are_not_images_and_hidden_ones_are_passed_over(mvtec_root):
    for name in ("notes.txt", "._000.png", "Thumbs.db"):
        (mvtec_root / "bottle/train/good" / name).write_bytes(b"no image")
    assert len(AnomalyFolder(mvtec_root, categories="bottle")) == 3


# Masks


def test_mask_is_defect_above_half_of_full_scale(mvtec_root, write):
    mask = np.zeros((20, 24), np.uint8)
    mask[0, :4] = [1, 127, 128, 254]
    write(mvtec_root / "bottle/ground_truth/crack/005_mask.png", mask)
    sample = AnomalyFolder(mvtec_root, "test", image_size=None)[FIRST_CRACK]
    assert sample["mask"][0, 0, :5].tolist() == [0, 0, 1, 1, 0]


@pytest.mark.parametrize("name", ["005.png", "005.bmp", "005_mask.PNG"])
def test_mask_is_found_by_its_stem_with_or_without_the_ending(mvtec_root, name):
    truth = mvtec_root / "bottle/ground_truth/crack"
    with Image.open(truth / "005_mask.png") as mask:
        mask.load()
    (truth / "005_mask.png").unlink()
    mask.save(truth / name)
    assert AnomalyFolder(mvtec_root, "test", None).samples[FIRST_CRACK].mask_path == truth / name


def test_good_images_need_no_mask_and_get_zeros(mvtec_root):
    dataset = AnomalyFolder(mvtec_root, "test", image_size=16)
    good = next(i for i, record in enumerate(dataset.samples) if record.kind == "good")
    assert dataset.has_masks and dataset[good]["mask"].sum() == 0


def test_one_missing_mask_is_enough_to_say_so(mvtec_root):
    (mvtec_root / "carpet/ground_truth/cut/005_mask.png").unlink()
    assert not AnomalyFolder(mvtec_root, "test").has_masks
    assert AnomalyFolder(mvtec_root, "test", categories=["bottle"]).has_masks


def test_shrunken_mask_keeps_pixels_that_are_at_least_half_covered():
    mask = np.zeros((8, 8), np.uint8)
    mask[:4, :4] = 1  # covers one of four pixels fully
    mask[:4, 4:6] = 1  # covers the next by half
    mask[4:, 4:5] = 1  # covers another by a quarter
    assert resize_mask(mask, (2, 2)).tolist() == [[1, 1], [0, 0]]


def test_defect_thinner_than_half_a_pixel_does_not_vanish():
    mask = np.zeros((64, 64), np.uint8)
    mask[9, 32:40] = 1
    expected = np.zeros((8, 8), np.uint8)
    expected[1, 4] = 1
    assert np.array_equal(resize_mask(mask, (8, 8)), expected)


def test_empty_mask_stays_empty_at_any_size():
    assert resize_mask(np.zeros((10, 10), np.uint8), (4, 7)).sum() == 0


def test_enlarged_mask_repeats_its_pixels():
    mask = np.array([[1, 0], [0, 1]], np.uint8)
    assert np.array_equal(resize_mask(mask, (6, 6)), np.kron(mask, np.ones((3, 3))))


def test_mask_that_marks_nothing_on_a_defective_image_is_warned_about(mvtec_root, write):
    write(mvtec_root / "bottle/ground_truth/crack/005_mask.png", np.zeros((20, 24), np.uint8))
    with pytest.warns(UserWarning, match="005_mask.png marks no pixel"):
        sample = AnomalyFolder(mvtec_root, "test")[FIRST_CRACK]
    assert sample["label"] == 1  # the folder says so


# Your own images


def test_plain_folder_of_good_images_is_a_training_set(mvtec_root):
    folder = mvtec_root / "bottle/train/good"
    dataset = AnomalyFolder.from_folders(good=folder, image_size=16, category="bottle")
    assert (dataset.split, dataset.categories, len(dataset)) == ("train", ["bottle"], 3)
    assert torch.equal(dataset[1]["image"], AnomalyFolder(mvtec_root, image_size=16)[1]["image"])


def test_test_folder_with_subfolders_has_labels_but_no_masks(mvtec_root):
    dataset = AnomalyFolder.from_folders(test=mvtec_root / "bottle/test")
    assert [record.label for record in dataset.samples] == [1, 1, 0, 0, 1, 1]
    assert dataset.has_labels and not dataset.has_masks


def test_loose_test_images_claim_neither_labels_nor_masks(mvtec_root):
    dataset = AnomalyFolder.from_folders(test=mvtec_root / "bottle/test/hole")
    assert not dataset.has_labels and not dataset.has_masks
    assert [record.kind for record in dataset.samples] == ["unlabelled"] * 2


@pytest.mark.parametrize("folders", [{}, {"good": ".", "test": "."}])
def test_from_folders_wants_exactly_one_folder(folders):
    with pytest.raises(ValueError, match="either good=... or test=..."):
        AnomalyFolder.from_folders(**folders)


# What goes wrong


def test_missing_root_shows_the_neighbours_and_the_expected_tree(mvtec_root):
    with pytest.raises(FileNotFoundError) as error:
        AnomalyFolder(mvtec_root.parent / "mvtek")
    assert "mvtek" in str(error.value)
    assert "holds: mvtec/" in str(error.value) and "train/good/000.png" in str(error.value)


def test_root_without_categories_shows_what_it_holds(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(FileNotFoundError, match=r"(?s)it holds: pictures/.*ground_truth/<defect>"):
        AnomalyFolder(tmp_path)


def test_category_without_the_split_is_named(mvtec_root):
    shutil.rmtree(mvtec_root / "carpet/test")
    with pytest.raises(FileNotFoundError, match=r"carpet/test\n.*holds: ground_truth/, train/"):
        AnomalyFolder(mvtec_root, "test")


def test_empty_category_is_named(mvtec_root):
    shutil.rmtree(mvtec_root / "carpet/train/good")
    (mvtec_root / "carpet/train/good").mkdir()
    with pytest.raises(ValueError, match="'carpet' is empty.*holds: nothing"):
        AnomalyFolder(mvtec_root)


def test_unknown_category_lists_the_known_ones(mvtec_root):
    with pytest.raises(ValueError, match=r"\['cup'\].*known: bottle, carpet"):
        AnomalyFolder(mvtec_root, categories=["bottle", "cup"])


def test_unknown_split_is_refused(mvtec_root):
    with pytest.raises(ValueError, match="'valid'"):
        AnomalyFolder(mvtec_root, "valid")


@pytest.mark.parametrize("size", [0, -4, (8,), (8, 0)])
def test_impossible_image_size_is_refused(mvtec_root, size):
    with pytest.raises(ValueError, match="image_size"):
        AnomalyFolder(mvtec_root, image_size=size)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_truncated_png_is_named_wherever_it_breaks_off(mvtec_root, share):
    path = mvtec_root / "bottle/train/good/000.png"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="cannot read the image .*bottle/train/good/000.png"):
        AnomalyFolder(mvtec_root)[0]


def test_mask_of_another_size_is_named_with_both_sizes(mvtec_root, write):
    write(mvtec_root / "bottle/ground_truth/crack/005_mask.png", np.zeros((24, 20), np.uint8))
    with pytest.raises(ValueError, match="005_mask.png is 20x24 .*crack/005.png is 24x20"):
        AnomalyFolder(mvtec_root, "test")[FIRST_CRACK]


def test_floating_point_image_is_refused_because_its_range_is_unknown(tmp_path, write):
    path = write(tmp_path / "a.tif", np.ones((4, 4), np.float32))
    with pytest.raises(ValueError, match="a.tif: floating-point"):
        read_image(path)


# The border check


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.rand(3, 8, 8), r"\(3, 8, 8\).*images\[None\]"),
        (torch.rand(2, 1, 8, 8), r"\(B, 3, H, W\), got \(2, 1, 8, 8\)"),
        (torch.rand(2, 8, 8, 3), r"got \(2, 8, 8, 3\)"),
        (torch.rand(0, 3, 8, 8), "batch is empty"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "float32.*torch.uint8.*255"),
        (torch.full((1, 3, 8, 8), 255.0), r"found \[255, 255\]; divide by 255"),
        (torch.full((1, 3, 8, 8), -1.0), r"found \[-1, -1\]; is it still in \[-1, 1\]"),
        (torch.full((1, 3, 8, 8), float("inf")), "NaN or infinite"),
        (np.zeros((1, 3, 8, 8)), "expected a tensor.*ndarray"),
    ],
)
def test_what_is_no_batch_of_images_is_refused_with_a_hint(images, words):
    with pytest.raises(ValueError, match=words):
        check_images(images)


def test_the_image_with_nan_pixels_is_counted_and_the_name_is_the_callers():
    images = torch.rand(4, 3, 8, 8)
    images[2, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"^the originals: NaN.*\[2\]"):
        check_images(images, "the originals")


def test_images_from_zero_to_one_inclusive_pass():
    assert check_images(torch.linspace(0, 1, 3 * 4).view(1, 3, 2, 2)) is None
