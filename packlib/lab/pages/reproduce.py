"""Presets -> papermill -> executed notebooks, records, figures and a report.

Each notebook's last cell writes `summaries/<notebook>.json`; a notebook counts as done only when papermill succeeded
and that file is new. A call resumes where the one before stopped: what has a record is not run again.
"""

from __future__ import annotations

import ast
import io
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import nbformat
import papermill
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError

from packlib.lab import records
from packlib.lab.data import published
from packlib.lab.data.corpora import DATA
from packlib.lab.pages.freshness import Freshness
from packlib.lab.pages.kernel import ForkedKernelManager
from packlib.lab.pages.notebook import alarm
from packlib.lab.pages.progress import Progress, heard
from packlib.lab.pages.ranges import check_ranges
from packlib.lab.pages.report import write_report
from packlib.lab.parameters import check_parameters, unknown_name
from packlib.lab.presets import read_preset
from packlib.lab.runs import experiment

LONGEST_PLAIN = 5_000  # characters of a table as plain text, beside its HTML
TICK = 0.5  # seconds between two looks at how far a notebook is
PATIENCE = 5  # seconds for a notebook to end after Ctrl-C


class NotebookFailed(RuntimeError):
    """A notebook did not reach its last cell; the executed notebook shows where."""


def load_preset(name: str) -> dict[str, Any]:
    """A preset's contents, every notebook with its parameters.

    Raises `ValueError` for an unknown preset, notebook or parameter, listing the known ones, and for a value out of its
    range; `TypeError` for a parameter of another type than its default in the notebook.
    """
    preset = read_preset(name)
    known = {path.stem: path for path in notebooks()}
    for notebook, parameters in preset["notebooks"].items():
        if notebook not in known:
            raise unknown_name("notebook", notebook, known)
        if isinstance(parameters, str):
            shared = read_preset(parameters)["notebooks"]
            if not isinstance(shared.get(notebook, ""), dict):
                raise ValueError(f"preset {name}, {notebook}: preset {parameters} has no parameters for it")
            preset["notebooks"][notebook] = parameters = shared[notebook]
        declared = declared_parameters(known[notebook])
        for parameter in parameters or {}:
            if parameter not in declared:
                raise unknown_name(f"parameter of {notebook}", parameter, declared)
        try:
            check_ranges(check_parameters(declared | (parameters or {}), declared), notebook)
        except (TypeError, ValueError, OSError) as error:
            raise type(error)(f"preset {name}, {notebook}: {error}") from None
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


def execute(notebook: Path, folder: Path, parameters: dict[str, Any], progress: Progress | None = None) -> Path:
    """Run one notebook into `folder` through papermill; returns the executed one.

    What its cells print goes to `logs/<notebook>.log`, and how far it is to `progress`. Raises `NotebookFailed` when a
    cell failed or the last one did not run, `OutOfTime` when arms are left for the next call. On Ctrl-C its kernel, and
    what that has started, end first.
    """
    output, summary = folder / notebook.name, folder / "summaries" / f"{notebook.stem}.json"
    before = summary.stat().st_mtime_ns if summary.exists() else None
    unfinished = output.with_suffix(".running.ipynb")
    log = folder / "logs" / f"{notebook.stem}.log"
    progress = progress or Progress(1, io.StringIO())
    try:
        with heard(log, progress.hear), log.open("a", encoding="utf-8") as stderr:
            _papermill(notebook, unfinished, parameters | {"run": str(folder)}, progress.tick, stderr)
    except papermill.PapermillExecutionError as error:
        if error.ename == experiment.OutOfTime.__name__:
            unfinished.unlink()
            raise experiment.OutOfTime(f"{notebook.name}: {error.evalue}") from None
        where = f"{notebook.name}, cell {error.exec_count}"
        raise NotebookFailed(f"{where}: {error.ename}: {error.evalue}; see {unfinished}") from None
    except DeadKernelError as error:
        raise NotebookFailed(f"{notebook.name}: {error}, killed or out of memory; see {unfinished}") from None
    except KeyboardInterrupt:
        unfinished.unlink(missing_ok=True)
        raise
    if not summary.exists() or summary.stat().st_mtime_ns == before:
        raise NotebookFailed(f"{notebook.name} ended without writing {summary.name}; see {unfinished}")
    _publishable(unfinished, folder, records.read_json(summary).get("doubts", []))
    unfinished.replace(output)
    return output


def _papermill(
    source: Path, output: Path, parameters: dict[str, Any], tick: Callable[[], None], stderr: TextIO
) -> None:
    """papermill in a thread: in the main one nbclient answers Ctrl-C, with a traceback for everything that waits.

    tick: called a few times a second. stderr: of the kernel's process, not of its cells. On Ctrl-C the kernel is
    interrupted, as by hand, so that its arm ends before it.
    """
    kernels: list[AsyncKernelManager] = []
    ended: list[BaseException | None] = []

    class Manager(ForkedKernelManager):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            kernels.append(self)

        async def start_kernel(self, **options: Any) -> None:  # type: ignore[override]
            await super().start_kernel(**options, stderr=stderr)

    def run() -> None:
        try:
            papermill.execute_notebook(
                source,
                output,
                parameters,
                kernel_name="python3",
                cwd=source.parent,
                progress_bar=False,
                log_output=True,
                kernel_manager_class=Manager,
            )
            ended.append(None)
        except BaseException as error:  # raised where it is waited for
            ended.append(error)

    thread = threading.Thread(target=run, name=source.stem, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(TICK)
            tick()
    except KeyboardInterrupt:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # nobody asks what became of its tasks
        for kernel in kernels:
            _end(kernel, thread)
        raise
    if ended[0] is not None:
        raise ended[0]


def _end(kernel: AsyncKernelManager, thread: threading.Thread) -> None:
    """Interrupt a kernel until its notebook has ended, for PATIENCE seconds; then kill what is left of its group."""
    process: Any = kernel.provisioner
    group = getattr(process, "pgid", None)
    for _ in range(PATIENCE):
        with suppress(ProcessLookupError, TypeError, AttributeError):  # it has ended, or not begun
            os.kill(process.pid, signal.SIGINT)
        thread.join(1)
        if not thread.is_alive():
            break
    if group and group != os.getpgrp():
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    thread.join(PATIENCE)


def _publishable(path: Path, folder: Path, doubts: Sequence[str] = ()) -> None:
    """Make an executed notebook render on GitHub, and for everybody.

    Machine paths, papermill's bookkeeping and widget state are taken out; links lead back to `notebooks/`. What its
    last cell doubts is said below its title, too.
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
            cell.source = re.sub(r"\]\((?!\w+:|#)", f"]({up}/", cell.source)
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        for shown in (output.get("data", {}) for output in cell.get("outputs", [])):
            if "text/html" in shown and len(shown.get("text/plain", "")) > LONGEST_PLAIN:
                del shown["text/plain"]  # nobody reads a table so, and GitHub does not render large notebooks
    if doubts:
        notebook.cells.insert(1, nbformat.v4.new_markdown_cell(alarm(doubts), id="doubts"))
    nbformat.write(notebook, path)


def reproduce(
    preset: str,
    *,
    output: str | None = None,
    only: list[str] | None = None,
    minutes: float | None = None,
    stream: TextIO | None = None,
) -> Path:
    """Execute a preset's notebooks in order and write the report; returns the run's folder.

    output: name or path of the run folder (the preset's name by default). only: notebooks to run, by name or number.
    minutes: start no new arm after that time; the next call goes on. stream: for progress (standard error). A notebook
    that would come out as it is (`freshness`) is left as it is, unless `only` asks for it. Raises `FileNotFoundError`,
    before anything runs, where nothing is measured yet and data that the preset names are not here.
    """
    if data := os.environ.get(DATA):  # notebooks run in a folder of their own
        os.environ[DATA] = str(Path(data).resolve())
    loaded = load_preset(preset)
    order = loaded["notebooks"]
    chosen = _chosen(order, only) if only else order
    folder = records.run_folder(output or preset)
    if not any((folder / "records").glob("*.json")):  # records are redrawn without the data
        published.check_data(preset, chosen)
    sources, fresh = {path.stem: path for path in notebooks()}, Freshness(folder, order)
    started, progress = time.monotonic(), Progress(len(chosen), stream)
    takes = f" about {loaded['minutes']:g} minutes on {loaded['hardware']};" if "minutes" in loaded else ""
    progress.say(f"{preset}: {len(chosen)} notebooks;{takes} what cells print is in {folder / 'logs'}")
    with _until(minutes):
        try:
            for name, given in chosen.items():
                parameters = declared_parameters(sources[name]) | (given or {})
                if not only and fresh.is_fresh(sources[name], parameters):
                    progress.skip(name)
                    continue
                progress.begin(name)
                before, begun, ended = fresh.measured(), time.monotonic(), False
                try:
                    execute(sources[name], folder, given or {}, progress)
                    ended = True
                finally:
                    fresh.keep(sources[name], parameters, before, ended=ended)
                progress.done(f"{time.monotonic() - begun:.0f} s")
        except experiment.OutOfTime as left:
            progress.say(f"{left}; call again to go on")
    report, seconds = write_report(folder), time.monotonic() - started
    progress.say(f"{preset} in {seconds:.0f} s: executed notebooks in {folder}, report in {report}")
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
