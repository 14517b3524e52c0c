"""Every row of the table plans each example exactly once, and has a look, a layout and a boundary of its own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packlib.collators import FlatteningCollator, PaddingCollator
from packlib.lab import strategies
from packlib.lab.strategies import STRATEGIES, get_strategy, plan_for

WHOLE = [name for name, strategy in STRATEGIES.items() if not strategy.cuts]  # strategies that never cut an example
CROPS = "best_fit_crop_posid"  # and the one that throws away what it cuts off


# plans


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != CROPS])
@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 7), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_every_strategy_plans_every_token_once(name, lengths, batch_size, seed):
    strategy, max_tokens = get_strategy(name), 100
    plan = plan_for(strategy, lengths, batch_size=batch_size, max_tokens=max_tokens, seed=seed)
    planned = sorted((segment.example, segment.start, segment.stop) for row in plan for segment in row)
    covered = {example: 0 for example in range(len(lengths))}
    for example, start, stop in planned:  # the pieces of an example join without gap or overlap
        assert start == covered[example] < stop
        covered[example] = stop
    assert list(covered.values()) == lengths
    assert name not in WHOLE or len(planned) == len(lengths), "no example is cut"
    report = plan.report(lengths, strategy.layout)
    assert (report.lost_tokens, report.real_tokens) == (0, sum(lengths))
    assert report.slots == report.real_tokens or strategy.layout == "padded"
    capacity = batch_size * max_tokens if strategy.size != "row" else max_tokens
    sizes = [[segment.stop - segment.start for segment in row] for row in plan]
    assert max(len(row) * max(row) if strategy.layout == "padded" else sum(row) for row in sizes) <= capacity


@pytest.mark.parametrize("name", STRATEGIES)
def test_plans_follow_the_seed(name):
    lengths = np.random.default_rng(0).integers(1, 100, 200)
    first, again, other = (
        plan_for(get_strategy(name), lengths, batch_size=4, max_tokens=100, seed=seed) for seed in (1, 1, 2)
    )
    assert first.sha256 == again.sha256 and list(first) != list(other)


@pytest.mark.parametrize(
    ("left", "right"), [("padding", "minibatch_packing"), ("fixed_length_packing", "fixed_length_packing_posid")]
)
def test_arms_that_differ_in_one_thing_share_their_rows(left, right):
    lengths = np.random.default_rng(0).integers(1, 100, 200)
    left_plan, right_plan, grouped = (
        plan_for(get_strategy(name), lengths, batch_size=4, max_tokens=100, seed=1)
        for name in (left, right, "group_by_length")
    )
    assert left_plan.sha256 == right_plan.sha256 != grouped.sha256
    assert (STRATEGIES[left].layout, STRATEGIES[left].boundary) != (
        STRATEGIES[right].layout,
        STRATEGIES[right].boundary,
    )


def test_only_fixed_length_packing_is_contaminated_on_purpose():
    assert [name for name, strategy in STRATEGIES.items() if strategy.contaminated] == ["fixed_length_packing"]
    for strategy in STRATEGIES.values():
        collator = strategy.collator(pad_token_id=9)
        assert isinstance(collator, PaddingCollator if strategy.layout == "padded" else FlatteningCollator)
    features = [{"input_ids": [1, 2, 3, 4], "seq_lengths": [3, 1]}]
    for name, ends in (("fixed_length_packing", [0, 4]), ("fixed_length_packing_posid", [0, 3, 4])):
        assert get_strategy(name).collator(0)(features)["cu_seq_lens_q"].tolist() == ends


def test_a_row_of_the_table_is_a_micro_batch_or_a_row():
    rows = {name: strategy.rows_per_batch(4) for name, strategy in STRATEGIES.items()}
    assert {name for name, n in rows.items() if n == 4} == {
        "fixed_length_packing",
        "fixed_length_packing_posid",
        "best_fit_crop_posid",
        "trl_packing_bfd",
    }
    assert set(rows.values()) == {1, 4}


def test_overlong_examples_are_not_planned():
    for name, strategy in STRATEGIES.items():
        if strategy.cuts:
            plan = plan_for(strategy, [5, 101, 300], batch_size=4, max_tokens=100, seed=0)
            assert plan.row_lengths.max() == 100, name
            continue
        with pytest.raises(ValueError, match=r"lengths\[1\] = 101 exceeds max_tokens = 100"):
            plan_for(strategy, [5, 101, 300], batch_size=4, max_tokens=100, seed=0)


def test_unknown_strategies_are_named_with_the_known_ones():
    expected = r"unknown strategy 'multipack' \(did you mean 'multipack_posid'\?\); known: best_fit_.*trl_padding_free"
    with pytest.raises(ValueError, match=expected):
        get_strategy("multipack")


def test_every_strategy_is_listed_and_has_a_look_of_its_own():
    lines = strategies.listing().splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(STRATEGIES)
    assert [line.split()[0] for line in lines if line.endswith("contaminated on purpose")] == ["fixed_length_packing"]
    assert len({strategy.look for strategy in STRATEGIES.values()}) == len(STRATEGIES)
    assert len({strategy.label for strategy in STRATEGIES.values()}) == len(STRATEGIES)
