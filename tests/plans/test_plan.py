"""Plans: what their arrays hold, what a report counts, and that reordering, balancing and saving lose nothing."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packlib import plans
from packlib.plans import Plan, Segment, best_fit_decreasing, fixed_length, next_fit, shuffled_batches

LENGTHS = np.random.default_rng(0).integers(1, 60, 300)


def test_rows_are_lists_of_segments():
    plan = fixed_length([3, 4], max_tokens=5)
    assert list(plan) == [[Segment(0, 0, 3), Segment(1, 0, 2)], [Segment(1, 2, 4)]]
    assert plan[-1] == [Segment(1, 2, 4)]
    assert plan.row_examples.tolist() == [2, 1]
    assert plan.row_costs().tolist() == [13, 4]
    with pytest.raises(IndexError, match="row 2 of a plan with 2 rows"):
        plan[2]


def test_arrays_are_compact_and_read_only():
    plan = best_fit_decreasing(LENGTHS, 100, overflow="error")
    assert [a.dtype for a in (plan.row_splits, plan.example, plan.start, plan.stop)] == [
        np.int64,
        np.int32,
        np.int32,
        np.int32,
    ]
    with pytest.raises(ValueError, match="read-only"):
        plan.example[0] = 1


def test_a_plan_without_its_segments_is_refused():
    plan = fixed_length([3, 4], max_tokens=5)
    for splits in ([0, 2], [1, 3], [0, 2, 2, 3]):
        with pytest.raises(ValueError, match="row_splits must rise from 0"):
            Plan(np.array(splits), plan.example, plan.start, plan.stop, 5, "by hand", plan.lengths_sha256)


def test_report_counts_apart_slots_real_and_loss_tokens():
    lengths = [4, 8, 5, 11]
    plan = shuffled_batches(lengths, 2, seed=0)
    rows = [[lengths[s.example] for s in row] for row in plan]
    report = plan.report(lengths, layout="padded")
    assert (report.examples, report.rows, report.real_tokens, report.loss_tokens, report.lost_tokens) == (
        4,
        2,
        28,
        24,
        0,
    )
    assert report.slots == sum(len(row) * max(row) for row in rows)
    assert report.fill * report.waste == pytest.approx(1)
    assert report.capacity_fill is None
    assert plan.report(lengths).slots == 28
    assert report.examples_per_row == {"p5": 2.0, "p50": 2.0, "p95": 2.0}
    costs = [sum(n * n for n in row) for row in rows]
    assert report.attention_cost == sum(costs)
    assert report.attention_spread == pytest.approx(max(costs) * 2 / sum(costs))
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_report_refuses_what_was_not_planned():
    plan = next_fit([3, 4], 5, overflow="error")
    with pytest.raises(ValueError, match=r"lengths of 2 examples have hash .*; expected those that were planned"):
        plan.report([4, 3])
    with pytest.raises(ValueError, match="layout = 'ragged'"):
        plan.report([3, 4], layout="ragged")
    with pytest.raises(ValueError, match=r"loss_tokens\[1\] = 4; expected 0 to 3"):
        plan.report([3, 4], loss_tokens=[1, 4])
    with pytest.raises(ValueError, match=r"loss_tokens has shape \[1\]; expected \[2\]"):
        plan.report([3, 4], loss_tokens=[1])


def test_shuffle_keeps_the_rows():
    plan = best_fit_decreasing(LENGTHS, 97, overflow="error")
    shuffled = plan.shuffle(5)
    assert sorted(map(tuple, shuffled)) == sorted(map(tuple, plan))
    assert list(shuffled) != list(plan)
    assert shuffled.sha256 == plan.shuffle(5).sha256 != plan.shuffle(6).sha256


def test_what_is_not_taken_is_lost():
    plan = best_fit_decreasing(LENGTHS, 97, overflow="error")
    part = plan.take(range(10))
    assert list(part) == [plan[i] for i in range(10)]
    assert part.report(LENGTHS).lost_tokens == LENGTHS.sum() - plan.row_lengths[:10].sum()


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    world=st.integers(1, 9),
    cost=st.sampled_from(["quadratic", "linear"]),
    seed=st.integers(0, 99),
)
def test_balance_loses_nothing_and_gives_every_rank_as_many_rows(lengths, world, cost, seed):
    plan = best_fit_decreasing(lengths, 40, overflow="error")
    if len(lengths) < -(-len(plan) // world) * world:
        with pytest.raises(ValueError, match="world_size"):
            plan.balance(world, cost, seed)
        return
    balanced = plan.balance(world, cost, seed)
    assert len(balanced) % world == 0
    assert len(plan) <= len(balanced) < len(plan) + world
    assert sorted(balanced.example) == list(range(len(lengths)))
    assert balanced.report(lengths).lost_tokens == 0
    assert balanced.row_lengths.max() <= 40


def spread(plan, world):
    """Σ over steps of the slowest rank's Σ n², over the mean rank's."""
    costs = plan.row_costs()[: len(plan) // world * world].reshape(-1, world)
    return costs.max(axis=1).sum() / costs.mean(axis=1).sum()


def test_balanced_ranks_wait_for_each_other_less_than_five_percent():
    lengths = np.random.default_rng(0).lognormal(np.log(500) - 0.72, 1.2, 20_000).clip(1, 4096).astype(int)
    plan = best_fit_decreasing(lengths, 4096, overflow="error")
    assert spread(plan, 8) > 1.3
    balanced = plan.balance(8)
    assert spread(balanced, 8) < 1.05
    per_rank = balanced.row_costs().reshape(-1, 8).sum(axis=0)
    assert per_rank.max() < 1.05 * per_rank.mean()


def test_balance_refuses_ranks_that_examples_do_not_suffice_for():
    plan = next_fit([4, 4, 4], 4, overflow="error")
    with pytest.raises(ValueError, match="world_size = 0; expected an integer of at least 1"):
        plan.balance(0)
    with pytest.raises(ValueError, match="3 rows do not divide by world_size = 4; none has two examples to part"):
        plan.balance(4)
    with pytest.raises(ValueError, match="3 rows do not divide by world_size = 2; none has two examples to part"):
        plan.balance(2)
    with pytest.raises(ValueError, match="cost = 'cubic'"):
        plan.balance(3, cost="cubic")


def test_constant_examples_fills_steps_exactly():
    lengths = np.random.default_rng(0).lognormal(np.log(500) - 0.72, 1.2, 5_000).clip(1, 4096).astype(int)
    plan = next_fit(lengths, 4096, overflow="error")
    grouped, steps = plans.constant_examples(plan, 32, seed=1)
    per_step = np.add.reduceat(grouped.row_examples, steps[:-1])
    assert sorted(grouped.example) == list(range(len(lengths)))
    assert len(per_step) == len(shuffled_batches(lengths, 32)) == 157
    assert sorted(per_step.tolist()) == [5000 % 32] + [32] * 156
    rows = len(plan) // len(per_step)
    same_rows = np.add.reduceat(plan.row_examples, np.arange(0, len(plan), rows))
    assert (same_rows == 32).mean() < 0.1
    assert len(grouped) < 1.02 * len(plan), "few rows are split"
    assert plans.constant_examples(plan, 32, seed=2)[0].sha256 != grouped.sha256
    for bad in (0, len(lengths) + 1):
        with pytest.raises(ValueError, match=f"examples = {bad}; expected"):
            plans.constant_examples(plan, bad)


def test_rows_that_stay_whole_make_steps_about_constant():
    lengths = np.random.default_rng(0).lognormal(np.log(500) - 0.72, 1.2, 5_000).clip(1, 4096).astype(int)
    plan = next_fit(lengths, 4096, overflow="error")
    grouped, steps = plans.constant_examples(plan, 32, seed=1, split_rows=False)
    assert len(grouped) == len(plan) and sorted(grouped.row_lengths) == sorted(plan.row_lengths)
    per_step = np.add.reduceat(grouped.row_examples, steps[:-1])
    assert per_step.max() == 32 and (per_step == 32).mean() > 0.98
    rows = next_fit([1] * 6 + [6] * 3, 6, overflow="error", order="sorted")
    grouped, steps = plans.constant_examples(rows, 2, split_rows=False)
    assert sorted(np.add.reduceat(grouped.row_examples, steps[:-1]).tolist()) == [1, 2, 6], "a row above is a step"


def test_a_row_above_the_step_is_split():
    plan, steps = plans.constant_examples(next_fit([1] * 6 + [6] * 3, 6, overflow="error", order="sorted"), 2)
    assert sorted(np.add.reduceat(plan.row_examples, steps[:-1]).tolist()) == [1, 2, 2, 2, 2]
    assert sorted(plan.example) == list(range(9)) and plan.row_lengths.max() == 6


def test_save_and_load_round_trip(tmp_path):
    plan = next_fit(LENGTHS, 75, overflow="error", seed=3)
    path = plan.save(tmp_path / "plan.npz")
    again = Plan.load(path, lengths=LENGTHS, max_tokens=75)
    assert again.sha256 == plan.sha256
    assert list(again) == list(plan)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.npz"]
    with pytest.raises(ValueError, match="max_tokens = 75; expected 80"):
        Plan.load(path, max_tokens=80)
    with pytest.raises(ValueError, match="expected those that were planned"):
        Plan.load(path, lengths=LENGTHS[::-1])
    with np.load(path) as file:
        arrays = dict(file)
    arrays["stop"][0] -= 1
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="was changed"):
        Plan.load(path)
