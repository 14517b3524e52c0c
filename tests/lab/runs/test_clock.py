"""Micro-batches are counted to the optimiser step that trained on them, in every layout; rates follow from times."""

import numpy as np
import pytest
import torch

from packlib.collators import FlatteningCollator, PaddingCollator
from packlib.lab.runs import clock
from packlib.lab.runs.clock import COUNTS, Counter, StepClock
from packlib.lab.runs.spec import RunSpec


def counted(**counts):
    """A micro-batch or a step as a tuple of COUNTS."""
    return tuple(counts.get(name, 0) for name in COUNTS)


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
    counter.batches = [counted(slots=10 * n, tokens=n) for n in collated]
    steps = counter.per_step(accumulation, ends=[0.0] * len(tokens), per_epoch=per_epoch)
    assert steps[:, COUNTS.index("tokens")].tolist() == tokens
    assert steps[:, COUNTS.index("slots")].tolist() == [10 * n for n in tokens]


ROWS = [{"input_ids": [1, 2, 3, 4], "seq_lengths": [3, 1]}, {"input_ids": [5, 6], "seq_lengths": [2]}]


@pytest.mark.parametrize(
    ("collator", "slots", "pairs"),
    [
        (FlatteningCollator(), 6, 3**2 + 1 + 2**2),
        (FlatteningCollator(boundary="row"), 6, 4**2 + 2**2),
        (FlatteningCollator(pad_to_multiple_of=8), 8, 3**2 + 1 + 2**2 + 2**2),
        (PaddingCollator(), 9, 3 * 3**2),
    ],
    ids=["flat", "contaminated", "with pads", "padded"],
)
def test_a_counter_counts_what_it_hands_over(collator, slots, pairs):
    """Three examples of 3, 1 and 2 tokens, of which all but the first of each are predicted."""
    counter = Counter(collator)
    batch = counter(ROWS)
    expected = {"slots": slots, "tokens": 6, "loss_tokens": 3, "examples": 3, "pairs": pairs}
    assert dict(zip(COUNTS, counter.batches[0])) == expected
    assert batch["input_ids"].numel() == slots, "it is handed on as it is"


def test_examples_without_seq_lengths_are_counted_by_their_positions():
    counter = Counter(FlatteningCollator())
    counter([{"input_ids": [1, 2]}, {"input_ids": [3]}, {"input_ids": [4, 5, 6]}])
    assert dict(zip(COUNTS, counter.batches[0]))["examples"] == 3


def watch(begins, ends, **options):
    """A clock that has seen steps begin and end."""
    found = StepClock(RunSpec(**options), torch.device("cpu"), print, None)
    found.begins, found.ends, found.host = begins, ends, [0.5] * len(ends)
    return found


def test_rates_are_those_of_the_steps_after_warm_up():
    found = watch([0.0, 10.0, 12.0], [9.0, 11.0, 15.0], warmup_steps=1)
    steps = [counted(slots=999, tokens=999, loss_tokens=999, examples=9)]
    steps.append(counted(slots=80, tokens=40, loss_tokens=36, examples=4))
    steps.append(counted(slots=120, tokens=60, loss_tokens=54, examples=6))
    metrics = found.metrics(np.array(steps))
    assert found.seconds().tolist() == [9.0, 1.0, 3.0] and metrics["measured_steps"] == 2
    assert metrics["tokens_per_s"]["mean"] == 100 / 4 and metrics["slots_per_s"]["mean"] == 200 / 4
    assert metrics["tokens_per_s"]["p50"] == (40 / 1 + 60 / 3) / 2
    assert metrics["loss_tokens_per_s"]["mean"] == 90 / 4
    assert metrics["step_seconds"]["mean"] == 2.0
    assert (metrics["measured_fill"], metrics["measured_waste"]) == (0.5, 2.0)
    assert (metrics["tokens_per_step"], metrics["slots_per_step"], metrics["examples_per_step"]) == (50, 100, 5)
    assert metrics["peak_memory_bytes"] is None or metrics["peak_memory_bytes"] > 0


def test_a_trace_adds_up_step_by_step():
    found = watch([0.0, 2.0], [1.0, 4.0])
    steps = np.array([counted(slots=8, examples=1), counted(slots=6, examples=1)])
    trace = found.trace(steps, [2.0, 1.5, 1.0], [1.0, 0.5, 0.2])
    assert trace["step"] == [1, 2] and trace["seconds"] == [1.0, 3.0]
    assert trace["slots"] == [8, 14] and trace["examples"] == [1, 2]
    assert trace["loss"] == [2.0, 1.5] and trace["grad_norm"] == [1.0, 0.5], "no more than steps were timed"


def test_the_ceiling_is_the_best_of_several_products(monkeypatch):
    """Each product takes half as long as the one before: the last one counts."""
    ticks = iter([t for i in range(5) for t in (0.0, 2.0**-i)])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(ticks))
    assert clock.matmul_ceiling(torch.device("cpu"), torch.float32) == 2 * 1024**3 * 2**4
