"""Where the memory of a training step goes, by hand, and held against the peaks of measured runs (notebook 06).

    weights + gradients + AdamW's two moments     4 numbers a parameter, whatever the batch; divided by the GPUs that
                                                  share them (FSDP)
    activations                                   per slot of the largest micro-batch: with recomputation each layer
                                                  keeps its input, and the layer at work keeps what its backward needs

Batching changes the second line only. So what padding costs in memory hides behind the first on one GPU, and shows
where several share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedConfig

from packlib.lab import figures, models
from packlib.lab.costs import largest_batch
from packlib.lab.figures import COLORS, Picture
from packlib.lab.strategies import get_strategy

Record = Mapping[str, Any]
LAYER_INNER, LAYER_HIDDEN = 7, 3  # of the layer at work: numbers a slot of its inner and of its hidden size
PARTS = ("weights", "gradients", "AdamW's moments", "activations")
LARGE_BATCH = 16  # examples from which on the micro-batches of a step are about equally large


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one GPU."""

    weights: float
    gradients: float
    moments: float
    activations: float

    @property
    def total(self) -> float:
        """Their sum."""
        return self.weights + self.gradients + self.moments + self.activations


def step_memory(
    config: PreTrainedConfig, slots: float, *, itemsize: int = 2, moment_size: int = 2, gpus: int = 1
) -> StepMemory:
    """Memory of a step with all layers recomputed. O(1).

    slots: of the largest micro-batch on one GPU, pads too. itemsize, moment_size: bytes of a weight, gradient and
    activation, and of a moment. gpus: that share weights, gradients and moments.

    In a layer's backward there are, of the inner size of its feed-forward part, gate, up, their activation and product,
    and three gradients; of the hidden size its input, the norm of it, and a gradient. Logits are not counted: they come
    and go before the first backward of a layer, and are less where a vocabulary is small.
    """
    parameters, hidden = models.parameter_count(config).total, config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    numbers = config.num_hidden_layers * hidden + LAYER_INNER * inner + LAYER_HIDDEN * hidden
    shared = parameters / gpus
    return StepMemory(itemsize * shared, itemsize * shared, 2 * moment_size * shared, itemsize * numbers * slots)


def peaks(runs: Iterable[Record]) -> pd.DataFrame:
    """Peak memory of measured runs beside `step_memory`, a row each, by slots.

    Columns `model, strategy, corpus, batch_size, slots`, `by_hand` and `measured` in bytes, and `error`, the one over
    the other less 1. Runs that it speaks of: on a GPU, in bfloat16, all layers
    recomputed, the trainer's own loss, one rank; and the size of whose largest micro-batch is known: full rows, or so
    many examples that the micro-batches of a step hardly differ.
    """
    rows = []
    for run in runs:
        if run["status"] != "ok" or not _plain(run):
            continue
        spec, strategy = run["spec"], get_strategy(run["spec"]["strategy"])
        full_rows = strategy.layout == "flat" and strategy.size != "examples"
        if not full_rows and spec["batch_size"] < LARGE_BATCH:
            continue
        slots = largest_batch(run)
        by_hand = step_memory(models.model_config(spec["model"]), slots).total
        corpus = str(spec["corpus"]).split("_")[0]
        row = (spec["model"], spec["strategy"], corpus, spec["batch_size"], slots, by_hand)
        rows.append((*row, run["metrics"]["peak_memory_bytes"]))
    columns = ["model", "strategy", "corpus", "batch_size", "slots", "by_hand", "measured"]
    table = pd.DataFrame(rows, columns=columns).drop_duplicates(columns[:4]).sort_values("slots", ignore_index=True)
    return table.assign(error=table["by_hand"] / table["measured"] - 1)


def _plain(run: Record) -> bool:
    spec, metrics = run["spec"], run["metrics"]
    rig = spec.get("rig") or {}
    plain = rig.get("recompute") == "all" and not any(rig.get(name) for name in ("fused_loss", "liger", "lora_rank"))
    on_gpu = bool(run["environment"].get("cuda")) and metrics.get("peak_memory_bytes")
    return bool(plain and on_gpu and spec.get("dtype") == "bfloat16" and spec.get("world_size", 1) == 1)


def slots_by_strategy(
    runs: Iterable[Record], model: str, corpus: str, strategies: Iterable[str], batch_size: int = 4
) -> dict[str, float]:
    """Slots of the largest micro-batch of published runs (the mean one of its step): strategy -> slots, in that order.

    corpus: what its name begins with. Strategies without such a run are left out.
    """
    found = {}
    for run in runs:
        spec = run["spec"]
        same = spec["model"] == model and str(spec["corpus"]).startswith(corpus) and spec["batch_size"] == batch_size
        if run["status"] == "ok" and same and _plain(run):
            found[spec["strategy"]] = largest_batch(run)
    return {name: found[name] for name in strategies if name in found}


def shared_memory(config: PreTrainedConfig, slots: Mapping[str, float], gpus: Iterable[int]) -> pd.DataFrame:
    """`step_memory` of strategies whose largest micro-batch has so many slots, on several numbers of GPUs.

    Columns `gpus, strategy`, PARTS in bytes, and `total over padding's`. The moments are float32, as most train. The
    first strategy is the one that others are held against.
    """
    rows = []
    for count in gpus:
        found = {name: step_memory(config, n, moment_size=4, gpus=count) for name, n in slots.items()}
        reference = next(iter(found.values())).total
        for name, memory in found.items():
            parts = (memory.weights, memory.gradients, memory.moments, memory.activations)
            rows.append((count, name, *parts, memory.total / reference))
    return pd.DataFrame(rows, columns=["gpus", "strategy", *PARTS, "total over padding's"])


# Figures


def memory_bars(table: pd.DataFrame) -> Picture:
    """`shared_memory` as stacked bars, a panel for each number of GPUs, with the total over the first strategy's."""
    counts = list(table["gpus"].unique())
    last = table[table["gpus"] == counts[-1]].iloc[-1]
    alt = f"Memory of a step by part on {' and '.join(map(str, counts))} GPUs"
    names = list(table["strategy"].unique())
    figure, axes = figures.new(5.6 * len(counts) + 1.6, 0.6 * len(names) + 2.3, alt, len(counts), sharey=True)
    for ax, (count, rows) in zip(axes, table.groupby("gpus", sort=False)):
        left = np.zeros(len(rows))
        for part, color, hatch in zip(PARTS, (COLORS[7], COLORS[9], COLORS[4], COLORS[1]), ("", "//", "..", "xx")):
            width = rows[part].to_numpy() / 1e9
            ax.barh(range(len(rows)), width, 0.66, left, color=color, hatch=hatch, edgecolor="white", label=part)
            left += width
        for y, (end, ratio) in enumerate(zip(left, rows["total over padding's"])):
            ax.text(end, y, f"  {end:.0f} GB, {ratio:.2f} ×", va="center", fontsize=10)
        ax.set_yticks(range(len(rows)), [figures.label(name) for name in rows["strategy"]])
        title = f"{count} GPU{'s share' if count > 1 else ' holds'} weights, gradients, moments"
        ax.set(title=title, xlabel="memory of a GPU (GB)", xlim=(0, left.max() * 1.35))
        ax.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(PARTS))
    figure.alt += f"; {figures.label(last['strategy'])} {last[PARTS[-1]] / 1e9:.0f} GB of activations"
    return figure


# Findings


def peaks_finding(table: pd.DataFrame) -> str:
    """How well `step_memory` says measured peaks, in a sentence. table: `peaks`, not empty."""
    return (
        f"Memory by hand: {len(table)} published peaks of {', '.join(sorted(table['model'].unique()))} between "
        f"{table['measured'].min() / 1e9:.1f} and {table['measured'].max() / 1e9:.1f} GB are within "
        f"{table['error'].abs().max():.1%} of weights, gradients, moments and activations."
    )


def shared_finding(table: pd.DataFrame) -> str:
    """What sharing does to the memory that the second strategy saves over the first. table: `shared_memory`."""
    first, second = table["strategy"].unique()[:2]
    ratio = table[table["strategy"] == second].set_index("gpus")["total over padding's"]
    return (
        f"{figures.label(second)} takes {ratio.iloc[0]:.2f} × the memory of {figures.label(first)} on {ratio.index[0]} "
        f"GPU and {ratio.iloc[-1]:.2f} × on {ratio.index[-1]}: what batching cannot change is divided, the activations "
        "are not."
    )
