"""Time and memory of a micro-batch from its slots and Σ n²: three costs, small enough to check by hand.

    seconds = per_slot · work + per_pair · Σ n² + per_batch          (`packlib.plans.CostModel`)
    peak bytes = per_slot · slots of the largest micro-batch + per_batch (what is always there)

work: slots; on a GPU less the output head's share for slots without a label, which TRL's fused loss skips there. A pair
costs twice what its FLOPs would in a slot, for strategies differ too little in Σ n² to fit it (LOG.md: the best of 1, 2
and 4 on one CPU run). The others are fitted to records of measured runs by non-negative least squares on relative
errors. Their error is the largest that appears when each strategy in turn is left out and predicted from the others.
Without records, FLOPs alone decide, and no error can be given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import linprog, nnls

from packlib.lab import models
from packlib.lab.records import had_device_alone
from packlib.lab.strategies import STRATEGIES
from packlib.plans import CostModel

Record = Mapping[str, Any]
PAIR_SLOWDOWN = 2.0  # FLOP/s taken for a slot's matrix products over those taken for attention
SETTING = ["corpus", "batch_size", "max_tokens", "gradient_accumulation", "world_size"]  # what compared runs share


@dataclass(frozen=True)
class Calibration:
    """Costs of a micro-batch in seconds or bytes (uncalibrated: FLOPs), their relative error, the runs behind them."""

    cost: CostModel
    error: float | None = None
    runs: int = 0


def comparable(runs: Sequence[Record], model: str | None = None) -> list[Record]:
    """Finished runs of our strategies that share model, depth, device, kernel, dtype and rig, and had the device alone.

    Of several such groups the one of `model`, if there is one, then the one of most strategies, then the largest.
    """
    groups: dict[tuple, list[Record]] = {}
    for run in runs:
        spec = run["spec"]
        if run["status"] == "ok" and STRATEGIES[spec["strategy"]].trl is None and had_device_alone(run):
            rig = str(sorted(spec.get("rig", {}).items()))
            shared = (spec.get(name) for name in ("model", "kernel", "dtype", "layers"))
            groups.setdefault((run["environment"]["device"], *shared, rig), []).append(run)

    def worth(group: list[Record]) -> tuple[bool, int, int]:
        return group[0]["spec"]["model"] == model, len({run["spec"]["strategy"] for run in group}), len(group)

    return max(groups.values(), key=worth, default=[])


def calibrate(runs: Sequence[Record], model: str) -> tuple[Calibration, Calibration]:
    """Costs of `model`, in seconds and in peak bytes.

    runs: records of status `ok` of one model, of at least three strategies (fewer calibrate nothing). Where it is
    another model than `model`, time is scaled by FLOPs and memory comes from a formula.
    """
    config = models.model_config(model)
    flops, pair_flops = models.flops_per_token(config), models.attention_flops_per_token(config, 1.0) / 2
    head = _head_share(model, runs)
    names = [run["spec"]["strategy"] for run in runs]
    if len(set(names)) < 3:
        return Calibration(CostModel(flops, pair_flops, 0.0, head)), _memory_by_formula(config, 4)
    time = _fit_time(runs, np.array([undisturbed_step(run) for run in runs]))
    time = replace(time, cost=replace(time.cost, head=head))
    other = runs[0]["spec"]["model"]
    with_memory = [run for run in runs if run["metrics"].get("peak_memory_bytes")]
    if other != model or len(with_memory) < len(runs):
        measured = models.model_config(other)
        scaled = replace(
            time.cost,
            per_slot=time.cost.per_slot * flops / models.flops_per_token(measured),
            per_pair=time.cost.per_pair * pair_flops * 2 / models.attention_flops_per_token(measured, 1.0),
        )
        return replace(time, cost=scaled), _memory_by_formula(config, 4)
    features = [(largest_batch(run), 1.0) for run in runs]
    return time, _fit(features, [run["metrics"]["peak_memory_bytes"] for run in runs], names)


def _fit_time(runs: Sequence[Record], seconds: np.ndarray) -> Calibration:
    """`per_slot` is the cost of a slot with a label, `per_pair` a fixed part of it. seconds: each undisturbed step."""
    spec = runs[0]["spec"]
    config = models.model_config(spec["model"], layers=spec.get("layers"))
    pair = PAIR_SLOWDOWN * models.attention_flops_per_token(config, 1.0) / 2 / models.flops_per_token(config)
    work = CostModel(1.0, pair, 0.0, _head_share(spec["model"], runs))  # in units of one slot
    features = []
    for run in runs:
        slots, labelled, pairs, batches = time_features(run)
        features.append((work(slots, labelled=labelled, pairs=pairs), batches))
    names = [run["spec"]["strategy"] for run in runs]
    # Corpora and their repeats have their turns: a factor each, so that the machine's drift is not taken for a cost.
    _, turn = np.unique([f"{r['spec'].get('repeat', 0)} {r['spec'].get('corpus')}" for r in runs], return_inverse=True)
    pace = np.ones(len(runs))
    for _ in range(20):
        fitted = _fit(features, seconds / pace, names)
        predicted = [fitted.cost.per_slot * slots + fitted.cost.per_batch * batches for slots, batches in features]
        log_ratio = np.log(seconds / predicted)
        pace = np.exp((np.bincount(turn, log_ratio) / np.bincount(turn))[turn] - log_ratio.mean())
    cost = replace(fitted.cost, per_pair=fitted.cost.per_slot * pair, head=work.head)
    return replace(fitted, cost=cost)


def _head_share(model: str, runs: Sequence[Record]) -> float:
    """TRL scores positions without a label too where there is no Triton, and so on a CPU."""
    if not runs or not runs[0]["environment"].get("cuda"):
        return 0.0
    count = models.parameter_count(models.model_config(model))
    return count.head / (count.active + count.head)


def time_features(run: Record) -> tuple[float, float, float, float]:
    """Slots, slots with a label, Σ n² and micro-batches of the mean optimiser step on one rank."""
    spec, plan, metrics = run["spec"], run["plan"], run["metrics"]
    contaminated = STRATEGIES[spec["strategy"]].contaminated
    pairs_per_token = spec["max_tokens"] if contaminated else plan["attention_cost"] / plan["real_tokens"]
    ranks, labelled = spec["world_size"], metrics["loss_tokens_per_s"]["mean"] * metrics["step_seconds"]["mean"]
    pairs = pairs_per_token * metrics["tokens_per_step"]
    return metrics["slots_per_step"] / ranks, labelled / ranks, pairs / ranks, spec["gradient_accumulation"]


def undisturbed_step(run: Record) -> float:
    """Seconds of the mean measured step when nothing else runs: other work only ever slows a step, the fast ones count.

    The line seconds = a + b · slots that a tenth of the measured steps lie under (quantile regression, Koenker and
    Bassett 1978), at the mean slots.
    """
    measured = slice(-run["metrics"]["measured_steps"], None)
    seconds, slots = (np.diff(run["trace"][name], prepend=0)[measured] for name in ("seconds", "slots"))
    x, y, one = slots / slots.mean(), seconds / seconds.mean(), np.eye(len(slots))
    # y = a + b · x + above - below, all of them positive or 0
    weights = [0, 0, *0.1 * one.sum(0), *0.9 * one.sum(0)]
    line = linprog(weights, A_eq=np.column_stack([np.ones(len(x)), x, one, -one]), b_eq=y)
    return float(seconds.mean() * (line.x[0] + line.x[1]))


def largest_batch(run: Record) -> float:
    """Slots of the largest micro-batch of a run (of the mean one of its largest step)."""
    steps = np.diff(run["trace"]["slots"], prepend=0)
    return steps.max() / run["spec"]["gradient_accumulation"] / run["spec"]["world_size"]


def _fit(
    features: Sequence[tuple[float, float]], values: Sequence[float] | np.ndarray, groups: Sequence[str]
) -> Calibration:
    """Non-negative least squares on relative errors, so that a slow strategy does not outweigh a fast one.

    features: slots and micro-batches of each run.
    """
    x, names = np.array(features, dtype=float) / np.array(values, dtype=float)[:, None], np.array(groups)
    scale = x.max(axis=0)

    def solve(part: np.ndarray) -> np.ndarray:
        return nnls(part / scale, np.ones(len(part)))[0] / scale

    errors = [np.abs(x[names == name] @ solve(x[names != name]) - 1).max() for name in np.unique(names)]
    slot, batch = solve(x).tolist()
    return Calibration(CostModel(slot, 0.0, batch), error=float(max(errors)), runs=len(x))


def _memory_by_formula(config: Any, itemsize: int) -> Calibration:
    """Weights, gradients, Adam's two moments; 17 activations of hidden size a layer and slot (2205.05198); 3 logits."""
    count = models.parameter_count(config)
    per_slot = 17 * itemsize * config.num_hidden_layers * config.hidden_size + 3 * 4 * config.vocab_size
    return Calibration(CostModel(per_slot, 0.0, 4 * itemsize * count.total))


def held_out(runs: Sequence[Record]) -> pd.DataFrame:
    """Speed-ups over padding, measured (at `undisturbed_step`) and predicted from the other strategies' runs.

    Columns `corpus, strategy, measured, predicted, error`. Compares `comparable` runs of one setting and turn
    (`repeat`), then takes the mean over turns; empty without padding or with fewer than three other strategies.
    """
    runs = comparable(runs)
    seconds = np.array([undisturbed_step(run) for run in runs])
    names = list(dict.fromkeys(run["spec"]["strategy"] for run in runs))
    left_out = [name for name in names if name != "padding" and len(names) > 3]
    rows = [row for name in left_out for row in _predicted_turns(runs, seconds, name)]
    table = pd.DataFrame(rows, columns=[*SETTING, "strategy", "measured", "predicted"])
    means = table.groupby([*SETTING, "strategy"], sort=False, as_index=False)[["measured", "predicted"]].mean()
    means["error"] = means["predicted"] / means["measured"] - 1
    return means[["corpus", "strategy", "measured", "predicted", "error"]]


def _predicted_turns(runs: Sequence[Record], seconds: np.ndarray, name: str) -> list[tuple]:
    """Of each turn that has padding and `name`: the setting, `name`, its speed-up measured and predicted without it."""
    is_other = np.array([run["spec"]["strategy"] != name for run in runs])
    others = [run for run in runs if run["spec"]["strategy"] != name]
    cost = _fit_time(others, seconds[is_other]).cost
    turns: dict[tuple, dict[str, list[tuple[float, float]]]] = {}
    for run, measured in zip(runs, seconds):
        slots, labelled, pairs, batches = time_features(run)
        predicted = cost(slots, labelled=labelled, pairs=pairs, batches=batches)
        turn = (*(run["spec"][key] for key in SETTING), run["spec"].get("repeat", 0))
        rates = turns.setdefault(turn, {}).setdefault(run["spec"]["strategy"], [])
        tokens = run["metrics"]["tokens_per_step"]
        rates.append((tokens / measured, tokens / predicted))
    return [
        (*turn[:-1], name, *np.mean(rates[name], axis=0) / np.mean(rates["padding"], axis=0))
        for turn, rates in turns.items()
        if "padding" in rates and name in rates
    ]
