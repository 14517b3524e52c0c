"""Figures draw what their tables hold, leave empty what they do not, and carry alt text."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from test_tables import lost, row

from packlib.lab import figures, tables


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def table():
    both = [[row(corpus=c), row("minibatch_packing", 190, 1.0, 8e9, corpus=c), lost("multipack_posid", corpus=c)] for c in ("pydocs", "arithmetic")]
    return tables.against(pd.DataFrame(both[0] + both[1]))


def texts(figure) -> list[str]:
    return [text.get_text().strip() for ax in figure.axes for text in ax.texts]


def drawn(figure) -> None:
    """Everything that a reader needs is there, and it can be drawn."""
    assert figure.alt
    figure.canvas.draw()
    for ax in figure.axes:
        labels = [ax.xaxis.label, *ax.get_xticklabels(), *ax.get_yticklabels(), *ax.texts]
        assert all(label.get_fontsize() >= 10 for label in labels if label.get_text())


def test_speed_up_bars_show_every_limit_and_no_bar_for_what_was_not_measured(table):
    figure = figures.speed_up_bars(table, "packing pays")
    drawn(figure)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["pydocs", "arithmetic"]
    for ax in figure.axes:
        assert [bar.get_width() for bar in ax.patches] == [1.0, 1.9], "two bars for three arms"
        limits = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--" and len(line.get_xdata())]
        assert limits == [1.0, 2.0]
    assert texts(figure) == ["1.00×", "1.90×"] * 2
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["Padding", "MiniBatchPacking + PosID", "Multipack + PosID"]


def test_memory_bars_are_in_gigabytes(table):
    figure = figures.memory_bars(table, "memory")
    drawn(figure)
    assert [bar.get_width() for bar in figure.axes[0].patches if bar.get_width() > 0] == [10.0, 8.0]
    assert texts(figure)[:2] == ["10.00", "8.00"]


def test_forest_marks_zero_and_draws_no_interval_for_one_seed():
    rows = [("a", "minibatch_packing", 0.1, 0.05, 0.15, 3), ("b", "multipack_posid", 0.2, math.nan, math.nan, 1)]
    figure = figures.forest(pd.DataFrame(rows, columns=["label", "strategy", "difference", "low", "high", "n"]), "differences", "nats")
    drawn(figure)
    (ax,) = figure.axes
    intervals = [segment for collection in ax.collections for segment in collection.get_segments()]
    assert np.array(intervals)[:, :, 0].tolist() == [[pytest.approx(0.05), pytest.approx(0.15)]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a (n=3)", "b (n=1)"]
    assert any(list(line.get_xdata()) == [0, 0] for line in ax.lines)


def test_what_the_paper_does_not_say_is_written_out():
    rows = [("Padding", "padding", "paper", 742.0), ("Padding", "padding", "ours", 100.0), ("Multipack", "multipack_posid", "ours", 350.0)]
    rows.append(("Multipack", "multipack_posid", "paper", math.nan))
    figure = figures.beside_paper(pd.DataFrame(rows, columns=["label", "strategy", "source", "value"]), "value", "beside", "tokens/s")
    drawn(figure)
    assert sorted(texts(figure)) == ["100", "350", "742", "paper: not known"]
    assert sorted(bar.get_width() for bar in figure.axes[0].patches if bar.get_width()) == [100, 350, 742]


def test_curves_have_their_limit():
    frame = pd.DataFrame({"strategy": "minibatch_packing", "batch_size": [8, 1, 2], "speed_up": [1.8, 1.0, 1.2], "limit": [2.0, 1.0, 1.3]})
    figure = figures.curves(frame, "batch_size", "speed_up", "a curve", "examples", "× padding", limit="limit")
    drawn(figure)
    line, limit = figure.axes[0].lines
    assert list(line.get_xdata()) == [1, 2, 8] and list(line.get_ydata()) == [1.0, 1.2, 1.8] and list(limit.get_ydata()) == [1.0, 1.3, 2.0]


def test_attention_pictures_leave_white_what_is_not_attended():
    weight = np.tril(np.full((5, 5), 0.2))
    isolated = weight * np.kron(np.eye(2), np.ones((3, 3)))[:5, :5]
    figure = figures.attention_pictures([3, 2], [weight, isolated], ["contaminated", "PosID"])
    drawn(figure)
    white = [int(np.isnan(np.ma.filled(ax.images[0].get_array(), np.nan)).sum()) for ax in figure.axes[:2]]
    assert white == [10, 16]


def test_logit_changes_name_the_largest_change_of_the_others():
    changes = {"without PosID": np.array([0.5, 0.5, 0.25, 0.1]), "with PosID": np.array([0.5, 0.5, 0.0, 0.0])}
    figure = figures.logit_changes(changes, [2, 2], edited=0)
    drawn(figure)
    assert "0.25 without PosID, 0 with PosID" in figure.axes[0].get_title(loc="left") and texts(figure) == ["A, edited", "B"]


def test_a_figure_is_shown_with_its_alt_text_and_kept(tmp_path, monkeypatch, table):
    shown = []
    monkeypatch.setattr(figures, "display", shown.append)
    figure = figures.memory_bars(table, "memory")
    figures.show(figure, "06_memory", tmp_path)
    assert (tmp_path / "figures" / "06_memory.png").read_bytes() == shown[0].data and shown[0].data.startswith(b"\x89PNG")
    assert shown[0].alt == figure.alt == "memory" and not plt.get_fignums(), "closed"
    figures.show(figures.memory_bars(table, "memory"))
    assert len(list(tmp_path.rglob("*.png"))) == 1
