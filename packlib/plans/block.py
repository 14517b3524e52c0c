"""What a stream does with a full buffer: which rows come now, in which order, and which examples wait for more.

A block is the examples that a buffer holds. It is packed long to short, its rows are drawn in random order, and the
least full of them are held back, to be packed again with what comes next. `packlib.plans.iterable` fills the buffer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from packlib.plans.lengths import Overflow, hash_lengths
from packlib.plans.packing import pack_block
from packlib.plans.plan import Cost, Plan

HELD = 16  # one row in so many is held back for the next block


@dataclass(frozen=True)
class Block:
    """How a buffer becomes rows: the arguments of `stream`, but for its examples."""

    max_tokens: int
    overflow: Overflow
    buffer: int
    seed: int
    world_size: int
    cost: Cost

    def full(self, examples: int, tokens: int) -> bool:
        """Whether the buffer holds enough: `buffer` examples, and two rows for every rank."""
        return examples >= self.buffer and tokens >= 2 * self.world_size * self.max_tokens

    def plan(self, size: np.ndarray, held: int, number: int, last: bool) -> tuple[Plan, np.ndarray]:
        """Rows to emit, of whole items, and the items that wait for the next block. A pure function.

        size: integers [items], none above max_tokens; the first `held` of them have waited already. number: of the
        block. last: nothing waits. Returns the plan of the rows, and item numbers, ascending. As `pack_block`, with a
        sort of the rows.
        """
        rng = np.random.default_rng([self.seed % 2**64, number])
        index, splits = pack_block(size, self.max_tokens, rng)
        whole = Plan(
            splits,
            index,
            np.zeros(len(index), dtype=np.int32),
            size[index].astype(np.int32),
            max_tokens=self.max_tokens,
            algorithm=f"block(number={number}, seed={self.seed})",
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
            except ValueError:  # rows that neither divide nor can be parted
                if not last:
                    raise
        return plan, waiting
