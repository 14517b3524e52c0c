"""Records are whole or absent, never overwritten, and say where they were measured without saying on which host."""

import json
import math
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from packlib.lab import records


def record(identity: str = "aaaa", created: str = "2026-01-01", **changes) -> dict:
    return {
        "run_id": identity,
        "status": "ok",
        "error": None,
        "spec": {"strategy": "padding", "seed": 0},
        "environment": {"created": created},
        "plan": {"fill": 0.5, "examples_per_row": {"p50": 4.0}},
        "metrics": {"tokens_per_s": {"mean": 10.0}, "optimizer_steps": 2},
        "trace": {"step": [1, 2], "tokens": [5, 9], "loss": [2.0, None]},
    } | changes


@pytest.fixture
def folder(tmp_path):
    return records.run_folder(tmp_path)


def names(folder) -> list[str]:
    return sorted(path.name for path in (folder / "records").iterdir())


def test_identity_is_that_of_the_contents():
    spec = {"strategy": "padding", "seed": 0, "steps": None, "learning_rate": 1e-3}
    identity = records.run_id(spec)
    assert records.run_id(dict(reversed(spec.items()))) == identity == "46b1b757b72b", (
        "published records keep their names"
    )
    assert (
        len(
            {
                records.run_id(spec | change)
                for change in ({}, {"seed": 1}, {"steps": 0}, {"learning_rate": 2e-3}, {"new": None})
            }
        )
        == 5
    )


# writing


def test_a_record_is_never_overwritten(folder):
    path = records.write_record(folder, record(status="ok"))
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        records.write_record(folder, record(status="failed"))
    assert path.read_bytes() == before and names(folder) == ["aaaa.json"]
    assert oct(path.stat().st_mode & 0o777) == "0o644", "others may read it"


def test_of_many_writers_one_wins(folder):
    def write(i):
        try:
            records.write_record(folder, record(error=str(i)))
        except FileExistsError:
            return None
        return str(i)

    with ThreadPoolExecutor(8) as pool:
        (winner,) = filter(None, pool.map(write, range(40)))
    assert records.read_record(folder, "aaaa")["error"] == winner and names(folder) == ["aaaa.json"]


def torn_reads(path, write, times: int) -> int:
    """How often a reader saw something else than one whole version, while `write(version)` was called."""
    torn, done = [], threading.Event()

    def read():
        while not done.is_set():
            try:
                value = json.loads(path.read_text(encoding="utf-8"))
                if len(set(value["numbers"])) != 1 or len(value["numbers"]) != 5_000:
                    torn.append(value)
            except FileNotFoundError:
                pass
            except json.JSONDecodeError as error:
                torn.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for version in range(times):
        write({"numbers": [version] * 5_000})
    done.set()
    reader.join()
    return len(torn)


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "x.json"
    assert torn_reads(path, lambda value: records.write_json(path, value, overwrite=True), 30) == 0
    assert torn_reads(path, lambda value: path.write_text(json.dumps(value), encoding="utf-8"), 300) > 0, (
        "the negative control"
    )


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError("No space left on device")])
def test_an_interrupted_write_leaves_nothing(folder, monkeypatch, stop):
    def half(value, file, **options):
        file.write(json.dumps(value)[:20])
        raise stop

    with monkeypatch.context() as patch, pytest.raises(type(stop) if isinstance(stop, OSError) else stop):
        patch.setattr(json, "dump", half)
        records.write_record(folder, record())
    assert names(folder) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_does_not_know_is_refused(folder, value):
    with pytest.raises(ValueError, match="Out of range float"):
        records.write_record(folder, record(metrics={"eval_loss_per_token": value}))
    assert names(folder) == [], "and leaves nothing behind"


# reading


def test_records_are_read_oldest_first(folder):
    for identity, created in (("bb", "2026-01-02"), ("aa", "2026-01-03"), ("cc", "2026-01-01")):
        records.write_record(folder, record(identity, created))
    (folder / "records" / ".half.tmp").write_text("{", encoding="utf-8")
    assert [r["run_id"] for r in records.read_records(folder)] == ["cc", "bb", "aa"]
    assert records.read_record(folder, "dd") is None


@pytest.mark.parametrize(
    "text", ['{"run_id": "bb", "sta', "[1, 2]", "3", '{"run_id": "bb"}', '{"environment": null}', ""]
)
def test_a_file_that_is_no_record_is_named(folder, text):
    records.write_record(folder, record())
    (folder / "records" / "broken.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^broken\.json is not a record: "):
        records.read_records(folder)


def test_records_load_as_rows(folder, tmp_path_factory):
    other = records.run_folder(tmp_path_factory.mktemp("other"))
    records.write_record(folder, record("aa"))
    records.write_record(
        folder, record("bb", "2026-01-02", status="oom", error="killed", plan=None, metrics=None, trace=None)
    )
    records.write_record(other, record("cc", "2025-01-01"))
    frame = records.load_records(folder)
    assert frame[["run_id", "status", "strategy"]].values.tolist() == [
        ["aa", "ok", "padding"],
        ["bb", "oom", "padding"],
    ]
    assert frame.loc[0, ["plan.fill", "plan.examples_per_row.p50", "metrics.tokens_per_s.mean"]].tolist() == [
        0.5,
        4.0,
        10.0,
    ]
    assert frame.loc[1, ["plan.fill", "metrics.tokens_per_s.mean", "metrics.optimizer_steps"]].isna().all(), (
        "missing, not 0"
    )
    assert records.load_records([folder, other])["run_id"].tolist() == ["aa", "bb", "cc"]


def test_a_record_of_a_spec_is_found_by_the_content_of_its_data(folder):
    for identity, created in (
        ("spec-11112222", "2026-01-01"),
        ("spec-33334444", "2026-01-02"),
        ("other-1", "2026-01-03"),
    ):
        records.write_record(folder, record(identity, created))
    assert records.run_id_on("spec", "11112222" + 56 * "0") == "spec-11112222"
    assert records.find_record(folder, "spec", "1111222200")["run_id"] == "spec-11112222"
    assert records.find_record(folder, "spec", "5555666600") is None, "on other data it is another run"
    assert records.find_record(folder, "spec", None)["run_id"] == "spec-33334444", "the newest, where there are no data"
    assert records.find_record(folder, "spe", None) is None


def test_a_superseded_record_is_kept(folder):
    records.write_record(folder, record(status="failed"))
    records.supersede(folder, record(status="failed"))
    assert names(folder) == [] and records.read_record(folder, "aaaa") is None
    (kept,) = (folder / "superseded").iterdir()
    assert kept.name.startswith("aaaa-") and records.read_json(kept)["status"] == "failed"


def test_runs_that_shared_their_device_are_told_from_others():
    def shared(value):
        return record(environment={"created": "2026-01-01"} | value)

    assert records.had_device_alone(shared({})) and records.had_device_alone(shared({"concurrent_runs": 1}))
    assert not records.had_device_alone(shared({"concurrent_runs": 2}))


def test_a_run_without_a_result_is_a_record_too(folder, monkeypatch):
    monkeypatch.setenv(records.CONCURRENT, "3")
    records.write_record(folder, records.unfinished("bbbb", {"strategy": "padding"}, "oom", "killed"))
    found = records.read_record(folder, "bbbb")
    assert (found["status"], found["error"], found["plan"]) == ("oom", "killed", None)
    assert found["environment"]["concurrent_runs"] == 3 and not records.had_device_alone(found)


# places


def test_a_bare_name_is_a_folder_of_the_checkout(tmp_path, monkeypatch):
    project = tmp_path / "clone"
    for name in ("notebooks", "papermill_runs"):
        (project / name).mkdir(parents=True)
    monkeypatch.chdir(project / "notebooks")
    assert records.project_root() == project
    assert (
        records.run_folder("cpu") == project / "papermill_runs" / "cpu"
        and (project / "papermill_runs" / "cpu" / "records").is_dir()
    )
    assert records.run_folder(tmp_path / "elsewhere") == tmp_path / "elsewhere"


def test_environment_says_what_a_number_depends_on_but_not_the_host():
    found = records.environment("abc")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (
        found["data_sha256"] == "abc"
        and found["created"].endswith("+00:00")
        and found["device"].startswith(("CPU (", "NVIDIA"))
    )
    assert all(found[name] for name in ("python", "torch", "transformers", "trl", "datasets", "accelerate", "threads"))
    assert not {"hostname", "host", "node", "user"} & found.keys()
    assert socket.gethostname() not in found.values() and os.environ.get("USER", "nobody") not in found.values()


def test_git_state_of_code_without_its_repository(monkeypatch):
    monkeypatch.setenv("PACKLIB_GIT_SHA", "0123abc-dirty")
    assert {key: records.environment()[key] for key in ("git_sha", "dirty")} == {"git_sha": "0123abc", "dirty": True}
    monkeypatch.setenv("PACKLIB_GIT_SHA", "0123abc")
    assert records.environment()["dirty"] is False
    monkeypatch.delenv("PACKLIB_GIT_SHA")
    monkeypatch.setattr(records, "project_root", lambda: records.Path("/"))
    assert {key: records.environment()[key] for key in ("git_sha", "dirty")} == {"git_sha": None, "dirty": None}, (
        "unknown, not clean"
    )
