"""Models by name: a tiny Llama for the CPU, and the paper's architectures at full size from their published configs.

A name in `MODELS` is built with random weights on the device, in the dtype: nothing is downloaded or copied, and speed
and memory do not depend on the values of the weights. Any other name is pretrained: Hub name, folder or .gguf file.
`use_cache` is off: with a cache, packed rows leak into each other on the sdpa and eager paths of transformers.
"""

import contextlib
import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from packlib.lab.parameters import check_pretrained
from packlib.lab.records import cache_folder


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A published config: `model_type` of transformers and the values of its config.json that matter to it.

    attention_route: `interface` where the model takes any registered attn_implementation; `flash` where its own
    attention classes know only eager, sdpa and flash_attention_2, so that a varlen kernel is reached through the last.
    """

    source: str
    model_type: str
    config: dict[str, Any]
    attention_route: str = "interface"
    any_vocabulary: bool = False


WITHOUT_ATTENTION = ("conv", "linear_attention", "mamba")  # transformers' names for layers of hybrids
FLASH_ROUTE = ("eager", "sdpa", "flash_attention_2")


def _architecture(
    source: str,
    model_type: str,
    *,
    attention_route: str = "interface",
    any_vocabulary: bool = False,
    **config: Any,
) -> Architecture:
    return Architecture(source, model_type, config, attention_route, any_vocabulary)


MODELS = {
    # 2.0 M parameters in the layers: about 8000 tokens/s of float32 training on two cores, with 4096 entries.
    "tiny-llama": _architecture(
        "packlib",
        "llama",
        vocab_size=4096,
        hidden_size=192,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        any_vocabulary=True,
    ),
    # config.json of the source; Jiang et al., arXiv 2310.06825, table 1.
    "mistral-7b": _architecture(
        "mistralai/Mistral-7B-v0.1",
        "mistral",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        sliding_window=4096,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
    ),
    # config.json of the source; Touvron et al., arXiv 2307.09288, section 2.
    "llama-2-7b": _architecture(
        "meta-llama/Llama-2-7b-hf",
        "llama",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    ),
    # config.json of the source; Mishra et al., arXiv 2405.04324, table 2.
    "granite-8b-code": _architecture(
        "ibm-granite/granite-8b-code-base-4k",
        "llama",
        vocab_size=49152,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    ),
    # config.json of the source; Almazrouei et al., arXiv 2311.16867. 71 query heads share one key and value head.
    "falcon-7b": _architecture(
        "tiiuae/falcon-7b",
        "falcon",
        vocab_size=65024,
        hidden_size=4544,
        num_hidden_layers=32,
        num_attention_heads=71,
        multi_query=True,
        parallel_attn=True,
        new_decoder_architecture=False,
        alibi=False,
        bias=False,
        max_position_embeddings=2048,
        layer_norm_epsilon=1e-5,
        attention_route="flash",
    ),
    # config.json of the source. Rotary position in 32 of the 80 dimensions of a head; dropout 0.1 on the residuals.
    "phi-2": _architecture(
        "microsoft/phi-2",
        "phi",
        vocab_size=51200,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
        partial_rotary_factor=0.4,
        resid_pdrop=0.1,
        bos_token_id=50256,
        eos_token_id=50256,
    ),
    # config.json of the source; Gemma Team, arXiv 2403.08295, table 1.
    "gemma-7b": _architecture(
        "google/gemma-7b",
        "gemma",
        vocab_size=256000,
        hidden_size=3072,
        intermediate_size=24576,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=256,
        max_position_embeddings=8192,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    ),
    # config.json of the source. Of 60 experts 4 are used for a token, with 1 shared expert (4 joined into one).
    "qwen1.5-moe-a2.7b": _architecture(
        "Qwen/Qwen1.5-MoE-A2.7B",
        "qwen2_moe",
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        num_experts=60,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        max_position_embeddings=8192,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        bos_token_id=151643,
        eos_token_id=151643,
    ),
    # config.json of the source; Allal et al., arXiv 2502.02737.
    "smollm2-135m": _architecture(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    ),
    # config.json of the source. Short convolutions over 3 tokens in ten layers, attention in the other six.
    "lfm2-1.2b": _architecture(
        "LiquidAI/LFM2-1.2B",
        "lfm2",
        vocab_size=65536,
        hidden_size=2048,
        intermediate_size=12288,
        block_auto_adjust_ff_dim=True,  # two thirds of it, up to a multiple of 256: 8192
        block_ffn_dim_multiplier=1.0,
        block_multiple_of=256,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        conv_L_cache=3,
        conv_bias=False,
        layer_types=[
            *("conv", "conv", "full_attention") * 3,
            *("conv", "full_attention") * 3,
            "conv",
        ],
        max_position_embeddings=128000,
        norm_eps=1e-5,
        rope_theta=1e6,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=7,
        pad_token_id=0,
    ),
    # As the text_config of the source's config.json, but for intermediate_size, which nobody here has seen there. Three
    # layers of gated delta rule (a convolution over 4 tokens and linear attention) for one of attention, which turns a
    # quarter of the 256 dimensions of a head.
    "qwen3.5-2b": _architecture(
        "Qwen/Qwen3.5-2B",
        "qwen3_5_text",
        vocab_size=248320,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        layer_types=[*("linear_attention",) * 3, "full_attention"] * 6,
        max_position_embeddings=262144,
        rms_norm_eps=1e-6,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10],
            "mrope_interleaved": True,
        },
        tie_word_embeddings=True,
        eos_token_id=248044,
    ),
}


def architecture(name: str) -> Architecture | None:
    """The entry of MODELS behind a name; None for a pretrained model."""
    return MODELS.get(name)


def model_config(name: str, *, vocab_size: int | None = None, layers: int | None = None) -> PreTrainedConfig:
    """Config of a name in MODELS (vocab_size, layers replace published values), a Hub name, a folder or a .gguf path.

    Raises ValueError when a pretrained model has another number of layers or too small a vocabulary.
    """
    if known := architecture(name):
        kinds = known.config.get("layer_types")
        changes = {
            "vocab_size": vocab_size,
            "num_hidden_layers": layers,
            "layer_types": kinds and layers and kinds[:layers],
        }
        changes = {key: value for key, value in changes.items() if value is not None}
        return AutoConfig.for_model(known.model_type, **{**known.config, **changes, "use_cache": False})
    check_pretrained("model", name, MODELS)
    config = AutoConfig.from_pretrained(**_location(name), use_cache=False)
    if layers not in (None, config.num_hidden_layers) or (vocab_size or 0) > config.vocab_size:
        raise ValueError(
            f"{name} is pretrained with {config.num_hidden_layers} layers and a vocabulary of {config.vocab_size}; "
            f"got layers = {layers}, vocab_size = {vocab_size}. Known without weights: {', '.join(MODELS)}"
        )
    return config


def build_model(
    name: str,
    *,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    vocab_size: int | None = None,
    layers: int | None = None,
) -> PreTrainedModel:
    """A causal language model on `device` in `dtype`, in training mode; the caller's random generator is left alone.

    A name in MODELS gets random weights that depend on the seed (and kind of device) only, another name its own.
    Raises ValueError when the model's attention classes cannot take attn_implementation.
    """
    if name in MODELS and MODELS[name].attention_route == "flash" and attn_implementation not in FLASH_ROUTE:
        raise ValueError(
            f"{name} bypasses transformers' attention interface; attn_implementation = {attn_implementation!r} cannot "
            f"reach it, expected one of {', '.join(FLASH_ROUTE)}"
        )
    if name.endswith(".gguf") and Path(name).exists():
        name = _dequantised(Path(name))
    config, device = model_config(name, vocab_size=vocab_size, layers=layers), torch.device(device)
    if name not in MODELS:
        model: Any = AutoModelForCausalLM.from_pretrained(
            **_location(name), config=config, dtype=dtype, attn_implementation=attn_implementation
        )
        return model.to(device).train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            config=config, dtype=dtype, attn_implementation=attn_implementation
        ).train()


def _dequantised(path: Path) -> str:
    """Folder with the weights of a .gguf file in float32, kept in the cache: reading the file takes half a minute."""
    status = path.stat()
    folder = cache_folder() / "gguf" / f"{path.stem}-{status.st_size}-{status.st_mtime_ns}"
    if not folder.exists():
        model: Any = AutoModelForCausalLM.from_pretrained(**_location(str(path)), dtype=torch.float32, use_cache=False)
        # Weights are in float32 by now, but stay marked as quantised, which nobody could save.
        model.is_quantized, model.hf_quantizer = False, None
        vars(model.config).pop("quantization_config", None)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            model.save_pretrained(Path(made, folder.name))
            with contextlib.suppress(OSError):  # another process was first
                Path(made, folder.name).rename(folder)
    return str(folder)


def _location(name: str) -> dict[str, str]:
    path = Path(name)
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": name}


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model: all; without the embeddings (input table and output head); of these, used for one token.

    `active` is below `without_embeddings` only for mixtures of experts. `head` is the output head, tied or not.
    """

    total: int
    without_embeddings: int
    active: int
    head: int


def parameter_count(config: PreTrainedConfig) -> ParameterCount:
    """Count on the meta device: no memory, also for 14 B parameters.

    >>> parameter_count(model_config("mistral-7b"))
    ParameterCount(total=7241732096, without_embeddings=6979588096, active=6979588096, head=131072000)
    """
    return _counted(type(config), config.to_json_string(use_diff=False))  # type: ignore[arg-type]


@functools.cache  # a model of 32 layers takes 0.2 s, and tables ask for the same one for every record
def _counted(kind: type[PreTrainedConfig], text: str) -> ParameterCount:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config := kind.from_dict(json.loads(text)))
    head = model.get_output_embeddings()
    tables = {*model.get_input_embeddings().parameters(), *head.parameters()}  # a set: they may be tied
    total = sum(parameter.numel() for parameter in model.parameters())
    layers = total - sum(parameter.numel() for parameter in tables)
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    used = experts * config.num_experts_per_tok // config.num_experts if experts else 0
    return ParameterCount(total, layers, layers - experts + used, head.weight.numel())


def attention_flops_per_token(config: PreTrainedConfig, seq_len: float) -> float:
    """Operations of attention itself, forward and backward, for a token of an example of seq_len tokens: 12 L H D keys.

    L: layers with attention; what the others of a hybrid do between tokens is little beside their products. keys: mean
    number attended to, (seq_len + 1) / 2, less with a sliding window. For examples of several lengths pass Σ n² / Σ n.
    Packing with boundaries does not change it; without them it grows with the row.

    >>> config = model_config("llama-2-7b")
    >>> round(attention_flops_per_token(config, 4096) / flops_per_token(config), 3)
    0.081
    """
    window = min(getattr(config, "sliding_window", None) or seq_len, seq_len)
    keys = window - window * (window - 1) / (2 * seq_len)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = len(kinds) - sum(kind in WITHOUT_ATTENTION for kind in kinds)
    return 12 * layers * config.num_attention_heads * head_dim * keys


def flops_per_token(config: PreTrainedConfig, seq_len: float | None = None) -> float:
    """Operations of forward and backward per real token: 6 N, plus attention_flops_per_token when seq_len is given.

    N: parameters a token is multiplied with, that is the active ones of the layers and the output head; looking a row
    of the input embedding up costs nothing. 6 = 2 forward + 4 backward (Kaplan et al., arXiv 2001.08361); what gradient
    checkpointing computes again is not counted.

    >>> round(flops_per_token(model_config("mistral-7b")) / 1e9, 2)
    42.66
    """
    count = parameter_count(config)
    return 6.0 * (count.active + count.head) + (attention_flops_per_token(config, seq_len) if seq_len else 0.0)
