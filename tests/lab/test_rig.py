"""The rig: what a `Rig` asks of a model and of a trainer. It changes how a step runs, not what it computes."""

import sys
from types import ModuleType

import pytest
import torch

from packlib.collators import FlatteningCollator
from packlib.lab import models, rig
from packlib.lab.small_models import small_model
from packlib.lab.spec import Rig
from packlib.losses import token_weights, weighted_loss


def small(name="tiny-llama"):
    return models.build_model(name, layers=1, vocab_size=64, seed=3)


@pytest.fixture
def liger(monkeypatch):
    """liger-kernel at the boundary: it notes what it is asked for."""
    module = ModuleType("liger_kernel.transformers")
    patch = ModuleType("liger_kernel.transformers.monkey_patch")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    module.asked = []
    module._apply_liger_kernel_to_instance = lambda model, **options: module.asked.append(options)
    for name, stand_in in {
        "liger_kernel": ModuleType("liger_kernel"),
        module.__name__: module,
        patch.__name__: patch,
    }.items():
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    module.types = patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    return module


def test_the_default_rig_leaves_everything_as_it_is(liger):
    model = small()
    before, forward = {name: value.clone() for name, value in model.state_dict().items()}, model.forward
    rig.prepare(model, Rig())
    assert liger.asked == [] and model.forward == forward
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert rig.trainer_settings(Rig())["gradient_checkpointing"] is False
    assert rig.adapters(Rig()) is None and rig.flat_shapes(Rig(), 256, 8) == {}


def test_recomputation_is_the_trainers():
    settings = rig.trainer_settings(Rig(recompute="all"))
    assert settings["gradient_checkpointing"] is True
    assert settings["gradient_checkpointing_kwargs"] == {"use_reentrant": False}


def test_fused_layers_leave_the_loss_and_the_weights_alone(liger):
    fused = small()
    rig.prepare(fused, Rig(liger=True))
    (asked,) = liger.asked
    assert asked["cross_entropy"] is False and asked["fused_linear_cross_entropy"] is False
    assert all(torch.equal(a, b) for a, b in zip(fused.parameters(), small().parameters()))


def test_fused_layers_are_refused_where_liger_has_none(liger):
    liger.types.clear()
    liger.types["mistral"] = None
    with pytest.raises(ValueError, match="liger: liger-kernel has no layers for llama; it has mistral"):
        rig.prepare(small(), Rig(liger=True))
    assert liger.asked == []


def test_fused_layers_need_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ImportError, match="liger_kernel"):
        rig.prepare(small(), Rig(liger=True))


def batch(lengths=(9, 4, 14)):
    generator = torch.Generator().manual_seed(0)
    examples = [{"input_ids": torch.randint(0, 64, (n,), generator=generator).tolist()} for n in lengths]
    return FlatteningCollator()(examples) | {"use_cache": False}


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def test_a_fused_loss_is_the_sum_of_the_plain_ones():
    """And its gradients are the plain ones', whether every token weighs alike or every example."""
    model, inputs = small(), batch()
    count = int((inputs["labels"] != -100).sum())
    plain = model(**inputs).loss
    plain.backward()
    expected = gradients(model)
    rig.prepare(model, Rig(fused_loss=True))
    assert torch.allclose(model(**inputs).loss, plain), "without being asked it is the model it was"
    summed = model(**inputs, summed_loss=True)
    (summed / count).backward()
    found = gradients(model)
    assert float(summed.detach()) == pytest.approx(count * float(plain.detach()), rel=1e-5)
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in expected.items())
    weights, total = token_weights(inputs["labels"], inputs["cu_seq_lens_q"], "per_example")
    weighted = model(**inputs, summed_loss=True, loss_weights=weights).detach()
    truth = weighted_loss(model(**inputs).logits, inputs["labels"], weights, total).detach()
    assert float(weighted / total) == pytest.approx(float(truth), rel=1e-5)
    assert float(weighted / total) != pytest.approx(float(plain.detach()), rel=1e-4), "another weighting, another loss"


def test_a_fused_loss_is_refused_where_the_model_does_more_to_its_logits():
    with pytest.raises(ValueError, match="fused_loss: Gemma2ForCausalLM changes its logits by final_logit_softcapping"):
        rig.prepare(small_model("gemma2"), Rig(fused_loss=True))


@pytest.mark.parametrize("max_norm", [1e9, 0.5])
def test_the_lean_optimiser_takes_the_steps_of_adamw(max_norm):
    """Clipping included; and what is not clipped differs from what is."""
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(3, 5)), torch.nn.Parameter(torch.ones(7))] for _ in range(2))
    lean, adamw = rig.LeanAdamW(ours, zero=True, **options), torch.optim.AdamW(theirs, **options)
    for _ in range(4):
        for a, b in zip(ours, theirs):
            b.grad = torch.randn(a.shape, generator=generator)
            a.grad = b.grad.clone()
        expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        assert torch.allclose(lean.fold_clip(max_norm), expected)
        lean.step()
        adamw.step()
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs))
        assert all(float(a.grad.abs().max()) == 0 for a in ours), "zeroed where they lie"
    unclipped = torch.nn.Parameter(torch.ones(7))
    unclipped.grad = torch.full((7,), 10.0)
    assert not torch.allclose(unclipped, ours[1])


def test_pads_make_the_shapes_of_batches_repeat():
    options = rig.flat_shapes(Rig(pad_to=32), max_tokens=64, segments=3)
    collator = FlatteningCollator(**options)
    shapes = {rig.shape_of(collator([{"input_ids": [1] * n}, {"input_ids": [2] * m}])) for n, m in ((5, 9), (20, 3))}
    assert len(shapes) == 1
    bare = {rig.shape_of(FlatteningCollator()([{"input_ids": [1] * n}])) for n in (5, 20)}
    assert len(bare) == 2, "the negative control"


def test_adapters_leave_the_weights_untrained():
    pytest.importorskip("peft")
    from peft import get_peft_model

    model = get_peft_model(small(), rig.adapters(Rig(lora_rank=2)))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
