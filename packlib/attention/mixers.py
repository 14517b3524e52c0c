"""Models that carry something from token to token by other means than attention pack exactly: `isolate_mixers`.

Attention stops at a segment's end because it is told to. Convolutions, state spaces, linear attention and token shifts
are told only where a compiled kernel takes `seq_idx` or `cu_seqlens`; without it transformers refuses such a model or,
as often, lets every example see the one before it. Here each such module runs on one line a segment
(`packlib.attention.lines`): forward and gradients are those of one example at a time.

No list of names says what a mixer is. The model runs once on a short packed row; then every module runs again by
itself, with one segment edited. Where the others' outputs move, or where the module refuses boundaries, the smallest
such module is put on lines and held against itself on each segment alone. What takes boundaries by itself, kernel and
all, passes the same test and stays as it is: varlen attention, and mixers with their kernels. Attention that no
boundaries reach (a mask of the model's own, ALiBi) and positions that count through the row are found and repaired
alike. At the end the whole model has to give each example the logits that it has alone, or the call fails.

What it costs: at most `max_waste` slots for a token inside the mixers (`mixer_waste(lengths)`), a few calls for one, and
one device synchronisation a batch, for the lengths; none where `cu_seq_lens_q` stays on the CPU. What to know:
- Call it on whole weights, on the device and in the dtype of training: after adapters and kernels are chosen, before
  layers are compiled or sharded. What takes boundaries there is not looked at again.
- Boundaries come from `cu_seq_lens_q`. Position ids that restart without it, boundaries beside an attention_mask, of two
  rows or beside a cache are errors; a cache that was left at its default is switched off. Padded batches, on either
  side, and generation are what they were.
- What a checkpoint computes again sees the boundaries of its own batch, however many are under way: transformers'
  checkpointing of either kind, and torch's `checkpoint_wrapper`. Under any other, backward is an error.
- A compiled layer breaks its graph at a mixer, which runs uncompiled; CUDA graphs cannot hold lines, whose shapes change
  with the lengths.
- Last states that a mixer returns are None for a packed row.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from packlib.attention.lines import (
    BOUNDARIES,
    MAX_WASTE,
    ONE_BY_ONE,
    Segments,
    current_segments,
    inside,
    is_per_token,
    mixer_waste,
    per_token,
    run_on_lines,
)
from packlib.collators import FlatteningCollator

Forward = Callable[..., Any]
Answer = Callable[[nn.Module, Forward, tuple[Any, ...], dict[str, Any]], Any]

_CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")  # transformers' attribute, and checkpoint_wrapper's
_PROBE = (9, 5, 11, 12)  # 37 tokens: a prime, so that no dimension of a model is taken for the row; lines have pads
_EDITED = slice(9, 14)  # the second segment; the others watch


@dataclass(eq=False)
class IsolatedMixers:
    """What `isolate_mixers` did.

    wrapped: modules that run on one line a segment, name -> class. native: modules that mix and take `seq_idx`, name ->
        class. position_ids_start: what `FlatteningCollator` has to be told for this model.
    """

    model: nn.Module = field(repr=False)
    max_waste: float
    wrapped: dict[str, str] = field(default_factory=dict)
    native: dict[str, str] = field(default_factory=dict)
    position_ids_start: int = 0

    def waste(self, lengths: Sequence[int]) -> float:
        """Most slots inside a wrapped module over the real tokens of a row with these segments."""
        return mixer_waste(lengths, self.max_waste) if self.wrapped else 1.0

    def undo(self) -> None:
        """Give every module its own forward back."""
        for module in self.model.modules():
            _restore(module)
        self.wrapped.clear()


def isolate_mixers(model: nn.Module, *, max_waste: float = MAX_WASTE) -> IsolatedMixers:
    """Let every module of `model` that mixes tokens see segments, in place; `check_isolation` proves it.

    Afterwards a flat batch [1, T] with `cu_seq_lens_q` (what `FlatteningCollator` returns) is computed as its examples
    would be one at a time. Everything else is computed as before, and a model without mixers is not touched.

    Args:
        model: a causal language model of transformers (any class whose forward takes `input_ids`, `position_ids` and
            boundaries), with or without adapters, on its device. It runs about ten times on 37 tokens.
        max_waste: most slots for a token inside a mixer; a smaller one means more calls.

    Raises `ValueError` if the model does not take a packed row, if something in it cannot be isolated, and if it has
    been isolated already; the model is then as it was.

    >>> from packlib.lab.small_models import small_model
    >>> isolated = isolate_mixers(small_model("mamba"))
    >>> isolated.wrapped
    {'backbone.layers.0.mixer': 'MambaMixer', 'backbone.layers.1.mixer': 'MambaMixer'}
    >>> round(isolated.waste([300, 290, 10]), 2)
    1.02
    """
    if any("_packlib_forward" in vars(module) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has isolated mixers; call undo() on what isolate_mixers returned")
    mixer_waste([1], max_waste)  # raises if it is below 1
    isolated = IsolatedMixers(model, max_waste)
    probe = _Probe(model)
    try:
        with probe.steady():
            _isolate(isolated, probe)
    except BaseException:
        isolated.undo()
        raise
    if isolated.wrapped or isolated.native:
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                _answer_for(module, _enter)
    return isolated


def _isolate(isolated: IsolatedMixers, probe: _Probe) -> None:
    # 1. Modules through which one segment moves another, innermost first; some kernels mix in training only.
    for training in (False, True):
        for call in probe.record(training):
            if probe.carries(call):
                _put_on_lines(isolated, probe, call)
            elif "seq_idx" in call.kwargs and not any(name.startswith(call.name) for name in isolated.native):
                if probe.carries(call.without_boundaries()):
                    isolated.native[call.name] = type(call.module).__name__
    # 2. Positions that do not start at 0; positions that count through the row.
    wrong = probe.wrong(0)
    if wrong and not probe.wrong(probe.other_start):
        isolated.position_ids_start, wrong = probe.other_start, ""
    if wrong:
        for call in probe.record(False):
            if probe.differs(call):
                _put_on_lines(isolated, probe, call)
        wrong = probe.wrong(0)
    if wrong:
        raise ValueError(wrong)


def _put_on_lines(isolated: IsolatedMixers, probe: _Probe, call: _Call) -> None:
    """Wrap the module if it is right then, with pads behind shorter lines or else without, and nothing inside it."""
    for max_waste in (isolated.max_waste, 1.0):
        if probe.right_on_lines(call, max_waste):
            for name in [name for name in isolated.wrapped if name.startswith(call.name + ".")]:
                _restore(isolated.model.get_submodule(name))
                del isolated.wrapped[name]
            isolated.wrapped[call.name] = type(call.module).__name__
            _answer_for(call.module, _mix(max_waste))
            return


# ---- what answers instead of a module's own forward


def _answer_for(module: nn.Module, answer: Answer) -> None:
    """Let `answer(module, its own forward, args, kwargs)` answer for `module.forward`.

    As a bound method on the instance, its own forward looked up when it is called: a deep copy of the model has the
    copy's, and classes that sharding puts in between are kept.
    """

    @torch.compiler.disable
    @functools.wraps(type(module).forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return answer(self, _own_forward(self), args, kwargs)

    module._packlib_forward = vars(module).get("forward")
    module.forward = types.MethodType(forward, module)


def _own_forward(module: nn.Module) -> Forward:
    if "_packlib_forward" not in vars(module):
        return module.forward
    return vars(module)["_packlib_forward"] or functools.partial(type(module).forward, module)


def _restore(module: nn.Module) -> None:
    if "_packlib_forward" not in vars(module):
        return
    own = vars(module).pop("_packlib_forward")
    if own is None:
        del module.forward
    else:
        module.forward = own


def _mix(max_waste: float) -> Answer:
    def mix(module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        segments = current_segments()
        if segments is not None and segments is not ONE_BY_ONE:
            module._packlib_packs = True
            return run_on_lines(forward, segments, max_waste, args, kwargs)
        if segments is None and hasattr(module, "_packlib_packs") and torch._C._current_graph_task_id() != -1:
            raise ValueError(
                f"{type(module).__name__} is computed again in backward, by a checkpoint that isolate_mixers does not "
                "know, so its segments are not known; use the model's gradient_checkpointing_enable()"
            )
        return forward(*args, **kwargs)

    return mix


def _enter(model: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward of a model: its mixers see the segments of its batch."""
    cu_seqlens, outer = kwargs.get("cu_seq_lens_q"), current_segments()
    if cu_seqlens is None:
        if outer is not None:  # a model inside a model
            return forward(*args, **kwargs)
        _refuse_restart(kwargs)
        with inside(ONE_BY_ONE):
            return forward(*args, **kwargs)
    given = [*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    tokens = next(value for value in given if isinstance(value, Tensor))
    segments = outer if outer is not None and outer.cu_seqlens is cu_seqlens else Segments(cu_seqlens)
    if tokens.shape[:2] != (1, segments.tokens):
        raise ValueError(
            f"cu_seq_lens_q has segments of {segments.tokens} tokens for rows of shape {tuple(tokens.shape[:2])}; "
            f"expected one flat row [1, {segments.tokens}]"
        )
    if kwargs.get("attention_mask") is not None:
        raise ValueError("the batch has cu_seq_lens_q and an attention_mask; expected no mask beside boundaries")
    if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
        raise ValueError("the batch has cu_seq_lens_q and a cache; expected use_cache = False for packed rows")
    kwargs = kwargs | {"use_cache": False}
    if kwargs.get("seq_idx") is None:
        kwargs["seq_idx"] = segments.seq_idx(tokens.device)
    _carry_into_checkpoints(model)
    with inside(segments):
        return forward(*args, **kwargs)


def _refuse_restart(kwargs: Mapping[str, Any]) -> None:
    """Raise if position ids say that a row is packed, where nothing else does."""
    position_ids, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if position_ids is None or position_ids.ndim != 2 or kwargs.get("past_key_values") is not None:
        return
    restart = position_ids.diff() != 1
    if mask is not None and mask.shape == position_ids.shape:  # positions of pads mean nothing
        restart = restart & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    if restart.any():
        raise ValueError(
            "position_ids restart inside a row, but no boundaries reached the mixers; pass cu_seq_lens_q "
            "(FlatteningCollator gives it), or one sequence a row"
        )


def _carry_into_checkpoints(model: nn.Module) -> None:
    """Let what is checkpointed see, when it is computed again, the segments that it saw at first."""
    for module in model.modules() if model.training else ():
        for name in _CHECKPOINTS:
            checkpoint = getattr(module, name, None)
            if checkpoint is not None and not isinstance(checkpoint, _CarryingCheckpoint):
                setattr(module, name, _CarryingCheckpoint(checkpoint))


@dataclass(frozen=True)
class _CarryingCheckpoint:
    checkpoint: Callable[..., Any]

    def __call__(self, function: Forward, *args: Any, **kwargs: Any) -> Any:
        segments = current_segments()

        @functools.wraps(function, assigned=())
        def carrying(*args: Any, **kwargs: Any) -> Any:
            with inside(segments):
                return function(*args, **kwargs)

        return self.checkpoint(carrying, *args, **kwargs)


# ---- what modules do


class _Call(NamedTuple):
    """One call of a module while the model ran on the probe; refused: not with boundaries."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    refused: bool = False

    def without_boundaries(self) -> _Call:
        return self._replace(kwargs=_without_boundaries(self.kwargs), refused=False)


def _without_boundaries(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in BOUNDARIES}


def _copy(tree: Any) -> Any:
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, tree)


class _Probe:
    """A short packed row, a model, and what its modules make of it."""

    def __init__(self, model: nn.Module) -> None:
        embeddings = model.get_input_embeddings()
        parameter = next(model.parameters())
        self.model, self.device = model, parameter.device
        self.eps = max(torch.finfo(parameter.dtype).eps, torch.finfo(torch.float32).eps)  # mixers compute in float32
        self.other_start = (getattr(model.config, "pad_token_id", None) or 0) + 1  # of RoBERTa and its like
        vocabulary = min(embeddings.weight.shape[0], 50_000)
        generator = torch.Generator().manual_seed(0)
        row = torch.randint(vocabulary // 8, vocabulary // 2, (sum(_PROBE),), generator=generator)  # no special tokens
        self.examples = [piece.tolist() for piece in row.split(_PROBE)]
        self.segments = Segments(self.batch(0)["cu_seq_lens_q"].cpu())
        self.watching = torch.ones(self.segments.tokens, dtype=torch.bool)
        self.watching[_EDITED] = False

    def batch(self, start: int) -> dict[str, Any]:
        batch = FlatteningCollator(position_ids_start=start)([{"input_ids": e} for e in self.examples])
        del batch["labels"]
        on_device = {
            name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in batch.items()
        }
        return on_device | {"use_cache": False}

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Every module is in the mode that it was in afterwards."""
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    def record(self, training: bool) -> list[_Call]:
        """First call of every module with a tensor [1, T, …], in the order in which they finish: innermost first.

        A module that raises is called again without boundaries.
        """
        self.model.train(training)
        calls: dict[nn.Module, _Call] = {}

        def watched(name: str, module: nn.Module, forward: Forward) -> Forward:
            def watching(*args: Any, **kwargs: Any) -> Any:
                given, refused = _copy((args, kwargs)), False
                try:
                    output = forward(*args, **kwargs)
                except Exception:
                    if kwargs.keys().isdisjoint(BOUNDARIES):
                        raise
                    output, refused = forward(*args, **_without_boundaries(kwargs)), True
                if per_token(given, self.segments.tokens):
                    calls.setdefault(module, _Call(name, module, *given, refused))
                return output

            return watching

        skipped = nn.Linear | nn.Embedding | nn.ModuleList | nn.ModuleDict | PreTrainedModel
        modules = {n: m for n, m in self.model.named_modules() if n and not isinstance(m, skipped)}
        before = {module: vars(module).get("forward") for module in modules.values()}
        try:
            for name, module in modules.items():
                module.forward = watched(name, module, module.forward)
            with torch.no_grad(), inside(self.segments):
                self.model(**self.batch(0))
        except Exception as error:
            raise ValueError(f"{type(self.model).__name__} does not take a packed row: {error}") from error
        finally:
            for module, forward in before.items():
                if forward is None:
                    vars(module).pop("forward", None)
                else:
                    module.forward = forward
        return list(calls.values())

    def carries(self, call: _Call) -> bool:
        """Whether editing a segment moves another one's outputs.

        By more than rounding, or by less, but along a gradient: in mixtures of experts rounding depends on the others.
        """
        if call.refused and "_packlib_forward" not in vars(call.module):
            return True
        ids = not any(value.is_floating_point() for value in per_token((call.args, call.kwargs), self.segments.tokens))
        try:
            with torch.no_grad():
                before = self._watched(call, lambda value: value.clone())
                after = self._watched(call, lambda value: self._edited(value, ids))
        except Exception:
            return False  # not without boundaries
        moved = max((_distance(x, y) for x, y in zip(before, after)), default=0.0)
        return moved > (0 if ids else self.eps**0.5) or (moved > 0 and self._pulls(call))

    def _watched(self, call: _Call, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Outputs of the segments that watch, after `change` of all tensors with a value for each token."""
        tokens = self.segments.tokens

        def changed(value: Any) -> Any:
            if is_per_token(value, tokens):
                return change(value)
            return value.clone() if isinstance(value, Tensor) else value

        args, kwargs = tree_map(changed, (call.args, call.kwargs))
        devices = [self.device] if self.device.type == "cuda" else []
        with inside(self.segments), torch.random.fork_rng(devices):
            torch.manual_seed(0)  # the same dropout
            output = call.module(*args, **kwargs)
        return [value[0, self.watching] for value in per_token(output, tokens)]

    def _edited(self, value: Tensor, ids: bool) -> Tensor:
        value = value.clone()
        if value.is_floating_point():
            value[:, _EDITED] = value[:, _EDITED].flip(-1) * -1.5 + 0.1
        elif ids:
            value[:, _EDITED] = value[:, _EDITED.stop :][:, : _PROBE[1]]
        return value

    def _pulls(self, call: _Call) -> bool:
        """Whether the watching segments' outputs have a gradient with respect to the edited one."""
        leaves: list[Tensor] = []

        def leaf(value: Tensor) -> Tensor:
            value = value.clone()
            if value.is_floating_point():
                leaves.append(value.requires_grad_())
            return value

        with torch.enable_grad():
            outputs = [value.double().sum() for value in self._watched(call, leaf) if value.requires_grad]
            if not outputs:
                return False
            gradients = torch.autograd.grad(sum(outputs), leaves, allow_unused=True)
        found = [g for g in gradients if g is not None]
        return any(float(g[:, _EDITED].abs().max()) > self.eps * float(g.abs().max()) for g in found)

    def right_on_lines(self, call: _Call, max_waste: float) -> bool:
        """Whether the module on lines is what it is on each segment alone, and no segment moves another."""
        try:
            padded = self._on_lines(call, max_waste)
            alone = self._on_lines(call, None)
        except Exception:
            return False
        return bool(padded) and all(_distance(x, y) < self.eps**0.5 for x, y in zip(alone, padded))

    def differs(self, call: _Call) -> bool:
        """Whether the module on the row is not what it is on each segment alone."""
        if isinstance(call.module, nn.Module) and "_packlib_forward" in vars(call.module):
            return False
        try:
            alone = self._on_lines(call, None)
            with torch.no_grad(), inside(self.segments):
                args, kwargs = _copy((call.args, call.kwargs))
                row = per_token(call.module(*args, **kwargs), self.segments.tokens)
        except Exception:
            return False
        return any(_distance(x, y) > self.eps**0.5 for x, y in zip(alone, row))

    def _on_lines(self, call: _Call, max_waste: float | None) -> list[Tensor]:
        args, kwargs = _copy((call.args, call.kwargs))
        call.module.eval()
        with torch.no_grad():
            output = run_on_lines(_own_forward(call.module), self.segments, max_waste, args, kwargs)
        return per_token(output, self.segments.tokens)

    def wrong(self, start: int) -> str:
        """What is wrong with the logits of the packed row, positions from `start`; nothing if they are as alone."""
        self.model.eval()
        leaves: list[Tensor] = []

        def to_leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            leaves.append(output.detach().requires_grad_())
            return leaves[-1]

        with torch.no_grad(), inside(ONE_BY_ONE):
            ids = [torch.tensor([example], device=self.device) for example in self.examples]
            alone = torch.cat([_logits(self.model(input_ids=i, use_cache=False))[0] for i in ids])
        hook = self.model.get_input_embeddings().register_forward_hook(to_leaf)
        try:
            with torch.enable_grad(), inside(self.segments):
                packed = _logits(self.model(**self.batch(start)))[0]
        finally:
            hook.remove()
        (gradient,) = torch.autograd.grad(packed[self.watching].double().sum(), leaves[:1])
        name, distance = type(self.model).__name__, _distance(alone, packed)
        if float(gradient[:, _EDITED].abs().max()) > self.eps * float(gradient.abs().max()):
            return f"{name} lets packed examples see each other, and no module of it can be isolated"
        if distance > 4 * self.eps**0.5:
            return (
                f"{name} does not give packed examples the logits that they have alone (off by {distance:.2g} of them)"
            )
        return ""


def _logits(output: Any) -> Tensor:
    return output.logits if getattr(output, "logits", None) is not None else output[0]


def _distance(x: Tensor, y: Tensor) -> float:
    """Largest difference over the largest value of `x`."""
    if x.shape != y.shape:
        return float("inf")
    x, y = x.double(), y.double()
    return float((x - y).abs().max() / x.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
