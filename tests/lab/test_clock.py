"""Micro-batches are counted to the optimiser step that trained on them."""

import pytest

from packlib.lab.clock import Counter


@pytest.mark.parametrize(
    ("accumulation", "per_epoch", "collated", "tokens"),
    [
        (1, 3, [1, 2, 4, 1, 2], [1, 2, 4, 1]),  # one batch collated ahead
        (2, 4, [1, 2, 4, 8, 1], [3, 12]),
        (3, 4, [1, 2, 4, 8, 1, 2, 4, 8], [7, 8, 7, 8]),  # the last step of an epoch takes what remains
        (3, 4, [1, 2, 4, 8, 1, 2, 4, 8], [7, 8, 7]),
        (4, 2, [1, 2, 1, 2], [3, 3]),
    ],
)
def test_steps_end_with_their_epoch(accumulation, per_epoch, collated, tokens):
    counter = Counter(None)
    counter.batches = [(10 * n, n, n - 1, 1) for n in collated]
    steps = counter.per_step(accumulation, ends=[0.0] * len(tokens), per_epoch=per_epoch)
    assert steps[:, 1].tolist() == tokens and steps[:, 0].tolist() == [10 * n for n in tokens]
