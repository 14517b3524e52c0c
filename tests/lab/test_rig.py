"""The rig: what a `Rig` asks of a model and of a trainer. It changes how a step runs, not what it computes."""

import sys
from types import ModuleType

import pytest
import torch

from packlib.lab import models, rig
from packlib.lab.spec import Rig


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
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert rig.prepare(model, Rig()) is model and liger.asked == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert rig.trainer_settings(Rig()) == {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": None}


def test_recomputation_is_the_trainers():
    settings = rig.trainer_settings(Rig(recompute="all"))
    assert settings == {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


def test_fused_layers_leave_the_loss_and_the_weights_alone(liger):
    fused = rig.prepare(small(), Rig(liger=True))
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
