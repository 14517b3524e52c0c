"""README.md is what the records say: `make tables` finds what is wrong, mends it, and refuses what it does not know."""

import re
from dataclasses import replace

import pandas as pd
import pytest

from packlib.lab import figures, records
from packlib.lab.pages import readme
from packlib.lab.runs.spec import Rig, RunSpec
from packlib.lab.studies import convergence
from tests.lab.studies import made_records

ROOT = records.project_root()
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = "\n".join(block[0] for block in readme.BLOCK.finditer(README) if block[2] in ("figure", "headline"))


def test_readme_says_what_the_records_say():
    text, stale = readme.render(README)
    assert text == README and not stale, f"run make tables: {stale}"
    assert {name for _, name, *_ in readme.BLOCK.findall(README)} == set(readme.BLOCKS)


def test_what_packing_is_worth_is_what_the_climb_found():
    """The words on top of README, against the findings of notebook 08 of the same records; nothing without graphs."""
    found = records.read_json(ROOT / "papermill_runs" / "h100" / "summaries" / "08_climb_to_the_limit.json")["findings"]
    ratios = {line.split("_")[0]: line.split("padded is ")[1] for line in found if "on one rig, flattened over" in line}
    frame = records.load_records(ROOT / "papermill_runs" / "h100")
    said = readme.worth(frame, "h100")
    assert set(ratios) == {"multitask", "math"} and not said.startswith(">")
    for data, line in ratios.items():
        ratio, share = line.split(",")[0], line.split(", ")[1].split(" of")[0]
        assert f"{ratio} × as fast on {data}" in said and share in said
    assert readme.worth(frame[frame["rig.graphs"].ne(True)], "h100") == ""


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


@pytest.fixture
def steady():
    """h200_models without its batches of one: nothing says that its times are off."""
    frame = records.load_records(ROOT / "papermill_runs" / "h200_models")
    return frame[frame["batch_size"] != 1]


def test_a_claim_of_a_run_in_doubt_stands_below_what_is_off(steady):
    run = "h200_models"
    frame = records.load_records(ROOT / "papermill_runs" / run)
    assert readme.claim(frame, run).startswith("> [!CAUTION]\n> 🔴 **The control is off")
    assert readme.claim(frame, run).split("\n\n")[1] == readme.claim(steady, run)
    line = "🔴 *Control off (see above): read large differences, not small ones.*\n\n"
    for block in (readme.headline, readme.arms):
        assert block(frame, run) == line + block(steady, run)
    caution = readme.claim(frame, run).split("\n\n")[0]
    assert readme.models(frame, run) == f"{caution}\n\n{readme.models(steady, run)}", "it may stand alone"
    assert readme.models(steady, run).endswith("1 × NVIDIA H200, 2026-11-25, attention by torch_varlen.")
    assert "relative to padding (control off), Mistral" in readme.figure(frame, run)
    assert "relative to padding, Mistral" in readme.figure(steady, run)
    two = records.load_records(ROOT / "papermill_runs" / "h200x2")
    control, repeats, table, *_ = readme.ranks(two, "h200x2").split("\n\n")
    assert "The control is off" in control and "Repeats are off" in repeats and table.startswith("| corpus |")
    quiet = two[(two["batch_size"] != 1) & (two["repeat"] == 0)]
    assert readme.ranks(quiet, "h200x2").startswith("| corpus |")


def test_what_packing_is_worth_stands_beside_its_control_and_below_it_where_it_is_off():
    """In CUDA graphs; the plain trainer of the same folder is in doubt, and says nothing about them."""
    frame, rate = records.load_records(ROOT / "papermill_runs" / "h200"), "metrics.tokens_per_s.mean"
    assert readme.claim(frame, "h200").startswith("> [!CAUTION]")
    said, checked = readme.worth(frame, "h200").split("\n\n")
    assert said.startswith("**Mistral-7B on 1 × NVIDIA H200") and "full rows reach" in said
    compiled = frame["rig.compile"].eq("layers") & (frame["strategy"] == "multipack_posid")
    rates = frame.loc[compiled, rate]
    assert len(rates) == 2 and f" {rates.median():,.0f} real tokens/s there" in said, "the middle of repeats"
    assert "full rows" not in readme.worth(frame[~compiled], "h200")
    assert checked.startswith("Repeats of an arm are within 0.") and "packing runs at 0.991 times" in checked
    one = frame["rig.graphs"].eq(True) & (frame["batch_size"] == 1) & (frame["strategy"] == "padding")
    off = readme.worth(frame.assign(**{rate: frame[rate].where(~one, frame[rate] * 1.1)}), "h200")
    assert off.startswith("> [!CAUTION]\n> 🔴 **The control is off") and said in off
    assert readme.worth(records.load_records(ROOT / "papermill_runs" / "h100"), "h100").endswith(
        "once, without a control."
    )


def test_the_title_of_a_figure_of_a_run_in_doubt_says_so(steady, tmp_path, monkeypatch):
    titles, draw = [], figures.bars_with_limits

    def kept(table, title, **size):
        titles.append(title)
        return draw(table, title, **size)

    monkeypatch.setattr(figures, "bars_with_limits", kept)
    for frame in (records.load_records(ROOT / "papermill_runs" / "h200_models"), steady):
        readme._draw(frame, tmp_path / "figures" / "readme.png", "numbers")
    assert titles == [f"{titles[1]} (control off)", titles[1]] and "full rows 2.03 ×" in titles[1]


def test_a_climb_in_doubt_stands_below_what_is_off(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "project_root", lambda: tmp_path)
    folder, frame = records.run_folder("made"), records.load_records(ROOT / "papermill_runs" / "h100")
    found = ["data, mini-batches: it runs."]
    for doubts in (["made: Repeats are off."], []):
        summary = {"doubts": doubts, "findings": found, "figures": {"08_mini_batches": "bars"}}
        records.write_json(folder / "summaries" / "08_climb_to_the_limit.json", summary, overwrite=True)
        lines = readme.climb(frame, "made").splitlines()
        assert lines[-1] == "- it runs." and lines[-5].startswith("![bars]")
        assert lines[:-5] == (["> [!CAUTION]", "> 🔴 **made: Repeats are off.**", ""] if doubts else [])


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

    for arm in arms:  # on another rig every loss is 7 higher, and each arm is held against its own padding
        if arm.variant == "":
            other = replace(arm.spec, rig=Rig(fused_loss=True))
            metrics = {"optimizer_steps": 8, "eval_loss_per_token": 8.0 + wobble[arm.spec.seed]}
            made_records.write(folder, other, metrics=metrics, environment={"created": "2026-01-02"})
    both = readme.losses(records.load_records(folder), "made").splitlines()
    assert both[: len(lines)] == lines
    padding, flattened = both[len(lines) :]
    assert padding == "| math (fused loss) | Padding | 8 | 8.0000 |  |"
    assert flattened.startswith("| math (fused loss) | MiniBatchPacking + PosID | 8 | 8.0000 | +0.0000 nats")

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
