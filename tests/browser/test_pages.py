"""The built book in a browser, on a phone and on a desk, in the light and in the dark.

    make book && python -m pytest -m browser tests/browser

Chromium is Debian's. Without it, or without a built book, all of this is skipped.
"""

import os
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
HTML = Path(__file__).resolve().parents[2] / "_build" / "html"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NOT_READ = ("_static", "_modules", "vendor")
PAGES = sorted(
    path.relative_to(HTML).as_posix()
    for path in HTML.rglob("*.html")
    if not path.relative_to(HTML).as_posix().startswith(NOT_READ)
    and path.name not in ("genindex.html", "py-modindex.html", "search.html")
    and path != HTML / "index.html"  # sends on to the landing page
)
REFERENCE = [page for page in PAGES if page.startswith("book/api/")]  # all alike
READ = [page for page in PAGES if page not in REFERENCE] + REFERENCE[::8]
CHAPTERS = [page for page in PAGES if page.startswith("notebooks/")]
LANDING = "book/index.html"
if CHROMIUM is None or not PAGES:
    pytest.skip("needs Chromium and a built book", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *words):
        """Nothing to say."""


@pytest.fixture(scope="module")
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=HTML))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as run:
        found = run.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield found
        found.close()


@pytest.fixture
def visit(browser, site):
    """Opens a page, and finds fault with what it fetches and says."""
    contexts, faults = [], []

    def opened(page: str, width: int = 1400):
        context = browser.new_context(viewport={"width": width, "height": 900})
        contexts.append(context)
        tab = context.new_page()
        tab.on("request", lambda r: faults.append(r.url) if not own(r.url) else None)
        tab.on("response", lambda r: faults.append(f"{r.status} {r.url}") if r.status > 399 else 0)
        tab.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
        tab.on("pageerror", lambda error: faults.append(str(error)))
        fetched = []
        tab.on("requestfinished", lambda request: fetched.append(request))
        tab.goto(f"{site}/{page}", wait_until="load")
        tab.weight = lambda: sum(r.sizes()["responseBodySize"] for r in fetched)
        return tab

    def own(address: str) -> bool:
        return address.startswith((site, "data:", "blob:"))

    yield opened
    for context in contexts:
        context.close()
    assert faults == []


def themes(tab):
    """A page in the light, then in the dark."""
    for theme in ("light", "dark"):
        look = "theme => Object.assign(document.documentElement.dataset, {theme, mode: theme})"
        tab.evaluate(look, theme)
        tab.wait_for_timeout(150)
        yield theme


def overflow(tab) -> str:
    """What makes a page wider than its window; empty if nothing does."""
    return tab.evaluate(
        """() => {
        const wide = document.documentElement.clientWidth;
        if (document.documentElement.scrollWidth <= wide) return "";
        const out = [...document.querySelectorAll("main *")].filter(
            e => e.getBoundingClientRect().right > wide + 1);
        return out.slice(0, 3).map(e => e.outerHTML.slice(0, 120)).join(" | ") || "the page";
    }"""
    )


def serious(tab) -> list[str]:
    """What axe-core finds, of the grave kinds."""
    found = (
        axe.Axe()
        .run(tab, options={"resultTypes": ["violations"], "preload": False})
        .response["violations"]
    )
    return [
        f"{v['id']}: {v['nodes'][0]['html'][:150]} ({len(v['nodes'])})"
        for v in found
        if v["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("page", READ)
def test_a_page_is_readable_for_everybody(visit, page):
    tab = visit(page)
    assert tab.locator(".katex-error, .cell_output .stderr").count() == 0
    found = {theme: (overflow(tab), serious(tab)) for theme in themes(tab)}
    assert found == {"light": ("", []), "dark": ("", [])}
    limit = 0.8e6 if page == LANDING else 2.5e6
    assert tab.weight() <= limit, f"{tab.weight() / 1e6:.2f} MB"


@pytest.mark.parametrize("page", READ)
def test_a_page_fits_a_phone(visit, page):
    tab = visit(page, 390)
    assert [overflow(tab) for _ in themes(tab)] == ["", ""]
    small = tab.evaluate(
        """() => [...document.querySelectorAll("svg.figure")].flatMap(svg => {
        const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
        return scale && scale * 10 < 9 ? [`${svg.ariaLabel}: ${scale * 10}`] : [];
    })"""
    )
    assert small == [], "labels of 10 points are smaller than 9 pixels"


@pytest.mark.parametrize("page", CHAPTERS)
def test_every_figure_says_what_to_see_and_what_it_shows(visit, page):
    tab = visit(page)
    figures = tab.locator("article figure")
    assert figures.count() >= 2
    for k in range(figures.count()):
        assert "Figure" in figures.nth(k).locator("figcaption").inner_text()
    without = "article svg.figure:not([aria-label]), article svg.figure[aria-label='']"
    assert tab.locator(f"{without}, article img:not([alt]), article img[alt='']").count() == 0
    alone = "article .cell_output svg.figure:not(figure *)"
    assert tab.locator(alone).count() == 0, "a picture without a caption"


@pytest.mark.parametrize("page", [LANDING, *CHAPTERS])
def test_sliders_change_their_picture(visit, page):
    tab = visit(page, 390)
    boxes = tab.locator(".diffad-slider")
    for k in range(boxes.count()):
        box = boxes.nth(k)
        handle, frames = box.locator("input"), box.locator(".frames > *")
        before, named = box.locator(".frames > *:visible"), box.locator("output")
        assert before.count() == 1
        first, word = before.first.get_attribute("data-label"), named.inner_text()
        at_end = handle.input_value() == handle.get_attribute("max")
        handle.focus()
        handle.press("ArrowLeft" if at_end else "ArrowRight")
        after = box.locator(".frames > *:visible")
        assert after.count() == 1 < frames.count()
        assert after.first.get_attribute("data-label") != first and named.inner_text() != word


def test_hidden_solutions_open(visit):
    tab = visit(CHAPTERS[0])
    solution = tab.locator("div.solution, div.dropdown.solution").first
    words = solution.locator(".section, .solution-content, p").last
    assert not words.is_visible()
    solution.locator("button, .admonition-title, summary").first.click()
    words.wait_for(state="visible")


def test_search_finds_aupro_in_chapter_9_first(visit):
    tab = visit("search.html?q=AUPRO")
    first = tab.locator("ul.search li a").first
    first.wait_for()
    assert "09_evaluation" in first.get_attribute("href")


def test_a_page_can_be_printed(visit):
    tab = visit(CHAPTERS[0])
    tab.emulate_media(media="print")
    assert not tab.locator(".bd-sidebar-primary").is_visible()
    assert tab.locator("h1:visible").count() == 1
    assert tab.locator("div.solution p").last.is_visible(), "on paper nothing can be opened"
