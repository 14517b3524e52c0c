"""What a notebook does only while somebody sits before it: say that a cell still runs, and offer sliders.

Under papermill nobody can be asked for input, and nothing of this happens; what a page shows is the static figure.
"""

from __future__ import annotations

import functools
import html
import inspect
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from IPython.core.getipython import get_ipython
from IPython.display import HTML, display

PATIENCE = 2.0  # seconds that a cell may run before it says so


def somebody_is_there() -> bool:
    """Whether the front end that runs this cell could ask somebody something: JupyterLab can, papermill cannot."""
    return bool(getattr(getattr(get_ipython(), "kernel", None), "_allow_stdin", False))


class _Timer:
    """A line under a cell that takes longer than `PATIENCE`, counting its seconds."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.counting = threading.Thread()

    def begin(self, _info: object = None) -> None:
        self.end()
        self.ended = threading.Event()
        given = (self.ended, time.monotonic())
        self.counting = threading.Thread(target=self._count, args=given, daemon=True)
        self.counting.start()

    def end(self, _result: object = None) -> None:
        self.ended.set()
        if self.counting.is_alive():  # what it writes last belongs to this cell
            self.counting.join(1.0)

    def _count(self, ended: threading.Event, begun: float) -> None:
        if ended.wait(PATIENCE):
            return
        line = display(_small("running"), display_id=True)
        while not ended.wait(1.0):
            line.update(_small(f"running, {time.monotonic() - begun:.0f} s"))
        line.update(_small(f"took {time.monotonic() - begun:.0f} s"))


@functools.cache
def _timer() -> _Timer:
    return _Timer()


def say_when_a_cell_takes_long() -> None:
    """From now on, the cell that calls this included. Does nothing where nobody is there."""
    if somebody_is_there():
        timer, events = _timer(), get_ipython().events  # type: ignore[union-attr]
        if timer.begin not in events.callbacks["pre_run_cell"]:
            events.register("pre_run_cell", timer.begin)
            events.register("post_run_cell", timer.end)
        timer.begin()


def _small(text: str) -> HTML:
    return HTML(f"<small>{html.escape(text)}</small>")


def sliders(draw: Callable[..., Any], choices: Mapping[str, Any]) -> None:
    """Show what `draw` returns; where somebody is there, controls under it draw it again.

    choices: as for `ipywidgets.interact`, per argument a list or a range `(low, high)` or `(low, high, step)`; it
    starts at the argument's default, else at the first of the list. The drawing is an output like any other, changed in
    place: the notebook shows it wherever it is read, with or without widgets.
    """
    arguments = inspect.signature(draw).parameters
    first = {name: values[0] for name, values in choices.items() if arguments[name].default is inspect.Parameter.empty}
    drawing = display(draw(**first), display_id=True)
    if not somebody_is_there():
        return
    from ipywidgets import VBox, interactive

    @functools.wraps(draw)  # whose arguments and defaults the controls follow
    def again(**chosen: Any) -> None:
        drawing.update(draw(**chosen))

    controls = interactive(again, **choices)
    for control in controls.kwargs_widgets:
        if hasattr(control, "continuous_update"):
            control.continuous_update = False  # draw where the slider is let go
    shown = VBox(controls.children)._repr_mimebundle_()
    display(shown | {"text/plain": "Run this cell in JupyterLab to move the sliders."}, raw=True)
