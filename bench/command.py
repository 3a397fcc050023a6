"""The command: which topics, on what, and where the table goes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench import card, denoising, memory, metrics, steps, svd, synthesis
from bench.table import Row, heading, to_markdown
from diffad_ref.checkpoints import write_text
from diffad_ref.tools.records import device_name, versions

TOPICS: dict[str, Callable[[torch.device], list[Row]]] = {
    "metrics": metrics.rows,
    "memory": memory.rows,
    "synthesis": synthesis.rows,
    "denoising": denoising.rows,
    "steps": steps.rows,
    "svd": svd.rows,
    "card": card.rows,
}
TABLE = Path("build/bench.md")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for and write the table."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    rows: list[Row] = []
    for name in options.only:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        rows += TOPICS[name](device)
    text = f"{heading(device, options.threads)}\n\n{to_markdown(rows)}\n"
    write_text(text, TABLE)
    if options.json is not None:
        record = {"device": device_name(device), "versions": versions()}
        record["rows"] = [row.to_dict() for row in rows]
        write_text(json.dumps(record, indent=1) + "\n", options.json)
    print(text)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.py", description="How fast the parts are that have a target."
    )
    parser.add_argument(
        "--only", type=chosen, default=list(TOPICS), help=f"some of {','.join(TOPICS)}"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="for torch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write them there, too")
    return parser.parse_args(arguments)


def chosen(names: str) -> list[str]:
    """Topics in a list with commas; an unknown one is refused together with what there is."""
    topics = [name.strip() for name in names.split(",")]
    if unknown := [name for name in topics if name not in TOPICS]:
        raise argparse.ArgumentTypeError(
            f"unknown topic {', '.join(map(repr, unknown))}; there are {', '.join(TOPICS)}"
        )
    return topics
