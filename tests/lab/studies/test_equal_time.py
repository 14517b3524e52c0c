"""Clocks of known costs, rates that are known to be best, and who wins at equal time by which clock."""

import math
from dataclasses import replace

import pandas as pd
import pytest

from packlib.lab import records
from packlib.lab.doubts import Doubt
from packlib.lab.runs.spec import Rig
from packlib.lab.studies import equal_time
from tests.lab.studies import made_records

SETTING = {"corpus": "pydocs", "limit": 80, "batch_size": 8, "rows_per_step": 2, "eval_examples": 8, "pick_seed": 9}
SETTING |= {"rates": [1e-3, 2e-3, 4e-3], "seeds": [0, 1, 2]}
SETTING |= {"all_steps": {"padding": 12, "multipack": 6, "constant examples": 24}}
SLOTS = {"padding": 100, "multipack_posid": 400}
BEST = {"padding": 1e-3, "full batches": 4e-3}


def write(folder, arm, *, per_step=1.0, per_slot=0.01, failed=False, concurrent=1):
    """A run whose loss falls with its steps, most at its best rate; seconds as of a clock with these costs."""
    spec = arm.spec
    slots = 50 if spec.split_rows else SLOTS[arm.strategy]
    power = 2 * math.log2(spec.learning_rate / BEST.get(arm.variant or arm.strategy, 2e-3))
    pace = (0.05 + 0.001 * (spec.seed % 3)) * slots**0.5 / (1 + power**2)
    steps = list(range(1, spec.steps + 1))
    losses = [3 * math.exp(-0.1 * pace * step) for step in steps]
    trace = {
        "step": steps,
        "slots": [slots * step for step in steps],
        "seconds": [(per_step + per_slot * slots) * step for step in steps],
        "evaluations": [
            {"step": step, "eval_loss_per_token": losses[step - 1]} for step in steps if step % spec.eval_every == 0
        ],
    }
    parts = {"metrics": {"eval_loss_per_token": losses[-1]}, "trace": trace}
    parts = {"status": "failed"} if failed else parts
    made_records.write(folder, spec, **parts, environment={"concurrent_runs": concurrent})


def measure(folder, asked, **kept):
    def train(arms):
        for arm in arms:
            if not records.find_record(folder, arm.spec.spec_id, None):
                write(folder, arm, **kept)

    return equal_time.measure(asked, folder, train)


def test_a_clock_finds_the_costs_it_was_made_of(tmp_path):
    folder = records.run_folder(tmp_path)
    arms = equal_time.grid_arms([SETTING])
    for arm in arms:
        write(folder, arm)
    found = records.read_records(folder)
    clock = equal_time.fit_clock(found, "made")
    assert (clock.per_step, clock.per_slot, len(clock.runs)) == (pytest.approx(1.0), pytest.approx(0.01), 9)
    assert clock.error == pytest.approx(0, abs=1e-9) and clock.said.startswith("made: 1e+03 ms a step and 1e+04 µs a")
    assert equal_time.fit_clock(found, "made", {"lean": True}) is None, "none has that rig"
    assert equal_time.fit_clock(found[:1], "made") is None
    shared = [record | {"environment": {"concurrent_runs": 2}} for record in found]
    assert equal_time.fit_clock(shared, "made") is None, "times of runs that shared the device are none"
    sdpa = found[0] | {"run_id": "other", "spec": found[0]["spec"] | {"kernel": "maskless_sdpa"}}
    assert equal_time.fit_clock([*found, sdpa], "made") == clock, "launched kernel by kernel, SDPA pays for new widths"
    graphs = {"compile": "layers", "graphs": True, "fused_loss": True, "pad_to": 16}
    sdpa["spec"] |= {"rig": sdpa["spec"]["rig"] | graphs}
    assert "other" in equal_time.fit_clock([*found, sdpa], "made").runs


def test_the_winner_is_who_has_the_lowest_loss_by_the_clock_in_hand(tmp_path):
    """Where a step costs most, full batches win; where a slot does, the many small steps of constant examples."""
    said = {}
    for name, costs in {"steps": {"per_step": 5.0, "per_slot": 1e-4}, "slots": {"per_step": 1e-4}}.items():
        folder = records.run_folder(tmp_path / name)
        timed = measure(folder, {"settings": [SETTING]}, **costs)
        assert {arm.label: arm.spec.learning_rate for arm in timed.reported} == {
            "Padding": 1e-3,
            "Multipack + PosID, full batches": 4e-3,
            "Multipack + PosID, full batches, padding's rate": 1e-3,
            "Multipack + PosID, exactly constant examples": 2e-3,
        }
        assert {arm.spec.seed for arm in timed.reported} == {0, 1, 2}
        (by_clock,) = timed.curves.values()
        (curve,) = by_clock.values()
        end, then = equal_time.at_equal_time(curve)
        assert end == pytest.approx(curve.groupby("arm")["seconds"].max().min()) and len(then) == 12
        table = equal_time.standing(curve)
        assert table["loss"].is_monotonic_increasing and table["seeds"].eq(3).all()
        said[name] = equal_time.findings(timed)
        first = f"the lowest mean loss is {table['loss'].iloc[0]:.4f} nats, of “{table.index[0]}”. Behind it: "
        assert first in said[name][0] and "“Padding” +" in said[name][0]
        assert "Not told apart" not in said[name][0]
        figure = equal_time.figure(by_clock, "pydocs")
        figure.canvas.draw()
        assert len(figure.legends[0].get_texts()) == 5  # the arms, and the second that is compared
    assert "nats, of “Multipack + PosID, full batches”. " in said["steps"][0]
    assert "nats, of “Multipack + PosID, exactly constant examples”. " in said["slots"][0]
    edges = [line for line in said["slots"] if "at the edge of its grid" in line]
    assert len(edges) == 2 and "Padding: the best rate, 0.001" in edges[0]


def test_an_arm_whose_interval_holds_0_is_not_told_apart_from_the_first():
    losses = {"a": (1.0, 1.1, 1.2), "b": (1.2, 1.05, 1.3), "c": (2.0, 2.1, 2.2)}
    rows = [
        {"corpus": "x", "arm": arm, "strategy": "padding", "variant": "", "spec_id": f"{arm}{seed}", "doubt": ""}
        | {"seed": seed, "lr": 1e-3, "step": step, "seconds": float(step), "loss": loss}
        for arm, seeds in losses.items()
        for seed, loss in enumerate(seeds)
        for step in (1, 2)
    ]
    said = equal_time.finding(pd.DataFrame(rows), "x", "a clock")
    assert (
        "1.1000 nats, of “a”. Behind it: “c” +1.0000 (+1.0000 to +1.0000). Not told apart from it: “b” +0.0833" in said
    )
    one_seed = equal_time.finding(pd.DataFrame([row for row in rows if row["seed"] == 0]), "x", "a clock")
    assert "Behind it" not in one_seed and "“c” +1.0000 (one seed)" in one_seed


def test_without_a_clock_nothing_is_compared(tmp_path):
    folder = records.run_folder(tmp_path)
    timed = measure(folder, {"settings": [SETTING]}, concurrent=3)
    assert not timed.clocks and not timed.reported and equal_time.findings(timed)[0].startswith("No clock: ")
    assert equal_time.findings(equal_time.measure({}, folder, lambda arms: None)) == []
    with pytest.raises(ValueError, match="unknown part of equal_time 'clock'"):
        equal_time.measure({"clock": []}, folder, print)
    for wrong, message in (
        ({"all_steps": {"paddin": 3}}, "unknown arm of all_steps 'paddin'"),
        ({"pick_seed": 1}, r"pick_seed = 1 is among seeds = \[0, 1, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            equal_time.grid_arms([SETTING | wrong])


def test_a_clock_of_another_run_and_rates_that_fail(tmp_path):
    """The grid's own times do not count where a run is named; an arm is reported once its whole grid was tried."""
    other, folder = records.run_folder(tmp_path / "other"), records.run_folder(tmp_path / "here")
    grid = equal_time.grid_arms([SETTING])
    for arm in grid:
        write(
            other,
            equal_time.Arm(arm.strategy, arm.variant, replace(arm.spec, model="x", rig=Rig(lean=True))),
            per_step=7.0,
        )
        if arm.strategy == "padding":
            write(folder, arm, failed=arm.spec.learning_rate == 1e-3)
        elif not arm.spec.split_rows and arm.spec.learning_rate > 1e-3:
            write(folder, arm)
    named = [{"label": "theirs", "run": str(other), "model": "x", "rig": {"lean": True}}]
    (clock,) = equal_time.clocks(named, folder, grid)
    assert (clock.label, clock.per_step) == ("theirs", pytest.approx(7.0))
    assert equal_time.clocks([named[0] | {"model": "y"}], folder, grid) == []
    assert equal_time.best_rates(folder, grid, clock) == {("pydocs", "Padding"): 2e-3}


@pytest.mark.parametrize("ratio", [1.0, 1.2])
def test_by_a_clock_of_a_run_in_doubt_nobody_wins(tmp_path, ratio):
    """Its control is among the runs that it was fitted to; a clock beside it, of the same folder, is not in doubt."""
    other, folder = records.run_folder(tmp_path / "other"), records.run_folder(tmp_path / "here")
    grid = equal_time.grid_arms([SETTING])
    for arm in grid:
        of_lean = replace(arm.spec, model="x", rig=Rig(lean=True))
        write(other, equal_time.Arm(arm.strategy, arm.variant, of_lean), per_step=0.5)
    one = replace(grid[0].spec, model="x", batch_size=1)
    for strategy, rate in (("padding", 100.0), ("minibatch_packing", 100.0 * ratio)):
        trace = {"step": [1, 2], "slots": [100, 200], "seconds": [2.0, 4.0]}
        metrics = {"tokens_per_s": {"mean": rate}}
        made_records.write(other, replace(one, strategy=strategy), metrics=metrics, trace=trace)
    clocks = [
        {"label": name, "run": str(other), "model": "x", "rig": {"lean": name == "lean"}} for name in ("lean", "eager")
    ]
    timed = measure(folder, {"settings": [SETTING], "clocks": clocks})
    said, off = equal_time.findings(timed), ratio > 1
    doubt = "fitted to a run in doubt (other: control off)"
    assert [clock.doubt for clock in timed.clocks] == ["", doubt if off else ""]
    red = [sentence for sentence in said if isinstance(sentence, Doubt)]
    assert red == (
        [f"Equal time: the clock “eager” is {doubt}. It orders no arms; losses by step are not in doubt."]
        if off
        else []
    )
    assert [clock.said.endswith(f"; {doubt}") for clock in timed.clocks] == [False, off]
    lean, eager = [sentence for sentence in said if sentence.startswith("pydocs, ") and ": after" in sentence]
    assert "the lowest mean loss is" in lean and "no order" not in lean
    assert ("the lowest mean loss is" in eager) == (not off) == ("no order" not in eager)
    assert not off or (eager.endswith(f"no order, as the clock is {doubt}.") and "losses of 4 arms are " in eager)
    by_clock = timed.curves["pydocs"]
    tables = [equal_time.standing(curve) for curve in by_clock.values()]
    assert [table["loss"].is_monotonic_increasing for table in tables] == [True, not off]
    assert tables[1].index[0] == "Padding" or not off, "arms stand as they were named"
    titles = [" ".join(ax.get_title(loc="left").split()) for ax in equal_time.figure(by_clock, "pydocs").axes]
    assert titles == ["lean", f"eager, {doubt}" if off else "eager"]
