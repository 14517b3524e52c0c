"""When a neighbour's text helps: related examples beside each other, or random ones, with boundaries and without.

Fixed-length rows, so that all four arms have the same steps and tokens. `order="neighbours"` runs the stream through
examples that are alike (TF-IDF) and shuffles the rows; the arms with boundaries say what being together in a step does
by itself. Held-out examples are scored alone, and behind training examples like them: what a model trained on related
rows might have learned to use (2402.13991, 2408.09327, 2512.14427).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from packlib.lab import figures
from packlib.lab.figures import Picture
from packlib.lab.studies.convergence import (
    FIXED,
    POSID,
    STEPS,
    Arm,
    arm_label,
    by_corpus,
    differences,
    exact_matches,
    read_setting,
    tell,
    verdict,
)

OWN = {"rows_per_step", "seeds"}
RELATED = f"{STEPS}, neighbours"
FURTHER = ("eval_loss_per_token_in_context", "exact_match_in_context")
VALUES = {"alone": "per_token", "behind related examples": FURTHER[0]}
PAIRS = {
    "No boundaries, random neighbours": ((FIXED, STEPS), (POSID, STEPS)),
    "No boundaries, related neighbours": ((FIXED, RELATED), (POSID, RELATED)),
    "Related instead of random neighbours, no boundaries": ((FIXED, RELATED), (FIXED, STEPS)),
    "Related instead of random neighbours, boundaries": ((POSID, RELATED), (POSID, STEPS)),
}


def arms(settings: Sequence[Mapping[str, Any]], **shared: Any) -> list[Arm]:
    """Four arms a seed: random or related neighbours, without boundaries and with.

    settings: mappings of `corpus, limit, rows_per_step, seeds` and fields of `RunSpec`; `eval_context` says how many
    examples stand before a held-out one. shared: such fields, where a setting has none.

    >>> setting = {"corpus": "arithmetic", "loss": "response", "limit": 80, "batch_size": 8, "rows_per_step": 2}
    >>> [arm.spec.order for arm in arms([setting | {"seeds": [0], "eval_examples": 8}])]
    ['planned', 'planned', 'neighbours', 'neighbours']
    """
    found = []
    for setting in settings:
        base, own = read_setting(setting, OWN, OWN | {"corpus", "limit"}, **shared)
        steps = math.ceil((base.limit or 1) / (base.batch_size * base.gradient_accumulation))
        equal = replace(base, batch_size=own["rows_per_step"], gradient_accumulation=1, steps=steps, eval_every=steps)
        for seed in own["seeds"]:
            for variant, order in ((STEPS, "planned"), (RELATED, "neighbours")):
                found += [
                    Arm(name, variant, replace(equal, strategy=name, seed=seed, order=order)) for name in (FIXED, POSID)
                ]
    return found


def effects(found: pd.DataFrame) -> pd.DataFrame:
    """PAIRS on one corpus: rows of `convergence.differences`, and `where` held-out examples stand (VALUES)."""
    rows = []
    for label, (changed, base) in PAIRS.items():
        runs = found[found["arm"].isin([arm_label(*changed), arm_label(*base)])]
        for where, value in VALUES.items():
            for row in differences(runs, arm_label(*base), value).to_dict("records"):
                rows.append(row | {"label": label, "where": where})
    return pd.DataFrame(rows, columns=None if rows else ["label", "where"])


def losses(found: pd.DataFrame) -> pd.DataFrame:
    """Mean validation loss over seeds where held-out examples stand, an arm a row."""
    return found.groupby(["corpus", "arm"], sort=False)[list(VALUES.values())].mean().set_axis(list(VALUES), axis=1)


def answers(found: pd.DataFrame) -> pd.DataFrame:
    """`convergence.exact_matches` where held-out examples stand, an arm a row."""
    values = zip(VALUES, ("exact_match", FURTHER[1]))
    return pd.concat({where: exact_matches(found, value) for where, value in values}, axis=1)


def figure(found: pd.DataFrame, corpus: str) -> Picture:
    """`effects` as intervals, a panel for each place where held-out examples stand."""
    title = f"{corpus}: when a neighbour helps"
    drawn = figures.forest(effects(found), title, "difference of validation loss", panels="where")
    drawn.alt = (
        f"Differences of validation loss on {corpus} between rows without and with boundaries, and with related and "
        f"random neighbours, {' and '.join(VALUES)}"
    )
    return drawn


def findings(found: pd.DataFrame) -> list[str]:
    """What rows without boundaries cost, by which neighbours they have and how it is asked: one sentence a pair.

    Where runs are planned and none has a result, this.
    """
    if len(found) and not (found["status"] == "ok").any():
        return [f"Neighbours: not measured yet, none of {len(found)} runs has a result."]
    said = []
    for corpus, runs in by_corpus(found).items():
        for label, rows in effects(runs).groupby("label", sort=False):
            told = "; ".join(f"{row['where']}: {_verdict(row)}" for row in rows.to_dict("records"))
            said.append(f"{corpus}: {label}, held-out examples {told}.")
    return said


def _verdict(row: Mapping[str, Any]) -> str:
    found = verdict(row)
    return f"{found}, {tell(row)}" if found else f"{tell(row)}; measure more seeds"
