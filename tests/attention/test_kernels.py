"""Kernels against the dense float64 reference, with its low-precision self as the tolerance; what each refuses."""

import inspect
import logging
from unittest import mock

import pytest
import torch

from packlib.attention import KERNELS, kernel_table, kernels, resolve_kernel, varlen_attention
from tests.attention.cases import LENGTHS, boundaries, random_qkv, run, worst

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CASES = [
    ("cpu", "sdpa", torch.float32),
    ("cpu", "sdpa", torch.bfloat16),
    ("cpu", "flex", torch.float32),
    ("cpu", "reference", torch.float32),
    *[pytest.param("cuda", kernel, torch.bfloat16, marks=GPU) for kernel in ("torch_varlen", "flex", "sdpa")],
]


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 16), (4, 2, 24), (6, 2, 16)])
@pytest.mark.parametrize(
    ("causal", "window"), [(True, None), (True, 1), (True, 5), (True, 100), (False, None), (False, 4)]
)
@pytest.mark.parametrize(("device", "kernel", "dtype"), CASES)
def test_kernel_equals_reference(device, kernel, dtype, causal, window, heads, kv_heads, dim):
    qkv = random_qkv(LENGTHS, heads, kv_heads, dim)
    backward = not (kernel == "flex" and device == "cpu")
    options = {"causal": causal, "window": window, "backward": backward}
    truth = run("reference", qkv, LENGTHS, **options)
    yardstick = worst(run("reference", qkv, LENGTHS, device, dtype, **options), truth)
    assert (
        worst(run(kernel, qkv, LENGTHS, device, dtype, **options), truth) <= 4 * yardstick + 4 * torch.finfo(dtype).eps
    )
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

    def v212(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
    ):
        assert enable_gqa
        return v211(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    function = {"2.10": v210, "2.11": v211, "2.12": v212}[version]
    monkeypatch.setattr(kernels, "_VARLEN_ATTN", function)
    monkeypatch.setattr(kernels, "_VARLEN_OPTIONS", tuple(inspect.signature(function).parameters))
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


def test_a_flash_attn_that_was_built_for_another_pytorch_is_none(monkeypatch):
    """And importing packlib goes on: the other kernels are there."""

    def load(name):
        raise ImportError("undefined symbol: _ZN3c104cuda9SetDeviceEi")

    monkeypatch.setattr(kernels, "distribution", lambda name: None)
    monkeypatch.setattr(kernels.importlib, "import_module", load)
    function, reason = kernels._import_flash_attn()
    assert function is None and reason.startswith("the flash-attn package does not load: undefined symbol")


def test_flash_attn_4_is_asked_in_its_own_words(monkeypatch):
    """What is hidden is None there, and -1 elsewhere; the function returns two things. It fails at dimension 80."""
    qkv, asked = random_qkv((5, 3), dim=80), []

    def function(q, k, v, **options):
        asked.append(options | {"widths": {x.shape[-1] for x in (q, k, v)}})
        call = kernels.Call(options["cu_seqlens_q"], 5, options["causal"], window, options["softmax_scale"], 7.0)
        return KERNELS["reference"].function(q, k, v, call), None

    monkeypatch.setattr(kernels, "_load_flash_attn_4", lambda: function)
    monkeypatch.setattr(kernels, "_half_on_hopper", lambda device, dtype: "")
    kernels._resolve.cache_clear()
    try:
        for causal, window, sides in [
            (True, None, (None, 0)),
            (True, 3, (2, 0)),
            (False, None, (None, None)),
            (False, 3, (2, 2)),
        ]:
            out = varlen_attention(
                *qkv, boundaries((5, 3)), 5, causal=causal, window=window, softcap=7.0, kernel="flash_attn_4"
            )
            assert asked[-1]["widths"] == {96} and asked[-1]["window_size"] == sides and asked[-1]["causal"] is causal
            alike = {"causal": causal, "window": window, "softcap": 7.0}
            plain = varlen_attention(*qkv, boundaries((5, 3)), 5, **alike, kernel="reference")
            torch.testing.assert_close(out, plain, rtol=0, atol=1e-12)
            assert asked[-1]["softcap"] == 7.0 and asked[-1]["softmax_scale"] == qkv[0].shape[-1] ** -0.5
    finally:
        kernels._resolve.cache_clear()


def test_a_flash_attn_4_that_does_not_load_says_why(monkeypatch):
    def load():
        raise ImportError("libcute.so: cannot open shared object file")

    monkeypatch.setattr(kernels, "_half_on_hopper", lambda device, dtype: "")
    assert kernels._has_flash_attn_4(torch.device("cpu"), torch.bfloat16) == "the flash-attn-4 package is not installed"
    monkeypatch.setattr(kernels, "_load_flash_attn_4", load)
    assert "has an old copy): libcute.so" in kernels._has_flash_attn_4(torch.device("cpu"), torch.bfloat16)
