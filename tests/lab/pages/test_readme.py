"""README.md is what the records say: `make tables` finds what is wrong, mends it, and refuses what it does not know."""

import re

import pandas as pd
import pytest

from packlib.lab import figures, records
from packlib.lab.pages import readme
from packlib.lab.runs.spec import RunSpec
from packlib.lab.studies import convergence
from tests.lab.studies import made_records

ROOT = records.project_root()
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = "\n".join(block[0] for block in readme.BLOCK.finditer(README) if block[2] in ("figure", "headline"))


def test_readme_says_what_the_records_say():
    text, stale = readme.render(README)
    assert text == README and not stale, f"run make tables: {stale}"
    assert {name for _, name, *_ in readme.BLOCK.findall(README)} == set(readme.BLOCKS)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """README and records of another checkout, without a figure."""
    (tmp_path / "papermill_runs" / "h200").mkdir(parents=True)
    (tmp_path / "papermill_runs" / "h200" / "records").symlink_to(ROOT / "papermill_runs" / "h200" / "records")
    monkeypatch.setattr(records, "project_root", lambda: tmp_path)
    return tmp_path / "README.md"


def test_tables_finds_and_mends_a_wrong_number_and_a_missing_figure(copy):
    number = re.search(r"\| multitask \| MiniBatchPacking \+ PosID \| ([\d,]+) ", README)[1]
    copy.write_text(SHORT.replace(number, "9,999"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"README\.md is not what the records say: figure, headline; run"):
        readme.update(check=True)
    assert "9,999" in copy.read_text(encoding="utf-8"), "--check writes nothing"
    readme.update()
    assert copy.read_text(encoding="utf-8") == SHORT
    said = "README.md: nothing to change; report.md: nothing to change"
    assert readme.update(check=True) == said
    picture = copy.parent / "papermill_runs" / "h200" / "figures" / "readme.png"
    readme._draw(records.load_records(copy.parent / "papermill_runs" / "h200"), picture, "other numbers")
    assert readme.render(SHORT)[1] == ["figure"]


def test_a_picture_that_other_code_drew_is_an_old_one(copy):
    copy.write_text(SHORT, encoding="utf-8")
    readme.update()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(figures.LIMIT, "linewidth", 3)
        assert readme.render(SHORT)[1] == ["figure"]
        patch.undo()
        patch.setattr(figures, "bars_with_limits", figures.forest)
        assert readme.render(SHORT)[1] == ["figure"]
    assert readme.render(SHORT)[1] == []


@pytest.mark.parametrize(
    "block, message",
    [
        ("headlines h200", r"unknown block of README.md 'headlines' \(did you mean 'headline'\?\)"),
        ("headline h300", "papermill_runs/h300/records is empty; expected the records of a published run"),
    ],
)
def test_unknown_block_and_run(block, message):
    with pytest.raises(ValueError, match=message):
        readme.render(f"<!-- table: {block} -->\n<!-- end -->")


def test_losses_follow_from_records_of_notebook_07(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "project_root", lambda: tmp_path)
    folder = records.run_folder("made")
    base = RunSpec(model="x.gguf", corpus="math_x.npz", limit=64, batch_size=8, eval_examples=8)
    arms = convergence.arms(base, rows_per_step=2)
    results = {"padding": 1.0, "minibatch_packing": 1.0, "fixed_length_packing": 1.25}
    wobble = {0: 0.0, 1: 0.001, 2: -0.001}
    for i, arm in enumerate(arms):
        loss = results.get(arm.strategy, 1.125) + wobble[arm.spec.seed] * len(arm.label)
        metrics = {"optimizer_steps": arm.spec.steps or 4, "eval_loss_per_token": loss}
        created = {"created": f"2026-01-01T{i:04}"}
        made_records.write(folder, arm.spec, metrics=metrics, environment=created)
    lines = readme.losses(records.load_records(folder), "made").splitlines()
    labels = list(dict.fromkeys(arm.label for arm in arms if arm.variant in convergence.SHARES))
    assert [line.split(" | ")[1] for line in lines[4:]] == labels
    fixed = (
        r"\| math \| FixedLengthPacking \(contaminated\), equal steps \| 8 \| 1.2500 \| \+0.2500 nats .*3 seeds\) \|"
    )
    assert re.match(fixed, lines[6])

    timed = records.run_folder("timed")
    made_records.write(timed, base, metrics={"optimizer_steps": 4})
    said = readme.losses(records.load_records(timed), "timed")
    assert said == "", "runs that were only timed have no validation loss"


def test_runs_that_shared_their_device_do_not_count():
    frame = records.load_records(ROOT / "papermill_runs" / "h200")
    slow = frame.assign(**{"run_id": "other", "environment.concurrent_runs": 3, "metrics.tokens_per_s.mean": 1.0})
    assert readme.arms(pd.concat([frame, slow], ignore_index=True), "h200") == readme.arms(frame, "h200")
    alone = slow.assign(**{"environment.concurrent_runs": 1})
    assert readme.arms(pd.concat([frame, alone], ignore_index=True), "h200") != readme.arms(frame, "h200")
