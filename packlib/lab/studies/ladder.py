"""Notebook 08: from padding on a plain trainer up to the device's limit, one change a rung.

A rung says beforehand what it should do to the two times of which the longer one is a step's: that of the host, which
launches, and that of the device, which computes. The factors are guesses from counting (LOG.md), made before anything
was measured; where a step comes out elsewhere, there is something to learn.

`arms` -> records -> `climb_table` -> figures and sentences. `next_rung.py` asks the same records what would gain most
on other data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from packlib.lab import doubts, figures, tables
from packlib.lab.figures import Picture
from packlib.lab.parameters import unknown_name
from packlib.lab.runs import experiment
from packlib.lab.runs.spec import RunSpec
from packlib.lab.strategies import get_strategy

Record = Mapping[str, Any]
MINI_BATCHES, FULL_ROWS = "mini-batches", "full rows"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Rung:
    """One change.

    Args:
        name: of the rung, as figures show it. change: what is different from the rung below, and why it should help.
        fields: of `RunSpec`, that change; `rig`'s are added to those of the rungs below.
        host, device: predicted factors on the time of the host and of the device; device None: what padding wastes.
        gpu: whether it needs one.
        beside: not a rung to climb on but a run to compare with; the next rung goes on from the one below it.
    """

    name: str
    change: str
    fields: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    host: float = 1.0
    device: float | None = 1.0
    gpu: bool = False
    beside: bool = False


CLIMBS: dict[str, tuple[Rung, ...]] = {
    MINI_BATCHES: (
        Rung(
            "padded, SDPA",
            "padded mini-batches, PyTorch's attention, every layer's activations computed again in backward",
            {"strategy": "padding", "kernel": "maskless_sdpa", "rig": {"recompute": "all"}},
        ),
        Rung(
            "padded, varlen attention",
            "the same batches, unpadded inside attention: the kernel that packing uses",
            {"kernel": "auto"},
        ),
        Rung(
            "flattened",
            "no pads anywhere: MiniBatchPacking + PosID, the same examples in every step",
            {"strategy": "minibatch_packing"},
            host=0.9,
            device=None,
        ),
        Rung(
            "TRL padding_free",
            "the peer: what TRL itself makes of the same mini-batches",
            {"strategy": "trl_padding_free"},
            beside=True,
        ),
        Rung(
            "fused loss",
            "head and loss in one, without the metrics that wait for the device three times a micro-batch",
            {"rig": {"fused_loss": True}},
            host=0.9,
            device=0.95,
        ),
        Rung(
            "compiled layers",
            "the many small kernels of a layer become few, so there is less to launch and less to read and write",
            {"rig": {"compile": "layers"}},
            host=0.4,
            device=0.85,
        ),
        Rung(
            "less recomputation",
            "small batches leave memory for activations, so that there is less forward inside backward, or none",
            {"rig": {"recompute": "keep"}},
            host=0.7,
            device=0.75,
        ),
        Rung(
            "CUDA graphs",
            "a micro-batch is one launch; rows are padded to multiples of 64 so that few shapes are captured",
            {"rig": {"graphs": True, "pad_to": 64}},
            host=0.05,
            device=1.05,
            gpu=True,
        ),
        Rung(
            "lean optimiser",
            "clipping, AdamW and zeroing in one pass over memory instead of four",
            {"rig": {"lean": True}},
            device=0.85,
            gpu=True,
        ),
        Rung(
            "padded, same rig",
            "padding on the best rig: what packing is worth where the host does not decide",
            {"strategy": "padding", "kernel": "maskless_sdpa", "rig": {"pad_to": 16}},
            gpu=True,
            beside=True,
        ),
        Rung(
            "merged micro-batches",
            "flat rows have no pads to grow, so the micro-batches of a step can be one: weights are read once",
            {"merged": True},
            host=0.5,
            device=0.85,
        ),
    ),
    FULL_ROWS: (
        Rung(
            "TRL packing (bfd)",
            "the peer: TRL's own full rows, activations computed again in backward",
            {"strategy": "trl_packing_bfd", "rig": {"recompute": "all"}},
            beside=True,
        ),
        Rung(
            "full rows",
            "Multipack + PosID: whole examples in rows of a full batch's capacity",
            {"strategy": "multipack_posid", "rig": {"recompute": "all"}},
        ),
        Rung(
            "fused loss",
            "head and loss in one, without the metrics that wait for the device",
            {"rig": {"fused_loss": True}},
            device=0.95,
        ),
        Rung(
            "compiled layers",
            "rows padded to one shape, compiled once for it: fewer passes over memory between the products",
            {"rig": {"compile": "layers", "pad_to": "row"}},
            host=0.4,
            device=0.85,
        ),
        Rung(
            "less recomputation",
            "the compiler keeps what is dear to compute and cheap to keep, within a budget of the memory",
            {"rig": {"recompute": "keep"}},
            device=0.9,
        ),
        Rung(
            "lean optimiser",
            "clipping and AdamW in one pass over memory",
            {"rig": {"lean": True}},
            device=0.98,
            gpu=True,
        ),
        Rung(
            "smaller micro-batches",
            "rows half as large, twice as many a step: the same memory keeps twice the share of their activations",
            {"parts": 2, "rig": {"recompute": "keep twice", "pad_to": "row"}},
            device=0.95,
            gpu=True,
        ),
        Rung(
            "float8",
            "matrix products in half the width, at twice the rate on paper; in whole rows again, as every micro-batch "
            "casts the weights, and half of what was kept, as casts need memory",
            {"parts": 1, "rig": {"float8": True, "recompute": "keep half", "pad_to": "row"}},
            device=0.75,
            gpu=True,
        ),
    ),
}


@dataclass(frozen=True)
class Arm:
    """A rung of a climb on a corpus, and the run that measures it.

    path: the rungs of the climb whose changes the run has, from the lowest on.
    """

    climb: str
    rung: Rung
    spec: RunSpec
    path: tuple[Rung, ...] = ()


def arms(
    base: RunSpec, climb: str, rungs: Sequence[str] = (), *, keep: str | float = 0.2, gpu: bool = True
) -> list[Arm]:
    """The arms of a climb, from the bottom up; runs beside it stand where they belong.

    Args:
        base: model, corpus, sizes, steps; its rig is what all rungs have besides their own (adapters, say).
        rungs: names of those to run; empty: all. What a rung changes stays for the rungs above it, run or not.
        keep: `recompute` from the rung of less recomputation on: what the memory allows.
        gpu: whether there is one; without, rungs that need it are left out. So is halving an odd `batch_size`.

    Raises `ValueError` for an unknown climb or rung, listing the known ones.
    """
    if climb not in CLIMBS:
        raise unknown_name("climb", climb, CLIMBS)
    known = [rung.name for rung in CLIMBS[climb]]
    for name in rungs:
        if name not in known:
            raise unknown_name(f"rung of {climb}", name, known)
    found, here = [], base
    path: tuple[Rung, ...] = ()
    for rung in CLIMBS[climb]:
        if (rung.gpu and not gpu) or base.batch_size % rung.fields.get("parts", 1):
            continue
        spec = _changed(here, rung.fields, keep, base)
        if not rung.beside:
            here, path = spec, (*path, rung)
        if not rungs or rung.name in rungs:
            found.append(Arm(climb, rung, spec, path))
    return found


def every_arm(base: RunSpec, climbs: Iterable[Mapping[str, Any]], *, gpu: bool = True) -> list[Arm]:
    """The arms of several climbs, one after the other.

    climbs: mappings with `climb`, what `arms` takes (`rungs`, `keep`), and any field of RunSpec that differs from the
    base's; `rig: {lora_rank: 16}` climbs with adapters. Raises `ValueError` and `TypeError` as `arms` and `RunSpec` do.
    """
    found = []
    for entry in climbs:
        fields = {"climb": MINI_BATCHES} | dict(entry)
        named = {name: fields.pop(name) for name in ("climb", "rungs", "keep") if name in fields}
        found += arms(replace(base, **fields), **named, gpu=gpu)
    return found


def _changed(spec: RunSpec, fields: Mapping[str, Any], keep: str | float, base: RunSpec) -> RunSpec:
    """The spec with a rung's fields. `merged`: one micro-batch of a step's; `parts`: so many of each of base's.

    Of its rig, `pad_to: row` is a micro-batch's capacity, and `recompute` what is given, its double or its half.
    """
    plain = {name: value for name, value in fields.items() if name not in ("rig", "merged", "parts")}
    if fields.get("merged"):
        plain |= {"batch_size": spec.batch_size * spec.gradient_accumulation, "gradient_accumulation": 1}
    if parts := fields.get("parts"):
        plain |= {"batch_size": base.batch_size // parts, "gradient_accumulation": base.gradient_accumulation * parts}
    rig = dict(fields.get("rig", {}))
    if rig.get("pad_to") == "row":
        rig["pad_to"] = plain.get("batch_size", spec.batch_size) * spec.max_tokens
    if share := {"keep": 1.0, "keep twice": 2.0, "keep half": 0.5}.get(rig.get("recompute", "")):
        rig["recompute"] = keep if isinstance(keep, str) else share * keep if share * keep < 1 else "none"
    return replace(spec, rig=replace(spec.rig, **rig), **plain)


def same_examples(one: RunSpec, other: RunSpec) -> bool:
    """Whether steps of two runs of a climb hold the same examples; rows filled to a batch's capacity change with it."""
    filled = any(get_strategy(spec.strategy).size == "batch" for spec in (one, other))
    return not filled or one.batch_size * one.max_tokens == other.batch_size * other.max_tokens


# What was measured


def measure(arms: Sequence[Arm], folder: Path, *, progress: experiment.Progress = print) -> list[Record | None]:
    """The record of each arm, in order; those without one are run, or left at None where no corpus of theirs is here.

    So a published climb can be redrawn where neither its data nor its device is. Raises `FileNotFoundError` where
    nothing can be run and nothing has a record, and as `experiment.run` does.
    """
    specs = [arm.spec for arm in arms]
    records: list[Record | None] = [*experiment.run_here(specs, folder, progress=progress)]
    if not any(records):
        names = ", ".join(sorted({repr(spec.corpus) for spec in specs}))
        raise FileNotFoundError(f"corpus {names} is not here, and no rung has a record on it")
    return records


def climb_table(arms: Sequence[Arm], records: Sequence[Record | None]) -> pd.DataFrame:
    """A row an arm, from the bottom up: the prediction, then what its record says.

    arms: of any climbs and corpora (`arms`). records: of each arm, None where there is none (`measure`).

    Columns `climb, corpus, lora_rank, rung, beside, status, error, run_id`; `predicted` real tokens/s, from the
    finished rung below and the factors of all rungs since (NaN without one, and beside the climb); `tokens_per_s, low,
    high` (mean, 20th and 80th percentile of steps), `limit` (tokens/s that the device allows), `share` of it;
    `step_seconds` (mean); of the one step that was profiled `host_seconds, kernel_seconds, launches, waiting` (share of
    it without a kernel); `peak_memory_bytes`; `loss_difference, grad_norm_difference`: relative, the largest over the
    steps, from those of the nearest finished rung below that trains on the same examples. What there is none of is NaN.
    A finished run whose gradient norms are farther off than `WRONG` has the status "wrong gradients": nothing is
    climbed on, or said of it.
    """
    rows = []
    climbed: dict[tuple, list[tuple[Arm, Record]]] = {}  # finished rungs of each climb, the highest first
    for arm, record in zip(arms, records):
        rung, below = arm.rung, climbed.setdefault((arm.climb, arm.spec.corpus, arm.spec.rig.lora_rank), [])
        row: dict[str, Any] = {"climb": arm.climb, "corpus": arm.spec.corpus, "lora_rank": arm.spec.rig.lora_rank or 0}
        row |= {"rung": rung.name, "beside": rung.beside, "status": record["status"] if record else NOT_MEASURED}
        row |= {"error": record["error"] if record else None, "run_id": record.get("run_id") if record else None}
        row |= dict.fromkeys(NUMBERS, math.nan)
        if below and not rung.beside:
            highest, before = below[0]
            row["predicted"] = _predicted_rate(before["metrics"], arm.path[len(highest.path) :])
        if record and record["status"] == "ok":
            row |= _measured(record["metrics"])
            alike = [before for other, before in below if same_examples(arm.spec, other.spec)]
            for name in ("loss", "grad_norm") if alike else ():
                row[f"{name}_difference"] = _apart(record, alike[0], name)
            if row["grad_norm_difference"] > WRONG and not get_strategy(arm.spec.strategy).packed_by_trl:
                row["status"] = "wrong gradients"
                row["error"] = (
                    f"their norms differ from the rung's below by up to {row['grad_norm_difference']:.1e} times"
                )
            elif not rung.beside:
                below.insert(0, (arm, record))
        rows.append(row)
    return pd.DataFrame(rows)


WRONG = 0.1  # relative; bfloat16 moves a gradient norm by less than a hundredth, float8 by little more
NUMBERS = (
    "predicted",
    "tokens_per_s",
    "low",
    "high",
    "limit",
    "share",
    "step_seconds",
    "host_seconds",
    "kernel_seconds",
    "launches",
    "waiting",
    "peak_memory_bytes",
    "loss_difference",
    "grad_norm_difference",
)


def _measured(metrics: Mapping[str, Any]) -> dict[str, float]:
    rate, limit, profile = metrics["tokens_per_s"], metrics["limit"], metrics.get("profile") or {}
    return {
        "tokens_per_s": rate["mean"],
        "low": rate["p20"],
        "high": rate["p80"],
        "limit": limit["tokens_per_s"],
        "share": limit["share"],
        "step_seconds": metrics["step_seconds"]["mean"],
        **{name: profile.get(name, math.nan) for name in ("host_seconds", "kernel_seconds", "launches", "waiting")},
        "peak_memory_bytes": metrics["peak_memory_bytes"] or math.nan,
    }


def host_and_device(metrics: Mapping[str, Any]) -> tuple[float, float]:
    """Seconds of the mean step on the host, until its last launch, and on the device.

    Both are those of the profiled step, at the mean step's length. Where nothing was profiled, on a CPU, the host is
    the device.
    """
    step, profile = metrics["step_seconds"]["mean"], metrics.get("profile")
    if not profile:
        return 0.0, step
    scale = step / profile["span_seconds"]
    return profile["host_seconds"] * scale, profile["kernel_seconds"] * scale


def _predicted_rate(metrics: Mapping[str, Any], rungs: Iterable[Rung]) -> float:
    """Real tokens/s of a run after these changes to its rig."""
    before = host, device = host_and_device(metrics)
    for rung in rungs:
        host *= rung.host
        device *= 1 / metrics["measured_waste"] if rung.device is None else rung.device
    return metrics["tokens_per_s"]["mean"] * max(before) / max(host, device)


def _apart(record: Record, reference: Record, name: str) -> float:
    """Largest relative difference of a trace's values, step by step."""
    ours, theirs = (np.array(each["trace"][name], dtype=float) for each in (record, reference))
    steps = min(len(ours), len(theirs))
    return float(np.abs(ours[:steps] / theirs[:steps] - 1).max()) if steps else math.nan


def predictions_table(arms: Iterable[Arm]) -> pd.DataFrame:
    """What is said before anything is measured: of each rung once, its change, and the factors on host and device."""
    rungs = {(arm.climb, arm.rung.name): arm.rung for arm in arms}
    rows = []
    for (climb, name), rung in rungs.items():
        device = "less what padding wastes" if rung.device is None else f"× {rung.device:g}"
        said = ("beside the climb", "") if rung.beside else (f"× {rung.host:g}", device)
        rows.append({"climb": climb, "rung": name, "what changes": rung.change, "host": said[0], "device": said[1]})
    return pd.DataFrame(rows)


def display_table(table: pd.DataFrame) -> pd.DataFrame:
    """`climb_table` for readers; where adapters were climbed with too, two more columns have their rungs."""
    full, adapted = (part.set_index(WAY) for part in (table[table["lora_rank"] == 0], table[table["lora_rank"] > 0]))
    main = full if len(full) else adapted
    columns = {
        "rung": [f"({row.Index[2]})" if row.beside else row.Index[2] for row in main.itertuples()],
        "predicted": tables.formatted(main["predicted"], "{:,.0f}"),
        "real tokens/s": tables.formatted(main["tokens_per_s"], "{:,.0f}"),
        "of the limit": tables.formatted(main["share"], "{:.0%}"),
        "step (ms)": tables.formatted(main["step_seconds"] * 1e3, "{:,.0f}"),
        "host (ms)": tables.formatted(main["host_seconds"] * 1e3, "{:,.0f}"),
        "kernels (ms)": tables.formatted(main["kernel_seconds"] * 1e3, "{:,.0f}"),
        "launches": tables.formatted(main["launches"], "{:,.0f}"),
        "peak memory (GB)": tables.formatted(main["peak_memory_bytes"] / 1e9, "{:.2f}"),
        "loss differs by": tables.formatted(main["loss_difference"], "{:.1e}"),
        "gradient norm by": tables.formatted(main["grad_norm_difference"], "{:.1e}"),
        "status": list(main["status"]),
    }
    if len(full) and len(adapted):
        beside = adapted.reindex(main.index)
        columns["LoRA: real tokens/s"] = tables.formatted(beside["tokens_per_s"], "{:,.0f}")
        columns["LoRA: of its limit"] = tables.formatted(beside["share"], "{:.0%}")
    shown = pd.DataFrame(columns)
    places = [f"{climb}, {tables.short(corpus)}" for climb, corpus, _ in main.index]
    shown.insert(0, "climb", ["" if i and places[i - 1] == place else place for i, place in enumerate(places)])
    return shown.loc[:, (shown != "").any()]


WAY = ["climb", "corpus", "rung"]


def limit_table(table: pd.DataFrame, records: Sequence[Record | None]) -> pd.DataFrame:
    """What the device needs at least for each finished run's mean step, by cause, and what the step took: in ms.

    table: of these records (`climb_table`). `unexplained`: neither the least that the work costs nor waiting for the
    host, as far as a profiled step says: what is computed again, passes over memory between the products, slow kernels.
    """
    rows = []
    for row, record in zip(table.itertuples(), records):
        if record is None or record["status"] != "ok":
            continue
        limit = {name: record["metrics"]["limit"][f"{name}_seconds"] * 1e3 for name in CAUSES}
        step = row.step_seconds * 1e3
        waiting = 0.0 if math.isnan(row.waiting) else row.waiting * step
        rest = {"step": step, "waiting for the host": waiting, "unexplained": step - waiting - sum(limit.values())}
        place = {"climb": f"{row.climb}, {tables.short(row.corpus)}", "rung": row.rung}
        rows.append(place | limit | {"least": sum(limit.values())} | rest)
    return pd.DataFrame(rows)


CAUSES = ("products", "attention", "optimizer")


# Figures


def climb_figure(table: pd.DataFrame, climb: str, *, here: str = "") -> Picture:
    """Real tokens/s of every rung of a climb, a panel a corpus, with its limit on every bar and its prediction marked.

    here: a rung that is marked as the reader's own. Raises `ValueError` for one that the climb does not have.
    """
    own = table[(table["climb"] == climb) & (table["lora_rank"] == table["lora_rank"].min())]
    own = own.assign(predicted=own["predicted"].where(own["status"] != NOT_MEASURED))  # there is nothing to hold it to
    corpora, names = list(dict.fromkeys(own["corpus"])), list(dict.fromkeys(own["rung"]))
    beside = set(own[own["beside"].astype(bool)]["rung"])
    if here and here not in names:
        raise unknown_name(f"rung of {climb}", here, names)
    title = f"{climb}: " + "; ".join(_said(own[own["corpus"] == corpus]) for corpus in corpora)
    figure, axes = figures.new(5.8 * len(corpora) + 2.2, 0.44 * len(names) + 2.3, title, len(corpora), sharey=True)
    for ax, corpus in zip(axes, corpora):
        rows = own[own["corpus"] == corpus].set_index("rung").reindex(names)
        top = np.nanmax([1.0, *rows[["high", "limit", "predicted"]].to_numpy(float).ravel()])
        for y, (name, row) in enumerate(rows.iterrows()):
            _draw_rung(ax, y, row, top)
            if name == here:
                ax.annotate("you are here", (1, y), xycoords=("axes fraction", "data"), va="center", ha="right")
                ax.axhspan(y - 0.48, y + 0.48, color="0.9", zorder=0)
        ax.set(title=f"{climb}, {tables.short(str(corpus))}", xlabel="real tokens/s", xlim=(0, top * 1.3))
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.set_yticks(range(len(names)), [f"({n})" if n in beside else n for n in names])
        ax.grid(axis="y", visible=False)
    axes[0].set_ylim(len(names) - 0.4, -0.6)  # from the top down, also where the last one was not measured
    meanings: list[Any] = [
        axes[-1].plot([], [], **figures.LIMIT, label="limit: what the device's measured rates allow")[0],
        axes[-1].plot([], [], **PREDICTED, label="predicted from the rung below")[0],
    ]
    if beside:
        meanings.append(axes[-1].barh([0], [0], **BESIDE, edgecolor="white", label="(beside the climb)"))
    figure.legend(handles=meanings, loc="outside lower center", ncols=2 if len(corpora) == 1 else 3)
    return figures.head(figure, title)


BESIDE: dict[str, Any] = {"color": "0.75", "hatch": "//"}
PREDICTED: dict[str, Any] = {"color": "black", "marker": "D", "markersize": 6, "linestyle": "", "markerfacecolor": "w"}


def _draw_rung(ax: Any, y: float, row: pd.Series, top: float) -> None:
    if row["status"] != "ok":
        ax.text(top * 0.01, y, str(row["status"]), va="center", fontsize=10, color="0.4")
    else:
        look = BESIDE if row["beside"] else {"color": figures.COLORS[0]}
        error = [[max(row["tokens_per_s"] - row["low"], 0)], [max(row["high"] - row["tokens_per_s"], 0)]]
        ax.barh(y, row["tokens_per_s"], 0.66, xerr=error, ecolor="0.25", capsize=3, edgecolor="white", **look)
        ax.plot([row["limit"]] * 2, [y - 0.42, y + 0.42], **figures.LIMIT)
        text = f"{row['tokens_per_s']:,.0f} ({row['share']:.0%})"
        end = max(row["high"], row["tokens_per_s"])
        for mark in sorted(x for x in (row["limit"], row["predicted"]) if np.isfinite(x)):
            if end <= mark + top * 0.02 < end + top * 0.26:  # the number stands beyond a mark, not on it
                end = mark
        ax.text(end + top * 0.03, y, text, va="center", fontsize=10)
    if np.isfinite(row["predicted"]):
        ax.plot([row["predicted"]], [y], **PREDICTED, zorder=5)


def _said(rows: pd.DataFrame) -> str:
    """How far a climb on one corpus led."""
    where, ends = tables.short(rows["corpus"].iloc[0]), _ends(rows)
    if ends is not None:
        first, best = ends
        rates = f"{first['tokens_per_s']:,.0f} to {best['tokens_per_s']:,.0f} real tokens/s"
        return f"{where} from {rates}, {best['share']:.0%} of the limit"
    finished = rows[rows["status"] == "ok"]
    if finished.empty:
        return f"{where} was not measured"
    best = finished.loc[finished["tokens_per_s"].idxmax()]
    return f"{where} at {best['tokens_per_s']:,.0f} real tokens/s, {best['share']:.0%} of the limit"


def _ends(rows: pd.DataFrame) -> tuple[pd.Series, pd.Series] | None:
    """The lowest finished rung of a climb on one corpus and the fastest one; None where they are the same."""
    climbed = rows[(rows["status"] == "ok") & ~rows["beside"].astype(bool)]
    if len(climbed) < 2 or climbed["tokens_per_s"].idxmax() == climbed.index[0]:
        return None
    return climbed.iloc[0], climbed.loc[climbed["tokens_per_s"].idxmax()]


def step_figure(table: pd.DataFrame, records: Sequence[Record | None], climb: str, corpus: str) -> Picture | None:
    """One profiled step before and after a climb: when the device had a kernel to run. None without profiles.

    table: of these records (`climb_table`).
    """
    with_profile = np.array([bool(r and r["status"] == "ok" and r["metrics"].get("profile")) for r in records])
    own = table[with_profile & (table["climb"] == climb) & (table["corpus"] == corpus)]
    ends = _ends(own[own["lora_rank"] == own["lora_rank"].min()])
    if ends is None:
        return None
    waits = " and ".join(f"{end['waiting']:.0%} of a step ({end['rung']})" for end in ends)
    title = f"{tables.short(corpus)}, {climb}: the device waits for the host {waits}"
    figure, axes = figures.new(9.5, 3.6, title, rows=2)
    for ax, end in zip(axes, ends):
        record = records[table.index.get_loc(end.name)]
        profile = record["metrics"]["profile"] if record else {}
        edges = np.linspace(0, profile["span_seconds"] * 1e3, len(profile["busy"]) + 1)
        ax.stairs(profile["busy"], edges, fill=True, color=figures.COLORS[0])
        ax.axvline(profile["host_seconds"] * 1e3, color="black", linewidth=1.6, linestyle=":")
        ax.set(ylim=(0, 1.05), xlim=(0, max(end["host_seconds"] for end in ends) * 1e3 * 1.1), yticks=[0, 1])
        ax.set_title(f"{end['rung']}: {profile['launches']:,} launches", fontsize=11)
        ax.set_ylabel("device busy")
    axes[-1].set_xlabel("ms of one step (dotted: the host has launched everything)")
    return figures.head(figure, title)


# Findings


def findings(table: pd.DataFrame, folder: Path) -> list[str]:
    """Sentences of notebook 08, every number from `climb_table`; none ranks where the climbs' own controls are off.

    folder: of the records. Its other runs, of another rig or lease, say nothing against a climb: a plain line at the
    end says where they are in doubt.
    """
    beside = doubts.of_folder(folder, table["run_id"].dropna())
    ranked = not any(isinstance(sentence, doubts.Doubt) for sentence in beside)
    said: list[str] = []
    for (climb, corpus, rank), rows in table.groupby(["climb", "corpus", "lora_rank"], sort=False):
        where = f"{tables.short(corpus)}, {climb}" + (f", LoRA rank {rank}" if rank else "")
        said += [f"{where}: {sentence}." for sentence in _about_climb(rows.reset_index(drop=True), ranked=ranked)]
    return [*(said or ["Nothing was measured."]), *beside]


def _about_climb(rows: pd.DataFrame, *, ranked: bool) -> Iterator[str]:
    """What a climb on one corpus says; ranked: also which rung is the fastest, gains most or is farthest off."""
    ok = rows[rows["status"] == "ok"]
    climbed = ok[~ok["beside"].astype(bool)]
    if (ends := _ends(rows)) is not None:
        first, best = ends
        times = f"{best['tokens_per_s'] / first['tokens_per_s']:.1f} times '{first['rung']}'"
        shares = f"from {first['share']:.0%} to {best['share']:.0%} of the limit"
        rates = f"{best['tokens_per_s']:,.0f} real tokens/s, {times} ({first['tokens_per_s']:,.0f})"
        yield f"'{best['rung']}' runs at {rates}, {shares}"
        others = climbed[climbed["rung"] != FLOAT8]
        if ranked and best["rung"] == FLOAT8 and len(others):
            top = others.loc[others["tokens_per_s"].idxmax()]
            without = f"without float8, '{top['rung']}' is the fastest ({top['tokens_per_s']:,.0f}, {top['share']:.0%})"
            yield f"{without}; float8 runs at {best['tokens_per_s'] / top['tokens_per_s']:.2f} times that"
        every = rows[~rows["beside"].astype(bool)]["tokens_per_s"]
        gains = every / every.shift()  # of rungs whose rung below was measured, too
        if ranked and gains.notna().any():
            most = rows.loc[gains.idxmax(), "rung"]
            yield f"the largest gain of one rung is that of '{most}', {gains.max():.2f} times"
    elif len(climbed):
        only = climbed.iloc[0]
        yield f"'{only['rung']}' runs at {only['tokens_per_s']:,.0f} real tokens/s, {only['share']:.0%} of the limit"
    predicted = climbed[climbed["predicted"].notna()]
    if len(predicted):
        off = predicted["predicted"] / predicted["tokens_per_s"] - 1
        worst = predicted.loc[off.abs().idxmax()]
        close = f"{(off.abs() <= CLOSE).sum()} of {len(off)} predictions come within {CLOSE:.0%}"
        numbers = f"{worst['predicted']:,.0f} predicted, {worst['tokens_per_s']:,.0f} measured"
        yield f"{close}; '{worst['rung']}' is farthest off, {numbers}" if ranked else close
    yield from _about_others(ok, climbed)
    differences = climbed[["loss_difference", "grad_norm_difference"]].max()
    if differences.notna().all():
        by = (
            f"{differences['loss_difference']:.1e}, gradient norms by at most {differences['grad_norm_difference']:.1e}"
        )
        yield f"from rung to rung, losses differ by at most {by} (relative, the largest of all steps)"
    for row in rows[~rows["status"].isin(["ok", NOT_MEASURED])].itertuples():
        reason = " ".join(str(row.error).split()).split(". ")[0].split(";")[0]
        yield f"'{row.rung}' has no result: {row.status}, {reason}"
    if missing := list(rows[rows["status"] == NOT_MEASURED]["rung"]):
        yield f"not measured: {', '.join(missing)}"


CLOSE = 0.2


def _about_others(ok: pd.DataFrame, climbed: pd.DataFrame) -> Iterator[str]:
    """The best rung against TRL's own, and padding on the same rig against the rung below it."""
    for index, other in ok[ok["beside"].astype(bool)].iterrows():
        under = climbed[climbed.index < index]
        if other["rung"] == SAME_RIG and len(under):
            flat = under.iloc[-1]
            ratio, allowed = (flat[name] / other[name] for name in ("tokens_per_s", "limit"))
            reached = f"{ratio / allowed:.0%} of the {allowed:.2f} that the limits allow"
            yield f"on one rig, flattened over padded is {ratio:.2f}, {reached}"
        elif other["rung"] != SAME_RIG and len(climbed):
            best = {
                rungs.loc[rungs["tokens_per_s"].idxmax(), "rung"]: rungs["tokens_per_s"].max()
                for rungs in (climbed, climbed[climbed["rung"] != FLOAT8])
                if len(rungs)
            }
            rates = (f"'{rung}' runs at {rate / other['tokens_per_s']:.2f} times" for rung, rate in best.items())
            yield f"{', '.join(rates)} '{other['rung']}'"


SAME_RIG, FLOAT8 = "padded, same rig", "float8"
