"""Does packing change what is learned? The arms of notebook 07, their statistics, figures and sentences.

Three things change at once when rows are packed to a fixed length: steps become fewer, examples are broken, and,
without boundaries, neighbours leak. Each pair of arms here differs in one of them, so that each loss can be put down to
its cause. An arm's specs follow from literals alone, not from the data: published records redraw on a machine that has
neither. What an arm shares with padding, its variant, is named in `_changes` and nowhere else: records are recognised
by the specs that it gives.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
from pandas.io.formats.style import Styler

from packlib.lab import figures, paper, records, tables
from packlib.lab.figures import Picture
from packlib.lab.parameters import unknown_name
from packlib.lab.runs import experiment
from packlib.lab.runs.spec import RunSpec
from packlib.lab.strategies import STRATEGIES

FIXED, POSID, MULTIPACK = "fixed_length_packing", "fixed_length_packing_posid", "multipack_posid"
PAIR = ("padding", "minibatch_packing")  # the same training, step by step
EPOCHS, STEPS, EXAMPLES = "equal epochs", "equal steps", "constant examples"
EXACT = f"exactly {EXAMPLES}"
SHARES = ("", STEPS, EPOCHS, EXAMPLES, EXACT)  # variants that leave the learning rate and what is shuffled as they are
GROUPS = ("padding", STEPS, EPOCHS, "multipack", EXAMPLES, EXACT, "learning rate", "atoms")
USUAL = ("padding", STEPS, EPOCHS, EXACT)  # groups of a setting that names none
OF_ATOMS = "atoms of "  # how such a variant begins
ATOMS = {"¼ row": 0.25, "½ row": 0.5, "1 row": 1.0, "2 rows": 2.0}  # size of what is shuffled
EVALUATIONS = 4  # of a run, the end included
PLAN = {"groups", "rows_per_step", "seeds"}  # fields of a setting that are none of RunSpec
AVERAGES = {"per token": "per_token", "per example": "per_example"}
NAMES = ("corpus", "arm", "strategy", "variant", "spec_id")  # what every table says of an arm
RESULTS = ("seed", "status", "lr", "batch", "tokens", "seconds", "steps", "per_token", "per_example", "exact_match")
NEGLIGIBLE = 1e-3  # nats: rounding alone stays below
EQUAL = 0.01  # nats, one per cent of perplexity: an interval within ± it shows that two arms learn the same


# Arms


@dataclass(frozen=True)
class Arm:
    """A strategy, what it shares with padding (`variant`; empty where everything), and the run that measures it."""

    strategy: str
    variant: str
    spec: RunSpec

    @property
    def label(self) -> str:
        """How the arm is written."""
        return arm_label(self.strategy, self.variant)

    @property
    def batch(self) -> str:
        """batch_size × max_tokens × accumulation: a step, in the paper's order."""
        return _batch(self.spec.batch_size, self.spec.max_tokens, self.spec.gradient_accumulation)

    @property
    def names(self) -> dict[str, str]:
        """What every table says of the arm."""
        names = {"corpus": tables.short(self.spec.corpus), "arm": self.label, "strategy": self.strategy}
        return names | {"variant": self.variant, "spec_id": self.spec.spec_id}


def _batch(batch_size: int, max_tokens: int, accumulation: int) -> str:
    return f"{batch_size} × {max_tokens:,} × {accumulation}"


def arm_label(strategy: str, variant: str = "") -> str:
    """How an arm is written: the strategy, and what it shares with padding."""
    label = STRATEGIES[strategy].label
    return f"{label}, {variant}" if variant else label


def arms(
    base: RunSpec, *, rows_per_step: int, groups: Sequence[str] = GROUPS, seeds: Iterable[int] = (0, 1, 2)
) -> list[Arm]:
    """The arms of some `GROUPS` over one corpus, for every seed, a whole seed after the other.

    base: batch_size × gradient_accumulation examples make a step of padding; a step of "equal epochs" is as many rows
    of max_tokens, as in Table 4, and so fewer steps; `rows_per_step` rows hold about as many examples as a step of
    padding ("equal steps", exactly). `limit` examples to train on must exist. Only padding and "equal steps" generate
    answers. Raises `ValueError`.

    >>> base = RunSpec(limit=64, batch_size=8, eval_examples=8)
    >>> found = arms(base, rows_per_step=2, groups=["equal steps"], seeds=[0])
    >>> [(arm.label, arm.spec.steps, arm.spec.batch_size) for arm in found][1]
    ('FixedLengthPacking + PosID, equal steps', 8, 2)
    """
    for group in set(groups) - set(GROUPS):
        raise unknown_name("group of arms", group, GROUPS)
    table = _changes(base, rows_per_step)
    rows = [row for group in GROUPS if group in groups for row in table[group]]
    return [
        Arm(strategy, variant, replace(base, strategy=strategy, seed=seed, **changes))
        for seed in seeds
        for strategy, variant, changes in rows
    ]


def _changes(base: RunSpec, rows_per_step: int) -> dict[str, list[tuple[str, str, dict[str, Any]]]]:
    """The arms of each group: strategy, variant, and the fields of RunSpec that differ from `base`."""
    if base.limit is None:
        raise ValueError("limit = None; expected the number of training examples: the steps of the arms follow from it")
    examples = base.batch_size * base.gradient_accumulation
    if not 1 <= rows_per_step < examples:
        expected = f"expected 1 to {examples - 1}, fewer rows than a step of padding has examples"
        raise ValueError(f"rows_per_step = {rows_per_step}; {expected}")
    steps, fewer = math.ceil(base.epochs * base.limit / examples), examples / rows_per_step
    answers = {"generate_examples": base.generate_examples}
    every = {"eval_every": math.ceil(steps / EVALUATIONS), "generate_examples": 0}
    few = every | {"eval_every": math.ceil(steps / fewer / EVALUATIONS)}
    equal = every | {"batch_size": rows_per_step, "gradient_accumulation": 1, "steps": steps}
    constant = every | {"batch_size": 1, "gradient_accumulation": 1, "examples_per_step": examples}
    rates = {f"lr × √{fewer:.3g}": base.learning_rate * fewer**0.5, f"lr × {fewer:.3g}": base.learning_rate * fewer}
    atoms = {f"{OF_ATOMS}{name}": int(share * base.max_tokens) for name, share in ATOMS.items()}
    return {
        "padding": [("padding", "", every | answers), ("minibatch_packing", "", every)],
        STEPS: [(FIXED, STEPS, equal | answers), (POSID, STEPS, equal | answers)],
        EPOCHS: [(FIXED, EPOCHS, few), (POSID, EPOCHS, few)],
        "multipack": [(MULTIPACK, EPOCHS, few), (MULTIPACK, STEPS, equal)],
        EXAMPLES: [(MULTIPACK, EXAMPLES, constant)],
        EXACT: [(MULTIPACK, EXACT, constant | {"split_rows": True})],
        "learning rate": [
            (MULTIPACK, f"{EPOCHS}, {name}", few | {"learning_rate": rate}) for name, rate in rates.items()
        ],
        "atoms": [(FIXED, name, equal | {"atom_size": size}) for name, size in atoms.items()],
    }


def settings_arms(
    settings: Sequence[Mapping[str, Any]], *, seeds: Sequence[int], groups: Sequence[str] = USUAL, **shared: Any
) -> list[Arm]:
    """The arms of several settings, one after the other.

    settings: mappings of `corpus, limit, rows_per_step`, perhaps `groups, seeds`, and fields of `RunSpec`. seeds,
    groups, shared (fields of `RunSpec`): where a setting names none. Raises `ValueError` for an unknown field, listing
    the known ones, and for a missing one.
    """
    found = []
    for setting in settings:
        base, own = read_setting(setting, PLAN, {"corpus", "limit", "rows_per_step"}, **shared)
        found += arms(base, **({"seeds": seeds, "groups": groups} | own))
    return found


def read_setting(
    setting: Mapping[str, Any], own: Collection[str], required: Collection[str], **shared: Any
) -> tuple[RunSpec, dict[str, Any]]:
    """The run that a setting's arms vary, and what of it is no field of `RunSpec` (`own`).

    shared: fields where the setting has none. Raises `ValueError` for an unknown field, listing the known ones, and for
    one that is `required` and missing.
    """
    known = {*own, *(field.name for field in fields(RunSpec))}
    for name in sorted(setting.keys() - known):
        raise unknown_name("field of a setting", name, known)
    for name in sorted(set(required) - setting.keys()):
        raise ValueError(f"setting {setting.get('corpus', '?')!r} has no {name}")
    given = shared | dict(setting)
    base = RunSpec(**{name: value for name, value in given.items() if name not in own})
    return base, {name: given[name] for name in set(own) & given.keys()}


def recognised(found: Iterable[Mapping[str, Any]]) -> dict[str, Arm]:
    """The records that are arms of this study, by run_id: whatever `arms` makes of some padding run among them."""
    specs = {
        record["run_id"]: RunSpec(**record["spec"])
        for record in found
        if record["spec"].get("eval_every") and record["spec"].get("strategy") in STRATEGIES
    }
    # 1. Every arm that could stand beside one of the padding runs; equal steps have some record's batch size.
    known: dict[str, Arm] = {}
    for padding in specs.values():
        if padding.strategy != "padding" or padding.limit is None:
            continue
        examples = padding.batch_size * padding.gradient_accumulation
        for rows in sorted({spec.batch_size for spec in specs.values() if spec.batch_size < examples}):
            for group in GROUPS:
                with suppress(ValueError):  # a run may be too short for some arms, which then were not run either
                    for arm in arms(padding, rows_per_step=rows, groups=[group], seeds=[padding.seed]):
                        known.setdefault(arm.spec.spec_id, arm)
    # 2. Those that were run.
    return {run_id: known[spec.spec_id] for run_id, spec in specs.items() if spec.spec_id in known}


# Tables


def results(folder: Path, planned: Sequence[Arm], further: Sequence[str] = ()) -> pd.DataFrame:
    """One row an arm and seed, measured or not. further: names of metrics that get a column, too.

    `Arm.names`, `seed`, `status` (of the record, or `missing`), `lr`, `batch` (batch_size, max_tokens, accumulation:
    the paper's notation), `tokens`, `seconds` (of runs that had the device to themselves), `steps`, the losses
    `per_token, per_example` in nats, `exact_match` in [0, 1].
    """
    rows = []
    for arm in planned:
        spec, record = arm.spec, experiment.find(arm.spec, folder) or {}
        metrics, trace = record.get("metrics") or {}, record.get("trace") or {}
        alone = bool(record) and records.had_device_alone(record)
        row = {
            "seed": spec.seed,
            "status": record.get("status", "missing"),
            "lr": spec.learning_rate,
            "batch": arm.batch,
            "tokens": trace["tokens"][-1] if trace else math.nan,
            "seconds": trace["seconds"][-1] if trace and alone else math.nan,
            "steps": metrics.get("optimizer_steps", math.nan),
            "per_token": metrics.get("eval_loss_per_token", math.nan),
            "per_example": metrics.get("eval_loss_per_example", math.nan),
            "exact_match": metrics.get("exact_match", math.nan),
        } | {name: metrics.get(name, math.nan) for name in further}
        rows.append(arm.names | row)
    return pd.DataFrame(rows, columns=[*NAMES, *RESULTS, *further])


def extent(found: pd.DataFrame) -> str:
    """How many of the planned runs of `results` have a result: a line for where a figure is not drawn."""
    if not len(found):
        return "This run does not ask it. What is expected was written down before: papermill_runs/LOG.md, 2026-11-25."
    return f"{(found['status'] == 'ok').sum()} of {len(found)} runs have a result."


def overview(found: pd.DataFrame) -> pd.DataFrame:
    """Of `results`: what an arm's steps are, means over seeds, and how many of its runs have a result."""
    rows = {}
    for place, runs in found.groupby(["corpus", "arm"], sort=False):
        means = {name: runs[name].mean() for name in ("steps", "tokens", "seconds")}
        measured = f"{(runs['status'] == 'ok').sum()} of {len(runs)}"
        rows[place] = {"batch": runs["batch"].iloc[0], **means, "measured": measured}
    return pd.DataFrame(rows).T.rename_axis(["corpus", "arm"])


def traces(folder: Path, planned: Sequence[Arm], *, validation: bool = False) -> pd.DataFrame:
    """Per optimiser step, or per evaluation: `Arm.names, seed, step, tokens, seconds, loss` (and `grad_norm` per step).

    `seconds` is NaN where several runs shared the device.
    """
    frames = []
    for arm in planned:
        record = experiment.find(arm.spec, folder)
        if not (record and record["trace"]):
            continue
        evaluations = record["trace"].pop("evaluations")
        trace = pd.DataFrame(record["trace"])
        if validation:
            losses = {seen["step"]: seen["eval_loss_per_token"] for seen in evaluations}
            losses[len(trace)] = record["metrics"]["eval_loss_per_token"]
            trace = trace.assign(loss=trace["step"].map(losses)).dropna(subset="loss")
        if not records.had_device_alone(record):
            trace["seconds"] = math.nan
        frames.append(trace.assign(**arm.names, seed=arm.spec.seed))
    if not frames:
        return pd.DataFrame(columns=[*NAMES, "seed", "step", "loss"])
    return pd.concat(frames, ignore_index=True)


def parity(steps: pd.DataFrame) -> dict[str, float]:
    """Largest difference of a step's training loss between padding and MiniBatchPacking, by corpus, in nats.

    steps: `traces`. Corpora without one of the two are absent.
    """
    gaps = {}
    for corpus, runs in steps[steps["strategy"].isin(PAIR)].groupby("corpus", sort=False):
        wide = runs.pivot_table(index=["seed", "step"], columns="strategy", values="loss")
        if set(PAIR) <= set(wide):
            gaps[corpus] = float((wide["minibatch_packing"] - wide["padding"]).abs().max())
    return gaps


def differences(found: pd.DataFrame, base: str = "Padding", value: str = "per_token") -> pd.DataFrame:
    """`tables.paired_differences` of the measured arms of one corpus to the arm `base`."""
    measured = found[found["status"] == "ok"].dropna(subset=value)
    return tables.paired_differences(measured, value, base=base, arm="arm")


class Cause(NamedTuple):
    """A pair of arms (strategy, variant) that differ in one thing, and what to do about it."""

    label: str
    changed: tuple[str, str]
    base: tuple[str, str]
    advice: tuple[str, str]  # where the difference is a cost, and where it is none


PADDING = ("padding", "")
TOO_FEW = ("at this learning rate put fewer rows into a step, or tune it", "there were steps to spare here")
REMAINS = ("this much remains of packing itself", "pack them")
STEPS_TOO = ("steps differ, too: see equal steps", "pack them")
LEAKS = ("pass boundaries to a model that will be asked alone", "boundaries are free")
BROKEN = ("pack whole examples", "examples may be cut here")
SAME = ("find the bug first", "use it instead of padding")
CAUSES = [
    Cause("Flattening the same mini-batches", ("minibatch_packing", ""), PADDING, SAME),
    Cause("Contamination, at equal steps and tokens", (FIXED, STEPS), (POSID, STEPS), LEAKS),
    Cause("Broken examples, at equal steps", (POSID, STEPS), PADDING, BROKEN),
    Cause("Fewer steps, fixed length", (POSID, EPOCHS), (POSID, STEPS), TOO_FEW),
    Cause("Fewer steps, multipack", (MULTIPACK, EPOCHS), (MULTIPACK, STEPS), TOO_FEW),
    Cause("Packing whole examples, equal steps", (MULTIPACK, STEPS), PADDING, REMAINS),
    Cause("Packing whole examples, constant examples", (MULTIPACK, EXAMPLES), PADDING, STEPS_TOO),
    Cause("Packing whole examples, exactly constant examples", (MULTIPACK, EXACT), PADDING, REMAINS),
]


def causes(found: pd.DataFrame) -> pd.DataFrame:
    """What each change costs by itself on one corpus: the measured pairs of CAUSES as `differences` gives them.

    Per token; `advice` is a sentence in plain words, and says where the average per example tells otherwise.
    """
    rows = []
    for cause in CAUSES:
        changed, base = arm_label(*cause.changed), arm_label(*cause.base)
        pair = found[found["arm"].isin([changed, base])]
        alike = {row["label"]: row for row in differences(pair, base, "per_example").to_dict("records")}
        for row in differences(pair, base).to_dict("records"):
            advice = f"{cause.label}: {_advice(cause, row)}"
            other = alike.get(row["label"])
            if other and verdict(other) in ("a cost", "a gain") and verdict(other) != verdict(row):
                advice = f"{advice[:-1]}. Per example it is {verdict(other)}, {tell(other)}."
            rows.append(row | {"label": cause.label, "advice": advice})
    return pd.DataFrame(rows)


def pairs(table: pd.DataFrame) -> Styler:
    """`causes` as it is read: pair, difference and interval in nats, standard errors, seeds."""
    names = {"label": "pair", "difference": "difference (nats)", "low": "from", "high": "to"}
    names |= {"standard_errors": "standard errors", "n": "seeds"}
    nats = dict.fromkeys(("difference (nats)", "from", "to"), "{:+.4f}")
    return table[list(names)].rename(columns=names).style.format(nats | {"standard errors": "{:.1f}"}, na_rep="")


def verdict(row: Mapping[str, Any]) -> str:
    """What an interval (`difference, low, high, n`) says: a cost, a gain, the same, undecided; empty for one seed."""
    if row["n"] < 2:
        return ""
    if row["low"] > 0 and row["difference"] > NEGLIGIBLE:
        return "a cost"
    if row["high"] < 0 and row["difference"] < -NEGLIGIBLE:
        return "a gain"
    if max(abs(row["low"]), abs(row["high"])) < EQUAL:
        return f"the same within {EQUAL} nats"
    return "undecided"


def _advice(cause: Cause, row: Mapping[str, Any]) -> str:
    if_cost, if_none = cause.advice
    found = verdict(row)
    what = {"": "measure more seeds", "undecided": "measure more seeds", "a cost": if_cost}.get(found, if_none)
    return f"{found}{', ' if found else ''}{tell(row)}; {what}."


def tell(row: Mapping[str, Any]) -> str:
    """A row of `differences` in words: nats, 95 % interval, standard errors, number of seeds."""
    interval = "one seed, no interval"
    if row["n"] > 1:
        interval = f"95 % interval {row['low']:+z.4f} to {row['high']:+z.4f}, "
        interval += f"{abs(row['standard_errors']):.1f} standard errors, {row['n']} seeds"
    return f"{row['difference']:+z.4f} nats ({interval})"


def table_4(found: pd.DataFrame) -> pd.DataFrame:
    """The paper's Table 4 and ours, on one corpus.

    Columns `label, strategy, source, batch, steps, loss`, `low, high` (95 % interval of our loss over seeds),
    `difference` (to the source's own padding).
    """
    known, rows, ok = paper.table_4(), [], found[found["status"] == "ok"]
    gaps = {arm_label("padding"): 0.0}
    gaps |= {row["label"]: row["difference"] for row in differences(found).to_dict("records")}
    padding = known.loc[known["strategy"] == "padding", "eval_loss_per_token"].iloc[0]
    for row in known.to_dict("records"):
        name = {"label": _paper_label(row), "strategy": row["strategy"]}
        loss, steps = row["eval_loss_per_token"], row["optimizer_steps"]
        theirs = {"batch": _batch(2, 4096, row["gradient_accumulation"]), "steps": steps, "loss": loss}
        rows.append(name | {"source": "paper"} | theirs | {"difference": loss - padding})
        runs = ok[ok["arm"] == name["label"]]
        if len(runs):
            mean = tables.mean_interval(runs["per_token"])
            ours = {"batch": runs["batch"].iloc[0], "steps": int(runs["steps"].iloc[0])}
            ours |= {"loss": mean.mean, "low": mean.low, "high": mean.high}
            rows.append(name | {"source": "ours"} | ours | {"difference": gaps.get(name["label"], math.nan)})
    return pd.DataFrame(rows)


def _paper_label(row: Mapping[str, Any]) -> str:
    """The arm of a row of the paper's Table 4: it shares padding's accumulation of 32, or the number of its steps."""
    if row["strategy"] == "padding":
        return arm_label("padding")
    return arm_label(row["strategy"], EPOCHS if row["gradient_accumulation"] == 32 else STEPS)


def order(table: pd.DataFrame) -> list[str]:
    """Whether ours and the paper's agree on each change of Table 4, in sentences (`table_4`).

    A change is position ids, at either number of steps, and more steps, with and without them.
    """
    loss, said = table.set_index(["source", "label"])["loss"], []
    changes = {
        f"position ids, {share}": (arm_label(FIXED, share), arm_label(POSID, share)) for share in (EPOCHS, STEPS)
    }
    changes |= {
        f"more steps, {STRATEGIES[fixed].label}": (arm_label(fixed, EPOCHS), arm_label(fixed, STEPS))
        for fixed in (FIXED, POSID)
    }
    for change, (before, after) in changes.items():
        if {("ours", before), ("ours", after)} <= set(loss.index):
            ours, theirs = (loss[who, after] - loss[who, before] for who in ("ours", "paper"))
            agree = "the same sign" if ours * theirs > 0 else "the other sign"
            said.append(f"{change}: {ours:+z.3f} nats here, {theirs:+z.3f} in the paper, {agree}.")
    return said


def paper_arms() -> list[str]:
    """The arms of the paper's Table 4, as ours are written."""
    return [_paper_label(row) for row in paper.table_4().to_dict("records")]


def sides(table: pd.DataFrame, who: str = "source") -> pd.DataFrame:
    """`table_4` as it is read: a row an arm, and under each of the column `who` batch, steps, loss and difference."""
    values = ["batch", "steps", "loss", "difference"]
    wide = table.drop_duplicates(["label", who]).pivot(index="label", columns=who, values=values).swaplevel(axis=1)
    wide = wide.reindex(table["label"].unique())
    wide = wide.reindex(columns=pd.MultiIndex.from_product([table[who].unique(), values], names=[None, None]))
    return wide.map(_cell)


def _cell(value: Any) -> str:
    if isinstance(value, str) or pd.isna(value):
        return value if isinstance(value, str) else ""
    return f"{value:.0f}" if value == int(value) and value > 1 else f"{value:.3f}"


def every_arm(found: pd.DataFrame) -> pd.DataFrame:
    """Every arm of one corpus against padding: `differences`, and `average`, per token or per example."""
    rows = [differences(found, value=value).assign(average=name) for name, value in AVERAGES.items()]
    return pd.concat(rows, ignore_index=True)


def atoms_table(found: pd.DataFrame) -> pd.DataFrame:
    """The arms of `results` that shuffle atoms, `size` their size."""
    atoms = found[found["variant"].str.startswith(OF_ATOMS) & (found["status"] == "ok")]
    return atoms.assign(size=atoms["variant"].str.removeprefix(OF_ATOMS))


def exact_matches(found: pd.DataFrame, value: str = "exact_match") -> pd.DataFrame:
    """Share of answers that come out right, with its 95 % interval over seeds, where answers were generated."""
    answered = found.dropna(subset=value)
    rows = {}
    for place, runs in answered.groupby(["corpus", "arm"], sort=False):
        mean = tables.mean_interval(runs[value])
        low, high = max(mean.low, 0.0), min(mean.high, 1.0)  # it is a share; NaN of one seed stays
        rows[place] = {"mean": mean.mean, "low": low, "high": high}
    return pd.DataFrame(rows).T


# Figures, one a corpus


def by_corpus(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """A table's rows by their corpus, in the order of the table; of `results`, corpora where something was measured."""
    if "status" in table:
        table = table[table["corpus"].isin(table.loc[table["status"] == "ok", "corpus"])]
    return dict(list(table.groupby("corpus", sort=False)))


def arm_curves(curves: pd.DataFrame, xs: Mapping[str, str], y: str, title: str, ylabel: str, alt: str) -> Picture:
    """`y` against every column of xs ({column: axis label}), a line an arm: its mean over runs, their range shaded.

    The strategy gives the colour and the variant the dashes; where all arms are of one strategy, the variant gives both
    colour and marker.
    """
    columns = min(3, len(xs) + 1)
    height = 4.2 + 0.25 * math.ceil(curves["arm"].nunique() / columns)
    figure, axes = figures.new(max(8.8, 4.2 * len(xs)), height, alt, len(xs), sharey=True)
    variants, one = list(dict.fromkeys(curves["variant"])), curves["strategy"].nunique() == 1
    dashes = {"": "-", STEPS: "-", EPOCHS: "--", EXAMPLES: ":", EXACT: ":"}
    shades = sns.color_palette("viridis", len(variants))
    for arm, runs in curves.groupby("arm", sort=False):
        (color, _, marker), variant = figures.style(runs["strategy"].iloc[0]), runs["variant"].iloc[0]
        if one:
            i = variants.index(variant)
            color, marker = shades[i], figures.MARKERS[i % len(figures.MARKERS)]
        line = dashes.get(variant, "-.")
        by_step = runs.groupby("step")
        mean, low, high = by_step[y].mean(), by_step[y].min(), by_step[y].max()
        for ax, column in zip(axes, xs):
            x = by_step[column].mean()
            often = max(1, len(x) // 8)
            ax.plot(x, mean, color=color, marker=marker, linestyle=line, markevery=often, markersize=6, label=arm)
            ax.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
    for ax, (column, xlabel) in zip(axes, xs.items()):
        ax.set_xlabel(xlabel)
        ax.xaxis.set_major_formatter("{x:,g}")
        ax.locator_params(axis="x", nbins=5)
        if timeless := curves["arm"].nunique() - curves.dropna(subset=column)["arm"].nunique():
            said = f"{timeless} arms without times:\nthey shared the device"
            ax.text(0.97, 0.95, said, transform=ax.transAxes, ha="right", va="top", fontsize=10)
    axes[0].set_ylabel(ylabel)
    figure.legend(handles=axes[0].get_lines(), loc="outside lower center", ncols=columns)
    return figures.head(figure, title)


def validation_curves(curves: pd.DataFrame, corpus: str) -> Picture:
    """Validation loss against steps, real tokens and seconds, of the arms that differ in what a step holds."""
    xs = {"step": "optimiser steps", "tokens": "real tokens", "seconds": "seconds of training"}
    title, ylabel = f"{corpus}: one set of runs, three axes", "validation loss (nats per token)"
    alt = f"Validation loss of padding and packed arms on {corpus} against steps, real tokens and seconds"
    return arm_curves(curves[curves["variant"].isin(SHARES)], xs, "loss", title, ylabel, alt)


def gradient_curves(steps: pd.DataFrame, corpus: str) -> Picture:
    """Gradient norms, as means of five steps, of the arms that differ in what a step holds (`traces`)."""
    steps = steps[steps["variant"].isin(SHARES)]
    smooth = steps.groupby("spec_id")["grad_norm"].rolling(5, min_periods=1).mean().droplevel(0)
    alt, ylabel = (
        f"Gradient norm against optimiser steps on {corpus}, one line an arm",
        "gradient norm (mean of 5 steps)",
    )
    xs = {"step": "optimiser steps"}
    figure = arm_curves(steps.assign(grad_norm=smooth), xs, "grad_norm", f"{corpus}: gradient norms", ylabel, alt)
    figure.axes[0].set_yscale("log")
    return figure


def atom_curves(curves: pd.DataFrame, corpus: str) -> Picture:
    """Perplexity against tokens for each size of the atoms, of the validation losses of one corpus (`traces`)."""
    curves = curves[curves["variant"].str.startswith(OF_ATOMS)]
    curves = curves.assign(arm=curves["variant"], perplexity=np.exp(curves["loss"].astype(float)))
    alt = f"Perplexity against tokens on {corpus} for atoms of a quarter to two rows"
    xs = {"tokens": "real tokens"}
    return arm_curves(curves, xs, "perplexity", f"{corpus}: size of the atoms", "perplexity", alt)


def table_4_bars(table: pd.DataFrame, corpus: str) -> Picture:
    """`table_4` as bars: each arm's validation loss above padding's, the paper's and ours."""
    title, xlabel = (
        f"{corpus}: validation loss above padding's, paper and here",
        "validation loss above padding's (nats)",
    )
    figure = figures.beside_paper(table, "difference", title, xlabel)
    figure.alt = f"Validation loss above padding of the arms of the paper's Table 4: paper and {corpus}"
    return figure


def cause_forest(table: pd.DataFrame, corpus: str) -> Picture:
    """`causes` as intervals."""
    figure = figures.forest(table, f"{corpus}: each change by itself", "difference of validation loss")
    figure.alt = f"Differences of validation loss between pairs of arms on {corpus}, with 95 % intervals"
    return figure


def arm_forest(table: pd.DataFrame, corpus: str) -> Picture:
    """`every_arm` as intervals."""
    title = f"{corpus}: every arm against padding"
    figure = figures.forest(table, title, "validation loss minus padding's", panels="average")
    figure.alt = f"Difference of every arm's validation loss to padding's on {corpus}, per token and per example"
    return figure


# Findings


def best_rate(found: pd.DataFrame) -> str | None:
    """Which learning rate serves multipack's fewer steps best, in a sentence; None where they were not measured."""
    packed = found[(found["strategy"] == MULTIPACK) & (found["status"] == "ok")]
    loss = packed.groupby("variant")["per_token"].mean()
    few = loss[loss.index.str.startswith(EPOCHS)]
    if len(few) < 2 or not {EPOCHS, STEPS} <= set(loss.index):
        return None
    if few.idxmin() == EPOCHS:
        return "With fewer steps, no learning rate tried is better than the one for many."
    table = differences(packed, arm_label(MULTIPACK, EPOCHS)).set_index("label")
    won, lost = (table.loc[arm_label(MULTIPACK, variant)] for variant in (few.idxmin(), STEPS))
    said = f"With fewer steps, “{few.idxmin()}” has the lowest loss of the learning rates tried, {tell(won)}"
    best = arm_label(MULTIPACK, few.idxmin())
    rates = packed[packed["variant"].str.startswith(EPOCHS)]
    others = differences(rates, best)
    if len(unclear := others[~(others["low"] > 0)]):
        names = ", ".join(label.split(", ", 1)[1] for label in unclear["label"])
        said += f" (not told apart from it: {names})"
    if not won["high"] < 0:
        return f"{said}: undecided."
    if not lost["high"] < 0:
        return f"{said}; what fewer steps cost is undecided."
    return f"{said}: it wins back {won['difference'] / lost['difference']:.0%} of what fewer steps cost multipack."


def best_atoms(found: pd.DataFrame, corpus: str) -> str:
    """Which size of atoms has the lowest mean loss on a corpus, and which others differ from it (`atoms_table`)."""
    loss = found.groupby("size")["per_token"].mean().sort_values()
    others = differences(found, arm_label(FIXED, f"{OF_ATOMS}{loss.index[0]}")).sort_values("difference")
    names = [label.split(OF_ATOMS)[1] for label in others["label"]]
    told = [
        f"{name} {tell(row)}{'' if row['low'] > 0 else ', undecided'}"
        for name, row in zip(names, others.to_dict("records"))
    ]
    best = f"{corpus}: {OF_ATOMS}{loss.index[0]} have the lowest mean loss ({loss.min():.4f} nats)"
    return f"{best}; the others against them: {'; '.join(told)}."


def findings(found: pd.DataFrame, gaps: Mapping[str, float]) -> list[str]:
    """Sentences of notebook 07, every number computed. found: `results`. gaps: `parity`."""
    groups = by_corpus(found)
    said = [f"{corpus}: {advice}" for corpus, runs in groups.items() for advice in causes(runs).get("advice", [])]
    rates = {corpus: best_rate(runs) for corpus, runs in groups.items()}
    said += [f"{corpus}: {rate}" for corpus, rate in rates.items() if rate]
    agree = "every step's training loss of padding and MiniBatchPacking agrees to"
    said += [f"{corpus}: {agree} {gap:.1e} nats." for corpus, gap in gaps.items()]
    said += [f"Atoms, {best_atoms(runs, corpus)}" for corpus, runs in by_corpus(atoms_table(found)).items()]
    return said + unfinished(found)


def unfinished(*tables_of_arms: pd.DataFrame) -> list[str]:
    """How many planned runs of `results` have no result, in a sentence; nothing where all have."""
    statuses = [status for table in tables_of_arms for status in table["status"]]
    missing = sum(status != "ok" for status in statuses)
    return [f"{missing} of {len(statuses)} planned runs have no result in this folder."] if missing else []
