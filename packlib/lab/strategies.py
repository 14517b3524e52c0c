"""The table of batching strategies: a plan, a layout and a boundary each. Adding a strategy is adding a row.

Every strategy sees the same examples: `Corpus.fit` applies the capacity once, before anything is planned, and counts
what that loses. TRL's own configurations stand beside ours as peers; they do their own planning and collating.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from packlib import plans
from packlib.collators import FlatteningCollator, PaddingCollator
from packlib.lab.parameters import unknown_name

Size = Literal["examples", "row", "batch"]
Layout = Literal["padded", "flat"]
Boundary = Literal["segment", "row"]


class Look(NamedTuple):
    """`color`: place in seaborn's colour-blind palette of ten; `hatch` and `marker`: matplotlib's."""

    color: int
    hatch: str
    marker: str


@dataclass(frozen=True)
class Strategy:
    """One row of the table: how a strategy batches, and how it looks in every figure.

    Args:
        name, label: what code and records call it, and what readers see.
        planner: `planner(lengths, size, *, seed, **own)` -> Plan. A peer is planned by TRL itself; its planner gives
            what it is handed, or rows of the same kind, for counts beforehand.
        size: what the planner's `size` counts: `"examples"` of a mini-batch (batch_size), tokens of a `"row"`
            (max_tokens; batch_size of these rows make a micro-batch), or slots of a `"batch"`
            (batch_size × max_tokens; a plan row is a whole micro-batch).
        layout: `"padded"` [B, T] with a mask, or `"flat"` [1, T] without.
        look: how it is drawn, the same in every figure.
        own: further keywords of the planner.
        boundary: where attention stops: at each `"segment"`, or only at each `"row"` (contaminated on purpose).
        examples_stay: every example stays an entry of its own, and counts as a row in the paper's Table 2.
        cuts: its planner cuts examples where a row ends, and so takes those longer than a row.
        trl: settings of `trl.SFTConfig`, for the peers.
    """

    name: str
    label: str
    planner: Callable[..., plans.Plan]
    size: Size
    layout: Layout
    look: Look
    own: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    boundary: Boundary = "segment"
    examples_stay: bool = False
    cuts: bool = False
    trl: Mapping[str, Any] | None = None

    @property
    def contaminated(self) -> bool:
        """Whether examples of a row see each other."""
        return self.boundary == "row"

    @property
    def packed_by_trl(self) -> bool:
        """Whether TRL plans rows of its own, instead of taking the mini-batches that it is handed."""
        return bool((self.trl or {}).get("packing"))

    def collator(self, pad_token_id: int, **options: Any) -> FlatteningCollator | PaddingCollator:
        """What turns this strategy's rows into a batch. options: of the collator, such as `pad_to_multiple_of`."""
        if self.layout == "padded":
            return PaddingCollator(pad_token_id, **options)
        return FlatteningCollator(boundary=self.boundary, pad_token_id=pad_token_id, **options)

    def rows_per_batch(self, batch_size: int) -> int:
        """Rows of the plan that make a micro-batch."""
        return batch_size if self.size == "row" else 1


_TABLE = [
    Strategy(
        "padding",
        "Padding",
        plans.shuffled_batches,
        size="examples",
        layout="padded",
        look=Look(7, "", "o"),
        examples_stay=True,
    ),
    Strategy(
        "group_by_length",
        "Group by length",
        plans.length_grouped_batches,
        size="examples",
        layout="padded",
        look=Look(9, "..", "s"),
        examples_stay=True,
    ),
    Strategy(
        "minibatch_packing",
        "MiniBatchPacking + PosID",
        plans.shuffled_batches,
        size="examples",
        layout="flat",
        look=Look(0, "//", "D"),
        examples_stay=True,
    ),
    Strategy(
        "fixed_length_packing",
        "FixedLengthPacking (contaminated)",
        plans.fixed_length,
        size="row",
        layout="flat",
        look=Look(3, "xx", "X"),
        boundary="row",
        cuts=True,
    ),
    Strategy(
        "fixed_length_packing_posid",
        "FixedLengthPacking + PosID",
        plans.fixed_length,
        size="row",
        layout="flat",
        look=Look(1, "\\\\", "P"),
        cuts=True,
    ),
    Strategy(
        "random_packing_posid",
        "Random packing + PosID",
        plans.next_fit,
        size="batch",
        layout="flat",
        look=Look(4, "oo", "v"),
        own={"overflow": "error", "order": "random"},
    ),
    Strategy(
        "sorted_packing_posid",
        "Sorted packing + PosID",
        plans.next_fit,
        size="batch",
        layout="flat",
        look=Look(5, "--", "<"),
        own={"overflow": "error", "order": "sorted"},
    ),
    Strategy(
        "multipack_posid",
        "Multipack + PosID",
        plans.best_fit_decreasing,
        size="batch",
        layout="flat",
        look=Look(2, "++", "^"),
        own={"overflow": "error"},
    ),
    Strategy(
        "best_fit_posid",
        "Best fit, mixed + PosID",
        plans.best_fit,
        size="batch",
        layout="flat",
        look=Look(4, "||", "p"),
        own={"overflow": "error"},
    ),
    Strategy(
        "best_fit_crop_posid",
        "Best fit, cropped + PosID",
        plans.best_fit_crop,
        size="row",
        layout="flat",
        look=Look(5, "//", "d"),
        cuts=True,
    ),
    Strategy(
        "token_budget",
        "Token budget, padded",
        plans.token_budget,
        size="batch",
        layout="padded",
        look=Look(6, "**", ">"),
        own={"overflow": "error"},
        examples_stay=True,
    ),
    Strategy(
        "dynapipe",
        "DynaPipe, padded",
        plans.dynamic_programming,
        size="batch",
        layout="padded",
        look=Look(8, "OO", "h"),
        own={"overflow": "error"},
        examples_stay=True,
    ),
    Strategy(
        "trl_padding",
        "TRL padding",
        plans.shuffled_batches,
        size="examples",
        layout="padded",
        look=Look(7, "o", "1"),
        examples_stay=True,
        trl={},
    ),
    Strategy(
        "trl_padding_free",
        "TRL padding_free",
        plans.shuffled_batches,
        size="examples",
        layout="flat",
        look=Look(0, "o", "2"),
        examples_stay=True,
        trl={"padding_free": True},
    ),
    Strategy(
        "trl_packing_bfd",
        "TRL packing (bfd)",
        plans.best_fit_decreasing,
        size="row",
        layout="flat",
        look=Look(2, "o", "3"),
        own={"overflow": "error"},
        trl={"packing": True, "packing_strategy": "bfd"},
    ),
]
STRATEGIES: dict[str, Strategy] = {strategy.name: strategy for strategy in _TABLE}


def get_strategy(name: str) -> Strategy:
    """The row of that name. Raises `ValueError` listing the known names."""
    if name not in STRATEGIES:
        raise unknown_name("strategy", name, STRATEGIES)
    return STRATEGIES[name]


def plan_for(
    strategy: Strategy, lengths: Sequence[int] | np.ndarray, *, batch_size: int, max_tokens: int, seed: int, **own: Any
) -> plans.Plan:
    """The strategy's plan for examples of these lengths (int [examples], each at most `max_tokens`: see
    `Corpus.fit`; any, where the strategy cuts).

    own: further keywords of its planner. For a peer, what it is handed (`trl_padding*`) or rows like its own.
    """
    lengths = np.asarray(lengths)
    if lengths.size and lengths.max() > max_tokens and not strategy.cuts:
        i = int(np.argmax(lengths > max_tokens))
        raise ValueError(f"lengths[{i}] = {lengths[i]} exceeds max_tokens = {max_tokens}; cut it first, by Corpus.fit")
    size = {"examples": batch_size, "row": max_tokens, "batch": batch_size * max_tokens}[strategy.size]
    return strategy.planner(lengths, size, seed=seed, **strategy.own, **own)


def listing() -> str:
    """The table as text, a line a strategy: `python -m packlib strategies`."""
    rows = [("strategy", "layout", "boundary", "")]
    for strategy in STRATEGIES.values():
        note = "contaminated on purpose" if strategy.contaminated else ""
        note = "planned by TRL" if strategy.trl is not None else note
        rows.append((strategy.name, strategy.layout, strategy.boundary, note))
    return "\n".join(f"{name:28}{layout:8}{boundary:10}{note}".rstrip() for name, layout, boundary, note in rows)
