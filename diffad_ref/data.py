"""What a sample is, and `AnomalyFolder`, which reads samples from the MVTec layout.

Everything that learns or judges eats the dictionaries that come out of here. Whatever is odd about
a file or a folder (bit depth, alpha, missing masks, no labels) is settled here, once.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})

# Surfaces without an outline that fill the image; zipper counts as one in DiffusionAD.
TEXTURES = frozenset(
    ["carpet", "grid", "leather", "tile", "wood", "zipper"]  # MVTec AD
    + ["brick", "grass", "gravel", "magnetic_tile"]  # the toy factory; magnetic tiles
    + [f"Class{i}" for i in range(1, 11)]  # DAGM 2007
)

EXPECTED_TREE = """\
<root>/
  <category>/
    train/good/000.png ...            good images to learn from
    test/good/000.png ...             good images to judge
    test/<defect>/000.png ...         defective images, one folder a kind of defect
    ground_truth/<defect>/000_mask.png ...   optional, white where the defect is
    texture                           optional, empty: the product is a surface, not an object
(<root> may also be one such category itself)"""

# ------------------------------------------------------------------------------------------ files


def _open(path: Path) -> Image.Image:
    """Decode fully, upright, with depths above 8 bits scaled to 8; ValueError names the file."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
    except Exception as error:  # PIL's decoders raise half a dozen unrelated types
        raise ValueError(f"cannot read the image {path}: {error}") from error
    if image.mode == "F":
        raise ValueError(f"{path}: floating-point images have no known range; save 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray(np.round(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    return image


def read_image(path: str | Path) -> Image.Image:
    """Read any supported image file as 8-bit RGB, alpha composited over white."""
    image = _open(Path(path))
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def read_mask(path: str | Path) -> np.ndarray:
    """Read a mask file as uint8 (H, W) in {0, 1}: 1 where it exceeds half of full scale."""
    image = _open(Path(path))
    if image.mode in ("LA", "RGBA", "P", "PA"):
        image = image.convert("RGB")  # a palette's colours count, not its indices
    return (np.asarray(image.convert("L")) > 127).astype(np.uint8)


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a binary mask (H, W) to `size` (height, width) so that it stays binary.

    A pixel is 1 if at least half of its area is. A mask too thin for that anywhere keeps the
    pixels that it covers most, so that no defective image loses its mask.
    """
    coverage = Image.fromarray(mask.astype(np.float32))
    coverage = np.asarray(coverage.resize((size[1], size[0]), Image.Resampling.BOX))
    threshold = min(0.5, float(coverage.max()))
    return ((coverage >= threshold - 1e-6) & (coverage > 0)).astype(np.uint8)


def estimate_foreground(image: np.ndarray) -> np.ndarray:
    """Where the product is, uint8 (H, W) in {0, 1}, guessed from an image, uint8 (H, W, 3).

    The background is taken to be what the border shows: each pixel's distance from the border's
    median colour is cut by Otsu's threshold, and gaps are closed. If that gives almost nothing or
    almost everything, the whole image counts.
    """
    from scipy import ndimage
    from skimage.filters import threshold_otsu

    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    distance = np.abs(image - np.median(border, axis=0)).max(-1)
    reach = max(1, len(image) // 24)
    product = ndimage.maximum_filter(distance > threshold_otsu(distance), 4 * reach + 1)
    product = ndimage.minimum_filter(product, 2 * reach + 1)  # gaps are closed, a margin is kept
    whole = not 0.05 <= product.mean() <= 0.95
    return np.ones_like(product, np.uint8) if whole else product.astype(np.uint8)


# ---------------------------------------------------------------------------------------- folders


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

    A detector gives the sets that fit it: see `Detector.folder`.

    Parameters
    ----------
    root : path
        Folder of categories, or one category (it then has a `train` or `test` folder).
    split : "train" (good images to learn from) or "test" (good and defective ones to judge)
    image_size : int, (height, width) or None
        Every image is resized to it (antialiased bilinear); None keeps each image's own size.
    categories : sequence of str, optional
        Which ones, in the order of `category_index`; by default all of them, sorted.
    textures : sequence of str, optional
        Which of them are surfaces without an outline; by default those with a file `texture` in
        their folder, and the known names in `TEXTURES`.
    foreground : path or "estimate", optional
        Where the product is: a folder that mirrors `root` with masks, or a guess.
    crop : int, optional
        Keep only the middle of each resized image, so many pixels a side, and of its masks. A
        label stays what its folder says, even if the defect is cut away.
    cache : bool
        Keep decoded images in memory, 4 HW bytes each: decoding would cost more than learning.

    Attributes
    ----------
    categories : list of str
        Where `category_index` points. A longer list may be put in its place: the images of one
        task then count their categories among those of all tasks.
    samples : list of Record
        In sorted order: category, then kind, then file name.
    has_labels, has_masks : bool
        False if test images lie loose in one folder; if any defective image lacks its mask.

    Raises
    ------
    FileNotFoundError
        If the root, a folder of the layout or a foreground mask is missing.
    ValueError
        If a category is unknown or empty. On access: a damaged file, a mask of another size.

    Notes
    -----
    `dataset[i]` is a dict: image (3, H, W) float32 in [0, 1], mask (1, H, W) in {0, 1}, label,
    category, category_index, texture, kind, path, and foreground (1, H, W) if it was asked for.
    Grey images get three equal channels; 16-bit images are scaled to 8; alpha is composited over
    white. A mask, `000_mask.png` or `000.png`, is defect where it exceeds half of full scale;
    zeros stand for one that is missing.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        image_size: int | tuple[int, int] | None = 64,
        categories: Sequence[str] | None = None,
        textures: Sequence[str] | None = None,
        foreground: str | Path | None = None,
        crop: int | None = None,
        cache: bool = True,
    ):
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", got {split!r}')
        folders = _category_folders(Path(root))
        chosen, samples = _select(folders, categories, root), []
        for category in chosen:
            folder = folders[category]
            if split == "train":
                records = _read_good(folder / "train/good", category)
            else:
                records = _read_test(folder / "test", category, folder / "ground_truth")
            if foreground not in (None, "estimate"):
                records = _add_foreground(records, folder, Path(foreground) / category)
            samples += records
        if textures is None:
            textures = [c for c in chosen if c in TEXTURES or (folders[c] / "texture").exists()]
        self._fill(root, split, samples, chosen, textures, image_size, foreground, crop, cache)

    @classmethod
    def from_folders(
        cls,
        good: str | Path | None = None,
        test: str | Path | None = None,
        image_size: int | tuple[int, int] | None = 64,
        category: str = "images",
        texture: bool | None = None,
        foreground: str | None = None,
        crop: int | None = None,
        cache: bool = True,
    ) -> AnomalyFolder:
        """Read one plain folder of images, without a layout and without masks.

        Parameters
        ----------
        good, test : path
            One of the two. Good images give a training set. Images to judge give a test set: its
            sub-folders name the kinds; without them `has_labels` is False.
        category : str
            Its name, the same for both sets.
        texture : bool, optional
            Whether the product is a surface that fills the image. A training set that is not told
            warns, and takes it for an object.

        The rest, and what is raised, as for `AnomalyFolder`.
        """
        if (good is None) == (test is None):
            raise ValueError("from_folders makes one set: give either good=... or test=...")
        if texture is None and good is not None and category not in TEXTURES:
            warnings.warn(
                f"{category!r} is taken for an object on a background; say texture=True for a "
                "surface that fills the image, or texture=False",
                stacklevel=2,
            )
        read, split, root = (
            (_read_good, "train", good) if test is None else (_read_test, "test", test)
        )
        surface = category in TEXTURES if texture is None else texture
        self = cls.__new__(cls)  # no layout to look for, so not through __init__
        textures, records = [category] * surface, read(Path(root), category)
        self._fill(root, split, records, [category], textures, image_size, foreground, crop, cache)
        return self

    def _fill(
        self, root, split, samples, categories, textures, image_size, foreground, crop, cache
    ) -> None:
        if unknown := set(textures) - set(categories):
            raise ValueError(f"textures {sorted(unknown)} are not among {', '.join(categories)}")
        self.root, self.split, self.samples = Path(root), split, samples
        self.categories, self.textures = list(categories), frozenset(textures)
        self.image_size, self.foreground, self.crop = image_size, foreground, crop
        self._size = size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"image_size must be positive, a pair or None, got {image_size!r}")
        if crop is not None and (size is None or crop > min(size)):
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
            "texture": record.category in self.textures,
            "kind": record.kind,
            "path": str(record.path),
        }

    def _decode(self, record: Record) -> dict[str, Tensor]:
        """The sample's pictures as bytes: image in 0..255, masks in {0, 1}."""
        image = read_image(record.path)
        size = self._size or image.size[::-1]
        small = np.array(image.resize(size[::-1], Image.Resampling.BILINEAR))
        parts = {"image": torch.from_numpy(small).permute(2, 0, 1).contiguous()}
        for name, path in (("mask", record.mask_path), ("foreground", record.foreground_path)):
            if path is not None:
                mask = _read_mask_of(record, path, image.size)
                parts[name] = torch.from_numpy(resize_mask(mask, size))[None]
        parts.setdefault("mask", torch.zeros(1, *size, dtype=torch.uint8))
        if self.foreground == "estimate":
            whole = record.category in self.textures
            guess = np.ones(size, np.uint8) if whole else estimate_foreground(small)
            parts["foreground"] = torch.from_numpy(guess)[None]
        if self.crop is not None:
            rows, columns = (slice((n - self.crop) // 2, (n + self.crop) // 2) for n in size)
            parts = {name: part[:, rows, columns].contiguous() for name, part in parts.items()}
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
    return [replace(r, foreground_path=masks[k]) for r, k in zip(samples, keys, strict=True)]
