"""The book's frame: what pages name exists, and the scripts that build it do what they say."""

import ast
import importlib
import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

import make
import real_maps
from bench.table import Row
from check_pages import problems
from diffad_ref.checkpoints import save
from diffad_ref.metrics import METRICS
from diffad_ref.tools import plan, tables
from diffad_ref.tools.baselines import SegmentationOnly
from diffad_ref.tools.protection import Protection
from generated import (
    card_tables,
    continual_runs,
    continual_table,
    headline,
    interval_table,
    mean_table,
    plan_tables,
    reproduce_tables,
    reproduced,
    result_tables,
    status_section,
    wrapped,
)
from real_maps import map_pictures
from slim import slim, used

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*(ROOT / "book").glob("*.md"), *(ROOT / "book" / "api").glob("*.md")])
PROSE = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FILES = [p.relative_to(ROOT).with_suffix("") for p in (ROOT / "diffad_ref").rglob("*.py")]
MODULES = sorted(".".join(p.parts) for p in FILES if not p.stem.startswith("__"))
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())


def chapters() -> list[str]:
    found = [TOC["root"]]
    for part in TOC["parts"]:
        for chapter in part["chapters"]:
            found += [chapter["file"], *(s["file"] for s in chapter.get("sections", ()))]
    return found


def notebook(path: Path, *markdown: str, code: str = "1") -> Path:
    """A notebook file with these Markdown cells and one code cell."""
    cells = [{"cell_type": "markdown", "source": text} for text in markdown]
    cells.append({"cell_type": "code", "source": code, "outputs": []})
    path.write_text(json.dumps({"cells": cells}))
    return path


# ------------------------------------------------------------------------------- what pages name


def test_every_chapter_of_the_table_of_contents_is_a_file():
    for chapter in chapters():
        assert any((ROOT / f"{chapter}{ext}").exists() for ext in (".md", ".ipynb")), chapter


def test_every_page_and_notebook_is_a_chapter():
    files = {p.relative_to(ROOT).with_suffix("").as_posix() for p in [*PAGES, *NOTEBOOKS]}
    assert sorted(files) == sorted(chapters())


def test_chapters_are_numbered_as_their_files_are_and_other_pages_are_not():
    numbered = [c["file"] for p in TOC["parts"] if p.get("numbered") for c in p["chapters"]]
    assert numbered == [f"notebooks/{path.stem}" for path in NOTEBOOKS]
    assert [int(path.stem[:2]) for path in NOTEBOOKS] == list(range(1, len(NOTEBOOKS) + 1))


def test_every_module_has_its_page_below_the_api_page():
    shown = {
        path.stem: re.findall(r"automodule:: (diffad_ref\.[\w.]+)", path.read_text())
        for path in (ROOT / "book/api").glob("*.md")
    }
    assert sorted(module for (module,) in shown.values()) == MODULES
    assert all(module.endswith(f".{stem}") for stem, (module,) in shown.items())


def test_the_api_page_names_every_module_once_with_a_sentence():
    rows = re.findall(
        r"\| \{doc\}`(\w+) <api/(\w+)>` \| .*\. \|", (ROOT / "book/api.md").read_text()
    )
    assert all(name == page for name, page in rows)
    assert sorted(name for name, _ in rows) == sorted(m.rpartition(".")[2] for m in MODULES)


@pytest.mark.parametrize("page", PROSE, ids=lambda p: p.stem)
def test_python_examples_compile_and_use_names_that_exist(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    resolve(f"{node.module}.{alias.name}")
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("da."):
                path = re.match(r"[\w.]+", ast.unparse(node))[0]
                resolve(path.replace("da", "diffad_ref", 1))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_functions_that_a_page_links_exist(page):
    for name in re.findall(r"\{py:\w+\}`~?([\w.]+)`", page.read_text()):
        resolve(name)


def resolve(name: str) -> object:
    """What a dotted name means: a module, or something in one."""
    package, *path = name.split(".")
    found = importlib.import_module(package)
    for part in path:
        if not hasattr(found, part):  # a module that nobody has imported yet
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_tests_that_a_page_names_exist(page):
    for file, name in re.findall(r"(tests/\w+\.py)(?:::(\w+))?", page.read_text()):
        assert (ROOT / file).exists(), file
        assert not name or f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def messages() -> list[str]:
    """All texts in the code of the package, with a dot of ellipsis for what is filled in."""
    found = []
    for file in FILES:
        for node in ast.walk(ast.parse((ROOT / file).with_suffix(".py").read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [p.value if isinstance(p, ast.Constant) else "…" for p in parts]
            found += ["".join(texts)] if all(isinstance(text, str) for text in texts) else []
    return found


OTHERS = ("No module", "Input should be", "Unexpected keyword")  # Python's, and pydantic's


def test_messages_that_the_page_of_troubles_quotes_are_those_of_the_package():
    text, known = (ROOT / "book/troubleshooting.md").read_text(), messages()
    for title in re.findall(r"\*\*(.+?)\*\*", text, re.DOTALL):
        for quoted in re.findall(r'"(.+?)"', " ".join(title.split()).replace("\\`", "`")):
            pieces = map(re.escape, quoted.strip(".").split("..."))
            message = re.compile(".*".join(pieces), re.DOTALL)
            assert any(map(message.search, known)) or quoted.startswith(OTHERS), quoted


COUNTS = {"D": 12, "C": 10, "G": 6, "A": 3, "O": 4, "E": 2, "M": 6}
FORMULAS = [f"{letter}{n + 1}" for letter, count in COUNTS.items() for n in range(count)]


@pytest.mark.parametrize("number", FORMULAS)
def test_each_formula_stands_in_the_index_and_beside_its_line_of_code(number):
    code = "".join(path.read_text() for path in (ROOT / "diffad_ref").glob("*.py"))
    assert re.search(rf"# .*\b{number}\b", code)
    assert rf"\tag{{{number}}}" in (ROOT / "book/equation_index.md").read_text()


@pytest.mark.parametrize("number", [*FORMULAS, "M7"])
def test_each_entry_of_the_index_names_code_test_and_a_chapter_that_speaks_of_it(number):
    entries = (ROOT / "book/equation_index.md").read_text().split("(eq-")
    (entry,) = (e for e in entries if e.startswith(f"{number.lower()})=\n## {number} · "))
    assert rf"\tag{{{number}}}" in entry and "- *Code:* " in entry and "- *Test:* " in entry
    path = re.search(r"- \*Chapter:\* \[chapter \d+\]\(\.\./(notebooks/\w+\.ipynb)\)", entry)[1]
    assert re.search(rf"\b{number}\b", (ROOT / path).read_text())


def test_commands_in_the_readme_are_targets_of_the_makefile():
    named = re.findall(r"\bmake ([a-z]+)", (ROOT / "README.md").read_text())
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"test", "book"} <= set(named) <= set(targets)


def test_continuous_integration_runs_the_readme_command_then_the_book():
    commands = (ROOT / ".ci/run").read_text().splitlines()
    made = [line.partition(" >")[0] for line in commands if line.startswith("make")]
    assert made == ["make test", "make book"]


def test_the_repository_has_one_address():
    address = CONFIG["repository"]["url"].removeprefix("https://github.com/")
    files = [*PROSE, *NOTEBOOKS, ROOT / "CITATION.cff"]
    text = "".join(path.read_text() for path in files)
    own_links = re.findall(r"github(?:\.com)?/([\w.-]+/diffad[\w-]*)", text)
    assert own_links and set(own_links) == {address}


def test_citations_are_in_the_bibliography():
    known = set(re.findall(r"^@\w+\{(\w+),", (ROOT / "book/references.bib").read_text(), re.M))
    text = "".join(path.read_text() for path in [*PAGES, *NOTEBOOKS])
    cited = {
        key.strip()
        for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text)
        for key in keys.split(",")
    }
    assert cited <= known


def test_vendored_files_come_with_their_licence():
    for folder in (ROOT / "book/extra/vendor").iterdir():
        assert (folder / "LICENSE").exists(), folder.name


# -------------------------------------------------------------------------------------- notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_stored_without_outputs_and_start_with_a_question(path):
    title, question = headline(path)
    assert title and question.endswith("?")
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs")


def test_a_notebook_without_a_question_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\*Question\?\*"):
        headline(notebook(tmp_path / "05_x.ipynb", "# Title\n\nText."))


# -------------------------------------------------------------------------- when a notebook re-runs


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A small project with a package and one notebook that has run and passed."""
    (tmp_path / "diffad_ref" / "weights").mkdir(parents=True)
    (tmp_path / "diffad_ref" / "core.py").write_text("x = 1")
    (tmp_path / "executed").mkdir()
    path = notebook(tmp_path / "01_a.ipynb", "# A")
    notebook(tmp_path / "executed" / path.name, "# A")
    monkeypatch.setattr(make, "ROOT", tmp_path)
    monkeypatch.setattr(make, "EXECUTED", tmp_path / "executed")
    record = {path.stem: {"passed": True, "key": make.fingerprint(path)}}
    return tmp_path, path, record


def test_a_notebook_that_passed_with_the_same_package_is_not_run_again(project):
    _, path, record = project
    assert not make.has_to_run(path, record)


@pytest.mark.parametrize("changed", ["diffad_ref/core.py", "diffad_ref/weights/w.json"])
def test_editing_the_package_runs_the_notebook_again(project, changed):
    root, path, record = project
    (root / changed).write_text("x = 2")
    assert make.has_to_run(path, record)


def test_editing_the_notebook_runs_it_again(project):
    _, path, record = project
    notebook(path, "# B")
    assert make.has_to_run(path, record)


def test_choosing_another_profile_runs_the_notebook_again(project, monkeypatch):
    _, path, record = project
    monkeypatch.setenv("DIFFAD_PROFILE", "paper")
    assert make.has_to_run(path, record)


def test_a_notebook_that_failed_or_never_ran_runs_again(project):
    root, path, record = project
    record[path.stem]["passed"] = False
    assert make.has_to_run(path, record)
    assert make.has_to_run(path, {})


def test_a_notebook_whose_executed_copy_is_gone_runs_again(project):
    root, path, record = project
    (root / "executed" / path.name).unlink()
    assert make.has_to_run(path, record)


def test_what_each_notebook_came_to_is_recorded(project, monkeypatch):
    root, path, _ = project
    other = notebook(root / "02_b.ipynb", "# B")

    def pytest_that_fails_the_second(command, cwd):
        assert command[-2:] == [str(root / "executed" / n.name) for n in (path, other)]
        cases = '<testcase name="01_a.ipynb" time="3"/>'
        cases += '<testcase name="02_b.ipynb" time="4"><failure/></testcase>'
        (root / "notebooks.xml").write_text(f"<testsuites>{cases}</testsuites>")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(make, "BUILD", root)
    monkeypatch.setattr(make, "RECORD", root / "notebooks.json")
    monkeypatch.setattr(make.subprocess, "run", pytest_that_fails_the_second)
    assert not make.run([path, other])
    record = make.read_record()
    assert record["01_a"]["passed"] and record["01_a"]["key"] == make.fingerprint(path)
    assert not record["02_b"]["passed"] and record["02_b"]["seconds"] == 4


# --------------------------------------------------------------------------------- generated pages


def test_the_status_tells_passed_failed_and_not_run_apart(tmp_path):
    paths = [notebook(tmp_path / f"{n}.ipynb", f"# {n}\n\n*Q?*") for n in "abc"]
    ran = {"seconds": 3.0, "finished": "today", "cores": 2, "versions": {"torch": "9.9"}}
    text = status_section(paths, {"a": {"passed": True, **ran}, "b": {"passed": False, **ran}})
    outcomes = re.findall(r"\| (passed|\*\*failed\*\*|not run) \|", text)
    assert outcomes == ["passed", "**failed**", "not run"]
    assert "torch 9.9" in text and "those of 2 CPU cores" in text


@pytest.mark.parametrize("load, words", [(1.9, "Nothing else"), (7.3, "up to 7.3 processes")])
def test_the_status_says_whether_the_machine_had_other_work(tmp_path, load, words):
    path = notebook(tmp_path / "a.ipynb", "# a\n\n*Q?*")
    ran = {"passed": True, "seconds": 3.0, "cores": 2, "load": load, "versions": {}}
    assert words in status_section([path], {"a": ran})


def save_record(path: Path, kinds: dict[str, float], **record) -> None:
    """A file as `evaluate --save` writes it, with one value for all metrics of a category."""
    rows = [
        {"category": c, "n_good": 1, "n_defective": 2} | dict.fromkeys(METRICS, value)
        for c, value in kinds.items()
    ]
    mean = rows[0] | {"category": "mean"} | dict.fromkeys(METRICS, sum(kinds.values()) / len(kinds))
    images = [{"path": "a", "category": "gear", "kind": "bent", "label": 1, "score": 0.5}]
    report = {"detector": "D", "protocol": "exact", "seed": 0, "seconds_per_image": 0.1}
    report |= {"table": [*rows, mean], "kinds": [row | {"kind": "bent"} for row in rows]}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record | {"report": report | {"images": images}}))


def test_results_are_read_from_the_records_worst_method_first(tmp_path):
    for name, value in {"full_method": 0.75, "PCA": 0.1234}.items():
        commands = ["train", f"evaluate {name}"]
        save_record(tmp_path / "toy" / f"{name}.json", {"gear": value}, commands=commands)
    text = re.sub(" +", " ", result_tables(tmp_path / "toy"))
    images, pixels = text.split("Pixels:")
    assert images.startswith("Images:\n\n| method | AUROC | AP | F1max |\n")
    assert images.index("| PCA | 12.3 |") < images.index("| full method | **75.0** |")
    assert "| method | AUROC | AP | F1max | AUPRO |" in pixels
    assert text.count("| method | bent |") == 2  # of a single category, a method a row
    last = text.split("pixel AP\n")[1]
    assert last.index("| PCA | 12.3 |\n") < last.index("| full method | **75.0** |\n")
    assert "train\nevaluate PCA\nevaluate full_method\n```" in text  # a command stands there once
    assert "By category" not in text  # of a single one, the first tables say it all


def test_results_of_several_categories_show_kinds_and_categories_as_rows(tmp_path):
    for name, low in {"better": 0.5, "worse": 0.25, "worse,_so": 0.2}.items():
        kinds = {"gear": low, "board": 0.5}
        save_record(tmp_path / "toy" / f"{name}.json", kinds, commands=[name])
    text = re.sub(" +", " ", result_tables(tmp_path / "toy"))
    assert "| kind | worse | better |" in text  # the variant "worse, so" stands in the means alone
    assert "| gear, bent | 25.0 | **50.0** |" in text
    images, pixels = text.split("By category, ")[1:]
    assert images.startswith("image AUROC") and pixels.startswith("pixel AP")
    assert "| category | worse | better |" in pixels
    assert "| gear | 25.0 | **50.0** |" in pixels


def test_results_say_what_a_method_costs_where_it_was_recorded(tmp_path):
    cost = {"training seconds": 65.0, "megabytes": 26.5}
    save_record(tmp_path / "toy" / "nearest.json", {"gear": 0.5}, cost=cost, commands=["a"])
    save_record(tmp_path / "toy" / "PCA.json", {"gear": 0.25}, commands=["b"])
    text = re.sub(" +", " ", result_tables(tmp_path / "toy"))
    assert "| method | ms per image | s to train | MB |" in text
    assert "| nearest | 100 | 65 | 26.5 |" in text
    assert "| PCA | 100 | | |" in text


def test_results_show_the_interval_of_a_mean_beside_it(tmp_path):
    options = {"commands": ["a"], "intervals": {"pixel_ap": [0.3, 0.45]}}
    save_record(tmp_path / "toy" / "PCA.json", {"gear": 0.4}, **options)
    text = result_tables(tmp_path / "toy")
    assert (
        text.count("40.0 (30.0–\N{WORD JOINER}45.0)") == 1
        and "| PCA | 40.0 | 40.0 | 40.0 |" in text
    )


def test_what_reproduce_found_stands_beside_what_is_published(tmp_path):
    metrics = dict.fromkeys(METRICS, 0.25)
    run = {
        **{"paper": "one_for_more", "setting": "visa 11-1", "command": "reproduce --data visa"},
        **{
            "categories": "12 of 12",
            "profile": "tiny",
            "share of the recipe": 0.125,
            "steps": 1200,
        },
        **{"start": "from scratch", "device": "CPU, 1 thread", "minutes since the last start": 7.8},
        **{"mean": {"here": metrics, "protocol": metrics | {"aupro": 0.5}}, "forgetting": metrics},
    }
    (tmp_path / "one.json").write_text(json.dumps(run))
    text = re.sub(" +", " ", reproduced(tmp_path))
    assert "**`one_for_more visa 11-1`**. 12 of 12 categories, 12 % of the `tiny` recipe" in text
    assert "| image AUROC | 25.0 | 25.0 | 88.3 | 25.0 |" in text  # as the paper says
    assert "| AUPRO | 25.0 | 50.0 | | 25.0 |" in text and "--data visa" in text
    run["share of the recipe"] = "see steps"  # as of a run with --steps
    (tmp_path / "one.json").write_text(json.dumps(run))
    assert "a part of the `tiny` recipe (1,200 steps)" in reproduced(tmp_path)


def test_no_table_of_the_results_is_too_wide_for_a_page():
    for folder in make.DATA_SETS:
        text = result_tables(ROOT / "book" / "records" / folder)
        assert max(line.count("|") - 1 for line in text.splitlines()) <= 7, folder


def test_a_long_command_is_broken_before_its_options():
    command = "python -m diffad_ref train toy " + " ".join(f"--option-{k} value" for k in range(9))
    lines = wrapped(command).split(" \\\n    ")
    assert " ".join(lines) == command and max(map(len, lines)) < 79


def test_maps_of_real_images_are_drawn_only_where_there_are_images(tmp_path, mvtec_root):
    path = tmp_path / "maps.png"
    assert "DIFFAD_MVTEC" in map_pictures(tmp_path / "nowhere", tmp_path, path)
    assert not path.exists()
    (mvtec_root / "carpet").rename(mvtec_root / "transistor")
    text = map_pictures(mvtec_root, tmp_path / "runs", path)
    assert path.is_file() and "CC BY-NC-SA 4.0" in text and "_generated/maps.png" in text


def test_whatever_was_trained_on_a_category_is_in_the_picture_of_its_maps(tmp_path, mvtec_root):
    trained = SegmentationOnly.tiny(image_size=32, built_in_textures=True)
    trained.categories = ["bottle"]
    save(trained, tmp_path / "runs" / "mvtec" / "one" / "weights")
    trained.categories = ["gear"]
    save(trained, tmp_path / "runs" / "toy" / "weights")
    rivals = ["template", "PCA", "nearest"]
    judges = real_maps._judges(mvtec_root, tmp_path / "runs", "bottle")
    assert list(judges) == [*rivals, "segmentation only"]
    assert list(real_maps._judges(mvtec_root, tmp_path / "runs", "carpet")) == rivals


def test_variants_of_a_method_stand_with_their_intervals_in_the_order_of_their_files(tmp_path):
    intervals = dict.fromkeys(METRICS, [0.3, 0.45])
    for name in ("02-without_it", "01-as_it_is"):
        options = {"commands": ["train", name], "intervals": intervals}
        save_record(tmp_path / f"{name}.json", {"gear": 0.4}, **options)
    text = interval_table(tmp_path)
    row = "| 40.0 (30.0–\N{WORD JOINER}45.0) " * 3 + "|\n"
    assert f"| as it is {row}| without it {row}" in text
    assert "train\n01-as_it_is\n02-without_it\n```" in text


def test_the_table_of_tasks_is_read_from_the_record_beside_the_weights(tmp_path):
    rows = [
        {"task": k, "category": c, **dict.fromkeys(METRICS, v), "loss": 0.1}
        for k, c, v in ((0, "gear", 0.9), (1, "gear", 0.7), (1, "board", 0.8))
    ]
    run = {"tasks": [["gear"], ["board"]], "rows": rows, "taken": [{}, {"layer": [1, 4]}]}
    runs = {name: {"command": "continual toy", "continual": run} for name in ("update", "none")}
    (tmp_path / "w.json").write_text(json.dumps({"record": {"runs": runs}}))
    text = re.sub(" +", " ", continual_table(tmp_path / "w.json"))
    images, pixels = text.split("Pixel AP:")
    for table in (images, pixels):
        assert "| update | 75.0 | 20.0 | 80.0 |" in table  # A, FM, new
    assert "| 25.0 |\n" in images and "```bash\ncontinual toy\n```" in text
    assert "| none |" in text and "| none |" not in continual_table(tmp_path / "w.json", "update")


def test_the_weights_of_a_run_are_judged_again_beside_it():
    text = continual_table(ROOT / "diffad_ref" / "weights" / "one_for_more_toy_3.json", "update")
    found = re.search(r"judged again: .*, pixel AP ([\d.]+) \(in the run ([\d.]+)\)", text)
    now, then = map(float, found.groups())
    assert 0 < abs(now - then) < 0.5  # another draw of the noise, and nothing else
    assert text.index("# --energy is gone since") < text.index("--energy 0.99999")


def test_the_page_of_costs_tells_size_memory_and_hours_of_each_method(monkeypatch):
    peaks = {"float32": ((2**30, 2**30),), "bf16": ((2**30, 2**29),)}
    cost = Protection(10**12, 10**12, 10**12, 2**30, 2**30, 3)
    sizes = 10**6, 10**6, 10**12, 10**12, peaks, 10**6, 10**5, 16, cost
    monkeypatch.setattr(plan, "paper_plans", lambda: [plan.Plan("OneForMore", *sizes)])
    text = plan_tables()
    assert text.count("| One-for-More") == 5  # size, memory at two precisions, hours twice
    assert "| One-for-More, protected " in text and "projecting a step" in text


def test_the_plan_of_all_settings_stands_in_two_tables():
    row = {"paper": "deco_diff", "setting": "mvtec", "models": 1, "steps": 10}
    shown = tables.rows([row | {"T4, h": 2.5, "disk, GB": 1.5}], percent=(), labels=2)
    trained, taken = re.sub(" +", " ", reproduce_tables(shown)).split("What it takes:")
    assert "| deco_diff | mvtec | 1 | 10 |" in trained
    assert "| deco_diff | mvtec | 2.5 | 1.5 |" in taken


def test_the_results_page_has_records_of_every_data_set_that_it_names():
    for folder in make.DATA_SETS:
        assert list((ROOT / "book" / "records" / folder).glob("*.json")), folder


# ------------------------------------------------------------------------------ what a page weighs


def test_the_book_shows_captions_and_no_bars():
    figure = {"name": "fig-01-a", "caption": "What to see.", "alt": "A gear."}
    bar = {"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": {}}}
    text = {"output_type": "stream", "name": "stdout", "text": "1"}
    cell = {"metadata": {"figure": figure, "tags": ["hide-input"]}, "outputs": [bar, text]}
    page = make.dressed({"metadata": {"widgets": {}}, "cells": [cell, {"metadata": {}}]})
    assert page["metadata"] == {} and page["cells"][0]["outputs"] == [text]
    look = page["cells"][0]["metadata"]["mystnb"]
    assert look["figure"] == {"name": "fig-01-a", "caption": "What to see."}
    assert look["image"] == {"alt": "A gear."}


def test_icons_that_no_page_names_are_dropped(tmp_path):
    folder = tmp_path / "_static/vendor/fontawesome/6"
    (folder / "css").mkdir(parents=True)
    rules = [f'.fa-{name}:before{{content:"\\f0{n}"}}' for n, name in ((10, "bars"), (11, "gem"))]
    (folder / "css/all.min.css").write_text(".fa{x:y}" + "".join(rules))
    for name in ("js", "webfonts"):
        (folder / name).mkdir()
    (folder / "js/all.min.js").write_text("")
    script = '<script src="_static/vendor/fontawesome/6/js/all.min.js?d=1"></script>'
    (tmp_path / "a.html").write_text(f'<i class="fa fa-bars"></i>{script}')
    for _ in range(2):  # a second time, nothing more
        slim(tmp_path)
        assert (tmp_path / "a.html").read_text() == '<i class="fa fa-bars"></i>'
        assert (folder / "css/all.min.css").read_text() == ".fa{x:y}" + rules[0]
    assert not (folder / "js/all.min.js").exists()


def test_rules_for_what_no_page_has_are_dropped():
    css = '@charset "UTF-8";a{b:c}.in,.out{d:e}.out .in{x:y}'
    css += "@media print{.out{f:g}.in:not(.in,p){h:i}}"
    kept = '@charset "UTF-8";a{b:c}.in{d:e}@media print{.in:not(.in,p){h:i}}'
    assert used(css, {"in"}) == kept and used("@media print{.out{f:g}}", {"in"}) == ""
    assert used("@font-face{src:url(a.woff)}", set()) == "@font-face{src:url(a.woff)}"


# -------------------------------------------------------------------------------------- check_pages


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//cdn.example/x.css">',
        '<img src="http://cdn.example/x.png">',
        '<img srcset="https://cdn.example/x.png 2x">',
        '<p style="background: url(https://cdn.example/x.png)">',
        '<style>@import "https://cdn.example/x.css";</style>',
        '<iframe src="https://cdn.example/"></iframe>',
    ],
)
def test_whatever_loads_from_another_host_is_found(tmp_path, html):
    (tmp_path / "page.html").write_text(html)
    (found,) = problems(tmp_path)
    assert "page.html" in found and "another host" in found


def test_a_style_sheet_that_loads_a_font_from_another_host_is_found(tmp_path):
    (tmp_path / "x.css").write_text("@font-face { src: url('https://cdn.example/f.woff2') }")
    assert len(problems(tmp_path)) == 1


def test_a_missing_local_file_is_found(tmp_path):
    (tmp_path / "page.html").write_text('<img src="gone.png">')
    (found,) = problems(tmp_path)
    assert "gone.png" in found and "not there" in found


def test_links_data_and_local_files_are_no_problem(tmp_path):
    (tmp_path / "a b.png").write_bytes(b"")
    (tmp_path / "page.html").write_text(
        '<a href="https://example.org">out</a><link rel="canonical" href="https://example.org">'
        '<img src="data:image/png;base64,AAAA"><img src="a%20b.png?v=1">'
        "<style>/* url(https://example.org/x) */ p { fill: url(#g) }</style>"
    )
    assert problems(tmp_path) == []


def test_what_a_card_took_is_shown_from_its_record():
    text = card_tables(ROOT / "bench" / "h100.json")
    assert "| DiffusionAD" in text and "too large" in text
    assert "commit c50c077" in text and "0.44 s, 48 GiB" in text
    assert "compiled beside a training" in text


def test_what_bench_writes_of_a_card_can_be_shown(tmp_path):
    rows = [Row("card", "DecoDiff: training step, batch 2, tf32", 0.5)]
    rows += [Row("card", "DecoDiff: training step, batch 2, tf32: memory", 2**31 / 1e9, "GB")]
    rows += [Row("card", "DecoDiff: training step, batch 2, bf16, compiled", note="out of memory")]
    rows += [Row("card", "DecoDiff: prediction of 1, bf16, an image", 0.25)]
    rows += [Row("card", "DecoDiff: a step of fit, batch 2, bf16", 1.1, "s", "bare loop", 1.0)]
    rows += [Row("card", "OneForMore: gathering, an image", 2.0)]
    record = {"device": "card", "versions": {"torch": "2"}, "commit": "abc"}
    record["rows"] = [row.to_dict() for row in rows]
    (tmp_path / "card.json").write_text(json.dumps([record]))
    text = card_tables(tmp_path / "card.json")
    assert "| method | batch | TF32 | bf16, compiled | `fit` to a bare loop |" in text
    assert "| DeCo-Diff | 2 | 0.50 s, 2 GiB | too large | 1.10 |" in text
    assert "| DeCo-Diff | 1 | 250 ms |" in text
    assert "| One-for-More: gathering, an image | 2 s |" in text


def test_runs_and_variants_stand_in_tables_with_their_commands(tmp_path):
    rows = [
        {"task": k, "category": c, "image_auroc": v, "pixel_ap": v / 2, "loss": 1.0}
        for k, c, v in ((0, "gear", 0.9), (1, "gear", 0.7), (1, "board", 0.8))
    ]
    run = {"tasks": [["gear"], ["board"]], "rows": rows, "taken": [{}, {}]}
    (tmp_path / "runs").mkdir()
    for name in ("2-second_one", "1-first"):
        record = {"commands": [f"continual {name}"], "continual": run}
        (tmp_path / "runs" / f"{name}.json").write_text(json.dumps(record))
    text = continual_runs(tmp_path / "runs")
    assert text.index("| first") < text.index("| second one") < text.index("continual 1-first")
    assert "| first | 70.0 | 80.0 | 35.0 | 40.0 |" in re.sub(" +", " ", text)
    save_record(tmp_path / "means" / "a_b.json", {"gear": 0.5}, commands=["evaluate"])
    text = re.sub(" +", " ", mean_table(tmp_path / "means"))
    assert "| a b | 50.0 | 50.0 |" in text and "evaluate\n```" in text
