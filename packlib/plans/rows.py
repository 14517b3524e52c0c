"""A plan's rows out of a data set: the one place where packing touches tokens. No loop over examples.

Rows are given as the arrays of a plan: `row_splits` int64 [rows + 1] into `example`, `start`, `stop` [segments].
"""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from packlib.collators import IGNORE_INDEX

PIECE = 2**26  # tokens gathered at once: arrow's list offsets are int32


def lengths_of(dataset: Dataset) -> np.ndarray:
    """Tokens of each example's `input_ids`, integers [examples]. `ValueError` for a table that is packed already."""
    if "input_ids" not in (names := dataset.column_names) or "seq_lengths" in names:
        raise ValueError(f"dataset has columns {names}; expected input_ids, and no seq_lengths (packed already?)")
    column = dataset.with_format("arrow").select_columns("input_ids")[:]["input_ids"]
    return pc.list_value_length(column).to_numpy()


def gather(
    dataset: Dataset, row_splits: np.ndarray, example: np.ndarray, start: np.ndarray, stop: np.ndarray, *, key: str
) -> Dataset:
    """`Plan.apply`: the rows as a data set, gathered in pieces of about PIECE tokens. key: names the plan in its cache."""
    source = dataset.with_format("arrow")
    row_tokens = np.add.reduceat(stop.astype(np.int64) - start, row_splits[:-1])
    piece = np.cumsum(row_tokens) // PIECE
    cuts = [0, *(np.flatnonzero(np.diff(piece)) + 1).tolist(), len(row_tokens)]
    tables = []
    for first, last in pairwise(cuts):
        here = slice(row_splits[first], row_splits[last])
        splits = (row_splits[first : last + 1] - row_splits[first]).astype(np.int32)
        tables.append(_gather(source, splits, example[here], start[here], stop[here]))
    fingerprint = hashlib.sha256(f"{key}{dataset._fingerprint}".encode()).hexdigest()[:16]
    return Dataset(pa.concat_tables(tables), fingerprint=fingerprint)


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
    columns = {}
    for name in table.column_names:
        values = table[name].chunk(0)
        aligned = _has_token_values(name, table[name], lengths, examples)
        if aligned:
            values = values.flatten()
        if name == "attention_mask":
            _refuse_zeros(values, lengths, examples)
        elif aligned:
            columns[name] = _lists(values.take(tokens), token_splits)
        else:
            columns[name] = _lists(values.take(pa.array(local)), row_splits)
    # 4. The first label of every segment goes.
    labels = columns.get("labels", columns["input_ids"]).values.to_numpy(False).astype(np.int64)
    labels[segment_splits[:-1]] = IGNORE_INDEX
    columns["labels"] = _lists(pa.array(labels), token_splits)
    columns["seq_lengths"] = _lists(pa.array(size), row_splits)
    return pa.table(columns)


def _lists(values: pa.Array, splits: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(splits), values)


def _refuse_zeros(mask: pa.Array, lengths: np.ndarray, examples: np.ndarray) -> None:
    if (zeros := np.flatnonzero(mask.to_numpy(False) == 0)).size:
        example = examples[np.cumsum(lengths).searchsorted(zeros[0], side="right")]
        raise ValueError(f"attention_mask of example {example} has zeros; expected examples without padding")


def _has_token_values(name: str, column: pa.ChunkedArray, lengths: np.ndarray, examples: np.ndarray) -> bool:
    """Whether a column has one value per token; `labels` and `attention_mask` must have."""
    found = pc.list_value_length(column).to_numpy() if hasattr(column.type, "value_type") else None
    if name in ("labels", "attention_mask"):
        i = int(np.argmax(found != lengths))
        if found[i] != lengths[i]:
            raise ValueError(f"{name} of example {examples[i]} covers {found[i]} tokens; expected {lengths[i]}")
    return found is not None and np.array_equal(found, lengths)
