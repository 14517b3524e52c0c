"""FlexAttention with a document mask: one compiled kernel that takes windows, softcap and any head dimension.

Two costs to keep away: every new T compiles anew, so T is padded up to a power of two; and building the block mask can
cost more than the attention, so it is built once per batch and kept on `cu_seqlens` (inside a compiled layer: once per
layer). A trap: after eight compilations PyTorch silently runs FlexAttention uncompiled, dense, T × T; here that limit
is far away, and passing it is an error. On the CPU PyTorch has no backward for it, and it runs uncompiled.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def bucket(tokens: int) -> int:
    """Smallest power of two that holds `tokens`, at least 128: at most one compilation for each doubling of T.

    >>> bucket(5), bucket(128), bucket(4097)
    (128, 128, 8192)
    """
    return max(128, 1 << (tokens - 1).bit_length())


_RECOMPILE_LIMIT = 256  # kinds of call (bucket, heads, head dimension, dtype, mask) that one process may compile


@cache
def _compiled(function: Callable[..., Any], device_type: str, backend: str = "inductor") -> Callable[..., Any]:
    """`function` itself on a CPU, else compiled; RuntimeError, never uncompiled, above `_RECOMPILE_LIMIT` kinds."""
    if device_type == "cpu":
        return function
    compiled = torch.compile(function, dynamic=False, fullgraph=True, backend=backend)

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT, accumulated_recompile_limit=_RECOMPILE_LIMIT):
            return compiled(*args, **kwargs)

    return call


def document_mask(cu_seqlens: Tensor, length: int, visible: Callable[[Tensor, Tensor], Tensor], key: Any) -> BlockMask:
    """Block mask [1, 1, length, length]: same segment and `visible(q, k)`. Once for each `cu_seqlens`, `length`, `key`.

    Positions from `cu_seqlens[-1]` on are padding: each sees itself only, so their blocks cost next to nothing. No
    synchronisation.
    """
    if torch.compiler.is_compiling():
        return _build_mask(create_block_mask, cu_seqlens, length, visible)
    known = cu_seqlens.__dict__.setdefault("_packlib_block_masks", {})
    if (cu_seqlens._version, length, key) not in known:
        create = _compiled(create_block_mask, cu_seqlens.device.type)
        known[cu_seqlens._version, length, key] = _build_mask(create, cu_seqlens, length, visible)
    return known[cu_seqlens._version, length, key]


def _build_mask(
    create: Callable[..., BlockMask], cu_seqlens: Tensor, length: int, visible: Callable[[Tensor, Tensor], Tensor]
) -> BlockMask:
    position = torch.arange(length, device=cu_seqlens.device)
    segment = torch.searchsorted(cu_seqlens, position, right=True)
    segment = torch.where(position < cu_seqlens[-1], segment, segment + position)

    def mask(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (segment[q] == segment[k]) & visible(q, k)

    return create(mask, None, None, length, length, device=cu_seqlens.device)


@cache
def _soft(cap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return score_mod


def flex_varlen(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, softcap: float | None) -> Tensor:
    """[T, H, D], [T, Hkv, D], [T, Hkv, Dv] -> [T, H, Dv]; `mask` covers `bucket(T)` positions."""
    total, heads = q.shape[:2]
    if q.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise NotImplementedError("flex has no backward on the CPU; use sdpa, or torch.no_grad()")
    if grouped := heads != k.shape[1]:
        group = heads // k.shape[1]
        if group & (group - 1):  # the compiled kernel takes groups of a power of two
            k, v, grouped = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), False
    tail = mask.shape[-1] - total
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, tail)).transpose(0, 1)[None] for x in (q, k, v))
    soft = _soft(softcap) if softcap else None
    if torch.compiler.is_compiling():
        out = flex_attention(q, k, v, score_mod=soft, block_mask=mask, scale=scale, enable_gqa=grouped)
    else:
        attend = _compiled(flex_attention, q.device.type)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")  # on the CPU, on purpose
            out = attend(q, k, v, score_mod=soft, block_mask=mask, scale=scale, enable_gqa=grouped)
    return out[0].transpose(0, 1)[:total]
