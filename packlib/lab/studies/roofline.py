"""A roofline with the strategies on it: what a step does with each byte that it moves (notebook 05).

    work       6 N operations a slot, N parameters that a slot is multiplied with
    bytes      weights read forward and backward and gradients written, once a micro-batch; 8 more numbers a parameter
               for the optimiser, once a step (`packlib.lab.runs.limits` counts the same)
    roof       the slower of both: operations at the measured matrix rate, bytes at the measured copy rate

Packing removes slots that do no good, and so moves a strategy to the left as well as towards its useful work: where a
step has few slots its weights are hardly worth fetching. Full rows move it to the right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator
from matplotlib.transforms import Bbox

from packlib.lab import figures, models
from packlib.lab.figures import LIMIT, Picture
from packlib.lab.records import had_device_alone
from packlib.lab.strategies import STRATEGIES, get_strategy

Record = Mapping[str, Any]
ITEMSIZE = 2  # bytes of a bfloat16 number
BY_MICRO_BATCH, BY_STEP = 3, 8  # numbers a parameter that are moved


def points(runs: Iterable[Record]) -> pd.DataFrame:
    """Measured bfloat16 runs on the roofline, a row each, by slots.

    Columns `model, device, corpus, strategy, rig` ("plain", or "climbed" where layers are compiled), `slots` of a
    micro-batch, `intensity` in FLOP a byte, `slot_flops` and `useful_flops` in FLOP/s (all slots, real tokens), `roof`
    in FLOP/s at that intensity, and the rates `matmul, copy`. Runs without a measured copy rate, with adapters, float8
    or a shared device are left out, and TRL's own where they do as ours; of several the fastest counts.
    """
    rows = []
    for run in runs:
        spec, metrics, rig = run["spec"], run.get("metrics") or {}, run["spec"].get("rig") or {}
        measured = run["status"] == "ok" and metrics.get("copy_bytes_per_s") and had_device_alone(run)
        if not measured or spec.get("dtype") != "bfloat16" or rig.get("float8") or rig.get("lora_rank"):
            continue
        strategy = get_strategy(spec["strategy"])
        if strategy.trl is not None and not strategy.packed_by_trl:
            continue  # lies on ours
        count = models.parameter_count(models.model_config(spec["model"]))
        multiplied, accumulated = count.active + count.head, spec["gradient_accumulation"]
        slots = metrics["slots_per_step"] / spec.get("world_size", 1)
        moved = ITEMSIZE * count.total * (BY_MICRO_BATCH * accumulated + BY_STEP)
        matmul, copy = metrics["matmul_flops_ceiling"], metrics["copy_bytes_per_s"]
        intensity = 6 * multiplied * slots / moved
        row = {
            "model": spec["model"],
            "device": run["environment"]["device"],
            "corpus": str(spec["corpus"]).split("_")[0],
            "strategy": spec["strategy"],
            "rig": "climbed" if rig.get("compile", "none") != "none" else "plain",
            "slots": slots / accumulated,
            "intensity": intensity,
            "slot_flops": 6 * multiplied * metrics["slots_per_s"]["mean"] / spec.get("world_size", 1),
            "useful_flops": 6 * multiplied * metrics["tokens_per_s"]["mean"] / spec.get("world_size", 1),
            "roof": min(matmul, intensity * copy),
            "matmul": matmul,
            "copy": copy,
        }
        rows.append(row)
    table = pd.DataFrame(rows).sort_values("useful_flops", ascending=False)
    keys = ["model", "device", "corpus", "strategy", "rig"]
    return table.drop_duplicates(keys).sort_values("slots", ignore_index=True)


# Figures


def roofline(table: pd.DataFrame) -> Picture:
    """`points` under the roof of their device: filled with all slots, hollow with real tokens alone.

    table: of one model and device.
    """
    matmul, copy = table["matmul"].median(), table["copy"].median()
    title = f"{table['model'].iloc[0]} on {table['device'].iloc[0]}: the roof bends at {matmul / copy:,.0f} FLOP a byte"
    figure, (ax,) = figures.new(10.5, 5.6, f"Roofline. {title}; {len(table)} measured runs under it")
    ends = np.geomspace(table["intensity"].min() / 2, max(table["intensity"].max(), matmul / copy) * 3, 100)
    ax.plot(ends, np.minimum(matmul, ends * copy) / 1e12, **LIMIT, label="roof: measured matrix and copy rate")
    found = dict(list(table.groupby(["strategy", "rig"], sort=False)))
    for strategy, rig in sorted(found, key=lambda arm: (arm[1] != "plain", list(STRATEGIES).index(arm[0]))):
        rows = found[strategy, rig]
        color, _, marker = figures.style(strategy)
        look: dict[str, Any] = {
            "marker": marker,
            "markersize": 12 if rig == "climbed" else 8,
            "linestyle": "none",
            "color": color,
        }
        if get_strategy(strategy).trl is not None:  # lies on ours: larger than it, of open lines, and above it
            look |= {"markersize": 20, "markeredgewidth": 2.5, "zorder": 4, "path_effects": figures.HALO}
        ax.plot(rows["intensity"], rows["slot_flops"] / 1e12, **look, label=f"{figures.label(strategy)}, {rig}")
        ax.plot(rows["intensity"], rows["useful_flops"] / 1e12, **look, fillstyle="none")
        ax.vlines(rows["intensity"], rows["useful_flops"] / 1e12, rows["slot_flops"] / 1e12, color=color)
    ax.set(xscale="log", yscale="log", xlabel="work for each byte moved (FLOP / byte)", ylabel="TFLOP/s")
    for axis, ticks in ((ax.xaxis, (100, 200, 500, 1000, 2000, 5000, 10_000)), (ax.yaxis, (50, 100, 200, 400, 800))):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:,.0f}")
    ax.set_title(title)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), title="filled: slots, hollow: real tokens")
    _name(figure, ax, table)
    return figure


def _name(figure: Picture, ax: Axes, table: pd.DataFrame) -> None:
    """Write every point's corpus beside it, where neither a point, a stem nor another name lies; once for two alike."""
    figure.draw_without_rendering()  # places axes and legend
    taken = []  # boxes of points and stems
    for row in table.itertuples():
        ends = np.array([(row.intensity, row.slot_flops / 1e12), (row.intensity, row.useful_flops / 1e12)])
        (x, top), (_, bottom) = ax.transData.transform(ends)
        taken.append(Bbox([[x - 10, bottom - 10], [x + 10, top + 10]]))
    named: list[tuple[str, float, float]] = []
    for row in table.itertuples():
        x, y = row.intensity, row.useful_flops / 1e12
        if any(c == row.corpus and abs(x / a - 1) < 0.1 and abs(y / b - 1) < 0.1 for c, a, b in named):
            continue
        named.append((row.corpus, x, y))
        for away, side in (((11, 0), "left"), ((-11, 0), "right"), ((0, -16), "center"), ((0, 16), "center")):
            look: dict[str, Any] = {"path_effects": figures.HALO, "zorder": 5, "fontsize": 10, "va": "center"}
            text = ax.annotate(str(row.corpus), (x, y), xytext=away, textcoords="offset points", ha=side, **look)
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:  # no room anywhere: the halo has to do
            text = ax.annotate(str(row.corpus), (x, y), xytext=(11, 0), textcoords="offset points", **look)
        taken.append(text.get_window_extent())


# Findings


def finding(table: pd.DataFrame) -> str:
    """On which side of the bend the runs lie, and how near to the roof each comes, in a sentence. table: `points`."""
    right = int((table["intensity"] > table["matmul"] / table["copy"]).sum())
    shares = table["useful_flops"] / table["roof"]
    told = [
        f"{share:.0%} with {figures.label(row['strategy'])} on {row['corpus']}, {row['rig']}"
        for share, (_, row) in zip(shares, table.iterrows())
    ]
    return (
        f"{right} of {len(table)} runs do so much work for each byte that the matrix rate is their roof, not the copy "
        f"rate; real tokens reach of it {'; '.join(told)}."
    )
