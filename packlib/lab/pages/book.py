"""The notebooks, the published runs and what is written about them as a static site, which `make book` writes to book/.

A page shows a notebook as a run left it, and says which one: the first of the given runs that has it, or else preset
`smoke`, run there and then, and again where the notebook has changed. Sphinx makes the pages, with MyST-NB for
notebooks and Furo's looks, which bring the index, search, light and dark, small screens and print. Everything is read
from disk; the site needs no network.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
from bs4 import BeautifulSoup, Tag

from packlib.lab import records
from packlib.lab.pages import reproduce
from packlib.lab.presets import presets

logger = logging.getLogger(__name__)
FILL_IN = "smoke"  # preset of the notebooks that no run has, but for what is published
PUBLISHED = {"04_prove_isolation": {"matrix": "published"}}
PARAMETERS = {"parameters", "injected-parameters"}  # tags of cells that a run may change
WORDS = re.compile(r"(?!NaN$)([A-Za-z\[{(]|.*[A-Za-z]{3})", re.DOTALL)  # the text of a cell that is no number
SHORT = 24  # letters of a cell that is not broken into lines
TABLE = re.compile(r"<table\b.*?</table>", re.DOTALL)
PANDAS_STYLE = re.compile(r"<style scoped>.*?</style>\s*", re.DOTALL)  # it would align every header right
RED = re.compile(r"🔴(?![^<]*>)")  # in a text: not every browser has a glyph for it
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
CONFIGURATION = """
project = "Packing, measured"
extensions = ["myst_nb"]
html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_use_index = html_show_sphinx = html_show_copyright = html_show_sourcelink = html_copy_source = False
myst_heading_anchors = 4
myst_enable_extensions = ["alert"]  # GitHub's > [!NOTE]
nb_execution_mode = "off"
nb_merge_streams = True
"""
STYLE = """
.main { min-width: 0; }  /* else as wide as .content would like to be */
.content { width: 61em; min-width: 0; padding: 0 1em; }  /* 120 columns of code */
.sidebar-drawer { width: calc(50% - 31.5em); }
.toc-drawer { flex-shrink: 0; }
.related-pages a[class] { max-width: calc(50% - 0.75rem); }
.red { color: var(--color-problematic); }
.alert .red { color: inherit; }  /* an alert has its own red, on its own ground */
.alert { margin: 0.5rem 0 1rem; }
.output img { height: auto; max-width: 100%; }
.output, p:has(> img:only-child), .table-wrapper { overflow-x: auto; }
.output:has(table), .table-wrapper {  /* a shadow where there is more: what scrolls along covers it at the end */
    --cover: var(--color-background-primary) 1rem, transparent;
    --shadow: var(--color-background-item), transparent;
    background: linear-gradient(to right, var(--cover)) local left / 2.5rem,
        linear-gradient(to left, var(--cover)) local right / 2.5rem,
        linear-gradient(to right, var(--shadow)) left / 0.75rem,
        linear-gradient(to left, var(--shadow)) right / 0.75rem;
    background-repeat: no-repeat;
}
article[role=main] table { border: 0; border-collapse: collapse; box-shadow: none; margin: 0.5rem 0; }
article[role=main] table :is(th, td) {
    background: none; border: 0; border-bottom: 1px solid var(--color-table-border);
    padding: 0.2rem 0.6rem; text-align: left; vertical-align: top;
}
article[role=main] table thead th { vertical-align: bottom; }
article[role=main] table :is(th, td)[data-number] { text-align: right; }
article[role=main] table :is(th, td) > p { margin: 0; }
[data-short] { white-space: nowrap; }
tbody :is(th, td):not([data-short]) { min-width: 12em; }  /* rows else grow as high as a page */
.output table, table:has(th:nth-child(7)) { font-size: var(--font-size--small); }
@media (min-width: 48em) { .output pre { white-space: pre-wrap; } }
@media (max-width: 48em) {
    h1 > .headerlink { display: none; }  /* it would wrap to a line of its own */
    .output img, p > img:only-child { max-width: 44rem; }
}
@media print { .output, pre { overflow: visible; white-space: pre-wrap; } .output table { font-size: 7pt; } }
"""


def build(runs: Iterable[str], output: Path) -> Path:
    """Make the site in `output`, which is replaced; returns its first page.

    runs: names under papermill_runs/; one that is not there is passed over. Raises `RuntimeError` where Sphinx fails.
    """
    folders = [folder for run in runs if (folder := records.run_folder(run, create=False)).is_dir()]
    with tempfile.TemporaryDirectory() as partial:
        source, made = Path(partial, "source"), Path(partial, "book")
        _write_pages(source, folders, _executed(folders))
        command = [sys.executable, "-m", "sphinx", "--quiet", "--jobs=auto", str(source), str(made)]
        if subprocess.run(command, check=False).returncode:
            raise RuntimeError("Sphinx made no book; it says why above (make book installs what it needs)")
        for page in made.rglob("*.html"):
            page.write_text(_finished(page.read_text(encoding="utf-8")), encoding="utf-8")
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(made, output, ignore=shutil.ignore_patterns(".*"))
    return output / "index.html"


def _finished(page: str) -> str:
    """A page of Sphinx with what the looks need: marks on the cells of tables, and a red circle that is drawn."""
    page = TABLE.sub(lambda table: _marked(table[0]), PANDAS_STYLE.sub("", page))
    return RED.sub('<span class="red">●</span>', page)


def _marked(table: str) -> str:
    """A table: columns of numbers get `data-number`, headers too, and cells that stay on one line `data-short`.

    A column is of numbers if most of its cells are: words among them, or a number among words, do not make it ragged.
    """
    soup = BeautifulSoup(table, "html.parser")
    taken: set[tuple[int, int]] = set()  # rows and columns of the cells so far
    columns: defaultdict[int, list[Tag]] = defaultdict(list)
    for y, row in enumerate(soup.find_all("tr")):
        for cell in row.find_all(["th", "td"]):
            x = next(x for x in itertools.count() if (y, x) not in taken)
            high, wide = (int(str(cell.get(name, "1"))) for name in ("rowspan", "colspan"))
            taken |= {(y + down, x + right) for down in range(high) for right in range(wide)}
            if wide == 1:
                columns[x].append(cell)
    for cells in columns.values():
        body = [cell for cell in cells if not cell.find_parent("thead")]
        words = {id(cell): cell.name == "th" or bool(WORDS.match(_text(cell))) for cell in body if _text(cell)}
        for cell in cells if sum(words.values()) * 2 < len(words) else ():
            cell["data-number"] = ""
        for cell in body:
            if len(_text(cell)) <= SHORT or not WORDS.match(_text(cell)):
                cell["data-short"] = ""
    return str(soup)


def _text(cell: Tag) -> str:
    return cell.get_text().strip()


def _executed(folders: list[Path]) -> dict[str, Path]:
    """Every notebook's name and its executed file; those that no folder has are executed, two at a time."""
    sources = {path.stem: path for path in reproduce.notebooks()}
    preset, filled = reproduce.load_preset(FILL_IN)["notebooks"], records.run_folder(FILL_IN)
    shown, missing = {}, []
    for name, source in sources.items():
        there = [folder / source.name for folder in folders if (folder / source.name).exists()]
        shown[name] = there[0] if there else filled / source.name
        if not there and not _shows(shown[name], source, PUBLISHED.get(name, {})):
            missing.append(name)

    def execute(name: str) -> None:
        logger.info("%s is in none of these runs: preset %s runs it now", name, FILL_IN)
        reproduce.execute(sources[name], filled, (preset[name] or {}) | PUBLISHED.get(name, {}))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(execute, missing))  # a list, so that what fails is raised
    return shown


def _shows(executed: Path, source: Path, parameters: Mapping[str, Any]) -> bool:
    """Whether a notebook was executed as its cells are now, with these parameters among its own."""
    if not executed.exists() or _code(executed) != _code(source):
        return False
    given = nbformat.read(executed, 4).metadata.get("papermill", {}).get("parameters", {})
    return {name: given.get(name) for name in parameters} == parameters


def _write_pages(folder: Path, runs: list[Path], shown: Mapping[str, Path]) -> None:
    """What Sphinx reads: one Markdown file or notebook a page, and its configuration."""
    root = records.project_root()
    site = _Site(folder, root)
    solutions = sorted((root / "notebooks" / "solutions").glob("*.ipynb"))
    reports = [run / "report.md" for run in runs if (run / "report.md").exists()]
    for name, path in shown.items():
        site.add(path, also=root / "notebooks" / f"{name}.ipynb", note=_which_run(path, root / "notebooks"))
    for path in sorted(path for run in runs for path in run.glob("[0-9]*.ipynb") if path not in shown.values()):
        site.add(path, note=_which_run(path, root / "notebooks"), listed=False)
    for path in solutions:
        site.add(path, note="A solution as it is in the repository: not run here.")
    for path in [*reports, root / "papermill_runs" / "LOG.md", root / "CONTRIBUTING.md", root / "README.md"]:
        site.add(path)
    contents = {
        "Notebooks": [root / "notebooks" / f"{name}.ipynb" for name in shown],
        "Measured": [*reports, root / "papermill_runs" / "LOG.md"],
        "More": [root / "CONTRIBUTING.md", *solutions],
    }
    site.write(contents)


def _which_run(executed: Path, sources: Path) -> str:
    """What a reader should know of the run that a page shows."""
    run = executed.parent.name
    devices = {record["environment"]["device"] for record in records.read_records(executed.parent)}
    text = f"Shown as run `{run}` left it{', on ' + ' and '.join(sorted(devices)) if devices else ''}."
    if run in presets():
        text += f" {reproduce.load_preset(run)['description'].strip()}"
    if _code(executed) != _code(sources / executed.name):
        text += " The notebook has changed since."
    return text


def _code(notebook: Path) -> list[str]:
    """The text of its code cells, without the parameters, which a run may set."""
    cells = [cell for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]
    return [
        cell.source for cell in cells if not {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", []))
    ]


class _Site:
    """Files of the repository and the pages that they become."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self.root = folder, root
        self.pages: dict[str, str] = {}  # path in the repository -> path of its page
        self.notes: dict[Path, str] = {}
        self.unlisted: set[Path] = set()

    def add(self, file: Path, *, also: Path | None = None, note: str = "", listed: bool = True) -> None:
        """A page. also: another file for which it stands, and where it lies. note: what stands under its title.

        listed: whether the table of contents has it; if not, its run's report links to it.
        """
        if not listed:
            self.unlisted.add(file)
        page = self._name(also or file)
        self.pages[self._name(file)] = self.pages[page] = "index.md" if page == "README.md" else page
        self.notes[file] = note

    def write(self, contents: Mapping[str, Sequence[Path]]) -> None:
        """Write all pages; the first one has the table of contents, by parts."""
        tables = [self._table(caption, files) for caption, files in contents.items()]
        for file, note in self.notes.items():
            page = self.folder / self.pages[self._name(file)]
            page.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".ipynb":
                page.write_text(self._notebook(file, note), encoding="utf-8")
            else:
                text = self._linked(file.read_text(encoding="utf-8"), file)
                page.write_text("\n\n".join([text, *(tables if page.name == "index.md" else [])]), encoding="utf-8")
        (self.folder / "conf.py").write_text(CONFIGURATION, encoding="utf-8")
        (self.folder / "_static").mkdir()
        (self.folder / "_static" / "book.css").write_text(STYLE, encoding="utf-8")

    def _notebook(self, file: Path, note: str) -> str:
        notebook = nbformat.read(file, 4)
        notebook.metadata["orphan"] = file in self.unlisted
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = self._linked(cell.source, file)
        title, _, rest = notebook.cells[0].source.partition("\n")
        notebook.cells[0].source = f"{title}\n\n*{note}*\n{rest}"
        return nbformat.writes(notebook)

    def _table(self, caption: str, files: Sequence[Path]) -> str:
        entries = [
            f"{_entry(file)} <{Path(self.pages[self._name(file)]).with_suffix('').as_posix()}>" for file in files
        ]
        return "\n".join(["```{toctree}", f":caption: {caption}", ":hidden:", "", *entries, "```"])

    def _linked(self, text: str, file: Path) -> str:
        """The text of a file with its links led to pages, or to copies of what has no page."""
        home = self._name(file)

        def lead(link: re.Match[str]) -> str:
            target = os.path.normpath(os.path.join(os.path.dirname(home), link[1]))
            if (self.root / target).is_dir():  # its first page stands for a folder
                target = next((name for name in self.pages if name.startswith(f"{target}/")), target)
            if target not in self.pages:
                if not (self.root / target).is_file():
                    logger.warning("%s links to %s, which is no file", home, link[1])
                    return link[0]
                (self.folder / target).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.root / target, self.folder / target)
            to = os.path.relpath(self.pages.get(target, target), os.path.dirname(self.pages[home]) or ".")
            return f"]({Path(to).as_posix()}{link[2] or ''})"

        return LINK.sub(lead, text)

    def _name(self, file: Path) -> str:
        return Path(os.path.relpath(file, self.root)).as_posix()


def _entry(file: Path) -> str:
    """What the table of contents calls a page."""
    name = file.stem.replace("_", " ")
    if file.parent.name == "solutions":
        return f"Solutions {name}"
    return {"report": f"Report of run {file.parent.name}", "LOG": "Log", "CONTRIBUTING": "Contributing"}.get(name, name)
