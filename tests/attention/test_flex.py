"""FlexAttention: what it cannot do is an error, and it is never run uncompiled where it should be compiled."""

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

from packlib.attention import flex
from tests.attention.cases import random_qkv, run


def test_flex_has_no_backward_on_cpu():
    with pytest.raises(NotImplementedError, match="no backward on the CPU"):
        run("flex", random_qkv((4, 5)), (4, 5))


def test_flex_is_never_run_uncompiled(monkeypatch):
    """PyTorch stops compiling after a few kinds of call, and runs FlexAttention dense; here that is a distant error."""

    def double(x):
        return 2 * x

    compiled = flex._compiled(double, "cuda", "eager")  # as on a GPU, without generating code
    with torch._dynamo.config.patch(recompile_limit=8):  # PyTorch's own; a rig of another test raises it
        torch._dynamo.reset()
        for length in range(2, 14):
            compiled(torch.ones(length))
        assert torch._dynamo.config.recompile_limit < 12, "PyTorch's own limit is passed"
        monkeypatch.setattr(flex, "_RECOMPILE_LIMIT", 12)
        with pytest.raises(FailOnRecompileLimitHit):
            for length in range(14, 18):
                compiled(torch.ones(length))
        torch._dynamo.reset()
    assert flex._compiled(double, "cpu") is double
