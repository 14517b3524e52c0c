"""Known answers: what is isolated, what leaks and where, in float32 and bfloat16; gradients."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from packlib.attention import KERNELS, flash_stand_in, register_attention
from packlib.collators import FlatteningCollator
from packlib.isolation import ContaminationError, check_equivalence, check_isolation
from packlib.isolation.probe import length_thresholds, packed_batch
from packlib.lab.small_models import small_config, small_model

ISOLATED = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "phi",
    "phi3",
    "granite",
    "olmo2",
    "starcoder2",
    "mixtral",
    "qwen2_moe",
]
LEAKING = {
    "opt": "attention",
    "falcon": "attention",
    "bloom": "attention",
    "mpt": "attention",
    "mamba": "state",
    "mamba2": "state",
    "jamba": "state",
    "recurrent_gemma": "convolution",
    "rwkv": "state",
    "gpt_oss": "attention",
    "bert": "attention",
}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_attention()


def off_diagonal(table):
    return [x for i, row in enumerate(table) for j, x in enumerate(row) if i != j]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_type", ISOLATED)
def test_isolated(model_type, dtype):
    report = check_isolation(small_model(model_type, dtype=dtype), strict=True)
    assert report.verdict in ("exact", "rounding") and report.isolated and report.starts_at is None
    assert max(off_diagonal(report.gradient)) == 0 and report.error <= 8 * max(
        report.noise, torch.finfo(dtype).eps * report.scale
    )
    if model_type not in ("mixtral", "qwen2_moe"):
        assert report.verdict == "exact" and max(off_diagonal(report.influence)) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_type", LEAKING)
def test_leaks_are_found_and_named(model_type, dtype):
    model = small_model(model_type, dtype=dtype)
    report = check_isolation(model)
    assert report.verdict == "leak" and not report.isolated
    assert report.culprit == LEAKING[model_type] and ".0." in report.starts_at  # the first layer already
    assert max(off_diagonal(report.influence)) > 16 * report.noise
    with pytest.raises(ContaminationError, match=rf"LEAK.*starts at {report.starts_at}"):
        check_isolation(model, strict=True)


def test_leak_has_a_direction():
    """In a causal model only what comes before can be seen."""
    report = check_isolation(small_model("opt"))
    assert all(report.influence[i][j] == 0 for i in range(4) for j in range(i + 1, 4)) and report.influence[1][0] > 0


def test_shifted_positions_are_no_leak_and_no_isolation():
    """Nobody sees another's tokens, but what is computed packed is not what is computed alone."""
    with flash_stand_in():
        report = check_isolation(small_model("roberta", "flash_attention_2"))
        assert report.verdict == "shifted" and not report.isolated and report.culprit == "positions"
        assert report.stand_in and "(a stand-in, not the flash-attn package)" in str(report)
        assert max(off_diagonal(report.influence)) == 0
        model = small_model("roberta", "packlib_varlen")
        collator = FlatteningCollator(position_ids_start=model.config.pad_token_id + 1)
        right = check_isolation(model, batch_builder=lambda examples: packed_batch(examples, collator))
    assert right.verdict == "exact" and not right.stand_in


def scaled(rope_type):
    """A llama whose rotary frequencies are others from 64 tokens on."""
    config = small_config("llama")
    config.rope_parameters = {
        "rope_type": rope_type,
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    if rope_type == "longrope":
        half = config.hidden_size // config.num_attention_heads // 2
        config.rope_parameters |= {"short_factor": [1.0] * half, "long_factor": [4.0] * half}
    config.max_position_embeddings = 64 if rope_type == "dynamic" else 256
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(small_model("llama").state_dict())
    return model


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_a_fault_of_the_rows_length_is_not_noise(rope_type):
    """Beside one of 100 tokens an example of 20 has other frequencies than alone; the yardstick must not hide it."""
    model = scaled(rope_type)
    (threshold,) = set(length_thresholds(model.config).values())
    assert threshold == 64
    for lengths in ((20, 100, 15), None):  # None: the threshold is read from the config, and one example is longer
        report = check_isolation(model, lengths=lengths)
        assert report.verdict == "shifted" and not report.isolated and not report.unprobed
        assert report.error > 1 and report.noise < 1e-4 and max(report.lengths) > 64 > min(report.lengths)
    short = check_isolation(scaled(rope_type), lengths=(20, 30, 10))
    assert short.verdict == "exact" and set(short.unprobed.values()) == {64} and "Not tried on both" in str(short)


def test_a_kernel_that_is_not_the_models_own_attention_is_different(monkeypatch):
    """Isolated, and as alone, but wrong: a window forgotten by the kernel."""
    from packlib.attention import register

    right = register.varlen_attention
    monkeypatch.setattr(register, "varlen_attention", lambda *a, **options: right(*a, **options | {"window": None}))
    rows = register.rows_attention
    monkeypatch.setattr(register, "rows_attention", lambda *a, **options: rows(*a, **options | {"window": None}))
    report = check_isolation(small_model("mistral"), kernel="sdpa")
    assert report.verdict == "different" and not report.isolated and report.culprit == "attention"
    assert report.eager_error > 0.1 and report.error < 1e-4


@pytest.mark.parametrize("model_type", ["phimoe", "afmoe", "mistral"])
def test_windows_and_views_are_those_of_eager(model_type):
    report = check_isolation(small_model(model_type), kernel="sdpa")
    assert report.isolated and report.eager_error < 1e-4 and max(report.lengths) > 8


def test_a_window_of_two_sides_that_call_and_mask_count_differently_is_refused():
    config = small_config("mistral")
    config.is_causal = False
    name = register_attention("sdpa", "packlib_sdpa")
    report = check_isolation(AutoModelForCausalLM.from_config(config, attn_implementation=name).eval())
    assert report.verdict == "refused" and "a window of 8 tokens, but its mask has a window of 9" in report.reason


@pytest.mark.parametrize("model_type", ["bloom", "codegen", "gpt_neox_japanese", "gptj", "gpt_neo", "falcon"])
def test_a_kernel_that_is_never_called_is_named(model_type):
    report = check_isolation(small_model(model_type), kernel="sdpa")
    assert (
        report.verdict == "refused" and "computes attention by itself and never calls 'packlib_sdpa'" in report.reason
    )


@pytest.mark.slow
def test_a_compiled_model_is_checked():
    model = torch.compile(small_model("llama"), backend="eager")
    assert check_isolation(model, lengths=(11, 5, 9)).verdict == "exact"


def test_a_refusal_is_neither_a_leak_nor_isolation():
    def position_ids_alone(examples):
        batch = packed_batch(examples)
        return {name: batch[name] for name in ("input_ids", "position_ids", "use_cache")}

    model = small_model("llama", "packlib_varlen")
    with pytest.raises(ContaminationError, match="REFUSED"):
        check_isolation(model, batch_builder=position_ids_alone, strict=True)
    report = check_isolation(model, batch_builder=position_ids_alone)
    assert (
        report.verdict == "refused" and "no boundaries reached the attention" in report.reason and not report.isolated
    )
    assert "REFUSED" in str(report)


@pytest.mark.parametrize("kernel", ["sdpa", "flex", "reference"])
def test_kernels(kernel):
    model = small_model("mistral")
    report = check_isolation(model, kernel=kernel)
    assert report.verdict == "exact" and report.attention == f"packlib_{kernel}"
    assert (report.gradient is None) == (kernel == "flex")
    assert model.config._attn_implementation == "sdpa"


def test_model_is_left_as_it_was():
    model = small_model("llama").train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    check_isolation(model, kernel="reference")
    check_equivalence(model, [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


@pytest.mark.parametrize("lengths", [[1, 1], [40, 1, 3], [8, 8, 8, 8, 8]])
def test_any_lengths(lengths):
    assert check_isolation(small_model("llama"), lengths=lengths).verdict == "exact"


def test_bad_input():
    model = small_model("llama")
    with pytest.raises(ValueError, match=r"lengths = \[7\]; expected at least two examples"):
        check_isolation(model, lengths=[7])
    with pytest.raises(ValueError, match=r"example 1 \(5 tokens\) is 0 times in batch_builder's input_ids"):
        check_isolation(model, batch_builder=lambda examples: packed_batch([examples[0]]))
    with pytest.raises(ValueError, match="model_type = 'lama'; transformers knows"):
        small_model("lama")


@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "phi", "olmo2", "qwen2_moe"]
)
@pytest.mark.parametrize("kernel", [None, "sdpa", "reference"])
def test_gradients_packed_equal_unpacked(model_type, kernel):
    generator = torch.Generator().manual_seed(0)
    examples = [{"input_ids": torch.randint(3, 250, (n,), generator=generator).tolist()} for n in (9, 23, 4, 14)]
    for report in check_equivalence(small_model(model_type), examples, kernel=kernel):
        assert report.gradient_error <= 1e-5, report
        assert report.loss_packed == pytest.approx(report.loss_alone, rel=1e-6)


def test_gradients_differ_where_there_is_a_leak():
    examples = [{"input_ids": list(range(5, 5 + n))} for n in (9, 12)]
    assert all(r.gradient_error > 0.01 for r in check_equivalence(small_model("opt"), examples))


def llama4(**fields):
    config = small_config("llama4_text")
    for name, value in fields.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(small_model("llama4_text").state_dict())
    return model


def test_llama_4s_temperature_counts_the_row_and_is_seen_to():
    """It is read off the row, not off position ids: beyond `floor_scale` packed tokens an example is another."""
    report = check_isolation(llama4(floor_scale=8), kernel="sdpa")
    assert report.verdict == "shifted" and not report.isolated and report.error > 0.1
    assert min(report.lengths) < 8 < max(report.lengths) and "floor_scale" not in report.unprobed
    assert check_isolation(llama4(floor_scale=8, attn_temperature_tuning=False), kernel="sdpa").verdict == "exact"
    assert check_isolation(llama4(), kernel="sdpa").unprobed["floor_scale"] == 8192, "the row was too short to tell"


def test_llama_4s_chunks_are_refused():
    report = check_isolation(llama4(attention_chunk_size=8), kernel="sdpa")
    assert report.verdict == "refused" and not report.isolated and "chunk" in report.reason


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_every_kernel_may_be_asked_by_name(kernel):
    """What is not here is refused for what it lacks, never for what it is called."""
    report = check_isolation(small_model("llama"), kernel=kernel)
    assert report.isolated or "does not work here" in report.reason
