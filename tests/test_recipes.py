"""The README's recipe, by Trainer and SFTTrainer, with LoRA, workers and a checkpoint: the losses of one at a time."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from packlib.attention import register_attention
from packlib.collators import FlatteningCollator
from packlib.plans import best_fit_decreasing

LENGTHS = (9, 23, 4, 14, 11, 30, 6, 17, 12, 21)
RATE = 1e-2
WORDS = {"<eos>": 0, **{str(i): i for i in range(1, 64)}}


def corpus(completions):
    generator = torch.Generator().manual_seed(0)
    columns = {"input_ids": [torch.randint(1, 64, (n,), generator=generator).tolist() for n in LENGTHS]}
    if completions:
        columns["completion_mask"] = [[0] * (n // 2) + [1] * (n - n // 2) for n in LENGTHS]
    return Dataset.from_dict(columns)


def plan_rows():
    return best_fit_decreasing(list(LENGTHS), 40, overflow="error", seed=0)


def tiny(lora, attention):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention)
    for parameter in model.parameters():  # attend to something, so that a leak is seen
        parameter.data *= 8 if parameter.ndim == 2 else 1
    if lora:
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model


def one_at_a_time(lora, completions, *, merged=False):
    """Losses of the plan's rows in order, by a loop in plain PyTorch on eager attention, one example a forward.

    merged: as if the examples of a row were one.
    """
    model, losses, examples = tiny(lora, "eager"), [], corpus(completions)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0)
    for row in plan_rows():
        pieces = [examples[segment.example] for segment in row]
        ids = [torch.tensor(piece["input_ids"]) for piece in pieces]
        masks = [torch.tensor(piece.get("completion_mask", [1] * len(piece["input_ids"]))).bool() for piece in pieces]
        for mask in masks:
            mask[0] = False
        if merged:
            ids, masks = [torch.cat(ids)], [torch.cat(masks)]
        total, count = 0.0, sum(int(mask.sum()) for mask in masks)
        for tokens, mask in zip(ids, masks):
            logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
            total += F.cross_entropy(logits[mask[1:]], tokens[1:][mask[1:]], reduction="sum") / count
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return losses


def recipe(trainer, folder, *, lora=False, workers=0, completions=False, resume=None):
    """Losses of the steps of the README's recipe, rows in order. resume: a checkpoint to go on from."""
    model = tiny(lora, register_attention())
    rows = plan_rows().apply(corpus(completions))
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "optim": "adamw_torch",
        "train_sampling_strategy": "sequential",
        "dataloader_num_workers": workers,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if trainer is SFTTrainer:
        words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(WORDS, "<eos>")), eos_token="<eos>")
        own = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}, "bf16": False}
        more = {"processing_class": words}
        args = SFTConfig(**own, **options, completion_only_loss=True if completions else None)
    else:
        args, more = TrainingArguments(**options), {}
    run = trainer(model, args, train_dataset=rows, data_collator=FlatteningCollator(), **more)
    run.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def check(trainer, folder, lora, workers, completions):
    truth = one_at_a_time(lora, completions)
    assert len(truth) == 4
    assert recipe(trainer, folder, lora=lora, workers=workers, completions=completions) == pytest.approx(
        truth, rel=1e-4
    )
    checkpoint = str(folder / "checkpoint-2")  # its history is in it: all losses come back, the last two computed anew
    resumed = recipe(trainer, folder / "on", lora=lora, workers=workers, completions=completions, resume=checkpoint)
    assert resumed == pytest.approx(truth, rel=1e-4)


QUICK = [  # trainer, LoRA, loader workers, completions only
    (Trainer, False, 0, False),
    (Trainer, True, 0, True),
    (SFTTrainer, True, 2, False),
    (SFTTrainer, False, 0, True),
]


@pytest.mark.parametrize(("trainer", "lora", "workers", "completions"), QUICK)
def test_losses_are_those_of_one_at_a_time(trainer, lora, workers, completions, tmp_path):
    check(trainer, tmp_path, lora, workers, completions)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "lora", "workers", "completions"),
    [
        case
        for case in itertools.product((Trainer, SFTTrainer), (False, True), (0, 2), (False, True))
        if case not in QUICK
    ],
)
def test_in_every_combination(trainer, lora, workers, completions, tmp_path):
    check(trainer, tmp_path, lora, workers, completions)


@pytest.mark.parametrize("lora", [False, True])
def test_losses_are_others_where_examples_or_prompts_leak(lora):
    """What the equality above can see."""
    truth = one_at_a_time(lora, False)
    assert one_at_a_time(lora, False, merged=True) != pytest.approx(truth, rel=1e-3)
    assert one_at_a_time(lora, True) != pytest.approx(truth, rel=1e-3)
