"""Micro-batches are counted to the optimiser step that trained on them, in every layout; rates follow from times."""

import numpy as np
import pytest
import torch

from packlib.collators import FlatteningCollator, PaddingCollator
from packlib.lab import clock
from packlib.lab.clock import COUNTS, Counter, StepClock
from packlib.lab.spec import RunSpec


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


ROWS = [{"input_ids": [1, 2, 3, 4], "seq_lengths": [3, 1]}, {"input_ids": [5, 6], "seq_lengths": [2]}]


@pytest.mark.parametrize(
    ("collator", "slots"),
    [(FlatteningCollator(), 6), (FlatteningCollator(boundary="row"), 6), (PaddingCollator(), 9)],
    ids=["flat", "contaminated", "padded"],
)
def test_a_counter_counts_what_it_hands_over(collator, slots):
    """Three examples of 3, 1 and 2 tokens, of which all but the first of each are predicted."""
    counter = Counter(collator)
    batch = counter(ROWS)
    assert dict(zip(COUNTS, counter.batches[0])) == {"slots": slots, "tokens": 6, "loss_tokens": 3, "examples": 3}
    assert batch["input_ids"].numel() == slots, "it is handed on as it is"


def test_examples_without_seq_lengths_are_counted_by_their_positions():
    counter = Counter(FlatteningCollator())
    counter([{"input_ids": [1, 2]}, {"input_ids": [3]}, {"input_ids": [4, 5, 6]}])
    assert counter.batches == [(6, 6, 3, 3)]


def test_rates_are_those_of_the_steps_after_warm_up():
    spec = RunSpec(warmup_steps=1)
    watch = StepClock(spec, torch.device("cpu"), print, None)
    watch.begins, watch.ends = [0.0, 10.0, 12.0], [9.0, 11.0, 15.0]
    counts = np.array([[999, 999, 999, 9], [80, 40, 36, 4], [120, 60, 54, 6]])
    metrics = watch.metrics(counts, spec)
    assert watch.seconds().tolist() == [9.0, 1.0, 3.0] and metrics["measured_steps"] == 2
    assert metrics["tokens_per_s"]["mean"] == 100 / 4 and metrics["slots_per_s"]["mean"] == 200 / 4
    assert metrics["tokens_per_s"]["p50"] == (40 / 1 + 60 / 3) / 2
    assert metrics["loss_tokens_per_s"]["mean"] == 90 / 4
    assert metrics["step_seconds"]["mean"] == 2.0
    assert (metrics["measured_fill"], metrics["measured_waste"]) == (0.5, 2.0)
    assert (metrics["tokens_per_step"], metrics["slots_per_step"], metrics["examples_per_step"]) == (50, 100, 5)
    assert metrics["peak_memory_bytes"] is None or metrics["peak_memory_bytes"] > 0


def test_a_trace_adds_up_and_leaves_empty_what_was_not_logged():
    watch = StepClock(RunSpec(), torch.device("cpu"), print, None)
    watch.begins, watch.ends = [0.0, 2.0], [1.0, 4.0]
    counts = np.array([[8, 4, 3, 1], [6, 6, 5, 1]])
    trace = watch.trace(counts, [{"step": 2, "loss": 1.5, "grad_norm": 0.5}, {"step": 2, "train_runtime": 3.0}])
    assert trace["seconds"] == [1.0, 3.0] and trace["slots"] == [8, 14] and trace["examples"] == [1, 2]
    assert trace["loss"] == [None, 1.5] and trace["grad_norm"] == [None, 0.5]


def test_the_ceiling_is_the_best_of_several_products(monkeypatch):
    """Each product takes half as long as the one before: the last one counts."""
    ticks = iter([t for i in range(5) for t in (0.0, 2.0**-i)])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(ticks))
    assert clock.matmul_ceiling(torch.device("cpu"), torch.float32) == 2 * 1024**3 * 2**4
