"""Attention inside each segment of a packed row, over interchangeable kernels with one signature.

A packed row is [T, H, D] with boundaries `cu_seqlens`; a token sees only its own segment. `reference` is the slow
obvious version; the others are held against it. What they trade: `reference` builds T × T scores; `sdpa` makes one call
per segment, so work is Σ n² and no mask is ever built (what makes packing pay on a CPU), at one launch per segment on a
GPU; `flash_attn`, `flash_attn_4` and `torch_varlen` are one launch, half precision only; `flex` compiles for each
bucket of T and builds a block mask per batch. The caller chooses; `auto` picks once and says so. Only `sdpa` needs
lengths on the host: one synchronisation a batch, remembered on the tensor. The others need none.

All but `flash_attn_4`, which ends a graph, can be traced by `torch.compile(fullgraph=True)`: boundaries are data of a
graph, not part of it, so that other boundaries of the same shape compile nothing. There `sdpa` is one opaque operator:
it loops over segments, and its backward computes their scores once more.
"""

import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlib.attention import flex
from packlib.attention.cu_seqlens import segment_lengths

logger = logging.getLogger(__name__)


def _constant_when_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.assume_constant_result`, which would import the compiler here and now."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class Call:
    """What a kernel is asked for; q, k, v apart. `window` counts visible tokens to the left, itself included."""

    cu_seqlens: Tensor
    max_seqlen: int
    causal: bool = True
    window: int | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def sides(self) -> tuple[int, int]:
        """Flash convention: visible tokens to the left and right, -1 for all."""
        left = -1 if self.window is None else self.window - 1
        return left, 0 if self.causal else left

    def visible(self, q: Tensor, k: Tensor) -> Tensor:
        """Whether position q sees position k of the same segment (broadcast)."""
        distance = q - k
        seen = distance >= 0 if self.causal else distance == distance
        return seen if self.window is None else seen & (distance.abs() < self.window)


def _reference(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q.to(dtype), k.to(dtype).repeat_interleave(group, 1)) * call.scale
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    position = torch.arange(len(q), device=q.device)
    segment = torch.searchsorted(call.cu_seqlens, position, right=True)
    seen = (segment[:, None] == segment) & call.visible(position[:, None], position)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.to(dtype).repeat_interleave(group, 1)).to(q.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    if torch.compiler.is_compiling():
        return _sdpa_operator(q, k, v, call.cu_seqlens, call.causal, call.window or 0, call.scale)
    lengths = [n for n in segment_lengths(call.cu_seqlens) if n]
    if len(set(lengths)) == 1:
        q, k, v = (x.unflatten(0, (len(lengths), lengths[0])).transpose(1, 2) for x in (q, k, v))
        return _sdpa_segments(q, k, v, call).transpose(1, 2).flatten(0, 1)
    # split and cat are one autograd node each; writing into slices would cost one node per segment
    q_pieces, k_pieces, v_pieces = (x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v))
    found = (_sdpa_segments(*piece, call=call) for piece in zip(q_pieces, k_pieces, v_pieces))
    return torch.cat([out.transpose(1, 2)[0] for out in found])


@torch.library.custom_op("packlib::sdpa_segments", mutates_args=())
def _sdpa_operator(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, window: int, scale: float
) -> Tensor:
    """`_sdpa` as one operator of a graph. window: 0 for all."""
    return _sdpa(q, k, v, Call(cu_seqlens, 0, causal, window or None, scale)).contiguous()


@_sdpa_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, window: int, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


@torch.library.custom_op("packlib::sdpa_segments_backward", mutates_args=())
def _sdpa_operator_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """By hand: an operator runs below autograd. Scores of one segment at a time, [H, n, n]."""
    call, group = Call(cu_seqlens, 0, causal, window or None, scale), q.shape[1] // k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    found = []
    lengths = [n for n in segment_lengths(cu_seqlens) if n]
    for piece in zip(*(x.split(lengths) for x in (grad, q, k, v))):
        dout, query, key, value = (x.transpose(0, 1).to(dtype) for x in piece)  # [H or Hkv, n, D]
        key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
        position = torch.arange(query.shape[1], device=q.device)
        hidden = ~call.visible(position[:, None], position)
        weights = (query @ key.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        dweights = dout @ value.mT
        dscores = weights * (dweights - (dweights * weights).sum(-1, keepdim=True)) * scale
        dkv = (x.unflatten(0, (-1, group)).sum(1) for x in (dscores.mT @ query, weights.mT @ dout))
        found.append([x.transpose(0, 1) for x in (dscores @ key, *dkv)])
    dq, dk, dv = (torch.cat(pieces).to(q.dtype) for pieces in zip(*found))
    return dq, dk, dv


@_sdpa_operator_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[4:]


def _sdpa_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *_sdpa_operator_backward(grad, *ctx.saved_tensors, *ctx.rest), None, None, None, None


_sdpa_operator.register_autograd(_sdpa_gradient, setup_context=_keep_inputs)


def _sdpa_segments(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """[segments, H, n, D] -> [segments, H, n, Dv], segments of one length."""
    scale, grouped = call.scale, q.shape[1] != k.shape[1]
    n, window = q.shape[2], call.window
    if window is None or window >= n:
        return F.scaled_dot_product_attention(q, k, v, is_causal=call.causal, scale=scale, enable_gqa=grouped)
    position, out = torch.arange(n, device=q.device), []
    # Blocks of queries with the keys that their window reaches: no mask above window × 3 window.
    for start in range(0, n, window):
        stop = min(start + window, n)
        first, last = max(0, start - window + 1), stop if call.causal else min(n, stop + window - 1)
        mask = call.visible(position[start:stop, None], position[first:last])
        block = q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last]
        out.append(F.scaled_dot_product_attention(*block, attn_mask=mask, scale=scale, enable_gqa=grouped))
    return torch.cat(out, 2)


def _flex(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    key = call.causal, call.window
    mask = flex.document_mask(call.cu_seqlens, flex.bucket(len(q)), call.visible, key)
    return flex.flex_varlen(q, k, v, mask, call.scale, call.softcap)


_Run = Callable[[Tensor, Tensor, Tensor, Call], Tensor]


def _same_head_dim(kernel: _Run) -> _Run:
    """Flash kernels want one head dimension: pad values up to the queries' (MLA) and crop the result."""

    def padded(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        missing = q.shape[-1] - v.shape[-1]
        return kernel(q, k, F.pad(v, (0, missing)), call)[..., : v.shape[-1]] if missing else kernel(q, k, v, call)

    return padded


def _import_varlen_attn() -> tuple[Callable[..., Any] | None, tuple[str, ...]]:
    """PyTorch's varlen kernel and its options; None where PyTorch is older than 2.10.

    `is_causal` in 2.10, `window_size` from 2.11, `enable_gqa` from 2.12 (2.11 needs no word for it).
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, ()
    return varlen_attn, tuple(inspect.signature(varlen_attn).parameters)


_VARLEN_ATTN, _VARLEN_OPTIONS = _import_varlen_attn()


@_same_head_dim
def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    known = _VARLEN_OPTIONS
    options: dict[str, object] = {}
    if "window_size" in known:
        options["window_size"] = call.sides  # the default is (-1, -1): not causal
    elif call.window is not None:
        raise NotImplementedError(
            f"torch_varlen of PyTorch {torch.__version__} has no window (2.11 has); use flex or sdpa"
        )
    else:
        options["is_causal"] = call.causal
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        elif "window_size" not in known:  # 2.11 has no option and takes fewer keys than queries as they are
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    if "scale" in known:
        options["scale"] = call.scale
    else:
        q = q * (call.scale * q.shape[-1] ** 0.5)
    boundaries = (call.cu_seqlens, call.cu_seqlens, call.max_seqlen, call.max_seqlen)
    assert _VARLEN_ATTN is not None  # `_has_torch_varlen` said so
    return _VARLEN_ATTN(q, k, v, *boundaries, **options)


def _import_flash_attn() -> tuple[Callable[..., Tensor] | None, str]:
    """The package's function, or None and why it cannot be used."""
    try:
        distribution("flash-attn")
    except PackageNotFoundError:
        return None, "the flash-attn package is not installed"
    try:
        return importlib.import_module("flash_attn").flash_attn_varlen_func, ""
    except (ImportError, OSError, AttributeError) as error:  # built for another PyTorch, say
        return None, f"the flash-attn package does not load: {error}"


FLASH_ATTN, _NO_FLASH_ATTN = _import_flash_attn()  # of the installed package (never of `flash_stand_in`)


@_same_head_dim
def _flash_attn(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    boundaries = (call.cu_seqlens, call.cu_seqlens, call.max_seqlen, call.max_seqlen)
    options = {"causal": call.causal, "window_size": call.sides, "softcap": call.softcap or 0.0}
    assert FLASH_ATTN is not None  # `_has_flash_attn` said so
    return FLASH_ATTN(q, k, v, *boundaries, softmax_scale=call.scale, **options)


@cache
def _load_flash_attn_4() -> Callable[..., Any]:
    """The function of the flash-attn-4 package, which brings a compiler and takes seconds to import.

    A compiled graph ends before it and goes on behind it. Raises as the import does.
    """
    distribution("flash-attn-4")
    return torch.compiler.disable(importlib.import_module("flash_attn.cute").flash_attn_varlen_func)


@_same_head_dim
def _flash_attn_4(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """Head dimensions are filled up to multiples of 32, as flash-attn does by itself: 4.0.0b36 fails at 80."""
    missing, width = -q.shape[-1] % 32, q.shape[-1]
    q, k, v = (F.pad(x, (0, missing)) if missing else x for x in (q, k, v))
    out, _ = _load_flash_attn_4()(
        *(q, k, v),
        cu_seqlens_q=call.cu_seqlens,
        cu_seqlens_k=call.cu_seqlens,
        max_seqlen_q=call.max_seqlen,
        max_seqlen_k=call.max_seqlen,
        softmax_scale=call.scale,
        causal=call.causal,
        window_size=tuple(None if side < 0 else side for side in call.sides),
        softcap=call.softcap or 0.0,
    )
    return out[..., :width]


def _half_since(capability: tuple[int, int], generation: str) -> Callable[[torch.device, torch.dtype], str]:
    """What a kernel for half precision lacks, that needs GPUs of a generation."""

    def missing(device: torch.device, dtype: torch.dtype) -> str:
        if device.type != "cuda":
            return f"needs a CUDA device, not {device.type}"
        if not torch.cuda.is_available():
            return "needs a CUDA device, and there is none here"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"needs float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
        needed = f"needs compute capability {'.'.join(map(str, capability))} ({generation}) or later"
        return "" if torch.cuda.get_device_capability(device) >= capability else needed

    return missing


_half_on_ampere, _half_on_hopper = _half_since((8, 0), "Ampere"), _half_since((9, 0), "Hopper")


def _anywhere(device: torch.device, dtype: torch.dtype) -> str:
    return ""


def _has_torch_varlen(device: torch.device, dtype: torch.dtype) -> str:
    return _half_on_ampere(device, dtype) if _VARLEN_ATTN else f"needs PyTorch 2.10, this is {torch.__version__}"


def _has_flash_attn(device: torch.device, dtype: torch.dtype) -> str:
    return _half_on_ampere(device, dtype) if FLASH_ATTN else _NO_FLASH_ATTN


def _has_flash_attn_4(device: torch.device, dtype: torch.dtype) -> str:
    if reason := _half_on_hopper(device, dtype):
        return reason
    try:
        _load_flash_attn_4()
    except PackageNotFoundError:
        return "the flash-attn-4 package is not installed"
    except (ImportError, OSError, AttributeError) as error:
        return f"the flash-attn-4 package does not load (install it after flash-attn, which has an old copy): {error}"
    return ""


@dataclass(frozen=True)
class Kernel:
    """One way to compute varlen attention. `missing(device, dtype)` is "" where it works, else what it lacks."""

    function: _Run
    missing: Callable[[torch.device, torch.dtype], str]
    softcap: bool
    trade: str


# In the order in which `auto` prefers them.
KERNELS: MappingProxyType[str, Kernel] = MappingProxyType(
    {
        "flash_attn": Kernel(_flash_attn, _has_flash_attn, True, "one launch; the flash-attn package"),
        "torch_varlen": Kernel(
            _torch_varlen, _has_torch_varlen, False, "one launch; PyTorch's copy of the flash kernel"
        ),
        "flash_attn_4": Kernel(
            _flash_attn_4, _has_flash_attn_4, True, "one launch; the flash-attn-4 package, compiles at first use"
        ),
        "sdpa": Kernel(_sdpa, _anywhere, False, "one call per segment, no mask; lengths on the host"),
        "flex": Kernel(_flex, _anywhere, True, "compiled; one block mask per batch; on a CPU forward only"),
        "reference": Kernel(_reference, _anywhere, True, "dense T × T scores; the yardstick, also in float64"),
    }
)


def kernel_table(device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> list[dict[str, object]]:
    """Which kernels work on `device` in `dtype`, and why not. Default: the GPU in bfloat16, or the CPU in float32.

    >>> [row["kernel"] for row in kernel_table("cpu") if row["works"]]
    ['sdpa', 'flex', 'reference']
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    reasons = {name: kernel.missing(device, dtype) for name, kernel in KERNELS.items()}
    columns = ("kernel", "works", "why_not", "softcap", "trade")
    return [
        dict(zip(columns, (name, not why, why, KERNELS[name].softcap, KERNELS[name].trade)))
        for name, why in reasons.items()
    ]


@cache
def _resolve(kernel: str, device: torch.device, dtype: torch.dtype) -> str:
    if kernel == "auto":
        kernel = next(name for name, candidate in KERNELS.items() if not candidate.missing(device, dtype))
        logger.info("packlib: kernel %s for %s on %s", kernel, str(dtype).removeprefix("torch."), device)
    if kernel not in KERNELS:
        raise ValueError(f"kernel = {kernel!r}; known kernels: auto, {', '.join(KERNELS)}")
    if reason := KERNELS[kernel].missing(device, dtype):
        working = [name for name, other in KERNELS.items() if not other.missing(device, dtype)]
        raise ValueError(f"kernel {kernel!r} does not work here: {reason}; working here: {', '.join(working)}")
    return kernel


@_constant_when_traced
def resolve_kernel(kernel: str, device: str | torch.device, dtype: torch.dtype) -> str:
    """`kernel` itself, or what "auto" stands for on this device and dtype. ValueError if unknown or without effect."""
    return _resolve(kernel, torch.device(device), dtype)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Attention in which a token sees only its own segment.

    Args:
        query: [T, H, D] floating, all segments end to end.
        key, value: [T, Hkv, D] and [T, Hkv, Dv], same device and dtype; H is a multiple of Hkv (grouped queries).
        cu_seqlens: int32 [segments + 1] on `query.device`, from 0 to T: segment i is `cu_seqlens[i]:cu_seqlens[i + 1]`.
        max_seqlen: length of the longest segment, tokens; an int, so that no kernel has to ask the device.
        causal: a token sees itself and what comes before it; otherwise its whole segment.
        window: tokens visible to the left, the token itself included (as many to the right if not causal); None: all.
        scale: factor on q·k; default D ** -0.5.
        softcap: scores become softcap · tanh(score / softcap), where the kernel has it.
        kernel: a name in KERNELS, or "auto".

    Returns [T, H, Dv] in `query.dtype`. Time O(Σ n²) (`reference`: O(T²)). Raises ValueError for shapes that do not
    fit, an unknown or unavailable kernel, and an option that the kernel does not have.

    >>> q = torch.ones(3, 1, 2); v = torch.tensor([1.0, 3.0, 5.0])[:, None, None]
    >>> varlen_attention(q, q, v, torch.tensor([0, 2, 3], dtype=torch.int32), 2, kernel="sdpa").flatten().tolist()
    [1.0, 2.0, 5.0]
    """
    _check(query, key, value, cu_seqlens, max_seqlen, window)
    name = resolve_kernel(kernel, query.device, query.dtype)
    if softcap and not KERNELS[name].softcap:
        having = [n for n, k in KERNELS.items() if k.softcap and not k.missing(query.device, query.dtype)]
        raise ValueError(f"kernel {name!r} has no softcap (softcap = {softcap}); these here have: {', '.join(having)}")
    if window is not None and window >= max_seqlen:
        window = None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    call = Call(cu_seqlens, max_seqlen, causal, window, scale, softcap or None)
    return KERNELS[name].function(query, key, value, call)


def rows_attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool = True, window: int | None = None, scale: float
) -> Tensor:
    """Attention inside each of B rows of one length, by PyTorch's SDPA without a mask: what `sdpa` does with such rows.

    query [B, H, T, D], key and value [B, Hkv, T, D or Dv] -> [B, H, T, Dv].
    """
    return _sdpa_segments(query, key, value, Call(query.new_empty(0), query.shape[2], causal, window, scale))


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int | None) -> None:
    flat = q.ndim == k.ndim == v.ndim == 3 and len(q) == len(k) == len(v)
    if not flat or k.shape[1] != v.shape[1] or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(
            f"query, key, value have shapes {shapes}; expected [T, H, D], [T, Hkv, D], [T, Hkv, Dv], H = n · Hkv"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"query, key, value have dtypes {q.dtype}, {k.dtype}, {v.dtype}; expected one")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.device != q.device:
        actual = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
        raise ValueError(f"cu_seqlens is {actual}; expected torch.int32 [segments + 1] on {q.device}")
    if not isinstance(max_seqlen, int | torch.SymInt):
        raise ValueError(
            f"max_seqlen is a {type(max_seqlen).__name__}; expected an int: a tensor would synchronise every layer"
        )
    if window is not None and window < 1:
        raise ValueError(f"window = {window}; expected at least 1, or None")
    if len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens has {len(cu_seqlens)} entries; expected where segments begin, and where the last ends"
        )
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        return  # reading values would synchronise, or end the graph; the collator has checked the lengths behind them
    lengths = segment_lengths(cu_seqlens)
    if not lengths or cu_seqlens[0] != 0 or sum(lengths) != len(q) or min(lengths) < 0 or max(lengths) > max_seqlen:
        raise ValueError(
            f"cu_seqlens runs from {cu_seqlens[0]} to {cu_seqlens[-1]}, longest segment {max(lengths, default=0)}; "
            f"expected 0 to T = {len(q)}, never decreasing, none above max_seqlen = {max_seqlen}"
        )
