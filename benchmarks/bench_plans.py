"""Planning speed and quality, as ratios measured in one run: `python benchmarks/bench_plans.py [--largest 8]`.

Lengths are lognormal (mean 200, sigma 1, at most 4096). The curve runs each size in a process of its own, for its peak
memory. Exits with 1 if a target was missed. `--only streams views` runs these parts alone.
"""

from __future__ import annotations

import argparse
import logging
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

from packlib.collators import FlatteningCollator
from packlib.plans import Plan, stream
from packlib.plans.block import Block
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


missed: list[str] = []


def report(what: str, value: str, target: str, met: bool) -> None:
    if not met:
        missed.append(what)
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


def examples_of(lengths: np.ndarray):
    """A data set of examples of these lengths."""
    import datasets
    import pyarrow as pa

    datasets.disable_caching()
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
    tokens = np.arange(offsets[-1], dtype=np.int32)
    return datasets.Dataset(pa.table({"input_ids": pa.ListArray.from_arrays(offsets, tokens)}))


def against_trl(per_example: float) -> None:
    from trl import pack_dataset

    lengths = lognormal(50_000)
    dataset = examples_of(lengths)
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


def slowest(plan: Plan) -> float:
    """The slowest of 8 ranks over the mean, in attention cost."""
    costs = plan.row_costs()[: len(plan) // 8 * 8].reshape(-1, 8)
    return costs.max(axis=1).sum() / costs.mean(axis=1).sum()


def balance() -> None:
    plan = best_fit_decreasing(lognormal(100_000), CAPACITY, overflow="error")
    before, after = slowest(plan), slowest(plan.balance(8))
    report(
        f"8 ranks, slowest over mean attention cost (unbalanced {before:.2f})",
        f"{after:.3f}",
        "at most 1.05",
        after <= 1.05,
    )


def blocks(lengths: np.ndarray, block: Block) -> list[Plan]:
    """What a stream of examples of these lengths plans, block by block; no token is read."""
    plans: list[Plan] = []
    held, last = lengths[:0], False
    while not last:
        size, lengths = np.split(np.concatenate([held, lengths]), [block.buffer])
        last = not len(lengths)
        plan, waiting = block.plan(size, len(held), len(plans), last)
        plans.append(plan)
        held = size[waiting]
    return plans


def streams() -> None:
    lengths = lognormal(10**6)
    offline = len(best_fit_decreasing(lengths, CAPACITY, overflow="error"))
    plans, seconds = timed(blocks, lengths, Block(CAPACITY, "error", 10_000, 0, 1, "quadratic"))
    assert sum(len(plan.example) for plan in plans) == len(lengths)
    rate, excess = len(lengths) / seconds, sum(map(len, plans)) / offline - 1
    report("stream, buffer 10,000, examples planned", f"{rate / 1e6:.2f} million/s", "at least 1", rate >= 1e6)
    report("stream, buffer 10,000, rows over those of a plan", f"{excess:.3%}", "at most 0.5 %", excess <= 5e-3)
    for buffer in (10_000, 20_000):
        plan = blocks(lengths[: 10 * buffer], Block(CAPACITY, "error", buffer, 0, 8, "quadratic"))[1]
        what, uneven = (
            f"stream, buffer {buffer:,}, {len(plan) / 8:.0f} rows a rank: 8 ranks, slowest over mean",
            slowest(plan),
        )
        if buffer == 10_000:
            print(f"    {what}: {uneven:.3f}")
        else:
            report(what, f"{uneven:.3f}", "at most 1.05", uneven <= 1.05)
    few = [np.ones(length, dtype=np.int64) for length in lengths[:50_000].tolist()]
    rows, seconds = timed(lambda: sum(1 for _ in stream(few, CAPACITY, overflow="error")))
    print(f"    with the tokens moved: {len(few) / seconds:,.0f} examples/s, {rows / seconds:,.0f} rows/s")


def views() -> None:
    """Rows read in random order and collated, as trainers do, from a view and from the table in its fastest format."""
    import datasets

    lengths = lognormal(50_000)
    plan = best_fit_decreasing(lengths, CAPACITY, overflow="error")
    order = np.random.default_rng(0).permutation(len(plan))[:800].tolist()
    collate = FlatteningCollator()
    with tempfile.TemporaryDirectory() as folder:
        examples_of(lengths).save_to_disk(f"{folder}/examples")
        dataset = datasets.load_from_disk(f"{folder}/examples")  # mapped, both
        view, table = plan.view(dataset), plan.apply(dataset, f"{folder}/rows")
        formats = {"python": table, "numpy": table.with_format("numpy"), "torch": table.with_format("torch")}
        best = dict.fromkeys(["view", *formats], 0.0)
        for _ in range(5):  # by turns: the machine's mood hits all of them
            for name, rows in {"view": view, **formats}.items():
                _, seconds = timed(lambda rows=rows: [collate(rows.__getitems__([i])) for i in order])
                best[name] = max(best[name], len(order) / seconds)
    ratio = best["view"] / max(best[name] for name in formats)
    report("view, rows/s over those of the copied table, collated", f"{ratio:.2f} x", "at least 0.9 x", ratio >= 0.9)
    print("    rows/s: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in best.items()))


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
    parser.add_argument("--only", nargs="+", choices=["streams", "views"], help="these parts alone")
    args = parser.parse_args()
    if args.size:
        one_size(args.size)
    elif args.only:
        for part in args.only:
            {"streams": streams, "views": views}[part]()
    else:
        curve(args.largest)
        per_example = packers()
        histogram_of_16_million()
        balance()
        streams()
        views()
        against_trl(per_example)
    sys.exit(bool(missed))
