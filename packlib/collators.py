"""Rows of a plan -> one model batch. The only module that knows Hugging Face's key names.

`FlatteningCollator` lays rows end to end, [1, T], with position ids that restart and boundaries as `cu_seqlens`: no
slot is spent on padding and no attention mask exists. `PaddingCollator` lays every example on a line of its own,
[B, T], with a mask. Both compute everything on the host, in numpy, with a fixed number of array operations for any
number of tokens: guessing the boundaries later, from position ids on the device, costs one synchronisation a layer.

Features may be single examples or packed rows, ours or anybody's: `packlib.columns` says which columns are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from packlib.columns import IGNORE_INDEX
from packlib.features import Feature, concatenate

__all__ = ["IGNORE_INDEX", "FlatteningCollator", "PaddingCollator"]


@dataclass(frozen=True)
class FlatteningCollator:
    """Concatenate features into one [1, T] batch whose segments do not see each other (arXiv 2407.09105, §3.4).

    Args:
        boundary: `"segment"`: attention stops at every example ("PosID"). `"row"`: only at every feature, so the
            examples inside a packed row see each other; contaminated on purpose, the paper's FixedLengthPacking.
        pad_to_multiple_of: appends one trailing segment of `pad_token_id` with labels -100, so that T is a multiple.
        pad_token_id: what that segment is filled with.
        pad_segments_to: empty segments at the end make so many of them, so that `cu_seqlens` has one shape.
        max_seqlen_multiple_of: rounds `max_length_q` up, so that it has few values.
        position_ids_start: position of an example's first token (RoBERTa and its like: pad_token_id + 1).

    Each feature has `input_ids` (list or integer array [n]) and optionally
    - `labels` ([n]; one for each token, -100 for none), or masks that make them: `completion_mask`, `assistant_masks`,
      `loss_mask` ([n], all of them 1 where a token carries loss; with `labels` they are ignored). Default: `input_ids`;
    - boundaries, if it is packed already: `seq_lengths` (summing to n), `position_ids` that restart, `seq_idx` or
      `segment_ids`, `cu_seqlens`; several must agree. Default: one segment;
    - `attention_mask`, accepted only if it is all ones.
    Inputs are not changed.

    Returns a dict of `input_ids`, `labels`, `position_ids` int64 [1, T]; `seq_idx` int32 [1, T] (segment number of each
    token); `cu_seq_lens_q`, `cu_seq_lens_k` int32 [segments + 1] (one tensor); `max_length_q`, `max_length_k` int;
    `use_cache` False, for with a cache transformers' own attention (sdpa, eager) drops boundaries; and, with
    `pad_to_multiple_of`, `pad_tail` True, for attention that has to know. Never an attention_mask: with one,
    transformers takes the mask and drops the boundaries. All tensors on the CPU.
    O(T), no per-token Python for arrays.

    Raises `ValueError`, naming the feature's index: no tokens, labels or boundaries that do not fit or contradict each
    other, a mask with zeros, tokens that are not a flat list of integers, columns that change the result and cannot be
    honoured (other modalities, weights, classes), and a row whose labels show that it was packed, but whose boundaries
    somebody dropped.

    >>> batch = FlatteningCollator()([{"input_ids": [10, 11, 12, 13]}, {"input_ids": [20, 21, 22]}])
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[10, 11, 12, 13, 20, 21, 22]], [[-100, 11, 12, 13, -100, 21, 22]])
    >>> batch["position_ids"].tolist(), batch["cu_seq_lens_q"].tolist(), batch["max_length_q"]
    ([[0, 1, 2, 3, 0, 1, 2]], [0, 4, 7], 4)
    """

    boundary: Literal["segment", "row"] = "segment"
    pad_to_multiple_of: int | None = None
    pad_token_id: int = 0
    pad_segments_to: int | None = None
    max_seqlen_multiple_of: int | None = None
    position_ids_start: int = 0

    def __post_init__(self) -> None:
        if self.boundary not in ("segment", "row"):
            raise ValueError(f"boundary = {self.boundary!r}; expected 'segment' or 'row'")
        for name in ("pad_to_multiple_of", "pad_segments_to", "max_seqlen_multiple_of"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}; expected at least 1")
        if self.position_ids_start < 0:
            raise ValueError(f"position_ids_start = {self.position_ids_start}; expected at least 0")

    def __call__(self, features: Sequence[Feature]) -> dict[str, torch.Tensor | int]:
        rows = concatenate(features, self.position_ids_start)
        tokens, labels = rows.tokens, rows.labels
        lengths = rows.segments if self.boundary == "segment" else rows.lengths
        # 1. The first label of every example goes, then pads make one more segment.
        labels[np.cumsum(rows.segments) - rows.segments] = IGNORE_INDEX
        if tail := -len(tokens) % (self.pad_to_multiple_of or 1):
            tokens = np.concatenate([tokens, np.full(tail, self.pad_token_id)])
            labels = np.concatenate([labels, np.full(tail, IGNORE_INDEX)])
            lengths = np.append(lengths, tail)
        # 2. Everything that says where segments end.
        ends = np.cumsum(lengths)
        seq_idx = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        position_ids = np.arange(len(tokens)) - np.repeat(ends - lengths - self.position_ids_start, lengths)
        cu_seqlens = torch.from_numpy(np.concatenate([[0], ends, self._empty_segments(ends)]).astype(np.int32))
        max_seqlen = int(lengths.max())
        max_seqlen += -max_seqlen % (self.max_seqlen_multiple_of or 1)
        arrays = {"input_ids": tokens, "labels": labels, "position_ids": position_ids, "seq_idx": seq_idx}
        batch: dict[str, torch.Tensor | int] = {name: torch.from_numpy(flat)[None] for name, flat in arrays.items()}
        batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = cu_seqlens
        batch["max_length_q"] = batch["max_length_k"] = max_seqlen
        batch["use_cache"] = False
        if self.pad_to_multiple_of:
            batch["pad_tail"] = True  # not its length: compiled layers would be compiled for each
        return batch

    def _empty_segments(self, ends: np.ndarray) -> np.ndarray:
        """Ends of the segments that are missing: where the last one ends."""
        if self.pad_segments_to is None:
            return ends[:0]
        if len(ends) > self.pad_segments_to:
            raise ValueError(
                f"the batch has {len(ends)} segments; expected at most pad_segments_to = {self.pad_segments_to}"
            )
        return np.full(self.pad_segments_to - len(ends), ends[-1])


@dataclass(frozen=True)
class PaddingCollator:
    """Give every example a line of its own, padded on the right to the longest: the baseline.

    Takes the same features as `FlatteningCollator` (a packed row becomes as many lines as it has segments) and raises
    the same errors. Returns `input_ids`, `labels` (-100 on the first token of a line and on pads), `attention_mask`,
    int64 [B, T] on the CPU; without `with_mask` `position_ids` and no mask, which causal attention does not need: no
    token sees the pads behind it.

    >>> batch = PaddingCollator(pad_token_id=9)([{"input_ids": [1, 2, 3], "seq_lengths": [1, 2]}])
    >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist()
    ([[1, 9], [2, 3]], [[1, 0], [1, 1]], [[-100, -100], [-100, 3]])
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int | None = None
    with_mask: bool = True

    def __call__(self, features: Sequence[Feature]) -> dict[str, torch.Tensor]:
        rows = concatenate(features)
        lengths = rows.segments
        rows.labels[np.cumsum(lengths) - lengths] = IGNORE_INDEX
        width = int(lengths.max())
        width += -width % (self.pad_to_multiple_of or 1)
        mask = np.arange(width) < lengths[:, None]
        input_ids, labels = np.full(mask.shape, self.pad_token_id), np.full(mask.shape, IGNORE_INDEX)
        input_ids[mask], labels[mask] = rows.tokens, rows.labels
        batch = {"input_ids": input_ids, "labels": labels}
        if self.with_mask:
            batch["attention_mask"] = mask.astype(np.int64)
        else:
            batch["position_ids"] = np.broadcast_to(np.arange(width), mask.shape).copy()
        return {name: torch.from_numpy(padded) for name, padded in batch.items()}
