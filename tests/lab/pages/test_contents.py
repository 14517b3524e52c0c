"""JupyterLab's files: a run leaves the tracked notebook as it is, and is not lost."""

import asyncio
from pathlib import Path

import nbformat
import pytest

from packlib.lab.pages.contents import Contents


@pytest.fixture
def manager(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    root = tmp_path / "repository"
    (root / "notebooks" / "solutions").mkdir(parents=True)
    return Contents(root_dir=str(root))


def notebook(manager, path):
    """A notebook as it is committed, in that place; its file."""
    cells = [
        nbformat.v4.new_markdown_cell("[next](b.ipynb) [web](https://example.org)"),
        nbformat.v4.new_code_cell("1"),
    ]
    for i, cell in enumerate(cells):
        cell.id = f"cell-{i}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    file = Path(manager.root_dir, path)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), file)
    return file


def run_and_save(manager, path):
    """What JupyterLab does: open, run, save; returns the model that it opens next."""

    async def steps():
        model = await manager.get(path)
        cell = model["content"].cells[1]
        cell.outputs, cell.execution_count = [nbformat.v4.new_output("stream", text="2\n")], 1
        cell.metadata["scrolled"] = True
        model["content"].metadata["language_info"]["version"] = "3.11.7"
        await manager.save({"type": "notebook", "format": "json", "content": model["content"]}, path)
        return await manager.get(path)

    return asyncio.run(steps())["content"]


@pytest.mark.parametrize("name", ["a.ipynb", "solutions/a.ipynb"])
def test_a_run_leaves_the_tracked_notebook_as_it_is(name, manager):
    file = notebook(manager, f"notebooks/{name}")
    before = file.read_bytes()
    opened = run_and_save(manager, f"notebooks/{name}")
    assert file.read_bytes() == before
    assert opened.cells[1].outputs[0].text == "2\n" and opened.cells[1].execution_count == 1
    kept = nbformat.read(f"{manager.root_dir}/papermill_runs/explore/{name}", 4)
    home = "../../notebooks" if name == "a.ipynb" else "../../../notebooks/solutions"
    assert kept.cells[0].source == f"[next]({home}/b.ipynb) [web](https://example.org)"


def test_what_was_edited_since_has_no_outputs(manager):
    file = notebook(manager, "notebooks/a.ipynb")
    run_and_save(manager, "notebooks/a.ipynb")
    edited = nbformat.read(file, 4)
    edited.cells[1].source = "2"
    nbformat.write(edited, file)
    assert not asyncio.run(manager.get("notebooks/a.ipynb"))["content"].cells[1].outputs


def test_other_notebooks_are_saved_as_jupyter_saves_them(manager):
    file = notebook(manager, "mine.ipynb")
    assert run_and_save(manager, "mine.ipynb").cells[1].outputs
    assert nbformat.read(file, 4).cells[1].outputs
