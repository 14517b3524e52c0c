import matplotlib.pyplot as plt
import numpy as np
import pytest

from packlib import plans
from packlib.lab import advice, plan_figures, plan_study
from packlib.plans import best_fit_decreasing, shuffled_batches

LENGTHS = np.random.default_rng(0).lognormal(np.log(100) - 0.5, 1.0, 1500).clip(2, 512).astype(int)


def test_waste_grows_with_the_batch_and_packing_has_none():
    table = plan_study.waste_by_batch_size(LENGTHS, [1, 4, 16]).pivot(index="batch_size", columns="strategy", values="waste")
    assert table.loc[1, "padding"] == 1
    assert table["padding"].is_monotonic_increasing
    assert (table["group_by_length"].loc[4:] < table["padding"].loc[4:]).all()
    assert (table["minibatch_packing"] == 1).all()


def test_a_capacity_loses_what_it_cuts():
    table = plan_study.capacity_table(np.array([100, 300]), [128, 512])
    assert table["lost_tokens"].tolist() == [pytest.approx(172 / 400), 0.0]
    assert table["cut_examples"].tolist() == [0.5, 0.0]
    assert table["rows"].tolist() == [2, 1]


def test_larger_vocabularies_shorten_the_text():
    table = plan_study.tokenizer_table("arithmetic", ["bpe:300", "bpe:1024"], batch_size=4, max_tokens=512, limit=200)
    assert table["tokens"].is_monotonic_decreasing
    assert table["packed rows"].iloc[1] < table["packed rows"].iloc[0]
    assert (table["padding waste"] > 1).all()


def test_every_planner_has_a_line_that_agrees_with_its_plan():
    table = plan_study.planner_table(LENGTHS, batch_size=4, max_tokens=512).set_index("planner")
    assert list(table.index) == list(plan_study.PLANNERS)
    assert table.loc["best_fit_decreasing", "rows"] == len(best_fit_decreasing(LENGTHS, 512, overflow="error"))
    assert table.loc["fixed_length", "broken_examples"] > 0
    assert (table.drop("fixed_length")["broken_examples"] == 0).all()
    assert table.loc["shuffled_batches", "randomness"] > 0.7 > 0.5 > table.loc["length_grouped_batches", "randomness"]
    with pytest.raises(ValueError, match=r"unknown planner 'best_fit'; known: best_fit_decreasing"):
        plan_study.make_plan("best_fit", LENGTHS, batch_size=4, max_tokens=512)


def test_fill_grows_with_what_is_planned_at_once():
    table = plan_study.fill_by_chunk(LENGTHS, 512, [10, 100, 10**6])
    assert table["chunk"].tolist() == [10, 100, len(LENGTHS)]
    assert table["fill"].is_monotonic_increasing
    assert table["rows"].iloc[-1] == len(best_fit_decreasing(LENGTHS, 512, overflow="error"))


def test_ranks_wait_for_the_dearest():
    plan = shuffled_batches([1, 2, 3, 4], 1).take([0])
    four = plans.next_fit([1, 1, 2, 3], 3, overflow="error", order="sorted")
    assert plan_study.slowest_over_mean(plan, 1) == 1
    costs = four.row_costs()[: len(four) // 2 * 2].reshape(-1, 2)
    assert plan_study.slowest_over_mean(four, 2) == costs.max(axis=1).sum() / costs.mean(axis=1).sum() > 1
    assert plan_study.rank_costs(four, 2).mean(axis=1) == pytest.approx(1)


def test_long_to_short_sorts_rows_by_their_longest():
    plan = plan_study.long_to_short(best_fit_decreasing(LENGTHS, 512, overflow="error"))
    longest = np.maximum.reduceat(plan.stop - plan.start, plan.row_splits[:-1])
    assert (np.diff(longest) <= 0).all()


def figures():
    plan = best_fit_decreasing(LENGTHS, 512, overflow="error")
    few = LENGTHS[:12]
    named = {name: (plan_study.make_plan(name, few, batch_size=4, max_tokens=512), layout) for name, (_, layout) in plan_study.PLANNERS.items()}
    yield plan_figures.length_histograms({"a": LENGTHS, "b": np.full(10, 7)})
    yield plan_figures.waste_curves({"a": plan_study.waste_by_batch_size(LENGTHS, [1, 4])})
    yield plan_figures.capacity_curves({"a": plan_study.capacity_table(LENGTHS, [64, 512])})
    yield plan_figures.row_pictures(named, 512)
    yield plan_figures.fill_growth(plan_study.fill_by_chunk(LENGTHS, 512, [100, 1000]))
    yield plan_figures.examples_per_row({"sorted": plan_study.long_to_short(plan), "shuffled": plan})
    yield plan_figures.rank_waiting({"as planned": plan, "balanced": plan.balance(4)}, 4)
    yield plan_figures.predicted_speed_ups({"a": advice.advise(LENGTHS, max_tokens=512, model="tiny-llama")}, "Predicted")


def test_figures_draw_and_say_what_they_show(tmp_path):
    for i, figure in enumerate(figures()):
        assert len(figure.alt) > 8
        figure.savefig(tmp_path / f"{i}.png")
        plt.close(figure)
        for ax in figure.axes:
            if ax.get_visible():
                assert ax.get_title(loc="left") or ax.get_title(), figure.alt
                assert ax.get_xlabel(), figure.alt
