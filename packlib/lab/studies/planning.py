"""Tables about plans: what notebooks 01 and 03 measure before anything is trained. One DataFrame per question, one row per point."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from packlib import plans
from packlib.lab.corpora import load_corpus
from packlib.lab.parameters import unknown_name
from packlib.plans import Plan

Planner = Callable[
    [np.ndarray, int, int, int], Plan
]  # lengths, batch size, capacity, seed; mini-batches have a budget of both multiplied

PLANNERS: dict[str, tuple[Planner, str]] = {  # name: planner, layout of its rows
    "shuffled_batches": (lambda n, b, c, s: plans.shuffled_batches(n, b, s), "padded"),
    "length_grouped_batches": (lambda n, b, c, s: plans.length_grouped_batches(n, b, s), "padded"),
    "token_budget": (lambda n, b, c, s: plans.token_budget(n, b * c, overflow="error", seed=s), "padded"),
    "dynamic_programming": (
        lambda n, b, c, s: plans.dynamic_programming(n, "padded", max_slots=b * c, overflow="error", seed=s),
        "padded",
    ),
    "fixed_length": (lambda n, b, c, s: plans.fixed_length(n, c, s), "flat"),
    "next_fit (random)": (lambda n, b, c, s: plans.next_fit(n, c, overflow="error", seed=s), "flat"),
    "next_fit (sorted)": (lambda n, b, c, s: plans.next_fit(n, c, overflow="error", order="sorted", seed=s), "flat"),
    "histogram": (lambda n, b, c, s: plans.histogram(n, c, overflow="error", seed=s), "flat"),
    "first_fit_decreasing": (lambda n, b, c, s: plans.first_fit_decreasing(n, c, overflow="error", seed=s), "flat"),
    "best_fit_decreasing": (lambda n, b, c, s: plans.best_fit_decreasing(n, c, overflow="error", seed=s), "flat"),
}


def make_plan(name: str, lengths: np.ndarray, *, batch_size: int, max_tokens: int, seed: int = 0) -> Plan:
    """The plan of a planner in PLANNERS; examples above `max_tokens` must have been cut. Raises `ValueError` for an unknown one."""
    if name not in PLANNERS:
        raise unknown_name("planner", name, PLANNERS)
    return PLANNERS[name][0](lengths, batch_size, max_tokens, seed)


def waste_by_batch_size(lengths: np.ndarray, batch_sizes: Sequence[int], seed: int = 0) -> pd.DataFrame:
    """`batch_size, strategy, waste` (slots per real token) of padding random mini-batches, of group-by-length and of packing."""
    rows = []
    for size in batch_sizes:
        padded = plans.shuffled_batches(lengths, size, seed).report(lengths, "padded").waste
        grouped = plans.length_grouped_batches(lengths, size, seed).report(lengths, "padded").waste
        rows += [(size, "padding", padded), (size, "group_by_length", grouped), (size, "minibatch_packing", 1.0)]
    return pd.DataFrame(rows, columns=["batch_size", "strategy", "waste"])


def capacity_table(lengths: np.ndarray, capacities: Sequence[int]) -> pd.DataFrame:
    """`max_tokens, cut_examples, lost_tokens` (shares, truncating) and `fill, rows` of best fit, for each capacity of a row."""
    rows = []
    for capacity in capacities:
        kept = np.minimum(lengths, capacity)
        report = plans.best_fit_decreasing(kept, capacity, overflow="error").report(kept)
        rows.append(
            (capacity, (lengths > capacity).mean(), 1 - kept.sum() / lengths.sum(), report.capacity_fill, report.rows)
        )
    return pd.DataFrame(rows, columns=["max_tokens", "cut_examples", "lost_tokens", "fill", "rows"])


def tokenizer_table(
    corpus: str, tokenizers: Sequence[str], *, batch_size: int, max_tokens: int, limit: int | None = None
) -> pd.DataFrame:
    """The same text under several tokenizers: vocabulary, lengths in tokens, padding's waste, tokens lost above `max_tokens`, packed rows."""
    rows = []
    for name in tokenizers:
        loaded = load_corpus(corpus, tokenizer=name, limit=limit)
        n, kept = loaded.lengths, np.minimum(loaded.lengths, max_tokens)
        padded = plans.shuffled_batches(kept, batch_size).report(kept, "padded")
        packed = plans.best_fit_decreasing(kept, max_tokens, overflow="error")
        spread = n.std() / n.mean()
        rows.append(
            (
                name,
                loaded.vocab_size,
                int(n.sum()),
                n.mean(),
                np.percentile(n, 99),
                spread,
                padded.waste,
                1 - kept.sum() / n.sum(),
                len(packed),
            )
        )
    columns = [
        "tokenizer",
        "vocabulary",
        "tokens",
        "mean",
        "p99",
        "std / mean",
        "padding waste",
        "lost tokens",
        "packed rows",
    ]
    return pd.DataFrame(rows, columns=columns)


def planner_table(
    lengths: np.ndarray, *, batch_size: int, max_tokens: int, seed: int = 0, names: Sequence[str] = tuple(PLANNERS)
) -> pd.DataFrame:
    """Every planner on the same examples: `planner, rows, fill, milliseconds, broken_examples, randomness, attention_spread`."""
    rows = []
    for name in names:
        begin = time.perf_counter()
        plan = make_plan(name, lengths, batch_size=batch_size, max_tokens=max_tokens, seed=seed)
        milliseconds = (time.perf_counter() - begin) * 1e3
        report = plan.report(lengths, PLANNERS[name][1])
        fill = report.fill if report.capacity_fill is None else report.capacity_fill
        rows.append(
            (
                name,
                report.rows,
                fill,
                milliseconds,
                report.broken_examples,
                randomness(plan, lengths, batch_size * max_tokens),
                report.attention_spread,
            )
        )
    return pd.DataFrame(
        rows, columns=["planner", "rows", "fill", "milliseconds", "broken_examples", "randomness", "attention_spread"]
    )


def randomness(plan: Plan, lengths: np.ndarray, tokens: int) -> float:
    """How mixed stretches of `tokens` tokens are in length: 1 as in a random order, near 0 where the order, or the row, follows length.

    The variance that the stretches' token-weighted mean log length has when segments are shuffled (8 times), over the variance in the plan.

    >>> lengths = np.arange(1, 1001)
    >>> rows = plans.shuffled_batches(lengths, 1)
    >>> round(randomness(long_to_short(rows), lengths, tokens=5000), 2), randomness(rows, lengths, tokens=5000) > 0.8
    (0.07, True)
    """
    size = plan.stop - plan.start
    logs = np.log(lengths[plan.example])

    def variance(order: np.ndarray) -> float:
        n = size[order].astype(np.int64)
        stretch = (np.cumsum(n) - n) // tokens
        return float((np.bincount(stretch, logs[order] * n) / np.maximum(np.bincount(stretch, n), 1)).var())

    rng = np.random.default_rng(0)
    chance = np.mean([variance(rng.permutation(len(size))) for _ in range(8)])
    return float(min(1.0, chance / max(variance(np.arange(len(size))), 1e-12)))


def fill_by_chunk(lengths: np.ndarray, max_tokens: int, chunks: Sequence[int], seed: int = 0) -> pd.DataFrame:
    """`chunk, fill, rows`: best fit when only `chunk` examples (in random order) are planned at once, as `datasets.map` does with 1000."""
    order = np.random.default_rng(seed).permutation(lengths)
    rows = []
    for chunk in sorted({min(chunk, len(order)) for chunk in chunks}):
        parts = [order[begin : begin + chunk] for begin in range(0, len(order), chunk)]
        count = sum(len(plans.best_fit_decreasing(part, max_tokens, overflow="error")) for part in parts)
        rows.append((chunk, lengths.sum() / (count * max_tokens), count))
    return pd.DataFrame(rows, columns=["chunk", "fill", "rows"])


def rank_costs(plan: Plan, world_size: int) -> np.ndarray:
    """Σ n² of every rank at every step, over the mean of its step: float64 [steps, world_size]; rank r takes rows r, r + world_size, …"""
    costs = plan.row_costs()[: len(plan) // world_size * world_size].reshape(-1, world_size)
    return costs / costs.mean(axis=1, keepdims=True)


def slowest_over_mean(plan: Plan, world_size: int) -> float:
    """How much longer an epoch's attention takes because every step waits for its dearest rank: Σ max / Σ mean over the steps."""
    costs = plan.row_costs()[: len(plan) // world_size * world_size].reshape(-1, world_size)
    return float(costs.max(axis=1).sum() / costs.mean(axis=1).sum())


def long_to_short(plan: Plan) -> Plan:
    """The rows sorted by their longest segment, as a packer builds them: what shuffling the rows prevents."""
    longest = np.maximum.reduceat(plan.stop - plan.start, plan.row_splits[:-1])
    return plan.take(np.argsort(-longest, kind="stable"), "long_to_short")
