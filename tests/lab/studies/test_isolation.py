"""The matrix of notebook 04: every situation has its known verdict, and the three dtypes agree."""

import json

import pytest

from packlib.attention import register_attention
from packlib.lab.studies import isolation


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_attention()


def expected(attention, situation):
    """The table of PITFALLS.md, for a model with rotary positions that takes any attention."""
    if attention == "packlib_varlen":
        return "exact" if "cu_seqlens" in situation or situation == "FlatteningCollator" else "refused"
    if attention == "flash_attention_2":
        return "leak" if situation in ("+ mask with pads", "two packed rows") else "exact"
    return "exact" if situation in ("FlatteningCollator", "position ids alone", "two packed rows") else "leak"


@pytest.fixture(scope="module")
def matrix():
    return isolation.run_matrix(["llama"], ["sdpa", "flash_attention_2", "packlib_varlen"])


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_masked_attentions_are_alike(attention):
    for situation in ("position ids alone", "cache left on"):
        assert isolation.check_cell("llama", attention, situation, "float32")["verdict"] == expected(
            attention, situation
        )


def test_matrix_shows_every_situation(matrix):
    assert len(matrix["cells"]) == 3 * 7 * 3 and not matrix["disagreements"]
    for cell in matrix["cells"]:
        if (cell["dtype"], cell["situation"]) != (
            "float64",
            "cu_seqlens, no position ids",
        ):  # float64 sees RoPE's float32 angles
            assert cell["verdict"] == expected(cell["attention"], cell["situation"]), cell
    json.dumps(matrix, allow_nan=False)


def test_disagreements_count_false_alarms_and_misses():
    cell = {"model": "m", "attention": "a", "situation": "s"}
    cells = [
        cell | {"dtype": d, "verdict": v} for d, v in (("float64", "leak"), ("float32", "exact"), ("bfloat16", "leak"))
    ]
    assert [(d["dtype"], d["kind"]) for d in isolation.disagreements(cells)] == [("float32", "miss")]
    cells[0]["verdict"] = "exact"
    assert [(d["dtype"], d["kind"]) for d in isolation.disagreements(cells)] == [("bfloat16", "false alarm")]


def test_unsupported_is_a_cell():
    cell = isolation.check_cell("bloom", "flex_attention", "FlatteningCollator", "float32")
    assert cell["verdict"] == "unsupported" and "BloomForCausalLM" in cell["reason"]


def test_heat_map(matrix):
    figure = isolation.heat_map(matrix)
    version = matrix["environment"]["transformers"]
    assert (
        f"transformers {version}" in figure.axes[0].get_title(loc="left")
        and "sdpa 4, flash_attention_2 2, packlib_varlen 0" in figure.alt
    )


@pytest.mark.slow
@pytest.mark.parametrize("model_type", isolation.MODELS)
def test_whole_matrix(model_type):
    record = isolation.run_matrix([model_type])
    assert not record["disagreements"]
    assert all(c["seconds"] < 20 for c in record["cells"])
