"""A stream of packed rows as a `datasets.IterableDataset`, which parts, shuffles, maps and resumes like every other.

What `datasets` composes are its examples iterables; a stream is one more of them, over that of its source. They are not
public, so everything that is used of them is in this file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from datasets import DatasetInfo, Features, IterableDataset, List, Value
from datasets.iterable_dataset import BufferShuffledExamplesIterable, ExamplesIterable, _BaseExamplesIterable

from packlib.columns import LENGTHS, POSITIONS, refuse
from packlib.features import READ, packed_row, sliced
from packlib.plans.block import Block

COLUMNS = {"input_ids": "int64", "labels": "int64", POSITIONS: "int32", LENGTHS: "int64"}
FEATURES = Features({name: List(Value(kind)) for name, kind in COLUMNS.items()})

Item = tuple[int, dict[str, Any]]  # an example, or a piece of one, with the example's number


class PackedStream(IterableDataset):
    """What `plans.stream` returns: rows of whole examples, from a buffer. See there.

    With the methods of a `datasets.IterableDataset`; `set_epoch` draws other rows. What `map` and the like return is a
    plain IterableDataset, whose state has this one's in it.
    """

    @classmethod
    def of(cls, examples: Iterable[Any], block: Block) -> PackedStream:
        """The stream of `examples`, planned as `block` says."""
        if isinstance(examples, IterableDataset):
            source, distributed = examples._ex_iterable, examples._distributed
        else:
            source, distributed = ExamplesIterable(_Passes(examples), {}), None
        return cls(_Rows(_separate(source), block), info=DatasetInfo(features=FEATURES), distributed=distributed)

    @property
    def rows(self) -> int:
        """Rows that have come so far in this process's pass, and after it: how many there are."""
        return self._own_state()["rows"]

    @property
    def lost_tokens(self) -> int:
        """Tokens that `overflow="truncate"` has cut off so far, counted when a block has been emitted."""
        return self._own_state()["lost_tokens"]

    def _own_state(self) -> dict[str, Any]:
        state = self._state_dict["examples_iterable"]
        while "lost_tokens" not in state:  # inside that of a rank, which takes every so many rows
            state = state["examples_iterable"]
        return state


class _Passes:
    """Numbers the items of an iterable. An iterator is used up by its first pass, which must not pass for an end."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items, self.used = items, False

    def __call__(self) -> Iterator[tuple[int, Any]]:
        if isinstance(self.items, Iterator) and self.used:
            raise ValueError(
                "the examples are an iterator, which an earlier pass has used up; pass what can be iterated anew: a "
                "list, a datasets.IterableDataset, an object whose __iter__ begins again"
            )
        self.used = True
        return enumerate(self.items)


class _Rows(_BaseExamplesIterable):
    """Rows of `ex_iterable`'s examples. The state: the source's at the beginning of the block, and what had waited."""

    features = FEATURES  # rows have them, so that nothing is cast

    def __init__(self, ex_iterable: _BaseExamplesIterable, block: Block) -> None:
        super().__init__()
        self.ex_iterable, self.block = ex_iterable, block

    def _init_state_dict(self) -> dict[str, Any]:
        self.ex_iterable._init_state_dict()
        self._state_dict: dict[str, Any] = {
            "settings": asdict(self.block),
            "block": 0,  # its number; the source's state and the examples read where it begins; what has waited for it
            "source": None,
            "read": 0,
            "held": "[]",
            "emitted": 0,  # rows of this block, and of all
            "rows": 0,
            "lost_tokens": 0,
            "type": type(self).__name__,
        }
        return self._state_dict

    def __iter__(self) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        state: dict[str, Any] = self._state_dict or self._init_state_dict()
        # 1. Begin where the state says: at a block, some of whose rows have been seen.
        if state["rows"]:  # that of a beginning is anyone's: a loader may take it before it tells a worker its number
            self._check(state["settings"])
        state["settings"] = asdict(self.block)
        exact, held = _exact(self.ex_iterable), [(number, feature) for number, feature in json.loads(state["held"])]
        examples, last = self._examples(state, exact), False
        while not last:
            # 2. Fill the buffer, behind what has waited.
            items = held.copy()
            read, cut, last = self._fill(items, examples, state["read"])
            if not items:
                break
            # 3. Emit its rows.
            size = np.array([len(feature["input_ids"]) for _, feature in items])
            plan, waiting = self.block.plan(size, len(held), state["block"], last)
            rows = np.split(plan.example, plan.row_splits[1:-1])
            for number in range(state["emitted"], len(rows)):
                numbers, features = zip(*(items[i] for i in rows[number].tolist()))
                row = packed_row(features, numbers)
                state.update(emitted=number + 1, rows=state["rows"] + 1)
                yield f"{state['block']}_{number}", row
            # 4. The next block begins here.
            held = [items[i] for i in waiting.tolist()]
            state.update(block=state["block"] + 1, read=read, emitted=0, held=_plain(held))
            state.update(
                lost_tokens=state["lost_tokens"] + cut, source=self.ex_iterable.state_dict() if exact else None
            )

    def _check(self, settings: dict[str, Any]) -> None:
        for name, own in asdict(self.block).items():
            if settings[name] != own:
                raise ValueError(f"the state was saved with {name} = {settings[name]!r}; this stream has {own!r}")

    def _examples(self, state: dict[str, Any], exact: bool) -> Iterator[Any]:
        """The source's examples, from where the state's block begins."""
        if exact and state["source"] is not None:
            self.ex_iterable.load_state_dict(state["source"])
        examples = (example for _, example in self.ex_iterable)
        for _ in range(0 if exact else state["read"]):
            next(examples, None)
        return examples

    def _fill(self, items: list[Item], examples: Iterator[Any], read: int) -> tuple[int, int, bool]:
        """Append examples to `items` until the block is full; how many were read by now, tokens lost, whether all."""
        tokens, lost = sum(len(feature["input_ids"]) for _, feature in items), 0
        while not self.block.full(len(items), tokens):
            if (example := next(examples, None)) is None:
                return read, lost, True
            pieces, cut = self._pieces(example, read)
            items += [(read, piece) for piece in pieces]
            tokens += sum(len(piece["input_ids"]) for piece in pieces)
            read, lost = read + 1, lost + cut
        return read, lost, False

    def _pieces(self, example: Any, number: int) -> tuple[list[dict[str, Any]], int]:
        """An example as what the overflow policy leaves of it, and how many tokens are cut off."""
        feature = dict(example) if isinstance(example, Mapping) else {"input_ids": example}
        if feature.get("input_ids") is None or not len(feature["input_ids"]):
            raise ValueError(f"example {number} of the stream has no tokens: {sorted(feature)}")
        if not feature.keys() <= READ:
            given = {name: value for name, value in feature.items() if value is not None}
            refuse(given, f"example {number} of the stream")
            feature = {name: value for name, value in given.items() if name in READ}
        size, most = len(feature["input_ids"]), self.block.max_tokens
        if size <= most:
            return [feature], 0
        if self.block.overflow == "error":
            raise ValueError(
                f"example {number} of the stream has {size} tokens, more than max_tokens = {most}; "
                'pass overflow="split" or "truncate"'
            )
        if self.block.overflow == "truncate":
            return sliced(feature, size, [(0, most)]), size - most
        return sliced(feature, size, [(start, min(start + most, size)) for start in range(0, size, most)]), 0

    @property
    def num_shards(self) -> int:
        # Ranks that part shards would neither have as many rows nor equal work: they are given rows.
        return self.ex_iterable.num_shards if self.block.world_size == 1 else 1

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> _Rows:
        if self.block.world_size > 1:
            return self
        return _Rows(self.ex_iterable.shard_data_sources(num_shards, index, contiguous), self.block)

    def reshard_data_sources(self) -> _Rows:
        return _Rows(self.ex_iterable.reshard_data_sources(), self.block)

    def shuffle_data_sources(self, generator: np.random.Generator) -> _Rows:
        return _Rows(self.ex_iterable.shuffle_data_sources(generator), self.block)

    def shift_rngs(self, value: int) -> _Rows:  # datasets' way to tell epochs and workers
        return _Rows(self.ex_iterable, replace(self.block, seed=self.block.seed + value))


def _exact(source: _BaseExamplesIterable) -> bool:
    """Whether a source resumes at the very example: a shuffle buffer does not keep what it holds."""
    inner = [getattr(source, "ex_iterable", None), *(getattr(source, "ex_iterables", None) or ())]
    return not isinstance(source, BufferShuffledExamplesIterable) and all(_exact(one) for one in inner if one)


def _separate(source: _BaseExamplesIterable) -> _BaseExamplesIterable:
    """A copy that keeps a state of its own: two streams may read one source by turns, to train and to evaluate."""
    source = copy(source)
    if hasattr(source, "ex_iterable"):
        source.ex_iterable = _separate(source.ex_iterable)
    if hasattr(source, "ex_iterables"):
        source.ex_iterables = [_separate(one) for one in source.ex_iterables]
    return source


def _plain(held: list[Item]) -> str:
    """What waits, as JSON: states are copied with every row, and text is not."""
    return json.dumps(
        [[number, {name: np.asarray(values).tolist() for name, values in feature.items()}] for number, feature in held]
    )
