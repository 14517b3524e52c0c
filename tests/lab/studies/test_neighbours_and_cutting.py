"""When a neighbour helps, and where cutting is paid, of records whose losses are made up."""

import math
import re

import numpy as np
import pytest

from packlib.lab import records
from packlib.lab.strategies import get_strategy, plan_for
from packlib.lab.studies import convergence, cutting, neighbours
from packlib.lab.studies.convergence import FIXED, POSID
from tests.lab.studies import made_records

TASK = {"corpus": "arithmetic", "loss": "response", "limit": 80, "batch_size": 8, "rows_per_step": 2, "eval_context": 3}
TASK |= {"eval_examples": 8, "generate_examples": 4, "seeds": [0, 1, 2]}
LONG = {"corpus": "pysource", "steps": 8, "rows_per_step": 4, "max_tokens": 256, "eval_examples": 8, "seeds": [0, 1, 2]}


@pytest.fixture
def beside(tmp_path):
    """Without boundaries: + 0.3 alone; behind related examples the one trained on related rows gains 0.2."""
    folder, arms = records.run_folder(tmp_path), neighbours.arms([TASK])
    for i, arm in enumerate(arms):
        open_rows, related = arm.strategy == FIXED, arm.variant == neighbours.RELATED
        noise = arm.spec.seed + 1e-3 * math.sin(7 * i)
        metrics = {
            "eval_loss_per_token": 2 + 0.3 * open_rows + noise,
            "eval_loss_per_token_in_context": 2 - 0.2 * (open_rows and related) + noise,
            "exact_match": 0.25,
            "exact_match_in_context": 0.5 if related else 0.25,
        }
        made_records.write(folder, arm.spec, metrics=metrics, trace=None)
    return convergence.results(folder, arms, neighbours.FURTHER)


def test_all_four_arms_take_the_same_steps():
    arms = neighbours.arms([TASK])
    assert {(arm.spec.steps, arm.spec.batch_size, arm.spec.eval_context) for arm in arms} == {(10, 2, 3)}
    assert {(arm.strategy, arm.spec.order) for arm in arms} == {
        (name, order) for name in (FIXED, POSID) for order in ("planned", "neighbours")
    }


def test_a_neighbour_costs_alone_and_helps_in_context(beside):
    alone, behind = neighbours.VALUES
    table = neighbours.effects(beside).set_index(["label", "where"])
    assert len(table) == 8 and table["n"].eq(3).all()
    related = "No boundaries, related neighbours"
    assert table.loc[(related, alone), "difference"] == pytest.approx(0.3, abs=3e-3)
    assert table.loc[(related, behind), "difference"] == pytest.approx(-0.2, abs=3e-3)
    said = dict(line.removeprefix("arithmetic: ").split(", held-out examples ") for line in neighbours.findings(beside))
    assert list(said) == list(neighbours.PAIRS)
    assert said[related].startswith(f"{alone}: a cost, +0.3") and f"; {behind}: a gain, -0.2" in said[related]
    assert f"{behind}: the same within 0.01 nats" in said["Related instead of random neighbours, boundaries"]
    assert neighbours.findings(beside[beside["seed"] == 0])[0].endswith("measure more seeds.")
    answers = neighbours.answers(beside)
    assert answers[alone, "mean"].tolist() == [0.25] * 4
    assert answers[behind, "mean"].tolist() == [0.25] * 2 + [0.5] * 2
    levels = neighbours.losses(beside)
    assert levels[alone].tolist() == pytest.approx([3.3, 3, 3.3, 3], abs=3e-3)
    assert levels[behind].tolist() == pytest.approx([3, 3, 2.8, 3], abs=3e-3)
    figure = neighbours.figure(beside, "arithmetic")
    figure.canvas.draw()
    assert "arithmetic" in figure.alt and len(figure.axes[0].get_yticklabels()) == 4
    assert [ax.get_title(loc="left") for ax in figure.axes] == [alone, behind]
    assert neighbours.findings(beside[:0]) == []
    (missing,) = neighbours.findings(beside.assign(status="missing"))
    assert missing == "Neighbours: not measured yet, none of 12 runs has a result."


EARLY = {"cut anywhere": 0.2, "truncated, best fit": -0.1}


@pytest.fixture
def cut(tmp_path):
    """Cutting anywhere costs 0.2 below position 64. Truncation gains 0.1, loses half the tokens, and costs 1 behind."""
    folder, arms = records.run_folder(tmp_path), cutting.arms([LONG])
    for i, arm in enumerate(arms):
        early, noise = EARLY.get(arm.variant, 0.0), arm.spec.seed + 1e-3 * math.sin(7 * i)
        truncated = arm.spec.overflow == "truncate"
        metrics = {
            "eval_loss_per_token": 2 + early + noise,
            "eval_loss_longest": 2 + noise,
            "eval_tokens": 300,
            "eval_loss_per_token_rest": 3 + truncated + noise,
            "eval_tokens_rest": 100,
            "eval_loss_by_position": [[n, 3 + noise + (early if n < 64 else 0), n] for n in (1, 8, 64, 128)],
        }
        plan = {"lost_tokens": 500 * truncated, "real_tokens": 1000 - 500 * truncated}
        trace = {"tokens": [4096, 8192], "seconds": [1.0, 2.0]}
        made_records.write(folder, arm.spec, metrics=metrics, plan=plan, trace=trace)
    return cutting.measured(folder, arms), cutting.positions(folder, arms)


def test_what_is_lost_and_every_token_are_weighed(cut):
    table = cutting.overview(cut[0])
    assert list(table.index) == list(cutting.WAYS)
    assert table["lost"].tolist() == [0, 0, 0, 0, 0.5, 0] and table["tokens"].eq(8192).all()
    assert table["× each"].tolist() == pytest.approx([8.192] * 4 + [16.384, 8.192])
    assert "8,192" in cutting.display_table(cut[0]).to_html()
    # Seeds 0 to 2 have a mean of 1: 300 first tokens of 3 + early, 100 behind of 4 or 5.
    assert table["every token"].tolist() == pytest.approx([3.4, 3.25, 3.25, 3.25, 3.425, 3.25], abs=2e-3)
    said = cutting.findings(cut[0])
    assert [line.split(", against")[0] for line in said] == [f"pysource, {name}" for name in cutting.VALUES]
    early = table[f"first {cutting.EARLY} tokens"] - table[f"first {cutting.EARLY} tokens"][cutting.BASE]
    assert early.tolist() == pytest.approx([0.2, 0, 0, 0, -0.1, 0], abs=2e-3)
    assert re.search(r": “truncated, best fit” -0\.(10|09).*; “cut anywhere” \+0\.(20|19).*; undecided: ", said[1])
    assert re.search(r"“truncated, best fit” \+(1\.00|0\.99)", said[4])
    one_seed = cutting.findings(cut[0][cut[0]["seed"] == 0])
    assert all("none is established to differ; undecided: " in line for line in one_seed)
    no_base = cut[0][cut[0]["arm"] != cutting.BASE]
    assert cutting.findings(no_base) == [] and cutting.findings(cut[0][:0]) == []


def test_positions_say_where_it_is_paid(cut):
    figure = cutting.position_curves(cut[1], "pysource")
    figure.canvas.draw()
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert lines["cut anywhere"] == pytest.approx([0.2, 0, 0], abs=3e-3), "from the second token on"
    assert lines["truncated, best fit"] == pytest.approx([-0.1, 0, 0], abs=3e-3)
    assert cutting.BASE not in lines


def test_what_overflows_is_handed_over_as_the_way_says():
    ways = {arm.variant: arm.spec for arm in cutting.arms([LONG | {"seeds": [0]}])}
    assert {name: spec.overflow for name, spec in ways.items()} == {
        name: way for name, (_, way) in cutting.WAYS.items()
    }
    assert {(spec.steps, spec.batch_size, spec.max_tokens) for spec in ways.values()} == {(8, 4, 256)}
    assert ways["cut anywhere"].corpus_options["max_tokens"] is None
    assert ways["split, best fit"].corpus_options["max_tokens"] == 256


def test_shuffled_rows_do_not_fill_a_step_with_one_example():
    """Both cut the same stream anywhere; examples of ten rows, four rows a step."""
    ways = {arm.variant: arm.spec for arm in cutting.arms([LONG | {"seeds": [0]}])}
    distinct = {}
    for way in (cutting.CUT, cutting.AS_THEY_COME):
        own = {} if ways[way].atom_size is None else {"atom_size": ways[way].atom_size}
        lengths = [10 * ways[way].max_tokens] * 12
        plan = plan_for(get_strategy(ways[way].strategy), lengths, batch_size=4, max_tokens=256, seed=0, **own)
        assert len(plan) == 120
        distinct[way] = np.mean([len(set(step)) for step in plan.example.reshape(30, 4)])
    assert distinct[cutting.AS_THEY_COME] < 2 and distinct[cutting.CUT] > 3
