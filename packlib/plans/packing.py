"""Fit and cut: the algorithms under the planners, on arrays.

Segments are three parallel integer arrays (`example`, `start`, `stop`); rows are `row_splits` into them. `example` and
`start` are None where each example is one whole segment: at 10^8 examples every array that is not made counts. Only
what takes examples in a given order loops over them: `best_fit_rows`, `crop_rows`, and the dynamic programme.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np

from packlib.plans.lengths import Layout, Overflow, index_type, positive

Rule = Literal["best_fit_decreasing", "first_fit_decreasing", "histogram"]
Segments = tuple[np.ndarray | None, np.ndarray | None, np.ndarray]
Columns = tuple[np.ndarray, np.ndarray, np.ndarray]  # the same, none left out


def fit(
    lengths: np.ndarray, max_tokens: int | None, overflow: Overflow | None, *, name: str = "max_tokens"
) -> Segments:
    """Whole examples, or what the policy leaves of those longer than `max_tokens`.

    lengths: int32 [examples]. name: what the caller's argument is called, for errors.
    """
    if max_tokens is None and overflow is None:
        return None, None, lengths
    if overflow not in ("error", "truncate", "split"):
        raise ValueError(f"overflow = {overflow!r}; expected 'error', 'truncate' or 'split'")
    max_tokens = positive(name, max_tokens)
    if lengths.max() <= max_tokens:
        return None, None, lengths
    if overflow == "error":
        i = int(np.argmax(lengths > max_tokens))
        policies = 'pass overflow="split" or "truncate"'
        raise ValueError(f"lengths[{i}] = {lengths[i]} exceeds {name} = {max_tokens}; {policies}")
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


def gather(segments: Segments, index: np.ndarray) -> Columns:
    """The segments at `index` (integers [k]), all three columns present; `example` is int32 while that is enough."""
    example, start, stop = segments
    if example is None or start is None:
        return index.astype(index_type(len(stop)), copy=False), np.zeros(len(index), dtype=np.int32), stop[index]
    return example[index], start[index], stop[index]


def cut(segments: Segments, size: int) -> tuple[np.ndarray, Columns]:
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
    """Segment numbers by descending size, equal ones in random order; and how many there are of each size.

    Both int64, [segments] and [largest + 1]. numpy's stable sort of 16-bit keys is a radix sort; larger sizes take two
    passes. Shuffling inside a run of equal sizes stays in cache.
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
    """Histogram of sizes, int64 [largest + 1].

    In pieces: bincount copies what is not int64, and cache is faster than memory.
    """
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


def best_fit_rows(size: np.ndarray, max_tokens: int) -> np.ndarray:
    """Row of each item, taken in order: the fullest with room for it, or a new one. int64 [items].

    size: integers [items], 1 to max_tokens. Rows with equal room wait in one list; the distinct rooms are kept sorted.

    >>> best_fit_rows(np.array([3, 4, 1, 2]), 5).tolist()
    [0, 1, 1, 0]
    """
    rooms: list[int] = []
    waiting: dict[int, list[int]] = {}
    rows, new = [], 0
    for n in size.tolist():
        at = bisect_left(rooms, n)
        if at == len(rooms):
            row, room, new = new, max_tokens, new + 1
        else:
            room = rooms[at]
            row = waiting[room].pop()
            if not waiting[room]:
                del waiting[room], rooms[at]
        if left := room - n:
            if left not in waiting:
                waiting[left] = []
                insort(rooms, left)
            waiting[left].append(row)
        rows.append(row)
    return np.array(rows)


def crop_rows(size: np.ndarray, max_tokens: int, buffer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items in the order of full rows, how much of each is kept, and row_splits, all int64.

    size: integers [items]. A row takes the longest of the next `buffer` items that fits; when none does, the shortest
    is cropped to the room that is left.
    """
    waiting: list[tuple[int, int]] = []  # (size, item), short to long
    taken: list[int] = []
    kept: list[int] = []
    splits, coming, sizes = [0], 0, size.tolist()
    while waiting or coming < len(sizes):
        room = max_tokens
        while room:
            while len(waiting) < buffer and coming < len(sizes):
                insort(waiting, (sizes[coming], coming))
                coming += 1
            if not waiting:
                break
            at = bisect_right(waiting, (room, len(sizes))) - 1
            n, item = waiting.pop(max(at, 0))
            taken.append(item)
            kept.append(min(n, room))
            room -= kept[-1]
        splits.append(len(taken))
    return np.array(taken), np.array(kept), np.array(splits)


class _Group(NamedTuple):
    """Rows that were filled alike: `rows` of them from number `first`, each with `taken` examples and `room` tokens."""

    first: int
    rows: int
    taken: int
    room: int


_PRIORITY: dict[Rule, Callable[[_Group], int]] = {  # the group that comes first out of a heap
    "best_fit_decreasing": lambda group: group.room,
    "first_fit_decreasing": lambda group: group.first,
    "histogram": lambda group: -group.room,
}


def pack_histogram(
    counts: np.ndarray, max_tokens: int, rule: Rule = "best_fit_decreasing"
) -> tuple[list[tuple[int, int, int, int]], np.ndarray]:
    """Decreasing-fit packing of `counts[n]` examples of n tokens (n ≤ max_tokens), exact, without looking at examples.

    Rows that were filled alike form one group, so one step places all examples of one length that fit into the group.
    Groups with room for the current length lie in a heap, ordered by the rule; the others wait until lengths have come
    down to their room. Returns placements (first row, rows, examples each, examples already there), long to short, and
    the examples per row (int64 [rows]). O(groups · log groups); there are a few groups per distinct length.

    >>> pack_histogram(np.bincount([4, 3, 1, 1]), max_tokens=5)[0]
    [(0, 1, 1, 0), (1, 1, 1, 0), (0, 1, 1, 1), (1, 1, 1, 1)]
    """
    priority = _PRIORITY[rule]
    ready: list[tuple[int, _Group]] = []
    waiting: dict[int, list[_Group]] = {}
    full: list[_Group] = []
    placements: list[tuple[int, int, int, int]] = []
    new_row, previous = 0, len(counts)

    def put(group: _Group, length: int) -> None:
        if not group.room:
            full.append(group)
        elif group.room < length:
            waiting.setdefault(group.room, []).append(group)
        else:
            heappush(ready, (priority(group), group))

    for length in np.flatnonzero(counts)[::-1].tolist():
        # 1. Lengths have come down to the room of some groups that waited.
        for room in range(length, previous):
            for group in waiting.pop(room, ()):
                put(group, length)
        left, previous = int(counts[length]), length
        while left:
            # 2. Take the group that the rule prefers, or open as many new rows as are needed.
            if ready:
                _, group = heappop(ready)
            else:
                group = _Group(new_row, -(-left // (max_tokens // length)), 0, max_tokens)
                new_row += group.rows
            # 3. Fill each of its rows with as many examples as fit; shortest-pack-first looks again after every one.
            each = 1 if rule == "histogram" and group.taken else group.room // length
            # 4. Some rows take all of that, one more takes what is left over, the others stay as they were.
            for rows, examples in ((min(group.rows, left // each), each), (1, left % each)):
                if rows and group.rows and 0 < examples <= left:
                    placements.append((group.first, rows, examples, group.taken))
                    filled = group.taken + examples, group.room - examples * length
                    put(_Group(group.first, rows, *filled), length)
                    group = group._replace(first=group.first + rows, rows=group.rows - rows)
                    left -= rows * examples
            if group.rows:
                put(group, length)
    row_counts = np.empty(new_row, dtype=np.int64)
    for group in chain(full, (group for _, group in ready), *waiting.values()):
        row_counts[group.first : group.first + group.rows] = group.taken
    return placements, row_counts


def pack_block(size: np.ndarray, max_tokens: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """First-fit-decreasing packing of some thousand items, row by row: the next row takes the longest that still fits.

    That gives first fit's rows, in time that goes with rows and not with distinct lengths (`pack_histogram`), which are
    nearly as many as items here. size: integers [items], 1 to max_tokens. Returns item numbers and row_splits, both
    int64; equal sizes are dealt at random.

    >>> pack_block(np.array([4, 3, 1, 1]), 5, np.random.default_rng(0))[1]
    array([0, 2, 4])
    """
    # 1. Items long to short, and where those of each distinct size begin.
    order = rng.permutation(len(size))
    order = order[np.argsort(-size[order], kind="stable")]
    distinct, left = (values.tolist() for values in np.unique(size, return_counts=True))
    begin = (len(size) - np.cumsum(left)).tolist()
    taken: list[int] = []  # from which item,
    counts: list[int] = []  # how many,
    rows: list[int] = []  # and how often a row took
    while distinct:
        # 2. A row: as many of the longest size that fits as there are and as fit, again and again.
        room, at, before = max_tokens, len(distinct), len(taken)
        while room >= distinct[0] and (at := bisect_right(distinct, room, 0, at) - 1) >= 0:
            count = min(left[at], room // distinct[at])
            taken.append(begin[at])
            counts.append(count)
            room -= count * distinct[at]
            if count < left[at]:
                begin[at] += count
                left[at] -= count
            else:
                del distinct[at], left[at], begin[at]
                if not distinct:
                    break
        rows.append(len(taken) - before)
    # 3. Every run of items, written out.
    repeats = np.array(counts)
    ends = np.cumsum(repeats)
    index = np.arange(ends[-1]) + np.repeat(np.array(taken) - (ends - repeats), repeats)
    return order[index], np.concatenate([[0], ends[np.cumsum(rows) - 1]])


def cheapest_cuts(size: np.ndarray, layout: Layout, cost: Callable[..., np.ndarray], max_slots: int) -> np.ndarray:
    """Row ends (int64, counted over all batches) of the cheapest cut of each batch, by dynamic programming over ends.

    size: float64 [batches, n], ascending in a batch, none above `max_slots`. A row costs `cost(slots, pairs=…)`:
    tokens and Σ n² if `layout` is flat, lines as long as the longest if it is padded.
    """
    batches, n = size.shape
    padded = layout == "padded"
    tokens, pairs = (np.pad(np.cumsum(x, axis=1), ((0, 0), (1, 0))) for x in (size, size * size))
    best, last = np.zeros((batches, n + 1)), np.zeros((batches, n + 1), dtype=np.int64)
    low = 0  # first begin from which some batch can still reach `end`
    for end in range(1, n + 1):
        # 1. Slots of a row from every begin to this end; begins that are too far away in every batch are done with.
        longest = size[:, end - 1 : end]
        slots = (end - np.arange(low, end)) * longest if padded else tokens[:, end : end + 1] - tokens[:, low:end]
        too_many = int((slots > max_slots).all(axis=0).argmin())
        slots, low = slots[:, too_many:], low + too_many
        # 2. The cheapest way to this end: the cheapest way to some begin, and one row from there.
        seen = slots * longest if padded else pairs[:, end : end + 1] - pairs[:, low:end]
        total = best[:, low:end] + cost(slots, pairs=seen)
        total[slots > max_slots] = np.inf
        last[:, end] = low + np.argmin(total, axis=1)
        best[:, end] = total.min(axis=1)
    # 3. Walk back from the last end of every batch.
    is_end = np.zeros((batches, n + 1), dtype=bool)
    at = np.full(batches, n)
    while at.any():
        is_end[np.arange(batches), at] = True
        at = last[np.arange(batches), at]
    return np.flatnonzero(is_end[:, 1:]) + 1
