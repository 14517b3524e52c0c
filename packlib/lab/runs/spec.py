"""What a run is: everything its result depends on, besides code, data and machine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any

from transformers import SchedulerType

from packlib.attention import KERNELS
from packlib.lab import records
from packlib.lab.data.corpora import UNLABELLED
from packlib.lab.parameters import check_parameters, unknown_name
from packlib.lab.strategies import get_strategy
from packlib.losses import WEIGHTINGS

DTYPES = ("float32", "bfloat16", "bf16_mixed")
OVERFLOW = ("error", "truncate", "split", "cut")
ORDERS = ("planned", "long_first", "long_last", "neighbours")
LOSSES = ("full", "response")
PADDED_SDPA = (
    "flash_sdpa",
    "maskless_sdpa",
)  # pads are attended to; the first is the stronger baseline of a plain trainer
OWN_ATTENTION = ("transformers_sdpa", "transformers_eager", "transformers_flash", *PADDED_SDPA)
KERNEL_NAMES = ("auto", *KERNELS, *OWN_ATTENTION)


@dataclass(frozen=True)
class Rig:
    """How a step is executed. The default is what a plain SFTTrainer does: eager layers, everything kept for backward.

    compile: `none`, or `layers`: every decoder layer, in place.
    recompute: `none`; `all`: every layer's activations are computed again in backward (gradient checkpointing); or a
        budget in (0, 1): the share of a compiled layer's activations that is kept besides attention's, the cheapest
        ones are not.
    graphs: forward and backward of micro-batches as CUDA graphs, one for each shape, captured before training.
    fused_loss: output head and loss in one, each position scored once; SFTTrainer's own also scores entropy and
        accuracy for its metrics, and waits for them.
    liger: Liger's fused norms, rotary embeddings and gated MLPs (package liger-kernel, on a GPU).
    lean: AdamW in one pass that also clips and zeroes, batches copied without waiting.
    pad_to: rows are padded to multiples of so many tokens, so that shapes repeat; 0: not at all.
    float8: matrix products of the layers in float8 (package torchao, on a Hopper GPU).
    lora_rank: adapters of this rank on all linear layers instead of training the weights (package peft).
    native_mixers: what is not attention takes the boundaries of flat rows itself where it can (convolutions; linear
        attention with package flash-linear-attention); else it runs on one line a segment, as `isolate_mixers` says.
    shard: weights, gradients and optimiser states over all ranks, layer by layer (FSDP2); without it, every rank holds
        them whole, and gradients are averaged over ranks by DDP, or at the end of a step where graphs or lean leave
        them in their place.
    """

    compile: str = "none"
    recompute: str | float = "none"
    graphs: bool = False
    fused_loss: bool = False
    liger: bool = False
    lean: bool = False
    pad_to: int = 0
    float8: bool = False
    lora_rank: int | None = None
    shard: bool = False
    native_mixers: bool = False

    def __post_init__(self) -> None:
        check_parameters(asdict(self), _defaults(self) | {"recompute": None, "lora_rank": None})
        if self.compile not in ("none", "layers"):
            raise unknown_name("compile", self.compile, ("none", "layers"))
        if self.recompute not in ("none", "all") and self.budget is None:
            raise ValueError(f"recompute = {self.recompute!r}; expected 'none', 'all', or a number between 0 and 1")
        if isinstance(self.pad_to, bool) or self.pad_to < 0:
            raise ValueError(f"pad_to = {self.pad_to!r}; expected at least 0 tokens")
        rank = self.lora_rank
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise ValueError(f"lora_rank = {rank!r}; expected an integer of at least 1 or None")
        if self.budget is not None and self.compile == "none":
            raise ValueError(
                f"recompute = {self.recompute} is a budget of compiled layers; expected compile = 'layers'"
            )
        if self.float8 and self.compile == "none":
            raise ValueError("float8 casts in kernels of its own unless they are compiled; expected compile = 'layers'")
        if self.shard and (self.graphs or self.lean):
            raise ValueError(
                "shard gathers weights in every layer and shards the optimiser's states: expected graphs = False and "
                "lean = False"
            )
        if self.graphs and not (self.fused_loss and self.pad_to and self.recompute != "all"):
            raise ValueError(
                "graphs need micro-batches that repeat and wait for nothing: expected fused_loss, pad_to above 0, and "
                f"recompute 'none' or a budget, not {self.recompute!r}"
            )

    @property
    def budget(self) -> float | None:
        """`recompute` as a memory budget, None where it is none."""
        value = self.recompute
        return float(value) if isinstance(value, float) and 0 < value < 1 else None

    @property
    def label(self) -> str:
        """What differs from a plain SFTTrainer, in words; empty where nothing does.

        >>> Rig(compile="layers", recompute=0.2).label
        'compiled layers, 0.2 of activations kept'
        """
        changed = _differences(self, Rig())
        if self.graphs or self.pad_to == 1:  # graphs cannot do without, and multiples of 1 are none
            changed.pop("pad_to", None)
        return ", ".join(in_words(name, value) for name, value in changed.items())


def in_words(field: str, value: object) -> str:
    """A field of `Rig` that is not as by default, as readers know it.

    >>> in_words("recompute", "all"), in_words("pad_to", 64), in_words("lean", True)
    ('checkpointing', 'rows of multiples of 64', 'lean optimiser')
    """
    if field == "recompute":
        return "checkpointing" if value == "all" else f"{value} of activations kept"
    words = {
        "compile": "compiled {}",
        "graphs": "CUDA graphs",
        "fused_loss": "fused loss",
        "liger": "Liger's layers",
        "lean": "lean optimiser",
        "pad_to": "rows of multiples of {}",
        "lora_rank": "LoRA rank {}",
        "shard": "FSDP2",
        "native_mixers": "mixers that take boundaries",
    }
    return words.get(field, field).format(value)


@dataclass(frozen=True)
class RunSpec:
    """Everything a run's result depends on, besides code, data and machine.

    batch_size: examples per mini-batch (padding, minibatch_packing, …) or rows of `max_tokens` per micro-batch (fixed
        length); rows of batch_size × max_tokens are one micro-batch where a strategy plans whole batches (multipack).
    steps: optimiser steps, passing over the plan as often as needed; None: `epochs` passes.
    warmup_steps: first steps left out of every timing. repeat: distinguishes repetitions of one measurement.
    kernel: one of `packlib.attention.KERNELS` or `auto`, through `packlib_varlen`; or `transformers_sdpa`,
        `transformers_eager`, `transformers_flash`: transformers' own attention, the last with the flash-attn package or
        a stand-in for its kernel; or `maskless_sdpa`: PyTorch's SDPA on padded batches without their mask, which causal
        attention does not need where pads are on the right; or `flash_sdpa`: the same, held to PyTorch's flash kernel
        (on Hopper PyTorch prefers cuDNN, which plans every new shape anew).
    dtype: `float32`; `bfloat16` (weights, gradients and optimiser states); `bf16_mixed` (float32 weights under
        autocast).
    weighting: one of `packlib.losses.WEIGHTINGS`. loss: `full` or `response`. overflow: what happens to examples above
        max_tokens, as in `Corpus.fit`; `cut`: a strategy that cuts gets them whole. unlabelled: and to those that then
        have no label left: `error`, `drop`, or `keep`.
    eval_examples: size of the held-out set (0: none), evaluated at the end and every `eval_every` steps. atom_size: for
        fixed_length.
    examples_per_step: group rows so that optimiser steps hold about this many examples. split_rows: exactly as many, by
        splitting rows between examples.
    order: of the rows: as `planned`; `long_first` or `long_last`, by their mean example; or `neighbours`: the stream of
        fixed_length runs through examples of like words, and its rows are shuffled.
    layers: toy depth instead of the published one.
    generate_examples: evaluation examples whose final answer is generated and compared. eval_context: also evaluate
        every held-out example behind so many training examples of like words (0: not).
    balance: rows are dealt out so that ranks have equal work, as `Plan.balance` does; else as they come.
    rig: how a step is executed; a mapping of its fields is as good. profile: one more step, of which kernels, launches
        and pauses are counted (on a GPU).

    Raises `ValueError` or `TypeError` naming the field, for what cannot be.
    """

    model: str = "tiny-llama"
    corpus: str = "pydocs"
    strategy: str = "padding"
    tokenizer: str = "bpe"
    batch_size: int = 4
    max_tokens: int = 1024
    gradient_accumulation: int = 1
    steps: int | None = None
    epochs: float = 1.0
    warmup_steps: int = 3
    limit: int | None = None
    overflow: str = "truncate"
    unlabelled: str = "error"
    loss: str = "full"
    weighting: str = "per_token"
    seed: int = 0
    repeat: int = 0
    kernel: str = "auto"
    dtype: str = "float32"
    learning_rate: float = 1e-3
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    weight_decay: float = 0.0
    eval_examples: int = 0
    eval_every: int | None = None
    generate_examples: int = 0
    eval_context: int = 0
    order: str = "planned"
    atom_size: int | None = None
    examples_per_step: int | None = None
    split_rows: bool = False
    layers: int | None = None
    world_size: int = 1
    balance: bool = True
    rig: Rig = field(default_factory=Rig)
    profile: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rig, Mapping):
            object.__setattr__(self, "rig", Rig(**self.rig))
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in check_parameters(given, _defaults(self)).items():
            object.__setattr__(self, name, value)  # an int for a float is that float: the same run, the same id
        get_strategy(self.strategy)
        choices = {
            "dtype": DTYPES,
            "overflow": OVERFLOW,
            "order": ORDERS,
            "unlabelled": UNLABELLED,
            "loss": LOSSES,
            "weighting": WEIGHTINGS,
            "kernel": KERNEL_NAMES,
            "lr_scheduler": [kind.value for kind in SchedulerType],
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
        _check_numbers(self)

    @property
    def all_steps(self) -> int | None:
        """Optimiser steps that are taken: those of `steps`, and the one that is profiled."""
        return None if self.steps is None else self.steps + self.profile

    @property
    def corpus_options(self) -> dict[str, Any]:
        """What `load_corpus` is asked for, besides name and split."""
        names = ("tokenizer", "loss", "limit", "max_tokens", "overflow", "unlabelled")
        options = {name: getattr(self, name) for name in names}
        return options | {"max_tokens": None, "overflow": "error"} if self.overflow == "cut" else options

    @property
    def spec_id(self) -> str:
        """Twelve hex digits of what differs from the defaults: a new field with a default leaves every id as it was."""
        return records.run_id(_differences(self, type(self)()))


OPTIONAL = {"steps", "limit", "eval_every", "atom_size", "examples_per_step", "layers"}  # at least 1, or None
AT_LEAST_ONE = OPTIONAL | {"batch_size", "max_tokens", "gradient_accumulation", "world_size"}
AT_LEAST_ZERO = {
    "warmup_steps",
    "seed",
    "repeat",
    "lr_warmup_steps",
    "eval_examples",
    "generate_examples",
    "eval_context",
    "weight_decay",
    "learning_rate",
}


def _check_numbers(spec: RunSpec) -> None:
    for name in sorted(AT_LEAST_ONE):
        value = getattr(spec, name)
        if value is None and name in OPTIONAL:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            also = " or None" if name in OPTIONAL else ""
            raise ValueError(f"{name} = {value!r}; expected an integer of at least 1{also}")
    for name in sorted(AT_LEAST_ZERO):
        value = getattr(spec, name)
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} = {value!r}; expected a finite number of at least 0")
    if not math.isfinite(spec.epochs) or spec.epochs <= 0:
        raise ValueError(f"epochs = {spec.epochs!r}; expected a finite number above 0")
    if spec.steps is not None and spec.warmup_steps >= spec.steps:
        raise ValueError(
            f"warmup_steps = {spec.warmup_steps} leaves nothing of steps = {spec.steps} to measure; expected fewer"
        )
    if spec.rig.shard and spec.world_size == 1:
        raise ValueError("rig.shard = True with world_size = 1; expected at least two ranks to shard over")
    if spec.split_rows and spec.examples_per_step is None:
        raise ValueError("split_rows = True with examples_per_step = None; expected the number of examples a step")
    if spec.profile and spec.steps is None:
        raise ValueError("profile = True adds a step to those of `steps`; expected steps, not None")
    if spec.eval_every is not None and not spec.eval_examples:
        raise ValueError(f"eval_every = {spec.eval_every} with eval_examples = 0; expected a held-out set to evaluate")


def _defaults(value: Any) -> dict[str, Any]:
    """Field -> its default, which has the type that a value must have (None: any)."""
    return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(value)}


def _differences(value: Any, default: Any) -> dict[str, Any]:
    """Fields of a dataclass that differ from those of `default`; of dataclasses among them, their own differences."""
    found = {}
    for f in fields(value):
        mine, usual = getattr(value, f.name), getattr(default, f.name)
        if mine != usual:
            found[f.name] = _differences(mine, usual) if is_dataclass(mine) else mine
    return found


def grid(base: RunSpec, **axes: Iterable[Any]) -> list[RunSpec]:
    """Every combination of the axes over `base`, the last axis fastest.

    >>> [s.strategy + str(s.seed) for s in grid(RunSpec(), seed=[0, 1], strategy=["padding", "minibatch_packing"])]
    ['padding0', 'minibatch_packing0', 'padding1', 'minibatch_packing1']
    """
    specs = [base]
    for name, values in axes.items():
        values = list(values)
        specs = [replace(spec, **{name: value}) for spec in specs for value in values]
    return specs
