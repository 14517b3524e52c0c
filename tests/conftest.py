"""One thread a process, here and in the processes that tests start: models are tiny, and pytest-xdist uses the cores."""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def theme():
    """Figures look as in the notebooks, whichever test ran before."""
    from packlib.lab import figures

    figures.theme()

