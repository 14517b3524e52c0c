"""What one step did on a GPU: its kernels, its launches, and how long the device waited for the host.

PyTorch's profiler watches the device alone, which hardly slows the host (`ProfilerActivity.CUDA`: kernels, copies and
the calls that launch them; no operators).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

BINS = 200  # of the picture of a step
KERNELS = 16  # kinds that are kept by name
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_CALLS = ("cuda_runtime", "cuda_driver")


class StepProfile:
    """Watches the device between `start` and `stop`; on a CPU nothing is watched, and the summary is None."""

    def __init__(self, device: torch.device) -> None:
        self.summary: dict[str, Any] | None = None
        watching = device.type == "cuda"
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) if watching else None

    def start(self) -> None:
        """Begin to watch, with an idle device."""
        if self._profiler is not None:
            torch.cuda.synchronize()
            self._profiler.start()

    def stop(self) -> None:
        """Wait for the device, and summarise."""
        if self._profiler is None:
            return
        torch.cuda.synchronize()
        self._profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            self._profiler.export_chrome_trace(str(path))
            self.summary = summarise(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])


def summarise(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts and times (seconds) of a chrome trace's events.

    `kernels`: how many ran (copies and fills included). `launches`: calls that put work on the device (a graph is one).
    `kernel_seconds`: time in which at least one ran. `span_seconds`: from the first call to the end of the last kernel.
    `host_seconds`: from the first call to the end of the last launch. `waiting`: share of the span in which none ran.
    `busy`: that share's complement in each of BINS equal parts of the span. `top`: the KERNELS kinds of kernel that
    took longest, as name, number and seconds.

    >>> kernel = {"cat": "kernel", "name": "k", "ts": 10.0, "dur": 5.0}
    >>> call = {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 5.0, "dur": 1.0}
    >>> found = summarise([kernel, call])
    >>> found["kernels"], found["launches"], round(found["waiting"], 2), found["host_seconds"]
    (1, 1, 0.5, 1e-06)
    """
    done = [event for event in events if event.get("cat") in (*_ON_DEVICE, *_CALLS) and "dur" in event]
    ran = _intervals(event for event in done if event["cat"] in _ON_DEVICE)
    calls = [event for event in done if event["cat"] in _CALLS]
    launched = _intervals(event for event in calls if "launch" in event["name"].lower())
    begin = min(event["ts"] for event in done)
    end = ran[:, 1].max()
    merged = _merged(ran)
    edges = np.linspace(begin, end, BINS + 1)
    covered = np.diff([np.clip(edge - merged[:, 0], 0, merged[:, 1] - merged[:, 0]).sum() for edge in edges])
    kernel_time, span = float((merged[:, 1] - merged[:, 0]).sum()), float(end - begin)
    return {
        "kernels": len(ran),
        "launches": len(launched),
        "kernel_seconds": kernel_time / 1e6,
        "span_seconds": span / 1e6,
        "host_seconds": float(launched[:, 1].max() - begin) / 1e6,
        "waiting": 1 - kernel_time / span,
        "busy": (covered / np.diff(edges)).round(3).tolist(),
        "top": _longest(event for event in done if event["cat"] in _ON_DEVICE),
    }


def _longest(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    totals: dict[str, list[float]] = {}
    for event in events:
        totals.setdefault(event["name"][:80], []).append(event["dur"])
    longest = sorted(totals.items(), key=lambda item: -sum(item[1]))[:KERNELS]
    return [{"name": name, "number": len(times), "seconds": sum(times) / 1e6} for name, times in longest]


def _intervals(events: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """Begin and end of each event in microseconds, float64 [events, 2], by begin."""
    found = np.array([(event["ts"], event["ts"] + event["dur"]) for event in events], dtype=float).reshape(-1, 2)
    return found[np.argsort(found[:, 0], kind="stable")]


def _merged(intervals: np.ndarray) -> np.ndarray:
    """The union of intervals that are sorted by begin, as intervals apart from each other."""
    latest = np.maximum.accumulate(intervals[:, 1])
    first = np.append(True, intervals[1:, 0] > latest[:-1])
    return np.column_stack([intervals[first, 0], latest[np.append(first[1:], True)]])
