"""How to look into a model that packs: examples, its logits where each lies, gradients between them, first difference.

The parts of `packlib.isolation` that know nothing about verdicts.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from packlib.collators import FlatteningCollator

Place = tuple[int, slice]

# Parts of class names that say what a module carries from one token to the next.
_CULPRITS = {
    "convolution": ("conv",),
    "state": (
        "mamba",
        "ssm",
        "mixer",
        "delta",
        "rwkv",
        "recurrent",
        "rglru",
        "lstm",
        "linearattention",
        "lightning",
        "retention",
        "shift",
    ),
    "positions": ("rotary", "position", "alibi", "embedding"),
    "attention": ("attention", "attn"),
}


def length_thresholds(config: Any) -> dict[str, int]:
    """Lengths in tokens at which a model of this config changes what it does, by their names in it.

    Windows, chunks, the length from which attention is scaled (`floor_scale`, `llama_4_scaling_beta`), and the one from
    which rotary embeddings have other frequencies (`longrope`; `dynamic`: max_position_embeddings).
    """
    found: dict[str, int] = {}

    def note(name: str, value: Any) -> None:
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            found[name] = value

    text = config.get_text_config()
    for name in ("sliding_window", "attention_window_size", "local_attention", "window_size", "attention_chunk_size"):
        note(name, getattr(text, name, None))
    if getattr(text, "attn_temperature_tuning", False):
        note("floor_scale", getattr(text, "floor_scale", None))
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    for kind in [rope, *(value for value in rope.values() if isinstance(value, Mapping))]:
        original = kind.get("original_max_position_embeddings", getattr(text, "original_max_position_embeddings", None))
        rope_type = kind.get("rope_type", kind.get("type"))
        if rope_type == "longrope" or kind.get("llama_4_scaling_beta") is not None:
            note("original_max_position_embeddings", original)
        elif rope_type == "dynamic":
            note("max_position_embeddings", text.max_position_embeddings)
    return found


def packed_batch(examples: Sequence[Sequence[int]], collator: FlatteningCollator | None = None) -> dict[str, Any]:
    """The batch that `FlatteningCollator` makes, without labels."""
    batch = (collator or FlatteningCollator())([{"input_ids": list(e)} for e in examples])
    del batch["labels"]
    return batch


def alone_batch(example: Sequence[int], copies: int = 1) -> dict[str, Any]:
    """One example, nothing beside it; or `copies` rows of it."""
    return {"input_ids": torch.tensor([list(example)] * copies), "use_cache": False}


def probe_tokens(model: PreTrainedModel, lengths: Sequence[int], seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Random examples, and the same with every token replaced. No special token, none twice if there are enough."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    special = {getattr(model.config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "unk", "mask")}
    usable = torch.tensor([t for t in range(min(4, vocabulary // 2), min(vocabulary, 50_000)) if t not in special])
    generator = torch.Generator().manual_seed(seed)
    shuffles = -(-2 * sum(lengths) // len(usable))
    order = torch.cat([usable[torch.randperm(len(usable), generator=generator)] for _ in range(shuffles)])
    pieces = order[: 2 * sum(lengths)].split([*lengths, *lengths])
    return [p.tolist() for p in pieces[: len(lengths)]], [p.tolist() for p in pieces[len(lengths) :]]


def find_places(input_ids: Tensor, examples: Sequence[Sequence[int]]) -> list[Place]:
    """Row and columns of each example in `input_ids` [B, T]."""
    places = []
    for i, example in enumerate(examples):
        fits = len(example) <= input_ids.shape[1]
        found = (
            (input_ids.unfold(1, len(example), 1) == torch.tensor(example)).all(-1).nonzero().tolist() if fits else []
        )
        if len(found) != 1:
            raise ValueError(
                f"example {i} ({len(example)} tokens) is {len(found)} times in batch_builder's input_ids; expected once"
            )
        places.append((found[0][0], slice(found[0][1], found[0][1] + len(example))))
    return places


def logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Logits [B, T, V] (of an encoder without a head: hidden states), float32 or better, on the model's device.

    Arguments that `model.forward` does not take are left out, as `Trainer` does with columns.
    """
    parameters = inspect.signature(model.forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    device = next(model.parameters()).device
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if anything or k in parameters}
    output = model(**moved)
    out = output.logits if getattr(output, "logits", None) is not None else output[0]
    return out.to(torch.promote_types(out.dtype, torch.float32))


def largest(a: Tensor, b: Tensor | None = None) -> float:
    """Largest absolute (difference of) value; infinity if there is a NaN."""
    value = (a if b is None else a - b).abs().max().item()
    return value if value == value else float("inf")


def input_gradients(
    model: PreTrainedModel, batch: Mapping[str, Any], places: Sequence[Place], seed: int = 0
) -> list[list[float]] | None:
    """[watched][moved]: gradient of a random projection of one example's logits with respect to another's embeddings.

    The largest value, relative to its own. None where the attention has no backward (FlexAttention on a CPU)
    or the embeddings are not [B, T, C].
    """
    leaves: list[Tensor] = []

    def to_leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # for models that scale it in place

    hook = model.get_input_embeddings().register_forward_hook(to_leaf)
    try:
        with torch.enable_grad():
            out = logits(model, batch)
            if leaves[0].shape[:2] != batch["input_ids"].shape:
                return None  # XLNet embeds [T, B, C]
            projection = torch.randn(out.shape[-1], generator=torch.Generator().manual_seed(seed)).to(out)
            table = []
            for row, columns in places:
                (gradient,) = torch.autograd.grad((out[row, columns] @ projection).sum(), leaves[:1], retain_graph=True)
                table.append([largest(gradient[place]) for place in places])
    except NotImplementedError:
        return None
    finally:
        hook.remove()
    return [[x / max(row[i], torch.finfo(torch.float32).tiny) for x in row] for i, row in enumerate(table)]


def _per_token(output: Any, batch: int, length: int) -> Tensor | None:
    """First tensor of a module's output as [B, T, …], if it has a value for each token."""
    while isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    if output.ndim >= 2 and output.shape[1] == length and output.shape[0] in (1, batch):
        return output.expand(batch, *output.shape[1:])
    if output.ndim >= 1 and output.shape[0] == batch * length:
        return output.unflatten(0, (batch, length))
    # Convolutions: [B, C, T + kernel].
    if output.ndim == 3 and output.shape[0] == batch and length <= output.shape[2] <= length + 8:
        return output[..., :length].transpose(1, 2)
    return None


def _trace(
    model: nn.Module, batch: Mapping[str, Any], place: Place
) -> list[tuple[str, nn.Module, Tensor | None, Tensor | None]]:
    """Inputs and outputs of every module at one example's place, in the order in which modules finish."""
    seen: list[tuple[str, nn.Module, Tensor | None, Tensor | None]] = []
    rows, length = batch["input_ids"].shape

    def at_place(value: Any) -> Tensor | None:
        tokens = _per_token(value, rows, length)
        return None if tokens is None else tokens[place].detach().clone()

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states", kwargs.get("input"))
            seen.append((name, module, at_place(given), at_place(output)))

        return hook

    hooks = [m.register_forward_hook(note(n), with_kwargs=True) for n, m in model.named_modules() if n]
    try:
        with torch.no_grad():
            logits(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def first_difference(
    model: nn.Module, a: Mapping[str, Any], b: Mapping[str, Any], at_a: Place, at_b: Place, tolerance: float
) -> tuple[str | None, str | None]:
    """Name of the first module that treats the same example differently in batches `a` and `b`, and what kind it is.

    If the first module whose output differs was already given different inputs, what differs lies between modules: the
    parent is named (attention between q_proj and o_proj).
    """

    def differ(x: Tensor | None, y: Tensor | None) -> bool:
        return x is not None and y is not None and x.shape == y.shape and largest(x.double(), y.double()) > tolerance

    traces = zip(_trace(model, a, at_a), _trace(model, b, at_b))
    for (name, module, in_a, out_a), (_, _, in_b, out_b) in traces:
        if differ(out_a, out_b):
            if differ(in_a, in_b) and "." in name:
                name = name.rpartition(".")[0]
                module = model.get_submodule(name)
            own = culprit(type(module).__name__, name.rpartition(".")[2])
            return name, own if own != "other" else culprit(*(type(m).__name__ for m in module.modules()))
    return None, None


def culprit(*names: str) -> str:
    """What a module with these names (its class, its attribute) carries from token to token.

    >>> culprit("MambaMixer", "mixer"), culprit("LlamaAttention", "self_attn"), culprit("ZeroPad2d", "time_shift")
    ('state', 'attention', 'state')
    """
    for name in names:
        for what, parts in _CULPRITS.items():
            if any(part in name.lower() for part in parts):
                return what
    return "other"
