"""Records -> the tables that notebooks, report and README show. Every number in prose comes from here.

A table says of every arm what it measured and what that is relative to padding on the same model, rig and data.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from packlib.lab.runs.spec import PADDED_SDPA, Rig, in_words
from packlib.lab.strategies import STRATEGIES

MEASURED = (
    "tokens_per_s",
    "tokens_per_s_low",
    "tokens_per_s_high",
    "slots_per_s",
    "peak_memory_bytes",
    "fill",
    "waste",
    "rows",
    "optimizer_steps",
    "step_seconds",
    "utilization",
    "loss",
)
RATES = ("metrics.tokens_per_s.mean", "metrics.slots_per_s.mean")  # of all ranks, in records
RELATIVE = ("speed_up", "speed_up_low", "speed_up_high", "limit", "waste_ratio", "memory_ratio")  # to padding
STEP = ("step_seconds.mean", "slots_per_step", "tokens_per_step", "limit.optimizer_seconds")  # what a limit is made of
VARIES = {
    "run_id",
    "status",
    "error",
    "model",
    "corpus",
    "strategy",
    "kernel",
    "seed",
    "repeat",
    "warmup_steps",
}  # between arms
FORMATS = {
    "rows": "{:,.0f}",
    "real tokens/s": "{:,.0f}",
    "slots/s": "{:,.0f}",
    "× padding": "{:.2f}",
    "limit": "{:.2f}",
    "fill": "{:.3f}",
    "peak memory (GB)": "{:.2f}",
    "validation loss": "{:.4f}",
}


def short(name: str) -> str:
    """A corpus's or model's name as it is shown: no folders, no `.jsonl.gz`, no `_{split}`."""
    return re.sub(r"[-_]\{split\}|\.(gguf|npz|jsonl|gz)\b", "", name.rsplit("/")[-1])


def arm_label(strategy: str, kernel: str) -> str:
    """How an arm is written: the strategy, and the attention where it is transformers' own."""
    label = STRATEGIES[strategy].label
    if kernel in PADDED_SDPA:
        return f"{label} (sdpa, {'flash' if kernel == 'flash_sdpa' else 'no mask'})"
    return f"{label} ({kernel.removeprefix('transformers_')})" if kernel.startswith("transformers_") else label


def rig_label(rig: Mapping[str, Any], ranks: int = 1) -> str:
    """What of a rig's fields differs from the default `Rig`, as text; a field that is missing (NaN) is as by default.

    ranks: processes that train together; what several do is compared with what as many do.

    >>> rig_label({"recompute": "all", "liger": True}), rig_label({"shard": True}, 2), rig_label({"recompute": "none"})
    ('recompute=all+liger', 'ranks=2+shard', '')
    """
    parts = [f"ranks={ranks}"] if ranks > 1 else []
    for name, usual in asdict(Rig()).items():
        value = rig.get(name)
        if pd.notna(value) and value != usual:
            if isinstance(value, float) and value.is_integer():  # of a column that has gaps
                value = int(value)
            parts.append(name if isinstance(usual, bool) else f"{name}={value}")
    return "+".join(parts)


def rigs(frame: pd.DataFrame) -> pd.Series:
    """`rig_label` of every run of a frame, as `records.load_records` gives it."""
    names = [field.name for field in fields(Rig)]
    columns = frame.reindex(columns=[f"rig.{name}" for name in names]).set_axis(names, axis=1)
    labels = [rig_label(row, ranks) for row, ranks in zip(columns.to_dict("records"), _ranks(frame))]
    return pd.Series(labels, index=frame.index, dtype=object)


def _dealt(frame: pd.DataFrame) -> list[str]:
    """Parts of `rig_label` for runs that are not what most are here: in the size of their rows, or in OF_MODEL.

    Also for those that are not balanced.
    """
    found: list[list[str]] = [[] for _ in range(len(frame))]
    for name, columns in {"batch": ["batch_size", "gradient_accumulation"], "max_tokens": ["max_tokens"]}.items():
        if set(columns) <= set(frame):
            sizes = [
                " × ".join(f"{value:.0f}" for value in values) for values in frame[columns].itertuples(index=False)
            ]
            usual = max(sizes, key=sizes.count, default="")
            for parts, size in zip(found, sizes):
                parts += [] if size == usual else [f"{name}={size}"]
    models = list(frame["model"])
    for name in (name for name in OF_MODEL if name in frame):
        values = [None if pd.isna(value) else value for value in frame[name]]
        values = [int(value) if isinstance(value, float) else value for value in values]  # of a column that has gaps
        of_model: dict[str, list[Any]] = {}
        for model, value in zip(models, values):
            of_model.setdefault(model, []).append(value)
        for parts, model, value in zip(found, models, values):
            usual = max(of_model[model], key=of_model[model].count)
            parts += [] if value == usual else [f"{name}={value}"]
    balance = frame.get("balance", pd.Series(True, index=frame.index)).fillna(True).astype(bool)
    return ["+".join([*parts, *([] if even else ["unbalanced"])]) for parts, even in zip(found, balance)]


OF_MODEL = "dtype", "layers", "order", "weighting"  # fields of RunSpec: another one is no repeat of an arm


def _ranks(frame: pd.DataFrame) -> pd.Series:
    return frame.get("world_size", pd.Series(1, index=frame.index)).fillna(1).astype(int)


def named_models(models: Iterable[str], rigs: Iterable[str]) -> list[str]:
    """Models with what their rig (`rig_label`) has beyond what all rigs of that model here share, in words.

    >>> named_models(["a", "a", "b"], ["recompute=all", "recompute=all+liger+lora_rank=8", "recompute=all"])
    ['a', "a (Liger's layers, LoRA rank 8)", 'b']
    """
    runs = [(model, [part for part in rig.split("+") if part]) for model, rig in zip(models, rigs)]
    shared: dict[str, set[str]] = {}
    for model, parts in runs:
        shared[model] = shared.get(model, set(parts)) & set(parts)
    own = [[_in_words(part) for part in parts if part not in shared[model]] for model, parts in runs]
    return [f"{model} ({', '.join(words)})" if words else model for (model, _), words in zip(runs, own)]


def _in_words(part: str) -> str:
    """A part of `rig_label` as readers know it."""
    name, _, value = part.partition("=")
    own = {"ranks": f"{value} ranks", "batch": f"batches of {value}", "max_tokens": f"at most {value} tokens"}
    own |= {"unbalanced": "ranks not balanced", "dtype": value, "weighting": f"loss {value}"}
    own |= {"layers": "all layers" if value == "None" else f"{value} layers", "order": f"rows {value}"}
    return own.get(name) or in_words(name, value)


def alone(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs whose times mean something: they had the device to themselves, as `records.had_device_alone` has it."""
    return frame[frame["environment.concurrent_runs"] == 1]


def one_setting(frame: pd.DataFrame) -> pd.DataFrame:
    """Of each model, rig and corpus the runs of the one setting that most arms share, all repeats and seeds of it.

    A run folder also holds other batch sizes, learning rates and lengths of training: each is a comparison of its own.
    How many steps a run that is not evaluated was timed over is no such difference, nor how many were its warm-up.
    """
    compared = frame.assign(**{"compared.rig": rigs(frame)})
    if "balance" in compared:  # older records do not say that they were
        compared["balance"] = compared["balance"].fillna(True).astype(bool)
    if {"steps", "eval_examples"} <= set(frame):
        compared["steps"] = frame["steps"].where(frame["eval_examples"] > 0)
    fixed = [name for name in frame if "." not in name and name not in VARIES]
    kept: list[Any] = []
    for _, group in compared.groupby(["model", "compared.rig", "corpus"], sort=False):
        settings = [arms for _, arms in group.groupby(fixed, sort=False, dropna=False)]
        kept += list(max(settings, key=_count_arms).index)
    return frame.loc[kept]


def _count_arms(runs: pd.DataFrame) -> int:
    return len(runs[["strategy", "kernel"]].drop_duplicates())


def against(frame: pd.DataFrame, base: str = "padding", by: Sequence[str] = ("model", "corpus")) -> pd.DataFrame:
    """Speed and memory of every arm relative to `base` on the same model, rig, size of batches and corpus.

    frame: `records.load_records`. by: columns that compared runs share, besides their rig. Repeats and seeds of an arm
    are pooled: its rate is the median of theirs, low and high their range. Rates are those of one of the ranks.
    waste_ratio: padding's slots per real token over the arm's own. limit: what dropping the pads can give (`limit`).

    Returns a row an arm with `by`, `rig` (`rig_label`, and how rows are dealt out where that is not as usual here),
    `strategy, kernel, status, runs`, MEASURED (tokens and slots per second,
    bytes, seconds, nats) and RELATIVE; what was not measured is NaN. Rows come model by model and corpus by corpus as
    in the frame, strategies in the order of their table.
    """
    if not len(frame):
        return pd.DataFrame()
    order, per_rank = {name: i for i, name in enumerate(STRATEGIES)}, _ranks(frame)
    rates = {name: frame[name] / per_rank for name in RATES if name in frame}
    labels = ["+".join(filter(None, parts)) for parts in zip(rigs(frame), _dealt(frame))]
    frame = frame.assign(rig=labels, **rates)
    frame = frame.sort_values("strategy", key=lambda names: names.map(order), kind="stable")
    rows = []
    keys = [*by, "rig"]
    for _, group in sorted(frame.groupby(keys, sort=False), key=lambda item: item[1].index.min()):
        reference = group[(group["strategy"] == base) & (group["status"] == "ok")]
        if len(reference):  # on packlib's attention, else on the first in the frame
            kernels = list(reference["kernel"])
            reference = reference[reference["kernel"] == ("auto" if "auto" in kernels else kernels[0])]
        for (strategy, kernel), arm in group.groupby(["strategy", "kernel"], sort=False):
            ok = arm[arm["status"] == "ok"]
            row = {key: arm[key].iloc[0] for key in keys} | {"strategy": strategy, "kernel": kernel}
            row |= {"status": arm["status"].iloc[0], "runs": len(ok)}
            row |= dict.fromkeys([*MEASURED, *RELATIVE], math.nan)
            row |= _measured(ok) if len(ok) else {}
            row |= _relative(ok, reference) if len(ok) and len(reference) else {}
            rows.append(row)
    return pd.DataFrame(rows)


def _measured(ok: pd.DataFrame) -> dict[str, float]:
    """MEASURED of an arm's finished runs."""
    rate = ok["metrics.tokens_per_s.mean"]
    loss = ok["metrics.eval_loss_per_token"].mean() if "metrics.eval_loss_per_token" in ok else math.nan
    return {
        "tokens_per_s": rate.median(),
        "tokens_per_s_low": rate.min(),
        "tokens_per_s_high": rate.max(),
        "slots_per_s": ok["metrics.slots_per_s.mean"].median(),
        "peak_memory_bytes": ok["metrics.peak_memory_bytes"].max(),
        "fill": ok["metrics.measured_fill"].mean(),
        "waste": ok["metrics.measured_waste"].mean(),
        "rows": table_2_rows(ok.iloc[0]),
        "optimizer_steps": ok["metrics.optimizer_steps"].iloc[0],
        "step_seconds": ok["metrics.step_seconds.p50"].median(),
        "utilization": ok["metrics.model_flops_utilization"].median(),
        "loss": loss,
    }


def limit(arm: pd.DataFrame, padding: pd.DataFrame) -> float:
    """The speed-up over padding that the pads' absence alone can give an arm, from finished runs of both.

    The optimiser goes once over weights and moments in every step, whatever is in the batch: its least time
    (`runs.limits`) stays, and all else of padding's measured step shrinks at most as its slots do. Where records do not
    say what the optimiser costs, all of it shrinks: the ratio of their slots per real token.
    """
    names = [f"metrics.{name}" for name in STEP]
    if all(name in runs and runs[name].notna().any() for name in names for runs in (arm, padding)):
        seconds, slots, tokens, fixed = (float(padding[name].mean()) for name in names)
        _, own_slots, own_tokens, _ = (float(arm[name].mean()) for name in names)
        least = fixed + max(seconds - fixed, 0.0) * own_slots / slots
        return (seconds / tokens) / (least / own_tokens)
    return float(padding["metrics.measured_waste"].mean() / arm["metrics.measured_waste"].mean())


def _relative(ok: pd.DataFrame, reference: pd.DataFrame) -> dict[str, float]:
    """RELATIVE of an arm's finished runs to those of the reference."""
    rate, usual = ok["metrics.tokens_per_s.mean"], reference["metrics.tokens_per_s.mean"].median()
    return {
        "speed_up": rate.median() / usual,
        "speed_up_low": rate.min() / usual,
        "speed_up_high": rate.max() / usual,
        "limit": limit(ok, reference),
        "waste_ratio": reference["metrics.measured_waste"].mean() / ok["metrics.measured_waste"].mean(),
        "memory_ratio": ok["metrics.peak_memory_bytes"].max() / reference["metrics.peak_memory_bytes"].max(),
    }


def table_2_rows(record: pd.Series) -> int:
    """Rows as the paper's Table 2 counts them: examples where every one stays an entry of its own, else packed rows."""
    stay = STRATEGIES[record["strategy"]].examples_stay
    return int(record["plan.examples"] if stay else record["plan.rows"])


class Mean(NamedTuple):
    """A mean with its 95 % interval; all but the mean are NaN where there is one value.

    standard_errors: how far the mean is from 0, in units of its standard error.
    """

    mean: float
    low: float
    high: float
    standard_errors: float


def mean_interval(values: Sequence[float] | np.ndarray | pd.Series) -> Mean:
    """Mean and 95 % interval (Student's t) of values [n].

    >>> [round(x, 2) for x in mean_interval([1.0, 2.0, 3.0])]
    [2.0, -0.48, 4.48, 3.46]
    """
    sample = np.asarray(values, dtype=float)
    if len(sample) < 2:
        return Mean(float(sample.mean()), math.nan, math.nan, math.nan)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of equal values: no width is right
        test = stats.ttest_1samp(sample, 0.0)
        low, high = test.confidence_interval(0.95)
    return Mean(float(sample.mean()), float(low), float(high), float(test.statistic))


def paired_differences(frame: pd.DataFrame, value: str, base: str = "padding", arm: str = "strategy") -> pd.DataFrame:
    """Difference of `value` to the arm `base`, seed by seed, with a 95 % interval over seeds.

    frame: a row a run with `seed`, `strategy` and the columns `arm` and `value`. Returns a row an arm:
    `label, strategy, difference, low, high, standard_errors, n` in the unit of `value`. Raises `ValueError` where an
    arm has two runs of a seed: they are of two settings, and no pair.
    """
    if len(twice := frame[frame.duplicated([arm, "seed"])]):
        found, seed = twice[[arm, "seed"]].iloc[0]
        raise ValueError(f"arm {found!r} has more than one run of seed {seed}; expected the runs of one setting")
    reference = frame[frame[arm] == base].set_index("seed")[value]
    rows = []
    for name, group in frame[frame[arm] != base].groupby(arm, sort=False):
        by_seed = group.set_index("seed")[value]
        common = by_seed.index.intersection(reference.index)
        if not len(common):
            continue
        found = mean_interval((by_seed[common] - reference[common]).to_numpy())
        label = STRATEGIES[name].label if name in STRATEGIES else str(name)
        row = {"label": label, "strategy": group["strategy"].iloc[0], "difference": found.mean}
        row |= {"low": found.low, "high": found.high, "standard_errors": found.standard_errors, "n": len(common)}
        rows.append(row)
    columns = ["label", "strategy", "difference", "low", "high", "standard_errors", "n"]
    return pd.DataFrame(rows, columns=columns)


def display_table(table: pd.DataFrame) -> pd.DataFrame:
    """`against`, with the names and units a reader expects and empty cells for what was not measured."""
    columns = {
        "model": [short(model) for model in named_models(table["model"], table["rig"])],
        "corpus": table["corpus"].map(short),
        "batching": [arm_label(*arm) for arm in zip(table["strategy"], table["kernel"])],
        "rows": table["rows"],
        "real tokens/s": table["tokens_per_s"],
        "slots/s": table["slots_per_s"],
        "× padding": table["speed_up"],
        "limit": table["limit"],
        "fill": table["fill"],
        "peak memory (GB)": table["peak_memory_bytes"] / 1e9,
        "validation loss": table["loss"],
        "status": table["status"],
    }
    shown = pd.DataFrame(columns)
    for column, form in FORMATS.items():
        shown[column] = formatted(shown[column], form)
    if (shown["status"] == "ok").all():
        shown = shown.drop(columns="status")
    return shown.loc[:, (shown != "").any()].reset_index(drop=True)


def formatted(values: Iterable[Any], form: str) -> list[str]:
    """Values as text, empty where there is none.

    >>> formatted([0.5, float("nan")], "{:.1%}")
    ['50.0%', '']
    """
    return [form.format(value) if pd.notna(value) else "" for value in values]


def markdown(table: pd.DataFrame) -> str:
    """A GitHub table; numbers are already formatted, so cells are written as they are."""
    head = "| " + " | ".join(table.columns) + " |\n|" + "---|" * len(table.columns)
    return "\n".join([head, *("| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False))])
