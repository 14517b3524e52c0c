"""What every test gets: the same environment whoever calls, one thread a process, and nothing left running."""

import os
import sys

import pytest

from tests import processes

# Set before anything is imported, and inherited by processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"  # models are tiny, and pytest-xdist uses the cores
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network; what asks for it fails at once and does not wait
sys.modules["rfc3987_syntax"] = None  # jsonschema would compile its grammar, 3 s a process; no notebook has an IRI
for name in ("PACKLIB_DATA", "PACKLIB_UNTIL", "PACKLIB_CONCURRENT_RUNS", "PACKLIB_GIT_SHA"):
    os.environ.pop(name, None)


# The files that take longest, begun first, so that no process waits for another's last file.
LONGEST = ("tests/notebooks/test_notebooks.py", "tests/notebooks/", "tests/lab/runs/test_experiment.py", "tests/lab/")


def pytest_collection_modifyitems(items):
    def place(item):
        return next((i for i, name in enumerate(LONGEST) if item.nodeid.startswith(name)), len(LONGEST))

    items.sort(key=place)  # stable: tests of a file stay in their order


@pytest.fixture(scope="session", autouse=True)
def orphans_are_seen():
    processes.adopt_orphans()


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    """A process that a test started ends with it; one that does not is killed, and the test fails."""
    before = processes.descendants(os.getpid())
    yield
    left = processes.left_running(before)
    assert not left, f"left running: {left}"
