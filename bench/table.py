"""One table for everything that is measured."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

HEADERS = ("topic", "measured", "here", "against", "there", "ratio", "target", "met", "note")


@dataclass(frozen=True)
class Row:
    """A figure and what it is measured against.

    Attributes
    ----------
    topic, measured : str
    here : float or None
        What our code took, in `unit`; None if it was not measured, and then `note` says why.
    unit : str
    rival : str
        What it is measured against: other code, or a limit.
    there : float or None
        The same figure of the rival.
    target : float or None
        What the ratio must reach.
    note : str
    """

    topic: str
    measured: str
    here: float | None = None
    unit: str = "s"
    rival: str = ""
    there: float | None = None
    target: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times as much the rival needs: the larger, the better."""
        if self.here is None or self.there is None:
            return None
        return self.there / max(self.here, 1e-300)  # a difference may be 0; JSON knows no infinity

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none, or nothing was measured."""
        return None if self.ratio is None or self.target is None else self.ratio >= self.target

    def to_dict(self) -> dict:
        """All of it in types that JSON knows."""
        return asdict(self) | {"ratio": self.ratio, "met": self.met}


def to_markdown(rows: Sequence[Row]) -> str:
    """The rows as one Markdown table; the ratio says how many times as much the rival needs."""
    rule = [":--", ":--", "--:", ":--", "--:", "--:", "--:", ":--", ":--"]
    lines = [list(HEADERS), rule, *map(_cells, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(row: Row) -> list[str]:
    return [
        row.topic,
        row.measured,
        _figure(row.here, row.unit),
        row.rival,
        _figure(row.there, row.unit),
        "" if row.ratio is None else f"{row.ratio:.3g}",
        "" if row.target is None else f"{row.target:.3g}",
        {None: "", True: "yes", False: "no"}[row.met],
        row.note.replace("|", "\\|"),  # a bar would end the cell
    ]


def _figure(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.3g} {unit}".rstrip()


def heading(device: torch.device, threads: int) -> str:
    """One line that says on what was measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return f"**torch {torch.__version__}, device {name}, {threads} threads, CPU {_processor()}**"


def _processor(listing: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's name; Python itself does not know it on Linux."""
    if listing.exists():
        for line in listing.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
