"""Whether a run's times can be trusted: its controls, and the sentence that takes its rankings back where they fail.

Two controls are known beforehand to be 1. With one example a batch nothing is padded, so that padding and packing do
the same work; and an arm that is repeated takes the same time. Where either is off by more than a few per cent, the
same cause may sit in every other ratio of the run, so that none is ranked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import pandas as pd

from packlib.lab import records, tables
from packlib.lab.runs.spec import PADDED_SDPA

CONTROL = 0.03  # a batch of one: packing's speed over padding's, from 1
REPEATS = 0.03  # rates of an arm's repeats, largest over smallest, from 1
PAIR = ("padding", "minibatch_packing")
BATCH = ["batch_size", "gradient_accumulation"]


class Doubt(str):
    """A finding that takes others back: shown on top, in red. short: what is off, in two words."""

    short: str

    def __new__(cls, text: str, short: str = "") -> Self:
        doubt = super().__new__(cls, text)
        doubt.short = short
        return doubt


def doubts(frame: pd.DataFrame) -> list[Doubt]:
    """What the controls among these runs (`records.load_records`) say against their times; nothing where they hold."""
    if "strategy" not in frame:
        return []
    ok = frame[(frame["status"] == "ok") & frame["strategy"].notna()]
    timed = tables.alone(ok)
    found = [of_control(*control) for control in controls(timed)]
    return [*(doubt for doubt in found if doubt), *of_repeats(timed)]


def by_run(frame: pd.DataFrame, own: Iterable[str] | None = None) -> dict[str, list[str]]:
    """What is said against each run folder's times, in sentences that begin with its name; nothing of the others.

    frame: runs with a column `run`, the folder's name. own: ids of the runs that a study shows, if not all: then the
    doubts are of settings that these were measured in, with batches of any size (a control has batches of one), and of
    the folder's other runs a plain line says what is off.
    """
    if not {"run", "strategy"} <= set(frame):
        return {}
    found: dict[str, list[str]] = {}
    ids = None if own is None else list(own)
    for run, runs in frame[frame["strategy"].notna()].groupby("run", sort=False):
        setting = _by_setting(runs.drop(columns=BATCH, errors="ignore"), []).ngroup()
        shown = setting.isin(setting if ids is None else setting[runs["run_id"].isin(ids)])
        said: list[str] = [Doubt(f"{run}: {doubt}", doubt.short) for doubt in doubts(runs[shown])]
        if off := in_short(doubts(runs[~shown])):
            said.append(f"{run}: other runs of this folder are in doubt ({off}); none of them is shown here.")
        if said:
            found[str(run)] = said
    return found


def of_records(found: Iterable[Mapping[str, Any]], own: Iterable[str]) -> str:
    """What is off of the settings of some runs among these records, as `in_short` says it. own: their ids."""
    frame = records.as_table(found)
    return in_short(by_run(frame.assign(run="these"), own).get("these", [])) if len(frame) else ""


def of_folder(folder: Path, own: Iterable[str]) -> list[str]:
    """`by_run` of one run folder and what a study shows of it."""
    frame = records.load_records(folder).assign(run=folder.name)
    return by_run(frame, own).get(folder.name, [])


def in_short(found: Iterable[str]) -> str:
    """What is off, of the doubts among these sentences: in words for a title; empty without any.

    >>> in_short([Doubt("The control is off: …", "control off"), "A step costs 4 ms."])
    'control off'
    """
    return ", ".join(dict.fromkeys(said.short for said in found if isinstance(said, Doubt)))


def of_control(ratio: float, where: str) -> Doubt | None:
    """The doubt that a batch of one raises, if it does. ratio: packing's speed over padding's; NaN: not measured."""
    if math.isnan(ratio) or abs(ratio - 1) <= CONTROL:
        return None
    return Doubt(
        f"The control is off: with one example a batch, where nothing is padded, packing runs at {ratio:.3f} times "
        f"padding's speed ({where}); expected 1 within {CONTROL:.0%}. Ratios of this run hold a difference that is not "
        f"packing's, and the run ranks nothing.",
        "control off",
    )


def of_repeats(frame: pd.DataFrame) -> list[Doubt]:
    """The doubt that repeats of an arm raise, if they do."""
    spread, where = _widest(frame)
    if math.isnan(spread) or spread <= REPEATS:
        return []
    return [
        Doubt(
            f"Repeats are off: the rate of an arm differs by {spread:.1%} between its repeats ({where}); expected "
            f"{REPEATS:.0%} at most. Smaller differences of this run may be noise, and the run ranks nothing.",
            "repeats off",
        )
    ]


def repeat_spread(frame: pd.DataFrame) -> float:
    """How far apart the rates of an arm's repeats are, at most, as a share; NaN without repeats.

    The rate over all measured steps, which is what tables show: the median of few steps that are unlike each other is
    the time of whichever lies in the middle.
    """
    return _widest(frame)[0]


def _widest(frame: pd.DataFrame) -> tuple[float, str]:
    """`repeat_spread`, and the arm that it is of."""
    ok, column = frame[frame["status"] == "ok"], "metrics.tokens_per_s.mean"
    spread, where = math.nan, ""
    if column not in ok:
        return spread, where
    for _, arm in _by_setting(ok, ["strategy", "kernel", "seed"], steps=True):
        apart = arm[column].max() / arm[column].min() - 1
        if len(arm) > 1 and not apart <= spread:
            one = arm.iloc[0]
            name = tables.arm_label(one["strategy"], one["kernel"])
            examples = f"{one['batch_size']:.0f} example{'s' if one['batch_size'] > 1 else ''} a batch"
            where = f"{name}, {tables.short(one['model'])} on {tables.short(one['corpus'])}, {examples}"
            spread = float(apart)
    return spread, where


def controls(timed: pd.DataFrame) -> list[tuple[float, str]]:
    """Of every setting with one example a batch: packing's speed over padding's, and where that is.

    Padding that is unpadded inside attention, or, where a rig cannot have that (CUDA graphs), through SDPA.
    """
    if "metrics.tokens_per_s.mean" not in timed:
        return []
    one = timed[(timed["batch_size"] == 1) & timed["strategy"].isin(PAIR)]
    found = []
    for _, group in _by_setting(one, []):
        rate = group.groupby(["strategy", "kernel"])["metrics.tokens_per_s.mean"].median()
        padded = [rate[arm] for kernel in ("auto", *PADDED_SDPA) if (arm := ("padding", kernel)) in rate]
        if padded and (packed := ("minibatch_packing", "auto")) in rate:
            where = f"{tables.short(group['model'].iloc[0])} on {tables.short(group['corpus'].iloc[0])}"
            found.append((float(rate[packed] / padded[0]), where))
    return found


def _by_setting(frame: pd.DataFrame, own: list[str], *, steps: bool = False) -> pd.api.typing.DataFrameGroupBy:
    """Runs by all that their specs share, of their number of steps only if `steps`, and by the columns `own`."""
    varies = tables.VARIES - {"model", "corpus"} | (set() if steps else {"steps"})
    fixed = [name for name in frame if "." not in name and name not in varies]
    return frame.assign(rig=tables.rigs(frame)).groupby([*fixed, "rig", *own], sort=False, dropna=False)
