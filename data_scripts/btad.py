"""BTAD: download, check and lay out its three categories 01, 02 and 03.

    python data_scripts/btad.py --out data/btad [--archive FILE] [--url URL] [--yes]

The archive calls good images `ok`; its images and masks are bmp and png mixed. Every other folder
under `test` counts as a kind of defect, with its masks in the folder of that name under
`ground_truth`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from download import DataError, Source, command_line
from mvtec_ad import (
    check_counts,
    contents,
    count_images,
    find_folders,
    images,
    provide,
    subfolders,
    write_mask,
)

SOURCE = Source(
    name="BTAD",
    folder="btad",
    licences=(
        "CC BY-SA according to its authors",
        "CC BY-NC-SA 4.0 according to other sources: they disagree",
    ),
    url="https://avires.dimi.uniud.it/papers/btad/btad.zip",
    sha256="461c9387e515bfed41ecaae07c50cf6b10def647b36c9e31d239ab2736b10d2a",
)
CATEGORIES = ("01", "02", "03")
# Images of the three categories. Whether test images are among them, and which category is which,
# is not stated beyond doubt, so that `check` takes the numbers in any order, with or without them.
NUMBERS = (399, 400, 1000)


def lay_out(tree: Path, target: Path, place: Callable) -> None:
    """Call `ok` good, and write the masks as png files of 0 and 255."""
    for name, folder in find_folders(tree, CATEGORIES).items():
        parts = find_folders(folder, ["train", "test", "ground_truth"], depth=0)
        good = find_folders(parts["train"], ["ok"], depth=0)["ok"]
        for path in images(good):
            place(path, target / name / "train/good" / path.name)
        kinds = subfolders(parts["test"])
        if len(kinds) < 2:
            raise DataError(
                f"expected ok and a folder of defects in {parts['test']}, "
                f"which holds {contents(parts['test'])}"
            )
        for kind in kinds:
            lay_out_kind(kind, parts["ground_truth"] / kind.name, target / name, place)


def lay_out_kind(folder: Path, masks: Path, target: Path, place: Callable) -> None:
    """Put the test images of a folder and their masks at their places."""
    kind = "good" if folder.name.casefold() in ("ok", "good") else folder.name
    mask_of = {path.stem.removesuffix("_mask"): path for path in images(masks)}
    for path in images(folder):
        place(path, target / "test" / kind / path.name)
        if kind != "good" and path.stem in mask_of:
            truth = target / "ground_truth" / kind / f"{path.stem}_mask.png"
            write_mask(mask_of[path.stem], path, truth)


def check(root: Path, numbers: tuple[int, ...]) -> None:
    """Raise DataError unless the categories are there with the stated numbers of images."""
    check_counts(root, {name: {} for name in CATEGORIES})
    found = [count_images(root / name) for name in CATEGORIES]
    train = [number["train"] for number in found]
    every = [number["train"] + number["test"] for number in found]
    if sorted(numbers) not in (sorted(train), sorted(every)):
        raise DataError(
            f"wrong number of images: {', '.join(CATEGORIES)} have {train} for training and "
            f"{every} with those for testing; one of these should be {list(numbers)} in some order"
        )


def main(
    arguments: list[str] | None = None,
    source: Source = SOURCE,
    counts: tuple[int, ...] = NUMBERS,
) -> None:
    """Run the command line."""
    options = command_line(source, __doc__).parse_args(arguments)
    provide(source, lay_out, partial(check, numbers=counts), options)


if __name__ == "__main__":
    main()
