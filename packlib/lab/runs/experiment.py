"""RunSpec -> RunRecord: measured training runs, each in a process of its own.

A sweep is a list of specs and a folder of records. Specs that have a record are not run again; a run that fails, runs
out of memory or is killed becomes a record with the reason and the sweep goes on. The processes are forked from a
server that has imported torch, transformers and TRL once, so a process of its own costs a fraction of a second and
gives its memory back, on the GPU too.

A record is named by what it measured: its spec (`RunSpec.spec_id`) and the content of its corpus, so that an edited
corpus file is another run. Where the data are not at hand, as when published records are redrawn, the spec alone finds
them.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pandas as pd

from packlib.lab import records
from packlib.lab.data.corpora import content_sha256
from packlib.lab.runs import forked
from packlib.lab.runs.spec import RunSpec

logger = logging.getLogger(__name__)
UNTIL = "PACKLIB_UNTIL"  # seconds since the epoch after which no arm is started
Progress = Callable[[str], None]


class OutOfTime(RuntimeError):
    """The time of this call is used up and arms are left; every finished one has its record, the next call goes on."""


class SweepFailed(RuntimeError):
    """No arm of a sweep has a result, and why."""


def find(spec: RunSpec, folder: Path) -> dict[str, Any] | None:
    """The record of a spec on the data as they are now, on whatever data where they are not here; None without one."""
    return records.find_record(folder, spec.spec_id, content_sha256(spec.corpus, spec.tokenizer))


def run(specs: Iterable[RunSpec], folder: Path, *, progress: Progress = logger.info) -> list[dict[str, Any]]:
    """Make sure that every spec has a record in `folder`; return the records, in order.

    In a script, call it under `if __name__ == "__main__":`, as everything that starts processes.

    progress: called with a line when an arm starts and ends, and every few seconds in between. Runs in the given order,
    each in its own processes (one a rank), one after another, or `$PACKLIB_CONCURRENT_RUNS` at a time, on all GPUs in
    turn: for losses, as their times do not count then. After `$PACKLIB_UNTIL`, or when the longest arm so far would not
    end before it, no further arm is started and `OutOfTime` is raised: the next call goes on. A `failed` record, or one
    of a run that found no memory beside others, is kept under `superseded/` and its run tried again. Raises
    `FileNotFoundError` for a corpus that is not here, before any arm starts, `ValueError` for several ranks where
    several runs share the device, and `SweepFailed` where several arms all failed, each reason once.
    """
    specs = list(specs)
    if records.concurrent_runs() > 1 and any(spec.world_size > 1 for spec in specs):
        raise ValueError(f"{records.CONCURRENT} = {records.concurrent_runs()}; runs of several ranks have all devices")
    contents = {(spec.corpus, spec.tokenizer): content_sha256(spec.corpus, spec.tokenizer) for spec in specs}
    found: dict[int, dict[str, Any]] = {}
    # 1. What has a record, and what is left to run.
    for i, spec in enumerate(specs):
        record = records.find_record(folder, spec.spec_id, contents[spec.corpus, spec.tokenizer])
        here = contents[spec.corpus, spec.tokenizer] is not None
        if record and not _tried_again(record, here):
            found[i] = record
        elif contents[spec.corpus, spec.tokenizer] is None:
            before = f"{spec.strategy} failed on it before" if record else f"{spec.strategy} has no record on it"
            raise FileNotFoundError(f"corpus {spec.corpus!r} is not here, and {before}")
    if found:
        progress(f"{len(found)} of {len(specs)} arms had a record")
    # 2. Run it, while there is time.
    until, longest, stop = float(os.environ.get(UNTIL, "inf")), 0.0, threading.Event()
    left = [i for i, spec in enumerate(specs) if i not in found and spec not in specs[:i]]
    free: SimpleQueue[str] = SimpleQueue()  # the GPU of each run that may be going on
    for gpu in islice(cycle(_gpus() if left else [""]), records.concurrent_runs()):
        free.put(gpu)

    def one(i: int) -> None:
        nonlocal longest
        spec, content = specs[i], contents[specs[i].corpus, specs[i].tokenizer]
        title = f"[{i + 1}/{len(specs)}] {Path(spec.corpus).name} · {spec.model} · {spec.strategy} · seed {spec.seed}"
        if time.time() + longest > until:
            progress(f"{title}: left for the next call")
        else:
            assert content is not None  # looked at above
            if failed := records.find_record(folder, spec.spec_id, content):
                records.supersede(folder, failed)
            started, gpu = time.monotonic(), free.get()
            run_id = records.run_id_on(spec.spec_id, content)
            found[i] = _run_one(spec, run_id, folder, _titled(progress, title), stop, gpu)
            longest = max(longest, time.monotonic() - started)
            free.put(gpu)

    if records.concurrent_runs() == 1:
        for i in left:
            one(i)
    else:
        _at_once(one, left, stop)
    # 3. What became of it.
    done = [found[first] for first in map(specs.index, specs) if first in found]
    if missing := len(specs) - len(done):
        raise OutOfTime(f"{missing} of {len(specs)} arms are left for the next call")
    if len(done) > 1 and all(record["status"] == "failed" for record in done):
        reasons = dict.fromkeys(str(record["error"]) for record in done)
        raise SweepFailed(f"all {len(done)} arms failed: {'; '.join(reasons)}")
    return done


def run_here(
    specs: Iterable[RunSpec], folder: Path, *, progress: Progress = logger.info
) -> list[dict[str, Any] | None]:
    """`run` where a corpus is here; where none is, the record of each, or None, in order.

    So what is published of a run is redrawn where its data are not, and a line says what is missing of it; who has a
    part of the data is told of the rest before any arm starts. Raises as `run` does, and `FileNotFoundError` where
    nothing can be run and `folder` has no record at all.
    """
    specs = list(specs)
    if any(content_sha256(spec.corpus, spec.tokenizer) is not None for spec in specs):
        return [*run(specs, folder, progress=progress)]
    found = [find(spec, folder) for spec in specs]
    missing = {spec.corpus for spec, record in zip(specs, found) if record is None}
    if missing:
        names = ", ".join(sorted(map(repr, missing)))
        if not any(found) and not records.read_records(folder):
            raise FileNotFoundError(f"corpus {names} is not here, and {folder.name} has no records")
        progress(f"{found.count(None)} of {len(found)} arms have no record, and their corpus is not here: {names}")
    return found


def _tried_again(record: dict[str, Any], here: bool) -> bool:
    """Whether the next run may end otherwise: this one failed, or had to share the memory that it lacked.

    here: whether its data are. Without, what lacked memory is a result like any other, to be drawn.
    """
    shared = record["status"] == "oom" and not records.had_device_alone(record)
    return record["status"] == "failed" or (shared and here)


def _at_once(one: Callable[[int], None], left: list[int], stop: threading.Event) -> None:
    """`one(i)` for all that are left, `records.concurrent_runs()` at a time; what stops this thread sets `stop`."""
    with ThreadPoolExecutor(records.concurrent_runs()) as pool:
        try:
            list(pool.map(one, left))
        except BaseException:  # Ctrl-C reaches this thread alone
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def frame(specs: Iterable[RunSpec], folder: Path) -> pd.DataFrame:
    """The records of these specs as `records.load_records` gives them, in the order of the specs.

    A spec without a record has no row. Raises `ValueError` for a folder without records.
    """
    loaded = records.load_records(folder)
    if not len(loaded):
        raise ValueError(f"{folder.name} has no records; run the arms first")
    wanted = [record["run_id"] for spec in specs if (record := find(spec, folder))]
    return loaded.set_index("run_id", drop=False).loc[wanted].reset_index(drop=True)


def _titled(progress: Progress, title: str) -> Progress:
    return lambda line: progress(f"{title}: {line}")


def _gpus() -> list[str]:
    """The GPUs here, as CUDA_VISIBLE_DEVICES names them; one that is none without any."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())] or [""]


def _run_one(
    spec: RunSpec, run_id: str, folder: Path, progress: Progress, stop: threading.Event, gpu: str
) -> dict[str, Any]:
    """One run in processes of its own, one a rank; a record exists afterwards, whatever happened to them.

    stop: once it is set, they are ended and `KeyboardInterrupt` raised. gpu: the one that a single rank has.
    """
    code = _fork(spec, run_id, folder, progress, stop, gpu)
    if code in (-signal.SIGINT, 130):
        raise KeyboardInterrupt
    record = records.read_record(folder, run_id)
    if record is None:
        status, reason = _died(code)
        record = records.unfinished(run_id, asdict(spec), status, reason)
        records.write_record(folder, record)
    progress(f"{record['status']}{' · ' + record['error'] if record['error'] else ''}")
    return record


def _died(code: int) -> tuple[str, str]:
    """Status and reason of a process that left no record."""
    if code == -signal.SIGKILL:
        return "oom", "killed by SIGKILL, probably out of memory"
    if code < 0:
        return "failed", f"killed by {signal.Signals(-code).name}"
    return "failed", f"ended with exit code {code} and no record"


def _fork(spec: RunSpec, run_id: str, folder: Path, progress: Progress, stop: threading.Event, gpu: str) -> int:
    """The worker in a process of its own for every rank.

    Returns 0, or the exit code of the rank that ended first with another; the others are ended then, as they would wait
    for it.
    """
    receiver, sender = forked.context.Pipe(duplex=False)
    ranks = [
        forked.start(
            *(_child, spec, run_id, folder, sender),
            preload="packlib.lab.runs.preload",
            environment=environment,
            daemon=True,
        )
        for environment in _ranks(spec.world_size, gpu)
    ]
    sender.close()
    open_ended = True
    try:
        while open_ended and not any(rank.exitcode for rank in ranks):
            if stop.is_set():
                raise KeyboardInterrupt
            open_ended = _pass_on(receiver, progress, wait=0.5)
        while open_ended and receiver.poll():
            open_ended = _pass_on(receiver, progress)
        if not open_ended:  # every rank has ended, or is about to
            for rank in ranks:
                rank.join()
        return next((rank.exitcode for rank in ranks if rank.exitcode), 0)
    finally:
        for rank in ranks:
            rank.terminate()
            rank.join()


def _pass_on(receiver: Connection, progress: Progress, wait: float = 0.0) -> bool:
    """Hands over a line, if there is one within `wait` seconds; whether there can be another."""
    try:
        if receiver.poll(wait):
            progress(receiver.recv())
    except EOFError:
        return False
    return True


def _ranks(world_size: int, gpu: str) -> list[dict[str, str]]:
    """The environment of each rank: this process's, and above one rank what torchrun would add to it.

    A single rank sees `gpu` alone: Trainer takes several for DataParallel, which cannot split a [1, T] batch.
    """
    if world_size == 1:
        return [os.environ | {"CUDA_VISIBLE_DEVICES": gpu}]
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]  # free once this is closed
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world_size))
    return [os.environ | shared | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) for rank in range(world_size)]


def _child(spec: RunSpec, run_id: str, folder: Path, sender: Any) -> None:
    from packlib.lab.runs import worker

    if not worker.execute(spec, run_id, folder, sender.send):
        sys.exit(1)
