"""One measured training run through `trl.SFTTrainer`, inside the process that `experiment.run` gives it.

Throughput counts what the collator handed over, micro-batch by micro-batch, so TRL's own configurations go through the
same clock. A step's time runs from the end of the step before it to its own end (CUDA events on a GPU), data loading
and collating included, evaluation excluded.
"""

from __future__ import annotations

import os
import tempfile
import traceback
import warnings
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, set_seed
from trl import SFTConfig

from packlib import attention, plans
from packlib.collators import FlatteningCollator, PaddingCollator
from packlib.lab import models, records
from packlib.lab.data import neighbours
from packlib.lab.data.corpora import Corpus, load_corpus, load_tokenizer, located
from packlib.lab.runs import evaluation, rig
from packlib.lab.runs.clock import (
    COUNTS,
    Counter,
    Phases,
    StepClock,
    copy_rate,
    keep_freed_memory,
    launch_time,
    matmul_ceiling,
    of_all_ranks,
)
from packlib.lab.runs.limits import Rates, StepWork, step_limit
from packlib.lab.runs.spec import PADDED_SDPA, RunSpec
from packlib.lab.strategies import Strategy, get_strategy, plan_for


def execute(spec: RunSpec, run_id: str, folder: Path, progress: Callable[[str], None]) -> bool:
    """Run `spec` and write its record as `run_id`, also when it fails or does not fit; returns whether it did neither.

    Rank 0 writes the record of a run that did, and of others the rank that is first to fail.
    """
    warnings.filterwarnings("ignore", module="trl|transformers|torch|accelerate")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    first = int(os.environ.get("RANK", 0)) == 0
    if torch.cuda.is_available():
        own_cores(int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    torch.set_num_threads(max(1, torch.get_num_threads() // (records.concurrent_runs() * spec.world_size)))
    try:
        head = {"run_id": run_id, "status": "ok", "error": None, "spec": asdict(spec)}
        record = head | measure(spec, progress if first else _silent)
    except Exception as error:
        full = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
        reason = f"{type(error).__name__}: {str(error)[:500]}"
        record = records.unfinished(run_id, asdict(spec), "oom" if full else "failed", reason)
        if first and not full:
            progress("".join(traceback.format_exception(error)[-6:]))
        elif not full:  # ranks share what carries progress, and would write over each other
            traceback.print_exception(error)
    else:
        if not first:
            return True
    try:
        records.write_record(folder, record)
    except ValueError as error:  # a record holds no NaN
        reason = f"a loss, gradient or evaluation is not finite at learning_rate = {spec.learning_rate:g} ({error})"
        record = records.unfinished(run_id, asdict(spec), "failed", reason)
        records.write_record(folder, record)
    except FileExistsError:  # another rank has failed before
        pass
    return record["status"] == "ok"


def own_cores(rank: int, ranks: int) -> None:
    """Tie this process to its share of the cores: ranks that launch eagerly otherwise push each other around.

    Nothing where they are one, share fewer cores than they are, or the system has no affinity.
    """
    if ranks > 1 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        share = len(cores) // ranks
        if share:
            os.sched_setaffinity(0, cores[rank * share : (rank + 1) * share])


def measure(spec: RunSpec, progress: Callable[[str], None]) -> dict[str, Any]:
    """Build, train, evaluate: the `environment`, `plan`, `metrics` and `trace` of a record."""
    # 1. What is trained on, and what this device can do.
    phases = Phases()
    device = _device()
    if device.type == "cpu":
        keep_freed_memory()
    strategy = get_strategy(spec.strategy)
    corpus = load_corpus(spec.corpus, **spec.corpus_options)
    held_out = _held_out(spec, spec.eval_examples) if spec.eval_examples else None
    phases.end("corpus")
    rates = Rates(matmul_ceiling(device, _compute_dtype(spec)), copy_rate(device))
    phases.end("device")
    kernel, attn = route(spec, strategy, device)
    dataset, report = planned(spec, strategy, corpus)
    collator, shapes = collation(spec, strategy, corpus, dataset)
    phases.end("plan")
    # 2. Train.
    with tempfile.TemporaryDirectory() as scratch, dispatched(attn, kernel):
        one_shape = len({batch["input_ids"].shape for batch in shapes}) == 1
        model, mixers = build(spec, corpus, attn, device, flat=strategy.layout == "flat", one_shape=one_shape)
        clock = StepClock(spec, device, progress, (lambda: evaluation.evaluate(model, held_out)) if held_out else None)
        set_seed(spec.seed)
        trainer = rig.LabTrainer(
            model,
            trainer_config(spec, strategy, device, scratch),
            train_dataset=dataset,
            callbacks=[clock],
            processing_class=placeholder_tokenizer(corpus),
            data_collator=collator,
            rig=spec.rig,
            weighting=spec.weighting,
            examples=report["labelled_examples_per_step"] if spec.weighting == "longalign" else None,
        )
        trainer.remove_callback(PrinterCallback)
        if spec.rig.graphs:
            progress(f"{trainer.capture(shapes)} graphs captured")
        trainer.data_collator = counter = Counter(trainer.data_collator)
        phases.end("model")
        trainer.train()
        phases.end("training")
        # 3. Look at what happened.
        own = counter.per_step(spec.gradient_accumulation, clock.ends, len(trainer.get_train_dataloader()))
        of_ranks = of_all_ranks(own)
        counts = of_ranks.sum(axis=0)
        _check_learning(counts[:, COUNTS.index("loss_tokens")], spec)  # of TRL's packing, nothing is known beforehand
        metrics = clock.metrics(counts)
        if spec.world_size > 1:
            metrics["ranks"] = ranks = clock.ranks(of_ranks)
            metrics["peak_memory_bytes"] = max(ranks["peak_memory_bytes"])
        metrics |= _limits(spec, trainer.model, rates, metrics) | {"launch_seconds": launch_time(device)}
        metrics |= {"optimizer_steps": len(clock.ends), "kernel": kernel, "shapes": len(shapes) or None}
        if mixers:
            metrics["mixers"] = mixers
            if strategy.trl is None:
                metrics["mixers"]["slots_per_token"] = _mixer_slots(spec, strategy, dataset, mixers)
        if held_out:
            metrics |= evaluation.evaluate(model, held_out, by_position=True)
            if rest := _rest(spec):
                metrics |= _named(evaluation.evaluate(model, rest), "rest")
        if spec.eval_context:
            metrics |= _in_context(spec, corpus, model)
        if spec.generate_examples:
            tokenizer = load_tokenizer(located(spec.tokenizer), located(spec.corpus))
            asked = _held_out(replace(spec, loss="response"), spec.generate_examples)
            metrics |= evaluation.exact_match(model, asked, tokenizer)
        trace = clock.trace(counts, *trainer.history())
    environment = records.environment(corpus.sha256)
    phases.end("results")
    metrics["phases"] = phases.seconds
    return {"environment": environment, "plan": report, "metrics": metrics, "trace": trace}


def _limits(spec: RunSpec, model: PreTrainedModel, rates: Rates, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """How near a run came to what its device allows, for each device."""
    ranks, rate = spec.world_size, metrics["tokens_per_s"]["mean"] / spec.world_size
    parameters, trained = (
        sum(p.numel() for p in model.parameters() if p.requires_grad or everything) for everything in (True, False)
    )
    limit = step_limit(
        model.config,
        StepWork(
            micro_batches=spec.gradient_accumulation,
            slots=metrics["slots_per_step"] / ranks,
            tokens=metrics["tokens_per_step"] / ranks,
            pairs=metrics["pairs_per_step"] / ranks,
        ),
        rates,
        itemsize=2 if spec.dtype == "bfloat16" else 4,
        trained=None if trained == parameters else trained,
        shards=ranks if spec.rig.shard else 1,
    )
    flops = models.flops_per_token(model.config)
    return {
        "matmul_flops_ceiling": rates.matmul_flops,
        "copy_bytes_per_s": rates.copy_bytes,
        "flops_per_token": flops,
        "model_flops_utilization": rate * flops / rates.matmul_flops,
        "limit": asdict(limit) | {"share": rate / limit.tokens_per_s},
    }


def _device() -> torch.device:
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)  # what is synchronised and counted where no device is named
        return device
    return torch.device("cpu")


def _held_out(spec: RunSpec, examples: int) -> Corpus:
    """Held-out examples; of those above max_tokens the beginning, however training examples are cut."""
    options = spec.corpus_options | {"limit": examples, "max_tokens": spec.max_tokens}
    if spec.overflow in ("split", "cut"):
        options["overflow"] = "truncate"
    return load_corpus(spec.corpus, split="eval", **options)


def _rest(spec: RunSpec) -> Corpus | None:
    """What `_held_out` leaves of the held-out examples: their further pieces of max_tokens, each on its own."""
    options = spec.corpus_options | {"limit": spec.eval_examples, "max_tokens": None, "overflow": "error"}
    whole = load_corpus(spec.corpus, split="eval", **options)
    pieces = -(-whole.lengths // spec.max_tokens)
    first = np.cumsum(pieces) - pieces
    cut_off = np.setdiff1d(np.arange(pieces.sum()), first)
    rest = whole.fit(spec.max_tokens, "split").subset(cut_off) if len(cut_off) else None
    return rest if rest and rest.loss_tokens.any() else None


def _in_context(spec: RunSpec, corpus: Corpus, model: PreTrainedModel) -> dict[str, Any]:
    """What the model makes of held-out examples behind training examples of like words: losses, and answers."""
    asked = replace(spec, loss="response")
    held_out = _held_out(asked, spec.eval_examples)
    shown = neighbours.nearest(corpus, held_out, spec.eval_context)
    metrics = _named(evaluation.evaluate(model, neighbours.behind(corpus, held_out, shown)), "in_context")
    if spec.generate_examples:
        some = neighbours.behind(corpus, _held_out(asked, spec.generate_examples), shown)
        tokenizer = load_tokenizer(located(spec.tokenizer), located(spec.corpus))
        metrics["exact_match_in_context"] = evaluation.exact_match(model, some, tokenizer)["exact_match"]
    return metrics


def _named(losses: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {f"{name}_{where}": value for name, value in losses.items() if name.startswith("eval_")}


def _compute_dtype(spec: RunSpec) -> torch.dtype:
    return torch.float32 if spec.dtype == "float32" else torch.bfloat16


def build(
    spec: RunSpec, corpus: Corpus, attn: str, device: torch.device, *, flat: bool = False, one_shape: bool = False
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of a spec, on its rig, and what was done to its mixers (nothing where it has none, or rows are padded).

    flat: whether rows are flat, so that mixers have to see boundaries. one_shape: whether all micro-batches will have
    as many slots. Raises `ValueError` where the corpus has token ids that the model does not know.
    """
    ours = models.architecture(spec.model)
    model = models.build_model(
        located(spec.model),
        attn_implementation=attn,
        dtype=torch.bfloat16 if spec.dtype == "bfloat16" else torch.float32,
        device=device,
        seed=spec.seed,
        layers=spec.layers,
        vocab_size=corpus.vocab_size if ours and ours.any_vocabulary else None,
    )
    known = model.config.get_text_config().vocab_size
    if corpus.vocab_size > known:
        raise ValueError(f"{spec.corpus} has {corpus.vocab_size} token ids; {spec.model} has {known}: wrong tokenizer")
    mixers = _isolated(model, spec.rig.native_mixers) if flat and attention.carries_state(model) else {}
    rig.prepare(model, spec.rig, weighting=spec.weighting, one_shape=one_shape)
    return model, mixers


def _isolated(model: PreTrainedModel, native: bool) -> dict[str, Any]:
    """Isolates the mixers of `model`: how many of each class run on lines, and how many take boundaries instead."""
    lines = attention.isolate_mixers(model, native=native)
    handed = attention.hand_over_boundaries(model) if native else {}
    taking = (kind for name, kind in handed.items() if name not in lines)
    return {"on_lines": dict(Tally(lines.values())), "with_boundaries": dict(Tally(taking))}


def _mixer_slots(spec: RunSpec, strategy: Strategy, dataset: Dataset, mixers: Mapping[str, Any]) -> float:
    """Slots inside the mixers over the real tokens, over all micro-batches."""
    if not mixers["on_lines"]:
        return 1.0
    slots = tokens = 0.0
    for batch in _micro_batches(spec, strategy, dataset.select_columns("seq_lengths")):
        lengths = [int(n) for row in batch for n in row["seq_lengths"]]
        lengths = [sum(lengths)] if strategy.contaminated else lengths
        slots += attention.mixer_waste(lengths) * sum(lengths)
        tokens += sum(lengths)
    return slots / tokens


def collation(
    spec: RunSpec, strategy: Strategy, corpus: Corpus, dataset: Dataset
) -> tuple[FlatteningCollator | PaddingCollator | None, list[dict[str, Any]]]:
    """The collator of a spec (None for a peer: TRL's own), and a micro-batch of each shape that it will make here.

    Shapes are looked for where the rig makes them repeat: one pass over the rows of this rank, on the host.
    """
    if strategy.trl is not None:
        return None, []
    options: dict[str, Any] = {}
    if strategy.layout == "flat":
        options = rig.flat_shapes(spec.rig, spec.max_tokens, _most_segments(spec, strategy, dataset))
    elif spec.rig.pad_to:
        options = {"pad_to_multiple_of": spec.rig.pad_to}
    if spec.kernel in PADDED_SDPA:
        options["with_mask"] = False
    collator = strategy.collator(corpus.pad_token_id, **options)
    shapes: dict[tuple, dict[str, Any]] = {}
    batches = _micro_batches(spec, strategy, dataset) if spec.rig.pad_to else iter(())
    for features in islice(batches, int(os.environ.get("RANK", 0)), None, spec.world_size):  # ranks take turns
        batch: dict[str, Any] = dict(collator(features))
        shapes[rig.shape_of(batch)] = batch
    return collator, list(shapes.values())


def _micro_batches(spec: RunSpec, strategy: Strategy, dataset: Dataset) -> Iterator[list[dict[str, Any]]]:
    size = strategy.rows_per_batch(spec.batch_size)
    for begin in range(0, len(dataset), size):
        yield [dataset[i] for i in range(begin, min(begin + size, len(dataset)))]


def _most_segments(spec: RunSpec, strategy: Strategy, dataset: Dataset) -> int:
    """Segments of the micro-batch that has most."""
    if strategy.contaminated:
        return strategy.rows_per_batch(spec.batch_size)
    counts = np.array([len(lengths) for lengths in dataset["seq_lengths"]])
    return int(np.add.reduceat(counts, np.arange(0, len(counts), strategy.rows_per_batch(spec.batch_size))).max())


def route(spec: RunSpec, strategy: Strategy, device: torch.device) -> tuple[str, str]:
    """(kernel that computes attention, `attn_implementation`).

    TRL's peers and models with attention classes of their own go through transformers' flash dispatch.
    """
    maskless = spec.kernel in PADDED_SDPA
    if maskless or spec.kernel in ("transformers_sdpa", "transformers_eager"):
        if strategy.layout == "flat" or (strategy.trl is not None and maskless):
            expected = "expected a varlen kernel"
            raise ValueError(f"kernel = {spec.kernel!r} builds a T x T mask or none for {spec.strategy}; {expected}")
        if maskless:
            return spec.kernel, attention.register_attention("sdpa", "packlib_rows")
        return spec.kernel, spec.kernel.removeprefix("transformers_")
    asked = "auto" if spec.kernel == "transformers_flash" else spec.kernel
    kernel = attention.resolve_kernel(asked, device, _compute_dtype(spec))
    ours = models.architecture(spec.model)
    own_dispatch = ours is not None and ours.attention_route == "flash"
    if spec.kernel == "transformers_flash" or strategy.trl is not None or own_dispatch:
        return kernel, "flash_attention_2"
    return kernel, attention.register_attention(kernel)


def dispatched(attn: str, kernel: str) -> AbstractContextManager:
    """While a run lasts: PyTorch's SDPA on its flash kernel, or transformers' flash dispatch on `kernel`.

    The first where `flash_sdpa` is asked for, the second where a run goes there and flash-attn is not what computes.
    """
    if kernel == "flash_sdpa":
        return sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    return attention.flash_stand_in(kernel) if attn == "flash_attention_2" and kernel != "flash_attn" else nullcontext()


def planned(spec: RunSpec, strategy: Strategy, corpus: Corpus) -> tuple[Dataset, dict[str, Any]]:
    """The data set that the trainer is given (only the rows it will reach) and the plan's report."""
    own: dict[str, Any] = {} if spec.atom_size is None else {"atom_size": spec.atom_size}
    if spec.order == "neighbours":
        own["order"] = neighbours.chain(corpus, seed=spec.seed)
    sizes = {"batch_size": spec.batch_size, "max_tokens": spec.max_tokens}
    plan = plan_for(strategy, corpus.lengths, seed=spec.seed, **sizes, **own)
    if spec.order in ("long_first", "long_last"):
        sign = -1 if spec.order == "long_first" else 1
        plan = plan.take(np.argsort(sign * plan.row_lengths / plan.row_examples, kind="stable"), spec.order)
    if spec.examples_per_step:
        if strategy.size == "row" or strategy.layout == "padded" or spec.gradient_accumulation > 1:
            raise ValueError(
                f"examples_per_step = {spec.examples_per_step} makes one flat batch a step; {spec.strategy} with "
                f"gradient_accumulation = {spec.gradient_accumulation} cannot"
            )
        plan, steps = plans.constant_examples(plan, spec.examples_per_step, seed=spec.seed, split_rows=spec.split_rows)
        plan = replace(plan, row_splits=plan.row_splits[steps], max_tokens=None)
    if spec.world_size > 1 and spec.balance:
        plan = plan.balance(spec.world_size, seed=spec.seed)
    report = plan.report(corpus.lengths, strategy.layout).to_dict()
    report["lost_tokens"] += corpus.lost_tokens
    report["unlabelled_examples"] = corpus.unlabelled
    labels = corpus.predicted(plan.example, plan.start, plan.stop)  # of the real mask
    report["loss_tokens"] = int(labels.sum())
    if strategy.packed_by_trl:
        return corpus.dataset, report
    per_step = spec.gradient_accumulation * strategy.rows_per_batch(spec.batch_size) * spec.world_size
    report["labelled_examples_per_step"] = per_step * int((labels > 0).sum()) / len(plan)
    if spec.all_steps:
        plan = plan.take(np.arange(min(spec.all_steps * per_step, len(plan))))
    of_rows = np.add.reduceat(corpus.predicted(plan.example, plan.start, plan.stop), plan.row_splits[:-1])
    _check_learning(np.add.reduceat(of_rows, np.arange(0, len(of_rows), per_step)), spec)
    if strategy.trl is not None:  # the examples in the order of the mini-batches; TRL does the rest
        return corpus.dataset.select(plan.example), report
    return plan.apply(corpus.dataset).with_format("numpy"), report


def _check_learning(loss_tokens: np.ndarray, spec: RunSpec) -> None:
    """ValueError for optimiser steps without a label: their loss is 0 or no number, and they train nothing."""
    bare = np.flatnonzero(loss_tokens == 0)
    if len(bare):
        raise ValueError(
            f"{len(bare)} of {len(loss_tokens)} optimiser steps have no loss token, the first is step {bare[0] + 1}: "
            f"all that they hold within max_tokens = {spec.max_tokens} is prompt; expected unlabelled = 'drop', more "
            "max_tokens, or more examples a step"
        )


def trainer_config(spec: RunSpec, strategy: Strategy, device: torch.device, scratch: str) -> SFTConfig:
    """TRL's settings for a spec: our plans are handed over as they are; the peers prepare and pack by themselves."""
    if strategy.trl is None:
        preparation: Mapping[str, Any] = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
        batch_size = strategy.rows_per_batch(spec.batch_size)
    else:
        preparation = {"max_length": spec.max_tokens if strategy.packed_by_trl else None, **strategy.trl}
        batch_size = spec.batch_size
    return SFTConfig(
        **preparation,
        **rig.trainer_settings(spec.rig),
        output_dir=scratch,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation,
        max_steps=spec.all_steps or -1,
        num_train_epochs=spec.epochs,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.lr_scheduler,
        warmup_steps=spec.lr_warmup_steps,
        weight_decay=spec.weight_decay,
        optim="adamw_torch_fused" if device.type == "cuda" else "adamw_torch",
        bf16=spec.dtype == "bf16_mixed",
        train_sampling_strategy="random" if strategy.packed_by_trl else "sequential",
        remove_unused_columns=strategy.packed_by_trl,
        seed=spec.seed,
        logging_strategy="no",  # LabTrainer keeps losses and norms; logging waits for them, step by step
        logging_nan_inf_filter=False,  # it looks at every loss
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        use_cpu=device.type == "cpu",
    )


def placeholder_tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    """What TRL reads pad and end tokens from: the examples are tokenized already, and theirs may not be at hand."""
    tokens = {"<unk>": corpus.vocab_size, "<end>": corpus.eos_token_id}
    pad = "<end>" if corpus.pad_token_id == corpus.eos_token_id else "<pad>"
    tokens.setdefault(pad, corpus.pad_token_id)
    backend = Tokenizer(WordLevel(tokens, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>", pad_token=pad)


def _silent(line: str) -> None:
    pass
