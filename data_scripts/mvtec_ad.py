"""MVTec AD: download, check and lay out its 15 categories.

    python data_scripts/mvtec_ad.py --out data/mvtec_ad [--archive FILE] [--url URL] [--yes]

The other data sets are laid out as this one is, so what writes and counts that layout stands here.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
from download import DataError, Source, command_line, obtain, require_space
from PIL import Image

SOURCE = Source(
    name="MVTec AD",
    folder="mvtec_ad",
    licences=("CC BY-NC-SA 4.0",),
    url="https://www.mydrive.ch/shares/150996/b52ecdcbf521176e9db9c731f2304b27/download/"
    "420938113-1629960298/mvtec_anomaly_detection.tar.xz",
    sha256="cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d",
    size=5_300_000_000,
    exact=False,
)

# Training and test images of each category.
NUMBERS = {
    "bottle": (209, 83), "cable": (224, 150), "capsule": (219, 132), "carpet": (280, 117),
    "grid": (264, 78), "hazelnut": (391, 110), "leather": (245, 124), "metal_nut": (220, 115),
    "pill": (267, 167), "screw": (320, 160), "tile": (230, 117), "toothbrush": (60, 42),
    "transistor": (213, 100), "wood": (247, 79), "zipper": (240, 151),
}  # fmt: skip
COUNTS = {name: {"train": train, "test": test} for name, (train, test) in NUMBERS.items()}
COUNTS["all categories"] = {"train": 3629, "good": 467, "defective": 1258, "without mask": 0}

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
# All that Pillow may take a file for: it hands PostScript, whatever its suffix, to Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # MPO, of some cameras, comes with JPEG
IGNORED = ("__MACOSX",)  # what macOS adds to archives


# --------------------------------------------------------------------------- from tree to layout


def provide(
    source: Source,
    lay_out: Callable[[Path, Path, Callable], None],
    check: Callable[[Path], None],
    options: argparse.Namespace,
) -> None:
    """Make `options.out`, whole, or end with one line on stderr and exit status 2.

    Parameters
    ----------
    source : Source
        Where the data set comes from.
    lay_out : function of (tree, target, place)
        Writes the layout; `place(path, file)` puts a file of the tree at its place.
    check : function of a folder
        Raises DataError if the layout there is not whole.
    options : Namespace
        Of `command_line`.
    """
    out = options.out.resolve()
    work = out.parent / f".{out.name}.partial"
    try:
        if not out.name:
            raise DataError(f"--out {out} is the root of a disk: name a folder in it")
        if not _is_finished(out, check):
            _make(source, lay_out, check, options, out, work)
        shutil.rmtree(work, ignore_errors=True)
    except KeyboardInterrupt:
        print(f"\nstopped; {work} keeps what is there, run again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    except (OSError, ValueError, EOFError) as error:
        with contextlib.suppress(OSError):
            work.rmdir()  # only if nothing is in it
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def _is_finished(out: Path, check: Callable[[Path], None]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        check(out)
    except (DataError, OSError) as error:
        raise DataError(f"{out} is there, but not whole ({error}): move it away first") from None
    print(f"{out} is there already: nothing to do")
    return True


def _make(source, lay_out, check, options, out: Path, work: Path) -> None:
    tree = obtain(source, options, work)
    by_hand = tree == options.archive  # the user's folder: copied, and left as it is
    unfinished = work / "laid_out"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    if by_hand:
        size = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())
        require_space(unfinished, size, "to copy the images")
    try:
        lay_out(tree, unfinished, partial(place, by_link=not by_hand))
        check(unfinished)
    except (ValueError, FileNotFoundError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        kept = (
            "" if options.archive else f"; {work} keeps what was fetched, delete it to begin anew"
        )
        raise DataError(f"{error}{kept}") from None
    if out.exists():
        out.rmdir()  # empty; Windows would not rename onto it
    os.replace(unfinished, out)
    print(f"{out} is complete")


def place(path: Path, target: Path, by_link: bool) -> None:
    """Put a file at its place: as a hard link, which costs no space, or as a copy.

    Raises DataError if the place is taken.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        raise DataError(f"{path} would become {target.name}, as another file of its folder has")
    if by_link:
        with contextlib.suppress(OSError):  # not every disk knows hard links
            os.link(path, target)
            return
    shutil.copyfile(path, target)


def find_folders(root: Path, names: Iterable[str], depth: int = 3) -> dict[str, Path]:
    """The folders of these names, whatever their case, that lie side by side under `root`.

    Parameters
    ----------
    depth : int
        How many levels below `root` their parent may lie; the highest one wins.

    Raises
    ------
    DataError
        Where they are not together; says which are missing and what is there instead.
    """
    names, level, best, nearest = list(names), [root], None, {}
    for _ in range(depth + 1):
        for parent in level:
            inside = {p.name.casefold(): p for p in subfolders(parent)}
            found = {name: inside[name.casefold()] for name in names if name.casefold() in inside}
            if len(found) == len(names):
                return found
            if best is None or len(found) > len(nearest):
                best, nearest = parent, found
        level = [child for parent in level for child in subfolders(parent)]
    missing = [name for name in names if name not in nearest]
    raise DataError(
        f"expected the folders {', '.join(names)} side by side in {root} or below; "
        f"{best} lacks {', '.join(missing)} and holds {contents(best)}"
    )


def subfolders(folder: Path) -> list[Path]:
    """The visible folders in a folder, sorted; none if it does not exist."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(p for p in found if p.is_dir() and p.name[0] != "." and p.name not in IGNORED)


def images(folder: Path) -> list[Path]:
    """The visible image files in a folder, sorted; none if it does not exist."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(p for p in found if p.suffix.lower() in SUFFIXES and p.name[0] != ".")


def contents(folder: Path) -> str:
    """What a folder holds, for a message."""
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return (", ".join(names[:12]) or "nothing") + more


# ------------------------------------------------------------------------------ masks and counts


def mark_defect(path: Path, class_numbers: bool = False) -> np.ndarray:
    """Read a mask file as uint8 (H, W), 1 where the defect is.

    Parameters
    ----------
    class_numbers : bool
        The values name kinds of defects, so that anything above 0 is one. Otherwise they are
        grey levels, and a defect exceeds half of full scale.

    Raises
    ------
    DataError
        The file is damaged.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            image = file.copy()
    except Exception as error:  # PIL's decoders raise half a dozen unrelated types
        raise DataError(f"cannot read the mask {path}: {error}") from None
    if image.mode in ("LA", "RGBA", "PA") or (image.mode == "P" and not class_numbers):
        image = image.convert("RGB")  # of a palette of class numbers, the indices count
    values = np.asarray(image)
    if class_numbers:
        return (values > 0).reshape(*values.shape[:2], -1).any(2).astype(np.uint8)
    if image.mode.startswith("I"):
        return (np.round(values / 257) > 127).astype(np.uint8)  # 16 bits
    return (np.asarray(image.convert("L")) > 127).astype(np.uint8)


def check_size(image: Path, path: Path, mask: np.ndarray) -> None:
    """Raise DataError unless an image can be read and has as many pixels as its mask (H, W)."""
    try:
        with Image.open(image, formats=FORMATS) as file:
            size = file.size
    except Exception as error:  # PIL's decoders raise half a dozen unrelated types
        raise DataError(f"cannot read the image {image}: {error}") from None
    if size != mask.shape[::-1]:
        raise DataError(f"{path} is {mask.shape[::-1]} pixels, its image {size}")


def write_mask(path: Path, image: Path, target: Path, class_numbers: bool = False) -> None:
    """Write the mask of an image strictly 0 or 255; a mask that marks nothing is reported.

    Raises DataError if one of them is damaged, their sizes differ, or the mask's place is taken.
    """
    mask = mark_defect(path, class_numbers)
    check_size(image, path, mask)
    if target.exists():
        raise DataError(f"{path} would become {target.name}, as another mask of its folder has")
    if not mask.any():
        print(f"note: {path} marks no pixel")
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask * 255).save(target)


def count_images(category: Path) -> dict[str, int]:
    """The images of a category: train, test, good, defective, and defective without mask."""
    kinds = subfolders(category / "test")
    defective = [path for kind in kinds if kind.name != "good" for path in images(kind)]
    masks = {
        (kind.name, path.stem.removesuffix("_mask"))
        for kind in subfolders(category / "ground_truth")
        for path in images(kind)
    }
    good = len(images(category / "test/good"))
    return {
        "train": len(images(category / "train/good")),
        "test": good + len(defective),
        "good": good,
        "defective": len(defective),
        "without mask": sum((p.parent.name, p.stem) not in masks for p in defective),
    }


def check_counts(root: Path, counts: dict[str, dict[str, int]]) -> None:
    """Compare a folder in the MVTec layout with the numbers that its authors state.

    Parameters
    ----------
    counts : dict from category, or "all categories", to a part of what `count_images` returns
        Of a category with an empty dict, every number of images above 0 is right.

    Raises
    ------
    DataError
        Names every number that is wrong.
    """
    found = {name: count_images(root / name) for name in counts if name != "all categories"}
    empty = [name for name, number in found.items() if not number["train"] * number["test"]]
    if empty:
        raise DataError(f"no training or no test images of {', '.join(empty)}")
    total = {
        key: sum(number[key] for number in found.values())
        for key in ("train", "test", "good", "defective", "without mask")
    }
    found["all categories"] = total
    wrong = [
        f"{name} has {found[name][key]} {key} instead of {number}"
        for name, expected in counts.items()
        for key, number in expected.items()
        if found[name][key] != number
    ]
    if wrong:
        raise DataError(f"wrong number of images: {'; '.join(wrong)}")
    if total["without mask"]:
        print(f"note: {total['without mask']} defective images have no mask")


# -------------------------------------------------------------------------------------- MVTec AD


def lay_out(tree: Path, target: Path, place: Callable, categories: Iterable[str]) -> None:
    """Take over categories that have the layout already, with the notes beside them."""
    folders = find_folders(tree, categories)
    parent = next(iter(folders.values())).parent
    for path in sorted(parent.glob("*.txt")):
        place(path, target / path.name)
    for name, folder in folders.items():
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not any(
                p.startswith(".") for p in path.relative_to(folder).parts
            ):
                place(path, target / name / path.relative_to(folder))


def main(
    arguments: list[str] | None = None,
    source: Source = SOURCE,
    counts: dict[str, dict[str, int]] = COUNTS,
) -> None:
    """Run the command line."""
    options = command_line(source, __doc__).parse_args(arguments)
    categories = [name for name in counts if name != "all categories"]
    provide(
        source,
        partial(lay_out, categories=categories),
        partial(check_counts, counts=counts),
        options,
    )


if __name__ == "__main__":
    main()
