"""Presets -> papermill -> executed notebooks, records, figures and a report. Resumes: arms with a record are not run again.

A preset is `papermill_runs/presets/<name>.yaml`: `description`, and `notebooks`, mapping a notebook to its parameters. Each notebook's last cell
writes `summaries/<notebook>.json`; a notebook counts as done only when papermill succeeded and that file is new.
"""

from __future__ import annotations

import logging
import os
import re
import time
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError

from packlib.lab import experiment, records, tables
from packlib.lab.parameters import unknown_name

logger = logging.getLogger(__name__)


class NotebookFailed(RuntimeError):
    """A notebook did not reach its last cell; the executed notebook shows where."""


def presets() -> dict[str, Path]:
    """Names of the presets and their files."""
    return {path.stem: path for path in sorted((records.project_root() / "papermill_runs" / "presets").glob("*.yaml"))}


def load_preset(name: str) -> dict[str, Any]:
    """A preset's contents. Raises `ValueError` for an unknown preset, notebook or parameter, listing the known ones."""
    if name not in presets():
        raise unknown_name("preset", name, presets())
    preset = yaml.safe_load(presets()[name].read_text())
    known = {path.stem: path for path in notebooks()}
    for notebook, parameters in preset["notebooks"].items():
        if notebook not in known:
            raise unknown_name("notebook", notebook, known)
        declared = declared_parameters(known[notebook])
        for parameter in parameters or {}:
            if parameter not in declared:
                raise unknown_name(f"parameter of {notebook}", parameter, declared)
    return preset


def notebooks() -> list[Path]:
    return sorted((records.project_root() / "notebooks").glob("[0-9]*.ipynb"))


def declared_parameters(notebook: Path) -> list[str]:
    """Names in the notebook's `parameters` cell. Raises `ValueError` unless exactly one cell is tagged so: papermill would inject on top."""
    cells = [c for c in nbformat.read(notebook, 4).cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ValueError(f"{notebook.name} has {len(cells)} cells tagged 'parameters'; expected 1")
    return re.findall(r"^(\w+)\s*(?::[^=]+)?=", cells[0].source, flags=re.MULTILINE)


def execute(notebook: Path, folder: Path, parameters: dict[str, Any]) -> Path:
    """Run one notebook into `folder` through papermill.

    Raises `NotebookFailed` when a cell failed or the last one did not run, `OutOfTime` when arms are left for the next call.
    """
    output = folder / notebook.name
    summary = folder / "summaries" / f"{notebook.stem}.json"
    before = summary.stat().st_mtime_ns if summary.exists() else None
    unfinished = output.with_suffix(".running.ipynb")
    try:
        papermill.execute_notebook(
            notebook, unfinished, parameters | {"run": str(folder)}, kernel_name="python3", cwd=notebook.parent, progress_bar=False, log_output=True,
        )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        if error.ename == experiment.OutOfTime.__name__:
            unfinished.unlink()
            raise experiment.OutOfTime(f"{notebook.name}: {error.evalue}") from None
        raise NotebookFailed(
            f"{notebook.name}, cell {error.exec_count}: {error.ename}: {error.evalue}; see {unfinished}"
        ) from None
    except DeadKernelError as error:
        raise NotebookFailed(f"{notebook.name}: {error}, killed or out of memory; see {unfinished}") from None
    if not summary.exists() or summary.stat().st_mtime_ns == before:
        raise NotebookFailed(f"{notebook.name} ended without writing {summary.name}; see {unfinished}")
    _publishable(unfinished, folder)
    unfinished.replace(output)
    return output


def _publishable(path: Path, folder: Path) -> None:
    """Take machine paths, papermill's bookkeeping and widget state out of an executed notebook, so that it renders on GitHub, and let its
    links lead back to `notebooks/`."""
    text = path.read_text()
    for here, name in ((folder, folder.name), (records.project_root(), "."), (Path.home(), "~")):
        for prefix in {str(here.resolve()), str(here.absolute())} - {
            "/"
        }:  # the home of a container's nameless user is /
            text = text.replace(prefix, name)
    notebook = nbformat.reads(text, 4)
    notebook.metadata.pop("widgets", None)
    notebook.metadata.pop("papermill", None)
    root = records.project_root().resolve()
    up = (
        Path(os.path.relpath(root / "notebooks", folder.resolve())).as_posix()
        if folder.resolve().is_relative_to(root)
        else None
    )
    for cell in notebook.cells:
        if up and cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\((?!\w+:|#|\.\./)", f"]({up}/", cell.source)
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
    nbformat.write(notebook, path)


def reproduce(
    preset: str, *, output: str | None = None, only: list[str] | None = None, minutes: float | None = None
) -> Path:
    """Execute a preset's notebooks in order and write the report; returns the run's folder.

    output: name or path of the run folder (the preset's name by default). only: notebooks to run, by name or number. minutes: start no new arm
    after that time; the next call goes on.
    """
    chosen = load_preset(preset)["notebooks"]
    if only:
        picked = {n: p for n, p in chosen.items() if any(n == o or n.startswith(f"{o}_") for o in only)}
        if missing := [o for o in only if not any(n == o or n.startswith(f"{o}_") for n in chosen)]:
            raise unknown_name("notebook", missing[0], chosen)
        chosen = picked
    folder = records.run_folder(output or preset)
    if minutes is not None:
        os.environ[experiment.UNTIL] = str(time.time() + 60 * minutes)
    sources = {path.stem: path for path in notebooks()}
    started = time.monotonic()
    try:
        for i, (name, parameters) in enumerate(chosen.items()):
            logger.info("notebook %d/%d: %s", i + 1, len(chosen), name)
            begun = time.monotonic()
            execute(sources[name], folder, parameters or {})
            logger.info("notebook %d/%d: %s done in %.0f s", i + 1, len(chosen), name, time.monotonic() - begun)
    except experiment.OutOfTime as left:
        logger.info("%s; call again to go on", left)
    finally:
        if minutes is not None:
            del os.environ[experiment.UNTIL]  # the next call has all the time it wants
    report = write_report(folder)
    logger.info(
        "%s in %.0f s: executed notebooks in %s, report in %s", preset, time.monotonic() - started, folder, report
    )
    return folder


def write_report(folder: Path) -> Path:
    """`report.md` of a run folder: the table, every notebook's findings and figures, and where the numbers were measured."""
    lines = [f"# Padding versus packing: run `{folder.name}`", ""]
    found = records.read_records(folder)
    if found:
        environments = (record["environment"] for record in found)
        places = sorted({f"{e['device']}, torch {e['torch']}, transformers {e['transformers']}" for e in environments})
        lines += [f"{len(found)} measured runs on: {'; '.join(places)}.", "", *filter(None, [headline(folder)]), ""]
    for path in sorted((folder / "summaries").glob("*.json")):
        summary = records.read_json(path)
        lines += [
            f"## [{summary['title']}]({path.stem}.ipynb)",
            "",
            *(f"- {finding}" for finding in summary["findings"]),
            "",
        ]
        kept = [
            (name, alt)
            for name, alt in summary.get("figures", {}).items()
            if (folder / "figures" / f"{name}.png").exists()
        ]
        lines += [f"![{alt}](figures/{name}.png)\n" for name, alt in kept]
    report = folder / "report.md"
    report.write_text("\n".join(lines).rstrip() + "\n")
    return report


def headline(folder: Path) -> str:
    """The table of measured arms as Markdown: what the terminal, the report and the README show. Empty where no training run has a record."""
    frame = records.load_records(folder)
    if "strategy" not in frame:  # no record, or notebook 05's of attention alone
        return ""
    timed = frame[
        frame["strategy"].notna() & (frame["environment.concurrent_runs"] == 1)
    ]  # the others' times do not count
    return tables.markdown(tables.display_table(tables.against(tables.one_setting(timed))))
