"""What each strategy keeps and what it gives up: the paper's table of variations, computed (notebook 09).

Nothing here is told. Whether examples stay apart is seen on a batch of the strategy's own, whether a plan can be made
while the data come in on plans of which later lengths were changed, whether the order is random on two seeds.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from packlib import plans
from packlib.attention import register_attention
from packlib.lab.small_models import small_model
from packlib.lab.strategies import STRATEGIES, Strategy, plan_for

TOY = {"batch_size": 4, "max_tokens": 32}  # of the batch whose examples are edited
PAD, VOCABULARY = 0, 64  # ids from 1 on are examples'


def drawn(examples: int, mean: float, longest: int, seed: int = 0) -> np.ndarray:
    """Lengths with a heavy tail (log-normal, σ = 1), int64 [examples] in 1 to `longest`, `mean` before they are cut."""
    raw = np.random.default_rng(seed).lognormal(np.log(mean) - 0.5, 1.0, examples)
    return raw.round().clip(1, longest).astype(np.int64)


def table(lengths: np.ndarray, *, batch_size: int, max_tokens: int, accumulation: int = 1) -> pd.DataFrame:
    """A row a strategy of ours, on examples of these lengths (int [examples], each at most `max_tokens`).

    Columns: `examples stay apart`, `whole examples` (none is cut), `online` (a row does not depend on what comes after
    it), `random groups` (another seed brings other examples together), `rows`, `fill` in [0, 1], `optimiser steps` of
    an epoch with `accumulation` micro-batches each.
    """
    rows = {}
    for strategy in STRATEGIES.values():
        if strategy.trl is not None:
            continue
        sizes = {"batch_size": batch_size, "max_tokens": max_tokens}
        plan = plan_for(strategy, lengths, seed=0, **sizes)
        report = plan.report(lengths, strategy.layout)
        per_step = strategy.rows_per_batch(batch_size) * accumulation
        rows[strategy.label] = {
            "examples stay apart": stays_apart(strategy),
            "whole examples": report.broken_examples == 0,
            "online": is_online(strategy),
            "random groups": is_random(strategy, lengths, **sizes),
            "rows": report.examples if strategy.examples_stay else report.rows,
            "fill": report.fill,
            "optimiser steps": -(-report.rows // per_step),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("batching")


def stays_apart(strategy: Strategy) -> bool:
    """Whether another token in one example leaves the logits of all others as they were, on a batch of the strategy."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(4, 13, 24)
    plan = plan_for(strategy, lengths, seed=0, **TOY)
    model = small_model("llama", register_attention("reference"), torch.float64)
    collator = strategy.collator(PAD)
    examples = [{"input_ids": generator.integers(1, VOCABULARY, n)} for n in lengths]
    batch_rows = [_row(plan, i, examples) for i in range(strategy.rows_per_batch(TOY["batch_size"]))]
    # 1. The first example of the batch begins with another token.
    edited = [{name: values.copy() for name, values in row.items()} for row in batch_rows]
    ids = edited[0]["input_ids"]
    ids[0] = ids[0] % (VOCABULARY - 1) + 1
    before, after = (_logits(model, dict(collator(rows))) for rows in (batch_rows, edited))
    # 2. Its own logits move; those of nobody else do.
    own = int(batch_rows[0]["seq_lengths"][0])
    moved = (before != after).any(dim=-1)
    assert moved[0, :own].all()  # it was edited
    moved[0, :own] = False
    return not bool(moved.any())


def _row(plan: plans.Plan, i: int, examples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Row i as a collator takes it."""
    pieces = [examples[e]["input_ids"][start:stop] for e, start, stop in plan[i]]
    sizes = np.array([len(piece) for piece in pieces])
    positions = np.concatenate([np.arange(n) for n in sizes])
    return {"input_ids": np.concatenate(pieces), "position_ids": positions, "seq_lengths": sizes}


def _logits(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """Logits where there are examples; zero on pads, which nobody reads."""
    batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch | {"use_cache": False}).logits
    mask = batch.get("attention_mask")
    return logits if mask is None else logits * mask[..., None]


def is_online(strategy: Strategy) -> bool:
    """Whether some row stays together when the lengths of all examples outside it and one more row are drawn anew.

    Where a row is closed by what comes next, that is the other row; what comes later can not have mattered. Seen on a
    toy, with several draws, so that no row stays by chance.
    """
    generator = np.random.default_rng(0)
    first, *others = (generator.integers(2, 31, 160) for _ in range(4))
    rows = _groups(plan_for(strategy, first, seed=0, **TOY))
    for row in rows[::8]:  # where one stays, most do
        for closing in rows:
            kept = np.isin(np.arange(len(first)), list(row | closing))
            drawn = [np.where(kept, first, other) for other in others]
            if all(row in _groups(plan_for(strategy, lengths, seed=0, **TOY)) for lengths in drawn):
                return True
    return False


def _groups(plan: plans.Plan) -> list[frozenset[int]]:
    """The examples of every row."""
    return [frozenset(part.tolist()) for part in np.split(plan.example, plan.row_splits[1:-1])]


def is_random(strategy: Strategy, lengths: np.ndarray, *, batch_size: int, max_tokens: int) -> bool:
    """Whether most rows of one seed hold other examples than any row of another."""
    sizes = {"batch_size": batch_size, "max_tokens": max_tokens}
    one, other = (set(_groups(plan_for(strategy, lengths, seed=seed, **sizes))) for seed in (0, 1))
    return len(one & other) < len(one) / 2


def display(table: pd.DataFrame) -> pd.DataFrame:
    """`table` as it is read: yes and no, numbers formatted."""
    shown = table.copy()
    for name in shown:
        if shown[name].dtype == bool:
            shown[name] = shown[name].map({True: "yes", False: "no"})
    shown["rows"], shown["optimiser steps"] = (table[name].map("{:,}".format) for name in ("rows", "optimiser steps"))
    shown["fill"] = table["fill"].map("{:.3f}".format)
    return shown
