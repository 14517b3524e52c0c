"""Every causal type: `packlib_varlen` is right or refuses by name; a kernel that is wrong is found."""

from unittest import mock

import pytest

from packlib.attention import register
from packlib.lab import records
from packlib.lab.studies import sweep

# One of each kind: grouped queries, a window, learned positions, shifted ones, a softcap, a window that only the mask
# has, layers that are no attention, sinks, an attention that is never called, boundaries that get lost.
KINDS = {
    **dict.fromkeys(("llama", "mistral", "gpt2", "roberta", "gemma2", "phimoe"), "right"),
    **dict.fromkeys(("jamba", "nemotron"), "partly"),
    **dict.fromkeys(("gpt_oss", "bloom"), "refused"),
}


def outcomes(record):
    return {row["model"]: row["outcome"] for row in record["types"]}


@pytest.mark.timeout(120)
def test_a_handful_of_kinds(tmp_path):
    with mock.patch.object(register, "varlen_attention", wraps=register.varlen_attention) as spy:
        assert sweep.publish(KINDS, tmp_path).startswith("6 right, 2 partly, 2 refused")
    assert spy.call_count > 20
    (path,) = tmp_path.glob("sweep-transformers-*.json")
    record = records.read_json(path)
    assert outcomes(record) == KINDS
    by_type = {row["model"]: row for row in record["types"]}
    assert by_type["gemma2"]["kernel"] == "reference" and by_type["llama"]["kernel"] == "sdpa"
    assert "isolate_mixers" in by_type["jamba"]["ways"]["packed"]["reason"]
    assert "| bloom | refused |" in path.with_suffix(".md").read_text()


WRONG = {
    "window": {"window": None},  # forgotten
    "causal": {"causal": False},
    "scale": {"scale": 1.0},
    "boundaries": {},
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_kernel_is_found(fault):
    right = register.varlen_attention

    def wrong(q, k, v, cu_seqlens, max_seqlen, **options):
        if fault == "boundaries":
            cu_seqlens, max_seqlen = cu_seqlens[[0, -1]].contiguous(), len(q)
        return right(q, k, v, cu_seqlens, max_seqlen, **options | WRONG[fault])

    with mock.patch.object(register, "varlen_attention", wrong):
        row = sweep.check_type("mistral")
    assert row["outcome"] == "silent" and row["ways"]["packed"]["verdict"] == "wrong"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_causal_type():
    """No difference in silence; and what is not built is known and no more."""
    record = sweep.sweep()
    found = outcomes(record)
    assert len(found) > 150 and "silent" not in found.values()
    assert {model for model, outcome in found.items() if outcome == "not built"} <= set(sweep.OUT_OF_SCOPE)
    assert sum(outcome == "right" for outcome in found.values()) > 80
    for row in record["types"]:
        reasons = [cell["reason"] for cell in row["ways"].values() if cell["verdict"] == "refused"]
        assert all(len(reason) > 40 for reason in reasons)  # says what, and what to do
