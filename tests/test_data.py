"""What comes out of a folder of images, and what is said when it cannot."""

import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from diffad_ref.anomalies import estimate_foreground
from diffad_ref.data import (
    TEXTURES,
    AnomalyFolder,
    Feed,
    loading,
    read_image,
    read_mask,
    resize_mask,
)
from diffad_ref.detector import check_images
from diffad_ref.tools.toy_objects import OBJECTS

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
        "texture": False,
        "kind": "crack",
        "path": str(mvtec_root / "bottle/test/crack/005.png"),
    }


def test_default_collate_makes_batches_that_pass_the_border_check(mvtec_root):
    batch = next(iter(DataLoader(AnomalyFolder(mvtec_root, "test", image_size=8), batch_size=5)))
    check_images(batch["image"])
    assert batch["label"].tolist() == [1, 1, 0, 0, 1]
    assert batch["texture"].dtype == torch.bool and not batch["texture"].any()
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


@pytest.mark.parametrize(("size", "crop"), [(16, 12), (16, 16), (17, 10), ((12, 21), 7)])
def test_crop_keeps_the_middle_of_image_mask_and_foreground(mvtec_root, size, crop):
    arguments = {"split": "test", "image_size": size, "foreground": estimate_foreground}
    whole = AnomalyFolder(mvtec_root, **arguments)[FIRST_CRACK]
    found = AnomalyFolder(mvtec_root, **arguments, crop=crop)[FIRST_CRACK]
    height, width = whole["image"].shape[1:]
    top, left = (height - crop) // 2, (width - crop) // 2
    for name in ("image", "mask", "foreground"):
        middle = whole[name][:, top : top + crop, left : left + crop]
        assert torch.equal(found[name], middle), name


def test_image_whose_defect_is_cropped_away_keeps_its_label(mvtec_root, write):
    mask = np.zeros((20, 24), np.uint8)
    mask[:3, :3] = 255
    write(mvtec_root / "bottle/ground_truth/crack/005_mask.png", mask)
    sample = AnomalyFolder(mvtec_root, "test", 20, crop=12)[FIRST_CRACK]
    assert sample["label"] == 1 and not sample["mask"].any()


# Surfaces and objects


def test_known_surfaces_are_textures_and_objects_are_not():
    assert {"carpet", "zipper", "brick", "magnetic_tile", "Class10"} <= TEXTURES
    assert not {"bottle", "gear", "capsule", "board"} & TEXTURES


def textures_of(dataset):
    """The name of each category, and whether its samples say that it is a surface."""
    return {s["category"]: s["texture"] for s in (dataset[i] for i in range(len(dataset)))}


def test_samples_of_known_surfaces_say_so(mvtec_root):
    assert textures_of(AnomalyFolder(mvtec_root)) == {"bottle": False, "carpet": True}


@pytest.mark.parametrize("split", ["train", "test"])
def test_empty_file_called_texture_makes_a_category_a_surface(mvtec_root, split):
    (mvtec_root / "bottle/texture").touch()
    assert textures_of(AnomalyFolder(mvtec_root, split)) == {"bottle": True, "carpet": True}
    assert textures_of(AnomalyFolder(mvtec_root / "bottle", split)) == {"bottle": True}


@pytest.mark.parametrize("names", [[], ["bottle"], ["bottle", "carpet"]])
def test_names_that_are_given_overrule_known_names_and_marker_files(mvtec_root, names):
    (mvtec_root / "carpet/texture").touch()
    found = textures_of(AnomalyFolder(mvtec_root, textures=names))
    assert [category for category, surface in found.items() if surface] == names


def test_unknown_texture_lists_the_categories(mvtec_root):
    with pytest.raises(ValueError, match=r"\['cork'\] among bottle, carpet"):
        AnomalyFolder(mvtec_root, textures=["carpet", "cork"])


# Foreground


def test_foreground_is_left_out_unless_it_is_asked_for(mvtec_root):
    assert "foreground" not in AnomalyFolder(mvtec_root)[0]


def test_foreground_folder_adds_its_mask_by_place_and_name(mvtec_root, write):
    foreground = mvtec_root.parent / "foreground"
    for i in range(3):
        mask = np.zeros((20, 24), np.uint8)
        mask[: 5 * i + 5] = 255
        write(foreground / f"bottle/train/good/00{i}.bmp", mask)
    dataset = AnomalyFolder(mvtec_root, "train", None, ["bottle"], foreground=foreground)
    assert [dataset[i]["foreground"].sum().item() for i in range(3)] == [120, 240, 360]


def test_a_grey_foreground_is_soft_and_a_texture_may_have_one(mvtec_root, write):
    mask = np.full((20, 24), 100, np.uint8)
    mask[:10] = 200
    for i in range(3):
        write(mvtec_root / f"carpet/thresh/good/00{i}.png", mask)
    dataset = AnomalyFolder(mvtec_root, "train", None, ["carpet"], foreground="thresh")
    assert dataset[0]["foreground"].unique().tolist() == pytest.approx([100 / 255, 200 / 255])
    small = AnomalyFolder(mvtec_root, "train", 10, ["carpet"], foreground="thresh")
    assert (small[0]["foreground"].diff(dim=1) <= 0).all()  # no edge is made harder


def test_missing_foreground_mask_is_named(mvtec_root, write):
    foreground = mvtec_root.parent / "foreground"
    write(foreground / "bottle/train/good/000.png", np.zeros((20, 24), np.uint8))
    with pytest.raises(FileNotFoundError, match=r"001\.\* \(2 missing\)"):
        AnomalyFolder(mvtec_root, categories=["bottle"], foreground=foreground)


def test_estimated_foreground_is_that_of_the_resized_image_and_a_surface_is_all_of_it(
    mvtec_root, write
):
    pixels = np.full((20, 24, 3), 30, np.uint8)
    pixels[6:14, 8:18] = 200  # noise all over would be no product
    for category in ("bottle", "carpet"):
        write(mvtec_root / category / "train/good/000.png", pixels)
    dataset = AnomalyFolder(mvtec_root, image_size=16, foreground=estimate_foreground)
    bottle, carpet = (dataset[i]["foreground"] for i in (0, 3))
    small = (dataset[0]["image"] * 255).round().byte().permute(1, 2, 0).numpy()
    assert bottle.dtype == torch.float32 and bottle.shape == (1, 16, 16)
    assert np.array_equal(bottle[0], estimate_foreground(small))
    assert 0.1 < bottle.mean() < 0.9 and carpet.all()


def scene(name, seed, size=64):
    """A toy product, uint8 (size, size, 3), and where it is, from the renderer itself."""
    image, product = OBJECTS[name](np.random.default_rng(seed)).render(size)
    return (image * 255).round().astype(np.uint8), product.astype(bool)


@pytest.mark.parametrize(("name", "overlap"), [("gear", 0.6), ("capsule", 0.7), ("board", 0.75)])
def test_estimated_foreground_covers_the_product_with_a_margin(name, overlap):
    for seed in range(10):
        image, product = scene(name, seed)
        found = estimate_foreground(image).astype(bool)
        both = (found & product).sum()
        assert both / product.sum() > 0.94
        assert both / (found | product).sum() > overlap and found.mean() < 0.85


@pytest.mark.parametrize("level", [0, 100, 255])
def test_flat_image_is_all_foreground(level):
    found = estimate_foreground(np.full((32, 24, 3), level, np.uint8))
    assert found.shape == (32, 24) and found.dtype == np.uint8 and (found == 1).all()


def test_speck_is_no_product_so_the_whole_image_counts():
    image = np.zeros((64, 64, 3), np.uint8)
    image[30, 30] = 255
    assert estimate_foreground(image).all()


def test_dark_product_on_a_light_ground_is_found_as_well():
    image = np.full((48, 48, 3), 255, np.uint8)
    image[12:36, 16:32] = 0
    found = estimate_foreground(image)
    assert found[12:36, 16:32].all() and not found[:6].any() and not found[:, :10].any()


# How files are read


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "PNG", "TIFF"])
def test_lossless_formats_give_the_same_pixels(tmp_path, write, suffix):
    pixels = np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    write(tmp_path / f"a.{suffix}", pixels)
    image = AnomalyFolder.from_folders(test=tmp_path, image_size=None)[0]["image"]
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


def test_a_mask_may_have_colours_of_other_kinds(tmp_path):
    Image.new("LAB", (2, 2), (255, 128, 128)).save(tmp_path / "a.tif")
    assert read_mask(tmp_path / "a.tif").all()


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
    words = {"image_size": 16, "category": "bottle", "texture": False}
    dataset = AnomalyFolder.from_folders(good=folder, **words)
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


def test_training_folder_that_is_not_told_whether_it_shows_a_surface_warns(mvtec_root):
    folder = mvtec_root / "bottle/train/good"
    with pytest.warns(UserWarning, match="'bolts' is taken for an object.*texture=True"):
        dataset = AnomalyFolder.from_folders(good=folder, category="bolts")
    assert not dataset[0]["texture"]


@pytest.mark.parametrize(
    ("words", "surface"),
    [
        ({"texture": True}, True),
        ({"texture": False}, False),
        ({"category": "carpet"}, True),
        ({"category": "carpet", "texture": False}, False),
    ],
)
def test_training_folder_that_is_told_does_not_warn(mvtec_root, recwarn, words, surface):
    folder = mvtec_root / "bottle/train/good"
    assert AnomalyFolder.from_folders(good=folder, **words)[0]["texture"] is surface
    assert not recwarn.list


def test_folder_of_images_to_judge_never_warns(mvtec_root, recwarn):
    AnomalyFolder.from_folders(test=mvtec_root / "bottle/test")
    assert not recwarn.list


def test_plain_folder_is_cropped_and_its_product_found_as_in_the_layout(mvtec_root):
    folder, words = mvtec_root / "bottle/test", {"crop": 12, "foreground": estimate_foreground}
    plain = AnomalyFolder.from_folders(test=folder, image_size=16, **words)
    layout = AnomalyFolder(mvtec_root / "bottle", "test", 16, **words)
    for name in ("image", "foreground"):
        assert torch.equal(plain[2][name], layout[2][name])


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
    with pytest.raises(FileNotFoundError, match=r"(?s)holds: pictures/.*ground_truth/<defect>"):
        AnomalyFolder(tmp_path)


def test_category_without_the_split_is_named(mvtec_root):
    shutil.rmtree(mvtec_root / "carpet/test")
    with pytest.raises(FileNotFoundError, match=r"carpet/test\n.*holds: ground_truth/, train/"):
        AnomalyFolder(mvtec_root, "test")


def test_empty_category_is_named(mvtec_root):
    shutil.rmtree(mvtec_root / "carpet/train/good")
    (mvtec_root / "carpet/train/good").mkdir()
    with pytest.raises(ValueError, match="'carpet' is empty.*carpet/train/good.*nothing"):
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


@pytest.mark.parametrize(("size", "crop"), [(16, 17), ((8, 32), 9), (None, 4)])
def test_crop_larger_than_the_image_or_of_unknown_size_is_refused(mvtec_root, size, crop):
    with pytest.raises(ValueError, match=f"cannot crop {crop} pixels"):
        AnomalyFolder(mvtec_root, image_size=size, crop=crop)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_truncated_png_is_named_wherever_it_breaks_off(mvtec_root, share):
    path = mvtec_root / "bottle/train/good/000.png"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="cannot read the image .*bottle/train/good/000.png"):
        AnomalyFolder(mvtec_root)[0]


def test_mask_of_another_size_is_named_with_both_sizes(mvtec_root, write):
    write(mvtec_root / "bottle/ground_truth/crack/005_mask.png", np.zeros((24, 20), np.uint8))
    with pytest.raises(ValueError, match=r"005_mask.png is \(20, 24\).*crack/005.png \(24, 20\)"):
        AnomalyFolder(mvtec_root, "test")[FIRST_CRACK]


def test_floating_point_image_is_refused_because_its_range_is_unknown(tmp_path, write):
    path = write(tmp_path / "a.tif", np.ones((4, 4), np.float32))
    with pytest.raises(ValueError, match="a.tif: floating-point"):
        read_image(path)


# ------------------------------------------------------------------------------------------- feed


def batches(data, numbers, **settings):
    return list(Feed(data, torch.device("cpu"), **settings).batches(np.array(numbers)))


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_batches_are_those_of_a_data_loader_held_or_loaded(mvtec_root, workers):
    """As a whole on the device, in this process, or by two others."""
    data, numbers = (
        AnomalyFolder(mvtec_root, image_size=16, foreground=estimate_foreground),
        [[5, 0], [2, 2]],
    )
    expected = list(DataLoader(data, batch_sampler=numbers))
    for batch, other in zip(batches(data, numbers, workers=workers), expected, strict=True):
        assert batch.keys() == other.keys()
        for name, value in other.items():
            same = torch.equal(batch[name], value) if torch.is_tensor(value) else None
            assert same if torch.is_tensor(value) else list(batch[name]) == list(value), name
    assert not data.raw, "the data set itself is left as it was"


def test_a_data_set_that_is_too_large_is_not_held(mvtec_root, monkeypatch):
    data = AnomalyFolder(mvtec_root, image_size=16)
    assert Feed(data, torch.device("cpu")).held is not None
    little = SimpleNamespace(available=4 * 6 * 16 * 16 * 3)  # masks do not fit beside the images
    monkeypatch.setattr("diffad_ref.data.psutil.virtual_memory", lambda: little)
    assert Feed(data, torch.device("cpu")).held is None
    assert len(batches(data, [[0, 1]])[0]["image"]) == 2


def test_any_data_set_can_be_fed():
    samples = [{"image": torch.rand(3, 4, 4), "name": str(i)} for i in range(3)]
    (batch,) = batches(samples, [[2, 0]])
    assert torch.equal(batch["image"][0], samples[2]["image"]) and batch["name"] == ["2", "0"]


def test_a_damaged_image_is_named_while_a_set_is_read(mvtec_root):
    (mvtec_root / "bottle/train/good/001.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="001.png"):
        Feed(AnomalyFolder(mvtec_root, image_size=16), torch.device("cpu"))


def test_a_gpu_gets_processes_and_pinned_memory():
    assert loading(torch.device("cpu")) == {"num_workers": 0, "pin_memory": False}
    found = loading(torch.device("cuda"))
    assert 1 <= found["num_workers"] <= 4 and found["pin_memory"]
    assert loading(torch.device("cuda"), 0)["num_workers"] == 0
