"""Tables for people: per cent, the best in bold, as HTML in a notebook and Markdown in a shell.

Frames hold fractions; only what is shown here is in per cent.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import pandas as pd
from pandas import DataFrame
from pydantic import AfterValidator, Field
from typing_extensions import NotRequired, TypedDict

from diffad_ref.continual import Continual
from diffad_ref.detector import NotNegative, Number
from diffad_ref.evaluation import Report
from diffad_ref.metrics import METRICS

HEADERS = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1max": "image F1max",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1max": "pixel F1max",
    "aupro": "AUPRO",
    "n_good": "good",
    "n_defective": "defective",
    "seconds_per_image": "s per image",
}
COUNTS = ["n_good", "n_defective"]


@dataclass(repr=False, eq=False)
class Shown:
    """A frame that displays itself: HTML in a notebook, Markdown where it is printed.

    Attributes
    ----------
    frame : DataFrame
        Its index names the rows.
    percent : sequence of str
        Columns that hold fractions and are shown in per cent; by default the metrics.
    best : "column", "row" or None
        Where the largest fraction stands in bold.
    """

    frame: DataFrame
    percent: Sequence[str] = METRICS
    best: str | None = None

    def __repr__(self) -> str:
        """GitHub-flavoured Markdown."""
        texts = self._texts("**{}**", lambda text: text.replace("|", "\\|"))
        labels = texts.index.nlevels
        sides = ["left"] * labels + ["right"] * len(texts.columns)
        return _flat(texts).to_markdown(index=False, colalign=sides, disable_numparse=True)

    def _repr_html_(self) -> str:
        return _flat(self._texts("<b>{}</b>", html.escape)).to_html(escape=False, index=False)

    def _texts(self, strong: str, escape: Callable[[str], str]) -> DataFrame:
        """Every name and cell as a text, the best ones as `strong` says."""
        frame, along = self.frame, 1 if self.best == "row" else 0
        shares = frame[[c for c in frame if c in self.percent]].astype(float)
        top = shares.eq(shares.max(axis=along), axis=1 - along)

        def written(values, column=None) -> list[str]:
            texts = [escape(_text(value, column in shares)) for value in values]
            if self.best and column in shares:
                texts = [
                    strong.format(t) if b else t for t, b in zip(texts, top[column], strict=True)
                ]
            return texts

        def named(names) -> list[str]:
            return written("" if name is None else HEADERS.get(name, name) for name in names)

        levels = [written(frame.index.get_level_values(k)) for k in range(frame.index.nlevels)]
        index = pd.MultiIndex.from_arrays(levels, names=named(frame.index.names))
        cells = DataFrame({column: written(frame[column], column) for column in frame}, index)
        return cells.set_axis(named(frame), axis=1)


def _flat(texts: DataFrame) -> DataFrame:
    """The names of rows as columns, so that their headings stand in line with the others."""
    return texts.reset_index(names=texts.index.names, allow_duplicates=True)


def _text(value, percent: bool) -> str:
    if value is None or value != value:  # NaN
        return ""
    if percent:
        return f"{100 * value:.1f}"
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() or abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def rows(
    found: Sequence[dict],
    percent: Sequence[str] = METRICS,
    best: str | None = None,
    labels: int = 1,
) -> Shown:
    """Rows as a table; the first `labels` keys name them."""
    frame = DataFrame(found)
    return Shown(frame.set_index(list(frame.columns[:labels])), percent, best)


def by_category(report: Report) -> Shown:
    """One row a category, and the mean."""
    return Shown(report.table[[*METRICS, *COUNTS]])


def by_kind(report: Report, metrics=("image_auroc", "pixel_auroc", "pixel_ap")) -> Shown:
    """One row a kind of defect, against the good images of its category."""
    return Shown(report.kinds[[*metrics, "n_defective"]])


def joined(reports: Sequence[Report]) -> Report:
    """One report of models that judge different categories, without maps; with their mean.

    Raises ValueError if a category is in two of them, or they were judged in different ways.
    """
    first, *_ = reports
    if len({(r.detector, r.protocol, r.precision) for r in reports}) > 1:
        raise ValueError("reports of different detectors, protocols or precisions are not joined")
    table = pd.concat([report.table.drop(index="mean") for report in reports])
    if table.index.has_duplicates:
        twice = ", ".join(table.index[table.index.duplicated()])
        raise ValueError(f"categories in more than one report: {twice}")
    table.loc["mean"] = table.mean().where(~table.columns.isin(COUNTS), table.sum())
    images = pd.concat([report.images for report in reports], ignore_index=True)
    seconds = sum(report.seconds_per_image * len(report.images) for report in reports)
    return replace(
        first,
        table=table,
        kinds=pd.concat([report.kinds for report in reports]),
        images=images,
        seconds_per_image=seconds / len(images),
        maps=None,
        masks=None,
    )


def compare(reports: dict[str, Report], metrics=METRICS) -> Shown:
    """One row a report: the means over its categories, the best of each column in bold.

    Raises ValueError if the reports are not about the same images, or judged in different ways.
    """
    require_same_images(reports)
    frame = DataFrame({name: report.mean for name, report in reports.items()}).T
    frame.index.name = "method"
    if "seconds_per_image" in metrics:
        frame["seconds_per_image"] = [report.seconds_per_image for report in reports.values()]
    return Shown(frame[list(metrics)], best="column" if len(reports) > 1 else None)


def compare_kinds(reports: dict[str, Report], metric: str = "image_auroc") -> Shown:
    """One row a kind of defect, one column a report, for one metric; best in bold.

    Raises as `compare`.
    """
    require_same_images(reports)
    frame = pd.concat({name: report.kinds[metric] for name, report in reports.items()}, axis=1)
    return Shown(frame, tuple(reports), best="row" if len(reports) > 1 else None)


def require_same_images(reports: dict[str, Report]) -> None:
    if not reports:
        raise ValueError("there is no report to compare")
    first, *others = reports
    counts = {name: report.table[COUNTS].astype(int) for name, report in reports.items()}
    for name in others:
        one, other = reports[first], reports[name]
        paths = [sorted(r.images["path"]) for r in (one, other) if "path" in r.images]
        same = counts[name].equals(counts[first]) and one.kinds.index.equals(other.kinds.index)
        if not same or len(paths) == 2 and paths[0] != paths[1]:
            raise ValueError(f"{name!r} and {first!r} were not evaluated on the same images")
        if reports[name].protocol != reports[first].protocol:
            raise ValueError(
                f"{name!r} was judged by the protocol {reports[name].protocol}, {first!r} by "
                f"{reports[first].protocol}: such numbers cannot be compared"
            )


def after_tasks(run: Continual, metric: str = "image_auroc") -> Shown:
    """A continual run: one row a category, one column a task."""
    columns = [f"after task {k + 1}" for k in range(len(run.tasks))]
    found = []
    for k, task in enumerate(run.tasks):
        for category in task:
            values = run.values(metric, category)
            row = dict.fromkeys(columns) | dict(zip(columns[k:], values, strict=False))
            found.append({"category": category} | row)
    return rows(found, () if metric == "loss" else columns)


def summarise(runs: dict[str, Continual], metrics=("image_auroc", "pixel_ap")) -> Shown:
    """One row a run: A-metric (E1), forgetting FM (E2), plasticity ("new"), and FM by loss.

    "memory" is the mean share of a layer's directions that are taken after the last task. Metrics
    that a run lacks, such as those of pixels without masks, are left out.
    """
    known = [m for m in metrics if all(r[m] is not None for run in runs.values() for r in run.rows)]
    found = []
    for name, run in runs.items():
        several = len(run.tasks) > 1
        row = {"training": name} | {f"A {HEADERS[m]}": run.a_metric(m) for m in known}
        row |= {f"FM {HEADERS[m]}": run.forgetting(m) if several else None for m in known}
        row |= {f"new {HEADERS[m]}": run.plasticity(m) if several else None for m in known}
        row["FM loss"] = run.forgetting("loss") if several else None
        row["memory"] = run.share_taken()[-1] if run.taken[-1] else None
        found.append(row)
    shares = [f"{word} {HEADERS[m]}" for m in known for word in ("A", "FM", "new")] + ["memory"]
    frame = DataFrame(found).set_index("training").dropna(axis=1, how="all")
    order = [c for c in (*shares[:-1], "FM loss", "memory") if c in frame]
    return Shown(frame[order], shares)


# ---------------------------------------------------------------------------------------- as JSON


def _whole(found: list[dict]) -> list[dict]:
    names = [(row["category"], row.get("kind", "mean")) for row in found]
    if len(set(names)) < len(names) or "kind" not in found[0] and ("mean", "mean") not in names:
        raise ValueError("two rows have one name, or the mean is missing")
    return found


ROW = {"category": str} | dict.fromkeys(METRICS, Number | None)
ROW |= dict.fromkeys(COUNTS, NotNegative)
ROWS = Annotated[list[TypedDict("ROW", ROW)], Field(min_length=2), AfterValidator(_whole)]
KINDS = TypedDict("KIND", ROW | {"kind": str})
KINDS = Annotated[list[KINDS], Field(min_length=1), AfterValidator(_whole)]
REPORT = {"detector": str, "protocol": str, "seed": int, "precision": str}
REPORT |= {"seconds_per_image": float, "table": ROWS, "kinds": KINDS}
REPORT = TypedDict("REPORT", REPORT | {"images": NotRequired[list[dict]]})


def to_plain(report: Report) -> dict:
    """Everything of a report but maps and masks, in types that JSON knows."""
    frames = {
        "table": report.table.reset_index(),
        "kinds": report.kinds.reset_index(),
        "images": report.images,
    }
    plain = {
        name: frame.astype(object).where(frame.notna(), None).to_dict("records")
        for name, frame in frames.items()
    }
    names = ("detector", "protocol", "seed", "precision", "seconds_per_image")
    return {name: getattr(report, name) for name in names} | plain


def from_plain(plain: dict) -> Report:
    """A report (without maps) from what `to_plain` gave."""
    frames = {name: DataFrame(plain.get(name, [])) for name in ("table", "kinds", "images")}
    types = dict.fromkeys(METRICS, float) | dict.fromkeys(COUNTS, int)
    frames["table"] = frames["table"].set_index("category").astype(types)
    frames["kinds"] = frames["kinds"].set_index(["category", "kind"]).astype(types)
    return Report(**plain | frames)
