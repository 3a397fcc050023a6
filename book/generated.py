"""Tables of the book that come from files and runs, so that no number in them is typed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from diffad_ref.continual import Continual
from diffad_ref.tools import plan, tables


def markdown_table(rows: Sequence[dict]) -> str:
    """Rows as a Markdown table; the columns are the keys, in the order they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def minutes(seconds: float) -> str:
    """A duration for people."""
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def headline(notebook: Path) -> tuple[str, str]:
    """Title and question of a notebook: its first line and the *italic* paragraph below it."""
    first = "".join(json.loads(notebook.read_text())["cells"][0]["source"])
    found = re.match(r"# (.+)\n+\*([^*]+\?)\*(?:\n|\Z)", first)
    if not found:
        raise ValueError(f"{notebook.name} does not begin with '# Title' and '*Question?*'")
    return found[1].strip(), " ".join(found[2].split())


def notebook_table(notebooks: Sequence[Path], record: dict, repository: dict) -> str:
    """For the landing page: what each notebook asks, how long it ran, where to open it."""
    colab = repository["url"].replace(
        "https://github.com", "https://colab.research.google.com/github"
    )
    rows = []
    for notebook in notebooks:
        title, question = headline(notebook)
        link = f"{colab}/blob/{repository['branch']}/notebooks/{notebook.name}"
        ran = record.get(notebook.stem)
        rows.append(
            {
                "Notebook": f"[{title}](../notebooks/{notebook.name})",
                "Question": question,
                "Run time": minutes(ran["seconds"]) if ran else "not run",
                "Open": f"[Colab]({link}){{.colab}}",
            }
        )
    return markdown_table(rows)


def status_page(notebooks: Sequence[Path], record: dict) -> str:
    """The page that says which notebook ran, when, for how long, and on what."""
    rows = []
    for notebook in notebooks:
        ran = record.get(notebook.stem, {})
        outcome = {True: "passed", False: "**failed**", None: "not run"}[ran.get("passed")]
        rows.append(
            {
                "Notebook": f"[{headline(notebook)[0]}](../notebooks/{notebook.name})",
                "Outcome": outcome,
                "Run time": minutes(ran["seconds"]) if ran else "",
                "Finished": ran.get("finished", ""),
                "Cores": ran.get("cores", ""),
            }
        )
    used = {json.dumps(record[n.stem]["versions"]) for n in notebooks if n.stem in record}
    stacks = [" · ".join(f"{k} {v}" for k, v in json.loads(stack).items()) for stack in used]
    return (
        "# Execution status\n\n"
        "Every notebook runs from its first cell to its last before this book is built, and its\n"
        "`assert` lines check what the text claims. This page is written by that run.\n\n"
        + markdown_table(rows)
        + "\nVersions: "
        + "; ".join(sorted(stacks))
        + ".\n"
    )


def result_tables(records: Path, names: dict[str, str]) -> str:
    """Our own numbers, one section for each folder of records that `evaluate --save` wrote.

    Parameters
    ----------
    records : Path
        Has a folder for each data set, with a JSON file for each detector.
    names : dict
        Title of the section for each folder, in the order of the page.
    """
    parts = []
    for folder, title in names.items():
        found = {p.stem.replace("_", " "): p for p in (records / folder).glob("*.json")}
        found = {name: json.loads(path.read_text()) for name, path in found.items()}
        reports = {name: tables.from_plain(record["report"]) for name, record in found.items()}
        order = sorted(reports, key=lambda name: reports[name].mean["pixel_ap"])
        reports = {name: reports[name] for name in order}
        best = reports[order[-1]]
        several = len(best.table) > 2  # categories, and their mean
        table = tables.compare(reports, (*tables.METRICS, "seconds_per_image"))
        costs = [found[name].get("cost", {}) for name in order]
        table.frame["s to train"] = [cost.get("training seconds") for cost in costs]
        table.frame["MB"] = [cost.get("megabytes") for cost in costs]
        parts += [f"### {title}\n", f"{table}\n"]
        limits = [{"method": n} | _limits(found[n]) for n in order if "intervals" in found[n]]
        if limits:
            parts.append(f"With 95 % confidence intervals:\n\n{markdown_table(limits)}")
        for metric in ("image_auroc", "pixel_ap"):
            kinds = tables.compare_kinds(reports, metric)
            shown = kinds if several else turned(kinds)
            parts.append(f"By kind of defect, {tables.HEADERS[metric]}:\n\n{shown}\n")
        if several:
            parts.append(f"By category, {order[-1]}:\n\n{tables.by_category(best)}\n")
        parts.append(made_by(line for name in order for line in found[name]["commands"]))
    return "\n".join(parts)


def turned(kinds: tables.Shown) -> tables.Shown:
    """A table of `compare_kinds` for one category, with a row for each method."""
    frame = kinds.frame.droplevel("category").T.rename_axis("method")
    return tables.Shown(frame, tuple(frame), best="column")


def made_by(commands: Iterable[str]) -> str:
    """The commands below a table, each of them once."""
    listing = "\n".join(dict.fromkeys(commands))
    return f"Made by\n\n```bash\n{listing}\n```\n"


def interval_table(records: Path) -> str:
    """Variants of one method, with 95 % confidence intervals, from what `evaluate --save` wrote.

    Parameters
    ----------
    records : Path
        Folder with a JSON file for each variant; names sort them, up to the first "-".
    """
    rows, commands = [], []
    for path in sorted(records.glob("*.json")):
        record = json.loads(path.read_text())
        rows.append({"Variant": path.stem.partition("-")[2].replace("_", " ")} | _limits(record))
        commands += record["commands"]
    return f"{markdown_table(rows)}\n{made_by(commands)}"


def _limits(record: dict) -> dict[str, str]:
    """Means with their confidence intervals, in per cent."""
    mean, row = tables.from_plain(record["report"]).mean, {}
    for metric in ("image_auroc", "pixel_auroc", "pixel_ap"):
        low, high = (100 * value for value in record["intervals"][metric])
        row[tables.HEADERS[metric]] = f"{100 * mean[metric]:.1f} ({low:.1f}–{high:.1f})"
    return row


def continual_table(description: Path) -> str:
    """Runs of several tasks in a row, from the record beside the weights of the last task."""
    runs = json.loads(description.read_text())["record"]["runs"]
    table = tables.summarise({name: Continual(**run["continual"]) for name, run in runs.items()})
    return f"{table}\n\n{made_by(run['command'] for run in runs.values())}"


def continual_runs(records: Path) -> str:
    """Runs of several tasks in a row, from what `continual --save` wrote; names sort them."""
    found = {p.stem.partition("-")[2]: json.loads(p.read_text()) for p in sorted(records.glob("*"))}
    runs = {name.replace("_", " "): Continual(**run["continual"]) for name, run in found.items()}
    commands = made_by(line for run in found.values() for line in run["commands"])
    return f"{tables.summarise(runs)}\n\n{commands}"


def mean_table(records: Path) -> str:
    """Variants of one method by two metrics, from what `evaluate --save` wrote."""
    found = {p.stem.replace("_", " "): json.loads(p.read_text()) for p in records.glob("*.json")}
    reports = {name: tables.from_plain(found[name]["report"]) for name in sorted(found)}
    commands = made_by(line for name in sorted(found) for line in found[name]["commands"])
    return f"{tables.compare(reports, ('image_auroc', 'pixel_ap'))}\n\n{commands}"


def plan_tables() -> str:
    """What the papers' sizes cost: weights and arithmetic, memory, hours, protection."""
    plans = plan.paper_plans()
    parts = {
        "Size and arithmetic:": plan.size_table(plans),
        "Memory of a training step:": plan.memory_table(plans),
        "Hours of the whole recipe, at the measured shares of a GPU's peak:": plan.hours_table(
            plans
        ),
        "Protecting old tasks in One-for-More:": plan.protection_table(plans[-1].protection),
    }
    return "\n\n".join(f"{title}\n\n{table}" for title, table in parts.items()) + "\n"


def card_tables(record: Path) -> str:
    """What one card took at last, from its records: training steps, then predictions.

    The bf16 figures of the record before stand beside them.
    """
    before, now = json.loads(record.read_text())[-2:]
    steps, predictions, earlier = [], [], f"bf16 at {before['commit']}"
    for row in now["steps"]:
        old = _same(row, before["steps"])
        line = _of_method(row) | {"batch": row["batch"]}
        line |= {kind: _step(row[kind]) for kind in ("float32", "tf32", "bf16")}
        fit = row.get("fit")
        line |= {earlier: _step(old["bf16"]), "`fit` to a bare loop": f"{fit:.2f}" if fit else ""}
        steps.append(line)
    for row in now["predictions"]:
        old = _same(row, before["predictions"])
        cells = {"float32": row["float32"], "bf16": row["bf16"], earlier: old["bf16"]}
        cells["bf16, compiled"] = row.get("compiled")
        line = _of_method(row) | {"images at a time": row["batch"]}
        predictions.append(line | {k: "" if v is None else f"{v:.0f} ms" for k, v in cells.items()})
    where = f"{now['card']}, PyTorch {now['torch']}, {now['pixels']} pixels, random weights"
    return (
        f"Measured at commit {now['commit']} on one {where}. A training step:\n\n"
        f"{markdown_table(steps)}\nA prediction, for each image:\n\n{markdown_table(predictions)}\n"
        f"{now.get('note', '')}\n"
    )


def _of_method(row: dict) -> dict:
    names = {"DecoDiff": "DeCo-Diff", "OneForMore": "One-for-More"}
    return {"method": names.get(row["method"], row["method"])}


def _same(row: dict, others: list[dict]) -> dict:
    return next(o for o in others if (o["method"], o["batch"]) == (row["method"], row["batch"]))


def _step(cell: dict | None) -> str:
    words = "too large" if cell is None else f"{cell['seconds']:.2f} s"
    return words + (f", {cell['GiB']:.0f} GiB" if cell and "GiB" in cell else "")
