"""A desk to try: a copy of the repository at toy size, JupyterLab on it, and a real browser before it.

Nothing here runs in `make test`; `make browser` does. Pictures of what was seen go to `build/browser/`.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest

from packlib.lab import records
from packlib.lab.pages import reproduce

try:
    from playwright.sync_api import sync_playwright
except ImportError:  # installed by `make browser`
    collect_ignore_glob = ["test_*.py"]

collect_ignore = ["kernels.py"]  # it is JupyterLab's: imported, it starts a server
ROOT = records.project_root()
PICTURES = ROOT / "build" / "browser"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is in the page, also out of sight
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}

# Texts of an element whose contrast with what lies behind them is below WCAG's 4.5 (3 for large letters).
HARD_TO_READ = """element => {
    const parse = color => (color.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
    const over = ([r, g, b, a = 1], [R, G, B]) => [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a)];
    const known = new Map([[null, [255, 255, 255]]]);
    const behind = node => {
        if (!known.has(node))
            known.set(node, over(parse(getComputedStyle(node).backgroundColor), behind(node.parentElement)));
        return known.get(node);
    };
    const linear = value => value <= 10.31 ? value / 3294.6 : ((value / 255 + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const found = [];
    const texts = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const text = texts.currentNode.data.trim(), node = texts.currentNode.parentElement;
        if (!text || !node.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})) continue;
        if (!node.getClientRects().length || node.closest("script, style, svg")) continue;
        const looks = getComputedStyle(node), size = parseFloat(looks.fontSize);
        const ground = behind(node), [a, b] = [light(over(parse(looks.color), ground)), light(ground)];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        const large = size >= 24 || (size >= 18.66 && looks.fontWeight >= 700);
        if (ratio < (large ? 3 : 4.5)) found.push(`${ratio.toFixed(1)}: ${text.slice(0, 60)}`);
    }
    return found;
}"""


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    """Server and browser outlive a test: their own fixtures end them."""


@pytest.fixture(scope="session")
def chromium():
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def desk(tmp_path_factory):
    """The repository's tracked files in a folder of their own, notebooks with the parameters of the smoke preset."""
    import papermill.iorw
    import papermill.parameterize

    folder = tmp_path_factory.mktemp("desk")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    for name, parameters in reproduce.load_preset("smoke")["notebooks"].items():
        path = folder / "notebooks" / f"{name}.ipynb"
        notebook = papermill.iorw.load_notebook_node(str(path))
        if parameters:
            notebook = papermill.parameterize.parameterize_notebook(notebook, parameters)
        del notebook.metadata["papermill"]
        for cell in notebook.cells:
            cell.metadata = {"tags": cell.metadata.tags} if cell.metadata.get("tags") else {}
        nbformat.write(notebook, path)
    return folder


@pytest.fixture(scope="session")
def lab(desk, tmp_path_factory):
    """Address of JupyterLab, started in `desk` as `make lab` starts it, without this machine's settings."""
    own = tmp_path_factory.mktemp("jupyter")
    for name, values in SETTINGS.items():
        file = own / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values), encoding="utf-8")
    folders = (
        "JUPYTER_CONFIG_DIR",
        "JUPYTER_DATA_DIR",
        "JUPYTER_RUNTIME_DIR",
        "JUPYTERLAB_WORKSPACES_DIR",
        "IPYTHONDIR",
    )
    page = own / "JUPYTER_CONFIG_DIR" / "labconfig" / "page_config.json"
    page.parent.mkdir(parents=True)
    page.write_text('{"buildCheck": false}', encoding="utf-8")  # node would look for source extensions, 1 s a page
    environment = os.environ | {name: str(own / name) for name in folders}
    environment["JUPYTERLAB_SETTINGS_DIR"] = str(own / "settings")
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(desk)}  # for `tests.browser.kernels`
    port = free_port()
    dry = subprocess.run(
        ["make", "--no-print-directory", "-n", "lab", f"PYTHON={sys.executable}", "VENV="],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    command = [*shlex.split(dry.stdout), "--no-browser", "--allow-root", "--IdentityProvider.token="]
    command.append("--MappingKernelManager.kernel_manager_class=tests.browser.kernels.ForkedKernelManager")
    command.append("--LabApp.expose_app_in_browser=True")  # its commands, by name
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--ServerApp.disable_check_xsrf=True"]
    with open(own / "log", "w", encoding="utf-8") as log:
        server = subprocess.Popen(command, cwd=desk, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://localhost:{port}"
    try:
        for _ in range(600):
            if server.poll() is not None:
                pytest.fail("JupyterLab ended:\n" + Path(own / "log").read_text(encoding="utf-8"))
            try:
                urllib.request.urlopen(f"{address}/api/status").close()
                yield address
                break
            except OSError:
                time.sleep(0.1)
        else:
            pytest.fail("JupyterLab does not answer:\n" + Path(own / "log").read_text(encoding="utf-8"))
    finally:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]
