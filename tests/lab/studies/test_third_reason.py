"""What is left of the gap without each suspected cause, of records whose losses are made up."""

import math

import pytest

from packlib.lab import records
from packlib.lab.studies import convergence, third_reason
from packlib.lab.studies.third_reason import GAP, MINI, MIXED
from tests.lab.studies import made_records

SETTING = {"corpus": "pydocs", "limit": 80, "batch_size": 8, "rows_per_step": 2, "eval_examples": 8}
SEEDS = {"seeds": [0, 1, 2, 3], "further_seeds": [0, 1, 2]}
GAPS = {"": 0.0, "equal steps": 0.1, convergence.EXACT: 0.06, "equal steps, long rows first": 0.15}


@pytest.fixture
def measured(tmp_path):
    """Sorted rows lose 0.1 nats, mixed ones nothing, exactly constant examples 0.06, long rows first 0.15."""
    folder = records.run_folder(tmp_path)
    arms = third_reason.arms([SETTING | SEEDS])
    for i, arm in enumerate(arms):
        gap = 0.0 if arm.strategy == MIXED else GAPS.get(arm.variant, 0.0 if arm.strategy == MINI else 0.1)
        loss = 2 + arm.spec.seed + gap + 1e-3 * math.sin(7 * i)
        made_records.write(
            folder, arm.spec, metrics={"eval_loss_per_token": loss, "eval_loss_per_example": loss + gap}, trace=None
        )
    return convergence.results(folder, arms)


def test_an_arm_differs_from_the_gap_in_what_its_name_says():
    arms = {(arm.strategy, arm.variant): arm.spec for arm in third_reason.arms([SETTING | SEEDS])}
    assert {pair for suspect in third_reason.SUSPECTS for pair in (suspect.changed, suspect.base)} == arms.keys()
    steps = {key: spec.steps or math.ceil(spec.limit / spec.batch_size) for key, spec in arms.items()}
    assert steps.pop(("multipack_posid", convergence.EXACT)) == 80, "a row of the plan is a step: 80 rows of one step"
    assert set(steps.values()) == {10}
    exact = arms["multipack_posid", convergence.EXACT]
    assert exact.examples_per_step == 8 and exact.split_rows
    assert arms["multipack_posid", "equal steps, LongAlign's weights"].weighting == "longalign"


def test_a_cause_is_what_takes_the_gap_away(measured):
    table = third_reason.gaps(measured).set_index("label")
    assert table.loc[GAP.label, "difference"] == pytest.approx(0.1, abs=2e-3) and table.loc[GAP.label, "n"] == 4
    shares = {label: share for label, share in table["share"].dropna().items()}
    assert shares["Mixed rows, as full (which examples, and how many)"] == pytest.approx(1, abs=0.02)
    assert shares["Sorted rows, constant examples (how many)"] == pytest.approx(0.4, abs=0.02)
    assert shares["Long rows first"] == pytest.approx(-0.5, abs=0.02)
    said = third_reason.findings(measured)
    assert said[0].startswith("pydocs, per token: sorted packing against mini-batches at equal steps: +0.1")
    verdicts = {
        "“Mixed rows, as full": third_reason.CAUSE,
        "“Sorted rows, constant": third_reason.PART,
        "“Long rows first”": third_reason.OTHERS[third_reason.WIDER],
        "“Long rows last”": third_reason.OTHERS[third_reason.RULED_OUT],
        "“Mini-batches by length": third_reason.OTHERS[third_reason.ADDED],
    }
    for label, verdict in verdicts.items():
        lines = [line for line in said if label in line]
        assert len(lines) == 2 and all(verdict in line for line in lines), label
    assert all(line.endswith(f": {third_reason.CAUSE}.") for line in said if "“Mixed rows, as full" in line)
    figure = third_reason.figure(measured, "pydocs")
    figure.canvas.draw()
    assert len(figure.axes[0].get_yticklabels()) == len(third_reason.SUSPECTS)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["per token", "per example"]


def test_four_fifths_are_not_the_cause_while_something_is_left(measured):
    """Mixed rows leave 0.01 of 0.1, the same in every seed, so their interval does not hold 0."""
    verdicts = {}
    for left in (0.01, 0.0):
        mini = measured[measured["arm"] == convergence.arm_label(MINI)].set_index("seed")["per_token"]
        mixed = measured["arm"] == convergence.arm_label(MIXED, convergence.STEPS)
        loss = measured["seed"].map(mini) + left + 1e-4 * (-1.0) ** measured["seed"]
        table = third_reason.gaps(measured.assign(per_token=measured["per_token"].where(~mixed, loss)))
        verdicts[left] = third_reason.verdict(table[table["label"].str.startswith("Mixed rows, as full")].iloc[0])
    assert verdicts == {0.01: third_reason.PART, 0.0: third_reason.CAUSE}


def test_an_arm_below_mini_batches_is_no_cause(measured):
    """It takes more than the gap away, for a reason of its own."""
    lower = measured["arm"] == convergence.arm_label("multipack_posid", convergence.EXACT)
    found = measured.assign(per_token=measured["per_token"].where(~lower, measured["per_token"] - 0.2))
    (said,) = [
        line for line in third_reason.findings(found) if "per token" in line and "“Sorted rows, constant" in line
    ]
    around = third_reason.OTHERS[third_reason.AROUND]
    assert said.startswith(f"pydocs, per token: {around}")
    assert around not in "\n".join(third_reason.findings(measured)), "the negative control"


def test_without_a_gap_no_cause_is_named(measured):
    """The negative control: the same losses for sorted rows as for mini-batches, and a single seed."""
    level = measured.copy()
    mini = level[level["arm"] == convergence.arm_label(MINI)].set_index("seed")["per_token"]
    of_gap = level["arm"] == convergence.arm_label(*GAP.changed)
    level.loc[of_gap, "per_token"] = level.loc[of_gap, "seed"].map(lambda seed: mini[seed] + 1e-3 * (-1) ** seed)
    for found in (level, measured[measured["seed"] == 0]):
        said = [line for line in third_reason.findings(found) if "per token" in line]
        assert len(said) == 2 and said[1].endswith("so no cause is named.")
    assert third_reason.findings(measured[:0]) == []
    pair = [convergence.arm_label(MINI), convergence.arm_label(*GAP.changed)]
    assert len(third_reason.findings(measured[measured["arm"].isin(pair)])) == 2, "the gap alone, by either average"
