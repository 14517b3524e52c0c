"""The report as a stranger reads it: question, answer, provenance first; a control that is off takes rankings back."""

import json
import math

import pandas as pd
import pytest

from packlib.lab import doubts, records
from packlib.lab.pages import report
from packlib.lab.studies import throughput
from tests.lab.test_tables import lost, row


def record(identity: str, found: dict, created: str = "2026-01-01", **environment: object) -> dict:
    """A record of the line that `load_records` would give."""
    nested: dict = {"metrics": {}, "plan": {}}
    for name, value in found.items():
        if "." in name:
            *parents, last = name.split(".")
            place = nested
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value
    spec = {name: value for name, value in found.items() if "." not in name and name != "status"}
    seen = {"created": created, "device": "CPU", "torch": "2", "transformers": "5"} | environment
    head = {"run_id": identity, "status": found["status"], "error": None, "spec": spec, "environment": seen}
    measured = nested if found["status"] == "ok" else {"metrics": None, "plan": None}
    return head | measured | {"trace": None}


def written(folder, *found: dict) -> str:
    for i, one in enumerate(found):
        records.write_record(folder, record(f"r{i}", one))
    return report.write_report(folder).read_text(encoding="utf-8")


def tables_of(text: str) -> list[dict[str, dict[str, str]]]:
    """Every table with a column `batching`, as batching -> column -> cell."""
    found: list[dict] = []
    head: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if "batching" in cells:
            head = cells
            found.append({})
        elif head and len(cells) == len(head) and not line.startswith("|---"):
            found[-1][cells[head.index("batching")]] = dict(zip(head, cells))
        elif not cells:
            head = []
    return found


def test_one_setting_is_compared_and_capacities_are_apart(tmp_path):
    folder = records.run_folder(tmp_path)
    curve = [row(rate=50, batch_size=1), row("minibatch_packing", 50, batch_size=1)]
    table_2 = [row(), row("minibatch_packing", 190, 1.0), lost("multipack_posid")]
    shared = record("shared", row("fixed_length_packing", 1.0), concurrent_runs=2)
    records.write_record(folder, shared)
    text = written(folder, *curve, *table_2, row("multipack_posid", 9e9, steps=3))
    same, full = tables_of(text)
    assert list(same) == ["Padding", "MiniBatchPacking + PosID"] and list(full) == ["Multipack + PosID"]
    assert [arm["× padding"] for arm in same.values()] == ["1.00", "1.90"]
    assert full["Multipack + PosID"]["× padding"] == report.ABSENT and full["Multipack + PosID"]["status"] == "oom"
    for name in same["Padding"].keys() & report.LEGEND.keys():
        assert f"- **{name}**:" in text, "the legend explains every column"


def test_question_summary_and_provenance_come_first(tmp_path):
    folder = records.run_folder(tmp_path)
    found = [row(), row("minibatch_packing", 190, 1.0)]
    for i, sha in enumerate(["0123456789abc", "fedcba9876543"]):
        facts = {"git_sha": sha, "dirty": bool(i), "trl": "1"}
        records.write_record(folder, record(f"c{i}", found[i], f"2026-01-0{i + 1}T00", **facts))
    lines = [line for line in report.write_report(folder).read_text(encoding="utf-8").splitlines() if line]
    assert lines[1] == f"**Question.** {report.QUESTION}"
    assert lines[2].startswith(
        "**Summary.** Flattening the same mini-batches trains 1.90 times as fast as padding, on 1 model and 1 data set"
    )
    assert lines[5:7] == [
        "| `012345678` | 2026-01-01 | CPU | torch 2, transformers 5, trl 1 | 1 |",
        "| `fedcba987-dirty` | 2026-01-02 | CPU | torch 2, transformers 5, trl 1 | 1 |",
    ]


def test_a_folder_without_training_runs_has_a_report(tmp_path):
    """As after `reproduce --only 05`: attention alone was timed."""
    folder = records.run_folder(tmp_path)
    assert report.headline(folder) == "" and written(folder).startswith("# Padding versus packing: run")
    timing = record("t0", {"status": "ok", "arm": "varlen", "tokens": 64, "metrics.waste": 1.5})
    records.write_record(folder, timing)
    assert report.headline(folder) == "" and "| CPU |" in report.render(folder)
    records.write_record(folder, record("r0", row()))
    assert report.headline(folder).count("\n") == 2, "a line for training, none for timing"
    assert json.loads((folder / "records" / "t0.json").read_text(encoding="utf-8")) == timing


def test_the_terminal_gets_a_few_arms(tmp_path):
    folder = records.run_folder(tmp_path)
    written(folder, *(row(model=f"m{i}") for i in range(report.ON_TERMINAL + 3)))
    shown = report.headline(folder).splitlines()
    assert len(shown) == report.ON_TERMINAL + 3 and shown[-1] == "… 3 more arms in the report"


# controls


@pytest.mark.parametrize(("ratio", "off"), [(1.0, False), (1.029, False), (0.971, False), (1.138, True), (0.9, True)])
def test_a_batch_of_one_must_run_as_fast_packed(tmp_path, ratio, off):
    folder = records.run_folder(tmp_path)
    arms = [row(rate=100, batch_size=1), row("minibatch_packing", 100 * ratio, batch_size=1)]
    text = written(folder, *arms, row(), row("minibatch_packing", 190, 1.0))
    assert ("> [!CAUTION]\n> 🔴 **The control is off" in text) == off == ("none is ranked" in text)
    assert not off or (f"{ratio:.3f} times" in text and text.index("CAUTION") < text.index("**Summary.**"))


@pytest.mark.parametrize(("control", "repeat", "off"), [(1, 1, 0), (1.138, 1, 1), (1, 1.2, 1), (1.138, 1.2, 2)])
def test_the_terminal_says_what_is_off_above_its_ratios(tmp_path, control, repeat, off):
    """The report's own sentences, whole, in lines that a terminal holds; and of a run in order not a word."""
    folder = records.run_folder(tmp_path)
    arms = [row(rate=100, batch_size=1), row("minibatch_packing", 100 * control, batch_size=1)]
    repeats = [row(rate=100 * faster) | {"repeat": i} for i, faster in enumerate([1, repeat])]
    written(folder, *arms, *repeats, row("minibatch_packing", 190, 1.0))
    *said, table = report.headline(folder).split("\n\n")
    assert table.startswith("| model |") and f"| {control:.2f} |" in table
    found = doubts.doubts(records.load_records(folder))
    assert [" ".join(one.split()) for one in said] == [f"🔴 {one}" for one in found]
    assert len(said) == off and all(len(line) <= report.WIDTH for one in said for line in one.splitlines())


def test_what_a_notebook_doubts_stands_above_its_findings(tmp_path):
    folder = records.run_folder(tmp_path)
    for i, off in enumerate([["other: off"], []]):
        summary = {"title": f"T{i}", "doubts": off, "findings": ["found"], "figures": {}}
        records.write_json(folder / "summaries" / f"0{i}_x.json", summary)
    first, second = written(folder, row()).split("## [T0]")[1].split("## [T1]")
    assert first.index("> [!CAUTION]\n> 🔴 **other: off**") < first.index("- found") and "CAUTION" not in second


@pytest.mark.parametrize(("second", "off"), [(102, False), (110, True)])
def test_repeats_must_take_the_same_time(second, off):
    """By the rate that tables show: which of ten unequal steps lies in the middle says nothing."""
    middle = {"metrics.step_seconds.p50": 0.7}
    found = [row(rate=100) | {"repeat": 0}, row(rate=second) | {"repeat": 1} | middle]
    frame = pd.DataFrame([{"environment.concurrent_runs": 1} | one for one in found])
    assert doubts.repeat_spread(frame) == pytest.approx(second / 100 - 1)
    assert bool(doubts.doubts(frame)) == off
    for other in ({"batch_size": [4, 8]}, {"steps": [6, 13]}):
        apart = frame.assign(**other)
        assert math.isnan(doubts.repeat_spread(apart)) and not doubts.doubts(apart), "other settings are no repeats"


def test_a_run_with_a_control_that_is_off_ranks_nothing():
    from packlib.lab import tables

    found = [row(), row("minibatch_packing", 190, 1.0), row("multipack_posid", 300, 1.0)]
    frame = pd.DataFrame([{"environment.concurrent_runs": 1, "error": None} | one for one in found])
    cost = {"fixed_seconds": math.nan}

    def said(control: float) -> list[str]:
        by_size = pd.DataFrame({"batch_size": [1, 4], "speed_up": [control, 1.5], "reached": [math.nan, 0.5]})
        one = [row(batch_size=1), row("minibatch_packing", 100 * control, 1.0, batch_size=1)]
        runs = pd.concat([frame, pd.DataFrame(one).assign(**{"environment.concurrent_runs": 1})])
        return throughput.findings(tables.against(frame), by_size, cost, runs)

    good, bad = said(1.01), said(1.2)
    assert any("the fastest of" in line for line in good) and any("the most in the curve" in line for line in good)
    assert isinstance(bad[0], doubts.Doubt) and "1.200 times padding's speed" in bad[0]
    assert not any("the fastest of" in line or "the most in" in line for line in bad)
    assert [line for line in bad[1:] if "times as fast as padding" in line], "what was measured is still said"


def test_an_interval_of_a_share_stays_in_its_range():
    from packlib.lab.studies import convergence

    found = pd.DataFrame({"corpus": "x", "arm": "a", "exact_match": [0.0, 0.01, 0.9]})
    row = convergence.exact_matches(found).iloc[0]
    assert (row["low"], row["high"]) == (0.0, 1.0)
    alone = convergence.exact_matches(found.head(1)).iloc[0]
    assert math.isnan(alone["low"]) and math.isnan(alone["high"]), "one seed has no interval"
