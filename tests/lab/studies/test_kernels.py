"""The four arms compute the same attention, on the same useful work; a sweep resumes and keeps what did not fit."""

import numpy as np
import pandas as pd
import pytest
import torch

from packlib.attention.kernels import varlen_attention
from packlib.lab import records
from packlib.lab.studies import kernels
from packlib.lab.studies.kernels import ARMS, MIXES, draw_lengths

SPEC = {
    "arm": "varlen",
    "mix": "heavy_tail",
    "tokens": 256,
    "mean_length": 40,
    "seed": 0,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "layers": 2,
    "repeats": 2,
    "device": "cpu",
    "kernel": "sdpa",
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("tokens", "mean"), [(64, 8), (1000, 37), (4096, 512), (16, 16), (5, 1)])
def test_lengths_fill_the_batch(mix, tokens, mean):
    for seed in range(20):
        lengths = draw_lengths(mix, tokens, mean, seed)
        assert lengths.sum() == tokens and lengths.min() >= 1 and lengths.dtype == np.int64
        assert lengths.max() <= max(mean, tokens // 2)
    assert np.array_equal(draw_lengths(mix, tokens, mean, 3), draw_lengths(mix, tokens, mean, 3))


def test_mixes_waste_more_and_more():
    waste = {
        mix: np.mean([len(n) * n.max() / n.sum() for n in (draw_lengths(mix, 8192, 64, seed) for seed in range(20))])
        for mix in MIXES
    }
    assert waste["even"] == 1 < 1.3 < waste["narrow"] < 1.6 < 4 < waste["heavy_tail"]
    with pytest.raises(ValueError, match="mix = 'wide'; expected one of even, narrow, heavy_tail"):
        draw_lengths("wide", 10, 1, 0)


def test_useful_work_counts_visible_pairs():
    lengths = np.array([1, 3, 4])
    pairs = sum(sum(range(1, n + 1)) for n in lengths)
    assert kernels.useful_flops(lengths, heads=2, head_dim=8) == 3.5 * 4 * 2 * 8 * pairs


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_computes_the_same_attention(arm):
    lengths = draw_lengths("heavy_tail", 64, 12, 0)
    q, k, v = (torch.randn(64, heads, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    cu_seqlens = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
    expected = varlen_attention(q, k, v, cu_seqlens, int(lengths.max()), kernel="reference")
    build, attend, shape = kernels.arm(SPEC | {"arm": arm}, lengths)
    if arm == "padded_sdpa":
        assert shape == (len(lengths), lengths.max())
        inside = torch.arange(shape[1]) < torch.from_numpy(lengths)[:, None]
        inputs = [torch.full((*shape, *x.shape[1:]), 7.0).masked_scatter(inside[..., None, None], x) for x in (q, k, v)]
        out = attend(*inputs, build()).transpose(1, 2)[inside]
    else:
        out = attend(*(x.reshape(*shape, *x.shape[1:]) for x in (q, k, v)), build())
        out = out.transpose(1, 2).reshape(q.shape) if arm == "dense_mask" else out
    assert (out - expected).abs().max() < 1e-5
    whole = varlen_attention(q, k, v, torch.tensor([0, 64], dtype=torch.int32), 64, kernel="reference")
    assert (out - whole).abs().max() > 1e-2, "the negative control: one segment is another attention"


def test_a_sweep_resumes_and_keeps_what_ran_out_of_memory(tmp_path, monkeypatch):
    folder, specs = (
        records.run_folder(tmp_path),
        [SPEC | {"arm": arm} for arm in ("padded_sdpa", "dense_mask", "varlen")],
    )
    measure = kernels.measure

    def short_of_memory(spec):
        if spec["arm"] == "dense_mask":
            raise torch.OutOfMemoryError("Tried to allocate 256 MiB\nand so on")
        return measure(spec)

    monkeypatch.setattr(kernels, "measure", short_of_memory)
    table = kernels.sweep(folder, specs).set_index("arm")
    assert table["status"].to_dict() == {"padded_sdpa": "ok", "dense_mask": "oom", "varlen": "ok"}
    assert table.loc["dense_mask", "error"] == "Tried to allocate 256 MiB" and pd.isna(
        table.loc["dense_mask", "metrics.useful_flops_per_s"]
    )
    assert (
        table.loc["varlen", "metrics.slots"] == 256
        and table.loc["padded_sdpa", "metrics.slots"] == 256 * table.loc["varlen", "metrics.waste"]
    )
    flops = kernels.useful_flops(draw_lengths("heavy_tail", 256, 40, 0), 4, 16)
    for arm in ("padded_sdpa", "varlen"):
        line = table.loc[arm]
        seconds = line["metrics.mask_seconds"] / 2 + line["metrics.layer_seconds.p50"]
        assert line["metrics.useful_flops_per_s"] * seconds == pytest.approx(flops), "masks count once for two layers"
    monkeypatch.setattr(kernels, "measure", None)  # cannot be called
    again = kernels.sweep(folder, specs[:2])
    assert again["arm"].tolist() == ["padded_sdpa", "dense_mask"]


def test_gain_is_varlen_over_padding():
    rows = [
        ("varlen", 1, 30.0),
        ("padded_sdpa", 1, 10.0),
        ("varlen", 2, 8.0),
        ("padded_sdpa", 2, 16.0),
        ("flex", 1, 99.0),
    ]
    table = pd.DataFrame(rows, columns=["arm", "tokens", "metrics.useful_flops_per_s"])
    assert kernels.gain(table, "tokens").to_dict() == {1: 3.0, 2: 0.5}


def test_a_mix_is_told_by_what_is_looked_at():
    table = kernels.mix_table(["even", "heavy_tail"], tokens=1024, mean_length=64, seed=0)
    even = table.loc["even"]
    assert (even["examples"], even["longest"], even["waste"], even["pairs, padded"]) == (16, 64, 1, 1)
    assert even["pairs, dense mask"] == pytest.approx(1024**2 / (16 * 64 * 65 / 2))
    assert table.loc["heavy_tail", "pairs, padded"] > table.loc["heavy_tail", "waste"] > 1.5


@pytest.fixture
def timed():
    """Records of a sweep against tokens: varlen is 2 and 4 times padding, the dense mask did not fit at last."""
    rows = []
    for tokens, speeds in ((1024, (10.0, 5.0, 15.0, 20.0)), (2048, (10.0, np.nan, 30.0, 40.0))):
        for arm, speed in zip(ARMS, speeds):
            row = {"arm": arm, "mix": "heavy_tail", "tokens": tokens, "layers": 16, "metrics.waste": 2.5}
            row |= {"status": "ok" if speed > 0 else "oom", "metrics.useful_flops_per_s": speed}
            row |= {"metrics.matmul_flops_ceiling": 100.0, "metrics.layer_seconds.p50": 0.1}
            rows.append(row | {"metrics.mask_seconds": 0.01, "metrics.mask_share": 0.25})
    return pd.DataFrame(rows)


def test_tables_and_findings_are_those_of_the_records(timed):
    table = kernels.timing_table(timed)
    assert table["tokens"].is_monotonic_increasing and "oom" in set(table["status"])
    masks = kernels.mask_table(timed).set_index("arm")
    assert masks.loc["packed, SDPA with a dense mask", "bytes"] == 2048**2 and masks["bytes"].notna().sum() == 1
    said = kernels.findings(timed, "heavy_tail", "cpu")
    assert said[0].startswith("2048 tokens of heavy_tail lengths on cpu, waste 2.50: varlen does 4.00 times")
    assert said[0].endswith("40.0% of the measured ceiling.") and "25.0% of a step of 16 layers" in said[-1]
    assert said[1] == "Packing with FlexAttention does 3.00 times the useful work of padding."
    assert len(said) == 3, "nothing is said of what did not fit"
    fitted = kernels.findings(timed[timed["tokens"] == 1024], "heavy_tail", "cpu")
    assert fitted[1] == "Packing with a dense mask does 0.50 times the useful work of padding."


def test_even_lengths_show_what_the_kernels_differ_by(timed):
    assert kernels.even_gap(timed) is None
    even = timed[timed["tokens"] == 1024].assign(**{"mix": "even", "metrics.waste": 1.0})
    assert kernels.even_gap(even).startswith("Even lengths, waste 1.00: varlen does 2.00 times")
    swapped = even.assign(arm=even["arm"].replace({"varlen": "padded_sdpa", "padded_sdpa": "varlen"}))
    assert kernels.even_gap(swapped).startswith("Even lengths, waste 1.00: padding does 2.00 times")


def test_figures_draw_every_arm(timed):
    for figure in (kernels.against_tokens(timed, "heavy_tail", "cpu"), kernels.against_mix(timed[:4], 1024, "cpu")):
        figure.canvas.draw()
        (ax,) = figure.axes
        names = [text.get_text() for text in ax.get_legend().get_texts()]
        assert {label for label, _ in ARMS.values()} <= set(names)
        assert ax.get_ylabel() and "varlen does 2.0 to" in figure.alt


def test_kernels_beside_each_other_are_those_that_work_here_or_have_a_record(tmp_path, caplog):
    folder, names = records.run_folder(tmp_path), ["reference", "flash_attn", "sdpa"]
    specs = kernels.of_kernels(folder, SPEC, "even", [128, 256], names)
    assert [(spec["kernel"], spec["tokens"]) for spec in specs] == [
        ("reference", 128),
        ("sdpa", 128),
        ("reference", 256),
        ("sdpa", 256),
    ]
    assert "flash_attn is not timed: " in caplog.text
    elsewhere = dict(SPEC) | {"arm": "varlen", "mix": "even", "tokens": 128, "kernel": "flash_attn"}
    records.write_record(folder, records.unfinished(records.run_id(elsewhere), elsewhere, "oom", "too large"))
    caplog.clear()
    assert elsewhere in kernels.of_kernels(folder, SPEC, "even", [128], names), "a published one is redrawn"
    assert "flash_attn" not in caplog.text, "and nothing says that it is missing"
    if not torch.cuda.is_available():
        assert kernels.of_kernels(folder, dict(SPEC) | {"device": "cuda"}, "even", [128], ["torch_varlen"]) == []
    with pytest.raises(ValueError, match="flsh"):
        kernels.of_kernels(folder, SPEC, "even", [128], ["flsh"])


def test_the_fastest_kernel_leads(tmp_path):
    folder = records.run_folder(tmp_path)
    timed = kernels.sweep(folder, kernels.of_kernels(folder, SPEC, "even", [128, 256], ["reference", "sdpa"]))
    assert set(timed["metrics.kernel"]) == {"reference", "sdpa"}
    timed["metrics.useful_flops_per_s"] = [float(10 * (i + 1)) for i in range(len(timed))]
    timed["metrics.matmul_flops_ceiling"] = [10.0 ** (i + 3) for i in range(len(timed))]  # shares fall as rates rise
    table = kernels.beside_each_other(timed)
    last = timed[timed["tokens"] == 256].set_index("kernel")["metrics.useful_flops_per_s"]
    assert table.index[0] == last.idxmax() and table[256].to_dict() == last.to_dict()
    assert "share of the ceiling" in kernels.kernels_shown(timed).to_html()
    assert kernels.kernels_shown(timed[:0]).data.empty and kernels.kernel_findings(timed[:0], timed) == []
    (said,) = kernels.kernel_findings(timed, timed[:0])
    assert said.startswith(f"Of varlen kernels, {last.idxmax()} does most at 256 tokens: {last.max() / last.min():.2f}")
    assert kernels.kernel_findings(timed[timed["kernel"] == "sdpa"], timed) == []


@pytest.mark.parametrize(("again", "told"), [(106.0, "; so new and old are not told apart."), (102.0, ".")])
def test_a_lead_is_held_against_a_kernel_that_was_measured_twice(again, told):
    rate = "metrics.useful_flops_per_s"
    timed = pd.DataFrame([{"kernel": name, "tokens": 8, rate: r} for name, r in [("old", 100.0), ("new", 105.0)]])
    auto = pd.DataFrame([{"arm": arm, "tokens": 8, "metrics.kernel": "old", rate: again} for arm in ("flex", "varlen")])
    (said,) = kernels.kernel_findings(timed, auto)
    lead = "Of varlen kernels, new does most at 8 tokens: 1.05 times that of old"
    assert said == f"{lead}. old, measured twice, differs by {again / 100 - 1:.1%}{told}"
