"""JupyterLab as people use it: open a notebook, run all, look, move a slider, follow a link, save."""

import json
import re
import time
import urllib.request

import nbformat
import pytest

from packlib.lab.pages import reproduce
from tests.browser.conftest import HARD_TO_READ, PICTURES

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
NOTEBOOKS = [path.stem for path in reproduce.notebooks()]
# What JupyterLab itself writes to the console when all is well.
NOISE = re.compile("^Disposed$")  # JupyterLab says it of a document that was closed while its kernel still started
SLIDERS = {"01_measure_padding_waste", "03_plan_packs"}
DRAWN = ".jp-OutputArea-output p + img"  # what `notebook.explore` shows


class Desk:
    """JupyterLab in a page, and what went wrong in it."""

    def __init__(self, page, address):
        self.page, self.address, self.wrong = page, address, []
        page.set_default_timeout(60_000)
        page.on("console", lambda message: message.type == "error" and self._note(message.text))
        page.on("pageerror", lambda error: self._note(str(error)))
        page.on("response", lambda response: response.status >= 400 and self._note(f"{response.status} {response.url}"))
        page.goto(address)
        page.wait_for_selector(".jp-Notebook .jp-Cell")

    def _note(self, text):
        if not NOISE.search(text):
            self.wrong.append(text[:300])

    def open(self, name):
        """As a double click in the file browser does."""
        self.command("docmanager:open", path=f"notebooks/{name}.ipynb")
        self.page.wait_for_selector(f'.lm-TabBar-tab.jp-mod-current[title*="{name}"]')
        self.page.wait_for_selector(".jp-Notebook .jp-Cell")
        self.kernel_answers()

    def kernel_answers(self):
        """Wait for it: its name is a change of the notebook, and closing one that it comes to late would ask."""
        self.page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]:visible').wait_for()

    def command(self, name, **arguments):
        self.page.evaluate("([name, options]) => jupyterapp.commands.execute(name, options)", [name, arguments])

    def menu(self, *labels):
        """Click through the menu bar: `menu("Settings", "Theme", "JupyterLab Dark")`."""
        self.page.locator(".lm-MenuBar-item", has_text=labels[0]).click()
        for label in labels[1:]:
            named = self.page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{label}$"))
            self.page.locator(".lm-Menu-item:not(.lm-mod-disabled)", has=named).last.click()

    def run_all(self, seconds):
        self.menu("Run", "Run All Cells")
        prompts = self.page.locator(".jp-CodeCell > .jp-Cell-inputWrapper .jp-InputPrompt")
        error = self.page.locator('[data-mime-type="application/vnd.jupyter.error"]')
        until = time.monotonic() + seconds
        while any(not re.fullmatch(r"\[\d+\]:", text) for text in prompts.all_inner_texts()):
            assert not error.count(), error.first.inner_text()
            assert time.monotonic() < until, f"not ended after {seconds} s: {prompts.all_inner_texts()}"
            self.page.wait_for_timeout(200)
        assert not error.count(), error.first.inner_text()

    def save(self):
        self.page.keyboard.press("Control+s")
        self.page.wait_for_selector(".jp-mod-current .jp-DirtyIndicator, .lm-TabBar-tab.jp-mod-dirty", state="detached")

    def picture(self, name):
        self.page.screenshot(path=PICTURES / f"{name}.png")

    def clear(self):
        """Close what is open and end its kernels."""
        self.command("docmanager:save-all")  # a kernel's name is a change
        self.command("application:close-all")
        self.page.wait_for_selector(".jp-Notebook", state="detached")
        for session in json.load(urllib.request.urlopen(f"{self.address}/api/sessions")):
            request = urllib.request.Request(f"{self.address}/api/sessions/{session['id']}", method="DELETE")
            urllib.request.urlopen(request).close()
        self.wrong.clear()


@pytest.fixture(scope="module")
def window(chromium, lab):
    """Loaded once: JupyterLab takes longer to come up than most notebooks take to run."""
    page = chromium.new_page(viewport={"width": 1440, "height": 1000})
    yield Desk(page, lab)
    page.close()


@pytest.fixture
def at(window):
    yield window
    window.clear()


def test_opens_the_first_notebook_with_the_repository_as_root(at):
    assert at.page.locator(".jp-NotebookPanel h1").inner_text().startswith("Does packing pay")
    names = at.page.locator(".jp-DirListing-itemText")
    names.filter(has_text=NOTEBOOKS[-1]).wait_for()  # it goes to the notebook's folder by itself, a moment later
    at.page.locator(".jp-BreadCrumbs-home").click()
    names.filter(has_text="README.md").wait_for()
    assert {"notebooks", "papermill_runs"} <= set(names.all_inner_texts())


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, at, desk):
    path = desk / "notebooks" / f"{name}.ipynb"
    before = path.read_bytes()
    at.open(name)
    too_wide = at.page.locator(".jp-CodeCell .cm-scroller").evaluate_all(
        "boxes => boxes.filter(box => box.scrollWidth > box.clientWidth + 1).map(box => box.innerText)"
    )
    too_wide = [text for text in too_wide if not text.startswith("# Parameters")]  # the toy's, put in for this test
    assert not too_wide, "code is as wide as the page, with the file browser open, at 1440 pixels"
    at.run_all(200)
    if name in SLIDERS:
        move_a_slider(at.page)
    at.picture(name)
    at.save()
    executed = nbformat.read(desk / "papermill_runs" / "explore" / path.name, 4)
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells) and any(cell.outputs for cell in cells)
    assert path.read_bytes() == before, "the tracked notebook is as it was"
    assert not at.wrong


def move_a_slider(page):
    """The figure above a slider is drawn again when the slider is moved."""
    drawn, handle = page.locator(DRAWN), page.locator(".widget-slider .noUi-handle").first
    before = drawn.get_attribute("src")
    handle.focus()
    page.keyboard.press("PageUp")
    page.wait_for_function("([drawn, before]) => document.querySelector(drawn).src != before", arg=[DRAWN, before])
    assert drawn.get_attribute("alt")


def test_what_was_run_is_there_when_it_is_opened_again(at, desk):
    """After `test_notebook_runs`; the tracked notebook itself has no outputs."""
    name = NOTEBOOKS[0]
    assert not any(cell.get("outputs") for cell in nbformat.read(desk / "notebooks" / f"{name}.ipynb", 4).cells)
    at.open(name)
    assert at.page.locator(".jp-OutputArea-output img[alt]").count()


def test_links_lead_to_notebooks(at):
    at.open(NOTEBOOKS[0])
    at.page.locator(".jp-RenderedMarkdown a", has_text=NOTEBOOKS[2]).first.click()
    at.page.wait_for_selector(f'.lm-TabBar-tab.jp-mod-current[title*="{NOTEBOOKS[2]}"]')
    at.kernel_answers()
    assert not at.wrong


def test_dark(at):
    at.open(NOTEBOOKS[0])
    at.menu("Settings", "Theme", "JupyterLab Dark")
    at.page.wait_for_selector('body[data-jp-theme-light="false"]', state="attached")
    at.picture("dark")
    ours = at.page.locator(
        ".jp-NotebookPanel .jp-RenderedHTMLCommon"
    ).all()  # text and tables; the rest is JupyterLab's
    assert ours and not [text for part in ours for text in part.evaluate(HARD_TO_READ)]
    at.menu("Settings", "Theme", "JupyterLab Light")
    assert not at.wrong


def test_a_cell_that_takes_long_says_so(at, desk):
    cells = ["from packlib.lab.pages import live\nlive.say_when_a_cell_takes_long()", "import time\ntime.sleep(5)"]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata=kernel)
    nbformat.write(notebook, desk / "notebooks" / "slow.ipynb")
    at.open("slow")
    at.menu("Run", "Run All Cells")
    at.page.locator(".jp-OutputArea-output small", has_text="running").wait_for()
    assert at.page.locator(".jp-InputPrompt", has_text="[*]").count(), "while it runs"
    at.page.locator(".jp-OutputArea-output small", has_text=re.compile(r"took \d s")).wait_for()
