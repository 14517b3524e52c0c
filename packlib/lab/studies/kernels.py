"""Attention alone, forward and backward, in four ways: the same examples padded, packed with a dense mask, with FlexAttention, with varlen.

Useful work is the same for all: what causal attention inside each example has to compute, 2 · 2 · H · D multiply-adds for each visible
pair forward and 2.5 times that backward. What an arm computes beyond it (pads, masked pairs) or waits for (building masks) lowers its
useful FLOP/s. Masks are built once a batch and used in every layer, so a step is `mask + layers · attention`.
"""

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from packlib import flex
from packlib.attention.kernels import Call, resolve_kernel, varlen_attention
from packlib.lab import figures
from packlib.lab.records import environment, load_records, read_record, run_id, write_record

logger = logging.getLogger(__name__)

# arm: label, place in the palette, marker, hatch
ARMS = {
    "padded_sdpa": ("padded, SDPA causal", 7, "o", ""),
    "dense_mask": ("packed, SDPA with a dense mask", 3, "X", "xx"),
    "flex": ("packed, FlexAttention", 4, "v", "oo"),
    "varlen": ("packed, varlen", 0, "D", "//"),
}
MIXES = {
    "even": "every example alike",
    "narrow": "word problems: 50 to 150 % of the mean",
    "heavy_tail": "many tasks: log-normal, σ = 1",
}


def draw_lengths(mix: str, tokens: int, mean: int, seed: int) -> np.ndarray:
    """Lengths of one batch that sum to `tokens`: int64, none above half of `tokens` unless `mix` is `even`.

    >>> draw_lengths("even", 1024, 256, 0).tolist()
    [256, 256, 256, 256]
    """
    if mix not in MIXES:
        raise ValueError(f"mix = {mix!r}; expected one of {', '.join(MIXES)}")
    generator = np.random.default_rng(seed)
    draws = {
        "even": np.ones(tokens),
        "narrow": generator.uniform(0.5, 1.5, tokens),
        "heavy_tail": generator.lognormal(-0.5, 1.0, tokens),
    }
    lengths = np.clip((draws[mix] * mean).astype(np.int64), 1, max(mean, tokens // 2))
    count = int(np.searchsorted(lengths.cumsum(), tokens)) + 1
    lengths = lengths[:count]
    lengths[-1] -= lengths.sum() - tokens
    return lengths


def useful_flops(lengths: np.ndarray, heads: int, head_dim: int) -> float:
    """Forward and backward of one layer of causal attention inside each example."""
    return 3.5 * 4 * heads * head_dim * float((lengths * (lengths + 1) / 2).sum())


def _arm(spec: dict[str, Any], lengths: np.ndarray) -> tuple[Callable[[], Any], Callable[..., Tensor], tuple[int, ...]]:
    """How to build the masks of a batch, how to attend with them, and the shape of queries without heads and channels."""
    arm, device, dtype = spec["arm"], torch.device(spec["device"]), _dtype(spec)
    cu_seqlens = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32)).to(device)
    longest, total = int(lengths.max()), int(lengths.sum())
    kernel = resolve_kernel("flex" if arm == "flex" else spec["kernel"], device, dtype)

    def dense_mask() -> Tensor:
        position = torch.arange(total, device=device)
        segment = torch.searchsorted(cu_seqlens, position, right=True)
        return ((segment[:, None] == segment) & (position[:, None] >= position))[None, None]

    def boundaries() -> Tensor:
        fresh = cu_seqlens.clone()
        if arm == "flex":
            flex.document_mask(fresh, flex.bucket(total), Call(fresh, longest).visible, (True, None))
        return fresh

    def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if (
            mask is not None
        ):  # the fast kernels have no grouped queries beside a mask: transformers repeats the heads, too
            k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )

    def varlen(q: Tensor, k: Tensor, v: Tensor, fresh: Tensor) -> Tensor:
        return varlen_attention(q, k, v, fresh, longest, kernel=kernel)

    if arm == "padded_sdpa":  # pads on the right need no mask in causal attention: the kindest baseline
        return lambda: None, sdpa, (len(lengths), longest)
    return (dense_mask, sdpa, (1, total)) if arm == "dense_mask" else (boundaries, varlen, (total,))


def _dtype(spec: dict[str, Any]) -> torch.dtype:
    return torch.bfloat16 if spec["device"] == "cuda" else torch.float32


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Metrics of one arm: seconds of building masks and of one layer's attention over `repeats` steps, after two warm-ups.

    On a CPU FlexAttention has no backward: there its forward is timed alone, and counts as such (`backward` is false).
    """
    lengths = draw_lengths(spec["mix"], spec["tokens"], spec["mean_length"], spec["seed"])
    build, attend, shape = _arm(spec, lengths)
    backward = (spec["arm"], spec["device"]) != ("flex", "cpu")
    heads = (spec["heads"], spec["kv_heads"], spec["kv_heads"])
    made = {"device": spec["device"], "dtype": _dtype(spec), "requires_grad": backward}
    qkv = [torch.randn(*shape, h, spec["head_dim"], **made) for h in heads]
    synchronize = torch.cuda.synchronize if spec["device"] == "cuda" else lambda: None
    marks = []
    for _ in range(spec["repeats"] + 2):
        synchronize()
        marks.append([time.perf_counter()])
        mask = build()
        synchronize()
        marks[-1].append(time.perf_counter())
        out = attend(*qkv, mask)
        if backward:
            out.backward(out.detach())
        synchronize()
        marks[-1].append(time.perf_counter())
    masks, layers = np.diff(marks[2:]).T
    step = float(np.median(masks) + spec["layers"] * np.median(layers))
    flops = useful_flops(lengths, spec["heads"], spec["head_dim"]) / (1 if backward else 3.5)
    return {
        "examples": len(lengths), "slots": int(np.prod(shape)), "waste": len(lengths) * int(lengths.max()) / int(lengths.sum()),
        "backward": backward, "mask_seconds": float(np.median(masks)), "mask_share": float(np.median(masks)) / step,
        "layer_seconds": dict(zip(("p20", "p50", "p80"), np.quantile(layers, (0.2, 0.5, 0.8)).tolist())),
        "useful_flops_per_s": spec["layers"] * flops / step,
    }  # fmt: skip


def sweep(folder: Path, specs: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Measure the specs that have no record in `folder`, write a record each, and return the records of all of them as rows.

    A spec has `arm, mix, tokens, mean_length, seed, heads, kv_heads, head_dim, layers, repeats, device, kernel`.
    """
    from packlib.lab.worker import matmul_ceiling

    specs = list(specs)
    for i, spec in enumerate(specs):
        identity = run_id(spec)
        if read_record(folder, identity) is not None:
            continue
        record = {
            "run_id": identity,
            "status": "ok",
            "error": None,
            "spec": spec,
            "environment": environment(),
            "plan": None,
            "trace": None,
        }
        try:
            ceiling = matmul_ceiling(torch.device(spec["device"]), _dtype(spec))
            record["metrics"] = measure(spec) | {"matmul_flops_ceiling": ceiling}
        except torch.OutOfMemoryError as error:
            record |= {"status": "oom", "error": str(error).splitlines()[0], "metrics": None}
            torch.cuda.empty_cache()
        write_record(folder, record)
        logger.info("%d of %d: %s", i + 1, len(specs), {k: spec[k] for k in ("arm", "mix", "tokens")})
    table = load_records(folder)
    return table[table["run_id"].isin(map(run_id, specs))]


def gain(table: pd.DataFrame, by: str) -> pd.Series:
    """Useful work of varlen for each unit of padding's, by a column."""
    speed = table.pivot_table(index=by, columns="arm", values="metrics.useful_flops_per_s", sort=False)
    return speed["varlen"] / speed["padded_sdpa"]


def against_tokens(table: pd.DataFrame, title: str) -> Figure:
    """Useful TFLOP/s of each arm against the tokens of a batch, with the measured ceiling of a matrix product."""
    figure, (ax,) = figures.new(8.5, 4.8, title)
    for arm, rows in table.groupby("arm", sort=False):
        label, color, marker, _ = ARMS[arm]
        rows = rows.sort_values("tokens")
        ax.plot(
            rows["tokens"],
            rows["metrics.useful_flops_per_s"] / 1e12,
            marker=marker,
            markersize=8,
            color=figures._COLORS[color],
            label=label,
        )
    ax.axhline(
        table["metrics.matmul_flops_ceiling"].median() / 1e12,
        **figures.LIMIT,
        label="measured ceiling: a matrix product",
    )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set(title=title, xlabel="tokens in the batch", ylabel="useful TFLOP/s")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def against_mix(table: pd.DataFrame, title: str) -> Figure:
    """Share of the ceiling that each arm turns into useful work, one group a length mix, with the mix's waste."""
    waste, arms = table.groupby("mix")["metrics.waste"].max().sort_values(), list(dict.fromkeys(table["arm"]))
    mixes = list(waste.index)
    figure, (ax,) = figures.new(8.5, 4.8, title)
    for shift, arm in zip(np.linspace(-0.3, 0.3, len(arms)), arms):
        label, color, _, hatch = ARMS[arm]
        rows = table[table["arm"] == arm].set_index("mix").reindex(mixes)
        share = 100 * rows["metrics.useful_flops_per_s"] / rows["metrics.matmul_flops_ceiling"]
        ax.bar(
            np.arange(len(mixes)) + shift,
            share,
            width=0.6 / max(len(arms) - 1, 1),
            color=figures._COLORS[color],
            hatch=hatch,
            label=label,
        )
    ax.set_xticks(range(len(mixes)), [f"{mix}\nwaste {waste[mix]:.2f}" for mix in mixes])
    ax.set(title=title, ylabel="useful work, % of the measured ceiling")
    ax.grid(axis="x", visible=False)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
