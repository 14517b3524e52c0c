"""Figures about lengths and plans, for notebooks 01 and 03. Same theme, palette and alt texts as `figures.py`; nothing is trained for them."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from packlib.lab import plan_study
from packlib.lab.advice import Advice
from packlib.lab.figures import label, new, speed_up_bars, style
from packlib.plans import Plan

_COLORS = sns.color_palette("colorblind", 10)
_MARKERS = "oDs^vP"


def length_histograms(lengths: Mapping[str, np.ndarray]) -> Figure:
    """Where the examples are and where the tokens are, over length on a log scale: one panel per corpus."""
    tops = {name: np.sort(n)[::-1] for name, n in lengths.items()}
    share = {name: n[: max(len(n) // 10, 1)].sum() / n.sum() for name, n in tops.items()}
    found = ", ".join(
        f"{name}: the longest tenth of the examples holds {part:.0%} of the tokens" for name, part in share.items()
    )
    figure, axes = new(5.8 * len(lengths), 4.2, f"Histograms of length. {found}", len(lengths))
    for ax, (name, n) in zip(axes, lengths.items()):
        edges = np.unique(np.geomspace(n.min(), n.max() + 1, 31).round())
        ax.hist(n, edges, weights=np.full(len(n), 100 / len(n)), color=_COLORS[7], label="examples")
        ax.hist(
            n,
            edges,
            weights=100 * n / n.sum(),
            histtype="step",
            linewidth=2,
            hatch="//",
            color=_COLORS[0],
            label="tokens",
        )
        ax.axvline(n.mean(), color="black", linestyle="--", linewidth=1.4, label=f"mean, {n.mean():.0f} tokens")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_title(f"{name}: the longest tenth holds {share[name]:.0%} of the tokens", fontsize=11)
        ax.set(xlabel="tokens per example", ylabel="share (%)")
        ax.legend()
    return figure


def waste_curves(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Slots per real token against batch size: padding, group-by-length and packing; one panel per corpus (`waste_by_batch_size`)."""
    worst = {name: t[t["strategy"] == "padding"].sort_values("batch_size").iloc[-1] for name, t in tables.items()}
    alt = "; ".join(
        f"{name}: padding spends {w['waste']:.2f} slots on a token at batch size {w['batch_size']:.0f}"
        for name, w in worst.items()
    )
    figure, axes = new(5.6 * len(tables), 4.2, alt, len(tables), sharey=True)
    for ax, (name, table) in zip(axes, tables.items()):
        for strategy, rows in table.groupby("strategy", sort=False):
            color, _, marker = style(strategy)
            ax.plot(rows["batch_size"], rows["waste"], color=color, marker=marker, markersize=7, label=label(strategy))
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set(
            title=f"{name}: {worst[name]['waste']:.2f} slots per token at {worst[name]['batch_size']:.0f}",
            xlabel="examples per mini-batch",
        )
    axes[0].set(ylabel="slots per real token (1 = no waste)", ylim=(0.9, None))
    axes[-1].legend()
    return figure


def capacity_curves(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """What a capacity loses and how full it packs, against the capacity (`capacity_table`): one line per corpus."""
    alt = "; ".join(
        f"{name}: {t['lost_tokens'].iloc[0]:.0%} of the tokens lost at {t['max_tokens'].iloc[0]}"
        for name, t in tables.items()
    )
    figure, (lost, fill) = new(11.5, 4.2, f"Tokens lost and fill by capacity. {alt}", 2)
    for i, (name, table) in enumerate(tables.items()):
        look = {"color": _COLORS[i], "marker": _MARKERS[i % 6], "markersize": 7, "label": name}
        lost.plot(table["max_tokens"], 100 * table["lost_tokens"], **look)
        fill.plot(table["max_tokens"], table["fill"], **look)
    lost.set(title="A small capacity cuts the tail off", ylabel="tokens lost by truncation (%)")
    fill.set(title="A large one packs almost without gaps", ylabel="fill of best-fit rows (tokens / capacity)")
    for ax in (lost, fill):
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_xlabel("capacity of a row, max_tokens")
        ax.legend()
    return figure


def row_pictures(named: Mapping[str, tuple[Plan, str]], max_tokens: int, columns: int = 3) -> Figure:
    """Rows of plans, name -> (plan, layout): each segment a block coloured by its example's number, padding hatched, the capacity dashed."""
    count = -(-len(named) // columns)
    figure, axes = plt.subplots(
        count, columns, figsize=(4.6 * columns, 2.6 * count), squeeze=False, layout="constrained"
    )
    figure.alt = "Rows of each planner as coloured blocks: " + ", ".join(
        f"{name} {len(plan)} rows" for name, (plan, _) in named.items()
    )
    for ax in axes.flat[len(named) :]:
        ax.set_visible(False)
    for ax, (name, (plan, layout)) in zip(axes.flat, named.items()):
        lines = [[s] for row in plan for s in row] if layout == "padded" else list(plan)
        widths = (
            [max(s.stop - s.start for s in row) for row in plan for _ in row]
            if layout == "padded"
            else [0] * len(lines)
        )
        for y, (line, width) in enumerate(zip(lines, widths)):
            sizes = [s.stop - s.start for s in line]
            lefts = np.cumsum([0, *sizes[:-1]])
            ax.barh(
                [y] * len(line),
                sizes,
                left=lefts,
                height=0.86,
                color=[_COLORS[s.example % 10] for s in line],
                edgecolor="white",
                linewidth=0.8,
            )
            ax.barh(
                y,
                max(width - sum(sizes), 0),
                left=sum(sizes),
                height=0.86,
                color="0.93",
                hatch="////",
                edgecolor="0.7",
                linewidth=0,
            )
        if layout == "padded":
            for edge in plan.row_splits[1:-1]:
                ax.axhline(edge - 0.5, color="black", linewidth=0.8)
        ax.axvline(max_tokens, color="black", linestyle="--", linewidth=1.2)
        ax.set_title(f"{name}: {len(plan)} rows", fontsize=11)
        ax.set(xlim=(0, max_tokens * 1.02), ylim=(len(lines) - 0.4, -0.6), yticks=[], xlabel="tokens")
        ax.grid(False)
    return figure


def fill_growth(table: pd.DataFrame, marked: int = 1000) -> Figure:
    """Fill against how many examples are planned at once (`fill_by_chunk`), with `datasets.map`'s default marked."""
    at = table.loc[(table["chunk"] - marked).abs().idxmin()]
    title = f"Planned {at['chunk']:,.0f} at a time, rows are {at['fill']:.1%} full; all at once, {table['fill'].iloc[-1]:.2%}"
    figure, (ax,) = new(8.5, 4.2, title)
    ax.plot(table["chunk"], 100 * table["fill"], marker="o", markersize=7, color=_COLORS[0])
    ax.axvline(marked, color=_COLORS[3], linestyle="--", linewidth=1.6)
    ax.text(
        marked,
        100 * table["fill"].iloc[0],
        f" datasets.map plans {marked:,} at a time",
        color=_COLORS[3],
        fontsize=10,
        va="bottom",
    )
    ax.set_xscale("log")
    ax.set(title=title, xlabel="examples planned at once", ylabel="fill of the rows (%)")
    return figure


def examples_per_row(named: Mapping[str, Plan]) -> Figure:
    """Examples in each row over the epoch, with the running mean: an order that drifts changes the batch, and its statistics, with time."""
    figure, axes = new(
        6 * len(named), 4, "Examples per row over the epoch: " + ", ".join(named), len(named), sharey=True
    )
    for i, (ax, (name, plan)) in enumerate(zip(axes, named.items())):
        x, counts = 100 * np.arange(len(plan)) / len(plan), plan.row_examples
        ax.plot(x, counts, ".", markersize=4, color=_COLORS[7], alpha=0.6, label="one row")
        mean = pd.Series(counts).rolling(max(len(plan) // 20, 1), center=True, min_periods=1).mean()
        ax.plot(x, mean, color=_COLORS[i * 2], linewidth=2.4, label="running mean")
        ax.set(title=name, xlabel="progress of the epoch (%)", yscale="log")
        ax.legend()
    axes[0].set_ylabel("examples per row")
    return figure


def rank_waiting(named: Mapping[str, Plan], world_size: int, steps: int = 40) -> Figure:
    """Every rank's attention cost over the mean of its step: the highest point of a step is what all ranks wait for."""
    found = {name: plan_study.slowest_over_mean(plan, world_size) for name, plan in named.items()}
    alt = ", ".join(f"{name}: slowest rank {value:.2f} times the mean" for name, value in found.items())
    figure, axes = new(6 * len(named), 4, alt, len(named), sharey=True)
    for i, (ax, (name, plan)) in enumerate(zip(axes, named.items())):
        costs = plan_study.rank_costs(plan, world_size)[:steps]
        ax.plot(costs, ".", color="0.6", markersize=5)
        ax.plot(
            costs.max(axis=1), color=_COLORS[3 if i == 0 else 0], marker=_MARKERS[i], markersize=5, label="slowest rank"
        )
        ax.axhline(1, color="black", linewidth=1)
        ax.set(title=f"{name}: slowest {found[name]:.2f} × the mean", xlabel="optimiser step")
        ax.legend(loc="upper right")
    axes[0].set_ylabel("Σ n² of a rank / mean of the ranks")
    return figure


def predicted_speed_ups(advice: Mapping[str, Advice], title: str) -> Figure:
    """The advice's speed-ups per corpus with their error, and the limit (padding's slots per real token over the strategy's)."""
    rows: list[dict[str, object]] = []
    for corpus, found in advice.items():
        for p in found.strategies:
            error = p.speed_up * (p.speed_up_error or 0.0)
            rows.append({"corpus": corpus, "strategy": p.strategy, "speed_up": p.speed_up, "speed_up_low": p.speed_up - error,
                         "speed_up_high": p.speed_up + error, "limit": found.strategies[0].waste / p.waste})  # fmt: skip
    return speed_up_bars(pd.DataFrame(rows), title)
