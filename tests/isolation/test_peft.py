"""LoRA on every linear layer, packed through SFTTrainer: isolated; losses and gradients are those of one at a time."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D
from trl import SFTConfig, SFTTrainer

from packlib.attention import register_attention
from packlib.collators import FlatteningCollator
from packlib.isolation import check_equivalence, check_isolation
from packlib.lab.small_models import small_model
from packlib.plans import best_fit_decreasing

LENGTHS = (9, 23, 4, 14, 11)
# gpt2: Conv1D; phi: biases and one parallel block; qwen2_moe: a router, shared and routed experts
KINDS = ("llama", "gpt2", "phi", "qwen2_moe")


def examples():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 250, (n,), generator=generator).tolist()} for n in LENGTHS]


def adapted(model_type):
    """With adapters that count: their second matrix is zero at the start."""
    register_attention()
    torch.manual_seed(0)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if model_type == "qwen2_moe" else None
    lora = LoraConfig(
        r=4,
        target_modules="all-linear",
        target_parameters=experts,  # they are no linear layers, but one parameter for all
        task_type="CAUSAL_LM",
        fan_in_fan_out=model_type == "gpt2",
    )
    model = get_peft_model(small_model(model_type, "packlib_varlen"), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def gradients_of_one_step(model, folder, rows, size):
    """Loss and gradients of the adapters from one optimizer step of SFTTrainer, `size` rows of one micro-batch each."""
    seen = {}

    class Watching(SFTTrainer):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            optimizer.register_step_pre_hook(
                lambda *_: seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            )
            return optimizer

    settings = {
        "bf16": False,
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "report_to": [],
        "use_cpu": True,
    }
    config = SFTConfig(
        str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=size,
        max_steps=1,
        max_grad_norm=0,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    trainer = Watching(
        model, config, train_dataset=rows, data_collator=FlatteningCollator(), processing_class=tokenizer()
    )
    trainer.train()
    return trainer.state.log_history[0]["loss"], seen


def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<eos>": 0}, "<eos>")), eos_token="<eos>")


def apart(one, other):
    floor = 1e-3 * max(float(g.norm()) for g in one.values())
    return max(float((one[name] - other[name]).norm()) / max(float(g.norm()), floor) for name, g in one.items())


@pytest.mark.parametrize("model_type", KINDS)
def test_adapters_on_all_linear_layers(model_type, tmp_path):
    model, dataset = adapted(model_type), Dataset.from_list(examples())
    adapters = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    linear = [n for n, m in small_model(model_type).named_modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    assert all(any(name.endswith(layer) for name in adapters) for layer in linear if not layer.endswith("lm_head"))
    # 1. Isolated, as an object of peft and as the model inside it.
    assert check_isolation(model, strict=True).isolated
    # 2. One packed row gives the loss and the adapters' gradients of its examples one at a time.
    plan = best_fit_decreasing(list(LENGTHS), sum(LENGTHS), overflow="error")
    assert len(plan) == 1
    loss, packed = gradients_of_one_step(adapted(model_type), tmp_path, plan.apply(dataset), 1)
    single, alone = gradients_of_one_step(adapted(model_type), tmp_path, dataset, len(LENGTHS))
    assert set(packed) == set(alone) and all("lora_" in name for name in packed) and len(packed) >= 2 * len(adapters)
    assert loss == pytest.approx(single, rel=1e-5) and apart(alone, packed) < 1e-4
    for report in check_equivalence(model, examples()):
        assert report.gradient_error < 1e-5 and "lora_" in report.parameter
    # 3. Where examples see each other, both are others.
    merged = [{"input_ids": [token for example in examples() for token in example["input_ids"]]}]
    other, leaky = gradients_of_one_step(adapted(model_type), tmp_path, Dataset.from_list(merged), 1)
    assert other != pytest.approx(single, rel=1e-3) and apart(alone, leaky) > 0.01
