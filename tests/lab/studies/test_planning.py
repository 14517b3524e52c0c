"""What notebook 03 says of plans is what they have, and its pictures draw it."""

import numpy as np
import pytest

from packlib import plans
from packlib.lab.studies import planning
from packlib.plans import best_fit_decreasing, shuffled_batches

LENGTHS = np.random.default_rng(0).lognormal(np.log(100) - 0.5, 1.0, 1500).clip(2, 512).astype(int)
SIZES = {"batch_size": 4, "max_tokens": 512}


def test_planners_are_those_of_the_strategies_and_the_other_packers():
    found = planning.planners()
    assert list(found) == [
        "shuffled_batches",
        "length_grouped_batches",
        "token_budget",
        "dynamic_programming",
        "fixed_length",
        "next_fit (random)",
        "next_fit (sorted)",
        "best_fit_decreasing",
        "best_fit",
        "best_fit_crop",
        "first_fit_decreasing",
        "histogram",
    ]
    assert [strategy.size for strategy in found.values()] == ["examples"] * 2 + ["batch"] * 2 + ["row"] * 8
    assert {strategy.planner.__name__ for strategy in found.values()} <= set(plans.__all__)


def test_every_planner_has_a_line_that_agrees_with_its_plan():
    table = planning.planner_table(LENGTHS, **SIZES).set_index("planner")
    assert list(table.index) == list(planning.planners())
    assert table.loc["best_fit_decreasing", "rows"] == len(best_fit_decreasing(LENGTHS, 512, overflow="error"))
    assert table.loc["fixed_length", "broken_examples"] > 0
    assert (table.loc["fixed_length":, "fill"] == 1).all() and table.loc["shuffled_batches", "fill"] < 1
    assert table["row_fill"].isna().sum() == 4 and table.loc["next_fit (random)", "row_fill"] < 1
    assert (table.drop(["fixed_length", "best_fit_crop"])["broken_examples"] == 0).all()
    assert table.loc["shuffled_batches", "randomness"] > 0.7 > 0.5 > table.loc["length_grouped_batches", "randomness"]


def test_a_planner_is_named_by_its_label():
    assert planning.report_line(LENGTHS[:20], "shuffled_batches", **SIZES).startswith("5 rows, waste ")
    assert "row fill 0." in planning.report_line(LENGTHS[:20], "histogram", **SIZES)
    for function in (planning.report_line, lambda n, name, **sizes: planning.row_pictures(n, [name], seed=0, **sizes)):
        with pytest.raises(ValueError, match=r"unknown planner 'best' .*; known: best_fit, best_fit_crop, "):
            function(LENGTHS, "best", **SIZES)


def test_no_packer_needs_fewer_rows_than_the_bound():
    assert planning.fewest_rows(np.array([5, 5, 1]), 10) == 2 and planning.fewest_rows(np.array([5, 5]), 10) == 1
    assert planning.fewest_rows(LENGTHS, 512) <= len(best_fit_decreasing(LENGTHS, 512, overflow="error"))


def test_fill_grows_with_what_is_planned_at_once():
    table = planning.fill_by_chunk(LENGTHS, 512, [10, 100, 10**6])
    assert table["chunk"].tolist() == [10, 100, len(LENGTHS)]
    assert table["row_fill"].is_monotonic_increasing
    assert table["rows"].iloc[-1] == len(best_fit_decreasing(LENGTHS, 512, overflow="error"))
    assert planning.fill_by_chunk(LENGTHS, 512, [10])["chunk"].tolist() == [10, len(LENGTHS)], "all at once, too"
    assert planning.planned_at(table, 90)["chunk"] == 100
    assert table["more"].iloc[-1] == 0 and table["more"].iloc[0] == pytest.approx(
        table["rows"].iloc[0] / table["rows"].iloc[-1] - 1
    )


def test_a_stream_fills_as_its_buffer_and_its_order_allow():
    table = planning.fill_by_buffer(LENGTHS, 512, [20, 200, 1000, 10**6])
    assert table["buffer"].tolist() == [20, 200, 1000] * 2, "below the corpus"
    assert table["row_fill"].tolist() == pytest.approx((LENGTHS.sum() / 512 / table["rows"]).tolist())
    shuffled, in_order = (lines["row_fill"].tolist() for _, lines in table.groupby("source", sort=False))
    assert shuffled[0] < shuffled[-1] <= table["offline_fill"].max() and in_order[0] < shuffled[0]
    found = planning.buffer_finding(table)
    assert f"sorted by length, a buffer of 1,000 fills {in_order[-1]:.2%}" in found and "Shuffled, a buffer of" in found
    assert "Shuffled, no buffer up to 20 is" in planning.buffer_finding(table[table["buffer"] == 20])
    figure = planning.fill_by_buffer_lines(table)
    assert list(figure.axes[0].lines[0].get_ydata()) == pytest.approx([100 * fill for fill in shuffled])
    assert f"{shuffled[-1]:.2%}" in figure.axes[0].get_title(loc="left") and f"{in_order[-1]:.2%}" in figure.alt


def test_constant_examples_are_constant():
    plan = best_fit_decreasing(LENGTHS, 512, overflow="error")
    table = planning.examples_per_step(plan)
    (target,) = [name for name in table if name.startswith("exactly")]
    shuffled, constant = table.index
    assert constant == f"constant_examples({target.split()[1]})"
    assert table.loc[constant, target] > 90 > 50 > table.loc[shuffled, target]


def test_ranks_wait_for_the_dearest():
    plan = shuffled_batches([1, 2, 3, 4], 1).take([0])
    four = plans.next_fit([1, 1, 2, 3], 3, overflow="error", order="sorted")
    assert planning.slowest_over_mean(plan, 1) == 1
    costs = four.row_costs()[: len(four) // 2 * 2].reshape(-1, 2)
    assert planning.slowest_over_mean(four, 2) == costs.max(axis=1).sum() / costs.mean(axis=1).sum() > 1
    assert planning.rank_costs(four, 2).mean(axis=1) == pytest.approx(1)


def test_long_to_short_sorts_rows_by_their_longest():
    plan = planning.long_to_short(best_fit_decreasing(LENGTHS, 512, overflow="error"))
    longest = np.maximum.reduceat(plan.stop - plan.start, plan.row_splits[:-1])
    assert (np.diff(longest) <= 0).all()


def test_row_pictures_draw_every_token():
    names = list(planning.planners())
    figure = planning.row_pictures(LENGTHS[:12], names, seed=0, **SIZES)
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title(loc="left").split(":")[0] for ax in shown] == names
    for name, ax in zip(names, shown):
        pads = sum(bar.get_width() for bar in ax.patches if bar.get_hatch() == "////")
        tokens = sum(bar.get_width() for bar in ax.patches) - pads
        strategy = planning.planners()[name]
        plan = planning.plan_for(strategy, LENGTHS[:12], seed=0, **SIZES)
        report = plan.report(LENGTHS[:12], strategy.layout)
        assert tokens == LENGTHS[:12].sum() - report.lost_tokens and tokens + pads == report.slots


def test_every_example_has_a_look_of_its_own_and_only_broken_ones_are_crossed_out():
    few = LENGTHS[:24]
    figure = planning.row_pictures(few, ["best_fit_decreasing", "fixed_length"], seed=0, **SIZES)
    whole, cut = figure.axes[:2]
    assert len({bar.get_facecolor() for bar in whole.patches}) == len(whole.patches) == 24
    assert not any(bar.get_hatch() for bar in whole.patches) and "broken" not in whole.get_title(loc="left")
    plan = plans.fixed_length(few, 512, seed=0)
    crossed = [bar.get_facecolor() for bar in cut.patches if bar.get_hatch() == "xxx"]
    assert len(set(crossed)) == plan.report(few).broken_examples and len(crossed) == len(plan.example) - 24 + len(
        set(crossed)
    )
    assert f"{len(set(crossed))} broken" in cut.get_title(loc="left")


def test_cropped_examples_are_crossed_out_and_counted():
    few = LENGTHS[:24]
    (ax,) = planning.row_pictures(few, ["best_fit_crop"], seed=0, **SIZES).axes[:1]
    plan = plans.best_fit_crop(few, 512, seed=0)
    cropped = plan.stop - plan.start < few[plan.example]
    assert [bar.get_hatch() == "xxx" for bar in ax.patches] == cropped.tolist() and cropped.any()
    assert plan.report(few).broken_examples == cropped.sum()
    assert ax.get_title(loc="left").endswith(f", {cropped.sum()} broken")


def test_counts_are_plain_numbers_and_legends_hide_no_rank():
    plan = best_fit_decreasing(LENGTHS, 512, overflow="error")
    figure = planning.drift({"sorted": planning.long_to_short(plan), "shuffled": plan})
    figure.canvas.draw()
    assert {"5", "10", "20"} <= {label.get_text() for label in figure.axes[0].get_yticklabels()}
    figure = planning.rank_waiting({"as planned": plan, "balanced": plan.balance(4)}, 4)
    figure.canvas.draw()
    for ax in figure.axes:
        assert not ax.get_legend().get_window_extent().overlaps(ax.get_window_extent())
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["every rank", "slowest rank"]
    figure = planning.fill_by_buffer_lines(planning.fill_by_buffer(LENGTHS, 512, [20, 200, 1000]))
    figure.canvas.draw()
    assert {"100", "1,000"} <= {label.get_text() for label in figure.axes[0].get_xticklabels()}


def test_figures_draw_and_say_what_they_show():
    plan = best_fit_decreasing(LENGTHS, 512, overflow="error")
    for figure in (
        planning.row_pictures(LENGTHS[:12], list(planning.planners()), seed=0, **SIZES),
        planning.fill_growth(planning.fill_by_chunk(LENGTHS, 512, [100, 1000])),
        planning.drift({"sorted": planning.long_to_short(plan), "shuffled": plan}),
        planning.rank_waiting({"as planned": plan, "balanced": plan.balance(4)}, 4),
    ):
        figure.canvas.draw()
        assert len(figure.alt) > 8
        for ax in figure.axes:
            if ax.get_visible():
                assert ax.get_title(loc="left") and ax.get_xlabel(), figure.alt


def test_drift_is_told_as_it_is_drawn():
    plan = plans.next_fit([4, 4, *[1] * 16], 4, overflow="error", order="sorted")
    drifting, level = planning.long_to_short(plan), plan.take([0, 5, 1, 2, 3, 4])
    counts = {name: made.row_examples for name, made in {"sorted": drifting, "mixed": level}.items()}
    assert (counts["sorted"][0], counts["sorted"][-1]) == (1, 4)
    alt = planning.drift({"sorted": drifting, "mixed": level}).alt
    assert "sorted: 1.0 in the first tenth, 4.0 in the last; mixed: " in alt
    assert alt.endswith(f"mixed: {counts['mixed'][0]:.1f} in the first tenth, {counts['mixed'][-1]:.1f} in the last")


def test_findings_are_computed():
    table, growth = planning.planner_table(LENGTHS, **SIZES), planning.fill_by_chunk(LENGTHS, 512, [100])
    waiting = {"as planned": 1.5, "balanced": 1.25}
    said = planning.findings(table, growth, waiting, lengths=LENGTHS, max_tokens=512, ranks=8)
    by_planner = table.set_index("planner")
    rows = by_planner.loc["best_fit_decreasing", "rows"]
    assert said[0].startswith(f"Best fit packs 1,500 examples into {rows} rows in ")
    assert f"breaks {by_planner.loc['fixed_length', 'broken_examples']} of 1,500" in said[1]
    assert said[2].startswith("Planned 1,500 at a time, rows of 512 tokens are") and "0.0% more steps" in said[2]
    assert said[3].startswith("On 8 ranks the slowest does 1.50 ×") and said[3].endswith("balanced, 1.25 ×.")
