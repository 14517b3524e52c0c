"""Figures look as in the notebooks, whichever test ran before, and need no screen."""

import matplotlib as mpl
import pytest

from packlib.lab import figures

mpl.use("agg")


@pytest.fixture(autouse=True)
def theme():
    figures.theme()
