"""Loss weights under packing: the same sum as unpacked training, whatever shares the row.

A mean over a row's tokens weighs a long example more than a short one; a mean of per-example means does not. Packing changes neither
as long as weights belong to tokens and the denominator to the whole optimiser step: all its micro-batches and all its ranks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from packlib.collators import IGNORE_INDEX

WEIGHTINGS = ("per_token", "per_example")


def token_weights(
    labels: Tensor, cu_seqlens: Tensor | None = None, weighting: str = "per_token"
) -> tuple[Tensor, Tensor]:
    """Weight of each label, and how much this batch adds to the denominator of the step.

    Args:
        labels: int64 [B, T], -100 where there is no loss. As a collator makes them: the first of every segment is -100.
        cu_seqlens: int32 [segments + 1], the segments of the batch read row by row; None: each row is one.
        weighting: `per_token`: 1 for each loss token. `per_example`: 1 / (loss tokens of its segment), so that each segment weighs 1.

    Returns weights float32 [B, T] (0 at -100) and their sum: loss tokens, or segments with at least one. No synchronisation.
    Raises ValueError for an unknown weighting.

    >>> labels = torch.tensor([[-100, 5, 6, -100, 7]])
    >>> cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    >>> [x.tolist() for x in token_weights(labels, cu_seqlens, "per_example")]
    [[[0.0, 0.5, 0.5, 0.0, 1.0]], 2.0]
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting = {weighting!r}; expected one of {', '.join(WEIGHTINGS)}")
    weights = (labels != IGNORE_INDEX).float()
    if weighting == "per_example":
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
        logits: [B, T, V]; position t predicts label t + 1, inside a row. The first label of each segment is -100, so no example
            predicts the next one's start.
        labels: int64 [B, T]. weights: float [B, T], of `token_weights`.
        denominator: sum of the weights over the whole optimiser step (every micro-batch, every rank), not over this batch alone.

    >>> logits, labels = torch.zeros(1, 3, 4), torch.tensor([[-100, 1, 2]])
    >>> weights, denominator = token_weights(labels)
    >>> round(weighted_loss(logits, labels, weights, denominator).item(), 4)  # log 4
    1.3863
    """
    targets, weights = labels[:, 1:].flatten(), weights[:, 1:].flatten()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORE_INDEX, reduction="none")
    return (losses * weights).sum() / denominator
