"""The table of batching strategies: a plan, a layout and a boundary each. Adding a strategy is adding a row.

Every strategy sees the same examples: `fit_examples` applies the capacity to the corpus once, before anything is planned, and counts what
that loses. TRL's own configurations stand beside ours as peers; they do their own planning and collating.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from packlib import plans
from packlib.collators import FlatteningCollator, PaddingCollator
from packlib.lab.parameters import unknown_name

if TYPE_CHECKING:
    from packlib.lab.corpora import Corpus

Planner = Callable[..., plans.Plan]


@dataclass(frozen=True)
class Strategy:
    """One row of the table.

    planner: `(lengths, batch_size=, max_tokens=, seed=, atom_size=)` -> Plan; None where TRL plans by itself.
    layout: `padded` [B, T] with a mask, or `flat` [1, T] without. boundary: where attention stops.
    batched: True if a plan row is a whole micro-batch; False if `batch_size` rows of at most `max_tokens` make one.
    trl: settings of `trl.SFTConfig` for the peers.
    """

    name: str
    label: str
    planner: Planner | None
    layout: Literal["padded", "flat"]
    boundary: Literal["segment", "row"] = "segment"
    batched: bool = True
    trl: dict[str, Any] | None = None

    @property
    def contaminated(self) -> bool:
        return self.boundary == "row"

    def collator(self, pad_token_id: int) -> FlatteningCollator | PaddingCollator:
        """What turns this strategy's rows into a batch."""
        return PaddingCollator(pad_token_id) if self.layout == "padded" else FlatteningCollator(boundary=self.boundary)

    def rows_per_batch(self, batch_size: int) -> int:
        return 1 if self.batched else batch_size


def _table() -> list[Strategy]:
    def minibatches(lengths, *, batch_size, seed, **_):
        return plans.shuffled_batches(lengths, batch_size, seed)

    def grouped(lengths, *, batch_size, seed, **_):
        return plans.length_grouped_batches(lengths, batch_size, seed)

    def fixed(lengths, *, max_tokens, seed, atom_size=None, **_):
        return plans.fixed_length(lengths, max_tokens, seed, atom_size=atom_size)

    def next_fit(order):
        def planner(lengths, *, batch_size, max_tokens, seed, **_):
            return plans.next_fit(lengths, batch_size * max_tokens, order=order, seed=seed, overflow="error")

        return planner

    def best_fit(lengths, *, batch_size, max_tokens, seed, **_):
        return plans.best_fit_decreasing(lengths, batch_size * max_tokens, seed=seed, overflow="error")

    def budget(lengths, *, batch_size, max_tokens, seed, **_):
        return plans.token_budget(lengths, batch_size * max_tokens, seed=seed, layout="padded", overflow="error")

    def dynapipe(lengths, *, batch_size, max_tokens, seed, **_):
        return plans.dynamic_programming(lengths, "padded", max_slots=batch_size * max_tokens, seed=seed, overflow="error")

    return [
        Strategy("padding", "Padding", minibatches, "padded"),
        Strategy("group_by_length", "Group by length", grouped, "padded"),
        Strategy("minibatch_packing", "MiniBatchPacking + PosID", minibatches, "flat"),
        Strategy("fixed_length_packing", "FixedLengthPacking (contaminated)", fixed, "flat", boundary="row", batched=False),
        Strategy("fixed_length_packing_posid", "FixedLengthPacking + PosID", fixed, "flat", batched=False),
        Strategy("random_packing_posid", "Random packing + PosID", next_fit("random"), "flat"),
        Strategy("sorted_packing_posid", "Sorted packing + PosID", next_fit("sorted"), "flat"),
        Strategy("multipack_posid", "Multipack + PosID", best_fit, "flat"),
        Strategy("token_budget", "Token budget, padded", budget, "padded"),
        Strategy("dynapipe", "DynaPipe, padded", dynapipe, "padded"),
        Strategy("trl_padding", "TRL padding", None, "padded", batched=False, trl={}),
        Strategy("trl_padding_free", "TRL padding_free", None, "flat", batched=False, trl={"padding_free": True}),
        Strategy("trl_packing_bfd", "TRL packing (bfd)", None, "flat", batched=False, trl={"packing": True, "packing_strategy": "bfd"}),
    ]  # fmt: skip


STRATEGIES: dict[str, Strategy] = {strategy.name: strategy for strategy in _table()}
OVERFLOW = ("error", "truncate", "split")


def get_strategy(name: str) -> Strategy:
    """The row of that name. Raises `ValueError` listing the known names."""
    if name not in STRATEGIES:
        raise unknown_name("strategy", name, STRATEGIES)
    return STRATEGIES[name]


def plan_for(
    strategy: Strategy, lengths: Sequence[int] | np.ndarray, *, batch_size: int, max_tokens: int, seed: int, atom_size: int | None = None
) -> plans.Plan:
    """The strategy's plan for examples of these lengths (int [examples], each at most `max_tokens`: see `fit_examples`).

    The peers are planned by TRL itself; for `trl_padding*` this returns the mini-batches they are handed.
    """
    lengths = np.asarray(lengths)
    if lengths.size and lengths.max() > max_tokens:
        i = int(np.argmax(lengths > max_tokens))
        raise ValueError(f'lengths[{i}] = {lengths[i]} exceeds max_tokens = {max_tokens}; pass overflow="split" or "truncate"')
    planner = strategy.planner or (STRATEGIES["multipack_posid"] if strategy.name == "trl_packing_bfd" else STRATEGIES["padding"]).planner
    return planner(lengths, batch_size=batch_size, max_tokens=max_tokens, seed=seed, atom_size=atom_size)


def fit_examples(corpus: Corpus, max_tokens: int, overflow: str) -> tuple[Corpus, int]:
    """The corpus with no example above `max_tokens`, and the number of tokens that cost: the same data for every strategy.

    overflow: `error` names the first overlong example, `truncate` keeps the first `max_tokens` tokens of it, `split` makes several
    examples of it and loses nothing. Raises `ValueError`.
    """
    if overflow not in OVERFLOW:
        raise unknown_name("overflow policy", overflow, OVERFLOW)
    long = np.flatnonzero(corpus.lengths > max_tokens)
    if not long.size:
        return corpus, 0
    if overflow == "error":
        i = int(long[0])
        raise ValueError(
            f'lengths[{i}] = {corpus.lengths[i]} exceeds max_tokens = {max_tokens} ({long.size} of {len(corpus.lengths)} examples do); '
            f'pass overflow="split" or "truncate"'
        )
    starts = np.concatenate([[0], np.cumsum(corpus.lengths)[:-1]])
    if overflow == "truncate":
        lengths = np.minimum(corpus.lengths, max_tokens)
    else:
        pieces = -(-corpus.lengths // max_tokens)
        first = np.repeat(np.cumsum(pieces) - pieces, pieces)
        offsets = (np.arange(pieces.sum()) - first) * max_tokens
        lengths = np.minimum(np.repeat(corpus.lengths, pieces) - offsets, max_tokens)
        starts = np.repeat(starts, pieces) + offsets
    ends = np.cumsum(lengths)
    token = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
    columns = [corpus.dataset.data.column(name).combine_chunks().values.to_numpy()[token] for name in ("input_ids", "labels")]
    metadata = {name: value for name, value in vars(corpus).items() if isinstance(value, str | int) and name != "sha256"}
    fitted = type(corpus).from_arrays(*columns, lengths, **metadata)
    return fitted, int(corpus.lengths.sum() - lengths.sum())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`python -m packlib strategies` takes no arguments."""


def command(arguments: argparse.Namespace) -> str:
    """The table as text."""
    rows = [("strategy", "layout", "boundary", "")]
    for s in STRATEGIES.values():
        note = "contaminated on purpose" if s.contaminated else "planned by TRL" if s.trl is not None else ""
        rows.append((s.name, s.layout, s.boundary, note))
    return "\n".join(f"{name:28}{layout:8}{boundary:10}{note}".rstrip() for name, layout, boundary, note in rows)
