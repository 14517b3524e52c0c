"""Presets run through papermill in a project of their own: small notebooks that end well, end early, or die."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml

from packlib.lab import records
from packlib.lab.pages import freshness, report, reproduce
from packlib.lab.pages.freshness import Freshness
from packlib.lab.runs import experiment

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


def write_preset(project: Path, notebooks: dict, **facts: object) -> None:
    text = yaml.safe_dump({"description": "made up", "notebooks": notebooks} | facts)
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
    logs = ["logs/01_first.log", "logs/fingerprints.json"]
    assert written(folder) == ["01_first.ipynb", "figures/kept.png", *logs, "report.md", "summaries/01_first.json"]
    assert "\nmini " in (folder / "logs" / "01_first.log").read_text(encoding="utf-8").replace(str(folder), "mini")

    reproduce.reproduce("mini", only=["02_second"])
    assert records.read_json(folder / "summaries" / "02_second.json")["findings"] == ["seed 1", "no limit"]
    parts = [
        "# Padding versus packing: run `mini`",
        f"**Question.** {report.QUESTION}",
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
    assert written(folder) == ["01_x.running.ipynb", "logs/01_x.log", "summaries/01_x.json"], (
        "what did not finish does not look finished"
    )
    assert "injected-parameters" in (folder / "01_x.running.ipynb").read_text(encoding="utf-8"), (
        "it shows how far it came"
    )


def test_a_piece_ends_well_where_arms_are_left(project, capsys):
    """What has a record is kept, the notebook is not taken for done, and what would follow waits for the next call."""
    left = (
        "from packlib.lab.runs.experiment import OutOfTime\nraise OutOfTime('2 of 3 arms are left for the next call')"
    )
    write_notebook(project, "01_first", left, ENDS)
    write_notebook(project, "02_second", ENDS)
    write_preset(project, {"01_first": None, "02_second": None})
    folder = reproduce.reproduce("mini", minutes=1)
    assert "01_first.ipynb: 2 of 3 arms are left for the next call; call again to go on" in capsys.readouterr().err
    logs = ["logs/01_first.log", "logs/fingerprints.json"]
    assert written(folder) == [*logs, "report.md"] and experiment.UNTIL not in os.environ


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


def test_a_notebook_may_share_the_parameters_of_another_preset(project):
    for name in ("01_first", "02_second"):
        write_notebook(project, name, ENDS)
    write_preset(project, {"01_first": {"seed": 5}, "02_second": None})
    presets = project / "papermill_runs" / "presets"
    (presets / "mini.yaml").rename(presets / "other.yaml")
    write_preset(project, {"01_first": "other"})
    assert reproduce.load_preset("mini")["notebooks"] == {"01_first": {"seed": 5}}
    write_preset(project, {"02_second": "other"})
    with pytest.raises(ValueError, match="preset mini, 02_second: preset other has no parameters for it"):
        reproduce.load_preset("mini")
    write_preset(project, {"01_first": "otter"})
    with pytest.raises(ValueError, match="unknown preset 'otter'"):
        reproduce.load_preset("mini")


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


def test_what_is_doubted_stands_below_the_title(project):
    path = write_notebook(project, "01_x", "1 / 2")
    reproduce._publishable(path, project, ["one < two"])
    _, doubt, *_ = nbformat.read(path, 4).cells
    assert doubt.cell_type == "markdown" and "alert-danger" in doubt.source and "one &lt; two" in doubt.source
    reproduce._publishable(path, project)
    assert len(nbformat.read(path, 4).cells) == 3, "the negative control: nothing is put there without a doubt"


def test_a_long_table_is_kept_as_html_alone(project):
    path = write_notebook(project, "01_x", "1 / 2")
    notebook = nbformat.read(path, 4)
    long = "x" * (reproduce.LONGEST_PLAIN + 1)
    tables = [{"text/html": "<b>1</b>", "text/plain": long}, {"text/html": "<b>1</b>", "text/plain": "1"}]
    given = [*tables, {"text/plain": long}]
    notebook.cells[-1].outputs = [nbformat.v4.new_output("display_data", data) for data in given]
    nbformat.write(notebook, path)
    reproduce._publishable(path, project)
    kept = [output.data for output in nbformat.read(path, 4).cells[-1].outputs]
    assert kept == [{"text/html": "<b>1</b>"}, *given[1:]], "what is short, or has no HTML, stays"


# what need not run again


MEASURES = """
import json, pathlib
made = pathlib.Path(run, "attention", "NAME.json")
made.parent.mkdir(exist_ok=True)
made.write_text("{}")
"""


def test_what_would_come_out_the_same_is_not_run_again(project, capsys):
    """The first notebook must not run again because the second has measured since; whatever else changes counts."""
    first, second = (write_notebook(project, name, MEASURES, ENDS) for name in ("01_first", "02_second"))
    write_preset(project, {"01_first": {"seed": 5}, "02_second": None})

    def ran() -> list[str]:
        capsys.readouterr()
        reproduce.reproduce("mini")
        lines = capsys.readouterr().err.splitlines()
        return [line.split()[2].rstrip(":") for line in lines if line.endswith(" s") and "notebook" in line]

    assert ran() == ["01_first", "02_second"]
    folder = project / "papermill_runs" / "mini"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    begun = time.monotonic()
    assert ran() == [] and time.monotonic() - begun < 15
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    write_preset(project, {"01_first": {"seed": 6}, "02_second": None})
    assert ran() == ["01_first"], "its parameters"
    (folder / "attention" / "02_second.json").write_text('{"edited": 1}', encoding="utf-8")
    assert ran() == ["02_second"], "a record of its own, which the first one does not read"
    second.write_text(second.read_text(encoding="utf-8").replace("seed = 1", "seed = 2"), encoding="utf-8")
    (folder / first.name).unlink()
    assert ran() == ["01_first", "02_second"], "no output; another source"


def test_freshness_depends_on_package_data_and_failures(project, monkeypatch, tmp_path):
    notebook = write_notebook(project, "01_first", ENDS)
    data = tmp_path / "mine.jsonl"
    data.write_text("{}", encoding="utf-8")
    folder, given = records.run_folder("mini"), {"corpora": [str(data)], "others": ["", ".", "a**b", "hub:x/y"]}
    (folder / notebook.name).write_text("{}", encoding="utf-8")
    records.write_json(folder / "summaries" / "01_first.json", {})

    def fresh() -> bool:
        return Freshness(folder, ["01_first"]).is_fresh(notebook, given)

    def keep() -> None:
        Freshness(folder, ["01_first"]).keep(notebook, given, set(), ended=True)

    assert not fresh()
    keep()
    assert fresh()
    data.write_text("{} ", encoding="utf-8")
    assert not fresh(), "edited data"
    keep()
    monkeypatch.setattr(freshness, "_everywhere", lambda: "another package")
    assert not fresh()
    keep()
    assert fresh()
    records.write_record(folder, records.unfinished("r0", {}, "failed", "a defect"))
    keep()
    assert not fresh(), "a run that failed is tried again"
    Freshness(folder, ["01_first"]).keep(notebook, given, set(), ended=False)
    assert "fingerprint" not in Freshness(folder, ["01_first"]).known["01_first"], "what did not end is not fresh"


def test_tracked_files_stay_as_they_are(project):
    """Notebooks run from where they lie, and only write into the run's folder."""
    write_notebook(project, "01_first", ENDS)
    write_preset(project, {"01_first": None})
    tracked = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    reproduce.reproduce("mini")
    assert {path: path.read_bytes() for path in tracked} == tracked
    others = {path for path in project.rglob("*") if path.is_file()} - tracked.keys()
    assert {path.relative_to(project).parts[:2] for path in others} == {("papermill_runs", "mini")}


# Ctrl-C

INTERRUPTED = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(600)
"""


def test_ctrl_c_ends_everything_cleanly(project, tmp_path):
    """As in a terminal: one line, exit code 130, no process left (tests/conftest.py looks), no unfinished notebook."""
    write_notebook(project, "01_first", INTERRUPTED, ENDS)
    write_preset(project, {"01_first": None})
    script = f"""
import pathlib, signal
from packlib.lab import records
from packlib import __main__
from packlib.lab.pages import kernel
kernel.PRELOAD = "ipykernel.kernelapp"  # the notebook needs no more
signal.signal(signal.SIGINT, signal.default_int_handler)
records.project_root = lambda: pathlib.Path({str(project)!r})
raise SystemExit(__main__.main(["reproduce", "mini"]))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    log = project / "papermill_runs" / "mini" / "logs" / "01_first.log"
    until = time.monotonic() + 120
    while not (log.exists() and "child" in log.read_text(encoding="utf-8")) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Task exception" not in said and "Traceback" not in said
    assert said.splitlines()[-1].startswith("interrupted; every finished run has its record")
    assert len(said.splitlines()) < 20
    child = int(log.read_text(encoding="utf-8").split("child ")[1].split()[0])
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert not list(log.parents[1].glob("*.ipynb")), "nothing looks finished"
