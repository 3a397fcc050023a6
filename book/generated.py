"""Tables of the book that come from files and runs, so that no number in them is typed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from pandas import DataFrame, Index

from diffad_ref.continual import Continual
from diffad_ref.evaluation import Report
from diffad_ref.tools import plan, tables
from diffad_ref.tools.protection import protection_table
from diffad_ref.tools.reproduce import means
from diffad_ref.tools.settings import setting_of


def markdown_table(rows: Sequence[dict], numbers: bool = False) -> str:
    """Rows as a Markdown table; the columns are the keys, in the order they first appear.

    With `numbers`, all columns but the first are aligned to the right.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    sides = ["---"] + ["--:" if numbers else "---"] * (len(columns) - 1)
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join(sides) + " |"]
    lines += ["| " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def folded(title: str, text: str) -> str:
    """What a reader opens only if it is wanted."""
    return f":::{{dropdown}} {title}\n{text.strip()}\n:::\n"


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


def _chapter(notebook: Path) -> str:
    """Number and title of a chapter, with a link."""
    number = re.match(r"\d+", notebook.stem)
    words = f"{int(number[0])}. " if number else ""
    return f"{words}[{headline(notebook)[0]}](../notebooks/{notebook.name})"


def status_section(notebooks: Sequence[Path], record: dict) -> str:
    """Which notebook ran, with which outcome, when, for how long, and on what."""
    rows = []
    for notebook in notebooks:
        ran = record.get(notebook.stem, {})
        outcome = {True: "passed", False: "**failed**", None: "not run"}[ran.get("passed")]
        rows.append(
            {
                "Chapter": _chapter(notebook),
                "Outcome": outcome,
                "Run time": minutes(ran["seconds"]) if ran else "",
                "Finished": ran.get("finished", ""),
            }
        )
    runs = [record[notebook.stem] for notebook in notebooks if notebook.stem in record]
    used = {json.dumps(run["versions"]) for run in runs}
    stacks = [" · ".join(f"{k} {v}" for k, v in json.loads(stack).items()) for stack in used]
    words = "Versions: " + "; ".join(sorted(stacks)) + "." if stacks else ""
    return f"{markdown_table(rows)}\n{_machine(runs)}{words}\n"


def _machine(runs: Sequence[dict]) -> str:
    """How many cores the times belong to, and whether the machine had other work as well."""
    if not runs:
        return ""
    cores = sorted({run["cores"] for run in runs})
    words = f"The times are those of {' or '.join(map(str, cores))} CPU cores. "
    loads = [(run["load"], run["cores"]) for run in runs if "load" in run]
    busy = [load for load, count in loads if load > 1.25 * count]
    if busy:
        words += (
            f"The machine had other work as well: up to {max(busy):.1f} processes wanted to run at "
            "once. Where nothing else runs, the notebooks are quicker. "
        )
    elif len(loads) == len(runs):
        words += "Nothing else kept the machine busy. "
    return words


IMAGE = ("image_auroc", "image_ap", "image_f1max")
PIXEL = ("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro")


def result_tables(records: Path) -> str:
    """Our own numbers on one data set, from what `evaluate --save` wrote.

    Means of image and of pixel metrics stand first, then what each method costs. Kinds of defect,
    categories and commands are folded.

    Parameters
    ----------
    records : Path
        Folder with a JSON file for each detector.
    """
    found = {p.stem.replace("_", " "): json.loads(p.read_text()) for p in records.glob("*.json")}
    reports = {name: tables.from_plain(record["report"]) for name, record in found.items()}
    order = sorted(reports, key=lambda name: reports[name].mean["pixel_ap"])
    reports = {name: reports[name] for name in order}
    tables.compare(reports)  # refuses what was not judged on the same images
    several = len(reports[order[-1]].table) > 2  # categories, and their mean
    parts = [
        f"{'Images' if metrics is IMAGE else 'Pixels'}:\n\n{_means(reports, found, metrics)}"
        for metrics in (IMAGE, PIXEL)
    ]
    parts.append(f"What each method costs:\n\n{_costs(reports, found)}")
    for metric in ("image_auroc", "pixel_ap"):
        shown = kinds_as_rows(reports, metric) if several else kinds_as_columns(reports, metric)
        parts.append(folded(f"By kind of defect, {tables.HEADERS[metric]}", f"{shown}"))
    for metric in ("image_auroc", "pixel_ap") if several else ():
        shown = categories_as_rows(reports, metric)
        parts.append(folded(f"By category, {tables.HEADERS[metric]}", f"{shown}"))
    parts.append(made_by(line for name in order for line in found[name]["commands"]))
    return "\n".join(parts)


def _means(reports: dict[str, Report], found: dict[str, dict], metrics: Sequence[str]) -> str:
    """One row a method, in per cent, the best in bold, with the intervals that are known."""
    top = {m: max((r.mean[m] for r in reports.values()), default=None) for m in metrics}
    rows = []
    for name, report in reports.items():
        row = {"method": name}
        for metric in metrics:
            value = report.mean[metric]
            words = "" if value != value else f"{100 * value:.1f}"
            words = f"**{words}**" if len(reports) > 1 and value == top[metric] else words
            if metric in (limits := found[name].get("intervals", {})):
                words += f" {_interval(limits[metric])}"
            row[tables.HEADERS[metric].removeprefix("image ").removeprefix("pixel ")] = words
        rows.append(row)
    return markdown_table(rows, numbers=True)


def _costs(reports: dict[str, Report], found: dict[str, dict]) -> str:
    """Time and what must be kept, one row a method; a column that nobody has is left out."""
    frame = DataFrame(
        {
            "ms per image": [1000 * report.seconds_per_image for report in reports.values()],
            "s to train": [found[n].get("cost", {}).get("training seconds") for n in reports],
            "MB": [found[n].get("cost", {}).get("megabytes") for n in reports],
        },
        Index(list(reports), name="method"),
        dtype=float,
    )
    return f"{tables.Shown(frame.dropna(axis=1, how='all'))}\n"


def kinds_as_rows(reports: dict[str, Report], metric: str) -> tables.Shown:
    """A row for each category and kind, a column for each method."""
    shown = tables.compare_kinds(_alone(reports), metric)
    names = [", ".join(pair).replace("_", " ") for pair in shown.frame.index]
    frame = shown.frame.set_axis(Index(names, name="kind"))
    return tables.Shown(frame, shown.percent, shown.best)


def _alone(reports: dict[str, Report]) -> dict[str, Report]:
    """Of a method and its variants ("X, so") only the method."""
    return {n: r for n, r in reports.items() if n.rpartition(", ")[0] not in reports}


def categories_as_rows(reports: dict[str, Report], metric: str) -> tables.Shown:
    """A row for each category, a column for each method."""
    frame = DataFrame({name: report.table[metric] for name, report in _alone(reports).items()})
    return tables.Shown(frame.drop(index="mean"), tuple(frame), best="row")


def kinds_as_columns(reports: dict[str, Report], metric: str) -> tables.Shown:
    """A row for each method, for one category."""
    kinds = tables.compare_kinds(reports, metric)
    frame = kinds.frame.droplevel("category").T.rename_axis("method")
    return tables.Shown(frame, tuple(frame), best="column")


def made_by(commands: Iterable[str]) -> str:
    """The commands behind a table, each of them once, folded."""
    listing = "\n".join(map(wrapped, dict.fromkeys(commands)))
    return folded("Commands that made these numbers", f"```bash\n{listing}\n```")


def wrapped(command: str, width: int = 78) -> str:
    """A command over several lines, broken before its options."""
    first, *options = re.split(r" (?=--)", command)
    lines = [first]
    for option in options:
        if len(lines[-1]) + len(option) + 1 <= width:
            lines[-1] += f" {option}"
        else:
            lines.append(f"    {option}")
    return " \\\n".join(lines)


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
    return f"{markdown_table(rows, numbers=True)}\n{made_by(commands)}"


def _limits(record: dict) -> dict[str, str]:
    """Means with their confidence intervals, in per cent."""
    mean, row = tables.from_plain(record["report"]).mean, {}
    for metric in ("image_auroc", "pixel_auroc", "pixel_ap"):
        limits = _interval(record["intervals"][metric])
        row[tables.HEADERS[metric]] = f"{100 * mean[metric]:.1f} {limits}"
    return row


def _interval(limits: Sequence[float]) -> str:
    """An interval in per cent, which is not broken in two lines."""
    low, high = (100 * value for value in limits)
    return f"({low:.1f}–\N{WORD JOINER}{high:.1f})"


def continual_table(description: Path, chosen: str = "") -> str:
    """Runs of several tasks in a row, from the record beside the weights of the last task.

    Shown are those whose names match the pattern `chosen`; the commands are those of all. Beside
    what the run of these weights found stands what they are found to reach now.
    """
    record = json.loads(description.read_text())["record"]
    runs, parts = record["runs"], []
    shown = {n: Continual(**r["continual"]) for n, r in runs.items() if re.match(chosen, n)}
    parts.append(of_tasks(shown))
    if "report" in record:
        now, run = tables.from_plain(record["report"]).mean, shown["update"]
        values = [
            f"{tables.HEADERS[m]} {100 * now[m]:.1f} (in the run {100 * run.a_metric(m):.1f})"
            for m in ("image_auroc", "pixel_ap")
        ]
        parts.append(f"The weights of *update*, judged again: {', '.join(values)}.\n")
    commands = [run["command"] for run in runs.values()]
    if any("--energy" in command for command in commands):
        commands.insert(0, "# --energy is gone since: R Rᵀ keeps all, so no share must be chosen")
    return "\n".join([*parts, made_by(commands)])


def continual_runs(records: Path) -> str:
    """Runs of several tasks in a row, from what `continual --save` wrote; names sort them."""
    found = {p.stem.partition("-")[2]: json.loads(p.read_text()) for p in sorted(records.glob("*"))}
    runs = {name.replace("_", " "): Continual(**run["continual"]) for name, run in found.items()}
    commands = made_by(line for run in found.values() for line in run["commands"])
    return f"{of_tasks(runs)}\n{at_the_end(runs)}\n{commands}"


def at_the_end(runs: dict[str, Continual]) -> str:
    """What is known after the last task of the first task's products, and of all later ones."""
    first = next(run.tasks[0] for run in runs.values() if len(run.tasks) > 1)
    found = []
    for name, run in runs.items():
        rows = [row for row in run.rows if row["task"] == len(run.tasks) - 1]
        line = {"training": name}
        for metric in ("image_auroc", "pixel_ap"):
            for which in ("first", "later"):
                chosen = [r[metric] for r in rows if (r["category"] in first) == (which == "first")]
                line[f"{tables.HEADERS[metric]}, {which}"] = fmean(chosen)
        found.append(line)
    shown = tables.rows(found, percent=tuple(found[0])[1:])
    return f"At the end, products of the first task beside those of all later tasks:\n\n{shown}\n"


def of_tasks(runs: dict[str, Continual]) -> str:
    """What was known, forgotten and learned: a table for images, and one for pixels."""
    images = tables.summarise(runs, ("image_auroc",))
    parts = [("Image AUROC, and what holds of the whole run:", images)]
    pixels = tables.summarise(runs, ("pixel_ap",))
    known = [column for column in pixels.frame if column.endswith("pixel AP")]
    if known:
        parts.append(("Pixel AP:", tables.Shown(pixels.frame[known], pixels.percent)))
    for _, shown in parts:
        shown.frame.columns = [re.sub(" (image AUROC|pixel AP)$", "", c) for c in shown.frame]
        shown.percent = ("A", "FM", "new", "memory")
    return "\n".join(f"{title}\n\n{shown}\n" for title, shown in parts)


def mean_table(records: Path) -> str:
    """Variants of one method by two metrics, from what `evaluate --save` wrote."""
    found = {p.stem.replace("_", " "): json.loads(p.read_text()) for p in records.glob("*.json")}
    reports = {name: tables.from_plain(found[name]["report"]) for name in sorted(found)}
    commands = made_by(line for name in sorted(found) for line in found[name]["commands"])
    return f"{tables.compare(reports, ('image_auroc', 'pixel_ap'))}\n\n{commands}"


def reproduced(records: Path) -> str:
    """What `reproduce` found, beside what is published, from the `table.json` of its runs."""
    parts, commands = [], []
    for path in sorted(records.glob("*.json")):
        run = json.loads(path.read_text())
        paper, name, share = run["paper"], run["setting"], run["share of the recipe"]
        how = "a part" if isinstance(share, str) else f"{100 * share:.0f} %"  # with --steps
        words = (
            f"**`{paper} {name}`**. {run['categories']} categories, "
            f"{how} of the `{run['profile']}` recipe ({run['steps']:,} steps), "
            f"start: {run['start']}, {run['device']}, "
            f"{run['minutes since the last start']:.0f} minutes with judging."
        )
        parts.append(f"{words}\n\n{means(run, setting_of(paper, name))}\n")
        commands.append(run["command"])
    return "\n".join([*parts, made_by(commands)])


def plan_tables() -> str:
    """What the papers' sizes cost: weights and arithmetic, memory, hours, protection."""
    plans = plan.paper_plans()
    sizes, hours = plan.size_table(plans), plan.hours_table(plans)
    for shown in (sizes, hours):
        shown.frame.index = shown.frame.index.map(named)
    sizes.frame.columns = [column.replace(" a ", " per ") for column in sizes.frame]
    parts = {
        "Size and arithmetic (M: millions; TFLOP: 10¹² operations):": sizes,
        "Memory of a training step, in GB:": _memory(plans),
        "Hours of the whole recipe, at the measured shares of a GPU's peak:": hours,
        "What the protection of old tasks adds in One-for-More:": protection_table(
            plans[-1].protection
        ),
    }
    return "\n\n".join(f"{title}\n\n{table}" for title, table in parts.items()) + "\n"


def _memory(plans: Sequence[plan.Plan]) -> tables.Shown:
    """GB of a step with one image and with the recipe's batch."""
    found = [
        {
            "method": f"{named(p.method)}, {way}",
            "one image": p.memory(1, way),
            "recipe's batch": p.batch_size,
            "with that batch": p.memory(None, way),
        }
        for p in plans
        for way in p.peaks
    ]
    return tables.rows(found)


def room_section() -> str:
    """How many images a step of each method holds, by a card's memory and the way to compute."""
    shown = plan.room_table(plan.paper_plans())
    shown.frame.index = [f"{named(method)}, {way}" for method, way in shown.frame.index]
    shown.frame.index.name = "method"
    return f"{shown}\n"


def reproduce_tables(shown: tables.Shown) -> str:
    """The plan of all settings in two tables: what is trained, and what it takes."""
    costs = [column for column in shown.frame if column.endswith((", h", ", GB"))]
    halves = {
        "What is trained:": [column for column in shown.frame if column not in costs],
        "What it takes:": costs,
    }
    found = (f"{title}\n\n{tables.Shown(shown.frame[part])}" for title, part in halves.items())
    return "\n\n".join(found) + "\n"


STEP = re.compile(r"(\w+): training step, batch (\d+), (.+?)(: memory)?")
PREDICTION = re.compile(r"(\w+): prediction of (\d+), (.+), an image")
FIT = re.compile(r"(\w+): a step of fit, batch (\d+), bf16")


def card_tables(path: Path) -> str:
    """What one card took at last, from records of `bench.py`: steps, predictions, and the rest."""
    now, steps, predictions, rest = json.loads(path.read_text())[-1], {}, {}, []

    def line(table: dict, known: re.Match, size: str) -> dict:
        method, count = known.group(1, 2)
        return table.setdefault((method, count), {"method": named(method), size: count})

    for row in now["rows"]:
        what, here = row["measured"], row["here"]
        if known := STEP.fullmatch(what):
            cells, how = line(steps, known, "batch"), known[3].replace("tf32", "TF32")
            if known[4]:
                cells[how] += f", {1e9 * here / plan.GB:.0f} GiB"
            else:
                cells[how] = "too large" if here is None else f"{here:.2f} s"
        elif known := FIT.fullmatch(what):
            line(steps, known, "batch")["`fit` to a bare loop"] = f"{1 / row['ratio']:.2f}"
        elif known := PREDICTION.fullmatch(what):
            cell = "too large" if here is None else f"{1000 * here:.0f} ms"
            line(predictions, known, "images at a time")[known[3]] = cell
        elif here is not None:
            rest.append({"what": named(what), "took": f"{here:.3g} {row['unit']}"})
    where = f"{now['device']}, PyTorch {now['versions']['torch']}, 256 pixels, random weights"
    parts = {
        f"Measured at commit {now['commit']} on one {where}. A training step:": steps.values(),
        "A prediction, for each image:": predictions.values(),
        "What else was measured:": rest,
    }
    texts = [f"{title}\n\n{markdown_table(x, numbers=True)}" for title, x in parts.items() if x]
    return "\n".join([*texts, now.get("note", ""), ""])


def named(method: str) -> str:
    """A method's name in the papers, for the name of its class."""
    names = {"DecoDiff": "DeCo-Diff", "OneForMore": "One-for-More"}
    for found, name in (names | {"SegmentationOnly": "segmentation only"}).items():
        method = method.replace(found, name)
    return method
