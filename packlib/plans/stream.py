"""Packing without knowing all lengths: rows out of a bounded buffer of examples, nothing lost at the end.

A block is what the buffer holds: it is packed long to short, its rows are drawn in random order, and the least full of
them are held back, to be packed again with what comes. This file decides; `packlib.plans.iterable` reads and resumes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from packlib.plans.lengths import Lengths, Overflow, check_lengths, hash_lengths, positive
from packlib.plans.packing import fit, pack_block, sizes
from packlib.plans.plan import Cost, Plan

if TYPE_CHECKING:
    from packlib.plans.iterable import PackedStream

HELD = 16  # one row in so many is held back for the next block
SLACK = 0.005  # rows of a stream over those of a plan of all examples, measured with buffers of 10,000


def stream(
    examples: Iterable[Any],
    max_tokens: int,
    *,
    overflow: Overflow,
    buffer: int = 10_000,
    seed: int = 0,
    world_size: int = 1,
    cost: Cost = "quadratic",
) -> PackedStream:
    """Packed rows of whole examples out of data that has no length: a `datasets.IterableDataset`.

    A buffer of examples is packed first-fit decreasing and emitted in an order drawn from `seed`; one row in sixteen,
    the least full, waits for the next buffer, once. So rows are shuffled within a buffer, and an example is at most two
    buffers late; for more randomness shuffle `examples`. Nothing is lost: at the end all rows come. Rows have the
    columns of `Plan.apply` that a model needs, as numpy arrays: `input_ids`, `labels`, `position_ids`, `seq_lengths`.

    Args:
        examples: a `datasets.IterableDataset`, or anything that can be iterated: mappings with `input_ids` (and
            `labels`, masks: see `packlib.columns`), or integer arrays [n]. An iterator serves for one pass.
        max_tokens: capacity of a row. overflow: what becomes of longer examples, `"error"`, `"truncate"` or `"split"`.
        buffer: examples that are planned together.
        world_size: ranks that share the stream: rows come in groups of so many, of similar `cost` (see
            `Plan.balance`), for rank 0, 1, …; at the end rows are parted so that the last group is whole, too, where
            they have examples enough.

    Ranks and loader workers part it as they part every IterableDataset: by the shards of `examples`, or with
    `datasets.distributed.split_dataset_by_node` row by row. `state_dict` and `load_state_dict` resume it at any row:
    from the state of `examples` where that is exact, else by reading again what was read.

    Trainer needs `accelerator_config={"dispatch_batches": False}` (SFTTrainer sets it), `max_steps` (`estimate_rows`),
    and for SFTTrainer `dataset_kwargs={"skip_prepare_dataset": True}`. `ValueError`, in mid-stream, for examples that
    cannot be packed, by their number.

    >>> rows = stream([[1, 2, 3], [4], [5, 6]], max_tokens=4, overflow="error")
    >>> sorted(row["input_ids"].tolist() for row in rows)
    [[1, 2, 3, 4], [5, 6]]
    """
    from packlib.plans.iterable import PackedStream  # datasets is needed here alone

    fit(np.ones(1, dtype=np.int32), max_tokens, overflow)  # the same errors as every planner's
    if cost not in ("quadratic", "linear"):
        raise ValueError(f"cost = {cost!r}; expected 'quadratic' or 'linear'")
    ranks = positive("world_size", world_size)
    return PackedStream.of(examples, Block(max_tokens, overflow, positive("buffer", buffer), (int(seed),), ranks, cost))


@dataclass(frozen=True)
class Block:
    """How a buffer becomes rows. seed: the stream's, and what an epoch adds to it."""

    max_tokens: int
    overflow: Overflow
    buffer: int
    seed: tuple[int, ...]
    world_size: int
    cost: Cost

    def full(self, examples: int, tokens: int) -> bool:
        """Whether the buffer holds enough: `buffer` examples, and rows for every rank."""
        return examples >= self.buffer and tokens >= 2 * self.world_size * self.max_tokens

    def plan(self, size: np.ndarray, held: int, number: int, last: bool) -> tuple[Plan, np.ndarray]:
        """Rows to emit, and the items that wait for the next block.

        size: integers [items], none above max_tokens; the first `held` of them have waited already. number: of the
        block. last: nothing waits. Returns the plan of the rows, and item numbers, ascending.
        """
        rng = np.random.default_rng([*self.seed, number])
        index, splits = pack_block(size, self.max_tokens, rng)
        whole = Plan(
            splits,
            index,
            np.zeros(len(index), dtype=np.int32),
            size[index].astype(np.int32),
            max_tokens=self.max_tokens,
            algorithm=f"stream(block={number})",
            lengths_sha256=hash_lengths(size),
        )
        rows, waiting = np.arange(len(whole)), np.arange(0)
        if not last:
            # 1. The least full rows wait, those that have waited do not; as many as leave whole groups of ranks.
            waited = np.logical_or.reduceat(index < held, splits[:-1])
            rows = np.lexsort((whole.row_lengths, waited))
            wait = min(max(len(rows) // HELD, 1), len(rows) - 1, int((~waited).sum()))
            wait += (len(rows) - wait) % self.world_size
            waiting, rows = np.sort(whole.take(rows[:wait]).example) if wait else waiting, rows[wait:]
        # 2. The others come in random order, or in groups of similar cost.
        plan = whole.take(rng.permutation(rows))
        if self.world_size > 1:
            try:
                plan = plan.balance(self.world_size, self.cost, seed=int(rng.integers(2**31)))
            except ValueError:
                if not last:
                    raise
        return plan, waiting


@dataclass(frozen=True)
class RowsEstimate:
    """How many rows a stream will have: between `low` and `high` with the probability that was asked for."""

    low: int
    expected: int
    high: int


def estimate_rows(
    sample: Lengths,
    examples: int,
    max_tokens: int,
    *,
    overflow: Overflow,
    confidence: float = 0.95,
    resamples: int = 100,
    seed: int = 0,
) -> RowsEstimate:
    """Rows of `examples` examples, from the lengths of a random sample of them: what `max_steps` is computed from.

    The sample is packed, and `resamples` bootstrap samples of it, whose spread gives the bounds; `high` also has the
    half percent that a stream may need over a plan of everything. A sample that is not random (the first examples of a
    file) says nothing about the rest.

    Args:
        sample: tokens per example, integers [sampled], a few thousand. examples: of the whole stream.

    >>> estimate_rows([2, 2, 2, 2], examples=400, max_tokens=4, overflow="error").expected
    200
    """
    lengths = check_lengths(sample)
    if not len(lengths) <= positive("examples", examples):
        raise ValueError(f"examples = {examples}; expected at least the {len(lengths)} of the sample")
    rng = np.random.default_rng(seed)

    def packed(lengths: np.ndarray) -> int:
        return len(pack_block(sizes(fit(lengths, max_tokens, overflow)), max_tokens, rng)[1]) - 1

    rows, scale = packed(lengths), examples / len(lengths)
    spread = np.std([packed(rng.choice(lengths, len(lengths))) for _ in range(resamples)]) * scale
    spread *= np.sqrt(1 - 1 / scale) * NormalDist().inv_cdf((1 + confidence) / 2)
    low = max((rows - 1) * scale - spread, lengths.clip(max=max_tokens).sum() / max_tokens)
    return RowsEstimate(int(low), round(rows * scale), int(np.ceil((rows * scale + spread) * (1 + SLACK))))
