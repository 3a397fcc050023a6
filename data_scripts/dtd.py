"""DTD, the describable textures: download, check and lay out, as a source of foreign textures.

    python data_scripts/dtd.py --out data/dtd [--archive FILE] [--url URL] [--yes]

It has no good and defective images; `data/dtd/images` is a folder of textures for `--textures`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from download import DataError, Source, command_line
from mvtec_ad import contents, find_folders, images, provide, subfolders

SOURCE = Source(
    name="DTD (Describable Textures Dataset)",
    folder="dtd",
    licences=("for research use; no licence is stated",),
    url="https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
    sha256="e42855a52a4950a3b59612834602aa253914755c95b0cff9ead6d07395f8e205",
)
CATEGORIES = 47


def textures(folder: Path) -> list[Path]:
    """The jpg files of a category."""
    return [path for path in images(folder) if path.suffix.lower() in (".jpg", ".jpeg")]


def lay_out(tree: Path, target: Path, place: Callable) -> None:
    """Take over `images/<category>/*.jpg`."""
    for folder in subfolders(find_folders(tree, ["images"])["images"]):
        for path in textures(folder):
            place(path, target / "images" / folder.name / path.name)


def check(root: Path, categories: int) -> None:
    """Raise DataError unless that many categories hold images."""
    found = [folder for folder in subfolders(root / "images") if textures(folder)]
    if len(found) != categories:
        there = contents(root / "images") if (root / "images").is_dir() else contents(root)
        raise DataError(
            f"expected images/<category>/*.jpg of {categories} categories, found {len(found)}; "
            f"there is {there}"
        )


def main(
    arguments: list[str] | None = None, source: Source = SOURCE, counts: int = CATEGORIES
) -> None:
    """Run the command line."""
    options = command_line(source, __doc__).parse_args(arguments)
    provide(source, lay_out, partial(check, categories=counts), options)


if __name__ == "__main__":
    main()
