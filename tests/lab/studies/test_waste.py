"""What notebooks 00 and 01 count is what the plans have; their pictures draw it."""

import numpy as np
import pandas as pd
import pytest

from packlib.lab import advice
from packlib.lab.strategies import STRATEGIES
from packlib.lab.studies import waste
from packlib.plans import shuffled_batches

LENGTHS = np.random.default_rng(0).lognormal(np.log(100) - 0.5, 1.0, 1500).clip(2, 512).astype(int)
EIGHT = [4, 8, 5, 11, 3, 14, 6, 5]


def test_every_strategy_has_a_line():
    table = waste.strategy_table(EIGHT, batch_size=4)
    assert list(table.index) == list(STRATEGIES)
    assert table.loc["padding", "slots"] == shuffled_batches(EIGHT, 4).report(EIGHT, "padded").slots
    assert (table.loc[table["layout"] == "flat", "slots"] == sum(EIGHT)).all()
    assert list(table.index[table["boundary"] == "row"]) == ["fixed_length_packing"]
    assert table.loc["trl_padding", "plan"] == "as TRL makes it"
    holds = table["a step holds"]
    assert holds["padding"] == "4 examples" and holds["fixed_length_packing"] == "4 rows of 14 slots"
    assert holds["multipack_posid"] == "56 slots"
    assert table.loc["dynapipe", "plan"].startswith("DynaPipe's micro-batches (2311.10418): sort by length")
    assert table.loc["sorted_packing_posid", "plan"].endswith("(order = sorted)")


def test_length_grouping_shows_once_the_toy_is_large_enough():
    table = waste.strategy_table(EIGHT * 8, batch_size=4)
    assert table.loc["group_by_length", "slots"] < table.loc["padding", "slots"]
    assert (table.loc[["padding", "group_by_length", "minibatch_packing"], "steps"] == 16).all()
    assert table.loc["multipack_posid", "steps"] < 16


def test_waste_grows_with_the_batch_and_packing_has_none():
    table = waste.waste_by_batch_size(LENGTHS, [1, 4, 16])
    table = table.pivot(index="batch_size", columns="strategy", values="waste")
    assert table.loc[1, "padding"] == 1
    assert table["padding"].is_monotonic_increasing
    assert (table["group_by_length"].loc[4:] < table["padding"].loc[4:]).all()
    assert (table["minibatch_packing"] == 1).all()


def test_a_capacity_loses_what_it_cuts():
    table = waste.capacity_table(np.array([100, 300]), [128, 512])
    assert table["lost_tokens"].tolist() == [pytest.approx(172 / 400), 0.0]
    assert table["cut_examples"].tolist() == [0.5, 0.0]
    assert table["rows"].tolist() == [2, 1]


def test_larger_vocabularies_shorten_the_text():
    table = waste.tokenizer_table("arithmetic", ["bpe:300", "bpe:1024"], batch_size=4, max_tokens=512, limit=200)
    assert table["tokens"].is_monotonic_decreasing
    assert table["packed rows"].iloc[1] < table["packed rows"].iloc[0]
    assert (table["waste, whole"] > 1).all() and (table["waste, cut"] > 1).all()
    effect = waste.tokenizer_effect(table)
    assert f"shrinks by {1 - table['tokens'].iloc[1] / table['tokens'].iloc[0]:.0%}, " in effect
    assert f"padding's waste by {table['waste, whole'].iloc[1] / table['waste, whole'].iloc[0] - 1:+.0%};" in effect


def test_pairs_are_those_that_a_plan_and_a_mask_have():
    plan = shuffled_batches(EIGHT, 4, seed=0)
    pairs = waste.pair_table(plan, EIGHT)["pairs"]
    assert pairs["packed, boundaries"] == plan.report(EIGHT).attention_cost == plan.row_costs().sum()
    assert pairs["packed, no boundaries"] == (plan.row_lengths**2).sum() > pairs["packed, boundaries"]
    longest = [max(EIGHT[segment.example] for segment in row) for row in plan]
    assert pairs["padded"] == 4 * sum(n * n for n in longest)


def test_lengths_are_scaled_to_a_page():
    few = waste.page_sized(LENGTHS, seed=1)
    assert len(few) == waste.PAGE_EXAMPLES and max(few) == waste.PAGE_TOKENS and min(few) >= 1
    assert few == waste.page_sized(LENGTHS, seed=1)


def test_slots_picture_draws_the_plan():
    plan = shuffled_batches(EIGHT, 4, seed=0)
    figure = waste.slots_picture(plan, EIGHT)
    slots = [sum(patch.get_width() for patch in ax.patches) for ax in figure.axes[::2]]
    assert slots == [plan.report(EIGHT, "padded").slots, 56, 56]
    assert slots[0] > 56
    assert [text.get_text() for text in figure.axes[2].texts] == [chr(65 + s.example) for row in plan for s in row]
    assert f"{slots[0]:.0f} slots padded, 56 packed" in figure.alt


def test_attention_image_counts_scores():
    lengths = [4, 8, 5, 11]
    inside = sum(n * (n + 1) // 2 for n in lengths)
    line = list(enumerate(lengths))
    assert waste.attention_image([line], True)[1:] == (0, inside)
    assert waste.attention_image([line], False)[1:] == (28 * 29 // 2 - inside, 28 * 29 // 2)
    padded = [[(e, n), (waste.PADDING, 11 - n)] for e, n in line]
    image, foreign, scores = waste.attention_image(padded, True)
    assert (image.shape, foreign, scores) == ((44, 44, 3), 0, inside)


@pytest.fixture(scope="module")
def advised():
    return {"a": advice.advise(LENGTHS, max_tokens=512, model="tiny-llama")}


def test_figures_draw_and_say_what_they_show(advised):
    for figure in (
        waste.length_histograms({"a": LENGTHS, "b": np.full(10, 7)}),
        waste.waste_curves({"a": waste.waste_by_batch_size(LENGTHS, [1, 4])}),
        waste.capacity_curves({"a": waste.capacity_table(LENGTHS, [64, 512])}),
        waste.predicted_speed_ups(advised),
    ):
        figure.canvas.draw()
        assert len(figure.alt) > 8
        for ax in figure.axes:
            assert ax.get_title(loc="left") and ax.get_xlabel(), figure.alt


def test_predictions_show_their_limit(advised):
    padding, *others = advised["a"].strategies
    figure = waste.predicted_speed_ups(advised)
    assert f"{max(p.speed_up for p in others):.2f} × on a" in figure.get_suptitle()
    dashed = [line.get_xdata() for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    limits = [x[0] for x in dashed if len(x)]  # the legend's line has no points
    assert limits == [padding.waste / p.waste for p in advised["a"].strategies]


def test_findings_are_computed(advised):
    columns = ["tokenizer", "vocabulary", "tokens", "std / mean", "waste, whole", "waste, cut", "lost tokens"]
    rows = [("many", 900, 1000, 1.0, 2.0, 1.5, 0.1), ("few", 300, 4000, 1.0, 2.0, 1.25, 0.5)]
    by_tokenizer = pd.DataFrame(rows, columns=columns)
    nothing = pd.DataFrame(columns=["error"])
    first, second = waste.findings(advised, by_tokenizer, nothing, batch_size=4)
    assert first == f"a, 4 examples a mini-batch: {advised['a'].recommendation}"
    assert second.startswith("a: From few to many the text shrinks by 75%") and second.endswith("changes by +20%.")
    compared = pd.DataFrame({"error": [0.01, -0.08]})
    assert "within 8% of" in waste.findings(advised, by_tokenizer, compared, batch_size=4)[-1]
