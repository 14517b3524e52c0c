"""What does packing buy in tokens per second and memory? The arms of notebook 06, its tables, figures and sentences.

The paper's Table 2 compares whole arms; a curve against batch size, and a line through step time against slots, say
what share of the waste becomes speed and what a step costs besides its slots.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler
from scipy import stats

from packlib.lab import doubts, figures, tables
from packlib.lab.data.corpora import load_corpus
from packlib.lab.figures import Picture
from packlib.lab.runs.spec import PADDED_SDPA, RunSpec
from packlib.lab.strategies import STRATEGIES, get_strategy, plan_for

PLACE = ("models", "corpora", "strategies")  # what arms are spread over
PAIR = ("padding", "minibatch_packing")  # the same mini-batches, padded and flat
PEERS = {"minibatch_packing": "trl_padding_free", "multipack_posid": "trl_packing_bfd"}  # ours: TRL's own


# Arms


def table_2_specs(
    base: RunSpec,
    models: Iterable[str],
    corpora: Iterable[str],
    strategies: Iterable[str],
    further: Iterable[Mapping[str, Any]] = (),
) -> list[RunSpec]:
    """The arms in the order in which they are run: per model, per corpus, per strategy; then each entry of `further`.

    further: mappings with `models`, `corpora` and `strategies` of their own (missing ones are those given here), and
    any field of RunSpec that differs, such as `{"strategies": ["padding"], "repeat": 1}` or `{"rig": {"liger": True}}`
    (the fields of the rig that differ from the base's). A strategy written `padding:transformers_sdpa` names the
    attention, too: what padding costs on transformers' SDPA, where attention that pads is the baseline. Raises
    `ValueError` for an unknown strategy or attention and `TypeError` for an unknown field.
    """
    main = dict(zip(PLACE, (list(models), list(corpora), list(strategies))))
    specs = []
    for entry in ({}, *further):
        fields = {name: value for name, value in entry.items() if name not in PLACE}
        if "rig" in fields:
            fields["rig"] = replace(base.rig, **fields["rig"])
        varied = replace(base, **fields)
        places = itertools.product(*(entry.get(name, main[name]) for name in PLACE))
        specs += [_at(varied, *place) for place in places]
    return specs


def _at(base: RunSpec, model: str, corpus: str, arm: str) -> RunSpec:
    strategy, _, kernel = arm.partition(":")
    return replace(base, model=model, corpus=corpus, strategy=strategy, kernel=kernel or base.kernel)


def batch_size_specs(base: RunSpec, model: str, corpus: str, batch_sizes: Iterable[int]) -> list[RunSpec]:
    """padding and minibatch_packing on the same mini-batches of growing size."""
    return [
        replace(base, model=model, corpus=corpus, strategy=arm, batch_size=size) for size in batch_sizes for arm in PAIR
    ]


def enough_steps(specs: Iterable[RunSpec], tokens: int) -> list[RunSpec]:
    """The specs with as many steps as it takes to measure each over about `tokens` real tokens, never fewer.

    Mini-batches of short examples make short steps, and ten of them are over before a CPU has found its pace. With
    `tokens` = 0 nothing changes.
    """

    @cache
    def lengths(data: RunSpec) -> np.ndarray:
        return load_corpus(data.corpus, **data.corpus_options).lengths

    chosen = []
    for spec in specs:
        if tokens and spec.steps:
            known = lengths(replace(spec, strategy="padding", batch_size=1, steps=None, repeat=0, kernel="auto"))
            needed = spec.warmup_steps + math.ceil(tokens / _tokens_per_step(spec, known))
            spec = replace(spec, steps=max(spec.steps, needed))
        chosen.append(spec)
    return chosen


def _tokens_per_step(spec: RunSpec, lengths: np.ndarray) -> float:
    """Real tokens of the mean optimiser step."""
    strategy = get_strategy(spec.strategy)
    plan = plan_for(strategy, lengths, batch_size=spec.batch_size, max_tokens=spec.max_tokens, seed=spec.seed)
    rows = spec.gradient_accumulation * strategy.rows_per_batch(spec.batch_size)
    return lengths.sum() / len(plan) * rows


# Tables


def main_arms(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """Of `tables.against`, the measured arms of a model on its first rig, corpora by their short names."""
    own = table[table["model"] == model]
    own = own[(own["rig"] == own["rig"].iloc[0]) & own["speed_up"].notna()]
    return own.assign(corpus=own["corpus"].map(tables.short))


def both_baselines(frame: pd.DataFrame) -> pd.DataFrame:
    """`tables.against` of the runs that had the device to themselves, and `over_sdpa`: speed over padding through SDPA.

    The same model, rig, size of batches and corpus for both; of the two ways of padding through SDPA the first of
    PADDED_SDPA that was measured. NaN where none was, and `speed_up` where no padding was that is unpadded inside
    attention. Rates are of one rank.
    """
    found = tables.against(tables.alone(frame))
    if not len(found):
        return found.assign(over_sdpa=[])
    place = ["model", "rig", "corpus"]
    padded = found[found["strategy"] == PAIR[0]]
    sdpa: dict[tuple[Any, ...], float] = {}
    for kernel in reversed(PADDED_SDPA):
        sdpa |= padded[padded["kernel"] == kernel].set_index(place)["tokens_per_s"].to_dict()
    varlen = set(padded.loc[padded["kernel"] == "auto", place].itertuples(index=False, name=None))
    places = list(found[place].itertuples(index=False, name=None))
    over_sdpa = found["tokens_per_s"] / [sdpa.get(key, math.nan) for key in places]
    return found.assign(over_sdpa=over_sdpa, speed_up=found["speed_up"].where([key in varlen for key in places]))


def batch_size_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Speed-up of minibatch_packing over padding and its limit (`tables.limit`), per batch size; repeats are pooled.

    Columns `batch_size, strategy, speed_up, limit, reached, padding_memory_bytes, packed_memory_bytes`. reached: share
    of what dropping the pads can give that became speed, (speed_up - 1) / (limit - 1); NaN where nothing is wasted.
    """
    ok = frame[(frame["status"] == "ok") & frame["strategy"].isin(PAIR) & (frame["kernel"] == "auto")]
    rows = []
    alike = [name for name in ("gradient_accumulation", "max_tokens") if name in ok]
    for (size, *_), group in ok.groupby(["batch_size", *alike]):
        arms = dict(list(group.groupby("strategy")))
        if len(arms) < len(PAIR):
            continue
        pad, packed = (arms[name] for name in PAIR)
        limit = tables.limit(packed, pad)
        speed_up = packed["metrics.tokens_per_s.mean"].median() / pad["metrics.tokens_per_s.mean"].median()
        row = {"batch_size": size, "strategy": "minibatch_packing", "speed_up": speed_up, "limit": limit}
        row["reached"] = (speed_up - 1) / (limit - 1) if limit > 1 else math.nan
        row["padding_memory_bytes"] = pad["metrics.peak_memory_bytes"].max()
        row["packed_memory_bytes"] = packed["metrics.peak_memory_bytes"].max()
        rows.append(row)
    return pd.DataFrame(rows)


def display_sizes(by_size: pd.DataFrame) -> Styler:
    """`batch_size_table` as readers see it: shares in per cent, bytes in GB."""
    shown = pd.DataFrame(
        {
            "examples a batch": by_size["batch_size"],
            "× padding": by_size["speed_up"],
            "limit": by_size["limit"],
            "reached": by_size["reached"],
            "padding's memory (GB)": by_size["padding_memory_bytes"] / 1e9,
            "packed memory (GB)": by_size["packed_memory_bytes"] / 1e9,
        }
    )
    return shown.style.hide().format(precision=2, na_rep="–").format("{:.0%}", subset=["reached"], na_rep="–")


def like(frame: pd.DataFrame, spec: RunSpec, corpus: str) -> pd.DataFrame:
    """The runs of `frame` on a corpus that share model, rig and attention with a spec."""
    place = (frame["model"] == spec.model) & (frame["corpus"] == corpus) & (frame["kernel"] == spec.kernel)
    return frame[place & (tables.rigs(frame) == tables.rig_label(asdict(spec.rig), spec.world_size))]


def fixed_cost(frame: pd.DataFrame) -> dict[str, float]:
    """Seconds a step costs before any slot, and seconds per slot: a line through step time against slots per step.

    frame: runs of one model on one corpus. Returns `fixed_seconds`, `seconds_per_slot`, `r2`; NaN where fewer than
    three arms ended well, or all have the same slots.
    """
    ok = frame[frame["status"] == "ok"]
    if len(ok) < 3 or ok["metrics.slots_per_step"].nunique() < 2:
        return dict.fromkeys(("fixed_seconds", "seconds_per_slot", "r2"), math.nan)
    line = stats.linregress(
        ok["metrics.slots_per_step"].to_numpy(float), ok["metrics.step_seconds.mean"].to_numpy(float)
    )
    return {"fixed_seconds": float(line.intercept), "seconds_per_slot": float(line.slope), "r2": float(line.rvalue**2)}


def utilization_table(table: pd.DataFrame) -> pd.DataFrame:
    """Of `tables.against`: how busy the machine was, with the names that readers see."""
    columns = {
        "corpus": "corpus",
        "strategy": "batching",
        "tokens_per_s": "real tokens/s",
        "step_seconds": "step (s)",
        "utilization": "utilization",
        "optimizer_steps": "optimiser steps",
    }
    named = [tables.arm_label(*arm) for arm in zip(table["strategy"], table["kernel"])]
    shown = table.assign(corpus=table["corpus"].map(tables.short), strategy=named)
    busy = shown[list(columns)].rename(columns=columns)
    busy.insert(0, "model", tables.named_models(table["model"], table["rig"]))
    return busy


# Figures


def speed_up_bars(table: pd.DataFrame, model: str, off: str = "") -> Picture:
    """Speed-up over padding of a model's arms on packlib's attention, with the limit on every bar (`main_arms`).

    off: what is in doubt about these runs, for the title (`doubts.in_short`).
    """
    ours = table[~table["kernel"].str.startswith("transformers")]
    ours = ours.assign(label=[tables.arm_label(*arm) for arm in zip(ours["strategy"], ours["kernel"])])
    title = f"{model}: real tokens/s against padding" + (f" ({off})" if off else "")
    return figures.bars_with_limits(ours, title)


def memory_bars(table: pd.DataFrame, model: str) -> Picture:
    """Peak memory of a model's arms, one panel per corpus (`main_arms`)."""
    title = f"{model}: peak memory"
    groups = list(dict.fromkeys(table["corpus"]))
    arms = list(dict.fromkeys(zip(table["strategy"], table["kernel"])))
    width = figures.panels_width(len(groups))
    figure, axes = figures.new(width, 0.5 * len(arms) + 1.6, title, len(groups), sharey=True)
    for ax, group in zip(axes, groups):
        gigabytes = table[table["corpus"] == group].set_index(["strategy", "kernel"])["peak_memory_bytes"] / 1e9
        for y, arm in enumerate(arms):
            if arm in gigabytes.index:
                figures.bar(ax, y, gigabytes[arm], arm[0])
                ax.text(gigabytes[arm] * 1.02, y, f"{gigabytes[arm]:.2f}", **figures.NUMBER)
        ax.set(title=str(group), xlabel="peak memory (GB)", xlim=(0, gigabytes.max() * 1.28))
        ax.set_yticks(range(len(arms)), [tables.arm_label(*arm) for arm in arms])
        ax.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    return figures.head(figure, title)


def batch_size_curve(by_size: pd.DataFrame, model: str, corpus: str) -> Picture:
    """Speed-up and its limit against batch size (`batch_size_table`)."""
    title = f"{model}, {tables.short(corpus)}: speed-up and its limit against batch size"
    ylabel = "real tokens/s, relative to padding"
    return figures.curves(by_size, "batch_size", "speed_up", title, "examples per mini-batch", ylabel, limit="limit")


# Findings


def findings(table: pd.DataFrame, by_size: pd.DataFrame, cost: Mapping[str, float], frame: pd.DataFrame) -> list[str]:
    """Sentences of notebook 06, every number from records; none ranks where a control is off, which comes first.

    table: `tables.against` of the table's arms. by_size: `batch_size_table`. cost: `fixed_cost`. frame: all runs, those
    of the curve, too.
    """
    said: list[str] = list(doubts.doubts(frame))
    ranked = not said
    named = table.assign(model=tables.named_models(table["model"], table["rig"]))
    ours = named[(named["kernel"] == "auto") & named["speed_up"].notna()]
    for (model, corpus), group in ours.groupby(["model", "corpus"], sort=False):
        where = f"{model} on {tables.short(corpus)}"
        said += [f"{where}: {sentence}." for sentence in _about_arms(group.set_index("strategy"), ranked=ranked)]
    if ranked and len(by_size) and by_size["reached"].notna().any():
        best = by_size.loc[by_size["reached"].idxmax()]
        share = f"{best['reached']:.0%} of what dropping the pads can give has become speed"
        said.append(f"At {best['batch_size']:.0f} examples a batch, {share}, the most in the curve.")
    if cost["fixed_seconds"] > 0:
        before, each = cost["fixed_seconds"] * 1e3, cost["seconds_per_slot"] * 1e6
        said.append(f"By the line, a step costs {before:.0f} ms before its first slot and {each:.2f} µs per slot.")
    spread = doubts.repeat_spread(frame)
    if pd.notna(spread):
        said.append(f"Repeating an arm moved its rate by at most {spread:.1%}.")
    lost = frame[frame["status"] != "ok"]
    return said + [f"{row.strategy} with {row.model}: {row.status}, {row.error}." for row in lost.itertuples()]


def _about_arms(arms: pd.DataFrame, *, ranked: bool) -> list[str]:
    """What one model's arms on one corpus say, by strategy; ranked: also which is the fastest."""
    said = []
    if "minibatch_packing" in arms.index:
        row = arms.loc["minibatch_packing"]
        what = "the waste" if row["limit"] == row["waste_ratio"] else "dropping the pads"
        said.append(
            f"MiniBatchPacking + PosID is {row['speed_up']:.2f} times as fast as padding, where {what} allows "
            f"{row['limit']:.2f}; its peak memory is {row['memory_ratio']:.2f} of padding's"
        )
    others = [name for name in arms.index if name not in PAIR and STRATEGIES[name].trl is None]
    if others and ranked:
        best = arms.loc[others, "speed_up"].idxmax()
        times = f"{arms.loc[best, 'speed_up']:.2f} times padding"
        said.append(f"the fastest of our other strategies is {STRATEGIES[best].label}, {times}")
    for arm, peer in PEERS.items():
        if {arm, peer} <= set(arms.index):
            ratio = arms.loc[arm, "tokens_per_s"] / arms.loc[peer, "tokens_per_s"]
            times = f"{ratio:.2f} times the real tokens/s of {STRATEGIES[peer].label}"
            said.append(f"{STRATEGIES[arm].label} runs at {times}")
    return said
