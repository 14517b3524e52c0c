"""Which strategy has the lowest loss after so many seconds of GPU? Losses of real runs, on the clock of a given rig.

A run's losses depend on its steps, its seconds on the rig. So arms are trained once (several at a time, where only
losses count) and dated by a clock: seconds of a step = per_step + per_slot × slots, fitted to runs that had a device
alone. Every arm has its own learning rate, the best of a grid on a seed that is not reported, judged at equal time.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler
from scipy.optimize import nnls

from packlib.lab import doubts, figures, records, tables
from packlib.lab.figures import Picture
from packlib.lab.parameters import unknown_name
from packlib.lab.runs import experiment
from packlib.lab.runs.spec import Rig, RunSpec
from packlib.lab.strategies import STRATEGIES
from packlib.lab.studies.convergence import (
    EXACT,
    MULTIPACK,
    NAMES,
    POSID,
    STEPS,
    Arm,
    by_corpus,
    read_setting,
)

MIXED = "best_fit_posid"
OWN = {"rows_per_step", "seeds", "pick_seed", "rates", "all_steps"}
EVALUATIONS = 6  # of a run, the end included
WHOLE, UNTUNED = "full batches", "full batches, padding's rate"
KEYS = {  # strategy and variant of what `all_steps` names
    "padding": ("padding", ""),
    "group_by_length": ("group_by_length", ""),
    "minibatch_packing": ("minibatch_packing", ""),
    "multipack": (MULTIPACK, WHOLE),
    "constant examples": (MULTIPACK, EXACT),
    "fixed length": (POSID, WHOLE),
    "mixed rows": (MIXED, STEPS),
}
PADDING = "Padding"


class Timed(NamedTuple):
    """What was found: the grid's arms, those reported, the clocks, and `curves` by corpus and a clock's label."""

    grid: list[Arm]
    reported: list[Arm]
    clocks: list[Clock]
    curves: dict[str, dict[str, pd.DataFrame]]


def measure(asked: Mapping[str, Any], folder: Path, train: Callable[[Sequence[Arm]], None], **shared: Any) -> Timed:
    """Train the grid, choose rates by the first clock, train what is reported, and date it by every clock.

    asked: `settings`, as of `grid_arms`, and perhaps `clocks`, as of `clocks`; may be empty. train: makes sure that
    arms have a record in `folder`, or leaves them without.
    """
    unknown = asked.keys() - {"settings", "clocks"}
    for name in sorted(unknown):
        raise unknown_name("part of equal_time", name, ("settings", "clocks"))
    settings = asked.get("settings", ())
    grid = grid_arms(settings, **shared)
    train(grid)
    dated = clocks(asked.get("clocks", ()), folder, grid)
    reported = reported_arms(settings, folder, dated[0], **shared) if dated else []
    train(reported)
    found: dict[str, dict[str, pd.DataFrame]] = {}
    for clock in dated:
        for corpus, curve in by_corpus(curves(folder, reported, clock)).items():
            found.setdefault(corpus, {})[clock.label] = curve
    return Timed(grid, reported, dated, found)


def grid_arms(settings: Sequence[Mapping[str, Any]], **shared: Any) -> list[Arm]:
    """Every arm at every rate, on the seed that is not reported.

    settings: mappings of `corpus, limit, rates, pick_seed, seeds`, `rows_per_step` (rows with about a step's examples),
    `all_steps` (a key of KEYS: steps, enough to fill padding's time) and fields of `RunSpec`. shared: such fields,
    where a setting has none.

    >>> setting = {"corpus": "pydocs", "limit": 80, "batch_size": 8, "rows_per_step": 2, "eval_examples": 8}
    >>> setting |= {"rates": [1e-3, 2e-3], "pick_seed": 9, "seeds": [0], "all_steps": {"padding": 10, "multipack": 5}}
    >>> [(arm.label, arm.spec.steps, arm.spec.learning_rate) for arm in grid_arms([setting])][2:]
    [('Multipack + PosID, full batches', 5, 0.001), ('Multipack + PosID, full batches', 5, 0.002)]
    """
    return [
        Arm(arm.strategy, arm.variant, replace(arm.spec, seed=own["pick_seed"], learning_rate=rate))
        for setting in settings
        for base, own in [_read(setting, shared)]
        for arm in _arms(base, own)
        for rate in own["rates"]
    ]


def reported_arms(settings: Sequence[Mapping[str, Any]], folder: Path, clock: Clock, **shared: Any) -> list[Arm]:
    """Every arm whose grid is complete in `folder`, at its best rate by `clock`; multipack at padding's, too."""
    best = best_rates(folder, grid_arms(settings, **shared), clock)
    found = []
    for base, own in (_read(setting, shared) for setting in settings):
        corpus = tables.short(base.corpus)
        for seed in own["seeds"]:
            for arm in _arms(base, own):
                variants = {arm.variant: best.get((corpus, arm.label))}
                of_padding = best.get((corpus, PADDING))
                if (arm.strategy, arm.variant) == KEYS["multipack"] and of_padding != variants[arm.variant]:
                    variants[UNTUNED] = of_padding
                found += [
                    Arm(arm.strategy, variant, replace(arm.spec, seed=seed, learning_rate=rate))
                    for variant, rate in variants.items()
                    if rate
                ]
    return found


def _read(setting: Mapping[str, Any], shared: Mapping[str, Any]) -> tuple[RunSpec, dict[str, Any]]:
    base, own = read_setting(setting, OWN, OWN | {"corpus", "limit"}, **shared)
    for name in sorted(own["all_steps"].keys() - KEYS.keys()):
        raise unknown_name("arm of all_steps", name, KEYS)
    if own["pick_seed"] in own["seeds"]:
        raise ValueError(f"pick_seed = {own['pick_seed']} is among seeds = {own['seeds']}; expected a seed of its own")
    return base, own


def _arms(base: RunSpec, own: Mapping[str, Any]) -> list[Arm]:
    """One arm a key of `all_steps`, at base's seed and rate."""
    examples = base.batch_size * base.gradient_accumulation
    one = {"gradient_accumulation": 1}
    changes = {
        "constant examples": one | {"batch_size": 1, "examples_per_step": examples, "split_rows": True},
        "mixed rows": one | {"batch_size": own["rows_per_step"]},
    }
    found = []
    for key, (strategy, variant) in KEYS.items():
        if steps := own["all_steps"].get(key):
            every = math.ceil(steps / EVALUATIONS)
            spec = replace(base, strategy=strategy, steps=steps, eval_every=every, **changes.get(key, {}))
            found.append(Arm(strategy, variant, spec))
    return found


# Clocks


@dataclass(frozen=True)
class Clock:
    """Seconds of a step: `per_step` + `per_slot` × slots.

    runs: ids of those that it was fitted to; error: of their mean steps. doubt: the folder that they are from and what
    is off there; empty where nothing is.
    """

    label: str
    per_step: float
    per_slot: float
    runs: tuple[str, ...]
    error: float
    doubt: str = ""

    @property
    def said(self) -> str:
        """The clock in a sentence."""
        costs = f"{1e3 * self.per_step:.3g} ms a step and {1e6 * self.per_slot:.3g} µs a slot"
        fitted = f"{len(self.runs)} runs that had the device alone, within {self.error:.0%}"
        return f"{self.label}: {costs} ({fitted}){'; ' if self.doubt else ''}{self.doubt}"


def fit_clock(found: Iterable[Mapping[str, Any]], label: str, rig: Mapping[str, Any] | None = None) -> Clock | None:
    """A clock of the records among `found` that had the device alone; None for fewer than two of them.

    rig: values that fields of their rig must have. Mean step after warm-up against its mean slots, least squares on
    relative errors, no cost below 0.
    """
    runs, points = [], []
    for record in found:
        strategy = STRATEGIES.get(record["spec"].get("strategy", ""))
        if record["status"] != "ok" or strategy is None or strategy.trl or not records.had_device_alone(record):
            continue
        of_run, kernel = asdict(Rig(**record["spec"].get("rig", {}))), record["spec"].get("kernel")
        # One builds masks, and is nobody's way to pad; the other, but in graphs, pays for each new width (LOG.md).
        if kernel == "transformers_sdpa" or (kernel == "maskless_sdpa" and not of_run["graphs"]):
            continue
        if all(of_run[name] == value for name, value in (rig or {}).items()):
            warm = min(record["spec"].get("warmup_steps", 0), len(record["trace"]["step"]) - 1)
            seconds, slots = (np.diff(record["trace"][name], prepend=0)[warm:].mean() for name in ("seconds", "slots"))
            points.append((seconds, slots))
            runs.append(record["run_id"])
    if len(points) < 2:
        return None
    seconds, slots = np.array(points).T
    features = np.column_stack([np.ones(len(slots)), slots]) / seconds[:, None]
    scale = features.max(axis=0)
    costs = nnls(features / scale, np.ones(len(slots)))[0] / scale
    error = float(np.abs(features @ costs - 1).max())
    return Clock(label, float(costs[0]), float(costs[1]), tuple(runs), error)


def clocks(named: Sequence[Mapping[str, Any]], folder: Path, planned: Sequence[Arm]) -> list[Clock]:
    """The clocks that a notebook names, those that can be fitted; without a name, that of the study's own runs.

    named: mappings of `label`, `run` (a run folder with records of 06 or 08), `model`, perhaps `rig`.
    """
    if not named:
        own = [record for arm in planned if (record := experiment.find(arm.spec, folder))]
        return _asked(fit_clock(own, "this run's own steps"), folder)
    found: list[Clock] = []
    for one in named:
        place = records.run_folder(one["run"], create=False)
        of_model = [record for record in records.read_records(place) if record["spec"].get("model") == one["model"]]
        found += _asked(fit_clock(of_model, one["label"], one.get("rig")), place)
    return found


def _asked(clock: Clock | None, folder: Path) -> list[Clock]:
    """A clock, if there is one, with what is in doubt of the runs in a folder that it was fitted to."""
    if clock is None:
        return []
    off = doubts.in_short(doubts.of_folder(folder, clock.runs))
    return [replace(clock, doubt=f"fitted to a run in doubt ({folder.name}: {off})") if off else clock]


# Tables


def curves(folder: Path, planned: Sequence[Arm], clock: Clock) -> pd.DataFrame:
    """Every evaluation of every measured run, dated by the clock: `Arm.names, seed, lr, step, seconds, loss, doubt`.

    loss: per token. doubt: the clock's.
    """
    rows = []
    for arm in planned:
        record = experiment.find(arm.spec, folder)
        if not record or record["status"] != "ok":
            continue
        trace = record["trace"]
        seen = {one["step"]: one["eval_loss_per_token"] for one in trace["evaluations"]}
        seen[trace["step"][-1]] = record["metrics"]["eval_loss_per_token"]
        for step, loss in sorted(seen.items()):
            seconds = clock.per_step * step + clock.per_slot * trace["slots"][step - 1]
            run = {"seed": arm.spec.seed, "lr": arm.spec.learning_rate, "step": step, "seconds": seconds, "loss": loss}
            rows.append(arm.names | run | {"doubt": clock.doubt})
    return pd.DataFrame(rows, columns=[*NAMES, "seed", "lr", "step", "seconds", "loss", "doubt"])


def doubt_of(curve: pd.DataFrame) -> str:
    """What is in doubt of the clock that dated it; empty where nothing is."""
    return str(curve["doubt"].iloc[0]) if len(curve) else ""


def at_equal_time(curve: pd.DataFrame) -> tuple[float, pd.DataFrame]:
    """Of one corpus: the seconds that every run fills, and each run's loss then, between two evaluations linearly.

    Returns (seconds, a row a run: `arm, strategy, variant, seed, lr, loss, step`); a run whose first evaluation comes
    later has none.
    """
    end = float(curve.groupby("spec_id")["seconds"].max().min())
    rows = []
    for _, run in curve.groupby("spec_id", sort=False):
        names = run.iloc[0][["arm", "strategy", "variant", "seed", "lr"]].to_dict()
        at = {name: float(np.interp(end, run["seconds"], run[name], left=np.nan)) for name in ("loss", "step")}
        rows.append(names | at)
    return end, pd.DataFrame(rows).dropna(subset="loss")


def best_rates(folder: Path, grid: Sequence[Arm], clock: Clock) -> dict[tuple[str, str], float]:
    """(corpus, arm) -> its rate with the lowest loss at equal time, of arms whose whole grid has been run.

    A run that failed (a loss that is no number) loses.
    """
    curve = curves(folder, grid, clock)
    tried = {arm.spec.spec_id for arm in grid if experiment.find(arm.spec, folder)}
    whole: dict[tuple[str, str], bool] = {}
    for arm in grid:
        place = tables.short(arm.spec.corpus), arm.label
        whole[place] = whole.get(place, True) and arm.spec.spec_id in tried
    best = {}
    for corpus, runs in curve.groupby("corpus", sort=False):
        _, then = at_equal_time(runs)
        for arm, rates in then.groupby("arm", sort=False):
            if whole[corpus, arm]:
                best[corpus, arm] = float(rates.loc[rates["loss"].idxmin(), "lr"])
    return best


def at_edge(timed: Timed) -> list[str]:
    """Arms whose best rate is the smallest or largest of their grid, in words: a better one may lie beyond."""
    rates: dict[tuple[str, str], set[float]] = {}
    for arm in timed.grid:
        rates.setdefault((tables.short(arm.spec.corpus), arm.label), set()).add(arm.spec.learning_rate)
    chosen = {(tables.short(arm.spec.corpus), arm.label): arm.spec.learning_rate for arm in timed.reported}
    return [
        f"{corpus}, {arm}: the best rate, {rate:g}, is at the edge of its grid."
        for (corpus, arm), rate in chosen.items()
        if (tried := rates.get((corpus, arm))) and rate in (min(tried), max(tried))
    ]


def standing(curve: pd.DataFrame) -> pd.DataFrame:
    """Of one corpus and clock: `loss, step, lr, seeds`, and the difference to padding, `low, high`.

    The best first, unless the clock is in doubt.
    """
    _, then = at_equal_time(curve)
    gaps = tables.paired_differences(then, "loss", base=PADDING, arm="arm")
    gaps = gaps.set_index("label") if len(gaps) else gaps
    rows = {}
    for arm, runs in then.groupby("arm", sort=False):
        row = {name: runs[name].mean() for name in ("loss", "step", "lr")} | {"seeds": len(runs)}
        if arm in gaps.index:
            row |= gaps.loc[arm, ["difference", "low", "high"]].to_dict()
        rows[arm] = row
    table = pd.DataFrame(rows).T
    return table if doubt_of(curve) else table.sort_values("loss")


def display_table(curve: pd.DataFrame) -> Styler:
    """`standing` as it is read."""
    nats = dict.fromkeys(("difference", "low", "high"), "{:+.4f}")
    formats = {"loss": "{:.4f}", "step": "{:.0f}", "lr": "{:g}", "seeds": "{:.0f}"} | nats
    return standing(curve).style.format(formats, na_rep="")


# Figure and findings


def figure(by_clock: Mapping[str, pd.DataFrame], corpus: str) -> Picture:
    """Loss after so many seconds: a panel a clock (label: `curves` of one corpus), a line an arm."""
    alt = f"Validation loss on {corpus} against seconds of GPU time, a line an arm with its range, a panel a clock"
    drawn, axes = figures.new(max(8.8, 5.4 * len(by_clock)), 5.4, alt, len(by_clock), sharey=True)
    for ax, (label, curve) in zip(axes, by_clock.items()):
        end, _ = at_equal_time(curve)
        for arm, runs in curve.groupby("arm", sort=False):
            color, _, marker = figures.style(runs["strategy"].iloc[0])
            line = {EXACT: ":", UNTUNED: "--"}.get(runs["variant"].iloc[0], "-")
            by_step = runs.groupby("step")
            x = by_step["seconds"].mean()
            ax.plot(x, by_step["loss"].mean(), color=color, marker=marker, linestyle=line, markersize=6, label=arm)
            ax.fill_between(x, by_step["loss"].min(), by_step["loss"].max(), color=color, alpha=0.12, linewidth=0)
        ax.axvline(end, color="0.4", linewidth=1, label="the last second that all runs fill")
        doubt = doubt_of(curve)
        title = textwrap.fill(f"{label}, {doubt}" if doubt else label, 46)
        ax.set(title=title, xlabel="seconds of training")
    axes[0].set_ylabel("validation loss (nats per token)")
    drawn.legend(handles=axes[0].get_lines(), loc="outside lower center", ncols=min(3, len(axes) + 1))
    return figures.head(drawn, f"{corpus}: loss after so many seconds")


def finding(curve: pd.DataFrame, corpus: str, clock: str) -> str:
    """Whose mean loss is the lowest at equal time by a clock of this label, who is behind, and who may not be.

    Differences in nats with 95 % intervals over seeds. By a clock in doubt nobody: how far apart the losses are.
    """
    end, then = at_equal_time(curve)
    order = then.groupby("arm")["loss"].mean().sort_values()
    if len(order) < 2:
        return f"{corpus}: fewer than two arms have runs to compare at equal time."
    if doubt := doubt_of(curve):
        between = f"losses of {len(order)} arms are {order.iloc[0]:.4f} to {order.iloc[-1]:.4f} nats"
        return f"{corpus}, {clock}: after {end:.3g} s {between}; no order, as the clock is {doubt}."
    first = order.index[0]
    gaps = tables.paired_differences(then, "loss", base=first, arm="arm").sort_values("difference")
    said = [f"{corpus}, {clock}: after {end:.3g} s the lowest mean loss is {order.iloc[0]:.4f} nats, of “{first}”"]
    for state, rows in (("Behind it", gaps[gaps["low"] > 0]), ("Not told apart from it", gaps[~(gaps["low"] > 0)])):
        if len(rows):
            said.append(f"{state}: {'; '.join(map(_short, rows.to_dict('records')))}")
    return f"{'. '.join(said)}."


def _short(gap: Mapping[str, Any]) -> str:
    interval = f" ({gap['low']:+z.4f} to {gap['high']:+z.4f})" if gap["n"] > 1 else " (one seed)"
    return f"“{gap['label']}” {gap['difference']:+z.4f}{interval}"


def findings(timed: Timed) -> list[str]:
    """Who wins by each clock on each corpus, and whose rate may not be the best."""
    if timed.grid and not timed.clocks:
        return ["No clock: fewer than two runs that had the device alone, so nothing is compared at equal time."]
    said: list[str] = [
        doubts.Doubt(
            f"Equal time: the clock “{clock.label}” is {clock.doubt}. It orders no arms; losses by step are not in "
            f"doubt."
        )
        for clock in timed.clocks
        if clock.doubt
    ]
    said += [finding(curve, corpus, label) for corpus, dated in timed.curves.items() for label, curve in dated.items()]
    return said + at_edge(timed)
