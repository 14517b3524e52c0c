"""How far a run is: a line in place on a terminal; elsewhere few lines, however long it takes."""

import io
import logging

from packlib.lab.pages import progress
from packlib.lab.pages.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that a test lets pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_where_it_is_and_how_long_it_will_take():
    clock = Clock()
    shown = Progress(9, io.StringIO(), clock=clock)
    shown.begin("06_measure")
    assert shown.line() == "notebook 1/9 06_measure: starting, 0 s"
    shown.hear("Executing Cell 4-----")
    clock.now = 5
    assert shown.line() == "notebook 1/9 06_measure: cell 4, 5 s"
    shown.hear("[1/4] pydocs · tiny: has a record\n")
    shown.hear("[2/4] pydocs · tiny: step 3 of 9\n")
    assert shown.line() == "notebook 1/9 06_measure: arm 2/4 (pydocs · tiny), 5 s", "nothing measured, nothing guessed"
    clock.now = 15
    shown.hear("[2/4] pydocs · tiny: ok\n[3/4] pydocs · small: step 1 of 9\n")
    assert shown.line() == "notebook 1/9 06_measure: arm 3/4 (pydocs · small), 15 s, about 20 s left"
    shown.begin("07_compare")
    assert shown.line() == "notebook 2/9 07_compare: starting, 0 s"


def test_a_terminal_is_updated_in_place(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    shown = Progress(2, terminal, clock=Clock())
    shown.begin("a_notebook_with_a_name_wider_than_the_terminal")
    for _ in range(50):
        shown.tick()
    shown.done("3 s")
    text = terminal.getvalue()
    assert text.count("\n") == 1 and text.count("\r\x1b[K") == 52
    assert all(len(line) < 40 for line in text.split("\r\x1b[K")[1:-1])


def test_elsewhere_a_day_has_few_lines():
    clock, stream = Clock(), io.StringIO()
    shown = Progress(10, stream, clock=clock)
    for i in range(10):
        shown.begin(f"0{i}")
        for _ in range(864):
            clock.now += 10
            shown.tick()
        shown.done("2 h")
    lines = stream.getvalue().splitlines()
    assert progress.MOST <= len(lines) <= progress.MOST + 10
    assert lines[0].startswith("notebook 1/10 00: starting, 10 s"), "the first after ten seconds"


def test_what_cells_say_goes_to_the_log_alone(tmp_path, capsys):
    logger, heard = logging.getLogger("papermill"), []
    before = (logger.handlers, logger.propagate, logger.level)
    with progress.heard(tmp_path / "logs" / "06.log", heard.append):
        logger.info("Executing Cell 1")
        logger.warning("a cell's stderr")
    assert (tmp_path / "logs" / "06.log").read_text(encoding="utf-8") == "Executing Cell 1\na cell's stderr\n"
    assert heard == ["Executing Cell 1", "a cell's stderr"] and capsys.readouterr().err == ""
    assert (logger.handlers, logger.propagate, logger.level) == before
