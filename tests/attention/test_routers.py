"""Pads at the end of a row would be counted by a router's load-balancing loss: refused, by name."""

import pytest
import torch

from packlib.attention import register_attention
from packlib.collators import FlatteningCollator, PaddingCollator
from packlib.lab.small_models import small_model

EXAMPLES = [{"input_ids": [5, 9, 2, 7, 1]}, {"input_ids": [3, 3, 8]}, {"input_ids": [4, 6, 1, 9]}]


@pytest.fixture(scope="module", params=["olmoe", "mixtral", "qwen2_moe"])
def model(request):
    return small_model(request.param, register_attention("reference"), torch.float64)


def losses(model, collator):
    with torch.no_grad():
        return model(**collator(EXAMPLES), output_router_logits=True)


def test_a_pad_tail_is_refused_where_a_router_counts_it(model):
    with pytest.raises(ValueError, match=r"the batch ends in pads, which the router loss of .*Attention's model would"):
        losses(model, FlatteningCollator(pad_to_multiple_of=16))
    model.config.output_router_logits = True
    try:
        with pytest.raises(ValueError, match="set output_router_logits = False"):
            model(**FlatteningCollator(pad_to_multiple_of=16)(EXAMPLES))
    finally:
        model.config.output_router_logits = False


def test_without_pads_the_router_counts_what_padding_with_a_mask_counts(model):
    packed, padded = losses(model, FlatteningCollator()), losses(model, PaddingCollator())
    assert packed.aux_loss.item() == pytest.approx(padded.aux_loss.item(), rel=1e-6), "transformers leaves masked out"
    unmasked = PaddingCollator()(EXAMPLES)
    del unmasked["attention_mask"]
    with torch.no_grad():
        counted = model(**unmasked, output_router_logits=True).aux_loss.item()
    assert counted != pytest.approx(packed.aux_loss.item(), rel=1e-4), "and with pads it is another number"


def test_pads_are_welcome_where_nothing_counts_them(model):
    with torch.no_grad():
        with_pads = model(**FlatteningCollator(pad_to_multiple_of=16)(EXAMPLES)).loss
        without = model(**FlatteningCollator()(EXAMPLES)).loss
    assert with_pads.item() == pytest.approx(without.item(), rel=1e-6)


def test_compiled_layers_refuse_pads_that_a_router_counts_later():
    """What was compiled while nobody collected router logits; without pads it goes on, with them it is refused."""
    model = small_model("olmoe", register_attention("sdpa"))
    losses(model, FlatteningCollator())  # transformers' hooks are there before anything is compiled
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend="eager")
    with torch.no_grad():
        model(**FlatteningCollator(pad_to_multiple_of=16)(EXAMPLES))
    with pytest.raises(ValueError, match="the batch ends in pads, which the router loss of"):
        losses(model, FlatteningCollator(pad_to_multiple_of=16))
    assert torch.isfinite(losses(model, FlatteningCollator()).loss)
