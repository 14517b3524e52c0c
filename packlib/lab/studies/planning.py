"""Which examples should share a row? What notebook 03 compares: planners, and four traps that a full row does not show.

Everything follows from lengths and plans; no token is touched. One table per question, one row per point.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from packlib import plans
from packlib.lab import figures
from packlib.lab.figures import COLORS, Picture
from packlib.lab.parameters import unknown_name
from packlib.lab.strategies import STRATEGIES, Strategy, get_strategy, plan_for
from packlib.plans import Plan

OTHER_PACKERS = (plans.first_fit_decreasing, plans.histogram)  # that no strategy uses, as good as best fit
BROKEN = "#d55e00"  # what a broken example is crossed out in
ROWS_OF_A_STEP = 8  # in the table of examples per step


# Arms


def planners() -> dict[str, Strategy]:
    """Every planner that a strategy uses, and the other packers, by label; a strategy stands for how it is used.

    Mini-batches first, then packers, whose rows hold `max_tokens` here: a strategy may take several for a batch.
    """
    multipack = get_strategy("multipack_posid")
    others = [replace(multipack, name=packer.__name__, planner=packer) for packer in OTHER_PACKERS]
    ours = [strategy for strategy in STRATEGIES.values() if strategy.trl is None]
    found: dict[str, Strategy] = {}
    for strategy in sorted([*ours, *others], key=_is_flat):
        if strategy.layout == "flat" and strategy.size == "batch":
            strategy = replace(strategy, size="row")
        found.setdefault(_planner_label(strategy), strategy)  # what several strategies use is compared once
    return found


def _is_flat(strategy: Strategy) -> bool:
    return strategy.layout == "flat"


def _planner_label(strategy: Strategy) -> str:
    """`next_fit (sorted)`: the planner, and what it is told besides what happens to overlong examples."""
    told = [str(value) for name, value in strategy.own.items() if name != "overflow"]
    return " ".join([strategy.planner.__name__, *(f"({value})" for value in told)])


# Tables


def planner_table(lengths: np.ndarray, *, batch_size: int, max_tokens: int, seed: int = 0) -> pd.DataFrame:
    """Every planner on the same examples.

    Columns `planner, rows, fill` (real tokens over slots), `row_fill` (real tokens over rows × capacity; missing for
    mini-batches, which have none), `milliseconds, broken_examples, randomness` of stretches of batch_size × max_tokens
    tokens, `attention_spread` (dearest row over mean row).
    """
    rows = []
    for name, strategy in planners().items():
        begin = time.perf_counter()
        plan = plan_for(strategy, lengths, batch_size=batch_size, max_tokens=max_tokens, seed=seed)
        milliseconds = (time.perf_counter() - begin) * 1e3
        report = plan.report(lengths, strategy.layout)
        row = {
            "planner": name,
            "rows": report.rows,
            "fill": report.fill,
            "row_fill": report.capacity_fill if strategy.layout == "flat" else None,
            "milliseconds": milliseconds,
            "broken_examples": report.broken_examples,
            "randomness": randomness(plan, lengths, batch_size * max_tokens),
            "attention_spread": report.attention_spread,
        }
        rows.append(row)
    return pd.DataFrame(rows)


def report_line(lengths: np.ndarray, name: str, *, batch_size: int, max_tokens: int, seed: int = 0) -> str:
    """What the planner of that label makes of some lengths, in a line. Raises `ValueError` for an unknown label."""
    strategy = _planner(name)
    plan = plan_for(strategy, lengths, batch_size=batch_size, max_tokens=max_tokens, seed=seed)
    report = plan.report(lengths, strategy.layout)
    fill = "" if report.capacity_fill is None else f"row fill {report.capacity_fill:.3f}, "
    return f"{report.rows} rows, waste {report.waste:.2f}, {fill}{report.broken_examples} broken"


def _planner(name: str) -> Strategy:
    known = planners()
    if name not in known:
        raise unknown_name("planner", name, known)
    return known[name]


def fewest_rows(lengths: np.ndarray, max_tokens: int) -> int:
    """Rows of `max_tokens` that no packer can do without: the tokens over the capacity, rounded up."""
    return -(-int(lengths.sum()) // max_tokens)


def randomness(plan: Plan, lengths: np.ndarray, tokens: int) -> float:
    """How mixed stretches of `tokens` tokens are in length.

    1 as in a random order, near 0 where the order, or the row, follows length: the variance that the stretches'
    token-weighted mean log length has when segments are shuffled (8 times), over the variance in the plan.

    >>> lengths = np.arange(1, 1001)
    >>> rows = plans.shuffled_batches(lengths, 1)
    >>> round(randomness(long_to_short(rows), lengths, tokens=5000), 2), randomness(rows, lengths, tokens=5000) > 0.8
    (0.07, True)
    """
    size = plan.stop - plan.start
    logs = np.log(lengths[plan.example])

    def variance(order: np.ndarray) -> float:
        n = size[order].astype(np.int64)
        stretch = (np.cumsum(n) - n) // tokens
        return float((np.bincount(stretch, logs[order] * n) / np.maximum(np.bincount(stretch, n), 1)).var())

    rng = np.random.default_rng(0)
    chance = float(np.mean([variance(rng.permutation(len(size))) for _ in range(8)]))
    return min(1.0, chance / max(variance(np.arange(len(size))), 1e-12))


def fill_by_chunk(lengths: np.ndarray, max_tokens: int, chunks: Sequence[int], seed: int = 0) -> pd.DataFrame:
    """Best fit when only `chunk` examples, in random order, are planned at once.

    Columns `max_tokens, chunk, row_fill, rows, more`.

    `datasets.map` does so with 1000 of them. The last row is all of them at once; `more`: rows above its, as a share.
    """
    order = np.random.default_rng(seed).permutation(lengths)
    rows = []
    for chunk in sorted({min(chunk, len(order)) for chunk in [*chunks, len(order)]}):
        parts = [order[begin : begin + chunk] for begin in range(0, len(order), chunk)]
        count = sum(len(plans.best_fit_decreasing(part, max_tokens, overflow="error")) for part in parts)
        rows.append((max_tokens, chunk, lengths.sum() / (count * max_tokens), count))
    table = pd.DataFrame(rows, columns=["max_tokens", "chunk", "row_fill", "rows"])
    return table.assign(more=table["rows"] / table["rows"].iloc[-1] - 1)


def fill_by_buffer(lengths: np.ndarray, max_tokens: int, buffers: Sequence[int], seed: int = 0) -> pd.DataFrame:
    """Rows of `plans.stream` against its buffer, for buffers below the corpus.

    Columns `source` (`shuffled` or `sorted by length`, as examples come), `buffer, row_fill, rows` and `offline_fill`,
    the row fill of a plan of all of them. Rows are those that the stream makes, of tokens that take no memory.
    """
    offline = lengths.sum() / (len(plans.best_fit_decreasing(lengths, max_tokens, overflow="error")) * max_tokens)
    sources = {"shuffled": np.random.default_rng(seed).permutation(lengths), "sorted by length": np.sort(lengths)}
    made = []
    for source, order in sources.items():
        examples = [np.broadcast_to(np.int64(1), n) for n in order.tolist()]
        for buffer in sorted(buffer for buffer in buffers if buffer < len(order)):
            stream = plans.stream(examples, max_tokens, overflow="error", buffer=buffer, seed=seed)
            rows = sum(1 for _ in stream)
            made.append((source, buffer, lengths.sum() / (rows * max_tokens), rows, offline))
    return pd.DataFrame(made, columns=["source", "buffer", "row_fill", "rows", "offline_fill"])


def long_to_short(plan: Plan) -> Plan:
    """The rows sorted by their longest segment, as a packer builds them: what shuffling the rows prevents."""
    longest = np.maximum.reduceat(plan.stop - plan.start, plan.row_splits[:-1])
    return plan.take(np.argsort(-longest, kind="stable"), "long_to_short")


def examples_per_step(plan: Plan, seed: int = 0) -> pd.DataFrame:
    """Examples in an optimiser step of eight rows, as the plan has them and as `constant_examples` groups rows.

    Columns `steps`, quantiles `p5, p50, p95`, and the share of steps with exactly the target, in percent.
    """
    target = ROWS_OF_A_STEP * int(np.ceil(plan.row_examples.mean()))
    grouped, steps = plans.constant_examples(plan, target, seed=seed)
    by_step = {
        "rows as shuffled": np.add.reduceat(plan.row_examples, np.arange(0, len(plan), ROWS_OF_A_STEP)),
        f"constant_examples({target})": np.add.reduceat(grouped.row_examples, steps[:-1]),
    }
    rows = {}
    for name, examples in by_step.items():
        p5, p50, p95 = np.percentile(examples, (5, 50, 95))
        exactly = 100 * np.mean(examples == target)
        rows[name] = {"steps": len(examples), "p5": p5, "p50": p50, "p95": p95, f"exactly {target} (%)": exactly}
    return pd.DataFrame(rows).T


def rank_costs(plan: Plan, world_size: int) -> np.ndarray:
    """Σ n² of every rank at every step over the mean of its step, float64 [steps, world_size].

    Rank r takes rows r, r + world_size, …; rows that fill no step are left out.
    """
    costs = _costs_by_step(plan, world_size)
    return costs / costs.mean(axis=1, keepdims=True)


def slowest_over_mean(plan: Plan, world_size: int) -> float:
    """How much longer an epoch's attention takes because every step waits for its dearest rank: Σ max / Σ mean."""
    costs = _costs_by_step(plan, world_size)
    return float(costs.max(axis=1).sum() / costs.mean(axis=1).sum())


def _costs_by_step(plan: Plan, world_size: int) -> np.ndarray:
    return plan.row_costs()[: len(plan) // world_size * world_size].reshape(-1, world_size)


# Figures


def row_pictures(lengths: np.ndarray, chosen: Sequence[str], *, batch_size: int, max_tokens: int, seed: int) -> Picture:
    """The rows that some planners (labels of `planners`) make of the same few examples, a panel each, up to three wide.

    Each block is an example, with its number where there is room, in a colour of its own; what is broken is crossed out
    in vermilion (cut or cropped), padding is grey, the capacity dashed. Raises `ValueError` for an unknown label.
    """
    made = {}
    for name in chosen:
        made[name] = plan_for(_planner(name), lengths, batch_size=batch_size, max_tokens=max_tokens, seed=seed)
    padded = {name: _planner(name).layout == "padded" for name in made}
    lines = [len(plan.example) if padded[name] else len(plan) for name, plan in made.items()]
    columns = min(3 if len(made) != 4 else 2, len(made))
    heights = tuple(0.9 + min(0.2 * max(lines[i : i + columns]), 8.0) for i in range(0, len(made), columns))
    alt = "Rows of each planner as coloured blocks: "
    alt += ", ".join(f"{name} {len(plan)} rows" for name, plan in made.items())
    width = 13.2 / max(columns, 2)
    figure, axes = figures.new(width * columns, sum(heights), alt, columns, len(heights), height_ratios=heights)
    for ax in axes[len(made) :]:
        ax.set_visible(False)
    for ax, count, (name, plan) in zip(axes, lines, made.items()):
        _draw_rows(ax, plan, lengths, padded[name], numbers=max_tokens / width / 5 if count <= 40 else np.inf)
        ax.axvline(max_tokens, color="black", linestyle="--", linewidth=1.2)
        count_broken = _broken(plan, lengths).sum()
        broken = f", {count_broken} broken" if count_broken else ""
        ax.set_title(f"{name}: {len(plan)} {'batches' if padded[name] else 'rows'}{broken}", fontsize=11)
        ax.set(xlim=(0, max_tokens * 1.02), ylim=(count - 0.4, -0.6), yticks=[], xlabel="tokens")
        ax.grid(False)
    return figure


def _broken(plan: Plan, lengths: np.ndarray) -> np.ndarray:
    """Which examples are in the plan, but not in one piece: cut, cropped or truncated. bool, by example."""
    seen = np.bincount(plan.example, minlength=len(lengths)) > 0
    whole = plan.stop - plan.start == lengths[plan.example]
    seen[plan.example[whole]] = False
    return seen


def _draw_rows(ax: Axes, plan: Plan, lengths: np.ndarray, padded: bool, numbers: float) -> None:
    """One line a row, or, padded, one line an example and a rule between mini-batches. numbers: from this width on."""
    colors = np.random.default_rng(0).permutation(sns.husl_palette(len(lengths), s=0.7, l=0.75))  # neighbours differ
    broken, y = _broken(plan, lengths), 0
    for row in plan:
        if padded and y:
            ax.axhline(y - 0.5, color="black", linewidth=0.8)
        longest = max(segment.stop - segment.start for segment in row)
        for line in [[segment] for segment in row] if padded else [row]:
            left = 0
            for example, start, stop in line:
                look: dict[str, Any] = (
                    {"hatch": "xxx", "edgecolor": BROKEN} if broken[example] else {"edgecolor": "white"}
                )
                ax.barh(y, stop - start, 0.86, left, color=colors[example], linewidth=0.8, **look)
                if stop - start >= numbers:
                    box = {"facecolor": colors[example], "edgecolor": "none", "pad": 0.5} if broken[example] else None
                    place = left + (stop - start) / 2
                    ax.text(place, y, str(example), ha="center", va="center", fontsize=10, color="black", bbox=box)
                left += stop - start
            if padded:
                ax.barh(y, longest - left, 0.86, left, color="0.93", hatch="////", edgecolor="0.7", linewidth=0)
            y += 1


def fill_growth(table: pd.DataFrame, marked: int = 1000) -> Picture:
    """Row fill against how many examples are planned at once (`fill_by_chunk`), with `datasets.map`'s default marked.

    table: of one or several capacities, a line each.
    """
    worst = planned_at(table[table["max_tokens"] == table["max_tokens"].max()], marked)
    title = f"Planned {worst['chunk']:,.0f} at a time, {worst['max_tokens']:,.0f} tokens a row: "
    title += f"{worst['more']:.1%} more rows"
    figure, (ax,) = figures.new(9.5, 4.4, f"{title} than all at once. Row fill against examples planned at once")
    for i, (capacity, rows) in enumerate(table.groupby("max_tokens")):
        look: dict[str, Any] = {"color": COLORS[i], "marker": figures.MARKERS[i], "markersize": 7}
        ax.plot(rows["chunk"], 100 * rows["row_fill"], **look, label=f"rows of {capacity:,} tokens")
    ax.axvline(marked, color="0.25", linestyle=":", linewidth=1.6, label=f"datasets.map: {marked:,} at a time")
    ax.set(title=title, xscale="log", xlabel="examples planned at once", ylabel="row fill (%)")
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.legend(loc="lower right")
    return figure


def planned_at(growth: pd.DataFrame, chunk: int = 1000) -> pd.Series:
    """The row of `fill_by_chunk` (of one capacity) that is nearest to so many examples at a time."""
    return growth.loc[(growth["chunk"] - chunk).abs().idxmin()]


def fill_by_buffer_lines(table: pd.DataFrame) -> Picture:
    """Row fill against the buffer of a stream (`fill_by_buffer`), a line a source, and that of a plan of everything."""
    offline, largest = table["offline_fill"].iloc[0], table["buffer"].max()
    at = table[table["buffer"] == largest].set_index("source")["row_fill"]
    title = f"A buffer of {largest:,} fills {at['shuffled']:.2%}, a plan of all {offline:.2%}"
    figure, (ax,) = figures.new(8.5, 4.2, f"{title}; sorted by length, the stream fills {at['sorted by length']:.2%}")
    for i, (source, line) in enumerate(table.groupby("source", sort=False)):
        look: dict[str, Any] = {"color": COLORS[3 * i], "marker": figures.MARKERS[i], "markersize": 7}
        ax.plot(line["buffer"], 100 * line["row_fill"], **look, label=f"stream, {source}")
    ax.axhline(100 * offline, **figures.LIMIT, label="plan of all examples")
    ax.set(title=title, xscale="log", xlabel="examples in the buffer", ylabel="row fill (%)")
    figures.plain_numbers(ax.xaxis)
    ax.legend(loc="lower right")
    return figure


def drift(named: Mapping[str, Plan]) -> Picture:
    """Examples in each row over the epoch, with the running mean, one panel per order of the rows.

    An order that drifts changes the batch, and its statistics, with time.
    """
    ends = {name: _ends(plan.row_examples) for name, plan in named.items()}
    told = [f"{name}: {first:.1f} in the first tenth, {last:.1f} in the last" for name, (first, last) in ends.items()]
    alt = f"Examples per row over the epoch. {'; '.join(told)}"
    figure, axes = figures.new(6 * len(named), 4, alt, len(named), sharey=True)
    for i, (ax, (name, plan)) in enumerate(zip(axes, named.items())):
        x, counts = 100 * np.arange(len(plan)) / len(plan), plan.row_examples
        ax.plot(x, counts, ".", markersize=4, color=COLORS[7], alpha=0.6, label="one row")
        mean = pd.Series(counts).rolling(max(len(plan) // 20, 1), center=True, min_periods=1).mean()
        ax.plot(x, mean, color=COLORS[i * 2], linewidth=2.4, label="running mean")
        ax.set(title=name, xlabel="progress of the epoch (%)", yscale="log")
        ax.legend()
    figures.plain_numbers(axes[0].yaxis)
    axes[0].set_ylabel("examples per row")
    return figure


def _ends(counts: np.ndarray) -> tuple[float, float]:
    """Mean of the first tenth, and of the last."""
    tenth = max(len(counts) // 10, 1)
    return float(counts[:tenth].mean()), float(counts[-tenth:].mean())


def rank_waiting(named: Mapping[str, Plan], world_size: int, steps: int = 40) -> Picture:
    """Every rank's attention cost over the mean of its step, one panel per order of the rows.

    The highest point of a step is what all ranks wait for; the first `steps` optimiser steps are shown.
    """
    found = {name: slowest_over_mean(plan, world_size) for name, plan in named.items()}
    alt = ", ".join(f"{name}: slowest rank {value:.2f} times the mean" for name, value in found.items())
    figure, axes = figures.new(6 * len(named), 4, alt, len(named), sharey=True)
    for i, (ax, (name, plan)) in enumerate(zip(axes, named.items())):
        costs = rank_costs(plan, world_size)[:steps]
        color, marker = COLORS[3 if i == 0 else 0], figures.MARKERS[i]
        ax.plot(costs, ".", color="0.6", markersize=5, label=["every rank", *[""] * (costs.shape[1] - 1)])
        ax.plot(costs.max(axis=1), color=color, marker=marker, markersize=5, label="slowest rank")
        ax.axhline(1, color="black", linewidth=1)
        ax.set(title=f"{name}: slowest {found[name]:.2f} × the mean", xlabel="optimiser step")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    axes[0].set_ylabel("Σ n² of a rank / mean of the ranks")
    return figure


# Findings


def buffer_finding(table: pd.DataFrame, within: float = 0.005) -> str:
    """What `fill_by_buffer` found: the buffer from which on a stream is as full as a plan, and what sorting costs."""
    offline = table["offline_fill"].iloc[0]
    shuffled, in_order = (lines for _, lines in table.groupby("source", sort=False))
    short = shuffled[shuffled["row_fill"] < (1 - within) * offline]
    enough = shuffled[shuffled["buffer"] > short["buffer"].max()] if len(short) else shuffled
    largest, last = shuffled["buffer"].iloc[-1], in_order["row_fill"].iloc[-1]
    found = f"no buffer up to {largest:,} is" if enough.empty else f"a buffer of {enough['buffer'].iloc[0]:,} is"
    return (
        f"Shuffled, {found} within {within:.1%} of the row fill of a plan of everything ({offline:.2%}); "
        f"sorted by length, a buffer of {largest:,} fills {last:.2%}, {1 - last / offline:.1%} less than the plan."
    )


def findings(
    table: pd.DataFrame,
    growth: pd.DataFrame,
    waiting: Mapping[str, float],
    *,
    lengths: np.ndarray,
    max_tokens: int,
    ranks: int,
) -> list[str]:
    """Sentences of notebook 03, every number computed.

    table: `planner_table`. growth: `fill_by_chunk`, of one or several capacities. waiting:
    `slowest_over_mean` as planned, then balanced.
    """
    by_planner = table.set_index("planner")
    best = by_planner.loc["best_fit_decreasing"]
    chunked = [planned_at(rows) for _, rows in growth.groupby("max_tokens")]
    slowest, balanced = waiting.values()
    return [
        f"Best fit packs {len(lengths):,} examples into {best.rows:,.0f} rows in {best.milliseconds:.0f} ms; "
        f"the lower bound is {fewest_rows(lengths, max_tokens):,}. "
        f"Random next fit needs {by_planner.loc['next_fit (random)', 'rows']:,}.",
        f"Cutting every {max_tokens:,} tokens breaks {by_planner.loc['fixed_length', 'broken_examples']:,} "
        f"of {len(lengths):,} examples.",
        f"Planned {chunked[0]['chunk']:,.0f} at a time, "
        + ", ".join(f"rows of {at['max_tokens']:,.0f} tokens are {at['row_fill']:.2%} full" for at in chunked)
        + f"; that is up to {max(at['more'] for at in chunked):.1%} more steps than planned all at once.",
        f"On {ranks} ranks the slowest does {slowest:.2f} × the mean attention work of its step; "
        f"balanced, {balanced:.2f} ×.",
    ]
