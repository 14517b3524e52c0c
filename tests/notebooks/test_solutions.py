"""Every solution runs, cell by cell in this process: there is nothing to keep of it."""

import pytest

from tests.notebooks.test_notebooks import NOTEBOOKS, SOLUTIONS, code_cells, tagged_cell


def test_every_notebook_with_exercises_has_solutions():
    asked = [path.name for path in NOTEBOOKS if f"solutions/{path.name}" in path.read_text(encoding="utf-8")]
    assert asked == [path.name for path in SOLUTIONS]


LONG = {"06", "07", "08"}  # they train a dozen times: `pytest -m slow`


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] * (path.stem[:2] in LONG), id=path.stem) for path in SOLUTIONS]
)
def test_solution_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": path.stem}
    for cell in code_cells(path):
        if cell.id == tagged_cell(path).id:
            cell.source += f"\nrun = {str(tmp_path)!r}"
        exec(compile(cell.source, path.name, "exec"), names)
