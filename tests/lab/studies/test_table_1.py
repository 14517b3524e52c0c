"""What the table of strategies computes, against what the paper says of each."""

import pytest

from packlib.lab.strategies import STRATEGIES
from packlib.lab.studies import table_1


@pytest.fixture(scope="module")
def table():
    lengths = table_1.drawn(400, 240, 2048)
    assert 200 < lengths.mean() < 280 and lengths.max() <= 2048
    return table_1.table(lengths, batch_size=4, max_tokens=2048, accumulation=2)


def test_it_agrees_with_what_the_paper_says(table):
    apart, whole = table["examples stay apart"], table["whole examples"]
    assert apart[~apart].index.tolist() == ["FixedLengthPacking (contaminated)"]
    broken = ["FixedLengthPacking (contaminated)", "FixedLengthPacking + PosID", "Best fit, cropped + PosID"]
    assert whole[~whole].index.tolist() == broken
    online = table["online"]
    assert online["Padding"] and online["MiniBatchPacking + PosID"] and online["Random packing + PosID"]
    assert not online["Group by length"] and not online["Multipack + PosID"] and not online["Sorted packing + PosID"]
    assert table.loc["Padding", "random groups"] and not table.loc["Sorted packing + PosID", "random groups"]


def test_sizes_are_those_of_an_epoch(table):
    assert table.loc["Padding", "rows"] == table.loc["MiniBatchPacking + PosID", "rows"] == 400
    assert table.loc["Padding", "optimiser steps"] == 400 / 4 / 2
    assert table.loc["MiniBatchPacking + PosID", "fill"] == 1.0 > table.loc["Padding", "fill"]
    assert len(table) == sum(strategy.trl is None for strategy in STRATEGIES.values())
    shown = table_1.display(table)
    assert shown.loc["Padding", "online"] == "yes" and shown.loc["Padding", "rows"] == "400"
