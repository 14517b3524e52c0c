"""What a batch width costs SDPA the first time: padded batches have another one nearly every step.

PyTorch leaves the kernel of `scaled_dot_product_attention` to a preference. On Hopper that is cuDNN's, which is planned
for each shape on its own, on the host, forward and backward; its flash kernel takes any. A benchmark of one shape does
not see that, a run whose batches are padded to their longest example does.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from pandas.io.formats.style import Styler
from torch.nn.attention import SDPBackend, sdpa_kernel

from packlib.lab import records
from packlib.lab.studies import kernels
from packlib.lab.studies.kernels import Spec

BACKENDS = {"default": "PyTorch's choice", "flash": "held to flash"}
ARM = "new_width"
ROWS, WIDTHS = 4, (211, 307, 419, 523, 631, 743)  # examples in a batch, and tokens of the longest
NONE_WORKS = ("No available kernel", "No viable backend")  # what PyTorch says then
WARM_UP = 64  # tokens: a width whose time is that of loading libraries


def specs(shared: Spec) -> list[dict[str, Any]]:
    """Every backend on batches of ROWS examples and each of WIDTHS; shared: as for `kernels.specs`."""
    fields = {name: shared[name] for name in ("heads", "kv_heads", "head_dim", "device")}
    return [fields | {"arm": ARM, "backend": name, "rows": ROWS, "widths": [*WIDTHS]} for name in BACKENDS]


def sweep(folder: Path, specs: Sequence[Spec]) -> pd.DataFrame:
    """`kernels.sweep` of these specs."""
    return kernels.sweep(folder, specs, measure)


def measure(spec: Spec) -> dict[str, Any]:
    """Seconds of causal attention on [rows, width, heads, head_dim], forward and backward, at each width twice.

    `new_seconds` is the first time in this process, `again_seconds` the second. `chosen`: the kernel that computes;
    None, as all else, where the device has no flash kernel to be held to.
    """
    held = nullcontext() if spec["backend"] == "default" else sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    try:
        with held:
            for _ in range(2):
                chosen, _ = _attend(spec, WARM_UP)
            times = np.array([[_attend(spec, width)[1] for _ in range(2)] for width in spec["widths"]])
    except RuntimeError as error:
        if not any(said in str(error) for said in NONE_WORKS):
            raise
        return dict.fromkeys(("chosen", "new_seconds", "again_seconds"))
    new, again = times.T
    return {
        "chosen": chosen,
        "new_seconds": float(np.median(new)),
        "again_seconds": float(np.median(again)),
        "by_width": {"new_seconds": new.tolist(), "again_seconds": again.tolist()},
    }


def _attend(spec: Spec, width: int) -> tuple[str, float]:
    device, dtype = torch.device(spec["device"]), kernels.dtype_of(spec)
    q, k, v = (
        torch.randn(
            *(spec["rows"], spec[heads], width, spec["head_dim"]), device=device, dtype=dtype, requires_grad=True
        )
        for heads in ("heads", "kv_heads", "kv_heads")
    )
    grouped = spec["heads"] != spec["kv_heads"]
    started = kernels.now(device)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    out.backward(out.detach())
    seconds = kernels.now(device) - started
    return SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=grouped)).name, seconds


def published(folder: Path) -> pd.DataFrame:
    """The records of this study among those in `folder`, as `sweep` returns them."""
    found = records.read_records(folder)
    return records.as_table(record for record in found if record["spec"].get("arm") == ARM)


def shown(table: pd.DataFrame) -> Styler:
    """Backend by backend: the kernel that computes, and milliseconds of a width that is new, and of one that is not."""
    columns = {"metrics.new_seconds": "a new width (ms)", "metrics.again_seconds": "the same again (ms)"}
    found = table.assign(backend=table["backend"].map(BACKENDS), kernel=table["metrics.chosen"].map(_kernel))
    found[list(columns.values())] = 1e3 * found[list(columns)].astype(float)
    style = found[["backend", "kernel", *columns.values()]].style.hide()
    return style.format("{:.2f}", subset=[*columns.values()], na_rep="–")


def findings(table: pd.DataFrame) -> list[str]:
    """What a new width costs PyTorch's choice, and its flash kernel; nothing where both are the same."""
    if table.empty:
        return []
    by = table.set_index("backend")
    if by["metrics.chosen"].nunique() < len(BACKENDS):
        return []
    new, again = 1e3 * by["metrics.new_seconds"], 1e3 * by["metrics.again_seconds"]
    one = by.iloc[0]
    return [
        f"Padding through SDPA, {one['rows']} examples a batch on {one['device']}: a width that is new costs PyTorch's "
        f"choice, {_kernel(by.loc['default', 'metrics.chosen'])}, {new['default']:.0f} ms, and {again['default']:.1f} "
        f"ms again; held to flash {new['flash']:.1f} and {again['flash']:.1f} ms. Medians of {len(one['widths'])} "
        "widths, forward and backward."
    ]


def _kernel(chosen: Any) -> str:
    """PyTorch's name of a backend, as people write it; “none here” for a missing one."""
    names = {"CUDNN_ATTENTION": "cuDNN", "FLASH_ATTENTION": "flash", "EFFICIENT_ATTENTION": "memory-efficient"}
    return "none here" if pd.isna(chosen) else names.get(chosen, chosen.removesuffix("_ATTENTION").lower())
