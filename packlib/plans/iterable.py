"""A stream of packed rows as a `datasets.IterableDataset`, which parts, shuffles, maps and resumes like every other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import DatasetInfo, Features, IterableDataset, List, Value
from datasets.iterable_dataset import BufferShuffledExamplesIterable, ExamplesIterable, _BaseExamplesIterable

from packlib.columns import BOUNDARIES, LENGTHS, LOSS_MASKS, POSITIONS, refuse
from packlib.features import packed_row, sliced
from packlib.plans.stream import Block

COLUMNS = {"input_ids": "int64", "labels": "int64", POSITIONS: "int32", LENGTHS: "int64"}
FEATURES = Features({name: List(Value(kind)) for name, kind in COLUMNS.items()})
_READ = {"input_ids", "labels", "attention_mask", *LOSS_MASKS, *BOUNDARIES}


class PackedStream(IterableDataset):
    """What `plans.stream` returns: rows of whole examples, from a buffer. See there."""

    @classmethod
    def of(cls, examples: Iterable[Any], block: Block) -> PackedStream:
        """The stream of `examples`, planned as `block` says."""
        if isinstance(examples, IterableDataset):
            source, distributed = examples._ex_iterable, examples._distributed
        else:
            source, distributed = ExamplesIterable(_Passes(examples), {}), None
        return cls(_Rows(source, block), info=DatasetInfo(features=FEATURES), distributed=distributed)

    @property
    def rows(self) -> int:
        """Rows that have come so far in this process's pass, and after it: how many there are."""
        return self.state_dict()["examples_iterable"]["rows"]

    @property
    def lost_tokens(self) -> int:
        """Tokens that `overflow="truncate"` has cut off so far, counted when a block has been emitted."""
        return self.state_dict()["examples_iterable"]["lost_tokens"]


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

    def __init__(self, ex_iterable: _BaseExamplesIterable, block: Block) -> None:
        super().__init__()
        self.ex_iterable, self.block = ex_iterable, block

    features = FEATURES  # rows have them, so that nothing is cast

    def _init_state_dict(self) -> dict[str, Any]:
        self.ex_iterable._init_state_dict()
        self._state_dict: dict[str, Any] = {
            "block": 0,  # its number, where its examples begin in the source, and what has waited for it
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
        # 1. Begin where the state says: at a block, whose first rows have been seen.
        exact, source, read, skip = _exact(self.ex_iterable), self.ex_iterable, state["read"], state["emitted"]
        if exact and state["source"] is not None:
            source.load_state_dict(state["source"])
        examples = (example for _, example in source)
        for _ in range(0 if exact else read):
            next(examples, None)
        held, lost, last = (
            [(number, feature) for number, feature in json.loads(state["held"])],
            state["lost_tokens"],
            False,
        )
        while not last:
            # 2. Fill the buffer, behind what has waited.
            items = list(held)
            tokens = sum(len(feature["input_ids"]) for _, feature in items)
            while not self.block.full(len(items), tokens):
                if (example := next(examples, None)) is None:
                    last = True
                    break
                pieces, cut = self._pieces(example, read)
                items += [(read, piece) for piece in pieces]
                tokens += sum(len(piece["input_ids"]) for piece in pieces)
                read, lost = read + 1, lost + cut
            if not items:
                break
            # 3. Emit its rows.
            size = np.array([len(feature["input_ids"]) for _, feature in items])
            plan, waiting = self.block.plan(size, len(held), state["block"], last)
            for number, row in enumerate(plan):
                if number >= skip:
                    names, features = zip(*(items[segment.example] for segment in row))
                    made = packed_row(features, names)
                    state["emitted"], state["rows"] = number + 1, state["rows"] + 1
                    yield f"{state['block']}_{number}", made
            # 4. The next block begins here.
            held, skip = [items[i] for i in waiting.tolist()], 0
            state.update(block=state["block"] + 1, emitted=0, read=read, lost_tokens=lost, held=_plain(held))
            state["source"] = source.state_dict() if exact else None
        state["lost_tokens"] = lost

    def _pieces(self, example: Any, number: int) -> tuple[list[dict[str, Any]], int]:
        """An example as what the overflow policy leaves of it, and how many tokens are cut off."""
        if not isinstance(example, Mapping):
            example = {"input_ids": example}
        if example.get("input_ids") is None or not len(example["input_ids"]):
            raise ValueError(f"example {number} of the stream has no tokens: {sorted(example)}")
        feature = dict(example)
        if not feature.keys() <= _READ:
            given = {name: value for name, value in example.items() if value is not None}
            refuse(given, f"example {number}")
            feature = {name: value for name, value in given.items() if name in _READ}
        size, most = len(feature["input_ids"]), self.block.max_tokens
        if size <= most:
            return [feature], 0
        if self.block.overflow == "error":
            raise ValueError(
                f"example {number} of the stream has {size} tokens, more than max_tokens = {most}; "
                'pass overflow="split" or "truncate"'
            )
        if self.block.overflow == "truncate":
            return [sliced(feature, size, 0, most)], size - most
        return [sliced(feature, size, start, min(start + most, size)) for start in range(0, size, most)], 0

    @property
    def num_shards(self) -> int:
        return self.ex_iterable.num_shards

    def shuffle_data_sources(self, generator: np.random.Generator) -> _Rows:
        block = replace(self.block, seed=(*self.block.seed, int(generator.integers(2**31))))
        return _Rows(self.ex_iterable.shuffle_data_sources(generator), block)

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> _Rows:
        return _Rows(self.ex_iterable.shard_data_sources(num_shards, index, contiguous), self.block)

    def reshard_data_sources(self) -> _Rows:
        return _Rows(self.ex_iterable.reshard_data_sources(), self.block)


def _exact(source: _BaseExamplesIterable) -> bool:
    """Whether a source resumes at the very example: a shuffle buffer does not keep what it holds."""
    inner = [getattr(source, "ex_iterable", None), *(getattr(source, "ex_iterables", None) or ())]
    return not isinstance(source, BufferShuffledExamplesIterable) and all(
        _exact(one) for one in inner if one is not None
    )


def _plain(held: list[tuple[int, dict[str, Any]]]) -> str:
    """What waits, as JSON: states are copied with every row, and text is not."""
    return json.dumps(
        [[number, {name: np.asarray(values).tolist() for name, values in feature.items()}] for number, feature in held]
    )
