"""What is published of a run is what its notebooks say of the records that are here now.

A notebook may read records that another one measured (07 dates losses by the steps of 06): measured anew, these change
what it says, and nothing else would notice.
"""

import json
import shutil

import pytest

from packlib.lab import presets, records
from packlib.lab.pages import reproduce

RUNS = records.runs_folder()
ON_A_GPU = [
    run for run in presets.presets() if "GPU" in presets.read_preset(run)["hardware"]
]  # others lie here locally
PUBLISHED = sorted(path.relative_to(RUNS) for run in ON_A_GPU for path in (RUNS / run).glob("summaries/*.json"))
NOTEBOOKS = {path.stem: path for path in reproduce.notebooks()}


def copied(run, tmp_path):
    """A run folder like the published one, without what its notebooks make; of the same name, which they tell."""
    made = shutil.ignore_patterns("*.ipynb", "figures", "summaries", "logs")
    return records.run_folder(shutil.copytree(RUNS / run, tmp_path / run, ignore=made))


def drawn(run, stem, folder, monkeypatch):
    """The summary of a notebook that is executed on the records of `folder` alone."""
    monkeypatch.delenv("PACKLIB_DATA", raising=False)
    reproduce.execute(NOTEBOOKS[stem], folder, reproduce.load_preset(run)["notebooks"][stem] or {})
    return records.read_json(folder / "summaries" / f"{stem}.json")


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: f"{path.parts[0]}-{path.stem[:2]}")
def test_a_published_notebook_says_what_the_records_say(path, tmp_path, monkeypatch):
    run, stem = path.parts[0], path.stem
    assert drawn(run, stem, copied(run, tmp_path), monkeypatch) == records.read_json(RUNS / path)


def test_other_records_are_noticed(tmp_path, monkeypatch):
    run, stem = "h200_models", "06_measure_throughput_and_memory"
    folder = copied(run, tmp_path)
    for path in (folder / "records").glob("*.json"):
        record = records.read_json(path)
        if record["spec"]["strategy"] == "minibatch_packing" and record["metrics"]:
            record["metrics"]["tokens_per_s"]["mean"] *= 2
            path.write_text(json.dumps(record), encoding="utf-8")
    assert drawn(run, stem, folder, monkeypatch) != records.read_json(RUNS / run / "summaries" / f"{stem}.json")
