"""JupyterLab's files: running a notebook leaves the tracked one as it is, and nothing is lost.

A notebook of `notebooks/` is saved without outputs, just as it is committed: an edit is a clean diff, a run is none.
The executed one is kept in `papermill_runs/explore/`, where its figures and records go, too; when the notebook is
opened again, every cell that still has the text that was run gets its outputs back. Runs in the server, which must
start at once, so nothing heavy is imported here.
"""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import nbformat
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager

from packlib.atomic import atomic_write

EXECUTED = PurePosixPath("papermill_runs/explore")
KEPT = {"tags"}  # metadata of a cell that are committed


class Contents(AsyncLargeFileManager):
    """The contents manager that `make lab` gives to JupyterLab."""

    async def save(self, model: dict[str, Any], path: str = "") -> dict[str, Any]:
        """Save what JupyterLab sends; a notebook of `notebooks/` in two: without outputs, and executed."""
        executed = self._executed(path)
        if executed is None or model.get("type") != "notebook" or "content" not in model:
            return await super().save(model, path)
        notebook = nbformat.from_dict(model["content"])
        if executed.exists() or any(cell.get("outputs") for cell in notebook.cells):
            home = os.path.relpath(Path(self.root_dir, path.strip("/")).parent, executed.parent)
            with atomic_write(executed) as file:
                file.write(nbformat.writes(linked(notebook, Path(home).as_posix())) + "\n")
        return await super().save(model | {"content": stripped(notebook)}, path)

    async def get(self, path: str, content: bool = True, *others: Any, **options: Any) -> dict[str, Any]:
        """Give a file to JupyterLab; a notebook of `notebooks/` with the outputs of its last run."""
        model = await super().get(path, content, *others, **options)
        executed = self._executed(path)
        if executed and executed.exists() and content and model["type"] == "notebook":
            put_back(model["content"], nbformat.read(executed, 4))
        return model

    def _executed(self, path: str) -> Path | None:
        """Where the executed notebook is kept; None for what is no notebook of `notebooks/`."""
        parts = PurePosixPath(path.strip("/")).parts
        if len(parts) < 2 or parts[0] != "notebooks" or not parts[-1].endswith(".ipynb"):
            return None
        return Path(self.root_dir, EXECUTED, *parts[1:])


def stripped(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy as it is committed: no outputs, no counts, no metadata that JupyterLab adds."""
    bare = copy.deepcopy(notebook)
    for cell in bare.cells:
        cell.metadata = {name: value for name, value in cell.metadata.items() if name in KEPT}
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    bare.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    return bare


def linked(notebook: nbformat.NotebookNode, home: str) -> nbformat.NotebookNode:
    """A copy whose relative links start from `home`, the folder of the tracked notebook."""
    moved = copy.deepcopy(notebook)
    for cell in moved.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\((?!\w+:|#)", f"]({home}/", cell.source)
    return moved


def put_back(notebook: nbformat.NotebookNode, executed: nbformat.NotebookNode) -> None:
    """Give the cells of `notebook` the outputs and counts that those of the same text have in `executed`."""
    ran = {cell.source: cell for cell in executed.cells if cell.cell_type == "code"}
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source in ran:
            cell.outputs, cell.execution_count = ran[cell.source].outputs, ran[cell.source].execution_count
