"""Notebook 08: does a model learn the same on every rung? Some dozen steps of a pretrained one, against float32.

A rung may round elsewhere than the rung below it, and training carries that on from step to step. What a dtype may do
is seen on the lowest rung of each climb, which runs eager layers: it is measured once more in float32, and a rung is
as good as the lowest one where its losses stay as near to those of float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from packlib.lab import figures, tables
from packlib.lab.figures import Picture
from packlib.lab.runs.spec import RunSpec
from packlib.lab.strategies import get_strategy
from packlib.lab.studies import ladder
from packlib.lab.studies.ladder import Arm, Record, Rung

REFERENCE = Rung("float32", "the lowest rung in float32: what the others round", beside=True)
SLACK = 2.0  # times the lowest rung's own distance from float32


def arms(
    base: RunSpec, climbs: Iterable[str] = (), *, keep: str | float = "none", gpu: bool = True, **fields: Any
) -> list[Arm]:
    """The rungs of each climb that train on its examples, the lowest one in float32 first; nothing without climbs.

    base: sizes and steps; fields: those that differ, such as a pretrained model, its corpus, and the dtype of all
    rungs. keep: as in `ladder.arms`. Raises `ValueError` for an unknown climb, and where the dtype is float32 already.
    """
    climbs = list(climbs)
    base = replace(base, **fields)
    if not climbs:
        return []
    if base.dtype == "float32":
        raise ValueError("dtype = 'float32' leaves nothing to compare with float32; expected bfloat16 or bf16_mixed")
    found = []
    for climb in climbs:
        every = ladder.arms(base, climb, keep=keep, gpu=gpu)
        lowest = next(arm for arm in every if not arm.rung.beside)
        alike = [arm for arm in every if ladder.same_examples(arm.spec, lowest.spec)]
        rungs = [arm for arm in alike if not arm.spec.rig.float8]  # that one is meant to round more
        found += [Arm(climb, REFERENCE, replace(lowest.spec, dtype="float32")), *rungs]
    return found


def table(arms: Sequence[Arm], records: Sequence[Record | None]) -> pd.DataFrame:
    """A row an arm (`arms`) with a finished record, None where there is none.

    Columns `climb, rung, beside, status, steps`; `loss`: of the last step; `mean_difference, largest_difference`:
    absolute, in nats, of the losses of all steps from those of float32; `allowed`: the lowest rung's own mean
    difference times `SLACK`. Peers that pack by themselves train on other examples: their differences are NaN.
    """
    columns = ["climb", "rung", "beside", "status", "steps", "loss", "mean_difference", "largest_difference", "allowed"]
    rows = []
    traces = losses(arms, records)
    for arm, record in zip(arms, records):
        own, reference = traces.get((arm.climb, arm.rung.name)), traces.get((arm.climb, REFERENCE.name))
        row: dict[str, Any] = {"climb": arm.climb, "rung": arm.rung.name, "beside": arm.rung.beside}
        row |= {"status": record["status"] if record else ladder.NOT_MEASURED}
        row |= {"steps": 0 if own is None else len(own), "loss": math.nan if own is None else own[-1]}
        row |= dict.fromkeys(("mean_difference", "largest_difference", "allowed"), math.nan)
        if own is not None and reference is not None and arm.rung is not REFERENCE and not _other_examples(arm):
            apart = np.abs(own - reference)
            row |= {"mean_difference": apart.mean(), "largest_difference": apart.max()}
        rows.append(row)
    found = pd.DataFrame(rows, columns=columns)
    for _, of_climb in found.groupby("climb", sort=False):
        climbed = of_climb[~of_climb["beside"].astype(bool) & of_climb["mean_difference"].notna()]
        if len(climbed):
            found.loc[of_climb.index, "allowed"] = SLACK * climbed["mean_difference"].iloc[0]
    return found


def losses(arms: Sequence[Arm], records: Sequence[Record | None]) -> dict[tuple[str, str], np.ndarray]:
    """(climb, rung) -> loss of every step, float64 [steps], of finished runs."""
    return {
        (arm.climb, arm.rung.name): np.array(record["trace"]["loss"], dtype=float)
        for arm, record in zip(arms, records)
        if record and record["status"] == "ok"
    }


def _other_examples(arm: Arm) -> bool:
    return get_strategy(arm.spec.strategy).packed_by_trl


def display_table(table: pd.DataFrame) -> pd.DataFrame:
    """`table` for readers."""
    return pd.DataFrame(
        {
            "climb": table["climb"].where(~table["climb"].duplicated(), ""),
            "rung": [f"({row.rung})" if row.beside else row.rung for row in table.itertuples()],
            "last loss": tables.formatted(table["loss"], "{:.4f}"),
            "differs from float32 by (mean, nats)": tables.formatted(table["mean_difference"], "{:.1e}"),
            "at most": tables.formatted(table["largest_difference"], "{:.1e}"),
            "status": table["status"],
        }
    )


def figure(arms: Sequence[Arm], records: Sequence[Record | None]) -> Picture | None:
    """Losses of all rungs step by step, and their distance from float32; a column a climb. None without records."""
    numbers, traces = table(arms, records), losses(arms, records)
    climbs = [climb for climb in dict.fromkeys(numbers["climb"]) if (climb, REFERENCE.name) in traces]
    if not climbs:
        return None
    title = "; ".join(f"{climb}: {_verdict(numbers[numbers['climb'] == climb])}" for climb in climbs)
    drawing, axes = figures.new(5.2 * len(climbs) + 1.5, 5.6, title, len(climbs), rows=2)
    grid = np.array(axes).reshape(2, len(climbs))
    for (above, below), climb in zip(grid.T, climbs):
        reference = traces[climb, REFERENCE.name]
        steps = np.arange(1, len(reference) + 1)
        rungs = [arm for arm in arms if arm.climb == climb and not _other_examples(arm) and not arm.rung.beside]
        finished = [arm.rung.name for arm in rungs if (climb, arm.rung.name) in traces]
        above.plot(steps, reference, color="black", linewidth=3, label=REFERENCE.name)
        for i, name in enumerate(finished):
            look: Mapping[str, Any] = {"color": "0.2", "linestyle": ":"} if i == 0 else {"color": figures.COLORS[0]}
            above.plot(steps, traces[climb, name], linewidth=1, alpha=0.8, **look)
            label = f"{name} (lowest rung)" if i == 0 else "rungs above it" if i == 1 else None
            apart = np.abs(traces[climb, name] - reference)
            below.plot(steps, apart, linewidth=2 if i == 0 else 1, alpha=0.8, label=label, zorder=3 - (i > 0), **look)
        above.set(title=climb, ylabel="training loss (nats)")
        below.set(xlabel="step", ylabel="distance from float32 (nats)")
    handles = [*grid[0, 0].get_legend_handles_labels()[0], *grid[1, 0].get_legend_handles_labels()[0]]
    drawing.legend(handles=handles, loc="outside lower center", ncols=3)
    return figures.head(drawing, title)


def _verdict(numbers: pd.DataFrame) -> str:
    """What a climb's rows say, in half a sentence."""
    compared = numbers[~numbers["beside"].astype(bool) & numbers["mean_difference"].notna()]
    if len(compared) < 2:
        return "too few rungs finished to compare"
    lowest, above = compared.iloc[0], compared.iloc[1:]
    far = above[above["mean_difference"] > above["allowed"]]
    own = f"'{lowest['rung']}' is {lowest['mean_difference']:.1e} nats from float32 in the mean"
    if len(far):
        return f"{own}, farther off are {', '.join(far['rung'])} (at most {far['mean_difference'].max():.1e})"
    return f"{own}, the {len(above)} rungs above it at most {above['mean_difference'].max():.1e}"


def findings(numbers: pd.DataFrame) -> list[str]:
    """Sentences of notebook 08, every number from `table`."""
    return [
        f"Over {rows['steps'].max()} steps of {climb} in training: {_verdict(rows)}."
        for climb, rows in numbers.groupby("climb", sort=False)
        if rows["mean_difference"].notna().any()
    ]
