"""What test_sharding.py starts under torchrun: trains a tiny model on fixed rows, each rank writes what it saw.

    torchrun sharded_training.py OUT RIG [--resume] [--die-after STEP]

OUT: folder for checkpoints and `rank<r>.json`. RIG: fields of `Rig`, as JSON.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, set_seed
from trl import SFTConfig

from packlib import plans
from packlib.attention import register_attention
from packlib.collators import FlatteningCollator
from packlib.lab.runs import rig
from packlib.lab.runs.spec import Rig
from packlib.lab.small_models import small_model

ROWS, STEPS = 16, 4


def rows():
    """Rows of 40 tokens and less, in a fixed order."""
    generator = np.random.default_rng(0)
    examples = [generator.integers(3, 90, n).tolist() for n in generator.integers(4, 20, 60)]
    dataset = Dataset.from_dict({"input_ids": examples})
    plan = plans.best_fit_decreasing([len(ids) for ids in examples], 40, overflow="error", seed=0)
    return plan.take(np.arange(ROWS)).apply(dataset).with_format("numpy")


class DieAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os._exit(9)


def train(out, chosen, *, ranks=1, resume=False, die_after=None):
    """Losses and gradient norms of every step, weights at the end, and how many parameters were sharded."""
    set_seed(0)
    model = small_model("llama", register_attention("reference"), torch.float32)
    rig.prepare(model, chosen)
    config = SFTConfig(
        output_dir=str(out),
        **rig.trainer_settings(chosen),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2 // ranks,
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        save_strategy="steps" if ranks > 1 else "no",
        save_steps=2,
        logging_strategy="no",
        disable_tqdm=True,
        report_to="none",
        bf16=False,
        use_cpu=True,
    )
    trainer = rig.LabTrainer(
        model,
        config,
        train_dataset=rows(),
        data_collator=FlatteningCollator(),
        rig=chosen,
        processing_class=tokenizer(),
    )
    if chosen.graphs:  # which a CPU has not; what they replay, step by step
        trainer.graphs = lambda batch, denominator: trainer._forward_backward(batch, torch.as_tensor(denominator))
    if die_after:
        trainer.add_callback(DieAfter(die_after))
    trainer.train(resume_from_checkpoint=resume)
    losses, norms = trainer.history()
    parameters = dict(trainer.model.named_parameters())
    sharded = sum(isinstance(p, DTensor) for p in parameters.values())
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters.values()]
    return {
        "losses": losses,
        "norms": norms,
        "sharded": sharded,
        "parameters": len(parameters),
        "weights": [float(p.detach().double().norm()) for p in whole],
    }


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({"<unk>": 0, "<pad>": 1, "<end>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="<end>")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("rig", type=json.loads)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--die-after", type=int)
    given = parser.parse_args()
    count = int(os.environ["WORLD_SIZE"])
    seen = train(given.out, Rig(**given.rig), ranks=count, resume=given.resume, die_after=given.die_after)
    (given.out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen), encoding="utf-8")
