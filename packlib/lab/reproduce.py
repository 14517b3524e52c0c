"""Presets -> papermill -> executed notebooks, records, figures and a report.

A preset is `papermill_runs/presets/<name>.yaml`: `description`, and `notebooks`, mapping a notebook to its parameters.
Each notebook's last cell writes `summaries/<notebook>.json`; a notebook counts as done only when papermill succeeded
and that file is new. A call resumes where the one before stopped: what has a record is not run again.
"""

from __future__ import annotations

import ast
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError

from packlib.atomic import atomic_write
from packlib.lab import experiment, records, tables
from packlib.lab.parameters import check_parameters, unknown_name

logger = logging.getLogger(__name__)


class NotebookFailed(RuntimeError):
    """A notebook did not reach its last cell; the executed notebook shows where."""


def presets() -> dict[str, Path]:
    """Names of the presets and their files."""
    return {path.stem: path for path in sorted((records.runs_folder() / "presets").glob("*.yaml"))}


def load_preset(name: str) -> dict[str, Any]:
    """A preset's contents.

    Raises `ValueError` for an unknown preset, notebook or parameter, listing the known ones, and `TypeError` for a
    parameter of another type than its default in the notebook.
    """
    if name not in presets():
        raise unknown_name("preset", name, presets())
    preset = yaml.safe_load(presets()[name].read_text(encoding="utf-8"))
    known = {path.stem: path for path in notebooks()}
    for notebook, parameters in preset["notebooks"].items():
        if notebook not in known:
            raise unknown_name("notebook", notebook, known)
        declared = declared_parameters(known[notebook])
        for parameter in parameters or {}:
            if parameter not in declared:
                raise unknown_name(f"parameter of {notebook}", parameter, declared)
        try:
            check_parameters(declared | (parameters or {}), declared)
        except TypeError as error:
            raise TypeError(f"preset {name}, {notebook}: {error}") from None
    return preset


def notebooks() -> list[Path]:
    """The notebooks of this checkout, in order."""
    return sorted((records.project_root() / "notebooks").glob("[0-9]*.ipynb"))


def declared_parameters(notebook: Path) -> dict[str, Any]:
    """Names and defaults of the notebook's tagged cell, as papermill sees them.

    Raises `ValueError` unless exactly one cell is tagged: papermill would inject into the wrong place.
    """
    cells = nbformat.read(notebook, 4).cells
    tagged = sum("parameters" in cell.metadata.get("tags", []) for cell in cells)
    if tagged != 1:
        raise ValueError(f"{notebook.name} has {tagged} cells tagged 'parameters'; expected 1")
    found = papermill.inspect_notebook(str(notebook))
    return {name: ast.literal_eval(parameter["default"]) for name, parameter in found.items()}


def execute(notebook: Path, folder: Path, parameters: dict[str, Any]) -> Path:
    """Run one notebook into `folder` through papermill; returns the executed one.

    Raises `NotebookFailed` when a cell failed or the last one did not run, `OutOfTime` when arms are left for the next
    call.
    """
    output, summary = folder / notebook.name, folder / "summaries" / f"{notebook.stem}.json"
    before = summary.stat().st_mtime_ns if summary.exists() else None
    unfinished = output.with_suffix(".running.ipynb")
    try:
        papermill.execute_notebook(
            notebook,
            unfinished,
            parameters | {"run": str(folder)},
            kernel_name="python3",
            cwd=notebook.parent,
            progress_bar=False,
            log_output=True,
        )
    except papermill.PapermillExecutionError as error:
        if error.ename == experiment.OutOfTime.__name__:
            unfinished.unlink()
            raise experiment.OutOfTime(f"{notebook.name}: {error.evalue}") from None
        where = f"{notebook.name}, cell {error.exec_count}"
        raise NotebookFailed(f"{where}: {error.ename}: {error.evalue}; see {unfinished}") from None
    except DeadKernelError as error:
        raise NotebookFailed(f"{notebook.name}: {error}, killed or out of memory; see {unfinished}") from None
    if not summary.exists() or summary.stat().st_mtime_ns == before:
        raise NotebookFailed(f"{notebook.name} ended without writing {summary.name}; see {unfinished}")
    _publishable(unfinished, folder)
    unfinished.replace(output)
    return output


def _publishable(path: Path, folder: Path) -> None:
    """Make an executed notebook render on GitHub, and for everybody.

    Machine paths, papermill's bookkeeping and widget state are taken out; links lead back to `notebooks/`.
    """
    text, root = path.read_text(encoding="utf-8"), records.project_root()
    for here, name in ((folder, folder.name), (root, "."), (Path.home(), "~")):
        for prefix in {str(here.resolve()), str(here.absolute())} - {"/"}:  # the home of a container's nameless user
            text = text.replace(prefix, name)
    notebook = nbformat.reads(text, 4)
    notebook.metadata.pop("widgets", None)
    notebook.metadata.pop("papermill", None)
    inside = folder.resolve().is_relative_to(root.resolve())
    up = Path(os.path.relpath(root.resolve() / "notebooks", folder.resolve())).as_posix()
    for cell in notebook.cells:
        if inside and cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\((?!\w+:|#|\.\./)", f"]({up}/", cell.source)
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
    nbformat.write(notebook, path)


def reproduce(
    preset: str, *, output: str | None = None, only: list[str] | None = None, minutes: float | None = None
) -> Path:
    """Execute a preset's notebooks in order and write the report; returns the run's folder.

    output: name or path of the run folder (the preset's name by default). only: notebooks to run, by name or number.
    minutes: start no new arm after that time; the next call goes on.
    """
    chosen = load_preset(preset)["notebooks"]
    if only:
        chosen = _chosen(chosen, only)
    folder = records.run_folder(output or preset)
    sources = {path.stem: path for path in notebooks()}
    started = time.monotonic()
    with _until(minutes):
        try:
            for i, (name, parameters) in enumerate(chosen.items()):
                begun, count = time.monotonic(), f"notebook {i + 1}/{len(chosen)}: {name}"
                logger.info("%s", count)
                execute(sources[name], folder, parameters or {})
                logger.info("%s done in %.0f s", count, time.monotonic() - begun)
        except experiment.OutOfTime as left:
            logger.info("%s; call again to go on", left)
    report, seconds = write_report(folder), time.monotonic() - started
    logger.info("%s in %.0f s: executed notebooks in %s, report in %s", preset, seconds, folder, report)
    return folder


def _chosen(notebooks: dict[str, Any], only: list[str]) -> dict[str, Any]:
    """Those notebooks, by name or number. Raises `ValueError` for one that there is not."""
    picked: dict[str, Any] = {}
    for wanted in only:
        matching = {name: given for name, given in notebooks.items() if name == wanted or name.startswith(f"{wanted}_")}
        if not matching:
            raise unknown_name("notebook", wanted, notebooks)
        picked |= matching
    return {name: given for name, given in notebooks.items() if name in picked}


@contextmanager
def _until(minutes: float | None) -> Iterator[None]:
    """So many minutes for new arms; afterwards the next call has all the time it wants."""
    if minutes is not None:
        os.environ[experiment.UNTIL] = str(time.time() + 60 * minutes)
    try:
        yield
    finally:
        if minutes is not None:
            del os.environ[experiment.UNTIL]


def write_report(folder: Path) -> Path:
    """`report.md` of a run folder: the table, each notebook's findings and figures, where the numbers were measured."""
    lines = [f"# Padding versus packing: run `{folder.name}`", ""]
    found = records.read_records(folder)
    if found:
        environments = [record["environment"] for record in found]
        places = {f"{e['device']}, torch {e['torch']}, transformers {e['transformers']}" for e in environments}
        lines += [f"{len(found)} measured runs on: {'; '.join(sorted(places))}.", ""]
        lines += [*filter(None, [headline(folder)]), ""]
    for path in sorted((folder / "summaries").glob("*.json")):
        summary = records.read_json(path)
        lines += [f"## [{summary['title']}]({path.stem}.ipynb)", ""]
        lines += [*(f"- {finding}" for finding in summary["findings"]), ""]
        for name, alt in summary.get("figures", {}).items():
            if (folder / "figures" / f"{name}.png").exists():
                lines.append(f"![{alt}](figures/{name}.png)\n")
    report = folder / "report.md"
    with atomic_write(report) as file:
        file.write("\n".join(lines).rstrip() + "\n")
    return report


def headline(folder: Path) -> str:
    """The table of measured arms as Markdown: what the terminal and the report show.

    Runs that shared their device have no times, and are left out. Empty where no training run has a record.
    """
    frame = records.load_records(folder)
    if "strategy" not in frame:  # no record, or notebook 05's of attention alone
        return ""
    timed = tables.alone(frame[frame["strategy"].notna()])
    return tables.markdown(tables.display_table(tables.against(tables.one_setting(timed)))) if len(timed) else ""
