"""Which model leaks on which attention in which situation: a matrix that anyone can run again with their version of transformers.

`python -m packlib matrix` writes `papermill_runs/isolation/transformers-<version>.json`; the heat map is drawn from it.
Every cell is one `check_isolation` of a small model built from its config. Each is judged in float64 too, where rounding is nine orders
of magnitude below a leak: a verdict in float32 or bfloat16 that differs from it is a false alarm or a miss, and is counted.
"""

import json
import logging
import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from packlib.attention import flash_stand_in, register_attention
from packlib.isolation import IsolationReport, check_isolation
from packlib.lab import figures
from packlib.lab.records import environment, project_root, write_json
from packlib.isolation.probe import packed_batch
from packlib.lab.small_models import small_model

logger = logging.getLogger(__name__)

MODELS = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_neo", "gptj", "gpt_bigcode", "gpt_oss",
    "phi", "phi3", "granite", "olmo2", "starcoder2", "smollm3", "stablelm", "persimmon", "cohere", "cohere2", "llama4_text", "mixtral",
    "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "opt", "biogpt", "falcon", "bloom", "mpt", "mamba", "mamba2", "falcon_mamba",
    "rwkv", "jamba", "bamba", "falcon_h1", "recurrent_gemma", "granitemoehybrid", "lfm2", "qwen3_next", "olmo_hybrid", "minimax",
    "bert", "roberta", "electra", "modernbert",
)  # fmt: skip
ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "packlib_varlen")
DTYPES = ("float64", "float32", "bfloat16")
LENGTHS = (13, 10, 7, 16)  # two rows of 23 tokens; longer than the windows (8) and convolutions (4) of the small models
VERDICTS = {
    "exact": "#0173b2",
    "rounding": "#56b4e9",
    "shifted": "#ece133",
    "leak": "#d55e00",
    "refused": "#949494",
    "unsupported": "#f2f2f2",
}


def _rows(examples: Sequence[Sequence[int]]) -> dict[str, Any]:
    flat = packed_batch(examples)
    return {name: flat[name] for name in ("input_ids", "position_ids", "use_cache")}


def _padded(examples: Sequence[Sequence[int]]) -> dict[str, Any]:
    batch, tail = _rows(examples), torch.zeros(1, 3, dtype=torch.int64)
    mask = torch.ones_like(batch["input_ids"])
    pads = {"input_ids": tail, "position_ids": tail, "attention_mask": tail}
    return batch | {name: torch.cat([(batch | {"attention_mask": mask})[name], pad], 1) for name, pad in pads.items()}


def _two_rows(examples: Sequence[Sequence[int]]) -> dict[str, Any]:
    first, second = _rows(examples[:2]), _rows(examples[2:])
    return first | {name: torch.cat([first[name], second[name]]) for name in ("input_ids", "position_ids")}


def _without(batch: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in names}


SITUATIONS = {
    "FlatteningCollator": packed_batch,
    "position ids alone": _rows,
    "+ all-ones mask": lambda examples: (
        (batch := _rows(examples)) | {"attention_mask": torch.ones_like(batch["input_ids"])}
    ),
    "+ mask with pads": _padded,
    "two packed rows": _two_rows,
    "cache left on": lambda examples: _without(_rows(examples), "use_cache") | {"use_cache": True},
    "cu_seqlens, no position ids": lambda examples: _without(packed_batch(examples), "position_ids", "seq_idx"),
}


def check_cell(model: str, attention: str, situation: str, dtype: str) -> dict[str, Any]:
    """One cell: verdict and what it rests on. `unsupported` where transformers does not build or run the model with that attention."""
    cell: dict[str, Any] = {"model": model, "attention": attention, "situation": situation, "dtype": dtype}
    started = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.enter_context(
            torch.compiler.set_stance("force_eager")
        )  # compiling FlexAttention for each shape would take minutes
        if attention == "flash_attention_2":
            stack.enter_context(flash_stand_in())
        try:
            built = small_model(model, attention, getattr(torch, dtype))
            report = check_isolation(built, batch_builder=SITUATIONS[situation], lengths=LENGTHS)
        except Exception as error:  # whatever a model raises that does not know this attention
            cell |= {"verdict": "unsupported", "reason": f"{type(error).__name__}: {error}"[:300]}
        else:
            off = [x for i, row in enumerate(report.influence) for j, x in enumerate(row) if i != j]
            cell |= {"verdict": report.verdict, "reason": report.reason, "influence": max(off, default=None)}
            cell |= {name: getattr(report, name) for name in ("error", "noise", "scale", "starts_at", "culprit")}
    cell["seconds"] = round(time.perf_counter() - started, 3)
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in cell.items()
    }


def run_matrix(
    models: Iterable[str] = MODELS,
    attentions: Sequence[str] = ATTENTIONS,
    situations: Sequence[str] = tuple(SITUATIONS),
    dtypes: Sequence[str] = DTYPES,
) -> dict[str, Any]:
    """Every combination, as a record: `environment`, `cells` (a list of `check_cell`) and their `disagreements` with float64.

    About 0.15 s a cell on one core, 0.8 s for FlexAttention.
    """
    register_attention()
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    cells: list[dict[str, Any]] = []
    for model in models:
        cells += [check_cell(model, a, s, d) for a in attentions for s in situations for d in dtypes]
        own = [cell for cell in cells if cell["model"] == model]
        leaks = sum(cell["verdict"] == "leak" for cell in own)
        logger.info("%s: %d of %d cells leak, %.1f s", model, leaks, len(own), sum(cell["seconds"] for cell in own))
    transformers.logging.set_verbosity(verbosity)
    return {"environment": environment(), "lengths": LENGTHS, "cells": cells, "disagreements": disagreements(cells)}


def disagreements(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Cells that leak while the same cell in float64 does not, or the other way round: false alarms and misses."""
    leaks = {
        tuple(c[key] for key in ("model", "attention", "situation", "dtype")): c["verdict"] == "leak" for c in cells
    }
    return [
        {"model": m, "attention": a, "situation": s, "dtype": d, "kind": "false alarm" if leak else "miss"}
        for (m, a, s, d), leak in leaks.items()
        if leak != leaks.get((m, a, s, "float64"), leak)
    ]


def look(
    models: Sequence[str], attentions: Sequence[str], situations: Sequence[str], dtype: str = "float32"
) -> pd.DataFrame:
    """A few cells as a table, for a page: one row each, with what an edit moves in another example and where that starts."""
    cells = run_matrix(models, attentions, situations, [dtype])["cells"]
    frame = pd.DataFrame(cells).reindex(
        columns=["model", "attention", "situation", "verdict", "influence", "starts_at", "reason"]
    )
    return frame.astype({"influence": float})


def styled(frame: pd.DataFrame) -> Any:
    """`look`'s table with its verdicts in the colours of the heat map."""
    style = (
        frame.drop(columns="reason")
        .rename(columns={"influence": "an edit moves others by", "starts_at": "starts at"})
        .style.hide()
    )
    style = style.map(
        lambda v: f"background-color: {VERDICTS[v]}; color: {'white' if v in ('exact', 'leak') else 'black'}",
        subset=["verdict"],
    )
    return style.format(na_rep="", precision=2)


def published(folder: Path | None = None) -> dict[str, Any]:
    """The newest record of the whole matrix under `papermill_runs/isolation`. Raises FileNotFoundError where there is none."""
    folder = folder or project_root() / "papermill_runs" / "isolation"
    found = [json.loads(path.read_text()) for path in folder.glob("transformers-*.json")]
    if not found:
        raise FileNotFoundError("no published matrix; make one with: python -m packlib matrix")
    return max(found, key=lambda record: record["environment"]["created"])


def influence_pictures(reports: Sequence[IsolationReport], titles: Sequence[str]) -> Figure:
    """One square per report: how far editing the example of a column moves the logits of the example of a row."""
    alt = "; ".join(f"{t}: {r.verdict}" for t, r in zip(titles, reports))
    figure, axes = figures.new(4.6 * len(reports), 4.4, alt, len(reports))
    for ax, report, title in zip(axes, reports, titles):
        grid, names = np.array(report.influence), [chr(65 + i) for i in range(len(report.lengths))]
        ax.imshow(grid > 0, cmap=ListedColormap(["white", VERDICTS["leak"]]), vmin=0, vmax=1)
        ax.imshow(np.where(np.eye(len(grid), dtype=bool), 1, np.nan), cmap=ListedColormap([VERDICTS["exact"]]))
        for (i, j), value in np.ndenumerate(grid):
            ax.text(
                j,
                i,
                f"{value:.2g}",
                ha="center",
                va="center",
                fontsize=11,
                color="white" if i == j or value > 0 else "black",
            )
        ax.set_xticks(range(len(names)), names)
        ax.set_yticks(range(len(names)), names)
        ax.set(title=title, xlabel="example that is edited", ylabel="example that is watched")
        ax.grid(visible=False)
    return figure


def heat_map(record: Mapping[str, Any], dtype: str = "float32") -> Figure:
    """Model types down, attention and situation across, one colour per verdict; leaks carry a cross as well."""
    cells = [c for c in record["cells"] if c["dtype"] == dtype]
    models, attentions, situations = (
        list(dict.fromkeys(c[key] for c in cells)) for key in ("model", "attention", "situation")
    )
    grid = np.full((len(models), len(attentions) * len(situations)), np.nan)
    for c in cells:
        column = attentions.index(c["attention"]) * len(situations) + situations.index(c["situation"])
        grid[models.index(c["model"]), column] = list(VERDICTS).index(c["verdict"])
    figure, (axes,) = figures.new(1.8 + 0.36 * grid.shape[1], 3.6 + 0.24 * len(models), "", layout="constrained")
    axes.imshow(grid, cmap=ListedColormap(list(VERDICTS.values())), vmin=-0.5, vmax=len(VERDICTS) - 0.5, aspect="auto")
    leaks = list(VERDICTS).index("leak")
    axes.scatter(*np.argwhere(grid == leaks).T[::-1], marker="x", s=22, color="black", linewidths=1.1)
    axes.set_xticks(range(grid.shape[1]), situations * len(attentions), rotation=90, fontsize=10)
    axes.set_yticks(range(len(models)), models, fontsize=10)
    axes.set_xticks(np.arange(-0.5, grid.shape[1]), minor=True)
    axes.set_yticks(np.arange(-0.5, len(models)), minor=True)
    axes.grid(visible=False, which="major")
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    for k, attention in enumerate(attentions):
        axes.text(
            (k + 0.5) * len(situations) - 0.5, -0.8, attention, ha="center", va="bottom", fontsize=11, weight="bold"
        )
        axes.axvline(k * len(situations) - 0.5, color="black", linewidth=2)
    shares = ", ".join(f"{a} {sum(c['verdict'] == 'leak' for c in cells if c['attention'] == a)}" for a in attentions)
    version = record["environment"]["transformers"]
    axes.set_title(
        f"transformers {version}, {dtype}: packed examples see each other in {int((grid == leaks).sum())} of {len(cells)} cells",
        pad=26,
    )
    handles = [
        Patch(facecolor=color, edgecolor="grey", label=name + (" (×)" if name == "leak" else ""))
        for name, color in VERDICTS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=10, frameon=False)
    figure.alt = f"Heat map of isolation verdicts for {len(models)} model types with transformers {version}. Leaking cells: {shares}."
    return figure


def publish(models: Sequence[str] = MODELS, folder: Path | None = None) -> str:
    """Run the matrix, write its record and figure; returns a line about it."""
    folder = folder or project_root() / "papermill_runs" / "isolation"
    figures.theme()
    record = run_matrix(models)
    name = f"transformers-{transformers.__version__}"
    write_json(folder / f"{name}.json", record)
    heat_map(record).savefig(folder / f"{name}.png", dpi=figures.DPI)
    return f"{len(record['cells'])} cells, {len(record['disagreements'])} disagree with float64: {folder / name}.json"
