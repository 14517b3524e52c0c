"""Records as a machine would leave them whose times and memory follow exactly from known costs."""

from dataclasses import asdict, replace

import numpy as np

from packlib.lab import costs, models
from packlib.lab.runs.spec import RunSpec
from packlib.lab.strategies import STRATEGIES, plan_for
from packlib.plans import CostModel

TAIL = np.random.default_rng(0).lognormal(np.log(200) - 0.5, 1.0, 2000).clip(2, 1024).astype(int)
NARROW = np.random.default_rng(0).normal(120, 20, 2000).clip(2, 1024).astype(int)
CONFIG = models.model_config("tiny-llama")
PAIR = costs.PAIR_SLOWDOWN * models.attention_flops_per_token(CONFIG, 1.0) / 2 / models.flops_per_token(CONFIG)
SECONDS = CostModel(per_slot=1e-4, per_pair=1e-4 * PAIR, per_batch=0.02)
BYTES = CostModel(per_slot=1e5, per_pair=0.0, per_batch=5e8)
OURS = [name for name, strategy in STRATEGIES.items() if strategy.trl is None]


def head_share(model: str) -> float:
    """The output head's share of a token's work."""
    count = models.parameter_count(models.model_config(model))
    return count.head / (count.active + count.head)


def record(strategy, lengths, *, noise=0.0, model="tiny-llama", seconds=SECONDS):
    """A run on a GPU with these costs, and relative noise on its times: mini-batches of 4, or rows of 1024 tokens."""
    kind = STRATEGIES[strategy]
    plan = plan_for(kind, lengths, batch_size=4, max_tokens=1024, seed=1)
    # 1. Slots, pairs, real and labelled tokens of each row, then of each micro-batch.
    slots = plan.row_lengths
    if kind.layout == "padded":
        slots = np.maximum.reduceat(plan.stop - plan.start, plan.row_splits[:-1]) * plan.row_examples
    pairs = plan.row_lengths**2 if kind.contaminated else plan.row_costs()
    rows = np.arange(0, len(plan), kind.rows_per_batch(4))
    columns = (slots, pairs, plan.row_lengths, plan.row_lengths - plan.row_examples)
    slots, pairs, real, labelled = (np.add.reduceat(column, rows) for column in columns)
    # 2. What a machine with these costs takes.
    cost = replace(seconds, head=head_share(model))
    times = cost(slots, pairs=pairs, labelled=labelled) * (1 + noise)
    sizes = {"batch_size": 4, "max_tokens": 1024, "gradient_accumulation": 1}
    spec = RunSpec(model=model, strategy=strategy, corpus=f"of {lengths.sum()} tokens", **sizes)
    metrics = {
        "measured_steps": len(slots),
        "step_seconds": {"mean": times.mean()},
        "slots_per_step": slots.mean(),
        "tokens_per_step": real.mean(),
        "tokens_per_s": {"mean": real.sum() / times.sum()},
        "loss_tokens_per_s": {"mean": labelled.sum() / times.sum()},
        "peak_memory_bytes": int(BYTES(slots.max(), pairs=0)),
    }
    return {
        "run_id": f"{spec.spec_id}-{noise}",
        "status": "ok",
        "error": None,
        "spec": asdict(spec),
        "environment": {"device": "a machine", "cuda": "13.0"},
        "plan": plan.report(lengths, kind.layout).to_dict(),
        "metrics": metrics,
        "trace": {"slots": np.cumsum(slots).tolist(), "seconds": np.cumsum(times).tolist()},
    }


RUNS = [record(name, lengths) for lengths in (TAIL, NARROW) for name in OURS]
