"""Attention alone, forward and backward: the same examples padded, packed with a dense mask, FlexAttention, varlen.

What notebook 05 times. Useful work is the same for all: what causal attention inside each example has to compute,
2 · 2 · H · D operations for each visible pair forward and 2.5 times that backward. What an arm computes beyond it
(pads, masked pairs) or waits for (building masks) lowers its useful FLOP/s. Masks are built once a batch and used in
every layer, so a step is `mask + layers · attention`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from pandas.io.formats.style import Styler
from torch import Tensor

from packlib.attention import flex
from packlib.attention.kernels import KERNELS, Call, resolve_kernel, varlen_attention
from packlib.lab import figures, records
from packlib.lab.figures import COLORS, Picture
from packlib.lab.parameters import unknown_name
from packlib.lab.runs.clock import matmul_ceiling
from packlib.lab.strategies import Look

logger = logging.getLogger(__name__)

ARMS = {
    "padded_sdpa": ("padded, SDPA causal", Look(7, "", "o")),
    "dense_mask": ("packed, SDPA with a dense mask", Look(3, "xx", "X")),
    "flex": ("packed, FlexAttention", Look(4, "oo", "v")),
    "varlen": ("packed, varlen", Look(0, "//", "D")),
}
MIXES = {
    "even": "every example alike",
    "narrow": "word problems: 50 to 150 % of the mean",
    "heavy_tail": "many tasks: log-normal, σ = 1",
}
WARM_UPS = 2  # steps that are not timed
BACKWARD = 2.5  # work of the backward pass over that of the forward pass
Spec = Mapping[
    str, Any
]  # arm, mix, tokens, mean_length, seed, heads, kv_heads, head_dim, layers, repeats, device, kernel


# Arms


def specs(shared: Spec, mixes: Sequence[str], tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Every arm on every mix of lengths and number of tokens in a batch; shared: the other fields of a spec."""
    return [
        dict(shared) | {"arm": arm, "mix": mix, "tokens": count} for mix in mixes for count in tokens for arm in ARMS
    ]


def of_kernels(
    folder: Path, shared: Spec, mix: str, tokens: Sequence[int], names: Sequence[str]
) -> list[dict[str, Any]]:
    """The varlen arm on each of these kernels, on one mix of lengths and every number of tokens.

    A kernel that does not work here is left out, and logged with the reason, unless it has its record in `folder`.
    Raises `ValueError` for an unknown one.
    """
    found = []
    for name in names:
        if name not in KERNELS:
            raise unknown_name("kernel", name, KERNELS)
        arms = [dict(shared) | {"arm": "varlen", "mix": mix, "tokens": count, "kernel": name} for count in tokens]
        if reason := KERNELS[name].missing(torch.device(shared["device"]), dtype_of(shared)):
            published = [spec for spec in arms if records.read_record(folder, records.run_id(spec)) is not None]
            if len(published) < len(arms):
                logger.warning("%s is not timed: %s", name, reason)
            arms = published
        found += arms
    return sorted(found, key=lambda spec: tokens.index(spec["tokens"]))


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
    return (1 + BACKWARD) * 4 * heads * head_dim * _pairs(lengths)


def _pairs(lengths: np.ndarray) -> float:
    """Pairs of tokens that causal attention inside each example looks at."""
    return float((lengths * (lengths + 1) / 2).sum())


class Arm(NamedTuple):
    """How to `build` the masks of a batch, how to `attend(q, k, v, masks)` with them, and the shape of the tokens."""

    build: Callable[[], Any]
    attend: Callable[..., Tensor]
    shape: tuple[int, ...]


def arm(spec: Spec, lengths: np.ndarray) -> Arm:
    """The arm of a spec on examples of these lengths; queries are [*shape, heads, head_dim]."""
    name, device, dtype = spec["arm"], torch.device(spec["device"]), dtype_of(spec)
    cu_seqlens = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32)).to(device)
    longest, total = int(lengths.max()), int(lengths.sum())
    kernel = resolve_kernel("flex" if name == "flex" else spec["kernel"], device, dtype)

    def no_mask() -> None:
        """Pads on the right need no mask in causal attention: the kindest baseline."""

    def dense_mask() -> Tensor:
        position = torch.arange(total, device=device)
        segment = torch.searchsorted(cu_seqlens, position, right=True)
        return ((segment[:, None] == segment) & (position[:, None] >= position))[None, None]

    def boundaries() -> Tensor:
        fresh = cu_seqlens.clone()
        if name == "flex":
            flex.document_mask(fresh, flex.bucket(total), Call(fresh, longest).visible, (True, None))
        return fresh

    def varlen(q: Tensor, k: Tensor, v: Tensor, fresh: Tensor) -> Tensor:
        return varlen_attention(q, k, v, fresh, longest, kernel=kernel)

    if name == "padded_sdpa":
        return Arm(no_mask, _sdpa, (len(lengths), longest))
    return Arm(dense_mask, _sdpa, (1, total)) if name == "dense_mask" else Arm(boundaries, varlen, (total,))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:  # the fast kernels have no grouped queries beside a mask: transformers repeats the heads, too
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


def dtype_of(spec: Spec) -> torch.dtype:
    """What attention runs in on the device of a spec."""
    return torch.bfloat16 if spec["device"] == "cuda" else torch.float32


# Measuring


def measure(spec: Spec) -> dict[str, Any]:
    """Metrics of one arm: seconds of building masks and of one layer's attention over `repeats` steps.

    On a CPU FlexAttention has no backward: there its forward is timed alone, and counts as such (`backward` is false).
    """
    lengths = draw_lengths(spec["mix"], spec["tokens"], spec["mean_length"], spec["seed"])
    build, attend, shape = arm(spec, lengths)
    backward = (spec["arm"], spec["device"]) != ("flex", "cpu")
    device, dtype = torch.device(spec["device"]), dtype_of(spec)
    q, k, v = (
        torch.randn(*shape, spec[heads], spec["head_dim"], device=device, dtype=dtype, requires_grad=backward)
        for heads in ("heads", "kv_heads", "kv_heads")
    )
    marks = []
    for _ in range(WARM_UPS + spec["repeats"]):
        started = now(device)
        mask = build()
        built = now(device)
        out = attend(q, k, v, mask)
        if backward:
            out.backward(out.detach())
        marks.append((started, built, now(device)))
    masks, layers = np.diff(marks[WARM_UPS:]).T
    step = float(np.median(masks) + spec["layers"] * np.median(layers))
    flops = useful_flops(lengths, spec["heads"], spec["head_dim"]) / (1 if backward else 1 + BACKWARD)
    return {
        "kernel": resolve_kernel(spec["kernel"], device, dtype) if spec["arm"] == "varlen" else None,
        "examples": len(lengths),
        "slots": int(np.prod(shape)),
        "waste": len(lengths) * int(lengths.max()) / int(lengths.sum()),
        "backward": backward,
        "mask_seconds": float(np.median(masks)),
        "mask_share": float(np.median(masks)) / step,
        "layer_seconds": dict(zip(("p20", "p50", "p80"), np.quantile(layers, (0.2, 0.5, 0.8)).tolist())),
        "useful_flops_per_s": spec["layers"] * flops / step,
    }


def now(device: torch.device) -> float:
    """Seconds on a clock when everything that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def sweep(
    folder: Path, specs: Iterable[Spec], measured_by: Callable[[Spec], dict[str, Any]] | None = None
) -> pd.DataFrame:
    """Measure the specs that have no record in `folder`, write a record each, and return those of all as rows.

    measured_by: gives the metrics of a spec; `measure` by default.
    """
    specs = [dict(spec) for spec in specs]
    for i, spec in enumerate(specs):
        if records.read_record(folder, records.run_id(spec)) is None:
            records.write_record(folder, _measured(spec, measured_by or measure))
            told = ", ".join(str(spec[name]) for name in ("arm", "backend", "mix", "tokens") if name in spec)
            logger.info("%d of %d: %s", i + 1, len(specs), told)
    wanted = [records.run_id(spec) for spec in specs]
    return records.as_table(record for record in records.read_records(folder) if record["run_id"] in wanted)


def _measured(spec: Spec, measured_by: Callable[[Spec], dict[str, Any]]) -> dict[str, Any]:
    """The record of a spec; what did not fit is one, too."""
    identity = records.run_id(spec)
    try:
        ceiling = matmul_ceiling(torch.device(spec["device"]), dtype_of(spec))
        metrics = measured_by(spec) | {"matmul_flops_ceiling": ceiling}
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return records.unfinished(identity, spec, "oom", str(error).splitlines()[0])
    head = {"run_id": identity, "status": "ok", "error": None, "spec": spec, "environment": records.environment()}
    return head | {"plan": None, "metrics": metrics, "trace": None}


# Tables


def mix_table(mixes: Sequence[str], *, tokens: int, mean_length: int, seed: int) -> pd.DataFrame:
    """What padding and a dense mask look at for each useful slot or pair, a row a mix of lengths.

    `waste`: padding's slots per token. `pairs, padded` and `pairs, dense mask`: pairs of tokens per useful pair.
    """
    rows = {}
    for mix in mixes:
        n = draw_lengths(mix, tokens, mean_length, seed)
        useful, longest = _pairs(n), int(n.max())
        rows[mix] = {
            "lengths": MIXES[mix],
            "examples": len(n),
            "longest": longest,
            "waste": len(n) * longest / n.sum(),
            "pairs, padded": len(n) * longest * (longest + 1) / 2 / useful,
            "pairs, dense mask": n.sum() ** 2 / useful,
        }
    return pd.DataFrame(rows).T


def gain(table: pd.DataFrame, by: str) -> pd.Series:
    """Useful work of varlen for each unit of padding's, by a column."""
    speed = table.pivot_table(index=by, columns="arm", values="metrics.useful_flops_per_s", sort=False)
    return speed["varlen"] / speed["padded_sdpa"]


def timing_table(table: pd.DataFrame) -> pd.DataFrame:
    """Tokens by tokens what each arm takes and does: seconds of a layer, useful FLOP/s, and the ceiling's."""
    metrics = {
        "metrics.layer_seconds.p50": "layer (s)",
        "metrics.useful_flops_per_s": "useful FLOP/s",
        "metrics.matmul_flops_ceiling": "ceiling (FLOP/s)",
    }
    shown = table.sort_values(["tokens", "arm"]).rename(columns=metrics)
    return shown.assign(arm=shown["arm"].map(arm_label))[["tokens", "arm", *metrics.values(), "status"]]


def beside_each_other(table: pd.DataFrame) -> pd.DataFrame:
    """Kernel by kernel, what the varlen arm does at each number of tokens (`of_kernels`): useful FLOP/s.

    Columns are numbers of tokens, then `share of the ceiling` at the largest; the fastest there on top.
    """
    speed = table.pivot_table(index="kernel", columns="tokens", values="metrics.useful_flops_per_s", sort=False)
    largest = table[table["tokens"] == table["tokens"].max()].set_index("kernel")
    share = largest["metrics.useful_flops_per_s"] / largest["metrics.matmul_flops_ceiling"]
    fastest = speed.sort_values(table["tokens"].max(), ascending=False)
    return fastest.assign(**{"share of the ceiling": share})  # each of the ceiling at its time: no order


def kernels_shown(table: pd.DataFrame) -> Styler:
    """`beside_each_other` as it is read; an empty table without kernels."""
    if table.empty:
        return pd.DataFrame().style
    speeds = beside_each_other(table)
    formats: dict[Any, str] = dict.fromkeys(speeds.columns[:-1], "{:.2e}")
    return speeds.style.format(formats | {speeds.columns[-1]: "{:.1%}"}, na_rep="")


def kernel_findings(table: pd.DataFrame, by_tokens: pd.DataFrame) -> list[str]:
    """Which kernel is the fastest at most tokens, and by how much; nothing with fewer than two.

    by_tokens: the arms of `specs` on the same lengths. Its varlen arm ran on one of these kernels, too: how far the two
    times are apart is what a lead is held against.
    """
    if table.empty:
        return []
    largest = table[table["tokens"] == table["tokens"].max()].set_index("kernel")
    speed = largest["metrics.useful_flops_per_s"].dropna().sort_values(ascending=False)
    if len(speed) < 2:
        return []
    others = ", ".join(f"{speed.iloc[0] / rate:.2f} times that of {name}" for name, rate in speed.iloc[1:].items())
    said = f"Of varlen kernels, {speed.index[0]} does most at {largest['tokens'].iloc[0]} tokens: {others}"
    again = by_tokens[(by_tokens["arm"] == "varlen") & (by_tokens["tokens"] == largest["tokens"].iloc[0])]
    again = again[again["metrics.kernel"].isin(speed.index)]
    if not len(again):
        return [f"{said}."]
    name = again["metrics.kernel"].iloc[0]
    twice = [speed[name], again["metrics.useful_flops_per_s"].iloc[0]]
    apart = max(twice) / min(twice)
    close = [other for other, rate in speed.iloc[1:].items() if speed.iloc[0] <= apart * rate]
    told = f"; so {' and '.join([speed.index[0], *close])} are not told apart" if close else ""
    return [f"{said}. {name}, measured twice, differs by {apart - 1:.1%}{told}."]


def arm_label(arm: str) -> str:
    """What readers call an arm."""
    return ARMS[arm][0]


def largest_batch(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of most tokens, by arm."""
    return table[table["tokens"] == table["tokens"].max()].set_index("arm")


def mask_table(table: pd.DataFrame) -> pd.DataFrame:
    """What the masks of the largest batch cost: to build and, where T × T, to hold."""
    largest = largest_batch(table)
    shown = {
        "seconds": largest["metrics.mask_seconds"],
        "share of a step": largest["metrics.mask_share"],
        "bytes": (largest["tokens"] ** 2).where(largest.index == "dense_mask"),
    }
    return pd.DataFrame(shown).rename(arm_label).reset_index()


# Figures


def against_tokens(table: pd.DataFrame, mix: str, device: str) -> Picture:
    """Useful TFLOP/s of each arm against the tokens of a batch, with the measured ceiling of a matrix product."""
    title = f"{mix} lengths, {device}: {_gained(gain(table, 'tokens'))}"
    figure, (ax,) = figures.new(8.5, 4.8, title)
    for name, rows in table.groupby("arm", sort=False):
        label, look = ARMS[name]
        rows = rows.sort_values("tokens")
        teraflops = rows["metrics.useful_flops_per_s"] / 1e12
        ax.plot(rows["tokens"], teraflops, color=COLORS[look.color], marker=look.marker, markersize=8, label=label)
    ceiling = table["metrics.matmul_flops_ceiling"].median() / 1e12
    ax.axhline(ceiling, label="measured ceiling: a matrix product", **figures.LIMIT)
    figures.log2_axis(ax)
    ax.set_yscale("log")
    figures.plain_numbers(ax.yaxis)
    ax.set(title=title, xlabel="tokens in the batch", ylabel="useful TFLOP/s")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def against_mix(table: pd.DataFrame, tokens: int, device: str) -> Picture:
    """Share of the ceiling that each arm turns into useful work, one group a length mix, with the mix's waste."""
    title = f"{tokens:,} tokens, {device}: {_gained(gain(table, 'mix'))}"
    waste, arms = table.groupby("mix")["metrics.waste"].max().sort_values(), list(dict.fromkeys(table["arm"]))
    mixes, width = list(waste.index), 0.6 / max(len(arms) - 1, 1)
    figure, (ax,) = figures.new(8.5, 4.8, title)
    for shift, name in zip(np.linspace(-0.3, 0.3, len(arms)), arms):
        label, look = ARMS[name]
        rows = table[table["arm"] == name].set_index("mix").reindex(mixes)
        share = 100 * rows["metrics.useful_flops_per_s"] / rows["metrics.matmul_flops_ceiling"]
        x = np.arange(len(mixes)) + shift
        ax.bar(x, share, width=width, color=COLORS[look.color], hatch=look.hatch, label=label)
    ax.set_xticks(range(len(mixes)), [f"{mix}\nwaste {waste[mix]:.2f}" for mix in mixes])
    ax.set(title=title, ylabel="useful work, % of the measured ceiling")
    ax.grid(axis="x", visible=False)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _gained(gains: pd.Series) -> str:
    return f"varlen does {gains.min():.1f} to {gains.max():.1f} × padding's useful work"


# Findings


def findings(table: pd.DataFrame, mix: str, device: str) -> list[str]:
    """Sentences of notebook 05 about the largest batch of a sweep against tokens, every number computed."""
    largest = largest_batch(table)
    speed, tokens, layers = largest["metrics.useful_flops_per_s"], largest["tokens"].iloc[0], largest["layers"].iloc[0]
    share = speed["varlen"] / largest.loc["varlen", "metrics.matmul_flops_ceiling"]
    said = [
        f"{tokens} tokens of {mix} lengths on {device}, waste {largest['metrics.waste'].max():.2f}: "
        f"varlen does {speed['varlen'] / speed['padded_sdpa']:.2f} times the useful work of padding per second, "
        f"{share:.1%} of the measured ceiling."
    ]
    others = {"dense_mask": "Packing with a dense mask", "flex": "Packing with FlexAttention"}
    for arm, name in others.items():
        if pd.notna(speed[arm]):
            ratio = speed[arm] / speed["padded_sdpa"]
            said.append(f"{name} does {ratio:.2f} times the useful work of padding.")
    shares = largest.loc[list(others), "metrics.mask_share"].dropna()
    if len(shares):
        said.append(f"Building a mask takes {shares.min():.1%} to {shares.max():.1%} of a step of {layers} layers.")
    return said


def even_gap(table: pd.DataFrame) -> str | None:
    """What is left between padding and varlen where nothing is wasted, in a sentence; None where that was not measured.

    table: a sweep against mixes.
    """
    even = table[table["mix"] == "even"]
    if even.empty or not {"padded_sdpa", "varlen"} <= set(even["arm"]):
        return None
    ratio, waste = gain(even, "mix")["even"], even["metrics.waste"].max()
    faster, times = ("varlen", ratio) if ratio > 1 else ("padding", 1 / ratio)
    return (
        f"Even lengths, waste {waste:.2f}: {faster} does {times:.2f} times the useful work of the other. "
        "Nothing is saved there, so this is the kernels' own difference, and every other gain here contains it."
    )
