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

from packlib.lab.parameters import check_pretrained

# Sizes, and the names that configs have for them; a config gets those that it has. Whatever changes with the length
# (windows, blocks, tokens that an indexer selects) changes at 8 tokens, so that a few short examples show it.
_NAMES: MappingProxyType[int, str] = MappingProxyType(
    {
        256: "vocab_size vocab_size_per_layer_input n_positions max_position_embeddings n_ctx max_seq_len "
        "max_target_positions",
        96: "intermediate_size ffn_dim n_inner encoder_ffn_dim decoder_ffn_dim dim_ff dff d_inner ffn_hidden_size "
        "dense_intermediate_size feed_forward_size mlp_dim",
        64: "hidden_size n_embd d_model word_embed_proj_dim attention_hidden_size hidden_size_global lru_width "
        "pronunciation_embed_dim shape_embed_dim adapter_in_dim adapter_out_dim adapter_input_size",
        32: "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size o_lora_rank "
        "expert_ffn_hidden_size shared_intermediate_size moe_shared_expert_intermediate_size",
        16: "head_dim swa_head_dim index_head_dim indexer_head_dim d_head dim_head linear_head_dim linear_key_head_dim "
        "linear_value_head_dim mamba_head_dim mamba_d_head attention_head_size laurel_rank hc_lowrank adapter_rank "
        "hidden_size_per_layer_input depthwise_separable_out_channel downsample_hidden_size image_size patch_size "
        "crop_size chunk_size mamba_chunk_size",
        8: "state_size ssm_state_size rotary_dim mamba_num_heads mamba_n_heads mamba_d_state sliding_window "
        "local_attention window_size attention_window_size log_scaling_n_floor index_topk indexer_budget "
        "local_attn_chunk_length lsh_attn_chunk_length",
        4: "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads "
        "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads "
        "linear_num_heads linear_num_value_heads indexer_n_heads num_experts num_local_experts n_routed_experts "
        "index_block_size indexer_compress_ratio",
        2: "num_hidden_layers n_layer n_layers num_layers num_blocks encoder_layers decoder_layers num_encoder_layers "
        "num_decoder_layers num_key_value_heads swa_num_key_value_heads index_n_heads linear_num_key_heads o_groups "
        "n_groups num_experts_per_tok num_experts_per_token moe_topk zero_expert_num",
        1: "n_shared_experts num_shared_experts indexer_kv_heads index_topk_blocks",
    }
)
_SIZES: MappingProxyType[str, Any] = MappingProxyType(
    {name: size for size, names in _NAMES.items() for name in names.split()}
    | {"use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
)
_GROUPS = ("n_group", "topk_group", "num_expert_group")  # of experts: one, where there are any
_MLA = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
_MLA_HEADS = {"head_dim": 8, "num_key_value_heads": 4}  # the rotary part; every head has keys of its own
_WINDOW = {"layer_types": ["sliding_attention", "full_attention"]}
_MIXER = {"layer_types": ["linear_attention", "full_attention"]}
_ROPE = {kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in _WINDOW["layer_types"]}
_SHARED_KEYS = {"layer_types": 2 * _WINDOW["layer_types"], "num_hidden_layers": 4, "num_kv_shared_layers": 2}
_ZAMBA = {
    "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    "num_hidden_layers": 3,
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
    "use_mamba_kernels": False,
}
_PER_TYPE: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "bamba": {"attn_layer_indices": [1]},
        "blt": {"encoder_hash_byte_group_vocab": 64, "patch_size": 4},
        "cohere_compass_text": _WINDOW | {"rope_parameters": _ROPE},
        "dbrx": {
            "attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
            "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96},
        },
        "deepseek_v2": {"first_k_dense_replace": 1},
        "deepseek_v3": {"first_k_dense_replace": 1},
        "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
        "dots1": _WINDOW,
        "dots3_note_text": {f"swa_{name}": size for name, size in _MLA.items()}
        | {"swa_num_key_value_heads": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
        | {"qk_nope_head_dim": 8, "kv_lora_rank": 32, "swa_num_attention_heads": 4, "swa_head_dim": 16},
        "falcon_h1": {"mamba_d_ssm": 128},
        "gemma3n_text": _SHARED_KEYS | {"activation_sparsity_pattern": [0.95, 0.0] * 2},
        "gemma4_text": _SHARED_KEYS,
        "gemma4_unified_text": _SHARED_KEYS,
        "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
        "granitemoehybrid": _MIXER,
        "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
        "laguna": _WINDOW | {"rope_parameters": _ROPE},
        "lfm2": {"layer_types": ["conv", "full_attention"]},
        "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        "llama4_text": {"no_rope_layers": [1, 0]},
        "mamba2": {"num_heads": 8, "n_groups": 1},
        "mellum": _WINDOW | {"rope_parameters": _ROPE},
        "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
        "nemotron_h": {"head_dim": 16},
        "qwen2_moe": _WINDOW | {"use_sliding_window": True, "sliding_window": 8},
        "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
        "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
        "roc_bert": {"pronunciation_vocab_size": 256, "shape_vocab_size": 256},
        "smollm3": _WINDOW | {"use_sliding_window": True},
        "xmod": {"default_language": "en_XX"},
        "zamba": _ZAMBA,
        "zamba2": _ZAMBA | {"mamba_headdim": 16, "hybrid_layer_ids": [1, 2]},
        "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid_sliding", "hybrid"]},
    }
)


def small_config(model_type: str) -> PretrainedConfig:
    """Config of about two layers of 64 channels, vocabulary 256, windows of 8 tokens, no dropout.

    Of layers of several kinds the first of each is kept. Raises `ValueError` for an unknown type.
    """
    if model_type not in CONFIG_MAPPING_NAMES:
        raise ValueError(f"model_type = {model_type!r}; transformers knows {', '.join(sorted(CONFIG_MAPPING_NAMES))}")
    return _small(AutoConfig.for_model(model_type))


def _small(default: PretrainedConfig) -> PretrainedConfig:
    """A config of the same class; the configs inside it are made small too."""
    sizes = {name: size for name, size in _SIZES.items() if _settable(default, name)}
    sizes |= {name: 1 for name in _GROUPS if vars(default).get(name) is not None}
    if "kv_lora_rank" in vars(default):
        sizes |= _MLA | {name: size for name, size in _MLA_HEADS.items() if name in sizes}
    sizes |= {name: 0.0 for name, value in vars(default).items() if _is_dropout(name) and isinstance(value, float)}
    sizes |= _kept_layers(default)
    inner = {name: getattr(default, name, None) for name in default.sub_configs}
    sizes |= {name: _small(config) for name, config in inner.items() if isinstance(config, PretrainedConfig)}
    return type(default)(**sizes | _PER_TYPE.get(default.model_type, {}))


def _settable(config: PretrainedConfig, name: str) -> bool:
    return (name in vars(config) or name in config.attribute_map) and not isinstance(
        getattr(type(config), name, None), property
    )


def _is_dropout(name: str) -> bool:
    return "dropout" in name or "pdrop" in name or "layerdrop" in name


def _kept_layers(default: PretrainedConfig) -> dict[str, Any]:
    """The first layer of each kind that a config lists, two at least."""
    count = getattr(default, "num_hidden_layers", 0)
    lists = {
        name: value
        for name, value in vars(default).items()
        if isinstance(value, list | tuple) and len(value) == count and all(isinstance(kind, str) for kind in value)
    }
    if not lists:
        return {}
    kinds = list(zip(*lists.values()))
    kept = sorted({kinds.index(kind) for kind in kinds}) if len(set(kinds)) > 1 else [0, 1]
    return {name: [value[i] for i in kept] for name, value in lists.items()} | {"num_hidden_layers": len(kept)}


def small_model(
    model_type: str,
    attn_implementation: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    decoder: bool = False,
) -> PreTrainedModel:
    """A causal language model (or encoder) of `model_type` from `small_config`, on the CPU, in eval mode.

    decoder: build BERT and its like, which are encoders by default, as the causal models that they can be too. One
    seed, one set of weights. Those of linear layers and embeddings are drawn so that activations are of order one: with
    transformers' own initialisation a model this small attends to everything alike, and a leak would be hard to see.
    """
    config = small_config(model_type)
    if decoder and hasattr(config, "is_decoder"):
        config.is_decoder = True
    if dtype == torch.float64:
        config._experts_implementation = "eager"  # the grouped matrix product has no float64
    auto = (
        AutoModelForCausalLM if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not _encoder(config) else AutoModel
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, attn_implementation=attn_implementation, dtype=torch.float32)
        draw_of_order_one(model)
    return model.to(dtype).eval()


def draw_of_order_one(model: nn.Module) -> None:
    """Draw the weights of linear layers and embeddings anew, so that activations are of order one."""
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            fan_in = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
            nn.init.normal_(module.weight, std=1.5 / math.sqrt(fan_in))
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0)


def _encoder(config: PretrainedConfig) -> bool:
    """BERT and its like are in the causal mapping too, but as decoders: built as encoders unless they say so."""
    return hasattr(config, "type_vocab_size") and getattr(config, "is_decoder", True) is False


def load_model(name: str, attn_implementation: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model by local path, `model_type` (built small) or Hub name, in eval mode.

    Raises `OSError` or `ValueError` where it is none of these.
    """
    if not Path(name).exists() and name in CONFIG_MAPPING_NAMES:
        return small_model(name, attn_implementation, dtype)
    check_pretrained("model", name, CONFIG_MAPPING_NAMES)
    return AutoModelForCausalLM.from_pretrained(name, attn_implementation=attn_implementation, dtype=dtype).eval()
