"""One page to look at: heat maps of many images, the most abnormal first."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from diffad_ref.checkpoints import write_text

STYLE = """
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }
body { max-width: 75rem; margin: 1.5rem auto; padding: 0 1rem; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; }
figure { margin: 0; }
img { width: 100%; image-rendering: pixelated; border-radius: 4px; }
figcaption { overflow-wrap: anywhere; font-size: .85rem; }
b { font-variant-numeric: tabular-nums; }
"""


def write_sheet(rows: Sequence[dict], path: str | os.PathLike, title: str) -> None:
    """Write an HTML page that needs nothing but the pictures beside it.

    Parameters
    ----------
    rows : sequence of dict
        For each image its "name", "score" and "map", the latter relative to the page's folder.
    path : path
        Of the page.
    title : str
        Its heading.
    """
    figures = []
    for rank, row in enumerate(sorted(rows, key=lambda row: -row["score"]), 1):
        name, source = html.escape(str(row["name"])), quote(os.fsencode(row["map"]))
        figures.append(
            f'<figure><img src="{source}" loading="lazy" alt="{name} and its anomaly map">'
            f"<figcaption>{rank}. <b>{row['score']:.4g}</b> {name}</figcaption></figure>"
        )
    text = html.escape(title)
    write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{text}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{STYLE}</style><body><h1>{text}</h1>"
        "<p>Left the image, right the same with its anomaly map. The most abnormal come first. "
        "All maps share one colour scale.</p>"
        f"<main>{''.join(figures)}</main></body></html>\n",
        Path(path),
    )
