"""A tiny Llama, trained on packed rows by Trainer or SFTTrainer: the losses of its steps."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments
from trl import SFTConfig, SFTTrainer

from packlib.attention import register_attention
from packlib.collators import FlatteningCollator

VOCABULARY = {"<eos>": 0, **{str(i): i for i in range(1, 64)}}


def losses(rows, trainer, folder, resume=None, **arguments):
    """One a step. resume: the checkpoint to go on from. arguments: of TrainingArguments."""
    register_attention("reference")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="packlib_varlen")
    options = {
        "output_dir": str(folder),
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    if trainer is SFTTrainer:
        args = SFTConfig(dataset_kwargs={"skip_prepare_dataset": True}, bf16=False, **options)
        words = Tokenizer(WordLevel(VOCABULARY, "<eos>"))
        more = {"processing_class": PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")}
    else:
        args, more = TrainingArguments(**options), {}
    run = trainer(model, args=args, train_dataset=rows, data_collator=FlatteningCollator(), **more)
    run.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]
