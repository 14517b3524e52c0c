"""Known answers: what is isolated, what leaks and where, in float32 and bfloat16; gradients; the matrix; the command."""

import argparse
import json

import pytest
import torch

from packlib import isolation_command
from packlib.attention import flash_stand_in, register_attention
from packlib.isolation import ContaminationError, check_equivalence, check_isolation
from packlib.lab import isolation_matrix
from packlib.isolation.probe import packed_batch
from packlib.lab.small_models import small_model

ISOLATED = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi", "phi3", "granite", "olmo2", "starcoder2",
    "mixtral", "qwen2_moe",
]  # fmt: skip
LEAKING = {
    "opt": "attention", "falcon": "attention", "bloom": "attention", "mpt": "attention", "mamba": "state", "mamba2": "state",
    "jamba": "state", "recurrent_gemma": "convolution", "rwkv": "state", "gpt_oss": "attention", "bert": "attention",
}  # fmt: skip
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
    assert max(off_diagonal(report.gradient)) == 0 and report.error <= 8 * max(report.noise, torch.finfo(dtype).eps * report.scale)
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


def test_shifted_positions_are_no_leak():
    with flash_stand_in():
        report = check_isolation(small_model("roberta", "flash_attention_2"))
    assert report.verdict == "shifted" and report.isolated and report.culprit == "positions"
    assert max(off_diagonal(report.influence)) == 0


def test_a_refusal_is_neither_a_leak_nor_isolation():
    alone = isolation_matrix.SITUATIONS["position ids alone"]
    report = check_isolation(small_model("llama", "packlib_varlen"), batch_builder=alone, strict=True)
    assert report.verdict == "refused" and "no boundaries reached the attention" in report.reason and not report.isolated
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


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "phi", "olmo2", "qwen2_moe"])
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


# --- matrix ---


def expected(attention, situation):
    """The table of PITFALLS.md, for a model with rotary positions that takes any attention."""
    if attention == "packlib_varlen":
        return "exact" if "cu_seqlens" in situation or situation == "FlatteningCollator" else "refused"
    if attention == "flash_attention_2":
        return "leak" if situation in ("+ mask with pads", "two packed rows") else "exact"
    return "exact" if situation in ("FlatteningCollator", "position ids alone", "two packed rows") else "leak"


@pytest.fixture(scope="module")
def matrix():
    return isolation_matrix.run_matrix(["llama"], ["sdpa", "flash_attention_2", "packlib_varlen"])


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_masked_attentions_are_alike(attention):
    for situation in ("position ids alone", "cache left on"):
        assert isolation_matrix.check_cell("llama", attention, situation, "float32")["verdict"] == expected(attention, situation)


def test_matrix_shows_every_situation(matrix):
    assert len(matrix["cells"]) == 3 * 7 * 3 and not matrix["disagreements"]
    for cell in matrix["cells"]:
        if (cell["dtype"], cell["situation"]) != ("float64", "cu_seqlens, no position ids"):  # float64 sees RoPE's float32 angles
            assert cell["verdict"] == expected(cell["attention"], cell["situation"]), cell
    json.dumps(matrix, allow_nan=False)


def test_disagreements_count_false_alarms_and_misses():
    cell = {"model": "m", "attention": "a", "situation": "s"}
    cells = [cell | {"dtype": d, "verdict": v} for d, v in (("float64", "leak"), ("float32", "exact"), ("bfloat16", "leak"))]
    assert [(d["dtype"], d["kind"]) for d in isolation_matrix.disagreements(cells)] == [("float32", "miss")]
    cells[0]["verdict"] = "exact"
    assert [(d["dtype"], d["kind"]) for d in isolation_matrix.disagreements(cells)] == [("bfloat16", "false alarm")]


def test_unsupported_is_a_cell():
    cell = isolation_matrix.check_cell("bloom", "flex_attention", "FlatteningCollator", "float32")
    assert cell["verdict"] == "unsupported" and "BloomForCausalLM" in cell["reason"]


def test_heat_map(matrix):
    figure = isolation_matrix.heat_map(matrix)
    version = matrix["environment"]["transformers"]
    assert f"transformers {version}" in figure.axes[0].get_title(loc="left") and "sdpa 4, flash_attention_2 2, packlib_varlen 0" in figure.alt


@pytest.mark.slow
@pytest.mark.parametrize("model_type", isolation_matrix.MODELS)
def test_whole_matrix(model_type):
    record = isolation_matrix.run_matrix([model_type])
    assert not record["disagreements"]
    assert all(c["seconds"] < 20 for c in record["cells"])


# --- command ---


def command(*argv):
    parser = argparse.ArgumentParser()
    isolation_command.add_arguments(parser)
    return isolation_command.command(parser.parse_args(argv))


def test_command(tmp_path):
    small_model("llama").save_pretrained(tmp_path)
    assert "llama with sdpa in float32 on" in command(str(tmp_path)) and "EXACT" in command("llama", "--kernel", "sdpa")
    assert json.loads(command("opt", "--json"))["verdict"] == "leak"
    assert "EXACT" in command("falcon", "--attention", "flash_attention_2")
    with pytest.raises(ContaminationError, match="falcon with sdpa"):
        command("falcon", "--strict")
