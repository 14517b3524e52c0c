"""Kernels against the dense float64 reference, with its low-precision self as the tolerance; registration and every guard; the flash stand-in."""

import inspect
import logging
from itertools import chain
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import packlib.attention as attention
from packlib import flex, kernels
from packlib.attention import KERNELS, flash_stand_in, kernel_table, register_attention, resolve_kernel, varlen_attention
from packlib.collators import FlatteningCollator, PaddingCollator
from packlib.lab.small_models import small_config, small_model

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CASES = [("cpu", "sdpa", torch.float32), ("cpu", "sdpa", torch.bfloat16), ("cpu", "flex", torch.float32), ("cpu", "reference", torch.float32)]
CASES += [pytest.param("cuda", k, torch.bfloat16, marks=GPU) for k in ("torch_varlen", "flex", "sdpa")]
LENGTHS = (7, 1, 19, 19, 30, 0, 3)


def boundaries(lengths, device="cpu"):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int().to(device)


def random_qkv(lengths, heads=4, kv_heads=2, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(sum(lengths), h, dim, generator=generator, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)]


def run(kernel, qkv, lengths, device="cpu", dtype=torch.float64, backward=True, **options):
    """Output and the three gradients, on the CPU in float64."""
    qkv = [x.detach().to(device, dtype, copy=True).requires_grad_(backward) for x in qkv]
    out = varlen_attention(*qkv, boundaries(lengths, device), max(lengths), kernel=kernel, **options)
    if backward:
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out))
    return [x.detach().double().cpu() for x in (out, *(x.grad for x in qkv if backward))]


def worst(results, truth):
    """Largest error of any result, relative to its largest value (a window of one token has no gradient at the queries)."""
    floor = float(truth[0].abs().max())
    return max(float((r - t).abs().max()) / max(float(t.abs().max()), floor) for r, t in zip(results, truth))


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 16), (4, 2, 24), (6, 2, 16)])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 1), (True, 5), (True, 100), (False, None), (False, 4)])
@pytest.mark.parametrize(("device", "kernel", "dtype"), CASES)
def test_kernel_equals_reference(device, kernel, dtype, causal, window, heads, kv_heads, dim):
    qkv = random_qkv(LENGTHS, heads, kv_heads, dim)
    backward = not (kernel == "flex" and device == "cpu")
    options = {"causal": causal, "window": window, "backward": backward}
    truth = run("reference", qkv, LENGTHS, **options)
    yardstick = worst(run("reference", qkv, LENGTHS, device, dtype, **options), truth)
    assert worst(run(kernel, qkv, LENGTHS, device, dtype, **options), truth) <= 4 * yardstick + 4 * torch.finfo(dtype).eps
    contaminated = run(kernel, qkv, (sum(LENGTHS),), device, dtype, **options)
    if window != 1:  # a window of one token sees no neighbour to be contaminated by
        assert worst(contaminated, truth) > 0.1


@pytest.mark.parametrize("kernel", ["sdpa", "reference", "flex"])
@pytest.mark.parametrize("window", [None, 4])
def test_poison_stays_in_its_segment(kernel, window):
    qkv = [x.float() for x in random_qkv((5, 8, 6))]
    with torch.no_grad():
        clean = varlen_attention(*qkv, boundaries((5, 8, 6)), 8, kernel=kernel, window=window)
        for x in qkv:
            x[5:13] = 1e4
        poisoned = varlen_attention(*qkv, boundaries((5, 8, 6)), 8, kernel=kernel, window=window)
    assert torch.equal(clean[:5], poisoned[:5]) and torch.equal(clean[13:], poisoned[13:])
    assert not torch.equal(clean[5:13], poisoned[5:13])


def test_equal_lengths_take_one_call_and_unequal_one_each():
    spy = mock.Mock(wraps=torch.nn.functional.scaled_dot_product_attention)
    with mock.patch.object(kernels.F, "scaled_dot_product_attention", spy):
        run("sdpa", random_qkv((6, 6, 6)), (6, 6, 6))
        assert spy.call_count == 1
        run("sdpa", random_qkv((6, 5, 6)), (6, 5, 6))
        assert spy.call_count == 4
    assert all(call.kwargs.get("attn_mask") is None for call in spy.call_args_list)  # no mask is ever built


@pytest.mark.parametrize("kernel", ["reference", "flex"])
def test_softcap(kernel):
    q, k, v = (x[:, :1] for x in random_qkv((9,)))
    scores = torch.einsum("qhd,khd->hqk", q, k) * 0.25
    capped = (2.0 * torch.tanh(scores / 2.0)).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    expected = torch.einsum("hqk,khd->qhd", capped.softmax(-1), v)
    with torch.no_grad():
        out = varlen_attention(q, k, v, boundaries((9,)), 9, softcap=2.0, kernel=kernel)
        assert torch.allclose(out, expected, atol=1e-12)
        assert not torch.allclose(varlen_attention(q, k, v, boundaries((9,)), 9, kernel=kernel), expected, atol=1e-3)


def test_value_dimension_may_differ():
    q, k, _ = random_qkv((4, 6))
    v = torch.randn(10, 2, 5, dtype=torch.float64)
    assert run("sdpa", (q, k, v), (4, 6))[0].shape == (10, 4, 5)


@pytest.mark.parametrize("version", ["2.10", "2.11", "2.12"])
def test_torch_varlen_across_signatures(version, monkeypatch):
    """Each signature of PyTorch's kernel is asked for causal attention; its defaults are not causal."""
    seen = {}

    def dense(q, k, v, cu_q, cu_k, max_q, max_k, causal, window, scale):
        return varlen_attention(q, k, v, cu_q, max_q, causal=causal, window=window, scale=scale, kernel="reference")

    def v210(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        seen.update(heads=key.shape[1])
        return dense(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, None, None)

    def v211(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
        seen.update(heads=key.shape[1], window=window_size)
        left = None if window_size[0] < 0 else window_size[0] + 1
        return dense(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size[1] == 0, left, scale)

    def v212(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa
        return v211(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    function = {"2.10": v210, "2.11": v211, "2.12": v212}[version]
    monkeypatch.setattr(kernels, "_varlen_attn", lambda: (function, frozenset(inspect.signature(function).parameters)))
    qkv = random_qkv(LENGTHS)

    def ask(window=None, scale=None, causal=True):
        call = kernels.Call(boundaries(LENGTHS), max(LENGTHS), causal, window, scale or 16**-0.5, None)
        return kernels._torch_varlen(*qkv, call)

    for options in ({}, {"scale": 0.7}, {"causal": False}):
        expected = varlen_attention(*qkv, boundaries(LENGTHS), max(LENGTHS), kernel="reference", **options)
        assert torch.allclose(ask(**options), expected, atol=1e-12)
    assert seen["heads"] == (4 if version == "2.10" else 2)
    if version == "2.10":
        with pytest.raises(NotImplementedError, match="no window"):
            ask(window=5)
    else:
        expected = varlen_attention(*qkv, boundaries(LENGTHS), max(LENGTHS), kernel="reference", window=5)
        assert torch.allclose(ask(window=5), expected, atol=1e-12) and seen["window"] == (4, 0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"query": torch.zeros(9, 3, 16)}, "expected .T, H, D."),
        ({"query": torch.zeros(8, 4, 16)}, "have shapes"),
        ({"query": torch.zeros(9, 4, 16).half()}, "dtypes"),
        ({"cu_seqlens": torch.tensor([0, 9])}, r"torch.int64 \(2,\) on cpu; expected torch.int32"),
        ({"cu_seqlens": torch.tensor([0, 8], dtype=torch.int32)}, "from 0 to 8.*T = 9"),
        ({"cu_seqlens": torch.tensor([1, 9], dtype=torch.int32)}, "from 1 to 9"),
        ({"cu_seqlens": torch.tensor([0, 9, 5, 9], dtype=torch.int32)}, "never decreasing"),
        ({"max_seqlen": 8}, "longest segment 9; .*max_seqlen = 8"),
        ({"max_seqlen": torch.tensor(9)}, "expected an int"),
        ({"window": 0}, "window = 0; expected at least 1"),
        ({"kernel": "fast"}, "kernel = 'fast'; known kernels: auto, flash_attn"),
        ({"kernel": "torch_varlen"}, "does not work here: needs a CUDA device.*working here: sdpa"),
        ({"kernel": "sdpa", "softcap": 30.0}, "no softcap .softcap = 30.0.; these here have: flex, reference"),
    ],
)
def test_bad_input(change, match):
    given = {"query": torch.zeros(9, 4, 16), "key": torch.zeros(9, 2, 16), "value": torch.zeros(9, 2, 16)}
    given |= {"cu_seqlens": boundaries((9,)), "max_seqlen": 9}
    varlen_attention(**given)
    with pytest.raises(ValueError, match=match):
        varlen_attention(**given | change)


def test_flex_has_no_backward_on_cpu():
    with pytest.raises(NotImplementedError, match="no backward on the CPU"):
        run("flex", random_qkv((4, 5)), (4, 5))


def test_auto_picks_once_and_says_so(caplog):
    kernels._resolve.cache_clear()
    with caplog.at_level(logging.INFO, "packlib"):
        assert [resolve_kernel("auto", "cpu", torch.float32) for _ in range(3)] == ["sdpa"] * 3
    assert [r.message for r in caplog.records] == ["packlib: kernel sdpa for float32 on cpu"]


def test_kernel_table_gives_reasons():
    table = {row["kernel"]: row for row in kernel_table("cpu")}
    assert set(table) == set(KERNELS)
    assert all(row["works"] == (not row["why_not"]) for row in table.values())
    assert "needs a CUDA device" in table["torch_varlen"]["why_not"] and table["sdpa"]["works"]


def test_host_lengths_are_read_once_and_again_after_an_edit():
    cu_seqlens = boundaries((3, 4))
    assert kernels.segment_lengths(cu_seqlens) is kernels.segment_lengths(cu_seqlens)
    cu_seqlens[1] = 5
    assert kernels.segment_lengths(cu_seqlens) == [5, 2]


# --- registration with transformers ---


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_attention()


def features(lengths=(9, 4, 14), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 250, (n,), generator=generator).tolist()} for n in lengths]


def packed(examples):
    batch = FlatteningCollator()(examples)
    del batch["labels"], batch["seq_idx"]
    return batch | {"use_cache": False}


@torch.no_grad()
def alone(model, examples):
    return torch.cat([model(input_ids=torch.tensor([e["input_ids"]]), use_cache=False).logits[0] for e in examples])


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2", "phi", "qwen2_moe", "deepseek_v3"])
def test_packed_and_padded_equal_one_at_a_time(model_type):
    model, truth = small_model(model_type, "packlib_varlen"), alone(small_model(model_type, "sdpa"), features())
    tolerance = 1e-5 * float(truth.abs().max())
    padded = PaddingCollator()(features())
    left = {k: v.flip(1) for k, v in padded.items()}
    left["input_ids"][left["attention_mask"].bool()] = padded["input_ids"][padded["attention_mask"].bool()]
    with torch.no_grad(), mock.patch.object(attention, "varlen_attention", wraps=attention.varlen_attention) as spy:
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
        outs = [model(input_ids=batch["input_ids"].masked_fill(~mask, t), attention_mask=batch["attention_mask"]).logits for t in (5, 77)]
    assert torch.equal(outs[0][mask], outs[1][mask])


def test_layout_of_a_padded_batch_is_found_once_for_all_layers():
    model, batch = small_model("llama", "packlib_varlen"), PaddingCollator()(features())
    with mock.patch.object(attention, "_find_layout", wraps=attention._find_layout) as spy:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert spy.call_count == 1 < model.config.num_hidden_layers


def restart(batch=1):
    ids = torch.arange(3, 13)[None].repeat(batch, 1)
    return {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]).repeat(batch, 1), "use_cache": False}


BOUNDARIES = {"cu_seq_lens_q": boundaries((4, 6)), "cu_seq_lens_k": boundaries((4, 6)), "max_length_q": 6, "max_length_k": 6}


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
        ({"input_ids": torch.ones(1, 5).long(), "attention_mask": torch.tensor([[1, 1, 0, 1, 1]])}, r"attention_mask\[0\] has zeros between"),
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


def test_names_and_kernels_are_checked_when_registering():
    with pytest.raises(ValueError, match='names with "flash"'):
        register_attention(name="my_flash")
    with pytest.raises(ValueError, match="known kernels"):
        register_attention("fast")


def test_autocast_brings_float32_queries_back():
    model = small_model("llama", "packlib_varlen")
    with torch.autocast("cpu", torch.bfloat16), mock.patch.object(attention, "varlen_attention", wraps=varlen_attention) as spy:
        model(**packed(features()))
    assert {x.dtype for x in spy.call_args.args[:3]} == {torch.bfloat16}


# --- the flash path of transformers on the stand-in ---


@pytest.mark.parametrize("model_type", ["llama", "mistral", "falcon", "opt"])
def test_flash_path_of_transformers(model_type):
    truth = alone(small_model(model_type), features())
    batch = packed(features())
    if model_type == "falcon":
        batch = {k: batch[k] for k in ("input_ids", "position_ids", "use_cache")}
    with torch.no_grad(), flash_stand_in("sdpa"):
        model = small_model(model_type, "flash_attention_2")
        assert torch.allclose(model(**batch).logits[0], truth, atol=1e-5 * float(truth.abs().max()))
        two_rows = {k: torch.cat([v, v]) for k, v in batch.items() if k in ("input_ids", "position_ids")}
        leaked = model(**two_rows, use_cache=False).logits[0]
        assert not torch.allclose(leaked, truth, atol=0.1)  # packing is only seen at batch 1


def test_stand_in_leaves_no_trace():
    with flash_stand_in():
        small_model("llama", "flash_attention_2")
    with pytest.raises(ImportError, match=r"flash_attn|FlashAttention2"):
        small_model("llama", "flash_attention_2")


# --- collator and kernel together ---


def _nothing_lost_nothing_shared(rows):
    """Flatten rows of segments; give every token its example's number as value and equal scores: attention must return that number."""
    tokens = [[100 * (i + 1) + t for t in range(sum(row))] for i, row in enumerate(rows)]
    batch = FlatteningCollator()([{"input_ids": t, "seq_lengths": list(row)} for t, row in zip(tokens, rows)])
    assert batch["input_ids"][0].tolist() == list(chain(*tokens))
    lengths = [n for row in rows for n in row]
    assert batch["cu_seq_lens_q"].diff().tolist() == lengths and batch["max_length_q"] == max(lengths)
    assert batch["position_ids"][0].tolist() == [p for n in lengths for p in range(n)]
    first = batch["position_ids"] == 0
    assert (batch["labels"] == batch["input_ids"].masked_fill(first, -100)).all() and int(first.sum()) == len(lengths)
    number = batch["seq_idx"][0].float()[:, None, None]
    zero = torch.zeros_like(number)
    seen = varlen_attention(zero, zero, number, batch["cu_seq_lens_q"], batch["max_length_q"], kernel="sdpa")
    assert torch.allclose(seen, number, atol=1e-4)


ROWS = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=5)


@settings(max_examples=300, deadline=None)
@given(ROWS)
def test_random_batches(rows):
    _nothing_lost_nothing_shared(rows)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(ROWS)
def test_ten_thousand_random_batches(rows):
    _nothing_lost_nothing_shared(rows)


BAD = [
    (lambda f: f.update(input_ids=[]), "is empty"),
    (lambda f: f.update(labels=[1] * 99), "covers 99 tokens"),
    (lambda f: f.update(attention_mask=[0] * len(f["input_ids"])), "zeros over"),
    (lambda f: f.update(seq_lengths=[99]), "covers 99 tokens"),
    (lambda f: f.update(seq_lengths=[0, len(f["input_ids"])]), "integers of at least 1"),
    (lambda f: f.pop("input_ids"), "has no 'input_ids'"),
]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_fuzzed_bad_input_names_the_example(lengths, data):
    examples = [{"input_ids": list(range(n)), "labels": list(range(n))} for n in lengths]
    index, (spoil, match) = data.draw(st.integers(0, len(lengths) - 1)), data.draw(st.sampled_from(BAD))
    spoil(examples[index])
    with pytest.raises(ValueError, match=rf"features\[{index}\].*{match}"):
        FlatteningCollator()(examples)


def test_flex_is_never_run_uncompiled(monkeypatch):
    """PyTorch gives up compiling a function after a few kinds of call and runs FlexAttention dense; here that is an error, far away."""
    from torch._dynamo.exc import FailOnRecompileLimitHit
    from torch.nn.attention.flex_attention import flex_attention

    compiled = flex._compiled(flex_attention, "cuda", "eager")  # as on a GPU, without generating code

    def kinds(first, last):
        for dim in range(first, last):
            q = torch.randn(1, 1, 128, 8 * dim)
            compiled(q, q, q)

    torch._dynamo.reset()
    with torch.no_grad():
        kinds(1, 12)  # PyTorch's own limit is 8
        monkeypatch.setattr(flex, "_RECOMPILE_LIMIT", 12)
        with pytest.raises(FailOnRecompileLimitHit):
            kinds(12, 16)
    torch._dynamo.reset()
