"""Models that carry something from token to token by other means than attention pack exactly: `isolate_mixers`.

Attention stops at a segment's end because it is told to. Convolutions, state spaces, linear attention and token shifts
are told only where a compiled kernel takes `seq_idx` or `cu_seqlens`; without it transformers refuses such a model or,
as often, lets every example see the one before it. Here each such module runs on one line a segment
(`packlib.attention.lines`): forward and gradients are those of one example at a time.

No list of names says what a mixer is. The model runs on a short packed row; then every module runs again by itself. One
through which a segment has a gradient at another, or that does not run with boundaries, is put on lines if that mends
it; else what contains it is. What takes boundaries by itself, kernel and all, passes the same test and stays as it is:
varlen attention, and mixers with their kernels. Attention that boundaries do not reach (ALiBi) is found alike. At the
end the whole model has to give each example the logits that it has alone, or the call fails.

What it costs: at most `max_waste` slots for a token inside the mixers (`mixer_waste(lengths)`), a few calls for one,
and one device synchronisation a batch, for the lengths; none where `cu_seq_lens_q` stays on the CPU. What to know:
- Call it on whole weights, on the device and in the dtype of training: after adapters and kernels are chosen, before
  layers are compiled or sharded. What takes boundaries by itself then is not looked at again, and needs its `seq_idx`.
- Boundaries come from `cu_seq_lens_q`. Position ids that restart without it, boundaries beside an attention_mask, of
  two rows or beside a cache are errors; a cache that was left at its default is switched off. Padded batches, on either
  side, and generation are what they were.
- What a checkpoint computes again sees the boundaries of its own batch, however many are under way: transformers'
  checkpointing of either kind, and torch's `checkpoint_wrapper`. Under any other, backward is an error.
- A compiled layer breaks its graph at a mixer, which runs uncompiled; CUDA graphs cannot hold lines, whose shapes
  change with the lengths.
- Last states that a mixer returns are None for a packed row.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from packlib.attention.convolutions import hand_over_boundaries
from packlib.attention.lines import (
    BOUNDARIES,
    ISOLATED,
    MAX_WASTE,
    ONE_BY_ONE,
    Segments,
    current_segments,
    inside,
    mixer_waste,
    per_token,
    run_on_lines,
)
from packlib.collators import FlatteningCollator

Forward = Callable[..., Any]
Answer = Callable[[nn.Module, Forward, tuple[Any, ...], dict[str, Any]], Any]

_CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")  # transformers' attribute, and checkpoint_wrapper's
_PROBE = (13, 7, 21, 18)  # 59 tokens: a prime, so that no dimension of a model is taken for the row; lines have pads
_EDITED = slice(13, 20)  # the second segment; the others watch
_EPS = torch.finfo(torch.float32).eps


def isolate_mixers(model: nn.Module, *, max_waste: float = MAX_WASTE, native: bool = False) -> dict[str, str]:
    """Let every module of `model` that mixes tokens see segments, in place; `check_isolation` proves it.

    Afterwards a flat batch [1, T] with `cu_seq_lens_q` (what `FlatteningCollator` returns) is computed as its examples
    would be one at a time. Everything else is computed as before, and a model without mixers is not touched.

    Args:
        model: a causal language model of transformers (any class whose forward takes `input_ids`, `position_ids` and
            boundaries), with or without adapters, on its device. It and its modules run a few times on 59 tokens.
        max_waste: most slots for a token inside a mixer; a smaller one means more calls.
        native: first let convolutions take `seq_idx` (`packlib.attention.convolutions`). What is exact then needs no
            lines: short convolutions, and linear attention where flash-linear-attention is installed. A packed batch
            has to bring its `seq_idx`; the function is replaced in this process, for calls with boundaries only.

    Returns the modules that run on one line a segment now, name -> class.

    Raises `ValueError` if the model does not take a packed row, if something in it cannot be isolated, and if it has
    been isolated already; the model is then as it was.

    >>> from packlib.lab.small_models import small_model
    >>> isolate_mixers(small_model("mamba"))
    {'backbone.layers.0.mixer': 'MambaMixer', 'backbone.layers.1.mixer': 'MambaMixer'}
    """
    if any("_packlib_forward" in vars(module) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has isolated mixers already")
    mixer_waste([1], max_waste)  # raises if it is below 1
    wrapped: dict[str, str] = {}
    handed = hand_over_boundaries(model) if native else {}
    probe = _Probe(model)
    try:
        with probe.steady():
            calls = [*probe.record(training=False), *probe.record(training=True)]  # some kernels mix in training only
            wrapped |= _mend(calls, probe.isolated, max_waste)
            if probe.wrong():
                wrapped |= _mend(calls, probe.as_alone, max_waste)  # what counts through the row
            if wrong := probe.wrong():
                raise ValueError(wrong)
    except BaseException:
        for module in model.modules():
            _restore(module)
        raise
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module)[ISOLATED] = True
            if wrapped or handed:
                _answer_for(module, functools.partial(_enter, bool(handed.keys() - wrapped.keys())))
    return wrapped


def _mend(calls: list[_Call], right: Callable[[_Call], bool], max_waste: float) -> dict[str, str]:
    """Put the modules on lines that are right then and not before, innermost first; returns name -> class."""
    wrapped = {}
    for call in calls:
        if "_packlib_forward" not in vars(call.module) and not right(call):
            _answer_for(call.module, functools.partial(_mix, max_waste))
            if right(call):
                wrapped[call.name] = type(call.module).__name__
            else:
                _restore(call.module)
    return wrapped


# What answers instead of a module's own forward


def _answer_for(module: nn.Module, answer: Answer) -> None:
    """Let `answer(module, its own forward, args, kwargs)` answer for `module.forward`.

    As a bound method on the instance, its own forward looked up when it is called: a deep copy of the model has the
    copy's, and classes that sharding puts in between are kept.
    """

    @functools.wraps(type(module).forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return answer(self, _own_forward(self), args, kwargs)

    vars(module)["_packlib_forward"] = vars(module).get("forward")
    vars(module)["forward"] = types.MethodType(forward, module)


def _own_forward(module: nn.Module) -> Forward:
    return vars(module).get("_packlib_forward") or functools.partial(type(module).forward, module)


def _restore(module: nn.Module) -> None:
    if "_packlib_forward" in vars(module):
        own = vars(module).pop("_packlib_forward")
        vars(module).pop("forward")
        if own is not None:
            vars(module)["forward"] = own


@torch.compiler.disable
def _mix(max_waste: float, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    segments = current_segments()
    if segments is not None and segments is not ONE_BY_ONE:
        return run_on_lines(forward, segments, max_waste, args, kwargs)
    if segments is None and torch._C._current_graph_task_id() != -1:
        raise ValueError(
            f"{type(module).__name__} is computed again in backward, by a checkpoint that isolate_mixers does not "
            "know, so its segments are not known; use the model's gradient_checkpointing_enable()"
        )
    return forward(*args, **kwargs)


def _enter(
    needs_seq_idx: bool, model: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Forward of a model: its mixers see the segments of its batch."""
    if current_segments() is not None:  # a model inside a model
        return forward(*args, **kwargs)
    segments, cu_seqlens = ONE_BY_ONE, kwargs.get("cu_seq_lens_q")
    if cu_seqlens is None:
        _refuse_restart(kwargs)
    else:
        segments = Segments(cu_seqlens)
        _refuse_what_is_not_flat(segments.tokens, args, kwargs)
        if needs_seq_idx and kwargs.get("seq_idx") is None:
            raise ValueError("the batch has cu_seq_lens_q and no seq_idx; expected both, as FlatteningCollator gives")
        kwargs = kwargs | {"use_cache": False}
    for module in model.modules() if model.training else ():
        for name in _CHECKPOINTS:
            checkpoint = getattr(module, name, None)
            if checkpoint is not None and not isinstance(checkpoint, _CarryingCheckpoint):
                setattr(module, name, _CarryingCheckpoint(checkpoint))
    with inside(segments):
        return forward(*args, **kwargs)


def _refuse_what_is_not_flat(tokens: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    given = [*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    rows = next(tuple(value.shape[:2]) for value in given if isinstance(value, Tensor))
    if rows != (1, tokens):
        raise ValueError(
            f"cu_seq_lens_q has segments of {tokens} tokens for rows of shape {rows}; expected a flat row [1, {tokens}]"
        )
    if kwargs.get("attention_mask") is not None:
        raise ValueError("the batch has cu_seq_lens_q and an attention_mask; expected no mask beside boundaries")
    if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
        raise ValueError("the batch has cu_seq_lens_q and a cache; expected use_cache = False for packed rows")


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


@dataclass(frozen=True)
class _CarryingCheckpoint:
    """What is checkpointed sees, when it is computed again, the segments that it saw at first."""

    checkpoint: Callable[..., Any]

    def __call__(self, function: Forward, *args: Any, **kwargs: Any) -> Any:
        segments = current_segments()

        @functools.wraps(function, assigned=())
        def carrying(*args: Any, **kwargs: Any) -> Any:
            with inside(segments):
                return function(*args, **kwargs)

        return self.checkpoint(carrying, *args, **kwargs)


# What modules do


class _Call(NamedTuple):
    """One call of a module while the model ran on the probe."""

    name: str
    module: nn.Module
    training: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Probe:
    """A short packed row, a model, and what its modules make of it."""

    def __init__(self, model: Any) -> None:
        weight = model.get_input_embeddings().weight
        self.model, self.device, vocabulary = model, weight.device, min(len(weight), 50_000)
        self.eps = max(torch.finfo(weight.dtype).eps, _EPS)  # mixers compute in float32
        generator = torch.Generator().manual_seed(0)
        row = torch.randint(vocabulary // 8, vocabulary // 2, (sum(_PROBE),), generator=generator)  # no special tokens
        self.examples = [piece.tolist() for piece in row.split(_PROBE)]
        batch: dict[str, Any] = {**FlatteningCollator()([{"input_ids": example} for example in self.examples])}
        del batch["labels"]
        self.segments = Segments(batch["cu_seq_lens_q"])
        self.batch = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        self.watching = torch.ones(self.segments.tokens, dtype=torch.bool)
        self.watching[_EDITED] = False

    @contextmanager
    def steady(self) -> Iterator[None]:
        """No checkpoints meanwhile; modes and random numbers are as they were afterwards."""
        modules: list[Any] = list(self.model.modules())
        modes = [module.training for module in modules]
        checkpointed = [module for module in modules if vars(module).get("gradient_checkpointing")]
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            for module in checkpointed:
                module.gradient_checkpointing = False
            try:
                yield
            finally:
                for module in checkpointed:
                    module.gradient_checkpointing = True
                for module, training in zip(modules, modes):
                    module.training = training

    def record(self, training: bool) -> list[_Call]:
        """First call of every module with a tensor [1, T, …], in the order in which they finish: innermost first.

        A module that raises is called again without boundaries.
        """
        calls: dict[nn.Module, _Call] = {}

        def watch(name: str, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = _detached((args, kwargs))
            try:
                output = forward(*args, **kwargs)
            except Exception as error:
                try:
                    output = forward(*args, **{k: v for k, v in kwargs.items() if k not in BOUNDARIES})
                except Exception:
                    raise error from None
            if per_token(given, self.segments.tokens):
                calls.setdefault(module, _Call(name, module, training, *given))
            return output

        skipped = nn.Linear | nn.Embedding | nn.ModuleList | nn.ModuleDict | PreTrainedModel
        watched = {n: m for n, m in self.model.named_modules() if n and not isinstance(m, skipped)}
        self.model.train(training)
        try:
            for name, module in watched.items():
                _answer_for(module, functools.partial(watch, name))
            with torch.no_grad(), inside(self.segments):
                self.model(**self.batch)
        except Exception as error:
            raise ValueError(f"{type(self.model).__name__} does not take a packed row: {error}") from error
        finally:
            for module in watched.values():
                _restore(module)
        return list(calls.values())

    def isolated(self, call: _Call) -> bool:
        """Whether the module runs with boundaries, and no segment has a gradient at another."""
        call.module.train(call.training)
        leaves: list[Tensor] = []

        def leaf(value: Any) -> Any:
            if per_token(value, self.segments.tokens) and value.is_floating_point():
                leaves.append(value.clone().requires_grad_())
                return leaves[-1].clone()  # for modules that change it in place
            return value.clone() if isinstance(value, Tensor) else value

        try:
            with torch.enable_grad(), inside(self.segments):
                args, kwargs = tree_map(leaf, (call.args, call.kwargs))
                outputs = per_token(call.module.forward(*args, **kwargs), self.segments.tokens)
                return not self._pulls([output[0] for output in outputs], leaves)
        except Exception:
            return False

    def _pulls(self, outputs: list[Tensor], leaves: list[Tensor]) -> bool:
        """Whether a random projection of the watching tokens' outputs has a gradient at the edited ones."""
        watched = [output[self.watching].double() for output in outputs if output.requires_grad]
        if not watched or not leaves:
            return False
        generator = torch.Generator().manual_seed(0)
        onto = [torch.randn(out.shape, generator=generator, dtype=out.dtype).to(out.device) for out in watched]
        gradients = torch.autograd.grad(watched, leaves, onto, allow_unused=True)
        found = [gradient for gradient in gradients if gradient is not None]
        return any(float(g[:, _EDITED].abs().max()) > _EPS * float(g.abs().max()) for g in found)

    def as_alone(self, call: _Call) -> bool:
        """Whether the module makes of the row what it makes of each segment alone."""
        call.module.eval()
        try:
            with torch.no_grad(), inside(self.segments):
                args, kwargs = _detached((call.args, call.kwargs))
                row = per_token(call.module.forward(*args, **kwargs), self.segments.tokens)
                args, kwargs = _detached((call.args, call.kwargs))
                alone = run_on_lines(_own_forward(call.module), self.segments, 1.0, args, kwargs)
            return all(_distance(x, y) < self.eps**0.5 for x, y in zip(per_token(alone, self.segments.tokens), row))
        except Exception:
            return False

    def wrong(self) -> str:
        """What is wrong with the logits of the packed row; nothing if they are those of its examples alone."""
        self.model.eval()
        with torch.no_grad(), inside(ONE_BY_ONE):
            ids = [torch.tensor([example], device=self.device) for example in self.examples]
            alone = torch.cat([_logits(self.model(input_ids=i, use_cache=False))[0] for i in ids])
        try:
            packed, leaves = self._packed(gradient=True)
        except NotImplementedError:  # FlexAttention has no backward on a CPU
            packed, leaves = self._packed(gradient=False)
        name, distance = type(self.model).__name__, _distance(alone, packed)
        if self._pulls([packed], leaves):
            return f"{name} lets packed examples see each other, and no module of it can be isolated"
        if not distance < 4 * self.eps**0.5:
            return (
                f"{name} does not give packed examples the logits that they have alone (off by {distance:.2g} of "
                "them); check_isolation says where that starts (positions: FlatteningCollator has position_ids_start)"
            )
        return ""

    def _packed(self, gradient: bool) -> tuple[Tensor, list[Tensor]]:
        """Logits of the packed row, and its embeddings, by which they can be differentiated."""
        leaves: list[Tensor] = []

        def to_leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            leaves.append(output.detach().requires_grad_(gradient))
            return leaves[-1].clone()

        hook = self.model.get_input_embeddings().register_forward_hook(to_leaf)
        try:
            with torch.set_grad_enabled(gradient), inside(self.segments):
                packed = _logits(self.model(**self.batch))[0]
                return packed, per_token(leaves[:1], self.segments.tokens)  # XLNet embeds [T, 1, C]
        finally:
            hook.remove()


def _detached(tree: Any) -> Any:
    return tree_map(lambda value: value.detach().clone() if isinstance(value, Tensor) else value, tree)


def _logits(output: Any) -> Tensor:
    return output.logits if getattr(output, "logits", None) is not None else output[0]


def _distance(x: Tensor, y: Tensor) -> float:
    """Largest difference over the largest value of `x`."""
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).abs().max() / x.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
