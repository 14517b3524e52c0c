"""What is said against a run's times: of which run, about which of its settings, and nothing where controls hold."""

import pandas as pd
import pytest

from packlib.lab import doubts, records
from packlib.lab.doubts import Doubt
from tests.lab.test_tables import row


def frame(*found: dict) -> pd.DataFrame:
    """Runs that had the device alone."""
    return pd.DataFrame([{"environment.concurrent_runs": 1, "run_id": f"r{i}"} | one for i, one in enumerate(found)])


def control(ratio: float, **changes) -> list[dict]:
    """A batch of one padded and packed, this ratio apart."""
    return [row(batch_size=1, **changes), row("minibatch_packing", 100 * ratio, batch_size=1, **changes)]


def repeated(seconds: float, **changes) -> list[dict]:
    """An arm of 0.5 s a step, repeated."""
    return [row(rate=100 * 0.5 / s, repeat=i, **changes) for i, s in enumerate([0.5, seconds])]


def test_sentences_name_the_run_that_they_are_about():
    found = doubts.by_run(frame(*control(1.2, run="bad"), *repeated(0.7, run="bad"), *control(1.01, run="good")))
    assert list(found) == ["bad"]
    assert [one.split("; expected")[0][:24] for one in found["bad"]] == [
        "bad: The control is off:",
        "bad: Repeats are off: th",
    ]
    assert all(isinstance(one, Doubt) for one in found["bad"])
    assert doubts.in_short(found["bad"]) == "control off, repeats off"
    assert doubts.by_run(frame(*control(1.01, run="good"), *repeated(0.505, run="good"))) == {}
    assert doubts.by_run(frame(*control(1.2))) == {} == doubts.by_run(pd.DataFrame()), "of no run"


def test_where_only_sdpa_pads_it_is_the_control():
    """As in CUDA graphs; beside padding that is unpadded inside attention, this counts and SDPA does not."""
    packed = control(1.2, run="x")[1]
    sdpa = control(1.0, run="x")[0] | {"kernel": "maskless_sdpa"}
    assert doubts.in_short(doubts.by_run(frame(sdpa, packed))["x"]) == "control off"
    flash = sdpa | {"kernel": "flash_sdpa", "metrics.tokens_per_s.mean": 120.0}
    assert doubts.by_run(frame(sdpa, packed, flash)) == {}, "of two ways through SDPA the stronger"
    unpadded = control(1.0, run="x")[0] | {"metrics.tokens_per_s.mean": 120.0}
    assert doubts.by_run(frame(sdpa, packed, unpadded)) == {}
    assert doubts.by_run(frame(sdpa | {"kernel": "transformers_sdpa"}, packed)) == {}, "it builds masks"


def test_repeats_in_two_runs_are_none():
    first, second = repeated(0.7)
    assert doubts.by_run(frame(first | {"run": "a"}, second | {"run": "b"})) == {}


@pytest.mark.parametrize("what", ["own", "others", "both", "none"])
def test_a_study_is_told_of_its_own_runs_in_red_and_of_others_in_plain(what):
    own = repeated(0.7 if what in ("own", "both") else 0.5, run="x", corpus="a")
    others = control(1.2 if what in ("others", "both") else 1.0, run="x", corpus="b")
    said = doubts.by_run(frame(*own, *others), ["r0"]).get("x", [])
    red = [one for one in said if isinstance(one, Doubt)]
    plain = [one for one in said if not isinstance(one, Doubt)]
    assert [one.short for one in red] == (["repeats off"] if what in ("own", "both") else [])
    line = "x: other runs of this folder are in doubt (control off); none of them is shown here."
    assert plain == ([line] if what in ("others", "both") else [])


def test_a_repeat_that_a_study_does_not_show_speaks_against_the_one_that_it_does():
    assert doubts.by_run(frame(*repeated(0.7, run="x")), ["r1"])["x"][0].startswith("x: Repeats are off")


def test_a_control_speaks_against_larger_batches_of_its_rig_and_of_no_other():
    own = row(run="x", **{"rig.lean": True})
    off = control(1.2, run="x", **{"rig.lean": True})
    assert doubts.in_short(doubts.by_run(frame(own, *off), ["r0"])["x"]) == "control off"
    elsewhere = control(1.2, run="x", **{"rig.lean": False})
    (line,) = doubts.by_run(frame(own, *elsewhere), ["r0"])["x"]
    assert not isinstance(line, Doubt)


def test_a_folder_without_records_or_with_other_records_is_in_no_doubt(tmp_path):
    folder = records.run_folder(tmp_path / "empty")
    assert doubts.of_folder(folder, []) == []
    timing = {"run_id": "t", "status": "ok", "spec": {"arm": "varlen"}, "environment": {"created": "2026"}}
    records.write_record(folder, timing)
    assert doubts.of_folder(folder, ["t"]) == []


def test_the_published_runs_are_in_doubt_as_their_reports_say():
    """The climbs and hybrids of h200x2 are of other settings than its control and its repeats."""
    found = records.load_records(records.run_folder("h200x2", create=False)).assign(run="h200x2")
    assert doubts.in_short(doubts.by_run(found)["h200x2"]) == "control off, repeats off"
    (line,) = doubts.by_run(found, found.loc[found["world_size"] == 1, "run_id"])["h200x2"]
    assert not isinstance(line, Doubt) and "(control off, repeats off)" in line
    h100 = records.load_records(records.run_folder("h100", create=False)).assign(run="h100")
    assert doubts.by_run(h100) == {}
