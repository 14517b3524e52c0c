"""Variable-length attention for models of transformers: `attn_implementation="packlib_varlen"`.

Boundaries come from the batch, never from a guess: `cu_seq_lens_q` of a flat [1, T] batch, or the 2-D mask of a padded
one, which is unpadded so that padded baselines run on the same kernel. What looks packed but has no boundaries is an
error. Guessing from position ids on the device costs one synchronisation in every layer (18 % of a 7B step) and
transformers' own question whether they restart one in every forward; here a packed batch costs none, a padded one one.

What a model wants of its attention is known in two places: its mask (causal or not, a window, chunks, pads) and the
arguments of the attention call. Eager attention obeys the mask alone, so the mask's wishes are handed on to the kernel,
and what contradicts them is an error. Both functions here and the layers between them can be compiled.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel, masking_utils
from transformers.masking_utils import AttentionMaskInterface

from packlib.attention.cu_seqlens import segment_lengths
from packlib.attention.kernels import KERNELS, resolve_kernel, rows_attention, varlen_attention
from packlib.attention.lines import ISOLATED, current_segments

# Arguments of transformers' attention functions that change the result and that no kernel here has.
_UNSUPPORTED = ("s_aux", "position_bias", "head_mask", "alibi")
_PACKED = (
    "position_ids restart inside a row, but no boundaries reached the attention; pass cu_seq_lens_q and max_length_q "
    "(FlatteningCollator gives them) to a model that hands them to its attention, or one sequence a row"
)
_PACKED_BESIDE_MASK = (
    "position_ids restart inside a row that has an attention_mask; with cu_seq_lens_q and an attention_mask the mask "
    "wins in transformers and boundaries are lost, so packed rows have none (FlatteningCollator makes none)"
)
_registered: set[str] = set()  # names of ours, whose masks need no look at position ids
_positions: ContextVar[Tensor | None] = ContextVar("position ids of the mask that is being made", default=None)


def register_attention(kernel: str = "auto", name: str = "packlib_varlen") -> str:
    """Make `attn_implementation=name` known to transformers, running `kernel`; returns `name`.

    Takes batches of three kinds: flat [1, T] with `cu_seq_lens_q` and `max_length_q` (what `FlatteningCollator`
    returns), padded [B, T] with a 2-D attention_mask, and plain [B, T], one sequence a row. The forward raises
    ValueError if a batch looks packed (position ids restart) but has no boundaries, has boundaries and a mask, or asks
    for what there is no kernel for: dropout, sinks, decoding from a cache, masks of the model's own, chunks shorter
    than a segment, pads that a router's loss would count, replicas of DataParallel; and for models whose attention
    never calls what is registered here. `name` must not contain "flash": transformers takes such names for kernels of
    its Hub.

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
    _registered.add(name)
    _leave_positions_alone()
    _refuse_models_that_never_ask()
    return name


def is_registered(name: str | None) -> bool:
    """Whether `attn_implementation=name` is one of `register_attention`'s."""
    return name in _registered


class _Request(NamedTuple):
    """What a model's mask asks for, and what its forward does that a compiled layer cannot see.

    window: as in `varlen_attention`. chunk: longest segment that its chunks allow. routed: whether router logits are
    collected, from which a load-balancing loss is made.
    """

    causal: bool = True
    window: int | None = None
    chunk: int | None = None
    routed: bool = False

    def encode(self, layout: Tensor) -> Tensor:
        """`layout` [n] as [1, code, n, 1] without copying: shapes, unlike attributes, reach compiled layers.

        Of four dimensions, for models that cut masks to their keys (the last one) or to the queries of the logits that
        they keep: all of them in training.
        """
        size = self.window or self.chunk or 0
        kind = 2 if self.chunk else int(self.causal)
        mask = layout[None, None, :, None].expand(1, 1 + 6 * size + 2 * kind + self.routed, -1, 1)
        if "torch._dynamo" in sys.modules:
            torch._dynamo.mark_static(mask, 1)  # a number, not a size that varies
        return mask

    @classmethod
    def decode(cls, mask: Tensor) -> _Request:
        code = mask.shape[1] - 1
        size, kind = code // 6, code % 6 // 2  # divmod is not traced
        routed = bool(code % 2)
        if kind == 2:
            return cls(chunk=size, routed=routed)
        if kind == 1:  # a comparison of sizes is no bool where it is traced
            return cls(True, size or None, routed=routed)
        return cls(False, size or None, routed=routed)


def _mask(
    batch_size: int,
    q_length: int,
    *args: Any,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: Any = None,
    device: torch.device | None = None,
    **kwargs: Any,
) -> Tensor:
    """Mask function for transformers: what the mask asks for, and where real tokens are, once a forward.

    Returns int64 [1, code, n, 1]: `code` is a `_Request`; n = B + 1 `cu_seqlens` of rows without a mask, or these and
    the places of the real tokens in B · T.
    """
    name = type(config).__name__
    if use_vmap or getattr(mask_function, "__qualname__", "").startswith("or_masks"):
        raise ValueError(
            f"{name}'s model adds a mask of its own, which packlib_varlen would drop; use sdpa or flex_attention"
        )
    chunk = local_size if local_size and local_size == getattr(config, "attention_chunk_size", None) else None
    causal = "allow_is_bidirectional_skip" not in kwargs
    # A two-sided window leaves its own token out.
    window = None if chunk or not local_size else local_size + (not causal)
    positions = None if torch.compiler.is_compiling() else _positions.get()
    if attention_mask is None:
        layout = torch.arange(0, (batch_size + 1) * q_length, q_length, device=device)
    else:
        layout = _real_tokens(attention_mask, positions, batch_size, q_length)
    mask = _Request(causal, window, chunk, _collects_router_logits(config)).encode(layout)
    if attention_mask is None and positions is not None:
        mask._packlib_positions = positions  # type: ignore[attr-defined]  # looked at if no boundaries come
    return mask


def _real_tokens(mask: Tensor, position_ids: Tensor | None, batch: int, length: int) -> Tensor:
    """`cu_seqlens` of the real tokens of a padded batch, then their places in B · T: int64 [B + 1 + real tokens]."""
    if mask.shape != (batch, length):
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; expected [B, T] = {(batch, length)}")
    real = mask.bool().cpu()
    neighbours = real[:, 1:] & real[:, :-1]
    if position_ids is not None and position_ids.ndim == 2 and ((position_ids.cpu().diff() != 1) & neighbours).any():
        raise ValueError(_PACKED_BESIDE_MASK)
    lengths = real.sum(1)
    if (broken := neighbours.sum(1) < lengths - 1).any():
        row = int(broken.nonzero()[0])
        raise ValueError(f"attention_mask[{row}] has zeros between its ones; expected padding at the ends")
    places = real.flatten().nonzero()[:, 0]
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0), places]).to(mask.device)


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
    pad_tail: bool = False,
    **kwargs: Any,
) -> Tensor:
    """query [B, H, T, D], key and value [B, Hkv, T, D] -> [B, T, H, D]."""
    batch, _, length, _ = query.shape
    # 1. Refuse what no kernel does.
    if dropout:
        raise ValueError(f"dropout = {dropout}: no varlen kernel here has it; set the config's attention dropout to 0")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} passes {name}, which packlib_varlen would drop; use eager attention"
            )
    if key.shape[2] != length:
        raise ValueError(
            f"{type(module).__name__} has {length} queries but {key.shape[2]} keys: packlib_varlen is for training, "
            "without a cache and without attention to other tokens; generate after set_attn_implementation('sdpa')"
        )
    # 2. What the mask asks for, and what the call says.
    routed = attention_mask is None and _collects_router_logits(getattr(module, "config", None))
    request = _Request(_is_causal(module, is_causal), sliding_window, routed=routed)
    places = query.new_empty(0)
    if attention_mask is not None and attention_mask.shape[3:] == (1,) and attention_mask.dtype == torch.int64:
        request, places = _Request.decode(attention_mask), attention_mask[0, 0, batch + 1 :, 0]
    elif attention_mask is not None:
        raise ValueError(
            f"{type(module).__name__} makes a mask of its own, of shape {tuple(attention_mask.shape)}, which "
            "packlib_varlen would drop; use sdpa or eager attention"
        )
    if pad_tail and request.routed:
        raise ValueError(
            f"the batch ends in pads, which the router loss of {type(module).__name__}'s model would count; collate "
            "without pad_to_multiple_of, or set output_router_logits = False"
        )
    if sliding_window is not None and sliding_window != request.window:
        raise ValueError(
            f"{type(module).__name__} attends in a window of {sliding_window} tokens, but its mask has a window of "
            f"{request.window}; expected them to agree"
        )
    # 3. Where segments are.
    if cu_seq_lens_q is None:
        if attention_mask is None and position_ids is None and request.causal:
            raise ValueError(
                f"{type(module).__name__}'s model makes no mask where it is given none, and hands neither "
                "cu_seq_lens_q nor position_ids to its attention: whether the row is packed cannot be seen; expected "
                "rows that are not packed and an attention_mask, or sdpa"
            )
        _refuse_restart(attention_mask, position_ids, len(places) > 0)
        cu_seqlens, max_seqlen = _rows(attention_mask, batch, length, query.device), length
    elif len(places):
        raise ValueError(
            f"{type(module).__name__} got cu_seq_lens_q and an attention_mask (some models make one where none is "
            "given); expected no mask beside boundaries"
        )
    elif batch != 1:
        raise ValueError(f"cu_seq_lens_q with {batch} rows; expected one flat row [1, T]")
    elif getattr(module, "_is_replica", False):
        raise ValueError(
            "cu_seq_lens_q in a replica of DataParallel, which gives every GPU a piece of the boundaries; start one "
            "process a GPU (accelerate launch, torchrun), or show the program one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    elif cu_seq_lens_q.numel() < 2:
        raise ValueError(
            f"cu_seq_lens_q has {cu_seq_lens_q.numel()} entry: accelerate's dispatcher cuts every tensor of a batch of "
            'an iterable data set to its rows; pass accelerator_config={"dispatch_batches": False} to the trainer'
        )
    else:
        cu_seqlens = cu_seq_lens_q
        max_seqlen = max(segment_lengths(cu_seqlens)) if max_length_q is None else max_length_q
    if request.chunk and max_seqlen > request.chunk:
        raise ValueError(
            f"a segment of {max_seqlen} tokens exceeds attention_chunk_size = {request.chunk}; no kernel has chunks"
        )
    # 4. Flatten, attend, lay out again.
    dtype = value.dtype
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings leave q and k in float32
        dtype = torch.get_autocast_dtype(query.device.type)
    even = cu_seq_lens_q is None and not len(places) and not softcap
    if even and resolve_kernel(kernel, query.device, dtype) == "sdpa":  # rows of one length need no boundaries
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        rows = (x.to(dtype) for x in (query, key, value))
        out = rows_attention(*rows, causal=request.causal, window=request.window, scale=scale)
        return _poisoned(out.transpose(1, 2).contiguous(), position_ids)
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query, key, value))
    padded = len(places) not in (0, batch * length)
    if padded:
        q, k, v = (x[places] for x in (q, k, v))
    out = varlen_attention(
        q,
        k,
        v,
        cu_seqlens,
        max_seqlen,
        causal=request.causal,
        window=request.window,
        scale=scaling,
        softcap=softcap,
        kernel=kernel,
    )
    if padded:
        out = out.new_zeros(batch * length, *out.shape[1:]).index_copy(0, places, out)
    elif cu_seq_lens_q is None:
        out = _poisoned(out, position_ids)
    return out.unflatten(0, (batch, length)).contiguous()


def _is_causal(module: nn.Module, told: bool | None) -> bool:
    return told if told is not None else getattr(module, "is_causal", True)


def _rows(mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """`cu_seqlens` int32 [B + 1] of a batch without boundaries; kept on the mask, so that layers share its lengths."""
    if mask is None:
        return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
    if torch.compiler.is_compiling():
        return mask[0, 0, : batch + 1, 0].int()
    rows = getattr(mask, "_packlib_rows", None)
    if rows is None:
        rows = mask._packlib_rows = mask[0, 0, : batch + 1, 0].int().to(device)  # type: ignore[attr-defined]
    return rows


def _refuse_restart(mask: Tensor | None, position_ids: Tensor | None, masked: bool) -> None:
    """Raise if position ids restart, in a batch without boundaries. Asked once a batch, not where it is compiled.

    masked: whether it has pads; these were looked at when the mask was made.
    """
    if torch.compiler.is_compiling():
        return  # `_poisoned` takes care
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return  # the same forward ran, and was asked, before it is captured
    positions = getattr(mask, "_packlib_positions", None if masked else position_ids)
    if positions is None or positions.ndim != 2 or getattr(positions, "_packlib_one_by_one", False):
        return
    if (positions.diff() != 1).any():
        raise ValueError(_PACKED)
    positions._packlib_one_by_one = True  # type: ignore[union-attr]


def _poisoned(out: Tensor, position_ids: Tensor | None) -> Tensor:
    """Of a compiled layer without boundaries: NaN if position ids restart, for nothing can be raised inside a graph."""
    if not torch.compiler.is_compiling() or position_ids is None or position_ids.ndim != 2:
        return out
    return out.masked_fill((position_ids.diff() != 1).any(), torch.nan)


def _collects_router_logits(config: Any) -> bool:
    """Whether this forward collects router logits. Asked where a mask is made: compiled layers see no context variable.

    A mask of its own tells compiled layers, which are compiled once for either answer.
    """
    if getattr(config, "output_router_logits", False):
        return True
    return _collector_has_router_logits()


@torch.compiler.assume_constant_result  # where a whole model is compiled, its own argument decides, and is guarded
def _collector_has_router_logits() -> bool:
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return False
    return "router_logits" in (_active_collector.get() or {})


def _leave_positions_alone() -> None:
    """Let transformers not look at position ids when it makes a mask for an attention of ours.

    It asks the device whether they restart, once for every mask of every forward; the answer is not needed where
    boundaries are given, and `_refuse_restart` asks where they are not.
    """
    original = masking_utils._preprocess_mask_arguments
    if hasattr(original, "_packlib_original"):
        return
    signature = inspect.signature(original)
    if not {"config", "position_ids"} <= signature.parameters.keys():
        return  # another transformers: it asks, which costs time and nothing else

    @functools.wraps(original)
    def preprocess(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        if bound.arguments["config"]._attn_implementation not in _registered:
            return original(*args, **kwargs)
        _positions.set(bound.arguments["position_ids"])
        bound.arguments["position_ids"] = None
        return original(*bound.args, **bound.kwargs)

    preprocess._packlib_original = original  # type: ignore[attr-defined]
    masking_utils._preprocess_mask_arguments = preprocess


def _refuse_models_that_never_ask() -> None:
    """Let transformers refuse an attention of ours for models whose own code never calls what is registered.

    It would take the name without a word (`from_config`) or with a warning (`set_attn_implementation`), and go on with
    the model's own attention, which knows no boundaries; some of them are not even causal without a mask. The same for
    models that transformers marks as unfit for flash-attn, which has no masks either: they choose the tokens that
    attention sees (indexers), or add to its scores. Chunks are the exception: the forward looks at their size.
    """
    methods = "_check_and_adjust_attn_implementation", "get_correct_attn_implementation", "set_attn_implementation"
    for method in methods:
        original = getattr(PreTrainedModel, method, None)
        if original is not None and not hasattr(original, "_packlib_original"):
            setattr(PreTrainedModel, method, _asking_first(original))


def _asking_first(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def ask(self: PreTrainedModel, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(attn_implementation, str) or attn_implementation not in _registered:
            return original(self, attn_implementation, *args, **kwargs)
        name = type(self).__name__
        if not self._can_set_attn_implementation():
            raise ValueError(f"{name} computes attention by itself and never calls {attn_implementation!r}")
        attends = self._supports_sdpa or self._supports_attention_backend or not self._is_stateful  # not Mamba
        chunks = hasattr(getattr(self.config, "text_config", self.config), "attention_chunk_size")
        if attends and not self._supports_flash_attn and not chunks:
            raise ValueError(
                f"{name} needs masks of its own, which {attn_implementation!r} would drop (transformers: no flash "
                "attention for this model); use sdpa or eager attention"
            )
        if carries_state(self) and _refuse_mixers not in self._forward_pre_hooks.values():
            self.register_forward_pre_hook(_refuse_mixers, with_kwargs=True)
        if original.__name__ == "get_correct_attn_implementation":
            return attn_implementation  # transformers would take a name with "sdpa" in it for PyTorch's
        return original(self, attn_implementation, *args, **kwargs)

    ask._packlib_original = original  # type: ignore[attr-defined]
    return ask


def carries_state(model: PreTrainedModel) -> bool:
    """Whether something other than attention carries tokens' values on, by what transformers says of the model."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return bool(model._is_stateful) or not {"linear_attention", "conv"}.isdisjoint(kinds)


def _refuse_mixers(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a forward: raise if the batch is packed and the mixers of the model know no boundaries."""
    if vars(model).get(ISOLATED) or model.config._attn_implementation not in _registered:
        return
    packed, positions = kwargs.get("cu_seq_lens_q") is not None, kwargs.get("position_ids")
    if not packed and positions is not None and positions.ndim == 2 and kwargs.get("attention_mask") is None:
        packed = bool((positions.diff() != 1).any())
    if packed and current_segments() is None:
        raise ValueError(
            f"{type(model).__name__} carries values from token to token in layers other than attention, and the batch "
            "is packed; call packlib.attention.isolate_mixers(model) first, with or without kernels that take seq_idx"
        )
