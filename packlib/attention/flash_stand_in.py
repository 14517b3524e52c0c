"""A stand-in for the flash-attn package, so that transformers' own flash path runs where that package is not installed.

What packing does in practice is decided by transformers' dispatch code: which branch unpads, which one reads position
ids, when boundaries are ignored. Here that code runs unchanged, on a CPU too; only the innermost function is ours.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, modeling_flash_attention_utils
from transformers.integrations import flash_attention

from packlib.attention.cu_seqlens import uniform_segments
from packlib.attention.kernels import varlen_attention


def _flash_functions(kernel: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """`flash_attn_func` and `flash_attn_varlen_func` with flash-attn's signatures, running a kernel of packlib."""

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:
        if dropout_p:
            raise ValueError(
                f"dropout_p = {dropout_p}: no varlen kernel here has it; set the config's attention dropout to 0"
            )
        if q.shape[0] != k.shape[0]:
            raise ValueError(
                f"{q.shape[0]} queries but {k.shape[0]} keys: the flash stand-in is for training, not for a cache"
            )
        window = None if window_size[0] < 0 else window_size[0] + 1
        return varlen_attention(
            q,
            k,
            v,
            cu_seqlens_q,
            int(max_seqlen_q),
            causal=causal,
            window=window,
            scale=softmax_scale,
            softcap=softcap,
            kernel=kernel,
        )

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        rows, length = q.shape[:2]
        boundaries = uniform_segments(rows, length, q.device)
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        out = flash_attn_varlen_func(q, k, v, boundaries, boundaries, length, length, **kwargs)
        return out.unflatten(0, (rows, length))

    return flash_attn_func, flash_attn_varlen_func


def _no_kvcache(*args: Any, **kwargs: Any) -> Tensor:
    raise NotImplementedError("the flash stand-in is for training; it has no paged cache")


def _target_dtype(query: Tensor, module: nn.Module) -> torch.dtype | None:
    try:
        return _transformers_target_dtype(query, module)
    except StopIteration:  # GPT-2's layers are no nn.Linear; flash-attn never gets that far, it takes no float32
        return None


_transformers_target_dtype = flash_attention.get_target_dtype


def is_stand_in() -> bool:
    """Whether the package that transformers takes for flash-attn is the stand-in."""
    return hasattr(sys.modules.get("flash_attn"), "packlib_stand_in")


@contextmanager
def flash_stand_in(kernel: str = "auto") -> Iterator[None]:
    """Let `attn_implementation="flash_attention_2"` run without the flash-attn package, on a kernel of packlib.

    Unpadding, reading of position ids, windows and the models' own flash classes (Falcon's has no other route to a
    varlen kernel) stay transformers' code. Load the model inside the context. Outside it everything is as before; to
    install it for a whole process, enter it on an ExitStack that is never closed.
    """
    utils = modeling_flash_attention_utils
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.__spec__ = ModuleSpec("flash_attn", None)
    dense, varlen = _flash_functions(kernel)
    functions = {"flash_attn_func": dense, "flash_attn_varlen_func": varlen, "flash_attn_with_kvcache": _no_kvcache}
    vars(package).update(functions, packlib_stand_in=True)
    vars(padding).update(pad_input=utils._pad_input, unpad_input=utils._unpad_input)
    yes = mock.Mock(return_value=True)
    replacements: list[Any] = [
        mock.patch.dict(sys.modules, {"flash_attn": package, "flash_attn.bert_padding": padding}),
        mock.patch.dict(utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2], {"general_availability_check": yes}),
        mock.patch.object(utils, "is_flash_attn_2_available", yes),
        mock.patch.object(utils, "_loaded_implementation", None),
        mock.patch.object(PreTrainedModel, "_flash_attn_can_dispatch", yes),
        mock.patch.object(flash_attention, "get_target_dtype", _target_dtype),
    ]
    # Models that were imported before looked for flash-attn then.
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.models.") and "is_flash_attn_available" in vars(module):
            forward = utils._flash_attention_forward
            replacements.append(mock.patch.object(module, "_flash_attention_forward", forward, create=True))
    with ExitStack() as stack:
        for replacement in replacements:
            stack.enter_context(replacement)
        yield
