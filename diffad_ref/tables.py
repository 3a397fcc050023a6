"""Tables of numbers: per cent for people (Markdown, HTML), raw fractions for programs (CSV)."""

from __future__ import annotations

import csv
import html
import io
from dataclasses import dataclass

METRIC_HEADERS = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1max": "image F1max",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1max": "pixel F1max",
    "aupro": "AUPRO",
}
METRICS = tuple(METRIC_HEADERS)
HEADERS = METRIC_HEADERS | {
    "n_good": "good",
    "n_defective": "defective",
    "seconds_per_image": "s per image",
}


@dataclass(repr=False)
class Table:
    """Rows of named cells, shown in per cent as Markdown or HTML, or raw as CSV.

    Attributes
    ----------
    columns : tuple of str
    rows : list of dict
        Fractions for metrics; None for what is not defined, shown as an empty cell.
    best : bool
        Set the largest fraction of each column in bold.
    across : bool
        All columns but the labels are one metric of rival methods: the best stands in each row.
    labels : int
        How many columns from the left name the row.
    fractions : tuple of str
        Columns that are shown in per cent, besides the metrics.

    Raises
    ------
    ValueError
        A column that no row has.
    """

    columns: tuple[str, ...]
    rows: list[dict]
    best: bool = False
    across: bool = False
    labels: int = 1
    fractions: tuple[str, ...] = ()

    def __post_init__(self):
        unknown = set(self.columns).difference(*self.rows) if self.rows else set()
        if unknown:
            raise ValueError(f"unknown columns {sorted(unknown)}; known: {list(self.rows[0])}")

    def to_markdown(self) -> str:
        """GitHub-flavoured Markdown, numbers aligned to the right."""
        rule = [":--"] * self.labels + ["--:"] * (len(self.columns) - self.labels)
        lines = [[_plain(HEADERS.get(name, name)) for name in self.columns], rule]
        for row in self.rows:
            texts = [_plain(self._text(row, name)) for name in self.columns]
            bold = [self._is_best(row, name) for name in self.columns]
            lines.append([f"**{t}**" if b else t for t, b in zip(texts, bold, strict=True)])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def to_csv(self) -> str:
        """Comma-separated raw fractions, with the plain column names."""
        out = io.StringIO()
        writer = csv.DictWriter(out, self.columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return out.getvalue()

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(HEADERS.get(c, c))}</th>" for c in self.columns)
        body = ""
        for row in self.rows:
            body += "<tr>"
            for position, name in enumerate(self.columns):
                text = html.escape(self._text(row, name))
                text = f"<b>{text}</b>" if self._is_best(row, name) else text
                side = "left" if position < self.labels else "right"
                body += f'<td style="text-align:{side}">{text}</td>'
            body += "</tr>"
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def __repr__(self) -> str:
        return self.to_markdown()

    def _is_fraction(self, name: str) -> bool:
        rival = self.across and name in self.columns[self.labels :]
        return rival or name in METRICS or name in self.fractions

    def _text(self, row: dict, name: str) -> str:
        value = row.get(name)
        if value is None:
            return ""
        if self._is_fraction(name):
            return f"{100 * value:.1f}"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    def _is_best(self, row: dict, name: str) -> bool:
        if not self.best or not self._is_fraction(name) or row.get(name) is None:
            return False
        if self.across:
            rivals = [row.get(other) for other in self.columns[self.labels :]]
        else:
            rivals = [other.get(name) for other in self.rows]
        return row[name] == max(value for value in rivals if value is not None)


def _plain(text: str) -> str:
    """Keep a name from ending its Markdown cell."""
    return text.replace("|", "\\|")
