"""Operators that a packed step launches: packlib's attention against transformers' flash dispatch (TRL padding_free).

Both call the same kernel on a CPU, so that the difference is what the two routes do around it. Short steps last as long
as the host needs to launch them.
"""

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import MistralConfig, MistralForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from packlib.attention import flash_stand_in, register_attention
from packlib.collators import FlatteningCollator


def operators(attn_implementation: str, batch: dict) -> int:
    """`aten` calls of a second forward and backward pass, with gradient checkpointing, at Mistral-7B's depth."""
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    }
    config = MistralConfig(num_hidden_layers=32, sliding_window=4096, **shape)
    model = MistralForCausalLM._from_config(config, attn_implementation=attn_implementation)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    model(**batch | {"use_cache": False}).loss.backward()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        model(**batch | {"use_cache": False}).loss.backward()
    return sum(event.name.startswith("aten::") for event in trace.events())


def measure(lengths: tuple[int, ...] = (15, 23, 18, 19)) -> dict[str, int]:
    examples = [{"input_ids": list(range(3, 3 + n))} for n in lengths]
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    with flash_stand_in("sdpa"):
        theirs = operators("flash_attention_2", collate(examples))
    return {
        "packlib_varlen": operators(register_attention("sdpa"), FlatteningCollator()(examples)),
        "TRL padding_free": theirs,
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    for route, count in measure().items():
        print(f"operators in a packed step of 32 layers, {route:16}: {count:,}")
