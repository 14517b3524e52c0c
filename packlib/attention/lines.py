"""A module on one line a segment: the packed row [1, T, C] is unflattened to lines [n, L, C], and its output flattened.

What a module carries from token to token ends where a line ends. Lines are padded on the right with copies of their own
last token: a causal module never sees a pad, no other segment's numbers are touched, and what pads give back is
dropped, so that their gradient is zero.

Lines of similar length run together. A group takes the next shorter segment as long as its slots are at most
`max_waste` times its real tokens, so that
- slots inside the module are at most `max_waste` times the row's tokens, for any lengths;
- there are at most 1 + log(longest / shortest) / log(max_waste) groups, each of which is one call of the module.

The segments of the batch in hand are a context variable: set while a model runs (`packlib.attention.mixers`), and again
around what a checkpoint computes a second time, in whichever thread backward does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from packlib.attention.cu_seqlens import segment_lengths

MAX_WASTE = 1.25
ISOLATED = "_packlib_isolated"  # attribute of the models that `isolate_mixers` has seen
# Boundaries by the names that models hand them on with; a line has none.
BOUNDARIES = {"seq_idx", "cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "pad_tail"}


def group_segments(lengths: Sequence[int], max_waste: float = MAX_WASTE) -> list[list[int]]:
    """Numbers of the segments that run together, longest first; segments without tokens are in no group.

    lengths: tokens of each segment. max_waste: most slots for each real token of a group, at least 1; with 1 only
    segments of one length share a group. O(n log n). Raises `ValueError` for a smaller `max_waste`.

    >>> group_segments([100, 7, 96, 0, 8])
    [[0, 2], [4, 1]]
    """
    if max_waste < 1:
        raise ValueError(f"max_waste = {max_waste}; expected at least 1")
    groups: list[list[int]] = []
    real = 0  # tokens of the group that is being filled
    for i in sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i]):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= max_waste * (real + lengths[i]):
            groups[-1].append(i)
            real += lengths[i]
        else:
            groups.append([i])
            real = lengths[i]
    return groups


def mixer_waste(lengths: Sequence[int], max_waste: float = MAX_WASTE) -> float:
    """Slots inside a mixer on lines over the real tokens of a row with these segments: 1 to `max_waste`.

    >>> round(mixer_waste([300, 290, 10]), 3)
    1.017
    """
    return sum(lengths[group[0]] * len(group) for group in group_segments(lengths, max_waste)) / sum(lengths)


class Segments:
    """The segments of one batch: their lengths on the host, and their lines, laid out once however many modules ask.

    cu_seqlens: int32 [segments + 1]. One device synchronisation, none if it lies on the CPU or remembers its lengths.
    """

    def __init__(self, cu_seqlens: Tensor) -> None:
        self.cu_seqlens = cu_seqlens
        self.lengths = segment_lengths(cu_seqlens)
        self.tokens = sum(self.lengths)
        self._lines: dict[tuple[torch.device, float], tuple[list[Tensor], Tensor]] = {}

    def lines(self, device: torch.device, max_waste: float) -> tuple[list[Tensor], Tensor]:
        """For each group the tokens on its lines, int64 [lines, length]; and each token's slot, int64 [T].

        A pad has its line's last token. Slots are counted through all groups.
        """
        if (device, max_waste) not in self._lines:
            self._lines[device, max_waste] = self._lay_out(device, max_waste)
        return self._lines[device, max_waste]

    def _lay_out(self, device: torch.device, max_waste: float) -> tuple[list[Tensor], Tensor]:
        lengths = np.array(self.lengths)
        starts = np.cumsum(lengths) - lengths
        slot_of, slots = np.empty(self.tokens, dtype=np.int64), 0
        groups = []
        for group in group_segments(self.lengths, max_waste):
            offsets, last = np.arange(lengths[group[0]]), lengths[group, None] - 1
            groups.append(starts[group, None] + np.minimum(offsets, last))
            real = np.flatnonzero(offsets <= last)
            slot_of[groups[-1].flat[real]] = slots + real
            slots += groups[-1].size
        flat = torch.from_numpy(np.concatenate([slot_of, *(tokens.flat for tokens in groups)]))
        if device.type == "cuda":
            flat = flat.pin_memory()  # else the copy waits for the device
        slot, *index = flat.to(device, non_blocking=True).split([self.tokens, *(tokens.size for tokens in groups)])
        return [i.view(tokens.shape) for i, tokens in zip(index, groups)], slot


ONE_BY_ONE = Segments(torch.zeros(1, dtype=torch.int32))  # of a batch that is not packed, and of lines
_current: ContextVar[Segments | None] = ContextVar("segments of the batch that a model computes", default=None)


def current_segments() -> Segments | None:
    """Segments of the batch in hand; `ONE_BY_ONE` if it is not packed; None outside of a model's forward."""
    return _current.get()


@contextmanager
def inside(segments: Segments | None) -> Iterator[None]:
    """Let modules see these segments."""
    token = _current.set(segments)
    try:
        yield
    finally:
        _current.reset(token)


def per_token(tree: Any, tokens: int) -> list[Tensor]:
    """The tensors [1, T, …] among nested arguments or outputs."""
    return [value for value in tree_flatten(tree)[0] if _is_per_token(value, tokens)]


def _is_per_token(value: Any, tokens: int) -> bool:
    return isinstance(value, Tensor) and value.shape[:2] == (1, tokens)


def run_on_lines(
    forward: Callable[..., Any], segments: Segments, max_waste: float, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What `forward` makes of each segment by itself, laid out as its row again.

    Of the arguments, tensors [1, T, …] (nested ones too) are unflattened, masks [1, H, T, T] are cut to each line,
    biases of keys [H, 1, T] (ALiBi) begin anew, boundaries are left out, all else stays. Of the outputs, tensors
    [n, L, …] are flattened to [1, T, …]; others (last states) mean nothing for a row and become None.

    Raises `ValueError` if no argument has as many tokens as the segments.
    """
    given = per_token((args, kwargs), segments.tokens)
    if not given:
        shapes = [tuple(value.shape) for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        raise ValueError(f"a mixer was given tensors of shapes {shapes}; expected one [1, {segments.tokens}, …]")
    groups, slot = segments.lines(given[0].device, max_waste)
    kwargs = {name: value for name, value in kwargs.items() if name not in BOUNDARIES}
    outputs = []
    with inside(ONE_BY_ONE):
        for index in groups:
            line_args, line_kwargs = tree_map(partial(_unflatten, index=index, tokens=segments.tokens), (args, kwargs))
            outputs.append(forward(*line_args, **line_kwargs))
    leaves, specs = zip(*map(tree_flatten, outputs))
    return tree_unflatten([_flatten(parts, groups, slot) for parts in zip(*leaves)], specs[0])


def _unflatten(value: Any, index: Tensor, tokens: int) -> Any:
    """An argument as these lines have it."""
    if not isinstance(value, Tensor) or index.shape == (1, tokens):
        return value
    if _is_per_token(value, tokens):
        return value[0].index_select(0, index.flatten()).unflatten(0, index.shape)
    if value.ndim == 4 and value.shape[-2:] == (tokens, tokens):
        blocks = value[0][:, index[:, :, None], index[:, None, :]].transpose(0, 1)
        pads = torch.nn.functional.pad(index.diff() == 0, (1, 0))  # the last token once more, which it must not see
        return torch.where(pads[:, None, None], value[:, :, :1, -1:], blocks)  # as the first must not see the last
    if value.ndim == 3 and value.shape[1:] == (1, tokens):
        return value[:, :, : index.shape[1]].repeat(len(index), 1, 1)
    if value.ndim == 4 and value.shape[3] == 1 and value.dtype == torch.int64:  # packlib_varlen's: where rows end
        ends = torch.arange(0, index.numel() + 1, index.shape[1], device=value.device)
        return ends[None, None, :, None].expand(1, value.shape[1], -1, 1)
    return value


def _flatten(parts: Sequence[Any], groups: Sequence[Tensor], slot: Tensor) -> Any:
    """An output of all groups as the row has it."""
    if not isinstance(parts[0], Tensor):
        return parts[0]
    if any(part.shape[:2] != index.shape for part, index in zip(parts, groups)):
        return None
    return torch.cat([part.flatten(0, 1) for part in parts]).index_select(0, slot)[None]
