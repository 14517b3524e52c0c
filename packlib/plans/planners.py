"""Planners: lengths in, `Plan` out. Pure functions of lengths, capacity and seed; numpy only; the same plan everywhere.

All share one calling convention, `planner(lengths, size, *, seed=0, **own)`. `lengths` is tokens per example, integers
[examples] of at least 1; anything else is a `ValueError` that names the index. `size` is what its name says: examples
of a mini-batch, tokens of a row, or slots of a batch. Where an example can exceed a row, `overflow` must be given:
`"error"`, `"truncate"` (what is cut off counts as lost in the report) or `"split"` (pieces are placed like examples).

Lengths are integers no larger than the capacity, so the decreasing-fit packers run exactly over the histogram of
lengths: a million examples take about 0.2 s; time and memory grow linearly. Rows come in an order drawn from `seed`,
never long to short.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from packlib.columns import SEGMENT
from packlib.plans import packing
from packlib.plans.lengths import (
    Layout,
    Lengths,
    Overflow,
    check_layout,
    check_lengths,
    hash_lengths,
    index_type,
    positive,
)
from packlib.plans.packing import Columns, Rule, Segments
from packlib.plans.plan import Plan


@dataclass(frozen=True)
class CostModel:
    """Cost of micro-batches, in any unit of time: per_slot · slots + per_pair · Σ n² + per_batch · micro-batches.

    `head` is the share of a slot's work that only a slot with a label costs. The defaults are in units of one slot and
    of the order of a 7B model's (per_pair: the FLOPs of two tokens that attend to each other over those of a token);
    `packlib.lab.costs.calibrate` fits them to measured runs.

    >>> CostModel(per_slot=1.0, per_pair=0.5, per_batch=10.0)(4, pairs=8)
    18.0
    """

    per_slot: float = 1.0
    per_pair: float = 2e-5
    per_batch: float = 64.0
    head: float = 0.0

    def __call__(self, slots: Any, *, pairs: Any, labelled: Any = None, batches: Any = 1.0) -> Any:
        """The cost; numbers or arrays. labelled: slots with a label, None for all of them."""
        work = slots if labelled is None else (1 - self.head) * slots + self.head * labelled
        return self.per_slot * work + self.per_pair * pairs + self.per_batch * batches


def shuffled_batches(
    lengths: Lengths,
    batch_size: int,
    *,
    seed: int = 0,
    max_tokens: int | None = None,
    overflow: Overflow | None = None,
) -> Plan:
    """Random mini-batches of whole examples; a row is one mini-batch, for padding and MiniBatchPacking alike. O(n).

    Args:
        batch_size: examples per row; the last row has those that remain.
        max_tokens: longest allowed example in tokens (rows have no capacity here); goes with `overflow`.

    >>> [[segment.example for segment in row] for row in shuffled_batches([3, 1, 2], batch_size=2, seed=0)]
    [[2, 0], [1]]
    """
    lengths = check_lengths(lengths)
    segments = packing.fit(lengths, max_tokens, overflow)
    order = np.random.default_rng(seed).permutation(len(packing.sizes(segments)))
    return _batches("shuffled_batches", lengths, segments, order, batch_size, seed)


def length_grouped_batches(
    lengths: Lengths,
    batch_size: int,
    *,
    seed: int = 0,
    max_tokens: int | None = None,
    overflow: Overflow | None = None,
) -> Plan:
    """Mini-batches of similar lengths, as transformers' `LengthGroupedSampler` makes them. O(n log n).

    Examples are shuffled and cut into megabatches of min(n // (4 · batch_size), 50) batches, each sorted long to short;
    the longest example comes first, so that running out of memory shows at once. Arguments as in `shuffled_batches`.
    """
    positive("batch_size", batch_size)
    lengths = check_lengths(lengths)
    segments = packing.fit(lengths, max_tokens, overflow)
    size = packing.sizes(segments)
    n = len(size)
    megabatch = max(min(n // (batch_size * 4), 50), 1) * batch_size
    order = np.random.default_rng(seed).permutation(n)
    order = order[np.lexsort((-size[order], np.arange(n) // megabatch))]
    longest = int(np.argmax(size[order[::megabatch]])) * megabatch
    order[[0, longest]] = order[[longest, 0]]
    return _batches("length_grouped_batches", lengths, segments, order, batch_size, seed)


def token_budget(
    lengths: Lengths, max_slots: int, *, seed: int = 0, overflow: Overflow, layout: Layout = "padded"
) -> Plan:
    """Mini-batches of varying size under a budget of slots (2301.10587, bucketed). O(n log n).

    Sorted by length and cut into buckets of equal tokens, one for every eight rows' worth, at most 64; inside a bucket
    examples are shuffled and batched.

    Args:
        max_slots: most slots in a row. `"padded"`: every row of a bucket has max_slots // longest examples; `"flat"`:
            rows are filled up to max_slots tokens.
    """
    lengths = check_lengths(lengths)
    positive("max_slots", max_slots)
    check_layout(layout)
    segments, rng = packing.fit(lengths, max_slots, overflow, name="max_slots"), np.random.default_rng(seed)
    size = packing.sizes(segments)
    # 1. Sort, and cut into buckets of equal tokens.
    order, _ = packing.long_to_short(size, rng)
    tokens = np.cumsum(size[order], dtype=np.int64)
    buckets = int(min(max(tokens[-1] // (8 * max_slots), 1), 64))
    items, splits = [], [np.zeros(1, dtype=np.int64)]
    for bucket in np.split(order, tokens.searchsorted(tokens[-1] * np.arange(1, buckets) / buckets)):
        if not len(bucket):
            continue
        # 2. Batch a shuffled bucket: as many examples as its longest allows, or up to the budget.
        items.append(rng.permutation(bucket))
        if layout == "padded":
            rows = np.append(np.arange(0, len(bucket), max_slots // size[bucket[0]]), len(bucket))
        else:
            rows = packing.next_fit_splits(size[items[-1]], max_slots)
        splits.append(rows[1:] + splits[-1][-1])
    name = _call("token_budget", max_slots=max_slots, overflow=overflow, layout=layout, seed=seed)
    capacity = max_slots if layout == "flat" else None
    return _shuffled(lengths, np.concatenate(splits), segments, np.concatenate(items), rng, capacity, name)


def dynamic_programming(
    lengths: Lengths,
    max_slots: int,
    *,
    seed: int = 0,
    overflow: Overflow,
    layout: Layout = "padded",
    cost: CostModel = CostModel(),
    examples_per_step: int | None = None,
) -> Plan:
    """DynaPipe's micro-batches (2311.10418): sort by length, cut where the summed cost is least. O(n · examples a row).

    Args:
        max_slots: most slots in a row (memory): `"padded"` examples × longest, `"flat"` tokens.
        cost: what a row costs; the sum over rows is minimised, exactly.
        examples_per_step: random global batches of so many examples are sorted and cut on their own, and their rows
            stay together, as DynaPipe does; None: all examples are one batch, and its rows are shuffled.

    >>> plan = dynamic_programming([4, 1, 4, 1], 16, overflow="error", cost=CostModel(per_batch=1))
    >>> sorted(sorted(segment.example for segment in row) for row in plan)
    [[0, 2], [1, 3]]
    """
    lengths = check_lengths(lengths)
    positive("max_slots", max_slots)
    check_layout(layout)
    segments, rng = packing.fit(lengths, max_slots, overflow, name="max_slots"), np.random.default_rng(seed)
    size = packing.sizes(segments)
    n = len(size)
    per_step = positive("examples_per_step", n if examples_per_step is None else examples_per_step)
    order = rng.permutation(n)
    order = order[np.lexsort((size[order], np.arange(n) // per_step))]
    # All global batches of equal size are cut at once, then the last, shorter one.
    whole = n // per_step * per_step
    splits = [np.zeros(1, dtype=np.int64)]
    for begin, end in ((0, whole), (whole, n)):
        if begin < end:
            batches = size[order[begin:end]].reshape(-1, min(per_step, end - begin)).astype(np.float64)
            splits.append(packing.cheapest_cuts(batches, layout, cost, max_slots) + begin)
    own = {"cost": cost, "examples_per_step": examples_per_step}
    name = _call("dynamic_programming", max_slots=max_slots, overflow=overflow, layout=layout, seed=seed, **own)
    capacity = max_slots if layout == "flat" else None
    shuffle = rng if examples_per_step is None else None
    return _shuffled(lengths, np.concatenate(splits), segments, order, shuffle, capacity, name)


def fixed_length(
    lengths: Lengths,
    max_tokens: int,
    *,
    seed: int = 0,
    atom_size: int | None = None,
    order: np.ndarray | None = None,
) -> Plan:
    """FixedLengthPacking: one stream of all examples, cut every `max_tokens` tokens, whatever that breaks. O(n).

    Rows come in the order of the stream, so an example of many rows fills whole steps alone. `atom_size=max_tokens`
    shuffles the rows.

    Args:
        max_tokens: tokens of a row; the last one has those that remain.
        atom_size: the unit in which the stream is shuffled before it is cut into rows, in tokens (2408.09621: best at
            `max_tokens`). None: whole examples are shuffled.
        order: the examples in the order of the stream, a permutation, instead of a shuffled one; then the rows are
            shuffled, so that a step holds rows from everywhere. Goes without `atom_size`.

    >>> [[tuple(segment) for segment in row] for row in fixed_length([3, 4], max_tokens=5, seed=0)]
    [[(0, 0, 3), (1, 0, 2)], [(1, 2, 4)]]
    """
    lengths = check_lengths(lengths)
    segments, rng = packing.fit(lengths, None, None), np.random.default_rng(seed)
    if order is not None:
        return _in_order(lengths, positive("max_tokens", max_tokens), np.asarray(order), atom_size, seed)
    if atom_size is None:
        stream = packing.gather(segments, rng.permutation(len(lengths)))
    else:
        # 1. Cut the stream into atoms and shuffle them.
        atom_splits, atoms = packing.cut(segments, positive("atom_size", atom_size))
        order, _ = packing.select_rows(atom_splits, rng.permutation(len(atom_splits) - 1))
        example, start, stop = packing.gather(atoms, order)
        # 2. Pieces of one example that stayed neighbours are one segment again.
        apart = (example[1:] != example[:-1]) | (start[1:] != stop[:-1])
        begins, ends = np.append(True, apart), np.append(apart, True)
        stream = example[begins], start[begins], stop[ends]
    row_splits, segments = packing.cut(stream, positive("max_tokens", max_tokens))
    name = _call("fixed_length", max_tokens=max_tokens, seed=seed, atom_size=atom_size)
    return _plan(lengths, row_splits, segments, max_tokens, name)


def _in_order(lengths: np.ndarray, max_tokens: int, order: np.ndarray, atom_size: int | None, seed: int) -> Plan:
    """`fixed_length` of a stream whose order is given."""
    if atom_size is not None:
        raise ValueError(f"atom_size = {atom_size} shuffles the stream, order says how it runs; expected one of them")
    if not np.array_equal(np.sort(order), np.arange(len(lengths))):
        raise ValueError(f"order has {len(order)} entries; expected each of 0 to {len(lengths) - 1} once")
    row_splits, segments = packing.cut(packing.gather((None, None, lengths), order), max_tokens)
    name = _call("fixed_length", max_tokens=max_tokens, order="given")
    return _plan(lengths, row_splits, segments, max_tokens, name).shuffle(seed)


def next_fit(
    lengths: Lengths,
    max_tokens: int,
    *,
    seed: int = 0,
    overflow: Overflow,
    order: Literal["random", "sorted"] = "random",
) -> Plan:
    """Whole examples one after the other; a row ends when the next does not fit. O(n).

    Random and sorted packing (§4.3): `order="sorted"` packs long to short; rows are then shuffled.

    >>> plan = next_fit([3, 1, 2], max_tokens=4, overflow="error", order="sorted")
    >>> sorted([segment.example for segment in row] for row in plan)
    [[0], [2, 1]]
    """
    if order not in ("random", "sorted"):
        raise ValueError(f"order = {order!r}; expected 'random' or 'sorted'")
    lengths = check_lengths(lengths)
    segments, rng = packing.fit(lengths, positive("max_tokens", max_tokens), overflow), np.random.default_rng(seed)
    size = packing.sizes(segments)
    items = rng.permutation(len(size)) if order == "random" else packing.long_to_short(size, rng)[0]
    name = _call("next_fit", max_tokens=max_tokens, overflow=overflow, order=order, seed=seed)
    return _shuffled(lengths, packing.next_fit_splits(size[items], max_tokens), segments, items, rng, max_tokens, name)


def best_fit_decreasing(lengths: Lengths, max_tokens: int, *, seed: int = 0, overflow: Overflow) -> Plan:
    """Long to short, each example into the fullest row with room for it. Exact; O(n + distinct lengths · log).

    Args:
        max_tokens: capacity of a row, in tokens.
        seed: draws which of equally long examples goes where, and the order of the rows.

    >>> plan = best_fit_decreasing([3, 1, 2, 4], max_tokens=5, overflow="error")
    >>> sorted(sorted(segment.example for segment in row) for row in plan)
    [[0, 2], [1, 3]]
    """
    return _decreasing("best_fit_decreasing", lengths, max_tokens, overflow, seed)


def best_fit(lengths: Lengths, max_tokens: int, *, seed: int = 0, overflow: Overflow) -> Plan:
    """In random order, each example into the fullest row with room for it: as full as sorted packing, and mixed.

    Long to short, a row holds examples of about one length: few long ones, or many short ones. In random order it holds
    what a random mini-batch holds, and on lengths with a tail hardly a row more is needed. Exact; one step of Python an
    example (a million: 3 s).

    >>> plan = best_fit([3, 1, 2, 4], max_tokens=5, overflow="error", seed=1)  # example 1, then 0, 2 and 3
    >>> sorted(sorted(segment.example for segment in row) for row in plan)
    [[0, 1], [2], [3]]
    """
    lengths = check_lengths(lengths)
    segments, rng = packing.fit(lengths, positive("max_tokens", max_tokens), overflow), np.random.default_rng(seed)
    size = packing.sizes(segments)
    items = rng.permutation(len(size))
    rows = packing.best_fit_rows(size[items], max_tokens)
    items = items[np.argsort(rows, kind="stable")]
    row_splits = np.concatenate([[0], np.cumsum(np.bincount(rows))])
    name = _call("best_fit", max_tokens=max_tokens, overflow=overflow, seed=seed)
    return _shuffled(lengths, row_splits, segments, items, rng, max_tokens, name)


def best_fit_crop(lengths: Lengths, max_tokens: int, *, seed: int = 0, buffer: int = 1000) -> Plan:
    """Full rows that each begin with an example's first token; the last example of a row is cropped to fit (nanochat).

    Of the next `buffer` examples in random order a row takes the longest that fits, again and again; when none does,
    the shortest one is cropped to what is left, and the rest of it is lost (a report counts it). No row has room left
    but the last to be made. O(examples · log buffer). After nanochat's
    `tokenizing_distributed_data_loader_bos_bestfit`.

    >>> plan = best_fit_crop([3, 4, 3], max_tokens=5)
    >>> plan.row_lengths.tolist(), plan.report([3, 4, 3]).lost_tokens
    ([5, 3], 2)
    """
    lengths = check_lengths(lengths)
    capacity, rng = positive("max_tokens", max_tokens), np.random.default_rng(seed)
    items = rng.permutation(len(lengths))
    taken, stop, row_splits = packing.crop_rows(lengths[items], capacity, positive("buffer", buffer))
    segments = items[taken].astype(index_type(len(lengths))), np.zeros(len(taken), np.int32), stop.astype(np.int32)
    name = _call("best_fit_crop", max_tokens=max_tokens, seed=seed, buffer=buffer)
    return _plan(lengths, row_splits, segments, max_tokens, name).shuffle(seed)


def first_fit_decreasing(lengths: Lengths, max_tokens: int, *, seed: int = 0, overflow: Overflow) -> Plan:
    """Long to short, each example into the first row with room for it (multipack). As `best_fit_decreasing` else."""
    return _decreasing("first_fit_decreasing", lengths, max_tokens, overflow, seed)


def histogram(lengths: Lengths, max_tokens: int, *, seed: int = 0, overflow: Overflow) -> Plan:
    """Krell's shortest-pack-first (2107.02027): long to short, each example into the emptiest row with room for it."""
    return _decreasing("histogram", lengths, max_tokens, overflow, seed)


def constant_examples(plan: Plan, examples: int, *, seed: int = 0, split_rows: bool = True) -> tuple[Plan, np.ndarray]:
    """Group rows into optimiser steps of `examples` segments each, so that packing changes the speed and not the step.

    Returns the plan in the order of the steps (drawn from `seed`) and step_splits, int64 [steps + 1]: step i is the
    rows `step_splits[i]` to `step_splits[i + 1]`. O(rows).

    Args:
        split_rows: every step holds exactly `examples`, only one those that remain: as many steps as padding takes. A
            row with more is split between examples, and so are a few of those that best fit leaves in steps with room.
            False: rows stay whole; one with more is a step of its own, and a few steps hold fewer.

    >>> plan = next_fit([1, 1, 1, 1, 3, 3], max_tokens=4, overflow="error", order="sorted")
    >>> plan, step_splits = constant_examples(plan, examples=3)
    >>> sorted(plan.row_examples.tolist()), np.add.reduceat(plan.row_examples, step_splits[:-1]).tolist()
    ([1, 2, 3], [3, 3])
    """
    segments = len(plan.example)
    if not 1 <= positive("examples", examples) <= segments:
        raise ValueError(f"examples = {examples}; expected 1 to {segments}, the segments of the plan")
    name = f"constant_examples({examples}, seed={seed}, split_rows={split_rows})"
    if not split_rows:
        steps = best_fit_decreasing(np.minimum(plan.row_examples, examples), examples, overflow="error", seed=seed)
        return plan.take(steps.example, name), steps.row_splits
    # 1. Rows with more segments are split.
    begin = np.repeat(plan.row_splits[:-1], plan.row_examples)
    splits = np.append(np.flatnonzero((np.arange(segments) - begin) % examples == 0), segments)
    # 2. Best fit fills most steps to the last place.
    steps = best_fit_decreasing(np.diff(splits), examples, overflow="error", seed=seed)
    full = np.repeat(steps.row_lengths == examples, steps.row_examples)
    # 3. What the other steps hold is laid end to end, and cut again.
    order = np.concatenate([steps.example[full], steps.example[~full]])
    index, splits = packing.select_rows(splits, order)
    edges = np.union1d(splits, np.arange(0, segments, examples))
    regrouped = replace(plan, row_splits=edges, **{name: getattr(plan, name)[index] for name in SEGMENT})
    # 4. Steps in random order.
    ends = np.append(np.arange(0, segments, examples), segments)
    rows, step_splits = packing.select_rows(
        np.searchsorted(edges, ends), np.random.default_rng(seed).permutation(len(ends) - 1)
    )
    return regrouped.take(rows, name), step_splits


def _decreasing(rule: Rule, lengths: Lengths, max_tokens: int, overflow: Overflow, seed: int) -> Plan:
    lengths = check_lengths(lengths)
    segments, rng = packing.fit(lengths, positive("max_tokens", max_tokens), overflow), np.random.default_rng(seed)
    # 1. Pack the histogram: how many examples of each length go to which rows.
    items, counts = packing.long_to_short(packing.sizes(segments), rng)
    placements, row_counts = packing.pack_histogram(counts, max_tokens, rule)
    # 2. Draw the order of the rows.
    order = rng.permutation(len(row_counts))
    row_splits = np.concatenate([[0], np.cumsum(row_counts[order])])
    row_begin = np.empty_like(order)
    row_begin[order] = row_splits[:-1]
    # 3. Deal the examples, long to short, to the places that step 1 found.
    placed, begin = np.empty(len(items), dtype=index_type(len(items))), 0
    for first, rows, each, taken in placements:
        slot = row_begin[first : first + rows] + taken
        if each > 1:
            slot = (slot[:, None] + np.arange(each)).ravel()
        placed[slot] = items[begin : begin + rows * each]
        begin += rows * each
    name = _call(rule, max_tokens=max_tokens, overflow=overflow, seed=seed)
    return _plan(lengths, row_splits, packing.gather(segments, placed), max_tokens, name)


def _batches(name: str, lengths: np.ndarray, segments: Segments, order: np.ndarray, batch_size: int, seed: int) -> Plan:
    positive("batch_size", batch_size)
    splits = np.append(np.arange(0, len(order), batch_size), len(order))
    name = _call(name, batch_size=batch_size, seed=seed)
    return _plan(lengths, splits, packing.gather(segments, order), None, name)


def _shuffled(
    lengths: np.ndarray,
    row_splits: np.ndarray,
    segments: Segments,
    items: np.ndarray,
    rng: np.random.Generator | None,
    max_tokens: int | None,
    name: str,
) -> Plan:
    """Rows of `items` (segment numbers row by row), shuffled if there is an rng."""
    if rng is not None:
        index, row_splits = packing.select_rows(row_splits, rng.permutation(len(row_splits) - 1))
        items = items[index]
    return _plan(lengths, row_splits, packing.gather(segments, items), max_tokens, name)


def _plan(lengths: np.ndarray, row_splits: np.ndarray, segments: Columns, max_tokens: int | None, name: str) -> Plan:
    return Plan(row_splits, *segments, max_tokens=max_tokens, algorithm=name, lengths_sha256=hash_lengths(lengths))


def _call(name: str, **arguments: Any) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items() if value is not None)})"
