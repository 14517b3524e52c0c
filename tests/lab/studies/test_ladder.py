"""The climb of notebook 08: its arms, its predictions, and what it says of records whose answers are known."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from packlib.lab import records
from packlib.lab.doubts import Doubt
from packlib.lab.pages import reproduce
from packlib.lab.runs.spec import Rig, RunSpec
from packlib.lab.studies import ladder, next_rung, parity
from packlib.lab.studies.ladder import FULL_ROWS, MINI_BATCHES
from tests.lab.studies import made_records

BASE = RunSpec(corpus="corpus.npz", steps=5, gradient_accumulation=2, profile=True)


def names(arms):
    return [arm.rung.name for arm in arms]


def made(rate, *, host=0.1, device=0.1, step=0.1, limit=4000.0, waste=1.0, losses=(2.0, 1.0), tokens=100, **metrics):
    """Parts of a record: a profiled step that takes as long as the mean one."""
    measured = {
        "tokens_per_s": {"p20": rate - 1, "p50": rate, "p80": rate + 1, "mean": rate},
        "limit": {name: 0.01 for name in ("products_seconds", "attention_seconds", "optimizer_seconds")}
        | {"tokens_per_s": limit, "share": rate / limit},
        "step_seconds": {"mean": step},
        "profile": {
            "host_seconds": host,
            "kernel_seconds": device,
            "span_seconds": step,
            "launches": 7,
            "waiting": 0.5,
            "busy": [0.0, 1.0],
        },
        "peak_memory_bytes": 10**9,
        "measured_waste": waste,
        "slots_per_step": tokens * waste,
        "tokens_per_step": float(tokens),
    }
    return {"metrics": measured | metrics, "trace": {"loss": list(losses), "grad_norm": [4.0, 4.0]}}


@pytest.fixture
def climbed(tmp_path):
    """padded at 1000, flattened 1500, compiled out of memory, TRL's 1200; the rest was not measured."""
    folder = records.run_folder(tmp_path)
    arms = ladder.arms(BASE, MINI_BATCHES)
    parts = {
        "padded, SDPA": made(1000.0, host=0.1, device=0.04, waste=2.0),
        "flattened": made(1500.0, host=0.02, device=0.1, losses=(2.0, 1.01)),
        "TRL padding_free": made(1200.0),
        "compiled layers": {"status": "oom"},
    }
    for arm in arms:
        if arm.rung.name in parts:
            made_records.write(folder, arm.spec, **parts[arm.rung.name])
    found = ladder.measure(arms, folder, progress=lambda line: None)
    return arms, found, ladder.climb_table(arms, found).set_index("rung", drop=False)


def test_a_rung_keeps_what_the_rungs_below_it_changed():
    arms = {arm.rung.name: arm.spec for arm in ladder.arms(BASE, MINI_BATCHES, keep=0.2)}
    top = Rig(compile="layers", recompute=0.2, graphs=True, fused_loss=True, lean=True, pad_to=64)
    assert arms["lean optimiser"].rig == top and arms["lean optimiser"].strategy == "minibatch_packing"
    assert arms["padded, same rig"].rig == replace(top, pad_to=16)
    assert arms["merged micro-batches"].rig == top, "what is beside the climb changes nothing above it"
    merged = arms["merged micro-batches"]
    assert (merged.batch_size, merged.gradient_accumulation) == (8, 1)
    assert arms["TRL padding_free"].rig == arms["flattened"].rig == Rig(recompute="all")
    rows = {arm.rung.name: arm.spec for arm in ladder.arms(BASE, FULL_ROWS)}
    assert rows["compiled layers"].rig.pad_to == BASE.batch_size * BASE.max_tokens
    top = {arm.rung.name: arm.spec for arm in ladder.arms(BASE, FULL_ROWS, keep=0.2)}
    halved, float8 = top["smaller micro-batches"], top["float8"]
    assert (halved.batch_size, halved.gradient_accumulation) == (2, 2 * BASE.gradient_accumulation)
    assert (halved.rig.pad_to, halved.rig.recompute) == (2 * BASE.max_tokens, 0.4)
    assert replace(float8, rig=replace(float8.rig, float8=False, recompute=0.2)) == top["lean optimiser"]
    assert float8.rig.recompute == 0.1
    whole = ladder.arms(BASE, FULL_ROWS, ["smaller micro-batches"], keep=0.5)[0].spec
    assert whole.rig.recompute == "none", "twice a half is everything"
    assert "smaller micro-batches" not in names(ladder.arms(replace(BASE, batch_size=3), FULL_ROWS))


def test_a_last_rung_without_a_record_stands_inside_the_frame():
    arms = ladder.arms(BASE, FULL_ROWS, ["full rows", "float8"])
    table = ladder.climb_table(arms, [{"status": "ok", "error": None} | made(1000.0), None])
    figure = ladder.climb_figure(table, FULL_ROWS)
    figure.canvas.draw()
    (ax,) = figure.axes
    (text,) = (text for text in ax.texts if text.get_text() == ladder.NOT_MEASURED)
    assert ax.get_window_extent().contains(*text.get_window_extent().get_points().mean(axis=0))


def test_the_legend_of_a_climb_names_what_is_drawn():
    for rungs, said in ((["full rows", "float8"], False), (["TRL packing (bfd)", "full rows"], True)):
        arms = ladder.arms(BASE, FULL_ROWS, rungs)
        table = ladder.climb_table(arms, [{"status": "ok", "error": None} | made(1000.0) for _ in arms])
        (legend,) = ladder.climb_figure(table, FULL_ROWS).legends
        assert ("(beside the climb)" in [text.get_text() for text in legend.get_texts()]) == said


def test_a_rung_with_wrong_gradients_is_not_climbed_on(tmp_path):
    arms = ladder.arms(BASE, FULL_ROWS, ["full rows", "lean optimiser", "float8"])
    found = [{"status": "ok", "error": None} | made(rate) for rate in (1000.0, 1200.0, 2000.0)]
    for record, norm in zip(found, (4.0, 4.02, 1e16)):
        record["trace"]["grad_norm"] = [4.0, norm]
    table = ladder.climb_table(arms, found)
    assert table["status"].tolist() == ["ok", "ok", "wrong gradients"]
    said = " ".join(ladder.findings(table, tmp_path))
    assert "'lean optimiser' runs at 1,200 real tokens/s, 1.2 times" in said and "2,000" not in said
    assert "'float8' has no result: wrong gradients, their norms differ" in said
    assert "2,000" not in ladder.climb_figure(table, FULL_ROWS).alt


def test_float8_does_not_hide_what_is_fastest_without(tmp_path):
    arms = ladder.arms(BASE, FULL_ROWS, ["TRL packing (bfd)", "lean optimiser", "smaller micro-batches", "float8"])
    found = [{"status": "ok", "error": None} | made(rate) for rate in (800.0, 1000.0, 1200.0, 1500.0)]
    said = " ".join(ladder.findings(ladder.climb_table(arms, found), tmp_path))
    assert "without float8, 'smaller micro-batches' is the fastest (1,200, " in said
    assert "float8 runs at 1.25 times that" in said
    assert "'float8' runs at 1.88 times, 'smaller micro-batches' runs at 1.50 times 'TRL packing (bfd)'" in said
    said = " ".join(ladder.findings(ladder.climb_table(arms[:3], found[:3]), tmp_path))
    assert "float8" not in said and "'smaller micro-batches' runs at 1.50 times 'TRL packing (bfd)'" in said


def test_losses_are_compared_on_the_same_examples_only():
    arms = ladder.arms(BASE, FULL_ROWS, ["lean optimiser", "smaller micro-batches", "float8"])
    found = [{"status": "ok", "error": None} | made(1000.0, losses=(2.0, 1.0 + i / 10)) for i in range(3)]
    table = ladder.climb_table(arms, found).set_index("rung")
    assert np.isnan(table.loc["smaller micro-batches", "loss_difference"]), "its rows hold other examples"
    assert table.loc["float8", "loss_difference"] == pytest.approx(1.2 / 1.0 - 1), "the lean optimiser's rows again"


def test_rungs_that_are_left_out_are_stepped_over():
    only = ladder.arms(BASE, MINI_BATCHES, ["padded, SDPA", "less recomputation"], gpu=False)
    assert names(only) == ["padded, SDPA", "less recomputation"]
    assert only[1].spec.strategy == "minibatch_packing" and only[1].spec.rig.fused_loss
    on_a_cpu = ladder.arms(BASE, MINI_BATCHES, gpu=False)
    assert not any(arm.spec.rig.graphs or arm.spec.rig.lean for arm in on_a_cpu)
    assert names(on_a_cpu)[-1] == "merged micro-batches"
    with pytest.raises(ValueError, match="unknown rung of mini-batches 'fusd loss'"):
        ladder.arms(BASE, MINI_BATCHES, ["fusd loss"])
    with pytest.raises(ValueError, match="unknown climb 'rows'"):
        ladder.arms(BASE, "rows")


def test_several_climbs_and_adapters():
    climbs = [
        {"corpus": "a.npz", "rungs": ["flattened"]},
        {"climb": FULL_ROWS, "rungs": ["lean optimiser"], "keep": 0.3, "steps": 9},
        {"rungs": ["flattened"], "rig": {"lora_rank": 4}},
    ]
    arms = ladder.every_arm(BASE, climbs)
    assert [(a.climb, a.rung.name, a.spec.corpus, a.spec.steps, a.spec.rig.lora_rank) for a in arms] == [
        (MINI_BATCHES, "flattened", "a.npz", 5, None),
        (FULL_ROWS, "lean optimiser", "corpus.npz", 9, None),
        (MINI_BATCHES, "flattened", "corpus.npz", 5, 4),
    ]
    assert arms[1].spec.rig.recompute == 0.3
    assert "climb" not in climbs[0] and "climb" in climbs[1], "what was given is not changed"


def test_every_prediction_starts_from_the_finished_rung_below(climbed):
    _, _, table = climbed
    # Padded: the host needs 0.1 s and the device 0.04; × 1 and × 1: nothing changes.
    assert table.loc["padded, varlen attention", "predicted"] == pytest.approx(1000)
    # Flattened: 0.9 of the host's 0.1 s, half of the device's 0.04 s: waste 2.
    assert table.loc["flattened", "predicted"] == pytest.approx(1000 / 0.9)
    # Fused loss: the device's 0.1 s decides now, × 0.95; then × 0.85 for compiled layers, although it has no record.
    assert table.loc["fused loss", "predicted"] == pytest.approx(1500 / 0.95)
    assert table.loc["compiled layers", "predicted"] == pytest.approx(1500 / (0.95 * 0.85))
    assert table.loc[["padded, SDPA", "TRL padding_free"], "predicted"].isna().all()


def test_rungs_that_are_not_run_count_in_the_next_prediction():
    arms = ladder.arms(BASE, MINI_BATCHES, ["fused loss", "less recomputation", "merged micro-batches"], gpu=False)
    found = [{"status": "ok", "error": None} | made(1000.0, host=0.01, device=0.1), None, None]
    predicted = ladder.climb_table(arms, found)["predicted"].tolist()
    assert predicted[1:] == pytest.approx([1000 / (0.85 * 0.75), 1000 / (0.85 * 0.75 * 0.85)]), "compiled layers, too"
    on_a_gpu = ladder.arms(BASE, MINI_BATCHES, ["fused loss", "merged micro-batches"])
    assert ladder.climb_table(on_a_gpu, found[:2])["predicted"][1] == pytest.approx(
        1000 / (0.85 * 0.75 * 1.05 * 0.85 * 0.85)
    )


def test_without_a_profile_the_host_is_the_device():
    metrics = made(1000.0, step=0.2)["metrics"] | {"profile": None}
    assert ladder.host_and_device(metrics) == (0.0, 0.2)
    twice = made(1000.0, host=0.05, device=0.08)["metrics"]
    twice["step_seconds"] = {"mean": 0.2}  # a mean step of twice the profiled one's span
    assert ladder.host_and_device(twice) == pytest.approx((0.1, 0.16))


def test_a_row_says_what_its_record_says(climbed):
    _, _, table = climbed
    row = table.loc["flattened"]
    assert (row["tokens_per_s"], row["limit"], row["share"]) == (1500.0, 4000.0, 0.375)
    assert (row["host_seconds"], row["kernel_seconds"], row["launches"], row["waiting"]) == (0.02, 0.1, 7, 0.5)
    assert row["loss_difference"] == pytest.approx(0.01) and row["grad_norm_difference"] == 0.0
    assert table["status"].to_dict() == dict.fromkeys(table.index, ladder.NOT_MEASURED) | {
        "padded, SDPA": "ok",
        "flattened": "ok",
        "TRL padding_free": "ok",
        "compiled layers": "oom",
    }
    assert table.loc[["compiled layers", "CUDA graphs"], list(ladder.NUMBERS[1:])].isna().all(axis=None)


def test_sentences_follow_from_the_records(climbed, tmp_path):
    _, _, table = climbed
    said = ladder.findings(table, tmp_path)
    assert (
        "corpus, mini-batches: 'flattened' runs at 1,500 real tokens/s, 1.5 times 'padded, SDPA' (1,000), " in said[0]
    )
    assert said[0].endswith("from 25% to 38% of the limit.")
    text = "\n".join(said)
    assert "0 of 1 predictions come within 20%; 'flattened' is farthest off, 1,111 predicted, 1,500 measured" in text
    assert "'flattened' runs at 1.25 times 'TRL padding_free'" in text
    assert "losses differ by at most 1.0e-02, gradient norms by at most 0.0e+00" in text
    assert "'compiled layers' has no result: oom" in text
    assert "not measured: padded, varlen attention, fused loss, less recomputation" in text
    assert "largest gain of one rung" not in text, "the rung below flattened was not measured"


RANKS = ("the fastest", "largest gain", "farthest off")


@pytest.mark.parametrize("second", [1000.0, 910.0])
def test_a_climb_whose_own_repeats_are_off_says_so_and_ranks_nothing(tmp_path, second):
    folder, known = records.run_folder(tmp_path / "a run"), ["full rows", "lean optimiser", "float8"]
    arms = ladder.arms(BASE, FULL_ROWS, known)
    for arm, rate in zip(arms, (1000.0, 1200.0, 1500.0)):
        made_records.write(folder, arm.spec, **made(rate))
    made_records.write(folder, replace(arms[0].spec, repeat=1), **made(second))
    said = ladder.findings(ladder.climb_table(arms, ladder.measure(arms, folder)), folder)
    off, text = second < 1000, "\n".join(said)
    red = [sentence for sentence in said if isinstance(sentence, Doubt)]
    assert [sentence[:24] for sentence in red] == (["a run: Repeats are off: "] if off else [])
    assert "'float8' runs at 1,500 real tokens/s, 1.5 times 'full rows' (1,000)" in text, (
        "what was measured is still said"
    )
    assert "2 predictions come within 20%" in text
    assert [word in text for word in RANKS] == [not off] * 3


@pytest.mark.parametrize("packed", [1000.0, 1200.0])
def test_other_runs_of_the_folder_take_nothing_back_from_a_climb(climbed, tmp_path, packed):
    """Their control is of one example a batch, and eager; a plain line says that it is off."""
    _, _, table = climbed
    for strategy, rate in (("padding", 1000.0), ("minibatch_packing", packed)):
        made_records.write(tmp_path, replace(BASE, strategy=strategy, batch_size=1), **made(rate))
    said = ladder.findings(table, tmp_path)
    others = [sentence for sentence in said if "in doubt" in sentence]
    line = f"{tmp_path.name}: other runs of this folder are in doubt (control off); none of them is shown here."
    assert others == ([line] if packed > 1000 else []) and "farthest off" in "\n".join(said)
    assert not any(isinstance(sentence, Doubt) for sentence in said)


def test_packing_is_held_against_the_ratio_of_two_limits(tmp_path):
    arms = ladder.arms(BASE, MINI_BATCHES, ["lean optimiser", "padded, same rig"])
    found = [
        {"status": "ok", "error": None} | made(rate, limit=limit) for rate, limit in ((1500.0, 3000), (1200.0, 2000))
    ]
    said = "\n".join(ladder.findings(ladder.climb_table(arms, found), tmp_path))
    assert "on one rig, flattened over padded is 1.25, 83% of the 1.50 that the limits allow" in said


def test_least_and_unexplained_make_the_step(climbed):
    _, found, table = climbed
    rows = ladder.limit_table(table, found).set_index("rung")
    assert list(rows.index) == ["padded, SDPA", "flattened", "TRL padding_free"]
    assert rows.loc["flattened", ["least", "step", "waiting for the host", "unexplained"]].tolist() == pytest.approx(
        [30, 100, 50, 20]
    )


def test_the_figure_has_a_bar_a_limit_and_a_prediction_for_each(climbed):
    _, _, table = climbed
    figure = ladder.climb_figure(table, MINI_BATCHES, here="flattened")
    figure.canvas.draw()
    (ax,) = figure.axes
    assert [bar.get_width() for bar in ax.patches if 0.6 < bar.get_height() < 0.7] == [1000.0, 1500.0, 1200.0]
    dashed = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--" and len(line.get_xdata())]
    assert dashed == [4000.0] * 3
    marks = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "D" and len(line.get_xdata())]
    tried = table[table["status"] != ladder.NOT_MEASURED]
    assert marks == pytest.approx(tried["predicted"].dropna().tolist()) and len(marks) == 2
    texts = [text.get_text() for text in ax.texts]
    assert "you are here" in texts and "oom" in texts and ladder.NOT_MEASURED in texts
    assert "1,000 to 1,500 real tokens/s, 38% of the limit" in figure.alt
    assert "(TRL padding_free)" in [label.get_text() for label in ax.get_yticklabels()]
    with pytest.raises(ValueError, match="unknown rung of mini-batches 'flat'"):
        ladder.climb_figure(table, MINI_BATCHES, here="flat")


def test_a_step_is_shown_before_and_after(climbed):
    arms, found, table = climbed
    figure = ladder.step_figure(table, found, MINI_BATCHES, "corpus.npz")
    figure.canvas.draw()
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["padded, SDPA: 7 launches", "flattened: 7 launches"]
    bare = [r and r | {"metrics": r["metrics"] and r["metrics"] | {"profile": None}} for r in found]
    assert ladder.step_figure(ladder.climb_table(arms, bare), bare, MINI_BATCHES, "corpus.npz") is None


def test_adapters_are_a_second_pair_of_columns():
    rungs = {"rungs": ["padded, SDPA", "flattened"]}
    arms = ladder.every_arm(BASE, [rungs, rungs | {"rig": {"lora_rank": 4}}])
    found = [{"status": "ok", "error": None} | made(rate) for rate in (1000.0, 2000.0, 3000.0)] + [None]
    shown = ladder.display_table(ladder.climb_table(arms, found))
    assert shown["real tokens/s"].tolist() == ["1,000", "2,000"]
    assert shown["LoRA: real tokens/s"].tolist() == ["3,000", ""]
    alone = ladder.display_table(ladder.climb_table(arms[:2], found[:2]))
    assert "LoRA: real tokens/s" not in alone


def test_where_neither_data_nor_records_are_it_says_so(tmp_path):
    arms = ladder.arms(BASE, MINI_BATCHES)
    folder = records.run_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"corpus 'corpus.npz' is not here, and .* has no records"):
        ladder.measure(arms, folder)
    records.write_record(folder, records.unfinished("another", {"corpus": "x"}, "oom", "of another notebook"))
    with pytest.raises(FileNotFoundError, match=r"corpus 'corpus.npz' is not here, and no rung has a record on it"):
        ladder.measure(arms, folder)


def test_predictions_are_said_before_anything_is_measured():
    table = ladder.predictions_table(ladder.arms(BASE, MINI_BATCHES)).set_index("rung")
    assert table.loc["compiled layers", ["host", "device"]].tolist() == ["× 0.4", "× 0.85"]
    assert table.loc["flattened", "device"] == "less what padding wastes"
    assert table.loc["TRL padding_free", "host"] == "beside the climb"


# The rung that gains most


def recorded(folder, rates, corpus="corpus.npz", tokens=100):
    base = replace(BASE, corpus=corpus)
    for arm in ladder.arms(base, MINI_BATCHES):
        if arm.rung.name in rates:
            rate = rates[arm.rung.name]
            times = {"step": tokens / rate, "host": tokens / rate, "device": 0.01}
            made_records.write(folder, arm.spec, **made(rate, tokens=tokens, **times))
    return records.read_records(folder)


def test_the_rung_that_gains_most_is_named(tmp_path):
    rates = {"padded, SDPA": 1000.0, "flattened": 1100.0, "fused loss": 2200.0, "compiled layers": 2300.0}
    runs = recorded(records.run_folder(tmp_path), rates)
    advice = next_rung.next_rung([25] * 40, runs, batch_size=4, gradient_accumulation=2, max_tokens=64)
    assert [r.rung for r in advice.rungs] == list(rates)
    assert advice.rungs[0].gain is None and advice.rungs[2].gain == pytest.approx(2.0)
    assert "From 'padded, SDPA', the rung that gains most is 'fused loss': 2.00 × the rung below it" in str(advice)
    above = next_rung.next_rung([25] * 40, runs, max_tokens=64, gradient_accumulation=2, here="fused loss")
    assert above.recommendation == "Stay at 'fused loss': no rung above it gains 5 %."
    top = next_rung.next_rung([25] * 40, runs, max_tokens=64, here="compiled layers")
    assert top.recommendation == "You stand at the top of mini-batches, 'compiled layers'."
    assert advice.error is None and "unknown: no rung has records on two corpora" in str(advice)
    with pytest.raises(ValueError, match="unknown rung with a record 'CUDA graph'"):
        next_rung.next_rung([25] * 40, runs, here="CUDA graph")


def test_it_is_foreseen_from_the_climb_whose_steps_are_as_large(tmp_path):
    """Graphs help steps of 100 tokens and hardly those of 10,000; a reader gets what steps like the own ones gain."""
    folder = records.run_folder(tmp_path)
    recorded(folder, {"flattened": 1000.0, "CUDA graphs": 3000.0}, "short.npz", tokens=100)
    runs = recorded(folder, {"flattened": 1000.0, "CUDA graphs": 1100.0}, "long.npz", tokens=10_000)
    for length, gain in ((10, 3.0), (1200, 1.1)):
        advice = next_rung.next_rung([length] * 40, runs, batch_size=4, gradient_accumulation=2, max_tokens=2048)
        assert advice.rungs[-1].gain == pytest.approx(gain, rel=0.02)


@pytest.mark.parametrize(("norm", "top"), [(4.0, "fused loss"), (1e16, "flattened")])
def test_a_rung_with_wrong_gradients_is_not_advised(tmp_path, norm, top):
    folder = records.run_folder(tmp_path)
    for arm, rate in zip(ladder.arms(BASE, MINI_BATCHES, ["padded, SDPA", "flattened", "fused loss"]), (1e3, 2e3, 9e3)):
        parts = made(rate)
        if arm.rung.name == "fused loss":
            parts["trace"]["grad_norm"] = [norm, norm]
        made_records.write(folder, arm.spec, **parts)
    advice = next_rung.next_rung([25] * 40, records.read_records(folder), max_tokens=64, gradient_accumulation=2)
    assert advice.rungs[-1].rung == top


def test_a_step_on_other_data_is_what_its_host_and_device_need(tmp_path):
    """100 tokens in a step of 0.1 s. Longer examples are free where the host decides, and not where the device does."""
    arm = ladder.arms(BASE, MINI_BATCHES, ["flattened"])[0]
    hosted, computed = (
        {"spec": {"gradient_accumulation": 2}} | made(1000.0, host=h, device=d) for h, d in ((0.1, 0.02), (0.02, 0.1))
    )
    assert arm.spec.gradient_accumulation == 2
    assert next_rung._foreseen_rate(hosted, 100, 100, 2) == pytest.approx(1000)
    assert next_rung._foreseen_rate(hosted, 200, 200, 2) == pytest.approx(2000)
    assert next_rung._foreseen_rate(computed, 100, 100, 2) == pytest.approx(1000)
    assert next_rung._foreseen_rate(computed, 200, 200, 2) == pytest.approx(200 / 0.19), "0.01 s are the optimiser's"
    assert next_rung._foreseen_rate(hosted, 100, 100, 1) == pytest.approx(2000), "half as many launches"


def test_its_error_is_that_of_one_corpus_from_another(tmp_path):
    folder = records.run_folder(tmp_path)
    recorded(folder, {"padded, SDPA": 1000.0, "flattened": 1500.0})
    runs = recorded(folder, {"flattened": 1200.0}, corpus="other.npz")
    advice = next_rung.next_rung([25] * 40, runs, max_tokens=64)
    assert advice.error == pytest.approx(0.25), "1500 for 1200, or 1200 for 1500: the larger of 25 % and 20 %"
    assert "their error is up to 25%" in str(advice)


def test_one_rung_is_no_climb(tmp_path):
    with pytest.raises(ValueError, match="no climb has two finished rungs among these records"):
        next_rung.next_rung([25] * 40, recorded(records.run_folder(tmp_path), {"flattened": 1.0}))


# What is published


def test_the_published_climb_is_of_its_preset(monkeypatch):
    """Every record is an arm of preset h100, without the data, so notebook 08 redraws it anywhere.

    Of one commit, but for float8 and the two rungs below it: measured again beside it, in a lease of its own.
    """
    monkeypatch.delenv("PACKLIB_DATA", raising=False)
    asked = reproduce.load_preset("h100")["notebooks"]["08_climb_to_the_limit"]
    sizes = {name: asked[name] for name in ("model", "batch_size", "max_tokens", "gradient_accumulation", "steps")}
    base = RunSpec(**sizes, **asked["options"])
    climbed, same = (
        ladder.every_arm(base, asked["climbs"]),
        parity.arms(replace(base, profile=False), **asked["parity"]),
    )
    arms = [*climbed, *same]
    folder = records.run_folder("h100", create=False)
    found = [record for record in ladder.measure(arms, folder, progress=lambda line: None) if record]
    published = records.read_records(folder)
    assert {record["run_id"] for record in found} == {record["run_id"] for record in published}
    again = {
        arm.spec.spec_id for arm in climbed if arm.rung.name in ("lean optimiser", "smaller micro-batches", "float8")
    }
    again &= {arm.spec.spec_id for arm in climbed if arm.climb == FULL_ROWS}
    commits: dict[bool, set[tuple[str, bool]]] = {True: set(), False: set()}
    for record in published:
        if record["status"] == "ok":
            environment = record["environment"]
            commits[record["run_id"].split("-")[0] in again].add((environment["git_sha"], environment["dirty"]))
    assert len(commits[True]) == len(commits[False]) == 1 and not any(dirty for _, dirty in commits[True])
    before = [json.loads(path.read_text()) for path in folder.glob("superseded/*-3ee3d17.json")]
    assert len(before) == 2
    for record in before:  # the same arm, in another lease
        now = records.read_record(folder, record["run_id"])["metrics"]["tokens_per_s"]["mean"]
        assert now == pytest.approx(record["metrics"]["tokens_per_s"]["mean"], rel=0.01)
    table = ladder.climb_table(climbed, ladder.measure(climbed, folder, progress=lambda line: None))
    climbed = table[(table["status"] == "ok") & ~table["beside"]]
    whole = climbed[climbed["lora_rank"] == 0]
    assert (whole["loss_difference"].dropna() < 2**-8).all(), "one rounding of bfloat16"
    assert (climbed["loss_difference"].dropna() < 2**-7).all(), "eager layers round small adapters away (LOG.md)"
    assert math.isfinite(climbed["share"].max()) and climbed["share"].max() < 1
