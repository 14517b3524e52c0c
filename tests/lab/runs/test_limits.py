"""The least that a step costs, worked out by hand on a model small enough for it."""

from dataclasses import replace

import pytest

from packlib.lab import models
from packlib.lab.runs.limits import Rates, StepWork, step_limit

CONFIG = models.model_config("tiny-llama")
COUNT = models.parameter_count(CONFIG)
FAST = Rates(matmul_flops=1e12, copy_bytes=1e12)
WORK = StepWork(micro_batches=2, slots=8000, tokens=6000, pairs=10**6)
PRODUCTS = COUNT.active + COUNT.head  # what a token is multiplied with


def test_a_large_step_costs_its_products():
    limit = step_limit(CONFIG, WORK, FAST, itemsize=4)
    assert limit.products_seconds == pytest.approx(6 * PRODUCTS * 8000 / 1e12)
    width = CONFIG.num_hidden_layers * CONFIG.hidden_size
    assert limit.attention_seconds == pytest.approx(6 * width * 10**6 / 1e12)
    assert limit.optimizer_seconds == pytest.approx(8 * 4 * COUNT.total / 1e12)
    assert limit.tokens_per_s == pytest.approx(6000 / limit.seconds)


def test_a_small_micro_batch_costs_reading_the_weights():
    slow = Rates(matmul_flops=1e18, copy_bytes=1e9)
    limit = step_limit(CONFIG, WORK, slow, itemsize=2)
    weights = 2 * (COUNT.without_embeddings + COUNT.head)
    assert limit.products_seconds == pytest.approx(2 * 3 * weights / 1e9), "forward one pass, backward two"
    merged = step_limit(CONFIG, replace(WORK, micro_batches=1), slow, itemsize=2)
    assert merged.products_seconds == pytest.approx(limit.products_seconds / 2)


def test_what_packing_can_gain_is_less_than_the_waste():
    flat = step_limit(CONFIG, replace(WORK, slots=6000), FAST, itemsize=4)
    padded = step_limit(CONFIG, WORK, FAST, itemsize=4)
    assert 1 < flat.tokens_per_s / padded.tokens_per_s < 8000 / 6000
    only_products = replace(WORK, pairs=0)
    no_optimizer = [
        step_limit(CONFIG, replace(only_products, slots=n), replace(FAST, copy_bytes=1e18), itemsize=4)
        for n in (6000, 8000)
    ]
    assert no_optimizer[0].tokens_per_s / no_optimizer[1].tokens_per_s == pytest.approx(8000 / 6000, rel=1e-4)


def test_adapters_spare_gradients_and_optimizer():
    full, adapted = (step_limit(CONFIG, WORK, FAST, itemsize=4, trained=n) for n in (None, 1000))
    share = 1000 / COUNT.total
    assert adapted.products_seconds == pytest.approx(full.products_seconds * (4 + 2 * share) / 6)
    assert adapted.optimizer_seconds == pytest.approx(8 * 4 * 1000 / 1e12)
    assert adapted.attention_seconds == full.attention_seconds


def test_a_rank_of_four_updates_a_quarter_and_gathers_the_rest():
    """Two micro-batches: weights come four times, gradients of a rank's own quarter once from each of the others."""
    whole, sharded = (step_limit(CONFIG, WORK, FAST, itemsize=2, shards=n) for n in (1, 4))
    assert sharded.optimizer_seconds == pytest.approx(whole.optimizer_seconds / 4)
    assert (sharded.products_seconds, sharded.attention_seconds) == (whole.products_seconds, whole.attention_seconds)
    assert whole.gathered_bytes == 0
    weights = 2 * COUNT.total
    assert sharded.gathered_bytes == pytest.approx(4 * weights * 3 / 4 + 3 * weights / 4)
    assert sharded.tokens_per_s == pytest.approx(6000 / (whole.seconds - whole.optimizer_seconds * 3 / 4))
