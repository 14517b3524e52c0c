"""Notebook 09: what more GPUs than were measured would show, foreseen from records of two, with the error of doing so.

    micro-batch on one rank:  per_slot · (slots + pair · Σ n²), and not below `launch`, where the host launches kernels;
                              with CUDA graphs nothing is launched, and per_batch is added instead
    step, sharded:            micro-batches one after the other, each as long as on its slowest rank (FSDP2 waits in
                              every layer); not sharded: the slowest rank's sum (gradients meet once a step)
    and for every step:       the optimiser's least time, and what GPUs exchange: hidden behind the work, or not

per_slot, per_batch and a `launch` for each layout and kernel are fitted to every measured step of one rig, by least
squares on relative errors; the price of a pair is that of `packlib.lab.costs`. n ranks are planned as the worker plans
them. Not in it: a slower host with more processes on it, and links other than NVLink. Memory is a record's own peak,
less the states that further ranks take over, plus the growth of the largest micro-batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from packlib.lab import models, tables
from packlib.lab.costs import PAIR_SLOWDOWN
from packlib.lab.data.corpora import load_corpus
from packlib.lab.records import had_device_alone, read_records
from packlib.lab.runs.limits import Rates, StepLimit, StepWork, step_limit
from packlib.lab.runs.spec import Rig, RunSpec
from packlib.lab.strategies import get_strategy, plan_for
from packlib.plans import Plan

Record = Mapping[str, Any]
Lengths = Mapping[str, np.ndarray]  # corpus, as a spec names it -> tokens of each example, int [examples]
MINI, FULL = ("flat", "auto", "minibatch_packing"), "multipack_posid"  # layout, kernel, strategy
SDPA, VARLEN = ("padded", "maskless_sdpa", "padding"), ("padded", "auto", "padding")
PAPERS = Rig(recompute="all", shard=True)
BUS = 329e9  # bytes/s that a GPU receives in NCCL's all-reduce of 1 GiB: 2 H100, one measurement (355e9 on four)
STEPS, TIMED = 13, slice(3, 13)  # of preset h100x8
SPEED_GOAL = {"multitask": 1.9, "math": 1.4}  # the paper's: Table 2 for Mistral-7B, and "about" in its blog post
MEMORY_GOAL = {"multitask": 0.85, "math": 0.96}  # these and the next two: what was asked of a run on eight
SHARE_GOAL, RANKS_GOAL = 0.90, 0.92
MEMORY = "peak memory per GPU"
STATES = 4  # weights, gradients and AdamW's two moments
PAIRS = (0.5, 2.0)  # times the price of a pair: as wide as the prices that `packlib.lab.costs` tried
COLUMNS = ["corpus", "what", "low", "high", "left_out", "other_host", "goal", "verdict"]


@dataclass(frozen=True)
class Arm:
    """A finished record: its spec, seconds of its measured steps, and the plans of its examples for any ranks."""

    spec: RunSpec
    lengths: np.ndarray
    seconds: np.ndarray
    steps: int
    rates: Rates
    peak_bytes: float

    @property
    def key(self) -> tuple:
        """What its repeats share."""
        return (*self.sizes, *self.way, self.spec.strategy)

    @property
    def sizes(self) -> tuple[str, int, int]:
        """Corpus, examples (or rows) of a micro-batch, micro-batches of a step."""
        return self.spec.corpus, self.spec.batch_size, self.spec.gradient_accumulation

    @property
    def place(self) -> str:
        """The corpus without its tokenizer."""
        return self.spec.corpus.split("_")[0]

    @property
    def itemsize(self) -> int:
        """Bytes of a weight, a gradient and each moment."""
        return 2 if self.spec.dtype == "bfloat16" else 4

    @property
    def rig(self) -> str:
        """What decides costs: model, dtype and rig, but for what rows are padded to."""
        return json.dumps([self.spec.model, self.spec.dtype, asdict(replace(self.spec.rig, pad_to=1))], sort_keys=True)

    @property
    def way(self) -> tuple[str, str]:
        """What decides how much the host launches: layout and kernel."""
        return get_strategy(self.spec.strategy).layout, self.spec.kernel

    def plan(self, ranks: int, balance: bool = True) -> Plan:
        """As `packlib.lab.runs.worker.planned` makes it."""
        sizes = {"batch_size": self.spec.batch_size, "max_tokens": self.spec.max_tokens, "seed": self.spec.seed}
        plan = plan_for(get_strategy(self.spec.strategy), self.lengths, **sizes)
        return plan.balance(ranks, seed=self.spec.seed) if balance and ranks > 1 else plan

    def work(self, ranks: int, balance: bool = True) -> np.ndarray:
        """Slots and Σ n² of an epoch's micro-batches, float64 [steps, accumulation, ranks, 2]; ranks take turns."""
        plan, to = self.plan(ranks, balance), max(self.spec.rig.pad_to, 1)
        slots, pairs = plan.row_lengths, plan.row_costs()
        if self.way[0] == "padded":
            longest = -(-np.maximum.reduceat(plan.stop - plan.start, plan.row_splits[:-1]) // to) * to
            slots = longest * plan.row_examples
            if self.way == SDPA[:2]:  # pads attend, too; the others leave them out inside attention
                pairs = slots * longest
        shape = (-1, self.spec.gradient_accumulation, ranks)
        whole = len(plan) - len(plan) % (self.spec.gradient_accumulation * ranks)
        rounded = (-(-slots // to) * to)[:whole].reshape(shape)
        return np.stack([rounded, pairs[:whole].reshape(shape)], axis=-1).astype(float)

    @cached_property
    def measured(self) -> np.ndarray:
        """The work of the steps that were timed."""
        return self.work(self.spec.world_size)[self.steps - len(self.seconds) : self.steps]

    def limit(self, work: np.ndarray) -> StepLimit:
        """The least seconds of the mean step of `work`, for one rank."""
        ranks, (slots, pairs) = work.shape[2], work.sum(axis=1).mean(axis=(0, 1))
        least = StepWork(self.spec.gradient_accumulation, slots, slots, pairs)
        shards = ranks if self.spec.rig.shard else 1
        return step_limit(
            models.model_config(self.spec.model), least, self.rates, itemsize=self.itemsize, shards=shards
        )

    def exchanged_bytes(self, ranks: int) -> float:
        """What a rank receives in a step: weights and gradients of its shards, or gradients summed and spread again."""
        if self.spec.rig.shard:
            return self.limit(np.ones((1, 1, ranks, 2))).gathered_bytes
        total = models.parameter_count(models.model_config(self.spec.model)).total
        return 2 * (1 - 1 / ranks) * self.itemsize * total


@dataclass(frozen=True)
class Cost:
    """Seconds of a micro-batch on one rig; `pair` in slots; `hidden`: whether the exchange takes no time of its own."""

    per_slot: float
    per_batch: float
    launch: Mapping[tuple[str, str], float]
    pair: float
    hidden: bool

    def micro_batches(self, arm: Arm, work: np.ndarray) -> np.ndarray:
        """[steps, accumulation, ranks]."""
        seconds = self.per_slot * (work[..., 0] + self.pair * work[..., 1]) + self.per_batch
        return np.maximum(seconds, self.launch.get(arm.way, 0.0))

    def steps(self, arm: Arm, work: np.ndarray) -> np.ndarray:
        """Seconds of each step, [steps]."""
        each, ranks = self.micro_batches(arm, work), work.shape[2]
        slowest = each.max(axis=2).sum(axis=1) if arm.spec.rig.shard else each.sum(axis=1).max(axis=1)
        exchange = 0.0 if self.hidden else arm.exchanged_bytes(ranks) / BUS
        return slowest + arm.limit(work).optimizer_seconds + exchange


def read_arms(runs: Sequence[Record], lengths: Lengths) -> list[Arm]:
    """Finished runs of our strategies on several ranks whose lengths are known and that had their devices alone.

    Raises `ValueError` where a record was planned on other lengths than these.
    """
    arms = []
    for run in runs:
        spec = RunSpec(**run["spec"])
        peer = get_strategy(spec.strategy).trl is not None
        if (
            run["status"] == "ok"
            and spec.world_size > 1
            and not peer
            and spec.corpus in lengths
            and had_device_alone(run)
        ):
            metrics, seconds = run["metrics"], np.diff(run["trace"]["seconds"], prepend=0)
            rates = Rates(metrics["matmul_flops_ceiling"], metrics["copy_bytes_per_s"])
            timed = seconds[-metrics["measured_steps"] :]
            arm = Arm(spec, lengths[spec.corpus], timed, len(seconds), rates, metrics["peak_memory_bytes"])
            if arm.plan(spec.world_size).sha256 != run["plan"]["sha256"]:
                raise ValueError(f"{run['run_id']} was planned on other lengths of {spec.corpus} than those given")
            arms.append(arm)
    return arms


def by_rig(arms: Sequence[Arm]) -> dict[str, list[Arm]]:
    """Arms that share their costs."""
    found: dict[str, list[Arm]] = {}
    for arm in arms:
        found.setdefault(arm.rig, []).append(arm)
    return found


def fit(arms: Sequence[Arm], *, hidden: bool) -> Cost:
    """The costs of one rig, by least squares on relative errors of every measured step; each arm weighs alike."""
    rig, config = arms[0].spec.rig, models.model_config(arms[0].spec.model)
    pair = PAIR_SLOWDOWN * models.attention_flops_per_token(config, 1.0) / 2 / models.flops_per_token(config)
    ways = [] if rig.graphs else sorted({arm.way for arm in arms})
    fastest = {w: min(a.seconds.min() / a.spec.gradient_accumulation for a in arms if a.way == w) for w in ways}

    def cost(logs: np.ndarray) -> Cost:
        values = np.exp(logs).tolist()
        launch = dict(zip(ways, values[1:]))
        return Cost(values[0], values[1] if rig.graphs else 0.0, launch, pair, hidden)

    def errors(logs: np.ndarray) -> np.ndarray:
        now = cost(logs)
        off = [np.log(now.steps(a, a.measured) / a.seconds) / np.sqrt(len(a.seconds)) for a in arms]
        return np.concatenate(off)

    slot = np.median([a.seconds.sum() / a.measured[..., 0].max(axis=2).sum() for a in arms])
    begin = [slot / 2, *([slot * 100] if rig.graphs else (fastest[way] / 2 for way in ways))]
    return cost(least_squares(errors, np.log(begin)).x)


def left_out(arms: Sequence[Arm], *, hidden: bool) -> pd.DataFrame:
    """Each arm of one rig predicted from the others, repeats left out with it: `key, measured, predicted, error`.

    Mean seconds of a step; no row for an arm whose way (layout and kernel) no other arm has, unless graphs launch it.
    """
    rows = []
    for key in dict.fromkeys(arm.key for arm in arms):
        own, others = [a for a in arms if a.key == key], [a for a in arms if a.key != key]
        if others and (own[0].spec.rig.graphs or own[0].way in {a.way for a in others}):
            measured = np.mean([a.seconds.mean() for a in own])
            rows.append((key, measured, fit(others, hidden=hidden).steps(own[0], own[0].measured).mean()))
    table = pd.DataFrame(rows, columns=["key", "measured", "predicted"])
    return table.assign(error=table["predicted"] / table["measured"] - 1)


Means = Mapping[tuple, float]  # an arm's key -> seconds of its mean step


class _Foreseen:
    """The figures of one rig. elsewhere: its arms on another host."""

    def __init__(self, arms: Sequence[Arm], elsewhere: Sequence[Arm], ranks: int) -> None:
        self.arms, self.ranks, self.papers = arms, ranks, arms[0].spec.rig == PAPERS
        self.costs = [fit(arms, hidden=hidden) for hidden in (False, True)]
        self.measured, self.elsewhere = _means(arms), _means(elsewhere)
        self.fitted = [{arm.key: cost.steps(arm, arm.measured).mean() for arm in arms} for cost in self.costs]
        self.alone = [left_out(arms, hidden=c.hidden).set_index("key")["predicted"].to_dict() for c in self.costs]

    def rows(self) -> list[list]:
        """Rows of `predict`."""
        found = []
        for corpus in dict.fromkeys(arm.spec.corpus for arm in self.arms):
            here = {(*a.way, a.spec.strategy): a for a in reversed(self.arms) if a.sizes == (corpus, 4, 2)}
            if MINI in here and (self.papers or self.arms[0].spec.rig.graphs):
                found += [row for name in (SDPA, VARLEN) if name in here for row in self._over(here[name], here[MINI])]
        full = {a.key: a for a in reversed(self.arms) if a.spec.strategy == FULL and not a.spec.rig.shard}
        return found + [row for arm in full.values() for row in self._full_rows(arm)]

    def _over(self, padded: Arm, mini: Arm) -> list[list]:
        """MiniBatchPacking over padding on the steps that the preset times: speed, or its share of the limit; memory."""
        works = [arm.work(self.ranks)[TIMED] for arm in (padded, mini)]
        ratios = [c.steps(padded, works[0]).mean() / c.steps(mini, works[1]).mean() for c in self.costs]
        errors = self._errors(lambda means: means.get(padded.key, np.nan) / means.get(mini.key, np.nan))
        place, kernel = mini.place, "SDPA" if padded.spec.kernel == "maskless_sdpa" else "varlen"
        what = f"minibatch_packing over padding ({kernel}), "
        if not self.papers:
            allowed = padded.limit(works[0]).seconds / mini.limit(works[1]).seconds
            return [[place, f"our rig: {what}share of limit", [r / allowed for r in ratios], *errors, SHARE_GOAL]]
        speed_goal = SPEED_GOAL.get(place, np.nan) if kernel == "SDPA" else np.nan
        memory = self._memory(padded, mini)
        return [
            [place, f"{what}tokens/s", ratios, *errors, speed_goal],
            [place, f"{what}{MEMORY}", [memory[0]], memory[1], np.nan, MEMORY_GOAL.get(place, np.nan)],
        ]

    def _memory(self, padded: Arm, mini: Arm) -> tuple[float, float]:
        """Peak of `mini` over that of `padded`, and how far it is off on two ranks without their own records."""
        slope = peak_line(self.arms)[0]
        foreseen = [peak_of_more(arm, self.ranks, slope) for arm in (mini, padded)]
        without = [
            np.polyval(peak_line([a for a in self.arms if a.key != b.key]), largest(b, 2)) for b in (mini, padded)
        ]
        return foreseen[0] / foreseen[1], abs(without[0] / without[1] * padded.peak_bytes / mini.peak_bytes - 1)

    def _full_rows(self, arm: Arm) -> list[list]:
        """An epoch of full rows, weights held by each GPU: tokens/s per GPU over one GPU's, and the slowest rank."""
        costs = [replace(cost, pair=cost.pair * factor) for cost in self.costs for factor in PAIRS]
        errors, rows = self._errors(lambda means: means.get(arm.key, np.nan)), []
        for balance in (True, False):
            one, many = arm.work(1), arm.work(self.ranks, balance)
            what = f"full rows, {'balanced' if balance else 'not balanced'}, "
            rates = [c.steps(arm, one).mean() / c.steps(arm, many).mean() for c in costs]
            uneven = [slowest_over_mean(c, arm, many) for c in costs]
            rows.append([arm.place, f"{what}{self.ranks} GPUs over 1: tokens/s per GPU", rates, *errors, RANKS_GOAL])
            rows.append([arm.place, f"{what}slowest rank's step over the mean", uneven, np.nan, np.nan, np.nan])
        return rows

    def _errors(self, figure: Callable[[Means], float]) -> tuple[float, float]:
        """How far a figure is off on two ranks: its arms left out of the fit, and on the other host."""
        here = [abs(figure(means) / figure(self.measured) - 1) for means in self.alone]
        there = [abs(figure(means) / figure(self.elsewhere) - 1) for means in self.fitted]
        return float(np.max(here)), float(np.max(there))


def _means(arms: Sequence[Arm]) -> Means:
    return {arm.key: float(np.mean([a.seconds.mean() for a in arms if a.key == arm.key])) for arm in arms}


def slowest_over_mean(cost: Cost, arm: Arm, work: np.ndarray) -> float:
    """What the slowest rank of each step has to do over what the mean rank has, in seconds without any waiting."""
    each = cost.micro_batches(arm, work).sum(axis=1)
    return float(each.max(axis=1).sum() / each.mean(axis=1).sum())


def largest(arm: Arm, ranks: int) -> float:
    """Slots of the largest micro-batch of a run on so many ranks, warm-up included."""
    return arm.work(ranks)[: arm.steps if ranks == arm.spec.world_size else STEPS, ..., 0].max()


def peak_line(arms: Sequence[Arm]) -> np.ndarray:
    """[bytes a slot of the largest micro-batch, bytes that are always there], a line through the arms' peaks."""
    return np.polyfit([largest(arm, arm.spec.world_size) for arm in arms], [arm.peak_bytes for arm in arms], 1)


def peak_of_more(arm: Arm, ranks: int, per_slot: float) -> float:
    """Peak bytes per GPU on `ranks` GPUs that share the states: the record's own, see the module."""
    count = models.parameter_count(models.model_config(arm.spec.model)).total
    taken = STATES * arm.itemsize * count * (1 / arm.spec.world_size - 1 / ranks) if arm.spec.rig.shard else 0.0
    return arm.peak_bytes - taken + per_slot * (largest(arm, ranks) - largest(arm, arm.spec.world_size))


def predict(runs: Sequence[Record], lengths: Lengths, ranks: int, elsewhere: Sequence[Record] = ()) -> pd.DataFrame:
    """A row a figure of preset h100x8 that records of two ranks let us foresee for `ranks` of them.

    elsewhere: the same arms on another host. Columns `corpus, what`; `low, high`: with the exchange counted in full and
    hidden, for full rows also with pairs at half and at twice their price; `left_out`: relative error of the figure on
    two ranks, its arms predicted from the others, at the worse of these ends; `other_host`: the same for the other
    host's figure, predicted from this one's records; `goal` (NaN: none); `verdict`: what the range, made wider by the
    larger error, says of it.
    """
    there, rows = by_rig(read_arms(elsewhere, lengths)), []
    for rig, arms in by_rig(read_arms(runs, lengths)).items():
        for corpus, what, values, left, other, goal in _Foreseen(arms, there.get(rig, []), ranks).rows():
            error = float(np.nanmax([0.0, left, other]))
            low, high = min(values), max(values)
            verdict = _verdict(low * (1 - error), high * (1 + error), goal, less=MEMORY in what)
            rows.append([corpus, what, low, high, left, other, goal, verdict])
    return pd.DataFrame(rows, columns=COLUMNS)


def _verdict(low: float, high: float, goal: float, *, less: bool) -> str:
    if np.isnan(goal):
        return ""
    if high <= goal if less else low >= goal:
        return "met"
    return "missed" if (low > goal if less else high < goal) else "cannot say"


def foresee(folder: Path, ranks: int = 8) -> pd.DataFrame:
    """`predict` for a run's folder, from its records, those in `second_host/` and `lengths.npz`; empty without."""
    path = folder / "lengths.npz"
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS)
    with np.load(path) as stored:
        lengths = {name: stored[name].astype(np.int64) for name in stored.files}
    return predict(read_records(folder), lengths, ranks, read_records(folder / "second_host"))


def save_lengths(folder: Path) -> Path:
    """Write `lengths.npz`: the lengths that a run's records were planned on, where the corpora are at hand."""
    runs = [RunSpec(**run["spec"]) for run in read_records(folder) if run["status"] == "ok"]
    options = {run.corpus: run.corpus_options for run in runs if run.world_size > 1}
    lengths = {name: load_corpus(name, **own).lengths.astype(np.uint16) for name, own in options.items()}
    np.savez_compressed(folder / "lengths.npz", allow_pickle=False, **lengths)
    return folder / "lengths.npz"


def display_table(table: pd.DataFrame) -> pd.DataFrame:
    """`predict` for readers."""
    columns = {"corpus": table["corpus"], "figure": table["what"]}
    columns["foreseen"] = [_span(row) for row in table.to_dict("records")]
    columns["error, arms left out"] = tables.formatted(table["left_out"], "{:.0%}")
    columns["error, other host"] = tables.formatted(table["other_host"], "{:.0%}")
    return pd.DataFrame(columns | {"goal": tables.formatted(table["goal"], "{:.2f}"), "verdict": table["verdict"]})


def _span(row: Mapping[str, Any]) -> str:
    low, high = f"{row['low']:.2f}", f"{row['high']:.2f}"
    return low if low == high else f"{low} to {high}"


def findings(table: pd.DataFrame) -> list[str]:
    """Sentences of notebook 09, every number from `predict`."""
    said = []
    for row in table[table["verdict"] != ""].to_dict("records"):
        known = [value for value in (row["left_out"], row["other_host"]) if not np.isnan(value)]
        sure = {"met": "the goal is met", "missed": "the goal is missed"}.get(row["verdict"], "too wide to say")
        error = f"error up to {max(known):.0%}" if known else "error unknown"
        said.append(f"Foreseen, {row['corpus']}, {row['what']}: {_span(row)}, {error}; goal {row['goal']:.2f}: {sure}.")
    return said
