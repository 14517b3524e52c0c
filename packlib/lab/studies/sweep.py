"""Whether `packlib_varlen` computes what the model's own eager attention does: every causal language model type.

`python -m packlib matrix --sweep` writes `papermill_runs/isolation/sweep-transformers-<version>.json`, and a table
beside it. A type is built small from its config; four examples go through its eager attention one at a time, in
float64, which is the truth, and through `packlib_varlen` in four ways: alone, padded on the right, padded on the left,
packed. Each way is right within rounding, or refused by an error that says what it does not take, or off exactly as the
model's eager attention is off (a model that counts the positions of pads). Anything else is wrong in silence.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from packlib.attention import register_attention
from packlib.collators import FlatteningCollator, PaddingCollator
from packlib.isolation import check_isolation
from packlib.isolation.probe import alone_batch, largest, logits, packed_batch, probe_tokens
from packlib.lab import records
from packlib.lab.small_models import small_model

logger = logging.getLogger(__name__)

LENGTHS = (13, 10, 7, 16)  # longer than the windows (8) and convolutions (4) of the small models
WAYS = ("alone", "right", "left", "packed")
UNITS = 64  # of float32 rounding at the scale of the logits: norms and rotary angles are float32 in a float64 model too
KERNELS = ("sdpa", "reference")  # the second for what the first refuses (softcap)
OUT_OF_SCOPE = {
    "gemma3n": "its vision tower needs the timm package; its text model is gemma3n_text",
    "gemma4_assistant": "a draft model: it reads the keys and values of another model",
    "gemma4_unified_assistant": "a draft model: it reads the keys and values of another model",
    "musicgen": "its tokens are those of several audio codebooks, not text",
    "musicgen_melody": "its tokens are those of several audio codebooks, not text",
}
OUTCOMES = {
    "right": "all four ways are right within rounding",
    "partly": "what is not refused by name is right, or, padded on the left, what eager attention gives there",
    "refused": "refused by name, whatever the batch",
    "not built": "transformers does not build it small, or it is no language model",
    "silent": "wrong without a word",
}


def causal_types() -> list[str]:
    """Every `model_type` of transformers that has a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def sweep(models: Iterable[str] | None = None) -> dict[str, Any]:
    """`check_type` of each, by default of every causal type, as a record. About 0.4 s each on one core."""
    for kernel in KERNELS:
        register_attention(kernel, f"packlib_{kernel}")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    found = []
    for model_type in causal_types() if models is None else models:
        found.append(check_type(model_type))
        logger.info("%s: %s", model_type, found[-1]["outcome"])
    transformers.logging.set_verbosity(verbosity)
    return {"environment": records.environment(), "lengths": LENGTHS, "types": found}


def check_type(model_type: str) -> dict[str, Any]:
    """One type: class, dtype, kernel, what each way gave, what `check_isolation` says, and the outcome in a word."""
    empty = dict.fromkeys(("class", "dtype", "kernel", "scale", "isolation", "reason"))
    row: dict[str, Any] = {"model": model_type} | empty | {"ways": {}}
    if model_type in OUT_OF_SCOPE:
        return row | {"reason": OUT_OF_SCOPE[model_type], "outcome": "not built"}
    with warnings.catch_warnings(action="ignore"), torch.no_grad(), _softmax_in_its_own_dtype():
        try:
            eager, truth, examples = _truth(model_type)
        except Exception as error:  # whatever a model raises whose code and config do not fit
            return row | {"reason": f"{type(error).__name__}: {error}"[:300], "outcome": "not built"}
        dtype, scale = truth[0].dtype, max(map(largest, truth))
        row |= {"class": type(eager).__name__, "dtype": str(dtype).removeprefix("torch."), "scale": scale}
        tolerance = UNITS * torch.finfo(torch.float32).eps * scale
        for kernel in KERNELS:
            row["kernel"] = kernel
            try:
                model = small_model(model_type, f"packlib_{kernel}", dtype, decoder=True)
            except ValueError as refusal:
                row["ways"] = {way: {"verdict": "refused", "reason": str(refusal)} for way in WAYS}
                break
            model.load_state_dict(eager.state_dict())
            row["ways"] = {way: _judge(way, model, eager, examples, truth, tolerance) for way in WAYS}
            if not any("has no softcap" in cell.get("reason", "") for cell in row["ways"].values()):
                break
    if row["ways"]["packed"]["verdict"] == "right":
        collator = FlatteningCollator(position_ids_start=_first_position(model))
        report = check_isolation(model, lengths=LENGTHS, batch_builder=lambda e: packed_batch(e, collator))
        row["isolation"] = report.verdict
    return row | {"outcome": _outcome(row)}


def _truth(model_type: str) -> tuple[PreTrainedModel, list[Tensor], list[list[int]]]:
    """The model with its own eager attention, and the logits of each example alone; float64 where it runs."""
    for dtype in (torch.float64, torch.float32):  # a few have a float32 tensor somewhere
        model = small_model(model_type, "eager", dtype, decoder=True)
        examples, _ = probe_tokens(model, LENGTHS, seed=0)
        try:
            with _default_dtype(dtype):
                return model, [logits(model, alone_batch(e))[0] for e in examples], examples
        except RuntimeError:
            if dtype == torch.float32:
                raise
    raise AssertionError("not reached")


def _judge(
    way: str, model: nn.Module, eager: nn.Module, examples: list[list[int]], truth: list[Tensor], tolerance: float
) -> dict[str, Any]:
    """One way of handing the examples over: its verdict, and the error or the reason."""
    try:
        error = _error(way, model, examples, truth)
    except (ValueError, NotImplementedError) as refusal:
        return {"verdict": "refused", "reason": str(refusal)}
    except Exception as crash:  # whatever a model raises that was not meant to be given this
        return {"verdict": "crash", "reason": f"{type(crash).__name__}: {crash}"[:300]}
    if error <= tolerance:
        return {"verdict": "right", "error": error}
    if way in ("right", "left") and abs(error - _error(way, eager, examples, truth)) <= tolerance:
        return {"verdict": "as eager", "error": error}
    return {"verdict": "wrong", "error": error}


def _error(way: str, model: nn.Module, examples: list[list[int]], truth: list[Tensor]) -> float:
    """Largest difference of any logit from the truth."""
    start = _first_position(model)
    with _default_dtype(truth[0].dtype):
        if way == "alone":
            outs = [logits(model, alone_batch(example))[0] for example in examples]
        elif way == "packed":
            outs = list(
                logits(model, packed_batch(examples, FlatteningCollator(position_ids_start=start)))[0].split(
                    [*map(len, examples)]
                )
            )
        else:
            batch = _padded(examples, left=way == "left", first_position=start)
            out, mask = logits(model, batch), batch["attention_mask"].bool()
            outs = [row[here] for row, here in zip(out, mask)]
    return max(largest(out, expected) for out, expected in zip(outs, truth))


def _padded(examples: list[list[int]], *, left: bool, first_position: int) -> dict[str, Any]:
    """[B, T] with a mask; on the left, position ids too: most models count the positions of pads without."""
    right = PaddingCollator()([{"input_ids": example} for example in examples])
    batch: dict[str, Any] = {name: right[name] for name in ("input_ids", "attention_mask")} | {"use_cache": False}
    if left:
        shifts = [right["input_ids"].shape[1] - len(example) for example in examples]
        for name in ("input_ids", "attention_mask"):
            batch[name] = torch.stack([row.roll(shift) for row, shift in zip(right[name], shifts)])
        mask = batch["attention_mask"]
        batch["position_ids"] = (mask.cumsum(1) - 1 + first_position).clamp(min=max(0, first_position - 1))
    return batch


def _first_position(model: nn.Module) -> int:
    """Where positions of this model start: behind the padding index in RoBERTa and its like."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.padding_idx + 1
    return 0


def _outcome(row: Mapping[str, Any]) -> str:
    verdicts = {cell["verdict"] for cell in row["ways"].values()}
    if verdicts == {"refused"}:
        return "refused"
    if verdicts & {"wrong", "crash"} or row["isolation"] not in ("exact", "rounding", None):
        return "silent"
    return "right" if verdicts == {"right"} else "partly"


def table(record: Mapping[str, Any]) -> str:
    """The record as a page of Markdown: versions, what outcomes mean and how many there are, one line a type."""
    environment, types = record["environment"], record["types"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("transformers", "torch"))
    lengths = ", ".join(map(str, record["lengths"]))
    counts = Counter(row["outcome"] for row in types)
    lines = [
        "# Every causal language model type: packlib_varlen against its own eager attention",
        "",
        f"{versions}. {len(types)} types, built small; examples of {lengths} tokens. The truth is eager attention, one "
        "example at a time, in float64; an error is the largest difference of any logit from it, over "
        "the largest logit.",
        "",
        *(f"- **{outcome}** {counts[outcome]}: {meaning}" for outcome, meaning in OUTCOMES.items()),
        "",
        f"| type | outcome | {' | '.join(WAYS)} | why |",
        f"|---|---|{'---|' * len(WAYS)}---|",
    ]
    for row in types:
        cells = [_cell(row["ways"].get(way), row["scale"]) for way in WAYS]
        reasons = [row["reason"], *(cell.get("reason") for cell in row["ways"].values())]
        why = dict.fromkeys(" ".join(reason.split()).replace("|", "/") for reason in reasons if reason)
        lines.append(f"| {row['model']} | {row['outcome']} | {' | '.join(cells)} | {'; '.join(why)} |")
    return "\n".join(lines) + "\n"


def _cell(cell: Mapping[str, Any] | None, scale: float) -> str:
    if cell is None:
        return ""
    return cell["verdict"] if "error" not in cell else f"{cell['verdict']} {cell['error'] / scale:.0e}"


def publish(models: Iterable[str] | None = None, folder: Path | None = None) -> str:
    """Run the sweep, write its record and table; returns a line about it."""
    record = sweep(models)
    path = (folder or records.runs_folder() / "isolation") / f"sweep-transformers-{transformers.__version__}.json"
    records.write_json(path, record)
    path.with_suffix(".md").write_text(table(record), encoding="utf-8")
    counts = Counter(row["outcome"] for row in record["types"])
    return f"{', '.join(f'{n} {outcome}' for outcome, n in counts.most_common())}: {path.with_suffix('.md')}"


@contextmanager
def _softmax_in_its_own_dtype() -> Iterator[None]:
    """Eager attention in transformers computes its softmax in float32, in a float64 model too; here in float64."""
    original: Callable[..., Tensor] = F.softmax

    def softmax(
        input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
    ) -> Tensor:
        dtype = dtype if dtype is None else torch.promote_types(dtype, input.dtype)
        return original(input, dim, _stacklevel, dtype)

    with mock.patch.object(F, "softmax", softmax):
        yield


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """For models that make a tensor without saying of what dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.promote_types(dtype, torch.float32))
    try:
        yield
    finally:
        torch.set_default_dtype(before)
