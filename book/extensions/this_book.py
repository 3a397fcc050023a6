"""What this book asks of Sphinx, and no setting gives.

Pictures in SVG are put into their pages, so that they take their colours. A paper's formula keeps
its number beside it, and wherever text names the number, it leads to the index of equations. Code
of the package leads to its reference.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.transforms import SphinxTransform

from diffad_ref.tools.pages import themed

FORMULA = re.compile(r"\b(?:D(?:1[0-2]|[1-9])|C(?:10|[1-9])|G[1-6]|A[1-3]|O[1-4]|E[12]|M[1-7])\b")
TAG = re.compile(r"\s*\\tag\{([^}]+)\}")
INDEX = "book/equation_index"
NOT_TEXT = (nodes.literal, nodes.literal_block, nodes.reference, nodes.title, nodes.math, nodes.raw)
MATHS = (nodes.math, nodes.math_block)
FILE = re.compile(r"^# (diffad_ref/[\w/]+)\.py$", re.M)
DEFINED = re.compile(r"^(?:def|class) (\w+)", re.M)


class PicturesInPages(SphinxTransform):
    """Put SVG files into the page itself: there `currentColor` is the colour of its text."""

    default_priority = 400

    def apply(self) -> None:
        """Replace images by their text."""
        for image in list(self.document.findall(nodes.image)):
            if not image["uri"].endswith(".svg"):
                continue
            path = Path(self.env.relfn2path(image["uri"], self.env.docname)[1])
            text = themed(path.read_text(), html.escape(image.get("alt", ""), quote=True))
            image.replace_self(nodes.raw("", text, format="html"))
            self.env.note_dependency(str(path))


class NumbersBesideFormulas(SphinxTransform):
    """Take ``\\tag{D5}`` out of a formula, which may scroll, and set it beside, where it stays."""

    default_priority = 400

    def apply(self) -> None:
        """Wrap each formula that has a tag."""
        for formula in list(self.document.findall(nodes.math_block)):
            text = formula.astext()
            if tag := TAG.search(text):
                text = TAG.sub("", text, count=1)
                formula.children = [nodes.Text(text)]
                formula.rawsource = text
                box = nodes.container(classes=["formula"])
                formula.replace_self(box)
                number = nodes.paragraph("", f"({tag[1]})", classes=["number"])
                box.extend([formula, number])


def link_formulas(app: Sphinx, document: nodes.document, page: str) -> None:
    """Let every number of a formula in running text lead to the index of equations."""
    if page == INDEX or app.builder.format != "html":
        return
    target = app.builder.get_relative_uri(page, INDEX)
    for text in list(document.findall(nodes.Text)):
        if any(isinstance(parent, NOT_TEXT) for parent in above(text)):
            continue
        pieces, end = [], 0
        for found in FORMULA.finditer(text):
            pieces.append(nodes.Text(text[end : found.start()]))
            uri = f"{target}#eq-{found[0].lower()}"
            pieces.append(nodes.reference("", found[0], refuri=uri, classes=["to-formula"]))
            end = found.end()
        if pieces:
            text.parent.replace(text, [*pieces, nodes.Text(text[end:])])


def above(node: nodes.Node):
    """The parents of a node, from the nearest to the page."""
    while (node := node.parent) is not None:
        yield node


def link_listings(app: Sphinx, document: nodes.document, page: str) -> None:
    """Below code of the package, name what it is in the reference."""
    if app.builder.format != "html":
        return
    known = app.env.domaindata["py"]["objects"]
    for block in list(document.findall(nodes.literal_block)):
        files, names = FILE.split(block.astext()), []
        for file, code in zip(files[1::2], files[2::2], strict=True):
            names += [f"{file.replace('/', '.')}.{name}" for name in DEFINED.findall(code)]
        line = nodes.paragraph(classes=["in-reference"])
        for name in (name for name in names if name in known):
            uri = f"{app.builder.get_relative_uri(page, known[name].docname)}#{name}"
            line += nodes.Text(", " if line.children else "In the reference: ")
            line += nodes.reference("", "", nodes.literal("", name.split(".")[-1]), refuri=uri)
        if line.children:
            block.parent.insert(block.parent.index(block) + 1, line)


def fill_in_address(app: Sphinx, config: Config) -> None:
    """Let pages write ``{{ repository }}``: the address stands in `_config.yml` alone."""
    config.myst_substitutions["repository"] = config.html_theme_options["repository_url"]


def drop_scripts(app: Sphinx, page: str, template: str, context: dict, doctree) -> None:
    """Leave out what a page does not use: live cells anywhere, formulas where there are none."""
    unused = ["thebe"]
    if doctree is None or not any(doctree.findall(lambda n: isinstance(n, MATHS))):
        unused.append("katex")
    for kind in ("script_files", "css_files"):
        kept = []
        for file in context.get(kind, []):
            text = str(getattr(file, "filename", "") or file)
            text += getattr(file, "attributes", {}).get("body", "") or ""
            if not any(name in text.lower() or name in text for name in unused):
                kept.append(file)
        context[kind] = kept


def setup(app: Sphinx) -> dict[str, bool]:
    """Register all of them."""
    app.add_transform(PicturesInPages)
    app.add_transform(NumbersBesideFormulas)
    app.connect("doctree-resolved", link_formulas)
    app.connect("doctree-resolved", link_listings)
    app.connect("config-inited", fill_in_address)
    app.connect("html-page-context", drop_scripts, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
