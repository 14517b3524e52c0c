"""Adding a strategy is a planner and a row: this one is known to this file alone, and is in every table and figure."""

from collections import deque
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from packlib.lab import advice, figures, records, strategies, tables
from packlib.lab.pages import report
from packlib.lab.runs import experiment, worker
from packlib.lab.runs.spec import RunSpec
from packlib.lab.strategies import STRATEGIES, Look, Strategy
from packlib.lab.studies import convergence, paper, planning, throughput, waste
from packlib.plans import Plan
from packlib.plans.lengths import hash_lengths


def long_with_short(lengths, size, *, seed=0):
    """Rows of at most `size` tokens: the longest example that is left, then short ones while they fit."""
    lengths = np.asarray(lengths)
    left = deque(np.argsort(-lengths, kind="stable").tolist())
    rows = []
    while left:
        row = [left.popleft()]
        while left and lengths[[*row, left[-1]]].sum() <= size:
            row.append(left.pop())
        rows.append(row)
    rows = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    example = np.concatenate(rows)
    splits = np.cumsum([0, *map(len, rows)])
    name = f"long_with_short(size={size}, seed={seed})"
    return Plan(splits, example, np.zeros_like(example), lengths[example], size, name, hash_lengths(lengths))


OWN = Strategy("long_with_short", "Long with short", long_with_short, "batch", "flat", Look(6, "..", "d"))
BASE = RunSpec(
    corpus="arithmetic",
    tokenizer="bpe:512",
    limit=24,
    batch_size=4,
    max_tokens=256,
    layers=1,
    warmup_steps=1,
    steps=4,
    eval_examples=4,
    eval_every=2,
)
NAMES = ["padding", OWN.name]
LENGTHS = np.random.default_rng(0).integers(5, 200, 60)


def child(spec, run_id, folder, sender):
    """`experiment._child` in a process that has to be told of the row."""
    STRATEGIES[OWN.name] = OWN
    worker.execute(spec, run_id, folder, sender.send)


@pytest.fixture(autouse=True)
def row(monkeypatch):
    monkeypatch.setitem(STRATEGIES, OWN.name, OWN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One run of each, measured."""
    folder = records.run_folder(tmp_path_factory.mktemp("own"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STRATEGIES, OWN.name, OWN)
        patch.setattr(experiment, "_child", child)
        found = experiment.run([replace(BASE, strategy=name) for name in NAMES], folder)
    assert [record["status"] for record in found] == ["ok"] * 2, [record["error"] for record in found]
    return folder


@pytest.fixture
def frame(folder):
    return experiment.frame([replace(BASE, strategy=name) for name in NAMES], folder)


def drawn(figure) -> list[str]:
    """All texts of a figure that was drawn, and its alt text."""
    figure.canvas.draw()
    found = [text for ax in figure.axes for text in (*ax.get_yticklabels(), *ax.texts)]
    own = [ax.get_legend() for ax in figure.axes if ax.get_legend()]
    legends = [text for legend in (*own, *figure.legends) for text in legend.get_texts()]
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    return [text.get_text() for text in found + legends] + [*titles, figure.alt]


def names_it(figure) -> bool:
    return any(OWN.label in text or OWN.name in text for text in drawn(figure))


def test_it_is_listed_and_planned():
    assert OWN.name in strategies.listing()
    table = waste.strategy_table(LENGTHS.tolist(), batch_size=4)
    assert table.loc[OWN.name, ["in words", "slots"]].tolist() == [OWN.label, LENGTHS.sum()]
    sizes = {"batch_size": 4, "max_tokens": 256, "seed": 0}
    compared = planning.planner_table(LENGTHS, **sizes).set_index("planner")
    assert compared.loc[OWN.name, "broken_examples"] == 0 and compared.loc[OWN.name, "row_fill"] > 0.7
    assert names_it(planning.row_pictures(LENGTHS[:8], list(planning.planners()), **sizes))


def test_it_is_advised_on():
    found = advice.advise(LENGTHS, batch_size=4, max_tokens=256, model="tiny-llama")
    assert OWN.label in str(found)
    assert names_it(waste.predicted_speed_ups({"made": found}))


def test_it_is_measured_and_in_every_table(folder, frame):
    table = tables.against(frame).set_index("strategy")
    assert table.loc[OWN.name, "speed_up"] > 0 and table.loc[OWN.name, "waste"] == 1
    assert OWN.label in set(tables.display_table(table.reset_index())["batching"])
    assert f"| {OWN.label} |" in report.headline(folder)
    assert tables.table_2_rows(frame.iloc[1]) == frame["plan.rows"].iloc[1]
    busy = throughput.utilization_table(table.reset_index())
    assert OWN.label in set(busy["batching"])
    said = throughput.findings(table.reset_index(), pd.DataFrame(), throughput.fixed_cost(frame), frame)
    assert any(OWN.label in sentence for sentence in said)


def test_it_is_in_every_figure_of_speed(frame):
    main = throughput.main_arms(tables.against(frame), BASE.model)
    assert names_it(throughput.speed_up_bars(main, BASE.model))
    assert names_it(throughput.memory_bars(main, BASE.model))
    curve = pd.DataFrame({"strategy": OWN.name, "batch_size": [1, 2], "speed_up": [1.0, 2.0], "limit": [1.0, 3.0]})
    assert names_it(figures.curves(curve, "batch_size", "speed_up", "a curve", "x", "y", limit="limit"))
    assert figures.style(OWN.name) == (figures.COLORS[6], "..", "d")


def test_it_is_in_every_figure_of_learning(folder):
    planned = [convergence.Arm(name, "", replace(BASE, strategy=name)) for name in NAMES]
    found = convergence.results(folder, planned)
    assert OWN.label in set(convergence.overview(found).reset_index()["arm"])
    differences = convergence.every_arm(found)
    assert names_it(convergence.arm_forest(differences, "arithmetic"))
    steps, validation = (convergence.traces(folder, planned, validation=which) for which in (False, True))
    assert names_it(convergence.gradient_curves(steps, "arithmetic"))
    assert names_it(convergence.validation_curves(validation, "arithmetic"))
    assert convergence.differences(found)["label"].tolist() == [OWN.label]


def test_beside_the_paper_it_is_left_out_or_stands_alone(folder):
    """The paper does not know it."""
    frame = paper.measured(folder)
    assert OWN.name in set(frame["strategy"]) and OWN.name not in set(paper.speed_arms(frame)["strategy"])
    row = {"label": OWN.label, "strategy": OWN.name, "value": 1.5}
    both = pd.DataFrame([row | {"source": "ours"}, row | {"source": "paper", "value": np.nan}])
    figure = figures.beside_paper(both, "value", "beside", "ratio")
    assert names_it(figure) and "paper: not known" in {text.strip() for text in drawn(figure)}
