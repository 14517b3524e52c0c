"""What a hybrid gains from packing: attention beside convolutions or linear attention, padded and flattened.

Mini-batches of the same examples in three arms. Flattened, a mixer either runs on one line a segment
(`isolate_mixers`), or takes the boundaries itself (`Rig.native_mixers`); both have to give the losses of padding.
Redrawn from records; `checks` is the proof of isolation in the same places, each beside what it is without the repair.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from packlib.attention import isolate_mixers, register_attention
from packlib.isolation import check_isolation
from packlib.lab import doubts, models, records, tables
from packlib.lab.records import had_device_alone
from packlib.lab.runs import experiment
from packlib.lab.runs.spec import Rig, RunSpec
from packlib.lab.small_models import draw_of_order_one
from packlib.lab.studies.isolation import SITUATIONS

PADDED, LINES, BOUNDARIES = "padded", "flattened, on lines", "flattened, with boundaries"
ARMS = {PADDED: ("padding", False), LINES: ("minibatch_packing", False), BOUNDARIES: ("minibatch_packing", True)}
HYBRIDS = {"lfm2-1.2b": 3, "qwen3.5-2b": 4}  # and the layers from the first to the first of attention
CORPORA = ("multitask_mistral_{split}.npz", "math_mistral_{split}.npz")
RIGS = {
    "eager layers": Rig(fused_loss=True),
    "compiled layers": Rig(fused_loss=True, compile="layers", lean=True),
    "checkpointing": Rig(fused_loss=True, recompute="all"),
}
BASE = RunSpec(
    dtype="bfloat16",
    batch_size=4,
    gradient_accumulation=2,
    max_tokens=4096,
    steps=15,
    warmup_steps=5,
    learning_rate=1e-5,
)
PLACE = ["model", "corpus", "rig"]


def arms(
    base: RunSpec = BASE,
    names: Iterable[str] = tuple(HYBRIDS),
    corpora: Sequence[str] = CORPORA,
    rigs: Iterable[str] = tuple(RIGS),
) -> list[tuple[str, str, RunSpec]]:
    """(rig, arm, its spec) of every model, corpus and rig, padding first. rigs: names in RIGS."""
    return [
        (rig, arm, replace(base, model=name, corpus=corpus, strategy=strategy, rig=_with(RIGS[rig], native)))
        for rig in rigs
        for name in names
        for corpus in corpora
        for arm, (strategy, native) in ARMS.items()
    ]


def _with(rig: Rig, native: bool) -> Rig:
    return replace(rig, native_mixers=native)


def table(specs: Iterable[tuple[str, str, RunSpec]], folder: Path) -> pd.DataFrame:
    """A row for each of these arms (`arms`) that has a record in `folder`; empty where none has.

    Columns `model, corpus, rig, arm, status, error`; `folder, run_id`, where the record is; `device`; `tokens_per_s`,
    real ones, `low, high` (20th and 80th percentile of steps), `speed_up` over padding in the same place; `waste`,
    slots a token; `mixer_slots`, those inside mixers; `mixers`, what was done to them; `host_seconds` of a step,
    `share` of the limit, `peak_memory_bytes`; `loss_difference`, relative, the largest over the steps, from padding's.
    What there is none of is NaN.
    """
    rows: list[dict[str, Any]] = []
    padded: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for rig, arm, spec in specs:
        record = experiment.find(spec, folder)
        if record is None or not had_device_alone(record):
            continue
        place = (spec.model, tables.short(spec.corpus), rig)
        row = {**dict(zip(PLACE, place)), "arm": arm, "status": record["status"], "error": record["error"]}
        row |= {"folder": str(folder), "run_id": record["run_id"]}
        rows.append(row)
        if record["status"] != "ok":
            continue
        if arm == PADDED:
            padded[place] = record
        rows[-1] |= _measured(record)
        if reference := padded.get(place):
            rate = reference["metrics"]["tokens_per_s"]["mean"]
            row |= {"speed_up": row["tokens_per_s"] / rate, "loss_difference": _apart(record, reference)}
    columns = [*PLACE, "arm", "status", "error", "folder", "run_id", "device", "tokens_per_s", "low", "high"]
    columns += ["speed_up", "waste"]
    columns += ["mixer_slots", "mixers", "host_seconds", "share", "peak_memory_bytes", "loss_difference"]
    return pd.DataFrame(rows, columns=columns)


def _measured(record: Mapping[str, Any]) -> dict[str, Any]:
    metrics, rate = record["metrics"], record["metrics"]["tokens_per_s"]
    waste = metrics["slots_per_step"] / metrics["tokens_per_step"]
    mixers = metrics.get("mixers") or {}
    return {
        "device": record["environment"]["device"],
        "tokens_per_s": rate["mean"],
        "low": rate["p20"],
        "high": rate["p80"],
        "waste": waste,
        "mixer_slots": mixers.get("slots_per_token", waste),
        "mixers": _told(mixers),
        "host_seconds": metrics["host_seconds"],
        "share": metrics["limit"]["share"],
        "peak_memory_bytes": metrics["peak_memory_bytes"] or math.nan,
    }


def _told(mixers: Mapping[str, Any]) -> str:
    """What was done to the mixers, in words; nothing of a padded run."""
    ways = {"on lines": mixers.get("on_lines", {}), "with boundaries": mixers.get("with_boundaries", {})}
    return ", ".join(f"{count} {kind} {way}" for way, kinds in ways.items() for kind, count in kinds.items())


def _apart(record: Mapping[str, Any], reference: Mapping[str, Any]) -> float:
    ours, theirs = (np.array(each["trace"]["loss"], dtype=float) for each in (record, reference))
    return float(np.abs(ours / theirs - 1).max()) if len(ours) == len(theirs) > 0 else math.nan


def published(run: str, base: RunSpec = BASE) -> pd.DataFrame:
    """`table` of the arms that run folder `run`, a name under papermill_runs/ or a path, has records of."""
    folder = records.run_folder(run, create=False)
    return table(arms(base), folder) if (folder / "records").exists() else table([], folder)


def display_table(table: pd.DataFrame) -> pd.DataFrame:
    """`table` for readers."""
    return pd.DataFrame(
        {
            **{name: table[name] for name in (*PLACE, "arm")},
            "real tokens/s": tables.formatted(table["tokens_per_s"], "{:,.0f}"),
            "× padding": tables.formatted(table["speed_up"], "{:.2f}"),
            "slots a token": tables.formatted(table["waste"], "{:.2f}"),
            "inside mixers": tables.formatted(table["mixer_slots"], "{:.2f}"),
            "host (ms)": tables.formatted(table["host_seconds"] * 1e3, "{:,.0f}"),
            "of the limit": tables.formatted(table["share"], "{:.0%}"),
            "peak memory (GB)": tables.formatted(table["peak_memory_bytes"] / 1e9, "{:.2f}"),
            "loss differs by": tables.formatted(table["loss_difference"], "{:.1e}"),
            "mixers": table["mixers"].fillna(table["status"]),
        }
    )


def findings(table: pd.DataFrame, checked: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """Sentences about these rows of `table` and these checks (`checks`), every number computed; none about none.

    They rank nothing, so that what is said against the rows' own settings, and of their folder's others, stands beside.
    """
    said: list[str] = []
    done = table[table["status"] == "ok"]
    for place, rows in done.groupby(PLACE, sort=False):
        by_arm = rows.set_index("arm")
        if PADDED not in by_arm.index or len(by_arm) == 1:
            continue
        others = by_arm.drop(index=PADDED)
        gains = ", ".join(f"{arm} {row.speed_up:.2f} ×" for arm, row in others.iterrows())
        said.append(
            f"{place[0]} on {place[1]}, {place[2]}: {gains} the {by_arm.tokens_per_s[PADDED]:,.0f} real tokens/s of "
            f"padding, which has {by_arm.waste[PADDED]:.2f} slots a token; losses within "
            f"{others.loss_difference.max():.1e} of padding's."
        )
    failed = table[table["status"] != "ok"]
    said += [f"{r.model} on {r.corpus}, {r.rig}, {r.arm}: {r.status}." for r in failed.itertuples()]
    for folder, rows in done.groupby("folder", sort=False):
        said += doubts.of_folder(Path(str(folder)), rows["run_id"])
    for check in checked:
        where = f"{check['model']}, {check['layers']} layers in {check['dtype']} on {check['device']}, {check['arm']}"
        verdict = "isolated" if check["isolated"] else f"NOT isolated ({check['verdict']})"
        verdict = check["reason"] if check["verdict"] == "refused" else f"{verdict}; without it: {check['without']}"
        said.append(f"{where}: {verdict}.")
    return said


def check(name: str, *, native: bool, dtype: torch.dtype, device: torch.device, layers: int = 0) -> dict[str, Any]:
    """`check_isolation` of the first layers of a hybrid as an arm has it, and of the same without `isolate_mixers`.

    layers: 0 for those up to the first of attention. `without` is the verdict of the model on transformers' own sdpa,
    which gets position ids alone: its attention is right then. `moved`: how far an edit moves another example's logits.
    Where a package refuses this device, the verdict is `refused`, with its reason.
    """
    depth = layers or HYBRIDS[name]
    model = models.build_model(name, attn_implementation="sdpa", dtype=dtype, device=device, layers=depth)
    draw_of_order_one(model)  # else what leaks is lost in the noise of logits that hardly depend on the tokens
    place = {"model": name, "layers": depth, "arm": BOUNDARIES if native else LINES}
    place |= {"dtype": str(dtype).removeprefix("torch.")}
    place |= {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type}
    try:
        without = check_isolation(model, batch_builder=SITUATIONS["position ids alone"])
        model.set_attn_implementation(register_attention("auto" if device.type == "cuda" else "sdpa"))
        lines = isolate_mixers(model, native=native)
        report = check_isolation(model)
    except RuntimeError as refusal:  # a package that does not compute on this device says so in backward
        reason = str(refusal).splitlines()[0]
        return place | {"verdict": "refused", "isolated": False, "reason": reason, "without": "refused"}
    others = [x for i, row in enumerate(report.influence) for j, x in enumerate(row) if i != j]
    return place | {
        "on_lines": sorted(set(lines.values())),
        "verdict": report.verdict,
        "isolated": report.isolated,
        "moved": max(others, default=0.0),
        "error": report.error,
        "noise": report.noise,
        "reason": report.reason,
        "without": without.verdict,
    }


def checks_path() -> Path:
    """Where the published checks lie, a list of what `check` returns."""
    return records.runs_folder() / "isolation" / "hybrids.json"


def published_checks() -> list[dict[str, Any]]:
    """What was checked where the published records come from; nothing where nothing was."""
    path = checks_path()
    return records.read_json(path)["checks"] if path.exists() else []
