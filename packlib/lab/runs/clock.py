"""What a run is measured with: a collator that counts, a callback that marks steps, the peak of memory, the ceiling."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from packlib.collators import IGNORE_INDEX
from packlib.lab.runs.profile import StepProfile
from packlib.lab.runs.spec import RunSpec

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
COUNTS = ("slots", "tokens", "loss_tokens", "examples", "pairs")  # tokens: real ones; pairs: Σ n² of what attends


class Counter:
    """A collator that counts what it hands over: one entry of COUNTS a micro-batch, on the host."""

    def __init__(self, collator: Callable[[list], dict[str, Any]]) -> None:
        self.collator = collator
        self.batches: list[tuple[int, ...]] = []

    def __call__(self, features: list) -> dict[str, Any]:
        batch = self.collator(features)
        ids = batch["input_ids"]
        if len(ids) > 1 or "attention_mask" in batch:
            sequences = len(ids)
        elif all(f.get("seq_lengths") is not None for f in features):
            # a contaminated row has one position 0 for all of its examples
            sequences = sum(len(np.atleast_1d(f["seq_lengths"])) for f in features)
        else:
            positions: torch.Tensor = batch["position_ids"]
            sequences = int((positions == 0).sum())
        real = sum(len(feature["input_ids"]) for feature in features)
        labels: torch.Tensor = batch["labels"][:, 1:]
        boundaries = batch.get("cu_seq_lens_q")
        pairs = ids.numel() * ids.shape[1] if boundaries is None else int((boundaries.long().diff() ** 2).sum())
        self.batches.append((ids.numel(), real, int((labels != IGNORE_INDEX).sum()), sequences, pairs))
        return batch

    def per_step(self, accumulation: int, ends: list[float], per_epoch: int) -> np.ndarray:
        """COUNTS of each optimiser step on this rank, int64 [steps, len(COUNTS)], in the order of collating.

        accumulation: micro-batches of a step. ends: one entry per step that was taken. per_epoch: micro-batches of an
        epoch on one rank; the last step of an epoch takes those that remain.
        """
        counts, index = np.array(self.batches, dtype=np.int64), np.arange(len(self.batches))
        starts = np.flatnonzero(index % per_epoch % accumulation == 0)
        stops = np.append(starts[1:], len(counts))[: len(ends)]
        # What was collated ahead was never trained on.
        stops[-1] = min(stops[-1], starts[len(stops) - 1] + accumulation)
        return np.diff(np.vstack([np.zeros(len(COUNTS), dtype=np.int64), counts.cumsum(axis=0)[stops - 1]]), axis=0)


def of_all_ranks(values: np.ndarray) -> np.ndarray:
    """`values` of every rank, [ranks, *shape]; of this process alone where it is the only one."""
    if not torch.distributed.is_initialized():
        return values[None]
    own = torch.from_numpy(values).to("cuda" if torch.cuda.is_available() else "cpu")
    found = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(found, own)
    return torch.stack(found).cpu().numpy()


class StepClock(TrainerCallback):
    """Marks the begin and end of every optimiser step, reports progress, evaluates between steps."""

    def __init__(
        self, spec: RunSpec, device: torch.device, progress: Callable[[str], None], evaluate: Callable[[], dict] | None
    ) -> None:
        self.spec, self.device, self.progress, self.evaluate = spec, device, progress, evaluate
        self.watch = StepProfile(device)
        self.host: list[float] = []  # seconds until the host was done with a step
        self.begins: list[Any] = []
        self.ends: list[Any] = []
        self.evaluations: list[dict[str, float]] = []
        self.said = time.monotonic()

    def _mark(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self) -> None:
        self.begins.append(self._mark())
        self.began = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            _reset_peak_rss()
        self._begin()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._last(state):
            self.watch.start()

    def _last(self, state: TrainerState) -> bool:
        """Whether the step that follows, or has just ended, is the one that is profiled."""
        return self.spec.profile and len(self.ends) == self.spec.steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._last(state):
            self.watch.stop()
            return
        self.ends.append(self._mark())
        self.host.append(time.perf_counter() - self.began)
        every = self.spec.eval_every
        if self.evaluate and every and state.global_step % every == 0:
            self.evaluations.append({"step": state.global_step} | self.evaluate())
        if time.monotonic() - self.said > 5:
            self.said = time.monotonic()
            self.progress(f"step {state.global_step}/{state.max_steps}")
        self._begin()

    def seconds(self) -> np.ndarray:
        """Time of each step, begin to end, float64 [steps]."""
        if self.device.type == "cpu":
            return np.subtract(self.ends, self.begins[: len(self.ends)])
        torch.cuda.synchronize()
        return np.array([b.elapsed_time(e) / 1e3 for b, e in zip(self.begins, self.ends)])

    @property
    def _measured(self) -> slice:
        """The steps after warm-up."""
        return slice(min(self.spec.warmup_steps, len(self.ends) - 1), None)

    def ranks(self, counts: np.ndarray) -> dict[str, list]:
        """How even the ranks were after warm-up, a value a rank: means of a step, and the peak of memory.

        counts: of `Counter.per_step` on every rank, [ranks, steps, len(COUNTS)]. Step times say little where ranks wait
        for each other; tokens and pairs say what each had to do.
        """
        peak = np.array([_peak_memory(self.device)["peak_memory_bytes"] or 0])
        means = dict(zip(COUNTS, counts[:, self._measured].mean(axis=1).T))
        return {
            "step_seconds": of_all_ranks(self.seconds()[self._measured]).mean(axis=1).tolist(),
            "tokens_per_step": means["tokens"].tolist(),
            "pairs_per_step": means["pairs"].tolist(),
            "peak_memory_bytes": of_all_ranks(peak)[:, 0].tolist(),
        }

    def metrics(self, counts: np.ndarray) -> dict[str, Any]:
        """Rates (per second, all ranks), times (seconds) and sizes of the steps after warm-up, as a record holds them.

        counts: of `Counter.per_step`, the sum of all ranks.
        """
        measured = self._measured
        seconds, counts = self.seconds()[measured], counts[measured]
        slots, real, predicted, sequences, pairs = counts.T

        def spread(values: np.ndarray, mean: float) -> dict[str, float]:
            p20, p50, p80 = np.percentile(values, [20, 50, 80])
            return {"p20": float(p20), "p50": float(p50), "p80": float(p80), "mean": float(mean)}

        def rate(tokens: np.ndarray) -> dict[str, float]:
            return spread(tokens / seconds, tokens.sum() / seconds.sum())

        return {
            "tokens_per_s": rate(real),
            "slots_per_s": rate(slots),
            "loss_tokens_per_s": rate(predicted),
            "step_seconds": spread(seconds, seconds.mean()),
            "measured_steps": len(seconds),
            "measured_fill": float(real.sum() / slots.sum()),
            "measured_waste": float(slots.sum() / real.sum()),
            "tokens_per_step": float(real.mean()),
            "slots_per_step": float(slots.mean()),
            "examples_per_step": float(sequences.mean()),
            "pairs_per_step": float(pairs.mean()),
            "host_seconds": float(np.mean(self.host[measured])),
            "profile": self.watch.summary,
        } | _peak_memory(self.device)

    def trace(self, counts: np.ndarray, losses: list[float], grad_norms: list[float]) -> dict[str, Any]:
        """Step by step: seconds and COUNTS so far, loss (nats) and gradient norm, and what was evaluated on the way.

        counts: of `Counter.per_step`, the sum of all ranks. losses, grad_norms: of `LabTrainer.history`.
        """
        steps = len(self.ends)
        return {
            "step": list(range(1, steps + 1)),
            "seconds": np.cumsum(self.seconds()).round(6).tolist(),
            **{name: np.cumsum(counts[:, i]).tolist() for i, name in enumerate(COUNTS)},
            "loss": losses[:steps],
            "grad_norm": grad_norms[:steps],
            "evaluations": self.evaluations,
        }


class Phases:
    """Seconds of the parts of a run, one after another from here on; `end` names the part that has just ended.

    Of a short arm most time is no training: a sweep's cost is read off these.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def end(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = round(now - self._since, 3)
        self._since = now


def keep_freed_memory() -> None:
    """Let glibc keep freed tensors for the next ones, as the allocators that PyTorch's CPU guide recommends do.

    By default it hands large ones back to the system, which then faults every page in anew: up to 40 % of a step with
    3,000 slots, and hardly anything of a small one, so that padding and packing would be compared on page faults.
    Nothing happens without glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product on random data: the best of five after a warm-up."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def copy_rate(device: torch.device) -> float:
    """Bytes/s of a large copy inside the device's memory, read and written ones together: the best of five."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):  # the first one warms up
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() / best


def launch_time(device: torch.device, launches: int = 1000) -> float | None:
    """Seconds that the host takes to launch a kernel that does nothing to speak of; None on a CPU."""
    if device.type != "cuda":
        return None
    one = torch.zeros(1, device=device)
    for _ in range(100):
        one.add_(1)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(launches):
        one.add_(1)
    seconds = (time.perf_counter() - start) / launches
    torch.cuda.synchronize()
    return seconds


def _peak_memory(device: torch.device) -> dict[str, int | None]:
    if device.type == "cuda":
        return {
            "peak_memory_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    return {"peak_memory_bytes": _peak_rss(), "peak_reserved_bytes": None}


def _reset_peak_rss() -> None:
    gc.collect()
    # Not Linux, or not allowed: the peak is then the process's own, model building included.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _peak_rss() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
