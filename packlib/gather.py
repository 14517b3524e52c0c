"""Rows of a plan out of an arrow table: the one place where packing touches tokens. No loop over examples."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from packlib.collators import IGNORE_INDEX

if TYPE_CHECKING:
    from packlib.plans import Plan

PIECE = 2**26  # tokens gathered at once: arrow's list offsets are int32


def gather_rows(plan: Plan, dataset: Dataset) -> Dataset:
    """`Plan.apply`, in pieces of about PIECE tokens."""
    if "input_ids" not in (names := dataset.column_names) or "seq_lengths" in names:
        raise ValueError(f"dataset has columns {names}; expected input_ids, and no seq_lengths (packed already?)")
    source = dataset.with_format("arrow")
    plan.check_lengths(pc.list_value_length(source.select_columns("input_ids")[:]["input_ids"]).to_numpy())
    piece = np.cumsum(plan.row_lengths) // PIECE
    cuts = [0, *(np.flatnonzero(np.diff(piece)) + 1).tolist(), len(plan)]
    tables = [_gather(plan, source, first, last) for first, last in pairwise(cuts)]
    return Dataset(pa.concat_tables(tables), fingerprint=hashlib.sha256(f"{plan.sha256}{dataset._fingerprint}".encode()).hexdigest()[:16])


def _gather(plan: Plan, source: Dataset, first: int, last: int) -> pa.Table:
    """Rows `first` to `last` of the plan as a table, from a dataset in arrow format."""

    def lists(values: pa.Array, splits: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(splits), values)

    here = slice(plan.row_splits[first], plan.row_splits[last])
    row_splits = (plan.row_splits[first : last + 1] - plan.row_splits[first]).astype(np.int32)
    examples, local = np.unique(plan.example[here], return_inverse=True)
    size = plan.stop[here].astype(np.int64) - plan.start[here]
    table = source[examples].combine_chunks()
    lengths, segment_splits = pc.list_value_length(table["input_ids"]).to_numpy(), np.concatenate([[0], np.cumsum(size)])
    shift = (np.cumsum(lengths) - lengths)[local] + plan.start[here] - segment_splits[:-1]
    tokens = pa.array(np.arange(segment_splits[-1]) + np.repeat(shift, size))
    token_splits = segment_splits[row_splits].astype(np.int32)
    columns = {}
    for name in table.column_names:
        values, aligned = table[name].chunk(0), _has_token_values(name, table[name], lengths, examples)
        values = values.flatten() if aligned else values
        if name == "attention_mask" and (zeros := np.flatnonzero(values.to_numpy(False) == 0)).size:
            example = examples[np.cumsum(lengths).searchsorted(zeros[0], side="right")]
            raise ValueError(f"attention_mask of example {example} has zeros; expected examples without padding")
        if name != "attention_mask":
            columns[name] = lists(values.take(tokens), token_splits) if aligned else lists(values.take(pa.array(local)), row_splits)
    labels = columns.get("labels", columns["input_ids"]).values.to_numpy(False).astype(np.int64)
    labels[segment_splits[:-1]] = IGNORE_INDEX
    columns |= {"labels": lists(pa.array(labels), token_splits), "seq_lengths": lists(pa.array(size), row_splits)}
    return pa.table(columns)


def _has_token_values(name: str, column: pa.ChunkedArray, lengths: np.ndarray, examples: np.ndarray) -> bool:
    """Whether a column has one value per token; `labels` and `attention_mask` must have."""
    found = pc.list_value_length(column).to_numpy() if hasattr(column.type, "value_type") else None
    if name in ("labels", "attention_mask"):
        i = int(np.argmax(found != lengths))
        if found[i] != lengths[i]:
            raise ValueError(f"{name} of example {examples[i]} covers {found[i]} tokens; expected {lengths[i]}")
    return found is not None and np.array_equal(found, lengths)
