"""JupyterLab as people use it: open a notebook, run all, look, move a slider, follow a link, save."""

import re
import time

import nbformat
import pytest

from packlib.lab import reproduce
from tests.browser.conftest import PICTURES

pytestmark = [pytest.mark.browser, pytest.mark.timeout(200)]
NOTEBOOKS = [path.stem for path in reproduce.notebooks()]
# What JupyterLab itself writes to the console when all is well.
NOISE = re.compile("(?!)")
SLIDERS = {"01_measure_padding_waste", "03_plan_packs"}
DRAWN = ".jp-OutputArea-output p + img"  # what `notebook.explore` shows


class Desk:
    """A page of JupyterLab, and what went wrong in it."""

    def __init__(self, page, address):
        self.page, self.address, self.wrong = page, address, []
        page.set_default_timeout(60_000)
        page.on("console", lambda message: message.type == "error" and self._note(message.text))
        page.on("pageerror", lambda error: self._note(str(error)))
        page.on("response", lambda response: response.status >= 400 and self._note(f"{response.status} {response.url}"))

    def _note(self, text):
        if not NOISE.search(text):
            self.wrong.append(text[:300])

    def open(self, name):
        self.page.goto(f"{self.address}/lab/tree/notebooks/{name}.ipynb?reset")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell")
        self.page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]')

    def menu(self, *labels):
        self.page.locator(".lm-MenuBar-item", has_text=labels[0]).click()
        for label in labels[1:]:
            self.page.locator(".lm-Menu-item", has_text=re.compile(f"^{label}")).last.click()

    def run_all(self, seconds):
        self.menu("Run", "Run All Cells")
        prompts = self.page.locator(".jp-CodeCell > .jp-Cell-inputWrapper .jp-InputPrompt")
        until = time.monotonic() + seconds
        while any(not re.fullmatch(r"\[\d+\]:", text) for text in prompts.all_inner_texts()):
            assert time.monotonic() < until, f"not ended after {seconds} s: {prompts.all_inner_texts()}"
            error = self.page.locator('.jp-RenderedText[data-mime-type="application/vnd.jupyter.error"]')
            assert not error.count(), error.first.inner_text()
            self.page.wait_for_timeout(200)

    def save(self):
        self.page.keyboard.press("Control+s")
        self.page.wait_for_selector(".jp-mod-current .jp-DirtyIndicator, .lm-TabBar-tab.jp-mod-dirty", state="detached")

    def picture(self, name):
        self.page.screenshot(path=PICTURES / f"{name}.png")


@pytest.fixture
def at(chromium, lab):
    page = chromium.new_page(viewport={"width": 1440, "height": 1000})
    yield Desk(page, lab)
    page.close()


def test_opens_the_first_notebook_with_the_repository_as_root(at):
    at.page.goto(at.address)
    at.page.wait_for_selector(".jp-Notebook .jp-Cell")
    assert at.page.locator(".jp-NotebookPanel h1").inner_text().startswith("Does packing pay")
    at.page.locator(".jp-BreadCrumbs-home").click()
    names = at.page.locator(".jp-DirListing-itemText")
    names.filter(has_text="README.md").wait_for()
    assert {"notebooks", "papermill_runs"} <= set(names.all_inner_texts())


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, at, desk):
    path = desk / "notebooks" / f"{name}.ipynb"
    before = path.read_bytes()
    at.open(name)
    at.run_all(120)
    if name in SLIDERS:
        move_sliders(at)
    at.picture(name)
    at.save()
    executed = nbformat.read(desk / "papermill_runs" / "explore" / path.name, 4)
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells) and any(cell.outputs for cell in cells)
    assert path.read_bytes() == before, "the tracked notebook is as it was"
    assert not at.wrong
