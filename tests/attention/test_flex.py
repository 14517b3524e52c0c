"""FlexAttention: what it cannot do is an error, and it is never run uncompiled where it should be compiled."""

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import flex_attention

from packlib.attention import flex
from tests.attention.cases import random_qkv, run


def test_flex_has_no_backward_on_cpu():
    with pytest.raises(NotImplementedError, match="no backward on the CPU"):
        run("flex", random_qkv((4, 5)), (4, 5))


def test_flex_is_never_run_uncompiled(monkeypatch):
    """PyTorch gives up compiling after a few kinds of call and runs FlexAttention dense; here that is a distant error."""
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
