"""Planners: lengths in, `Plan` out. Pure functions of lengths, capacity and seed; numpy only; the same plan everywhere.

Lengths are integers no larger than the capacity, so the decreasing-fit packers run exactly over the histogram of
lengths: a million examples take about 0.2 s; time and memory grow linearly. Rows come in an order drawn from `seed`,
never long to short. `lengths` is tokens per example, integers [examples] of at least 1; anything else is a `ValueError`
that names the index. Where an example can exceed a row, `overflow` must be given: `"error"`, `"truncate"` (what is cut
off counts as lost in the report) or `"split"` (pieces are placed like examples).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from packlib import segments as seg
from packlib.segments import Lengths, Overflow, Segments, check_layout, check_lengths, positive

if TYPE_CHECKING:
    from packlib.plans import Plan

Incomplete = Literal["keep", "drop"]
Layout = Literal["padded", "flat"]


@dataclass(frozen=True)
class CostModel:
    """Cost of one micro-batch: fixed + per_slot · slots + per_pair · Σ n², in any unit of time.

    `layout="padded"`: every line is as long as the longest; `"flat"`: tokens and Σ n² as they are. The defaults are in
    units of one slot and of the order of a 7B model's (per_pair: attention FLOPs of a pair / FLOPs of a token).
    """

    layout: Layout = "padded"
    fixed: float = 64.0
    per_slot: float = 1.0
    per_pair: float = 2e-5

    def __post_init__(self) -> None:
        check_layout(self.layout)


def shuffled_batches(
    lengths: Lengths, batch_size: int, seed: int = 0, *, incomplete: Incomplete = "keep",
    max_tokens: int | None = None, overflow: Overflow | None = None,
) -> Plan:  # fmt: skip
    """Random mini-batches of whole examples; a row is one mini-batch, for padding and MiniBatchPacking alike. O(n).

    Args:
        batch_size: examples per row.
        incomplete: whether the last row, of fewer than `batch_size` examples, is kept or dropped (and reported as lost).
        max_tokens: longest allowed example in tokens (rows have no capacity here); goes with `overflow`.

    >>> [[segment.example for segment in row] for row in shuffled_batches([3, 1, 2], batch_size=2, seed=0)]
    [[2, 0], [1]]
    """
    lengths = check_lengths(lengths)
    segments = seg.fit(lengths, max_tokens, overflow)
    order = np.random.default_rng(seed).permutation(len(segments[2]))
    return _batches("shuffled_batches", lengths, segments, order, batch_size, seed, incomplete)


def length_grouped_batches(
    lengths: Lengths, batch_size: int, seed: int = 0, *, incomplete: Incomplete = "keep",
    max_tokens: int | None = None, overflow: Overflow | None = None,
) -> Plan:  # fmt: skip
    """Mini-batches of similar lengths, as transformers' `LengthGroupedSampler` makes them. O(n log n).

    Examples are shuffled and cut into megabatches of min(n // (4 · batch_size), 50) batches, each sorted long to short;
    the longest example comes first, so that running out of memory shows at once. Arguments as in `shuffled_batches`.
    """
    positive("batch_size", batch_size)
    lengths = check_lengths(lengths)
    segments = seg.fit(lengths, max_tokens, overflow)
    n, size = len(segments[2]), seg.sizes(segments)
    megabatch = max(min(n // (batch_size * 4), 50), 1) * batch_size
    order = np.random.default_rng(seed).permutation(n)
    order = order[np.lexsort((-size[order], np.arange(n) // megabatch))]
    longest = int(np.argmax(size[order[::megabatch]])) * megabatch
    order[[0, longest]] = order[[longest, 0]]
    return _batches("length_grouped_batches", lengths, segments, order, batch_size, seed, incomplete)


def token_budget(
    lengths: Lengths, max_slots: int, *, overflow: Overflow, layout: Layout = "padded", buckets: int | None = None,
    seed: int = 0,
) -> Plan:  # fmt: skip
    """Mini-batches of varying size under a budget of slots (2301.10587, bucketed). O(n log n).

    Sorted by length and cut into buckets of equal tokens; inside a bucket examples are shuffled and batched.

    Args:
        max_slots: most slots in a row. `"padded"`: every row of a bucket has max_slots // longest examples; `"flat"`: rows
            are filled up to max_slots tokens.
        buckets: more of them waste less and shuffle less. Default: one for every eight rows of tokens, at most 64.
    """
    lengths = check_lengths(lengths)
    positive("max_slots", max_slots)
    check_layout(layout)
    segments, rng = seg.fit(lengths, max_slots, overflow), np.random.default_rng(seed)
    size = seg.sizes(segments)
    order, _ = seg.long_to_short(size, rng)
    tokens = np.cumsum(size[order], dtype=np.int64)
    buckets = buckets or int(min(max(tokens[-1] // (8 * max_slots), 1), 64))
    positive("buckets", buckets)
    items, splits = [], [np.zeros(1, dtype=np.int64)]
    for bucket in np.split(order, tokens.searchsorted(tokens[-1] * np.arange(1, buckets) / buckets)):
        if len(bucket):
            items.append(rng.permutation(bucket))
            if layout == "padded":
                rows = np.append(np.arange(0, len(bucket), max_slots // size[bucket[0]]), len(bucket))
            else:
                rows = seg.next_fit_splits(size[items[-1]], max_slots)
            splits.append(rows[1:] + splits[-1][-1])
    name = _call("token_budget", max_slots=max_slots, overflow=overflow, layout=layout, buckets=buckets, seed=seed)
    capacity = max_slots if layout == "flat" else None
    return _shuffled(lengths, np.concatenate(splits), segments, np.concatenate(items), rng, capacity, name)


def dynamic_programming(
    lengths: Lengths, cost: CostModel | Layout, *, max_slots: int, overflow: Overflow,
    examples_per_step: int | None = None, seed: int = 0,
) -> Plan:  # fmt: skip
    """DynaPipe's micro-batches (2311.10418): sort by length, cut where the summed cost is least. O(n · examples a row).

    Args:
        cost: a `CostModel`, or `"padded"` / `"flat"` for its default; the sum over rows is minimised, exactly.
        max_slots: most slots in a row (memory): `"padded"` examples × longest, `"flat"` tokens.
        examples_per_step: random global batches of so many examples are sorted and cut on their own, and their rows stay
            together, as DynaPipe does; None: all examples are one batch, and its rows are shuffled.

    >>> plan = dynamic_programming([4, 1, 4, 1], CostModel("padded", fixed=1), max_slots=16, overflow="error")
    >>> sorted(sorted(segment.example for segment in row) for row in plan)
    [[0, 2], [1, 3]]
    """
    lengths = check_lengths(lengths)
    positive("max_slots", max_slots)
    model = CostModel(cost) if isinstance(cost, str) else cost
    segments, rng = seg.fit(lengths, max_slots, overflow), np.random.default_rng(seed)
    size, n = seg.sizes(segments), len(segments[2])
    per_step = n if examples_per_step is None else examples_per_step
    positive("examples_per_step", per_step)
    order = rng.permutation(n)
    order = order[np.lexsort((size[order], np.arange(n) // per_step))]
    whole = n // per_step * per_step
    splits = [np.zeros(1, dtype=np.int64)]
    for begin, end in ((0, whole), (whole, n)):
        if begin < end:
            batches = size[order[begin:end]].reshape(-1, min(per_step, end - begin))
            padded, costs = model.layout == "padded", (model.fixed, model.per_slot, model.per_pair)
            splits.append(seg.cheapest_cuts(batches.astype(np.float64), padded, costs, max_slots) + begin)
    settings = {"overflow": overflow, "examples_per_step": examples_per_step, "seed": seed}
    name = _call("dynamic_programming", cost=model, max_slots=max_slots, **settings)
    capacity, shuffle = None if padded else max_slots, rng if examples_per_step is None else None
    return _shuffled(lengths, np.concatenate(splits), segments, order, shuffle, capacity, name)


def fixed_length(lengths: Lengths, max_tokens: int, seed: int = 0, *, atom_size: int | None = None, incomplete: Incomplete = "keep") -> Plan:
    """FixedLengthPacking: one stream of all examples, cut every `max_tokens` tokens, whatever that breaks. O(n).

    Args:
        atom_size: the unit in which the stream is shuffled before it is cut into rows, in tokens (2408.09621: best at
            `max_tokens`). None: whole examples are shuffled.
        incomplete: whether the last row, of fewer than `max_tokens` tokens, is kept or dropped (and reported as lost).

    >>> [[tuple(segment) for segment in row] for row in fixed_length([3, 4], max_tokens=5, seed=0)]
    [[(0, 0, 3), (1, 0, 2)], [(1, 2, 4)]]
    """
    lengths = check_lengths(lengths)
    segments, rng = seg.fit(lengths, None, None), np.random.default_rng(seed)
    if atom_size is None:
        order = rng.permutation(len(lengths))
        stream = seg.gather(segments, order)
    else:
        atom_splits, atoms = seg.cut(segments, positive("atom_size", atom_size))
        order, _ = seg.select_rows(atom_splits, rng.permutation(len(atom_splits) - 1))
        example, start, stop = seg.gather(atoms, order)
        apart = (example[1:] != example[:-1]) | (start[1:] != stop[:-1])  # atoms that stayed neighbours are joined again
        stream = example[np.append(True, apart)], start[np.append(True, apart)], stop[np.append(apart, True)]
    row_splits, segments = seg.cut(stream, positive("max_tokens", max_tokens))
    if not _keep(incomplete, lengths.sum(dtype=np.int64) // max_tokens) and lengths.sum(dtype=np.int64) % max_tokens:
        row_splits = row_splits[:-1]
        segments = tuple(column[: row_splits[-1]] for column in segments)
    name = _call("fixed_length", max_tokens=max_tokens, seed=seed, atom_size=atom_size)
    return _plan(lengths, row_splits, segments, max_tokens, name)


def next_fit(lengths: Lengths, max_tokens: int, *, overflow: Overflow, order: Literal["random", "sorted"] = "random", seed: int = 0) -> Plan:
    """Whole examples one after the other; a row ends when the next does not fit. O(n).

    Random and sorted packing (§4.3): `order="sorted"` packs long to short; rows are then shuffled.

    >>> plan = next_fit([3, 1, 2], max_tokens=4, overflow="error", order="sorted")
    >>> sorted([segment.example for segment in row] for row in plan)
    [[0], [2, 1]]
    """
    lengths = check_lengths(lengths)
    segments, rng = seg.fit(lengths, positive("max_tokens", max_tokens), overflow), np.random.default_rng(seed)
    if order not in ("random", "sorted"):
        raise ValueError(f"order = {order!r}; expected 'random' or 'sorted'")
    size = seg.sizes(segments)
    items = rng.permutation(len(size)) if order == "random" else seg.long_to_short(size, rng)[0]
    name = _call("next_fit", max_tokens=max_tokens, overflow=overflow, order=order, seed=seed)
    return _shuffled(lengths, seg.next_fit_splits(size[items], max_tokens), segments, items, rng, max_tokens, name)


def best_fit_decreasing(lengths: Lengths, max_tokens: int, *, overflow: Overflow, seed: int = 0, max_examples: int | None = None) -> Plan:
    """Long to short, each example into the fullest row with room for it. Exact; O(n + distinct lengths · log).

    Args:
        max_tokens: capacity of a row, in tokens.
        seed: draws which of equally long examples goes where, and the order of the rows.
        max_examples: most segments in a row.

    >>> plan = best_fit_decreasing([3, 1, 2, 4], max_tokens=5, overflow="error")
    >>> sorted(sorted(segment.example for segment in row) for row in plan)
    [[0, 2], [1, 3]]
    """
    return _decreasing("best_fit_decreasing", lengths, max_tokens, overflow, seed, max_examples)


def first_fit_decreasing(lengths: Lengths, max_tokens: int, *, overflow: Overflow, seed: int = 0, max_examples: int | None = None) -> Plan:
    """Long to short, each example into the first row with room for it (multipack). As `best_fit_decreasing` else."""
    return _decreasing("first_fit_decreasing", lengths, max_tokens, overflow, seed, max_examples)


def histogram(lengths: Lengths, max_tokens: int, *, overflow: Overflow, seed: int = 0, max_examples: int | None = None) -> Plan:
    """Krell's shortest-pack-first (2107.02027): long to short, each example into the emptiest row with room for it."""
    return _decreasing("histogram", lengths, max_tokens, overflow, seed, max_examples)


def _decreasing(rule: Any, lengths: Lengths, max_tokens: int, overflow: Overflow, seed: int, max_examples: int | None):
    lengths = check_lengths(lengths)
    segments, rng = seg.fit(lengths, positive("max_tokens", max_tokens), overflow), np.random.default_rng(seed)
    limit = None if max_examples is None else positive("max_examples", max_examples)
    items, counts = seg.long_to_short(seg.sizes(segments), rng)
    placements, row_counts = seg.pack_histogram(counts, max_tokens, rule, limit)
    order = rng.permutation(len(row_counts))
    row_splits = np.concatenate([[0], np.cumsum(row_counts[order])])
    row_begin = np.empty_like(order)
    row_begin[order] = row_splits[:-1]
    placed, begin = np.empty(len(items), dtype=seg.index_type(len(items))), 0
    for first, rows, each, taken in placements:
        slot = row_begin[first : first + rows] + taken
        slot = slot if each == 1 else (slot[:, None] + np.arange(each)).ravel()
        placed[slot] = items[begin : begin + rows * each]
        begin += rows * each
    name = _call(rule, max_tokens=max_tokens, overflow=overflow, seed=seed, max_examples=max_examples)
    return _plan(lengths, row_splits, seg.gather(segments, placed), max_tokens, name)


def _batches(name: str, lengths, segments: Segments, order, batch_size: int, seed: int, incomplete: Incomplete) -> Plan:
    positive("batch_size", batch_size)
    splits = np.arange(0, len(order) + 1, batch_size)
    if _keep(incomplete, len(splits) - 1) and splits[-1] < len(order):
        splits = np.append(splits, len(order))
    order = order[: splits[-1]]
    name = _call(name, batch_size=batch_size, seed=seed, incomplete=incomplete)
    return _plan(lengths, splits, seg.gather(segments, order), None, name)


def _shuffled(lengths, row_splits, segments: Segments, items, rng, max_tokens: int | None, name: str) -> Plan:
    """Rows of `items` (segment numbers row by row), shuffled if there is an rng."""
    if rng is not None:
        index, row_splits = seg.select_rows(row_splits, rng.permutation(len(row_splits) - 1))
        items = items[index]
    return _plan(lengths, row_splits, seg.gather(segments, items), max_tokens, name)


def _plan(lengths: np.ndarray, row_splits: np.ndarray, segments: Segments, max_tokens: int | None, name: str) -> Plan:
    from packlib.plans import Plan  # plans re-exports this module

    return Plan(row_splits, *segments, max_tokens=max_tokens, algorithm=name, lengths_sha256=seg.hash_lengths(lengths))


def _call(name: str, **arguments: Any) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items() if value is not None)})"


def _keep(incomplete: Incomplete, full_rows: int) -> bool:
    if incomplete not in ("keep", "drop"):
        raise ValueError(f"incomplete = {incomplete!r}; expected 'keep' or 'drop'")
    if incomplete == "drop" and not full_rows:
        raise ValueError("incomplete = 'drop' leaves no row: there is less than one full row")
    return incomplete == "keep"
