"""Records as measured runs leave them, without measuring."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from packlib.lab import records
from packlib.lab.data.corpora import content_sha256
from packlib.lab.runs.spec import RunSpec


def write(folder: Path, spec: RunSpec, *, status: str = "ok", **parts: Any) -> dict[str, Any]:
    """Write a record under the name that `experiment.find` looks for.

    parts: `metrics`, `plan`, `trace`, and what the environment has besides a date.
    """
    content = content_sha256(spec.corpus, spec.tokenizer) or "0" * 64  # data that are not here
    environment = {"created": "2026-01-01", "device": "GPU", "device_count": 1} | parts.pop("environment", {})
    made = {"run_id": records.run_id_on(spec.spec_id, content), "status": status, "error": None, "spec": asdict(spec)}
    made |= {"environment": environment, "plan": None, "metrics": None, "trace": None}
    made |= parts if status == "ok" else {"plan": parts.get("plan")}
    records.write_record(folder, made)
    return made
