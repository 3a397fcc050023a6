"""Lay out the magnetic-tile surface defects as an MVTec-style category, `magnetic_tile`.

    python data_scripts/mtd.py SOURCE TARGET [--test-good 0.3] [--seed 0]
    python data_scripts/mtd.py --out data/mtd [--archive FILE] [--url URL] [--yes]

SOURCE holds the original folders, `MT_<kind>/Imgs/*.jpg` with a `.png` mask beside each. Without
it, they come from the authors' address or from an archive, and their number is checked.

The data set has no official split, and a random one would leak. `exp3_num_258558` reads: lighting
3 of 6, running number 258558. The number is no name of a tile; but the photographs of one tile
under several lightings were numbered one soon after the other. In a sample of 230 photographs
every number occurs once; comparing the surface texture of all pairs, those that show one tile lie
at most 192 numbers apart. So a gap above `GAP` begins a new group, and a group is never divided
between training and testing.

A group with a defective photograph is for testing, its good ones included: `exp5_num_117030`,
filed as good, shows the broken tile of `exp4_num_116999`. The authors' labels stay as they are.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from download import DataError, Source, command_line
from mvtec_ad import check_counts, check_size, find_folders, mark_defect, provide
from PIL import Image

SOURCE = Source(
    name="Magnetic-tile surface defects",
    folder="mtd",
    licences=("none is stated; the authors ask for a citation",),
    url="https://github.com/abin24/Magnetic-tile-defect-datasets./archive/cc4eb53.tar.gz",
    size=53_000_000,
    exact=False,
)
COUNTS = {"free": 952, "blowhole": 115, "break": 85, "crack": 57, "fray": 32, "uneven": 103}
CATEGORY = "magnetic_tile"
KINDS = ("blowhole", "break", "crack", "fray", "uneven")
GAP = 200  # running numbers further apart than this show different tiles

EXPECTED_TREE = """\
SOURCE/
  MT_Free/Imgs/exp1_num_116949.jpg ...      good tiles
  MT_Blowhole/Imgs/exp1_num_4944.jpg ...    defective tiles, each with its mask
  MT_Blowhole/Imgs/exp1_num_4944.png ...
  MT_Break/  MT_Crack/  MT_Fray/  MT_Uneven/"""

NOTICE = """\
Magnetic-tile surface defects: the authors state no licence and ask for this citation:
  Y. Huang, C. Qiu, Y. Guo, X. Wang, K. Yuan. Surface Defect Saliency of Magnetic Tile.
  IEEE CASE 2018, doi:10.1109/COASE.2018.8560423; The Visual Computer 36 (2020), 85-96."""


def tile_groups(names: list[str], gap: int = GAP) -> dict[str, int]:
    """Number the groups of photographs that may show one tile.

    Parameters
    ----------
    names : list of str
        File names without suffix, such as "exp3_num_258558".
    gap : int
        The largest distance between neighbouring numbers of one group.

    Returns
    -------
    dict from name to group number.

    Raises
    ------
    ValueError
        If a name carries no number.
    """
    numbers = {}
    for name in names:
        match = re.fullmatch(r"exp\d+_num_(\d+)", name)
        if match is None:
            raise ValueError(f"{name!r} is not named like exp3_num_258558: its tile is unknown")
        numbers[name] = int(match[1])
    groups, group, previous = {}, 0, None
    for name in sorted(numbers, key=numbers.get):
        if previous is not None and numbers[name] - previous > gap:
            group += 1
        groups[name], previous = group, numbers[name]
    return groups


def split_good(good: list[str], defective: list[str], share: float, seed: int) -> set[str]:
    """Choose the good photographs for testing, whole groups at a time.

    First come the groups that hold a defect, then random ones until `share` is reached.
    """
    groups = tile_groups(good + defective)
    bound = {groups[name] for name in defective}
    free = sorted({groups[name] for name in good} - bound)
    random.Random(seed).shuffle(free)
    test = {name for name in good if groups[name] in bound}
    while free and len(test) < share * len(good):
        group = free.pop()
        test |= {name for name in good if groups[name] == group}
    if len(test) == len(good):
        raise ValueError(f"no good image is left to train on with --test-good {share}")
    return test


def find_images(source: Path) -> dict[str, list[Path]]:
    """The photographs of every kind, "free" among them, sorted.

    Raises
    ------
    FileNotFoundError
        If a folder is missing or holds no photograph.
    """
    images = {}
    for kind in ("free", *KINDS):
        folder = source / f"MT_{kind.capitalize()}" / "Imgs"
        images[kind] = sorted(folder.glob("*.jpg"))
        if not images[kind]:
            there = ", ".join(sorted(p.name for p in source.glob("*"))) or "nothing"
            raise FileNotFoundError(
                f"no images in {folder}\n{source} holds: {there}\nexpected:\n{EXPECTED_TREE}"
            )
    return images


def write_defective(path: Path, kind: str, target: Path) -> bool:
    """Copy a photograph and write its mask strictly 0 or 255; False if the mask marks nothing.

    Raises
    ------
    FileNotFoundError, ValueError
        If the mask is missing, or one of them is damaged or of another size.
    """
    mask_path = path.with_suffix(".png")
    if not mask_path.is_file():
        raise FileNotFoundError(f"the image {path} has no mask {mask_path.name} beside it")
    mask = mark_defect(mask_path)
    check_size(path, mask_path, mask)
    if not mask.any():
        return False
    copy(path, target / "test" / kind)
    truth = target / "ground_truth" / kind
    truth.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask * 255).save(truth / f"{path.stem}_mask.png")
    return True


def copy(path: Path, folder: Path) -> None:
    """Copy a file into a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / path.name)


def convert(source: Path, target: Path, test_good: float = 0.3, seed: int = 0) -> Path:
    """Write `target/magnetic_tile` in the MVTec layout; a finished one is left as it is.

    Parameters
    ----------
    source : Path
        Folder with the original layout.
    target : Path
        Folder of data sets; made if need be.
    test_good : float
        Share of the good photographs to test on, in (0, 1); reached by whole groups.
    seed : int
        Of the split.

    Returns
    -------
    Path of the category.

    Raises
    ------
    FileNotFoundError
        If a folder or a mask is missing.
    ValueError
        If `test_good` is out of range or leaves nothing to train on, or a mask does not fit.
    """
    if not 0 < test_good < 1:
        raise ValueError(f"--test-good must lie between 0 and 1, got {test_good}")
    done, unfinished = Path(target) / CATEGORY, Path(target) / f".{CATEGORY}.partial"
    if done.is_dir():
        print(f"{done} is there already; delete it to make it anew")
        return done
    numbers = write_category(find_images(Path(source)), unfinished, test_good, seed)
    unfinished.rename(done)
    print("{}: {} train, {} good and {} defective".format(done, *numbers))
    return done


def write_category(
    images: dict[str, list[Path]], folder: Path, test_good: float, seed: int
) -> tuple[int, int, int]:
    """Write the category's files; how many are for training, good and defective for testing."""
    images = dict(images)
    good, defective = images.pop("free"), [path for paths in images.values() for path in paths]
    test = split_good([p.stem for p in good], [p.stem for p in defective], test_good, seed)
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    for path in good:
        copy(path, folder / ("test/good" if path.stem in test else "train/good"))
    written = {p for kind in images for p in images[kind] if write_defective(p, kind, folder)}
    for path in sorted(set(defective) - written):
        print(f"left out {path}: filed as defective, but its mask marks nothing")
    return len(good) - len(test), len(test), len(written)


def lay_out(tree: Path, target: Path, place: Callable, counts: dict, split: dict) -> None:
    """Write the category from an archive that holds the stated number of photographs."""
    folders = find_folders(tree, [f"MT_{kind.capitalize()}" for kind in counts])
    images = find_images(next(iter(folders.values())).parent)
    found = {kind: len(paths) for kind, paths in images.items()}
    if found != counts:
        raise DataError(f"wrong number of images: found {found}, expected {counts}")
    numbers = write_category(images, target / CATEGORY, **split)
    print("{}: {} train, {} good and {} defective".format(CATEGORY, *numbers))


def main(
    arguments: list[str] | None = None, source: Source = SOURCE, counts: dict[str, int] = COUNTS
) -> None:
    """Run the command line."""
    parser = command_line(source, __doc__)
    parser.add_argument("source", type=Path, nargs="?", help="folder that holds MT_Free, ...")
    parser.add_argument("target", type=Path, nargs="?", help="folder for magnetic_tile")
    parser.add_argument("--test-good", type=float, default=0.3, help="share of good test images")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split")
    options = parser.parse_args(arguments)
    split = {"test_good": options.test_good, "seed": options.seed}
    if options.source is None:
        if not 0 < options.test_good < 1:  # before the download, not after it
            parser.error(f"--test-good must lie between 0 and 1, got {options.test_good}")
        check = partial(check_counts, counts={CATEGORY: {}})
        provide(source, partial(lay_out, counts=counts, split=split), check, options)
    elif options.target is None:
        parser.error("SOURCE needs a TARGET, the folder to write magnetic_tile into")
    else:
        try:
            convert(options.source, options.target, **split)
        except (FileNotFoundError, ValueError) as error:
            raise SystemExit(f"error: {error}") from error
    print(NOTICE)


if __name__ == "__main__":
    main()
