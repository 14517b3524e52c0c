"""Which processes a test has started and left running. On Linux, orphans of its children are found too."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import psutil

_PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
# Servers of multiprocessing: they stay for the next test, and end with this process. What the first one forks does not.
_FORKSERVER, _TRACKER = "multiprocessing.forkserver", "multiprocessing.resource_tracker"


def adopt_orphans() -> None:
    """Let a process whose parent has died become a child of this one, not of init."""
    with suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _children(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task")
    with suppress(OSError):  # not Linux, or it has ended
        texts = [(thread / "children").read_text(encoding="ascii") for thread in threads.iterdir()]
        return [int(child) for text in texts for child in text.split()]
    with suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(pid).children()]
    return []


def descendants(pid: int) -> set[int]:
    """Children of a process, their children, and so on."""
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        for child in _children(waiting.pop()):
            if child not in found:
                found.add(child)
                waiting.append(child)
    return found


def _still_runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess, ChildProcessError):
        if process.status() == psutil.STATUS_ZOMBIE:
            os.waitpid(process.pid, os.WNOHANG)  # adopted, and ended: nobody else will ask
            return False
        command, parent = " ".join(process.cmdline()), process.parent()
        forked = _FORKSERVER in command and parent is not None and _FORKSERVER in " ".join(parent.cmdline())
        return forked or not (_FORKSERVER in command or _TRACKER in command)
    return False


def left_running(before: set[int], grace: float = 5.0) -> list[str]:
    """Command lines of descendants that were not there `before` and run on for `grace` seconds. They are killed."""
    found = []
    for pid in descendants(os.getpid()) - before:
        with suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    found = [process for process in found if _still_runs(process)]
    _, alive = psutil.wait_procs(found, timeout=grace)
    lines = []
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            lines.append(f"{process.pid}: {' '.join(process.cmdline())[:200]}")
            process.kill()
    return lines
