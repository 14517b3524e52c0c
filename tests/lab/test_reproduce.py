"""Presets run through papermill in a project of their own: small notebooks that end well, end early, or die."""

import json
import os
import time
from pathlib import Path

import nbformat
import pytest
import yaml

from packlib.lab import experiment, records, reproduce
from tests.lab.test_tables import lost, row

PARAMETERS = 'run = "x"  # folder\nseed = 1\nrate: float = 0.5'
ENDS = """
import json, os, pathlib
folder = pathlib.Path(run, "summaries")
folder.mkdir(exist_ok=True)
found = {"title": "Title", "findings": [f"seed {seed}", os.environ.get("PACKLIB_UNTIL", "no limit")]}
found["figures"] = {"kept": "alt text", "gone": "x"}
(folder / "NAME.json").write_text(json.dumps(found))
print(run, pathlib.Path.cwd(), pathlib.Path.home())
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A checkout with notebooks and a preset, in which the code believes to be."""
    root = tmp_path / "clone"
    (root / "notebooks").mkdir(parents=True)
    (root / "papermill_runs" / "presets").mkdir(parents=True)
    monkeypatch.setattr(records, "project_root", lambda: root)
    return root


def write_notebook(project: Path, name: str, *sources: str, tags: int = 1) -> Path:
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}) for _ in range(tags)]
    cells += [nbformat.v4.new_code_cell(source.replace("NAME", name)) for source in sources]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = project / "notebooks" / f"{name}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


def write_preset(project: Path, notebooks: dict) -> None:
    text = yaml.safe_dump({"description": "made up", "notebooks": notebooks})
    (project / "papermill_runs" / "presets" / "mini.yaml").write_text(text, encoding="utf-8")


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_preset_runs_its_notebooks_and_reports(project, monkeypatch):
    for name in ("01_first", "02_second"):
        write_notebook(project, name, ENDS)
    write_preset(project, {"01_first": {"seed": 5}, "02_second": None})
    folder = project / "papermill_runs" / "mini"
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "kept.png").write_bytes(b"")
    monkeypatch.delenv(experiment.UNTIL, raising=False)

    assert reproduce.reproduce("mini", only=["01"], minutes=2) == folder
    first = records.read_json(folder / "summaries" / "01_first.json")
    assert first["findings"][0] == "seed 5" and float(first["findings"][1]) == pytest.approx(time.time() + 120, abs=60)
    assert experiment.UNTIL not in os.environ, "the next call has all the time it wants"
    assert written(folder) == ["01_first.ipynb", "figures/kept.png", "report.md", "summaries/01_first.json"]

    reproduce.reproduce("mini", only=["02_second"])
    assert records.read_json(folder / "summaries" / "02_second.json")["findings"] == ["seed 1", "no limit"]
    parts = [
        "# Padding versus packing: run `mini`",
        f"## [Title](01_first.ipynb)\n\n- seed 5\n- {first['findings'][1]}",
        "![alt text](figures/kept.png)",
        "## [Title](02_second.ipynb)\n\n- seed 1\n- no limit",
        "![alt text](figures/kept.png)\n",
    ]
    assert (folder / "report.md").read_text(encoding="utf-8") == "\n\n".join(parts)
    executed = (folder / "01_first.ipynb").read_text(encoding="utf-8")
    assert (
        "mini ./notebooks ~" in executed.replace("\\n", "")
        and str(project) not in executed
        and str(Path.home()) + '"' not in executed
    )
    notebook = nbformat.reads(executed, 4)
    assert "papermill" not in notebook.metadata and all("papermill" not in c.metadata for c in notebook.cells)
    assert [c.metadata.get("tags") for c in notebook.cells][:2] == [
        ["parameters"],
        ["injected-parameters"],
    ] and notebook.cells[-1].outputs


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["import sys\nsys.exit(0)", ENDS], r"^01_x\.ipynb.*ended without writing 01_x\.json"),
        (["seed + missing", ENDS], r"^01_x\.ipynb, cell \d: NameError: name 'missing' is not defined; see .*running"),
        (["import os\nos._exit(0)", ENDS], r"^01_x\.ipynb: Kernel died, killed or out of memory; see .*running"),
        (["seed"], r"^01_x\.ipynb ended without writing 01_x\.json; see .*running"),
    ],
    ids=["sys.exit", "error", "killed", "no last cell"],
)
def test_a_notebook_that_did_not_reach_its_end_has_failed(project, tmp_path, cells, message):
    folder = records.run_folder(tmp_path / "run")
    records.write_json(folder / "summaries" / "01_x.json", {"title": "of an earlier run"})
    with pytest.raises(reproduce.NotebookFailed, match=message):
        reproduce.execute(write_notebook(project, "01_x", *cells), folder, {})
    assert written(folder) == ["01_x.running.ipynb", "summaries/01_x.json"], (
        "what did not finish does not look finished"
    )
    assert "injected-parameters" in (folder / "01_x.running.ipynb").read_text(encoding="utf-8"), (
        "it shows how far it came"
    )


def test_a_piece_ends_well_where_arms_are_left(project, caplog):
    """What has a record is kept, the notebook is not taken for done, and what would follow waits for the next call."""
    left = "from packlib.lab.experiment import OutOfTime\nraise OutOfTime('2 of 3 arms are left for the next call')"
    write_notebook(project, "01_first", left, ENDS)
    write_notebook(project, "02_second", ENDS)
    write_preset(project, {"01_first": None, "02_second": None})
    with caplog.at_level("INFO", logger="packlib"):
        folder = reproduce.reproduce("mini", minutes=1)
    assert "01_first.ipynb: 2 of 3 arms are left for the next call; call again to go on" in caplog.text
    assert written(folder) == ["report.md"] and experiment.UNTIL not in os.environ


def test_names_are_checked_before_anything_runs(project):
    write_notebook(project, "01_first", ENDS)
    write_notebook(project, "02_second", ENDS)
    assert reproduce.declared_parameters(project / "notebooks" / "01_first.ipynb") == {
        "run": "x",
        "seed": 1,
        "rate": 0.5,
    }
    write_preset(project, {"01_first": {"seed": 1}})
    with pytest.raises(ValueError, match=r"unknown preset 'mimi' \(did you mean 'mini'\?\); known: mini$"):
        reproduce.reproduce("mimi")
    for only in ("02", "1", "0"):
        with pytest.raises(ValueError, match=rf"unknown notebook '{only}'.*; known: 01_first$"):
            reproduce.reproduce("mini", only=["01", only])
    assert not (project / "papermill_runs" / "mini").exists()


def test_types_are_checked_before_anything_runs(project):
    """`1e-4` without a point is a string in YAML."""
    write_notebook(project, "01_first", ENDS)
    write_preset(project, {"01_first": {"rate": "1e-4"}})
    with pytest.raises(TypeError, match=r"preset mini, 01_first: parameter rate = '1e-4' is a str; expected float"):
        reproduce.reproduce("mini")
    write_preset(project, {"01_first": {"rate": 1, "seed": 2}})
    assert reproduce.load_preset("mini")["notebooks"] == {"01_first": {"rate": 1, "seed": 2}}


@pytest.mark.parametrize("tags", [0, 2])
def test_one_cell_is_tagged(project, tags):
    path = write_notebook(project, "01_x", tags=tags)
    with pytest.raises(ValueError, match=rf"01_x\.ipynb has {tags} cells tagged 'parameters'; expected 1"):
        reproduce.declared_parameters(path)


# what is published


@pytest.mark.parametrize("home", ["/root", "/"])
def test_machine_paths_and_widgets_are_taken_out(project, tmp_path, monkeypatch, home):
    folder = project / "papermill_runs" / "mini"
    link = tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    monkeypatch.setenv("HOME", home)
    opened = [f"open('{place}/x')" for place in (link, folder, project, home.rstrip("/"))]
    path = write_notebook(project, "01_x", *opened, "1 / 2")
    notebook = nbformat.read(path, 4)
    notebook.metadata |= {"widgets": {"state": {}}, "papermill": {"output_path": "x"}}
    notebook.cells[-1].metadata |= {"papermill": {"duration": 1}, "execution": {"start": 1}, "tags": ["kept"]}
    nbformat.write(notebook, path)
    reproduce._publishable(path, link)
    published = nbformat.read(path, 4)
    shown = ["link", "link", ".", "~" if home != "/" else ""]
    assert [c.source for c in published.cells[1:]] == [*(f"open('{place}/x')" for place in shown), "1 / 2"]
    assert set(published.metadata) == {"kernelspec"} and published.cells[-1].metadata == {"tags": ["kept"]}


# the report


def record(identity: str, found: dict, created: str = "2026-01-01") -> dict:
    """A record of the line that `load_records` would give."""
    nested = {"metrics": {}, "plan": {}}
    for name, value in found.items():
        if "." in name:
            *parents, last = name.split(".")
            place = nested
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value
    spec = {name: value for name, value in found.items() if "." not in name and name != "status"}
    environment = {"created": created, "device": "CPU", "torch": "2", "transformers": "5"}
    head = {"run_id": identity, "status": found["status"], "error": None, "spec": spec, "environment": environment}
    measured = nested if found["status"] == "ok" else {"metrics": None, "plan": None}
    return head | measured | {"trace": None}


def test_the_headline_compares_one_setting(tmp_path):
    folder = records.run_folder(tmp_path)
    curve = [row(rate=50, batch_size=1), row("minibatch_packing", 60, batch_size=1)]
    table_2 = [row(), row("minibatch_packing", 190, 1.0), lost("multipack_posid")]
    for i, found in enumerate([*curve, *table_2, row("multipack_posid", 9e9, steps=3)]):
        records.write_record(folder, record(f"r{i}", found))
    shared = record("shared", row("fixed_length_packing", 1.0))
    records.write_record(folder, shared | {"environment": shared["environment"] | {"concurrent_runs": 2}})
    lines = reproduce.write_report(folder).read_text(encoding="utf-8").splitlines()
    assert lines[2] == "7 measured runs on: CPU, torch 2, transformers 5."
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    shown = {cells[2]: dict(zip(table[0], cells)) for cells in table[2:]}
    assert list(shown) == ["Padding", "MiniBatchPacking + PosID", "Multipack + PosID"]
    assert [arm["× padding"] for arm in shown.values()] == ["1.00", "1.90", ""]
    assert [arm["status"] for arm in shown.values()] == ["ok", "ok", "oom"]


def test_a_folder_without_training_runs_has_a_report(tmp_path):
    """As after `reproduce --only 05`: attention alone was timed."""
    folder = records.run_folder(tmp_path)
    assert reproduce.headline(folder) == ""
    assert reproduce.write_report(folder).read_text(encoding="utf-8").startswith("# Padding versus packing: run")
    timing = record("t0", {"status": "ok", "arm": "varlen", "tokens": 64, "metrics.waste": 1.5})
    records.write_record(folder, timing)
    assert reproduce.headline(folder) == "" and "1 measured runs on: CPU" in reproduce.write_report(folder).read_text(
        encoding="utf-8"
    )
    records.write_record(folder, record("r0", row()))
    assert reproduce.headline(folder).count("\n") == 2, "a line for training, none for timing"
    assert json.loads((folder / "records" / "t0.json").read_text(encoding="utf-8")) == timing
