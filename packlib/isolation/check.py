"""Proof that packed examples do not see each other: for any model, any kernel, as it is loaded, on its device and in its dtype.

Three observations of one packed batch, from sharp to blunt. Gradients: an example's logits have gradient exactly zero with
respect to another example's embeddings, in any dtype, if nothing connects them. Influence: editing one example leaves the
others' logits as they were, bit for bit unless rounding depends on the content (mixtures of experts). Error: the packed logits
equal those of one example at a time, up to rounding. The yardstick for rounding is measured on the model itself: how much its
logits move when the same example comes in batches of other sizes. About twenty passes of some fifty tokens each.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from packlib.attention import register_attention
from packlib.collators import FlatteningCollator, PaddingCollator
from packlib.losses import WEIGHTINGS, token_weights, weighted_loss
from packlib.isolation.probe import (
    Place,
    alone_batch,
    find_places,
    first_difference,
    input_gradients,
    largest,
    logits,
    packed_batch,
    probe_tokens,
)

BatchBuilder = Callable[[list[list[int]]], Mapping[str, Any]]
LENGTHS = (11, 5, 17, 14)  # 47 tokens: a prime, so that no other dimension of a small model is taken for the row
_ROUNDING = 8.0  # how many times the measured noise still counts as rounding


class ContaminationError(RuntimeError):
    """Packed examples see each other."""


@dataclass(frozen=True)
class IsolationReport:
    """What `check_isolation` saw.

    verdict: `exact` (editing an example leaves the others bit for bit as they were, and they are what they are alone), `rounding`
        (the same up to the model's own noise), `shifted` (no example sees another, but their logits are not those of one at a
        time: positions), `leak`, or `refused` (the model or the kernel does not take this batch; `reason` says why).
    error: largest |packed - alone| over the logits. noise: the same between batch sizes, unpacked. scale: largest |logit| alone.
    influence[i][j]: largest change of example i's logits when j is edited. gradient[i][j]: gradient of i's logits with respect to
        j's embeddings, relative to i's own; None where the kernel has no backward.
    starts_at: name of the first module that differs. culprit: attention, convolution, state, positions or other.
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
    starts_at: str | None = None
    culprit: str | None = None
    reason: str | None = None

    @property
    def isolated(self) -> bool:
        """No example sees another, and the batch ran."""
        return self.verdict in ("exact", "rounding", "shifted")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        text = f"{self.model} with {self.attention} in {self.dtype} on {self.device}: {self.verdict.upper()}. "
        if self.verdict == "refused":
            return text + str(self.reason)
        worst, i, j = max((x, i, j) for i, row in enumerate(self.influence) for j, x in enumerate(row) if i != j)
        text += (
            f"Editing example {j} moves example {i} by {worst:.2g}; packed against one at a time {self.error:.2g} "
            f"(noise {self.noise:.2g}, logits up to {self.scale:.2g})"
        )
        return text + (f"; starts at {self.starts_at} ({self.culprit})" if self.starts_at else "")


@contextmanager
def _loaded(model: nn.Module, kernel: str | None) -> Iterator[None]:
    """Evaluation mode, on `kernel` if one is named; as before afterwards."""
    training, attention = model.training, getattr(model.config, "_attn_implementation", None)
    try:
        if kernel is not None:
            model.set_attn_implementation(register_attention(kernel, f"packlib_{kernel}"))
        yield model.eval()
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
        model: any causal language model or encoder of transformers, as it is loaded; used in eval mode and left as it was.
        kernel: one of `packlib.attention.KERNELS` to run it on through `packlib_varlen`; None: the attention it has.
        batch_builder: examples (lists of token ids) -> arguments of `model.forward`; each example must lie in one piece, once,
            in its `input_ids` [B, T]. Default `packed_batch`: one flat row, boundaries known, cache off.
        lengths: tokens in each example, at least two examples.
        strict: raise ContaminationError on a leak.

    Raises ValueError for fewer than two examples and for a batch in which an example cannot be found.
    """
    lengths = list(LENGTHS if lengths is None else lengths)
    if len(lengths) < 2 or min(lengths) < 1:
        raise ValueError(f"lengths = {lengths}; expected at least two examples of at least one token")
    builder = batch_builder or packed_batch
    examples, edited = probe_tokens(model, lengths, seed)
    batches = [builder([edited[k] if k == j else e for k, e in enumerate(examples)]) for j in range(-1, len(examples))]
    places = find_places(batches[0]["input_ids"], examples)
    with _loaded(model, kernel):
        found = _look(model, examples, batches, places)
        parameter = next(model.parameters())
        report = IsolationReport(
            model=model.config.model_type,
            attention=getattr(model.config, "_attn_implementation", None) or "none",
            dtype=str(parameter.dtype).removeprefix("torch."),
            device=parameter.device.type,
            lengths=lengths,
            **found,
        )
    if strict and report.verdict == "leak":
        raise ContaminationError(str(report))
    return report


def _look(
    model: nn.Module, examples: list[list[int]], batches: list[Mapping[str, Any]], places: list[Place]
) -> dict[str, Any]:
    """The observations of a report, and the verdict."""
    with torch.no_grad():
        noise = scale = float("nan")
        try:
            alone = [logits(model, alone_batch(e))[0] for e in examples]
            noise, scale = _noise(model, examples, alone), max(map(largest, alone))
            packed, again, *moved = [logits(model, b) for b in (batches[0], *batches)]
            if not all(out[p].isfinite().all() for out in (packed, *moved) for p in places):
                raise ValueError("the packed logits are not finite")
        except (ValueError, NotImplementedError) as refusal:
            found = {
                "verdict": "refused",
                "error": float("nan"),
                "influence": [],
                "gradient": None,
                "reason": str(refusal),
            }
            return found | {"noise": noise, "scale": scale}
    noise = max(noise, *(largest(again[p], packed[p]) for p in places))
    influence = [[largest(m[p], packed[p]) for m in moved] for p in places]
    errors = [largest(packed[p], a) for p, a in zip(places, alone)]
    gradient = input_gradients(model, batches[0], places)
    # where the noise happens to be zero, a few units in the last place of the largest logit still count as rounding
    eps = torch.finfo(next(model.parameters()).dtype).eps
    tolerance = _ROUNDING * max(noise, eps * scale)
    seen, i, j = max((x, i, j) for i, row in enumerate(influence) for j, x in enumerate(row) if i != j)
    slope, k, m = max((x, i, j) for i, row in enumerate(gradient or influence) for j, x in enumerate(row) if i != j)
    start: tuple[str | None, str | None] = None, None
    if seen > tolerance or (gradient and slope > eps):
        verdict, (i, j) = "leak", (i, j) if seen > tolerance else (k, m)
        start = first_difference(model, batches[0], batches[1 + j], places[i], places[i], noise)
    elif max(errors) > tolerance:
        verdict, i = "shifted", errors.index(max(errors))
        at = 0, slice(0, len(examples[i]))
        start = first_difference(model, batches[0], alone_batch(examples[i]), places[i], at, tolerance)
    else:
        verdict = "exact" if seen == 0 else "rounding"
    return {
        "verdict": verdict, "error": max(errors), "noise": noise, "scale": scale, "influence": influence, "gradient": gradient,
        "starts_at": start[0], "culprit": start[1],
    }  # fmt: skip


def _noise(model: nn.Module, examples: list[list[int]], alone: list[Tensor]) -> float:
    """How much the logits of unpacked examples move with the size of the batch.

    Several copies of each; and each with more text behind it, which a causal model does not see, or, if it sees what comes later,
    padded beside the others.
    """
    total = sum(map(len, examples))
    noise = [largest(logits(model, alone_batch(e, -(-total // len(e))))[0], a) for e, a in zip(examples, alone)]
    first = max(examples, key=len)
    changed = logits(model, alone_batch([*first[:-1], first[0]]))[0]
    if len(first) > 1 and largest(changed[0], alone[examples.index(first)][0]) == 0:  # causal: same shapes, same bits
        text = list(chain(*examples))
        longer = [logits(model, alone_batch((e + text)[:total]))[0] for e in examples]
    else:
        batch = PaddingCollator()([{"input_ids": e} for e in examples])
        longer = logits(model, {k: batch[k] for k in ("input_ids", "attention_mask")})
    return max(noise + [largest(out[: len(a)], a) for out, a in zip(longer, alone)])


@dataclass(frozen=True)
class EquivalenceReport:
    """Packed against one example at a time, with one weighting of the loss.

    gradient_error: largest ‖packed - alone‖ / ‖alone‖ over the parameters, and `parameter` is where. A norm below 1e-3 of the
        largest one counts as that much: the gradient of a key bias is zero but for rounding.
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
) -> list[EquivalenceReport]:
    """Loss and every parameter's gradient: one packed row against one example at a time, accumulated, with the same weights.

    Args:
        model: as for `check_isolation`; its gradients are left empty.
        examples: features with `input_ids` and optionally `labels`.
        kernel: as for `check_isolation`.

    Returns a report for each weighting. In float32 the errors are about 1e-6 on every kernel with a backward.
    """
    collate = FlatteningCollator()
    reports = []
    for weighting in weightings:
        results = []
        for rows in ([collate(examples)], [collate([e]) for e in examples]):
            weighted = [(row, *token_weights(row["labels"], row["cu_seq_lens_q"], weighting)) for row in rows]
            denominator = sum(total for _, _, total in weighted)
            model.zero_grad()
            loss = 0.0
            with _loaded(model, kernel):
                for row, weights, _ in weighted:
                    out = logits(model, {k: v for k, v in row.items() if k != "labels"} | {"use_cache": False})
                    part = weighted_loss(out, row["labels"].to(out.device), weights.to(out.device), float(denominator))
                    part.backward()
                    loss += part.item()
            gradients = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
            results.append((loss, gradients))
        model.zero_grad()
        (loss_packed, packed), (loss_alone, alone) = results
        floor = 1e-3 * max(float(g.norm()) for g in alone.values())
        errors = {n: float((packed[n] - g).norm()) / max(float(g.norm()), floor) for n, g in alone.items()}
        parameter = max(errors, key=errors.__getitem__)
        reports.append(EquivalenceReport(weighting, loss_packed, loss_alone, errors[parameter], parameter))
    return reports
