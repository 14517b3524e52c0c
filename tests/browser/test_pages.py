"""The book as a reader sees it: every page, at the width of a telephone and of a screen, light and dark.

Runs after test_lab.py, in one process: what that has run in JupyterLab need not be run again for the book.
"""

import functools
import subprocess
import sys
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup

from tests.browser.conftest import HARD_TO_READ, PICTURES

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
TELEPHONE, SCREEN = 390, 1500
WIDTHS = TELEPHONE, 1100, 1280, SCREEN  # from one column to three

# Tables and images that look wrong: numbers that may break, headers not aligned as their columns, images blown up.
LOOKS = """() => {
    const looks = (element, name) => getComputedStyle(element)[name];
    const broken = [...document.querySelectorAll("tbody td")].filter(cell => {
        const text = cell.textContent.trim();
        return text && !/[A-Za-z]{2}/.test(text) && looks(cell, "whiteSpace") !== "nowrap";
    });
    const ragged = [...document.querySelectorAll("article table")].flatMap(table => {
        const [head] = [...table.querySelectorAll("thead tr")], [row] = [...table.querySelectorAll("tbody tr")];
        if (!head || !row || head.cells.length !== row.cells.length) return [];
        return [...head.cells].filter((cell, i) => looks(cell, "textAlign") !== looks(row.cells[i], "textAlign"));
    });
    const images = [...document.querySelectorAll("article img")];
    const blown_up = images.filter(image => image.naturalWidth && image.clientWidth > image.naturalWidth);
    return [...broken, ...ragged, ...blown_up].map(element => element.textContent.trim() || element.src);
}"""


@pytest.fixture(scope="module")
def book(desk):
    """Of the published run, and of what JupyterLab left in `explore` for the other notebooks."""
    command = [sys.executable, "-m", "packlib", "book", "h200", "explore", "--output", str(desk / "book")]
    done = subprocess.run(command, cwd=desk, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return desk / "book"


def pages(book):
    return sorted(path for path in book.rglob("*.html") if "_static" not in path.parts)


@functools.cache
def parsed(path):
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@functools.cache
def anchors(path):
    return {tag["id"] for tag in parsed(path).select("[id]")}


def dead_links(path):
    """Addresses on a page, of this site, at which there is nothing."""
    dead = []
    for tag in parsed(path).select("[href], [src]"):
        address = urlsplit(tag.get("href") or tag.get("src"))
        if address.scheme or address.netloc:
            continue
        target = (path.parent / unquote(address.path)).resolve() if address.path else path
        anchor = unquote(address.fragment)
        if not target.is_file() or (anchor and target.suffix == ".html" and anchor not in anchors(target)):
            dead.append(address.geturl())
    return dead


def without_alt(path):
    return [str(image)[:100] for image in parsed(path).select("img") if not image.get("alt", "").strip()]


def test_every_notebook_and_report_is_a_page(book):
    names = {path.relative_to(book).as_posix() for path in pages(book)}
    assert {"index.html", "search.html", "papermill_runs/LOG.html", "papermill_runs/h200/report.html"} <= names
    assert sum(name.startswith("notebooks/0") for name in names) == 10
    first = (book / "notebooks" / "06_measure_throughput_and_memory.html").read_text(encoding="utf-8")
    assert "Shown as run" in first and "NVIDIA H200" in first


def test_no_link_is_dead_and_no_image_is_without_description(book):
    found = {path.relative_to(book).as_posix(): (dead_links(path), without_alt(path)) for path in pages(book)}
    assert len(found) > 20 and not {name: both for name, both in found.items() if any(both)}


def width_of(page, window):
    """How wide a page is in a window, in which it then is."""
    page.set_viewport_size({"width": window, "height": 1000})
    return page.evaluate("document.documentElement.scrollWidth")


def test_pages_are_readable(book, chromium):
    wrong = {}
    page = chromium.new_page()
    for path in pages(book):
        name = path.relative_to(book).with_suffix("").as_posix().replace("/", "-")
        page.set_viewport_size({"width": TELEPHONE, "height": 800})
        page.emulate_media(color_scheme="light")
        page.goto(path.as_uri())
        page.screenshot(path=PICTURES / f"book-{name}-{TELEPHONE}.png", full_page=True)
        looks = page.evaluate(LOOKS)
        too_wide = [width for width in WIDTHS if width_of(page, width) > width]  # the last one is SCREEN
        page.screenshot(path=PICTURES / f"book-{name}-{SCREEN}.png", full_page=True)
        cut_off = page.locator(".output pre").evaluate_all(
            "all => all.some(one => one.scrollWidth > one.clientWidth + 1)"
        )
        pale = page.locator("body").evaluate(HARD_TO_READ)
        page.emulate_media(color_scheme="dark")
        dark = page.locator("body").evaluate(HARD_TO_READ)
        if too_wide or looks or cut_off or pale or dark:
            wrong[name] = (too_wide, looks[:3], cut_off, pale[:3], dark[:3])
    page.close()
    assert not wrong


def test_search_finds(book, chromium):
    page = chromium.new_page()
    page.goto((book / "search.html").as_uri() + "?q=isolation")
    page.locator("#search-results li a", has_text="Isolation").or_(
        page.locator("#search-results li a")
    ).first.wait_for()
    page.close()


def test_what_is_wrong_with_a_page_is_noticed(tmp_path, chromium):
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<p style="color: #bbb">pale</p><p>dark</p><img src="bad.html"><a href="none.html">x</a><a href="#y">y</a>'
    )
    assert dead_links(bad) == ["none.html", "#y"] and len(without_alt(bad)) == 1
    page = chromium.new_page()
    page.goto(bad.as_uri())
    assert page.locator("body").evaluate(HARD_TO_READ) == ["1.9: pale"]
    page.close()
