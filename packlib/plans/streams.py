"""Packing without knowing all lengths: rows out of a bounded buffer of examples, and how many there will be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from packlib.plans.block import Block
from packlib.plans.lengths import Lengths, Overflow, check_lengths, positive
from packlib.plans.packing import fit, pack_block, sizes
from packlib.plans.plan import Cost

if TYPE_CHECKING:
    from packlib.plans.iterable import PackedStream

SLACK = 0.005  # rows of a stream over those of a plan of all its examples, at most, with a buffer of 10,000 examples


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
    """Packed rows of whole examples out of data that has no length, as a `datasets.IterableDataset`.

    `buffer` examples are packed first-fit decreasing; of the rows one in sixteen, the least full, waits to be packed
    again with the next buffer, and the others are emitted. At the end all rows come: nothing is lost. Rows have the
    columns of `Plan.apply` that a model needs, as numpy arrays: `input_ids`, `labels`, `position_ids`, `seq_lengths`.

    **Order and randomness.** Rows come in an order drawn from (`seed`, epoch, block), within a buffer, and examples of
    one length are dealt to its rows at random. An example comes with its own buffer or, if its row has waited, with the
    next. Buffers follow the source: a source sorted by length gives buffers of one length each, whose rows stay less
    full where that length divides `max_tokens` badly. For more randomness, and against sorted sources, shuffle
    `examples`.

    **Memory** holds one buffer, the examples that wait, and nothing of what has been emitted. **Time** is that of
    `pack_block`, about a microsecond an example where some twenty share a row, and of concatenating O(tokens).

    Args:
        examples: a `datasets.IterableDataset`, or anything that can be iterated: mappings with `input_ids` (and
            `labels`, masks: see `packlib.columns`), or integer arrays [n]. An iterator serves for one pass.
        max_tokens: capacity of a row. overflow: what becomes of longer examples, `"error"`, `"truncate"` or `"split"`.
        buffer: examples that are planned together; more where they do not make two rows for every rank.
        world_size: ranks that share the stream: rows come in groups of so many, of similar `cost` (see
            `Plan.balance`), for rank 0, 1, …, which take a row at a time; at the end rows are parted so that the last
            group is whole, too, where they have examples enough. Such a stream has one shard: every rank plans it all.
            Work is even where a rank has rows enough in a buffer: the slowest of eight does 1.06 × the mean with 57
            rows a rank, 1.03 × with 114 (`benchmarks/bench_plans.py`: lognormal lengths, Σ n²).

    Ranks and loader workers part it as they part every IterableDataset: by the shards of `examples`, which then are
    streams of their own, or with `datasets.distributed.split_dataset_by_node` row by row. `state_dict` and
    `load_state_dict` resume it at any row, from the state of `examples` where that is exact, else (shuffle buffers) by
    reading again what was read. A state is JSON and holds the tokens that wait.

    Trainer needs `accelerator_config={"dispatch_batches": False}` (SFTTrainer sets it), `max_steps` (`estimate_rows`),
    and for SFTTrainer `dataset_kwargs={"skip_prepare_dataset": True}`. `ValueError`, in mid-stream, for examples that
    cannot be packed, by their number, and for a state that was saved with other arguments.

    >>> rows = stream([[1, 2, 3], [4], [5, 6]], max_tokens=4, overflow="error")
    >>> sorted(row["input_ids"].tolist() for row in rows)
    [[1, 2, 3, 4], [5, 6]]
    """
    from packlib.plans.iterable import PackedStream  # datasets is needed here alone

    fit(np.ones(1, dtype=np.int32), max_tokens, overflow)  # the same errors as every planner's
    if cost not in ("quadratic", "linear"):
        raise ValueError(f"cost = {cost!r}; expected 'quadratic' or 'linear'")
    buffer, ranks = positive("buffer", buffer), positive("world_size", world_size)
    return PackedStream.of(examples, Block(int(max_tokens), overflow, buffer, int(seed), ranks, cost))


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
    file) says nothing about the rest. Afterwards `PackedStream.rows` has the number.

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
    low = max(int((rows - 1) * scale - spread), 1)  # the sample's last row may be all but empty
    return RowsEstimate(low, round(rows * scale), int(np.ceil((rows * scale + spread) * (1 + SLACK))))
