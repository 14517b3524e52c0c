"""Whether an executed notebook would come out the same again: then `reproduce` leaves it as it is.

Its fingerprint is of all that it depends on: its source and parameters, the package and whatever else is installed,
the device, the files and runs that parameters name, and the records of its run. A notebook reads what it and those
before it in the preset have measured; what later ones measured in the same folder is none of its business.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from packlib.lab import records
from packlib.lab.data.corpora import located

WRITTEN = {"summaries", "logs", "specs", "superseded", "figures"}  # folders of a run that no notebook reads


class Freshness:
    """What is known of the executed notebooks of a run folder: `logs/fingerprints.json`.

    order: the preset's notebooks.
    """

    def __init__(self, folder: Path, order: Iterable[str]) -> None:
        self.folder, self.order, self.path = folder, list(order), folder / "logs" / "fingerprints.json"
        self.known: dict[str, Any] = records.read_json(self.path) if self.path.exists() else {}

    def is_fresh(self, notebook: Path, parameters: Mapping[str, Any]) -> bool:
        """Whether its output is here and would be the same again; never while a run in the folder has failed."""
        outputs = (self.folder / notebook.name, self.folder / "summaries" / f"{notebook.stem}.json")
        if not all(path.exists() for path in outputs) or self._has_failed():
            return False
        return self.known.get(notebook.stem, {}).get("fingerprint") == self._fingerprint(notebook, parameters)

    def measured(self) -> set[str]:
        """Names of the files that notebooks of this run have measured."""
        return set(_measured(self.folder))

    def keep(self, notebook: Path, parameters: Mapping[str, Any], before: set[str], *, ended: bool) -> None:
        """Remember what a notebook has measured since `before`, and, where it ended well, its fingerprint."""
        old = self.known.get(notebook.stem, {}).get("made", [])
        made = sorted({*old, *(self.measured() - before)})
        self.known[notebook.stem] = {"made": made}
        if ended:
            self.known[notebook.stem]["fingerprint"] = self._fingerprint(notebook, parameters)
        records.write_json(self.path, self.known, overwrite=True)

    def _fingerprint(self, notebook: Path, parameters: Mapping[str, Any]) -> str:
        place = self.order.index(notebook.stem)
        later = {name for other in self.order[place + 1 :] for name in self.known.get(other, {}).get("made", [])}
        digest = hashlib.sha256(_everywhere().encode())
        digest.update(notebook.read_bytes() + json.dumps(parameters, sort_keys=True).encode())
        for name, path in sorted(_measured(self.folder).items()):
            if name not in later:
                digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
        for path in sorted(_named(parameters, self.folder)):
            state = path.stat()
            digest.update(f"{path} {state.st_size} {state.st_mtime_ns}".encode())
        return digest.hexdigest()

    def _has_failed(self) -> bool:
        return any(record["status"] == "failed" for record in records.read_records(self.folder))


def _measured(folder: Path) -> dict[str, Path]:
    """Every JSON file of a run's folder that a notebook may read, by its name there."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*.json")}
    return {name: path for name, path in found.items() if Path(name).parts[0] not in WRITTEN}


def _named(parameters: Any, folder: Path) -> Iterator[Path]:
    """Files that strings among the parameters name: data, models, records of other runs; and the isolation matrix."""
    yield from (records.runs_folder() / "isolation").glob("*.json")
    for text in _strings(parameters):
        path = Path(located(text))
        if path.name:
            yield from (p for p in _glob(path.parent, path.name.replace("{split}", "*")) if p.is_file())
        if path.name and not path.is_absolute() and ".." not in path.parts:
            runs = (run for run in _glob(records.runs_folder(), text) if run.resolve() != folder.resolve())
            yield from (p for run in runs for p in run.glob("records/*.json"))


def _glob(folder: Path, pattern: str) -> list[Path]:
    """Paths in a folder that match; none for what is no pattern at all."""
    try:
        return list(folder.glob(pattern))
    except (ValueError, OSError):
        return []


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


@functools.cache
def _everywhere() -> str:
    """What every notebook depends on: this package's source, what is installed, the device."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[2]
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    installed = sorted(f"{found.metadata['Name']} {found.version}" for found in distributions())
    place = [platform.python_version(), platform.machine(), *map(str, sorted(Path("/dev").glob("nvidia[0-9]*")))]
    digest.update(json.dumps([installed, place]).encode())
    return digest.hexdigest()
