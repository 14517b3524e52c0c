"""Every notebook: fit to commit, runs through papermill with the smoke preset, stops at a bad parameter.

They share one run folder, in order, as they do in `make reproduce`: 09 reads what 06 and 07 measured.
"""

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup

from packlib.lab import presets, records
from packlib.lab.pages import notebook, reproduce

NOTEBOOKS = reproduce.notebooks()
SOLUTIONS = sorted((records.project_root() / "notebooks" / "solutions").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"(?<![\w.:/~])/(?:home|root|tmp|work|mnt|opt|var|usr|data|Users|private)/|\b[A-Z]:\\\\")
LINES, COLUMNS = 15, 110  # of a code cell: what fits a screen and a page


def every(paths):
    return pytest.mark.parametrize("path", paths, ids=[("solution_" if p in SOLUTIONS else "") + p.stem for p in paths])


def code_cells(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def tagged_cell(path):
    (cell,) = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    return cell


def heading(path):
    return nbformat.read(path, 4).cells[0].source.splitlines()[0].removeprefix("# ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return records.run_folder(tmp_path_factory.mktemp("smoke"))


@every(NOTEBOOKS + SOLUTIONS)
def test_is_fit_to_commit(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert prose[0].startswith("# "), "the first cell begins with the title, an H1"
    assert sum(len(re.findall(r"^# ", text, flags=re.MULTILINE)) for text in prose) == 1, "one H1"
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata
    assert len(notebook.cells) <= 28
    assert all(cell.source.strip() for cell in notebook.cells), "no cell is empty"
    assert not MACHINE_PATH.search("\n".join(cell.source for cell in notebook.cells))


HEADER = "| claim | what you will see | time and hardware |"
ROUTE = re.compile(r"\*\*On the 90-minute route:\*\* (\d+) minutes?, ")


@every(NOTEBOOKS)
def test_header_follows_the_template(path):
    """Title, table of claims, and the place on the route."""
    header = nbformat.read(path, 4).cells[0].source
    assert HEADER in header.splitlines() and header.index(HEADER) < ROUTE.search(header).start()


def test_the_route_is_what_every_notebook_says_and_takes_90_minutes():
    (told,) = [cell.source for cell in nbformat.read(NOTEBOOKS[0], 4).cells if cell.source.startswith("## The route")]
    minutes = {number: int(n) for n, number in re.findall(r"^\| (\d+) \| \[?(\d\d) ", told, flags=re.MULTILINE)}
    headers = {path.stem[:2]: nbformat.read(path, 4).cells[0].source for path in NOTEBOOKS}
    assert minutes == {number: int(ROUTE.search(header)[1]) for number, header in headers.items()}
    assert sum(minutes.values()) == 90


@every(NOTEBOOKS + SOLUTIONS)
def test_a_code_cell_fits_on_a_screen_and_defines_no_class(path):
    for cell in code_cells(path):
        assert not cell.outputs and cell.execution_count is None, f"{cell.id} has outputs"
        lines = cell.source.splitlines()
        shown = [line for line in lines if line and not line.startswith(("import ", "from "))]
        assert len(shown) <= LINES and len(lines) <= LINES + 5, f"{cell.id} has {len(lines)} lines"
        assert not [line for line in lines if len(line) > COLUMNS], f"{cell.id} is too wide"
        assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(ast.parse(cell.source))), cell.id


@every(NOTEBOOKS + SOLUTIONS)
def test_parameters_are_literals_with_a_comment_each(path):
    cell = tagged_cell(path)
    statements = ast.parse(cell.source).body
    assert len(statements) <= 12
    for node in statements:
        ast.literal_eval(node.value)
        assert "#" in cell.source.splitlines()[node.end_lineno - 1], ast.unparse(node)
    cells = nbformat.read(path, 4).cells
    after = cells[[c.id for c in cells].index(cell.id) + 1].source
    start = f'notebook.start("{path.stem}", globals())'
    assert (start if path in NOTEBOOKS else "notebook.check(globals())") in after, "the next cell checks them"


@every(NOTEBOOKS)
def test_papermill_sees_the_parameters(path):
    """What it cannot read in the tagged cell would be missing from presets' checks."""
    names = {}
    exec(tagged_cell(path).source, names)
    assert reproduce.declared_parameters(path) == {k: v for k, v in names.items() if k != "__builtins__"}
    assert notebook.title(path.stem) == heading(path)


@every(NOTEBOOKS)
def test_runs_to_its_end(path, folder):
    executed = reproduce.execute(path, folder, reproduce.load_preset("smoke")["notebooks"].get(path.stem) or {})
    summary = records.read_json(folder / "summaries" / f"{path.stem}.json")
    assert summary["title"] == heading(path) and summary["findings"]
    assert not any("nan" in re.findall(r"[a-z]+", finding) for finding in summary["findings"]), summary["findings"]
    kept = {file.stem for file in (folder / "figures").glob(f"{path.stem[:2]}_*.png")}
    assert kept == set(summary["figures"]) and all(summary["figures"].values()), "every figure is in the report"
    assert executed.stat().st_size < 1_000_000
    for output in [output for cell in code_cells(executed) for output in cell.outputs]:
        data = output.get("data", {})
        assert "image/png" not in data, "a figure that was not shown with its alt text"
        page = BeautifulSoup(data.get("text/html", ""), "html.parser")
        assert all(image.get("alt") for image in page.select("img")), "a figure has no alt text"
        text = json.dumps(data) + output.get("text", "")
        assert not MACHINE_PATH.search(text) and str(folder) not in text, f"a path of this machine: {text[:300]}"
        assert output.get("name") != "stderr" or "Warning" not in text, f"a reader would stumble on: {text[:300]}"


def test_parameter_of_the_wrong_type_stops_the_notebook(tmp_path):
    notebook = next(path for path in NOTEBOOKS if path.stem.startswith("02_"))
    with pytest.raises(reproduce.NotebookFailed, match=r"TypeError: parameter seed = '1e-4' is a str; expected int"):
        reproduce.execute(notebook, records.run_folder(tmp_path), {"seed": "1e-4"})
    assert not (tmp_path / notebook.name).exists(), "what did not finish does not look finished"
    assert not (tmp_path / "summaries" / f"{notebook.stem}.json").exists()


@pytest.mark.parametrize(
    ("notebooks", "error", "message"),
    [
        (
            {"02_pack_with_position_ids": {"sed": 1}},
            ValueError,
            r"unknown parameter of 02_pack_with_position_ids 'sed' \(did you mean 'seed'\?\); known: edit",
        ),
        (
            {"02_pack_with_positions": {}},
            ValueError,
            r"unknown notebook '02_pack_with_positions' \(did you mean '02_pack_with_position_ids'\?\); known: 00_",
        ),
        (
            {"07_compare_convergence": {"learning_rate": "1e-3"}},
            TypeError,
            r"preset bad, 07_compare_convergence: parameter learning_rate = '1e-3' is a str; expected float",
        ),
    ],
)
def test_what_is_wrong_in_a_preset_is_an_error(notebooks, error, message, tmp_path, monkeypatch):
    preset = tmp_path / "bad.yaml"
    preset.write_text(yaml.safe_dump({"description": "", "notebooks": notebooks}), encoding="utf-8")
    monkeypatch.setattr(presets, "presets", lambda: {"bad": preset})
    with pytest.raises(error, match=message):
        reproduce.load_preset("bad")


def test_unknown_preset_is_an_error():
    with pytest.raises(ValueError, match=r"unknown preset 'smok' \(did you mean 'smoke'\?\); known: .*smoke"):
        reproduce.load_preset("smok")


@pytest.mark.parametrize("name", sorted(presets.presets()))
def test_presets_name_known_notebooks_and_parameters(name):
    preset = reproduce.load_preset(name)
    assert preset["description"]
    order = list(preset["notebooks"])
    if order[-1].startswith("09"):
        assert "06" in {name[:2] for name in order[:-1]}, "09 compares what it measured"


def test_smoke_preset_covers_every_notebook():
    assert list(reproduce.load_preset("smoke")["notebooks"]) == [path.stem for path in NOTEBOOKS]


def test_machine_paths_are_recognised():
    assert MACHINE_PATH.search("see /home/someone/x") and MACHINE_PATH.search(str(Path("/tmp/x")))
    assert not MACHINE_PATH.search("papermill_runs/cpu, ~/data/x, https://arxiv.org/data/1, tokens/s, ./tmp/x")
