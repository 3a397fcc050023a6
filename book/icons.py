"""Leave of the theme's icons what the pages show: of 2 MB for each page, some 20 kB."""

import re
from pathlib import Path

from fontTools.subset import Options, Subsetter, load_font, save_font

SCRIPT = re.compile(
    r"<(?:script|link)[^>]*fontawesome[^>]*(?:all\.min\.js|woff2)[^>]*>(?:</script>)?"
)
RULE = re.compile(r"[^{}]+\{[^{}]*\}")
ICON = re.compile(r'\.fa-([\w-]+):{1,2}before\{content:"\\([0-9a-f]+)"\}')


def slim(html: Path) -> None:
    """Drop the script that draws icons, and all that no page names of the fonts and the styles."""
    pages = {path: path.read_text() for path in html.rglob("*.html")}
    for path, text in pages.items():
        if (without := SCRIPT.sub("", text)) != text:
            path.write_text(without)
    for folder in (html / "_static" / "vendor" / "fontawesome").glob("*"):
        css = folder / "css" / "all.min.css"
        styles = [p.read_text() for p in (html / "_static").rglob("*.css") if p != css]
        named = set(re.findall(r"\bfa-([\w-]+)", "".join([*pages.values(), *styles])))
        points = set(re.findall(r"\\(f[0-9a-f]{3})\b", "".join(styles)))
        kept, text = [], css.read_text()
        for rule in RULE.findall(re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)):
            icons = ICON.findall(rule)
            used = [name for name, _ in icons if name in named]
            points |= {point for name, point in icons if name in named}
            if not (icons and not used) and "v4compat" not in rule:
                kept.append(rule)
        css.write_text("".join(kept))
        for font in (folder / "webfonts").iterdir():
            _subset(font, {int(point, 16) for point in points})
        (folder / "js" / "all.min.js").unlink(missing_ok=True)


def _subset(path: Path, points: set[int]) -> None:
    """Rewrite a font with these characters alone; of other formats nothing is left."""
    if path.suffix != ".woff2":
        return path.unlink()
    options = Options(flavor="woff2", notdef_outline=True)
    font, subsetter = load_font(path, options), Subsetter(options)
    subsetter.populate(unicodes=points)
    subsetter.subset(font)
    save_font(font, path, options)
