"""What every figure is drawn with: one theme, one palette, one look per strategy, and the shapes that several share.

A figure that only one notebook shows is drawn by its study. All of them come from records or plain arrays, without a
GPU; they have units on the axes, the finding in the title, text of at least 10 pt and alt text. Colours are told apart
by the colour-blind, and hatches and markers repeat them. Figures are made without pyplot, so nothing stays open.
"""

from __future__ import annotations

import io
import textwrap
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from packlib.lab.strategies import STRATEGIES

DPI = 110
PAGE = 8.8  # inches that a notebook's page shows without making the print smaller
LETTER = 0.075  # inches of 10 pt, in the mean
LABEL = 50  # letters in a line of a label
COLORS: list[tuple[float, float, float]] = list(sns.color_palette("colorblind", 10))  # what a `Look` counts in
MARKERS = "oDs^vP"  # of lines that are no strategies
LIMIT: dict[str, Any] = {"color": "black", "linewidth": 1.6, "linestyle": (0, (4, 2))}  # what cannot be passed
# One colour an example, mostly Okabe and Ito's; vermilion is kept for attention to another example.
EXAMPLES = np.array(
    [to_rgb(f"#{code}") for code in ("56b4e9", "e69f00", "009e73", "cc79a7", "f0e442", "9a9ae0", "b3936b", "999999")]
)
PAD = (0.9, 0.9, 0.9)
NUMBER: dict[str, Any] = {  # a number beside its bar, above the lines that it may lie on
    "fontsize": 10,
    "va": "center",
    "zorder": 5,
    "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.8},
}
HALO = [withStroke(linewidth=3, foreground="white")]  # around text on grids and stems
THEME = {
    "figure.dpi": DPI,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "figure.constrained_layout.use": True,
    "hatch.linewidth": 0.6,
}


class Picture(Figure):
    """A figure with `alt`: what it shows, in a sentence or two, for those who do not see it."""

    alt: str = ""


class Style(NamedTuple):
    """How a strategy is drawn, the same in every figure."""

    color: tuple[float, float, float]
    hatch: str
    marker: str


def style(strategy: str) -> Style:
    """The strategy's look, its colour as red, green and blue in [0, 1]."""
    look = STRATEGIES[strategy].look
    return Style(COLORS[look.color], look.hatch, look.marker)


def label(strategy: str) -> str:
    """What readers call a strategy."""
    return STRATEGIES[strategy].label


def theme() -> None:
    """Call once a notebook."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", rc=THEME)


def new(
    width: float,
    height: float,
    alt: str,
    columns: int = 1,
    rows: int = 1,
    *,
    sharey: bool = False,
    width_ratios: tuple[float, ...] | None = None,
    height_ratios: tuple[float, ...] | None = None,
) -> tuple[Picture, list[Axes]]:
    """A figure of `width` × `height` inches with its alt text, and its axes, row by row."""
    figure = Picture(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.alt = alt
    axes = figure.subplots(
        rows, columns, sharey=sharey, squeeze=False, width_ratios=width_ratios, height_ratios=height_ratios
    )
    return figure, list(axes.flat)


def head(figure: Picture, title: str) -> Picture:
    """Put the title over the whole figure, from its left edge, wrapped to its width: long ones have room there."""
    width = int(figure.get_figwidth() * 8.5)  # letters
    lines = [line for part in title.split("\n") for line in textwrap.wrap(part, width)]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontweight="bold", fontsize=13)
    return figure


def png(figure: Picture, description: str | None = None, **told: str) -> bytes:
    """The figure as a PNG file that carries its alt text (or `description`) as `Description`, and what else is `told`.

    256 colours, a third of the size of all: notebooks stay small.
    """
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=DPI)
    info = PngInfo()
    for key, text in ({"Description": figure.alt if description is None else description} | told).items():
        info.add_itxt(key, text)
    Image.open(full).convert("RGB").quantize(256).save(small, format="png", optimize=True, pnginfo=info)
    return small.getvalue()


def log2_axis(ax: Axes) -> None:
    """A horizontal axis of powers of two, written as plain numbers."""
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:,.10g}")


def plain_numbers(axis: Axis) -> None:
    """Ticks of a logarithmic axis as 5, 100 and 1,000, at least three where there is room; call when all is drawn."""
    low, high = sorted(axis.get_view_interval())
    for steps in ([1.0], [1.0, 2.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0]):
        locator = LogLocator(10, subs=steps)
        if sum(low <= tick <= high for tick in locator.tick_values(low, high)) >= 3:
            break
    axis.set_major_locator(locator)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:,.10g}")


def bar(ax: Axes, y: float, value: float, strategy: str, low: float = np.nan, high: float = np.nan) -> None:
    """A horizontal bar in the look of a strategy, from 0 to `value`, with an error bar where `low` and `high` are."""
    look = style(strategy)
    error = [[value - low], [high - value]] if low < high else None
    ax.barh(y, value, 0.66, color=look.color, hatch=look.hatch, edgecolor="white", xerr=error, ecolor="0.25", capsize=3)


def panels_width(panels: int) -> float:
    """Inches of panels of bars that share their labels: on a page's width, three of them are still read."""
    return 3.8 * panels + (3.4 if panels == 1 else 2.2)


def bars_with_limits(table: pd.DataFrame, title: str, *, width: float | None = None, row: float = 0.5) -> Picture:
    """Speed-up over padding per strategy, one panel per corpus, the limit drawn on every bar.

    table: `corpus, strategy, speed_up, speed_up_low, speed_up_high, limit`: ratios of real tokens/s; limit may be NaN;
        and `label`, of a bar, where it is not the strategy's.
    width: inches of the figure, `panels_width` if None; row: inches of height for each bar.
    """
    named = table if "label" in table else table.assign(label=table["strategy"].map(label))
    groups, arms = list(dict.fromkeys(named["corpus"])), list(dict.fromkeys(zip(named["strategy"], named["label"])))
    size = width or panels_width(len(groups)), row * len(arms) + 1.9
    room = 0.72 * len(groups) / (size[0] - 2.2)  # of a number beside a bar, as a share of its panel
    figure, axes = new(*size, title, len(groups), sharey=True)
    for ax, group in zip(axes, groups):
        rows = named[named["corpus"] == group].set_index(["strategy", "label"]).reindex(arms)
        right = max(np.nanmax(rows[["speed_up_high", "limit"]].to_numpy()) * (1 + room), 1.2)
        for y, ((strategy, _), arm) in enumerate(rows.iterrows()):
            if np.isfinite(arm["speed_up"]):
                bar(ax, y, arm["speed_up"], strategy, arm["speed_up_low"], arm["speed_up_high"])
                end = arm["speed_up_high"]
                if end <= arm["limit"] < end + room * right:  # the number stands beyond the limit, not on it
                    end = arm["limit"]
                ax.text(end + 0.02 * right, y, f"{arm['speed_up']:.2f}×", **NUMBER)
            if np.isfinite(arm["limit"]):
                ax.plot([arm["limit"]] * 2, [y - 0.42, y + 0.42], **LIMIT)
        ax.axvline(1, color="0.4", linewidth=1)
        ax.set(title=str(group), xlabel="real tokens/s, relative to padding")
        ax.set_yticks(range(len(arms)), [name for _, name in arms])
        ax.set_xlim(0, right)
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        ax.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    meaning = "limit of dropping the pads: all of padding's step but the optimiser's least shrinks with its slots"
    if "waste_ratio" not in table or table["limit"].equals(table["waste_ratio"]):
        meaning = "limit of dropping the pads: padding's slots per real token over the strategy's own"
    (line,) = axes[-1].plot([], [], **LIMIT, label=meaning)
    figure.legend(handles=[line], loc="outside lower center")
    return head(figure, title)


def forest(table: pd.DataFrame, title: str, xlabel: str, *, panels: str = "") -> Picture:
    """Differences of a loss with their 95 % intervals, one row each, zero marked.

    table: `label, strategy, difference, low, high, n` in nats (low and high may be NaN, for a single seed). panels: a
    column; rows of one value of it are a panel, the panels stand side by side, and a label has one line in all.
    """
    names = list(dict.fromkeys(table["label"]))
    groups = list(table.groupby(panels, sort=False)) if panels else [("", table)]
    figure, axes = new(9.5 if len(groups) == 1 else 11.5, 0.42 * len(names) + 1.9, title, len(groups), sharey=True)
    for ax, (panel, rows) in zip(axes, groups):
        for row in rows.itertuples():
            color, _, marker = style(row.strategy)
            error = [[row.difference - row.low], [row.high - row.difference]] if np.isfinite(row.low) else None
            ax.errorbar(
                *(row.difference, names.index(row.label)),
                xerr=error,
                color=color,
                marker=marker,
                markersize=8,
                capsize=4,
                linewidth=1.8,
            )
        ax.axvline(0, color="black", linewidth=1)
        ax.locator_params(axis="x", nbins=5 if panels else 7)
        ax.set(xlabel=f"{xlabel}\n(nats; right of 0 is worse)", title=panel)
    seeds = table.drop_duplicates("label").set_index("label")["n"]
    axes[0].set_yticks(range(len(names)), [f"{name} (n={seeds[name]})" for name in names])
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    return head(figure, title)


def beside_paper(
    table: pd.DataFrame,
    value: str,
    title: str,
    xlabel: str,
    *,
    panels: str = "",
    decimals: int = 3,
    limit: str = "",
    meaning: str = "",
) -> Picture:
    """Ours beside the paper's, a pair of bars a label; where a side does not know the value, that is written out.

    table: `label, strategy, source ("paper" | "ours")` and the column `value`. panels: a column; rows of one value of
    it are a panel, up to three stand side by side, and a label has one line in all. decimals: of the numbers, all
    alike. limit: a column that is dashed on our bars, NaN for no line; `meaning` is what the legend calls it.
    """
    names = list(dict.fromkeys(table["label"]))
    groups = list(table.groupby(panels, sort=False)) if panels else [("", table)]
    columns = min(len(groups), 3)
    stacked = -(-len(groups) // columns)
    lines = [textwrap.wrap(name, LABEL) for name in names]
    row = max(0.46, 0.18 * max(map(len, lines)))  # inches
    figure, axes = new(PAGE, stacked * (row * len(names) + 0.7) + 1.4, title, columns, stacked, sharey=True)
    wide = (PAGE - LETTER * max(len(line) for label in lines for line in label)) / columns  # inches of a panel, about
    known = table[[value, *([limit] if limit else [])]].to_numpy(float)
    low, high = np.nanmin([0, *known.flat]), np.nanmax([0, *known.flat])
    number = min(0.2 + 0.09 * max(len(f"{end:.{decimals}f}") for end in (low, high)), wide / 3)  # inches
    margin = number / (wide - number * (1 + bool(low))) * ((high - low) or 1)
    for ax, (panel, rows) in zip(axes, groups):
        _pairs(ax, rows, names, value, decimals, limit, margin)
        ax.set_title(textwrap.fill(str(panel), int(wide * 10)), fontsize=11)
        ax.set(xlabel=textwrap.fill(xlabel, int(wide * 11)))
        ax.set(xlim=(low - margin if low else 0, high + margin), ylim=(len(names) - 0.4, -0.6))
        ax.xaxis.set_major_locator(MaxNLocator(int(2 * wide), steps=[1, 2, 5, 10]))
        ax.set_yticks(range(len(names)), ["\n".join(label) for label in lines])
        ax.grid(axis="y", visible=False)
    for ax in axes[len(groups) :]:
        ax.remove()
    if limit:
        axes[0].plot([], [], label=meaning, **LIMIT)
    axes[0].barh([np.nan], [0], color="0.72", label="paper, grey")  # for the legend alone
    ours = "measured here, in the strategy's colour"
    axes[0].barh([np.nan], [0], color="white", hatch="//", edgecolor="0.3", label=ours)
    figure.legend(loc="outside lower center", ncols=3)
    return head(figure, title)


def _pairs(
    ax: Axes, rows: pd.DataFrame, names: list[str], value: str, decimals: int, limit: str, margin: float
) -> None:
    """The bars of a panel of `beside_paper`. margin: what a number takes beside a bar, on the axis."""
    for y, name in enumerate(names):
        if name not in set(rows["label"]):
            _beside(ax, 0, y, "not measured", color="0.45")
    for shift, source in ((-0.2, "paper"), (0.2, "ours")):
        own = rows[rows["source"] == source].drop_duplicates("label").set_index("label")
        for name, row in own.reindex(list(dict.fromkeys(rows["label"]))).iterrows():
            y, end = names.index(name), row[value]
            if pd.isna(end):
                told = "paper: not known" if source == "paper" else "ours: not measured"
                _beside(ax, 0, y + shift, told, color="0.45")
                continue
            look = {"color": "0.72"} if source == "paper" else {"color": style(row["strategy"]).color, "hatch": "//"}
            ax.barh(y + shift, end, height=0.36, edgecolor="white", **look)
            if limit and source == "ours" and np.isfinite(row[limit]):
                ax.plot([row[limit]] * 2, [y, y + 0.4], **LIMIT)
                if 0 <= end < row[limit] < end + margin:  # the number stands beyond the limit, not on it
                    end = row[limit]
            _beside(ax, end, y + shift, f"{round(row[value], decimals) + 0.0:.{decimals}f}")  # + 0.0: no "-0.00"


def _beside(ax: Axes, x: float, y: float, text: str, **look: Any) -> None:
    """Text beside the end of a bar: right of it, or left of one that points to the left."""
    side, away = ("right", -4) if x < 0 else ("left", 4)
    ax.annotate(text, (x, y), xytext=(away, 0), textcoords="offset points", ha=side, **NUMBER | look)


def curves(table: pd.DataFrame, x: str, y: str, title: str, xlabel: str, ylabel: str, limit: str = "") -> Picture:
    """One line per strategy of column `y` against column `x` (powers of two), and of `limit`, dashed, where given."""
    figure, (ax,) = new(8.5, 4.6, title)
    for strategy, rows in table.groupby("strategy", sort=False):
        color, _, marker = style(strategy)
        rows = rows.sort_values(x)
        ax.plot(rows[x], rows[y], color=color, marker=marker, markersize=7, label=label(strategy))
        if limit:
            ax.plot(rows[x], rows[limit], **LIMIT | {"color": color}, label=f"limit of {label(strategy)}")
    log2_axis(ax)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.legend()
    return figure
