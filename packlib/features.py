"""Features, end to end: tokens, labels and where segments end, out of whatever columns carry them.

A feature is one example or one packed row, a mapping of columns. What cannot be honoured is refused here, for the
collators, for a plan's view and for a stream alike. A fixed number of array operations, whatever the tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from packlib.columns import (
    BOUNDARIES,
    IGNORE_INDEX,
    LENGTHS,
    LOSS_MASKS,
    POSITIONS,
    lost_boundaries,
    refuse,
    segments_of,
)

READ = frozenset({"input_ids", "labels", "attention_mask", *LOSS_MASKS, *BOUNDARIES})  # columns that a row is made of

Feature = Mapping[str, Any]


class Tokens(NamedTuple):
    """All tokens and labels end to end (int64 [T], fresh arrays), tokens per feature, tokens per segment (int64)."""

    tokens: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    segments: np.ndarray


def concatenate(features: Sequence[Feature], first_position: int = 0) -> Tokens:
    """All features end to end. first_position: where position ids may start, too. `ValueError`, naming the feature."""
    if not features:
        raise ValueError("features is empty; expected at least one")
    present = _present(features)
    tokens, lengths = _column(features, "input_ids")
    if (lengths == 0).any():
        raise ValueError(f"features[{int(np.argmin(lengths))}]['input_ids'] is empty; expected at least one token")
    if "attention_mask" in present:
        _refuse_masks(features, lengths)
    if "labels" in present:
        labels = _aligned(features, "labels", lengths)
    else:
        labels = tokens.copy()
        for name in LOSS_MASKS:
            if name in present:
                labels[_aligned(features, name, lengths) == 0] = IGNORE_INDEX
    if not present.isdisjoint(BOUNDARIES):
        segments = _segments(features, tokens, labels, lengths, first_position)
    else:
        if "labels" in present:
            _refuse_lost(tokens, labels, lengths, range(len(features)))
        segments = lengths
    return Tokens(tokens, labels, lengths, segments)


def packed_row(features: Sequence[Feature], names: Sequence[int | str]) -> dict[str, np.ndarray]:
    """One row of whole segments, one a feature, with the columns of `Plan.apply`: its boundaries are in it twice.

    `input_ids`, `labels` int64 [n] (-100 on every segment's first token), `position_ids` int32 [n], `seq_lengths` int64
    [segments]. names: what an error calls each feature.
    """
    try:
        tokens, labels, lengths, segments = concatenate(features)
        if len(segments) > len(lengths):
            raise ValueError("one of them is packed already; expected examples, not packed rows")
    except ValueError as error:
        called = ", ".join(map(str, names[:20])) + (", …" if len(names) > 20 else "")
        raise ValueError(f"a row of the examples {called} (features[0] is the first): {error}") from None
    starts = np.cumsum(lengths) - lengths
    labels[starts] = IGNORE_INDEX
    positions = np.arange(len(tokens)) - np.repeat(starts, lengths)
    return {"input_ids": tokens, "labels": labels, POSITIONS: positions.astype(np.int32), LENGTHS: lengths}


def token_values(name: str, example: Mapping[str, Any]) -> bool:
    """Whether a column of an example has a value for each of its tokens."""
    value: Any = example.get(name)
    return hasattr(value, "__len__") and not isinstance(value, str) and len(value) == len(example["input_ids"])


def sliced(example: Mapping[str, Any], size: int, cuts: Iterable[tuple[int, int]]) -> list[dict[str, Any]]:
    """Pieces `(start, stop)` of an example of `size` tokens, of every column that has a value for each of them, too.

    What `concatenate` asks of an example is asked of the whole one, once; a piece says by `seq_lengths` that it is one.
    """
    try:
        segments = concatenate([example]).segments
    except ValueError as error:
        raise ValueError(f"an example of {size} tokens: {str(error).replace('features[0]', 'it')}") from None
    if len(segments) > 1:
        raise ValueError(f"an example of {size} tokens is packed already: it has {len(segments)} segments")
    columns = {name: value for name, value in example.items() if name not in BOUNDARIES}
    aligned = {name for name in columns if token_values(name, example)}
    return [
        {name: value[start:stop] if name in aligned else value for name, value in columns.items()}
        | {LENGTHS: [stop - start]}
        for start, stop in cuts
    ]


def _present(features: Sequence[Feature]) -> set[str]:
    """Columns that some feature has a value for. Raises for those that cannot be honoured, and for other things."""
    for i, feature in enumerate(features):
        if not isinstance(feature, Mapping):
            raise ValueError(f"features[{i}] is a {type(feature).__name__}; expected a mapping that has 'input_ids'")
    kinds = {tuple(feature) for feature in features}  # features have the same columns, as a rule
    names = {name for kind in kinds for name in kind}
    present = {name for name in names if any(feature.get(name) is not None for feature in features)}
    try:
        refuse(present, "a feature")
    except ValueError:
        for i, feature in enumerate(features):
            refuse((name for name, value in feature.items() if value is not None), f"features[{i}]")
    return present


def _aligned(features: Sequence[Feature], name: str, lengths: np.ndarray) -> np.ndarray:
    """A column with a value for each token, of all features or none: int64 [T], a fresh array."""
    given = [feature.get(name) is not None for feature in features]
    if not all(given):
        raise ValueError(f"features[{given.index(False)}] has no {name} but others have; give {name} to all or to none")
    values, found = _column(features, name)
    _same_lengths(name, found, lengths)
    return values


def _column(features: Sequence[Feature], name: str) -> tuple[np.ndarray, np.ndarray]:
    if missing := [i for i, feature in enumerate(features) if feature.get(name) is None]:
        raise ValueError(f"features[{missing[0]}] has no {name!r}; it has {sorted(features[missing[0]])}")
    columns = [feature[name] for feature in features]
    try:
        lengths = np.fromiter(map(len, columns), dtype=np.int64, count=len(columns))
    except TypeError:  # a class label, say; numpy's and torch's numbers have a __len__ that raises
        i = next(i for i, column in enumerate(columns) if not np.ndim(column))
        raise ValueError(
            f"features[{i}][{name!r}] = {columns[i]!r} is one value; expected one for each token"
        ) from None
    try:
        if all(isinstance(column, list) for column in columns):
            buffer = array("q")  # fills in C and refuses floats, which numpy would round
            for column in columns:
                buffer.fromlist(column)
            flat = np.frombuffer(buffer, dtype=np.int64)
        else:
            flat = np.concatenate([np.asarray(column) for column in columns]).astype(np.int64, casting="same_kind")
        if flat.ndim == 1:
            return flat, lengths
    except (TypeError, ValueError):
        pass
    for i, column in enumerate(columns):
        nested = isinstance(column, list) and len(column) and not np.isscalar(column[0])
        values = np.empty((0, 0)) if nested else np.asarray(column)
        if len(column) and (values.ndim != 1 or values.dtype.kind not in "iu"):
            raise ValueError(f"features[{i}][{name!r}] is not a flat sequence of integers")
    raise ValueError(f"{name!r} could not be concatenated")


def _same_lengths(name: str, actual: np.ndarray, expected: np.ndarray) -> None:
    if (bad := np.flatnonzero(actual != expected)).size:
        i = int(bad[0])
        raise ValueError(
            f"features[{i}][{name!r}] covers {actual[i]} tokens; expected {expected[i]}, the length of its input_ids"
        )


def _refuse_masks(features: Sequence[Feature], lengths: np.ndarray) -> None:
    for i, feature in enumerate(features):
        if feature.get("attention_mask") is None:
            continue
        mask = np.asarray(feature["attention_mask"])
        if mask.shape != (lengths[i],) or not mask.all():
            raise ValueError(
                f"features[{i}]['attention_mask'] has {int(mask.size - np.count_nonzero(mask))} zeros over {mask.size} "
                f"tokens (input_ids: {lengths[i]}); expected unpadded examples: remove the padding and its mask"
            )


def _segments(
    features: Sequence[Feature], tokens: np.ndarray, labels: np.ndarray, lengths: np.ndarray, first_position: int
) -> np.ndarray:
    """Tokens per segment, int64 [segments], where some feature carries boundaries."""
    found, bare = [], []
    for i, (feature, length) in enumerate(zip(features, lengths)):
        segments = segments_of(feature, int(length), f"features[{i}]", first_position)
        if segments is None:
            bare.append(i)
            segments = lengths[i : i + 1]
        found.append(segments)
    if features[0].get("labels") is not None:
        _refuse_lost(tokens, labels, lengths, bare)
    return np.concatenate(found)


def _refuse_lost(tokens: np.ndarray, labels: np.ndarray, lengths: np.ndarray, rows: Sequence[int]) -> None:
    if not (labels == IGNORE_INDEX).any():
        return
    ends = np.cumsum(lengths)
    for i in rows:
        here = slice(ends[i] - lengths[i], ends[i])
        if (at := lost_boundaries(tokens[here], labels[here])) is not None:
            raise ValueError(
                f"features[{i}] was packed and has lost its boundaries: its labels leave out token 0 and single tokens "
                f"inside (the first is {at}), as packing does, but it has no seq_lengths and no position_ids. Keep one "
                f"of these columns; if it is one example after all, say so: seq_lengths = [{lengths[i]}]"
            )
