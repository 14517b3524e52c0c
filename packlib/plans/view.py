"""A plan's rows as a data set that copies nothing: a row is gathered when it is asked for.

Examples are read where they lie: arrow memory, mapped from a file or not, or anything with `[i]` and `len`. So a corpus
may be larger than memory, and workers and ranks share the pages of one file.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset

from packlib.columns import LENGTHS, POSITIONS, SEGMENT, refuse
from packlib.features import READ, packed_row, sliced, token_values
from packlib.plans.rows import lengths_of

if TYPE_CHECKING:
    from packlib.plans.plan import Plan


class ArrowExamples:
    """Examples of a `datasets.Dataset` as dicts, lists of numbers as numpy arrays that share arrow's memory."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._open()

    def _open(self) -> None:
        table, indices = self.dataset.data.table, self.dataset._indices
        self.where = None if indices is None else indices.column(0).to_numpy()
        self.columns = {
            name: _ArrowColumn(table[name]) for name in table.column_names if table[name].null_count < len(table)
        }

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, example: Any) -> dict[str, Any]:
        row = example if self.where is None else self.where[example]
        return {name: column[row] for name, column in self.columns.items()}

    def aligned(self, name: str) -> bool:
        """Whether a column has one value for each token of every example."""
        lengths, tokens = (self.columns[column].lengths() for column in (name, "input_ids"))
        return lengths is not None and tokens is not None and np.array_equal(lengths, tokens)

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset": self.dataset}  # a mapped file travels to a worker as its path

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.dataset = state["dataset"]
        self._open()


class _ArrowColumn:
    """Random access to a chunked column; arrow's own takes a hundred times as long for one value."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.column = column
        self.first = np.cumsum([0, *map(len, column.chunks)]).tolist()
        lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        self.numbers = lists and pa.types.is_primitive(column.type.value_type)
        self.opened: dict[int, tuple[pa.Array, bool, np.ndarray | None, Any]] = {}

    def __getitem__(self, row: int) -> Any:
        at = bisect_right(self.first, row) - 1
        if at not in self.opened:
            self.opened[at] = self._open(self.column.chunk(at))
        (chunk, nulls, offsets, values), row = self.opened[at], int(row) - self.first[at]
        if offsets is None or (nulls and not chunk[row].is_valid):
            return chunk[row].as_py()
        part = values[offsets[row] : offsets[row + 1]]
        return part if isinstance(part, np.ndarray) else part.to_numpy(zero_copy_only=False)

    def _open(self, chunk: pa.Array) -> tuple[pa.Array, bool, np.ndarray | None, Any]:
        """A chunk, whether some of it is null, and where its lists lie; bits and nulls stay arrow's, who copies."""
        if not self.numbers:
            return chunk, False, None, None
        values = chunk.values
        if values.null_count == 0 and not pa.types.is_boolean(values.type):
            values = values.to_numpy()
        return chunk, chunk.null_count > 0, chunk.offsets.to_numpy(), values

    def lengths(self) -> np.ndarray | None:
        if not hasattr(self.column.type, "value_type"):
            return None
        return pc.list_value_length(self.column).to_numpy()


Indexable = ArrowExamples | Sequence[Any]


class PackedView(Dataset):
    """Packed rows by number: what `Plan.apply` makes a table of, row by row, as numpy arrays or tensors.

    The table behind it is the plan's, three integers a segment; so `select`, `shuffle`, `shard` and `train_test_split`
    work as on every `datasets.Dataset` and touch no token. `set_format` and `with_format` choose columns and "numpy"
    or "torch"; the boundaries, `seq_lengths`, always stay. What would rewrite or export rows (`map`, `filter`,
    `to_parquet`) is an error: `Plan.apply` makes a table of them. A row takes as long as reading its examples and
    concatenating their tokens.
    """

    _examples: Indexable
    _aligned: frozenset[str]  # columns with a value per token that `packed_row` does not know
    _columns: tuple[str, ...]
    _shown: tuple[str, ...] | None = None  # of the columns, as set_format chose
    _tensors: bool = False

    @classmethod
    def of(
        cls, table: pa.Table, examples: Indexable, columns: tuple[str, ...], aligned: frozenset[str], key: str
    ) -> PackedView:
        """table: lists `example`, `start`, `stop`, one a row. columns: what a row has. key: names the plan."""
        view = cls(table, fingerprint=key[:16])
        view._examples, view._columns, view._aligned = examples, columns, aligned
        return view

    def _like(self, dataset: Dataset) -> PackedView:
        """`dataset`, a selection of this table's rows, as a view."""
        dataset.__class__ = PackedView
        for name in ("_examples", "_aligned", "_columns", "_shown", "_tensors"):
            setattr(dataset, name, getattr(self, name))
        return cast("PackedView", dataset)

    def _chosen(self, columns: Sequence[str]) -> tuple[str, ...]:
        if unknown := [name for name in columns if name not in self._columns]:
            raise ValueError(f"columns {unknown} are not in the view; it has {list(self._columns)}")
        return tuple(columns) if LENGTHS in columns else (*columns, LENGTHS)

    def __repr__(self) -> str:
        return f"PackedView({{\n    columns: {self.column_names},\n    num_rows: {len(self)}\n}})"

    @property
    def column_names(self) -> list[str]:
        return list(self._columns)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return [row[key] for row in self]
        if isinstance(key, int | np.integer):
            return self._row(self._getitem(int(key)))
        rows = self.__getitems__(list(range(*key.indices(len(self)))) if isinstance(key, slice) else list(key))
        return {name: [row[name] for row in rows] for name in self._shown or self._columns}

    def __getitems__(self, keys: list) -> list:
        segments = self._getitem([int(key) for key in keys])
        return [self._row(dict(zip(SEGMENT, row))) for row in zip(*(segments[name] for name in SEGMENT))]

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(len(self)))

    def _row(self, segments: Mapping[str, list[int]]) -> dict[str, Any]:
        examples = [self._examples[i] for i in segments["example"]]
        if not isinstance(examples[0], Mapping):
            examples = [{"input_ids": np.asarray(ids)} for ids in examples]
        cuts = list(zip(segments["start"], segments["stop"]))
        sizes = [len(example["input_ids"]) for example in examples]
        for number, size, (_, stop) in zip(segments["example"], sizes, cuts):
            if stop > size:
                raise ValueError(f"example {number} has {size} tokens; the plan takes {stop}: planned for other data?")
        features = [
            example if cut == (0, size) else sliced(example, size, [cut])[0]
            for example, size, cut in zip(examples, sizes, cuts)
        ]
        row: dict[str, Any] = packed_row(features, segments["example"])
        shown = self._shown or self._columns
        for name in shown:
            if name not in row:
                values = [feature[name] for feature in features]
                row[name] = np.concatenate(values) if name in self._aligned else values
        if self._tensors:
            row = {
                name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in row.items()
            }
        return {name: row[name] for name in shown}

    def set_format(self, type: str | None = None, columns: list[str] | None = None, *args: Any, **kwargs: Any) -> None:
        if type not in (None, "numpy", "torch") or args or kwargs:
            raise ValueError(f"format {type!r} of a view; expected 'numpy' (as with None) or 'torch', and columns")
        self._shown = self._chosen(columns) if columns else None
        self._tensors = type == "torch"

    def with_format(
        self, type: str | None = None, columns: list[str] | None = None, *args: Any, **kwargs: Any
    ) -> PackedView:
        view = copy.copy(self)
        view.set_format(type, columns, *args, **kwargs)
        return view

    def select_columns(self, column_names: str | list[str], **options: Any) -> PackedView:
        names = [column_names] if isinstance(column_names, str) else column_names
        view = copy.copy(self)
        view._columns, view._shown = self._chosen(names), None
        return view

    def remove_columns(self, column_names: str | list[str], **options: Any) -> PackedView:
        names = [column_names] if isinstance(column_names, str) else column_names
        return self.select_columns([name for name in self._columns if name not in names])

    def select(self, *args: Any, **options: Any) -> PackedView:  # what shuffle, shard and train_test_split go through
        return self._like(super().select(*args, **options))

    def map(self, *args: Any, **options: Any) -> Any:
        raise TypeError(
            "a view makes its rows when they are asked for; Plan.apply makes a table that can be mapped, filtered, "
            "sorted and written (SFTTrainer maps, too, unless dataset_kwargs = {'skip_prepare_dataset': True})"
        )

    filter = sort = batch = repeat = unique = flatten = flatten_indices = iter = formatted_as = map
    add_column = add_item = rename_column = rename_columns = set_transform = with_transform = map
    cast = cast_column = class_encode_column = align_labels_with_mapping = save_to_disk = push_to_hub = map
    to_csv = to_dict = to_iterable_dataset = to_json = to_list = to_pandas = to_parquet = to_polars = map
    to_sql = to_tf_dataset = map


def view(
    plan: Plan, source: Dataset | Sequence[Any], lengths: np.ndarray | None, columns: Sequence[str] | None
) -> PackedView:
    """`Plan.view`. lengths: those of the examples, where it would take long to ask each."""
    # 1. Whether these are the examples that were planned.
    if isinstance(source, Dataset):
        plan.check_lengths(lengths_of(source))
        examples: Indexable = ArrowExamples(source)
    else:
        examples = source
        if lengths is None:
            ids = (item["input_ids"] if isinstance(item, Mapping) else item for item in examples)
            plan.check_lengths(np.fromiter((len(tokens) for tokens in ids), np.int64, len(examples)))
        elif len(lengths) != len(examples):
            raise ValueError(f"{len(lengths)} lengths for {len(examples)} examples")
    # 2. Columns: what makes a row, and further ones, with a value for each token or for each example.
    if isinstance(examples, ArrowExamples):
        names = list(examples.columns)
        further = [name for name in names if name not in READ]
        aligned = frozenset(filter(examples.aligned, further))
    else:
        first = examples[0] if isinstance(examples[0], Mapping) else {"input_ids": examples[0]}
        names = list(first)
        further = [name for name in names if name not in READ]
        aligned = frozenset(name for name in further if token_values(name, first))
    refuse(names, "the data set")
    # 3. The plan, as a table.
    splits = pa.array(plan.row_splits)
    table = pa.table({name: pa.LargeListArray.from_arrays(splits, pa.array(getattr(plan, name))) for name in SEGMENT})
    kept = [name for name in names if name in ("input_ids", "labels", *further)]
    columns_of_rows = tuple(dict.fromkeys((*kept, "labels", POSITIONS, LENGTHS)))  # in the order of the table
    made = PackedView.of(table, examples, columns_of_rows, aligned, plan.sha256)
    return made if columns is None else made.select_columns(list(columns))
