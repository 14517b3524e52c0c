"""What notebooks 00 and 02 show and a cell is too short for: pictures of slots and tensors, and a look into a small model.

Everything here is for rows of a few dozen tokens: attention weights are dense, [T, T], and nothing is fast.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel

from packlib import probe
from packlib.collators import IGNORE_INDEX
from packlib.lab import figures, models
from packlib.plans import Plan

# Mostly Okabe and Ito's colours, one an example; vermilion is kept for attention to another example
COLORS = np.array(
    [to_rgb(f"#{code}") for code in ("56b4e9", "e69f00", "009e73", "cc79a7", "f0e442", "9a9ae0", "b3936b", "999999")]
)
_FOREIGN, _PAD = to_rgb("#d55e00"), (0.9, 0.9, 0.9)


def small_llama(attn_implementation: str, vocab_size: int = 512, seed: int = 0) -> PreTrainedModel:
    """Two layers of `tiny-llama`, float32, eval mode, with queries and keys 4 times as large as at initialisation, where a small model looks at all
    tokens alike and a picture shows little."""
    model = models.build_model(
        "tiny-llama", attn_implementation=attn_implementation, seed=seed, vocab_size=vocab_size, layers=2
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(4)
    return model.eval()


@torch.no_grad()
def attention_weights(model: PreTrainedModel, batch: Mapping[str, Any], layer: int = 0) -> np.ndarray:
    """Attention weights of one layer, mean over heads, of a flat batch: float32 [T, T], rows are queries and sum to 1.

    Read from the eager attention of transformers, which has position ids alone to tell where examples begin. The model is left as it was.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        out = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, output_attentions=True
        )
    finally:
        model.set_attn_implementation(before)
    return out.attentions[layer][0].mean(0).numpy()


@torch.no_grad()
def token_logits(model: PreTrainedModel, *batches: Mapping[str, Any]) -> Tensor:
    """Logits of the real tokens, examples in reading order, float32 [real tokens, V]: pads are left out, so layouts can be subtracted."""
    found = []
    for batch in batches:
        logits = probe.logits(
            model, {"use_cache": False} | {name: value for name, value in batch.items() if name != "labels"}
        )
        mask = batch.get("attention_mask")
        found.append(logits.flatten(0, 1) if mask is None else logits[mask.bool()])
    return torch.cat(found)


def token_strips(
    batch: Mapping[str, Any], lengths: Sequence[int], names: Sequence[str] = ("input_ids", "labels", "position_ids")
) -> Figure:
    """The tensors of a flat batch, cell by cell, one colour an example, `cu_seq_lens_q` below the borders; up to about 40 tokens."""
    owner, edges = np.repeat(np.arange(len(lengths)), lengths), batch["cu_seq_lens_q"].tolist()
    alt = f"The packed row of {len(owner)} tokens as a table: {', '.join(names)}; cu_seqlens {edges} at the borders between examples"
    figure, (ax,) = figures.new(0.37 * len(owner) + 1.3, 0.42 * len(names) + 1.2, alt)
    for y, name in enumerate(names):
        for x, value in enumerate(batch[name][0].tolist()):
            ignored = name == "labels" and value == IGNORE_INDEX
            ax.add_patch(
                plt.Rectangle(
                    (x, y), 1, 1, facecolor=_PAD if ignored else (*COLORS[owner[x] % 8], 0.35), edgecolor="white"
                )
            )
            ax.text(x + 0.5, y + 0.5, value, ha="center", va="center", fontsize=9 if ignored else 10)
    ax.vlines(edges, 0, len(names) + 0.12, color="black", linewidth=1.8, clip_on=False)
    ax.set(
        xlim=(0, len(owner)), ylim=(len(names), 0), xticks=edges, yticks=np.arange(len(names)) + 0.5, yticklabels=names
    )
    ax.set(
        title=f"{len(lengths)} segments in one row of {len(owner)} slots",
        xlabel="cu_seqlens: where a segment ends and the next begins (tokens)",
    )
    ax.grid(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return figure


def slots_picture(plan: Plan, lengths: Sequence[int]) -> Figure:
    """One plan of mini-batches (up to 8 short examples), padded, packed without boundaries and packed with them: slots, and who attends to whom."""
    rows, padded, flat = (
        [[s.example for s in row] for row in plan],
        plan.report(lengths, "padded"),
        plan.report(lengths),
    )
    lines, packed = {}, {}  # name -> (example, tokens) from left to right; -1 is padding
    for i, row in enumerate(rows, 1):
        packed[f"mini-batch {i}"] = [(e, lengths[e]) for e in row]
        lines |= {
            f"mini-batch {i}, line {j}": [(e, lengths[e]), (-1, max(lengths[o] for o in row) - lengths[e])]
            for j, e in enumerate(row, 1)
        }
    layouts = [  # title, lines, how many of them are mini-batch 1, whether attention stops at examples
        (
            f"Padded: {padded.slots} slots for {padded.real_tokens} tokens (fill {padded.fill:.2f})",
            lines,
            len(rows[0]),
            True,
        ),
        (f"Packed, no boundaries: {flat.slots} slots (fill {flat.fill:.2f})", packed, 1, False),
        (f"Packed, a boundary at each example: {flat.slots} slots (fill {flat.fill:.2f})", packed, 1, True),
    ]
    figure, axes = plt.subplots(3, 2, figsize=(11, 8), width_ratios=(3, 1), height_ratios=(len(lines) * 0.7, 3, 3))
    figure.alt = f"{padded.examples} examples: {padded.slots} slots padded, {flat.slots} packed; who attends to whom without and with boundaries"
    for (ax, square), (title, drawn, first, boundary) in zip(axes, layouts):
        for y, line in enumerate(drawn.values()):
            for (example, tokens), left in zip(line, np.cumsum([0] + [n for _, n in line])):
                if example < 0:
                    ax.barh(y, tokens, left=left, color=_PAD, hatch="////", edgecolor="0.7", zorder=1)
                else:
                    ax.barh(
                        y,
                        tokens,
                        left=left,
                        color=COLORS[example % 8],
                        edgecolor="black" if boundary else "none",
                        linewidth=2,
                        zorder=2,
                    )
                    ax.text(left + tokens / 2, y, chr(65 + example), ha="center", va="center", fontsize=11)
        ax.set(title=title, xlabel="slots", yticks=range(len(drawn)), yticklabels=list(drawn))
        ax.set(ylim=(len(drawn) - 0.45, -0.55), xlim=(0, max(plan.row_lengths) + 0.3))
        ax.grid(axis="y", visible=False)
        image, foreign, scores = attention_image(list(drawn.values())[:first], boundary)
        square.imshow(image)
        square.set(
            xticks=[],
            yticks=[],
            ylabel="query",
            xlabel=f"key: {scores} scores,\n{foreign or 'none'} to other examples",
            title="Mini-batch 1",
        )
        square.grid(False)
    return figure


def attention_image(lines: Sequence[Sequence[tuple[int, int]]], boundary: bool) -> tuple[np.ndarray, int, int]:
    """Who attends to whom in these lines of (example, tokens), end to end: picture [T, T, 3], scores between different examples, all scores.

    >>> attention_image([[(0, 1), (1, 2)]], boundary=False)[1:], attention_image([[(0, 1), (1, 2)]], boundary=True)[1:]
    ((2, 6), (0, 4))
    """
    owner = np.concatenate([np.repeat([e for e, _ in line], [n for _, n in line]) for line in lines])
    line = np.repeat(np.arange(len(lines)), [sum(n for _, n in row) for row in lines])
    causal = np.tri(len(owner), dtype=bool) & (line[:, None] == line)
    real, same = (owner >= 0)[:, None] & (owner >= 0), owner[:, None] == owner
    seen = causal & real & (same | (not boundary))
    image = np.ones((*seen.shape, 3))
    image[causal & ~real] = _PAD
    image[seen] = COLORS[owner[np.nonzero(seen)[0]] % 8]
    image[seen & ~same] = _FOREIGN
    return image, int((seen & ~same).sum()), int(seen.sum())
