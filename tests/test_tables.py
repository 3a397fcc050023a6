"""Tables for people: what is bold, what is in per cent, what is compared; and reports as JSON."""

import json
import re
from math import inf, nan

import numpy as np
import pandas as pd
import pytest
from pandas import DataFrame
from pydantic import TypeAdapter

from diffad_ref.continual import Continual
from diffad_ref.evaluation import Report
from diffad_ref.metrics import METRICS
from diffad_ref.tools.tables import (
    HEADERS,
    REPORT,
    Shown,
    after_tasks,
    by_category,
    by_kind,
    compare,
    compare_kinds,
    from_plain,
    joined,
    rows,
    summarise,
    to_plain,
)


def cells(table):
    """The cells of a Markdown table, line by line, without the rule below the head."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in str(table).splitlines()]
    return [lines[0], *lines[2:]]


def report(bolt=0.5, nut=0.75, good=3, seconds=0.1, **fields):
    """A report on two categories in which every metric is the same number."""
    counts = {"n_good": good, "n_defective": 2}
    table = {"bolt": bolt, "nut": nut, "mean": (bolt + nut) / 2}
    table = [{"category": c} | counts | dict.fromkeys(METRICS, v) for c, v in table.items()]
    kinds = {("bolt", "bent"): bolt, ("bolt", "crack"): bolt / 2, ("nut", "bent"): nut}
    kinds = [
        {"category": c, "kind": k, "n_good": good, "n_defective": 1} | dict.fromkeys(METRICS, v)
        for (c, k), v in kinds.items()
    ]
    images = {"path": ["bolt/good/0.png", "nut/bent/1.png"], "category": ["bolt", "nut"]}
    images |= {"kind": ["good", "bent"], "label": [0, 1], "score": [1 / 3, 0.1]}
    table, kinds = DataFrame(table).set_index("category"), DataFrame(kinds)
    kinds = kinds.set_index(["category", "kind"])
    return Report(table, kinds, DataFrame(images), "Red", seconds_per_image=seconds, **fields)


# ------------------------------------------------------------------------------- what is displayed


def test_metrics_are_shown_in_per_cent_and_the_frame_behind_holds_fractions():
    table = rows([{"method": "a", "pixel_ap": 0.12345, "seconds_per_image": 0.12345}])
    assert cells(table) == [["method", "pixel AP", "s per image"], ["a", "12.3", "0.123"]]
    assert table.frame.loc["a", "pixel_ap"] == 0.12345


def test_columns_in_per_cent_are_those_that_are_named():
    table = rows([{"x": 1, "share": 0.5, "pixel_ap": 0.5}], percent=("share",))
    assert cells(table)[1] == ["1", "50.0", "0.5"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (3.0, "3"),
        (np.int64(3), "3"),
        (np.float64(0.000123456), "0.000123"),
        (1234.5, "1234"),
        (-0.0, "-0"),
        (None, ""),
        (nan, ""),
        ("word", "word"),
        (True, "True"),
    ],
)
def test_other_cells_have_three_digits_and_those_not_defined_are_empty(value, text):
    frame = DataFrame({"x": pd.Series([value], ["a"], dtype=object)})
    assert cells(Shown(frame))[1] == ["a", text]
    assert f"<td>{text}</td>" in Shown(frame)._repr_html_()


def test_numbers_that_name_rows_are_written_as_other_numbers_are():
    table = rows([{"threshold": 0.1 + 0.2, "TP": 1}])
    assert cells(table)[1] == ["0.3", "1"] and "<td>0.3</td>" in table._repr_html_()


@pytest.mark.parametrize(
    ("best", "bold"),
    [
        ("column", {"two x", "three x", "two y"}),
        ("row", {"one x", "two y", "three x"}),
        (None, set()),
    ],
)
def test_best_of_a_column_or_of_a_row_is_bold(best, bold):
    """Equal ones are all bold, an empty cell never, and of other columns none."""
    frame = DataFrame({"x": [0.3, 0.4, 0.4], "y": [0.1, 0.9, nan], "n": 7}, ["one", "two", "three"])
    table = Shown(frame, ("x", "y"), best)
    found = {
        f"{row} {column}"
        for row, *line in cells(table)[1:]
        for column, cell in zip("xyn", line, strict=True)
        if cell.startswith("**")
    }
    assert found == bold and table._repr_html_().count("<b>") == len(bold)


def test_html_holds_what_markdown_holds():
    table = Shown(report().table[["pixel_ap", "n_good"]], best="column")
    lines = re.findall(r"<tr.*?</tr>", table._repr_html_(), re.S)
    found = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", line) for line in lines]
    assert found[0] == ["category", "pixel AP", "good"]
    assert found[1:] == [["bolt", "50.0", "3"], ["nut", "<b>75.0</b>", "3"], ["mean", "62.5", "3"]]
    assert cells(table)[2] == ["nut", "**75.0**", "3"]


def test_names_cannot_break_a_table():
    table = rows([{"a|b <i>": "c|d <i>", "e|f <u>": "**g|h <u>**"}])
    assert str(table).splitlines()[0].count("\\|") == str(table).splitlines()[2].count("\\|") == 2
    text = table._repr_html_()
    assert "<i>" not in text and "<u>" not in text and "c|d &lt;i&gt;" in text
    assert "**g|h &lt;u&gt;**" in text  # what looks like Markdown stays as it was


def test_names_may_be_there_twice():
    table = rows([{"method": "a", "x": 1}, {"method": "a", "x": 2}, {"method": "method", "x": 3}])
    assert cells(table)[1:] == [["a", "1"], ["a", "2"], ["method", "3"]]
    assert table._repr_html_().count("<td>") == 6


def test_table_without_a_name_for_its_rows_has_an_empty_corner():
    frame = DataFrame({"index": [1], "x": [2]}, ["a"])
    assert cells(Shown(frame)) == [["", "index", "x"], ["a", "1", "2"]]


def test_display_is_the_same_every_time():
    table = compare({"a": report(), "b": report()})
    assert table._repr_html_() == compare({"a": report(), "b": report()})._repr_html_()


def test_several_keys_may_name_a_row():
    found = [{"category": "a", "kind": "x", "pixel_ap": 0.5, "n": 2}]
    table = rows(found, labels=2)
    assert table.frame.index.tolist() == [("a", "x")]
    assert cells(table) == [["category", "kind", "pixel AP", "n"], ["a", "x", "50.0", "2"]]


# ------------------------------------------------------------------------------------- of reports


def test_by_category_and_by_kind_show_a_report():
    head = [HEADERS[name] for name in METRICS]
    lines = cells(by_category(report()))
    assert lines[0] == ["category", *head, "good", "defective"]
    assert lines[3] == ["mean", *["62.5"] * 7, "3", "2"]
    lines = cells(by_kind(report()))
    assert lines[0] == ["category", "kind", "image AUROC", "pixel AUROC", "pixel AP", "defective"]
    assert lines[2] == ["bolt", "crack", "25.0", "25.0", "25.0", "1"]
    assert cells(by_kind(report(), ("aupro",)))[0] == ["category", "kind", "AUPRO", "defective"]


def test_comparison_has_a_row_for_each_mean_with_the_best_of_each_column_in_bold():
    table = compare({"low": report(0.5, 0.5), "high": report(0.5, 0.75, seconds=0.25)})
    assert cells(table)[1:] == [["low", *["50.0"] * 7], ["high", *["**62.5**"] * 7]]
    chosen = compare({"low": report(), "high": report()}, ("aupro", "seconds_per_image"))
    assert cells(chosen)[0] == ["method", "AUPRO", "s per image"]
    assert "**" not in str(compare({"alone": report()}))


def test_comparison_by_kind_has_a_column_for_each_report_with_the_best_of_each_row_in_bold():
    table = compare_kinds({"a": report(0.8, 0.2), "b": report(0.6, 0.4)}, "pixel_ap")
    assert cells(table) == [
        ["category", "kind", "a", "b"],
        ["bolt", "bent", "**80.0**", "60.0"],
        ["bolt", "crack", "**40.0**", "30.0"],
        ["nut", "bent", "20.0", "**40.0**"],
    ]


@pytest.mark.parametrize("way", [compare, compare_kinds])
def test_what_cannot_be_compared_is_refused(way):
    with pytest.raises(ValueError, match="no report"):
        way({})
    with pytest.raises(ValueError, match="'b' and 'a' were not evaluated on the same images"):
        way({"a": report(), "b": report(good=4)})
    with pytest.raises(ValueError, match="'b' .* protocol deco_diff, 'a' by exact: such numbers"):
        way({"a": report(), "b": report(protocol="deco_diff")})


def test_report_from_a_file_is_compared_with_a_fresh_one():
    fresh = report()  # whose counts may be floats, with the mean below them
    fresh.table = fresh.table.astype({"n_good": float, "n_defective": float})
    saved = from_plain(json.loads(json.dumps(to_plain(report(0.6)))))
    for pair in ({"a": fresh, "b": saved}, {"b": saved, "a": fresh}):
        assert len(compare(pair).frame) == 2 and len(compare_kinds(pair).frame) == 3


def test_metric_that_there_is_not_is_named():
    for table in (
        lambda: by_kind(report(), ("pixel_rocauc",)),
        lambda: compare({"a": report()}, ("pixel_rocauc",)),
        lambda: compare_kinds({"a": report()}, "pixel_rocauc"),
    ):
        with pytest.raises(KeyError, match="pixel_rocauc"):
            table()


# ------------------------------------------------------------------------------ of continual runs

AUROC = {"a": (0.9, 0.7, 0.75), "b": (0.8, 0.85, 0.5), "c": (0.6, 0.65), "d": (0.4,)}
LOSS = {"a": (0.1, 0.3, 0.2), "b": (0.2, 0.1, 0.4), "c": (0.5, 0.4), "d": (0.9,)}


def three_tasks():
    found = []
    for task, categories in enumerate(("ab", "abc", "abcd")):
        for name in categories:
            k = task - {"a": 0, "b": 0, "c": 1, "d": 2}[name]
            row = {"task": task, "category": name, "image_auroc": AUROC[name][k]}
            found.append(row | {"pixel_ap": AUROC[name][k], "loss": LOSS[name][k]})
    taken = [{"x": [1, 4], "y": [3, 6]}, {"x": [2, 4], "y": [6, 6]}, {"x": [4, 4], "y": [6, 6]}]
    return Continual([["a", "b"], ["c"], ["d"]], found, taken)


def test_table_of_tasks_leaves_cells_empty_before_a_category_was_learned():
    assert cells(after_tasks(three_tasks())) == [
        ["category", "after task 1", "after task 2", "after task 3"],
        ["a", "90.0", "70.0", "75.0"],
        ["b", "80.0", "85.0", "50.0"],
        ["c", "", "60.0", "65.0"],
        ["d", "", "", "40.0"],
    ]
    assert cells(after_tasks(three_tasks(), "loss"))[1] == ["a", "0.1", "0.3", "0.2"]


def test_summary_of_one_run_holds_its_measures():
    table = summarise({"mine": three_tasks()}, ["image_auroc"])
    expected = {"A image AUROC": 0.575, "FM image AUROC": 0.15, "new image AUROC": 0.5}
    expected |= {"FM loss": 0.1, "memory": 1.0}
    assert table.frame.loc["mine"].to_dict() == pytest.approx(expected)
    assert cells(table)[1] == ["mine", "57.5", "15.0", "50.0", "0.1", "100.0"]


def test_summary_of_several_runs_names_each_measure_once():
    lines = cells(summarise({"one": three_tasks(), "two": three_tasks()}))
    assert len(lines[0]) == len(set(lines[0])) == 9
    assert [line[0] for line in lines] == ["training", "one", "two"]


def test_summary_of_one_task_has_nothing_to_forget():
    one = Continual([["a"]], three_tasks().rows[:1], [{}])
    table = summarise({"mine": one}, ["image_auroc"])
    assert cells(table) == [["training", "A image AUROC"], ["mine", "90.0"]]


@pytest.mark.parametrize("category", AUROC)
def test_category_without_masks_leaves_the_measures_of_images_to_a_summary(category):
    run = three_tasks()
    for row in run.rows:
        row["pixel_ap"] = None if row["category"] == category else row["pixel_ap"]
    frame = summarise({"mine": run}).frame
    assert frame.loc["mine", "FM image AUROC"] == pytest.approx(0.15)
    assert not [column for column in frame if "pixel" in column]


# ---------------------------------------------------------------------------------------- as JSON


def test_report_survives_json_to_the_last_bit():
    first = report(1 / 3, 0.1, seed=5, protocol="deco_diff")
    first.table.loc["nut", "pixel_ap"] = nan
    text = json.dumps(to_plain(first), allow_nan=False)
    again = from_plain(json.loads(text))
    for name in ("table", "kinds", "images"):
        one, other = getattr(first, name), getattr(again, name)
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    for name in ("detector", "protocol", "seed", "seconds_per_image"):
        assert getattr(again, name) == getattr(first, name)
    assert again.maps is None and json.dumps(to_plain(again)) == text


def test_report_as_json_has_rows_with_names():
    plain = to_plain(report())
    assert plain["table"][0] | {"category": "bolt", "aupro": 0.5} == plain["table"][0]
    assert [row["category"] for row in plain["table"]] == ["bolt", "nut", "mean"]
    assert plain["kinds"][1]["kind"] == "crack" and plain["images"][1]["label"] == 1


@pytest.mark.parametrize(
    ("table", "row", "change"),
    [
        *[("table", 2, {"category": name}) for name in ("bolts", "bolt")],  # no mean; two bolts
        *[("table", 0, {"n_good": count}) for count in (nan, -1, None)],
        *[("table", 0, {"aupro": value}) for value in (nan, inf, "1")],
        ("kinds", 0, {"kind": "crack"}),  # there already
        ("kinds", slice(None), None),
    ],
)
def test_report_that_could_not_be_shown_is_refused(table, row, change):
    plain = to_plain(report())
    TypeAdapter(REPORT).validate_python(plain)
    if change is None:
        del plain[table][row]
    else:
        plain[table][row] |= change
    with pytest.raises(ValueError, match=table):
        TypeAdapter(REPORT).validate_python(plain)


def test_report_may_come_without_its_images():
    plain = to_plain(report())
    del plain["images"]
    assert from_plain(plain).images.empty and from_plain(plain).mean["aupro"] == 0.625


# -------------------------------------------------------------- models that judge one category each


def single(category, value, images, seconds):
    """A report on one category, with `images` images of which one is defective."""
    found = report(**{"bolt": value, "nut": value}, seconds=seconds)
    found.table = found.table.drop(index="nut").rename(index={"bolt": category})
    found.table.loc["mean", list(METRICS)] = value
    kinds = found.kinds.reset_index()
    found.kinds = kinds[kinds["category"] == "nut"].assign(category=category)
    found.kinds = found.kinds.set_index(["category", "kind"])
    found.images = DataFrame({"path": ["a"] * images, "score": [0.0] * images})
    return found


def test_reports_on_different_categories_become_one_with_their_mean():
    one, two = single("bolt", 0.5, 3, 0.1), single("nut", 0.75, 1, 0.5)
    both = joined([one, two])
    assert list(both.table.index) == ["bolt", "nut", "mean"]
    assert both.mean["pixel_ap"] == 0.625 and both.mean["n_good"] == 6
    assert len(both.kinds) == 2 and len(both.images) == 4
    assert both.seconds_per_image == pytest.approx((3 * 0.1 + 0.5) / 4)
    assert cells(compare({"both": both}, ("pixel_ap",)))[1] == ["both", "62.5"]


def test_reports_that_share_a_category_or_a_way_of_judging_not_at_all_are_not_joined():
    one, other = single("bolt", 0.5, 3, 0.1), single("nut", 0.75, 1, 0.5)
    with pytest.raises(ValueError, match="categories in more than one report: bolt"):
        joined([one, one])
    other.protocol = "deco_diff"
    with pytest.raises(ValueError, match="different detectors, protocols or precisions"):
        joined([one, other])
