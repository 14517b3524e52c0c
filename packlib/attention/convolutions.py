"""Causal convolutions that stop at boundaries, without a compiled kernel and without lines.

Where the package `causal_conv1d` is missing, transformers convolves the whole row: a token sees the last ones of the
example before its own. Inside a short convolution (3 or 4 tokens) that is a product for each step back, and a product
that crosses a boundary can be left out: no slots are added, shapes do not depend on the boundaries, and a compiled
layer has it in one kernel with what is around it. So LFM2 needs no lines at all, and linear attention none where
flash-linear-attention brings a kernel that takes `cu_seqlens`.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

NAME = "causal_conv1d_fn"  # what transformers' models call, a global of each modelling file


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor, activation: str | None = None
) -> Tensor:
    """A depthwise causal convolution of each segment by itself.

    x: [B, C, T]. weight: [C, K]. bias: [C]. seq_idx: int32 [B, T], the number of each token's segment. Returns
    [B, C, T] in `x.dtype`; 4 K small kernels where it is not compiled. Source: `causal_conv1d_fn` of the package of
    that name, of which it has arguments and results.

    >>> import torch
    >>> row, ones = torch.tensor([[[1.0, 2, 3, 4]]]), torch.ones(1, 2)
    >>> causal_conv1d(row, ones, None, torch.tensor([[0, 0, 1, 1]])).tolist()
    [[[1.0, 3.0, 3.0, 7.0]]]
    """
    weight = weight[..., None]  # [C, K, 1]
    given = x.to(weight.dtype)
    out = given * weight[:, -1]
    for back in range(1, min(weight.shape[1], x.shape[-1] + 1)):
        within = seq_idx[:, None, back:] == seq_idx[:, None, :-back]
        earlier = nn.functional.pad(given[..., :-back].where(within, 0.0), (back, 0))
        out = out + earlier * weight[:, -1 - back]
    if bias is not None:
        out = out + bias[:, None]
    return (out if activation is None else ACT2FN[activation](out)).to(x.dtype)


def hand_over_boundaries(model: nn.Module) -> dict[str, str]:
    """Let the convolutions that `model` computes by `causal_conv1d_fn` take `seq_idx`; name -> class of who has one.

    In the modelling file of each, for every model of its process; a call without `seq_idx` is what it was. Nothing is
    done where the package `causal_conv1d` is installed, which takes boundaries by itself.
    """
    if importlib.util.find_spec("causal_conv1d") is not None:
        return {}
    found = {}
    for name, module in model.named_modules():
        if any(isinstance(child, nn.Conv1d) for child in module.children()):
            file = sys.modules[type(module).__module__]
            if hasattr(file, NAME):
                setattr(file, NAME, _with_boundaries(getattr(file, NAME)))
                found[name] = type(module).__name__
    return found


def _with_boundaries(original: Any) -> Any:
    if hasattr(original, "_packlib_original"):
        return original

    @functools.wraps(original)
    def convolve(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if seq_idx is None:
            return original(hidden_states, weight, bias, activation=activation, **kwargs)
        return causal_conv1d(hidden_states, weight, bias, seq_idx, activation)

    convolve._packlib_original = original  # type: ignore[attr-defined]
    return convolve
