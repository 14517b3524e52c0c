"""A plan's rows out of a data set: the one place where packing touches tokens. No loop over examples.

Rows are given as the arrays of a plan: `row_splits` int64 [rows + 1] into `example`, `start`, `stop` [segments].
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetInfo, Features, load_from_disk

from packlib.atomic import atomic_write
from packlib.columns import BOUNDARIES, CUMULATIVE, IGNORE_INDEX, LENGTHS, LOSS_MASKS, POSITIONS, refusal

PIECE = 2**26  # tokens gathered at once: arrow's list offsets are int32
SHARD = 2**23  # tokens of a file; gathering one takes about 0.3 GB


def lengths_of(dataset: Dataset) -> np.ndarray:
    """Tokens of each example's `input_ids`, integers [examples]. `ValueError` for a table that is packed already."""
    if "input_ids" not in (names := dataset.column_names) or "seq_lengths" in names:
        raise ValueError(f"dataset has columns {names}; expected input_ids, and no seq_lengths (packed already?)")
    lengths = pc.list_value_length(dataset.data.table["input_ids"]).to_numpy()  # no token is read
    return lengths if dataset._indices is None else lengths[dataset._indices.column(0).to_numpy()]


def gather(
    dataset: Dataset,
    row_splits: np.ndarray,
    example: np.ndarray,
    start: np.ndarray,
    stop: np.ndarray,
    *,
    key: str,
    folder: Path | None = None,
) -> Dataset:
    """`Plan.apply`: the rows as a data set, gathered in pieces of about PIECE tokens, or of SHARD if they are written.

    key: names the plan in the fingerprint, by which `datasets` tells data sets apart in its cache.
    """
    source = dataset.with_format("arrow")
    row_tokens = np.add.reduceat(stop.astype(np.int64) - start, row_splits[:-1])
    piece = np.cumsum(row_tokens) // (SHARD if folder else PIECE)
    cuts = [0, *(np.flatnonzero(np.diff(piece)) + 1).tolist(), len(row_tokens)]

    def tables() -> Iterator[pa.Table]:
        for first, last in pairwise(cuts):
            here = slice(row_splits[first], row_splits[last])
            splits = (row_splits[first : last + 1] - row_splits[first]).astype(np.int32)
            yield _gather(source, splits, example[here], start[here], stop[here])

    fingerprint = hashlib.sha256(f"{key}{dataset._fingerprint}".encode()).hexdigest()[:16]
    if folder is None:
        return PackedDataset(pa.concat_tables(tables()), fingerprint=fingerprint)
    _write(tables(), len(cuts) - 1, folder, fingerprint)
    return _packed(load_from_disk(folder))


def _write(tables: Iterator[pa.Table], shards: int, folder: Path, fingerprint: str) -> None:
    """Shards that `datasets.load_from_disk` reads. What was interrupted has no state.json and cannot be loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; expected a new folder for the packed rows")
    names = [f"data-{shard:05d}-of-{shards:05d}.arrow" for shard in range(shards)]
    features = None
    for name, table in zip(names, tables):
        features = features or Features.from_arrow_schema(table.schema)
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
    DatasetInfo(features=features).write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    with atomic_write(folder / "state.json", "w") as file:
        json.dump(state, file)


class PackedDataset(Dataset):
    """A data set of packed rows that keeps its boundaries: `seq_lengths` stays, whatever columns are chosen or removed.

    Trainer removes every column that the model's forward does not name, and `with_format("torch", columns=…)` hides all
    that is not listed; rows without boundaries would train contaminated, without a word. What `map` makes of rows is
    refused where it has other tokens than `seq_lengths` say.
    """

    def set_format(self, type: str | None = None, columns: list[str] | None = None, *args: Any, **kwargs: Any) -> None:
        super().set_format(type, _with_lengths(columns), *args, **kwargs)

    def select_columns(self, column_names: str | list[str], **options: Any) -> Dataset:
        names = [column_names] if isinstance(column_names, str) else column_names
        return super().select_columns(_with_lengths(names), **options)

    def remove_columns(self, column_names: str | list[str], **options: Any) -> Dataset:
        names = [column_names] if isinstance(column_names, str) else column_names
        return super().remove_columns([name for name in names if name != LENGTHS], **options)

    def map(self, *args: Any, remove_columns: str | list[str] | None = None, **options: Any) -> Dataset:
        names = [remove_columns] if isinstance(remove_columns, str) else remove_columns or []
        if options.get("features") is None:  # else somebody says what comes out (filter, flatten_indices)
            names = [name for name in names if name != LENGTHS]
        return _check_cut(_packed(super().map(*args, remove_columns=names, **options)))

    def select(self, *args: Any, **options: Any) -> Dataset:  # what shuffle, sort and train_test_split go through
        return _packed(super().select(*args, **options))


def _packed(dataset: Dataset) -> Dataset:
    if LENGTHS in dataset.column_names:
        dataset.__class__ = PackedDataset
    return dataset


def _check_cut(dataset: Dataset) -> Dataset:
    """The same data set. `ValueError` where a function changed a row's tokens and not where its examples end."""
    table = dataset.data.table
    if {"input_ids", LENGTHS} <= set(table.column_names):
        tokens, segments = (pc.list_value_length(table[name]).to_numpy() for name in ("input_ids", LENGTHS))
        ends, splits = np.cumsum(pc.list_flatten(table[LENGTHS]).to_numpy()), np.cumsum(segments)
        told = np.diff(np.concatenate([[0], ends])[splits], prepend=0)
        if len(row := np.flatnonzero(told != tokens)):
            raise ValueError(
                f"row {row[0]} has {tokens[row[0]]} tokens and seq_lengths of {told[row[0]]}: packed, then mapped "
                "(SFTTrainer cuts rows at max_length; pass max_length=None and padding_free=True)"
            )
    return dataset


def _with_lengths(columns: list[str] | None) -> list[str] | None:
    return columns if columns is None or LENGTHS in columns else [*columns, LENGTHS]


def _gather(
    source: Dataset, row_splits: np.ndarray, example: np.ndarray, start: np.ndarray, stop: np.ndarray
) -> pa.Table:
    """Rows as a table, from a dataset in arrow format. row_splits: int32 [rows + 1]."""
    # 1. Fetch the examples that occur, once each.
    examples, local = np.unique(example, return_inverse=True)
    table = source[examples].combine_chunks()
    # 2. Where each token of the rows lies among theirs.
    size = stop.astype(np.int64) - start
    segment_splits = np.concatenate([[0], np.cumsum(size)])
    lengths = pc.list_value_length(table["input_ids"]).to_numpy()
    shift = (np.cumsum(lengths) - lengths)[local] + start - segment_splits[:-1]
    tokens = pa.array(np.arange(segment_splits[-1]) + np.repeat(shift, size))
    token_splits = segment_splits[row_splits].astype(np.int32)
    # 3. Columns with a value per token are gathered token by token, others segment by segment.
    columns, trained = {}, None
    for name in table.column_names:
        values = table[name].chunk(0)
        if values.null_count == len(values):
            continue
        if reason := refusal(name):
            first = examples[int(np.argmax(values.is_valid().to_numpy(False)))]
            raise ValueError(f"example {first} has {name!r}, {reason}; remove the column if it is of no account")
        if name in BOUNDARIES:
            _refuse_packed(name, values, lengths, examples)
            continue
        aligned = _has_token_values(name, table[name], lengths, examples)
        if aligned:
            values = values.flatten()
        if name == "attention_mask":
            _refuse_zeros(values, lengths, examples)
        elif name in LOSS_MASKS:
            mask = values.take(tokens).to_numpy(False) != 0
            trained = mask if trained is None else trained & mask
        elif aligned:
            columns[name] = _lists(values.take(tokens), token_splits)
        else:
            columns[name] = _lists(values.take(pa.array(local)), row_splits)
    # 4. Labels, with masks where there are none, and without the first one of every segment.
    labels = columns.get("labels", columns["input_ids"]).values.to_numpy(False).astype(np.int64)
    if trained is not None and "labels" not in columns:
        labels[~trained] = IGNORE_INDEX
    labels[segment_splits[:-1]] = IGNORE_INDEX
    columns["labels"] = _lists(pa.array(labels), token_splits)
    # 5. Boundaries, twice: Trainer keeps the arguments of the model's forward, TRL its own column.
    position = np.arange(segment_splits[-1]) - np.repeat(segment_splits[:-1], size)
    columns[POSITIONS] = _lists(pa.array(position.astype(np.int32)), token_splits)
    columns[LENGTHS] = _lists(pa.array(size), row_splits)
    return pa.table(columns)


def _refuse_packed(name: str, column: pa.Array, lengths: np.ndarray, examples: np.ndarray) -> None:
    """`ValueError` unless a column of boundaries says that every example is one segment."""
    found = pc.list_value_length(column).to_numpy(False)
    values = column.flatten().to_numpy(False)
    if name in CUMULATIVE:
        whole = found == 2
        ends = values.reshape(-1, 2)[:, 1] if whole.all() else lengths
        whole &= ends == lengths
    elif np.array_equal(found, lengths):
        starts = np.cumsum(lengths) - lengths
        expected = np.repeat(values[starts], lengths)
        if name == POSITIONS:
            expected = np.arange(len(values)) - np.repeat(starts, lengths)
        whole = np.logical_and.reduceat(values == expected, starts)
    else:
        whole = found == lengths
    if not whole.all():
        example = examples[int(np.argmin(whole))]
        raise ValueError(f"{name} of example {example} is not that of one segment; expected examples, not packed rows")


def _lists(values: pa.Array, splits: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(splits), values)


def _refuse_zeros(mask: pa.Array, lengths: np.ndarray, examples: np.ndarray) -> None:
    if (zeros := np.flatnonzero(mask.to_numpy(False) == 0)).size:
        example = examples[np.cumsum(lengths).searchsorted(zeros[0], side="right")]
        raise ValueError(f"attention_mask of example {example} has zeros; expected examples without padding")


def _has_token_values(name: str, column: pa.ChunkedArray, lengths: np.ndarray, examples: np.ndarray) -> bool:
    """Whether a column has one value per token; `labels` and `attention_mask` must have."""
    found = pc.list_value_length(column).to_numpy() if hasattr(column.type, "value_type") else None
    if name in ("labels", "attention_mask", *LOSS_MASKS):
        if found is None:
            raise ValueError(
                f"{name} is a column of {column.type}; expected lists, one value per token "
                f"(example {examples[0]} has {column[0].as_py()!r})"
            )
        i = int(np.argmax(found != lengths))
        if found[i] != lengths[i]:
            raise ValueError(f"{name} of example {examples[i]} covers {found[i]} tokens; expected {lengths[i]}")
    return found is not None and np.array_equal(found, lengths)
