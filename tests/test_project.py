"""The project's files agree with each other and with what they promise. What a check looks for, it is shown to find."""

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import nbformat
import pytest
import yaml
from datasets import Dataset
from packaging.version import Version

import packlib
from packlib import __main__
from packlib.lab import records
from packlib.lab.data.tokenizers import train_bpe
from packlib.lab.pages import reproduce
from packlib.lab.presets import presets
from packlib.lab.small_models import small_model

ROOT = records.project_root()


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


README = read("README.md")
PYPROJECT = tomllib.loads(read("pyproject.toml"))
PROJECT = PYPROJECT["project"]
CONDA_NAMES = {"torch": "pytorch-gpu"}
PIP_ONLY = {"gguf"}  # comes with `pip install -e .[lab,liger,float8]` in environment.yml
MACHINE_PATH = re.compile(r"(?<![\w.:/~])/(?:work|root|home/\w+|Users/\w+)/")
REGISTRY = re.compile(
    r"https?://[^\s/]*(?:pypi|pythonhosted|conda|registry|mirror|artifactory|nexus|proxy)|--(?:extra-)?index-url"
)
BINARY = {".png", ".npz", ".gz", ".gguf"}


def requirements(lines):
    """{name: lower bound or pin} of `name>=1.2`, `name==1.2`, `name=1.2` or `name`."""
    return dict(re.fullmatch(r"([\w-]+)(?:[>=]=?([\w.]+))?", line.strip()).groups() for line in lines)


LAB = requirements(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["lab"])
GPU = requirements(PROJECT["optional-dependencies"]["liger"] + PROJECT["optional-dependencies"]["float8"])
ENVIRONMENT = yaml.safe_load(read("environment.yml"))
CONDA = requirements(line for line in ENVIRONMENT["dependencies"] if isinstance(line, str))
PINS = requirements(line for line in read("constraints.txt").splitlines() if not line.startswith("#"))


def tracked():
    """Files of the repository, whatever else lies in its folder; none in a copy without git."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    names = listed.stdout.split("\0") if listed.returncode == 0 else []
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


TRACKED = tracked()
MODULES = sorted((ROOT / "packlib").rglob("*.py"))
with_git = pytest.mark.skipif(not TRACKED, reason="a copy without git: which files are the project's is not known")


# ---- environments


@pytest.mark.parametrize("name", sorted(LAB.keys() - PIP_ONLY))
def test_environment_has_every_dependency_with_the_same_bound(name):
    assert CONDA.get(CONDA_NAMES.get(name, name), "missing") == LAB[name]


def test_what_conda_does_not_have_comes_with_pip():
    assert {"pip": ["-e .[lab,liger,float8]"]} in ENVIRONMENT["dependencies"]
    assert LAB.keys() >= PIP_ONLY and not PIP_ONLY & CONDA.keys()


def test_environment_has_what_the_project_was_asked_for():
    asked = {
        "jupyterlab",
        "pytorch-gpu",
        "transformers",
        "trl",
        "flash-attn",
        "datasets",
        "matplotlib",
        "papermill",
        "seaborn",
    }
    assert CONDA.keys() >= asked and ENVIRONMENT["channels"] == ["conda-forge"]
    assert requirements(PROJECT["optional-dependencies"]["flash"]) == {"flash-attn": CONDA["flash-attn"]}


def test_constraints_pin_every_dependency_above_its_bound_and_torch_first():
    wanted = LAB | requirements(chain(*PROJECT["optional-dependencies"].values()))
    assert next(iter(PINS)) == "torch"
    assert not wanted.keys() - PINS.keys()
    assert not [name for name, bound in wanted.items() if Version(PINS[name]) < Version(bound)]


def test_python_versions_agree():
    assert Version(CONDA["python"]) >= Version(PROJECT["requires-python"].removeprefix(">="))


def test_a_build_has_the_version_that_the_package_says(tmp_path):
    """Of a version that no installation can have, so that what is built is read."""
    pytest.importorskip("setuptools", minversion="77")
    (tmp_path / "packlib").mkdir()
    (tmp_path / "packlib" / "__init__.py").write_text('__version__ = "9.8.7"\n', encoding="utf-8")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_text(read(name), encoding="utf-8")
    build = "import setuptools.build_meta as build; build.prepare_metadata_for_build_wheel('made')"
    (tmp_path / "made").mkdir()
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (metadata,) = (tmp_path / "made").glob("*.dist-info/METADATA")
    assert "\nVersion: 9.8.7\n" in metadata.read_text(encoding="utf-8") and Version(packlib.__version__)


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["version"], citation["license"]) == (packlib.__version__, PROJECT["license"])
    assert (
        "2407.09105" in citation["preferred-citation"]["journal"]
        and len(citation["preferred-citation"]["authors"]) == 5
    )


MAKE_TEST = [
    "python -m ruff check packlib tests benchmarks notebooks",
    "python -m ruff format --check packlib tests benchmarks notebooks",
    "python -m mypy packlib",
    """python -c 'from importlinter.cli import lint_imports_command as lint; lint(["--no-logo"])'""",
    "python -m pytest",
]


def test_ci_runs_what_a_contributor_runs():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    made = [shlex.split(line)[:2] for line in read(".ci/run").splitlines() if line.startswith("make ")]
    assert made == [["make", "test"], ["make", "browser"]], "of the browser's tests a part"
    (job,) = yaml.safe_load(read(".github/workflows/test.yml"))["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make test", "make browser"]
    pythons = job["strategy"]["matrix"]["python"]
    assert PROJECT["requires-python"] == f">={min(pythons, key=Version)}" and CONDA["python"] in pythons


def test_make_test_checks_style_types_and_imports_before_it_tests():
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # may run inside make
    command = ["make", "-n", "test", "PYTHON=python", "VENV="]
    dry = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True, env=outside)
    assert dry.stdout.splitlines() == MAKE_TEST


def test_pre_commit_formats_as_make_test_does():
    (ruff, strip) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert ruff["rev"] == f"v{PINS['ruff']}" and [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]
    (hook,) = strip["hooks"]
    assert (hook["id"], hook["args"], hook["files"]) == ("nbstripout", ["--keep-id"], "^notebooks/")


# ---- README


def commands(text):
    """`make …` and `python -m packlib …` as they stand in code, without comments."""
    code = re.findall(r"```bash\n(.*?)```|`([^`\n]+)`", text, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for pair in code for line in "".join(pair).splitlines()]
    return [shlex.split(line) for line in lines if re.match(r"make \w|python -m packlib \w", line)]


def problem(words):
    """What is wrong with a command, or None."""
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", read("Makefile"), flags=re.MULTILINE)
        named = [word.removeprefix("PRESET=") for word in words if word.startswith("PRESET=")]
        unknown = [word for word in words[1:] if "=" not in word and word not in targets]
        return next(iter(unknown + [preset for preset in named if preset not in presets()]), None)
    try:
        __main__.parser().parse_args(words[3:])
    except SystemExit:
        return " ".join(words)
    return None


def test_commands_of_readme_exist():
    found = commands(README)
    assert {"reproduce", "test", "lab", "tables"} <= {words[1] for words in found if words[0] == "make"}
    assert {"advise", "isolation", "strategies"} <= {words[3] for words in found if words[0] == "python"}
    assert not [(words, problem(words)) for words in found if problem(words)]


@pytest.mark.parametrize(
    "text",
    ["make reproduction", "make lab PRESET=a100", "python -m packlib advice x", "python -m packlib advise x --many 4"],
)
def test_commands_that_do_not_exist_are_noticed(text):
    assert problem(commands(f"```bash\n{text}   # a comment\n```")[0])


def test_python_of_readme_trains(tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    examples = [[1 + (i + j) % 200 for j in range(3 + i % 13)] for i in range(40)]
    brought = {
        "dataset": Dataset.from_dict({"input_ids": examples}),
        "model": small_model("llama"),
        "tokenizer": train_bpe(["a b c"] * 4, 270),
    }
    before = brought["model"].model.layers[0].self_attn.q_proj.weight.detach().cpu().clone()
    exec(compile(block, "README.md", "exec"), names := dict(brought))
    assert "EXACT" in capsys.readouterr().out
    assert names["trainer"].state.log_history[-1]["train_loss"] > 0
    assert (
        names["model"].config._attn_implementation == "packlib_varlen"
        and names["plan"].report(names["lengths"]).lost_tokens == 0
    )
    assert not before.equal(names["model"].model.layers[0].self_attn.q_proj.weight.cpu())


def links(path):
    """Targets of relative links in a Markdown file or a notebook."""
    if path.suffix == ".ipynb":
        text = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
    else:
        text = path.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target.split("#")[0] for target in targets if not re.match(r"https?:|mailto:|#|data:", target)]


def broken_links(path):
    return [target for target in links(path) if not (path.parent / target).exists()]


DOCUMENTS = [path for path in TRACKED if path.suffix in (".md", ".ipynb")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=[str(p.relative_to(ROOT)) for p in DOCUMENTS])
def test_links_resolve(path):
    assert not broken_links(path)


def test_links_that_lead_nowhere_are_noticed(tmp_path):
    text = "[here](a.md#part) [there](b.md) [web](https://example.org/b.md)"
    (tmp_path / "a.md").write_text(text, encoding="utf-8")
    assert broken_links(tmp_path / "a.md") == ["b.md"]
    assert len(links(ROOT / "README.md")) > 15


def test_readme_lists_every_notebook():
    table = re.findall(r"^\| \[\d\d [^]]+\]\(notebooks/([^)]+)\)", README, flags=re.MULTILINE)
    assert table == [path.name for path in reproduce.notebooks()]


def tree(text):
    """Paths of an annotated tree whose folders end in a slash and whose levels are two spaces deep."""
    found, parents = [], []
    for line in text.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents = parents[:depth]
        found.append("".join([*parents, name]))
        parents.append(name)
    return found


@with_git
def test_tree_of_readme_is_there():
    (text,) = re.findall(r"```\n(README\.md.*?)```", README, flags=re.DOTALL)
    names = tree(text)
    assert not [name for name in names if not (ROOT / name).exists()]
    known = {path.relative_to(ROOT).parts[0] for path in TRACKED}
    assert known - {".ci", ".github", ".gitignore", ".pre-commit-config.yaml", "LICENSE", "CITATION.cff"} == {
        name.split("/")[0] for name in names
    }
    inside = {path.relative_to(ROOT / "packlib").parts[0] for path in TRACKED if ROOT / "packlib" in path.parents}
    shown = {name.split("/")[1] for name in names if name.startswith("packlib/") and name != "packlib/"}
    assert shown == inside - {"__init__.py", "py.typed"}, "every room is shown"


def test_a_tree_is_read_level_by_level():
    assert tree("a.md  one\nb/  two\n  c/  three\n    d.py  four\n  e.py  five") == [
        "a.md",
        "b/",
        "b/c/",
        "b/c/d.py",
        "b/e.py",
    ]


def variables(text):
    """Environment variables of ours that a text names."""
    return set(re.findall(r"\bPACKLIB_[A-Z_]+\b", text))


def test_readme_lists_every_environment_variable():
    read_by_packlib = set().union(*(variables(path.read_text(encoding="utf-8")) for path in MODULES))
    rows = re.findall(r"^\| `(PACKLIB_\w+)` \|", README, flags=re.MULTILINE)
    assert sorted(rows) == sorted(read_by_packlib) and "PACKLIB_DATA" in read_by_packlib


# ---- packlib


CORE = [path for path in MODULES if ROOT / "packlib" / "lab" not in path.parents and path.stem != "__main__"]
# Imported where Plan.apply, Plan.view and stream are called, when a data set is at hand.
LAZY = {"rows": {"datasets", "pyarrow"}, "view": {"datasets", "pyarrow"}, "iterable": {"datasets"}}
OWN_EXTRA = {"liger_kernel": "liger-kernel", "torchao": "torchao"}  # [liger], [float8]
ASKED_FOR = {"sentencepiece"}  # where it is missing, an error says what to install
COMES_ALONG = {
    "accelerate": "trl",
    "huggingface_hub": "transformers",
    "tokenizers": "transformers",
    "jupyter_server": "jupyterlab",
    "jupyter_client": "jupyterlab",
    "ipykernel": "jupyterlab",
}
DISTRIBUTIONS = {
    "bs4": "beautifulsoup4",
    "IPython": "ipython",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


def imported(source, *, functions=False):
    """Packages (`packlib.lab` apart) that a module imports when it is imported; not those for type checkers alone.

    functions: those that its functions import, too.
    """
    names, waiting = set(), [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            names |= {"packlib.lab" if name.startswith("packlib.lab") else name.split(".")[0] for name in modules}
            continue
        later = isinstance(node, ast.FunctionDef | ast.Lambda) and not functions
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not later and not for_types:
            waiting.extend(ast.iter_child_nodes(node))
    return names - sys.stdlib_module_names


@pytest.mark.parametrize("path", CORE, ids=[str(path.relative_to(ROOT)) for path in CORE])
def test_core_imports_numpy_torch_and_transformers_only(path):
    allowed = {"packlib", "numpy", "torch", "transformers"} | LAZY.get(path.stem, set())
    assert imported(path.read_text(encoding="utf-8")) <= allowed


def test_imports_are_seen_where_they_are():
    source = (
        "if True:\n  import trl.x\nfrom packlib.lab import y\n"
        "def f():\n  import pandas\nif TYPE_CHECKING:\n  import datasets"
    )
    assert imported(source) == {"trl", "packlib.lab"}
    assert imported(source, functions=True) == {"trl", "packlib.lab", "pandas"}


def test_every_import_is_a_declared_dependency():
    found = set().union(*(imported(path.read_text(encoding="utf-8"), functions=True) for path in MODULES))
    foreign = found - {"packlib", "packlib.lab"} - ASKED_FOR - OWN_EXTRA.keys() - COMES_ALONG.keys()
    assert {DISTRIBUTIONS.get(name, name) for name in foreign} <= LAB.keys()
    assert set(OWN_EXTRA.values()) == GPU.keys()
    unused = LAB.keys() - {DISTRIBUTIONS.get(name, name) for name in found}
    assert unused == {"jupyterlab", "gguf"}, "what people run, and what transformers reads .gguf with"


def import_without(blocked, modules):
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import {', '.join(modules)}"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", check=False)


def test_core_works_without_the_lab():
    blocked = ["trl", "papermill", "pandas", "matplotlib", "seaborn", "datasets", "pyarrow", "IPython", "packlib.lab"]
    modules = [path.relative_to(ROOT).with_suffix("") for path in CORE if path.stem not in {"__init__", *LAZY}]
    done = import_without(blocked, [".".join(module.parts) for module in modules])
    assert done.returncode == 0, done.stderr[-500:]
    halted = "ModuleNotFoundError: import of packlib.lab halted"
    assert halted in import_without(["packlib.lab"], ["packlib.lab"]).stderr, "the block blocks"


def test_packlib_says_that_it_is_typed():
    assert PYPROJECT["tool"]["setuptools"]["package-data"]["packlib"] == ["py.typed"]
    assert (ROOT / "packlib" / "py.typed").is_file()


# ---- what is published


def private(text):
    """Lines that name a path of a machine or a package registry. Pictures in notebooks are left out."""
    lines = re.sub(r'"image/png": "[^"]*"', "", text).splitlines()
    return [line.strip()[:200] for line in lines if MACHINE_PATH.search(line) or REGISTRY.search(line)]


@with_git
def test_no_file_names_a_machine_or_a_registry():
    own = {Path(__file__), ROOT / "tests" / "notebooks" / "test_notebooks.py"}  # they show that such names are found
    found = {
        str(path.relative_to(ROOT)): private(path.read_text(encoding="utf-8"))
        for path in TRACKED
        if path.suffix not in BINARY and path not in own
    }
    assert len(found) > 100 and not {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize(
    "text",
    [
        "see /work/x",
        "in '/home/someone/x'",
        "/root/.cache",
        "pip install --index-url x",
        "https://pypi.example.org/simple",
    ],
)
def test_names_of_machines_and_registries_are_noticed(text):
    assert private(f"first\n{text}\nlast") == [text]
    assert not private("papermill_runs/work/x, ~/work/x, https://arxiv.org/abs/1, conda-forge, notebooks/root/x")


def unpublishable(path):
    """Why an executed notebook should not be published, or None."""
    if path.stat().st_size >= 1_000_000:
        return "1 MB or more"
    if not any(cell.cell_type == "code" and cell.outputs for cell in nbformat.read(path, 4).cells):
        return "was not executed"
    return next(iter(private(path.read_text(encoding="utf-8"))), None)


@with_git
def test_published_notebooks():
    published = [path for path in TRACKED if path.suffix == ".ipynb" and ROOT / "papermill_runs" in path.parents]
    assert published and not {path.name: unpublishable(path) for path in published if unpublishable(path)}


@pytest.mark.parametrize(
    "text, reason", [("x" * 1_000_000, "1 MB"), ("at /work/x", "at /work/x"), (None, "not executed"), ("fine", None)]
)
def test_unpublishable_notebooks_are_noticed(text, reason, tmp_path):
    output = [] if text is None else [nbformat.v4.new_output("stream", text=text)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=output)])
    nbformat.write(notebook, tmp_path / "a.ipynb")
    found = unpublishable(tmp_path / "a.ipynb")
    assert found is None if reason is None else reason in found
