"""Records -> the tables that notebooks, report and README show. Every number in prose comes from here."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from packlib.lab.strategies import STRATEGIES

_VALUES = ("tokens_per_s", "tokens_per_s_low", "tokens_per_s_high", "slots_per_s", "peak_memory_bytes", "fill", "waste", "rows", "optimizer_steps",
           "step_seconds", "utilization", "loss", "speed_up", "speed_up_low", "speed_up_high", "limit", "memory_ratio")  # fmt: skip


def short(name: str) -> str:
    """A corpus's or model's name as it is shown: no folders, no `.jsonl.gz`, no `_{split}`."""
    return re.sub(r"[-_]\{split\}|\.(gguf|npz|jsonl|gz)\b", "", name.rsplit("/")[-1])


def arm_label(strategy: str, kernel: str) -> str:
    """How an arm is written: the strategy, and the attention where it is transformers' own."""
    return STRATEGIES[strategy].label + (
        f" ({kernel.removeprefix('transformers_')})" if kernel.startswith("transformers_") else ""
    )


def t95(n: int) -> float:
    """Student's t for a 95 % interval of a mean over n values (NaN below two)."""
    return float(stdtrit(n - 1, 0.975)) if n > 1 else math.nan


def one_setting(frame: pd.DataFrame) -> pd.DataFrame:
    """Of each model and corpus the runs of the one setting that most arms share, all repeats and seeds of it.

    A run folder also holds other batch sizes, learning rates and lengths of training: each is a comparison of its own. How many steps a run
    that is not evaluated was timed over is no such difference.
    """
    compared = (
        frame.assign(steps=frame["steps"].where(frame["eval_examples"] > 0))
        if {"steps", "eval_examples"} <= set(frame)
        else frame
    )
    free = {"run_id", "status", "error", "model", "corpus", "strategy", "kernel", "seed", "repeat"}
    fixed, kept = [name for name in frame if "." not in name and name not in free], []
    for _, group in compared.groupby(["model", "corpus"], sort=False):
        settings = [arms for _, arms in group.groupby(fixed, sort=False, dropna=False)]
        kept += list(max(settings, key=lambda arms: len(arms[["strategy", "kernel"]].drop_duplicates())).index)
    return frame.loc[kept]


def against(frame: pd.DataFrame, base: str = "padding", by: tuple[str, ...] = ("model", "corpus")) -> pd.DataFrame:
    """Speed and memory of every arm relative to `base` on the same model and corpus.

    frame: `records.load_records`. Repeats and seeds of an arm are pooled: its rate is the median of theirs, low and high their range. limit:
    padding's slots per real token over the arm's own, what dropping the pads alone can give. Columns that no arm has a value for are NaN. Rows come
    model by model and corpus by corpus as in the frame, strategies in the order of their table.
    """
    rows, order = [], list(STRATEGIES)
    frame = frame.sort_values("strategy", key=lambda s: s.map(order.index), kind="stable") if len(frame) else frame
    groups = frame.groupby(list(by), sort=False)
    for _, group in sorted(groups, key=lambda item: item[1].index.min()):
        reference = group[(group["strategy"] == base) & (group["status"] == "ok")]
        reference = reference[reference["kernel"] == reference["kernel"].iloc[0]] if len(reference) else reference
        for (strategy, kernel), arm in group.groupby(["strategy", "kernel"], sort=False):
            ok = arm[arm["status"] == "ok"]
            row = {
                **{key: arm[key].iloc[0] for key in by},
                "strategy": strategy,
                "kernel": kernel,
                "status": arm["status"].iloc[0],
                "runs": len(ok),
            }
            row |= dict.fromkeys(_VALUES, math.nan)
            if len(ok):
                rate = ok["metrics.tokens_per_s.mean"]
                row |= {
                    "tokens_per_s": rate.median(), "tokens_per_s_low": rate.min(), "tokens_per_s_high": rate.max(),
                    "slots_per_s": ok["metrics.slots_per_s.mean"].median(), "peak_memory_bytes": ok["metrics.peak_memory_bytes"].max(),
                    "fill": ok["metrics.measured_fill"].mean(), "waste": ok["metrics.measured_waste"].mean(),
                    "rows": table_2_rows(ok.iloc[0]), "optimizer_steps": ok["metrics.optimizer_steps"].iloc[0],
                    "step_seconds": ok["metrics.step_seconds.p50"].median(), "utilization": ok["metrics.model_flops_utilization"].median(),
                    "loss": ok["metrics.eval_loss_per_token"].mean() if "metrics.eval_loss_per_token" in ok else math.nan,
                }  # fmt: skip
                if len(reference):
                    padding = reference["metrics.tokens_per_s.mean"].median()
                    row |= {
                        "speed_up": row["tokens_per_s"] / padding, "speed_up_low": rate.min() / padding, "speed_up_high": rate.max() / padding,
                        "limit": reference["metrics.measured_waste"].mean() / row["waste"],
                        "memory_ratio": row["peak_memory_bytes"] / reference["metrics.peak_memory_bytes"].max(),
                    }  # fmt: skip
            rows.append(row)
    return pd.DataFrame(rows)


def table_2_rows(record: pd.Series) -> int:
    """Rows as the paper's Table 2 counts them: examples where every example stays an entry of its own, packed rows otherwise."""
    online = record["strategy"] in (
        "padding",
        "group_by_length",
        "minibatch_packing",
        "token_budget",
        "dynapipe",
        "trl_padding",
        "trl_padding_free",
    )
    return int(record["plan.examples"] if online else record["plan.rows"])


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % interval (Student's t); the interval is NaN for a single value.

    >>> mean_interval(np.array([1.0, 2.0, 3.0]))[0]
    2.0
    """
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    half = t95(len(values)) * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return mean, mean - half, mean + half


def paired_differences(frame: pd.DataFrame, value: str, base: str = "padding", arm: str = "strategy") -> pd.DataFrame:
    """Difference of `value` to the arm `base`, seed by seed, with a 95 % interval over seeds: `label, strategy, difference, low, high, n`."""
    reference = frame[frame[arm] == base].set_index("seed")[value]
    rows = []
    for name, group in frame[frame[arm] != base].groupby(arm, sort=False):
        by_seed = group.set_index("seed")[value]
        common = by_seed.index.intersection(reference.index)
        if len(common):
            mean, low, high = mean_interval((by_seed[common] - reference[common]).to_numpy())
            text = STRATEGIES[name].label if name in STRATEGIES else str(name)
            rows.append(
                {
                    "label": text,
                    "strategy": group["strategy"].iloc[0],
                    "difference": mean,
                    "low": low,
                    "high": high,
                    "n": len(common),
                }
            )
    return pd.DataFrame(rows)


def display_table(table: pd.DataFrame) -> pd.DataFrame:
    """`against`, with the names and units a reader expects and empty cells for what was not measured."""
    shown = pd.DataFrame({
        "model": table["model"].map(short), "corpus": table["corpus"].map(short),
        "batching": [arm_label(*arm) for arm in zip(table["strategy"], table["kernel"])],
        "rows": table.get("rows"), "real tokens/s": table.get("tokens_per_s"), "slots/s": table.get("slots_per_s"),
        "× padding": table.get("speed_up"), "limit": table.get("limit"), "fill": table.get("fill"),
        "peak memory (GB)": table["peak_memory_bytes"] / 1e9, "validation loss": table.get("loss"), "status": table["status"],
    })  # fmt: skip
    formats = {"rows": "{:,.0f}", "real tokens/s": "{:,.0f}", "slots/s": "{:,.0f}", "× padding": "{:.2f}", "limit": "{:.2f}", "fill": "{:.3f}",
               "peak memory (GB)": "{:.2f}", "validation loss": "{:.4f}"}  # fmt: skip
    for column, form in formats.items():
        shown[column] = [form.format(v) if pd.notna(v) else "" for v in shown[column]]
    if (shown["status"] == "ok").all():
        shown = shown.drop(columns="status")
    return shown.loc[:, (shown != "").any()].reset_index(drop=True)


def markdown(table: pd.DataFrame) -> str:
    """A GitHub table; numbers are already formatted, so cells are written as they are."""
    head = "| " + " | ".join(table.columns) + " |\n|" + "---|" * len(table.columns)
    return "\n".join([head, *("| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False))])
