"""What a step must cost at least: the time that the device's measured rates allow for the work that it has to do.

    products:  2 N slots forward and 4 N backward at the matrix rate, or reading the weights (and writing gradients) at
               the copy rate, whichever is longer, for each micro-batch
    attention: its own products for Σ n², at the matrix rate
    optimiser: gradients read for the norm, then weights, gradients and two moments read and all but the gradients
               written, at the copy rate

Where weights are sharded (FSDP2), a rank updates its share of them only, and multiplies with all of them: it gathers
the others' for every forward and again for every backward, and gradients are reduced once a step. That traffic is
named, in bytes; it has no time here, since it runs beside the products and the rate between devices is not measured.

N: parameters that a token is multiplied with, output head included. What a rig adds (launches, computing activations
again, waiting) is not necessary work. The same sum with padding's slots is padding's limit, and their ratio is what
packing can gain on a rig without losses: less than the waste, where a step has costs that no batching removes.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from packlib.lab import models


@dataclass(frozen=True)
class Rates:
    """What a device can do, measured in the process of the run: FLOP/s of a large product, bytes/s of a large copy."""

    matmul_flops: float
    copy_bytes: float


@dataclass(frozen=True)
class StepWork:
    """The work of a mean optimiser step on one rank.

    micro_batches, slots (all of them, pads too), tokens (real ones), pairs: Σ n² over what attends to each other, as
    the layout has it (padded: lines as long as the longest).
    """

    micro_batches: float
    slots: float
    tokens: float
    pairs: float


@dataclass(frozen=True)
class StepLimit:
    """Least seconds of a step, by cause, and the real tokens/s that they allow.

    gathered_bytes: weights and gradients that a rank receives from the others in a step, where they are sharded.
    """

    products_seconds: float
    attention_seconds: float
    optimizer_seconds: float
    tokens_per_s: float
    gathered_bytes: float = 0.0

    @property
    def seconds(self) -> float:
        """Their sum."""
        return self.products_seconds + self.attention_seconds + self.optimizer_seconds


def step_limit(
    config: PreTrainedConfig,
    work: StepWork,
    rates: Rates,
    *,
    itemsize: int,
    trained: float | None = None,
    shards: int = 1,
) -> StepLimit:
    """The limit of a step on one rank.

    itemsize: bytes of a weight, a gradient and each moment. trained: parameters that are trained, where not all are
    (adapters): the others have no gradient of their own and no optimiser step. shards: ranks that share weights,
    gradients and moments; 1: every rank has all of them.
    """
    count = models.parameter_count(config)
    multiplied = count.active + count.head
    share = 1.0 if trained is None else trained / count.total  # of the weights, for which gradients are made
    # 1. Products. Every expert of a mixture is read, however few tokens use it.
    weights = itemsize * (count.without_embeddings + count.head)
    slots = work.slots / work.micro_batches
    forward = max(2 * multiplied * slots / rates.matmul_flops, weights / rates.copy_bytes)
    backward = max(2 * (1 + share) * multiplied * slots / rates.matmul_flops, (1 + share) * weights / rates.copy_bytes)
    products = work.micro_batches * (forward + backward)
    # 2. Attention: as many multiplications for each pair, forward and backward.
    attention = models.attention_flops_per_token(config, 1.0) / 2 * work.pairs / rates.matmul_flops
    # 3. The optimiser: one read for the norm; four reads and three writes for AdamW.
    updated = count.total if trained is None else trained
    optimizer = 8 * itemsize * updated / shards / rates.copy_bytes
    # 4. What comes from other ranks: all weights but its own, twice a micro-batch; the sums of its own gradients.
    others = 1 - 1 / shards
    gathered = itemsize * others * (2 * work.micro_batches * count.total + updated)
    total = products + attention + optimizer
    return StepLimit(products, attention, optimizer, work.tokens / total, gathered)
