"""Real runs through trl.SFTTrainer, as small as they come: an arm leaves a record, and what stops it loses nothing."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter as Tally
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import transformers

from packlib.lab import records
from packlib.lab.data.corpora import content_sha256
from packlib.lab.runs import experiment, forked, worker
from packlib.lab.runs.spec import PADDED_SDPA, RunSpec, grid
from packlib.lab.strategies import get_strategy
from tests import processes

EXAMPLES = 16
BASE = RunSpec(
    corpus="arithmetic",
    tokenizer="bpe:512",
    limit=EXAMPLES,
    batch_size=4,
    max_tokens=256,
    layers=1,
    warmup_steps=1,
    eval_examples=6,
    kernel="sdpa",
)
SWEPT = [
    "padding",
    "minibatch_packing",
    "fixed_length_packing",
    "fixed_length_packing_posid",
    "multipack_posid",
    "trl_padding",
    "trl_padding_free",
    "trl_packing_bfd",
]
KILLED, SLOW = 13, 99  # seeds that `child` treats in its own way
CURVES = ("slots", "tokens", "loss_tokens", "examples")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return records.run_folder(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def swept(folder):
    """One epoch of each strategy over the same 16 examples: strategy -> record."""
    return {record["spec"]["strategy"]: record for record in experiment.run(grid(BASE, strategy=SWEPT), folder)}


@pytest.fixture
def interrupts():
    """SIGINT interrupts, also where it is ignored: a shell starts what it runs in the background like that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run_id(spec: RunSpec) -> str:
    return records.run_id_on(spec.spec_id, content_sha256(spec.corpus, spec.tokenizer))


def child(spec, run_id, folder, sender):
    """Stands in for `experiment._child`: one seed is killed as it runs, one takes too long, others are measured."""
    sender.send("started")
    if spec.seed == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    if spec.seed == SLOW:
        time.sleep(60)
    worker.execute(spec, run_id, folder, sender.send)


def fake_run(status="ok", after=lambda: None):
    """Stands in for `experiment._run_one`, and counts."""

    def run_one(spec, run_id, folder, progress, stop, gpu):
        run_one.ran.append(spec)
        run_one.gpus.append(gpu)
        record = records.unfinished(run_id, asdict(spec), status, "made up")
        records.write_record(folder, record)
        after()
        return record

    run_one.ran, run_one.gpus = [], []
    return run_one


def control_c(after: float) -> None:
    """SIGINT to this process's main thread, `after` seconds from now."""
    threading.Timer(after, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "records").iterdir())


# what a run leaves


def test_every_arm_leaves_a_record(swept, folder):
    assert list(swept) == SWEPT
    assert {name: record["error"] for name, record in swept.items() if record["status"] != "ok"} == {}
    assert files(folder) == sorted(f"{record['run_id']}.json" for record in swept.values()), (
        "one record each, nothing half-written"
    )
    assert all(run_id(replace(BASE, strategy=name)) == record["run_id"] for name, record in swept.items())


def test_a_record_holds_what_the_design_says(swept, folder):
    for record in swept.values():
        assert set(record) == {"run_id", "status", "error", "spec", "environment", "plan", "metrics", "trace"}
        assert run_id(RunSpec(**record["spec"])) == record["run_id"]
        assert {"git_sha", "dirty", "python", "torch", "trl", "driver", "device", "data_sha256", "created"} <= record[
            "environment"
        ].keys()
        metrics, trace = record["metrics"], record["trace"]
        for rate in ("tokens_per_s", "slots_per_s", "step_seconds"):
            low, middle, high = (metrics[rate][p] for p in ("p20", "p50", "p80"))
            assert 0 < low <= middle <= high
        assert (
            metrics["optimizer_steps"] == len(trace["step"])
            and metrics["measured_steps"] == len(trace["step"]) - BASE.warmup_steps
        )
        assert metrics["peak_memory_bytes"] > 1e7 and metrics["model_flops_utilization"] > 0
        assert {len(trace[name]) for name in ("step", "seconds", "loss", "grad_norm", *CURVES)} == {len(trace["step"])}
        assert all(a < b for a, b in zip(trace["seconds"], trace["seconds"][1:]))
        assert metrics["eval_loss_per_token"] < trace["loss"][0], "it learned something"
        assert list(metrics["phases"]) == ["corpus", "device", "plan", "model", "training", "results"]
        assert 0 < trace["seconds"][-1] <= metrics["phases"]["training"] and min(metrics["phases"].values()) >= 0
        text = json.dumps(record)
        assert str(Path.home()) not in text and str(folder) not in text, "a path of this machine"


def test_every_arm_trains_on_the_same_tokens(swept):
    """Conservation through planner, data set, TRL and collator, counted where batches are handed over: peers too."""
    for name, record in swept.items():
        totals = {curve: record["trace"][curve][-1] for curve in CURVES}
        plan, fixed = record["plan"], name.startswith("fixed_length")
        assert totals["tokens"] == plan["real_tokens"] == swept["padding"]["plan"]["real_tokens"], name
        assert totals["slots"] == plan["slots"] and totals["loss_tokens"] == plan["loss_tokens"], name
        assert fixed or (totals["examples"], totals["loss_tokens"]) == (EXAMPLES, totals["tokens"] - EXAMPLES), name
    assert len({record["environment"]["data_sha256"] for record in swept.values()}) == 1


def close(a: dict, b: dict, curve: str = "loss") -> float:
    assert len(a["trace"][curve]) == len(b["trace"][curve])
    return max(abs(x - y) for x, y in zip(a["trace"][curve], b["trace"][curve]))


def test_padding_and_minibatch_packing_are_the_same_training(swept):
    padding, packed, multipack = (swept[name] for name in ("padding", "minibatch_packing", "multipack_posid"))
    assert [padding["trace"][c] for c in CURVES[1:]] == [packed["trace"][c] for c in CURVES[1:]], (
        "the same mini-batches"
    )
    assert padding["trace"]["slots"] != packed["trace"]["slots"]
    assert close(padding, packed) < 1e-4 and close(padding, packed, "grad_norm") < 1e-3
    for loss in ("eval_loss_per_token", "eval_loss_per_example"):
        assert padding["metrics"][loss] == pytest.approx(packed["metrics"][loss], abs=1e-4)
        assert abs(padding["metrics"][loss] - multipack["metrics"][loss]) > 1e-2, (
            "the negative control: other steps, other model"
        )


def test_padding_through_sdpa_is_the_same_training(swept, folder):
    """Both ways: as PyTorch chooses its kernel, and held to the flash one."""
    for record in experiment.run(grid(BASE, kernel=PADDED_SDPA), folder):
        assert record["metrics"]["kernel"] == record["spec"]["kernel"]
        assert record["trace"]["loss"] == pytest.approx(swept["padding"]["trace"]["loss"], rel=1e-4)


def test_only_a_run_that_is_held_to_flash_is():
    def choices() -> list[bool]:
        return [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in ("flash", "math", "cudnn")]

    usual = choices()
    with worker.dispatched("packlib_rows", "maskless_sdpa"):
        assert choices() == usual != [True, False, False]
    with worker.dispatched("packlib_rows", "flash_sdpa"):
        assert choices() == [True, False, False]
    assert choices() == usual
    for kernel in PADDED_SDPA:
        spec = replace(BASE, strategy="minibatch_packing", kernel=kernel)
        with pytest.raises(ValueError, match=f"kernel = '{kernel}' builds a T x T mask or none for minibatch_packing"):
            worker.route(spec, get_strategy(spec.strategy), torch.device("cpu"))


def test_contamination_shows_on_the_same_rows(swept):
    leaky, isolated = swept["fixed_length_packing"], swept["fixed_length_packing_posid"]
    assert leaky["plan"]["sha256"] == isolated["plan"]["sha256"]
    assert [leaky["trace"][c] for c in CURVES[:3]] == [isolated["trace"][c] for c in CURVES[:3]]
    assert close(leaky, isolated) > 1e-3
    assert leaky["metrics"]["eval_loss_per_token"] != pytest.approx(
        isolated["metrics"]["eval_loss_per_token"], abs=1e-3
    )


@pytest.mark.parametrize(("peer", "ours"), [("trl_padding", "padding"), ("trl_padding_free", "minibatch_packing")])
def test_peers_are_measured_on_the_same_mini_batches(swept, peer, ours):
    assert [swept[peer]["trace"][c] for c in CURVES] == [swept[ours]["trace"][c] for c in CURVES]
    assert close(swept[peer], swept[ours]) < 1e-4
    assert swept["trl_packing_bfd"]["trace"]["tokens"] != swept[ours]["trace"]["tokens"], (
        "the negative control packs other rows"
    )


def test_records_load_in_the_order_of_the_specs(swept, folder):
    wanted = [replace(BASE, strategy=name) for name in ("multipack_posid", "padding")]
    found = experiment.frame([wanted[0], replace(BASE, seed=1), wanted[1]], folder)
    assert found["strategy"].tolist() == ["multipack_posid", "padding"]
    assert found["metrics.tokens_per_s.mean"].notna().all() and found["plan.fill"].between(0.5, 1).all()


def test_no_records_say_so(tmp_path):
    with pytest.raises(ValueError, match="has no records; run the arms first"):
        experiment.frame([BASE], records.run_folder(tmp_path))


def test_partial_steps_are_counted_as_they_were_taken(folder):
    """Four mini-batches in steps of three: the second step has one."""
    padding, packed = experiment.run(
        grid(replace(BASE, gradient_accumulation=3), strategy=["padding", "minibatch_packing"]), folder
    )
    assert padding["trace"]["examples"] == packed["trace"]["examples"] == [12, 16]
    assert close(padding, packed) < 1e-4


# sweeps


def test_a_sweep_resumes(swept, folder, monkeypatch):
    run_one, said = fake_run(), []
    monkeypatch.setattr(experiment, "_run_one", run_one)
    again = experiment.run(grid(BASE, strategy=list(swept)), folder, progress=said.append)
    assert again == list(swept.values()) and run_one.ran == []
    assert said == [f"{len(swept)} of {len(swept)} arms had a record"]
    experiment.run([replace(BASE, seed=5)], records.run_folder(folder / "other"))
    assert len(run_one.ran) == 1, "the negative control: another spec does run"


def test_a_death_and_a_failure_are_records_and_the_sweep_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "_child", child)
    folder, said = records.run_folder(tmp_path), []
    unfit = {"strategy": "padding", "examples_per_step": 8}
    specs = [replace(BASE, seed=KILLED), replace(BASE, **unfit), BASE]
    killed, failed, ok = experiment.run(specs, folder, progress=said.append)
    assert (killed["status"], killed["error"]) == ("oom", "killed by SIGKILL, probably out of memory")
    assert failed["status"] == "failed"
    assert failed["error"].startswith("ValueError: examples_per_step = 8 makes one flat batch a step; padding")
    assert ok["status"] == "ok" and ok["trace"]["tokens"][-1] > 0
    for record in (killed, failed):
        assert record["metrics"] is record["trace"] is record["plan"] is None and record["environment"]["torch"]
    assert files(folder) == sorted(f"{run_id(spec)}.json" for spec in specs)
    assert any("in planned" in line for line in said), "where it failed is shown"
    assert experiment.frame(specs, folder)["status"].tolist() == ["oom", "failed", "ok"]


def test_what_is_published_of_a_run_is_redrawn_where_its_data_are_not(tmp_path):
    """Arms without a record are left at None, in a line; in a folder without any record that is an error."""
    folder, said = records.run_folder(tmp_path / "run"), []
    absent = replace(BASE, corpus=str(tmp_path / "no.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"corpus '.*no\.jsonl' is not here, and run has no records"):
        experiment.run_here([absent], folder)
    done = replace(absent, seed=1)
    records.write_record(folder, records.unfinished(f"{done.spec_id}-0123", asdict(done), "oom", "as published"))
    found = experiment.run_here([absent, done], folder, progress=said.append)
    assert found[0] is None and found[1]["error"] == "as published"
    assert said[-1].startswith("1 of 2 arms have no record, and their corpus is not here: ")
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl' is not here, and padding has no record on it"):
        experiment.run_here([BASE, absent], folder)  # a part of the data: nothing is trained before this is said
    assert len(files(folder)) == 1


def test_a_corpus_that_is_not_here_stops_a_sweep_before_its_first_arm(tmp_path, monkeypatch):
    run_one, folder = fake_run(), records.run_folder(tmp_path / "run")
    monkeypatch.setattr(experiment, "_run_one", run_one)
    missing = replace(BASE, corpus=str(tmp_path / "no.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"corpus '.*no\.jsonl' is not here, and padding has no record on it"):
        experiment.run([missing, BASE], folder)
    with pytest.raises(ValueError, match=r"unknown corpus 'arithmetik' \(did you mean 'arithmetic'\?\)"):
        experiment.run([replace(BASE, corpus="arithmetik"), BASE], folder)
    assert run_one.ran == [] and files(folder) == []
    experiment.run([BASE], folder)
    assert run_one.ran == [BASE], "the negative control"


def test_an_edited_corpus_is_another_run(tmp_path, monkeypatch):
    """A record is of a spec and of the content of its corpus, wherever that lies; where it is gone, of the spec."""
    run_one, folder = fake_run(), records.run_folder(tmp_path / "run")
    monkeypatch.setattr(experiment, "_run_one", run_one)
    path = tmp_path / "sums.jsonl"
    spec = replace(BASE, corpus=str(path))
    path.write_text('{"text": "one and one is two"}\n', encoding="utf-8")
    first = experiment.run([spec], folder)[0]["run_id"]
    assert experiment.run([spec], folder)[0]["run_id"] == first and len(run_one.ran) == 1
    path.write_text('{"text": "one and one is three"}\n', encoding="utf-8")
    assert experiment.find(spec, folder) is None
    edited = experiment.run([spec], folder)[0]["run_id"]
    assert len(run_one.ran) == 2 and edited != first
    assert {edited.split("-")[0], first.split("-")[0]} == {spec.spec_id}, "the same spec on other data"
    path.write_text('{"text": "one and one is two"}\n', encoding="utf-8")
    assert experiment.run([spec], folder)[0]["run_id"] == first, "the record of the text that is back"
    path.unlink()
    assert experiment.find(spec, folder)["run_id"] == edited, "without data the newest record"
    assert [record["run_id"] for record in experiment.run([spec], folder)] == [edited] and len(run_one.ran) == 2


@pytest.mark.parametrize("at_once", [1, 2])
def test_an_interrupt_loses_no_finished_arm(tmp_path, monkeypatch, interrupts, at_once):
    monkeypatch.setattr(experiment, "_child", child)
    monkeypatch.setenv(records.CONCURRENT, str(at_once))
    folder, specs = records.run_folder(tmp_path), [replace(BASE, eval_examples=0), replace(BASE, seed=SLOW)]
    awaited = {"[1/2] ok", "[2/2] started"}

    def progress(line):
        seen = {f"{line[:5]} {line.split(': ')[-1]}"} & awaited
        awaited.difference_update(seen)
        if seen and not awaited:
            control_c(0.2)

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        experiment.run(specs, folder, progress=progress)
    assert time.monotonic() - begun < 30 and not multiprocessing.active_children(), "the arm's process is gone too"
    assert files(folder) == [f"{run_id(specs[0])}.json"]
    run_one = fake_run()
    monkeypatch.setattr(experiment, "_run_one", run_one)
    first, _ = experiment.run(specs, folder)
    assert first["status"] == "ok" and run_one.ran == specs[1:], "the next call goes on where it stopped"


def test_several_runs_share_a_device_where_asked(tmp_path, monkeypatch):
    """Three at a time, each waiting for two others; their records are in the order of the specs."""
    meet, run_one, specs = threading.Barrier(3), fake_run(), grid(BASE, seed=range(6))

    def one(spec, *rest):
        meet.wait(timeout=5)
        return run_one(spec, *rest)

    monkeypatch.setattr(experiment, "_run_one", one)
    monkeypatch.setenv(records.CONCURRENT, "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    found = experiment.run(specs, records.run_folder(tmp_path))
    assert Tally(map(int, run_one.gpus)) == {5: 4, 7: 2}, "the third has to share"
    assert [record["spec"]["seed"] for record in found] == list(range(6)) and len(run_one.ran) == 6
    assert {record["environment"]["concurrent_runs"] for record in found} == {3}
    with pytest.raises(ValueError, match="PACKLIB_CONCURRENT_RUNS = 3; runs of several ranks"):
        experiment.run([replace(BASE, world_size=2)], tmp_path)
    monkeypatch.setenv(records.CONCURRENT, "all")
    with pytest.raises(ValueError, match="PACKLIB_CONCURRENT_RUNS = 'all'; expected a number of at least 1"):
        experiment.run(specs, tmp_path)


def test_a_failed_run_is_tried_again_and_its_record_kept(tmp_path, monkeypatch):
    folder = records.run_folder(tmp_path)
    for status, tried, kept in (("failed", 1, 0), ("failed", 1, 1), ("oom", 1, 2), ("oom", 0, 2)):
        run_one = fake_run(status)
        monkeypatch.setattr(experiment, "_run_one", run_one)
        assert experiment.run([BASE], folder)[0]["status"] == status
        assert len(run_one.ran) == tried
        superseded = [json.loads(path.read_text()) for path in folder.glob("superseded/*.json")]
        assert [(r["status"], r["run_id"]) for r in superseded] == [("failed", run_id(BASE))] * kept
    assert len(records.read_records(folder)) == 1


def test_a_run_that_found_no_memory_beside_others_is_tried_again(tmp_path, monkeypatch):
    """Alone it may fit; what ran out of memory alone is not tried again (above)."""
    folder = records.run_folder(tmp_path)
    for beside, status, tried in (("2", "oom", 1), ("1", "oom", 1), ("1", "oom", 0), ("2", "oom", 0)):
        run_one = fake_run(status)
        monkeypatch.setattr(experiment, "_run_one", run_one)
        monkeypatch.setenv(records.CONCURRENT, beside)
        assert experiment.run([BASE], folder)[0]["status"] == status
        assert len(run_one.ran) == tried, (beside, tried)
    assert len(list(folder.glob("superseded/*.json"))) == 1
    published = records.run_folder(tmp_path / "published")
    monkeypatch.setenv(records.CONCURRENT, "2")
    experiment.run([BASE], published)
    monkeypatch.setattr(experiment, "content_sha256", lambda corpus, tokenizer: None)
    assert experiment.run([BASE], published)[0]["status"] == "oom", "where the data are not, it is drawn as it is"


class Clock:
    """Stands in for the module `time`."""

    now = 1000.0
    time = monotonic = lambda self: self.now

    def forward(self, seconds=30):
        self.now += seconds


@pytest.mark.parametrize(("left", "ran"), [(-1, 0), (50, 1), (61, 2), (1000, 4)])
def test_no_arm_is_started_that_would_not_end_in_time(tmp_path, monkeypatch, left, ran):
    """Arms of 30 s: the first starts while there is time, the next ones only where the longest so far would end."""
    clock, said = Clock(), []
    run_one = fake_run(after=clock.forward)
    monkeypatch.setattr(experiment, "time", clock)
    monkeypatch.setattr(experiment, "_run_one", run_one)
    monkeypatch.setenv(experiment.UNTIL, str(clock.now + left))
    specs = grid(BASE, seed=range(4))
    folder = records.run_folder(tmp_path)
    with pytest.raises(experiment.OutOfTime, match=f"{4 - ran} of 4 arms are left") if ran < 4 else nullcontext():
        experiment.run(specs, folder, progress=said.append)
    assert len(run_one.ran) == len(records.read_records(folder)) == ran
    assert sum(line.endswith("left for the next call") for line in said) == 4 - ran
    monkeypatch.delenv(experiment.UNTIL)
    assert [r["run_id"] for r in experiment.run(specs, tmp_path)] == [run_id(spec) for spec in specs]


@pytest.mark.parametrize(
    ("error", "status", "traced"),
    [
        (torch.OutOfMemoryError("Tried to allocate 2 GiB"), "oom", False),
        (RuntimeError("CUDA error: out of memory"), "oom", False),
        (ValueError("no such thing"), "failed", True),
    ],
)
def test_memory_that_runs_out_is_told_from_a_failure(tmp_path, monkeypatch, error, status, traced):
    def measure(spec, progress):
        raise error

    monkeypatch.setattr(worker, "measure", measure)
    said, verbosity = [], transformers.logging.get_verbosity()
    with warnings.catch_warnings():
        worker.execute(BASE, "a-run", tmp_path, said.append)
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()
    record = records.read_record(tmp_path, "a-run")
    assert (record["status"], record["error"]) == (status, f"{type(error).__name__}: {error}")
    assert bool(said) == traced


# several processes


def sees(spec, run_id, folder, sender):
    """Stands in for `experiment._child`: the record is the environment of a rank, the second of several fails."""
    record = records.unfinished(run_id, asdict(spec), "ok", os.environ.get("CUDA_VISIBLE_DEVICES"))
    if spec.world_size == 1:
        records.write_record(folder, record)
    elif os.environ["RANK"] == "1":
        raise SystemExit(3)
    else:
        time.sleep(60)


def test_a_single_rank_sees_one_gpu(tmp_path, monkeypatch):
    """Trainer would take the others for DataParallel."""
    monkeypatch.setattr(experiment, "_child", sees)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    (record,) = experiment.run([BASE], records.run_folder(tmp_path))
    assert record["error"] == "5"


def test_a_rank_that_fails_ends_the_others(tmp_path, monkeypatch):
    """They would wait for it, for minutes."""
    monkeypatch.setattr(experiment, "_child", sees)
    started = time.monotonic()
    (record,) = experiment.run([replace(BASE, world_size=2)], records.run_folder(tmp_path))
    assert record["status"] == "failed" and record["error"] == "ended with exit code 3 and no record"
    assert time.monotonic() - started < 50


def test_the_rank_that_fails_leaves_the_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    said: list[str] = []
    assert not worker.execute(replace(BASE, corpus="nowhere.jsonl", world_size=2), "x", tmp_path, said.append)
    record = records.read_record(tmp_path, "x")
    assert record["status"] == "failed" and "nowhere.jsonl" in record["error"]
    assert "nowhere.jsonl" in capsys.readouterr().err and said == []
    assert not worker.execute(replace(BASE, corpus="elsewhere.jsonl", world_size=2), "x", tmp_path, said.append)
    assert records.read_record(tmp_path, "x") == record, "the first reason stays"


@pytest.mark.slow
def test_two_ranks_share_the_rows(folder, swept):
    (record,) = experiment.run([replace(BASE, strategy="minibatch_packing", world_size=2)], folder)
    assert record["status"] == "ok", record["error"]
    trace, alone = record["trace"], swept["minibatch_packing"]["trace"]
    assert trace["examples"] == [8, 16] and record["metrics"]["optimizer_steps"] == 2, (
        "a mini-batch for each rank in every step"
    )
    batches = [b - a for a, b in zip([0, *alone["tokens"]], alone["tokens"])]
    assert len(set(batches)) == 4 and trace["tokens"][-1] == sum(batches), "each mini-batch once"
    assert trace["tokens"][0] in {a + b for i, a in enumerate(batches) for b in batches[:i]}
    assert all(math.isfinite(loss) for loss in trace["loss"])


def test_an_interrupt_ends_the_ranks(tmp_path, interrupts):
    before = processes.descendants(os.getpid())
    control_c(2)
    with pytest.raises(KeyboardInterrupt):
        experiment.run([replace(BASE, world_size=2, steps=10_000)], records.run_folder(tmp_path))
    assert processes.left_running(before) == [] and files(tmp_path) == []


def runs_on(pipe):
    """A run that would last a minute, if nobody hung up."""
    forked.end_when(partial(pipe.poll, 60))
    pipe.send("started")
    time.sleep(60)


def test_a_process_ends_when_what_it_waits_for_happens():
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=runs_on, args=(theirs,))
    process.start()
    theirs.close()
    assert ours.recv() == "started" and process.is_alive()
    ours.close()
    process.join(20)
    assert process.exitcode == 1


# A sweep in a process that is then killed.
SCRIPT = """
import sys
from pathlib import Path
from packlib.lab.runs import experiment
from packlib.lab.runs.spec import RunSpec

if __name__ == "__main__":
    spec = RunSpec(corpus="arithmetic", tokenizer="bpe:512", layers=1, steps=100_000, world_size=int(sys.argv[2]))
    experiment.run([spec], Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_ends_with_the_process_that_waits_for_it(tmp_path, ranks):
    """Also where that process is killed and can end nothing itself; what it waited for leaves no record."""
    (tmp_path / "sweep.py").write_text(SCRIPT, encoding="utf-8")
    folder = records.run_folder(tmp_path / "run")
    with subprocess.Popen([sys.executable, str(tmp_path / "sweep.py"), str(folder), str(ranks)]) as sweep:
        runs = []
        while len(runs) < 3:  # the run and two servers of processes, or torchrun and two ranks
            assert sweep.poll() is None
            time.sleep(0.1)
            runs = [psutil.Process(pid) for pid in processes.descendants(sweep.pid)]
        sweep.kill()
    _, alive = psutil.wait_procs(runs, timeout=30)
    assert alive == [] and files(folder) == []


def test_a_run_whose_loss_is_not_finite_has_failed(tmp_path):
    spec = replace(BASE, learning_rate=1e30, steps=3, eval_examples=0)
    (record,) = experiment.run([spec], records.run_folder(tmp_path))
    assert record["status"] == "failed"
    assert record["error"].startswith("a loss, gradient or evaluation is not finite")
