"""Costs: fitted to a machine that obeys the model they are its own; what is disturbed or not comparable is left out."""

import numpy as np
import pytest

from packlib.lab import costs, models
from packlib.lab.strategies import STRATEGIES
from tests.lab.made_runs import BYTES, OURS, PAIR, RUNS, SECONDS, TAIL, head_share, record


def test_calibration_finds_the_costs_of_the_machine():
    time, memory = costs.calibrate(RUNS, "tiny-llama")
    assert time.cost.per_slot == pytest.approx(SECONDS.per_slot, rel=0.1)
    assert time.cost.per_pair == pytest.approx(time.cost.per_slot * PAIR)
    assert time.cost.head == head_share("tiny-llama") and time.runs == memory.runs == len(RUNS)
    assert (memory.cost.per_slot, memory.cost.per_batch) == pytest.approx((BYTES.per_slot, BYTES.per_batch), rel=0.01)
    once, twice = (costs.calibrate([record(n, TAIL, noise=x) for n in OURS], "tiny-llama")[0] for x in (0.0, 1.0))
    assert twice.cost.per_slot == pytest.approx(2 * once.cost.per_slot), "the negative control"


def test_another_model_is_scaled_by_its_operations():
    own, _ = costs.calibrate(RUNS, "tiny-llama")
    other, memory = costs.calibrate(RUNS, "llama-2-7b")
    big, small = (models.flops_per_token(models.model_config(name)) for name in ("llama-2-7b", "tiny-llama"))
    assert other.cost.per_slot == pytest.approx(own.cost.per_slot * big / small)
    assert other.cost.per_batch == own.cost.per_batch and other.error == own.error and memory.error is None


def test_few_strategies_calibrate_nothing():
    time, memory = costs.calibrate(RUNS[:2], "tiny-llama")
    assert time.error is None and memory.error is None and time.runs == 0
    assert time.cost.per_slot == models.flops_per_token(models.model_config("tiny-llama")), "operations decide alone"


@pytest.mark.parametrize("name", OURS)
def test_features_of_a_run_are_those_of_its_mean_step(name):
    run = next(run for run in RUNS if run["spec"]["strategy"] == name)
    slots, labelled, pairs, batches = costs.time_features(run)
    metrics, plan = run["metrics"], run["plan"]
    assert slots == metrics["slots_per_step"] and batches == 1
    assert labelled == pytest.approx(plan["loss_tokens"] / metrics["measured_steps"], rel=0.02)
    per_token = 1024 if STRATEGIES[name].contaminated else plan["attention_cost"] / plan["real_tokens"]
    assert pairs == pytest.approx(per_token * metrics["tokens_per_step"])
    assert costs.time_features(run | {"spec": run["spec"] | {"world_size": 2}})[0] == slots / 2


def test_held_out_strategies_are_predicted_from_the_others():
    runs = [
        r | {"spec": r["spec"] | {"corpus": corpus}}
        for r, corpus in zip(RUNS, ["tail"] * len(OURS) + ["narrow"] * len(OURS))
    ]
    table = costs.held_out(runs)
    assert sorted(table["strategy"]) == sorted([name for name in OURS if name != "padding"] * 2)
    assert table["error"].abs().max() < 0.16  # the fast steps of this machine are those with less Σ n²
    slow = [r | {"trace": r["trace"] | {"seconds": [100 * s for s in r["trace"]["seconds"]]}} for r in runs]
    broken = [s if r["spec"]["strategy"] == "multipack_posid" else r for r, s in zip(runs, slow)]
    errors = costs.held_out(broken).groupby("strategy")["error"].max()
    assert errors["multipack_posid"] > 1
    assert errors.drop("multipack_posid").abs().max() < 0.08
    assert costs.held_out(runs[:3]).empty


def test_only_comparable_runs_calibrate():
    other = [r | {"spec": r["spec"] | {"kernel": "transformers_sdpa"}} for r in RUNS[:3]]
    peers = [r | {"spec": r["spec"] | {"strategy": "trl_padding"}} for r in RUNS[:1]]
    failed = [r | {"status": "oom"} for r in RUNS[:1]]
    assert costs.comparable([*other, *peers, *failed, *RUNS]) == RUNS
    assert (
        costs.comparable([*RUNS[:2], *[r | {"spec": r["spec"] | {"model": "phi-2"}} for r in RUNS]], "tiny-llama")
        == RUNS[:2]
    )
    assert costs.comparable([]) == []


def test_a_disturbed_step_does_not_count():
    run = record("fixed_length_packing_posid", TAIL)
    steps = np.diff(run["trace"]["seconds"], prepend=0)
    steps[0] *= 50
    disturbed = run | {"trace": run["trace"] | {"seconds": np.cumsum(steps).tolist()}}
    assert costs.undisturbed_step(disturbed) == pytest.approx(costs.undisturbed_step(run), rel=0.05)
    slower = run | {"trace": run["trace"] | {"seconds": [2 * s for s in run["trace"]["seconds"]]}}
    assert costs.undisturbed_step(slower) == pytest.approx(2 * costs.undisturbed_step(run))


def test_a_mostly_disturbed_run_is_timed_by_its_quiet_steps():
    slots = np.tile([1000, 3000, 2000, 1500, 2500], 6)
    seconds = 0.1 + 1e-4 * slots
    run = {
        "metrics": {"measured_steps": 30},
        "trace": {"slots": slots.cumsum().tolist(), "seconds": seconds.cumsum().tolist()},
    }
    assert costs.undisturbed_step(run) == pytest.approx(0.1 + 1e-4 * 2000), "on the line through steps of several sizes"
    slowed = np.where(np.arange(30) < 20, 1.5 * seconds, seconds)
    assert costs.undisturbed_step(
        run | {"trace": run["trace"] | {"seconds": slowed.cumsum().tolist()}}
    ) == pytest.approx(0.3)


def test_a_slow_turn_is_not_taken_for_a_cost():
    """Everything half as fast in a later turn changes no speed-up, measured or predicted; one slow arm in it does."""
    later = [r | {"spec": r["spec"] | {"repeat": 1}} for r in (record(name, TAIL, noise=1.0) for name in OURS)]
    once, twice = costs.held_out(RUNS), costs.held_out([*RUNS, *later])
    assert twice["measured"].tolist() == pytest.approx(once["measured"].tolist())
    assert twice["predicted"].tolist() == pytest.approx(once["predicted"].tolist(), rel=0.02)
    mixed = costs.held_out([*RUNS, *later[:-1], record(OURS[-1], TAIL) | {"spec": later[-1]["spec"]}])
    assert mixed["measured"].iloc[-2:].max() > 1.2 * once["measured"].iloc[-2:].max()


def test_runs_that_shared_the_device_do_not_calibrate():
    shared = [r | {"environment": r["environment"] | {"concurrent_runs": 5}} for r in RUNS]
    assert costs.comparable(shared) == [] and costs.comparable([*shared, RUNS[0]]) == RUNS[:1]


def test_more_strategies_calibrate_before_more_runs():
    deep = [r | {"spec": r["spec"] | {"layers": 1}} for r in RUNS[:2] * 20]
    assert costs.comparable([*deep, *RUNS]) == RUNS
