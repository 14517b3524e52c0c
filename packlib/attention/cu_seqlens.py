"""Boundaries of segments, `cu_seqlens`, and their lengths on the host, which are remembered on the tensor itself."""

from itertools import pairwise

import torch
from torch import Tensor


def segment_lengths(cu_seqlens: Tensor) -> list[int]:
    """Lengths of the segments on the host. One device synchronisation for each tensor, however many layers ask.

    >>> segment_lengths(torch.tensor([0, 4, 7], dtype=torch.int32))
    [4, 3]
    """
    version, lengths = getattr(cu_seqlens, "_packlib_lengths", (None, []))
    if version != cu_seqlens._version:
        lengths = [b - a for a, b in pairwise(cu_seqlens.tolist())]
        _remember(cu_seqlens, lengths)
    return lengths


def _remember(cu_seqlens: Tensor, lengths: list[int]) -> None:
    cu_seqlens._packlib_lengths = (cu_seqlens._version, lengths)  # type: ignore[attr-defined]


def uniform_segments(segments: int, length: int, device: torch.device) -> Tensor:
    """`cu_seqlens` of segments of one length, rows without padding: int32 [segments + 1] on `device`, no waiting."""
    cu_seqlens = torch.arange(0, (segments + 1) * length, length, dtype=torch.int32, device=device)
    _remember(cu_seqlens, [length] * segments)
    return cu_seqlens
