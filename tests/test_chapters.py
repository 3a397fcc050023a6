"""What every chapter owes its reader: few words, little code in view, captions, an answer."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FOLDED = {"hide-input", "remove-cell", "remove-input", "hide-cell"}
pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem[:2])


def cells(path: Path, kind: str) -> list[dict]:
    found = json.loads(path.read_text())["cells"]
    return [c | {"text": "".join(c["source"])} for c in found if c["cell_type"] == kind]


def prose(path: Path) -> str:
    """What is read at first sight: solutions are closed, formulas and code are no words."""
    text = "\n\n".join(cell["text"] for cell in cells(path, "markdown"))
    text = re.sub(r":::\{solution\}.*?\n:::", "", text, flags=re.DOTALL)
    text = re.sub(r"```[\s\S]*?```|^:\w+:.*$|^:::.*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\$\$.*?\$\$|\$[^$]*\$", "x", text, flags=re.DOTALL)


def in_view(path: Path) -> list[str]:
    code = cells(path, "code")
    return [c["text"] for c in code if not FOLDED & set(c["metadata"].get("tags", []))]


def test_a_chapter_has_at_most_2500_words_in_view(path):
    assert len(re.findall(r"\w[\w'’.-]*", prose(path))) <= 2500


def test_at_most_30_per_cent_of_a_page_is_code_in_view(path):
    code = sum(map(len, in_view(path)))
    assert code <= 0.3 * (code + len(prose(path)))


def test_cells_in_view_are_short(path):
    for text in in_view(path):
        lines = text.splitlines()
        assert len(lines) <= 15 and max(map(len, lines), default=0) <= 80, text


def test_figures_have_names_captions_and_descriptions(path):
    figures = [c["metadata"]["figure"] for c in cells(path, "code") if "figure" in c["metadata"]]
    assert len(figures) >= 2
    names = [figure["name"] for figure in figures]
    assert len(names) == len(set(names))
    for figure in figures:
        assert set(figure) == {"name", "caption", "alt"}
        assert figure["name"].startswith(f"fig-{path.stem[:2]}-")
        assert figure["caption"].rstrip().endswith((".", "?")) and len(figure["alt"]) > 20


def test_a_chapter_ends_with_what_was_learned_exercises_and_surprises(path):
    text = "\n\n".join(cell["text"] for cell in cells(path, "markdown"))
    wanted = ("What you have learned", "Exercises", "Common surprises")
    places = [text.find(f"\n## {title}") for title in wanted]
    assert -1 not in places and places == sorted(places)
    exercises = re.findall(r":::\{exercise\}[^\n]*\n:label: (\S+)", text)
    solved = re.findall(r":::\{solution\} (\S+)", text)
    assert len(exercises) >= 3 and exercises == solved
    assert all(label.startswith(f"ex-{path.stem[:2]}-") for label in exercises)


def test_formulas_and_terms_lead_on(path):
    text = "\n".join(cell["text"] for cell in cells(path, "markdown"))
    assert "book/glossary" in text and "book/notation" in text


def test_the_first_cell_of_code_installs_the_package_and_prints_nothing(path):
    first, *_ = cells(path, "code")
    assert first["metadata"]["tags"] == ["remove-cell"] and "print(" not in first["text"]
    assert 'figure_formats = ["svg"]' in first["text"]
