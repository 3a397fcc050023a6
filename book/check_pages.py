"""Check that a built page loads nothing from another host, and nothing that is missing.

Links that a reader may click lead anywhere; what a browser fetches by itself must be a file of
this book, so that it reads the same on a train, from a memory stick and in ten years.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Attributes that make a browser fetch something without a click.
LOADING = {
    ("audio", "src"),
    ("embed", "src"),
    ("iframe", "src"),
    ("img", "src"),
    ("img", "srcset"),
    ("input", "src"),
    ("link", "href"),
    ("object", "data"),
    ("script", "src"),
    ("source", "src"),
    ("source", "srcset"),
    ("track", "src"),
    ("video", "poster"),
    ("video", "src"),
}
# Kinds of <link> that only name another page.
NAMING = {"author", "canonical", "help", "index", "license", "next", "prev", "search"}
IN_STYLE = re.compile(r"""url\(\s*['"]?([^'")]+)|@import\s+['"]([^'"]+)""")


class Loads(HTMLParser):
    """Collects what a page fetches."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.in_style = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Keep addresses of loading attributes and of inline styles."""
        values = {key: value or "" for key, value in attributes}
        self.in_style = tag == "style"
        if tag == "link" and set(values.get("rel", "").split()) & NAMING:
            return
        self.found += [v.split(" ")[0] for k, v in values.items() if (tag, k) in LOADING and v]
        self.found += in_style(values.get("style", ""))

    def handle_data(self, data: str) -> None:
        """Keep addresses of `<style>` blocks."""
        if self.in_style:
            self.found += in_style(data)
            self.in_style = False


def in_style(css: str) -> list[str]:
    """Addresses that a style sheet fetches."""
    css = re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL)
    return [first or second for first, second in IN_STYLE.findall(css)]


def loads(path: Path) -> list[str]:
    """What a browser fetches for a page or a style sheet."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".css":
        return in_style(text)
    page = Loads()
    page.feed(text)
    return page.found


def problems(folder: Path) -> list[str]:
    """Sentences about what the pages below a folder load and should not.

    Parameters
    ----------
    folder : Path
        The built book.

    Returns
    -------
    list of str
        Empty when every page loads only files that are there.
    """
    found = []
    pages = [path for path in folder.rglob("*.html") if "_static" not in path.parts]
    for path in sorted([*pages, *folder.rglob("*.css")]):
        for address in loads(path):
            parts = urlsplit(address)
            page = path.relative_to(folder)
            if parts.scheme == "data" or address.startswith("#"):
                continue
            if parts.scheme or parts.netloc:
                found.append(f"{page} loads {address[:100]} from another host")
            elif not (path.parent / unquote(parts.path)).exists():
                found.append(f"{page} loads {address[:100]}, which is not there")
    return found
