"""The arms of notebook 06 and what it says of them, from made-up records whose answers are known."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from packlib.lab import records, tables
from packlib.lab.pages import reproduce
from packlib.lab.runs import experiment
from packlib.lab.runs.spec import Rig, RunSpec
from packlib.lab.studies import throughput
from tests.lab import test_tables as made

BASE = RunSpec(steps=9)


def row(*arm, **changes) -> dict:
    return {"environment.concurrent_runs": 1} | made.row(*arm, **changes)


def lost(*arm, **changes) -> dict:
    return {"environment.concurrent_runs": 1} | made.lost(*arm, **changes)


def test_arms_come_in_the_order_in_which_they_are_read():
    strategies, places = (
        ["padding", "padding:transformers_sdpa", "multipack_posid"],
        (["tiny-llama"], ["pydocs", "arithmetic"]),
    )
    further = [
        {"corpora": ["pydocs"], "strategies": ["padding", "minibatch_packing"], "repeat": 1},
        {"models": ["phi-2"], "seed": 7},
    ]
    specs = throughput.table_2_specs(BASE, *places, strategies, further)
    arms = [(s.model, s.corpus, s.strategy, s.kernel, s.repeat, s.seed) for s in specs]
    each = [("padding", "auto"), ("padding", "transformers_sdpa"), ("multipack_posid", "auto")]
    first = [("tiny-llama", corpus, *arm, 0, BASE.seed) for corpus in ("pydocs", "arithmetic") for arm in each]
    repeats = [("tiny-llama", "pydocs", arm, "auto", 1, BASE.seed) for arm in ("padding", "minibatch_packing")]
    assert arms == [
        *first,
        *repeats,
        *(("phi-2", corpus, *arm, 0, 7) for corpus in ("pydocs", "arithmetic") for arm in each),
    ]
    assert len({spec.spec_id for spec in specs}) == len(specs)
    assert further == [
        {"corpora": ["pydocs"], "strategies": ["padding", "minibatch_packing"], "repeat": 1},
        {"models": ["phi-2"], "seed": 7},
    ]
    same = {
        "model": BASE.model,
        "corpus": BASE.corpus,
        "strategy": "padding",
        "kernel": "auto",
        "repeat": 0,
        "seed": BASE.seed,
    }
    assert all(replace(spec, **same) == BASE for spec in specs), "all else is alike"


def test_a_rig_says_what_differs_from_the_base():
    base = replace(BASE, rig=Rig(recompute="all"))
    specs = throughput.table_2_specs(base, ["tiny-llama"], ["pydocs"], ["padding"], [{"rig": {"liger": True}}])
    assert [spec.rig for spec in specs] == [Rig(recompute="all"), Rig(recompute="all", liger=True)]
    with pytest.raises(TypeError, match="'ligr'"):
        throughput.table_2_specs(base, ["tiny-llama"], ["pydocs"], ["padding"], [{"rig": {"ligr": True}}])


def test_a_misspelt_arm_or_field_is_named():
    with pytest.raises(ValueError, match="unknown strategy 'paddin'"):
        throughput.table_2_specs(BASE, ["tiny-llama"], ["pydocs"], ["paddin"])
    with pytest.raises(ValueError, match="unknown kernel 'sdpaa'"):
        throughput.table_2_specs(BASE, ["tiny-llama"], ["pydocs"], ["padding:sdpaa"])
    with pytest.raises(TypeError, match="'modell'"):
        throughput.table_2_specs(
            BASE, ["tiny-llama"], ["pydocs"], ["padding"], [{"corpora": ["arithmetic"], "modell": "phi-2"}]
        )


def test_the_curve_has_pairs():
    specs = throughput.batch_size_specs(BASE, "tiny-llama", "pydocs", [1, 8])
    assert [(s.batch_size, s.strategy) for s in specs] == [
        (n, name) for n in (1, 8) for name in ("padding", "minibatch_packing")
    ]


def test_short_steps_are_measured_more_often(monkeypatch):
    lengths = np.array([10, 30] * 50)  # 2000 tokens
    monkeypatch.setattr(throughput, "load_corpus", lambda name, **options: SimpleNamespace(lengths=lengths))
    base = replace(BASE, batch_size=5, max_tokens=100, warmup_steps=3, steps=6)
    arms = ("padding", "trl_padding_free", "fixed_length_packing_posid", "multipack_posid", "trl_packing_bfd")
    specs = [replace(base, strategy=name) for name in arms]
    found = {spec.strategy: spec.steps for spec in throughput.enough_steps(specs, 1000)}
    # Five examples of 20 tokens make 100 a step; 5 rows of 100, or one of 500, make 500, and two such steps are
    # measured already.
    assert found == dict(zip(arms, (13, 13, 6, 6, 6)))
    assert throughput.enough_steps([replace(base, gradient_accumulation=2)], 1000)[0].steps == 8
    assert throughput.enough_steps(specs, 0) == specs


def test_reached_is_the_share_of_the_limit_that_became_speed():
    frame = pd.DataFrame(
        [
            row(batch_size=4, waste=2.0),
            row("minibatch_packing", 190, 1.0, batch_size=4),
            row(batch_size=8, waste=3.0),
            row("minibatch_packing", 200, 1.0, batch_size=8),
            row(batch_size=1, waste=1.0),
            row("minibatch_packing", 101, 1.0, batch_size=1),
            row(batch_size=16, waste=3.0),
            lost("minibatch_packing", batch_size=16),
            row(rate=1, batch_size=4, kernel="transformers_sdpa"),
            row("multipack_posid", 900, 1.0, batch_size=4),
        ]
    )
    again = row("minibatch_packing", 160, 1.0, batch_size=4, repeat=1)
    twice = throughput.batch_size_table(pd.DataFrame([*frame.to_dict("records"), again]))
    assert twice.set_index("batch_size").loc[4, "speed_up"] == 1.75, "repeats are pooled"
    wide = [row(rate=9, batch_size=4, max_tokens=2), row("minibatch_packing", 9, 1.0, batch_size=4, max_tokens=2)]
    apart = throughput.batch_size_table(pd.DataFrame([*frame.assign(max_tokens=1).to_dict("records"), *wide]))
    assert sorted(apart.loc[apart["batch_size"] == 4, "speed_up"]) == [1.0, 1.9], "another setting is no repeat"
    table = throughput.batch_size_table(frame).set_index("batch_size")
    assert table["speed_up"].to_dict() == {1: 1.01, 4: 1.9, 8: 2.0} and table["limit"].to_dict() == {
        1: 1.0,
        4: 2.0,
        8: 3.0,
    }
    assert table.loc[[4, 8], "reached"].tolist() == pytest.approx([0.9, 0.5]) and pd.isna(table.loc[1, "reached"]), (
        "nothing was wasted"
    )


def steps(slots, seconds):
    return pd.DataFrame(
        [row(**{"metrics.slots_per_step": n, "metrics.step_seconds.mean": s}) for n, s in zip(slots, seconds)]
    )


def test_fixed_cost_is_the_line_through_the_arms():
    slots = [1000, 2000, 3000, 5000]
    cost = throughput.fixed_cost(steps(slots, [0.05 + 2e-5 * n for n in slots]))
    assert cost == pytest.approx({"fixed_seconds": 0.05, "seconds_per_slot": 2e-5, "r2": 1.0})
    assert throughput.fixed_cost(steps(slots, [0.2, 0.1, 0.2, 0.1]))["r2"] < 0.5, "the negative control is no line"
    few = throughput.fixed_cost(pd.concat([steps(slots[:2], [1, 2]), pd.DataFrame([lost("padding")])]))
    assert all(map(math.isnan, few.values())), "two points are no evidence for a line"


def test_findings_say_what_was_measured():
    frame = pd.DataFrame(
        [
            row(),
            *(row(rate=rate, repeat=i) for i, rate in enumerate([90, 117], 1)),
            row("minibatch_packing", 190, 1.0, 8e9),
            row("multipack_posid", 350, 1.0),
            row("trl_padding_free", 152, 1.0),
            lost("fixed_length_packing", error="killed by SIGKILL"),
        ]
    )
    by_size = throughput.batch_size_table(frame[frame["repeat"] == 0])
    line = {"fixed_seconds": 0.05, "seconds_per_slot": 2e-5, "r2": 1.0}
    said = "\n".join(throughput.findings(tables.against(frame), by_size, line, frame))
    faster = "MiniBatchPacking + PosID is 1.90 times as fast as padding, where the waste allows 2.00"
    assert f"{faster}; its peak memory is 0.80 of padding's" in said
    assert said.startswith("Repeats are off") and "the fastest of our other" not in said, "and so nothing is ranked"
    steady = throughput.findings(tables.against(frame), by_size, line, frame[frame["repeat"] == 0])
    assert "the fastest of our other strategies is Multipack + PosID, 3.50 times padding" in "\n".join(steady)
    assert "MiniBatchPacking + PosID runs at 1.25 times the real tokens/s of TRL padding_free" in said
    assert "At 4 examples a batch, 90% of what dropping the pads can give has become speed" in "\n".join(steady)
    assert "costs 50 ms before its first slot and 20.00 µs per slot" in said and "by at most 30.0%" in said
    assert said.endswith("fixed_length_packing with tiny-llama: oom, killed by SIGKILL.")


def test_findings_without_padding_claim_no_speed_up():
    frame = pd.DataFrame([lost("padding", error="killed"), row("minibatch_packing", 190, 1.0)])
    said = throughput.findings(
        tables.against(frame),
        throughput.batch_size_table(frame),
        {"fixed_seconds": 0.05, "seconds_per_slot": 2e-5},
        frame,
    )
    assert (
        not any("times" in finding or "nan" in finding for finding in said)
        and said[-1] == "padding with tiny-llama: oom, killed."
    )


def rigged(strategy="padding", rate=100.0, liger=False, **changes):
    return row(strategy, rate, **{"rig.recompute": "all", "rig.liger": liger} | changes)


def test_figures_and_line_are_of_the_first_rig():
    frame = pd.DataFrame([rigged(), rigged("multipack_posid", 200), rigged(rate=500, liger=True), lost("dynapipe")])
    main = throughput.main_arms(tables.against(frame), "tiny-llama")
    assert main["strategy"].tolist() == ["padding", "multipack_posid"] and main["tokens_per_s"].max() == 200
    spec = RunSpec(corpus="pydocs", rig=Rig(recompute="all"))
    assert throughput.like(frame, spec, "pydocs").index.tolist() == [0, 1]
    assert len(throughput.like(frame, spec, "arithmetic")) == 0


def test_the_machine_s_use_is_named_by_rig():
    frame = pd.DataFrame([rigged(), rigged(rate=200, liger=True)])
    assert throughput.utilization_table(tables.against(frame))["model"].tolist() == [
        "tiny-llama",
        "tiny-llama (Liger's layers)",
    ]


def test_readers_see_words_and_gigabytes():
    table = pd.DataFrame(
        {"batch_size": [1, 4], "speed_up": [1.1, 1.5], "limit": [1.0, 2.0], "reached": [float("nan"), 0.5]}
        | {"padding_memory_bytes": [2e9, 4e9], "packed_memory_bytes": [2e9, 3e9]}
    )
    assert throughput.display_sizes(table).to_html(exclude_styles=True).count("_") == 0
    told = re.findall(r">([^<\s]+)</td>", throughput.display_sizes(table).to_html())
    assert told[6:] == ["4", "1.50", "2.00", "50%", "4.00", "3.00"]


def test_memory_bars_are_in_gigabytes():
    frame = pd.DataFrame([row(), row("minibatch_packing", 190, 1.0, 8e9), lost("multipack_posid")])
    figure = throughput.memory_bars(throughput.main_arms(tables.against(frame), "tiny-llama"), "tiny-llama")
    figure.canvas.draw()
    (ax,) = figure.axes
    assert all(text.get_window_extent().x1 < ax.get_window_extent().x1 for text in ax.texts)
    assert [bar.get_width() for bar in ax.patches] == [10.0, 8.0]
    assert [text.get_text().strip() for text in ax.texts] == ["10.00", "8.00"] and "memory (GB)" in ax.get_xlabel()


def test_bars_and_curve_leave_out_attention_that_pads():
    frame = pd.DataFrame([row(), row("minibatch_packing", 190, 1.0), row(kernel="transformers_sdpa", rate=50)])
    main = throughput.main_arms(tables.against(frame), "tiny-llama")
    figure = throughput.speed_up_bars(main, "tiny-llama")
    assert [bar.get_width() for bar in figure.axes[0].patches] == [1.0, 1.9]
    doubted = throughput.speed_up_bars(main, "tiny-llama", "control off")
    assert [picture.alt.count("(control off)") for picture in (figure, doubted)] == [0, 1]
    by_size = throughput.batch_size_table(pd.concat([frame, frame.assign(batch_size=8)]))
    curve = throughput.batch_size_curve(by_size, "tiny-llama", "some/pydocs.jsonl")
    curve.canvas.draw()
    assert curve.alt == "tiny-llama, pydocs: speed-up and its limit against batch size"


def test_of_two_ways_through_sdpa_the_stronger_is_the_baseline():
    """Held to its flash kernel where that was measured, else as PyTorch chooses; unpadded padding stays the first."""
    rates = {"auto": 100, "maskless_sdpa": 50, "flash_sdpa": 80}
    alone = {"environment.concurrent_runs": 1}
    frame = pd.DataFrame([made.row(kernel=kernel, rate=rate, **alone) for kernel, rate in rates.items()])
    found = throughput.both_baselines(frame).set_index("kernel")
    assert found["over_sdpa"].to_dict() == {"auto": 1.25, "maskless_sdpa": 0.625, "flash_sdpa": 1.0}
    assert found["speed_up"].to_dict() == {"auto": 1.0, "maskless_sdpa": 0.5, "flash_sdpa": 0.8}
    left = throughput.both_baselines(frame[frame["kernel"] != "flash_sdpa"]).set_index("kernel")
    assert left["over_sdpa"].to_dict() == {"auto": 2.0, "maskless_sdpa": 1.0}


def test_one_number_of_slots_makes_no_line():
    same = throughput.fixed_cost(steps([1000] * 4, [1, 2, 3, 4]))
    assert all(map(math.isnan, same.values()))


@pytest.mark.parametrize(("run", "rig"), [("h200", "graphs"), ("h200_models", "liger")])
def test_the_published_run_is_of_its_preset(monkeypatch, run, rig):
    """Every arm that the preset asks for has a record, without the data: notebook 06 redraws it anywhere."""
    monkeypatch.delenv("PACKLIB_DATA", raising=False)
    asked = reproduce.load_preset(run)["notebooks"]["06_measure_throughput_and_memory"]
    sizes = {name: asked[name] for name in ("batch_size", "max_tokens", "gradient_accumulation", "steps")}
    base = RunSpec(**sizes, **asked["options"])
    places = (asked["models"], asked["corpora"], asked["strategies"], asked["further"])
    specs = throughput.table_2_specs(base, *places)
    specs += throughput.batch_size_specs(base, asked["models"][0], asked["corpora"][-1], asked["batch_sizes"])
    folder = records.run_folder(run, create=False)
    assert len(specs) > 35 and not [spec for spec in specs if experiment.find(spec, folder) is None]
    assert [spec for spec in specs if getattr(spec.rig, rig)], "other rigs are among them"


@pytest.mark.parametrize("name", ["h100", "h100x2", "h100x8", "h200", "h200_models"])
def test_arms_of_every_preset_are_possible_and_different(name):
    given = reproduce.load_preset(name)["notebooks"].get("06_measure_throughput_and_memory")
    sizes = {key: given[key] for key in ("batch_size", "max_tokens", "gradient_accumulation", "steps") if key in given}
    base = RunSpec(**sizes, **given["options"])
    specs = throughput.table_2_specs(base, *(given[key] for key in throughput.PLACE), given.get("further", []))
    assert len({spec.spec_id for spec in specs}) == len(specs) > 5
