"""Array operations under the planners: check lengths, cut streams, gather rows, and pack a histogram of lengths.

Segments are three parallel integer arrays (`example`, `start`, `stop`); rows are `row_splits` into them. `example` and `start` are None where
each example is one whole segment: at 10^8 examples every array that is not made counts. Nothing here loops over single examples, save the
dynamic programme.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import chain
from typing import Literal

import numpy as np

Lengths = Sequence[int] | np.ndarray
Overflow = Literal["error", "truncate", "split"]
Rule = Literal["best_fit_decreasing", "first_fit_decreasing", "histogram"]
Segments = tuple[np.ndarray | None, np.ndarray | None, np.ndarray]


def check_lengths(lengths: Lengths) -> np.ndarray:
    """`lengths` as int32 [examples]; `ValueError` with the index of what is not an integer of at least 1.

    >>> check_lengths([3, 0])
    Traceback (most recent call last):
    ValueError: lengths[1] = 0; expected integers from 1 to 2147483647
    """
    array = np.asarray(lengths)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"lengths has shape {list(array.shape)}; expected [examples] with at least one example")
    if array.dtype.kind not in "iu":
        odd = array != np.floor(array) if array.dtype.kind == "f" else np.array([type(value) is not int for value in list(lengths)])
        i = int(np.argmax(odd))
        raise ValueError(f"lengths[{i}] = {list(lengths)[i]!r} in {array.dtype} lengths; expected integers of at least 1")
    if array.min() < 1 or array.max() > 2**31 - 1:
        i = int(np.argmax((array < 1) | (array > 2**31 - 1)))
        raise ValueError(f"lengths[{i}] = {array[i]}; expected integers from 1 to 2147483647")
    return array.astype(np.int32, copy=False)


def check_loss_tokens(loss_tokens: Lengths, lengths: np.ndarray) -> np.ndarray:
    """`loss_tokens` as integers [examples]; `ValueError` with the index of what is not from 0 to the length less one."""
    loss_tokens = np.asarray(loss_tokens)
    if loss_tokens.shape != lengths.shape:
        raise ValueError(f"loss_tokens has shape {list(loss_tokens.shape)}; expected {list(lengths.shape)}")
    if (bad := (loss_tokens < 0) | (loss_tokens >= lengths)).any():
        i = int(np.argmax(bad))
        raise ValueError(f"loss_tokens[{i}] = {loss_tokens[i]}; expected 0 to {lengths[i] - 1}, for {lengths[i]} tokens")
    return loss_tokens


def hash_lengths(lengths: np.ndarray) -> str:
    """sha256 of int32 lengths [examples] in little-endian order: what a plan is tied to."""
    return hashlib.sha256(np.ascontiguousarray(lengths, dtype="<i4").data).hexdigest()


def positive(name: str, value: int) -> int:
    """`value`; `ValueError` unless it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} = {value!r}; expected an integer of at least 1")
    return value


def check_layout(layout: str) -> None:
    """`ValueError` unless `layout` is padded or flat."""
    if layout not in ("padded", "flat"):
        raise ValueError(f"layout = {layout!r}; expected 'padded' or 'flat'")


def fit(lengths: np.ndarray, max_tokens: int | None, overflow: Overflow | None) -> Segments:
    """Whole examples, or what the policy leaves of those longer than `max_tokens`. lengths: int32 [examples]."""
    if max_tokens is None and overflow is None:
        return None, None, lengths
    if overflow not in ("error", "truncate", "split"):
        raise ValueError(f"overflow = {overflow!r}; expected 'error', 'truncate' or 'split'")
    positive("max_tokens", max_tokens)
    if lengths.max() <= max_tokens:
        return None, None, lengths
    if overflow == "error":
        i = int(np.argmax(lengths > max_tokens))
        policies = 'pass overflow="split" or "truncate"'
        raise ValueError(f"lengths[{i}] = {lengths[i]} exceeds max_tokens = {max_tokens}; {policies}")
    if overflow == "truncate":
        return None, None, np.minimum(lengths, np.int32(max_tokens))
    pieces = -(-lengths.astype(np.int64) // max_tokens)
    example = np.repeat(np.arange(len(lengths), dtype=index_type(len(lengths))), pieces)
    start = (np.arange(len(example)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * max_tokens
    stop = np.minimum(start + max_tokens, lengths[example])
    return example, start.astype(np.int32), stop.astype(np.int32)


def sizes(segments: Segments) -> np.ndarray:
    """Tokens per segment, int32 [segments]."""
    _, start, stop = segments
    return stop if start is None else stop - start


def gather(segments: Segments, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The segments at `index` (integers [k]), all three columns present; `example` is int32 while that is enough."""
    example, start, stop = segments
    if example is None:
        return index.astype(index_type(len(stop)), copy=False), np.zeros(len(index), dtype=np.int32), stop[index]
    return example[index], start[index], stop[index]


def cut(segments: Segments, size: int) -> tuple[np.ndarray, Segments]:
    """Lay segments end to end and cut every `size` tokens: row_splits (int64 [rows + 1]) and the finer segments."""
    ends = np.cumsum(sizes(segments), dtype=np.int64)
    row_begins = np.arange(0, ends[-1], size)
    edges = np.sort(np.concatenate([row_begins, ends]), kind="stable")  # two sorted runs, so a merge; begins at 0
    edges = edges[np.append(True, np.diff(edges) > 0)]
    begin, end = edges[:-1], edges[1:]
    source = ends.searchsorted(begin, side="right")
    example, _, stop = gather(segments, source)
    shift = stop - ends[source]
    row_splits = np.append(begin.searchsorted(row_begins), len(begin))
    return row_splits, (example, (begin + shift).astype(np.int32), (end + shift).astype(np.int32))


def select_rows(row_splits: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the segments of `rows`, in that order (int64), and the new row_splits (int64 [len(rows) + 1])."""
    counts = np.diff(row_splits)[rows]
    splits = np.concatenate([[0], np.cumsum(counts)])
    return np.arange(splits[-1]) + np.repeat(row_splits[:-1][rows] - splits[:-1], counts), splits


def long_to_short(size: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Segment numbers by descending size, equal ones in random order (int64 [segments]); and how many there are of each size.

    numpy's stable sort of 16-bit keys is a radix sort; larger sizes take two passes. Shuffling inside a run of equal sizes stays in cache.
    """
    counts, longest = count(size), int(size.max())
    order = np.argsort(np.subtract(longest, size, dtype=np.int32).astype(np.uint16), kind="stable")  # the low 16 bits
    if longest > 0xFFFF:
        order = order[np.argsort(((longest - size[order]) >> 16).astype(np.uint16), kind="stable")]
    ends = np.cumsum(counts[::-1])
    for end, n in zip(ends.tolist(), counts[::-1].tolist()):
        if n > 1:
            rng.shuffle(order[end - n : end])
    return order, counts


def count(size: np.ndarray) -> np.ndarray:
    """Histogram of sizes, int64 [largest + 1]; in pieces, because bincount copies what is not int64 and cache is faster than memory."""
    counts = np.zeros(int(size.max()) + 1, dtype=np.int64)
    for begin in range(0, len(size), max(2**16, 4 * len(counts))):
        counts += np.bincount(size[begin : begin + max(2**16, 4 * len(counts))], minlength=len(counts))
    return counts


def next_fit_splits(size: np.ndarray, max_tokens: int) -> np.ndarray:
    """row_splits of items taken in order. One binary search a row: a row's end depends on the row before."""
    ends = np.cumsum(size, dtype=np.int64)
    splits, used = [0], 0
    while splits[-1] < len(size):
        splits.append(int(ends.searchsorted(used + max_tokens, side="right")))
        used = int(ends[splits[-1] - 1])
    return np.array(splits)


def pack_histogram(
    counts: np.ndarray, max_tokens: int, rule: Rule = "best_fit_decreasing", max_examples: int | None = None
) -> tuple[list[tuple[int, int, int, int]], np.ndarray]:
    """Decreasing-fit packing of `counts[n]` examples of n tokens (n ≤ max_tokens), exact, without looking at examples.

    Rows that were filled alike form one group, so one step places all examples of one length that fit into the group.
    Groups with room for the current length lie in a heap, ordered by the rule; the others wait until lengths have come
    down to their room. Returns placements (first row, rows, examples each, examples already there), long to short, and
    the examples per row (int64 [rows]). O(groups · log groups); there are a few groups per distinct length.

    >>> pack_histogram(np.bincount([4, 3, 1, 1]), max_tokens=5)[0]
    [(0, 1, 1, 0), (1, 1, 1, 0), (0, 1, 1, 1), (1, 1, 1, 1)]
    """
    order = {"best_fit_decreasing": (1, 0), "first_fit_decreasing": (0, 1), "histogram": (-1, 0)}
    by_room, by_row = order[rule]
    ready: list[tuple[int, int, int, int, int]] = []
    waiting: dict[int, list[tuple[int, int, int]]] = {}
    full: list[tuple[int, int, int]] = []
    placements: list[tuple[int, int, int, int]] = []
    new_row, previous, most = 0, len(counts), max_examples or max_tokens

    def put(first: int, rows: int, taken: int, room: int, length: int) -> None:
        if not room or taken == most:
            full.append((first, rows, taken))
        elif room < length:
            waiting.setdefault(room, []).append((first, rows, taken))
        else:
            heappush(ready, (by_room * room + by_row * first, first, rows, taken, room))

    for length in np.flatnonzero(counts)[::-1].tolist():
        for room in range(length, previous):
            for group in waiting.pop(room, ()):
                put(*group, room, length)
        left, previous = int(counts[length]), length
        while left:
            if ready:
                _, first, rows, taken, room = heappop(ready)
            else:
                first, taken, room = new_row, 0, max_tokens
                rows = -(-left // min(room // length, most))
                new_row += rows
            each = 1 if rule == "histogram" and taken else min(room // length, most - taken)
            for n, k in ((min(rows, left // each), each), (1, left % each)):  # and one row takes the rest
                if n and rows and 0 < k <= left:
                    placements.append((first, n, k, taken))
                    put(first, n, taken + k, room - k * length, length)
                    first, rows, left = first + n, rows - n, left - n * k
            if rows:
                put(first, rows, taken, room, length)
    row_counts = np.empty(new_row, dtype=np.int64)
    for first, rows, taken in chain(full, (group[1:4] for group in ready), *waiting.values()):
        row_counts[first : first + rows] = taken
    return placements, row_counts


def cheapest_cuts(size: np.ndarray, padded: bool, costs: tuple[float, float, float], max_slots: int) -> np.ndarray:
    """Row ends (int64, counted over all batches) of the cheapest cut of each batch, by dynamic programming over ends.

    size: float64 [batches, n], ascending in a batch, none above `max_slots`. costs: per row, slot and pair of tokens.
    """
    batches, n = size.shape
    tokens, pairs = (np.pad(np.cumsum(x, axis=1), ((0, 0), (1, 0))) for x in (size, size * size))
    best, last = np.zeros((batches, n + 1)), np.zeros((batches, n + 1), dtype=np.int64)
    low = 0  # first begin from which some batch can still reach `end`
    for end in range(1, n + 1):
        longest = size[:, end - 1 : end]
        used = (end - np.arange(low, end)) * longest if padded else tokens[:, end : end + 1] - tokens[:, low:end]
        too_many = int((used > max_slots).all(axis=0).argmin())
        used, low = used[:, too_many:], low + too_many
        seen = used * longest if padded else pairs[:, end : end + 1] - pairs[:, low:end]
        total = best[:, low:end] + (costs[0] + costs[1] * used + costs[2] * seen)
        total[used > max_slots] = np.inf
        last[:, end] = low + np.argmin(total, axis=1)
        best[:, end] = total.min(axis=1)
    is_end = np.zeros((batches, n + 1), dtype=bool)
    at = np.full(batches, n)
    while at.any():
        is_end[np.arange(batches), at] = True
        at = last[np.arange(batches), at]
    return np.flatnonzero(is_end[:, 1:]) + 1


def index_type(examples: int) -> type:
    return np.int32 if examples < 2**31 else np.int64
