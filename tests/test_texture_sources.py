"""Foreign textures, and the guess where a product lies."""

import numpy as np
import pytest
import torch

from diffad_ref.texture_sources import BUILT_IN, Photographs, estimate_foreground, texture_bank
from diffad_ref.toy_objects import OBJECTS

# ------------------------------------------------------------------------------------ texture bank


def test_built_in_bank_holds_the_photographs_of_both_packages():
    bank = texture_bank(size=32)
    assert bank.shape == (len(BUILT_IN) + 2, 3, 32, 32) and bank.dtype == torch.uint8
    assert (bank.float().std((1, 2, 3)) > 10).all()  # no blank one
    assert len({image.numpy().tobytes() for image in bank}) == len(bank)


def test_built_in_bank_holds_nothing_that_the_toy_factory_sells():
    assert not {"brick", "grass", "gravel"} & set(BUILT_IN)


def test_photographs_are_equal_crops_for_equal_arguments_and_all_others_differ():
    crops, again = Photographs(32, 5), Photographs(32, 5)
    assert len(crops) == 5 and crops.categories == ("photographs",)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(crops, again, strict=True))
    assert len({sample["image"].numpy().tobytes() for sample in crops}) == 5
    batch = torch.utils.data.default_collate([crops[i] for i in range(5)])
    assert batch["image"].shape == (5, 3, 32, 32) and batch["mask"].shape == (5, 1, 32, 32)
    assert 0 <= batch["image"].min() and batch["image"].max() <= 1 and not batch["label"].any()


def test_folder_is_searched_through_and_each_image_cut_to_its_centre(tmp_path, write):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = (10, 200, 30)  # the centred square
    write(tmp_path / "deep/er/a.png", wide)
    write(tmp_path / "b.png", np.full((8, 8), 77, np.uint8))  # grey
    (tmp_path / "notes.txt").write_text("no image")
    bank = texture_bank(tmp_path, size=16)
    assert bank.shape == (2, 3, 16, 16) and bank.dtype == torch.uint8
    assert (bank[0] == 77).all()
    assert (bank[1] == torch.tensor([10, 200, 30])[:, None, None]).all()


def test_missing_texture_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; DTD's is dtd/images"):
        texture_bank(tmp_path / "nowhere")


def test_texture_folder_without_images_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path.name} holds no jpg, png or webp"):
        texture_bank(tmp_path)


def test_damaged_texture_is_named(tmp_path, write):
    path = write(tmp_path / "half.png", np.eye(64, dtype=np.uint8) * 255)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="half.png"):
        texture_bank(tmp_path, size=16)


# -------------------------------------------------------------------------------------- foreground


def scene(name, seed, size=64):
    """A toy product (1, 3, size, size) and where it is (size, size), from the renderer itself."""
    image, product = OBJECTS[name](np.random.default_rng(seed)).render(size)
    return torch.tensor(image).float().permute(2, 0, 1)[None], torch.tensor(product)


@pytest.mark.parametrize(("name", "overlap"), [("gear", 0.6), ("capsule", 0.7), ("board", 0.75)])
def test_estimated_foreground_covers_the_product_with_a_margin(name, overlap):
    for seed in range(10):
        image, product = scene(name, seed)
        found = estimate_foreground(image)[0, 0].bool()
        both = (found & product).sum() / (found | product).sum()
        assert (found & product).sum() / product.sum() > 0.94
        assert both > overlap and found.float().mean() < 0.85


def test_foreground_of_an_image_does_not_depend_on_its_batch():
    images = torch.cat([scene(name, 0)[0] for name in OBJECTS])
    together = estimate_foreground(images)
    alone = torch.cat([estimate_foreground(image[None]) for image in images])
    assert torch.equal(together, alone) and together.shape == (3, 1, 64, 64)
    assert together.unique().tolist() == [0, 1]


@pytest.mark.parametrize("level", [0.0, 0.4, 1.0])
def test_flat_image_is_all_foreground(level):
    assert estimate_foreground(torch.full((2, 3, 32, 32), level)).all()


def test_speck_is_no_product_so_the_whole_image_counts():
    image = torch.zeros(1, 3, 64, 64)
    image[..., 30, 30] = 1
    assert estimate_foreground(image).all()


def test_dark_product_on_a_light_ground_is_found_as_well():
    image = torch.ones(1, 3, 48, 48)
    image[..., 12:36, 16:32] = 0
    found = estimate_foreground(image)[0, 0]
    assert found[12:36, 16:32].all() and not found[:6].any() and not found[:, :10].any()
