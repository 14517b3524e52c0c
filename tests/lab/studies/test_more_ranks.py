"""More GPUs foreseen from two: known costs are found again, plans are the worker's, errors are shown."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from packlib.lab import models, records
from packlib.lab.doubts import Doubt
from packlib.lab.runs.limits import Rates
from packlib.lab.runs.spec import Rig, RunSpec
from packlib.lab.studies import more_ranks
from packlib.lab.studies.more_ranks import MINI, PAPERS, SDPA, VARLEN, Arm, Cost

CORPUS = "made_mistral_{split}.npz"
LENGTHS = np.random.default_rng(0).lognormal(5.5, 1.0, 4000).clip(8, 4096).astype(np.int64)
GRAPHS = Rig(compile="layers", graphs=True, fused_loss=True, lean=True, pad_to=16)
SLOT, LAUNCH = 1e-4, {MINI[:2]: 0.3, VARLEN[:2]: 0.35, SDPA[:2]: 0.5}  # seconds
RATES = Rates(7e14, 4e12)


def arm(strategy="minibatch_packing", kernel="auto", rig=PAPERS, steps=13, **fields):
    """An arm on two ranks whose seconds are still to be made."""
    fields = {"model": "mistral-7b", "dtype": "bfloat16", "world_size": 2, "max_tokens": 4096} | fields
    sizes = {"batch_size": 4, "gradient_accumulation": 2} | fields
    spec = RunSpec(corpus=CORPUS, strategy=strategy, kernel=kernel, rig=rig, **sizes)
    return Arm(spec, LENGTHS, np.ones(steps - 3), steps, RATES, 4e10)


def timed(cost, made, noise=0.0, seed=0):
    """The arm, with the seconds that these costs give it."""
    seconds = cost.steps(made, made.measured)
    return replace(made, seconds=seconds * np.random.default_rng(seed).normal(1, noise, len(seconds)))


def record(made):
    """The record of an arm, as a worker writes it."""
    seconds = np.concatenate([np.full(made.steps - len(made.seconds), 9.0), made.seconds]).cumsum().tolist()
    metrics = {"matmul_flops_ceiling": RATES.matmul_flops, "copy_bytes_per_s": RATES.copy_bytes}
    metrics |= {"measured_steps": len(made.seconds), "peak_memory_bytes": made.peak_bytes}
    head = {"run_id": "made", "status": "ok", "spec": asdict(made.spec), "environment": {}}
    return head | {"metrics": metrics, "trace": {"seconds": seconds}, "plan": {"sha256": made.plan(2).sha256}}


@pytest.fixture(scope="module")
def made():
    """Arms of the paper's rig, and the costs that made them."""
    cost = replace(more_ranks.fit([arm()], hidden=True), per_slot=SLOT, launch=LAUNCH)
    arms = [arm(), arm("padding"), arm("padding", "maskless_sdpa"), arm("multipack_posid", steps=6)]
    return cost, [timed(cost, one) for one in arms]


@pytest.fixture(scope="module")
def published():
    folder = records.run_folder("h200x2", create=False)
    lengths = more_ranks.read_lengths(folder)
    return folder, lengths, more_ranks.read_arms(records.read_records(folder), lengths)


@pytest.mark.parametrize("hidden", [True, False])
def test_known_costs_are_found_again(made, hidden):
    cost = replace(made[0], hidden=hidden)
    arms = [timed(cost, one) for one in made[1]]
    found = more_ranks.fit(arms, hidden=hidden)
    assert found.per_slot == pytest.approx(SLOT, rel=1e-3)
    assert dict(found.launch) == pytest.approx(LAUNCH, rel=1e-3)
    taken_for_hidden = more_ranks.fit(arms, hidden=True)
    assert (taken_for_hidden.launch[MINI[:2]] > LAUNCH[MINI[:2]] * 1.01) == (not hidden), (
        "the exchange has to be somewhere"
    )


def test_pads_attend_in_sdpa_however_its_kernel_is_chosen():
    flash, chosen, unpadded = (arm("padding", kernel).measured for kernel in ("flash_sdpa", "maskless_sdpa", "auto"))
    assert np.array_equal(flash, chosen) and not np.array_equal(flash, unpadded)


def test_known_costs_of_graphs_are_found_again():
    cost = Cost(6e-5, 0.03, {}, more_ranks.fit([arm()], hidden=True).pair, hidden=False)
    merged = arm(rig=GRAPHS, batch_size=8, gradient_accumulation=1)
    arms = [timed(cost, one) for one in (arm(rig=GRAPHS), arm("padding", "maskless_sdpa", GRAPHS), merged)]
    found = more_ranks.fit(arms, hidden=False)
    assert (found.per_slot, found.per_batch) == pytest.approx((6e-5, 0.03), rel=1e-3) and not found.launch
    assert more_ranks.left_out(arms, hidden=False)["error"].abs().max() < 1e-3


def test_an_arm_that_costs_otherwise_shows_as_error(made):
    """Negative control: arms that one set of costs made foresee each other, one that is slower is not foreseen."""
    cost, arms = made
    arms = arms + [timed(cost, arm(strategy, batch_size=2)) for strategy in ("padding", "minibatch_packing")]
    exact = more_ranks.left_out(arms, hidden=True)
    assert len(exact) == 5, "padding through SDPA has no other arm of its kernel"
    assert exact["error"].abs().max() < 1e-3
    slow = [replace(one, seconds=one.seconds * (1.5 if one.spec.strategy == "multipack_posid" else 1)) for one in arms]
    assert more_ranks.left_out(slow, hidden=True)["error"].abs().max() > 0.25


def test_fitted_arms_come_out_within_the_error_that_is_stated(published):
    for arms in more_ranks.by_rig(published[2]).values():
        cost, alone = more_ranks.fit(arms, hidden=False), more_ranks.left_out(arms, hidden=False)
        fitted = [abs(cost.steps(one, one.measured).mean() / one.seconds.mean() - 1) for one in arms]
        assert max(fitted) <= (alone["error"].abs().max() if len(alone) else 1e-3)


def test_the_work_of_two_ranks_is_what_the_records_counted(published):
    folder, _, arms = published
    counted = {run["run_id"]: run["trace"] for run in records.read_records(folder)}
    for one in arms:
        (trace,) = (t for i, t in counted.items() if i.startswith(one.spec.spec_id))
        slots = np.diff(trace["slots"], prepend=0)[-len(one.seconds) :]
        assert (one.measured[..., 0].sum(axis=(1, 2)) == slots).all()


def test_other_lengths_than_the_records_are_refused(made):
    runs = [record(one) for one in made[1]]
    assert len(more_ranks.read_arms(runs, {CORPUS: LENGTHS})) == len(runs)
    with pytest.raises(ValueError, match="was planned on other lengths of made_mistral"):
        more_ranks.read_arms(runs, {CORPUS: LENGTHS[::-1]})
    assert not more_ranks.read_arms(runs, {}) and not more_ranks.read_arms([r | {"status": "oom"} for r in runs], {})


def test_more_ranks_never_make_the_slowest_rank_faster(made):
    """Of the same micro-batches: a step of 8 ranks waits for the slowest of all that 4 steps of 2 ranks wait for."""
    cost, arms = made
    for one in arms:
        work = one.work(8)
        apart = work.reshape(*work.shape[:2], 4, 2, 2)
        eight, *of_two = (
            cost.steps(one, w) - one.limit(w).optimizer_seconds for w in (work, *(apart[:, :, i] for i in range(4)))
        )
        assert (eight >= np.max(of_two, axis=0) - 1e-9).all()
        waiting = [more_ranks.slowest_over_mean(cost, one, one.work(n, balance=False)) for n in (1, 2, 8)]
        assert waiting == sorted(waiting) and waiting[0] == 1


def test_balance_is_never_worse_than_none(made):
    cost, arms = made
    full = next(one for one in arms if one.spec.strategy == "multipack_posid")
    for ranks in (2, 4, 8):
        even, drawn = (more_ranks.slowest_over_mean(cost, full, full.work(ranks, balance)) for balance in (True, False))
        assert 1 <= even <= drawn
    assert drawn > 1.005, "there is something to even out"


def test_exchange_grows_with_ranks():
    total = models.parameter_count(models.model_config("mistral-7b")).total
    sharded, whole = arm(), arm(rig=GRAPHS)
    assert sharded.exchanged_bytes(1) == whole.exchanged_bytes(1) == 0
    assert sharded.exchanged_bytes(8) / sharded.exchanged_bytes(2) == pytest.approx((7 / 8) / (1 / 2))
    assert sharded.exchanged_bytes(2) == pytest.approx(2 * total * (2 * 2 + 1) / 2)
    assert whole.exchanged_bytes(2) == pytest.approx(2 * total)


def test_memory_by_hand():
    total = models.parameter_count(models.model_config("mistral-7b")).total
    one = arm()
    grown = more_ranks.largest(one, 8) - more_ranks.largest(one, 2)
    states, everything = more_ranks.peaks_of_more(one, 8, per_slot=5e5, always=3.7e10)
    assert states == pytest.approx(4e10 - 8 * total * (1 / 2 - 1 / 8) + 5e5 * grown)
    assert everything == pytest.approx(4e10 - 3.7e10 * 3 / 4 + 5e5 * grown)
    whole = arm(rig=GRAPHS)
    assert more_ranks.peaks_of_more(whole, 2, 5e5, 3.7e10) == (4e10, 4e10), "nothing is shared"


def test_a_slower_host_shows_in_the_error_and_in_the_verdict(made):
    cost, arms = made
    arms = [replace(one, peak_bytes=3.7e10 + 5e5 * more_ranks.largest(one, 2)) for one in arms]
    runs, key = [record(one) for one in arms], {CORPUS: LENGTHS}
    slow = replace(cost, launch={way: seconds * 3 for way, seconds in LAUNCH.items()})
    alike, other = (
        more_ranks.predict(runs, key, 8, [record(timed(there, one)) for one in arms]).figures for there in (cost, slow)
    )
    speed = alike["what"].str.endswith("tokens/s")
    assert speed.sum() == 2 and (alike["other_host"][speed] < 0.02).all() and (other["other_host"][speed] > 0.1).all()
    memory = alike[alike["what"].str.endswith(more_ranks.MEMORY)]
    assert (memory["left_out"] < 1e-9).all() and (memory["high"] < 1).all()
    row = {"kind": "tokens/s", "low": 1.0, "high": 1.1, "left_out": 0.05, "other_host": np.nan}
    goals = {0.9: "met", 1.0: "cannot say", 1.1: "cannot say", 1.3: "missed", np.nan: ""}
    assert {goal: more_ranks._verdict(row | {"goal": goal}) for goal in goals} == goals
    assert more_ranks._verdict(row | {"goal": 1.3, "kind": more_ranks.MEMORY}) == "met"


def test_published_records_foresee_every_kind_of_figure(published):
    forecast = more_ranks.foresee(published[0])
    table = forecast.figures
    for kind in ("tokens/s", more_ranks.MEMORY, "share of limit", "tokens/s per GPU", "over the mean"):
        assert table["what"].str.endswith(kind).any()
    assert (table["low"] <= table["high"]).all()
    said = more_ranks.findings(forecast)
    assert isinstance(said[0], Doubt) and "(control off, repeats off)" in said[0], "as the published run's own report"
    assert f"({forecast.arms['key'].nunique()} arms)" in said[1]
    assert not any(isinstance(line, Doubt) for line in more_ranks.findings(forecast._replace(doubts="")))
    assert sum(line.count("(goal") for line in said) == (table["verdict"] != "").sum()
    assert len(more_ranks.display_table(forecast)) == len(table)


def test_a_folder_without_lengths_foresees_nothing(tmp_path):
    forecast = more_ranks.foresee(tmp_path)
    assert forecast.figures.empty and more_ranks.display_table(forecast).empty and not more_ranks.findings(forecast)
