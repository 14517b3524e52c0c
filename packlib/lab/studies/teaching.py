"""What notebook 02 shows and a cell is too short for: pictures of tensors, and a look into a small model.

Everything here is for rows of a few dozen tokens: attention weights are dense, [T, T], and nothing is fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.colors import PowerNorm
from matplotlib.patches import Rectangle
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from packlib.collators import IGNORE_INDEX
from packlib.isolation import probe
from packlib.lab import figures, models
from packlib.lab.figures import COLORS, Picture

Batch = Mapping[str, Any]
TENSORS = ("input_ids", "labels", "position_ids")


def small_llama(attn_implementation: str, vocab_size: int = 512, seed: int = 0) -> PreTrainedModel:
    """Two layers of `tiny-llama`, float32, eval mode, with queries and keys 4 times as large as at initialisation.

    A small model as initialised looks at all tokens alike, and a picture of it shows little.
    """
    model = models.build_model(
        "tiny-llama", attn_implementation=attn_implementation, seed=seed, vocab_size=vocab_size, layers=2
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(4)
    return model.eval()


# Tables


@torch.no_grad()
def attention_weights(model: PreTrainedModel, batch: Batch, layer: int = 0) -> np.ndarray:
    """Attention weights of one layer, mean over heads, of a flat batch: float32 [T, T], rows are queries and sum to 1.

    Read from the eager attention of transformers, which has position ids alone to tell where examples begin. The model
    is left as it was.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        ids, positions = batch["input_ids"], batch["position_ids"]
        out = model(input_ids=ids, position_ids=positions, use_cache=False, output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    return out.attentions[layer][0].mean(0).numpy()


@torch.no_grad()
def token_logits(model: PreTrainedModel, *batches: Batch) -> Tensor:
    """Logits of the real tokens, examples in reading order, float32 [real tokens, V].

    Pads are left out, so that layouts can be subtracted.
    """
    found = []
    for batch in batches:
        inputs = {"use_cache": False} | {name: value for name, value in batch.items() if name != "labels"}
        logits = probe.logits(model, inputs)
        mask = batch.get("attention_mask")
        found.append(logits.flatten(0, 1) if mask is None else logits[mask.bool()])
    return torch.cat(found)


def edit_changes(
    model: PreTrainedModel, batches: Mapping[str, Batch], edited: np.ndarray, token: int
) -> dict[str, np.ndarray]:
    """Largest change of every token's logits when the tokens of one example become `token`: name -> float32 [T].

    batches: flat batches of the same row. edited: bool [T], the tokens of that example.
    """
    changes = {}
    for name, batch in batches.items():
        ids = torch.where(torch.from_numpy(edited), token, batch["input_ids"])
        change = token_logits(model, {**batch, "input_ids": ids}) - token_logits(model, batch)
        changes[name] = change.abs().amax(1).numpy()
    return changes


def layout_losses(model: PreTrainedModel, layouts: Mapping[str, Sequence[Batch]]) -> pd.DataFrame:
    """The same examples in several layouts, each a list of batches; the first one is the reference.

    Columns `loss`, nats per token, batches weighted by their loss tokens, and `difference`, the largest one of a
    token's logits to those of the reference.
    """
    reference = token_logits(model, *next(iter(layouts.values())))
    rows = {}
    for name, batches in layouts.items():
        counts = [int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches]
        with torch.no_grad():
            means = [model(**{**batch, "use_cache": False}).loss.item() for batch in batches]
        difference = float((token_logits(model, *batches) - reference).abs().max())
        rows[name] = {"loss": np.average(means, weights=counts), "difference": difference}
    return pd.DataFrame(rows).T


def logit_errors(
    model: PreTrainedModel, batches: Mapping[str, Batch], reference: Tensor, attentions: Sequence[str]
) -> pd.DataFrame:
    """Largest logit error of every batch (rows) on every attention (columns) as text, or why it was refused.

    reference: float32 [real tokens, V]. The model is left on the last attention.
    """
    errors: dict[str, dict[str, str]] = {}
    for attention in attentions:
        model.set_attn_implementation(attention)
        errors[attention] = {name: _logit_error(model, batch, reference) for name, batch in batches.items()}
    return pd.DataFrame(errors).rename_axis("largest logit error")


def _logit_error(model: PreTrainedModel, batch: Batch, reference: Tensor) -> str:
    try:
        return f"{float((token_logits(model, batch) - reference).abs().max()):.1e}"
    except ValueError as refusal:
        return f"refused: {str(refusal).split(';')[0]}"


def scores_by_distance(
    encode: Callable[[Tensor, Tensor], Tensor], places: Sequence[int], distances: int = 64, channels: int = 64
) -> dict[int, np.ndarray]:
    """Score of a query with a key, by the distance between them, wherever the query stands: place -> [distances].

    encode: (vectors [n, channels], positions int64 [n]) -> vectors, what a model does with positions. The query stands
    at `place`, the key 0 to distances - 1 tokens to its left; both vectors are the same all the time.
    """
    query, key = torch.randn(2, channels, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    away = torch.arange(distances)
    found = {}
    for place in places:
        left = encode(key.expand(distances, -1), place - away)
        found[place] = (left @ encode(query[None], torch.tensor([place]))[0] / channels**0.5).numpy()
    return found


def same_as_llama(rotate: Callable[[Tensor, Tensor], Tensor], model: PreTrainedModel) -> bool:
    """Whether `rotate` (as `encode` of `scores_by_distance`) is what a Llama does to its queries, up to rounding."""
    config, positions = model.config, torch.arange(50)
    query = torch.randn(50, config.head_dim, generator=torch.Generator().manual_seed(0))
    cos, sin = model.model.rotary_emb(query, positions[None])
    theirs, _ = apply_rotary_pos_emb(query[None, None], query[None, None], cos, sin)
    return torch.allclose(rotate(query, positions), theirs[0, 0], atol=1e-4)


# Figures


def token_strips(batch: Batch, lengths: Sequence[int], names: Sequence[str] = TENSORS) -> Picture:
    """The tensors of a flat batch cell by cell, one colour an example, up to about 40 tokens.

    `cu_seq_lens_q` stands below the borders between the examples.
    """
    owner, edges = np.repeat(np.arange(len(lengths)), lengths), batch["cu_seq_lens_q"].tolist()
    alt = f"The packed row of {len(owner)} tokens as a table: {', '.join(names)}; cu_seqlens {edges} at the borders. "
    restarts = torch.nonzero(batch["position_ids"][0] == 0).flatten().tolist()
    ignored = torch.nonzero(batch["labels"][0] == IGNORE_INDEX).flatten().tolist()
    alt += f"position_ids are 0 at {restarts}, labels are {IGNORE_INDEX} at {ignored}"
    figure, (ax,) = figures.new(0.37 * len(owner) + 1.3, 0.42 * len(names) + 1.2, alt)
    for y, name in enumerate(names):
        for x, value in enumerate(batch[name][0].tolist()):
            no_label = name == "labels" and value == IGNORE_INDEX
            color = figures.PAD if no_label else (*figures.EXAMPLES[owner[x] % 8], 0.35)
            ax.add_patch(Rectangle((x, y), 1, 1, facecolor=color, edgecolor="white"))
            ax.text(x + 0.5, y + 0.5, value, ha="center", va="center", fontsize=9 if no_label else 10)
    ax.vlines(edges, 0, len(names) + 0.12, color="black", linewidth=1.8, clip_on=False)
    ax.set(xlim=(0, len(owner)), ylim=(len(names), 0), xticks=edges)
    ax.set_yticks(np.arange(len(names)) + 0.5, names)
    ax.set_xlabel("cu_seqlens: where a segment ends and the next begins (tokens)")
    ax.set_title(f"{len(lengths)} segments in one row of {len(owner)} slots")
    ax.grid(False)
    ax.tick_params(length=0)
    ax.tick_params(axis="x", pad=8)  # below the ends of the rules
    ax.spines[:].set_visible(False)
    return figure


def attention_pictures(lengths: Sequence[int], weights: Sequence[np.ndarray], titles: Sequence[str]) -> Picture:
    """Who attends to whom: one square of attention weights ([T, T], rows = queries) per title, borders drawn.

    White is no attention at all.
    """
    told = [f"{title}: {foreign_share(w, lengths):.0%} goes to other examples" for w, title in zip(weights, titles)]
    alt = f"Attention weights of examples of {list(lengths)} tokens. {'; '.join(told)}"
    figure, axes = figures.new(4.9 * len(titles) + 0.8, 5.0, alt, len(titles))
    edges = np.cumsum([0, *lengths])
    centres, letters = (edges[:-1] + edges[1:] - 1) / 2, [chr(65 + i) for i in range(len(lengths))]
    for ax, weight, title in zip(axes, weights, titles):
        image = ax.imshow(np.where(weight > 0, weight, np.nan), cmap="viridis_r", norm=PowerNorm(0.5, 0, 1))
        for edge in edges[1:-1]:
            ax.axhline(edge - 0.5, color="black", linewidth=1)
            ax.axvline(edge - 0.5, color="black", linewidth=1)
        ax.set_title(title, fontsize=12)
        ax.set_xlabel("key: token of example …")
        ax.set_xticks(centres, letters)
        ax.set_yticks(centres, letters)
        ax.grid(False)
    axes[0].set_ylabel("query: token of example …")
    figure.colorbar(image, ax=axes, shrink=0.8, label="attention weight (square-root scale)")
    return figure


def foreign_share(weights: np.ndarray, lengths: Sequence[int]) -> float:
    """Share of the attention ([T, T], rows = queries) that goes to another example.

    >>> foreign_share(np.array([[1.0, 0.0], [0.5, 0.5]]), [1, 1])
    0.25
    """
    owner = np.repeat(np.arange(len(lengths)), lengths)
    return float(weights[owner[:, None] != owner].sum() / weights.sum())


def logit_changes(changes: Mapping[str, np.ndarray], lengths: Sequence[int], edited: int) -> Picture:
    """`edit_changes` along the row, one line per boundary rule; the edited example is shaded."""
    edges = np.cumsum([0, *lengths])
    others = np.repeat(np.arange(len(lengths)), lengths) != edited
    moved = ", ".join(f"{values[others].max():.2g} {name}" for name, values in changes.items())
    title = f"Editing {chr(65 + edited)} moves the others' logits by up to {moved}"
    figure, (ax,) = figures.new(10, 3.9, f"{title}; change at every position of the row")
    ax.axvspan(edges[edited] - 0.5, edges[edited + 1] - 0.5, color="0.9")
    for (name, values), marker, color in zip(changes.items(), "oX^", (COLORS[3], COLORS[2], COLORS[0])):
        ax.plot(np.arange(len(values)), values, marker=marker, markersize=6, color=color, label=name)
    for i, (start, stop) in enumerate(pairwise(edges)):
        ax.axvline(stop - 0.5, color="black", linewidth=1)
        name = f"{chr(65 + i)}{', edited' if i == edited else ''}"
        ax.text((start + stop - 1) / 2, 1.01, name, transform=ax.get_xaxis_transform(), ha="center", fontsize=11)
    top = max(1e-6, *(float(values.max()) for values in changes.values()))
    ax.set_yscale("symlog", linthresh=1e-7)
    ax.set(xlabel="position in the packed row (tokens)", ylabel="largest logit change")
    ax.set(xlim=(-0.5, edges[-1] - 0.5), ylim=(-3e-8, 4 * top))
    ax.set_title(title, pad=22)
    ax.legend(loc="center right")
    return figure


def distance_curves(named: Mapping[str, Mapping[int, np.ndarray]]) -> Picture:
    """`scores_by_distance` of several ways to tell positions, a panel each, a line for every place of the query.

    Where lines lie on each other the score knows the distance alone.
    """
    spread = {name: max_spread(scores) for name, scores in named.items()}
    alt = "; ".join(f"{name}: the same distance, scores up to {value:.1g} apart" for name, value in spread.items())
    figure, axes = figures.new(5.6 * len(named), 3.9, f"Score against distance. {alt}", len(named))
    for ax, (name, scores) in zip(axes, named.items()):
        for i, (place, values) in enumerate(scores.items()):
            look: dict[str, Any] = {
                "color": COLORS[i],
                "marker": figures.MARKERS[i],
                "markersize": 11 - 3 * i,
                "markevery": 4,
            }
            ax.plot(values, **look, linewidth=4 - 1.2 * i, label=f"query at position {place:,}")
        ax.set(title=f"{name}: {spread[name]:.1g} apart", xlabel="distance from query to key (tokens)")
        ax.legend()
    axes[0].set_ylabel("score, q · k / √channels")
    return figure


def max_spread(scores: Mapping[int, np.ndarray]) -> float:
    """How far scores of one distance are apart at most (`scores_by_distance`)."""
    return float(np.ptp(list(scores.values()), axis=0).max())


# Findings


def findings(
    table: pd.DataFrame,
    noticed: Mapping[str, float],
    leaked: Sequence[float],
    same: Mapping[str, bool],
    scores: Mapping[str, Mapping[int, np.ndarray]],
    edited: str,
) -> list[str]:
    """Sentences of notebook 02 about boundaries, every number computed.

    table: `layout_losses`. noticed: how far others' logits moved without and with boundaries, after an edit of the
    example `edited`. leaked: share of attention to other examples, without and with. same: entries of the batch that
    transformers' collator makes alike. scores: `scores_by_distance` by what tells the positions.
    """
    reference, *others = table.index
    exact = [name for name in others if table.loc[name, "difference"] < 1e-4]
    leaking = [name for name in others if name not in exact]
    without, with_them = noticed.values()
    said = f"The same loss as {reference} ({table.loc[reference, 'loss']:.4f} nats per token): {' and '.join(exact)}"
    return [
        f"{sum(same.values())} of {len(same)} entries of the batch are the same as DataCollatorWithFlattening's.",
        f"Without boundaries {leaked[0]:.0%} of the attention goes to other examples, with them {leaked[1]:.0%}.",
        "Wherever a pair of tokens stands, its score at one distance differs by up to "
        + " and ".join(f"{max_spread(found):.1g} with {name}" for name, found in scores.items())
        + ".",
        f"Editing example {edited} moves the others' logits by up to {without:.2g} without boundaries "
        f"and by {with_them:g} with them.",
        "; ".join([said, *(f"{name} gives {table.loc[name, 'loss']:.4f}" for name in leaking)]) + ".",
    ]
