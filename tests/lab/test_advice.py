"""Advice on a machine whose costs are known: what it predicts, recommends, and says of its own limits."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from packlib import __main__
from packlib.lab import advice
from packlib.lab.advice import advise
from packlib.plans import CostModel
from tests.lab.made_runs import BYTES, NARROW, OURS, RUNS, TAIL, record


def test_predictions_recover_a_machine_that_obeys_the_model():
    found = {p.strategy: p for p in advise(TAIL, max_tokens=1024, runs=RUNS).strategies}
    rates = {r["spec"]["strategy"]: r["metrics"]["tokens_per_s"]["mean"] for r in RUNS[: len(OURS)]}
    for name in OURS:
        assert found[name].speed_up == pytest.approx(rates[name] / rates["padding"], rel=0.05), name
        assert (
            found[name].speed_up_error < 0.2
        )  # the fast steps of this machine are those with less Σ n², and strategies differ in that
    assert found["multipack_posid"].speed_up > 1.5 * found["padding"].speed_up
    peak = BYTES(4096, pairs=0)
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


def test_a_machine_with_another_balance_gives_another_answer():
    """Negative control: where only fixed costs count, filling rows pays and packing mini-batches does not."""
    idle = CostModel(per_slot=1e-8, per_pair=0.0, per_batch=1.0)
    found = {
        p.strategy: p
        for p in advise(TAIL, max_tokens=1024, runs=[record(n, TAIL, seconds=idle) for n in OURS]).strategies
    }
    assert found["minibatch_packing"].speed_up == pytest.approx(1, abs=0.02)
    assert found["multipack_posid"].speed_up > 3


def test_recommendations():
    assert advise(TAIL, runs=RUNS, max_tokens=1024).recommendation.startswith("Pack your mini-batches")
    same = np.full(500, 128)
    assert advise(same, max_tokens=128).recommendation.startswith("Do not pack: padding spends 1.00 slots on a token")
    assert "not worth it" in advise(same, max_tokens=1024, runs=RUNS).recommendation
    assert "group by length gets" in advise(NARROW, max_tokens=1024).recommendation


def test_fuller_batches_are_told_where_mini_batches_are_within_the_error():
    found = {p.strategy: p for p in advise(TAIL, max_tokens=1024, runs=RUNS).strategies}
    found["minibatch_packing"] = replace(found["minibatch_packing"], speed_up=1.2, speed_up_error=0.3)
    told = {}
    for multi in (3.0, 1.3):
        found["multipack_posid"] = replace(found["multipack_posid"], speed_up=multi, speed_up_error=0.3)
        told[multi] = advice._recommend(list(found.values()))
    assert all(said.startswith("Mini-batch packing is probably not worth it") for said in told.values())
    assert "Fuller batches are beyond it: multipack 3.00 ×" in told[3.0] and "Fuller" not in told[1.3]


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
    assert shares == {
        128: pytest.approx((172 + 872) / 1400),
        256: pytest.approx((44 + 744) / 1400),
        512: pytest.approx(488 / 1400),
        1024: 0.0,
    }


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
    assert (
        __main__.main(
            ["advise", str(corpus), "--max-tokens", "256", "--model", "tiny-llama", "--records", str(corpus.parent)]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "MiniBatchPacking + PosID" in text
    assert "tokens lost by truncating at" in text
    assert __main__.main(["advise", str(corpus), "--max-tokens", "256", "--model", "tiny-llama", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recommendation"] in text or found["notes"]
    assert [p["strategy"] for p in found["strategies"]] == OURS
    assert set(found) == {
        "corpus",
        "tokenizer",
        "batch_size",
        "max_tokens",
        "gradient_accumulation",
        "world_size",
        "model",
    } | set(asdict(advise(TAIL)))


def test_command_names_the_rung_that_gains_most(corpus, capsys):
    """On the published climb; on records without one it says what is missing."""
    asked = ["advise", str(corpus), "--max-tokens", "256", "--records", "h100", "--rig"]
    assert __main__.main([*asked, "flattened"]) == 0
    text = capsys.readouterr().out
    assert "From 'flattened', the rung that gains most is '" in text
    assert "mini-batches: CUDA graphs" in text and "NVIDIA H100 80GB HBM3; their error is up to" in text
    assert __main__.main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["rig"]
    assert found["rungs"][0]["gain"] is None and "From 'padded, SDPA'" in found["recommendation"]
    assert __main__.main(["advise", str(corpus), "--records", str(corpus.parent), "--rig"]) == 1
    assert "no climb has two finished rungs among these records" in capsys.readouterr().err


def test_command_reports_an_unknown_corpus(capsys):
    assert __main__.main(["advise", "no-such-corpus"]) == 1
    assert "no-such-corpus" in capsys.readouterr().err


def test_a_run_in_doubt_is_told_as_one():
    """With one example a batch it runs 1.2 times as fast packed; where both are alike, nothing is said."""
    for factor, doubted in ((1.2, True), (1.0, False)):
        runs = []
        for name, rate in (("padding", 1.0), ("minibatch_packing", factor)):
            run = record(name, TAIL)
            rates = run["metrics"]["tokens_per_s"] | {"mean": rate}
            runs.append(
                run | {"spec": run["spec"] | {"batch_size": 1}, "metrics": run["metrics"] | {"tokens_per_s": rates}}
            )
        notes = advise(TAIL, max_tokens=1024, runs=[*RUNS, *runs]).notes
        assert any("in doubt (control off)" in note for note in notes) == doubted
