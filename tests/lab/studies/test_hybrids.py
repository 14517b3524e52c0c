"""What a hybrid gains: arms, what is said of records whose answers are known, and a check that finds the leak."""

import dataclasses

import pytest
import torch
from transformers.models.lfm2 import modeling_lfm2

from packlib.lab import models, records
from packlib.lab.doubts import Doubt
from packlib.lab.runs import worker
from packlib.lab.runs.spec import RunSpec
from packlib.lab.studies import hybrids
from packlib.lab.studies.hybrids import BOUNDARIES, LINES, PADDED
from tests.lab.studies import made_records

TINY = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 4096,
    "block_auto_adjust_ff_dim": False,
}


@pytest.fixture
def tiny(monkeypatch):
    """LFM2 three layers deep and 32 wide, its process's convolutions put back afterwards."""
    monkeypatch.setattr(modeling_lfm2, "causal_conv1d_fn", modeling_lfm2.causal_conv1d_fn)
    published = models.MODELS["lfm2-1.2b"]
    monkeypatch.setitem(models.MODELS, "lfm2-1.2b", dataclasses.replace(published, config=published.config | TINY))


def made(rate, *, waste=1.0, loss=2.0, mixers=None):
    step = {"slots_per_step": 100 * waste, "tokens_per_step": 100.0, "host_seconds": 0.1, "peak_memory_bytes": 10**9}
    metrics = {"tokens_per_s": {"mean": rate, "p20": rate, "p80": rate}, "limit": {"share": 0.5}} | step
    return {"metrics": metrics | ({"mixers": mixers} if mixers else {}), "trace": {"loss": [loss], "grad_norm": [1.0]}}


def test_a_table_and_sentences_of_known_records(tmp_path):
    folder, specs = records.run_folder(tmp_path), hybrids.arms(corpora=["a.npz"], rigs=["eager layers"])
    lines = {"on_lines": {"Conv": 10}, "with_boundaries": {}, "slots_per_token": 1.2}
    known = {
        PADDED: made(1000.0, waste=2.0),
        LINES: made(1500.0, loss=2.002, mixers=lines),
        BOUNDARIES: {"status": "oom"},
    }
    assert hybrids.findings(hybrids.table(specs, folder)) == [], "of nothing nothing is said"
    for _, arm, spec in specs[:3]:
        made_records.write(folder, spec, **known[arm])
    table = hybrids.table(specs, folder).set_index("arm")
    row = table.loc[LINES]
    assert (row.speed_up, row.waste, row.mixer_slots, row.mixers) == (1.5, 1.0, 1.2, "10 Conv on lines")
    assert row.loss_difference == pytest.approx(1e-3) and table.loc[PADDED, "mixer_slots"] == 2.0
    first, *rest = hybrids.findings(table.reset_index())
    assert first.startswith(
        "lfm2-1.2b on a, eager layers: flattened, on lines 1.50 × the 1,000 real tokens/s of padding"
    )
    assert "losses within 1.0e-03 of padding's" in first and rest == [
        "lfm2-1.2b on a, eager layers, flattened, with boundaries: oom."
    ]
    assert hybrids.display_table(table.reset_index())["mixers"].tolist() == ["", "10 Conv on lines", "oom"]


@pytest.mark.parametrize("packed", [1.0, 1.2])
def test_of_other_runs_in_doubt_a_plain_line_says_so(tmp_path, packed):
    folder, specs = records.run_folder(tmp_path / "a run"), hybrids.arms(corpora=["a.npz"], rigs=["eager layers"])
    for _, arm, spec in specs[:2]:
        made_records.write(folder, spec, **made(1000.0 if arm == PADDED else 1500.0))
    for strategy, rate in (("padding", 1000.0), ("minibatch_packing", 1000.0 * packed)):
        made_records.write(folder, RunSpec(corpus="b.npz", strategy=strategy, batch_size=1), **made(rate))
    first, *rest = hybrids.findings(hybrids.table(specs, folder))
    line = "a run: other runs of this folder are in doubt (control off); none of them is shown here."
    assert "1.50 × the 1,000" in first and rest == ([line] if packed > 1.1 else [])
    assert not any(isinstance(sentence, Doubt) for sentence in rest)


def test_arms_differ_in_what_they_are_called_by():
    specs = [spec for *_, spec in hybrids.arms()]
    assert len({spec.spec_id for spec in specs}) == len(specs) == 2 * 2 * 3 * len(hybrids.RIGS)
    assert {spec.rig.native_mixers for _, arm, spec in hybrids.arms() if arm == BOUNDARIES} == {True}


@pytest.mark.parametrize("native", [False, True])
def test_a_check_sees_the_leak_and_the_repair(tiny, native):
    found = hybrids.check("lfm2-1.2b", native=native, dtype=torch.float32, device=torch.device("cpu"))
    assert found["isolated"] and found["moved"] == 0 and found["without"] == "leak"
    assert found["on_lines"] == ([] if native else ["Lfm2ShortConv"])
    (said,) = hybrids.findings(hybrids.table([], records.runs_folder()), [found])
    assert f"3 layers in float32 on cpu, {found['arm']}: isolated; without it: leak." in said


def test_a_package_that_refuses_the_device_is_no_leak(tiny, monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("not on this device\nupgrade")

    monkeypatch.setattr(hybrids, "check_isolation", refuse)
    found = hybrids.check("lfm2-1.2b", native=True, dtype=torch.float32, device=torch.device("cpu"))
    (said,) = hybrids.findings(hybrids.table([], records.runs_folder()), [found])
    assert said.endswith("float32 on cpu, flattened, with boundaries: not on this device.")


def test_a_run_isolates_mixers_and_says_so(tiny, tmp_path):
    """Two micro-batches of four: flattened in both ways the losses are those of padding."""
    folder, found = records.run_folder(tmp_path), {}
    base = RunSpec(model="lfm2-1.2b", corpus="arithmetic", kernel="sdpa", steps=2, warmup_steps=1, limit=32, layers=3)
    for arm, (strategy, native) in hybrids.ARMS.items():
        spec = dataclasses.replace(base, strategy=strategy, rig={"native_mixers": native})
        worker.execute(spec, spec.spec_id, folder, lambda line: None)
        found[arm] = records.read_record(folder, spec.spec_id)
        assert found[arm]["status"] == "ok", found[arm]["error"]
    for arm in (LINES, BOUNDARIES):
        assert found[arm]["trace"]["loss"] == pytest.approx(found[PADDED]["trace"]["loss"], rel=1e-5)
    told = {arm: record["metrics"].get("mixers") for arm, record in found.items()}
    assert told[PADDED] is None and told[LINES]["on_lines"] == {"Lfm2ShortConv": 2}
    assert 1 < told[LINES]["slots_per_token"] <= 1.25
    assert told[BOUNDARIES] == {"on_lines": {}, "with_boundaries": {"Lfm2ShortConv": 2}, "slots_per_token": 1.0}
