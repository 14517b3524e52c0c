"""RunSpec -> RunRecord: measured training runs, each in a process of its own.

A sweep is a list of specs and a folder of records. Specs that have a record are not run again; a run that fails, runs out of memory or is
killed becomes a record with the reason and the sweep goes on. The processes are forked from a server that has imported torch, transformers
and TRL once, so a process of its own costs a fraction of a second and gives its memory back, on the GPU too.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from packlib.lab import records
from packlib.lab.parameters import check_parameters, unknown_name

logger = logging.getLogger(__name__)
DTYPES = ("float32", "bfloat16", "bf16_mixed")
UNTIL = "PACKLIB_UNTIL"  # seconds since the epoch after which no arm is started


class OutOfTime(RuntimeError):
    """The time of this call is used up and arms are left; every finished one has its record, the next call goes on."""


@dataclass(frozen=True)
class RunSpec:
    """Everything a run's result depends on, besides code and machine. `run_id` is its hash.

    batch_size: examples per mini-batch (padding, minibatch_packing, …) or rows of `max_tokens` per micro-batch (fixed length); rows of
        batch_size × max_tokens are one micro-batch where a strategy plans whole batches (multipack).
    steps: optimiser steps, passing over the plan as often as needed; None: `epochs` passes.
    warmup_steps: first steps left out of every timing. repeat: distinguishes repetitions of one measurement.
    kernel: one of `packlib.attention.KERNELS` or `auto`, through `packlib_varlen`; or `transformers_sdpa`, `transformers_eager`,
        `transformers_flash`: transformers' own attention, the last with the flash-attn package or a stand-in for its kernel.
    dtype: `float32`; `bfloat16` (weights, gradients and optimiser states); `bf16_mixed` (float32 weights under autocast).
    weighting: `per_token` or `per_example`. loss: `full` or `response`. overflow: what happens to examples above max_tokens.
    eval_examples: size of the held-out set (0: none), evaluated at the end and every `eval_every` steps. atom_size: for fixed_length.
    examples_per_step: group rows so that optimiser steps hold about this many examples. layers: toy depth instead of the published one.
    generate_examples: evaluation examples whose final answer is generated and compared.
    """

    model: str = "tiny-llama"
    corpus: str = "pydocs"
    strategy: str = "padding"
    tokenizer: str = "bpe"
    batch_size: int = 4
    max_tokens: int = 1024
    gradient_accumulation: int = 1
    steps: int | None = None
    epochs: float = 1.0
    warmup_steps: int = 3
    limit: int | None = None
    overflow: str = "truncate"
    loss: str = "full"
    weighting: str = "per_token"
    seed: int = 0
    repeat: int = 0
    kernel: str = "auto"
    dtype: str = "float32"
    learning_rate: float = 1e-3
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    weight_decay: float = 0.0
    gradient_checkpointing: bool = False
    eval_examples: int = 0
    eval_every: int | None = None
    generate_examples: int = 0
    atom_size: int | None = None
    examples_per_step: int | None = None
    layers: int | None = None
    world_size: int = 1

    def __post_init__(self) -> None:
        from packlib.lab.strategies import OVERFLOW, get_strategy

        optional = {"steps", "limit", "eval_every", "atom_size", "examples_per_step", "layers"}
        checked = check_parameters(asdict(self), {f.name: None if f.name in optional else f.default for f in fields(self)})
        vars(self).update(checked)  # an int for a float is that float: the same run, the same id
        for name in optional | {"batch_size", "max_tokens", "gradient_accumulation", "world_size"}:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} = {value!r}; expected an integer of at least 1{' or None' if name in optional else ''}")
        get_strategy(self.strategy)
        choices = {"dtype": DTYPES, "overflow": OVERFLOW, "loss": ("full", "response"), "weighting": ("per_token", "per_example")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
        if self.kernel not in known_kernels():
            raise unknown_name("kernel", self.kernel, known_kernels())

    @property
    def run_id(self) -> str:
        return records.run_id(asdict(self))


def known_kernels() -> tuple[str, ...]:
    """What `RunSpec.kernel` may be."""
    from packlib.attention import KERNELS

    return ("auto", *KERNELS, "transformers_sdpa", "transformers_eager", "transformers_flash")


def grid(base: RunSpec, **axes: Iterable[Any]) -> list[RunSpec]:
    """Every combination of the axes over `base`, the last axis fastest.

    >>> [s.strategy + str(s.seed) for s in grid(RunSpec(), seed=[0, 1], strategy=["padding", "minibatch_packing"])]
    ['padding0', 'minibatch_packing0', 'padding1', 'minibatch_packing1']
    """
    specs = [base]
    for name, values in axes.items():
        values = list(values)
        specs = [replace(spec, **{name: value}) for spec in specs for value in values]
    return specs


def run(specs: Iterable[RunSpec], folder: Path, *, progress: Callable[[str], None] = logger.info) -> list[dict[str, Any]]:
    """Make sure that every spec has a record in `folder`; return the records, in order.

    In a script, call it under `if __name__ == "__main__":`, as everything that starts processes.

    progress: called with a line when an arm starts and ends, and every few seconds in between. Runs one after another, in the given order, each
    in its own process (under torchrun where `world_size` > 1). After `$PACKLIB_UNTIL`, or when the longest arm so far would not end before
    it, no further arm is started and `OutOfTime` is raised: the next call goes on. A `failed` record is kept under `superseded/` and its run
    tried again.
    """
    specs = list(specs)
    until = float(os.environ.get(UNTIL, "inf"))
    longest, done = 0.0, []
    for i, spec in enumerate(specs):
        record = records.read_record(folder, spec.run_id)
        title = f"[{i + 1}/{len(specs)}] {spec.corpus.rsplit('/')[-1]} · {spec.model} · {spec.strategy} · seed {spec.seed}"
        if record and record["status"] == "failed":
            old = folder / "records" / f"{spec.run_id}.json"
            old.parent.with_name("superseded").mkdir(exist_ok=True)
            old.replace(old.parent.with_name("superseded") / f"{spec.run_id}-{time.time_ns()}.json")
            record = None
        if record:
            progress(f"{title}: has a record")
        elif time.time() + longest > until:
            progress(f"{title}: left for the next call")
            continue
        else:
            started = time.monotonic()
            _run_one(spec, folder, lambda line, title=title: progress(f"{title}: {line}"))
            longest = max(longest, time.monotonic() - started)
            record = records.read_record(folder, spec.run_id)
            progress(f"{title}: {record['status']}{' · ' + record['error'] if record['error'] else ''}")
        done.append(record)
    if left := len(specs) - len(done):
        raise OutOfTime(f"{left} of {len(specs)} arms are left for the next call")
    return done


def frame(specs: Iterable[RunSpec], folder: Path) -> pd.DataFrame:
    """The records of these specs, as `records.load_records` gives them, in the order of the specs; those without a record are absent."""
    loaded, wanted = records.load_records(folder), [spec.run_id for spec in specs]
    if not len(loaded):
        raise ValueError(f"{folder.name} has no records; run the arms first")
    return loaded.set_index("run_id", drop=False).reindex([i for i in wanted if i in set(loaded["run_id"])]).reset_index(drop=True)


def _run_one(spec: RunSpec, folder: Path, progress: Callable[[str], None]) -> None:
    """One run in a process of its own; a record exists afterwards, whatever happened to the process."""
    code = _launch(spec, folder, progress) if spec.world_size > 1 else _fork(spec, folder, progress)
    if code in (-signal.SIGINT, 130):
        raise KeyboardInterrupt
    if records.read_record(folder, spec.run_id) is None:
        killed = code == -signal.SIGKILL
        reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code} and no record"
        records.write_record(folder, unfinished(spec, "oom" if killed else "failed", reason + (", probably out of memory" if killed else "")))


def unfinished(spec: RunSpec, status: str, reason: str) -> dict[str, Any]:
    """The record of a run without a result."""
    empty = {"plan": None, "metrics": None, "trace": None}
    return {"run_id": spec.run_id, "status": status, "error": reason, "spec": asdict(spec), "environment": records.environment()} | empty


def _fork(spec: RunSpec, folder: Path, progress: Callable[[str], None]) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["packlib.lab.worker"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(spec, folder, sender), daemon=True)
    process.start()
    sender.close()
    try:
        while True:
            try:
                progress(receiver.recv())
            except EOFError:
                break
        process.join()
    except BaseException:
        process.terminate()
        process.join()
        raise
    return process.exitcode


def _child(spec: RunSpec, folder: Path, sender: Any) -> None:
    from packlib.lab import worker

    worker.execute(spec, folder, sender.send)


def _launch(spec: RunSpec, folder: Path, progress: Callable[[str], None]) -> int:
    """The same worker, `world_size` times, under torchrun: DataParallel cannot split a [1, T] batch."""
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={spec.world_size}"]
    spec_file = records.write_json(folder / "specs" / f"{spec.run_id}.json", asdict(spec), overwrite=True)
    command = [sys.executable, *ranks, "-m", "packlib.lab.worker", str(spec_file), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout:
                progress(line.rstrip())
        except BaseException:
            process.terminate()  # torchrun ends its ranks; they would train on where only this process is interrupted
            process.wait()
            raise
    return process.returncode
