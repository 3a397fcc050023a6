"""Leave of the theme what the pages use: of its 2.5 MB for each page, less than 0.5."""

from __future__ import annotations

import re
from pathlib import Path

from fontTools.subset import Options, Subsetter, load_font, save_font

SCRIPT = re.compile(
    r"<(?:script|link)[^>]*fontawesome[^>]*(?:all\.min\.js|woff2)[^>]*>(?:</script>)?"
)
ICON = re.compile(r'^(?:\.fa-[\w-]+:{1,2}before,?)+\{content:"\\([0-9a-f]+)"\}')
CLASS = re.compile(r"\.([A-Za-z_][\w-]*)")
MENDED = {  # what a screen reader needs, and the theme or an extension does not say
    '<summary><span class="toctree-toggle"': '<summary aria-label="Pages below">'
    '<span class="toctree-toggle"',
    '<div role="list" class="citation-list">': '<div class="citation-list">',
}
EMPTY = re.compile(r"listItem\.appendChild\((\s*Search\.makeSearchSummary\([^)]*\))\s*\)")
LARGE = ("bootstrap.css", "sphinx-design.min.css")  # mostly for what this book has not


def slim(html: Path) -> None:
    """Drop the script that draws icons, and what no page names of icons and of large styles."""
    pages = {path: path.read_text() for path in html.rglob("*.html")}
    for path, text in pages.items():
        better = SCRIPT.sub("", text)
        for wrong, right in MENDED.items():
            better = better.replace(wrong, right)
        if better != text:
            path.write_text(better)
    static = html / "_static"
    search = static / "searchtools.js"  # it stumbles over a place without text
    if search.exists():
        search.write_text(EMPTY.sub(r'listItem.append(\1 ?? "")', search.read_text()))
    scripts = [p.read_text() for p in static.rglob("*.js") if "fontawesome" not in p.parts]
    names = set(re.findall(r"[A-Za-z_][\w-]*", "".join([*pages.values(), *scripts])))
    for path in static.rglob("*.css"):
        if path.name in LARGE:
            path.write_text(used(path.read_text(), names))
    styles = [p.read_text() for p in static.rglob("*.css") if p.name != "all.min.css"]
    for folder in (static / "vendor" / "fontawesome").glob("*"):
        _icons(folder, set(re.findall(r"\bfa-([\w-]+)", "".join([*pages.values(), *styles]))),
               set(re.findall(r"\\(f[0-9a-f]{3})\b", "".join(styles))))  # fmt: skip


def used(css: str, names: set[str]) -> str:
    """The rules of a style sheet that name no class, or one that is in use."""
    kept, start, depth = [], 0, 0
    for place in re.finditer(r"[{}]|;(?=[^{}]*[@.#\w][^{}]*\{)", css):
        depth += {"{": 1, "}": -1}.get(place[0], 0)
        if depth or place[0] == "{":
            continue
        head, brace, body = css[start : place.end()].partition("{")
        start = place.end()
        if head.lstrip().startswith(("@media", "@supports")) and brace:
            inner = used(body[:-1], names)
            kept += [f"{head}{{{inner}}}"] if inner.strip() else []
        elif not brace or head.lstrip().startswith("@"):
            kept.append(head + brace + body)
        else:
            alive = [one for one in _selectors(head) if set(CLASS.findall(one)) <= names]
            kept += [",".join(alive) + "{" + body] if alive else []
    return "".join(kept)


def _selectors(head: str) -> list[str]:
    """The parts of a list of selectors; a comma in brackets parts nothing."""
    head = re.sub(r"/\*.*?\*/", "", head, flags=re.DOTALL)
    return re.split(r",(?![^(]*\))", head)


def _icons(folder: Path, named: set[str], points: set[str]) -> None:
    """Keep the icons of these names and of these characters."""
    css, kept = folder / "css" / "all.min.css", []
    text = re.sub(r"/\*.*?\*/", "", css.read_text(), flags=re.DOTALL)
    text = re.sub(r',url\([^)]*\.ttf\) format\("truetype"\)', "", text)
    for rule in re.findall(r"[^{}]+\{[^{}]*\}", text):
        icon = ICON.match(rule)
        wanted = icon and named & set(re.findall(r"\.fa-([\w-]+):", rule))
        points = points | ({icon[1]} if wanted else set())
        if (wanted or not icon) and "v4compat" not in rule:
            kept.append(rule)
    css.write_text("".join(kept))
    for font in (folder / "webfonts").iterdir():
        _subset(font, {int(point, 16) for point in points})
    (folder / "js" / "all.min.js").unlink(missing_ok=True)


def _subset(path: Path, points: set[int]) -> None:
    """Rewrite a font with these characters alone; of other formats nothing is left."""
    if path.suffix != ".woff2" or "v4compat" in path.name:
        return path.unlink()
    options = Options(flavor="woff2", notdef_outline=True)
    font, subsetter = load_font(path, options), Subsetter(options)
    subsetter.populate(unicodes=points)
    subsetter.subset(font)
    save_font(font, path, options)
