"""Presets of batch runs, as files: `papermill_runs/presets/<name>.yaml`. Reading them imports nothing that runs them.

A preset has a `description` (what it is for), `hardware`, `minutes` (about how many it takes there, where that is
known), and `notebooks`, mapping a notebook to its parameters, or to the name of the preset that it shares them with.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import yaml

from packlib.lab import records
from packlib.lab.parameters import unknown_name

WIDTH = 100  # columns of a listing


def presets() -> dict[str, Path]:
    """Names of the presets and their files."""
    return {path.stem: path for path in sorted((records.runs_folder() / "presets").glob("*.yaml"))}


def read_preset(name: str) -> dict[str, Any]:
    """A preset as its file has it. Raises `ValueError` for an unknown one, listing the known ones."""
    known = presets()
    if name not in known:
        raise unknown_name("preset", name, known)
    read: dict[str, Any] = yaml.safe_load(known[name].read_text(encoding="utf-8"))
    return read


def listing() -> str:
    """The presets: what for, on what, how long, and which notebooks."""
    told, indent = [], max(map(len, presets())) + 2
    for name in presets():
        preset = read_preset(name)
        numbers = " ".join(notebook[:2] for notebook in preset["notebooks"])
        minutes = f"about {preset['minutes']:g} minutes" if "minutes" in preset else "not timed yet"
        facts = f"{preset['hardware']}; {minutes}; notebooks {numbers}"
        text = textwrap.wrap(preset["description"].strip(), WIDTH - indent)
        told.append("\n".join([f"{name:{indent}}{facts}", *(f"{'':{indent}}{line}" for line in text)]))
    return "\n\n".join(told)
