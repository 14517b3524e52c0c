"""Any `model_type` of transformers, built small from its config: no download, and a forward takes milliseconds."""

import math
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

# Sizes by the names that configs have for them; a config gets those that it has.
_SIZES: MappingProxyType[str, Any] = MappingProxyType(
    dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 64)
    | dict.fromkeys(("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len"), 256)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4)
    | dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 96)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4)
    | dict.fromkeys(("sliding_window", "local_attention", "state_size", "rotary_dim"), 8)
    | dict(vocab_size=256, num_key_value_heads=2, head_dim=16, num_experts_per_tok=2, use_cache=False)
    | dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
)
_SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
_MLA = dict(q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
_SSM = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=16)
_PER_TYPE: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "deepseek_v3": _MLA | dict(n_group=1, topk_group=1, head_dim=8, num_key_value_heads=4, first_k_dense_replace=1),
        "bamba": _SSM,
        "falcon_h1": _SSM | dict(mamba_d_ssm=128),
        "granitemoehybrid": _SSM | dict(layer_types=["linear_attention", "full_attention"]),
        "deepseek_v2": _MLA | dict(head_dim=8, num_key_value_heads=4, first_k_dense_replace=1),
        "gemma2": dict(layer_types=_SLIDING_AND_FULL),
        "gemma3_text": dict(layer_types=_SLIDING_AND_FULL),
        "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=8),
        "jamba": dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False),
        "lfm2": dict(layer_types=["conv", "full_attention"]),
        "mamba2": dict(num_heads=8, head_dim=16, n_groups=1, chunk_size=16),
        "minimax": dict(layer_types=["linear_attention", "full_attention"]),
        "olmo_hybrid": dict(layer_types=["linear_attention", "full_attention"]),
        "modernbert": dict(layer_types=_SLIDING_AND_FULL),
        "qwen3_next": dict(
            layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4, linear_num_key_heads=2
        ),
        "recurrent_gemma": dict(block_types=["recurrent", "attention"], lru_width=64, attention_window_size=8),
    }
)


def small_config(model_type: str) -> PretrainedConfig:
    """Config of about two layers of 64 channels, vocabulary 256, windows of 8 tokens, no dropout.

    Raises `ValueError` for an unknown type.
    """
    if model_type not in CONFIG_MAPPING_NAMES:
        raise ValueError(f"model_type = {model_type!r}; transformers knows {', '.join(sorted(CONFIG_MAPPING_NAMES))}")
    default = AutoConfig.for_model(model_type)
    settable = [n for n in _SIZES if hasattr(default, n) and not isinstance(getattr(type(default), n, None), property)]
    if "layer_types" in vars(default):
        settable.append("layer_types")
    dropouts = {
        n: 0.0 for n in vars(default) if ("dropout" in n or "pdrop" in n) and isinstance(getattr(default, n), float)
    }
    return AutoConfig.for_model(
        model_type, **{n: _SIZES.get(n) for n in settable} | dropouts | _PER_TYPE.get(model_type, {})
    )


def small_model(
    model_type: str, attn_implementation: str | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """A causal language model (or encoder) of `model_type` from `small_config`, on the CPU, in eval mode.

    One seed, one set of weights. Those of linear layers and embeddings are drawn so that activations are of order one:
    with transformers' own initialisation a model this small attends to everything alike, and a leak would be hard to
    see.
    """
    config = small_config(model_type)
    if dtype == torch.float64:
        config._experts_implementation = "eager"  # the grouped matrix product has no float64
    auto = (
        AutoModelForCausalLM if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not _encoder(config) else AutoModel
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, attn_implementation=attn_implementation, dtype=torch.float32)
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D):
                fan_in = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
                nn.init.normal_(module.weight, std=1.5 / math.sqrt(fan_in))
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=1.0)
    return model.to(dtype).eval()


def _encoder(config: PretrainedConfig) -> bool:
    """BERT and its like are in the causal mapping too, but as decoders: built as encoders here."""
    return hasattr(config, "is_decoder") and hasattr(config, "type_vocab_size")


def load_model(name: str, attn_implementation: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model by local path, `model_type` (built small) or Hub name, in eval mode.

    Raises `OSError` where it is none of these.
    """
    if not Path(name).exists() and name in CONFIG_MAPPING_NAMES:
        return small_model(name, attn_implementation, dtype)
    try:
        return AutoModelForCausalLM.from_pretrained(name, attn_implementation=attn_implementation, dtype=dtype).eval()
    except OSError as error:
        raise OSError(
            f"{name!r} is no folder here, no model_type of transformers, and the Hub did not give it: {error}"
        ) from None
