"""What a sample is, and `AnomalyFolder`, which reads samples from the MVTec layout.

Whatever is odd about a file or a folder (bit depth, missing masks, no labels) is settled here.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # what is in a file, whatever its name says

# Surfaces without an outline that fill the image; zipper counts as one in DiffusionAD.
TEXTURES = {f"Class{i}" for i in range(1, 11)}  # DAGM 2007
TEXTURES |= set("carpet grid leather tile wood zipper brick grass gravel magnetic_tile".split())

EXPECTED_TREE = """\
<root>/<category>/             (<root> may also be one such category itself)
    train/good/000.png ...            good images to learn from
    test/good/000.png ...             good images to judge
    test/<defect>/000.png ...         defective images, one folder a kind of defect
    ground_truth/<defect>/000_mask.png ...   optional, white where the defect is
    texture                           optional, empty: the product is a surface, not an object"""


def read_image(path: str | Path, ground: str = "white") -> Image.Image:
    """Read any supported image file as 8-bit RGB, upright, over a ground where it is transparent.

    Depths above 8 bits are scaled to 8. A ValueError names the file.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            image, pages = ImageOps.exif_transpose(file), getattr(file, "n_frames", 1)
    except Exception as error:  # PIL's decoders raise half a dozen unrelated types
        raise ValueError(f"cannot read the image {path}: {error}") from error
    if pages > 1:
        raise ValueError(f"{path} holds {pages} images: save each in a file of its own")
    if image.mode == "F":
        raise ValueError(f"{path}: floating-point images have no known range; save 8 or 16 bits")
    if image.mode.startswith("I"):
        if image.getextrema()[1] > 65535:
            raise ValueError(f"{path}: integers above 65535 have no known range; save 8 or 16 bits")
        image = Image.fromarray(np.round(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        behind = Image.new("RGBA", image.size, ground)
        image = Image.alpha_composite(behind, image.convert("RGBA"))
    return image.convert("RGB")


def read_mask(path: str | Path) -> np.ndarray:
    """Read a mask file as uint8 (H, W) in {0, 1}: 1 where it exceeds half of full scale."""
    return (_read_grey(path) > 127).astype(np.uint8)


def _read_grey(path: str | Path) -> np.ndarray:
    image = read_image(path, ground="black")  # what nobody sees marks nothing
    return np.asarray(image.convert("L"))


# PIL's; but "linear" mixes the nearest four pixels, however much an image shrinks, as OpenCV does.
FILTERS = {"antialiased": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
FILTERS |= {"linear": None}


def resize_image(image: Image.Image, size: tuple[int, int], resample: str) -> np.ndarray:
    """Resize an RGB image to `size` (height, width), uint8 (H, W, 3), by one of `FILTERS`."""
    if resample != "linear":
        return np.array(image.resize(size[::-1], FILTERS[resample]))
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    return F.interpolate(planes, size, mode="bilinear")[0].round().byte().permute(1, 2, 0).numpy()


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a binary mask (H, W) to `size` (height, width) so that it stays binary.

    A pixel is 1 if at least half of its area is. A mask too thin for that anywhere keeps the
    pixels that it covers most, so that no defective image loses its mask.
    """
    coverage = Image.fromarray(mask.astype(np.float32))
    coverage = np.asarray(coverage.resize(size[::-1], Image.Resampling.BOX))
    threshold = min(0.5, float(coverage.max()))
    return ((coverage >= threshold - 1e-6) & (coverage > 0)).astype(np.uint8)


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
    """Images with their masks from a folder in the MVTec layout; see `Detector.folder`, too.

    `dataset[i]` is a dict: image (3, H, W) float32 in [0, 1], mask (1, H, W) in {0, 1}, label,
    category, category_index, texture, kind, path, and foreground (1, H, W) in [0, 1] if asked for.
    `has_labels` is False if test images lie loose in one folder, `has_masks` if any defective
    image lacks its mask, `000_mask.png` or `000.png`; zeros stand for it. `categories` may be
    replaced by a longer list. What is missing is a FileNotFoundError, what is wrong a ValueError.

    Parameters
    ----------
    root, split
        Folder of categories, or one category, laid out as in `EXPECTED_TREE`; "train" are good
        images to learn from, "test" good and defective ones to judge.
    image_size : int, (height, width) or None
        Every image is resized to it; None keeps each image's own size.
    categories, textures : sequence of str, optional
        Which categories, in the order of `category_index`; by default all, sorted. Which of them
        are surfaces; by default those with a file `texture`, and the known names in `TEXTURES`.
    foreground : path or callable, optional
        Where the product is: a folder of masks that mirrors `root`; or the name of one in each
        category that mirrors its `train` (released: DISthresh, or thresh), where grey is soft; or
        what makes a mask of an object's image, such as `anomalies.estimate_foreground`. A texture
        without masks is foreground everywhere.
    crop, resample
        Keep the middle of each image, so many pixels a side; how it is resized: `resize_image`.
    cache, plain
        Keep decoded images in memory; the category of a `root` without layout (`from_folders`).
    """

    raw = False  # whether pictures stay bytes: see `as_floats`
    resize_mask = staticmethod(resize_mask)

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        image_size: int | tuple[int, int] | None = 64,
        categories: Sequence[str] | None = None,
        textures: Sequence[str] | None = None,
        foreground: str | Path | Callable | None = None,
        crop: int | None = None,
        resample: str = "antialiased",
        cache: bool = True,
        plain: str | None = None,
    ):
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", got {split!r}')
        self.root, self.split, self.crop, self.image_size = Path(root), split, crop, image_size
        self.foreground, self.resample, self._cache = foreground, resample, {}
        self._size = size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"image_size must be positive, a pair or None, got {image_size!r}")
        if resample not in FILTERS or crop is not None and (size is None or crop > min(size)):
            found = f"crop {crop} pixels from images of size {image_size} ({resample})"
            raise ValueError(f"cannot {found}; resample is one of {', '.join(FILTERS)}")
        folders = {plain: self.root} if plain else _category_folders(self.root)
        self.categories, self.samples = _select(folders, categories, self.root), []
        if textures is None:
            marked = {name for name in self.categories if (folders[name] / "texture").is_file()}
            textures = marked | (TEXTURES & set(self.categories))
        self.textures = frozenset(textures)
        if strange := self.textures.difference(self.categories):
            raise ValueError(f"no category {sorted(strange)} among {', '.join(self.categories)}")
        masks = [] if foreground is None or callable(foreground) else [Path(foreground)]
        if masks and not any(p.is_dir() for p in masks + [f / masks[0] for f in folders.values()]):
            raise _missing(f"no folder {foreground} of foreground masks", self.root)
        for category in self.categories:
            folder = folders[category]
            if split == "train":
                records = _read_good(folder if plain else folder / "train/good", category)
            else:
                truth = None if plain else folder / "ground_truth"
                records = _read_test(folder if plain else folder / "test", category, truth)
            if not (foreground is None or callable(foreground)):
                masks, inside = Path(foreground), folder / foreground
                bare = len(masks.parts) == 1 and inside.is_dir()
                places = (folder / split, inside) if bare else (folder, masks / category)
                if places[1].is_dir() or category not in self.textures:
                    records = _add_foreground(records, *places)
            if not plain:
                _tell_unused(category, folder, split, records)
            self.samples += records
        self.has_labels = all(record.kind != "unlabelled" for record in self.samples)
        self.has_masks = self.has_labels and all(r.mask_path for r in self.samples if r.label)
        self.cache = cache and image_size is not None

    @staticmethod
    def from_folders(
        good=None, test=None, *, category: str = "images", texture: bool | None = None, **options
    ) -> AnomalyFolder:
        """Read one plain folder of images: either good ones to learn from, or ones to test.

        Sub-folders of `test` name the kinds; without them `has_labels` is False. A training set
        that is not told whether the product is a texture warns, and takes it for an object. The
        category's name must be the same in both sets; options are those of `AnomalyFolder`.
        """
        if (good is None) == (test is None):
            raise ValueError("from_folders makes one set: give either good=... or test=...")
        if texture is not None:
            options["textures"] = [category] * texture
        elif good is not None and category not in TEXTURES:
            words = "say texture=True for a surface that fills the image, or texture=False"
            warnings.warn(f"{category!r} is taken for an object: {words}", stacklevel=2)
        root, split = (good, "train") if test is None else (test, "test")
        return AnomalyFolder(root, split, plain=category, **options)

    def __len__(self) -> int:
        return len(self.samples)

    def fingerprint(self) -> dict[str, str]:
        """What tells other images, and other foregrounds, from these: their files and sizes."""
        found = {"images": "path", "masks": "mask_path", "foreground": "foreground_path"}
        made = getattr(self.foreground, "__qualname__", "")  # what makes foregrounds, if anything
        read = {"textures": sorted(self.textures), "read": [self.crop, self.resample, made]}
        for name, place in found.items():
            files = [path for r in self.samples if (path := getattr(r, place))]
            text = repr([(path.parts[-4:], path.stat().st_size) for path in files])
            found[name] = f"{len(files)} files, {hashlib.sha256(text.encode()).hexdigest()}"
        return found | read

    def __getitem__(self, i: int) -> dict:
        record = self.samples[i]
        parts = self._cache.get(record.path) or self._decode(record)
        if self.cache:
            self._cache[record.path] = parts
        index = self.categories.index(record.category)
        names = {"category": record.category, "kind": record.kind, "path": str(record.path)}
        sample = {**parts, **names, "label": record.label, "category_index": index}
        sample["texture"] = record.category in self.textures
        return sample if self.raw else as_floats(sample)

    def _decode(self, record: Record) -> dict[str, Tensor]:
        """The sample's pictures as bytes: image and foreground in 0..255, mask in {0, 1}."""
        image = read_image(record.path)
        size = self._size or image.size[::-1]
        small = resize_image(image, size, self.resample)
        parts = {"image": small, "mask": np.zeros(size, np.uint8)}
        if record.mask_path is not None:
            mask = _read_mask_of(record, record.mask_path, image.size)
            parts["mask"] = self.resize_mask((mask > 127).astype(np.uint8), size)
        if record.foreground_path is not None:  # it may be soft
            soft = Image.fromarray(_read_mask_of(record, record.foreground_path, image.size))
            parts["foreground"] = np.array(soft.resize(size[::-1], Image.Resampling.BILINEAR))
        elif self.foreground is not None and record.category in self.textures:
            parts["foreground"] = np.full(size, 255, np.uint8)
        elif callable(self.foreground):
            parts["foreground"] = 255 * self.foreground(small)
        if self.crop is not None:
            rows, columns = (slice((n - self.crop) // 2, (n + self.crop) // 2) for n in size)
            parts = {name: part[rows, columns] for name, part in parts.items()}
        tensors = {name: torch.from_numpy(np.atleast_3d(part)) for name, part in parts.items()}
        return {name: part.permute(2, 0, 1).contiguous() for name, part in tensors.items()}


def _to_learn_from(batch) -> dict:
    """A batch, unless it is none, or something in it is known to be defective."""
    if not isinstance(batch, dict):
        raise ValueError(f"samples are dicts, as those of `AnomalyFolder`, not {type(batch)}")
    if torch.as_tensor(batch.get("label", 0)).any():
        raise ValueError("there are defective images to learn from: is this the test split?")
    return batch


def as_floats(sample: dict) -> dict:
    """Pictures of a sample or batch from bytes to float32, from 0 to 1; a mask is 0 or 1."""
    bytes_ = {k: v for k, v in sample.items() if isinstance(v, Tensor) and v.dtype == torch.uint8}
    return sample | {k: v.float() / (1 if k == "mask" else 255) for k, v in bytes_.items()}


def loading(device: torch.device, workers: int | None = None) -> dict:
    """How a DataLoader loads for a device: by 4 processes for a GPU, by none for a CPU."""
    gpu = device.type == "cuda"
    workers = min(4, os.cpu_count() or 1) * gpu if workers is None else workers
    return {"num_workers": workers, "pin_memory": gpu}


class Feed:
    """Batches of a data set on a device, so that no GPU waits for them.

    One whose samples can be `raw`, and that fits into a quarter of the device's free memory, lies
    there as a whole. The samples of others come from `workers` processes: see `loading`.
    """

    def __init__(self, dataset: Dataset, device: torch.device, workers=None, progress=False):
        self.dataset, self.device, self.held = copy(dataset), device, None
        self.settings = loading(device, workers)
        if hasattr(dataset, "raw"):
            self.dataset.raw, gpu = True, device.type == "cuda"
            size = sum(v.nbytes for v in self.dataset[0].values() if isinstance(v, Tensor))
            free = torch.cuda.mem_get_info(device)[0] if gpu else psutil.virtual_memory().available
            if workers is None and 4 * size * len(dataset) <= free:
                self.held = self._hold(progress)

    def _hold(self, progress: bool) -> dict:
        count = len(self.dataset)
        with ThreadPoolExecutor() as pool:  # while one decodes, others may
            samples = pool.map(self.dataset.__getitem__, range(count))
            samples = list(tqdm(samples, "read", count, leave=False, disable=not progress))
        held = _to_learn_from(default_collate(samples))
        return send_to_device(held, self.device, non_blocking=True)

    def batches(self, numbers: np.ndarray) -> Iterator[dict]:
        """The samples of such numbers (count, B), batch by batch."""
        if self.held is None:
            for batch in DataLoader(self.dataset, batch_sampler=numbers.tolist(), **self.settings):
                batch = send_to_device(_to_learn_from(batch), self.device, non_blocking=True)
                yield as_floats(batch)
            return
        places = torch.from_numpy(numbers).to(self.device)
        for names, place in zip(numbers.tolist(), places, strict=True):
            chosen = {k: v[place] for k, v in self.held.items() if isinstance(v, Tensor)}
            others = {k: [v[n] for n in names] for k, v in self.held.items() if k not in chosen}
            yield as_floats(others | chosen)


def _read_mask_of(record: Record, path: Path, image_size: tuple[int, int]) -> np.ndarray:
    mask = _read_grey(path)
    if mask.shape[::-1] != image_size:
        raise ValueError(f"{path} is {mask.shape[::-1]}, but its image {record.path} {image_size}")
    if mask.max() <= 127:
        warnings.warn(f"{path} marks no pixel, its image is {record.kind!r}", stacklevel=2)
    return mask


def _missing(what: str, folder: Path) -> FileNotFoundError:
    near = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    return FileNotFoundError(f"{what}\n{near} holds: {_contents(near)}\nexpected:\n{EXPECTED_TREE}")


def _contents(folder: Path) -> str:
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return (", ".join(names[:12]) or "nothing") + more


def _entries(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise _missing(f"no folder {folder}", folder)
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))


def is_heat_map(path: Path) -> bool:
    """Whether a prediction gave the file its name: part.png_map.png."""
    image = path.name.removesuffix("_map.png")
    return image != path.name and Path(image).suffix.lower() in SUFFIXES


def _images(folder: Path) -> list[Path]:
    files = (p for p in _entries(folder) if p.suffix.lower() in SUFFIXES and p.is_file())
    return [path for path in files if not is_heat_map(path)]


def files_under(folder: Path) -> list[Path]:
    """All that is visible in a folder, at any depth, through links, but no folders; sorted."""
    found, seen = [], {os.path.realpath(folder)}
    for base, folders, names in os.walk(folder, followlinks=True):
        real = {name: os.path.realpath(Path(base, name)) for name in folders if name[0] != "."}
        folders[:] = [name for name in sorted(real) if real[name] not in seen]
        seen.update(real.values())
        found += [Path(base, name) for name in names if name[0] != "."]
    return sorted(found)


def images_under(folder: Path, suffixes=SUFFIXES) -> list[Path]:
    """The visible images in a folder, at any depth, sorted."""
    return [p for p in files_under(folder) if p.suffix.lower() in suffixes and p.is_file()]


def _tell_unused(category: str, folder: Path, split: str, records: list[Record]) -> None:
    """Warn of files where images and masks lie, if they are neither."""
    used = {path for record in records for path in (record.path, record.mask_path)}
    places = [folder / split] + [folder / "ground_truth"] * (split == "test")
    if left := [p for place in places for p in files_under(place) if p not in used]:
        names = ", ".join(str(p.relative_to(folder)) for p in left[:3]) + ", ..." * (len(left) > 3)
        warnings.warn(f"{category}: not used are {len(left)} files: {names}", stacklevel=4)


def _category_folders(root: Path) -> dict[str, Path]:
    def has_split(folder: Path) -> bool:
        return (folder / "train").is_dir() or (folder / "test").is_dir()

    found = {folder.name: folder for folder in _entries(root) if has_split(folder)}
    if found and has_split(root):
        raise ValueError(f"{root} has train/ or test/, and also the categories {', '.join(found)}")
    if not (found or has_split(root)):
        raise _missing(f"no category (a folder with train/ or test/) in {root}", root)
    return {root.resolve().name: root} if has_split(root) else found


def _select(folders: dict[str, Path], categories, root: Path) -> list[str]:
    chosen = folders if categories is None else categories
    wanted = [chosen] if isinstance(chosen, str) else list(dict.fromkeys(chosen))
    unknown = [category for category in wanted if category not in folders]
    if unknown or not wanted:
        problem = f"unknown categories {unknown}" if unknown else "no category chosen"
        raise ValueError(f"{problem} in {root}; known: {', '.join(folders)}")
    return wanted


def _read_good(folder: Path, category: str) -> list[Record]:
    if paths := _images(folder):
        return [Record(path, None, category, "good") for path in paths]
    known, found = ", ".join(sorted(SUFFIXES)), _contents(folder)
    raise ValueError(f"category {category!r} is empty: no image ({known}) in {folder}: {found}")


def _read_test(folder: Path, category: str, truth: Path | None = None) -> list[Record]:
    if truth is None and (paths := images_under(folder)):  # a plain folder: all that it holds
        inner = [(path, path.relative_to(folder).parts[:-1]) for path in paths]
        return [Record(p, None, category, k[0] if k else "unlabelled") for p, k in inner]
    kinds, samples = [p for p in _entries(folder) if p.is_dir() and _images(p)], []
    if not kinds:  # loose images: nobody says which of them are good
        return [replace(record, kind="unlabelled") for record in _read_good(folder, category)]
    for kind in kinds:
        masks = {}
        if kind.name.casefold() == "good" != kind.name:
            raise ValueError(f"{kind}: good images lie in good, and any other name is a defect's")
        if kind.name != "good" and (truth / kind.name).is_dir():
            masks = {mask.stem: mask for mask in _images(truth / kind.name)}
        for path in _images(kind):
            mask = masks.get(f"{path.stem}_mask", masks.get(path.stem))
            samples.append(Record(path, mask, category, kind.name))
    return samples


def _add_foreground(samples: list[Record], folder: Path, foreground: Path) -> list[Record]:
    """Pair each image with the mask at the same place under the foreground folder."""
    _entries(foreground)
    masks = {p.relative_to(foreground).with_suffix(""): p for p in images_under(foreground)}
    keys = [record.path.relative_to(folder).with_suffix("") for record in samples]
    if missing := [str(foreground / key) for key in keys if key not in masks]:
        raise FileNotFoundError(f"no foreground mask {missing[0]}.* ({len(missing)} missing)")
    return [replace(r, foreground_path=masks[k]) for r, k in zip(samples, keys, strict=True)]
