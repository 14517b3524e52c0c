"""Like is set beside like; what one side does not say stays empty; ratios, limits and sentences follow from records."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from packlib.lab import models, paper, records
from packlib.lab.doubts import Doubt
from packlib.lab.figures import PAGE
from packlib.lab.runs.spec import Rig, RunSpec
from packlib.lab.studies import convergence
from packlib.lab.studies import paper as comparison
from packlib.lab.studies.convergence import EPOCHS, FIXED, POSID, STEPS
from tests.lab.studies import made_records

GPU = RunSpec(
    model="mistral-7b",
    corpus="multitask_mistral_{split}.npz",
    batch_size=4,
    max_tokens=4096,
    gradient_accumulation=2,
    dtype="bfloat16",
)
TINY = RunSpec(model="tiny-llama", corpus="pydocs")
DATA, STAND_INS = {"multitask": "FLAN", "pydocs": "FLAN", "math": "OrcaMath"}, {"tiny-llama": "mistral-7b"}


def write(folder, spec, *, rate=0.0, memory=1e9, waste=1.0, status="ok", loss=None, steps=10, devices=1, **environment):
    """A record as a measured run leaves it, without measuring."""
    metrics = {
        "tokens_per_s": {"mean": rate},
        "slots_per_s": {"mean": rate * waste},
        "step_seconds": {"p50": 1.0},
        "peak_memory_bytes": memory,
        "measured_fill": 1 / waste,
        "measured_waste": waste,
        "optimizer_steps": steps,
        "model_flops_utilization": 0.5,
        "kernel": "torch_varlen",
        "eval_loss_per_token": loss,
    }
    plan = {"examples": 1000, "rows": 250, "real_tokens": 500_000, "waste": waste}
    environment = {"device_count": devices, "concurrent_runs": 1} | environment
    made_records.write(folder, spec, status=status, metrics=metrics, plan=plan, environment=environment)


@pytest.fixture
def folder(tmp_path):
    """mistral-7b: packing is 1.5 times padding, of a limit of 2.

    A second batch size has fewer arms, and one arm did not fit.
    """
    folder = records.run_folder(tmp_path / "somewhere")
    write(folder, GPU, rate=1000, memory=70e9, waste=2.0)
    write(folder, replace(GPU, strategy="minibatch_packing"), rate=1530, memory=63e9)
    write(folder, replace(GPU, strategy="multipack_posid"), rate=2200, memory=77e9)
    write(folder, replace(GPU, strategy="minibatch_packing", repeat=1), rate=1570, memory=63e9)
    write(folder, replace(GPU, strategy=FIXED), status="oom")
    write(folder, replace(GPU, batch_size=16), rate=9000, memory=1e9, waste=9.0)
    write(folder, replace(GPU, strategy="minibatch_packing", batch_size=16), rate=9999, memory=1e9)
    write(folder, replace(GPU, kernel="transformers_sdpa"), rate=1, memory=1e12, waste=2.0)
    write(folder, replace(GPU, strategy="trl_padding_free"), rate=1, memory=1)
    return folder


def beside(folder, published=()):
    return comparison.side_by_side(comparison.speed_arms(comparison.measured(folder, published)), DATA, STAND_INS)


def row(table, **where):
    found = table[np.logical_and.reduce([table[name] == value for name, value in where.items()])]
    assert len(found) == 1, f"{len(found)} rows where {where}"
    return found.iloc[0]


def test_ratios_limit_and_floor_are_those_of_one_setting(folder):
    packed = row(beside(folder), model="mistral-7b", corpus="multitask_mistral", strategy="minibatch_packing")
    assert packed["tokens_per_s"] == 1550, "repeats are pooled; batch 16, other kernels and TRL's peers are not"
    assert (packed["speed_up"], packed["limit"], packed["memory_ratio"]) == (1.55, 2.0, 0.9)
    parameters = models.parameter_count(models.model_config("mistral-7b")).total
    assert packed["floor"] == pytest.approx(8 * parameters / 70e9)
    assert (packed["tokens_per_s_paper"], packed["data"], packed["rows"]) == (1408, "FLAN", 1000)
    assert packed["speed_up_paper"] == pytest.approx(1408 / 742)


def test_offline_packing_is_multipack_and_a_run_out_of_memory_is_no_row(folder):
    table = beside(folder)
    assert row(table, model="mistral-7b", strategy="multipack_posid")["tokens_per_s_paper"] == 3010
    assert pd.isna(row(table, model="mistral-7b", strategy=FIXED)["run"]), "in the paper, and here without a result"


def test_times_of_runs_that_shared_the_device_do_not_count(tmp_path):
    folder = records.run_folder(tmp_path / "shared")
    write(folder, GPU, rate=1000)
    write(folder, replace(GPU, strategy="minibatch_packing"), rate=10, concurrent_runs=2)
    write(folder, replace(GPU, strategy="minibatch_packing", repeat=1), rate=1500)
    assert row(beside(folder), strategy="minibatch_packing", run="shared")["speed_up"] == 1.5


def test_every_row_of_table_2_is_there_once(folder):
    table = beside(folder)
    absolute = [f"{name}_paper" for name in comparison.VALUES]
    known = table[table[absolute].notna().any(axis=1)]
    assert len(known) == len(paper.table_2()) == len(known.drop_duplicates(["model", "strategy"]))
    for name in ("tokens_per_s", "peak_memory_bytes", "rows"):
        assert known[f"{name}_paper"].sum() == paper.table_2()[name].sum()
    assert known["loss_paper"].sum() == pytest.approx(paper.table_2()["eval_loss_per_token"].sum())


def test_a_stand_in_has_the_papers_ratios_and_none_of_its_absolute_numbers(tmp_path):
    folder = records.run_folder(tmp_path / "cpu")
    for strategy, rate in (("padding", 100), ("minibatch_packing", 180)):
        write(
            folder,
            replace(TINY, strategy=strategy),
            rate=rate,
            memory=1e9,
            waste=2.0 if strategy == "padding" else 1.0,
            devices=0,
        )
    packed = row(beside(folder), model="tiny-llama", strategy="minibatch_packing")
    assert packed["speed_up_paper"] == pytest.approx(1408 / 742) and pd.isna(packed["tokens_per_s_paper"])
    assert pd.isna(packed["floor"]), "a process's own memory is in the peak of a CPU run"
    alone = comparison.side_by_side(comparison.speed_arms(comparison.measured(folder)), {}, {})
    assert pd.isna(row(alone, model="tiny-llama", strategy="minibatch_packing")["speed_up_paper"]), (
        "nothing stands for anything by itself"
    )


def test_orcamath_is_the_blogs_about(tmp_path):
    folder = records.run_folder(tmp_path / "math")
    for strategy in ("padding", "minibatch_packing"):
        write(folder, replace(GPU, corpus="math_mistral_{split}.npz", strategy=strategy), rate=1, memory=1e9)
    packed = row(beside(folder), corpus="math_mistral", strategy="minibatch_packing")
    assert (packed["speed_up_paper"], packed["memory_ratio_paper"]) == (1.4, 0.94)
    assert pd.isna(packed["tokens_per_s_paper"])


def test_an_empty_folder_shows_the_paper_with_empty_cells(tmp_path):
    folder = records.run_folder(tmp_path / "nothing")
    frame = comparison.measured(folder)
    table, four = beside(folder), comparison.table_4(comparison.convergence_arms(frame))
    shown = comparison.pairs(table, ["rows", "real tokens/s", "peak memory (GB)", "validation loss"])
    assert len(shown) == len(paper.table_2()) and (shown.xs("here", axis=1, level=1) == "").all(axis=None)
    assert shown.loc[("not measured", "mistral-7b", "FLAN", "padding"), ("real tokens/s", "paper")] == "742"
    assert list(comparison.settings(comparison.speed_arms(frame))) == ["paper"]
    assert len(four) == 5 and set(four["source"]) == {"paper"}
    said = comparison.findings(table, frame, "nothing")
    assert said[0].startswith("Run nothing has no speed") and said[-1].startswith("17 of 17 rows")


def test_published_runs_stand_beside_and_the_same_run_counts_once(folder, tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    monkeypatch.setattr(records, "project_root", lambda: root)
    published = records.run_folder(root / "papermill_runs" / "gpu1")
    write(published, GPU, rate=1, memory=1.0)  # folder has it too
    write(published, replace(GPU, corpus="math_mistral_{split}.npz"), rate=2, memory=1.0)
    for names in (["gpu1"], ["gpu?"], ["none*", "gpu*"]):
        frame = comparison.measured(folder, names)
        assert frame.groupby("run").size().to_dict() == {"somewhere": 9, "gpu1": 1}
    assert set(comparison.measured(folder, ["none*"])["run"]) == {"somewhere"}
    with pytest.raises(ValueError, match=r"unknown published run 'gpu2' \(did you mean 'gpu1'\?\); known: gpu1"):
        comparison.measured(folder, ["gpu2"])


def test_settings_say_what_differs(folder):
    table = comparison.settings(comparison.speed_arms(comparison.measured(folder)))
    assert table.loc["tokens per example"].to_dict() == {"paper": "FLAN: 471", "somewhere": "multitask_mistral: 500"}
    assert table.loc["slots per real token, padded", "somewhere"] == "multitask_mistral: 2.00"
    assert table.loc["batch × accumulation"].tolist() == ["4 × 2", "4 × 2"]
    assert table.loc["gradients, AdamW's moments"].tolist() == ["", "bfloat16"]


LOSSES = [
    ("padding", "", 2.0, 40),
    (FIXED, EPOCHS, 3.0, 5),
    (POSID, EPOCHS, 2.5, 5),
    (FIXED, STEPS, 2.25, 40),
    (POSID, STEPS, 2.125, 40),
]


@pytest.fixture
def trained(folder):
    base = replace(TINY, batch_size=8, eval_examples=8, limit=320)
    losses = {(strategy, variant): (loss, steps) for strategy, variant, loss, steps in LOSSES}
    for arm in convergence.arms(base, rows_per_step=2, seeds=[0, 1]):
        loss, steps = losses.get((arm.strategy, arm.variant), (99.0, 40))  # of other arms of notebook 07
        write(folder, arm.spec, rate=1, memory=1.0, loss=loss + arm.spec.seed, steps=steps)
    write(folder, replace(base, strategy=POSID, eval_every=7), loss=99.0)  # of no arm at all
    short = convergence.arms(replace(base, limit=32), rows_per_step=2, groups=["padding"], seeds=[0])
    write(folder, short[0].spec, loss=99.0)  # of another setting
    fused = convergence.arms(replace(base, rig=Rig(fused_loss=True)), rows_per_step=2, groups=["padding"], seeds=[0])
    write(folder, fused[0].spec, loss=99.0)  # padding alone on another rig: nothing to hold against Table 4
    return folder


def test_table_4_finds_the_arms_by_their_steps(trained):
    frame = comparison.measured(trained)
    four = comparison.table_4(comparison.convergence_arms(frame))
    ours = four[four["source"] == "ours"]
    assert set(ours["setting"]) == {"somewhere: tiny-llama on pydocs"}
    assert ours["loss"].tolist() == [2.5, 3.5, 3.0, 2.75, 2.625], (
        "the means over seeds; atoms and other settings are elsewhere"
    )
    assert ours["steps"].tolist() == [40, 5, 5, 40, 40] and ours["difference"].tolist() == [0.0, 1.0, 0.5, 0.25, 0.125]
    assert set(comparison.speed_arms(frame)["model"]) == {"mistral-7b"}, (
        "runs that evaluate on the way are not timed against Table 2"
    )


def test_findings_are_computed(trained):
    frame = comparison.measured(trained)
    table = beside(trained)
    said = "\n".join(comparison.findings(table, frame, "somewhere"))
    saved = 0.1 / (1 - row(table, strategy="minibatch_packing", run="somewhere")["floor"])
    assert "1.55 times as fast as padding, with a limit of 2.00, and takes 0.90 of its peak memory;" in said
    assert "the paper's mistral-7b on FLAN: 1.90 and 0.80" in said
    assert f"can change it saves {saved:.0%}" in said
    assert "2 speed-ups are known on both sides" in said and "farthest is offline packing + PosID" in said
    found = {EPOCHS: ("+0.5000", "+0.073"), STEPS: ("+0.1250", "+0.082")}
    for variant, (ours, theirs) in found.items():
        interval = f"95 % interval {ours} to {ours}, inf standard errors, 2 seeds), a cost"
        told = f"changes the loss by {ours} nats ({interval}; in the paper by {theirs}."
        assert f"somewhere: tiny-llama on pydocs, {variant}: leaving out position ids {told}" in said
    assert "14 of 17 rows" in said and "nan" not in said


def test_padding_through_sdpa_is_a_baseline_where_it_ran_in_the_same_setting(folder):
    def said() -> str:
        return "\n".join(comparison.findings(beside(folder), comparison.measured(folder), "somewhere"))

    elsewhere = [replace(GPU, batch_size=16), replace(GPU, rig=Rig(lean=True)), replace(GPU, max_tokens=2048)]
    for spec in elsewhere:
        write(folder, replace(spec, kernel="maskless_sdpa"), rate=1, waste=2.0)
    assert "SDPA" not in said()
    for repeat, rate in enumerate([770, 775, 780]):
        write(folder, replace(GPU, kernel="maskless_sdpa", repeat=repeat), rate=rate, waste=2.0)
    assert (
        "1.55 times as fast as padding (2.00 times padding through SDPA as PyTorch chooses), with a limit of 2.00"
        in said()
    )
    write(folder, replace(GPU, kernel="flash_sdpa"), rate=1000, waste=2.0)  # the stronger one
    assert (
        "1.55 times as fast as padding (1.55 times padding through SDPA held to its flash kernel), with a limit of 2.00"
        in said()
    )


def test_one_seed_has_no_interval_and_no_verdict(folder):
    base = replace(TINY, batch_size=8, eval_examples=8, limit=320)
    for arm in convergence.arms(base, rows_per_step=2, groups=["padding", STEPS], seeds=[0]):
        write(folder, arm.spec, rate=1, loss=2.0 if arm.strategy == FIXED else 2.5)
    frame = comparison.measured(folder)
    said = [line for line in comparison.findings(beside(folder), frame, "somewhere") if "position ids" in line]
    assert len(said) == 1 and "by -0.5000 nats (one seed, no interval); in the paper by +0.082." in said[0]


@pytest.mark.parametrize("packed", [1010, 1200])
def test_a_run_whose_control_is_off_says_so_first_and_ranks_nothing(folder, tmp_path, monkeypatch, packed):
    """It is the farthest from the paper: of those that are left, another one is."""
    monkeypatch.setattr(records, "project_root", lambda: tmp_path)
    doubted = records.run_folder(tmp_path / "papermill_runs" / "doubted")
    math = replace(GPU, corpus="math_mistral_{split}.npz")
    for spec in (math, replace(math, strategy="multipack_posid"), replace(math, batch_size=1)):
        write(doubted, spec, rate=1000, waste=2.0)
    write(doubted, replace(math, strategy="minibatch_packing"), rate=100)
    write(doubted, replace(math, strategy="minibatch_packing", batch_size=1), rate=packed)

    def said(here, published):
        frame = comparison.measured(here, published)
        return comparison.findings(beside(here, published), frame, here.name)

    both, off = said(folder, ["doubted"]), packed == 1200
    red = [line for line in both if isinstance(line, Doubt)]
    assert [line[:29] for line in red] == (["doubted: The control is off: "] if off else []) and red == both[: len(red)]
    (ranked,) = [line for line in both if "known on both sides" in line]
    assert ("runs in doubt left out, farthest is offline packing + PosID, somewhere" in ranked) == off
    assert ("; farthest is MiniBatchPacking + PosID, doubted" in ranked) == (not off)
    assert any(line.startswith("doubted, mistral-7b on math_mistral: MiniBatch") for line in both), "still said"
    assert any("farthest" in line for line in said(doubted, [])) == (not off)
    assert not any(isinstance(line, Doubt) for line in said(folder, [])), "nothing is said against the other run"


def test_bars_carry_their_limit_and_no_number_lies_under_it(folder):
    table = beside(folder)
    rows = table[(table["run"] == "somewhere") & (table["strategy"] != "padding")]
    figure = comparison.ratio_bars(rows, "speed_up", ["model", "batching"], "Speed-up")
    (ax,) = figure.axes
    assert figure.get_suptitle() == "Speed-up:\n1.55 to 2.20 here, 1.90 to 4.06 in the paper"
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["mistral-7b, offline packing + PosID", "mistral-7b, MiniBatchPacking + PosID"]
    dashed = [line for line in ax.lines if line.get_linestyle() == "--" and len(line.get_xdata()) == 2]
    assert [list(line.get_xdata()) for line in dashed] == [[2.0, 2.0], [2.0, 2.0]]
    figure.canvas.draw()
    ours = [text for text in ax.texts if text.get_text() in ("1.55", "2.20")]
    for text, line in zip(sorted(ours, key=lambda text: text.xy[1]), dashed, strict=True):
        box, limit = text.get_window_extent(), ax.transData.transform((line.get_xdata()[0], 0))[0]
        assert not box.x0 <= limit <= box.x1, text.get_text()


def test_a_gpu_of_two_that_share_states_has_half_of_them(tmp_path):
    folder, base = records.run_folder(tmp_path / "two"), replace(GPU, world_size=2, rig=Rig(shard=True))
    write(folder, base, rate=2000, memory=40e9, waste=2.0, devices=2)
    write(folder, replace(base, strategy="minibatch_packing"), rate=2500, memory=39e9, devices=2)
    packed = row(beside(folder), run="two", strategy="minibatch_packing")
    parameters = models.parameter_count(models.model_config("mistral-7b")).total
    assert packed["floor"] == pytest.approx(8 * parameters / 2 / 40e9)


@pytest.mark.parametrize("two", [True, False])
def test_of_a_model_on_one_gpu_and_on_two_the_two_are_compared(tmp_path, two):
    """Not the rungs that notebook 08 climbs on one of them, if there are two."""
    folder = records.run_folder(tmp_path / "both")
    for spec, rate in ((GPU, 1000), (replace(GPU, world_size=2, rig=Rig(shard=True)), 1500))[: 1 + two]:
        write(folder, spec, rate=1000, waste=2.0)
        write(folder, replace(spec, strategy="minibatch_packing"), rate=rate)
    lfm = replace(GPU, model="lfm2-1.2b")
    write(folder, lfm, rate=1000, waste=2.0)
    write(folder, replace(lfm, strategy="minibatch_packing"), rate=1300)
    table = beside(folder)
    packed = row(table, run="both", model="mistral-7b", strategy="minibatch_packing")
    assert packed["speed_up"] == (1.5 if two else 1.0) and packed["speed_up_paper"] == pytest.approx(1408 / 742)
    assert row(table, run="both", model="lfm2-1.2b", strategy="minibatch_packing")["speed_up"] == 1.3
    machine = comparison.settings(comparison.speed_arms(comparison.measured(folder))).loc["machine", "both"]
    each = ["1 x GPU, not sharded (lfm2-1.2b)", "2 x GPU, FSDP2 (mistral-7b)"]
    assert sorted(machine.split("; ")) == (each if two else ["1 x GPU, not sharded"]), "with its models, or one for all"


def test_the_same_arm_on_two_devices_counts_twice(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "project_root", lambda: tmp_path)
    other = records.run_folder(tmp_path / "papermill_runs" / "other")
    for strategy in ("padding", "minibatch_packing"):
        write(other, replace(GPU, strategy=strategy), rate=7, created="2026-02-02", device="another GPU")
    assert set(comparison.speed_arms(comparison.measured(folder, ["other"]))["run"]) == {"somewhere", "other"}


def test_memory_with_adapters_has_no_floor_and_leaves_the_axis_to_the_ratios(folder):
    base = replace(GPU, rig=Rig(lora_rank=16))
    write(folder, base, rate=2000, memory=20e9, waste=2.0)
    write(folder, replace(base, strategy="minibatch_packing"), rate=2500, memory=19e9)
    table = beside(folder)
    packed = table[(table["strategy"] == "minibatch_packing") & table["run"].notna()].set_index("model")
    assert pd.isna(packed.loc["mistral-7b (LoRA rank 16)", "floor"]) and packed.loc["mistral-7b", "floor"] < 1
    (ax,) = comparison.blog_memory(table).axes
    assert 1 < ax.get_xlim()[1] < 1.2
    dashed = [line for line in ax.lines if line.get_linestyle() == "--" and len(line.get_xdata())]
    assert [line.get_xdata()[0] for line in dashed] == [packed.loc["mistral-7b", "floor"]]


def test_published_runs_are_shown_on_a_page():
    """Their print is as large as on a screen: a figure that is wider, or a title that is cut off, is none."""
    root = records.runs_folder()
    table = beside(root / "h200", ["h?00*"])
    pictures = [*comparison.speed_figures(table).values()]
    pictures += [comparison.blog_throughput(table), comparison.blog_memory(table)]
    four = comparison.table_4(comparison.convergence_arms(comparison.measured(root / "h200")))
    pictures += [comparison.table_4_figure(rows, name) for name, rows in comparison.table_4_settings(four).items()]
    assert len(table["run"].dropna().unique()) == 4 and len(pictures) == 8
    for figure in pictures:
        figure.canvas.draw()
        width, height = figure.get_size_inches()
        assert height <= width <= PAGE, figure.alt
        assert all(text.get_window_extent().x1 <= figure.bbox.x1 for text in figure.texts)
        for ax in figure.axes:
            absent = [text for text in ax.texts if text.get_text() == "not measured"]  # one for both sides
            sides = len(ax.texts) + len(absent)
            assert sides == 2 * len(figure.axes[0].get_yticklabels()), "nothing is left out"


def test_data_of_the_paper_share_a_panel_and_what_stands_for_the_same_keeps_its_name(folder, tmp_path):
    for corpus, rate in (("math_mistral_{split}.npz", 1200), ("pydocs", 1300), ("pysource", 1400)):
        base = replace(GPU, corpus=corpus)
        write(folder, base, rate=1000, memory=70e9, waste=2.0)
        write(folder, replace(base, strategy="minibatch_packing"), rate=rate, memory=63e9)
    table = beside(folder)
    figure = comparison.blog_throughput(table)
    titles = [" ".join(ax.get_title(loc="left").split()) for ax in figure.axes]
    assert sorted(titles[0].removesuffix(" for FLAN").split(", ")) == ["multitask_mistral", "pydocs"]
    assert titles[1:] == ["math_mistral for OrcaMath"]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    both = [f"somewhere, mistral-7b, {corpus}" for corpus in ("multitask_mistral", "pydocs")]
    assert sorted(labels) == ["somewhere, mistral-7b", *both]
    numbers = [{text.get_text() for text in ax.texts} for ax in figure.axes]
    assert {"1.55", "1.30"} <= numbers[0] and "1.20" in numbers[1]
    (by_batching,) = comparison.speed_figures(table).values()
    assert "pysource" in [ax.get_title(loc="left") for ax in by_batching.axes], "only the blog's has the paper's data"
    other = comparison.blog_throughput(table[table["data"] == ""])
    assert [ax.get_title(loc="left") for ax in other.axes] == ["pysource"], "all of it where nothing else is"


def test_every_run_has_its_figures(trained):
    frame = comparison.measured(trained)
    table, four = beside(trained), comparison.table_4(comparison.convergence_arms(frame))
    figures = comparison.speed_figures(table)
    assert list(figures) == ["somewhere"]
    settings = comparison.table_4_settings(four)
    assert list(settings) == ["somewhere: tiny-llama on pydocs"]
    for figure in (
        *figures.values(),
        comparison.blog_throughput(table),
        comparison.blog_memory(table),
        *(comparison.table_4_figure(rows, name) for name, rows in settings.items()),
    ):
        figure.canvas.draw()
        assert figure.alt and "\n" not in figure.alt
    assert figure.get_suptitle() == "somewhere: tiny-llama on pydocs:\neach arm minus padding, paper and here"


def test_without_a_run_the_papers_bars_are_shown(tmp_path):
    table = beside(records.run_folder(tmp_path / "nothing"))
    assert list(comparison.speed_figures(table)) == ["paper"]
    assert "nothing here, 1.40 to 1.96 in the paper" in comparison.blog_throughput(table).get_suptitle()


def test_a_rig_of_its_own_has_a_name_of_its_own_and_no_value_of_the_paper(folder):
    base = replace(GPU, rig=Rig(liger=True))
    write(folder, base, rate=2000, memory=70e9, waste=2.0)
    write(folder, replace(base, strategy="minibatch_packing"), rate=2500, memory=63e9)
    table = beside(folder)
    packed = row(table, model="mistral-7b (Liger's layers)", strategy="minibatch_packing")
    assert packed["speed_up"] == 1.25 and pd.isna(packed["speed_up_paper"]) and packed["floor"] < 1
    assert row(table, run="somewhere", model="mistral-7b", strategy="minibatch_packing")["speed_up"] == 1.55
