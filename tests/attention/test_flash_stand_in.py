"""transformers' own flash path, on the stand-in for the flash-attn package."""

import pytest
import torch

from packlib.attention import flash_stand_in
from packlib.lab.small_models import small_model
from tests.attention.cases import alone, features, packed


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
        leaked = model(**two_rows | {"use_cache": False}).logits[0]
        assert not torch.allclose(leaked, truth, atol=0.1)  # packing is only seen at batch 1


def test_stand_in_leaves_no_trace():
    with flash_stand_in():
        small_model("llama", "flash_attention_2")
    with pytest.raises(ImportError, match=r"flash_attn|FlashAttention2"):
        small_model("llama", "flash_attention_2")
