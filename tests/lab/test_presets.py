"""Presets as files: what a reader is told of them, and what is no preset."""

import pytest
import yaml

from packlib.lab import presets, records


def test_presets_are_listed_and_read(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "project_root", lambda: tmp_path)
    folder = tmp_path / "papermill_runs" / "presets"
    folder.mkdir(parents=True)
    timed = {"description": "made up", "hardware": "a machine", "minutes": 2, "notebooks": {"01_first": None}}
    untimed = {key: value for key, value in timed.items() if key != "minutes"}
    for name, preset in {"long_name": timed, "a": untimed}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(preset), encoding="utf-8")
    assert presets.listing().split("\n\n") == [
        "a          a machine; not timed yet; notebooks 01\n           made up",
        "long_name  a machine; about 2 minutes; notebooks 01\n           made up",
    ]
    assert presets.read_preset("a") == untimed
    with pytest.raises(ValueError, match=r"^unknown preset 'c'; known: a, long_name$"):
        presets.read_preset("c")
