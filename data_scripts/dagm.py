"""DAGM 2007: lay out Class1 to Class10 from an archive or folder that was fetched by hand.

    python data_scripts/dagm.py --archive FILE_OR_FOLDER --out data/dagm

Each class has the folders Train and Test, with images, and in each a folder Label with masks. An
image is defective if a mask that bears its name, such as `0576_label.png` or `0576.png` for
`0576.png`, marks anything. Good images of Train are for training, all of Test for testing. The
layout trains on good images alone, so defective ones of Train are left out, and their number said.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from download import DataError, Source, command_line
from mvtec_ad import (
    check_counts,
    contents,
    find_folders,
    images,
    mark_defect,
    provide,
    write_mask,
)

SOURCE = Source(
    name="DAGM 2007",
    folder="dagm",
    licences=('"publicly available"; no licence is stated',),
    by_hand=(
        "Fetch it by hand: the folders Class1 to Class10, each with Train, Test and in both of "
        "them Label. Put the archive, or the folder, anywhere outside --out and name it: "
        "--archive DAGM.zip"
    ),
)
above_zero = partial(mark_defect, class_numbers=True)
COUNTS = {f"Class{i}": {} for i in range(1, 11)}  # the numbers of images are not stated


def masks_of(folder: Path) -> dict[Path, Path]:
    """The mask of each defective image in a folder `Train` or `Test`.

    Raises
    ------
    DataError
        If there is no image, no folder Label, no mask in it, one that fits no image, or one whose
        values do not reach half of full scale: is it a mask?
    """
    label = find_folders(folder, ["Label"], depth=0)["Label"]
    stems = {path.stem.casefold(): path for path in images(folder)}
    masks = {}
    for mask in images(label):
        stem = mask.stem.casefold()
        image = stems.get(stem) or stems.get(re.sub(r"[ _-]*(label|mask)$", "", stem))
        if image is None or image in masks:
            raise DataError(f"{mask} fits no image in {folder}, or a second one does")
        masks[image] = mask
    defective = {image: mask for image, mask in masks.items() if mark_defect(mask).any()}
    faint = [p for p in masks.values() if p not in defective.values() and above_zero(p).any()]
    if faint:
        raise DataError(f"{faint[0]} has no value above half of full scale, but some above 0")
    if not defective:
        raise DataError(
            f"expected images in {folder} and a mask image for each defective one in {label}; "
            f"found {len(stems)} images, and in {label.name}: {contents(label)}"
        )
    return defective


def lay_out(tree: Path, target: Path, place: Callable, classes: list[str]) -> None:
    """Sort the images into good and defective, and write the masks as 0 and 255."""
    for name, folder in find_folders(tree, classes).items():
        parts = find_folders(folder, ["Train", "Test"], depth=1)
        masks = masks_of(parts["Train"])
        for path in images(parts["Train"]):
            if path not in masks:
                place(path, target / name / "train/good" / path.name)
        print(f"{name}: {len(masks)} defective images of Train are left out")
        masks = masks_of(parts["Test"])
        for path in images(parts["Test"]):
            kind = "defect" if path in masks else "good"
            place(path, target / name / "test" / kind / path.name)
            if path in masks:
                truth = target / name / "ground_truth/defect" / f"{path.stem}_mask.png"
                write_mask(masks[path], path, truth)


def main(
    arguments: list[str] | None = None,
    source: Source = SOURCE,
    counts: dict[str, dict[str, int]] = COUNTS,
) -> None:
    """Run the command line."""
    options = command_line(source, __doc__).parse_args(arguments)
    check = partial(check_counts, counts=counts)
    provide(source, partial(lay_out, classes=list(counts)), check, options)


if __name__ == "__main__":
    main()
