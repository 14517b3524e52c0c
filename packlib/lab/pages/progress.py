"""How far `reproduce` has come: one line that is updated on a terminal, now and then a line elsewhere.

What cells print goes into `logs/<notebook>.log` of the run's folder; from it the display reads which cell, and which
arm of how many, is running, and how long the arms so far took.
"""

from __future__ import annotations

import logging
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

ARM = re.compile(r"^\[(\d+)/(\d+)\] (.*?): (.*)", re.MULTILINE)  # a line of `experiment.run`
CELL = re.compile(r"^Executing Cell (\d+)")  # a line of papermill
SOON, GROWTH, MOST = 10.0, 0.25, 20  # seconds to the first line where nothing can be updated, share to the next, lines


class Progress:
    """Lines about `count` notebooks. On a terminal `tick` updates one line in place; elsewhere at most MOST are added.

    clock: seconds, as `time.monotonic`.
    """

    def __init__(
        self, count: int, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.count, self.stream, self.clock = count, stream or sys.stderr, clock
        self.started = self.begun = clock()
        self.number, self.name, self.cell, self.lines = 0, "", 0, 0
        self.next_line = self.started + SOON
        self.arms: tuple[int, int, str] | None = None
        self.measured, self.arms_begun = 0, 0.0

    def begin(self, name: str) -> None:
        """The next notebook begins."""
        self.number, self.name, self.begun = self.number + 1, name, self.clock()
        self.cell, self.arms, self.measured = 0, None, 0
        self.tick()

    def hear(self, text: str) -> None:
        """Something that papermill or a cell says."""
        if found := CELL.match(text):
            self.cell = int(found[1])
        for number, count, title, said in ARM.findall(text):
            last, of = self.arms[:2] if self.arms else (0, 0)
            if int(count) != of or int(number) == 1 < last:  # another sweep; of one, several arms may run at once
                self.measured, self.arms_begun = 0, self.clock()
            self.arms = (int(number), int(count), title)
            self.measured += said.startswith(("ok", "oom", "failed"))

    def line(self) -> str:
        """Where the notebook is, and about how many seconds its arms will take."""
        seconds = self.clock() - self.begun
        where = f"notebook {self.number}/{self.count} {self.name}: "
        if self.arms is None:
            return where + (f"cell {self.cell}, " if self.cell else "starting, ") + f"{seconds:.0f} s"
        number, count, title = self.arms
        left = ""
        if self.measured and number < count:
            each = (self.clock() - self.arms_begun) / self.measured
            left = f", about {each * (count - number + 1):.0f} s left"
        return f"{where}arm {number}/{count} ({title}), {seconds:.0f} s{left}"

    def tick(self) -> None:
        """Show where things are, if it is time to."""
        if self.stream.isatty():
            width = shutil.get_terminal_size().columns - 1
            self.stream.write(f"\r\x1b[K{self.line()[:width]}")
            self.stream.flush()
        elif self.clock() >= self.next_line and self.lines < MOST:
            self.lines += 1
            self.next_line = self.clock() + max(SOON, GROWTH * (self.clock() - self.started))
            self.say(self.line())

    def say(self, text: str) -> None:
        """A line that stays."""
        self.stream.write(("\r\x1b[K" if self.stream.isatty() else "") + text + "\n")
        self.stream.flush()

    def done(self, how: str) -> None:
        """The notebook has ended."""
        self.say(f"notebook {self.number}/{self.count} {self.name}: {how}")

    def skip(self, name: str) -> None:
        """The next notebook need not run."""
        self.number, self.name = self.number + 1, name
        self.done("nothing new")


@contextmanager
def heard(path: Path, hear: Callable[[str], None]) -> Iterator[None]:
    """What papermill and the cells say goes to a file, and to `hear`, and nowhere else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("papermill")
    before = logger.handlers, logger.propagate, logger.level
    file = logging.FileHandler(path, mode="w", encoding="utf-8")
    logger.handlers, logger.propagate = [file, _Ear(hear)], False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before[:2]
        logger.setLevel(before[2])
        file.close()


class _Ear(logging.Handler):
    def __init__(self, hear: Callable[[str], None]) -> None:
        super().__init__()
        self.hear = hear

    def emit(self, record: logging.LogRecord) -> None:
        self.hear(record.getMessage())
