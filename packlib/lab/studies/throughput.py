"""The arms of notebook 06: Table 2's comparison, and speed-up against batch size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from packlib.lab import tables
from packlib.lab.spec import RunSpec
from packlib.lab.strategies import STRATEGIES, get_strategy, plan_for


def table_2_specs(
    base: RunSpec,
    models: Iterable[str],
    corpora: Iterable[str],
    strategies: Iterable[str],
    further: Iterable[Mapping[str, Any]] = (),
) -> list[RunSpec]:
    """The arms in the order in which they are run: per model, per corpus, per strategy; then the same for each entry of `further`.

    further: mappings with `models`, `corpora` and `strategies` of their own (missing ones are those given here), and any field of RunSpec that
    differs, such as `{"strategies": ["padding"], "repeat": 1}`. A strategy written `padding:transformers_sdpa` names the attention, too: what
    padding costs on transformers' SDPA, where attention that pads is the baseline. Raises `ValueError` for an unknown strategy or attention and
    `TypeError` for an unknown field.
    """
    main = {"models": list(models), "corpora": list(corpora), "strategies": list(strategies)}
    specs = []
    for entry in ({}, *further):
        fields = main | dict(entry)
        places = itertools.product(*(fields.pop(name) for name in main))
        specs += [_arm(replace(base, **fields), *place) for place in places]
    return specs


def _arm(base: RunSpec, model: str, corpus: str, arm: str) -> RunSpec:
    strategy, _, kernel = arm.partition(":")
    return replace(base, model=model, corpus=corpus, strategy=strategy, kernel=kernel or base.kernel)


def batch_size_specs(base: RunSpec, model: str, corpus: str, batch_sizes: Iterable[int]) -> list[RunSpec]:
    """padding and minibatch_packing on the same mini-batches of growing size."""
    arms = ("padding", "minibatch_packing")
    return [
        replace(base, model=model, corpus=corpus, strategy=arm, batch_size=size) for size in batch_sizes for arm in arms
    ]


def enough_steps(specs: Iterable[RunSpec], tokens: int) -> list[RunSpec]:
    """The specs with as many steps as it takes to measure each over about `tokens` real tokens, never fewer than they have.

    Mini-batches of short examples make short steps, and ten of them are over before a CPU has found its pace. With `tokens` = 0 nothing changes.
    """
    from packlib.lab import worker

    @cache
    def lengths(spec: RunSpec) -> np.ndarray:
        return worker.training_corpus(spec)[0].lengths

    def enough(spec: RunSpec) -> RunSpec:
        strategy, known = (
            get_strategy(spec.strategy),
            lengths(replace(spec, strategy="padding", batch_size=1, steps=None, repeat=0, kernel="auto")),
        )
        plan = plan_for(strategy, known, batch_size=spec.batch_size, max_tokens=spec.max_tokens, seed=spec.seed)
        rows = spec.gradient_accumulation * (
            1 if strategy.trl is not None else strategy.rows_per_batch(spec.batch_size)
        )
        return replace(
            spec, steps=max(spec.steps, spec.warmup_steps + math.ceil(tokens / (known.sum() / len(plan) * rows)))
        )

    return [enough(spec) if tokens and spec.steps else spec for spec in specs]


def batch_size_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Speed-up of minibatch_packing over padding and its limit (padding's waste) per batch size: `batch_size, speed_up, limit, reached, …`.

    reached: share of the waste that became speed: (speed_up - 1) / (limit - 1); NaN where nothing is wasted.
    """
    ok = frame[
        (frame["status"] == "ok")
        & frame["strategy"].isin(["padding", "minibatch_packing"])
        & (frame["kernel"] == "auto")
    ]
    rows = []
    for size, group in ok.groupby("batch_size"):
        arms = {name: arm.iloc[0] for name, arm in group.groupby("strategy")}
        if len(arms) == 2:
            pad, packed = arms["padding"], arms["minibatch_packing"]
            speed_up = packed["metrics.tokens_per_s.mean"] / pad["metrics.tokens_per_s.mean"]
            limit = pad["metrics.measured_waste"]
            reached = (speed_up - 1) / (limit - 1) if limit > 1 else math.nan
            rows.append({
                "batch_size": size, "strategy": "minibatch_packing", "speed_up": speed_up, "limit": limit, "reached": reached,
                "padding_memory_bytes": pad["metrics.peak_memory_bytes"], "packed_memory_bytes": packed["metrics.peak_memory_bytes"],
            })  # fmt: skip
    return pd.DataFrame(rows)


def fixed_cost(frame: pd.DataFrame) -> dict[str, float]:
    """Seconds a step costs before any slot, and seconds per slot: a line through step time against slots per step, over arms of one corpus.

    Returns `fixed_seconds`, `seconds_per_slot`, `r2` (NaN for fewer than three arms that ended well).
    """
    ok = frame[frame["status"] == "ok"]
    if len(ok) < 3:
        return dict.fromkeys(("fixed_seconds", "seconds_per_slot", "r2"), math.nan)
    slots, seconds = ok["metrics.slots_per_step"].to_numpy(float), ok["metrics.step_seconds.mean"].to_numpy(float)
    slope, fixed = np.polyfit(slots, seconds, 1)
    residual = seconds - (fixed + slope * slots)
    return {
        "fixed_seconds": float(fixed),
        "seconds_per_slot": float(slope),
        "r2": float(1 - residual.var() / seconds.var()),
    }


def findings(table: pd.DataFrame, by_size: pd.DataFrame, cost: dict[str, float], frame: pd.DataFrame) -> list[str]:
    """Sentences of notebook 06, every number from records."""
    said = []
    ours = table[(table["kernel"] == "auto") & table["speed_up"].notna()]
    for (model, corpus), group in ours.groupby(["model", "corpus"], sort=False):
        arms = group.set_index("strategy")
        where = f"{model} on {tables.short(corpus)}"
        if "minibatch_packing" in arms.index:
            row = arms.loc["minibatch_packing"]
            said.append(
                f"{where}: MiniBatchPacking + PosID is {row['speed_up']:.2f} times as fast as padding, where the waste allows {row['limit']:.2f}; "
                f"its peak memory is {row['memory_ratio']:.2f} of padding's."
            )
        rest = arms.drop(index=["padding", "minibatch_packing"], errors="ignore")
        rest = rest[~rest.index.str.startswith("trl")]
        if len(rest):
            best = rest["speed_up"].idxmax()
            said.append(
                f"{where}: the fastest of our other strategies is {STRATEGIES[best].label}, {rest.loc[best, 'speed_up']:.2f} times padding."
            )
        for arm, peer in (("minibatch_packing", "trl_padding_free"), ("multipack_posid", "trl_packing_bfd")):
            if {arm, peer} <= set(arms.index):
                ratio = arms.loc[arm, "tokens_per_s"] / arms.loc[peer, "tokens_per_s"]
                said.append(
                    f"{where}: {STRATEGIES[arm].label} runs at {ratio:.2f} times the real tokens/s of {STRATEGIES[peer].label}."
                )
    if len(by_size) and by_size["reached"].notna().any():
        best = by_size.loc[by_size["reached"].idxmax()]
        said.append(
            f"At {best['batch_size']:.0f} examples a batch, {best['reached']:.0%} of the waste has become speed, the most in the curve."
        )
    if cost["fixed_seconds"] > 0:
        said.append(
            f"A step costs {cost['fixed_seconds'] * 1e3:.0f} ms before its first slot and {cost['seconds_per_slot'] * 1e6:.2f} µs per slot."
        )
    repeated = frame[(frame["status"] == "ok") & (frame["kernel"] == "auto")].groupby(["model", "corpus", "strategy"])[
        "metrics.step_seconds.p50"
    ]
    spreads = (repeated.max() / repeated.min() - 1)[repeated.count() > 1]
    if len(spreads):
        said.append(f"Repeating an arm moved its median step time by at most {spreads.max():.1%}.")
    lost = frame[frame["status"] != "ok"]
    return said + [f"{row.strategy} with {row.model}: {row.status}, {row.error}." for row in lost.itertuples()]
