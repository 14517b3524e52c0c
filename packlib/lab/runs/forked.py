"""Processes that are forked from a server, which has imported everything once: there in half a second, not in ten.

The server belongs to the process that starts the first one, and serves those that it forks, too: a kernel of
`reproduce` starts its arms from the server that has started it. CUDA is not initialised there, so each process may.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

context = multiprocessing.get_context("forkserver")


def start(
    target: Callable[..., object],
    *arguments: Any,
    preload: str,
    output: int = 2,
    environment: Mapping[str, str] = os.environ,
    daemon: bool = False,
) -> BaseProcess:
    """A process that runs `target(*arguments)` and ends when this one has ended.

    preload: module that the server imports, if this starts it. output: file descriptor for what the process writes to
    its standard output and error. environment: its environment variables, as of now and not as of the server's start.
    """
    context.set_forkserver_preload([preload])
    handed_over = Connection(os.dup(output), readable=False)  # multiprocessing hands over the files of connections
    process = context.Process(target=_run, args=(target, arguments, handed_over, dict(environment)), daemon=daemon)
    process.start()
    handed_over.close()
    return process


def _run(
    target: Callable[..., object], arguments: tuple[Any, ...], output: Connection, environment: dict[str, str]
) -> None:
    if parent := multiprocessing.parent_process():
        end_when(parent.join)
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    os.environ.clear()
    os.environ.update(environment)
    gc.freeze()  # what the server imported is no garbage: looking at it again takes 0.2 s, and copies its pages
    target(*arguments)


def end_when(waited_for: Callable[[], object]) -> None:
    """End this process as soon as `waited_for()` returns: a run must not go on when nobody waits for its record."""

    def wait() -> None:
        waited_for()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
