"""The drawings of the book: they are what the code draws, and say what the book says."""

import json
import re
from pathlib import Path

import pytest

import schematics
from drawing import words

ROOT = Path(__file__).resolve().parent.parent
DRAWINGS = schematics.drawings()


def without_pictures(text: str) -> str:
    """A drawing without what was computed, whose last bits differ from machine to machine."""
    return re.sub(r'(<image [^>]*href=)"[^"]*"', r'\1""', text)


@pytest.mark.parametrize("name", DRAWINGS)
def test_committed_drawings_are_those_that_the_code_draws(name):
    committed = (ROOT / "book/images" / name).read_text()
    assert without_pictures(committed) == without_pictures(DRAWINGS[name])
    assert "picture:" not in committed
    assert len(committed) < 60_000


@pytest.mark.parametrize("name", DRAWINGS)
def test_each_formula_in_a_drawing_is_in_the_equation_index(name):
    index = (ROOT / "book/equation_index.md").read_text()
    spoken = re.sub(r"<[^>]+>", "", DRAWINGS[name])
    for number in re.findall(r"\b[DCGAO]\d+\b", spoken):
        assert rf"\tag{{{number}}}" in index, number


@pytest.mark.parametrize("name", DRAWINGS)
def test_letters_are_large_enough_on_a_phone(name):
    width = int(re.search(r'viewBox="0 0 (\d+)', DRAWINGS[name])[1])
    sizes = map(float, re.findall(r'font-size="([\d.]+)"', DRAWINGS[name]))
    assert width <= 400
    assert min(sizes, default=11) >= 11
    assert all("font-size" in text for text in re.findall(r"<text[^>]*>", DRAWINGS[name]))


def test_arrows_between_chapters_are_what_the_chapters_say_they_need():
    said = {}
    for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        cells = json.loads(path.read_text())["cells"][:2]
        words = " ".join("".join(cell["source"]) for cell in cells)
        sentence = re.search(r"Needs [^.]+\.", re.sub(r" ?[<(][^>)]+[>)]", "", words))
        numbers = re.findall(r"\d+", sentence[0]) if sentence else ()
        said[int(path.name[:2])] = set(map(int, numbers))

    def behind(chapter: int, needs: dict) -> set[int]:
        return needs[chapter].union(*(behind(n, needs) for n in needs[chapter]))

    drawn = {n: {other for mine, other in schematics.NEEDS if mine == n} for n in said}
    assert {n: behind(n, drawn) for n in drawn} == {n: behind(n, said) for n in said}


def test_sub_and_superscripts_return_to_the_line():
    shifts = map(int, re.findall(r'dy="(-?\d+)"', words(0, 0, "$x_{0,g}$ and $M^⊤$ are")))
    assert sum(shifts) == 0
