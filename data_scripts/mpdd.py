"""MPDD: lay out the six categories of an archive or folder that was fetched by hand.

python data_scripts/mpdd.py --archive FILE_OR_FOLDER --out data/mpdd
"""

from __future__ import annotations

from functools import partial

from download import Source, command_line
from mvtec_ad import check_counts, lay_out, provide

SOURCE = Source(
    name="MPDD",
    folder="mpdd",
    licences=("CC BY-NC-SA 4.0",),
    by_hand=(
        "Its authors give it out behind a web form, so fetch it by hand: the folder with "
        "bracket_black, bracket_brown, bracket_white, connector, metal_plate and tubes. Put the "
        "archive, or the folder, anywhere outside --out and name it: --archive MPDD.zip"
    ),
)
CATEGORIES = (
    "bracket_black", "bracket_brown", "bracket_white", "connector", "metal_plate", "tubes",
)  # fmt: skip
COUNTS = {name: {} for name in CATEGORIES}  # the numbers of images are not stated


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
