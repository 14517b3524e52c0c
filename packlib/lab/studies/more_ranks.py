"""Notebook 09: what more GPUs than were measured would show, foreseen from records of two, with the error of doing so.

    micro-batch on one rank:  per_slot · (slots + pair · Σ n²), and not below `launch`, where the host launches kernels;
                              with CUDA graphs nothing is launched, and per_batch is added instead
    step, sharded:            micro-batches one after the other, each as long as on its slowest rank (FSDP2 waits in
                              every layer); not sharded: the slowest rank's sum (gradients meet once a step)
    and for every step:       the optimiser's least time, and what GPUs exchange: sharded, hidden behind the work or
                              not, both ends; not sharded, it comes when the work is done and cannot be hidden

per_slot, per_batch and a `launch` for each layout and kernel are fitted to every measured step of one rig, by least
squares on relative errors; the price of a pair is that of `packlib.lab.costs`. n ranks are planned as the worker plans
them. Not in it: a slower host with more processes on it, and links other than NVLink. Memory is a record's own peak
plus the growth of the largest micro-batch, less what further ranks take over: the states, or, as the other end, all
that does not grow with slots. The lengths that records were planned on lie beside them (`save_lengths`, checked by the
plans' hashes), so that everything can be computed again without the corpora.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import least_squares
from transformers import PreTrainedConfig

from packlib.lab import doubts, models, tables
from packlib.lab.costs import PAIR_SLOWDOWN
from packlib.lab.data.corpora import load_corpus
from packlib.lab.records import had_device_alone, read_records
from packlib.lab.runs.limits import Rates, StepLimit, StepWork, step_limit
from packlib.lab.runs.spec import PADDED_SDPA, Rig, RunSpec
from packlib.lab.strategies import get_strategy, plan_for
from packlib.plans import Plan

Record = Mapping[str, Any]
Lengths = Mapping[str, np.ndarray]  # corpus, as a spec names it -> tokens of each example, int [examples]
MINI, FULL = ("flat", "auto", "minibatch_packing"), "multipack_posid"  # layout, kernel, strategy
SDPA, VARLEN = ("padded", "maskless_sdpa", "padding"), ("padded", "auto", "padding")
STRATEGIES = ("padding", "minibatch_packing", FULL)
RATES = ("matmul_flops_ceiling", "copy_bytes_per_s")
PAPERS = Rig(recompute="all", shard=True)
FROM = 2  # ranks of the records
BUS = 329e9  # bytes/s that a GPU receives in NCCL's all-reduce of 1 GiB: 2 H100, one measurement (355e9 on four)
STEPS, TIMED = 13, slice(3, 13)  # of preset h100x8
SPEED_GOAL = {"multitask": 1.9, "math": 1.4}  # the paper's: Table 2 for Mistral-7B, and "about" in its blog post
MEMORY_GOAL = {"multitask": 0.85, "math": 0.96}  # these and the next two: what was asked of a run on eight
SHARE_GOAL, RANKS_GOAL = 0.90, 0.92
MEMORY = "peak memory per GPU"
NEEDED = "GB/s that a GPU has to receive for the goal"
STATES = 4  # weights, gradients and AdamW's two moments
PAIRS = (0.5, 2.0)  # times the price of a pair: as wide as the prices that `packlib.lab.costs` tried
VERDICTS = {
    "met": "error included, {n} of {all} figures meet their goal",
    "missed": "error included, {n} of {all} figures miss their goal",
    "cannot say": "the error is too large to say whether {n} of {all} figures meet their goal",
}
COLUMNS = ["corpus", "what", "low", "high", "left_out", "other_host", "goal", "verdict"]


@cache
def _config(model: str) -> PreTrainedConfig:
    return models.model_config(model)


@dataclass(frozen=True, eq=False)
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
        return _work(self, ranks, balance)

    @cached_property
    def measured(self) -> np.ndarray:
        """The work of the steps that were timed."""
        return self.work(self.spec.world_size)[self.steps - len(self.seconds) : self.steps]

    def limit(self, work: np.ndarray) -> StepLimit:
        """The least seconds of the mean step of `work`, for one rank."""
        ranks, (slots, pairs) = work.shape[2], work.sum(axis=1).mean(axis=(0, 1))
        least = StepWork(self.spec.gradient_accumulation, slots, slots, pairs)
        shards = ranks if self.spec.rig.shard else 1
        return step_limit(_config(self.spec.model), least, self.rates, itemsize=self.itemsize, shards=shards)

    def exchanged_bytes(self, ranks: int) -> float:
        """What a rank receives in a step: weights and gradients of its shards, or gradients summed and spread again."""
        if self.spec.rig.shard:
            return self.limit(np.ones((1, 1, ranks, 2))).gathered_bytes
        total = models.parameter_count(_config(self.spec.model)).total
        return 2 * (1 - 1 / ranks) * self.itemsize * total


@lru_cache(maxsize=256)
def _work(arm: Arm, ranks: int, balance: bool) -> np.ndarray:
    plan, to = arm.plan(ranks, balance), max(arm.spec.rig.pad_to, 1)
    slots, pairs = plan.row_lengths, plan.row_costs()
    if arm.way[0] == "padded":
        longest = -(-np.maximum.reduceat(plan.stop - plan.start, plan.row_splits[:-1]) // to) * to
        slots = longest * plan.row_examples
        if arm.spec.kernel in PADDED_SDPA:  # pads attend, too; the varlen kernel leaves them out
            pairs = slots * longest
    shape = (-1, arm.spec.gradient_accumulation, ranks)
    whole = len(plan) - len(plan) % (shape[1] * ranks)
    rounded = (-(-slots // to) * to)[:whole].reshape(shape)
    return np.stack([rounded, pairs[:whole].reshape(shape)], axis=-1).astype(float)


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
    """Finished runs of STRATEGIES on two balanced ranks whose lengths are known and that had their devices alone.

    Raises `ValueError` where a record was planned on other lengths than these.
    """
    arms = []
    for run in runs:
        spec, metrics = RunSpec(**run["spec"]), run["metrics"]
        known = spec.world_size == FROM and spec.balance and spec.strategy in STRATEGIES and spec.corpus in lengths
        if not (known and run["status"] == "ok" and had_device_alone(run)):
            continue
        seconds, rates = np.diff(run["trace"]["seconds"], prepend=0), (metrics[name] for name in RATES)
        timed, peak = seconds[-metrics["measured_steps"] :], metrics["peak_memory_bytes"]
        arm = Arm(spec, lengths[spec.corpus], timed, len(seconds), Rates(*rates), peak)
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
    rig, config = arms[0].spec.rig, _config(arms[0].spec.model)
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
    """Each arm of one rig predicted from the others, repeats left out with it: `rig, key, measured, predicted, error`.

    Seconds of the mean step; no row for an arm whose way (layout and kernel) no other arm has, unless graphs launch it.
    """
    rows = []
    for key, measured in _means(arms).items():
        own, others = next(a for a in arms if a.key == key), [a for a in arms if a.key != key]
        if others and (own.spec.rig.graphs or own.way in {a.way for a in others}):
            predicted = float(fit(others, hidden=hidden).steps(own, own.measured).mean())
            rows.append([own.spec.rig.label, key, measured, predicted, predicted / measured - 1])
    return pd.DataFrame(rows, columns=["rig", "key", "measured", "predicted", "error"])


Means = Mapping[tuple, float]  # an arm's key -> seconds of its mean step


class _Foreseen:
    """The figures of one rig. elsewhere: its arms on another host."""

    def __init__(self, arms: Sequence[Arm], elsewhere: Sequence[Arm], ranks: int) -> None:
        self.arms, self.ranks, self.papers = arms, ranks, arms[0].spec.rig == PAPERS
        ends = (False, True) if arms[0].spec.rig.shard else (False,)
        self.costs = [fit(arms, hidden=hidden) for hidden in ends]
        self.measured, self.elsewhere = _means(arms), _means(elsewhere)
        self.fitted = [{arm.key: cost.steps(arm, arm.measured).mean() for arm in arms} for cost in self.costs]
        self.left_out = [left_out(arms, hidden=cost.hidden) for cost in self.costs]
        self.alone = [table.set_index("key")["predicted"].to_dict() for table in self.left_out]

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
        """MiniBatchPacking over padding on the steps that the preset times: speed or its share of the limit; memory."""
        works = [arm.work(self.ranks)[TIMED] for arm in (padded, mini)]
        ratios = [c.steps(padded, works[0]).mean() / c.steps(mini, works[1]).mean() for c in self.costs]
        errors = self._errors(lambda means: means.get(padded.key, np.nan) / means.get(mini.key, np.nan))
        place, kernel = mini.place, "SDPA" if padded.spec.kernel == "maskless_sdpa" else "varlen"
        what = f"minibatch_packing over padding ({kernel}), "
        if not self.papers:
            allowed = padded.limit(works[0]).seconds / mini.limit(works[1]).seconds
            return [[place, f"our rig: {what}share of limit", [r / allowed for r in ratios], *errors, SHARE_GOAL]]
        speed_goal = SPEED_GOAL.get(place, np.nan) if kernel == "SDPA" else np.nan
        rows = [[place, f"{what}tokens/s", ratios, *errors, speed_goal]]
        if kernel == "SDPA":  # the other peak is the same within a percent
            rows.append([place, f"{what}{MEMORY}", *self._memory(padded, mini), np.nan, MEMORY_GOAL.get(place, np.nan)])
        return rows

    def _memory(self, padded: Arm, mini: Arm) -> tuple[list[float], float]:
        """Peak of `mini` over that of `padded` at both ends; its error on two ranks without their own records."""
        line = peak_line(self.arms)
        ends = np.array([peaks_of_more(arm, self.ranks, *line) for arm in (mini, padded)])
        others = ([a for a in self.arms if a.key != own.key] for own in (mini, padded))
        first, second = (np.polyval(peak_line(a), largest(own, FROM)) for a, own in zip(others, (mini, padded)))
        return (ends[0] / ends[1]).tolist(), abs(float(first / second) * padded.peak_bytes / mini.peak_bytes - 1)

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
            spare = [
                c.steps(arm, one).mean() / RANKS_GOAL - replace(c, hidden=True).steps(arm, many).mean() for c in costs
            ]
            needed = [arm.exchanged_bytes(self.ranks) / max(seconds, 1e-9) / 1e9 for seconds in spare]
            rows.append([arm.place, f"{what}{NEEDED}", needed, np.nan, np.nan, np.nan])
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


def peaks_of_more(arm: Arm, ranks: int, per_slot: float, always: float) -> tuple[float, float]:
    """Peak bytes per GPU on `ranks` GPUs: states alone sharded further, and all that is `always` there."""
    own = arm.spec.world_size
    states = STATES * arm.itemsize * models.parameter_count(_config(arm.spec.model)).total / own
    grown = arm.peak_bytes + per_slot * (largest(arm, ranks) - largest(arm, own))
    further = 1 - own / ranks if arm.spec.rig.shard else 0.0
    return grown - states * further, grown - always * further


class Forecast(NamedTuple):
    """`figures`: a row a figure, see `predict`. `arms`: `left_out` of every rig, at both ends of the exchange.

    doubts: what is off of the records that it rests on, in short; empty where nothing is.
    """

    figures: pd.DataFrame
    arms: pd.DataFrame
    doubts: str = ""


def predict(runs: Sequence[Record], lengths: Lengths, ranks: int, elsewhere: Sequence[Record] = ()) -> Forecast:
    """The figures of preset h100x8 that records of two ranks let us foresee for `ranks` of them.

    elsewhere: the same arms on another host. Columns `corpus, what`; `low, high`: both ends of the exchange and of
    memory, for full rows pairs at half and at twice their price; `left_out`: relative error on two ranks where arms are
    predicted from the others, the largest over this rig's figures of that kind (for full rows, of a step; a single
    ratio may be right by chance); `other_host`: the same for the other host's figures, predicted from these records;
    `goal` (NaN: none); `verdict`: what the range, made wider by the larger error, says of it.
    """
    there, rows, alone = by_rig(read_arms(elsewhere, lengths)), [], []
    for rig, arms in by_rig(read_arms(runs, lengths)).items():
        foreseen = _Foreseen(arms, there.get(rig, []), ranks)
        rows += [[rig, row[1].split(", ")[-1], *row] for row in foreseen.rows()]
        alone += foreseen.left_out
    table = pd.DataFrame(rows, columns=["rig", "kind", "corpus", "what", "values", "left_out", "other_host", "goal"])
    errors = ["left_out", "other_host"]
    table[errors] = table.groupby(["rig", "kind"])[errors].transform("max")
    table["low"], table["high"] = table["values"].map(min), table["values"].map(max)
    table["verdict"] = [_verdict(row) for row in table.to_dict("records")]
    off = doubts.of_records(runs, (run["run_id"] for run in runs if run["spec"].get("world_size") == FROM))
    return Forecast(table[COLUMNS], pd.concat(alone) if alone else left_out([], hidden=True), off)


def _verdict(row: Mapping[str, Any]) -> str:
    error = np.nanmax([0.0, row["left_out"], row["other_host"]])
    low, high, goal = row["low"] * (1 - error), row["high"] * (1 + error), row["goal"]
    if np.isnan(goal):
        return ""
    if row["kind"] == MEMORY:  # less is better
        low, high, goal = -high, -low, -goal
    return "met" if low >= goal else "missed" if high < goal else "cannot say"


def foresee(folder: Path, ranks: int = 8) -> Forecast:
    """`predict` for a run's folder, from its records, those in `second_host/` and `lengths.json`; empty without."""
    lengths = read_lengths(folder)
    if not lengths:
        return predict([], {}, ranks)
    return predict(read_records(folder), lengths, ranks, read_records(folder / "second_host"))


def read_lengths(folder: Path) -> Lengths:
    """What `save_lengths` wrote; nothing where it did not."""
    path = folder / "lengths.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: np.array(lengths, dtype=np.int64) for name, lengths in stored.items()}


def save_lengths(folder: Path) -> Path:
    """Write `lengths.json`: the lengths that a run's records were planned on, where the corpora are at hand."""
    runs = [RunSpec(**run["spec"]) for run in read_records(folder) if run["status"] == "ok"]
    options = {run.corpus: run.corpus_options for run in runs if run.world_size == FROM}
    lengths = {name: load_corpus(name, **own).lengths.tolist() for name, own in options.items()}
    path = folder / "lengths.json"
    path.write_text(json.dumps(lengths, separators=(",", ":")) + "\n", encoding="utf-8")
    return path


def display_table(forecast: Forecast) -> pd.DataFrame:
    """The figures for readers."""
    table = forecast.figures
    columns = {"corpus": table["corpus"], "figure": table["what"]}
    columns["foreseen"] = [_span(row) for row in table.to_dict("records")]
    columns["error, arms left out"] = tables.formatted(table["left_out"], "{:.1%}")
    columns["error, other host"] = tables.formatted(table["other_host"], "{:.1%}")
    return pd.DataFrame(columns | {"goal": tables.formatted(table["goal"], "{:.2f}"), "verdict": table["verdict"]})


def _span(row: Mapping[str, Any]) -> str:
    low, high = f"{row['low']:.3f}", f"{row['high']:.3f}"
    return low if low == high else f"{low} to {high}"


def findings(forecast: Forecast) -> list[str]:
    """Sentences of notebook 09, every number from `predict`: how well arms foresee each other, then verdicts."""
    off, table = forecast.arms["error"].abs(), forecast.figures
    said: list[str] = []
    if forecast.doubts and len(table):
        said.append(
            doubts.Doubt(
                f"What is foreseen for more GPUs rests on a run in doubt ({forecast.doubts}): its verdicts are of that "
                "run's steps, whatever made them so."
            )
        )
    if len(off):
        said.append(
            f"On two GPUs, a mean step predicted from the rig's other arms is off by {off.median():.1%} typically and "
            f"{off.max():.1%} at most ({forecast.arms['key'].nunique()} arms)."
        )
    if table["other_host"].notna().any():
        worst = table.loc[table["other_host"].idxmax()]
        said.append(
            f"Another host's figures, predicted from this one's records, are off by {worst['other_host']:.1%} at most "
            f"(“{worst['what']}”): the host is a part of what is measured."
        )
    needed = table.loc[table["what"].str.endswith(NEEDED), "high"]
    if len(needed):
        said.append(
            f"What full rows lose on more GPUs rests on the rate of their exchange, assumed, not measured on so many: "
            f"{BUS / 1e9:.0f} GB/s, where the goal takes {needed.min():.0f} to {needed.max():.0f}."
        )
    judged = table[table["verdict"] != ""]
    for verdict, sentence in VERDICTS.items():
        rows = judged[judged["verdict"] == verdict].to_dict("records")
        shown = "; ".join(f"{r['corpus']}, {r['what']} {_span(r)} (goal {r['goal']:.2f})" for r in rows)
        said += [f"Foreseen, not measured: {sentence.format(n=len(rows), all=len(judged))}: {shown}."] if rows else []
    return said
