"""A plan: which pieces of which examples form each row. A pure function of lengths, capacity and seed.

Four arrays in CSR form (`row_splits`, `example`, `start`, `stop`), so that 10^8 examples are 1.2 GB of arrays and not
objects; no token is touched until `apply`. A row is what the planner emits: one packed row of at most `max_tokens`, or
one mini-batch of whole examples.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from packlib.atomic import atomic_write
from packlib.columns import SEGMENT
from packlib.plans.lengths import (
    Layout,
    Lengths,
    check_layout,
    check_lengths,
    check_loss_tokens,
    hash_lengths,
    positive,
)
from packlib.plans.packing import select_rows

if TYPE_CHECKING:
    from datasets import Dataset

    from packlib.plans.view import PackedView

Cost = Literal["quadratic", "linear"]


class Segment(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of example number `example`."""

    example: int
    start: int
    stop: int


@dataclass(frozen=True)
class PlanReport:
    """What a plan costs and keeps, in tokens and slots; `to_dict` is what a record holds.

    fill = real / slots; waste = slots / real; capacity_fill = real / (rows · max_tokens), None without a capacity.
    broken_examples are cut or truncated; lost_tokens are in no row; attention_cost is Σ n² over segments and
    attention_spread the dearest row's over the mean row's. examples_per_row: p5, p50, p95.
    """

    algorithm: str
    layout: str
    examples: int
    rows: int
    slots: int
    real_tokens: int
    loss_tokens: int
    lost_tokens: int
    fill: float
    waste: float
    capacity_fill: float | None
    broken_examples: int
    examples_per_row: dict[str, float]
    attention_cost: int
    attention_spread: float
    sha256: str

    def to_dict(self) -> dict:
        """Plain JSON types, as a record keeps them."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Plan:
    """Rows of segments. Arrays are read-only.

    Args:
        row_splits: int64 [rows + 1]; row i is the segments `row_splits[i]` to `row_splits[i + 1]`.
        example, start, stop: integers [segments]: tokens `start:stop` of example number `example`.
        max_tokens: capacity of a row in tokens, None where rows are mini-batches.
        algorithm: the planner's call, for records.
        lengths_sha256: hash of the lengths that were planned; `apply` and `report` refuse others.
        data: the data set that the plan belongs to, as its owner calls it (`save`); None where nobody said.

    >>> from packlib.plans import fixed_length
    >>> plan = fixed_length([3, 4], max_tokens=5)
    >>> len(plan), plan[0], plan.row_lengths.tolist()
    (2, [Segment(example=0, start=0, stop=3), Segment(example=1, start=0, stop=2)], [5, 2])
    """

    row_splits: np.ndarray
    example: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    max_tokens: int | None
    algorithm: str
    lengths_sha256: str
    data: str | None = None

    def __post_init__(self) -> None:
        splits, counts = self.row_splits, {len(self.example), len(self.start), len(self.stop)}
        if len(counts) > 1 or splits[0] or splits[-1] not in counts or (np.diff(splits) < 1).any():
            raise ValueError(f"row_splits must rise from 0 to {sorted(counts)}, the segments, without an empty row")
        for array in self._arrays.values():
            array.setflags(write=False)

    def __len__(self) -> int:
        return len(self.row_splits) - 1

    def __getitem__(self, row: int) -> list[Segment]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of a plan with {len(self)} rows")
        here = slice(*self.row_splits[row % len(self) :][:2])
        return list(map(Segment, self.example[here].tolist(), self.start[here].tolist(), self.stop[here].tolist()))

    def __iter__(self) -> Iterator[list[Segment]]:
        return map(self.__getitem__, range(len(self)))

    @property
    def _arrays(self) -> dict[str, np.ndarray]:
        return {"row_splits": self.row_splits, "example": self.example, "start": self.start, "stop": self.stop}

    @property
    def row_lengths(self) -> np.ndarray:
        """Real tokens per row, int64 [rows]."""
        return self.row_costs("linear")

    @property
    def row_examples(self) -> np.ndarray:
        """Segments per row, int64 [rows]."""
        return np.diff(self.row_splits)

    def row_costs(self, cost: Cost = "quadratic") -> np.ndarray:
        """Σ n² ("quadratic", attention) or Σ n ("linear") over the segments of each row, int64 [rows]."""
        if cost not in ("quadratic", "linear"):
            raise ValueError(f"cost = {cost!r}; expected 'quadratic' or 'linear'")
        size = (self.stop - self.start).astype(np.int64)
        return np.add.reduceat(size * size if cost == "quadratic" else size, self.row_splits[:-1])

    @cached_property
    def sha256(self) -> str:
        """Hash of rows, capacity, algorithm and planned lengths; the same on every platform."""
        digest = hashlib.sha256(json.dumps([self.max_tokens, self.algorithm, self.lengths_sha256]).encode())
        for array in self._arrays.values():
            for begin in range(0, len(array), 2**22):
                digest.update(array[begin : begin + 2**22].astype("<i8").data)
        return digest.hexdigest()

    def take(self, rows: Sequence[int] | np.ndarray, note: str = "take") -> Plan:
        """The plan of these rows (integers [k] of 0 to len - 1), in this order; a report counts the others as lost."""
        index, row_splits = select_rows(self.row_splits, np.asarray(rows))
        columns = {"example": self.example[index], "start": self.start[index], "stop": self.stop[index]}
        return replace(self, row_splits=row_splits, algorithm=f"{self.algorithm}.{note}", **columns)

    def shuffle(self, seed: int) -> Plan:
        """The same rows in an order drawn from `seed`."""
        return self.take(np.random.default_rng(seed).permutation(len(self)), f"shuffle(seed={seed})")

    def report(self, lengths: Lengths, layout: Layout = "flat", loss_tokens: Lengths | None = None) -> PlanReport:
        """Count slots, real, loss and lost tokens of this plan in a layout.

        Args:
            lengths: the lengths that were planned [examples]; others are refused.
            layout: `"flat"`: slots = tokens of the rows; `"padded"`: Σ rows (segments × longest segment).
            loss_tokens: labels per example that are not -100, integers [examples], taken to be its last ones (prompt,
                then response). Default: all but the first. A segment's first token never has a label.

        >>> from packlib.plans import shuffled_batches
        >>> report = shuffled_batches([3, 1], batch_size=2).report([3, 1], layout="padded")
        >>> report.slots, report.real_tokens, report.loss_tokens, report.waste
        (6, 4, 2, 1.5)
        """
        lengths, rows = self.check_lengths(lengths), len(self)
        check_layout(layout)
        size, costs = (self.stop - self.start).astype(np.int64), self.row_costs()
        real = slots = int(size.sum())
        if layout == "padded":
            slots = int((np.maximum.reduceat(size, self.row_splits[:-1]) * self.row_examples).sum())
        seen = np.zeros(len(lengths), dtype=bool)
        seen[self.example] = True
        whole = int(((self.start == 0) & (self.stop == lengths[self.example])).sum())
        unlabelled = 1 if loss_tokens is None else (lengths - check_loss_tokens(loss_tokens, lengths))[self.example]
        return PlanReport(
            algorithm=self.algorithm,
            layout=layout,
            examples=int(seen.sum()),
            rows=rows,
            slots=slots,
            real_tokens=real,
            loss_tokens=int(np.maximum(self.stop - np.maximum(self.start + 1, unlabelled), 0).sum()),
            lost_tokens=int(lengths.sum(dtype=np.int64)) - real,
            fill=real / slots,
            waste=slots / real,
            capacity_fill=real / (rows * self.max_tokens) if self.max_tokens else None,
            broken_examples=int(seen.sum()) - whole,
            examples_per_row=dict(zip(("p5", "p50", "p95"), np.percentile(self.row_examples, (5, 50, 95)).tolist())),
            attention_cost=int(costs.sum()),
            attention_spread=float(costs.max() / costs.mean()),
            sha256=self.sha256,
        )

    def balance(self, world_size: int, cost: Cost = "quadratic", seed: int = 0) -> Plan:
        """Interleave rows so that rank r takes rows r, r + world_size, …: as many for each rank, even costs in a step.

        Rows of similar cost share a step, which makes the sum of the dearest ranks' costs as small as it can be; the
        order of steps, and of ranks in a step, is drawn from `seed`. Where rows do not divide, rows with several
        examples are parted between examples: nothing is lost or repeated. O(rows log rows).

        >>> from packlib.plans import best_fit_decreasing
        >>> plan = best_fit_decreasing([4, 4, 1, 1, 1, 1], max_tokens=4, overflow="error").balance(world_size=2)
        >>> plan.row_costs().reshape(-1, 2).tolist()
        [[2, 2], [16, 16]]
        """
        splits = self.row_splits
        for _ in range(-len(self) % positive("world_size", world_size)):
            counts = np.diff(splits)
            row = int(counts.argmax())
            if counts[row] < 2:
                raise ValueError(
                    f"{len(self)} rows do not divide by world_size = {world_size}; none has two examples to part"
                )
            splits = np.insert(splits, row + 1, splits[row] + counts[row] // 2)
        plan, rng = replace(self, row_splits=splits), np.random.default_rng(seed)
        steps = rng.permuted(np.argsort(plan.row_costs(cost), kind="stable").reshape(-1, world_size), axis=1)
        return plan.take(
            rng.permutation(steps).ravel(), f"balance(world_size={world_size}, cost={cost!r}, seed={seed})"
        )

    def apply(self, dataset: Dataset, folder: str | os.PathLike | None = None) -> Dataset:
        """The packed rows as a `datasets.Dataset` for `FlatteningCollator`, or TRL with `padding_free=True`. O(tokens).

        Other collators drop the boundaries, TRL's own without `padding_free` too: examples of a row then see each
        other, without a word. What SFTTrainer would cut at its `max_length`, 1,024 by default, is an error.

        With `folder`, a new one, rows are written there in shards while they are made, and read from there: memory
        holds one shard. `datasets.load_from_disk` opens the folder again.

        Columns: `input_ids`; `labels` int64, -100 on every segment's first token (from `input_ids` if missing, less
        what `completion_mask`, `assistant_masks` or `loss_mask` leave out); the boundaries twice, `position_ids`
        and `seq_lengths`; any column aligned with the tokens, concatenated; any other as a list with one value per
        segment. `attention_mask` must be all ones and is left out. `ValueError` for other data than was planned, for
        labels or masks that do not fit, rows that are packed already, and columns that change the result and cannot be
        honoured (other modalities, weights, classes): named by example.
        """
        from packlib.plans import rows  # datasets and pyarrow are needed here alone

        self.check_lengths(rows.lengths_of(dataset))
        return rows.gather(dataset, **self._arrays, key=self.sha256, folder=None if folder is None else Path(folder))

    def view(
        self, dataset: Dataset | Sequence[Any], *, columns: Sequence[str] | None = None, lengths: Lengths | None = None
    ) -> PackedView:
        """The packed rows as a map-style data set that copies nothing: a row is gathered when it is asked for.

        A `datasets.Dataset` with the rows of `apply`, as numpy arrays; it travels to loader workers. Where a corpus is
        mapped from files, memory is that of the plan, 12 bytes a segment, whatever the tokens. A row is O(its tokens).

        Rows come in the plan's order; Trainer draws its own unless `train_sampling_strategy="sequential"`. Equal work
        (`balance`) holds for ranks that take rows r, r + world_size, …, as accelerate and torch's DistributedSampler
        deal them; `split_dataset_by_node` deals stretches. SFTTrainer takes a view with
        `dataset_kwargs={"skip_prepare_dataset": True}`.

        Args:
            dataset: a `datasets.Dataset` with `input_ids`; or anything with `len` and `[i]` whose items are integer
                arrays [n], or mappings of columns with `input_ids`.
            columns: those wanted, of `apply`'s; `seq_lengths` is always there. Default: all.
            lengths: those that were planned, for an indexable where asking every item takes long; each example is held
                against the plan when it is read.

        `ValueError` as in `apply`, for columns and values when a row is asked for.
        """
        from packlib.plans import view  # datasets and pyarrow are needed here alone

        return view.view(self, dataset, None if lengths is None else self.check_lengths(lengths), columns)

    def save(self, path: str | os.PathLike, data: str | None = None) -> Path:
        """Write an npz with a hash, atomically; returns the path. Ranks and machines load the one file.

        data: names the data set, and its version, for `load` to compare: a Hub name and revision, a fingerprint.
        """
        path = Path(path)
        meta = {name: getattr(self, name) for name in ("max_tokens", "algorithm", "lengths_sha256", "sha256")}
        meta["data"] = self.data if data is None else data
        with atomic_write(path, "wb") as file:
            np.savez(file, allow_pickle=False, meta=np.array(json.dumps(meta)), **self._arrays)
        return path

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        lengths: Lengths | None = None,
        max_tokens: int | None = None,
        data: str | None = None,
    ) -> Plan:
        """Read a plan back. `ValueError` for a changed file, and for one made for other `lengths`, `max_tokens` or
        `data` (where given)."""
        with np.load(path, allow_pickle=False) as file:
            meta = json.loads(str(file["meta"]))
            sha256 = meta.pop("sha256")
            plan = cls(**{name: file[name] for name in ("row_splits", *SEGMENT)}, **meta)
        if plan.sha256 != sha256:
            raise ValueError(f"{path} was changed: its plan has hash {plan.sha256[:12]}, saved was {sha256[:12]}")
        for name, expected in {"max_tokens": max_tokens, "data": data}.items():
            if expected is not None and expected != (found := getattr(plan, name)):
                raise ValueError(f"{path} was planned for {name} = {found!r}; expected {expected!r}")
        if lengths is not None:
            plan.check_lengths(lengths)
        return plan

    def check_lengths(self, lengths: Lengths) -> np.ndarray:
        """`lengths` as int32 [examples]; `ValueError` if they are not those that were planned."""
        lengths = check_lengths(lengths)
        if (actual := hash_lengths(lengths)) != self.lengths_sha256:
            expected = f"expected those that were planned (hash {self.lengths_sha256[:12]})"
            raise ValueError(f"lengths of {len(lengths)} examples have hash {actual[:12]}; {expected}")
        return lengths
