"""Tables follow from records: ratios to padding, intervals, and empty cells for what was not measured."""

import math
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

from packlib.lab import paper, records, tables
from packlib.lab.runs.spec import Rig
from packlib.lab.strategies import STRATEGIES


def row(strategy="padding", rate=100.0, waste=2.0, memory=10e9, **changes) -> dict:
    """A record as `records.load_records` gives it."""
    found = {
        "model": "tiny-llama",
        "corpus": "pydocs",
        "strategy": strategy,
        "kernel": "auto",
        "seed": 0,
        "repeat": 0,
        "batch_size": 4,
        "status": "ok",
        "metrics.tokens_per_s.mean": rate,
        "metrics.slots_per_s.mean": rate * waste,
        "metrics.peak_memory_bytes": memory,
        "metrics.measured_fill": 1 / waste,
        "metrics.measured_waste": waste,
        "metrics.optimizer_steps": 9,
        "metrics.step_seconds.p50": 0.5,
        "metrics.model_flops_utilization": 0.3,
        "plan.examples": 64,
        "plan.rows": 16,
    }
    return found | changes


def lost(strategy, status="oom", **changes) -> dict:
    return {name: math.nan if "." in name else value for name, value in row(strategy, status=status, **changes).items()}


def arms(*rows: dict) -> pd.DataFrame:
    return tables.against(pd.DataFrame(rows)).set_index(["model", "corpus", "strategy", "kernel"]).droplevel("model")


def rigged(rate: float, strategy: str = "padding", **rig) -> dict:
    """A record on a rig of which only some fields were known."""
    return row(strategy, rate, **{f"rig.{name}": value for name, value in rig.items()})


def test_speed_memory_and_limit_are_relative_to_padding():
    found = arms(row("multipack_posid", 350, 1.25, 12e9), row("padding"), row("minibatch_packing", 190, 1.0, 8e9)).loc[
        "pydocs"
    ]
    packed, full = found.loc[("minibatch_packing", "auto")], found.loc[("multipack_posid", "auto")]
    assert (packed["speed_up"], packed["limit"], packed["memory_ratio"]) == (1.9, 2.0, 0.8)
    assert (full["speed_up"], full["limit"], full["memory_ratio"]) == (3.5, 1.6, 1.2)
    assert (found.loc[("padding", "auto"), ["speed_up", "limit", "memory_ratio"]] == 1).all()
    assert [strategy for strategy, _ in found.index] == ["padding", "minibatch_packing", "multipack_posid"], (
        "in the order of the table"
    )


def timed(strategy, seconds, slots, tokens, optimizer=0.25):
    """A record that says what its step is made of."""
    step = {"step_seconds.mean": seconds, "slots_per_step": slots, "tokens_per_step": tokens}
    step |= {"limit.optimizer_seconds": optimizer, "tokens_per_s.mean": tokens / seconds}
    return row(strategy, waste=slots / tokens, **{f"metrics.{name}": value for name, value in step.items()})


def test_what_the_optimiser_costs_is_not_in_the_limit():
    """Padding: 1 s a step, of which the optimiser has to take a quarter; flat rows have half of its slots."""
    padded, flat = timed("padding", 1.0, 2000, 1000), timed("minibatch_packing", 0.7, 1000, 1000)
    full = timed("multipack_posid", 1.2, 4000, 4000)
    found = arms(padded, flat, full).loc["pydocs"].droplevel("kernel")
    assert found.loc["minibatch_packing", "limit"] == pytest.approx(1 / (0.25 + 0.75 / 2))
    assert found.loc["multipack_posid", "limit"] == pytest.approx(1 / ((0.25 + 0.75 * 2) / 4)), "fewer optimiser steps"
    assert found["waste_ratio"].tolist() == [1, 2, 2] and found.loc["padding", "limit"] == 1
    unknown = arms(padded, timed("minibatch_packing", 0.7, 1000, 1000, optimizer=math.nan)).loc["pydocs"]
    assert unknown["limit"].tolist() == [1, 2], "of which nothing is known but the waste"


def test_each_model_and_corpus_has_its_own_padding():
    found = arms(
        row(),
        row("minibatch_packing", 150),
        row(corpus="arithmetic", rate=10),
        row("minibatch_packing", 30, corpus="arithmetic"),
    )
    assert found.xs("minibatch_packing", level="strategy")["speed_up"].to_dict() == {
        ("pydocs", "auto"): 1.5,
        ("arithmetic", "auto"): 3.0,
    }


def test_attention_that_pads_is_an_arm_not_another_baseline():
    found = arms(row(), row(kernel="transformers_sdpa", rate=80), row("minibatch_packing", 200)).loc["pydocs"]
    assert found["speed_up"].to_dict() == {
        ("padding", "auto"): 1.0,
        ("padding", "transformers_sdpa"): 0.8,
        ("minibatch_packing", "auto"): 2.0,
    }
    assert (
        tables.arm_label("padding", "transformers_sdpa") == "Padding (sdpa)"
        and tables.arm_label("padding", "auto") == "Padding"
    )


def test_each_rig_has_its_own_padding_and_its_name_says_what_is_its_own():
    plain, fused = {"recompute": "all", "liger": False}, {"recompute": "all", "liger": True}
    packed = [rigged(150, "minibatch_packing", **plain), rigged(260, "minibatch_packing", **fused)]
    frame = pd.DataFrame(
        [rigged(100, **plain), rigged(200, **fused), *packed, row(model="phi-2", **{"rig.liger": True})]
    )
    table = tables.against(frame)
    assert table["speed_up"].tolist() == [1.0, 1.5, 1.0, 1.3, 1.0]
    assert list(dict.fromkeys(table["rig"])) == ["recompute=all", "recompute=all+liger", "liger"]
    shown = tables.display_table(table)["model"].tolist()
    assert shown == ["tiny-llama"] * 2 + ["tiny-llama (Liger's layers)"] * 2 + ["phi-2"], (
        "what a model's rigs share goes unsaid"
    )
    assert len(tables.one_setting(frame)) == len(frame), "each rig is a comparison of its own"


def test_each_size_of_batches_has_its_own_padding_and_its_name_says_so():
    sized = [row(rate=100), row("minibatch_packing", 150)]
    one = {"batch_size": 1, "gradient_accumulation": 2}
    other = [row(rate=50, **one), row("minibatch_packing", 51, **one)]
    usual = [each | {"gradient_accumulation": 2} for each in (*sized, row("multipack_posid", 300))]
    table = tables.against(pd.DataFrame([*usual, *other]))
    assert table["runs"].tolist() == [1] * 5, "they are no repeats of each other"
    assert dict(zip(table["tokens_per_s"], table["speed_up"])) == {100: 1, 150: 1.5, 300: 3, 50: 1, 51: 1.02}
    shown = tables.display_table(table)
    assert set(shown.loc[shown["real tokens/s"].isin(["50", "51"]), "model"]) == {"tiny-llama (batches of 1 × 2)"}


def test_ranks_that_are_not_balanced_are_another_arm():
    two = {"world_size": 2}
    runs = [row(rate=100, **two), row(rate=90, **two, balance=False), row(rate=104, **two, balance=True)]
    table = tables.against(pd.DataFrame(runs)).set_index("rig")
    assert table["runs"].to_dict() == {"ranks=2": 2, "ranks=2+unbalanced": 1}, "older records were balanced"
    assert "ranks not balanced" in tables.display_table(table.reset_index())["model"].iloc[1]
    assert len(tables.one_setting(pd.DataFrame(runs))) == 2


def test_longer_rows_are_no_repeats_of_shorter_ones():
    usual, long = ([row(max_tokens=n), row("multipack_posid", rate=n / 4, max_tokens=n)] for n in (1024, 4096))
    table = tables.against(pd.DataFrame([*usual, *long]))
    assert table["runs"].tolist() == [1] * 4 and set(table["rig"]) == {"", "max_tokens=4096"}
    assert "(at most 4096 tokens)" in tables.display_table(table)["model"].iloc[-1]


def test_another_precision_or_depth_is_no_repeat():
    usual, half = ([row(**own), row("multipack_posid", 200, **own)] for own in ({"dtype": "float32", "layers": 2},) * 2)
    for one in half:
        one |= {"dtype": "bfloat16", "rate": 1}
    half[0]["metrics.tokens_per_s.mean"] = 400
    deep = [row(rate=10, dtype="float32", layers=None)]
    table = tables.against(pd.DataFrame([*usual, *usual, *half, *deep]))
    assert table["rig"].tolist() == ["", "", "dtype=bfloat16", "dtype=bfloat16", "layers=None"]
    assert table["runs"].tolist() == [2, 2, 1, 1, 1]
    assert table["speed_up"].tolist() == [1, 2, 1, 0.5, 1], "each against padding of its own"
    shown = tables.display_table(table)["model"].tolist()
    assert shown[2:] == ["tiny-llama (bfloat16)"] * 2 + ["tiny-llama (all layers)"]


def test_padding_on_packlibs_attention_is_the_baseline_whatever_was_measured_first():
    found = arms(row(kernel="maskless_sdpa", rate=50), row(rate=100), row("minibatch_packing", rate=150))
    assert found.loc[("pydocs", "minibatch_packing", "auto"), "speed_up"] == 1.5


def test_a_rig_is_written_as_what_differs_from_the_default():
    assert tables.rig_label({}) == tables.rig_label(asdict(Rig())) == ""
    assert tables.rig_label({"recompute": "all", "liger": math.nan}) == "recompute=all"
    assert tables.rig_label(asdict(Rig(recompute="all", liger=True))) == "recompute=all+liger"
    assert tables.rigs(pd.DataFrame([row(), rigged(1, liger=True)])).tolist() == ["", "liger"]


def test_runs_that_shared_their_device_have_no_times():
    frame = pd.DataFrame([row(), row()]).assign(**{"environment.concurrent_runs": [1, 2]})
    assert tables.alone(frame).index.tolist() == [0]
    shared, alone = ({"environment": {"concurrent_runs": runs}} for runs in (2, 1))
    assert records.had_device_alone(alone) and not records.had_device_alone(shared)


def test_repeats_are_pooled():
    rates = (100, 104, 90)
    repeats = [row(rate=rate, repeat=i) for i, rate in enumerate(rates)]
    packed = [row("minibatch_packing", rate, repeat=i) for i, rate in enumerate((200, 300))]
    found = arms(*repeats, *packed).loc["pydocs"]
    padding, faster = found.loc[("padding", "auto")], found.loc[("minibatch_packing", "auto")]
    assert (padding["runs"], padding["tokens_per_s"], padding["tokens_per_s_low"], padding["tokens_per_s_high"]) == (
        3,
        100,
        90,
        104,
    )
    assert (faster["speed_up"], faster["speed_up_low"], faster["speed_up_high"]) == (2.5, 2.0, 3.0)


def test_an_arm_that_ran_out_of_memory_keeps_its_line_and_has_no_numbers():
    table = tables.against(pd.DataFrame([row(), lost("minibatch_packing"), row("multipack_posid", 300, 1.0)]))
    gone = table.set_index("strategy").loc["minibatch_packing"]
    assert (
        gone["status"] == "oom"
        and gone["runs"] == 0
        and gone[["tokens_per_s", "speed_up", "limit", "memory_ratio"]].isna().all()
    )
    shown = tables.display_table(table).set_index("batching")
    assert shown.loc["MiniBatchPacking + PosID"].drop(["model", "corpus", "status"]).eq("").all(), "empty, not 0"
    assert shown.loc["MiniBatchPacking + PosID", "status"] == "oom"
    columns = ["rows", "real tokens/s", "× padding", "limit", "peak memory (GB)"]
    assert shown.loc["Multipack + PosID", columns].tolist() == ["16", "300", "3.00", "2.00", "10.00"]


def test_without_padding_there_is_no_ratio():
    for reference in ([], [lost("padding", "failed")]):
        table = tables.against(pd.DataFrame([*reference, row("minibatch_packing", 150)])).set_index("strategy")
        assert table.loc["minibatch_packing", "tokens_per_s"] == 150
        assert table[["speed_up", "limit", "memory_ratio"]].isna().all(axis=None), (
            "the columns are there: notebooks read them"
        )


def test_a_table_without_any_result_is_a_table():
    shown = tables.display_table(tables.against(pd.DataFrame([lost("padding"), lost("multipack_posid", "failed")])))
    names = {"model": ["tiny-llama"] * 2, "corpus": ["pydocs"] * 2, "batching": ["Padding", "Multipack + PosID"]}
    assert shown.to_dict("list") == names | {"status": ["oom", "failed"]}


def test_columns_without_a_value_are_not_shown():
    shown = tables.display_table(tables.against(pd.DataFrame([row(), row("minibatch_packing", 150)])))
    assert "validation loss" not in shown and "status" not in shown, "nobody evaluated, everybody finished"
    evaluated = [
        row(**{"metrics.eval_loss_per_token": 1.25}),
        row("minibatch_packing", 150, **{"metrics.eval_loss_per_token": math.nan}),
    ]
    assert tables.display_table(tables.against(pd.DataFrame(evaluated)))["validation loss"].tolist() == ["1.2500", ""]


def test_rows_are_counted_as_table_2_does():
    counted = {name: tables.table_2_rows(pd.Series(row(name))) for name in STRATEGIES}
    packed = {name for name in STRATEGIES if name.startswith(("fixed", "best_fit", "multipack")) or "packing_" in name}
    assert {name for name, rows in counted.items() if rows == 16} == packed
    assert set(counted.values()) == {16, 64}


def test_only_one_setting_is_compared():
    """The batch-size curve and the convergence runs of a folder are comparisons of their own."""
    table_2 = [row(name) for name in ("padding", "minibatch_packing", "multipack_posid")] + [
        row(repeat=1),
        row(corpus="arithmetic"),
    ]
    others = [
        row(rate=1e9, batch_size=16),
        row("minibatch_packing", 1e9, batch_size=16),
        row(rate=1e9, learning_rate=0.5),
        row(rate=1e9, steps=7),
    ]
    frame = pd.DataFrame([*others[:2], *table_2, *others[2:]])
    kept = tables.one_setting(frame)
    assert len(kept) == len(table_2) and kept["metrics.tokens_per_s.mean"].max() == 100
    assert len(tables.one_setting(frame.iloc[:0])) == 0
    timed = pd.DataFrame([row(steps=40, eval_examples=0), row("multipack_posid", steps=7, eval_examples=0)])
    assert len(tables.one_setting(timed)) == 2, "short steps are timed more often"
    assert len(tables.one_setting(timed.assign(eval_examples=48))) == 1, "trained longer is another training"


def test_markdown_is_a_table():
    text = tables.markdown(pd.DataFrame({"a": ["1", ""], "b": ["x", "y"]}))
    assert text == "| a | b |\n|---|---|\n| 1 | x |\n|  | y |"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("pydocs", "pydocs"),
        ("multitask_mistral_{split}.npz", "multitask_mistral"),
        ("some/where/math-{split}.jsonl.gz", "math"),
        ("hub:a/b", "b"),
    ],
)
def test_names_are_shown_short(name, shown):
    assert tables.short(name) == shown


# statistics


@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (3, 4.303), (6, 2.571), (31, 2.042), (121, 1.980)])
def test_half_an_interval_is_students_t_times_the_standard_error(n, t):
    values = np.random.default_rng(n).normal(5, 2, n)
    error = values.std(ddof=1) / n**0.5
    found = tables.mean_interval(values)
    assert found.mean == pytest.approx(values.mean())
    assert [found.mean - found.low, found.high - found.mean] == pytest.approx([t * error] * 2, rel=1e-3)
    assert found.standard_errors == pytest.approx(found.mean / error)


def test_one_value_has_no_interval():
    mean, *rest = tables.mean_interval(np.array([3.0]))
    assert mean == 3 and all(map(math.isnan, rest))


def test_equal_values_have_an_interval_without_width(recwarn):
    for value in (0.0, 0.1):
        found = tables.mean_interval([value] * 3)
        assert found.high - found.low < 1e-12 and found.mean == pytest.approx(value)
    assert not recwarn.list


def test_intervals_cover_the_mean_as_often_as_they_say():
    draws = np.random.default_rng(0).normal(5, 2, (4000, 4))
    intervals = np.array([tables.mean_interval(values)[1:3] for values in draws])
    assert np.mean((intervals[:, 0] < 5) & (intervals[:, 1] > 5)) == pytest.approx(0.95, abs=0.015)


def test_differences_are_paired_by_seed():
    losses = {
        "padding": {0: 1.0, 1: 2.0, 2: 3.0},
        "minibatch_packing": {0: 1.1, 1: 2.1, 2: 3.1},
        "multipack_posid": {1: 2.5, 7: 0.0},
    }
    frame = pd.DataFrame(
        [{"strategy": name, "seed": seed, "loss": loss} for name, by in losses.items() for seed, loss in by.items()]
    )
    found = tables.paired_differences(frame, "loss").set_index("strategy")
    assert list(found.index) == ["minibatch_packing", "multipack_posid"]
    packed = found.loc["minibatch_packing"]
    assert packed["n"] == 3 and packed["difference"] == pytest.approx(0.1) and packed["high"] - packed["low"] < 1e-9, (
        "the seeds' own effect is gone"
    )
    assert packed["label"] == "MiniBatchPacking + PosID"
    assert found.loc["multipack_posid", "n"] == 1 and math.isnan(found.loc["multipack_posid", "low"])
    nothing = tables.paired_differences(frame, "loss", base="no such arm")
    assert nothing.empty and set(nothing) == {"strategy", *found}, "a table without rows has its columns"
    with pytest.raises(
        ValueError, match="arm 'padding' has more than one run of seed 1; expected the runs of one setting"
    ):
        tables.paired_differences(pd.concat([frame, frame[1:2]]), "loss")


# the paper


def test_the_papers_ratios_are_the_ones_it_speaks_of():
    ratios = paper.ratios_to_padding().set_index(["model", "strategy"])
    packed = ratios.xs("minibatch_packing", level="strategy")
    assert packed.loc["mistral-7b", ["speed_up", "memory_ratio"]].tolist() == pytest.approx([1408 / 742, 24549 / 30625])
    assert packed["speed_up"].between(1.85, 2.0).all() and packed["memory_ratio"].between(0.74, 0.83).all(), (
        "about 2 times and -20 % on FLAN"
    )
    assert (
        packed["loss_difference"].abs().max()
        < 0.005
        < ratios.xs("fixed_length_packing", level="strategy")["loss_difference"].min()
    )
    assert "phi-2" not in ratios.index, "it has no padding to compare with"


def test_what_the_paper_does_not_say_is_empty():
    table = paper.table_2().set_index(["model", "strategy"])
    assert (
        table.loc[("llama-2-7b", "offline_packing_posid"), ["rows", "tokens_per_s", "peak_memory_bytes"]].isna().all()
    )
    assert (
        (table["tokens_per_s"].dropna() > 600).all()
        and (table["peak_memory_bytes"].dropna() > 2e10).all()
        and len(table) == 17
    )
    assert table["source"].str.contains("arXiv 2407.09105, Table 2, ").all()


def test_table_4_and_the_blog():
    table = paper.table_4()
    rows = list(zip(table["strategy"], table["optimizer_steps"], table["eval_loss_per_token"]))
    fixed, posid = "fixed_length_packing", "fixed_length_packing_posid"
    few, many = [(fixed, 35, 1.294), (posid, 35, 1.221)], [(fixed, 281, 1.252), (posid, 281, 1.170)]
    assert rows == [("padding", 311, 1.117), *few, *many]
    blog = paper.blog_ratios().set_index("corpus")
    assert (
        blog.loc["FLAN", ["speed_up", "memory_change"]].tolist() == [2.0, -0.2]
        and blog.loc["OrcaMath", "speed_up"] == 1.4
    )
    assert set(paper.STRATEGY.values()) - set(STRATEGIES) == {"offline_packing_posid"}, (
        "the others are ours by the same name"
    )
