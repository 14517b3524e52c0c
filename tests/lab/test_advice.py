import json
from dataclasses import asdict

import numpy as np
import pytest

from packlib import __main__
from packlib.lab import advice, costs, models
from packlib.lab.advice import advise
from packlib.lab.strategies import STRATEGIES, plan_for

TAIL = np.random.default_rng(0).lognormal(np.log(200) - 0.5, 1.0, 2000).clip(2, 1024).astype(int)
NARROW = np.random.default_rng(0).normal(120, 20, 2000).clip(2, 1024).astype(int)
CONFIG = models.model_config("tiny-llama")
PAIR = costs.PAIR_SLOWDOWN * models.attention_flops_per_token(CONFIG, 1.0) / 2 / models.flops_per_token(CONFIG)
TRUE = {"slot": 1e-4, "pair": 1e-4 * PAIR, "batch": 0.02, "resident": 5e8, "per_slot": 1e5}


def record(strategy, lengths, *, noise=0.0, model="tiny-llama", batch_size=4, max_tokens=1024, cost=TRUE):
    """A record as a machine with exactly these costs would leave it (plus relative noise on the time)."""
    kind = STRATEGIES[strategy]
    plan = plan_for(kind, lengths, batch_size=batch_size, max_tokens=max_tokens, seed=1)
    report = plan.report(lengths, kind.layout).to_dict()
    rows = np.arange(0, len(plan), kind.rows_per_batch(batch_size))
    size = plan.stop - plan.start
    slots = np.maximum.reduceat(size, plan.row_splits[:-1]) * plan.row_examples if kind.layout == "padded" else plan.row_lengths
    pairs = plan.row_lengths**2 if kind.contaminated else plan.row_costs()
    slots, pairs, real, labelled = (np.add.reduceat(x, rows) for x in (slots, pairs, plan.row_lengths, plan.row_lengths - plan.row_examples))
    count = models.parameter_count(models.model_config(model))
    head = count.head / (count.active + count.head)
    seconds = cost["slot"] * ((1 - head) * slots + head * labelled) + cost["pair"] * pairs + cost["batch"]
    return {
        "status": "ok",
        "spec": {"model": model, "strategy": strategy, "batch_size": batch_size, "max_tokens": max_tokens, "gradient_accumulation": 1,
                 "world_size": 1, "corpus": f"of {lengths.sum()} tokens"},
        "environment": {"device": "a machine", "cuda": "13.0"},
        "plan": report,
        "metrics": {
            "step_seconds": {"mean": seconds.mean() * (1 + noise)}, "slots_per_step": slots.mean(), "tokens_per_step": real.mean(),
            "loss_tokens_per_s": {"mean": labelled.sum() / seconds.sum() / (1 + noise)},
            "tokens_per_s": {"mean": real.sum() / seconds.sum() / (1 + noise)}, "flops_per_token": 12e6 + 6 * 192 * 4096,
            "peak_memory_bytes": int(cost["resident"] + cost["per_slot"] * slots.max()), "measured_steps": len(slots),
        },
        "trace": {"slots": np.cumsum(slots).tolist(), "seconds": np.cumsum(seconds * (1 + noise)).tolist()},
    }  # fmt: skip


OURS = [name for name, strategy in STRATEGIES.items() if strategy.trl is None]
RUNS = [record(name, lengths) for lengths in (TAIL, NARROW) for name in OURS]


def test_predictions_recover_a_machine_that_obeys_the_model():
    found = {p.strategy: p for p in advise(TAIL, max_tokens=1024, runs=RUNS).strategies}
    rates = {r["spec"]["strategy"]: r["metrics"]["tokens_per_s"]["mean"] for r in RUNS[: len(OURS)]}
    for name in OURS:
        assert found[name].speed_up == pytest.approx(rates[name] / rates["padding"], rel=0.05), name
        assert found[name].speed_up_error < 0.2  # the fast steps of this machine are those with less Σ n², and strategies differ in that
    assert found["multipack_posid"].speed_up > 1.5 * found["padding"].speed_up
    peak = TRUE["resident"] + TRUE["per_slot"] * 4096
    assert found["fixed_length_packing_posid"].peak_memory_bytes == pytest.approx(peak, rel=0.01)
    assert found["fixed_length_packing_posid"].peak_memory_error < 0.01


def test_the_error_covers_what_the_model_does_not_explain():
    rng = np.random.default_rng(1)
    noisy = [record(name, lengths, noise=rng.uniform(-0.1, 0.1)) for lengths in (TAIL, NARROW) for name in OURS]
    found = advise(TAIL, max_tokens=1024, runs=noisy).strategies
    truth = {r["spec"]["strategy"]: r["metrics"]["tokens_per_s"]["mean"] for r in RUNS[: len(OURS)]}
    assert found[1].speed_up_error > 0.08
    for p in found[1:]:
        assert abs(p.speed_up / (truth[p.strategy] / truth["padding"]) - 1) < p.speed_up_error


def test_held_out_strategies_are_predicted_from_the_others():
    runs = [r | {"spec": r["spec"] | {"corpus": corpus}} for r, corpus in zip(RUNS, ["tail"] * len(OURS) + ["narrow"] * len(OURS))]
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
    assert costs.comparable([*RUNS[:2], *[r | {"spec": r["spec"] | {"model": "phi-2"}} for r in RUNS]], "tiny-llama") == RUNS[:2]
    assert costs.comparable([]) == []


def test_a_machine_with_another_balance_gives_another_answer():
    """Negative control: where only fixed costs count, filling rows pays and packing mini-batches does not."""
    idle = {**TRUE, "slot": 1e-8, "pair": 0.0, "batch": 1.0}
    found = {p.strategy: p for p in advise(TAIL, max_tokens=1024, runs=[record(n, TAIL, cost=idle) for n in OURS]).strategies}
    assert found["minibatch_packing"].speed_up == pytest.approx(1, abs=0.02)
    assert found["multipack_posid"].speed_up > 3


def test_recommendations():
    assert advise(TAIL, runs=RUNS, max_tokens=1024).recommendation.startswith("Pack your mini-batches")
    same = np.full(500, 128)
    assert advise(same, max_tokens=128).recommendation.startswith("Do not pack: padding spends 1.00 slots on a token")
    assert "not worth it" in advise(same, max_tokens=1024, runs=RUNS).recommendation
    assert "group by length gets" in advise(NARROW, max_tokens=1024).recommendation


def test_without_records_it_says_that_it_guesses():
    found = advise(TAIL, max_tokens=1024, model="mistral-7b")
    assert any("their error is unknown" in note for note in found.notes)
    assert all(p.speed_up_error is None for p in found.strategies[1:])
    assert "± ?" in str(found)


def test_extrapolation_is_stated():
    def extrapolating(**options):
        return "".join(note for note in advise(TAIL, runs=RUNS, **options).notes if note.startswith("Extrapolating"))

    assert extrapolating(max_tokens=1024) == ""
    assert "max_tokens 2,048 is above the 1,024 measured" in extrapolating(max_tokens=2048)
    assert "world size 8 is above the 1 measured" in extrapolating(max_tokens=1024, world_size=8)
    assert "llama-2-7b was not measured" in extrapolating(max_tokens=1024, model="llama-2-7b")
    wide = np.where(np.arange(2000) % 16, 8, 1024)
    assert "padding's waste of" in "".join(advise(wide, runs=RUNS, max_tokens=1024).notes)


def test_notes_count_what_is_lost_and_the_steps():
    found = advise(np.append(TAIL, 3000), max_tokens=1024)
    lost = 3000 - 1024
    assert found.notes[0].startswith("1 examples (0.0%) are longer than 1,024 tokens")
    assert f"{lost / (TAIL.sum() + 3000):.1%} of the tokens" in found.notes[0]
    assert any("optimiser steps an epoch" in note and "√" in note for note in found.notes)
    padding = found.strategies[0]
    assert padding.optimizer_steps == -(-2001 // 4)
    assert advise(TAIL, max_tokens=1024, world_size=2, gradient_accumulation=5).strategies[0].optimizer_steps == 50


def test_lost_by_capacity_is_what_truncation_loses():
    shares = advice.lost_by_capacity(np.array([100, 300, 1000]))
    assert shares == {128: pytest.approx((172 + 872) / 1400), 256: pytest.approx((44 + 744) / 1400), 512: pytest.approx(488 / 1400), 1024: 0.0}


def test_histogram_counts_every_example():
    facts = advice.describe(TAIL)
    assert sum(n for _, n, _ in facts["histogram"]) == len(TAIL)
    assert sum(share for _, _, share in facts["histogram"]) == pytest.approx(1)
    assert len(advice.text_histogram(facts["histogram"])) == len(facts["histogram"])
    assert advice.describe(np.array([5, 5]))["histogram"] == [(5, 2, 1.0)]


def test_bad_lengths_are_refused_as_the_planners_do():
    with pytest.raises(ValueError, match=r"lengths\[1\] = 0"):
        advise([3, 0])
    with pytest.raises(ValueError, match=r"lengths has shape \[0\]"):
        advise([])


@pytest.fixture
def corpus(tmp_path):
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
    rng = np.random.default_rng(0)
    path = tmp_path / "data.jsonl"
    texts = [" ".join(rng.choice(words, int(n))) for n in rng.lognormal(3, 1, 300).clip(2, 300)]
    path.write_text("\n".join(json.dumps({"prompt": "say", "response": text}) for text in texts))
    return path


def test_command_prints_text_and_json(corpus, capsys):
    assert __main__.main(["advise", str(corpus), "--max-tokens", "256", "--model", "tiny-llama", "--records", "no-such-run"]) == 0
    text = capsys.readouterr().out
    assert "MiniBatchPacking + PosID" in text
    assert "tokens lost by truncating at" in text
    assert __main__.main(["advise", str(corpus), "--max-tokens", "256", "--model", "tiny-llama", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recommendation"] in text or found["notes"]
    assert [p["strategy"] for p in found["strategies"]] == OURS
    assert set(found) == {"corpus", "tokenizer", "batch_size", "max_tokens", "gradient_accumulation", "world_size", "model"} | set(
        asdict(advise(TAIL))
    )


def test_command_reports_an_unknown_corpus(capsys):
    assert __main__.main(["advise", "no-such-corpus"]) == 1
    assert "no-such-corpus" in capsys.readouterr().err


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
    run = {"metrics": {"measured_steps": 30}, "trace": {"slots": slots.cumsum().tolist(), "seconds": seconds.cumsum().tolist()}}
    assert costs.undisturbed_step(run) == pytest.approx(0.1 + 1e-4 * 2000), "on the line through steps of several sizes"
    slowed = np.where(np.arange(30) < 20, 1.5 * seconds, seconds)
    assert costs.undisturbed_step(run | {"trace": run["trace"] | {"seconds": slowed.cumsum().tolist()}}) == pytest.approx(0.3)


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
