"""Whether and why whole examples in full rows lose at equal steps: arms that take one suspected cause away each.

Sorted packing (best fit decreasing, multipack) differs from mini-batches in more than its fill: a row holds examples of
about one length, so that steps are all long or all short (which examples share a step); it holds two of them or thirty
(how many); an example in a row of thirty weighs less than one in a row of two (weight); a learning rate may suit its
steps less (rate, and whether it decays); and its long rows come whenever they come (order). The gap to mini-batches is
measured with all of these, then without one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pandas as pd

from packlib.lab import figures, tables
from packlib.lab.figures import Picture
from packlib.lab.runs.spec import RunSpec
from packlib.lab.studies.convergence import (
    AVERAGES,
    EXACT,
    MULTIPACK,
    STEPS,
    Arm,
    arm_label,
    by_corpus,
    read_setting,
    tell,
)

MINI, MIXED, BY_LENGTH = "minibatch_packing", "best_fit_posid", "group_by_length"
FIRST, LAST = f"{STEPS}, long rows first", f"{STEPS}, long rows last"
PER_EXAMPLE, LONGALIGN, DECAY, RATE = "weights per example", "LongAlign's weights", "linear decay", "lr × 2"
OWN = {"rows_per_step", "seeds", "further_seeds"}
NAMED = 0.8  # share of the gap that an arm must take away to be called its cause
GAP_SAID = "sorted packing against mini-batches at equal steps"
CAUSE, PART = "it is the cause, nothing is established to be left", "a part of the cause"
ADDED, AROUND, WIDER, RULED_OUT, UNDECIDED = "added", "around", "wider", "ruled out", "undecided"
OTHERS = {
    ADDED: "what the suspected cause does alone, added to mini-batches",
    RULED_OUT: "ruled out as the whole cause, as a gap remains without it",
    WIDER: "wider than the gap itself, so no cause of it",
    AROUND: "the gap turns around, so this changes more than its cause",
    UNDECIDED: "undecided",
}


class Suspect(NamedTuple):
    """What a pair of arms (strategy, variant) leaves of the gap, and which cause it goes without, or `adds` alone."""

    label: str
    changed: tuple[str, str]
    base: tuple[str, str]
    adds: bool = False


MINIBATCHES = (MINI, "")
GAP = Suspect("Sorted packing, as it is", (MULTIPACK, STEPS), MINIBATCHES)
SUSPECTS = [
    GAP,
    Suspect("Mixed rows, as full (which examples, and how many)", (MIXED, STEPS), MINIBATCHES),
    Suspect("Sorted rows, constant examples (how many)", (MULTIPACK, EXACT), MINIBATCHES),
    Suspect("Mini-batches by length (which examples, alone)", (BY_LENGTH, ""), MINIBATCHES, adds=True),
    Suspect("Every example weighs alike in its step", (MULTIPACK, f"{STEPS}, {PER_EXAMPLE}"), (MINI, PER_EXAMPLE)),
    Suspect("Every example weighs alike in all steps", (MULTIPACK, f"{STEPS}, {LONGALIGN}"), (MINI, PER_EXAMPLE)),
    Suspect("Learning rate decays to 0", (MULTIPACK, f"{STEPS}, {DECAY}"), (MINI, DECAY)),
    Suspect("Mixed rows, and the rate decays to 0", (MIXED, f"{STEPS}, {DECAY}"), (MINI, DECAY)),
    Suspect("Learning rate × 2", (MULTIPACK, f"{STEPS}, {RATE}"), (MINI, RATE)),
    Suspect("Long rows first", (MULTIPACK, FIRST), MINIBATCHES),
    Suspect("Long rows last", (MULTIPACK, LAST), MINIBATCHES),
]


def arms(settings: Sequence[Mapping[str, Any]], **shared: Any) -> list[Arm]:
    """The arms of each setting: those of the gap and of its repair for `seeds`, all others for `further_seeds`.

    settings: mappings of `corpus, limit, rows_per_step, seeds, further_seeds` and fields of `RunSpec`. shared: such
    fields, where a setting has none.

    >>> setting = {"corpus": "pydocs", "limit": 80, "batch_size": 8, "rows_per_step": 2, "eval_examples": 8}
    >>> found = arms([setting | {"seeds": [0, 1], "further_seeds": [0]}])
    >>> len(found), found[1].label, found[1].spec.steps
    (18, 'Multipack + PosID, equal steps', 10)
    """
    found = []
    for setting in settings:
        base, own = read_setting(setting, OWN, OWN | {"corpus", "limit"}, **shared)
        key, further = _variants(base, own["rows_per_step"])
        for names, seeds in ((key, own["seeds"]), (further, own["further_seeds"])):
            found += [
                Arm(strategy, variant, replace(base, strategy=strategy, seed=seed, **changes))
                for seed in seeds
                for (strategy, variant), changes in names.items()
            ]
    return found


Changes = dict[tuple[str, str], dict[str, Any]]


def _variants(base: RunSpec, rows_per_step: int) -> tuple[Changes, Changes]:
    """(strategy, variant) -> the fields that differ from base: of the gap and its repair, and of all others."""
    if base.limit is None:
        raise ValueError("limit = None; expected the number of training examples: the steps of the arms follow from it")
    examples = base.batch_size * base.gradient_accumulation
    steps = math.ceil(base.limit / examples)
    every = {"eval_every": math.ceil(steps / 2)}
    full = every | {"batch_size": rows_per_step, "gradient_accumulation": 1, "steps": steps}
    constant = every | {"batch_size": 1, "gradient_accumulation": 1, "examples_per_step": examples, "split_rows": True}
    key: Changes = {(MINI, ""): every, (MULTIPACK, STEPS): full, (MIXED, STEPS): full}
    further: Changes = {
        (MULTIPACK, EXACT): constant,
        (BY_LENGTH, ""): every,
        (MULTIPACK, FIRST): full | {"order": "long_first"},
        (MULTIPACK, LAST): full | {"order": "long_last"},
        (MULTIPACK, f"{STEPS}, {LONGALIGN}"): full | {"weighting": "longalign"},
    }
    conditions: dict[str, dict[str, Any]] = {
        DECAY: {"lr_scheduler": "linear"},
        RATE: {"learning_rate": 2 * base.learning_rate},
        PER_EXAMPLE: {"weighting": "per_example"},
    }
    for name, changes in conditions.items():
        further[MINI, name] = every | changes
        further[MULTIPACK, f"{STEPS}, {name}"] = full | changes
    further[MIXED, f"{STEPS}, {DECAY}"] = full | conditions[DECAY]
    return key, further


def gaps(found: pd.DataFrame, value: str = "per_token") -> pd.DataFrame:
    """What each of SUSPECTS leaves of the gap on one corpus, and takes of it, both paired by seed.

    found: `convergence.results` of one corpus. value: `per_token` or `per_example`. Returns a row a pair that was
    measured: `label, strategy, difference, low, high, standard_errors, n` in nats, as `tables.paired_differences`;
    `taken, taken_low, taken_high` of the gap, in nats; `share` of it (NaN where no seed has both).
    """
    loss = found[found["status"] == "ok"].pivot_table(index="seed", columns="arm", values=value)
    gap, rows = _by_seed(loss, GAP), []
    for suspect in SUSPECTS:
        by_seed = _by_seed(loss, suspect)
        if not len(by_seed):
            continue
        mean = tables.mean_interval(by_seed)
        row = {"label": suspect.label, "strategy": suspect.changed[0], "difference": mean.mean, "low": mean.low}
        row |= {"high": mean.high, "standard_errors": mean.standard_errors, "n": len(by_seed)}
        row |= dict.fromkeys(("taken", "taken_low", "taken_high", "share"), math.nan)
        common = gap.index.intersection(by_seed.index)
        if suspect is not GAP and len(common):
            taken = tables.mean_interval(gap[common] - by_seed[common])
            row |= {"taken": taken.mean, "taken_low": taken.low, "taken_high": taken.high}
            row["share"] = taken.mean / gap[common].mean()
        rows.append(row)
    return pd.DataFrame(rows)


def _by_seed(loss: pd.DataFrame, suspect: Suspect) -> pd.Series:
    changed, base = arm_label(*suspect.changed), arm_label(*suspect.base)
    if not {changed, base} <= set(loss):
        return pd.Series(dtype=float)
    return (loss[changed] - loss[base]).dropna()


def figure(found: pd.DataFrame, corpus: str) -> Picture:
    """`gaps` as intervals, per token and per example, of one corpus."""
    table = pd.concat([gaps(found, value).assign(average=name) for name, value in AVERAGES.items()])
    title = f"{corpus}: what is left without each cause"
    drawn = figures.forest(table, title, "validation loss minus mini-batches'", panels="average")
    drawn.alt = f"What is left of the difference between sorted packing and mini-batches on {corpus}, cause by cause"
    return drawn


def findings(found: pd.DataFrame) -> list[str]:
    """The gap on each corpus, what takes it away, and what does not, in sentences. found: `results`."""
    return [said for corpus, runs in by_corpus(found).items() for said in _findings(runs, corpus)]


def _findings(found: pd.DataFrame, corpus: str) -> list[str]:
    said: list[str] = []
    for name, value in AVERAGES.items():
        table = gaps(found, value)
        if not len(table) or table["label"].iloc[0] != GAP.label:
            continue
        gap, rows = table.iloc[0], table.iloc[1:].dropna(subset="taken")
        said.append(f"{corpus}, {name}: {GAP_SAID}: {tell(gap)}.")
        if not gap["low"] > 0:
            said.append(f"{corpus}, {name}: the interval of the gap holds 0 (or has one seed), so no cause is named.")
            continue
        verdicts = pd.Series([verdict(row) for row in rows.to_dict("records")], index=rows.index, dtype=object)
        for kind in (CAUSE, PART):
            said += [f"{corpus}, {name}: {_took(row)}: {kind}." for row in rows[verdicts == kind].to_dict("records")]
        for kind, told in OTHERS.items():
            if alike := [_left(row) for row in rows[verdicts == kind].to_dict("records")]:
                said.append(f"{corpus}, {name}: {told} (difference to mini-batches, nats): {'; '.join(alike)}.")
    return said


def _left(row: Mapping[str, Any]) -> str:
    return f"“{row['label']}” {row['difference']:+z.4f} ({row['low']:+z.4f} to {row['high']:+z.4f})"


def _took(row: Mapping[str, Any]) -> str:
    took = f"“{row['label']}” takes {row['share']:.0%} of the gap away ({row['taken']:+z.4f} nats, "
    return f"{took}95 % interval {row['taken_low']:+z.4f} to {row['taken_high']:+z.4f}); left: {tell(row)}"


def verdict(row: Mapping[str, Any]) -> str:
    """What a row of `gaps` says of its suspect: CAUSE, PART or a key of OTHERS.

    The cause takes NAMED of the gap away, and of what is left the interval holds 0.
    """
    if row["label"] in {suspect.label for suspect in SUSPECTS if suspect.adds}:
        return ADDED
    if row["taken_low"] > 0 and row["high"] < 0:
        return AROUND
    if row["taken_low"] > 0:
        return CAUSE if row["share"] >= NAMED and row["low"] <= 0 else PART
    if row["taken_high"] < 0:
        return WIDER
    return RULED_OUT if row["low"] > 0 else UNDECIDED
