"""Rows of a plan -> one model batch. The only module that knows Hugging Face's key names.

`FlatteningCollator` lays rows end to end, [1, T], with position ids that restart and boundaries as `cu_seqlens`: no slot is spent on
padding and no attention mask exists. `PaddingCollator` lays every example on a line of its own, [B, T], with a mask.
Both compute everything on the host, in numpy, with a fixed number of array operations for any number of tokens: guessing the boundaries
later, from position ids on the device, costs one synchronisation in every layer.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

IGNORE_INDEX = -100
Feature = Mapping[str, Any]


@dataclass(frozen=True)
class FlatteningCollator:
    """Concatenate features into one [1, T] batch whose segments do not see each other (arXiv 2407.09105, §3.4).

    Args:
        boundary: `"segment"`: attention stops at every example ("PosID"). `"row"`: only at every feature, so the examples inside a packed
            row see each other; contaminated on purpose, the paper's FixedLengthPacking.
        pad_to_multiple_of: appends one trailing segment of `pad_token_id` with labels -100, so that T is a multiple of it.
        pad_token_id: what that segment is filled with.

    Each feature has `input_ids` (list or integer array [n]), optionally `labels` ([n]; default: `input_ids`), `seq_lengths` (lengths of the
    examples inside it, summing to n; default: [n]) and `attention_mask` (accepted only if it is all ones). Inputs are not changed.

    Returns a dict of `input_ids`, `labels`, `position_ids` int64 [1, T]; `seq_idx` int32 [1, T] (segment number of each token);
    `cu_seq_lens_q`, `cu_seq_lens_k` int32 [segments + 1] (one tensor); `max_length_q`, `max_length_k` int. Never an attention_mask:
    with one, transformers takes the mask and drops the boundaries. All tensors on the CPU. O(T), no per-token Python for arrays.

    Raises `ValueError`, naming the feature's index: no tokens, labels or seq_lengths that do not fit, a mask with zeros, tokens that are
    not a flat list of integers.

    >>> batch = FlatteningCollator()([{"input_ids": [10, 11, 12, 13]}, {"input_ids": [20, 21, 22]}])
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[10, 11, 12, 13, 20, 21, 22]], [[-100, 11, 12, 13, -100, 21, 22]])
    >>> batch["position_ids"].tolist(), batch["cu_seq_lens_q"].tolist(), batch["max_length_q"]
    ([[0, 1, 2, 3, 0, 1, 2]], [0, 4, 7], 4)
    """

    boundary: Literal["segment", "row"] = "segment"
    pad_to_multiple_of: int | None = None
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if self.boundary not in ("segment", "row"):
            raise ValueError(f"boundary = {self.boundary!r}; expected 'segment' or 'row'")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of = {self.pad_to_multiple_of}; expected at least 1")

    def __call__(self, features: Sequence[Feature]) -> dict[str, torch.Tensor | int]:
        tokens, labels, row_lengths, segment_lengths = _concatenate(features)
        lengths = segment_lengths if self.boundary == "segment" else row_lengths
        if self.pad_to_multiple_of and (tail := -len(tokens) % self.pad_to_multiple_of):
            tokens = np.concatenate([tokens, np.full(tail, self.pad_token_id)])
            labels = np.concatenate([labels, np.full(tail, IGNORE_INDEX)])
            lengths = np.append(lengths, tail)
            segment_lengths = np.append(segment_lengths, tail)
        labels[np.cumsum(segment_lengths) - segment_lengths] = IGNORE_INDEX
        ends = np.cumsum(lengths)
        seq_idx = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        position_ids = np.arange(len(tokens)) - np.repeat(ends - lengths, lengths)
        cu_seqlens = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
        max_seqlen = int(lengths.max())
        batch = {"input_ids": tokens, "labels": labels, "position_ids": position_ids, "seq_idx": seq_idx}
        return {name: torch.from_numpy(array)[None] for name, array in batch.items()} | {
            "cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": max_seqlen, "max_length_k": max_seqlen,
        }  # fmt: skip


@dataclass(frozen=True)
class PaddingCollator:
    """Give every example a line of its own, padded on the right to the longest: the baseline.

    Takes the same features as `FlatteningCollator` (one with `seq_lengths` becomes that many lines) and raises the same errors.
    Returns `input_ids`, `labels` (-100 on the first token of a line and on pads), `attention_mask`, int64 [B, T] on the CPU.

    >>> batch = PaddingCollator(pad_token_id=9)([{"input_ids": [1, 2, 3], "seq_lengths": [1, 2]}])
    >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist()
    ([[1, 9], [2, 3]], [[1, 0], [1, 1]], [[-100, -100], [-100, 3]])
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int | None = None

    def __call__(self, features: Sequence[Feature]) -> dict[str, torch.Tensor]:
        tokens, labels, _, lengths = _concatenate(features)
        labels[np.cumsum(lengths) - lengths] = IGNORE_INDEX
        width = int(lengths.max())
        width += -width % (self.pad_to_multiple_of or 1)
        mask = np.arange(width) < lengths[:, None]
        padded = {
            name: np.full(mask.shape, fill)
            for name, fill in (("input_ids", self.pad_token_id), ("labels", IGNORE_INDEX))
        }
        padded["input_ids"][mask], padded["labels"][mask] = tokens, labels
        return {name: torch.from_numpy(array) for name, array in padded.items()} | {
            "attention_mask": torch.from_numpy(mask.astype(np.int64))
        }


def _concatenate(features: Sequence[Feature]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All tokens and labels end to end (int64 [T], fresh arrays), tokens per feature, tokens per segment (int64)."""
    if not features:
        raise ValueError("features is empty; expected at least one")
    tokens, row_lengths = _column(features, "input_ids")
    if (row_lengths == 0).any():
        raise ValueError(f"features[{int(np.argmin(row_lengths))}]['input_ids'] is empty; expected at least one token")
    with_labels = [f.get("labels") is not None for f in features]
    if not any(with_labels):
        labels = tokens.copy()
    else:
        if not all(with_labels):
            raise ValueError(
                f"features[{with_labels.index(False)}] has no labels but others have; give labels to all or to none"
            )
        labels, label_lengths = _column(features, "labels")
        _same_lengths("labels", label_lengths, row_lengths)
    _refuse_masks(features, row_lengths)
    return tokens, labels, row_lengths, _segment_lengths(features, row_lengths)


def _column(features: Sequence[Feature], name: str) -> tuple[np.ndarray, np.ndarray]:
    if missing := [i for i, f in enumerate(features) if f.get(name) is None]:
        raise ValueError(f"features[{missing[0]}] has no {name!r}; it has {sorted(features[missing[0]])}")
    columns = [f[name] for f in features]
    lengths = np.fromiter(map(len, columns), dtype=np.int64, count=len(columns))
    try:
        if all(isinstance(c, list) for c in columns):
            buffer = array("q")  # fills in C and refuses floats, which numpy would round
            for column in columns:
                buffer.fromlist(column)
            flat = np.frombuffer(buffer, dtype=np.int64)
        else:
            flat = np.concatenate([np.asarray(c) for c in columns]).astype(np.int64, casting="same_kind")
        if flat.ndim == 1:
            return flat, lengths
    except (TypeError, ValueError):
        pass
    for i, column in enumerate(columns):
        flat = not isinstance(column, list) or not column or np.isscalar(column[0])
        values = np.asarray(column) if flat else np.empty((0, 0))
        if len(column) and (values.ndim != 1 or values.dtype.kind not in "iu"):
            raise ValueError(f"features[{i}][{name!r}] is not a flat sequence of integers")
    raise ValueError(f"{name!r} could not be concatenated")


def _same_lengths(name: str, actual: np.ndarray, expected: np.ndarray) -> None:
    if (bad := np.flatnonzero(actual != expected)).size:
        i = int(bad[0])
        raise ValueError(
            f"features[{i}][{name!r}] covers {actual[i]} tokens; expected {expected[i]}, the length of its input_ids"
        )


def _refuse_masks(features: Sequence[Feature], row_lengths: np.ndarray) -> None:
    for i, feature in enumerate(features):
        mask = feature.get("attention_mask")
        if mask is None:
            continue
        mask = np.asarray(mask)
        if mask.shape != (row_lengths[i],) or not mask.all():
            raise ValueError(
                f"features[{i}]['attention_mask'] has {int(mask.size - np.count_nonzero(mask))} zeros over {mask.size} tokens "
                f"(input_ids: {row_lengths[i]}); expected unpadded examples: remove the padding and its mask before collating"
            )


def _segment_lengths(features: Sequence[Feature], row_lengths: np.ndarray) -> np.ndarray:
    given = [f.get("seq_lengths") for f in features]
    if all(g is None for g in given):
        return row_lengths
    per_row = [np.atleast_1d(np.asarray(row_lengths[i] if g is None else g)) for i, g in enumerate(given)]
    sums = np.array([p.sum() for p in per_row])
    _same_lengths("seq_lengths", sums, row_lengths)
    lengths = np.concatenate(per_row)
    if lengths.dtype.kind not in "iu" or (lengths < 1).any():
        i = next(i for i, p in enumerate(per_row) if p.dtype.kind not in "iu" or (p < 1).any())
        raise ValueError(f"features[{i}]['seq_lengths'] = {per_row[i].tolist()}; expected integers of at least 1")
    return lengths.astype(np.int64)
