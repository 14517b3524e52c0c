"""Time and memory of a micro-batch from its slots and Σ n²: three costs, small enough to check by hand.

    seconds = slot · work + pair · Σ n² + batch        peak bytes = slot · slots of the largest micro-batch + batch (what is always there)

work: slots; on a GPU less the output head's share for slots without a label, which TRL's fused loss skips there. A pair costs twice
what its FLOPs would in a slot, for strategies differ too little in Σ n² to fit it (LOG.md: the best of 1, 2 and 4 on one CPU run). The others are
fitted to records of measured runs by non-negative least squares on relative errors. Their error is the largest that appears when each strategy in
turn is left out and predicted from the others. Without records, FLOPs alone decide, and no error can be given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import linprog, nnls

from packlib.lab import models
from packlib.lab.strategies import STRATEGIES

PAIR_SLOWDOWN = 2.0  # FLOP/s taken for a slot's matrix products over those taken for attention


@dataclass(frozen=True)
class Costs:
    """Cost per slot, per pair of tokens (Σ n²) and per micro-batch, in seconds or bytes (uncalibrated: in FLOPs); `error` is relative.

    head: share of a slot's work that only a slot with a label costs.
    """

    slot: float
    pair: float
    batch: float
    error: float | None
    runs: int = 0
    head: float = 0.0

    def __call__(self, slots: np.ndarray | float, labelled: np.ndarray | float, pairs: np.ndarray | float, batches: float = 1.0) -> Any:
        return self.slot * ((1 - self.head) * slots + self.head * labelled) + self.pair * pairs + self.batch * batches


def comparable(runs: Sequence[Mapping[str, Any]], model: str | None = None) -> list[Mapping[str, Any]]:
    """Finished runs of our strategies that share model, depth, device, kernel and dtype, and had the device to themselves.

    Of several such groups the one of `model`, if there is one, then the one of most strategies, then the largest.
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for r in runs:
        if r["status"] == "ok" and STRATEGIES[r["spec"]["strategy"]].trl is None and r["environment"].get("concurrent_runs", 1) == 1:
            key = r["environment"]["device"], *(r["spec"].get(name) for name in ("model", "kernel", "dtype", "layers", "gradient_checkpointing"))
            groups.setdefault(key, []).append(r)

    def worth(group: list[Mapping[str, Any]]) -> tuple[bool, int, int]:
        return group[0]["spec"]["model"] == model, len({r["spec"]["strategy"] for r in group}), len(group)

    return max(groups.values(), key=worth, default=[])


def calibrate(runs: Sequence[Mapping[str, Any]], model: str) -> tuple[Costs, Costs]:
    """Costs of `model`, in seconds and in peak bytes.

    runs: records of status `ok` of one model, of at least three strategies (fewer calibrate nothing). Where it is another model than `model`,
    time is scaled by FLOPs and memory comes from a formula.
    """
    config = models.model_config(model)
    flops, pair_flops, head = models.flops_per_token(config), models.attention_flops_per_token(config, 1.0) / 2, _head_share(model, runs)
    names = [r["spec"]["strategy"] for r in runs]
    if len(set(names)) < 3:
        return Costs(flops, pair_flops, 0.0, None, head=head), _memory_by_formula(config, 4)
    other = runs[0]["spec"]["model"]
    time = replace(_fit_time(runs), head=head)
    with_memory = [r for r in runs if r["metrics"].get("peak_memory_bytes")]
    if other != model or len(with_memory) < len(runs):
        scale = models.model_config(other)
        slot = time.slot * flops / models.flops_per_token(scale)
        pair = time.pair * pair_flops * 2 / models.attention_flops_per_token(scale, 1.0)
        return replace(time, slot=slot, pair=pair), _memory_by_formula(config, 4)
    features = [(largest_batch(r), 1.0) for r in runs]
    return time, _fit(features, [r["metrics"]["peak_memory_bytes"] for r in runs], names)


def _fit_time(runs: Sequence[Mapping[str, Any]]) -> Costs:
    """Seconds; `slot` is the cost of a slot with a label, `pair` a fixed part of it."""
    spec = runs[0]["spec"]
    config = models.model_config(spec["model"], layers=spec.get("layers"))
    pair = PAIR_SLOWDOWN * models.attention_flops_per_token(config, 1.0) / 2 / models.flops_per_token(config)
    costs = Costs(1.0, pair, 0.0, None, head=_head_share(spec["model"], runs))
    features = [(costs(slots, labelled, pairs), batches) for slots, labelled, pairs, batches in map(time_features, runs)]
    seconds, names = np.array([undisturbed_step(r) for r in runs]), [r["spec"]["strategy"] for r in runs]
    _, turn = np.unique([f"{r['spec'].get('repeat', 0)} {r['spec'].get('corpus')}" for r in runs], return_inverse=True)
    pace = np.ones(len(runs))  # corpora and their repeats have their turns: a factor each, so that drift of the machine is not taken for a cost
    for _ in range(20):
        fitted = _fit(features, seconds / pace, names)
        log_ratio = np.log(seconds / [fitted.slot * work + fitted.batch * batches for work, batches in features])
        pace = np.exp((np.bincount(turn, log_ratio) / np.bincount(turn))[turn] - log_ratio.mean())
    return replace(fitted, pair=fitted.slot * pair, head=costs.head)


def _head_share(model: str, runs: Sequence[Mapping[str, Any]]) -> float:
    """TRL scores positions without a label too where there is no Triton, and so on a CPU."""
    if not runs or not runs[0]["environment"].get("cuda"):
        return 0.0
    count = models.parameter_count(models.model_config(model))
    return count.head / (count.active + count.head)


def time_features(run: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """Slots, slots with a label, Σ n² and micro-batches of the mean optimiser step on one rank."""
    spec, plan, metrics = run["spec"], run["plan"], run["metrics"]
    pairs = plan["attention_cost"] / plan["real_tokens"]
    if STRATEGIES[spec["strategy"]].contaminated:
        pairs = spec["max_tokens"]
    ranks, labelled = spec["world_size"], metrics["loss_tokens_per_s"]["mean"] * metrics["step_seconds"]["mean"]
    return metrics["slots_per_step"] / ranks, labelled / ranks, pairs * metrics["tokens_per_step"] / ranks, spec["gradient_accumulation"]


def undisturbed_step(run: Mapping[str, Any]) -> float:
    """Seconds of the mean measured step when nothing else runs: other work only ever slows a step, so the fast ones count.

    The line seconds = a + b · slots that a tenth of the measured steps lie under (quantile regression, Koenker and Bassett 1978), at the mean slots.
    """
    seconds, slots = (np.diff(run["trace"][name], prepend=0)[-run["metrics"]["measured_steps"] :] for name in ("seconds", "slots"))
    x, y, one = slots / slots.mean(), seconds / seconds.mean(), np.eye(len(slots))
    # y = a + b · x + above - below, all of them positive or 0
    line = linprog([0, 0, *0.1 * one.sum(0), *0.9 * one.sum(0)], A_eq=np.column_stack([np.ones(len(x)), x, one, -one]), b_eq=y)
    return float(seconds.mean() * (line.x[0] + line.x[1]))


def largest_batch(run: Mapping[str, Any]) -> float:
    """Slots of the largest micro-batch of a run (of the mean one of its largest step)."""
    steps = np.diff(run["trace"]["slots"], prepend=0)
    return steps.max() / run["spec"]["gradient_accumulation"] / run["spec"]["world_size"]


def _fit(features: Sequence[tuple[float, float]], values: Sequence[float], groups: Sequence[str]) -> Costs:
    """Non-negative least squares on relative errors, so that a slow strategy does not outweigh a fast one. features: slots and micro-batches."""
    x, names = np.array(features, dtype=float) / np.array(values, dtype=float)[:, None], np.array(groups)
    scale = x.max(axis=0)

    def solve(part: np.ndarray) -> np.ndarray:
        return nnls(part / scale, np.ones(len(part)))[0] / scale

    errors = [np.abs(x[names == name] @ solve(x[names != name]) - 1).max() for name in np.unique(names)]
    slot, batch = solve(x).tolist()
    return Costs(slot, 0.0, batch, error=float(max(errors)), runs=len(x))


def _memory_by_formula(config: Any, itemsize: int) -> Costs:
    """Weights, gradients and Adam's two moments; 17 activations of hidden size per layer and slot (2205.05198), three rows of logits."""
    count = models.parameter_count(config)
    per_slot = 17 * itemsize * config.num_hidden_layers * config.hidden_size + 3 * 4 * config.vocab_size
    return Costs(per_slot, 0.0, 4 * itemsize * count.total, None)


def held_out(runs: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Speed-ups over padding, measured (at `undisturbed_step`) and predicted from the other strategies' runs.

    Columns `corpus, strategy, measured, predicted, error`.

    Compares `comparable` runs of one corpus, batch size, capacity, accumulation and turn (`repeat`), then takes the mean over turns; empty without
    padding or with fewer than three other strategies.
    """
    rows, settings = [], ["corpus", "batch_size", "max_tokens", "gradient_accumulation", "world_size"]
    runs = comparable(runs)
    names = list(dict.fromkeys(r["spec"]["strategy"] for r in runs))
    for name in names if len(names) > 3 else ():
        costs = _fit_time([r for r in runs if r["spec"]["strategy"] != name])
        turns: dict[tuple, dict[str, list[tuple[float, float]]]] = {}
        for r in runs:
            tokens, turn = r["metrics"]["tokens_per_step"], (*(r["spec"][key] for key in settings), r["spec"].get("repeat", 0))
            rates = turns.setdefault(turn, {}).setdefault(r["spec"]["strategy"], [])
            rates.append((tokens / undisturbed_step(r), tokens / costs(*time_features(r))))
        for turn, rates in turns.items():
            if name != "padding" and "padding" in rates and name in rates:
                rows.append((*turn, name, *np.mean(rates[name], axis=0) / np.mean(rates["padding"], axis=0)))
    table = pd.DataFrame(rows, columns=[*settings, "repeat", "strategy", "measured", "predicted"])
    table = table.groupby([*settings, "strategy"], sort=False, as_index=False)[["measured", "predicted"]].mean()
    return table[["corpus", "strategy", "measured", "predicted"]].assign(error=table["predicted"] / table["measured"] - 1)
