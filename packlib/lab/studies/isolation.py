"""Which model leaks on which attention in which situation: what notebook 04 shows, and the matrix behind it.

`python -m packlib matrix` writes `papermill_runs/isolation/transformers-<version>.json`, for anyone to run again with
their version of transformers; the heat map is drawn from it. Every cell is one `check_isolation` of a small model built
from its config. Each is judged in float64 too, where rounding is far below a leak: a verdict in float32 or bfloat16
that differs from it is a false alarm or a miss, and is counted.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from pandas.io.formats.style import Styler
from transformers import PreTrainedModel

from packlib.attention import flash_stand_in, isolate_mixers, mixer_waste, register_attention
from packlib.isolation import EquivalenceReport, IsolationReport, check_equivalence, check_isolation
from packlib.isolation.probe import packed_batch
from packlib.lab import figures, records
from packlib.lab.figures import Picture
from packlib.lab.small_models import small_model

logger = logging.getLogger(__name__)

MODELS = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
    *("gpt2", "gpt_neox", "gpt_neo", "gptj", "gpt_bigcode", "gpt_oss"),
    *("phi", "phi3", "granite", "olmo2", "starcoder2", "smollm3", "stablelm", "persimmon", "cohere", "cohere2"),
    *("llama4_text", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"),
    *("opt", "biogpt", "falcon", "bloom", "mpt"),
    *("mamba", "mamba2", "falcon_mamba", "rwkv", "jamba", "bamba", "falcon_h1", "recurrent_gemma", "granitemoehybrid"),
    *("lfm2", "qwen3_next", "qwen3_5_text", "olmo_hybrid", "nemotron_h", "kimi_linear", "minimax"),
    *("bert", "roberta", "electra", "modernbert"),
)
ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "packlib_varlen")
DTYPES = ("float64", "float32", "bfloat16")
LENGTHS = (13, 10, 7, 16)  # two rows of 23 tokens; longer than the windows (8) and convolutions (4) of the small models
VERDICTS = {
    "exact": "#0173b2",
    "rounding": "#56b4e9",
    "shifted": "#ece133",
    "leak": "#d55e00",
    "different": "#cc78bc",
    "refused": "#949494",
    "unsupported": "#f2f2f2",
}
NARROW = 9.0  # inches that the legend of the verdicts needs to stand on one line
WEIGHED = (4, 9, 60)  # tokens of the examples whose loss is averaged in two ways
Examples = Sequence[Sequence[int]]
Batch = dict[str, Any]


# Arms: the situations that a packed batch can be in


def _position_ids_alone(examples: Examples) -> Batch:
    flat = packed_batch(examples)
    return {name: flat[name] for name in ("input_ids", "position_ids", "use_cache")}


def _mask_of_ones(examples: Examples) -> Batch:
    batch = _position_ids_alone(examples)
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


def _mask_with_pads(examples: Examples) -> Batch:
    batch, pads = _mask_of_ones(examples), torch.zeros(1, 3, dtype=torch.int64)
    names = ("input_ids", "position_ids", "attention_mask")
    return batch | {name: torch.cat([batch[name], pads], 1) for name in names}


def _two_rows(examples: Examples) -> Batch:
    """Half of the examples in each row; the shorter row ends with an example of zeros, which nobody watches."""
    halves = [list(examples[: len(examples) // 2]), list(examples[len(examples) // 2 :])]
    tokens = [sum(map(len, half)) for half in halves]
    for half, count in zip(halves, tokens):
        if count < max(tokens):
            half.append([0] * (max(tokens) - count))
    first, second = map(_position_ids_alone, halves)
    return first | {name: torch.cat([first[name], second[name]]) for name in ("input_ids", "position_ids")}


def _cache_left_on(examples: Examples) -> Batch:
    return _position_ids_alone(examples) | {"use_cache": True}


def _boundaries_alone(examples: Examples) -> Batch:
    return {name: value for name, value in packed_batch(examples).items() if name not in ("position_ids", "seq_idx")}


SITUATIONS = {
    "FlatteningCollator": packed_batch,
    "position ids alone": _position_ids_alone,
    "+ all-ones mask": _mask_of_ones,
    "+ mask with pads": _mask_with_pads,
    "two packed rows": _two_rows,
    "cache left on": _cache_left_on,
    "cu_seqlens, no position ids": _boundaries_alone,
    "+ isolate_mixers": packed_batch,  # FlatteningCollator's batch for the model that `isolate_mixers` makes of it
}
ISOLATED = "+ isolate_mixers"


# Tables


class _Refused(ValueError):
    """`isolate_mixers` says that it cannot."""


def _isolate(model: PreTrainedModel) -> None:
    try:
        isolate_mixers(model)
    except ValueError as error:
        raise _Refused(str(error)) from error


def check_cell(
    model: str, attention: str, situation: str, dtype: str, lengths: Sequence[int] = LENGTHS
) -> dict[str, Any]:
    """One cell: verdict and what it rests on. lengths: tokens in each of the packed examples.

    `unsupported` where transformers does not build or run the model with that attention.
    """
    cell: dict[str, Any] = {"model": model, "attention": attention, "situation": situation, "dtype": dtype}
    started = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiling for each shape would take minutes
        if attention == "flash_attention_2":
            stack.enter_context(flash_stand_in())
        try:
            built = small_model(model, attention, getattr(torch, dtype))
            if situation == ISOLATED:
                _isolate(built)
            report = check_isolation(built, batch_builder=SITUATIONS[situation], lengths=lengths)
        except _Refused as refusal:
            cell |= {"verdict": "refused", "reason": str(refusal)}
        except Exception as error:  # whatever a model raises that does not know this attention
            cell |= {"verdict": "unsupported", "reason": f"{type(error).__name__}: {error}"[:300]}
        else:
            others = [x for i, row in enumerate(report.influence) for j, x in enumerate(row) if i != j]
            cell |= {"verdict": report.verdict, "reason": report.reason, "influence": max(others, default=None)}
            cell |= {name: getattr(report, name) for name in ("error", "noise", "scale", "starts_at", "culprit")}
    cell["seconds"] = round(time.perf_counter() - started, 3)
    return {name: None if _is_infinite(value) else value for name, value in cell.items()}


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says about kernels that are not installed."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def run_matrix(
    models: Iterable[str] = MODELS,
    attentions: Sequence[str] = ATTENTIONS,
    situations: Sequence[str] = tuple(SITUATIONS),
    dtypes: Sequence[str] = DTYPES,
    lengths: Sequence[int] = LENGTHS,
) -> dict[str, Any]:
    """Every combination, as a record: `environment`, `cells` (`check_cell`) and their `disagreements` with float64.

    About 0.15 s a cell on one core, 0.8 s for FlexAttention and where mixers are isolated.
    """
    register_attention()
    cells: list[dict[str, Any]] = []
    for model in models:
        with _quiet():
            own = [check_cell(model, a, s, d, lengths) for a in attentions for s in situations for d in dtypes]
        leaks, seconds = sum(cell["verdict"] == "leak" for cell in own), sum(cell["seconds"] for cell in own)
        logger.info("%s: %d of %d cells leak, %.1f s", model, leaks, len(own), seconds)
        cells += own
    found = {"cells": cells, "disagreements": disagreements(cells)}
    return {"environment": records.environment(), "lengths": list(lengths)} | found


def disagreements(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Cells that leak while the same cell in float64 does not, or the other way round: false alarms and misses."""
    keys = ("model", "attention", "situation", "dtype")
    leaks = {tuple(cell[key] for key in keys): cell["verdict"] == "leak" for cell in cells}
    found = []
    for (*place, dtype), leak in leaks.items():
        if leak != leaks.get((*place, "float64"), leak):
            kind = "false alarm" if leak else "miss"
            found.append(dict(zip(keys, (*place, dtype))) | {"kind": kind})
    return found


def look(
    models: Sequence[str],
    attentions: Sequence[str],
    situations: Sequence[str],
    dtype: str = "float32",
    lengths: Sequence[int] = LENGTHS,
) -> pd.DataFrame:
    """A few cells as a table, for a page: one row each, with what an edit moves in another example and where."""
    cells = run_matrix(models, attentions, situations, [dtype], lengths)["cells"]
    columns = ["model", "attention", "situation", "verdict", "influence", "starts_at", "reason"]
    return pd.DataFrame(cells).reindex(columns=columns).astype({"influence": float})


def styled(frame: pd.DataFrame) -> Styler:
    """`look`'s table with its verdicts in the colours of the heat map, without columns that say nothing.

    Of a reason it has what comes before the first semicolon: what was wrong; after it comes what to do.
    """
    names = {"influence": "an edit moves others by", "starts_at": "starts at", "reason": "why"}
    told = frame.assign(reason=frame["reason"].str.split(";").str[0]).dropna(axis="columns", how="all")
    shown = told.rename(columns=names).style.hide().map(_verdict_css, subset=["verdict"])
    left = [name for name in ("starts at", "why") if name in shown.columns]
    return shown.set_properties(subset=left, **{"text-align": "left"}).format(na_rep="", precision=2)


def _verdict_css(verdict: str) -> str:
    return f"background-color: {VERDICTS[verdict]}; color: {'white' if verdict == 'exact' else 'black'}"


def matrix_folder() -> Path:
    """Where the published matrices lie."""
    return records.runs_folder() / "isolation"


def published(folder: Path | None = None) -> dict[str, Any]:
    """The newest record of the whole matrix, by default of the published ones; `FileNotFoundError` without one."""
    found = [records.read_json(path) for path in (folder or matrix_folder()).glob("transformers-*.json")]
    if not found:
        raise FileNotFoundError("no published matrix; make one with: python -m packlib matrix")
    return max(found, key=lambda record: record["environment"]["created"])


def judged(record: Mapping[str, Any], dtype: str) -> pd.DataFrame:
    """The cells of a matrix in one dtype, one row each."""
    cells = pd.DataFrame(record["cells"])
    return cells[cells["dtype"] == dtype]


def weighed_examples(seed: int = 0) -> list[dict[str, list[int]]]:
    """Three examples of very different lengths, random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(4, 250, (n,), generator=generator).tolist()} for n in WEIGHED]


def repaired(model_type: str, dtype: str, lengths: Sequence[int], seed: int = 0) -> tuple[list[IsolationReport], str]:
    """`check_isolation` of a small model on sdpa before and after `isolate_mixers`, and a line on what that did."""
    with _quiet():
        model = small_model(model_type, "sdpa", getattr(torch, dtype))
        before = check_isolation(model, lengths=lengths, seed=seed)
        wrapped = isolate_mixers(model)
        after = check_isolation(model, lengths=lengths, seed=seed)
        after = replace(after, attention=f"{after.attention} + isolate_mixers")  # as figures call it
    names, slots = ", ".join(f"{name} ({kind})" for name, kind in wrapped.items()), mixer_waste(lengths)
    return [before, after], f"on one line a segment: {names or 'nothing'}; {slots:.2f} slots a token inside"


def equivalence(model_type: str, examples: Sequence[Mapping[str, list[int]]]) -> pd.DataFrame:
    """`check_equivalence` of a small model on sdpa: packed against one at a time, a row a weighting of the loss."""
    reports: list[EquivalenceReport] = check_equivalence(small_model(model_type), examples, kernel="sdpa")
    return pd.DataFrame(reports)


def loss_gradients(model: PreTrainedModel, batch: Batch, lengths: Sequence[int]) -> np.ndarray:
    """How much each example's loss depends on each example's embeddings: float [examples, examples].

    Entry [i, j] is the norm of the gradient of example i's summed loss with respect to the embedded tokens of j.
    batch: flat and labelled, of examples of these lengths, in their order. The model is on the attention it has.
    """
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    inputs = {name: value for name, value in batch.items() if name not in ("input_ids", "labels")}
    logits = model(inputs_embeds=embedded, **inputs | {"use_cache": False}).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:], reduction="none")  # ignores -100
    found = []
    for loss in losses.split([lengths[0] - 1, *lengths[1:]]):  # the label that a token predicts is the next one's
        (gradient,) = torch.autograd.grad(loss.sum(), embedded, retain_graph=True)
        found.append([float(part.norm()) for part in gradient[0].split(list(lengths))])
    return np.array(found)


def weightings(model_type: str, examples: Sequence[Mapping[str, list[int]]]) -> pd.DataFrame:
    """Each example's loss, and how much a token of it weighs in either average of the loss."""
    rows = []
    tokens = [len(example["input_ids"]) - 1 for example in examples]
    for i, example in enumerate(examples):
        (report, *_) = check_equivalence(small_model(model_type), [example], kernel="sdpa")
        row = {"example": chr(65 + i), "loss tokens": tokens[i], "loss": report.loss_alone}
        weights = {"weight per token": tokens[i] / sum(tokens), "weight per example": 1 / len(examples)}
        rows.append(row | weights)
    return pd.DataFrame(rows)


# Figures


def influence_pictures(reports: Sequence[IsolationReport]) -> Picture:
    """One square per report: how far editing the example of a column moves the logits of the example of a row."""
    named = {f"{report.model}, {report.attention}: {report.verdict}": np.array(report.influence) for report in reports}
    return _squares(named, "example that is edited", "example that is watched")


def gradient_pictures(named: Mapping[str, np.ndarray]) -> Picture:
    """`loss_gradients` of several batches, a square each: the loss of a row's example, the embeddings of a column's."""
    others = {name: grid[~np.eye(len(grid), dtype=bool)].max() for name, grid in named.items()}
    titled = {f"{name}: up to {others[name]:.2g} in another example": grid for name, grid in named.items()}
    return _squares(titled, "gradient in the embeddings of example …", "of the loss of example …")


def _squares(named: Mapping[str, np.ndarray], xlabel: str, ylabel: str) -> Picture:
    """A number for every pair of examples, [examples, examples]; off the diagonal what is not 0 is a leak."""
    figure, axes = figures.new(4.6 * len(named), 4.4, "; ".join(named), len(named))
    for ax, (title, grid) in zip(axes, named.items()):
        names = [chr(65 + i) for i in range(len(grid))]
        ax.imshow(grid > 0, cmap=ListedColormap(["white", VERDICTS["leak"]]), vmin=0, vmax=1)
        ax.imshow(np.where(np.eye(len(grid), dtype=bool), 1, np.nan), cmap=ListedColormap([VERDICTS["exact"]]))
        for (i, j), value in np.ndenumerate(grid):
            color = "white" if i == j or value > 0 else "black"
            ax.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=11, color=color)
        ax.set_xticks(range(len(names)), names)
        ax.set_yticks(range(len(names)), names)
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        ax.grid(visible=False)
    return figure


def heat_map(record: Mapping[str, Any], dtype: str = "float32") -> Picture:
    """Model types down, attention and situation across, one colour per verdict; leaks carry a cross as well."""
    cells, version = judged(record, dtype), record["environment"]["transformers"]
    models, attentions, situations = (list(cells[key].unique()) for key in ("model", "attention", "situation"))
    verdicts = cells.set_index(["model", "attention", "situation"])["verdict"].map(list(VERDICTS).index)
    wide = verdicts.unstack(["attention", "situation"]).reindex(models)
    grid = wide.reindex(columns=pd.MultiIndex.from_product([attentions, situations])).to_numpy(float)
    leaks = grid == list(VERDICTS).index("leak")
    by_attention = cells[cells["verdict"] == "leak"].groupby("attention").size()
    told = ", ".join(f"{attention} {by_attention.get(attention, 0)}" for attention in attentions)
    alt = f"Heat map of isolation verdicts for {len(models)} model types with transformers {version}. "
    width = 1.8 + 0.36 * grid.shape[1]
    small = width < NARROW  # the legend of a few columns of cells has rows of its own
    size = (max(width, 6.5), 4.4 + 0.24 * len(models)) if small else (width, 3.6 + 0.24 * len(models))
    figure, (ax,) = figures.new(*size, f"{alt}Leaking cells: {told}.")
    ax.imshow(grid, cmap=ListedColormap(list(VERDICTS.values())), vmin=-0.5, vmax=len(VERDICTS) - 0.5, aspect="auto")
    down, across = np.nonzero(leaks)
    ax.scatter(across, down, marker="x", s=22, color="black", linewidths=1.1)
    ax.set_xticks(range(grid.shape[1]), situations * len(attentions), rotation=90, fontsize=10)
    ax.set_yticks(range(len(models)), models, fontsize=10)
    ax.set_xticks(np.arange(-0.5, grid.shape[1]), minor=True)
    ax.set_yticks(np.arange(-0.5, len(models)), minor=True)
    ax.grid(visible=False, which="major")
    ax.grid(which="minor", color="white", linewidth=1)
    ax.tick_params(which="both", length=0)
    for k, attention in enumerate(attentions):
        middle = (k + 0.5) * len(situations) - 0.5
        above: dict[str, Any] = {"xycoords": ax.get_xaxis_transform(), "xytext": (0, 5), "textcoords": "offset points"}
        ax.annotate(attention, (middle, 1), **above, ha="center", fontsize=11, weight="bold")
        ax.axvline(k * len(situations) - 0.5, color="black", linewidth=2)
    found = f"packed examples see each other in {int(leaks.sum())} of {len(cells)} cells"
    handles = [
        Patch(facecolor=color, edgecolor="grey", label="leak (×)" if name == "leak" else name)
        for name, color in VERDICTS.items()
    ]
    columns = 2 if small else len(handles)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=10, frameon=False)
    return figures.head(figure, f"transformers {version}, {dtype}: {found}")


def publish(models: Sequence[str] = MODELS, folder: Path | None = None) -> str:
    """Run the matrix, write its record and figure; returns a line about it."""
    figures.theme()
    record = run_matrix(models)
    path = (folder or matrix_folder()) / f"transformers-{transformers.__version__}.json"
    records.write_json(path, record)
    path.with_suffix(".png").write_bytes(figures.png(heat_map(record)))
    return f"{len(record['cells'])} cells, {len(record['disagreements'])} disagree with float64: {path}"


# Findings


def findings(record: Mapping[str, Any], dtype: str, equal: pd.DataFrame) -> list[str]:
    """Sentences of notebook 04, every number computed.

    record: of a matrix, spoken of in one dtype. equal: `equivalence`.
    """
    cells = judged(record, dtype)
    ran = cells[~cells["verdict"].isin(["unsupported", "refused"])]
    leaks = ran[ran["verdict"] == "leak"]
    ours = cells[(cells["attention"] == "packlib_varlen") & (cells["situation"] == "FlatteningCollator")]
    where, leaking = "combinations of model, attention and situation that run", ours[ours["verdict"] == "leak"]
    own = [
        f"packlib_varlen with FlatteningCollator's batch: {sum(leaking['culprit'] == 'attention')} leaks in attention, "
        f"{len(leaking)} in all; {sum(ours['verdict'] == 'refused')} model types refused."
    ]
    return [
        f"transformers {record['environment']['transformers']}: {len(leaks)} of {len(ran)} {where} leak.",
        f"{len(record['disagreements'])} of {len(record['cells'])} verdicts disagree with float64: "
        f"false alarms and misses.",
        *(own if len(ours) else []),
        *_mended(cells),
        f"Packed against one at a time, the largest relative error of any parameter's gradient is "
        f"{equal['gradient_error'].max():.1e}.",
    ]


def _mended(cells: pd.DataFrame) -> list[str]:
    """What `isolate_mixers` makes of the cells that are not right without it; nothing if it was not tried."""
    wide = cells.pivot(index=["model", "attention"], columns="situation", values="verdict")
    if not {"FlatteningCollator", ISOLATED} <= set(wide):
        return []
    tried = wide[wide["FlatteningCollator"].isin(["leak", "shifted", "refused"])]
    if tried.empty:
        return []
    apart = tried[ISOLATED].isin(["exact", "rounding"]).sum()
    where = "combinations of model and attention that leak, shift or refuse with that batch"
    return [f"isolate_mixers keeps examples apart in {apart} of the {len(tried)} {where}."]
