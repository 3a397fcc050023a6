"""The landing page's buttons, and a card for each chapter: what it asks, how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from generated import headline, minutes

SEEN = {  # what the picture of each chapter shows, for those who do not see it
    1: "A good gear, a gear without one of its teeth, and a mask of where it is missing",
    2: "A circuit board under much noise, under little noise, and without any",
    3: "A gear without some teeth, the same under noise, and what a model makes of the noise",
    4: "A capsule as rebuilt from little noise, from much noise, and from both",
    5: "A circuit board without its chip, halfway through its correction, and at the end",
    6: "An arrow, its part along a line, and the rest of it",
    7: "A narrow matrix beside a wide one becomes a narrow one beside a part that is cut",
    8: "A circuit board without its chip, the board rebuilt with one, and a map of the difference",
    9: "A circuit board, a map that glows where a chip is missing, and the map cut at a threshold",
    10: "The maps of three methods for the same circuit board",
}


def colab(notebook: Path, repository: dict) -> str:
    """The address that opens a notebook in Colab."""
    where = repository["url"].replace(
        "https://github.com", "https://colab.research.google.com/github"
    )
    return f"{where}/blob/{repository['branch']}/notebooks/{notebook.name}"


def buttons(notebooks: Sequence[Path], repository: dict) -> str:
    """Two ways into the first chapter: read it here, or run it in Colab."""
    return (
        ":::{div} buttons\n"
        f"```{{button-ref}} ../notebooks/{notebooks[0].stem}\n"
        ":ref-type: doc\n:color: primary\n\nRead chapter 1\n```\n\n"
        f"```{{button-link}} {colab(notebooks[0], repository)}\n"
        ":color: primary\n:outline:\n\nOpen in Colab\n```\n:::\n"
    )


def cards(notebooks: Sequence[Path], record: dict, repository: dict) -> str:
    """A grid with a card for each notebook: picture, number, title, question, run time, Colab."""
    parts = []
    for notebook in notebooks:
        number, (title, question) = int(notebook.name[:2]), headline(notebook)
        name, ran = f"card_{number:02}", record.get(notebook.stem)
        kind = "svg" if (Path(__file__).parent / "images" / f"{name}.svg").exists() else "webp"
        time = minutes(ran["seconds"]) if ran else "not run"
        foot = f"{time} · [Colab]({colab(notebook, repository)}){{.colab}}"
        parts.append(
            f":::{{grid-item-card}} {number} · {title}\n"
            f":link: ../notebooks/{notebook.stem}\n:link-type: doc\n"
            f":img-top: images/{name}.{kind}\n:img-alt: {SEEN[number]}\n\n"
            f"{question}\n\n```{{div}} foot\n{foot}\n```\n:::\n"
        )
    return "::::{grid} 1 2 2 2\n:gutter: 3\n:class-container: chapters\n\n" + "\n".join(
        [*parts, "::::\n"]
    )
