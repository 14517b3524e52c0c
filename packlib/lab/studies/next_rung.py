"""Which change of the rig would gain most on this data? `python -m packlib advise DATA --rig`, from a ladder's records.

A rung's step is taken apart as its record allows: the host needs its time for each micro-batch, whatever is in it; the
device needs the optimiser's time for each step, and what remains for each slot; the longer one lasts. Held against runs
on another corpus where there are some, and where there are none it says so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from packlib.lab.parameters import unknown_name
from packlib.lab.records import had_device_alone
from packlib.lab.runs.spec import Rig, RunSpec
from packlib.lab.strategies import get_strategy, plan_for
from packlib.lab.studies import ladder
from packlib.lab.studies.ladder import Record


@dataclass(frozen=True)
class Foreseen:
    """A rung on other data: real tokens/s from its record, and the gain over the rung below that has one.

    gain: a factor, None of the lowest rung.
    """

    climb: str
    rung: str
    tokens_per_s: float
    gain: float | None


@dataclass(frozen=True)
class RigAdvice:
    """What `next_rung` found; `str()` is the text for a terminal, `asdict` the JSON.

    error: the largest relative error of a rung's tokens/s when it is foreseen from its record on another corpus; None
    where no rung has records on two.
    """

    device: str
    rungs: list[Foreseen]
    error: float | None
    recommendation: str

    def __str__(self) -> str:
        lines = [f"{'rung':44}{'real tokens/s':>15}{'× the rung below':>18}"]
        lines += [
            f"{f'{r.climb}: {r.rung}':44}{r.tokens_per_s:15,.0f}{f'{r.gain:.2f}' if r.gain else '':>18}"
            for r in self.rungs
        ]
        error = "unknown: no rung has records on two corpora" if self.error is None else f"up to {self.error:.0%}"
        return "\n".join(
            [*lines, "", f"- Foreseen from records on {self.device}; their error is {error}.", "", self.recommendation]
        )


def next_rung(
    lengths: Sequence[int] | np.ndarray,
    runs: Sequence[Record],
    *,
    batch_size: int = 4,
    max_tokens: int = 4096,
    gradient_accumulation: int = 1,
    here: str = "",
) -> RigAdvice:
    """Which rung would gain most on examples of these lengths (integers [examples]), from records of a ladder.

    batch_size, max_tokens, gradient_accumulation: as in `RunSpec`, of the mini-batches below any rung that merges them.
    here: the rung that a reader stands on; default: the lowest that has a record. Raises `ValueError` where no climb
    has two finished rungs, and for an unknown `here`.
    """
    kept = np.minimum(np.asarray(lengths), max_tokens)
    ways = _ways(runs)
    tokens = batch_size * gradient_accumulation * float(kept.mean())

    def suits(way: _Way) -> tuple[int, float]:
        """Most rungs first, then the step that is nearest in size to the reader's."""
        step = next(iter(way.climbed.values()))["metrics"]["tokens_per_step"]
        return len(way.climbed), -abs(math.log(step / tokens))

    chosen = {way.climb: way for way in sorted(ways, key=suits)}
    rungs = []
    for climb in sorted(chosen, key=list(ladder.CLIMBS).index):
        way = chosen[climb]
        base = replace(
            way.base, batch_size=batch_size, max_tokens=max_tokens, gradient_accumulation=gradient_accumulation
        )
        specs = {arm.rung.name: arm.spec for arm in ladder.arms(base, climb, keep=way.keep)}
        climbed = {name: run for name, run in way.climbed.items() if name in specs}  # an odd batch cannot be halved
        rates = [_foreseen_rate(run, *_work_of(specs[name], kept)) for name, run in climbed.items()]
        gains = [None, *(above / under for under, above in itertools.pairwise(rates))]
        rungs += [Foreseen(climb, *each) for each in zip(climbed, rates, gains)]
    if all(rung.gain is None for rung in rungs):
        raise ValueError("no climb has two finished rungs among these records; run notebook 08 first, or name its run")
    devices = {run["environment"]["device"] for way in chosen.values() for run in way.climbed.values()}
    return RigAdvice(" and ".join(sorted(devices)), rungs, _error_on_other_data(ways), _recommend(rungs, here))


@dataclass(frozen=True)
class _Way:
    """Finished rungs of a climb on one corpus, from the bottom up; `base` and `keep` as `arms` takes them."""

    climb: str
    base: RunSpec
    keep: str | float
    climbed: dict[str, Record]


def _ways(runs: Sequence[Record]) -> list[_Way]:
    """The climbs that these records belong to: those whose arms they are the runs of."""
    known = {spec.spec_id: (spec, run) for run in runs if (spec := _spec_of(run)) is not None}
    plain = {replace(spec, strategy="padding", kernel="auto", rig=Rig()) for spec, _ in known.values()}
    keeps = {spec.rig.recompute for spec, _ in known.values()} - {"all"} or {"none"}
    ways = []
    for base in sorted(plain, key=lambda spec: spec.spec_id):
        for keep in sorted(keeps, key=str):
            for climb in ladder.CLIMBS:
                own = [arm for arm in ladder.arms(base, climb, keep=keep) if not arm.rung.beside]
                there = [known[i][1] if (i := arm.spec.spec_id) in known else None for arm in own]
                status = ladder.climb_table(own, there)["status"] if own else ()  # wrong gradients advise nobody
                climbed = {arm.rung.name: run for arm, run, s in zip(own, there, status) if run and s == "ok"}
                if climbed:
                    ways.append(_Way(climb, base, keep, climbed))
    return ways


def _spec_of(run: Record) -> RunSpec | None:
    """The spec of a finished run without adapters that had the device alone; None of any other."""
    if run["status"] != "ok" or not had_device_alone(run) or "limit" not in run["metrics"]:
        return None
    spec = RunSpec(**run["spec"])
    return spec if spec.rig.lora_rank is None else None


def _work_of(spec: RunSpec, lengths: np.ndarray) -> tuple[float, float, int]:
    """Slots, real tokens and micro-batches of the mean optimiser step on examples of these lengths."""
    strategy, to = get_strategy(spec.strategy), max(spec.rig.pad_to, 1)
    plan = plan_for(strategy, lengths, batch_size=spec.batch_size, max_tokens=spec.max_tokens, seed=spec.seed)
    if strategy.layout == "padded":
        longest = np.maximum.reduceat(plan.stop - plan.start, plan.row_splits[:-1])
        slots = -(-longest // to) * to * plan.row_examples
    else:
        batches = np.arange(0, len(plan), strategy.rows_per_batch(spec.batch_size))
        slots = -(-np.add.reduceat(plan.row_lengths, batches) // to) * to
    steps = len(slots) / spec.gradient_accumulation
    return float(slots.sum()) / steps, float(lengths.sum()) / steps, spec.gradient_accumulation


def _foreseen_rate(run: Record, slots: float, tokens: float, micro_batches: int) -> float:
    """Real tokens/s of a run's rung where a step has so many slots, real tokens and micro-batches."""
    metrics = run["metrics"]
    host, device = ladder.host_and_device(metrics)
    fixed = min(metrics["limit"]["optimizer_seconds"], device)
    launching = host * micro_batches / run["spec"]["gradient_accumulation"]
    computing = fixed + (device - fixed) * slots / metrics["slots_per_step"]
    step = metrics["step_seconds"]["mean"] * max(launching, computing) / max(host, device)
    return tokens / step


def _error_on_other_data(ways: Sequence[_Way]) -> float | None:
    """Of each rung that has records on two corpora, one foreseen from the other: the largest relative error."""
    errors = []
    for one, other in itertools.permutations(ways, 2):
        if one.climb == other.climb and one.base.corpus != other.base.corpus:
            for name in one.climbed.keys() & other.climbed.keys():
                run, there = one.climbed[name], other.climbed[name]["metrics"]
                accumulation = other.climbed[name]["spec"]["gradient_accumulation"]
                rate = _foreseen_rate(run, there["slots_per_step"], there["tokens_per_step"], accumulation)
                errors.append(abs(rate / there["tokens_per_s"]["mean"] - 1))
    return max(errors, default=None)


def _recommend(rungs: Sequence[Foreseen], here: str) -> str:
    names = [rung.rung for rung in rungs]
    if here and here not in names:
        raise unknown_name("rung with a record", here, names)
    at = names.index(here) if here else 0
    stand, above = rungs[at], [rung for rung in rungs[at + 1 :] if rung.climb == rungs[at].climb]
    other = max((r for r in rungs if r.climb != stand.climb), key=lambda rung: rung.tokens_per_s, default=None)
    said = f"You stand at the top of {stand.climb}, '{stand.rung}'."
    if above:
        most, best = (max(above, key=key) for key in (lambda r: r.gain or 0.0, lambda r: r.tokens_per_s))
        said = (
            f"From '{stand.rung}', the rung that gains most is '{most.rung}': {most.gain:.2f} × the rung below it. "
            f"'{best.rung}' would run at {best.tokens_per_s:,.0f} real tokens/s, "
            f"{best.tokens_per_s / stand.tokens_per_s:.2f} × '{stand.rung}'."
        )
        if best.tokens_per_s < 1.05 * stand.tokens_per_s:
            said = f"Stay at '{stand.rung}': no rung above it gains 5 %."
    if other and other.tokens_per_s > 1.05 * max(rung.tokens_per_s for rung in (stand, *above)):
        rate = f"{other.tokens_per_s:,.0f} real tokens/s with '{other.rung}'"
        said += f" {other.climb.capitalize()} would reach {rate}, with fewer optimiser steps an epoch."
    return said
