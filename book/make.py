"""Run the notebooks and build the book.

    python book/make.py            run the notebooks that changed, then build _build/html
    python book/make.py run        run every notebook now, as tests
    python book/make.py run 03     run those whose names begin so
    python book/make.py pages      build what changed of the pages, from what has run so far

A notebook runs once for both: the executed copy is kept in `build/notebooks` together with the
fingerprint of everything that its result depends on, and the book is made from those copies.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import yaml

from cards import buttons, cards
from check_pages import problems
from diffad_ref.tools.settings import plan_table
from generated import (
    card_tables,
    continual_runs,
    continual_table,
    interval_table,
    mean_table,
    plan_tables,
    reproduce_tables,
    reproduced,
    result_tables,
    room_section,
    status_section,
)
from house import house_page
from real_maps import map_pictures
from slim import slim

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
EXECUTED = BUILD / "notebooks"  # copies of the notebooks, with their outputs
RECORD = BUILD / "notebooks.json"  # what happened when they ran
SOURCE = BUILD / "source"  # what Sphinx reads
HTML = ROOT / "_build" / "html"

DATA_SETS = ("toy", "mvtec", "tile")  # folders of book/records, a file of tables each


def versions() -> dict[str, str]:
    """What the notebooks ran on."""
    packages = ("torch", "torchvision", "diffusers", "accelerate", "numpy", "scikit-learn")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def fingerprint(notebook: Path) -> str:
    """Hash of what a notebook's result depends on: itself, the package, versions, profile."""
    parts = [notebook, *sorted((ROOT / "diffad_ref").rglob("*"))]
    digest = hashlib.sha256(json.dumps(versions()).encode())
    digest.update(os.environ.get("DIFFAD_PROFILE", "").encode())
    for path in parts:
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def read_record() -> dict[str, dict]:
    """Outcome of the last run of each notebook, by name."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def run(notebooks: list[Path]) -> bool:
    """Run notebooks with `pytest --nbmake`, keep the executed copies, record what happened."""
    if not notebooks:
        return True
    EXECUTED.mkdir(parents=True, exist_ok=True)
    record = read_record()
    for notebook in notebooks:
        record.pop(notebook.stem, None)  # so that an interrupted run leaves no stale entry
        shutil.copy(notebook, EXECUTED)
    RECORD.write_text(json.dumps(record, indent=1))

    report = BUILD / "notebooks.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-v", "--nbmake", "--overwrite"]
    command += ["--nbmake-kernel=python3", f"--junitxml={report}"]
    command += ["--nbmake-timeout=1200"]  # seconds a cell, for machines that are busy
    keys = {notebook.stem: fingerprint(notebook) for notebook in notebooks}
    done = subprocess.run(command + [str(EXECUTED / n.name) for n in notebooks], cwd=ROOT)

    for case in ElementTree.parse(report).iter("testcase"):
        name = Path(case.get("name") or case.get("classname")).stem
        record[name] = {
            "key": keys[name],
            "passed": case.find("failure") is None and case.find("error") is None,
            "seconds": float(case.get("time")),
            "finished": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[1],  # processes that wanted to run, in the last five minutes
            "versions": versions(),
        }
    RECORD.write_text(json.dumps(record, indent=1))
    return done.returncode == 0


def has_to_run(notebook: Path, record: dict[str, dict]) -> bool:
    """Whether no passed run of exactly this notebook with exactly this package is at hand."""
    last = record.get(notebook.stem, {})
    fresh = last.get("passed") and last["key"] == fingerprint(notebook)
    return not fresh or not (EXECUTED / notebook.name).exists()


def dressed(notebook: dict) -> dict:
    """A notebook as the book shows it: figures with captions, and without progress bars.

    A cell that draws has the metadata ``"figure": {"name": ..., "caption": ..., "alt": ...}``.
    """
    notebook["metadata"].pop("widgets", None)
    for cell in notebook["cells"]:
        bar = "application/vnd.jupyter.widget-view+json"
        if "outputs" in cell:
            cell["outputs"] = [o for o in cell["outputs"] if bar not in o.get("data", {})]
        if figure := cell["metadata"].pop("figure", None):
            look = {"figure": {k: figure[k] for k in ("name", "caption")}}
            cell["metadata"]["mystnb"] = look | {"image": {"alt": figure["alt"]}}
    return notebook


def stage(notebooks: list[Path]) -> None:
    """Lay out what Sphinx reads: settings, pages, executed notebooks, generated tables."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(ROOT / "book", SOURCE / "book", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(ROOT / name, SOURCE)
    (SOURCE / "notebooks").mkdir()
    for notebook in notebooks:
        ran = EXECUTED / notebook.name
        page = dressed(json.loads((ran if ran.exists() else notebook).read_text()))
        (SOURCE / "notebooks" / notebook.name).write_text(json.dumps(page))

    record = read_record()
    repository = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
    generated = SOURCE / "book" / "_generated"
    generated.mkdir()
    (generated / "start.md").write_text(buttons(notebooks, repository))
    (generated / "cards.md").write_text(cards(notebooks, record, repository))
    for name in DATA_SETS:
        found = result_tables(ROOT / "book" / "records" / name)
        (generated / f"results_{name}.md").write_text(found)
    ablations = interval_table(ROOT / "book" / "records" / "deco_diff_ablations")
    (generated / "deco_diff_ablations.md").write_text(ablations)
    continual = ROOT / "diffad_ref" / "weights" / "one_for_more_toy_3.json"
    (generated / "continual.md").write_text(continual_table(continual, "update|gamma"))
    for name in ("mvtec_continual", "toy_continual", "toy_wide_continual"):
        (generated / f"{name}.md").write_text(continual_runs(ROOT / "book" / "records" / name))
    for name in ("mvtec_features", "toy_features"):
        (generated / f"{name}.md").write_text(mean_table(ROOT / "book" / "records" / name))
    runs = reproduced(ROOT / "book" / "records" / "reproduce")
    (generated / "reproduced.md").write_text(runs)
    (generated / "plan.md").write_text(plan_tables())
    (generated / "room.md").write_text(room_section())
    (generated / "reproduce.md").write_text(reproduce_tables(plan_table()))
    mvtec = Path(os.environ.get("DIFFAD_MVTEC", ROOT / "data" / "mvtec_ad"))
    shown = map_pictures(mvtec, ROOT / "runs", generated / "mvtec_maps.png")
    (generated / "mvtec_maps.md").write_text(shown)
    card = ROOT / "bench" / "h100.json"
    (generated / "card.md").write_text(card_tables(card))
    (generated / "house.md").write_text(house_page())
    (generated / "status.md").write_text(status_section(notebooks, record))


def render(everything: bool) -> bool:
    """Build all pages, or those that changed, with warnings as errors; check what they load."""
    command = [Path(sys.executable).with_name("jupyter-book"), "build", str(SOURCE)]
    command += ["--path-output", str(ROOT), "-W", "--keep-going"]
    if everything:
        shutil.rmtree(HTML, ignore_errors=True)
        command.append("--all")
    if subprocess.run(command, cwd=ROOT).returncode:
        return False
    slim(HTML)
    found = problems(HTML)
    print("\n".join(found) or "Every page loads only files of this book.")
    return not found


def main() -> int:
    """Exit status 0 only if every notebook passed and the book has no warning."""
    task, *names = sys.argv[1:] or ["book"]
    if task not in ("book", "run", "pages"):
        sys.exit(__doc__)
    notebooks = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    if task == "run":
        chosen = [n for n in notebooks if not names or n.name.startswith(tuple(names))]
        return 0 if run(chosen) else 1
    record, passed = read_record(), True
    if task == "book":
        passed = run([notebook for notebook in notebooks if has_to_run(notebook, record)])
    stage(notebooks)  # also after a failure: the status page then says which notebook failed
    built = render(everything=task == "book")
    print(f"\nThe book: {HTML / 'index.html'}" if built else "\nThe book has errors, see above.")
    return 0 if passed and built else 1


if __name__ == "__main__":
    sys.exit(main())
