"""Loss weights under packing: the same sum as unpacked training, whatever shares the row.

A mean over a row's tokens weighs a long example more than a short one; a mean of per-example means does not. Packing
changes neither as long as weights belong to tokens and the denominator to the whole optimiser step: all its
micro-batches and all its ranks.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from packlib.collators import IGNORE_INDEX

WEIGHTINGS = ("per_token", "per_example", "longalign")


def token_weights(
    labels: Tensor, cu_seqlens: Tensor | None = None, weighting: str = "per_token"
) -> tuple[Tensor, Tensor]:
    """Weight of each label, and how much this batch adds to the denominator of the step.

    Args:
        labels: int64 [B, T], -100 where there is no loss. As a collator makes them: the first of every segment is -100.
        cu_seqlens: int32 [segments + 1], the segments of the batch read row by row; None: each row is one.
        weighting: `per_token`: 1 for each loss token. `per_example`: 1 / (loss tokens of its segment), so that each
            segment weighs 1. `longalign`: the same weights, for a denominator that is no step's own: the mean number
            of examples a step (LongAlign, 2401.18058), so that an example weighs as much wherever it was packed.

    Returns weights float32 [B, T] (0 at -100) and their sum: loss tokens, or segments with at least one. No
    synchronisation. Raises ValueError for an unknown weighting.

    >>> labels = torch.tensor([[-100, 5, 6, -100, 7]])
    >>> cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    >>> [x.tolist() for x in token_weights(labels, cu_seqlens, "per_example")]
    [[[0.0, 0.5, 0.5, 0.0, 1.0]], 2.0]
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting = {weighting!r}; expected one of {', '.join(WEIGHTINGS)}")
    weights = (labels != IGNORE_INDEX).float()
    if weighting != "per_token":
        flat = weights.flatten()
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, flat.numel() + 1, labels.shape[-1], device=labels.device)
        position = torch.arange(flat.numel(), device=labels.device)
        segment = torch.searchsorted(cu_seqlens, position, right=True) - 1
        counts = flat.new_zeros(cu_seqlens.numel()).index_add(0, segment, flat)
        weights = (flat / counts[segment].clamp(min=1)).view_as(weights)
    return weights, weights.sum()


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor, denominator: Tensor | float) -> Tensor:
    """Σ weight · cross entropy / denominator, a float32 scalar: the next-token loss of transformers, with weights.

    Args:
        logits: [B, T, V]; position t predicts label t + 1, inside a row. The first label of each segment is -100, so no
            example predicts the next one's start.
        labels: int64 [B, T]. weights: float [B, T], of `token_weights`.
        denominator: sum of the weights over the whole optimiser step (every micro-batch, every rank), not over this
            batch alone.

    >>> logits, labels = torch.zeros(1, 3, 4), torch.tensor([[-100, 1, 2]])
    >>> weights, denominator = token_weights(labels)
    >>> round(weighted_loss(logits, labels, weights, denominator).item(), 4)  # log 4
    1.3863
    """
    targets, weights = labels[:, 1:].flatten(), weights[:, 1:].flatten()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORE_INDEX, reduction="none")
    return (losses * weights).sum() / denominator


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Sum of the next-token losses of hidden states, without keeping logits: a float32 scalar, to be divided.

    Scores CHUNK positions at a time and computes their logits once more in the backward (2 % of a 7B step). Compiled,
    a chunk is one matrix product and one pass over its logits. No synchronisation, so a CUDA graph can hold it.

    Args:
        hidden: [B, T, C]; position t predicts label t + 1, inside a row. weight: [V, C], the output head; bias: [V].
        labels: int64 [B, T], -100 where there is no loss. weights: float [B, T], of `token_weights`; default: all 1.

    >>> hidden, weight, labels = torch.zeros(1, 3, 2), torch.zeros(4, 2), torch.tensor([[-100, 1, 2]])
    >>> round(linear_cross_entropy(hidden, weight, labels).item(), 4)  # 2 log 4
    2.7726
    """
    flat, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    factors = None if weights is None else weights[:, 1:].flatten()
    total = hidden.new_zeros((), dtype=torch.float32)
    for begin in range(0, len(flat), CHUNK):
        part = slice(begin, begin + CHUNK)
        arguments = flat[part], weight, bias, targets[part], None if factors is None else factors[part]
        if len(flat) <= CHUNK:  # its logits are no more than what one chunk takes anyway
            return _chunk_loss(*arguments)
        total = total + checkpoint(_chunk_loss, *arguments, use_reentrant=False, preserve_rng_state=False)
    return total


CHUNK = 4096  # positions scored at once: 0.5 GB of logits in bfloat16 and float32 for a vocabulary of 32,000


def _chunk_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, factors: Tensor | None) -> Tensor:
    return _compiled(_plain_chunk_loss, hidden.device.type)(hidden, weight, bias, targets, factors)


def _plain_chunk_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, factors: Tensor | None
) -> Tensor:
    losses = F.cross_entropy(
        F.linear(hidden, weight, bias).float(), targets, ignore_index=IGNORE_INDEX, reduction="none"
    )
    return losses.sum() if factors is None else (losses * factors).sum()


@functools.cache
def _compiled(function: Callable[..., Tensor], device_type: str) -> Callable[..., Tensor]:
    """On a GPU compiled, for any number of positions; on a CPU as it is."""
    return torch.compile(function, dynamic=True) if device_type == "cuda" else function
