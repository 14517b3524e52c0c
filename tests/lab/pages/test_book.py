"""The book's pages before and after Sphinx; what a reader sees is tested in a browser (tests/browser)."""

import nbformat
import pytest
from bs4 import BeautifulSoup

from packlib.lab.pages import book


def cells(page):
    """Text of every cell of a finished page, and the marks it got."""
    found = BeautifulSoup(book._finished(page), "html.parser").select("th, td")
    return {cell.text.strip(): {name for name in cell.attrs if name.startswith("data-")} for cell in found}


@pytest.mark.parametrize(
    "cell, number",
    [
        ("<td>refused: no boundaries</td>", False),
        ('<td id="T_1" class="data row0" >llama</td>', False),
        ('<td id="T_1" class="data row0" >1.3e+00</td>', True),
        ("<td><p>1.3 GB</p></td>", True),
        ("<td><p><strong>no</strong></p></td>", False),
        ("<td>h200</td>", False),
        ("<td>['padding']</td>", False),
        ("<td>4 × 2</td>", True),
        ("<td>NaN</td>", True),
        ("<td></td>", False),
        ("<th>7</th>", False),
    ],
)
def test_words_of_a_table_are_told_from_numbers(cell, number):
    marks = cells(f"<table><thead><tr><th>head</th></tr></thead><tbody><tr>{cell}</tr></tbody></table>")
    assert all(("data-number" in found) == number for found in marks.values()), marks


def test_a_column_is_aligned_as_most_of_its_cells_and_its_header_with_it():
    marks = cells(
        "<table>"
        "<thead><tr><th></th><th colspan=2>both</th></tr><tr><th>run</th><th>speed</th><th>device</th></tr></thead>"
        "<tbody><tr><th rowspan=3>h200</th><td>1,024</td><td>16</td></tr>"
        "<tr><td>2,048</td><td>one that is named in many words</td></tr><tr><td>refused</td><td>H100</td></tr></tbody>"
        "</table>"
    )
    assert {text for text, found in marks.items() if "data-number" in found} == {"speed", "1,024", "2,048", "refused"}
    short = {text for text, found in marks.items() if "data-short" in found}
    assert short == {"h200", "1,024", "16", "2,048", "refused", "H100"}


def test_a_red_circle_is_drawn_and_pandas_own_looks_are_left_out():
    page = '<img alt="🔴"><p>🔴 off</p><style scoped>th { text-align: right; }</style>'
    assert book._finished(page) == '<img alt="🔴"><p><span class="red">●</span> off</p>'


def test_a_run_s_own_notebook_is_a_page_that_only_its_report_links_to(tmp_path):
    run = tmp_path / "papermill_runs" / "cpu"
    run.mkdir(parents=True)
    table = {"text/html": "<table><tr><td>llama</td></tr></table>"}
    output = nbformat.v4.new_output("display_data", table)
    cells = [nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell("table", outputs=[output])]
    for name in ("06.ipynb", "07.ipynb"):
        nbformat.write(nbformat.v4.new_notebook(cells=cells), run / name)
    (run / "report.md").write_text("# Report\n\n[06](06.ipynb)\n", encoding="utf-8")
    (tmp_path / "source").mkdir()
    site = book._Site(tmp_path / "source", tmp_path)
    site.add(run / "06.ipynb", note="Shown as run `cpu` left it.", listed=False)
    site.add(run / "07.ipynb")
    site.add(run / "report.md")
    site.write({"Notebooks": [run / "07.ipynb"]})
    made = tmp_path / "source" / "papermill_runs" / "cpu"
    pages = {name: nbformat.read(made / name, 4) for name in ("06.ipynb", "07.ipynb")}
    assert {name: page.metadata.orphan for name, page in pages.items()} == {"06.ipynb": True, "07.ipynb": False}
    assert "[06](06.ipynb)" in (made / "report.md").read_text(encoding="utf-8")
    assert pages["06.ipynb"].cells[1].outputs[0].data == table
    assert pages["06.ipynb"].cells[0].source == "# Title\n\n*Shown as run `cpu` left it.*\n"


def test_a_page_is_executed_again_where_its_cells_or_parameters_are_others(tmp_path):
    def written(name, source, **parameters):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        notebook.metadata["papermill"] = {"parameters": parameters}
        nbformat.write(notebook, tmp_path / name)
        return tmp_path / name

    source, executed = written("04.ipynb", "show(matrix)"), written("run.ipynb", "show(matrix)", matrix="run")
    assert book._shows(executed, source, {}) and book._shows(executed, source, {"matrix": "run"})
    assert not book._shows(executed, source, {"matrix": "published"})
    assert not book._shows(written("old.ipynb", "show()", matrix="run"), source, {})
    assert not book._shows(tmp_path / "none.ipynb", source, {})
