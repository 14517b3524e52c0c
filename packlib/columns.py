"""What columns of a tokenized example mean for packing: where segments end, what carries loss, what is refused.

One place for both collators, `Plan.apply` and the lab's corpora, so that a column that changes the result is read or
refused everywhere, and never dropped without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

IGNORE_INDEX = -100
LENGTHS = "seq_lengths"  # tokens of each segment of a row, in TRL's spelling
POSITIONS = "position_ids"  # of each token; they restart with every segment
SEGMENT_NUMBERS = ("seq_idx", "segment_ids", "sequence_ids", "document_ids")  # of each token
CUMULATIVE = ("cu_seqlens", "cu_seq_lens", "cu_seq_lens_q", "cu_seq_lens_k")  # where segments begin, and the end
BOUNDARIES = (LENGTHS, POSITIONS, *SEGMENT_NUMBERS, *CUMULATIVE)
LOSS_MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask")  # 1 where a token carries loss

SEGMENT = ("example", "start", "stop")  # of a plan: tokens start to stop of an example

_CLASSES = "a class or span of the example: only next-token loss is computed"
_WEIGHTS = "a weight of the loss: weigh with packlib.losses"
_INPUTS = "an input of the model that is not packed"
_REFUSED: dict[str, str] = {
    **dict.fromkeys(("label", "label_ids", "start_positions", "end_positions", "next_sentence_label"), _CLASSES),
    **dict.fromkeys(("loss_weights", "loss_weight", "token_weights", "label_weights", "sample_weight"), _WEIGHTS),
    **dict.fromkeys(("weights", "sample_weights", "advantages"), _WEIGHTS),
    **dict.fromkeys(("token_type_ids", "mm_token_type_ids", "inputs_embeds", "bbox", "head_mask"), _INPUTS),
    **dict.fromkeys(("decoder_input_ids", "decoder_attention_mask", "encoder_outputs", "past_key_values"), _INPUTS),
    **dict.fromkeys(("global_attention_mask", "cross_attention_mask", "input_features", "input_values"), _INPUTS),
}
_MODALITIES = ("pixel_", "image", "video", "audio", "visual", "vision", "speech", "input_audio")


def refusal(column: str) -> str | None:
    """Why a column cannot be honoured, in words; None where it can, or changes nothing that a model computes.

    >>> refusal("pixel_values")
    'an input of another modality that is not packed'
    >>> refusal("task") is None
    True
    """
    if column in _REFUSED:
        return _REFUSED[column]
    return "an input of another modality that is not packed" if column.startswith(_MODALITIES) else None


def refuse(columns: Iterable[str], where: str) -> None:
    """Raise `ValueError` for the first column that changes the result and cannot be honoured. where: what has it."""
    for column in columns:
        if reason := refusal(column):
            raise ValueError(f"{where} has {column!r}, {reason}; remove the column if it is of no account")


def segments_of(row: Mapping[str, Any], length: int, where: str, first_position: int = 0) -> np.ndarray | None:
    """Tokens of each segment of a row, from whatever columns carry them; None where none does. int64 [segments].

    Args:
        row: columns of BOUNDARIES among others; a value of None counts as absent.
        length: tokens of the row. where: how an error calls it. first_position: that position ids may start at, too.

    Raises `ValueError` for a column that does not fit the row, for two that disagree, and for positions that are
    neither those of whole segments nor refused by another rule: transformers' masks cut where positions do not step by
    one, its flash path where they return to the smallest, and `[0, 1, 2, 5, 6]` is two segments for one and one for
    the other.
    """
    found: dict[str, np.ndarray] = {}
    for name in BOUNDARIES:
        value = row.get(name)
        if value is not None:
            read = _READERS.get(name, _from_numbers)
            found[name] = read(_integers(value, f"{where}[{name!r}]"), length, f"{where}[{name!r}]", first_position)
    if not found:
        return None
    (name, lengths), *others = found.items()
    for other, further in others:
        if not np.array_equal(lengths, further):
            raise ValueError(f"{where}: {name} says segments of {_few(lengths)} tokens and {other} of {_few(further)}")
    return lengths


def _integers(value: Any, where: str) -> np.ndarray:
    array = np.atleast_1d(np.asarray(value))
    if array.ndim == 2 and len(array) == 1:  # a batch of one row
        array = array[0]
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{where} is not a flat sequence of integers")
    return array.astype(np.int64, copy=False)


def _covering(array: np.ndarray, length: int, where: str) -> None:
    if len(array) != length:
        raise ValueError(f"{where} covers {len(array)} tokens; expected {length}, the length of its input_ids")


def _from_lengths(array: np.ndarray, length: int, where: str, first_position: int) -> np.ndarray:
    if (total := int(array.sum())) != length:
        raise ValueError(f"{where} covers {total} tokens; expected {length}, the length of its input_ids")
    if (array < 1).any():
        raise ValueError(f"{where} = {array.tolist()}; expected integers of at least 1")
    return array


def _from_positions(array: np.ndarray, length: int, where: str, first_position: int) -> np.ndarray:
    _covering(array, length, where)
    starts = np.flatnonzero(np.append(True, np.diff(array) != 1))
    odd = ~np.isin(array[starts], (0, first_position)) | (array[starts] != array[0])
    if odd.any():
        i = int(starts[np.argmax(odd)])
        raise ValueError(
            f"{where} goes to {array[i]} at token {i}; expected {first_position} at the start of each segment, and "
            "steps of 1 inside: what is meant by other positions cannot be told"
        )
    return np.diff(np.append(starts, length))


def _from_numbers(array: np.ndarray, length: int, where: str, first_position: int) -> np.ndarray:
    _covering(array, length, where)
    starts = np.flatnonzero(np.append(True, np.diff(array) != 0))
    if len(np.unique(array[starts])) < len(starts):
        raise ValueError(f"{where} gives one number to segments that lie apart; expected a number of its own for each")
    return np.diff(np.append(starts, length))


def _from_cumulative(array: np.ndarray, length: int, where: str, first_position: int) -> np.ndarray:
    lengths = np.diff(array)
    if len(array) < 2 or array[0] or array[-1] != length or (lengths < 0).any():
        raise ValueError(f"{where} = {_few(array)}; expected to rise from 0 to {length}, the length of its input_ids")
    return lengths[lengths > 0]


_READERS = {
    LENGTHS: _from_lengths,
    POSITIONS: _from_positions,
    **dict.fromkeys(CUMULATIVE, _from_cumulative),
}


def _few(array: np.ndarray) -> str:
    values = array.tolist()
    return str(values) if len(values) < 9 else f"{str(values[:8])[:-1]}, …]"


def lost_boundaries(input_ids: np.ndarray, labels: np.ndarray) -> int | None:
    """Where a row shows that it was packed, if it does: the first inner token whose label was left out for a boundary.

    A packed row has no label on the first token of each segment. So labels that leave out the row's first token and
    single tokens inside, no two side by side, and are the tokens themselves everywhere else, are those of a packed row.
    Longer stretches without labels are prompts as well as boundaries: a conversation has them, and is not suspected.

    >>> lost_boundaries(np.arange(6), np.array([-100, 1, 2, -100, 4, 5]))
    3
    """
    out = labels == IGNORE_INDEX
    inner = np.flatnonzero(out)[1:]
    if not len(inner) or not out[0] or (out[1:] & out[:-1]).any() or not np.array_equal(labels[~out], input_ids[~out]):
        return None
    return int(inner[0])
