"""The pictures and tables of notebook 02: what they show is what the model does."""

import numpy as np
import pytest
import torch

from packlib.attention import register_attention
from packlib.collators import FlatteningCollator, PaddingCollator
from packlib.lab.studies import teaching

EXAMPLES = [[10, 11, 12, 13], [*range(20, 28)], [*range(30, 35)], [*range(40, 50), 410]]  # PAPER.md, §3.5
LENGTHS = [len(e) for e in EXAMPLES]
SEGMENT = np.repeat(np.arange(4), LENGTHS)
ROW = {"input_ids": [token for ids in EXAMPLES for token in ids], "seq_lengths": LENGTHS}
ISOLATED, CONTAMINATED = FlatteningCollator()([ROW]), FlatteningCollator(boundary="row")([ROW])


@pytest.fixture(scope="module")
def model():
    return teaching.small_llama(register_attention("sdpa"))


def test_attention_weights_stay_inside_examples_only_with_boundaries(model):
    inside = (SEGMENT[:, None] == SEGMENT) & np.tri(28, dtype=bool)
    isolated, contaminated = (teaching.attention_weights(model, batch) for batch in (ISOLATED, CONTAMINATED))
    assert np.array_equal(isolated > 0, inside)
    assert np.array_equal(contaminated > 0, np.tri(28, dtype=bool))
    assert np.allclose(isolated.sum(1), 1) and np.allclose(contaminated.sum(1), 1)
    assert model.config._attn_implementation == "packlib_varlen", "the model is left as it was"


def test_attention_weights_differ_between_tokens(model):
    last = teaching.attention_weights(model, ISOLATED)[-1, -11:]
    assert last.max() > 2 / 11, "a uniform picture would show nothing"


def test_token_logits_are_in_reading_order_for_every_layout(model):
    features = [{"input_ids": ids} for ids in EXAMPLES]
    alone = teaching.token_logits(model, *(FlatteningCollator()([feature]) for feature in features))
    assert alone.shape == (28, 512)
    assert torch.allclose(teaching.token_logits(model, ISOLATED), alone, atol=1e-5)
    assert torch.allclose(teaching.token_logits(model, PaddingCollator()(features)), alone, atol=1e-5)
    assert (teaching.token_logits(model, CONTAMINATED) - alone)[4:].abs().max() > 0.1
    assert torch.allclose(teaching.token_logits(model, CONTAMINATED)[:4], alone[:4], atol=1e-5), (
        "nothing lies before the first example"
    )


@pytest.mark.parametrize("edited", range(4))
def test_editing_an_example_leaves_the_others_bit_still_only_with_boundaries(model, edited):
    batches = {"with": ISOLATED, "without": CONTAMINATED}
    changes = teaching.edit_changes(model, batches, edited == SEGMENT, token=300)
    assert np.array_equal(changes["with"] == 0, edited != SEGMENT)
    assert np.array_equal(changes["without"] == 0, edited > SEGMENT)


def test_layouts_are_held_against_the_first(model):
    features = [{"input_ids": ids} for ids in EXAMPLES]
    layouts = {
        "one at a time": [FlatteningCollator()([feature]) for feature in features],
        "padded": [PaddingCollator()(features)],
        "packed": [ISOLATED],
        "without boundaries": [CONTAMINATED],
    }
    table = teaching.layout_losses(model, layouts)
    assert table.loc["one at a time", "difference"] == 0 and table.loc["without boundaries", "difference"] > 0.1
    assert table["loss"].iloc[:3].to_numpy() == pytest.approx(table["loss"].iloc[0], abs=1e-5)
    assert abs(table.loc["without boundaries", "loss"] - table["loss"].iloc[0]) > 1e-3

    noticed, same = {"without": 1.5, "with": 0.0}, {"input_ids": True, "labels": False}
    scores = {"RoPE": {0: np.zeros(2), 9: np.zeros(2)}, "a table": {0: np.zeros(2), 9: np.array([0.0, 3.0])}}
    said = teaching.findings(table, noticed, [0.5, 0.0], same, scores, edited="A")
    assert said[0].startswith("1 of 2 entries") and "with them 0%" in said[1]
    assert said[2].endswith("up to 0 with RoPE and 3 with a table.") and "by up to 1.5 " in said[3]
    assert "padded and packed; without boundaries gives" in said[4]


def rotate(x, positions):
    first, second = x.chunk(2, -1)
    angle = positions[:, None] * 10_000 ** -torch.arange(0, 1, 2 / x.shape[-1], dtype=x.dtype)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def test_rotary_scores_know_the_distance_alone_and_learned_ones_the_place(model):
    assert teaching.same_as_llama(rotate, model)
    assert not teaching.same_as_llama(lambda x, positions: rotate(x, positions + 1), model)
    table = torch.randn(2000, 64, dtype=torch.float64)
    rotary = teaching.scores_by_distance(rotate, [100, 1500])
    learned = teaching.scores_by_distance(lambda x, positions: x + table[positions], [100, 1500])
    assert teaching.max_spread(rotary) < 1e-10 < 0.1 < teaching.max_spread(learned)
    assert np.ptp(rotary[100]) > 0.1, "it does know the distance"
    figure = teaching.distance_curves({"RoPE": rotary, "learned": learned})
    figure.canvas.draw()
    assert [len(ax.lines) for ax in figure.axes] == [2, 2] and "learned: the same distance" in figure.alt


def test_errors_are_numbers_or_the_reason_of_a_refusal(model):
    alone = {name: ISOLATED[name] for name in ("input_ids", "position_ids")}
    reference = teaching.token_logits(model, ISOLATED)
    cases = {"position ids": alone, "cache on": alone | {"use_cache": True}, "all": ISOLATED}
    table = teaching.logit_errors(model, cases, reference, ["sdpa", "packlib_varlen"])
    assert float(table.loc["position ids", "sdpa"]) < 1e-4 < 0.1 < float(table.loc["cache on", "sdpa"])
    assert table.loc["position ids", "packlib_varlen"].startswith("refused: ")
    assert float(table.loc["all", "packlib_varlen"]) == 0


def test_token_strips_write_every_value_and_border():
    figure = teaching.token_strips(ISOLATED, LENGTHS)
    written = [text.get_text() for text in figure.axes[0].texts]
    assert written == [str(v) for name in ("input_ids", "labels", "position_ids") for v in ISOLATED[name][0].tolist()]
    assert figure.axes[0].get_xticks().tolist() == [0, 4, 12, 17, 28]
    assert "[0, 4, 12, 17, 28]" in figure.alt
    assert figure.alt.endswith("position_ids are 0 at [0, 4, 12, 17], labels are -100 at [0, 4, 12, 17]")
    figure.canvas.draw()
    (ax,) = figure.axes
    (rules,) = ax.collections
    lowest = min(ax.transData.transform(path.vertices)[:, 1].min() for path in rules.get_paths())
    assert all(label.get_window_extent().y1 < lowest for label in ax.get_xticklabels()), "below the rules"


def test_attention_pictures_leave_white_what_is_not_attended():
    weight = np.tril(np.full((5, 5), 0.2))
    isolated = weight * np.kron(np.eye(2), np.ones((3, 3)))[:5, :5]
    figure = teaching.attention_pictures([3, 2], [weight, isolated], ["contaminated", "PosID"])
    figure.canvas.draw()
    pictures = [np.ma.filled(ax.images[0].get_array(), np.nan) for ax in figure.axes[:2]]
    assert [int(np.isnan(picture).sum()) for picture in pictures] == [10, 16]
    assert figure.alt.endswith("contaminated: 40% goes to other examples; PosID: 0% goes to other examples")


def test_logit_changes_name_the_largest_change_of_the_others():
    changes = {"without PosID": np.array([0.5, 0.5, 0.25, 0.1]), "with PosID": np.array([0.5, 0.5, 0.0, 0.0])}
    figure = teaching.logit_changes(changes, [2, 2], edited=0)
    figure.canvas.draw()
    (ax,) = figure.axes
    assert "0.25 without PosID, 0 with PosID" in ax.get_title(loc="left")
    assert [text.get_text() for text in ax.texts] == ["A, edited", "B"]
