"""The cards of the landing page."""

import json
from pathlib import Path

from cards import SEEN, buttons, cards

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
REPOSITORY = {"url": "https://github.com/someone/something", "branch": "dev"}
COLAB = "https://colab.research.google.com/github/someone/something/blob/dev/notebooks"


def test_a_card_says_what_its_notebook_asks_and_how_long_it_ran(tmp_path):
    first = {"cell_type": "markdown", "source": "# Things: more\n\n*How many\nare there?*\n"}
    notebook = tmp_path / "05_things.ipynb"
    notebook.write_text(json.dumps({"cells": [first]}))
    card = cards([notebook], {"05_things": {"seconds": 75.0}}, REPOSITORY)
    assert "5 · Things: more" in card and "How many are there?" in card
    assert ":link: ../notebooks/05_things" in card
    assert f"1 min 15 s · [Colab]({COLAB}/05_things.ipynb)" in card
    assert "not run · " in cards([notebook], {}, REPOSITORY)


def test_every_chapter_has_a_card_with_a_picture_and_words_for_it():
    page = cards(NOTEBOOKS, {}, REPOSITORY)
    assert page.count("{grid-item-card}") == len(NOTEBOOKS) == len(SEEN)
    names = [line.split()[1] for line in page.splitlines() if line.startswith(":img-top:")]
    weights = [(ROOT / "book" / name).stat().st_size for name in names]
    assert sum(weights) < 150_000


def test_the_buttons_lead_to_the_first_chapter():
    page = buttons(NOTEBOOKS, REPOSITORY)
    assert f"../notebooks/{NOTEBOOKS[0].stem}\n" in page
    assert f"{COLAB}/{NOTEBOOKS[0].name}\n" in page


def test_the_moving_figure_is_light():
    assert (ROOT / "book/images/correction.html").stat().st_size < 150_000
