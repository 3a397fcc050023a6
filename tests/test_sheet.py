"""The page of heat maps, and the table of several reports."""

import json
import re

import numpy as np
import pytest
import torch
from pandas import DataFrame
from PIL import Image

from diffad_ref.__main__ import main
from diffad_ref.checkpoints import write_text
from diffad_ref.evaluation import Report
from diffad_ref.metrics import METRICS
from diffad_ref.tools import tables
from diffad_ref.tools.plots import save_heat_map
from diffad_ref.tools.sheet import write_sheet


def test_sheet_shows_the_most_abnormal_first_and_finds_its_pictures(tmp_path):
    names = ["a.png", "deep/b & c.png", "d?.png"]
    rows = [
        {"name": name, "score": score, "map": f"{name}_map.png"}
        for name, score in zip(names, (0.2, 0.9, 0.5), strict=True)
    ]
    write_sheet(rows, tmp_path / "sheet.html", "3 <images>")
    page = (tmp_path / "sheet.html").read_text()
    assert re.findall(r"<b>([\d.]+)</b>", page) == ["0.9", "0.5", "0.2"]
    sources = re.findall(r'<img src="([^"]+)"', page)
    assert sources == ["deep/b%20%26%20c.png_map.png", "d%3F.png_map.png", "a.png_map.png"]
    assert "<h1>3 &lt;images&gt;</h1>" in page and "b &amp; c.png" in page
    assert "http" not in page  # nothing from elsewhere


def report(scale, images=2):
    row = dict.fromkeys(METRICS, scale) | {"n_good": images, "n_defective": 1}
    return Report(
        DataFrame([row | {"category": name} for name in ("gear", "mean")]).set_index("category"),
        DataFrame([row | {"category": "gear", "kind": "missing"}]).set_index(["category", "kind"]),
        DataFrame(columns=["path", "category", "kind", "label", "score"]),
        detector="Name",
        seconds_per_image=scale,
    )


@pytest.fixture
def files(tmp_path):
    """Two reports as `evaluate --save` writes them."""
    for name, scale in (("first_try", 0.25), ("second", 0.75)):
        entries = {"commands": [], "report": tables.to_plain(report(scale)), "intervals": {}}
        write_text(json.dumps(entries), tmp_path / f"{name}.json")
    return [str(tmp_path / "first_try.json"), str(tmp_path / "second.json")]


def test_compare_prints_the_table_of_the_library_and_one_by_kind(files, capsys):
    assert main(["compare", *files]) == 0
    printed = capsys.readouterr().out
    expected = tables.compare({"first try": report(0.25), "second": report(0.75)})
    assert printed.startswith(f"{expected}\n")
    rows = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines()]
    assert ["", "gear", "missing", "25.0", "**75.0**", ""] in rows


@pytest.mark.parametrize("form", ["--json", "--csv"])
def test_compare_gives_fractions_to_programs(files, capsys, form):
    assert main(["compare", *files, form]) == 0
    printed = capsys.readouterr().out
    if form == "--json":
        rows = json.loads(printed)
        assert [(row["method"], row["pixel_ap"]) for row in rows] == [
            ("first try", 0.25),
            ("second", 0.75),
        ]
    else:
        assert printed.splitlines()[1].startswith("first try,0.25,")


def test_compare_refuses_what_cannot_be_compared(files, tmp_path, capsys):
    other = {"report": tables.to_plain(report(0.5, images=3))}
    write_text(json.dumps(other), tmp_path / "other.json")
    (tmp_path / "none.json").write_text('{"mean": 1}')
    (tmp_path / "list.json").write_text('{"report": {"table": [], "kinds": [], "images": []}}')
    (tmp_path / "text.json").write_text("a note")
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "second.json").write_bytes((tmp_path / "second.json").read_bytes())
    for name, words in (
        ("other.json", "same images"),
        ("none.json", "none.json is no report"),
        ("again/second.json", "two reports are called 'second'"),
        ("missing.json", "missing.json"),
        ("list.json", "list.json is no report"),
        ("text.json", "text.json is no report"),
    ):
        assert main(["compare", *files, str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err, name


def test_map_scale_of_a_heat_map_reaches_the_largest_value(tmp_path):
    values = torch.tensor([[0.0, 5.0], [10.0, 10.0]])
    save_heat_map(torch.zeros(3, 2, 2), values, tmp_path / "map.png", (0.0, 10.0))
    pixels = np.array(Image.open(tmp_path / "map.png"))[:, 2:].astype(int)
    brightness = pixels.sum(-1)
    assert brightness[0, 0] == 0 and brightness[0, 1] < brightness[1, 0] == brightness[1, 1]
