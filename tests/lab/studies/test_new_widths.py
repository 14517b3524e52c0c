"""What a width costs the first time: measured twice, told only where PyTorch's choice is another kernel than flash."""

import pandas as pd
import pytest
import torch

from packlib.lab import records
from packlib.lab.studies import new_widths

SHARED = {"heads": 4, "kv_heads": 2, "head_dim": 16, "device": "cpu", "layers": 2, "kernel": "sdpa"}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(new_widths, "WIDTHS", (33, 48, 70))


def row(backend, chosen, new, again):
    metrics = {"metrics.chosen": chosen, "metrics.new_seconds": new, "metrics.again_seconds": again}
    return {"backend": backend, "rows": 4, "widths": [64, 80], "device": "cuda"} | metrics


def test_every_width_is_met_twice(tmp_path, monkeypatch):
    met = []

    def attend(spec, width):
        met.append((spec["backend"], torch.backends.cuda.math_sdp_enabled(), width))
        return "FLASH_ATTENTION", 1.0 if met.count(met[-1]) == 1 else 0.25

    monkeypatch.setattr(new_widths, "_attend", attend)
    folder, specs = records.run_folder(tmp_path), new_widths.specs(SHARED)
    table = new_widths.sweep(folder, specs)
    widths = [new_widths.WARM_UP] * 2 + [33, 33, 48, 48, 70, 70]
    assert met == [("default", True, n) for n in widths] + [("flash", False, n) for n in widths]
    assert table["metrics.new_seconds"].tolist() == [1.0, 1.0] and table["metrics.again_seconds"].tolist() == [0.25] * 2
    assert new_widths.sweep(folder, specs)["run_id"].tolist() == table["run_id"].tolist() and len(met) == 16, "resumed"


def test_what_is_timed_is_attention_of_that_width(tmp_path):
    table = new_widths.sweep(records.run_folder(tmp_path), new_widths.specs(SHARED))
    assert table["metrics.chosen"].tolist() == ["FLASH_ATTENTION"] * 2 and (table["metrics.new_seconds"] > 0).all()
    assert new_widths.findings(table) == [], "one kernel, nothing to tell"
    assert "held to flash" in new_widths.shown(table).to_string()


def test_findings_say_what_pytorchs_choice_costs():
    table = pd.DataFrame(
        [row("default", "CUDNN_ATTENTION", 0.1304, 0.0009), row("flash", "FLASH_ATTENTION", 0.0007, 0.0006)]
    )
    (said,) = new_widths.findings(table)
    assert "costs PyTorch's choice, cuDNN, 130 ms, and 0.9 ms again; held to flash 0.7 and 0.6 ms" in said
    assert "4 examples a batch on cuda" in said and "Medians of 2 widths" in said
    assert "cuDNN 130.40 0.90" in new_widths.shown(table).to_string()


@pytest.mark.parametrize(("error", "told"), [("No available kernel. Aborting execution.", True), ("CUDA error", False)])
def test_a_device_without_a_flash_kernel_says_so(tmp_path, monkeypatch, error, told):
    attend = new_widths._attend

    def fails(spec, width):
        if spec["backend"] == "flash":
            raise RuntimeError(error)
        return attend(spec, width)

    monkeypatch.setattr(new_widths, "_attend", fails)
    folder, specs = records.run_folder(tmp_path), new_widths.specs(SHARED)
    if not told:
        with pytest.raises(RuntimeError, match="CUDA error"):
            new_widths.sweep(folder, specs)
        return
    table = new_widths.sweep(folder, specs)
    assert new_widths.findings(table) == [] and "held to flash none here – –" in new_widths.shown(table).to_string()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_held_to_flash_a_new_width_costs_no_plan(tmp_path):
    shared = SHARED | {"device": "cuda", "head_dim": 128}
    table = new_widths.sweep(records.run_folder(tmp_path), new_widths.specs(shared))
    by = table.set_index("backend")
    assert by.loc["flash", "metrics.chosen"] == "FLASH_ATTENTION"
    assert by.loc["flash", "metrics.new_seconds"] < 0.02
