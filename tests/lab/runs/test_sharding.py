"""FSDP2 over two ranks trains as one process does on the same rows: losses, gradient norms, weights, checkpoints."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from packlib.lab import records, tables
from packlib.lab.pages import reproduce
from packlib.lab.runs import experiment, worker
from packlib.lab.runs.spec import Rig, RunSpec
from packlib.lab.studies import throughput
from tests.lab.runs import sharded_training

pytestmark = pytest.mark.timeout(240)
SCRIPT = Path(sharded_training.__file__)


def on_two_ranks(out, rig, *options):
    out.mkdir(exist_ok=True)
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *ranks, str(SCRIPT), str(out), json.dumps(rig), *options]
    ended = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=200, check=False)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("rank*.json"))]
    return found, ended


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return sharded_training.train(tmp_path_factory.mktemp("alone"), Rig())


def test_ranks_share_the_cores_and_one_keeps_them_all(monkeypatch):
    held = []
    monkeypatch.setattr(worker.os, "sched_getaffinity", lambda process: {7, 2, 3, 9, 11}, raising=False)
    monkeypatch.setattr(worker.os, "sched_setaffinity", lambda process, cores: held.append(cores), raising=False)
    for rank, ranks in ((0, 2), (1, 2), (0, 1), (3, 8)):
        worker.own_cores(rank, ranks)
    assert held == [[2, 3], [7, 9]]


def close(values):
    return pytest.approx(values, rel=1e-5, abs=1e-5)


def test_two_ranks_train_as_one_process_does(tmp_path, alone):
    (first, second), ended = on_two_ranks(tmp_path, {"shard": True, "recompute": "all"})
    assert ended.returncode == 0, ended.stderr
    assert first == second, "every rank has the loss, the norm and the weights of all"
    assert first["sharded"] == first["parameters"] > 0, "a rank holds its part of each weight"
    assert alone["sharded"] == 0
    assert first["losses"] == close(alone["losses"]) and first["norms"] == close(alone["norms"])
    assert first["weights"] == close(alone["weights"])
    assert alone["losses"][0] > alone["losses"][-1] + 0.1, "and something was learned, so that there is a difference"


@pytest.mark.slow
def test_killed_and_resumed_it_ends_the_same(tmp_path, alone):
    seen, ended = on_two_ranks(tmp_path, {"shard": True}, "--die-after", "3")
    assert ended.returncode != 0 and seen == [] and (tmp_path / "checkpoint-2").is_dir()
    (first, _), ended = on_two_ranks(tmp_path, {"shard": True}, "--resume")
    assert ended.returncode == 0, ended.stderr
    assert first["losses"] == close(alone["losses"][2:]), "the two steps after the checkpoint"
    assert first["weights"] == close(alone["weights"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "rig",
    [{}, {"shard": True, "fused_loss": True}, {"graphs": True, "fused_loss": True, "pad_to": 1}, {"lean": True}],
    ids=["DDP", "fused loss", "graphs", "lean"],
)
def test_other_rigs_on_two_ranks(tmp_path, alone, rig):
    (first, second), ended = on_two_ranks(tmp_path, rig)
    assert ended.returncode == 0, ended.stderr
    assert first == second and (first["sharded"] > 0) == ("shard" in rig)
    assert first["losses"] == close(alone["losses"]) and first["norms"] == close(alone["norms"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_dry_run_of_the_papers_machine(tmp_path):
    """The arms of preset h100x8 with two processes for its eight GPUs, a toy for its model, and short rows."""
    parameters = reproduce.load_preset("h100x8")["notebooks"]["06_measure_throughput_and_memory"]
    sizes = {name: parameters[name] for name in ("batch_size", "gradient_accumulation")}
    toy = {"dtype": "float32", "layers": 1, "limit": 96, "tokenizer": "bpe:512", "warmup_steps": 1, "world_size": 2}
    base = RunSpec(**sizes, max_tokens=128, steps=2, **parameters["options"] | toy)
    specs = throughput.table_2_specs(base, ["tiny-llama"], ["arithmetic"], parameters["strategies"])
    specs = [spec for spec in specs if not spec.strategy.startswith("trl_")][:3]
    (uneven,) = (entry for entry in parameters["further"] if entry.get("balance") is False)
    on_a_cpu = {"compile": "none", "recompute": "none", "pad_to": 0, "lean": False}
    for entry in (parameters["further"][0], uneven):
        rig = replace(base.rig, **entry["rig"] | on_a_cpu)
        specs.append(replace(specs[2], rig=rig, balance=entry.get("balance", True)))
    found = experiment.run(specs, records.run_folder(tmp_path))
    assert [record["error"] for record in found] == [None] * len(specs)
    for record in found:
        ranks = record["metrics"]["ranks"]
        assert {len(values) for values in ranks.values()} == {2}
        assert sum(ranks["tokens_per_step"]) == pytest.approx(record["metrics"]["tokens_per_step"])
    losses = {(r["spec"]["strategy"], r["spec"]["kernel"]): r["trace"]["loss"] for r in found[:3]}
    assert losses["padding", "auto"] == close(losses["minibatch_packing", "auto"])
    table = tables.against(experiment.frame(specs, records.run_folder(tmp_path)))
    rate = found[0]["metrics"]["tokens_per_s"]["mean"]
    assert table["tokens_per_s"].iloc[0] == pytest.approx(rate / 2), "tables say what one GPU does"


@pytest.mark.parametrize(
    ("rig", "world_size", "match"),
    [
        ({"shard": True}, 1, "world_size = 1; expected at least two ranks"),
        ({"shard": True, "lean": True}, 2, "expected graphs = False and lean = False"),
    ],
)
def test_what_cannot_be_sharded_is_refused(rig, world_size, match):
    with pytest.raises(ValueError, match=match):
        RunSpec(rig=rig, world_size=world_size)
