"""Planning speed and quality, as ratios measured in one run: `python benchmarks/bench_plans.py [--largest 8]`.

Lengths are lognormal (mean 200, sigma 1, at most 4096). The curve runs each size in a process of its own, for its peak
memory.
"""

from __future__ import annotations

import argparse
import logging
import resource
import subprocess
import sys
import time

import numpy as np

from packlib.plans.packing import count, pack_histogram
from packlib.plans.planners import best_fit_decreasing, first_fit_decreasing, histogram, next_fit

CAPACITY = 4096


def lognormal(examples: int) -> np.ndarray:
    draws = np.random.default_rng(0).standard_normal(examples, dtype=np.float32)
    np.exp(draws + np.float32(np.log(200) - 0.5), out=draws)
    return draws.clip(1, CAPACITY, out=draws).astype(np.int32)


def timed(function, *args, **kwargs):
    begin = time.perf_counter()
    result = function(*args, **kwargs)
    return result, time.perf_counter() - begin


def report(what: str, value: str, target: str, met: bool) -> None:
    print(f"{what:68} {value:>20}   {target:18} {'ok' if met else 'MISSED'}", flush=True)


def packers() -> float:
    """The first call of each packer on a million lengths; returns best fit's seconds per example."""
    lengths = lognormal(10**6)
    bound = -(-int(lengths.sum(dtype=np.int64)) // CAPACITY)
    plan, first = timed(best_fit_decreasing, lengths, CAPACITY, overflow="error")
    report("best fit, a million lengths, first call", f"{first:.2f} s", "at most 0.5 s", first <= 0.5)
    excess = len(plan) / bound - 1
    report("best fit, rows over the lower bound", f"{excess:.4%}", "at most 0.1 %", excess <= 1e-3)
    for planner in (first_fit_decreasing, histogram, next_fit):
        plan, seconds = timed(planner, lengths, CAPACITY, overflow="error")
        print(f"    {planner.__name__}: {seconds:.2f} s, {len(plan) / bound - 1:.4%} over the bound")
    return first / len(lengths)


def against_trl(per_example: float) -> None:
    import datasets
    import pyarrow as pa
    from trl import pack_dataset

    datasets.disable_caching()
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    lengths = lognormal(50_000)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
    dataset = datasets.Dataset(
        pa.table({"input_ids": pa.ListArray.from_arrays(offsets, np.arange(offsets[-1], dtype=np.int32))})
    )
    for name, map_kwargs in (("as called", {}), ("all at once", {"batch_size": None})):
        theirs, seconds = timed(pack_dataset, dataset, CAPACITY, "bfd", map_kwargs)
        ratio = seconds / len(lengths) / per_example
        report(f"best fit against trl.pack_dataset {name}, per example", f"{ratio:.0f} x", "at least 50 x", ratio >= 50)
        ours, whole = timed(lambda: best_fit_decreasing(lengths, CAPACITY, overflow="error").apply(dataset))
        rows = f"rows {len(ours)} against {len(theirs)}"
        print(f"    with the tokens moved (plan and apply): {seconds / whole:.1f} x; {rows}")


def histogram_of_16_million() -> None:
    lengths = lognormal(16 * 10**6)
    (_, packing), (_, whole) = (
        timed(lambda: pack_histogram(count(lengths), CAPACITY, "histogram")),
        timed(histogram, lengths, CAPACITY, overflow="error"),
    )
    report(
        "histogram packing, 16 million lengths, histogram to pack shapes",
        f"{packing:.2f} s",
        "at most 0.1 s",
        packing <= 0.1,
    )
    report("histogram packing, 16 million lengths, with assignment", f"{whole:.2f} s", "at most 4 s", whole <= 4)


def balance() -> None:
    plan = best_fit_decreasing(lognormal(100_000), CAPACITY, overflow="error")

    def slowest(plan) -> float:
        costs = plan.row_costs()[: len(plan) // 8 * 8].reshape(-1, 8)
        return costs.max(axis=1).sum() / costs.mean(axis=1).sum()

    before, after = slowest(plan), slowest(plan.balance(8))
    report(
        f"8 ranks, slowest over mean attention cost (unbalanced {before:.2f})",
        f"{after:.3f}",
        "at most 1.05",
        after <= 1.05,
    )


def curve(largest: int) -> None:
    """Seconds and peak memory of best fit for 10^4 to 10^largest lengths; whether the largest takes linear time."""
    print(f"    {'lengths':>12} {'seconds':>9} {'ns each':>9} {'peak GiB':>9}")
    nanoseconds, peak = {}, 0.0
    for power in range(4, largest + 1):
        out = subprocess.run(
            [sys.executable, __file__, "--size", str(10**power)], capture_output=True, text=True, check=True
        ).stdout
        seconds, peak = map(float, out.split())
        nanoseconds[power] = seconds / 10**power * 1e9
        print(f"    {10**power:12,} {seconds:9.3f} {nanoseconds[power]:9.0f} {peak:9.2f}", flush=True)
    ratio = nanoseconds[largest] / nanoseconds[6]
    report(f"10^{largest} lengths: time per length against 10^6", f"{ratio:.1f} x", "linear: below 2 x", ratio < 2)
    report(f"10^{largest} lengths: peak memory", f"{peak:.1f} GiB", "at most 8 GiB", peak <= 8)


def one_size(examples: int) -> None:
    _, seconds = timed(best_fit_decreasing, lognormal(examples), CAPACITY, overflow="error")
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest", type=int, default=8, help="the curve ends at 10^LARGEST lengths")
    parser.add_argument("--size", type=int, help="time one size and print seconds and peak GiB")
    args = parser.parse_args()
    if args.size:
        one_size(args.size)
    else:
        curve(args.largest)
        per_example = packers()
        histogram_of_16_million()
        balance()
        against_trl(per_example)
