"""Every figure of the notebooks, drawn from records or plain arrays; none needs a GPU.

One palette and one marker per strategy everywhere (colour-blind safe, plus hatch), units on the axes, the finding in the title, alt text in
`figure.alt`. `show` displays a figure with its alt text and keeps a PNG in the run's folder.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import seaborn as sns
from IPython.display import Image, display
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from packlib.lab.strategies import STRATEGIES
from packlib.lab.tables import arm_label

DPI = 110
_COLORS = sns.color_palette("colorblind", 10)
_STYLE = {  # strategy: colour, hatch, marker
    "padding": (7, "", "o"), "group_by_length": (9, "..", "s"), "minibatch_packing": (0, "//", "D"), "fixed_length_packing": (3, "xx", "X"),
    "fixed_length_packing_posid": (1, "\\\\", "P"), "multipack_posid": (2, "++", "^"), "random_packing_posid": (4, "oo", "v"),
    "sorted_packing_posid": (5, "--", "<"), "token_budget": (6, "**", ">"), "dynapipe": (8, "OO", "h"), "trl_padding": (7, "o", "1"),
    "trl_padding_free": (0, "o", "2"), "trl_packing_bfd": (2, "o", "3"),
}  # fmt: skip
LIMIT = {"color": "black", "linewidth": 1.6, "linestyle": (0, (4, 2))}


def style(strategy: str) -> tuple[tuple[float, float, float], str, str]:
    """(colour, hatch, marker) of a strategy, the same in every figure."""
    color, hatch, marker = _STYLE[strategy]
    return _COLORS[color], hatch, marker


def label(strategy: str) -> str:
    return STRATEGIES[strategy].label


def theme() -> None:
    """Call once a notebook."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", rc={
        "figure.dpi": DPI, "axes.titlelocation": "left", "axes.titlesize": 13, "axes.titleweight": "bold", "axes.labelsize": 11,
        "xtick.labelsize": 10, "ytick.labelsize": 10, "legend.fontsize": 10, "figure.constrained_layout.use": True, "hatch.linewidth": 0.6,
    })  # fmt: skip


def show(figure: Figure, name: str | None = None, folder: Path | None = None) -> None:
    """Display a figure with its alt text; with `name` and `folder`, keep it as `<folder>/figures/<name>.png` too."""
    full, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=DPI)
    plt.close(figure)
    PIL.Image.open(full).convert("RGB").quantize(256).save(
        buffer, format="png", optimize=True
    )  # a third of the size: notebooks stay small
    if name and folder:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        (folder / "figures" / f"{name}.png").write_bytes(buffer.getvalue())
    display(Image(buffer.getvalue(), alt=figure.alt))


def new(width: float, height: float, alt: str, columns: int = 1, **kwargs) -> tuple[Figure, np.ndarray]:
    """A figure of one row of axes, with its alt text. Returns (figure, axes [columns])."""
    figure, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False, **kwargs)
    figure.alt = alt
    return figure, axes[0]


def head(figure: Figure, title: str) -> Figure:
    """Put the title over the whole figure, from its left edge, wrapped to its width: long ones have room there; returns the figure."""
    lines = [line for part in title.split("\n") for line in textwrap.wrap(part, int(figure.get_figwidth() * 9))]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontweight="bold", fontsize=13)
    return figure


def attention_pictures(lengths: Sequence[int], weights: Sequence[np.ndarray], titles: Sequence[str]) -> Figure:
    """Who attends to whom: one square of attention weights ([T, T], rows = queries) per title, segment borders drawn. White: no attention at all."""
    figure, axes = new(
        4.9 * len(titles) + 0.8,
        5.0,
        f"Attention weights, {' beside '.join(titles)}; examples of {list(lengths)} tokens",
        len(titles),
    )
    edges = np.cumsum([0, *lengths])
    centres, letters = (edges[:-1] + edges[1:] - 1) / 2, [chr(65 + i) for i in range(len(lengths))]
    for ax, weight, title in zip(axes, weights, titles):
        image = ax.imshow(np.where(weight > 0, weight, np.nan), cmap="viridis_r", norm=PowerNorm(0.5, 0, 1))
        for edge in edges[1:-1]:
            ax.axhline(edge - 0.5, color="black", linewidth=1)
            ax.axvline(edge - 0.5, color="black", linewidth=1)
        ax.set_title(title, fontsize=12)
        ax.set(
            xlabel="key: token of example …", xticks=centres, xticklabels=letters, yticks=centres, yticklabels=letters
        )
        ax.grid(False)
    axes[0].set_ylabel("query: token of example …")
    figure.colorbar(image, ax=list(axes), shrink=0.8, label="attention weight (square-root scale)")
    return figure


def logit_changes(changes: dict[str, np.ndarray], lengths: Sequence[int], edited: int) -> Figure:
    """Largest logit change at every token of a packed row after editing one example: one line per boundary rule ({title: float [T]})."""
    edges = np.cumsum([0, *lengths])
    others = np.repeat(np.arange(len(lengths)), lengths) != edited
    moved = ", ".join(f"{values[others].max():.2g} {name}" for name, values in changes.items())
    title = f"Editing {chr(65 + edited)} moves the others' logits by up to {moved}"
    figure, (ax,) = new(10, 3.9, f"{title}; change at every position of the row")
    ax.axvspan(edges[edited] - 0.5, edges[edited + 1] - 0.5, color="0.9")
    for i, (name, values) in enumerate(changes.items()):
        ax.plot(
            np.arange(len(values)),
            values,
            marker="oX^"[i % 3],
            markersize=6,
            color=_COLORS[[3, 2, 0][i % 3]],
            label=name,
        )
    for i, (start, stop) in enumerate(pairwise(edges)):
        ax.axvline(stop - 0.5, color="black", linewidth=1)
        name = f"{chr(65 + i)}{', edited' if i == edited else ''}"
        ax.text((start + stop - 1) / 2, 1.01, name, transform=ax.get_xaxis_transform(), ha="center", fontsize=11)
    top = max(max(values.max() for values in changes.values()), 1e-6)
    ax.set_yscale("symlog", linthresh=1e-7)
    ax.set(
        xlabel="position in the packed row (tokens)",
        ylabel="largest logit change",
        xlim=(-0.5, edges[-1] - 0.5),
        ylim=(-3e-8, 4 * top),
    )
    ax.set_title(title, pad=22)
    ax.legend(loc="center right")
    return figure


def speed_up_bars(table: pd.DataFrame, title: str) -> Figure:
    """Speed-up over padding per strategy, one panel per corpus, the limit drawn on every bar.

    table columns: `corpus, strategy, speed_up, speed_up_low, speed_up_high, limit` (ratios of real tokens/s; limit may be NaN).
    """
    groups = list(dict.fromkeys(table["corpus"]))
    figure, axes = new(
        5.6 * len(groups) + 1.6, 0.5 * table["strategy"].nunique() + 1.9, title, len(groups), sharey=True
    )
    names = list(dict.fromkeys(table["strategy"]))
    for ax, group in zip(axes, groups):
        rows = table[table["corpus"] == group].set_index("strategy").reindex(names)
        for y, (strategy, row) in enumerate(rows.iterrows()):
            color, hatch, _ = style(strategy)
            if np.isfinite(row["speed_up"]):
                error = [[row["speed_up"] - row["speed_up_low"]], [row["speed_up_high"] - row["speed_up"]]]
                ax.barh(
                    y,
                    row["speed_up"],
                    color=color,
                    hatch=hatch,
                    edgecolor="white",
                    height=0.66,
                    xerr=error,
                    ecolor="0.25",
                    capsize=3,
                )
            if np.isfinite(row["limit"]):
                ax.plot([row["limit"]] * 2, [y - 0.42, y + 0.42], **LIMIT)
            if np.isfinite(row["speed_up"]):  # on white where the limit is drawn below it
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85}
                ax.text(
                    row["speed_up_high"] * 1.02 + 0.02,
                    y,
                    f"{row['speed_up']:.2f}×",
                    va="center",
                    fontsize=10,
                    bbox=box,
                    zorder=4,
                )
        ax.axvline(1, color="0.4", linewidth=1)
        ax.set(
            title=str(group),
            xlabel="real tokens/s, relative to padding",
            yticks=range(len(names)),
            yticklabels=[label(n) for n in names],
        )
        ax.set_xlim(0, max(np.nanmax(rows[["speed_up_high", "limit"]].to_numpy()) * 1.18, 1.2))
        ax.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    (line,) = axes[-1].plot(
        [], [], **LIMIT, label="limit of dropping the pads: padding's slots per real token over the strategy's own"
    )
    figure.legend(handles=[line], loc="outside lower center")
    return head(figure, title)


def memory_bars(table: pd.DataFrame, title: str) -> Figure:
    """Peak memory per strategy (GB), one panel per corpus. table columns: `corpus, strategy, kernel, peak_memory_bytes`."""
    groups = list(dict.fromkeys(table["corpus"]))
    names = list(dict.fromkeys(zip(table["strategy"], table["kernel"])))
    figure, axes = new(5.6 * len(groups) + 1.6, 0.5 * len(names) + 1.6, title, len(groups), sharey=True)
    for ax, group in zip(axes, groups):
        rows = table[table["corpus"] == group].set_index(["strategy", "kernel"])["peak_memory_bytes"] / 1e9
        for y, (strategy, kernel) in enumerate(names):
            if (strategy, kernel) in rows.index:
                color, hatch, _ = style(strategy)
                ax.barh(y, rows[strategy, kernel], color=color, hatch=hatch, edgecolor="white", height=0.66)
                ax.text(rows[strategy, kernel], y, f" {rows[strategy, kernel]:.2f}", va="center", fontsize=10)
        ax.set(title=str(group), xlabel="peak memory (GB)", yticks=range(len(names)))
        ax.set_yticklabels([arm_label(*name) for name in names])
        ax.set_xlim(0, rows.max() * 1.15)
        ax.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    return head(figure, title)


def forest(table: pd.DataFrame, title: str, xlabel: str) -> Figure:
    """Differences of a loss with their 95 % intervals, one row each, zero marked.

    table columns: `label, strategy, difference, low, high, n` in nats (low and high may be NaN for a single seed).
    """
    figure, (ax,) = new(9.5, 0.42 * len(table) + 1.7, title)
    for y, row in enumerate(table.itertuples()):
        color, _, marker = style(row.strategy)
        error = [[row.difference - row.low], [row.high - row.difference]] if np.isfinite(row.low) else None
        ax.errorbar(row.difference, y, xerr=error, color=color, marker=marker, markersize=8, capsize=4, linewidth=1.8)
    ax.axvline(0, color="black", linewidth=1)
    labels = [f"{r.label} (n={r.n})" for r in table.itertuples()]
    ax.set(
        xlabel=f"{xlabel}\n(nats; right of 0 is worse)",
        yticks=range(len(table)),
        yticklabels=labels,
        ylim=(len(table) - 0.4, -0.6),
    )
    return head(figure, title)


def beside_paper(table: pd.DataFrame, value: str, title: str, xlabel: str) -> Figure:
    """Ours beside the paper's: table columns `label, strategy, source ("paper" | "ours"), <value>`; an empty cell is left empty."""
    names = list(dict.fromkeys(table["label"]))
    figure, (ax,) = new(10, 0.62 * len(names) + 1.8, title)
    for shift, (source, hatch, shade) in zip((-0.2, 0.2), (("paper", "", "0.72"), ("ours", "//", None))):
        rows = table[table["source"] == source].drop_duplicates("label").set_index("label").reindex(names)
        for y, (_, row) in enumerate(rows.iterrows()):
            if pd.notna(row[value]):
                ax.barh(
                    y + shift,
                    row[value],
                    height=0.36,
                    color=shade or style(row["strategy"])[0],
                    hatch=hatch,
                    edgecolor="white",
                )
                ax.text(row[value], y + shift, f" {row[value]:.3g}", va="center", fontsize=10)
            else:
                ax.text(0, y + shift, f" {source}: not known", va="center", fontsize=10, color="0.45")
    ax.barh([0], [0], color="0.72", label="paper")
    ax.barh([0], [0], color=_COLORS[0], hatch="//", edgecolor="white", label="measured here")
    ax.set(xlabel=xlabel, yticks=range(len(names)), yticklabels=names)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.grid(axis="y", visible=False)
    ax.legend(loc="lower right")
    return head(figure, title)


def curves(
    table: pd.DataFrame,
    x: str,
    y: str,
    title: str,
    xlabel: str,
    ylabel: str,
    limit: str | None = None,
    logx: bool = True,
) -> Figure:
    """One line per strategy of `y` against `x`, with the column `limit` as a dashed line where given."""
    figure, (ax,) = new(8.5, 4.6, title)
    for strategy, rows in table.groupby("strategy", sort=False):
        color, _, marker = style(strategy)
        rows = rows.sort_values(x)
        ax.plot(rows[x], rows[y], color=color, marker=marker, markersize=7, label=label(strategy))
        if limit:
            ax.plot(rows[x], rows[limit], **LIMIT | {"color": color}, label=f"limit of {label(strategy)}")
    if logx:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.legend()
    return figure
