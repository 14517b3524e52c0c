"""Does packing change what is learned? The arms of that question, their statistics, and the figures only notebook 07 needs.

Three things change at once when rows are packed to a fixed length: steps become fewer, examples are broken, and, without boundaries,
neighbours leak. Each pair of arms here differs in one of them, so that each loss can be put down to its cause. An arm's specs follow from
literals alone, not from the data: published records redraw on a machine that has neither.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from packlib.lab import figures, paper, records, tables
from packlib.lab.spec import RunSpec
from packlib.lab.parameters import unknown_name
from packlib.lab.strategies import STRATEGIES

FIXED, POSID, MULTIPACK = "fixed_length_packing", "fixed_length_packing_posid", "multipack_posid"
EPOCHS, STEPS, EXAMPLES = "equal epochs", "equal steps", "constant examples"
GROUPS = ("padding", "equal steps", "equal epochs", "multipack", "constant examples", "learning rate", "atoms")
ATOMS = {"¼ row": 0.25, "½ row": 0.5, "1 row": 1.0, "2 rows": 2.0}  # size of what is shuffled


@dataclass(frozen=True)
class Arm:
    """A strategy, what it shares with padding (`variant`; empty where everything), and the run that measures it."""

    strategy: str
    variant: str
    spec: RunSpec

    @property
    def label(self) -> str:
        return STRATEGIES[self.strategy].label + (f", {self.variant}" if self.variant else "")

    @property
    def names(self) -> dict[str, str]:
        corpus, name = tables.short(self.spec.corpus), {"strategy": self.strategy, "variant": self.variant}
        return {"corpus": corpus, "arm": self.label, **name, "run_id": self.spec.run_id}


def arms(
    base: RunSpec,
    *,
    rows_per_step: int,
    groups: Sequence[str] = GROUPS,
    seeds: Iterable[int] = (0, 1, 2),
    evaluations: int = 4,
) -> list[Arm]:
    """The arms of some `GROUPS` over one corpus, for every seed, a whole seed after the other.

    base: batch_size × gradient_accumulation examples make a step of padding; a step of "equal epochs" is as many rows of max_tokens, as in
    Table 4, and so fewer steps; `rows_per_step` rows hold about as many examples as a step of padding ("equal steps", exactly). `limit`
    examples to train on must exist. evaluations: per run, the end included. Only padding and "equal steps" generate answers. Raises `ValueError`.

    >>> found = arms(RunSpec(limit=64, batch_size=8), rows_per_step=2, groups=["equal steps"], seeds=[0])
    >>> [(arm.label, arm.spec.steps, arm.spec.batch_size) for arm in found][1]
    ('FixedLengthPacking + PosID, equal steps', 8, 2)
    """
    if base.limit is None:
        raise ValueError("limit = None; expected the number of training examples: the steps of the arms follow from it")
    for group in set(groups) - set(GROUPS):
        raise unknown_name("group of arms", group, GROUPS)
    examples = base.batch_size * base.gradient_accumulation
    if not 1 <= rows_per_step < examples:
        raise ValueError(
            f"rows_per_step = {rows_per_step}; expected 1 to {examples - 1}, fewer rows than a step of padding has examples"
        )
    steps, fewer = math.ceil(base.epochs * base.limit / examples), examples / rows_per_step
    every = {"eval_every": math.ceil(steps / evaluations), "generate_examples": 0}
    few = every | {"eval_every": math.ceil(steps / fewer / evaluations)}
    equal = every | {"batch_size": rows_per_step, "gradient_accumulation": 1, "steps": steps}
    constant = every | {"batch_size": 1, "gradient_accumulation": 1, "examples_per_step": examples}
    answers = {"generate_examples": base.generate_examples}
    table = {
        "padding": [("padding", "", every | answers), ("minibatch_packing", "", every)],
        "equal steps": [(name, STEPS, equal | answers) for name in (FIXED, POSID)],
        "equal epochs": [(name, EPOCHS, few) for name in (FIXED, POSID)],
        "multipack": [(MULTIPACK, EPOCHS, few), (MULTIPACK, STEPS, equal)],
        "constant examples": [(MULTIPACK, EXAMPLES, constant)],
        "learning rate": [
            (MULTIPACK, f"{EPOCHS}, lr × {sign}{fewer:.3g}", few | {"learning_rate": base.learning_rate * factor})
            for sign, factor in (("√", fewer**0.5), ("", fewer))
        ],
        "atoms": [(FIXED, f"atoms of {name}", equal | {"atom_size": int(share * base.max_tokens)}) for name, share in ATOMS.items()],
    }  # fmt: skip
    chosen = [row for group in GROUPS if group in groups for row in table[group]]
    return [
        Arm(s, variant, replace(base, strategy=s, seed=seed, **changes))
        for seed in seeds
        for s, variant, changes in chosen
    ]


def settings_arms(settings: Sequence[Mapping[str, Any]], *, seeds: Sequence[int], **shared: Any) -> list[Arm]:
    """The arms of several settings, one after the other: mappings of `corpus, limit, rows_per_step, groups, seeds`, fields of `RunSpec`.

    shared: fields of `RunSpec` for all of them. Raises `ValueError` for a field that there is not, listing the known ones, and for a missing one.
    """
    plan, found = {"groups", "rows_per_step", "seeds"}, []
    known = plan | {f.name for f in fields(RunSpec)}
    for setting in settings:
        for name in sorted(setting.keys() - known):
            raise unknown_name("field of a setting", name, known)
        for name in sorted({"corpus", "limit", "rows_per_step"} - setting.keys()):
            raise ValueError(f"setting {setting.get('corpus', '?')!r} has no {name}")
        spec = {"seeds": seeds} | shared | dict(setting)
        found += arms(
            RunSpec(**{k: v for k, v in spec.items() if k not in plan}), **{k: spec[k] for k in plan & spec.keys()}
        )
    return found


def results(folder: Path, planned: Sequence[Arm]) -> pd.DataFrame:
    """One row an arm and seed, measured or not: `Arm.names, seed, status, lr, batch, tokens, seconds, steps, per_token, per_example, exact_match`.

    status: that of the record, or `missing`. batch: (batch_size, max_tokens, accumulation), the paper's notation. Losses are nats.
    """
    keys = {
        "steps": "optimizer_steps",
        "per_token": "eval_loss_per_token",
        "per_example": "eval_loss_per_example",
        "exact_match": "exact_match",
    }
    rows = []
    for arm in planned:
        spec, record = arm.spec, records.read_record(folder, arm.spec.run_id)
        row = arm.names | {
            "seed": spec.seed,
            "status": record["status"] if record else "missing",
            "lr": spec.learning_rate,
        }
        row["batch"] = f"({spec.batch_size}, {spec.max_tokens}, {spec.gradient_accumulation})"
        metrics, trace = (record or {}).get("metrics") or {}, (record or {}).get("trace") or {}
        row |= {name: trace[name][-1] if trace else math.nan for name in ("tokens", "seconds")}
        row["seconds"] = row["seconds"] if record and _alone(record) else math.nan
        rows.append(row | {name: metrics.get(key, math.nan) for name, key in keys.items()})
    return pd.DataFrame(rows)


def _alone(record: Mapping[str, Any]) -> bool:
    """Whether the run had the device to itself, so that its times mean something."""
    return record["environment"].get("concurrent_runs", 1) == 1


def traces(folder: Path, planned: Sequence[Arm], *, validation: bool = False) -> pd.DataFrame:
    """Per optimiser step, or per evaluation: `corpus, arm, strategy, run_id, step, tokens, seconds, loss` (and `grad_norm` per step).

    `seconds` is NaN where several runs shared the device.
    """
    frames = []
    for arm in planned:
        record = records.read_record(folder, arm.spec.run_id)
        if not (record and record["trace"]):
            continue
        evaluations = record["trace"].pop("evaluations")
        trace = pd.DataFrame(record["trace"])
        if validation:
            seen = {
                e["step"]: e["eval_loss_per_token"] for e in [*evaluations, {"step": len(trace)} | record["metrics"]]
            }
            trace = trace.assign(loss=trace["step"].map(seen)).dropna(subset="loss")
        if not _alone(record):
            trace["seconds"] = math.nan
        frames.append(trace.assign(**arm.names))
    return (
        pd.concat(frames, ignore_index=True)
        if frames
        else pd.DataFrame(columns=["corpus", "arm", "strategy", "variant", "run_id", "loss"])
    )


def differences(found: pd.DataFrame, base: str = "Padding", value: str = "per_token") -> pd.DataFrame:
    """`tables.paired_differences` of the measured arms of one corpus to the arm `base`, with `standard_errors`: the difference in those units."""
    table = tables.paired_differences(found[found["status"] == "ok"].dropna(subset=value), value, base=base, arm="arm")
    if len(table):
        table["standard_errors"] = table["difference"] / (
            (table["high"] - table["low"]) / 2 / table["n"].map(tables.t95)
        )
    return table


def _name(strategy: str, variant: str = "") -> str:
    return Arm(strategy, variant, None).label


CAUSES = [  # what the pair isolates, arm, arm it is held against, what to do where the difference is a cost, and where it is none
    (
        "Flattening the same mini-batches",
        _name("minibatch_packing"),
        _name("padding"),
        "find the bug first",
        "use it instead of padding",
    ),
    (
        "Contamination, at equal steps and tokens",
        _name(FIXED, STEPS),
        _name(POSID, STEPS),
        "always pass boundaries",
        "boundaries are free",
    ),
    (
        "Broken examples, at equal steps",
        _name(POSID, STEPS),
        _name("padding"),
        "pack whole examples",
        "examples may be cut here",
    ),
    (
        "Fewer steps, fixed length",
        _name(POSID, EPOCHS),
        _name(POSID, STEPS),
        "put fewer rows into a step",
        "there were steps to spare here",
    ),
    (
        "Fewer steps, multipack",
        _name(MULTIPACK, EPOCHS),
        _name(MULTIPACK, STEPS),
        "put fewer rows into a step",
        "there were steps to spare here",
    ),
    (
        "Packing whole examples, equal steps",
        _name(MULTIPACK, STEPS),
        _name("padding"),
        "this much remains of packing itself",
        "pack them",
    ),
    (
        "Packing whole examples, constant examples",
        _name(MULTIPACK, EXAMPLES),
        _name("padding"),
        "this much remains of packing itself",
        "pack them",
    ),
]
NEGLIGIBLE = 1e-3  # nats: rounding alone stays below


def causes(found: pd.DataFrame) -> pd.DataFrame:
    """What each change costs by itself: the measured pairs of `CAUSES` as `differences` gives them, and `advice`, a sentence in plain words."""
    rows = []
    for label, changed, base, cost, free in CAUSES:
        for row in differences(found[found["arm"].isin([changed, base])], base).to_dict("records"):
            costs = row["low"] > 0 and row["difference"] > NEGLIGIBLE
            effect = "a cost" if costs else "a gain" if row["high"] < -NEGLIGIBLE else "no difference that shows"
            said = (
                f"{effect}, {tell(row)}; {cost if costs else free}."
                if row["n"] > 1
                else f"{tell(row)}; measure more seeds."
            )
            rows.append(row | {"label": label, "advice": f"{label}: {said}"})
    return pd.DataFrame(rows)


def tell(row: Mapping[str, Any]) -> str:
    """A row of `differences` in words: nats, 95 % interval, standard errors, number of seeds."""
    interval = f"95 % interval {row['low']:+z.4f} to {row['high']:+z.4f}, {abs(row['standard_errors']):.1f} standard errors, {row['n']} seeds"
    return f"{row['difference']:+z.4f} nats ({interval if row['n'] > 1 else 'one seed, no interval'})"


def table_4(found: pd.DataFrame) -> pd.DataFrame:
    """The paper's Table 4 and ours: `label, strategy, source, batch, steps, loss, low, high` (ours), `difference` (to the source's own padding)."""
    known, rows, ok = paper.table_4(), [], found[found["status"] == "ok"]
    gaps = differences(found)
    gaps = {"Padding": 0.0} | (gaps.set_index("label")["difference"].to_dict() if len(gaps) else {})
    for row in known.itertuples():
        label = _name(
            row.strategy, "" if row.strategy == "padding" else EPOCHS if row.gradient_accumulation == 32 else STEPS
        )
        paper_row = {
            "batch": f"(2, 4096, {row.gradient_accumulation})",
            "steps": row.optimizer_steps,
            "loss": row.eval_loss_per_token,
        }
        paper_row["difference"] = (
            row.eval_loss_per_token - known["eval_loss_per_token"].iloc[0]
        )  # padding is its first row
        rows.append({"label": label, "strategy": row.strategy, "source": "paper"} | paper_row)
        if len(ours := ok[ok["arm"] == label]):
            mean, low, high = tables.mean_interval(ours["per_token"].to_numpy())
            ours_row = {
                "batch": ours["batch"].iloc[0],
                "steps": int(ours["steps"].iloc[0]),
                "loss": mean,
                "low": low,
                "high": high,
            }
            rows.append(
                {"label": label, "strategy": row.strategy, "source": "ours"}
                | ours_row
                | {"difference": gaps.get(label, math.nan)}
            )
    return pd.DataFrame(rows)


def arm_curves(curves: pd.DataFrame, xs: Mapping[str, str], y: str, title: str, ylabel: str) -> Figure:
    """`y` against every column of xs ({column: axis label}), a line an arm: its mean over runs, their range shaded. The strategy gives the colour
    and the variant the dashes; where all arms are of one strategy, the variant gives both."""
    figure, axes = figures.new(5.2 * len(xs) + 4, 4.6, title, len(xs), sharey=True)
    variants, one = list(dict.fromkeys(curves["variant"])), curves["strategy"].nunique() == 1
    dashes = {"": "-", STEPS: "-", EPOCHS: "--", EXAMPLES: ":"}
    for arm, runs in curves.groupby("arm", sort=False):
        (color, _, marker), variant = figures.style(runs["strategy"].iloc[0]), runs["variant"].iloc[0]
        if one:
            color, marker = (
                sns.color_palette("viridis", len(variants))[variants.index(variant)],
                "osD^vP"[variants.index(variant) % 6],
            )
        for ax, (x, xlabel) in zip(axes, xs.items()):
            by_step = runs.groupby("step")
            line, low, high = by_step[x].mean(), by_step[y].min(), by_step[y].max()
            look = {
                "color": color,
                "marker": marker,
                "linestyle": dashes.get(variant, "-."),
                "markevery": max(1, len(line) // 8),
            }
            ax.plot(line, by_step[y].mean(), markersize=6, label=arm, **look)
            ax.fill_between(line, low, high, color=color, alpha=0.12, linewidth=0)
            ax.set_xlabel(xlabel)
    axes[0].set_ylabel(ylabel)
    axes[-1].legend(bbox_to_anchor=(1.02, 1), loc="upper left")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


def best_rate(found: pd.DataFrame) -> str | None:
    """Which learning rate serves multipack's fewer steps best, in a sentence; None where they were not measured."""
    loss = found[(found["strategy"] == MULTIPACK) & (found["status"] == "ok")].groupby("variant")["per_token"].mean()
    few = loss[loss.index.str.contains(EPOCHS)]
    if len(few) < 2 or not {EPOCHS, STEPS} <= set(loss.index):
        return None
    won = (few[EPOCHS] - few.min()) / (few[EPOCHS] - loss[STEPS])
    return f"With fewer steps, “{few.idxmin()}” is the best learning rate tried: it wins back {won:.0%} of what fewer steps cost multipack."
