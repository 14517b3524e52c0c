"""The project's files agree: with each other, with the records, with what they promise. What a check looks for, it is shown to find."""

import argparse
import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from datasets import Dataset
from packaging.version import Version

from packlib.__main__ import COMMANDS
from packlib.lab import convergence, readme, records, reproduce
from packlib.lab.spec import RunSpec
from packlib.lab.tokenizers import train_bpe
from packlib.lab.small_models import small_model

ROOT = records.project_root()
README = (ROOT / "README.md").read_text()
PROSE = readme.BLOCK.sub("", README)  # what was written by hand
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"torch": "pytorch-gpu"}
PIP_ONLY = {"gguf"}  # comes with `pip install -e .[lab,liger]` in environment.yml
MACHINE_PATH = re.compile(r"(?<![\w.:/~])/(?:work|root|home/\w+|Users/\w+)/")
REGISTRY = re.compile(r"https?://[^\s/]*(?:pypi|pythonhosted|conda|registry|mirror|artifactory|nexus|proxy)|--(?:extra-)?index-url")
BINARY = {".png", ".npz", ".gz", ".gguf"}


def requirements(lines):
    """{name: lower bound or pin} of `name>=1.2`, `name==1.2`, `name=1.2` or `name`."""
    return dict(re.fullmatch(r"([\w-]+)(?:[>=]=?([\d.]+))?", line.strip()).groups() for line in lines)


LAB = requirements(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["lab"])
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
CONDA = requirements(line for line in ENVIRONMENT["dependencies"] if isinstance(line, str))
PINS = requirements(line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))


def tracked():
    """Files of the repository, with those about to be added; of a copy without git, all but what tools left there."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    ours = ("notebooks", "packlib", "papermill_runs", "tests", "benchmarks", ".ci")
    found = [path for name in ours for path in (ROOT / name).rglob("*")] + list(ROOT.glob("*.*"))
    return [path for path in found if path.is_file() and not {"__pycache__", "cpu", "smoke"} & set(path.parts)]


# ---- environments


@pytest.mark.parametrize("name", sorted(LAB.keys() - PIP_ONLY))
def test_environment_has_every_dependency_with_the_same_bound(name):
    assert CONDA.get(CONDA_NAMES.get(name, name), "missing") == LAB[name]


def test_what_conda_does_not_have_comes_with_pip():
    assert {"pip": ["-e .[lab,liger]"]} in ENVIRONMENT["dependencies"]
    assert LAB.keys() >= PIP_ONLY and not PIP_ONLY & CONDA.keys()


def test_environment_has_what_the_project_was_asked_for():
    asked = {"jupyterlab", "pytorch-gpu", "transformers", "trl", "flash-attn", "datasets", "matplotlib", "papermill", "seaborn"}
    assert CONDA.keys() >= asked and ENVIRONMENT["channels"] == ["conda-forge"]


def test_constraints_pin_every_dependency_above_its_bound_and_torch_first():
    wanted = LAB | requirements(PROJECT["optional-dependencies"]["test"] + PROJECT["optional-dependencies"]["liger"])
    assert next(iter(PINS)) == "torch"
    assert not wanted.keys() - PINS.keys()
    assert not [name for name, bound in wanted.items() if Version(PINS[name]) < Version(bound)]


def test_python_versions_agree():
    assert Version(CONDA["python"]) >= Version(PROJECT["requires-python"].removeprefix(">="))


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert "2407.09105" in citation["preferred-citation"]["journal"] and len(citation["preferred-citation"]["authors"]) == 5


def test_ci_runs_what_a_contributor_runs():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text().splitlines()
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # these tests may run in a make of their own
    dry = subprocess.run(["make", "-n", "test", "PYTHON=python", "VENV="], cwd=ROOT, capture_output=True, text=True, check=True, env=outside)
    assert dry.stdout.split("\n")[:2] == ["python -m ruff check .", "python -m pytest"]


# ---- README


def test_readme_says_what_the_records_say():
    text, stale = readme.render(README)
    assert text == README and not stale, f"run make tables: {stale}"
    assert {name for _, name, *_ in readme.BLOCK.findall(README)} == set(readme.BLOCKS)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """README and records of another checkout, without a figure."""
    (tmp_path / "papermill_runs" / "h200").mkdir(parents=True)
    (tmp_path / "papermill_runs" / "h200" / "records").symlink_to(ROOT / "papermill_runs" / "h200" / "records")
    monkeypatch.setattr(records, "project_root", lambda: tmp_path)
    return tmp_path / "README.md"


def test_tables_finds_and_mends_a_wrong_number_and_a_missing_figure(copy):
    number = re.search(r"\| multitask \| MiniBatchPacking \+ PosID \| ([\d,]+) ", README)[1]
    copy.write_text(README.replace(number, "9,999"))
    with pytest.raises(ValueError, match=r"README.md is not what the records say: figure, headline, .*; run make tables"):
        readme.command(argparse.Namespace(check=True))
    assert "9,999" in copy.read_text(), "--check writes nothing"
    readme.command(argparse.Namespace(check=False))
    assert copy.read_text() == README
    assert readme.command(argparse.Namespace(check=True)) == "README.md: nothing to change"
    picture = copy.parent / "papermill_runs" / "h200" / "figures" / "readme.png"
    readme._draw(records.load_records(copy.parent / "papermill_runs" / "h200"), picture, "other numbers")
    assert readme.render(README)[1] == ["figure"]


@pytest.mark.parametrize(
    "block, message",
    [
        ("headlines h200", r"unknown block of README.md 'headlines' \(did you mean 'headline'\?\)"),
        ("headline h300", "papermill_runs/h300/records is empty; expected the records of a published run"),
    ],
)
def test_unknown_block_and_run(block, message):
    with pytest.raises(ValueError, match=message):
        readme.render(f"<!-- table: {block} -->\n<!-- end -->")


def test_losses_follow_from_records_of_notebook_07():
    arms = convergence.arms(RunSpec(model="x.gguf", corpus="math_x.npz", limit=64, batch_size=8), rows_per_step=2)
    results = {"padding": 1.0, "minibatch_packing": 1.0, "fixed_length_packing": 1.25}
    wobble = {0: 0.0, 1: 0.001, 2: -0.001}
    frame = pd.DataFrame([
        asdict(arm.spec) | {"run_id": arm.spec.run_id, "status": "ok", "metrics.optimizer_steps": arm.spec.steps or 4,
                            "metrics.eval_loss_per_token": results.get(arm.strategy, 1.125) + wobble[arm.spec.seed] * len(arm.label)}
        for arm in arms
    ])  # fmt: skip
    lines = readme.losses(frame, "x").splitlines()
    labels = list(dict.fromkeys(arm.label for arm in arms if "lr" not in arm.variant and "atoms" not in arm.variant))
    assert [line.split(" | ")[1] for line in lines[4:]] == labels
    assert re.match(r"\| math \| FixedLengthPacking \(contaminated\), equal steps \| 8 \| 1.2500 \| \+0.2500 nats .*3 seeds\) \|", lines[6])
    assert readme.losses(frame.assign(eval_every=None), "x") == "", "runs that were only timed have no validation loss"


def test_runs_that_shared_their_device_do_not_count():
    frame = records.load_records(ROOT / "papermill_runs" / "h200")
    slow = frame.assign(**{"run_id": "other", "environment.concurrent_runs": 3, "metrics.tokens_per_s.mean": 1.0})
    assert readme.arms(pd.concat([frame, slow], ignore_index=True), "h200") == readme.arms(frame, "h200")
    alone = slow.assign(**{"environment.concurrent_runs": 1})
    assert readme.arms(pd.concat([frame, alone], ignore_index=True), "h200") != readme.arms(frame, "h200")


def typed_numbers(text):
    """Paragraphs with a measurement in them that do not say that it is the paper's."""
    measurement = re.compile(r"\d\s*(?:×\s+(?:as|padding)|tokens/s|% (?:less|faster|of))|\d\.\d+\s*(?:×|s\b|GB)")
    return [part for part in text.split("\n\n") if measurement.search(part) and "The paper's column" not in " ".join(part.split())]


def test_measurements_in_readme_come_from_records():
    assert not typed_numbers(PROSE)
    assert typed_numbers("It is 1.53 × as fast.") and typed_numbers("Up to 6,526 tokens/s.") and typed_numbers("That is 8 % less memory.")


def commands(text):
    """`make …` and `python -m packlib …` as they stand in code, without comments."""
    code = re.findall(r"```bash\n(.*?)```|`([^`\n]+)`", text, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for pair in code for line in "".join(pair).splitlines()]
    return [shlex.split(line) for line in lines if re.match(r"make \w|python -m packlib \w", line)]


def problem(words):
    """What is wrong with a command, or None."""
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        presets = [word.removeprefix("PRESET=") for word in words if word.startswith("PRESET=")]
        unknown = [word for word in words[1:] if "=" not in word and word not in targets]
        return next(iter(unknown + [preset for preset in presets if preset not in reproduce.presets()]), None)
    module = COMMANDS.get(words[3], (None, None))[0]
    if module is None:
        return words[3]
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(module).add_arguments(parser)
    try:
        return " ".join(parser.parse_known_args(words[4:])[1]) or None
    except argparse.ArgumentError as error:
        return str(error)


def test_commands_of_readme_exist():
    found = commands(README)
    assert {"reproduce", "test", "lab", "tables"} <= {words[1] for words in found if words[0] == "make"}
    assert {"advise", "isolation", "strategies"} <= {words[3] for words in found if words[0] == "python"}
    assert not [(words, problem(words)) for words in found if problem(words)]


@pytest.mark.parametrize("text", ["make reproduction", "make lab PRESET=a100", "python -m packlib advice x", "python -m packlib advise x --many 4"])
def test_commands_that_do_not_exist_are_noticed(text):
    assert problem(commands(f"```bash\n{text}   # a comment\n```")[0])


def test_python_of_readme_trains(tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    examples = [[1 + (i + j) % 200 for j in range(3 + i % 13)] for i in range(40)]
    brought = {"dataset": Dataset.from_dict({"input_ids": examples}), "model": small_model("llama"), "tokenizer": train_bpe(["a b c"] * 4, 270)}
    before = brought["model"].model.layers[0].self_attn.q_proj.weight.detach().cpu().clone()
    exec(compile(block, "README.md", "exec"), names := dict(brought))
    assert "EXACT" in capsys.readouterr().out
    assert names["trainer"].state.log_history[-1]["train_loss"] > 0
    assert names["model"].config._attn_implementation == "packlib_varlen" and names["plan"].report(names["lengths"]).lost_tokens == 0
    assert not before.equal(names["model"].model.layers[0].self_attn.q_proj.weight.cpu())


def links(path):
    """Targets of relative links in a Markdown file or a notebook."""
    cells = nbformat.read(path, 4).cells if path.suffix == ".ipynb" else None
    text = path.read_text() if cells is None else "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:|mailto:|#|data:", target)]


def broken_links(path):
    return [target for target in links(path) if not (path.parent / target).exists()]


DOCUMENTS = [p for p in tracked() if p.suffix in (".md", ".ipynb")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=[str(p.relative_to(ROOT)) for p in DOCUMENTS])
def test_links_resolve(path):
    assert not broken_links(path)


def test_links_that_lead_nowhere_are_noticed(tmp_path):
    (tmp_path / "a.md").write_text("[here](a.md#part) [there](b.md) [web](https://example.org/b.md)")
    assert broken_links(tmp_path / "a.md") == ["b.md"]
    assert len(links(ROOT / "README.md")) > 15


def test_readme_lists_every_notebook():
    table = re.findall(r"^\| \[\d\d [^]]+\]\(notebooks/([^)]+)\)", README, flags=re.MULTILINE)
    assert table == [path.name for path in reproduce.notebooks()]


def test_tree_of_readme_is_there():
    (tree,) = re.findall(r"```\n(README\.md.*?)```", README, flags=re.DOTALL)
    parent, names = "", []
    for line in tree.splitlines():
        name = line.split()[0]
        parent = parent if line.startswith("  ") else name
        names.append(parent + name if line.startswith("  ") else name)
    assert not [name for name in names if not (ROOT / name).exists()]
    known = {path.relative_to(ROOT).parts[0] for path in tracked()} - {".ci", ".gitignore", "LICENSE", "CITATION.cff"}
    assert known == {name.split("/")[0] for name in names}


def test_log_has_its_newest_entry_on_top():
    dates = re.findall(r"^## (.{10}) · \S", (ROOT / "papermill_runs" / "LOG.md").read_text(), flags=re.MULTILINE)
    assert dates and dates == sorted(dates, reverse=True) and all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for date in dates)


# ---- packlib


MODULES = sorted((ROOT / "packlib").rglob("*.py"))
CORE = [path for path in MODULES if path.parent.name == "packlib" and path.stem != "__main__"]
LAZY = {"gather": {"datasets", "pyarrow"}}  # modules that are imported when a data set is at hand


@pytest.mark.parametrize("path", MODULES, ids=[str(p.relative_to(ROOT)) for p in MODULES])
def test_a_module_is_one_idea(path):
    assert len(path.read_text().splitlines()) <= 300


def imported(source):
    """Top-level packages (`packlib.lab` apart) that a module imports when it is imported; not those for type checkers."""
    names, waiting = set(), [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            names |= {"packlib.lab" if name.startswith("packlib.lab") else name.split(".")[0] for name in modules}
        elif not isinstance(node, ast.FunctionDef | ast.Lambda) and not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            waiting.extend(ast.iter_child_nodes(node))
    return names - sys.stdlib_module_names


@pytest.mark.parametrize("path", CORE, ids=[p.stem for p in CORE])
def test_core_imports_numpy_torch_and_transformers_only(path):
    assert imported(path.read_text()) <= {"packlib", "numpy", "torch", "transformers"} | LAZY.get(path.stem, set())


def test_imports_are_seen_where_they_are():
    source = "if True:\n  import trl.x\nfrom packlib.lab import y\ndef f():\n  import pandas\nif TYPE_CHECKING:\n  import datasets"
    assert imported(source) == {"trl", "packlib.lab"}


def import_without(blocked, modules):
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import {', '.join(modules)}"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_core_works_without_the_lab():
    blocked = ["trl", "papermill", "pandas", "matplotlib", "seaborn", "datasets", "pyarrow", "IPython", "packlib.lab"]
    done = import_without(blocked, [f"packlib.{path.stem}" for path in CORE if path.stem not in {"__init__", *LAZY}])
    assert done.returncode == 0, done.stderr[-500:]
    assert "ModuleNotFoundError: import of packlib.lab halted" in import_without(["packlib.lab"], ["packlib.lab"]).stderr, "the block blocks"


# ---- what is published


def private(text):
    """Lines that name a path of a machine or a package registry. Pictures in notebooks are left out."""
    lines = re.sub(r'"image/png": "[^"]*"', "", text).splitlines()
    return [line.strip()[:200] for line in lines if MACHINE_PATH.search(line) or REGISTRY.search(line)]


def test_no_file_names_a_machine_or_a_registry():
    own = {Path(__file__), ROOT / "tests" / "notebooks" / "test_notebooks.py"}  # they show that such names are found
    found = {str(path.relative_to(ROOT)): private(path.read_text()) for path in tracked() if path.suffix not in BINARY and path not in own}
    assert len(found) > 100 and not {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize("text", ["see /work/x", "in '/home/someone/x'", "/root/.cache", "pip install --index-url x", "https://pypi.example.org/simple"])
def test_names_of_machines_and_registries_are_noticed(text):
    assert private(f"first\n{text}\nlast") == [text]
    assert not private("papermill_runs/work/x, ~/work/x, https://arxiv.org/abs/1, conda-forge, notebooks/root/x")


def unpublishable(path):
    """Why an executed notebook should not be published, or None."""
    if path.stat().st_size >= 1_000_000:
        return "1 MB or more"
    if not any(cell.cell_type == "code" and cell.outputs for cell in nbformat.read(path, 4).cells):
        return "was not executed"
    return next(iter(private(path.read_text())), None)


def test_published_notebooks():
    published = [path for path in tracked() if path.suffix == ".ipynb" and "papermill_runs" in path.parts]
    assert not {path.name: unpublishable(path) for path in published if unpublishable(path)}


@pytest.mark.parametrize("text, reason", [("x" * 1_000_000, "1 MB"), ("at /work/x", "at /work/x"), (None, "not executed"), ("fine", None)])
def test_unpublishable_notebooks_are_noticed(text, reason, tmp_path):
    output = [] if text is None else [nbformat.v4.new_output("stream", text=text)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=output)])
    nbformat.write(notebook, tmp_path / "a.ipynb")
    found = unpublishable(tmp_path / "a.ipynb")
    assert found is None if reason is None else reason in found
