"""One JSON file per run, written atomically and never overwritten; a folder of them loads as a DataFrame.

`papermill_runs/<run>/records/<run_id>.json` holds `run_id, status, error, spec, environment, plan, metrics, trace`.
Units are in the key or SI; a missing value is null, never 0. Figures and tables read records, so they can be redrawn on
a machine without a GPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packlib.atomic import atomic_write

if TYPE_CHECKING:  # a third of a second, which only tables need
    import pandas as pd

CONCURRENT = "PACKLIB_CONCURRENT_RUNS"
PACKAGES = ("torch", "transformers", "trl", "datasets", "accelerate", "flash-attn", "flash-attn-4")


def project_root() -> Path:
    """The checkout that holds notebooks/ and papermill_runs/; the working folder without one (an installed package)."""
    here = Path.cwd()
    for folder in (here, *here.parents, *Path(__file__).resolve().parents):
        if (folder / "notebooks").is_dir() and (folder / "papermill_runs").is_dir():
            return folder
    return here


def runs_folder() -> Path:
    """`papermill_runs/` of the checkout."""
    return project_root() / "papermill_runs"


def cache_folder() -> Path:
    """Folder for trained tokenizers, parsed corpora, weights: `$PACKLIB_CACHE`, or `~/.cache/packlib`."""
    return Path(os.environ.get("PACKLIB_CACHE") or Path.home() / ".cache" / "packlib")


def run_folder(run: str | Path, *, create: bool = True) -> Path:
    """`papermill_runs/<run>` for a bare name; any other path as it is. create: make it, with its `records/`."""
    folder = Path(run)
    if len(folder.parts) == 1:
        folder = runs_folder() / folder
    if create:
        (folder / "records").mkdir(parents=True, exist_ok=True)
    return folder


def run_id(spec: Mapping[str, Any]) -> str:
    """Twelve hex digits that name a spec: the same spec is the same run, so a sweep resumes where it stopped."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]


def run_id_on(spec_id: str, content: str) -> str:
    """Name of a spec's run on data of this content (a hash): `<spec_id>-<8 digits of the content>`."""
    return f"{spec_id}-{content[:8]}"


def write_json(path: Path, value: Mapping[str, Any], *, overwrite: bool = False) -> Path:
    """Write one JSON file so that a reader sees all of it or nothing. Raises `FileExistsError` unless `overwrite`."""
    with atomic_write(path, overwrite=overwrite) as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")
    return path


def write_record(folder: Path, record: Mapping[str, Any]) -> Path:
    """Write `record` as `<folder>/records/<run_id>.json`. Raises `FileExistsError` where that run has one already."""
    return write_json(folder / "records" / f"{record['run_id']}.json", record)


def unfinished(run_id: str, spec: Mapping[str, Any], status: str, reason: str) -> dict[str, Any]:
    """The record of a run without a result."""
    empty = {"plan": None, "metrics": None, "trace": None}
    head = {"run_id": run_id, "status": status, "error": reason, "spec": dict(spec)}
    return head | {"environment": environment()} | empty


def supersede(folder: Path, record: Mapping[str, Any]) -> None:
    """Move a record out of the way, into `superseded/`: its run is tried again, and nothing is overwritten."""
    old = folder / "records" / f"{record['run_id']}.json"
    kept = folder / "superseded" / f"{record['run_id']}-{time.time_ns()}.json"
    kept.parent.mkdir(exist_ok=True)
    old.replace(kept)


def read_record(folder: Path, identity: str) -> dict[str, Any] | None:
    """The record of one run, or None."""
    path = folder / "records" / f"{identity}.json"
    return json.loads(path.read_text()) if path.exists() else None


def find_record(folder: Path, spec_id: str, content: str | None) -> dict[str, Any] | None:
    """The record of a spec on data with this content; of None (they are not here) the newest on whatever data."""
    if content is not None:
        return read_record(folder, run_id_on(spec_id, content))
    found = [json.loads(path.read_text()) for path in (folder / "records").glob(f"{spec_id}-*.json")]
    return max(found, key=lambda record: record["environment"]["created"], default=None)


def had_device_alone(record: Mapping[str, Any]) -> bool:
    """Whether no other run shared the device, so that times mean something. Records that do not say had it alone."""
    return record["environment"].get("concurrent_runs", 1) == 1


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of a run folder, oldest first. Raises `ValueError` naming a file that is not a record."""
    records = []
    for path in sorted((folder / "records").glob("*.json")):
        try:
            record = json.loads(path.read_text())
            records.append((record["environment"]["created"], path.name, record))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path.name} is not a record: {error!r}") from None
    return [record for *_, record in sorted(records, key=lambda item: item[:2])]


def load_records(folder: Path | Iterable[Path]) -> pd.DataFrame:
    """`as_table` of the records of a run folder, or of several."""
    folders = [folder] if isinstance(folder, Path) else list(folder)
    return as_table(record for one in folders for record in read_records(one))


def as_table(found: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per run; traces are left out.

    Spec fields keep their names (`strategy`, `rig.recompute`), others are dotted (`plan.fill`). A run that says nothing
    of others had the device alone.
    """
    import pandas as pd

    rows = []
    for record in found:
        names = ("run_id", "status", "error", "environment", "plan", "metrics")
        rest: dict[str, Any] = {key: record.get(key) for key in names}
        rest["environment"] = {"concurrent_runs": 1} | rest["environment"]
        rows.append(_dotted(record["spec"]) | _dotted(rest))
    return pd.DataFrame(rows)


def _dotted(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dots between the keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _dotted(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return flat


def environment(data_sha256: str | None = None) -> dict[str, Any]:
    """What a number depends on besides its spec. The host's name is left out on purpose."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        **_git(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "driver": _driver() if cuda else None,
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "device_count": torch.cuda.device_count() if cuda else 0,
        "device_memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "threads": torch.get_num_threads(),
        "concurrent_runs": concurrent_runs(),
        "data_sha256": data_sha256,
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }


def concurrent_runs() -> int:
    """How many runs share the device (`$PACKLIB_CONCURRENT_RUNS`); above 1 their losses count, their times do not.

    Raises `ValueError` for what is no positive number.
    """
    text = os.environ.get(CONCURRENT, "1")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{CONCURRENT} = {text!r}; expected a number of at least 1")
    return int(text)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any]:
    """SHA and dirtiness of the checkout; of `$PACKLIB_GIT_SHA` (`…-dirty`) where code travels without a repository."""
    sha = os.environ.get("PACKLIB_GIT_SHA")
    if sha:
        return {"git_sha": sha.removesuffix("-dirty"), "dirty": sha.endswith("-dirty")}

    def git(*args: str) -> str | None:
        done = subprocess.run(["git", *args], cwd=project_root(), capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        sha, status = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except FileNotFoundError:
        sha, status = None, None
    return {"git_sha": sha, "dirty": None if status is None else bool(status)}


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (FileNotFoundError, subprocess.CalledProcessError, IndexError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"CPU ({name}, {os.cpu_count()} cores)"


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
