"""The paper's numbers as data, each with its table and row: arXiv 2407.09105 v6, and its blog post of 2024-08-21.

What the sources we have do not say is None and stays empty in every table and figure.
"""

from __future__ import annotations

import pandas as pd

SOURCE = "arXiv 2407.09105"
SETTING = {
    "devices": "8 x A100-80GB, FSDP",
    "dtype": "bf16",
    "gradient_accumulation": 2,
    "max_tokens": 4096,
    "batch_size": 4,
    "epochs": 1,
    "examples": 20_000,
    "seeds": 1,
}

STRATEGY = {
    "padding": "padding",
    "FixedLengthPacking": "fixed_length_packing",
    "FixedLengthPacking + PosID": "fixed_length_packing_posid",
    "offline packing + PosID": "offline_packing_posid",
    "MiniBatchPacking + PosID": "minibatch_packing",
}

_TABLE_2 = [  # model, batching, rows, tokens/s and peak memory (MB) per GPU, validation loss: FLAN_20k, one epoch
    ("mistral-7b", "padding", 19961, 742, 30625, 1.129),
    ("mistral-7b", "FixedLengthPacking", 2294, 2986, 30783, 1.306),
    ("mistral-7b", "offline packing + PosID", 585, 3010, 30783, 1.284),
    ("mistral-7b", "MiniBatchPacking + PosID", 19961, 1408, 24549, 1.127),
    ("llama-2-7b", "padding", 19958, 771, 29234, 1.266),
    ("llama-2-7b", "FixedLengthPacking", 2346, 3091, 29433, 1.579),
    ("llama-2-7b", "offline packing + PosID", None, None, None, 1.578),
    ("llama-2-7b", "MiniBatchPacking + PosID", 19958, 1455, 23854, 1.262),
    ("granite-8b-code", "padding", 19947, 693, 36277, 1.169),
    ("granite-8b-code", "FixedLengthPacking", None, None, None, 1.740),
    ("granite-8b-code", "offline packing + PosID", None, None, None, 1.767),
    ("granite-8b-code", "MiniBatchPacking + PosID", 19947, 1358, 27538, 1.169),
    ("falcon-7b", "padding", 19969, 890, 29894, 1.842),
    ("falcon-7b", "FixedLengthPacking", 2168, 3401, 30106, 2.585),
    ("falcon-7b", "offline packing + PosID", None, None, None, 2.415),
    ("phi-2", "FixedLengthPacking", None, None, None, 3.375),
    ("phi-2", "offline packing + PosID", None, None, None, 3.464),
]
# Mistral-7B on FLAN_20k, one epoch, batch 2, max_tokens 4096
_TABLE_4 = [  # batching, gradient accumulation, optimiser steps, validation loss
    ("padding", 32, 311, 1.117),
    ("FixedLengthPacking", 32, 35, 1.294),
    ("FixedLengthPacking + PosID", 32, 35, 1.221),
    ("FixedLengthPacking", 4, 281, 1.252),
    ("FixedLengthPacking + PosID", 4, 281, 1.170),
]
# MiniBatchPacking + PosID over padding, for Llama-2-7B, Mistral-7B and Granite-8B-code
_BLOG = [  # data set, throughput (ratio), peak memory (change)
    ("FLAN", 2.0, -0.20),
    ("OrcaMath", 1.4, -0.06),
]


def table_2() -> pd.DataFrame:
    """Table 2; empty cells are NaN.

    Columns `model, batching, strategy, rows, tokens_per_s, peak_memory_bytes, eval_loss_per_token, source`.
    """
    columns = ["model", "batching", "rows", "tokens_per_s", "peak_memory_mb", "eval_loss_per_token"]
    table = pd.DataFrame(_TABLE_2, columns=columns)
    table["peak_memory_bytes"] = table.pop("peak_memory_mb") * 1e6
    table["strategy"] = table["batching"].map(STRATEGY)
    table["source"] = [
        f"{SOURCE}, Table 2, {model}, {batching}" for model, batching in zip(table["model"], table["batching"])
    ]
    return table


def table_4() -> pd.DataFrame:
    """Table 4: `batching, strategy, gradient_accumulation, optimizer_steps, eval_loss_per_token, source`."""
    table = pd.DataFrame(
        _TABLE_4, columns=["batching", "gradient_accumulation", "optimizer_steps", "eval_loss_per_token"]
    )
    table["strategy"] = table["batching"].map(STRATEGY)
    table["source"] = f"{SOURCE}, Table 4"
    return table


def blog_ratios() -> pd.DataFrame:
    """The blog post's figures as ratios.

    Columns `corpus`, `speed_up` (about), `memory_change` (share of padding's peak), `source`.
    """
    return pd.DataFrame(_BLOG, columns=["corpus", "speed_up", "memory_change"]).assign(source="blog post, 2024-08-21")


def ratios_to_padding() -> pd.DataFrame:
    """Table 2 as ratios to padding within each model: `speed_up`, `memory_ratio`, `loss_difference`."""
    table = table_2()
    base = table[table["strategy"] == "padding"].set_index("model")
    known = table[table["model"].isin(base.index)].copy()
    of = base.loc[known["model"]]
    known["speed_up"] = known["tokens_per_s"].to_numpy() / of["tokens_per_s"].to_numpy()
    known["memory_ratio"] = known["peak_memory_bytes"].to_numpy() / of["peak_memory_bytes"].to_numpy()
    known["loss_difference"] = known["eval_loss_per_token"].to_numpy() - of["eval_loss_per_token"].to_numpy()
    return known
