"""Loss weights: packed training sums to the same thing as unpacked training, also over gradient accumulation."""

import pytest
import torch

from packlib import losses
from packlib.collators import FlatteningCollator, PaddingCollator
from packlib.lab.small_models import small_model
from packlib.losses import linear_cross_entropy, token_weights, weighted_loss

LENGTHS = (9, 2, 14, 5, 7, 3)


def features(masked=0):
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 250, (n,), generator=generator).tolist() for n in LENGTHS]
    return [{"input_ids": t, "labels": [-100] * min(masked, len(t) - 1) + t[min(masked, len(t) - 1) :]} for t in tokens]


def step(model, micro_batches, weighting, denominator=None):
    """One optimiser step's loss and gradients, accumulated over micro-batches that share one denominator."""
    weighted = [(b, *token_weights(b["labels"], b.get("cu_seq_lens_q"), weighting)) for b in micro_batches]
    denominator = denominator or sum(total for _, _, total in weighted)
    model.zero_grad()
    loss = 0.0
    for batch, weights, _ in weighted:
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "seq_idx")}
        part = weighted_loss(model(**inputs | {"use_cache": False}).logits, batch["labels"], weights, denominator)
        part.backward()
        loss += float(part.detach())
    return loss, {n: p.grad.clone() for n, p in model.named_parameters()}


def error(a, b):
    return max(float((a[n] - g).norm() / g.norm()) for n, g in b.items())


@pytest.mark.parametrize("masked", [0, 3])
@pytest.mark.parametrize("weighting", ["per_token", "per_example"])
def test_packed_accumulation_equals_unpacked(weighting, masked):
    model, examples = small_model("llama"), features(masked)
    flat, padded = FlatteningCollator(), PaddingCollator()
    packed = step(model, [flat(examples[:4]), flat(examples[4:])], weighting)
    unpacked = step(model, [padded(examples[:2]), padded(examples[2:3]), padded(examples[3:])], weighting)
    assert packed[0] == pytest.approx(unpacked[0], rel=1e-6) and error(packed[1], unpacked[1]) < 1e-5
    other = step(model, [flat(examples)], {"per_token": "per_example", "per_example": "per_token"}[weighting])
    assert error(other[1], unpacked[1]) > 1e-2  # the weighting matters


def test_mean_of_micro_batch_means_is_another_loss():
    """The classic mistake: each micro-batch divided by its own tokens."""
    model, flat = small_model("llama"), FlatteningCollator()
    micro = [flat(features()[:1]), flat(features()[1:])]
    right = step(model, micro, "per_token")
    wrong = [step(model, [m], "per_token") for m in micro]
    mean = {n: (wrong[0][1][n] + wrong[1][1][n]) / 2 for n in right[1]}
    assert error(mean, right[1]) > 1e-2


def test_per_token_is_the_loss_of_transformers():
    model, batch = small_model("llama"), FlatteningCollator()(features())
    inputs = {k: v for k, v in batch.items() if k != "seq_idx"}
    theirs = model(**inputs | {"use_cache": False}).loss
    assert step(model, [batch], "per_token")[0] == pytest.approx(float(theirs.detach()), rel=1e-6)


def test_per_example_is_the_mean_of_example_means():
    model = small_model("llama")
    means = [step(model, [FlatteningCollator()([f])], "per_token")[0] for f in features()]
    assert step(model, [FlatteningCollator()(features())], "per_example")[0] == pytest.approx(
        sum(means) / len(means), rel=1e-6
    )


def test_longalign_weighs_an_example_alike_in_every_step():
    """Steps of one and of five examples, over the mean of three: their sum is that of steps of three (2401.18058)."""
    model, flat, examples = small_model("llama"), FlatteningCollator(), features()

    def sums(cuts, weighting, denominator=None):
        steps = [step(model, [flat(examples[a:b])], weighting, denominator) for a, b in cuts]
        return {n: sum(gradients[n] for _, gradients in steps) for n in steps[0][1]}

    even, uneven = [(0, 3), (3, 6)], [(0, 1), (1, 6)]
    expected = sums(even, "per_example")
    assert error(sums(uneven, "longalign", 3.0), expected) < 1e-5
    assert error(sums(uneven, "per_example"), expected) > 1e-2, "a step's own number: an example alone weighs more"


def test_weights():
    labels, cu_seqlens = (
        torch.tensor([[-100, 1, 2, 3, -100, 4, -100, -100]]),
        torch.tensor([0, 4, 6, 8], dtype=torch.int32),
    )
    weights, total = token_weights(labels, cu_seqlens)
    assert weights.tolist() == [[0, 1, 1, 1, 0, 1, 0, 0]] and total == 4
    weights, total = token_weights(labels, cu_seqlens, "per_example")
    assert (
        torch.allclose(weights, torch.tensor([[0, 1 / 3, 1 / 3, 1 / 3, 0, 1, 0, 0]])) and total == 2
    )  # the last example has no loss token
    assert torch.equal(token_weights(labels, cu_seqlens, "longalign")[0], weights)
    with pytest.raises(ValueError, match="weighting = 'mean'; expected one of per_token, per_example, longalign"):
        token_weights(labels, weighting="mean")


@pytest.mark.parametrize("chunk", [5, 64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_a_loss_without_logits_is_the_loss_of_logits(chunk, weighted, biased, monkeypatch):
    """In chunks (5 of 18 positions) or in one, with the gradients of hidden states, head and bias."""
    monkeypatch.setattr(losses, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden, head, bias = (torch.randn(*n, generator=generator, requires_grad=True) for n in ((2, 10, 6), (7, 6), (7,)))
    labels = torch.randint(0, 7, (2, 10), generator=generator)
    labels[0, 3:6] = -100
    weights = torch.rand(2, 10, generator=generator) if weighted else (labels != -100).float()
    leaves = (hidden, head, bias) if biased else (hidden, head)
    logits = hidden @ head.T + (bias if biased else 0)
    truth = weighted_loss(logits, labels, weights, 1.0)
    found = linear_cross_entropy(
        hidden, head, labels, bias=bias if biased else None, weights=weights if weighted else None
    )
    assert torch.allclose(found, truth, rtol=1e-5)
    expected, gradients = (torch.autograd.grad(loss, leaves) for loss in (truth, found))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients, expected))
    shifted = linear_cross_entropy(hidden, head, labels.roll(1, 1))
    assert not torch.allclose(shifted, truth, rtol=1e-3), "the negative control: labels of other positions"
