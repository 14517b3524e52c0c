"""What every notebook does: check its parameters, show its figures with alt text, and end with what it found.

papermill passes what YAML or the command line gives it, and only warns of a name that the notebook does not have. So
the cell after the tagged one calls `start`, which holds what runs against what the tagged cell declares: IPython keeps
the text of the cells that ran, the tagged one and, right after it, the one that papermill injected. That works the same
way under `papermill`, under `python -m packlib reproduce` and by hand, wherever the notebook lies.
"""

from __future__ import annotations

import ast
import base64
import functools
import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import HTML, Markdown, display

from packlib.atomic import atomic_write
from packlib.lab import figures, records
from packlib.lab.doubts import Doubt
from packlib.lab.figures import Picture
from packlib.lab.pages import live
from packlib.lab.pages.ranges import check_ranges
from packlib.lab.parameters import check_parameters, unknown_name

INJECTED = "# Parameters"  # the first line of the cell that papermill puts in


@dataclass
class Run:
    """One execution of a notebook: its name and title, the folder that it writes to, and the figures shown so far.

    figures: name -> alt text, in the order in which they were shown.
    """

    notebook: str
    title: str
    folder: Path
    figures: dict[str, str] = field(default_factory=dict)


def start(notebook: str, names: Mapping[str, Any]) -> Run:
    """Check and print the parameters, make the run's folder, set the theme of figures and tables.

    notebook: its name, as in `notebooks/<name>.ipynb`. names: its `globals()`, with the parameter `run`, a name under
    papermill_runs/ or a path. Raises `ValueError` for a parameter that it does not have, naming the known ones, and for
    a value out of its range, `TypeError` for a value of the wrong type.
    """
    live.say_when_a_cell_takes_long()
    checked = check(names)
    check_ranges(checked, notebook)
    folder = records.run_folder(names["run"])
    figures.theme()
    pd.set_option("display.max_colwidth", None)
    shown = checked | {"run": folder.name}  # without the folders of this machine
    display(pd.DataFrame({"value": {name: in_words(value) for name, value in shown.items()}}).rename_axis("parameter"))
    return Run(notebook, title(notebook), folder)


def in_words(value: Any) -> str:
    """A parameter as it is read: lists with commas, mappings as `name: value`, lists of mappings one after the other.

    >>> in_words([1, 2]), in_words({"limit": 9, "seeds": []}), in_words([{"corpus": "a"}, {"corpus": "b"}])
    ('1, 2', 'limit: 9; seeds: –', '(corpus: a), (corpus: b)')
    """
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {in_words(one)}" for name, one in value.items()) or "–"
    if isinstance(value, list | tuple):
        return ", ".join(f"({in_words(one)})" if isinstance(one, Mapping) else in_words(one) for one in value) or "–"
    return str(value).replace("_{split}.npz", "") if value != "" else "–"


def check(names: Mapping[str, Any]) -> dict[str, Any]:
    """A notebook's parameters, each of the type that its tagged cell gives it; errors as of `start`.

    names: the notebook's `globals()`; where the text of its cells is not kept, nothing is known and nothing checked.
    """
    declared, injected = _parameters(names.get("In", ()))
    for name in injected:
        if name not in declared:
            raise unknown_name("parameter", name, declared)
    return check_parameters(names, declared)


def _parameters(cells: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What the tagged cell declares, with its defaults, and the names that were injected after it."""
    declared: dict[str, Any] = {}
    injected: list[str] = []
    for cell in cells:
        assigned = _assignments(cell)
        if cell.startswith(INJECTED):
            injected = list(assigned)
            continue
        try:
            values = {name: ast.literal_eval(value) for name, value in assigned.items()}
        except ValueError:  # the tagged cell has literals only
            continue
        # The first such cell is the tagged one; run again by hand, it has its names again.
        if values and declared.keys() <= values.keys():
            declared, injected = values, []
    return declared, injected


def _assignments(cell: str) -> dict[str, ast.expr]:
    """Names and what they are set to, where a cell does nothing else; else nothing."""
    try:
        statements = ast.parse(cell).body
    except SyntaxError:
        return {}
    found: dict[str, ast.expr] = {}
    for statement in statements:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        value = getattr(statement, "value", None)
        if not isinstance(statement, ast.Assign | ast.AnnAssign) or not isinstance(target, ast.Name) or value is None:
            return {}
        found[target.id] = value
    return found


def title(notebook: str) -> str:
    """The heading of a notebook of this checkout; its name where there is no such file."""
    path = records.project_root() / "notebooks" / f"{notebook}.ipynb"
    if not path.exists():
        return notebook
    heading = "".join(records.read_json(path)["cells"][0]["source"]).splitlines()[0]
    return heading.removeprefix("# ")


class _Shown:
    """A picture as a page needs it.

    nbconvert's and JupyterLab's own rendering of a PNG drop its alt text; that of HTML keeps it.
    """

    def __init__(self, file: bytes, alt: str) -> None:
        self.file, self.alt = file, alt

    def __repr__(self) -> str:
        return self.alt

    def _repr_html_(self) -> str:
        source = base64.b64encode(self.file).decode()
        return f'<img src="data:image/png;base64,{source}" alt="{html.escape(self.alt)}">'


def show(figure: Picture, name: str | None = None, run: Run | None = None) -> None:
    """Display a figure with its alt text, which the PNG carries, too.

    With a name and a run it is kept as `figures/<name>.png` of the run's folder, and stands in its report.
    """
    file = figures.png(figure)
    if name and run:
        with atomic_write(run.folder / "figures" / f"{name}.png", "wb") as kept:
            kept.write(file)
        run.figures[name] = figure.alt
    display(_Shown(file, figure.alt))


def explore(draw: Callable[..., tuple[Picture, str]], **choices: Any) -> None:
    """Display a figure and a line about it, with controls for the arguments of `draw` where somebody is there.

    choices: per argument a list or a range, as for `ipywidgets.interact`. Elsewhere the first figure stands alone.
    """

    @functools.wraps(draw)  # its arguments and defaults
    def shown(**chosen: Any) -> HTML:
        figure, line = draw(**chosen)
        return HTML(f"<p>{html.escape(line)}</p>{_Shown(figures.png(figure), figure.alt)._repr_html_()}")

    live.sliders(shown, choices)


def finish(findings: Sequence[str], run: Run) -> None:
    """What the last cell calls: show the findings, and write `summaries/<notebook>.json`, the proof of having ended.

    findings: sentences whose numbers were computed. Those that take others back (`Doubt`) come first, in red.
    """
    doubts = [finding for finding in findings if isinstance(finding, Doubt)]
    found = [finding for finding in findings if not isinstance(finding, Doubt)]
    summary = {"title": run.title, "doubts": doubts, "findings": found, "figures": run.figures}
    records.write_json(run.folder / "summaries" / f"{run.notebook}.json", summary, overwrite=True)
    if doubts:
        display(HTML(alarm(doubts)))
    display(Markdown("\n".join(f"- {finding}" for finding in found)))


def alarm(doubts: Sequence[str]) -> str:
    """Doubts as a red box, and with a red mark where a page drops colours, as HTML."""
    lines = "<br>".join(f"\U0001f534 {html.escape(doubt)}" for doubt in doubts)
    look = "color: #b00020; background-color: #fff0f0; padding: 0.5em"  # its own ground: it is read in dark, too
    return f'<div class="alert alert-block alert-danger" style="{look}"><b>{lines}</b></div>'
