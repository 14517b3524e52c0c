"""Notebook 08: from padding on a plain trainer up to the device's limit, one change a rung.

A rung says beforehand what it should do to the two times of which the longer one is a step's: that of the host, which
launches, and that of the device, which computes. The factors are guesses from counting (LOG.md), made before anything
was measured; where a step comes out elsewhere, there is something to learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from packlib.lab.parameters import unknown_name
from packlib.lab.spec import RunSpec

MINI_BATCHES, FULL_ROWS = "mini-batches", "full rows"


@dataclass(frozen=True)
class Rung:
    """One change.

    Args:
        name: of the rung, as figures show it. change: what is different from the rung below, and why it should help.
        fields: of `RunSpec`, that change; `rig`'s are added to those of the rungs below.
        host, device: predicted factors on the time of the host and of the device; device None: what padding wastes.
        gpu: whether it needs one.
        beside: not a rung to climb on but a run to compare with; the next rung goes on from the one below it.
    """

    name: str
    change: str
    fields: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    host: float = 1.0
    device: float | None = 1.0
    gpu: bool = False
    beside: bool = False


CLIMBS: dict[str, tuple[Rung, ...]] = {
    MINI_BATCHES: (
        Rung(
            "padded, SDPA",
            "padded mini-batches, PyTorch's attention, every layer's activations computed again in backward",
            {"strategy": "padding", "kernel": "maskless_sdpa", "rig": {"recompute": "all"}},
        ),
        Rung(
            "padded, varlen attention",
            "the same batches, unpadded inside attention: the kernel that packing uses",
            {"kernel": "auto"},
        ),
        Rung(
            "flattened",
            "no pads anywhere: MiniBatchPacking + PosID, the same examples in every step",
            {"strategy": "minibatch_packing"},
            host=0.9,
            device=None,
        ),
        Rung(
            "TRL padding_free",
            "the peer: what TRL itself makes of the same mini-batches",
            {"strategy": "trl_padding_free"},
            beside=True,
        ),
        Rung(
            "fused loss",
            "head and loss in one, without the metrics that wait for the device three times a micro-batch",
            {"rig": {"fused_loss": True}},
            host=0.9,
            device=0.95,
        ),
        Rung(
            "compiled layers",
            "the many small kernels of a layer become few, so there is less to launch and less to read and write",
            {"rig": {"compile": "layers"}},
            host=0.4,
            device=0.85,
        ),
        Rung(
            "less recomputation",
            "small batches leave memory for activations, so that there is less forward inside backward, or none",
            {"rig": {"recompute": "keep"}},
            host=0.7,
            device=0.75,
        ),
        Rung(
            "CUDA graphs",
            "a micro-batch is one launch; rows are padded to multiples of 128 so that few shapes are captured",
            {"rig": {"graphs": True, "pad_to": 128}},
            host=0.05,
            device=1.05,
            gpu=True,
        ),
        Rung(
            "lean optimiser",
            "clipping, AdamW and zeroing in one pass over memory instead of four",
            {"rig": {"lean": True}},
            device=0.85,
            gpu=True,
        ),
        Rung(
            "padded, same rig",
            "padding on the best rig: what packing is worth where the host does not decide",
            {"strategy": "padding", "kernel": "maskless_sdpa", "rig": {"pad_to": 64}},
            gpu=True,
            beside=True,
        ),
        Rung(
            "merged micro-batches",
            "flat rows have no pads to grow, so the micro-batches of a step can be one: weights are read once",
            {"merged": True},
            host=0.5,
            device=0.85,
        ),
    ),
    FULL_ROWS: (
        Rung(
            "TRL packing (bfd)",
            "the peer: TRL's own full rows, activations computed again in backward",
            {"strategy": "trl_packing_bfd", "rig": {"recompute": "all"}},
            beside=True,
        ),
        Rung(
            "full rows",
            "Multipack + PosID: whole examples in rows of a full batch's capacity",
            {"strategy": "multipack_posid", "rig": {"recompute": "all"}},
        ),
        Rung(
            "fused loss",
            "head and loss in one, without the metrics that wait for the device",
            {"rig": {"fused_loss": True}},
            device=0.95,
        ),
        Rung(
            "compiled layers",
            "rows padded to one shape, compiled once for it: fewer passes over memory between the products",
            {"rig": {"compile": "layers", "pad_to": "row"}},
            host=0.4,
            device=0.85,
        ),
        Rung(
            "less recomputation",
            "the compiler keeps what is dear to compute and cheap to keep, within a budget of the memory",
            {"rig": {"recompute": "keep"}},
            device=0.9,
        ),
        Rung(
            "lean optimiser",
            "clipping and AdamW in one pass over memory",
            {"rig": {"lean": True}},
            device=0.98,
            gpu=True,
        ),
        Rung(
            "float8",
            "matrix products of the layers in half the width, at twice the rate on paper",
            {"rig": {"float8": True}},
            device=0.75,
            gpu=True,
        ),
    ),
}


@dataclass(frozen=True)
class Arm:
    """A rung of a climb on a corpus, and the run that measures it."""

    climb: str
    rung: Rung
    spec: RunSpec


def arms(
    base: RunSpec, climb: str, rungs: Sequence[str] = (), *, keep: str | float = 0.2, gpu: bool = True
) -> list[Arm]:
    """The arms of a climb, from the bottom up; runs beside it stand where they belong.

    Args:
        base: model, corpus, sizes, steps; its rig is what all rungs have besides their own (adapters, say).
        rungs: names of those to run; empty: all. What a rung changes stays for the rungs above it, run or not.
        keep: `recompute` from the rung of less recomputation on: what the memory allows.
        gpu: whether there is one; without, rungs that need it are left out.

    Raises `ValueError` for an unknown climb or rung, listing the known ones.
    """
    if climb not in CLIMBS:
        raise unknown_name("climb", climb, CLIMBS)
    known = [rung.name for rung in CLIMBS[climb]]
    for name in rungs:
        if name not in known:
            raise unknown_name(f"rung of {climb}", name, known)
    found, here = [], base
    for rung in CLIMBS[climb]:
        spec = _changed(here, rung.fields, keep)
        if not rung.beside:
            here = spec if gpu or not rung.gpu else here
        if (not rungs or rung.name in rungs) and (gpu or not rung.gpu):
            found.append(Arm(climb, rung, spec))
    return found


def _changed(spec: RunSpec, fields: Mapping[str, Any], keep: str | float) -> RunSpec:
    """The spec with a rung's fields; `merged` makes one micro-batch of a step's, `pad_to: row` is a row's capacity."""
    plain = {name: value for name, value in fields.items() if name not in ("rig", "merged")}
    rig = dict(fields.get("rig", {}))
    if rig.get("pad_to") == "row":
        rig["pad_to"] = spec.batch_size * spec.max_tokens
    if rig.get("recompute") == "keep":
        rig["recompute"] = keep
    if fields.get("merged"):
        plain |= {"batch_size": spec.batch_size * spec.gradient_accumulation, "gradient_accumulation": 1}
    return replace(spec, rig=replace(spec.rig, **rig), **plain)
