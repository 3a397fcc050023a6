"""VisA: download, check and lay out its 12 categories by the authors' 1-class split.

    python data_scripts/visa.py --out data/visa [--archive FILE] [--url URL] [--yes]

The archive has its own layout, `<category>/Data/{Images,Masks}`, and the split is a table,
`split_csv/1cls.csv`. The masks hold class numbers: whatever is above 0 becomes 255.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path

from download import DataError, Source, command_line, safe_path
from mvtec_ad import check_counts, find_folders, provide, write_mask
from tqdm import tqdm

SOURCE = Source(
    name="VisA",
    folder="visa",
    licences=(
        "CC BY 4.0 according to its authors",
        "CC BY-NC-SA 4.0 according to other sources: they disagree",
    ),
    url="https://amazon-visual-anomaly.s3.us-west-2.amazonaws.com/VisA_20220922.tar",
    sha256="2eb8690c803ab37de0324772964100169ec8ba1fa3f7e94291c9ca673f40f362",
    size=1_929_840_640,
)

# Training and good test images of each category; each has 100 defective ones as well.
NUMBERS = {
    "candle": (900, 100), "capsules": (542, 60), "cashew": (450, 50), "chewinggum": (453, 50),
    "fryum": (450, 50), "macaroni1": (900, 100), "macaroni2": (900, 100), "pcb1": (904, 100),
    "pcb2": (901, 100), "pcb3": (905, 101), "pcb4": (904, 101), "pipe_fryum": (450, 50),
}  # fmt: skip
COUNTS = {
    name: {"train": train, "good": good, "defective": 100, "without mask": 0}
    for name, (train, good) in NUMBERS.items()
}

COLUMNS = ("object", "split", "label", "image", "mask")


def read_split(path: Path) -> list[dict[str, str]]:
    """The rows of the table, one an image.

    Raises
    ------
    DataError
        If the table is missing, is no text, or lacks one of the five columns.
    """
    if not path.is_file():
        raise DataError(f"there is no {path}, which holds the split")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            rows, columns = list(table), table.fieldnames or []
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    missing = [column for column in COLUMNS if column not in columns]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; its columns are {', '.join(columns)}")
    return [{column: (row[column] or "").strip() for column in COLUMNS} for row in rows]


def find_file(root: Path, name: str, table: Path) -> Path:
    """A file that the table names, relative to `root`; DataError if there is none."""
    path = root / safe_path(name)
    if not path.is_file():
        raise DataError(f"{table.name} names {name!r}, but there is no {path}")
    return path


def lay_out(tree: Path, target: Path, place: Callable, categories: list[str]) -> None:
    """Sort the images by the table; masks become 0 and 255."""
    root = find_folders(tree, ["split_csv", *categories])["split_csv"].parent
    table = root / "split_csv" / "1cls.csv"
    for row in tqdm(read_split(table), "lay out", unit=" images", disable=None):
        image = find_file(root, row["image"], table)
        category = target / safe_path(row["object"])
        good = row["label"].casefold() in ("normal", "good")
        if row["split"] not in ("train", "test") or (row["split"] == "train" and not good):
            raise DataError(
                f"{table.name} puts {row['image']!r}, {row['label']}, in {row['split']!r}"
            )
        kind = "good" if good else "anomaly"
        place(image, category / row["split"] / kind / image.name)
        if not good:
            mask = find_file(root, row["mask"], table)
            truth = category / "ground_truth" / kind / f"{image.stem}_mask.png"
            write_mask(mask, image, truth, class_numbers=True)


def main(
    arguments: list[str] | None = None,
    source: Source = SOURCE,
    counts: dict[str, dict[str, int]] = COUNTS,
) -> None:
    """Run the command line."""
    options = command_line(source, __doc__).parse_args(arguments)
    check = partial(check_counts, counts=counts)
    provide(source, partial(lay_out, categories=list(counts)), check, options)


if __name__ == "__main__":
    main()
