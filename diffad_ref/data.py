"""The sample contract, and `AnomalyFolder`, which reads the MVTec layout from disk.

Everything that learns or judges in this package eats the dictionaries that come out of here, so
whatever is odd about a folder (missing masks, mixed sizes, no labels) is settled here, once.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import center_crop

from diffad_ref.images import SUFFIXES, read_image, read_mask, resize_mask

# Surfaces without an outline: the whole image is foreground. Zipper counts as one in DiffusionAD.
TEXTURES = frozenset(
    ["carpet", "grid", "leather", "tile", "wood", "zipper"]  # MVTec AD
    + ["brick", "grass", "gravel"]  # the toy factory
    + ["magnetic_tile"]
    + [f"Class{i}" for i in range(1, 11)]  # DAGM 2007
)

EXPECTED_TREE = """\
<root>/
  <category>/
    train/good/000.png ...            good images to learn from
    test/good/000.png ...             good images to judge
    test/<defect>/000.png ...         defective images, one folder a kind of defect
    ground_truth/<defect>/000_mask.png ...   optional, white where the defect is
(<root> may also be one such category itself)"""


def is_texture(category: str) -> bool:
    """Whether a category is a surface that fills the image, rather than an object on a ground."""
    return category in TEXTURES


@dataclass(frozen=True)
class Record:
    """Where one sample lies on disk, before anything is decoded."""

    path: Path
    mask_path: Path | None
    category: str
    kind: str  # "good", the defect folder's name, or "unlabelled"
    foreground_path: Path | None = None

    @property
    def label(self) -> int:
        """1 for a defective image, 0 for a good or unlabelled one."""
        return int(self.kind not in ("good", "unlabelled"))


class AnomalyFolder(Dataset):
    """Images with their masks from a folder in the MVTec layout.

    Parameters
    ----------
    root : path
        Folder of categories, or one category (it then has a `train` or `test` folder).
    split : "train" (good images to learn from) or "test" (good and defective ones to judge)
    image_size : int, (height, width) or None
        Every image is resized to it (antialiased bilinear); None keeps each image's own size.
    categories : sequence of str, optional
        Which ones, in the order of `category_index`; by default all of them, sorted.
    foreground : path, optional
        Folder that mirrors `root` with masks of the object, such as
        `<foreground>/<category>/train/good/000.png`.
    crop : int, optional
        Keep only the middle of each resized image, so many pixels a side, and of its masks. A
        label stays what its folder says, even if the defect is cut away.
    cache : bool
        Keep decoded images in memory, 4 HW bytes each. Small images are read thousands of times,
        and decoding would cost more than learning. Ignored for `image_size=None`.

    Attributes
    ----------
    categories : list of str
        Where `category_index` points. A longer list may be put in its place: the images of one
        task then count their categories among those of all tasks.
    samples : list of Record
        In sorted order: category, then kind, then file name.
    has_labels : bool
        False if the test images lie loose in one folder: image metrics then mean nothing.
    has_masks : bool
        False if any defective image lacks its mask: pixel metrics then mean nothing.

    Raises
    ------
    FileNotFoundError
        If the root, a folder of the layout or a foreground mask is missing.
    ValueError
        If a category is unknown or empty. On access: a damaged file, a mask of another size.

    Notes
    -----
    `dataset[i]` is a dict: image (3, H, W) float32 in [0, 1], mask (1, H, W) in {0, 1}, label,
    category, category_index, kind, path, and foreground (1, H, W) if a folder was given.

    Grey images get three equal channels; 16-bit images are scaled from 65535 to 255. Alpha is
    composited over white, because the colour beneath a transparent pixel is arbitrary.

    A mask, `000_mask.png` or `000.png`, is defect where it exceeds half of full scale. (Class
    numbers such as VisA's are for the adapter that writes this layout.) `resize_mask` has the
    rule for smaller sizes. Zeros stand for a mask that is missing or not needed.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        image_size: int | tuple[int, int] | None = 64,
        categories: Sequence[str] | None = None,
        foreground: str | Path | None = None,
        cache: bool = True,
        crop: int | None = None,
    ):
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", got {split!r}')
        self.root = Path(root)
        folders = _category_folders(self.root)
        self.categories = _select(folders, categories, self.root)
        samples = []
        for category in self.categories:
            folder = folders[category]
            if split == "train":
                found = _read_good(folder / "train/good", category)
            else:
                found = _read_test(folder / "test", category, folder / "ground_truth")
            if foreground is not None:
                found = _add_foreground(found, folder, Path(foreground) / category)
            samples += found
        self._fill(split, samples, image_size, cache, crop)

    @classmethod
    def from_folders(
        cls,
        good: str | Path | None = None,
        test: str | Path | None = None,
        image_size: int | tuple[int, int] | None = 64,
        category: str = "images",
        cache: bool = True,
        crop: int | None = None,
    ) -> AnomalyFolder:
        """Read one plain folder of images, without a layout and without masks.

        Parameters
        ----------
        good : path
            Folder of good images; gives a training set.
        test : path
            Folder of images to judge; gives a test set. Subfolders name the kinds ("good", or
            any defect) and give labels. Without them `has_labels` is False: predict only.
        category : str
            Its name, the same for both sets. The rest as for `AnomalyFolder`.

        Raises ValueError if not exactly one of them is given, or it holds no image.
        """
        if (good is None) == (test is None):
            raise ValueError("from_folders makes one set: give either good=... or test=...")
        self = cls.__new__(cls)  # no layout to look for, so not through __init__
        self.root = Path(test if good is None else good)
        self.categories = [category]
        read, split = (_read_test, "test") if good is None else (_read_good, "train")
        self._fill(split, read(self.root, category), image_size, cache, crop)
        return self

    def _fill(self, split, samples, image_size, cache, crop=None) -> None:
        self.split = split
        self.samples = samples
        self.image_size = image_size
        self._size = _size_pair(image_size)
        self.crop = crop
        if crop is not None and (self._size is None or crop > min(self._size)):
            raise ValueError(f"cannot crop {crop} pixels from images of size {image_size}")
        self.has_labels = all(record.kind != "unlabelled" for record in samples)
        self.has_masks = self.has_labels and all(r.mask_path for r in samples if r.label)
        self.cache = cache and image_size is not None
        self._cache: dict[Path, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> dict:
        record = self.samples[i]
        parts = self._cache.get(record.path) or self._decode(record)
        if self.cache:
            self._cache[record.path] = parts
        return {
            **{name: part.float() for name, part in parts.items()},
            "image": parts["image"].float() / 255,
            "label": record.label,
            "category": record.category,
            "category_index": self.categories.index(record.category),
            "kind": record.kind,
            "path": str(record.path),
        }

    def _decode(self, record: Record) -> dict[str, Tensor]:
        """The sample's pictures as bytes: image in 0..255, masks in {0, 1}."""
        image = read_image(record.path)
        height, width = self._size or image.size[::-1]
        small = image.resize((width, height), Image.Resampling.BILINEAR)
        parts = {"image": torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()}
        masks = {"mask": record.mask_path, "foreground": record.foreground_path}
        for name, path in masks.items():
            if path is not None:
                mask = _read_mask_of(record, path, image.size)
                parts[name] = torch.from_numpy(resize_mask(mask, (height, width)))[None]
        parts.setdefault("mask", torch.zeros(1, height, width, dtype=torch.uint8))
        if self.crop is not None:
            parts = {name: center_crop(part, [self.crop]) for name, part in parts.items()}
        return parts


def _read_mask_of(record: Record, path: Path, image_size: tuple[int, int]) -> np.ndarray:
    mask = read_mask(path)
    if mask.shape[::-1] != image_size:
        raise ValueError(
            f"{path} is {mask.shape[1]}x{mask.shape[0]} pixels, but its image {record.path} is "
            f"{image_size[0]}x{image_size[1]} (width x height)"
        )
    if not mask.any():
        warnings.warn(f"{path} marks no pixel, its image is {record.kind!r}", stacklevel=2)
    return mask


def _size_pair(image_size) -> tuple[int, int] | None:
    pair = (image_size, image_size) if isinstance(image_size, int) else image_size
    if pair is not None and (len(pair) != 2 or min(pair) < 1):
        raise ValueError(f"image_size must be a positive int, a pair or None, got {image_size!r}")
    return pair


def _contents(folder: Path) -> str:
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return (", ".join(names[:12]) or "nothing") + more


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        near = next(p for p in folder.absolute().parents if p.is_dir())
        raise FileNotFoundError(
            f"no folder {folder}\n{near} holds: {_contents(near)}\nexpected:\n{EXPECTED_TREE}"
        )


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    files = (p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    return sorted(p for p in files if p.suffix.lower() in SUFFIXES)


def _category_folders(root: Path) -> dict[str, Path]:
    _require_folder(root)
    splits = {"train", "test"}
    if splits & {folder.name for folder in _folders(root)}:
        return {root.resolve().name: root}
    found = {f.name: f for f in _folders(root) if splits & {part.name for part in _folders(f)}}
    if not found:
        raise FileNotFoundError(
            f"no category (a folder with train/ or test/) in {root}\n"
            f"it holds: {_contents(root)}\nexpected:\n{EXPECTED_TREE}"
        )
    return found


def _select(folders: dict[str, Path], categories, root: Path) -> list[str]:
    if categories is None:
        return list(folders)
    wanted = [categories] if isinstance(categories, str) else list(dict.fromkeys(categories))
    unknown = [category for category in wanted if category not in folders]
    if unknown or not wanted:
        problem = f"unknown categories {unknown}" if unknown else "no category chosen"
        raise ValueError(f"{problem} in {root}; known: {', '.join(folders)}")
    return wanted


def _read_good(folder: Path, category: str) -> list[Record]:
    _require_folder(folder)
    paths = _images(folder)
    if not paths:
        raise ValueError(
            f"category {category!r} is empty: no image in {folder}, which holds: "
            f"{_contents(folder)} (image files end in {', '.join(sorted(SUFFIXES))})"
        )
    return [Record(path, None, category, "good") for path in paths]


def _read_test(folder: Path, category: str, truth: Path | None = None) -> list[Record]:
    _require_folder(folder)
    kinds = [kind for kind in _folders(folder) if _images(kind)]
    if not kinds:  # loose images: nobody says which of them are good
        return [Record(r.path, None, category, "unlabelled") for r in _read_good(folder, category)]
    samples = []
    for kind in kinds:
        masks = {}
        if kind.name != "good" and truth is not None and (truth / kind.name).is_dir():
            masks = {mask.stem: mask for mask in _images(truth / kind.name)}
        for path in _images(kind):
            mask = masks.get(f"{path.stem}_mask", masks.get(path.stem))
            samples.append(Record(path, mask, category, kind.name))
    return samples


def _add_foreground(samples: list[Record], folder: Path, foreground: Path) -> list[Record]:
    """Pair each image with the mask at the same place under the foreground folder."""
    _require_folder(foreground)
    files = [p for p in foreground.rglob("*") if p.suffix.lower() in SUFFIXES]
    masks = {p.relative_to(foreground).with_suffix(""): p for p in files}
    keys = [record.path.relative_to(folder).with_suffix("") for record in samples]
    missing = [str(foreground / key) for key in keys if key not in masks]
    if missing:
        raise FileNotFoundError(f"no foreground mask {missing[0]}.* ({len(missing)} missing)")
    return [
        replace(record, foreground_path=masks[key])
        for record, key in zip(samples, keys, strict=True)
    ]
