"""Variable-length attention for models of transformers: `attn_implementation="packlib_varlen"`.

Boundaries come from the batch, never from a guess: `cu_seq_lens_q` of a flat [1, T] batch, or the 2-D mask of a padded one,
which is unpadded so that padded baselines run on the same kernel. What looks packed but has no boundaries is an error. Guessing
from position ids on the device costs one synchronisation in every layer (18 % of a 7B step); here a packed batch costs none,
a padded one one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from packlib.attention.cu_seqlens import segment_lengths, uniform_segments
from packlib.attention.flash_stand_in import flash_stand_in
from packlib.attention.kernels import KERNELS, kernel_table, resolve_kernel, varlen_attention

__all__ = ["KERNELS", "flash_stand_in", "kernel_table", "register_attention", "resolve_kernel", "varlen_attention"]

# Arguments of transformers' attention functions that change the result and that no kernel here has.
_UNSUPPORTED = ("s_aux", "position_bias", "head_mask", "alibi")


@dataclass(frozen=True)
class _Layout:
    """Where the real tokens of a padded batch are: `index` int64 [real tokens] into B · T (None: all), `cu_seqlens`, `max_seqlen`."""

    index: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int


def register_attention(kernel: str = "auto", name: str = "packlib_varlen") -> str:
    """Make `attn_implementation=name` known to transformers, running `kernel`; returns `name`.

    Takes batches of three kinds: flat [1, T] with `cu_seq_lens_q` and `max_length_q` (what `FlatteningCollator` returns), padded
    [B, T] with a 2-D attention_mask, and plain [B, T], one sequence a row. The forward raises ValueError if a batch looks packed
    (position ids restart) but has no boundaries, has boundaries and a mask, or asks for what there is no kernel for: dropout,
    sinks, decoding from a cache, masks of the model's own. `name` must not contain "flash": transformers takes such names for
    kernels of its Hub.

    >>> register_attention("sdpa", "packlib_example")
    'packlib_example'
    """
    if "flash" in name:
        raise ValueError(f'name = {name!r}; names with "flash" are taken for Hub kernels by transformers')
    if kernel != "auto" and kernel not in KERNELS:
        raise ValueError(f"kernel = {kernel!r}; known kernels: auto, {', '.join(KERNELS)}")

    def attend(module: nn.Module, *qkv_and_mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return _forward(kernel, module, *qkv_and_mask, **kwargs), None

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, _mask)
    return name


def _mask(
    batch_size: int,
    q_length: int,
    *args: Any,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """Mask function for transformers: a 2-D mask stays as it is. An empty one says that transformers saw position ids restart."""
    name = type(config).__name__
    if use_vmap:
        raise ValueError(
            f"{name}'s model adds a mask of its own, which packlib_varlen would drop; use sdpa or flex_attention"
        )
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and q_length > chunk:
        raise ValueError(
            f"{name}: rows of {q_length} tokens exceed attention_chunk_size = {chunk}; there is no kernel for chunks"
        )
    if attention_mask is not None or allow_is_causal_skip or allow_is_bidirectional_skip:
        return attention_mask
    return torch.empty(batch_size, 0, dtype=torch.bool)


def _forward(
    kernel: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """query [B, H, T, D], key and value [B, Hkv, T, D] -> [B, T, H, D]."""
    batch, _, length, _ = query.shape
    if dropout:
        raise ValueError(f"dropout = {dropout}: no varlen kernel here has it; set the config's attention dropout to 0")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} passes {name}, which packlib_varlen would drop; use eager attention"
            )
    if key.shape[2] != length:
        raise ValueError(
            f"{length} queries but {key.shape[2]} keys: packlib_varlen is for training; generate with sdpa"
        )
    looks_packed = attention_mask is not None and attention_mask.shape[-1] == 0
    if cu_seq_lens_q is None:
        if looks_packed:
            raise ValueError(_PACKED)
        layout = _layout(attention_mask, position_ids, batch, length, query.device)
    elif attention_mask is not None and not looks_packed:
        raise ValueError("the batch has cu_seq_lens_q and an attention_mask; expected no mask beside boundaries")
    elif batch != 1:
        raise ValueError(f"cu_seq_lens_q with {batch} rows; expected one flat row [1, T]")
    else:
        longest = max(segment_lengths(cu_seq_lens_q)) if max_length_q is None else int(max_length_q)
        layout = _Layout(None, cu_seq_lens_q, longest)
    dtype = value.dtype
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings leave q and k in float32
        dtype = torch.get_autocast_dtype(query.device.type)
    flat = [x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query, key, value)]
    if layout.index is not None:
        flat = [x[layout.index] for x in flat]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    options = {"causal": causal, "window": sliding_window, "scale": scaling, "softcap": softcap, "kernel": kernel}
    out = varlen_attention(*flat, layout.cu_seqlens, layout.max_seqlen, **options)
    if layout.index is not None:
        out = out.new_zeros(batch * length, *out.shape[1:]).index_copy(0, layout.index, out)
    return out.unflatten(0, (batch, length))


_PACKED = (
    "position_ids restart inside a row, but no boundaries reached the attention; pass cu_seq_lens_q and max_length_q "
    "(FlatteningCollator gives them) to a model that hands them to its attention, or one sequence a row"
)


def _layout(mask: Tensor | None, position_ids: Tensor | None, batch: int, length: int, device: torch.device) -> _Layout:
    """Layout of a batch without boundaries, found in its first layer and kept on the tensor that came with the batch."""
    carrier = mask if mask is not None else position_ids
    if carrier is None:
        return _Layout(None, uniform_segments(batch, length, device), length)
    if (known := getattr(carrier, "_packlib_layout", None)) is None:
        known = carrier._packlib_layout = _find_layout(mask, position_ids, batch, length, device)
    return known


def _find_layout(
    mask: Tensor | None, position_ids: Tensor | None, batch: int, length: int, device: torch.device
) -> _Layout:
    if mask is not None and mask.shape != (batch, length):
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; expected [B, T] = {(batch, length)}")
    real = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask.bool().cpu()
    neighbours = real[:, 1:] & real[:, :-1]
    if position_ids is not None and position_ids.ndim == 2 and ((position_ids.cpu().diff() != 1) & neighbours).any():
        raise ValueError(_PACKED)
    lengths = real.sum(1)
    if (broken := neighbours.sum(1) < lengths - 1).any():
        raise ValueError(
            f"attention_mask[{int(broken.nonzero()[0])}] has zeros between its ones; expected padding at the ends"
        )
    if real.all():
        return _Layout(None, uniform_segments(batch, length, device), length)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    return _Layout(real.flatten().nonzero()[:, 0].to(device), cu_seqlens.to(device), int(lengths.max()))
