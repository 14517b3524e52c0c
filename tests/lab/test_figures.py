"""Figures draw what their tables hold, leave empty what they do not, and carry alt text."""

import io
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from packlib.lab import figures, tables
from packlib.lab.strategies import STRATEGIES
from tests.lab.test_tables import lost, row


@pytest.fixture
def table():
    """Padding, an arm that is faster, and one without a result, on two corpora."""
    rows = []
    for corpus in ("pydocs", "arithmetic"):
        rows += [row(corpus=corpus), row("minibatch_packing", 190, 1.0, 8e9, corpus=corpus)]
        rows.append(lost("multipack_posid", corpus=corpus))
    return tables.against(pd.DataFrame(rows))


def texts(figure) -> list[str]:
    return [text.get_text().strip() for ax in figure.axes for text in ax.texts]


def drawn(figure) -> None:
    """Everything that a reader needs is there, and it can be drawn."""
    assert len(figure.alt) > 3
    figure.canvas.draw()
    for ax in figure.axes:
        labels = [ax.xaxis.label, *ax.get_xticklabels(), *ax.get_yticklabels(), *ax.texts]
        assert all(label.get_fontsize() >= 10 for label in labels if label.get_text())


def test_bars_show_every_limit_and_no_bar_for_what_was_not_measured(table):
    figure = figures.bars_with_limits(table, "packing pays")
    drawn(figure)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["pydocs", "arithmetic"]
    for ax in figure.axes:
        assert [bar.get_width() for bar in ax.patches] == [1.0, 1.9], "two bars for three arms"
        limits = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--" and len(line.get_xdata())]
        assert limits == [1.0, 2.0]
    assert texts(figure) == ["1.00×", "1.90×"] * 2
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["Padding", "MiniBatchPacking + PosID", "Multipack + PosID"]


def test_forest_marks_zero_and_draws_no_interval_for_one_seed():
    rows = [("a", "minibatch_packing", 0.1, 0.05, 0.15, 3), ("b", "multipack_posid", 0.2, math.nan, math.nan, 1)]
    table = pd.DataFrame(rows, columns=["label", "strategy", "difference", "low", "high", "n"])
    figure = figures.forest(table, "differences", "nats")
    drawn(figure)
    (ax,) = figure.axes
    intervals = [segment for collection in ax.collections for segment in collection.get_segments()]
    assert np.array(intervals)[:, :, 0].tolist() == [[pytest.approx(0.05), pytest.approx(0.15)]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a (n=3)", "b (n=1)"]
    assert any(list(line.get_xdata()) == [0, 0] for line in ax.lines)


def test_what_the_paper_does_not_say_is_written_out():
    rows = [
        ("Padding", "padding", "paper", 742.0),
        ("Padding", "padding", "ours", 100.0),
        ("Multipack", "multipack_posid", "ours", 350.0),
        ("Multipack", "multipack_posid", "paper", math.nan),
    ]
    table = pd.DataFrame(rows, columns=["label", "strategy", "source", "value"])
    figure = figures.beside_paper(table, "value", "beside", "tokens/s")
    drawn(figure)
    assert sorted(texts(figure)) == ["100", "350", "742", "paper: not known"]
    assert sorted(bar.get_width() for bar in figure.axes[0].patches if bar.get_width()) == [100, 350, 742]


def test_curves_have_their_limit():
    columns = {"batch_size": [8, 1, 2], "speed_up": [1.8, 1.0, 1.2], "limit": [2.0, 1.0, 1.3]}
    frame = pd.DataFrame({"strategy": "minibatch_packing"} | columns)
    figure = figures.curves(frame, "batch_size", "speed_up", "a curve", "examples", "× padding", limit="limit")
    drawn(figure)
    line, limit = figure.axes[0].lines
    assert list(line.get_xdata()) == [1, 2, 8] and list(line.get_ydata()) == [1.0, 1.2, 1.8]
    assert list(limit.get_ydata()) == [1.0, 1.3, 2.0]


def test_a_bar_has_an_error_bar_where_there_is_an_interval():
    _, (ax,) = figures.new(4, 3, "bars")
    figures.bar(ax, 0, 2.0, "padding")
    figures.bar(ax, 1, 2.0, "minibatch_packing", low=1.5, high=2.25)
    (interval,) = [segment for collection in ax.collections for segment in collection.get_segments()]
    assert interval[:, 0].tolist() == [1.5, 2.25]
    assert [bar.get_hatch() for bar in ax.patches] == ["", "//"]


def test_a_look_is_read_from_the_table_of_strategies(monkeypatch):
    assert figures.style("padding") == (figures.COLORS[7], "", "o")
    changed = replace(STRATEGIES["padding"], label="Pads", look=STRATEGIES["dynapipe"].look)
    monkeypatch.setitem(STRATEGIES, "padding", changed)
    assert figures.style("padding") == figures.style("dynapipe") and figures.label("padding") == "Pads"


def test_a_png_is_small_and_says_what_it_shows(table):
    figure = figures.bars_with_limits(table, "packing pays: Σ n² × 2")
    with Image.open(io.BytesIO(figures.png(figure))) as image:
        assert image.info["Description"] == figure.alt == "packing pays: Σ n² × 2" and image.mode == "P"
    with Image.open(io.BytesIO(figures.png(figure, "other words"))) as image:
        assert image.info["Description"] == "other words"
    assert not plt.get_fignums(), "nothing stays open"


def test_a_long_title_is_wrapped_to_the_figure():
    figure, _ = figures.new(4, 3, "title")
    figures.head(figure, "word " * 30 + "\nend")
    lines = figure.get_suptitle().split("\n")
    assert len(lines) > 3 and max(map(len, lines)) <= 36 and lines[-1] == "end"
