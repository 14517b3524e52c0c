"""`packlib_varlen` inside transformers: packed and padded batches equal one at a time; what would leak is an error."""

from unittest import mock

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from packlib.attention import register, register_attention, varlen_attention
from packlib.collators import PaddingCollator
from packlib.lab.small_models import small_config, small_model
from tests.attention.cases import alone, boundaries, features, packed


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_attention()


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2", "phi", "qwen2_moe", "deepseek_v3"])
def test_packed_and_padded_equal_one_at_a_time(model_type):
    model, truth = small_model(model_type, "packlib_varlen"), alone(small_model(model_type, "sdpa"), features())
    tolerance = 1e-5 * float(truth.abs().max())
    padded = PaddingCollator()(features())
    left = {k: v.flip(1) for k, v in padded.items()}
    left["input_ids"][left["attention_mask"].bool()] = padded["input_ids"][padded["attention_mask"].bool()]
    with torch.no_grad(), mock.patch.object(register, "varlen_attention", wraps=register.varlen_attention) as spy:
        assert torch.allclose(model(**packed(features())).logits[0], truth, atol=tolerance)
        assert spy.call_count == model.config.num_hidden_layers  # our kernel ran, in every layer
        for batch in (padded, left):
            out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            if batch is padded or model_type != "gpt2":  # GPT-2 counts positions from the pads on if they come first
                assert torch.allclose(out[batch["attention_mask"].bool()], truth, atol=tolerance)
        merged = packed(features()) | {"cu_seq_lens_q": boundaries((27,)), "max_length_q": 27}
        assert not torch.allclose(model(**merged).logits[0], truth, atol=0.1)


def test_pads_may_be_anything():
    model, batch = small_model("llama", "packlib_varlen"), PaddingCollator()(features())
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        outs = [
            model(input_ids=batch["input_ids"].masked_fill(~mask, t), attention_mask=batch["attention_mask"]).logits
            for t in (5, 77)
        ]
    assert torch.equal(outs[0][mask], outs[1][mask])


def test_layout_of_a_padded_batch_is_found_once_for_all_layers():
    model, batch = small_model("llama", "packlib_varlen"), PaddingCollator()(features())
    with mock.patch.object(register, "_real_tokens", wraps=register._real_tokens) as spy:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert spy.call_count == 1 < model.config.num_hidden_layers


def restart(batch=1):
    ids = torch.arange(3, 13)[None].repeat(batch, 1)
    return {
        "input_ids": ids,
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]).repeat(batch, 1),
        "use_cache": False,
    }


BOUNDARIES = {
    "cu_seq_lens_q": boundaries((4, 6)),
    "cu_seq_lens_k": boundaries((4, 6)),
    "max_length_q": 6,
    "max_length_k": 6,
}


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (restart(), "position_ids restart inside a row"),
        (restart() | {"use_cache": True}, "position_ids restart inside a row"),
        (restart(2), "position_ids restart inside a row"),
        (restart() | {"attention_mask": torch.ones(1, 10)}, "position_ids restart inside a row"),
        (restart() | {"attention_mask": torch.tensor([[1] * 8 + [0] * 2])}, "position_ids restart inside a row"),
        (restart() | BOUNDARIES | {"attention_mask": torch.ones(1, 10)}, "cu_seq_lens_q and an attention_mask"),
        (restart(2) | BOUNDARIES, "cu_seq_lens_q with 2 rows"),
        (
            {"input_ids": torch.ones(1, 5).long(), "attention_mask": torch.tensor([[1, 1, 0, 1, 1]])},
            r"attention_mask\[0\] has zeros between",
        ),
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_what_would_leak_is_an_error(model_type, batch, match):
    model = small_model(model_type, "packlib_varlen")
    with torch.no_grad():
        model(**restart() | BOUNDARIES)
        with pytest.raises(ValueError, match=match):
            model(**batch)


def test_what_no_kernel_has_is_an_error():
    model = small_model("llama", "packlib_varlen").train()
    model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"dropout = 0\.1"):
        model(**packed(features()))
    with pytest.raises(ValueError, match="no softcap"):
        small_model("gemma2", "packlib_varlen")(**packed(features()))
    with pytest.raises(ValueError, match="passes s_aux"):
        small_model("gpt_oss", "packlib_varlen")(**packed(features()))
    with pytest.raises(ValueError, match="packlib_varlen is for training"):
        small_model("llama", "packlib_varlen").generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, use_cache=True)
    config = small_config("llama4_text")
    config.attention_chunk_size = 8
    config._attn_implementation = "packlib_varlen"
    with pytest.raises(ValueError, match="attention_chunk_size = 8"):
        AutoModelForCausalLM.from_config(config, attn_implementation="packlib_varlen")(**packed(features()))


def test_a_replica_of_data_parallel_is_refused_where_rows_are_packed():
    """Each would get a piece of `cu_seqlens`. Padded lines can be shared out."""
    model, padded = small_model("llama", "packlib_varlen"), PaddingCollator()(features())
    layer = model.model.layers[0]
    with torch.no_grad():
        whole = model(**padded | {"use_cache": False}).logits
        layer.self_attn = layer.self_attn._replicate_for_data_parallel()
        assert torch.equal(model(**padded | {"use_cache": False}).logits, whole)
        with pytest.raises(ValueError, match="replica of DataParallel"):
            model(**packed(features()))


def test_names_and_kernels_are_checked_when_registering():
    with pytest.raises(ValueError, match='names with "flash"'):
        register_attention(name="my_flash")
    with pytest.raises(ValueError, match="known kernels"):
        register_attention("fast")


def test_autocast_brings_float32_queries_back():
    model = small_model("llama", "packlib_varlen")
    with (
        torch.autocast("cpu", torch.bfloat16),
        mock.patch.object(register, "varlen_attention", wraps=varlen_attention) as spy,
    ):
        model(**packed(features()))
    assert {x.dtype for x in spy.call_args.args[:3]} == {torch.bfloat16}


def test_attention_that_is_told_nothing_of_the_row_is_refused():
    """As Moshi of transformers 5.17 calls it: no mask where none is given, boundaries and position ids dropped."""
    attend = AttentionInterface._global_mapping["packlib_varlen"]
    attention = small_model("llama", "packlib_varlen").model.layers[0].self_attn
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match=r"LlamaAttention's model makes no mask .* whether the row is packed"):
        attend(attention, q, q, q, None)
    told = {"position_ids": torch.arange(5)[None]}, {"cu_seq_lens_q": boundaries((2, 3))}, {"is_causal": False}
    assert all(attend(attention, q, q, q, None, **kwargs)[0].shape == (1, 5, 2, 4) for kwargs in told)
