"""Lengths of examples: what planners accept, what a plan is tied to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

Lengths = Sequence[int] | np.ndarray
Overflow = Literal["error", "truncate", "split"]
Layout = Literal["padded", "flat"]


def check_lengths(lengths: Lengths) -> np.ndarray:
    """`lengths` as int32 [examples]; `ValueError` with the index of what is not an integer of at least 1.

    >>> check_lengths([3, 0])
    Traceback (most recent call last):
    ValueError: lengths[1] = 0; expected integers from 1 to 2147483647
    """
    array = np.asarray(lengths)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"lengths has shape {list(array.shape)}; expected [examples] with at least one example")
    if array.dtype.kind not in "iu":
        odd = (
            array != np.floor(array)
            if array.dtype.kind == "f"
            else np.array([type(value) is not int for value in list(lengths)])
        )
        i = int(np.argmax(odd))
        raise ValueError(
            f"lengths[{i}] = {list(lengths)[i]!r} in {array.dtype} lengths; expected integers of at least 1"
        )
    if array.min() < 1 or array.max() > 2**31 - 1:
        i = int(np.argmax((array < 1) | (array > 2**31 - 1)))
        raise ValueError(f"lengths[{i}] = {array[i]}; expected integers from 1 to 2147483647")
    return array.astype(np.int32, copy=False)


def check_loss_tokens(loss_tokens: Lengths, lengths: np.ndarray) -> np.ndarray:
    """`loss_tokens` as integers [examples]; `ValueError` with the index of what is not from 0 to length - 1."""
    loss_tokens = np.asarray(loss_tokens)
    if loss_tokens.shape != lengths.shape:
        raise ValueError(f"loss_tokens has shape {list(loss_tokens.shape)}; expected {list(lengths.shape)}")
    if (bad := (loss_tokens < 0) | (loss_tokens >= lengths)).any():
        i = int(np.argmax(bad))
        raise ValueError(
            f"loss_tokens[{i}] = {loss_tokens[i]}; expected 0 to {lengths[i] - 1}, for {lengths[i]} tokens"
        )
    return loss_tokens


def hash_lengths(lengths: np.ndarray) -> str:
    """sha256 of int32 lengths [examples] in little-endian order: what a plan is tied to."""
    return hashlib.sha256(np.ascontiguousarray(lengths, dtype="<i4").data).hexdigest()


def positive(name: str, value: Any) -> int:
    """`value`; `ValueError` unless it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} = {value!r}; expected an integer of at least 1")
    return int(value)


def check_layout(layout: str) -> None:
    """`ValueError` unless `layout` is padded or flat."""
    if layout not in ("padded", "flat"):
        raise ValueError(f"layout = {layout!r}; expected 'padded' or 'flat'")


def index_type(examples: int) -> type[np.int32] | type[np.int64]:
    """The smaller integer type that numbers so many examples: at 10^8 examples an index is 0.4 GB of int32."""
    return np.int32 if examples < 2**31 else np.int64
