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


def inside(figure) -> None:
    """No text of an axes leaves its frame."""
    for ax in figure.axes:
        frame = ax.get_window_extent()
        for text in ax.texts:
            box = text.get_window_extent()
            assert frame.x0 <= box.x0 and box.x1 < frame.x1, text.get_text()


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


def test_a_label_has_one_line_in_all_panels_of_a_forest():
    rows = [
        ("a", "minibatch_packing", 0.1, 0.05, 0.15, 3, "per token"),
        ("b", "multipack_posid", 0.2, 0.1, 0.3, 3, "per token"),
        ("b", "multipack_posid", -0.2, -0.3, -0.1, 3, "per example"),
    ]
    table = pd.DataFrame(rows, columns=["label", "strategy", "difference", "low", "high", "n", "average"])
    figure = figures.forest(table, "differences", "nats", panels="average")
    drawn(figure)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["per token", "per example"]
    heights = [
        [float(y) for line in ax.lines if line.get_marker() in "D^" for y in line.get_ydata()] for ax in figure.axes
    ]
    assert heights == [[0.0, 1.0], [1.0]]


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
    assert sorted(texts(figure)) == ["100.000", "350.000", "742.000", "paper: not known"]
    assert sorted(bar.get_width() for bar in figure.axes[0].patches if bar.get_width()) == [100, 350, 742]
    inside(figure)


def test_numbers_beside_bars_are_alike_and_stand_outside_them():
    rows = [
        ("a", "padding", "paper", 1.4, 2.0),
        ("a", "padding", "ours", 0.944, 1.0),
        ("b", "padding", "ours", -1.5, 0),
    ]
    rows += [("c", "padding", "ours", -0.0001, math.nan)]
    table = pd.DataFrame(rows, columns=["label", "strategy", "source", "value", "most"])
    figure = figures.beside_paper(table, "value", "beside", "ratio", decimals=2, limit="most", meaning="the most")
    drawn(figure)
    inside(figure)
    (ax,) = figure.axes
    found = {text.get_text(): text.get_window_extent() for text in ax.texts}
    assert {"1.40", "0.94", "-1.50", "0.00"} <= set(found)
    ends = {name: ax.transData.transform((x, 0))[0] for name, x in (("1.40", 1.4), ("0.94", 1.0), ("-1.50", -1.5))}
    assert found["1.40"].x0 > ends["1.40"] and found["-1.50"].x1 < ends["-1.50"]
    assert found["0.94"].x0 > ends["0.94"], "beyond the limit of 1, not on it"
    dashed = [line for line in ax.lines if line.get_linestyle() == "--" and len(line.get_xdata())]
    assert [line.get_xdata()[0] for line in dashed] == [1.0, 0.0], "none for the paper's bar, and none for NaN"
    assert all(text.get_zorder() > line.get_zorder() for text in ax.texts for line in ax.lines)
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(ax.get_window_extent())


@pytest.mark.parametrize("corpora", [1, 2, 3, 4])
def test_panels_beside_the_paper_share_labels_on_a_page(corpora):
    """However many labels: a long one does not shrink the print, and none of a panel's is taken for zero."""
    names = ["h200, mistral-7b (Liger's layers)", "b"]
    rows = [
        (name, "minibatch_packing", source, f"a_long_name_{i} for FLAN", 4.06 - i, 4.1)
        for i in range(corpora)
        for name in names[: 2 - (i == 1)]
        for source in ("paper", "ours")
    ]
    table = pd.DataFrame(rows, columns=["label", "strategy", "source", "corpus", "value", "most"])
    options = {"panels": "corpus", "decimals": 2, "limit": "most", "meaning": "the most"}
    figure = figures.beside_paper(table, "value", "beside", "real tokens/s, relative to padding", **options)
    drawn(figure)
    inside(figure)
    assert figure.get_figwidth() == figures.PAGE and len(figure.axes) == corpora
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == names
    for i, ax in enumerate(figure.axes):
        assert " ".join(ax.get_title(loc="left").split()) == f"a_long_name_{i} for FLAN"
        assert ("not measured" in [text.get_text() for text in ax.texts]) == (i == 1)
    (legend,) = figure.legends
    boxes = [legend.get_window_extent(), *(ax.get_tightbbox() for ax in figure.axes)]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


@pytest.mark.parametrize("width", [None, 7.0])
def test_no_number_lies_on_its_limit_or_on_the_frame(width):
    rows = [("pydocs", "padding", 1.0, 1.0), ("pydocs", "minibatch_packing", 1.41, 1.55), ("math", "padding", 0.9, 1.0)]
    table = pd.DataFrame(rows, columns=["corpus", "strategy", "speed_up", "limit"])
    table = table.assign(speed_up_low=table["speed_up"], speed_up_high=table["speed_up"])
    figure = figures.bars_with_limits(table, "bars", width=width, row=0.6)
    drawn(figure)
    inside(figure)
    for ax in figure.axes:
        limits = [line for line in ax.lines if line.get_linestyle() == "--" and len(line.get_xdata())]
        for text, line in zip(ax.texts, limits, strict=True):
            assert text.get_window_extent().x0 > ax.transData.transform((line.get_xdata()[0], 0))[0]


@pytest.mark.parametrize("low, high, some", [(2, 40, {"5", "10", "20"}), (8, 3e4, {"10", "100", "1,000", "10,000"})])
def test_logarithmic_axes_have_plain_numbers(low, high, some):
    figure, (ax,) = figures.new(6, 4, "numbers")
    ax.plot([1, 2], [low, high])
    ax.set_yscale("log")
    figures.plain_numbers(ax.yaxis)
    figure.canvas.draw()
    bottom, top = ax.get_ylim()
    shown = {tick.label1.get_text() for tick in ax.yaxis.get_major_ticks() if bottom <= tick.get_loc() <= top}
    assert some <= shown and not any("$" in text for text in shown)
    assert not ax.yaxis.get_minor_ticks()


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
    with Image.open(io.BytesIO(figures.png(figure, "other words", Drawn="today"))) as image:
        assert image.info["Description"] == "other words" and image.info["Drawn"] == "today"
    assert not plt.get_fignums(), "nothing stays open"


def test_a_long_title_is_wrapped_to_the_figure():
    figure, _ = figures.new(4, 3, "title")
    figures.head(figure, "word " * 30 + "\nend")
    lines = figure.get_suptitle().split("\n")
    assert len(lines) > 3 and max(map(len, lines)) <= 36 and lines[-1] == "end"
