"""One measured training run through `trl.SFTTrainer`, inside the process that `experiment.run` gives it.

Throughput counts what the collator handed over, micro-batch by micro-batch, so TRL's own configurations go through the same clock. A step's
time runs from the end of the step before it to its own end (CUDA events on a GPU), data loading and collating included, evaluation excluded.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, set_seed
from trl import SFTConfig, SFTTrainer

from packlib import attention, losses, plans
from packlib.lab import corpora, evaluation, experiment, models, records, strategies
from packlib.lab.clock import Counter, StepClock, keep_freed_memory
from packlib.lab.experiment import RunSpec

DATA = "PACKLIB_DATA"  # folder of corpora, tokenizers and models that specs name without their path


def execute(spec: RunSpec, folder: Path, progress: Callable[[str], None]) -> None:
    """Run `spec` and write its record, also when it fails or does not fit. Rank 0 writes."""
    warnings.filterwarnings("ignore", module="trl|transformers|torch|accelerate")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    rank = int(os.environ.get("RANK", 0))
    try:
        record = {"run_id": spec.run_id, "status": "ok", "error": None, "spec": asdict(spec)} | measure(spec, progress if rank == 0 else _silent)
    except Exception as error:
        full = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
        record = experiment.unfinished(spec, "oom" if full else "failed", f"{type(error).__name__}: {str(error)[:500]}")
        if not full and rank == 0:
            progress(_trace(error))
    if rank == 0:
        try:
            records.write_record(folder, record)
        except ValueError as error:  # a record holds no NaN
            reason = f"a loss, gradient or evaluation is not finite at learning_rate = {spec.learning_rate:g} ({error})"
            records.write_record(folder, experiment.unfinished(spec, "failed", reason))


def measure(spec: RunSpec, progress: Callable[[str], None]) -> dict[str, Any]:
    """Build, train, evaluate: the `environment`, `plan`, `metrics` and `trace` of a record."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        keep_freed_memory()
    strategy = strategies.get_strategy(spec.strategy)
    corpus, lost = training_corpus(spec)
    held_out = training_corpus(replace(spec, limit=spec.eval_examples), "eval")[0] if spec.eval_examples else None
    ceiling = matmul_ceiling(device, torch.float32 if spec.dtype == "float32" else torch.bfloat16)
    kernel, attn = route(spec, strategy, device)
    dataset, report = planned(spec, strategy, corpus, lost)
    with tempfile.TemporaryDirectory() as scratch, flash(attn, kernel):
        model = models.build_model(
            located(spec.model), attn_implementation=attn, dtype=torch.bfloat16 if spec.dtype == "bfloat16" else torch.float32, device=device,
            seed=spec.seed, layers=spec.layers, vocab_size=corpus.vocab_size if spec.model.startswith("tiny") else None,
        )  # fmt: skip
        if corpus.vocab_size > model.config.get_text_config().vocab_size:
            raise ValueError(f"{spec.corpus} has {corpus.vocab_size} token ids; {spec.model} has {model.config.vocab_size}: wrong tokenizer")
        clock = StepClock(spec, device, progress, (lambda: evaluation.evaluate(model, held_out)) if held_out else None)
        set_seed(spec.seed)
        trainer = LabTrainer(
            model, trainer_config(spec, strategy, device, scratch), train_dataset=dataset, callbacks=[clock],
            processing_class=placeholder_tokenizer(corpus),
            data_collator=None if strategy.trl is not None else strategy.collator(corpus.pad_token_id),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.weighting = spec.weighting
        trainer.data_collator = counter = Counter(trainer.data_collator)
        trainer.train()
        history, steps = trainer.state.log_history, trainer.state.global_step
        counts = counter.per_step(spec.gradient_accumulation, clock.ends, len(trainer.get_train_dataloader()))
        metrics = clock.metrics(counts, spec) | {"optimizer_steps": steps, "matmul_flops_ceiling": ceiling, "kernel": kernel}
        flops = models.flops_per_token(model.config)
        metrics["flops_per_token"] = flops
        metrics["model_flops_utilization"] = metrics["tokens_per_s"]["mean"] * flops / ceiling / spec.world_size
        if held_out:
            metrics |= clock.evaluate()
        if spec.generate_examples:
            metrics |= _generate(spec, model)
    trace = clock.trace(counts, history)
    return {"environment": records.environment(corpus.sha256), "plan": report, "metrics": metrics, "trace": trace}


def located(name: str) -> str:
    """The name or path of a corpus, tokenizer or model; files may lie in the folder `$PACKLIB_DATA`, so that a spec names no machine's paths."""
    folder = os.environ.get(DATA)
    inside = Path(folder, name) if folder and not name.startswith("hub:") else None
    return str(inside) if inside and (inside.exists() or Path(str(inside).format(split="train")).exists()) else name


def training_corpus(spec: RunSpec, split: str = "train") -> tuple[corpora.Corpus, int]:
    """The examples of a spec, none longer than its `max_tokens`, and the tokens that this lost."""
    corpus = corpora.load_corpus(located(spec.corpus), split=split, tokenizer=located(spec.tokenizer), loss=spec.loss, limit=spec.limit)
    return strategies.fit_examples(corpus, spec.max_tokens, spec.overflow)


def route(spec: RunSpec, strategy: strategies.Strategy, device: torch.device) -> tuple[str, str]:
    """(kernel that computes attention, `attn_implementation`). TRL's peers and models with attention classes of their own go through
    transformers' flash dispatch."""
    if spec.kernel in ("transformers_sdpa", "transformers_eager"):
        if strategy.layout == "flat":
            raise ValueError(f"kernel = {spec.kernel!r} builds a T x T mask or none for {spec.strategy}; expected a varlen kernel")
        return spec.kernel, spec.kernel.removeprefix("transformers_")
    own_dispatch = getattr(models.architecture(spec.model), "attention_route", None) == "flash"
    kernel = attention.resolve_kernel("auto" if spec.kernel == "transformers_flash" else spec.kernel, device, _compute_dtype(spec))
    if spec.kernel == "transformers_flash" or strategy.trl is not None or own_dispatch:
        return kernel, "flash_attention_2"
    return kernel, attention.register_attention(kernel)


def _compute_dtype(spec: RunSpec) -> torch.dtype:
    return torch.float32 if spec.dtype == "float32" else torch.bfloat16


def flash(attn: str, kernel: str) -> AbstractContextManager:
    """transformers' flash dispatch on `kernel`, where the run goes through it and the flash-attn package is not what computes."""
    return attention.flash_stand_in(kernel) if attn == "flash_attention_2" and kernel != "flash_attn" else nullcontext()


def planned(spec: RunSpec, strategy: strategies.Strategy, corpus: corpora.Corpus, lost: int) -> tuple[Dataset, dict[str, Any]]:
    """The data set that the trainer is given (only the rows it will reach) and the plan's report. TRL's peers get the examples."""
    settings = {"batch_size": spec.batch_size, "max_tokens": spec.max_tokens, "seed": spec.seed, "atom_size": spec.atom_size}
    plan = strategies.plan_for(strategy, corpus.lengths, **settings)
    if spec.examples_per_step:
        if not strategy.batched or strategy.layout == "padded" or spec.gradient_accumulation > 1:
            raise ValueError(f"examples_per_step = {spec.examples_per_step} makes one flat batch a step; {spec.strategy} with "
                             f"gradient_accumulation = {spec.gradient_accumulation} cannot")  # fmt: skip
        plan, steps = plans.constant_examples(plan, spec.examples_per_step, spec.seed)
        plan = replace(plan, row_splits=plan.row_splits[steps], max_tokens=None)
    if spec.world_size > 1:
        plan = plan.balance(spec.world_size, seed=spec.seed)
    report = plan.report(corpus.lengths, strategy.layout).to_dict()
    report |= {"lost_tokens": report["lost_tokens"] + lost}
    if (strategy.trl or {}).get("packing"):
        return corpus.dataset, report
    per_step = spec.gradient_accumulation * strategy.rows_per_batch(spec.batch_size) * spec.world_size
    if spec.steps and (rows := spec.steps * (per_step if strategy.trl is None else spec.gradient_accumulation)) < len(plan):
        plan = plan.take(np.arange(rows))
    if strategy.trl is None:
        return plan.apply(corpus.dataset).with_format("numpy"), report
    return corpus.dataset.select(plan.example), report


def trainer_config(spec: RunSpec, strategy: strategies.Strategy, device: torch.device, scratch: str) -> SFTConfig:
    """TRL's settings for a spec: our own plans are handed over as they are; the peers prepare and pack by themselves."""
    ours = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
    peer = {"max_length": spec.max_tokens if (strategy.trl or {}).get("packing") else None, **(strategy.trl or {})}
    packed_by_trl = bool(peer.get("packing"))
    return SFTConfig(
        **(ours if strategy.trl is None else peer),
        output_dir=scratch,
        per_device_train_batch_size=strategy.rows_per_batch(spec.batch_size),
        gradient_accumulation_steps=spec.gradient_accumulation,
        max_steps=spec.steps or -1,
        num_train_epochs=spec.epochs,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.lr_scheduler,
        warmup_steps=spec.lr_warmup_steps,
        weight_decay=spec.weight_decay,
        optim="adamw_torch_fused" if device.type == "cuda" else "adamw_torch",
        bf16=spec.dtype == "bf16_mixed",
        gradient_checkpointing=spec.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if spec.gradient_checkpointing else None,
        train_sampling_strategy="random" if packed_by_trl else "sequential",
        remove_unused_columns=packed_by_trl,
        seed=spec.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would show the mean of the steps before
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        use_cpu=device.type == "cpu",
    )


class LabTrainer(SFTTrainer):
    """SFTTrainer that can also weight every example alike, packed or not, over a whole optimiser step."""

    weighting = "per_token"

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        if self.weighting == "per_token":
            return super()._get_num_items_in_batch(batch_samples, device)
        examples = sum(losses.token_weights(b["labels"], b.get("cu_seq_lens_q"), self.weighting)[1] for b in batch_samples)
        return self.accelerator.gather(examples.to(device)).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.weighting == "per_token" or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        weights, _ = losses.token_weights(inputs["labels"], inputs.get("cu_seq_lens_q"), self.weighting)
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        loss = -(outputs.log_probs * weights[:, 1:]).sum() / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product on random data: the best of five after a warm-up. What utilisation is measured against."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def placeholder_tokenizer(corpus: corpora.Corpus) -> PreTrainedTokenizerFast:
    """TRL wants a tokenizer for its pad and end tokens; the examples are tokenized already, also where no tokenizer can be had."""
    tokens = {"<unk>": corpus.vocab_size, "<end>": corpus.eos_token_id}
    pad = "<end>" if corpus.pad_token_id == corpus.eos_token_id else "<pad>"
    tokens.setdefault(pad, corpus.pad_token_id)
    backend = Tokenizer(WordLevel(tokens, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>", pad_token=pad)


def _generate(spec: RunSpec, model: PreTrainedModel) -> dict[str, float]:
    corpus, tokenizer = located(spec.corpus), located(spec.tokenizer)
    held_out = corpora.load_corpus(corpus, split="eval", tokenizer=tokenizer, loss="response", limit=spec.generate_examples)
    return evaluation.exact_match(model, held_out, corpora.load_tokenizer(tokenizer, corpus))


def _silent(line: str) -> None:
    pass


def _trace(error: Exception) -> str:
    return "".join(traceback.format_exception(error)[-6:])


if __name__ == "__main__":
    execute(RunSpec(**json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]), lambda line: print(line, flush=True))
