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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from packlib.lab import models
from packlib.lab.costs import PAIR_SLOWDOWN
from packlib.lab.records import had_device_alone
from packlib.lab.runs.limits import Rates, StepLimit, StepWork, step_limit
from packlib.lab.runs.spec import Rig, RunSpec
from packlib.lab.strategies import get_strategy, plan_for
from packlib.plans import Plan

Record = Mapping[str, Any]
Lengths = Mapping[str, np.ndarray]  # corpus, as a spec names it -> tokens of each example, int [examples]
MINI, VARLEN, SDPA = ("minibatch_packing", "auto"), ("padding", "auto"), ("padding", "maskless_sdpa")
FULL = ("multipack_posid", "auto")
PAPERS = Rig(recompute="all", shard=True)
BUS = 329e9  # bytes/s that a GPU receives in NCCL's all-reduce of 1 GiB: 2 H100, one measurement (355e9 on four)
STEPS, TIMED = 13, slice(3, 13)  # of preset h100x8
MEMORY_GOAL = {"multitask": 0.85, "math": 0.96}  # these and the next two: what was asked of a run on eight
SHARE_GOAL, RANKS_GOAL = 0.90, 0.92
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
        return self.spec.corpus, self.way, self.spec.batch_size, self.spec.strategy

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
            if self.spec.kernel == SDPA[1]:  # pads attend, too; the others leave them out inside attention
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
        itemsize = 2 if self.spec.dtype == "bfloat16" else 4
        least = StepWork(self.spec.gradient_accumulation, slots, slots, pairs)
        shards = ranks if self.spec.rig.shard else 1
        return step_limit(models.model_config(self.spec.model), least, self.rates, itemsize=itemsize, shards=shards)

    def exchanged_bytes(self, ranks: int) -> float:
        """What a rank receives in a step: weights and gradients of its shards, or gradients summed and spread again."""
        if self.spec.rig.shard:
            return self.limit(np.ones((1, 1, ranks, 2))).gathered_bytes
        total = models.parameter_count(models.model_config(self.spec.model)).total
        return 2 * (1 - 1 / ranks) * (2 if self.spec.dtype == "bfloat16" else 4) * total


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


def predict(runs: Sequence[Record], lengths: Lengths, ranks: int, elsewhere: Sequence[Record] = ()) -> pd.DataFrame:
    """A row a figure of preset h100x8 that the records of two ranks let us foresee for `ranks` of them.

    elsewhere: the same arms from another host. Columns `corpus, what`; `low, high`: the exchange counted in full and
    hidden, for full rows also pairs at half and at twice their price; `left_out`: relative error of this figure on two
    ranks where its arms are predicted without themselves, the larger of both ends (NaN: cannot be); `other_host`: the
    same for the other host's figure, predicted from this one's records; `goal`; `verdict`: whether the range, wider by
    the larger error, is above it (memory: below).
    """
    elsewhere_by_rig, rows = by_rig(read_arms(elsewhere, lengths)), []
    for rig, group in by_rig(read_arms(runs, lengths)).items():
        foreseen = _Foreseen(group, elsewhere_by_rig.get(rig, []), ranks)
        for corpus in dict.fromkeys(arm.spec.corpus for arm in group):
            rows += foreseen.comparisons(corpus) + foreseen.full_rows(corpus)
    return pd.DataFrame(rows, columns=COLUMNS)


class _Foreseen:
    """The figures of one rig."""

    def __init__(self, arms: Sequence[Arm], elsewhere: Sequence[Arm], ranks: int) -> None:
        self.arms, self.elsewhere, self.ranks = arms, elsewhere, ranks
        self.costs = [fit(arms, hidden=hidden) for hidden in (False, True)]
        self.alone = [left_out(arms, hidden=cost.hidden).set_index("key")["predicted"] for cost in self.costs]

    def comparisons(self, corpus: str) -> list[tuple]:
        """MiniBatchPacking over padding, both with four examples twice: speed, its share of the limit, peak memory."""
        found = {(a.spec.strategy, a.spec.kernel): a for a in reversed(self.arms) if _sizes(a) == (corpus, 4, 2)}
        mini, name, rows = found.get(MINI), corpus.split("_")[0], []
        papers = self.arms[0].spec.rig == PAPERS
        for padding in (SDPA, VARLEN):
            if mini is None or padding not in found or not (papers or mini.spec.rig.graphs):
                continue
            padded = found[padding]
            works = [arm.work(self.ranks)[TIMED] for arm in (padded, mini)]
            ratios = [c.steps(padded, works[0]).mean() / c.steps(mini, works[1]).mean() for c in self.costs]
            errors = self._errors(lambda key_seconds: key_seconds(padded) / key_seconds(mini))
            through = "padding through SDPA" if padding == SDPA else "padding on the varlen kernel"
            what = f"minibatch_packing over {through}"
            if papers:
                goal = SPEED_GOAL.get(name, np.nan) if padding == SDPA else np.nan
                rows.append(_row(name, f"{what}, tokens/s", ratios, errors, goal))
                rows.append(_row(name, f"{what}, peak memory", *self._memory(padded, mini), MEMORY_GOAL.get(name)))
            else:
                allowed = padded.limit(works[0]).seconds / mini.limit(works[1]).seconds
                shares = [ratio / allowed for ratio in ratios]
                rows.append(_row(name, f"our rig: {what}, share of its limit", shares, errors, SHARE_GOAL))
        return rows

    def full_rows(self, corpus: str) -> list[tuple]:
        """Multipack, weights held by each GPU: an epoch's tokens/s per GPU over one GPU's, and the slowest rank."""
        rows = []
        for arm in self.arms:
            if (arm.spec.corpus, arm.spec.strategy) != (corpus, FULL) or arm.spec.rig.shard:
                continue
            costs = [replace(cost, pair=cost.pair * factor) for cost in self.costs for factor in PAIRS]
            errors = self._errors(lambda key_seconds: key_seconds(arm))
            for balance, said in ((True, "with plan.balance"), (False, "without plan.balance")):
                one, many = arm.work(1), arm.work(self.ranks, balance)
                rates = [c.steps(arm, one).mean() / c.steps(arm, many).mean() for c in costs]
                slowest = [slowest_over_mean(c, arm, many) for c in costs]
                name = corpus.split("_")[0]
                what = f"full rows, {self.ranks} GPUs over 1, {said}"
                rows.append(_row(name, f"{what}: tokens/s per GPU", rates, errors, RANKS_GOAL))
                rows.append(_row(name, f"{what}: slowest rank's step over the mean", slowest, (np.nan, np.nan)))
        return rows

    def _errors(self, figure: Callable[[Callable[[Arm], float]], float]) -> tuple[float, float]:
        """How far a figure of mean seconds is off on two ranks: its arms left out, and on the other host."""
        keys = {arm.key for arm in self.elsewhere}
        pairs = [(lambda arm, a=alone: a.get(arm.key, np.nan), self._measured(self.arms)) for alone in self.alone]
        here = [figure(predicted) / figure(measured) - 1 for predicted, measured in pairs]
        ...


