"""Will packing pay on this data? Every strategy plans the lengths; time and memory are predicted from the plans.

`costs.py` has the model behind the prediction. The recommendation is one sentence, also when it is "do not pack".
"""

from __future__ import annotations

import gzip
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from packlib.lab import doubts
from packlib.lab.costs import Calibration, calibrate, comparable
from packlib.lab.data.corpora import EVAL_SHARE, located
from packlib.lab.strategies import STRATEGIES, Strategy, plan_for
from packlib.plans import CostModel, Plan, PlanReport

CAPACITIES = 2 ** np.arange(7, 18)
WORTH = 1.05  # a speed-up below this is not worth a change
WIDTH = 100  # columns of the text, of which tables have a few more
MANY = 100_000  # the dynamic programme of dynapipe takes minutes above this


@dataclass(frozen=True)
class Prediction:
    """One strategy on one epoch.

    speed_up: real tokens/s over padding's. *_error: relative, None where nothing was measured.
    """

    strategy: str
    label: str
    rows: int
    optimizer_steps: int
    examples_per_step: float
    waste: float
    capacity_fill: float | None
    broken_examples: int
    speed_up: float
    speed_up_error: float | None
    peak_memory_bytes: float
    peak_memory_error: float | None


@dataclass(frozen=True)
class Advice:
    """What `advise` found; `str()` is the text for a terminal, `asdict` the JSON."""

    data: dict[str, Any]
    lost_by_capacity: dict[int, float]
    strategies: list[Prediction]
    notes: list[str]
    recommendation: str

    def __str__(self) -> str:
        d = self.data
        quantiles = f"mean {d['mean']:.0f}, p50 {d['p50']:.0f}, p99 {d['p99']:.0f}, longest {d['longest']:,}"
        head = f"{d['examples']:,} examples, {d['tokens']:,} tokens; {quantiles}"
        lost = "   ".join(f"{capacity:,}:\u00a0{share:.1%}" for capacity, share in self.lost_by_capacity.items())
        lost = textwrap.fill(f"tokens lost by truncating at   {lost}", WIDTH, subsequent_indent=" " * 31)
        lines = [head, "", *text_histogram(d["histogram"]), "", lost.replace("\u00a0", " "), ""]
        numbers = f"{'rows':>9}{'steps':>8}{'ex./step':>9}{'waste':>7}{'fill':>7}{'cut':>7}"
        lines.append(f"{'strategy':34}{numbers}{'speed-up':>15}{'peak GB':>14}")
        for p in self.strategies:
            fill = "" if p.capacity_fill is None else f"{p.capacity_fill:.3f}"
            numbers = f"{p.rows:9,}{p.optimizer_steps:8,}{p.examples_per_step:9.1f}{p.waste:7.2f}"
            numbers += f"{fill:>7}{p.broken_examples:7,}"
            speed = _plus_minus(p.speed_up, p.speed_up_error)
            peak = _plus_minus(p.peak_memory_bytes / 1e9, p.peak_memory_error)
            lines.append(f"{p.label:34}{numbers}{speed:>15}{peak:>14}")
        notes = [textwrap.fill(f"- {note}", WIDTH, subsequent_indent="  ") for note in self.notes]
        return "\n".join([*lines, "", *notes, "", textwrap.fill(self.recommendation, WIDTH)])


def read_note(name: str, read: int, limit: int | None = None) -> str:
    """Why advice on a corpus reads fewer examples than its file has; empty where it reads all.

    name: of the corpus, as for `load_corpus`. read: examples that it gave. limit: what it was asked for.
    """
    if name.endswith(".npz") or "{split}" in name:
        return f"{read:,} examples read: a random subset, as asked" if limit == read else ""
    path = Path(located(name))
    count = f"{read:,} examples read"
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            total = sum(bool(line.strip()) for line in lines)
        if total == read:
            return ""
        count = f"{read:,} of the file's {total:,} examples read"
    why = f"one in {EVAL_SHARE}, chosen by its own hash, is held out for evaluation"
    return f"{count}: {f'a random subset, as asked, and {why}' if limit == read else why}"


def advise(
    lengths: Sequence[int] | np.ndarray,
    *,
    batch_size: int = 4,
    max_tokens: int = 4096,
    gradient_accumulation: int = 1,
    world_size: int = 1,
    model: str | None = None,
    runs: Sequence[Mapping[str, Any]] = (),
    seed: int = 0,
) -> Advice:
    """Advice for examples of these lengths (tokens, integers [examples]); what exceeds `max_tokens` is truncated.

    batch_size: examples per mini-batch, or rows of max_tokens, as in `RunSpec`. model: a name that `build_model` takes;
    default: that of the records, else mistral-7b. runs: records (`records.read_records`) to calibrate on. Raises
    `ValueError` as the planners do.
    """
    full = np.asarray(lengths)
    kept = np.minimum(full, max_tokens) if full.dtype.kind in "iu" else full
    chosen = comparable(runs, model)
    model = model or (chosen[0]["spec"]["model"] if chosen else "mistral-7b")
    time, memory = calibrate(chosen, model)
    rated: list[tuple[Strategy, _Epoch]] = []
    for strategy in STRATEGIES.values():
        if strategy.trl is None and not (strategy.name == "dynapipe" and len(full) > MANY):
            plan = plan_for(strategy, kept, batch_size=batch_size, max_tokens=max_tokens, seed=seed)
            if world_size > 1:
                plan = plan.balance(world_size)
            per_batch = strategy.rows_per_batch(batch_size)
            rated.append((strategy, _epoch(plan, strategy, kept, per_batch, world_size, time.cost)))
    padding = rated[0][1]
    found = []
    for strategy, epoch in rated:
        report, steps = epoch.report, -(-epoch.micro_batches // gradient_accumulation)
        prediction = Prediction(
            strategy=strategy.name,
            label=strategy.label,
            rows=report.rows,
            optimizer_steps=steps,
            examples_per_step=report.examples / steps,
            waste=report.waste,
            capacity_fill=report.capacity_fill,
            broken_examples=report.broken_examples,
            speed_up=epoch.tokens_per_cost / padding.tokens_per_cost,
            speed_up_error=0.0 if epoch is padding else time.error,
            peak_memory_bytes=float(memory.cost(epoch.largest_batch, pairs=0.0)),
            peak_memory_error=memory.error,
        )
        found.append(prediction)
    notes = _notes(found, full, max_tokens, model, chosen, time, world_size)
    if time.error is not None and (off := doubts.of_records(runs, (run["run_id"] for run in chosen))):
        notes.append(f"Their run is in doubt ({off}): small differences between strategies may not be packing's.")
    return Advice(describe(full), lost_by_capacity(full), found, notes, _recommend(found))


def describe(lengths: np.ndarray) -> dict[str, Any]:
    """Counts, quantiles in tokens, and a histogram over 14 equal steps of log length.

    A bin of the histogram is (upper end in tokens, examples, share of all tokens).
    """
    edges = np.unique(np.geomspace(lengths.min(), lengths.max() + 1, 15).round().astype(int))
    examples, _ = np.histogram(lengths, edges)
    tokens, _ = np.histogram(lengths, edges, weights=lengths / lengths.sum())
    p50, p90, p99 = np.percentile(lengths, (50, 90, 99))
    facts = {
        "examples": len(lengths),
        "tokens": int(lengths.sum()),
        "mean": float(lengths.mean()),
        "p50": p50,
        "p90": p90,
        "p99": p99,
    }
    return facts | {
        "longest": int(lengths.max()),
        "histogram": list(zip((edges[1:] - 1).tolist(), examples.tolist(), tokens.tolist())),
    }


def text_histogram(histogram: Sequence[tuple[int, int, float]], width: int = 50) -> list[str]:
    """One line a bin: `≤ 128 tokens ██████ 1,234 examples, 12 % of the tokens`."""
    most = max(examples for _, examples, _ in histogram)
    return [
        f"≤{top:>7,} tokens {'█' * round(width * n / most):{width}} {n:>9,} examples {share:>6.1%} of the tokens"
        for top, n, share in histogram
    ]


def lost_by_capacity(lengths: np.ndarray) -> dict[int, float]:
    """Share of the tokens that truncation would lose, for powers of two up to the first that loses nothing."""
    shares = {int(c): float(np.maximum(lengths - c, 0).sum() / lengths.sum()) for c in CAPACITIES}
    first = next((c for c, share in shares.items() if share == 0), max(shares))
    return {c: share for c, share in shares.items() if c <= first and (share < 0.9 or c == first)}


@dataclass(frozen=True)
class _Epoch:
    """One strategy's epoch: its plan's report, tokens per unit of cost, micro-batches a rank, slots of the largest."""

    report: PlanReport
    tokens_per_cost: float
    micro_batches: int
    largest_batch: int


def _epoch(
    plan: Plan, strategy: Strategy, lengths: np.ndarray, rows_per_batch: int, world_size: int, cost: CostModel
) -> _Epoch:
    # 1. Slots, labelled slots and pairs of every row, then of every micro-batch.
    slots, pairs = plan.row_lengths, plan.row_lengths**2 if strategy.contaminated else plan.row_costs()
    labelled = slots - plan.row_examples
    if strategy.layout == "padded":
        longest = np.maximum.reduceat(plan.stop - plan.start, plan.row_splits[:-1])
        slots = longest.astype(np.int64) * plan.row_examples
    batches = np.arange(0, len(plan), rows_per_batch)
    slots, labelled, pairs = (np.add.reduceat(x, batches) for x in (slots, labelled, pairs))
    # 2. Ranks take turns and wait for the slowest.
    costs = cost(slots, labelled=labelled, pairs=pairs)
    by_step = np.pad(costs, (0, -len(costs) % world_size)).reshape(-1, world_size)
    report = plan.report(lengths, strategy.layout)
    rate = report.real_tokens / by_step.max(axis=1).sum()
    return _Epoch(report, rate, len(by_step), int(slots.max()))


def _notes(
    found: Sequence[Prediction],
    lengths: np.ndarray,
    max_tokens: int,
    model: str,
    runs: Sequence[Mapping[str, Any]],
    time: Calibration,
    world_size: int,
) -> list[str]:
    notes, padding = [], found[0]
    if over := int((lengths > max_tokens).sum()):
        lost = np.maximum(lengths - max_tokens, 0).sum() / lengths.sum()
        share = f"{over:,} examples ({over / len(lengths):.1%})"
        notes.append(f"{share} are longer than {max_tokens:,} tokens; truncating them loses {lost:.1%} of the tokens.")
    fewer = min((p for p in found if not STRATEGIES[p.strategy].contaminated), key=lambda p: p.optimizer_steps)
    if (times := padding.optimizer_steps / fewer.optimizer_steps) > 1.2:
        notes.append(
            f"Steps: {fewer.label} takes {fewer.optimizer_steps:,} optimiser steps an epoch, padding "
            f"{padding.optimizer_steps:,}. At padding's learning rate the model then moves less: keep the examples per "
            f"step (smaller batches, `constant_examples`), or raise the rate, with Adam by about √{times:.1f} = "
            f"{times**0.5:.1f} × as a start, and compare validation loss at equal examples. Mini-batch packing changes "
            f"no step."
        )
    if broken := [p.label for p in found if p.broken_examples]:
        notes.append(
            f"{' and '.join(broken)} cut examples in two; without PosID neighbours also see each other, which costs "
            f"quality."
        )
    if time.error is None:
        notes.append(
            f"No records to calibrate on: speed-ups are ratios of {model}'s FLOPs, without fixed costs, and their "
            f"error is unknown. `python -m packlib reproduce` makes records; name their run with --records."
        )
        return notes
    measured, device = runs[0]["spec"]["model"], runs[0]["environment"]["device"]
    notes.append(
        f"Calibrated on {time.runs} runs of {measured} on {device}; "
        f"± is the largest error when a strategy is predicted from the others."
    )
    beyond = []
    if measured != model:
        beyond.append(f"{model} was not measured, its costs are scaled by FLOPs and its memory comes from a formula")
    for name, value in (("world size", world_size), ("max_tokens", max_tokens)):
        known = max(r["spec"][name.replace(" ", "_")] for r in runs)
        if value > known:
            beyond.append(f"{name} {value:,} is above the {known:,} measured")
    wastes = [r["plan"]["waste"] for r in runs]
    if padding.waste > 1.1 * max(wastes):
        beyond.append(f"padding's waste of {padding.waste:.2f} is above the {max(wastes):.2f} measured")
    if beyond:
        notes.append(f"Extrapolating: {'; '.join(beyond)}.")
    return notes


def _recommend(found: Sequence[Prediction]) -> str:
    by_name = {p.strategy: p for p in found}
    padding, grouped, packed, multi = (
        by_name[n] for n in ("padding", "group_by_length", "minibatch_packing", "multipack_posid")
    )
    error = packed.speed_up_error or 0.0
    waste = f"padding spends {padding.waste:.2f} slots on a token"
    if max(packed.speed_up, multi.speed_up) < WORTH:
        return f"Do not pack: {waste}, so packing would gain {max(packed.speed_up, multi.speed_up) - 1:.0%} at most."
    if packed.speed_up < WORTH:
        return (
            f"Mini-batch packing is not worth it ({waste}); multipack would run {multi.speed_up:.2f} × as fast by "
            f"fuller batches, with {multi.optimizer_steps:,} instead of {padding.optimizer_steps:,} steps an epoch, so "
            f"only if you can retune the learning rate."
        )
    if packed.speed_up * (1 - error) < WORTH:
        gain = f"the predicted {packed.speed_up:.2f} × is within the error of ±{error:.0%}"
        fuller = ""
        if multi.speed_up * (1 - (multi.speed_up_error or 0.0)) >= WORTH:
            steps = f"{multi.optimizer_steps:,} instead of {padding.optimizer_steps:,} steps an epoch"
            fuller = f" Fuller batches are beyond it: multipack {multi.speed_up:.2f} ×, with {steps}."
        return f"Mini-batch packing is probably not worth it: {waste}, and {gain}; measure before you switch.{fuller}"
    also = ""
    if grouped.speed_up > 0.95 * packed.speed_up:
        gets = f"group by length gets {grouped.speed_up:.2f} × with one setting"
        also = f", though {gets}, at the price of less random batches"
    elif multi.speed_up > 1.1 * packed.speed_up:
        fewer = f"{padding.optimizer_steps / multi.optimizer_steps:.1f} × fewer optimiser steps"
        also = f"; multipack reaches {multi.speed_up:.2f} ×, with {fewer}"
    same = f"the same steps run {packed.speed_up:.2f} × as fast"
    return f"Pack your mini-batches (minibatch_packing): {waste}, {same}{also}."


def _plus_minus(value: float, error: float | None) -> str:
    if error is None:
        return f"{value:.2f} ± ?"
    if error == 0:
        return f"{value:.2f}       "  # as wide as with an error, so that columns stand
    return f"{value:.2f} ± {value * error:.2f}"
