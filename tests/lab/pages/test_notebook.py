"""A notebook stops at a parameter that it does not have; its figures keep their alt text wherever they go."""

import json
import subprocess
import sys

import nbformat
import pytest
from bs4 import BeautifulSoup
from IPython.core.formatters import DisplayFormatter
from nbconvert import HTMLExporter
from PIL import Image

from packlib.lab import figures, records
from packlib.lab.doubts import Doubt
from packlib.lab.pages import notebook, reproduce

TAGGED = 'run = "explore"  # a folder\nseed = 0  # of everything\nrates = [0.5]  # of learning'
INJECTED = "# Parameters\nseed = 3\n"


def namespace(*cells: str) -> dict:
    """`globals()` of a kernel that ran these cells."""
    names: dict = {"In": ["", *cells, "from packlib.lab import notebook\nnotebook.check(globals())"]}
    for cell in cells:
        exec(cell, names)
    return names


# parameters


def test_parameters_are_those_of_the_tagged_cell():
    assert notebook.check(namespace(TAGGED)) == {"run": "explore", "seed": 0, "rates": [0.5]}
    assert notebook.check(namespace(TAGGED, INJECTED))["seed"] == 3
    assert notebook.check(namespace(TAGGED, "# Parameters\nrates = [1]\n"))["rates"] == [1.0]


@pytest.mark.parametrize(
    ("cell", "error", "message"),
    [
        (
            "# Parameters\nsed = 3\n",
            ValueError,
            r"unknown parameter 'sed' \(did you mean 'seed'\?\); known: rates, run",
        ),
        ("# Parameters\nseed = 3\nlimit = float('inf')\n", ValueError, "unknown parameter 'limit'; known: rates, run"),
        ("# Parameters\nseed = '3'\n", TypeError, "parameter seed = '3' is a str; expected int"),
        ("# Parameters\nrates = [None]\n", TypeError, r"parameter rates\[0\] = None is a NoneType; expected float"),
    ],
)
def test_an_injected_parameter_of_another_name_or_type_stops_it(cell, error, message):
    with pytest.raises(error, match=message):
        notebook.check(namespace(TAGGED, cell))


def test_cells_that_are_run_again_by_hand_are_no_parameters():
    by_hand = ["tokens = 5", "import os", "seed, rates = 0, [0.5]", "losses = [1, 2]\nprint(losses)"]
    names = namespace(TAGGED, INJECTED, *by_hand, TAGGED.replace("0  #", "7  #"))
    assert notebook.check(names) == {"run": "explore", "seed": 7, "rates": [0.5]}


def test_where_no_cells_are_kept_nothing_is_checked():
    assert notebook.check({"seed": "whatever"}) == {}


def papermill(path, tmp_path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "papermill", str(path), str(tmp_path / "out.ipynb"), "--no-progress-bar"]
    return subprocess.run([*command, *options], capture_output=True, text=True, check=False, cwd=tmp_path)


def test_papermill_itself_fails_at_an_unknown_parameter(tmp_path):
    """From any folder, and of a copy of the notebook that lies elsewhere."""
    source = next(path for path in reproduce.notebooks() if path.stem.startswith("02_"))
    copy = tmp_path / "my own.ipynb"
    copy.write_bytes(source.read_bytes())
    done = papermill(copy, tmp_path, "-p", "edited_exampl", "1", "-p", "run", str(tmp_path / "run"))
    assert done.returncode != 0 and "unknown parameter 'edited_exampl' (did you mean 'edited_example'?)" in done.stderr
    assert "known: edited_example, examples, kernel, run, seed, vocab_size" in done.stderr
    assert not (tmp_path / "run").exists(), "nothing was made for it"


# start, show and finish


@pytest.fixture
def shown(monkeypatch):
    """What notebooks display."""
    found: list = []
    monkeypatch.setattr(notebook, "display", found.append)
    return found


def test_a_run_starts_shows_and_ends(tmp_path, shown):
    names = namespace(TAGGED) | {"run": str(tmp_path / "here")}
    run = notebook.start("02_pack_with_position_ids", names)
    assert (run.folder, run.title) == (tmp_path / "here", "Position ids that restart at 0 keep packed examples apart")
    (table,) = shown
    assert table["value"].to_dict() == {"run": "here", "seed": "0", "rates": "0.5"}, "without this machine's folders"

    figure, _ = figures.new(3, 2, 'what <it> "shows"')
    notebook.show(figure, "02_a", run)
    notebook.show(figures.new(3, 2, "another")[0])
    notebook.finish(["one", "two"], run)
    kept = tmp_path / "here" / "figures" / "02_a.png"
    with Image.open(kept) as image:
        assert image.info["Description"] == figure.alt
    assert [path.name for path in kept.parent.iterdir()] == ["02_a.png"]
    summary = records.read_json(tmp_path / "here" / "summaries" / "02_pack_with_position_ids.json")
    figures_shown = {"02_a": figure.alt}
    assert summary == {"title": run.title, "doubts": [], "findings": ["one", "two"], "figures": figures_shown}
    assert shown[-1].data == "- one\n- two"
    report = reproduce.write_report(run.folder).read_text(encoding="utf-8")
    assert f"![{figure.alt}](figures/02_a.png)" in report


def test_doubts_come_first_and_in_red(tmp_path, shown):
    run = notebook.Run("06_x", "x", records.run_folder(tmp_path))
    notebook.finish(["one", Doubt("off by <1>"), "two"], run)
    red, rest = shown
    assert "alert-danger" in red.data and "🔴 off by &lt;1&gt;" in red.data and rest.data == "- one\n- two"
    summary = records.read_json(tmp_path / "summaries" / "06_x.json")
    assert summary["doubts"] == ["off by <1>"] and summary["findings"] == ["one", "two"]


def test_a_notebook_of_elsewhere_is_called_by_its_name():
    assert notebook.title("12_of_my_own") == "12_of_my_own"


def test_alt_text_reaches_the_page_of_nbconvert(shown):
    figure, _ = figures.new(3, 2, 'Σ n² of <2> ranks, "balanced"')
    notebook.show(figure)
    data, metadata = DisplayFormatter().format(shown[0])
    assert set(data) == {"text/plain", "text/html"} and not metadata
    assert json.dumps(data).count("base64") == 1, "the picture is in the notebook once"
    output = nbformat.v4.new_output("display_data", data=data)
    page, _ = HTMLExporter().from_notebook_node(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[output])])
    )
    (image,) = BeautifulSoup(page, "html.parser").select("img")
    assert image["alt"] == figure.alt and image["src"].startswith("data:image/png;base64,")
