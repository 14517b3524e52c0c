"""The pictures of notebooks 00 and 02: what they show is what the model and the plan do."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from packlib.attention import register_attention
from packlib.collators import FlatteningCollator, PaddingCollator
from packlib.lab import teaching
from packlib.plans import shuffled_batches

EXAMPLES = [[10, 11, 12, 13], [*range(20, 28)], [*range(30, 35)], [*range(40, 50), 410]]  # PAPER.md, §3.5
LENGTHS = [len(e) for e in EXAMPLES]
SEGMENT = np.repeat(np.arange(4), LENGTHS)
ROW = {"input_ids": [token for ids in EXAMPLES for token in ids], "seq_lengths": LENGTHS}
ISOLATED, CONTAMINATED = FlatteningCollator()([ROW]), FlatteningCollator(boundary="row")([ROW])


@pytest.fixture(scope="module")
def model():
    return teaching.small_llama(register_attention("sdpa"))


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


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
    assert torch.allclose(teaching.token_logits(model, CONTAMINATED)[:4], alone[:4], atol=1e-5), "nothing lies before the first example"


@pytest.mark.parametrize("edited", range(4))
def test_editing_an_example_leaves_the_others_bit_still_only_with_boundaries(model, edited):
    ids = torch.where(torch.from_numpy(edited == SEGMENT), 300, torch.tensor(ROW["input_ids"]))
    for batch, still in ((ISOLATED, edited != SEGMENT), (CONTAMINATED, edited > SEGMENT)):
        change = teaching.token_logits(model, batch | {"input_ids": ids[None]}) - teaching.token_logits(model, batch)
        assert np.array_equal(change.abs().amax(1).numpy() == 0, still)


def test_token_strips_write_every_value_and_border():
    figure = teaching.token_strips(ISOLATED, LENGTHS)
    written = [text.get_text() for text in figure.axes[0].texts]
    assert written == [str(v) for name in ("input_ids", "labels", "position_ids") for v in ISOLATED[name][0].tolist()]
    assert figure.axes[0].get_xticks().tolist() == [0, 4, 12, 17, 28]
    assert "[0, 4, 12, 17, 28]" in figure.alt


def test_slots_picture_draws_the_plan():
    lengths = [4, 8, 5, 11, 3, 14, 6, 5]
    plan = shuffled_batches(lengths, 4, seed=0)
    figure = teaching.slots_picture(plan, lengths)
    slots = [sum(patch.get_width() for patch in ax.patches) for ax in figure.axes[::2]]
    assert slots == [plan.report(lengths, "padded").slots, 56, 56]
    assert slots[0] > 56
    assert [text.get_text() for text in figure.axes[2].texts] == [chr(65 + s.example) for row in plan for s in row]
    assert f"{slots[0]:.0f} slots padded, 56 packed" in figure.alt


def test_attention_image_counts_scores():
    lines = [[(0, 4), (1, 8), (2, 5), (3, 11)]]
    inside = sum(n * (n + 1) // 2 for n in LENGTHS)
    assert teaching.attention_image(lines, True)[1:] == (0, inside)
    assert teaching.attention_image(lines, False)[1:] == (28 * 29 // 2 - inside, 28 * 29 // 2)
    padded = [[(e, n), (-1, 11 - n)] for e, n in enumerate(LENGTHS)]
    image, foreign, scores = teaching.attention_image(padded, True)
    assert (image.shape, foreign, scores) == ((44, 44, 3), 0, inside)
