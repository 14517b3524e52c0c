"""Every notebook: fit to commit, runs through papermill with the smoke preset, stops at a bad parameter. Every solution runs.

Notebooks share one run folder, in order, as they do in `make reproduce`: 09 reads what 06 and 07 measured.
"""

import ast
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
import yaml

from packlib.lab import records, reproduce

NOTEBOOKS = reproduce.notebooks()
SOLUTIONS = sorted((records.project_root() / "notebooks" / "solutions").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"(?<![\w.:/~])/(?:home|root|tmp|work|mnt|opt|var|usr|data|Users|private)/|\b[A-Z]:\\\\")


def every(paths):
    return pytest.mark.parametrize("path", paths, ids=[("solution_" if p in SOLUTIONS else "") + p.stem for p in paths])


def code_cells(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return records.run_folder(tmp_path_factory.mktemp("smoke"))


@every(NOTEBOOKS + SOLUTIONS)
def test_is_fit_to_commit(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    cells = notebook.cells
    assert re.match(r"# \S", cells[0].source), "the first cell begins with the title, an H1"
    assert sum(len(re.findall(r"^# ", c.source, flags=re.MULTILINE)) for c in cells if c.cell_type == "markdown") == 1, "one H1"
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata
    assert len(cells) <= 26
    assert all(cell.source.strip() for cell in cells), "no cell is empty"
    assert not MACHINE_PATH.search("\n".join(cell.source for cell in cells))
    for i, cell in enumerate(c for c in cells if c.cell_type == "code"):
        assert not cell.outputs and cell.execution_count is None, f"code cell {i} has outputs"
        assert len(cell.source.splitlines()) <= 15, f"code cell {i} does not fit on a screen: {cell.source[:60]!r}"
        assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(ast.parse(cell.source))), f"code cell {i} defines a class"


@every(NOTEBOOKS + SOLUTIONS)
def test_parameters_are_literals_and_checked(path):
    cells = nbformat.read(path, 4).cells
    tagged = [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    statements = ast.parse(cells[tagged[0]].source).body
    names = [(node.targets[0] if isinstance(node, ast.Assign) else node.target).id for node in statements]
    assert ("run" in names or path in SOLUTIONS) and len(names) <= 12
    for name, node in zip(names, statements):
        ast.literal_eval(node.value)
        line = cells[tagged[0]].source.splitlines()[node.end_lineno - 1]
        assert "#" in line, f"parameter {name} has no comment"
    check = list(ast.walk(ast.parse(cells[tagged[0] + 1].source)))
    assert "check_parameters" in cells[tagged[0] + 1].source, "the cell after the parameters checks them"
    mentioned = {node.value for node in check if isinstance(node, ast.Constant)} | {node.arg for node in check if isinstance(node, ast.keyword)}
    assert set(names) <= mentioned, f"not checked: {sorted(set(names) - mentioned)}"


@every(NOTEBOOKS)
def test_runs_to_its_end(path, folder):
    executed = reproduce.execute(path, folder, reproduce.load_preset("smoke")["notebooks"].get(path.stem) or {})
    summary = records.read_json(folder / "summaries" / f"{path.stem}.json")
    assert summary["title"] and summary["findings"]
    assert not [name for name in summary["figures"] if not (folder / "figures" / f"{name}.png").exists()], "a figure of the summary was not kept"
    assert not any("nan" in re.findall(r"[a-z]+", finding) for finding in summary["findings"]), summary["findings"]
    assert executed.stat().st_size < 1_000_000
    outputs = [output for cell in code_cells(executed) for output in cell.outputs]
    for output in outputs:
        data = output.get("data", {})
        assert "image/png" not in data or output.metadata["image/png"].get("alt"), "a figure has no alt text"
        text = json.dumps({kind: value for kind, value in data.items() if not kind.startswith("image/")}) + output.get("text", "")
        assert not MACHINE_PATH.search(text) and str(folder) not in text, f"a path of this machine: {text[:300]}"
        assert output.get("name") != "stderr" or "Warning" not in text, f"a warning that a reader would stumble on: {text[:300]}"


@every(SOLUTIONS)
def test_solution_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": path.stem}
    for cell in code_cells(path):
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += f"\nrun = {str(tmp_path)!r}"
        exec(compile(cell.source, path.name, "exec"), names)
    plt.close("all")


def test_parameter_of_the_wrong_type_stops_the_notebook(tmp_path):
    notebook = next(path for path in NOTEBOOKS if path.stem.startswith("02_"))
    with pytest.raises(reproduce.NotebookFailed, match=r"TypeError: parameter seed = '1e-4' is a str; expected int"):
        reproduce.execute(notebook, records.run_folder(tmp_path), {"seed": "1e-4"})
    assert not (tmp_path / notebook.name).exists(), "what did not finish does not look finished"
    assert not (tmp_path / "summaries" / f"{notebook.stem}.json").exists()


@pytest.mark.parametrize(
    "notebooks, message",
    [
        ({"02_pack_with_position_ids": {"sed": 1}}, r"unknown parameter of 02_pack_with_position_ids 'sed' \(did you mean 'seed'\?\); known: edit"),
        ({"02_pack_with_positions": {}}, r"unknown notebook '02_pack_with_positions' \(did you mean '02_pack_with_position_ids'\?\); known: 00_"),
    ],
)
def test_unknown_name_in_a_preset_is_an_error(notebooks, message, tmp_path, monkeypatch):
    preset = tmp_path / "bad.yaml"
    preset.write_text(yaml.safe_dump({"description": "", "notebooks": notebooks}))
    monkeypatch.setattr(reproduce, "presets", lambda: {"bad": preset})
    with pytest.raises(ValueError, match=message):
        reproduce.load_preset("bad")


def test_unknown_preset_is_an_error():
    with pytest.raises(ValueError, match=r"unknown preset 'smok' \(did you mean 'smoke'\?\); known: .*smoke"):
        reproduce.load_preset("smok")


@pytest.mark.parametrize("name", sorted(reproduce.presets()))
def test_presets_name_known_notebooks_and_parameters(name):
    preset = reproduce.load_preset(name)
    assert preset["description"]
    order = list(preset["notebooks"])
    assert {"06", "07"} <= {name[:2] for name in order[:-1]} and order[-1].startswith("09"), "09 compares what 06 and 07 measured"


def test_smoke_preset_covers_every_notebook():
    assert list(reproduce.load_preset("smoke")["notebooks"]) == [path.stem for path in NOTEBOOKS]


def test_machine_paths_are_recognised():
    assert MACHINE_PATH.search("see /home/someone/x") and MACHINE_PATH.search(str(Path("/tmp/x")))
    assert not MACHINE_PATH.search("papermill_runs/cpu, ~/data/x, https://arxiv.org/data/1, tokens/s, ./tmp/x")
