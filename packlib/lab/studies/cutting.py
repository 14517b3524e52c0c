"""What cutting does to a model trained from scratch: six ways to bring long examples into rows of one length.

All arms take the same steps over as many tokens, in shuffled rows; one leaves the rows of a stream as they come, so
that a long example fills whole steps alone. They differ in where examples are cut (anywhere, every `max_tokens`
from their beginning, once), in what is lost (nothing, all behind the first row, what a crop leaves over) and in whether
a row begins with an example. Held-out examples are scored from their beginning, by position; what lies behind the first
`max_tokens` is scored as pieces of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from packlib.lab import figures
from packlib.lab.figures import Picture
from packlib.lab.runs import experiment
from packlib.lab.studies.convergence import (
    MULTIPACK,
    POSID,
    Arm,
    by_corpus,
    differences,
    read_setting,
    results,
    tell,
)

OWN = {"rows_per_step", "seeds"}
RANDOM, CROP = "random_packing_posid", "best_fit_crop_posid"
CUT, AS_THEY_COME = "cut anywhere", "cut anywhere, rows as they come"
WAYS = {  # strategy, how overlong examples are handed to it, and what it is called
    CUT: (POSID, "cut"),
    AS_THEY_COME: (POSID, "cut"),
    "split, random rows": (RANDOM, "split"),
    "split, best fit": (MULTIPACK, "split"),
    "truncated, best fit": (MULTIPACK, "truncate"),
    "begin with an example, crop the last": (CROP, "cut"),
}
FURTHER = ("eval_tokens", "eval_loss_longest", "eval_loss_per_token_rest", "eval_tokens_rest")
EARLY = 64  # tokens: the first ones of an example, which a cut may leave without what they follow from
VALUES = {
    "every token": "every",
    f"first {EARLY} tokens": "early",
    "first rows": "per_token",
    "first rows of long ones": "eval_loss_longest",
    "behind the first row": "eval_loss_per_token_rest",
}
BASE = "split, best fit"


def arms(settings: Sequence[Mapping[str, Any]], **shared: Any) -> list[Arm]:
    """WAYS for every seed. settings: mappings of `corpus, steps, rows_per_step, seeds` and fields of `RunSpec`.

    >>> setting = {"corpus": "pysource", "steps": 8, "rows_per_step": 4, "max_tokens": 256, "eval_examples": 8}
    >>> [(arm.variant, arm.spec.overflow) for arm in arms([setting | {"seeds": [0]}])][0]
    ('cut anywhere', 'cut')
    """
    found = []
    for setting in settings:
        base, own = read_setting(setting, OWN, OWN | {"corpus", "steps"}, **shared)
        rows = replace(base, batch_size=own["rows_per_step"], gradient_accumulation=1, eval_every=base.steps)
        found += [
            Arm(strategy, variant, replace(rows, strategy=strategy, overflow=overflow, seed=seed, atom_size=atom))
            for seed in own["seeds"]
            for variant, (strategy, overflow) in WAYS.items()
            for atom in [base.max_tokens if variant == CUT else None]  # rows are what is shuffled
        ]
    return found


def measured(folder: Path, planned: Sequence[Arm]) -> pd.DataFrame:
    """`convergence.results` with what is scored here, in nats per token, and two facts of what is trained on.

    `lost`: share of tokens in no row; `repeated`: tokens trained on for each that is in one.

    `arm` is the way alone; `early` is of the first EARLY tokens of held-out examples (octaves that begin below), and
    `every` weighs the first max_tokens and what lies behind them.
    """
    found = results(folder, planned, FURTHER)
    lost, early, repeated = [], [], []
    for arm in planned:
        record = experiment.find(arm.spec, folder) or {}
        plan, metrics = record.get("plan") or {}, record.get("metrics") or {}
        total = plan.get("lost_tokens", 0) + plan.get("real_tokens", 0)
        lost.append(plan["lost_tokens"] / total if total else math.nan)
        repeated.append(record["trace"]["tokens"][-1] / plan["real_tokens"] if total else math.nan)
        first = [(loss * seen, seen) for at, loss, seen in metrics.get("eval_loss_by_position", ()) if at < EARLY]
        losses, seen = np.sum(first, axis=0) if first else (math.nan, 1)
        early.append(losses / seen)
    tokens, rest = found["eval_tokens"], found["eval_tokens_rest"].fillna(0)
    every = tokens * found["per_token"] + rest * found["eval_loss_per_token_rest"].fillna(0)
    found = found.assign(lost=lost, early=early, repeated=repeated)
    return found.assign(arm=found["variant"], every=every / (tokens + rest))


def positions(folder: Path, planned: Sequence[Arm]) -> pd.DataFrame:
    """Loss by position: `corpus, arm, strategy, seed, position` (the first of its octave)`, loss` in nats per token."""
    rows = []
    for arm in planned:
        metrics = (experiment.find(arm.spec, folder) or {}).get("metrics") or {}
        for position, loss, _ in metrics.get("eval_loss_by_position", []):
            names = arm.names | {"arm": arm.variant, "seed": arm.spec.seed}
            rows.append(names | {"position": position, "loss": loss})
    return pd.DataFrame(rows, columns=["corpus", "arm", "strategy", "seed", "position", "loss"])


def overview(found: pd.DataFrame) -> pd.DataFrame:
    """Of one corpus: tokens, share lost, and the mean losses of VALUES, an arm a row.

    `× each`: how often the tokens that are not lost are trained on. `findings` says which losses differ.
    """
    rows = {}
    for arm, runs in found[found["status"] == "ok"].groupby("arm", sort=False):
        row = {"tokens": runs["tokens"].mean(), "lost": runs["lost"].mean(), "× each": runs["repeated"].mean()}
        row |= {"seeds": len(runs)}
        row |= {name: runs[value].mean() for name, value in VALUES.items() if runs[value].notna().any()}
        rows[arm] = row
    return pd.DataFrame(rows).T


def display_table(found: pd.DataFrame) -> Styler:
    """`overview` as it is read."""
    formats = {"tokens": "{:,.0f}", "lost": "{:.0%}", "× each": "{:.1f}", "seeds": "{:.0f}"}
    return overview(found).style.format(formats | dict.fromkeys(VALUES, "{:.3f}"), na_rep="")


def position_curves(table: pd.DataFrame, corpus: str) -> Picture:
    """Loss by position minus that of BASE, seed by seed: mean and range of each way, from the second token on.

    A first token follows from nothing, and whatever a model thinks of it is noise between seeds.
    """
    alt = f"Loss by position in the example on {corpus}, each way of cutting minus “{BASE}”, with its range over seeds"
    drawn, (ax,) = figures.new(11, 4.6, alt)
    table = table[table["position"] > 1]
    base = table[table["arm"] == BASE].set_index(["seed", "position"])["loss"]
    for arm, runs in table[table["arm"] != BASE].groupby("arm", sort=False):
        gap = (runs.set_index(["seed", "position"])["loss"] - base).dropna().groupby("position")
        color, _, marker = figures.style(runs["strategy"].iloc[0])
        dashes = "--" if "truncated" in arm or arm == AS_THEY_COME else "-"
        ax.plot(gap.mean().index, gap.mean(), color=color, marker=marker, linestyle=dashes, label=arm)
        ax.fill_between(gap.mean().index, gap.min(), gap.max(), color=color, alpha=0.12, linewidth=0)
    ax.axhline(0, color="black", linewidth=1)
    figures.log2_axis(ax)
    ax.set(xlabel="position in the example, tokens (each point up to the next)", ylabel=f"loss minus “{BASE}” (nats)")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figures.head(drawn, f"{corpus}: where in an example cutting is paid")


def findings(found: pd.DataFrame) -> list[str]:
    """For each of VALUES on each corpus: what differs from BASE, and what no interval decides, in sentences."""
    return [said for corpus, runs in by_corpus(found).items() for said in _findings(runs, corpus)]


def _findings(found: pd.DataFrame, corpus: str) -> list[str]:
    said = []
    ok = found[found["status"] == "ok"]
    for name, value in VALUES.items():
        losses = ok.dropna(subset=value).groupby("arm", sort=False)[value].mean()
        if len(losses) < 2 or BASE not in losses:
            continue
        gaps = differences(ok, BASE, value).sort_values("difference")
        decided = (gaps["low"] > 0) | (gaps["high"] < 0)
        told = [f"“{row['label']}” {tell(row)}" for row in gaps[decided].to_dict("records")]
        open_ones = [f"“{row['label']}” ({row['difference']:+z.4f})" for _, row in gaps[~decided].iterrows()]
        parts = ["; ".join(told) or "none is established to differ"]
        parts += [f"undecided: {', '.join(open_ones)}"] if open_ones else []
        said.append(f"{corpus}, {name}, against “{BASE}” ({losses[BASE]:.4f} nats): {'; '.join(parts)}.")
    return said
