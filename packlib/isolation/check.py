"""Proof that packed examples do not see each other: for any model, any kernel, as it is loaded, on its device.

Four observations, from sharp to blunt. Gradients: an example's logits have gradient exactly zero with respect to
another example's embeddings, in any dtype, if nothing connects them. Influence: editing one example leaves the others'
logits as they were, bit for bit unless rounding depends on the content (mixtures of experts). Error: the packed logits
equal those of one example at a time. Eager error: one example at a time, the attention in hand computes what the
model's own eager attention does. The last two hold up to rounding, whose yardstick is measured on the model itself: how
much its logits move when the same example comes in batches of other sizes, within what the dtype can explain.

Models change what they do at lengths that their configs name (windows, chunks, scaled rotary embeddings). The examples
lie on both sides of those that a few hundred tokens reach; the others are named in the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from packlib.attention.flash_stand_in import is_stand_in
from packlib.attention.register import is_registered, register_attention
from packlib.collators import FlatteningCollator, PaddingCollator
from packlib.isolation.probe import (
    Place,
    alone_batch,
    find_places,
    first_difference,
    input_gradients,
    largest,
    length_thresholds,
    logits,
    packed_batch,
    probe_tokens,
)
from packlib.losses import WEIGHTINGS, token_weights, weighted_loss

BatchBuilder = Callable[[list[list[int]]], Mapping[str, Any]]
LENGTHS = (11, 5, 17, 14)  # 47 tokens: a prime, so that no other dimension of a small model is taken for the row
REACH = 512  # tokens: thresholds up to here get an example that is longer
_ROUNDING = 8.0  # how many times the measured noise still counts as rounding
_NOISE_UNITS = 16.0  # of rounding at the scale of the logits: what moves them more than that is a fault, not noise
_UNITS = 4.0  # of rounding at the scale of the logits that noise may come to, times the one of equal shapes
_EAGER_UNITS = 64.0  # the same for two ways to compute attention; eager has its softmax in float32


class ContaminationError(RuntimeError):
    """Packed examples see each other, or it cannot be shown that they do not."""


@dataclass(frozen=True)
class IsolationReport:
    """What `check_isolation` saw.

    verdict: `exact` (editing an example leaves the others bit for bit as they were, and they are what they are alone),
        `rounding` (the same up to the model's own noise), `shifted` (no example sees another, but their logits are not
        those of one at a time: positions, or something that depends on the row's length), `different` (as alone, but
        the attention in hand is not the model's own), `leak`, or `refused` (the model or the kernel does not take this
        batch; `reason` says why).
    error: largest |packed - alone| over the logits. noise: the same between batch sizes, unpacked. scale: largest
        |logit| alone. eager_error: largest |alone - alone with the model's eager attention|; None without another.
    influence[i][j]: largest change of example i's logits when j is edited. gradient[i][j]: gradient of i's logits with
        respect to j's embeddings, relative to i's own; None where the kernel has no backward.
    starts_at: name of the first module that differs. culprit: attention, convolution, state, positions or other.
    stand_in: whether flash_attention_2 ran on packlib's stand-in. unprobed: lengths at which this model changes what it
        does, by the name in its config, that the examples are not on both sides of.
    """

    model: str
    attention: str
    dtype: str
    device: str
    lengths: list[int]
    verdict: str
    error: float
    noise: float
    scale: float
    influence: list[list[float]]
    gradient: list[list[float]] | None
    eager_error: float | None = None
    starts_at: str | None = None
    culprit: str | None = None
    reason: str | None = None
    stand_in: bool = False
    unprobed: dict[str, int] = field(default_factory=dict)

    @property
    def isolated(self) -> bool:
        """Whether packed examples are what each is alone with the model's own attention, up to rounding."""
        return self.verdict in ("exact", "rounding")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        attention = f"{self.attention} (a stand-in, not the flash-attn package)" if self.stand_in else self.attention
        text = f"{self.model} with {attention} in {self.dtype} on {self.device}: {self.verdict.upper()}. "
        if self.verdict == "refused":
            return text + str(self.reason)
        worst, i, j = _worst(self.influence)
        text += (
            f"Editing example {j} moves example {i} by {worst:.2g}; packed against one at a time {self.error:.2g} "
            f"(noise {self.noise:.2g}, logits up to {self.scale:.2g})"
        )
        if self.eager_error is not None:
            text += f"; against eager attention {self.eager_error:.2g}"
        if self.starts_at:
            text += f"; starts at {self.starts_at} ({self.culprit})"
        if self.unprobed:
            far = ", ".join(f"{name} = {length:,}" for name, length in self.unprobed.items())
            text += f". Not tried on both sides of {far}: pass lengths= that are"
        return text


def _worst(table: Sequence[Sequence[float]]) -> tuple[float, int, int]:
    """Largest entry off the diagonal, and where."""
    return max((x, i, j) for i, row in enumerate(table) for j, x in enumerate(row) if i != j)


@contextmanager
def _loaded(model: PreTrainedModel, kernel: str | None) -> Iterator[None]:
    """Evaluation mode, on `kernel` if one is named; as before afterwards."""
    training, attention = model.training, getattr(model.config, "_attn_implementation", None)
    try:
        if kernel is not None:
            name = f"packlib_{kernel.replace('flash', 'fa')}"  # transformers takes "flash" for a kernel of its Hub
            model.set_attn_implementation(register_attention(kernel, name))
        model.eval()
        yield
    finally:
        model.train(training)
        if kernel is not None:
            model.set_attn_implementation(attention)


def check_isolation(
    model: PreTrainedModel,
    *,
    kernel: str | None = None,
    batch_builder: BatchBuilder | None = None,
    lengths: Sequence[int] | None = None,
    seed: int = 0,
    strict: bool = False,
) -> IsolationReport:
    """Pack a few random examples, edit each in turn, and see whether another one notices.

    Args:
        model: any causal language model or encoder of transformers, as it is loaded (compiled as well); used in eval
            mode and left as it was.
        kernel: one of `packlib.attention.KERNELS` to run it on through `packlib_varlen`; None: the attention it has.
        batch_builder: examples (lists of token ids) -> arguments of `model.forward`; each example must lie in one
            piece, once, in its `input_ids` [B, T]. Default `packed_batch`: one flat row, boundaries known, cache off.
        lengths: tokens in each example, at least two examples. Default: four short ones, and one beyond each length up
            to REACH at which the config says that the model changes what it does.
        strict: raise ContaminationError unless they are apart, also where the question was refused.

    Raises ValueError for fewer than two examples and for a batch in which an example cannot be found.
    """
    thresholds = length_thresholds(model.config)
    lengths = _probe_lengths(thresholds) if lengths is None else list(lengths)
    if len(lengths) < 2 or min(lengths) < 1:
        raise ValueError(f"lengths = {lengths}; expected at least two examples of at least one token")
    builder = batch_builder or packed_batch
    examples, edited = probe_tokens(model, lengths, seed)
    batches = [builder([edited[k] if k == j else e for k, e in enumerate(examples)]) for j in range(-1, len(examples))]
    places = find_places(batches[0]["input_ids"], examples)
    try:
        with _loaded(model, kernel), _compiled_for_every_shape(model):
            attention = getattr(model.config, "_attn_implementation", None) or "none"
            found = _look(model, examples, batches, places)
    except ValueError as refusal:  # the model does not take this kernel
        attention, found = f"packlib_{kernel}", _refused(refusal)
    parameter = next(model.parameters())
    report = IsolationReport(
        model=model.config.model_type,
        attention=attention,
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=parameter.device.type,
        lengths=lengths,
        stand_in=attention.startswith("flash") and is_stand_in(),
        unprobed={name: t for name, t in thresholds.items() if not min(lengths) <= t < max(lengths)},
        **found,
    )
    if strict and not report.isolated:
        raise ContaminationError(str(report))
    return report


def _probe_lengths(thresholds: Mapping[str, int]) -> list[int]:
    """LENGTHS, and one example beyond each threshold within REACH; a prime number of tokens in all."""
    lengths = [*LENGTHS, *(t + 3 for t in sorted(set(thresholds.values())) if max(LENGTHS) <= t <= REACH)]
    while any(sum(lengths) % k == 0 for k in range(2, int(sum(lengths) ** 0.5) + 1)):
        lengths[-1] += 1
    return lengths


def _refused(reason: Exception, **seen: float) -> dict[str, Any]:
    empty = {"error": float("nan"), "noise": float("nan"), "scale": float("nan"), "influence": [], "gradient": None}
    text = str(reason) if isinstance(reason, ValueError | NotImplementedError) else f"{type(reason).__name__}: {reason}"
    return empty | seen | {"verdict": "refused", "reason": text}


def _look(
    model: PreTrainedModel, examples: list[list[int]], batches: list[Mapping[str, Any]], places: list[Place]
) -> dict[str, Any]:
    """The observations of a report, and the verdict."""
    # 1. One at a time, the yardstick, and packed: before and after each edit.
    noise = scale = float("nan")
    try:
        with torch.no_grad():
            if _never_calls(model, batches[0]):
                raise ValueError(f"{type(model).__name__} never called {model.config._attn_implementation!r}")
            alone = [logits(model, alone_batch(e))[0] for e in examples]
            scale = max(map(largest, alone))
            noise = _noise(model, examples, alone, scale)
            packed, again, *moved = [logits(model, batch) for batch in (batches[0], *batches)]
            if not all(out[p].isfinite().all() for out in (packed, *moved) for p in places):
                raise ValueError("the packed logits are not finite")
    except (ValueError, NotImplementedError, IndexError, RuntimeError, TypeError, KeyError) as refusal:
        return _refused(refusal, noise=noise, scale=scale)
    # 2. What they say. Where noise happens to be zero, a few units in the last place of the largest logit are rounding.
    rounding = _rounding(model)
    noise = min(max(noise, *(largest(again[p], packed[p]) for p in places)), _NOISE_UNITS * rounding * scale)
    influence = [[largest(m[p], packed[p]) for m in moved] for p in places]
    errors = [largest(packed[p], a) for p, a in zip(places, alone)]
    gradient = input_gradients(model, batches[0], places)
    eager_error = _eager_error(model, examples, alone)
    tolerance = _ROUNDING * max(noise, rounding * scale)
    seen, i, j = _worst(influence)
    slope, k, m = _worst(gradient or influence)
    # 3. The verdict, and where what is wrong begins.
    start: tuple[str | None, str | None] = None, None
    if seen > tolerance or (gradient and slope > _eps(model)):
        verdict, (i, j) = "leak", (i, j) if seen > tolerance else (k, m)
        start = first_difference(model, batches[0], batches[1 + j], places[i], places[i], noise)
    elif max(errors) > tolerance:
        verdict, i = "shifted", errors.index(max(errors))
        at = 0, slice(0, len(examples[i]))
        start = first_difference(model, batches[0], alone_batch(examples[i]), places[i], at, tolerance)
    elif eager_error is not None and eager_error > _EAGER_UNITS * rounding * scale:
        verdict, start = "different", (None, "attention")
    else:
        verdict = "exact" if seen == 0 else "rounding"
    return {
        "verdict": verdict,
        "error": max(errors),
        "noise": noise,
        "scale": scale,
        "influence": influence,
        "gradient": gradient,
        "eager_error": eager_error,
        "starts_at": start[0],
        "culprit": start[1],
    }


def _eps(model: PreTrainedModel) -> float:
    return torch.finfo(next(model.parameters()).dtype).eps


def _rounding(model: nn.Module) -> float:
    """Units in which logits are rounded: a float64 model of transformers has norms and rotary angles in float32."""
    return max(_eps(model), torch.finfo(torch.float32).eps)


def _noise(model: PreTrainedModel, examples: list[list[int]], alone: list[Tensor], scale: float) -> float:
    """How much the logits of unpacked examples move with the size of the batch.

    Several copies of each; and each with more text behind it, which a causal model does not see, or, if it sees what
    comes later, padded beside the others. What more text does is noise only as far as the copies or the dtype explain
    it: a model whose rotary frequencies depend on the longest position computes another thing there.
    """
    total = sum(map(len, examples))
    copies = [largest(logits(model, alone_batch(e, -(-total // len(e))))[0], a) for e, a in zip(examples, alone)]
    first = max(examples, key=len)
    changed = logits(model, alone_batch([*first[:-1], first[0]]))[0]
    if len(first) > 1 and largest(changed[0], alone[examples.index(first)][0]) == 0:  # causal: same shapes, same bits
        text = list(chain(*examples))
        longer = [logits(model, alone_batch((e + text)[:total]))[0] for e in examples]
    else:
        batch = PaddingCollator()([{"input_ids": e} for e in examples])
        longer = list(logits(model, {k: batch[k] for k in ("input_ids", "attention_mask")}))
    moved = max(largest(out[: len(a)], a) for out, a in zip(longer, alone))
    return max(*copies, min(moved, _UNITS * max(*copies, _rounding(model) * scale)))


def _eager_error(model: PreTrainedModel, examples: list[list[int]], alone: list[Tensor]) -> float | None:
    """How far the attention in hand is from the model's own eager one, one example at a time; None without another."""
    attention = getattr(model.config, "_attn_implementation", None)
    if attention in (None, "eager") or not getattr(model, "_can_set_attn_implementation", bool)():
        return None
    try:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            return max(largest(logits(model, alone_batch(e))[0], a) for e, a in zip(examples, alone))
    except (ValueError, NotImplementedError, RuntimeError):
        return None  # it has no eager attention that runs
    finally:
        model.set_attn_implementation(attention)


def _never_calls(model: PreTrainedModel, batch: Mapping[str, Any]) -> bool:
    """Whether the model has attention, and a registered one of ours, that a forward (uncompiled) does not call."""
    name = getattr(model.config, "_attn_implementation", None)
    if not is_registered(name) or not any("Attention" in type(module).__name__ for module in model.modules()):
        return False
    original, calls = AttentionInterface._global_mapping[name], []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0])
        return original(*args, **kwargs)

    AttentionInterface.register(name, counted)
    try:
        with torch.compiler.set_stance("force_eager"):
            logits(model, batch)
    finally:
        AttentionInterface.register(name, original)
    return not calls


@contextmanager
def _compiled_for_every_shape(model: PreTrainedModel) -> Iterator[None]:
    """A compiled model stays compiled for all shapes that are tried (by default it gives up after eight).

    And its backward may run more than once.
    """
    compiled = (getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    if not hasattr(model, "_orig_mod") and not any(compiled):
        yield
        return
    from torch._dynamo import config as dynamo  # importing it takes a second
    from torch._functorch import config as functorch

    limits = {"recompile_limit": 256, "accumulated_recompile_limit": 1024}
    with dynamo.patch(**limits), functorch.patch(donated_buffer=False):
        yield


@dataclass(frozen=True)
class EquivalenceReport:
    """Packed against one example at a time, with one weighting of the loss.

    gradient_error: largest ‖packed - alone‖ / ‖alone‖ over the parameters, and `parameter` is where. A norm below 1e-3
        of the largest one counts as that much: the gradient of a key bias is zero but for rounding.
    """

    weighting: str
    loss_packed: float
    loss_alone: float
    gradient_error: float
    parameter: str


def check_equivalence(
    model: PreTrainedModel,
    examples: Sequence[Mapping[str, Sequence[int]]],
    *,
    kernel: str | None = None,
    weightings: Sequence[str] = WEIGHTINGS,
    collator: FlatteningCollator | None = None,
) -> list[EquivalenceReport]:
    """Loss and every parameter's gradient: one packed row against one example at a time, accumulated, same weights.

    Args:
        model: as for `check_isolation`; its gradients are left empty.
        examples: features with `input_ids` and optionally `labels`.
        kernel: as for `check_isolation`.
        collator: what packs; default: `FlatteningCollator()`.

    Returns a report for each weighting. In float32 the errors are about 1e-6 on every kernel with a backward.
    """
    reports, collator = [], collator or FlatteningCollator()
    for weighting in weightings:
        with _loaded(model, kernel):
            loss_packed, packed = _loss_and_gradients(model, [collator(examples)], weighting)
            loss_alone, alone = _loss_and_gradients(model, [collator([e]) for e in examples], weighting)
        floor = 1e-3 * max(float(g.norm()) for g in alone.values())
        errors = {n: float((packed[n] - g).norm()) / max(float(g.norm()), floor) for n, g in alone.items()}
        parameter = max(errors, key=errors.__getitem__)
        reports.append(EquivalenceReport(weighting, loss_packed, loss_alone, errors[parameter], parameter))
    return reports


def _loss_and_gradients(
    model: PreTrainedModel, rows: list[dict[str, Any]], weighting: str
) -> tuple[float, dict[str, Tensor]]:
    """Loss of these micro-batches as one step, and its gradients in float64 by parameter."""
    weighted = [(row, *token_weights(row["labels"], row["cu_seq_lens_q"], weighting)) for row in rows]
    denominator = sum(float(total) for _, _, total in weighted)
    model.zero_grad()
    loss = 0.0
    for row, weights, _ in weighted:
        out = logits(model, {name: value for name, value in row.items() if name != "labels"} | {"use_cache": False})
        part = weighted_loss(out, row["labels"].to(out.device), weights.to(out.device), denominator)
        part.backward()
        loss += part.item()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss, gradients
