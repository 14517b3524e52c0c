"""The rig: how a step is executed. Nothing else in the repository knows how a `Rig` is put on a model and a trainer."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from packlib.lab.spec import Rig


def prepare(model: PreTrainedModel, rig: Rig) -> PreTrainedModel:
    """Put what belongs into the model into it; returns the model. Raises `ValueError` where it cannot be, naming it."""
    if rig.liger:
        fuse_layers(model)
    return model


def trainer_settings(rig: Rig) -> dict[str, Any]:
    """What belongs into the arguments of `trl.SFTConfig`."""
    recompute = rig.recompute == "all"
    return {
        "gradient_checkpointing": recompute,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if recompute else None,
    }


def fuse_layers(model: PreTrainedModel) -> None:
    """Put Liger's kernels for norms, rotary embeddings and gated MLPs into `model`, the rotary one for the process.

    One launch each instead of up to ten; the loss stays as it was. Raises `ValueError` where Liger knows nothing of the
    model's type, `ImportError` without liger-kernel.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = ", ".join(MODEL_TYPE_TO_APPLY_LIGER_FN)
        raise ValueError(f"liger: liger-kernel has no layers for {model.config.model_type}; it has {known}")
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
