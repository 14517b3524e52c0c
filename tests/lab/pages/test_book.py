"""The book's pages before Sphinx sees them; what a reader sees is tested in a browser (tests/browser)."""

import nbformat
import pytest

from packlib.lab.pages import book


@pytest.mark.parametrize(
    "cell, text",
    [
        ("<td>refused: no boundaries</td>", True),
        ('<td id="T_1" class="data row0" >llama</td>', True),
        ('<td id="T_1" class="data row0" >1.3e+00</td>', False),
        ("<td>no</td>", True),
        ("<td>h200</td>", True),
        ("<td>['padding']</td>", True),
        ("<td>4 × 2</td>", False),
        ("<td>NaN</td>", False),
        ("<td></td>", False),
    ],
)
def test_words_of_a_table_are_told_from_numbers(cell, text):
    assert ("<td data-text" in book.TEXT_CELL.sub("<td data-text", cell)) == text


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
    assert "<td data-text>llama" in pages["06.ipynb"].cells[1].outputs[0].data["text/html"]
    assert pages["06.ipynb"].cells[0].source == "# Title\n\n*Shown as run `cpu` left it.*\n"
