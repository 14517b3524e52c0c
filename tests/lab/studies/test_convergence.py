"""Arms share what they say they share; statistics and sentences follow from records; flattened batches train alike."""

import math
from dataclasses import replace

import pytest

from packlib.lab import records
from packlib.lab.pages import reproduce
from packlib.lab.runs import experiment, worker
from packlib.lab.runs.spec import RunSpec
from packlib.lab.strategies import STRATEGIES
from packlib.lab.studies import convergence
from packlib.lab.studies.convergence import EPOCHS, FIXED, MULTIPACK, POSID, STEPS
from tests.lab.studies import made_records

BASE = RunSpec(
    corpus="arithmetic",
    limit=100,
    batch_size=4,
    gradient_accumulation=2,
    max_tokens=512,
    learning_rate=1e-3,
    generate_examples=5,
    eval_examples=8,
)


def test_arms_share_what_their_names_say():
    found = convergence.arms(BASE, rows_per_step=2, seeds=[0])
    by_name = {arm.label: arm.spec for arm in found}
    assert len(by_name) == len(found) == len({arm.spec.spec_id for arm in found}) == 16
    for arm in found:
        same_steps = arm.spec.steps == 13  # ceil(100 / 8)
        assert same_steps == (arm.variant == STEPS or "atoms" in arm.variant)
        assert (arm.spec.batch_size, arm.spec.gradient_accumulation) == (
            (2, 1) if same_steps else (1, 1) if arm.spec.examples_per_step else (4, 2)
        )
        assert (arm.spec.generate_examples == 5) == (
            arm.strategy == "padding" or (arm.variant == STEPS and arm.strategy != MULTIPACK)
        )
    few = by_name[f"Multipack + PosID, {EPOCHS}"].learning_rate
    assert by_name[f"Multipack + PosID, {EPOCHS}, lr × √4"].learning_rate == few * 2
    assert by_name[f"Multipack + PosID, {EPOCHS}, lr × 4"].learning_rate == few * 4
    assert [arm.spec.atom_size for arm in found if "atoms" in arm.variant] == [128, 256, 512, 1024]


def test_a_seed_is_complete_before_the_next_begins():
    found = convergence.arms(BASE, rows_per_step=2, groups=["padding", "multipack"], seeds=[3, 5])
    assert [arm.spec.seed for arm in found] == [3] * 4 + [5] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": ["atom"]}, "unknown group of arms 'atom'.*did you mean 'atoms'"),
        ({"rows_per_step": 8}, "rows_per_step = 8; expected 1 to 7"),
        ({"base": RunSpec()}, "limit = None; expected the number of training examples"),
    ],
)
def test_bad_arms_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        convergence.arms(**({"base": BASE, "rows_per_step": 2} | changes))


def test_settings_name_their_fields():
    setting = {"corpus": "arithmetic", "limit": 80, "batch_size": 8, "rows_per_step": 1, "groups": ["padding"]}
    setting |= {"eval_examples": 8}
    found = convergence.settings_arms(
        [setting, setting | {"corpus": "pydocs", "seeds": [4]}], seeds=[0, 1], learning_rate=3e-3
    )
    assert [(arm.spec.corpus, arm.spec.seed) for arm in found[::2]] == [
        ("arithmetic", 0),
        ("arithmetic", 1),
        ("pydocs", 4),
    ]
    assert {arm.spec.learning_rate for arm in found} == {3e-3}
    with pytest.raises(ValueError, match="unknown field of a setting 'lenght'"):
        convergence.settings_arms([setting | {"lenght": 3}], seeds=[0])
    with pytest.raises(ValueError, match="setting 'arithmetic' has no limit"):
        convergence.settings_arms([{"corpus": "arithmetic", "rows_per_step": 1}], seeds=[0])


def write(folder, arm, loss, *, status="ok", concurrent=1):
    """A record with that validation loss, without training."""
    trace = {
        "step": [1, 2, 3],
        "tokens": [100, 200, 300],
        "seconds": [1.0, 2.0, 3.0],
        "loss": [4.0, 3.0, loss],
        "grad_norm": [3.0, 2.0, 1.0],
        "evaluations": [{"step": 2, "eval_loss_per_token": 3.0}],
    }
    metrics = {"optimizer_steps": 3, "eval_loss_per_token": loss, "eval_loss_per_example": loss + 0.1}
    if arm.spec.generate_examples:
        metrics["exact_match"] = 0.25
    environment = {"concurrent_runs": concurrent}
    made_records.write(folder, arm.spec, status=status, metrics=metrics, trace=trace, environment=environment)


LOSSES = {
    ("padding", ""): 1.0,
    ("minibatch_packing", ""): 1.0,
    (FIXED, STEPS): 1.5,
    (POSID, STEPS): 1.1,
    (FIXED, EPOCHS): 2.5,
    (POSID, EPOCHS): 2.0,
    (MULTIPACK, STEPS): 1.0,
    (MULTIPACK, EPOCHS): 2.0,
    (MULTIPACK, convergence.EXAMPLES): 1.0,
    (MULTIPACK, convergence.EXACT): 1.0,
}


@pytest.fixture
def measured(tmp_path):
    """Records of every arm but the atoms: a common effect of the seed, and noise of 0.01 of the arm."""
    groups = [group for group in convergence.GROUPS if group != "atoms"]
    planned = convergence.arms(BASE, rows_per_step=2, groups=convergence.GROUPS, seeds=[0, 1, 2])
    kept = {arm.spec.spec_id for arm in convergence.arms(BASE, rows_per_step=2, groups=groups, seeds=[0, 1, 2])}
    for i, arm in enumerate(planned):
        if arm.spec.spec_id in kept:
            loss = LOSSES.get((arm.strategy, arm.variant), 1.4 if "√" in arm.variant else 3.0)
            write(tmp_path, arm, loss + arm.spec.seed + 0.01 * math.sin(7 * i))
    return tmp_path, planned


def test_missing_arms_are_listed_and_never_invented(measured):
    folder, planned = measured
    found = convergence.results(folder, planned)
    assert (found["status"] == "missing").sum() == 12 and found.loc[
        found["status"] == "missing", "per_token"
    ].isna().all()
    assert not any("atoms" in label for label in convergence.differences(found)["label"])
    nothing = convergence.results(folder / "empty", planned)
    assert (
        len(convergence.causes(nothing))
        == len(convergence.differences(nothing))
        == len(convergence.traces(folder / "empty", planned))
        == 0
    )
    assert set(convergence.table_4(nothing)["source"]) == {"paper"}


def test_causes_are_paired_by_seed(measured):
    """Seeds differ by a whole nat, which the pairing takes out."""
    found = convergence.results(*measured)
    table = convergence.causes(found).set_index("label")
    contamination = table.loc["Contamination, at equal steps and tokens"]
    assert (
        contamination["difference"] == pytest.approx(0.4, abs=0.02)
        and contamination["low"] > 0.3
        and contamination["n"] == 3
    )
    assert "a cost, +0.3" in contamination["advice"] and contamination["advice"].endswith("will be asked alone.")
    assert table.loc["Fewer steps, fixed length", "difference"] == pytest.approx(0.9, abs=0.02)
    assert "undecided" in table.loc["Flattening the same mini-batches", "advice"]
    assert abs(table.loc["Packing whole examples, constant examples", "standard_errors"]) < 4
    assert "lr × √4” has the lowest loss of the learning rates tried, -" in convergence.best_rate(found)
    assert ": it wins back 6" in convergence.best_rate(found)
    assert "(not told apart" not in convergence.best_rate(found)
    rate = found["variant"].str.endswith("lr × 4") & (found["strategy"] == convergence.MULTIPACK)
    best = found[found["variant"].str.endswith("lr × √4")].set_index("seed")["per_token"]
    near = found.assign(per_token=found["per_token"].where(~rate, found["seed"].map(best) + 1e-3))
    near.loc[rate & (near["seed"] == 0), "per_token"] += 5e-3
    assert "(not told apart from it: equal epochs, lr × 4)" in convergence.best_rate(near)
    for_examples = found.assign(per_example=found["per_token"] + 0.3 * found["arm"].eq("MiniBatchPacking + PosID"))
    advice = convergence.causes(for_examples).set_index("label")["advice"]
    assert "Per example it is a cost, +0.3" in advice["Flattening the same mini-batches"]
    assert "Per example" not in advice["Contamination, at equal steps and tokens"], "it says the same"
    one_seed = found[found["seed"] == 0]
    assert convergence.best_rate(one_seed).endswith(": undecided."), "a seed has no interval"
    worse = found["variant"].str.startswith(f"{convergence.EPOCHS}, ") & (found["strategy"] == convergence.MULTIPACK)
    level = found.assign(per_token=found["per_token"] + 5 * worse)
    assert convergence.best_rate(level).endswith("no learning rate tried is better than the one for many.")


@pytest.mark.parametrize(
    ("low", "difference", "high", "verdict"),
    [
        (0.002, 0.004, 0.006, "a cost"),
        (-0.006, -0.004, -0.002, "a gain"),
        (-0.007, 0.0001, 0.007, "the same within 0.01 nats"),
        (0.0001, 0.0005, 0.0009, "the same within 0.01 nats"),
        (-0.0031, 0.0066, 0.0164, "undecided"),
        (-0.0164, -0.0066, 0.0031, "undecided"),
    ],
)
def test_a_wide_interval_decides_nothing(low, difference, high, verdict):
    row = {"low": low, "difference": difference, "high": high, "standard_errors": 1.0, "n": 3}
    assert convergence._advice(convergence.CAUSES[0], row).startswith(f"{verdict}, ")


def test_table_4_is_compared_change_by_change(measured):
    table = convergence.table_4(convergence.results(*measured))
    said = convergence.order(table)
    assert [sentence.split(":")[0] for sentence in said] == [
        "position ids, equal epochs",
        "position ids, equal steps",
        "more steps, FixedLengthPacking (contaminated)",
        "more steps, FixedLengthPacking + PosID",
    ]
    assert all(sentence.endswith("the same sign.") for sentence in said)
    ours = table["source"] == "ours"
    assert "the other sign" in convergence.order(table.assign(loss=table["loss"].where(~ours, -table["loss"])))[0]
    assert convergence.order(table[~ours]) == []


def test_one_seed_has_no_interval(measured):
    found = convergence.results(*measured)
    rows = convergence.causes(found[found["seed"] == 0])
    assert (
        rows["low"].isna().all() and rows["advice"].str.endswith("(one seed, no interval); measure more seeds.").all()
    )
    assert not rows["advice"].str.contains("a cost|a gain").any()


def test_table_4_is_relative_to_each_sources_padding(measured):
    table = convergence.table_4(convergence.results(*measured)).set_index(["label", "source"])
    label = f"FixedLengthPacking + PosID, {STEPS}"
    assert table.loc[(label, "paper"), "difference"] == pytest.approx(1.170 - 1.117)
    assert table.loc[(label, "ours"), "difference"] == pytest.approx(0.1, abs=0.02)
    assert table.loc[("Padding", "ours"), "difference"] == 0 and len(table) == 10


def test_validation_traces_hold_the_last_evaluation(measured):
    curve = convergence.traces(*measured, validation=True)
    first = curve[curve["spec_id"] == curve["spec_id"].iloc[0]]
    assert (
        first["step"].tolist() == [2, 3]
        and first["loss"].iloc[0] == 3.0
        and first["loss"].iloc[1] == pytest.approx(1.0, abs=0.02)
    )


def test_an_arm_is_recognised_by_its_spec(measured):
    """Whatever the records are called, and none that only looks like one."""
    folder, planned = measured
    found = records.read_records(folder)
    known = convergence.recognised(found)
    by_spec = {arm.spec.spec_id: (arm.strategy, arm.variant, arm.spec.seed) for arm in planned}
    assert len(known) == len(found) == 36
    for run_id, arm in known.items():
        assert (arm.strategy, arm.variant, arm.spec.seed) == by_spec[run_id.split("-")[0]]
    assert {arm.variant for arm in known.values()} == {arm.variant for arm in planned if "atoms" not in arm.variant}
    strange = [
        {"run_id": "x", "spec": {"arm": "varlen"}},
        {"run_id": "y", "spec": {"strategy": "gone", "eval_every": 1}},
    ]
    timed = [{"run_id": "z", "spec": {"strategy": "padding"}}]
    alone = [record for record in found if record["spec"]["strategy"] != "padding"]
    assert convergence.recognised([*strange, *timed, *alone]) == {}, "without its padding an arm shares nothing"


def test_steps_about_constant_are_no_record_of_steps_exactly_constant(tmp_path):
    """h200's records of constant examples are of rows that stay whole; the exact arm does not find them."""
    about, exact = (
        convergence.arms(BASE, rows_per_step=2, groups=[group], seeds=[0])[0]
        for group in (convergence.EXAMPLES, convergence.EXACT)
    )
    assert replace(exact.spec, split_rows=False) == about.spec and exact.spec.spec_id != about.spec.spec_id
    write(tmp_path, about, 1.0)
    found = convergence.results(tmp_path, [about, exact])
    assert found["status"].tolist() == ["ok", "missing"]
    assert convergence.extent(found) == "1 of 2 runs have a result."
    assert convergence.extent(found[:0]).startswith("This run does not ask it. What is expected")
    assert list(convergence.by_corpus(found)) == ["arithmetic"] and convergence.by_corpus(found[1:]) == {}


def test_a_run_too_short_for_some_arms_is_recognised(tmp_path):
    short = replace(BASE, limit=16)  # two steps of padding, fewer than the warm-up that equal steps would need
    (arm, _) = convergence.arms(short, rows_per_step=2, groups=["padding"], seeds=[0])
    write(tmp_path, arm, 1.0)
    write(
        tmp_path, convergence.Arm("dynapipe", "", replace(short, strategy="dynapipe", batch_size=2, eval_every=1)), 1.0
    )
    known = convergence.recognised(records.read_records(tmp_path))
    assert [found.label for found in known.values()] == ["Padding"]


def test_times_of_runs_that_shared_the_device_do_not_count(tmp_path):
    first, second = convergence.arms(BASE, rows_per_step=2, groups=["padding"], seeds=[0])
    write(tmp_path, first, 1.0)
    write(tmp_path, second, 1.0, concurrent=2)
    found = convergence.results(tmp_path, [first, second])
    assert found["seconds"].iloc[0] == 3.0 and math.isnan(found["seconds"].iloc[1])
    steps = convergence.traces(tmp_path, [first, second])
    assert steps.groupby("strategy")["seconds"].count().to_dict() == {"padding": 3, "minibatch_packing": 0}
    overview = convergence.overview(found)
    assert overview["measured"].tolist() == ["1 of 1"] * 2 and overview["batch"].tolist() == ["4 × 512 × 2"] * 2


def test_parity_is_the_largest_difference_of_a_step(tmp_path):
    planned = convergence.arms(BASE, rows_per_step=2, groups=["padding"], seeds=[0, 1])
    for arm, loss in zip(planned, (1.0, 1.001, 1.0, 1.25)):
        write(tmp_path, arm, loss)
    steps = convergence.traces(tmp_path, planned)
    assert convergence.parity(steps) == {"arithmetic": 0.25}
    assert convergence.parity(steps[steps["strategy"] == "padding"]) == {}


def test_tables_are_read_as_the_paper_writes_them(measured):
    found = convergence.results(*measured)
    shown = convergence.sides(convergence.table_4(found))
    label = f"FixedLengthPacking + PosID, {EPOCHS}"
    assert list(dict.fromkeys(who for who, _ in shown)) == ["paper", "ours"]
    assert shown.loc[label, ("paper", "batch")] == "2 × 4,096 × 32" and shown.loc[label, ("paper", "steps")] == "35"
    assert shown.loc["Padding", ("paper", "difference")] == "0.000" and shown.loc[label, ("ours", "steps")] == "3"
    both = convergence.every_arm(found)
    alike = both[both["label"] == "MiniBatchPacking + PosID"]
    assert alike["average"].tolist() == ["per token", "per example"]
    exact = convergence.exact_matches(found)
    assert exact["mean"].tolist() == [0.25] * 3 and len(convergence.exact_matches(found.assign(exact_match=None))) == 0


def test_figures_and_findings_of_all_arms(tmp_path):
    planned = convergence.arms(BASE, rows_per_step=2, seeds=[0, 1])
    for i, arm in enumerate(planned):
        write(tmp_path, arm, LOSSES.get((arm.strategy, arm.variant), 1.5) + 0.01 * math.sin(7 * i))
    found, steps = convergence.results(tmp_path, planned), convergence.traces(tmp_path, planned)
    validation = convergence.traces(tmp_path, planned, validation=True)
    figures = {
        "curves": convergence.validation_curves(validation, "arithmetic"),
        "gradients": convergence.gradient_curves(steps, "arithmetic"),
        "atoms": convergence.atom_curves(validation, "arithmetic"),
        "table 4": convergence.table_4_bars(convergence.table_4(found), "arithmetic"),
        "causes": convergence.cause_forest(convergence.causes(found), "arithmetic"),
        "forest": convergence.arm_forest(convergence.every_arm(found), "arithmetic"),
    }
    for figure in figures.values():
        figure.canvas.draw()
        assert "arithmetic" in figure.alt and figure.alt != figure.get_suptitle()
    lines = {name: {line.get_label() for line in figures[name].axes[0].lines} for name in ("curves", "atoms")}
    assert lines["atoms"] == {f"atoms of {size}" for size in convergence.ATOMS}
    assert len(lines["curves"]) == 10 and not any("lr" in label or "atoms" in label for label in lines["curves"])

    said = convergence.findings(found, convergence.parity(steps))
    assert len([line for line in said if line.startswith("arithmetic: ")]) == len(convergence.CAUSES) + 2
    assert said[-1].startswith("Atoms, arithmetic: atoms of ") and said[-1].count("nats (95 % interval") == 3
    lost = convergence.findings(convergence.results(tmp_path / "empty", planned), {})
    assert lost == ["32 of 32 planned runs have no result in this folder."]


def test_the_published_run_is_of_its_preset(monkeypatch):
    """Every arm that the preset asks for has a record and is recognised, without the data."""
    monkeypatch.delenv("PACKLIB_DATA", raising=False)
    asked = reproduce.load_preset("h200")["notebooks"]["07_compare_convergence"]
    names = ("model", "tokenizer", "dtype", "learning_rate", "eval_examples", "seeds")
    settings = [*asked["settings"], *asked["further"]["constant_examples"]]
    planned = convergence.settings_arms(settings, **{name: asked[name] for name in names})
    folder = records.run_folder("h200", create=False)
    known = {arm.spec.spec_id: arm for arm in convergence.recognised(records.read_records(folder)).values()}
    assert len(planned) == len(known) == 81
    for arm in planned:
        assert experiment.find(arm.spec, folder)["status"] == "ok", arm.label
        assert known[arm.spec.spec_id].variant == arm.variant


@pytest.mark.slow
def test_padding_and_minibatch_packing_train_the_same_model(monkeypatch):
    """50 float32 steps on the CPU through the harness: losses step by step, and what was learned."""
    spec = RunSpec(
        corpus="arithmetic",
        tokenizer="bpe:512",
        loss="response",
        limit=200,
        batch_size=4,
        max_tokens=512,
        layers=1,
        learning_rate=2e-3,
        kernel="sdpa",
        eval_examples=16,
    )
    padded, packed = (worker.measure(replace(spec, strategy=name), print) for name in convergence.PAIR)
    leaky_row = replace(STRATEGIES["minibatch_packing"], boundary="row")
    monkeypatch.setitem(STRATEGIES, "minibatch_packing", leaky_row)
    leaky = worker.measure(replace(spec, strategy="minibatch_packing"), print)  # the negative control
    assert len(padded["trace"]["loss"]) == 50
    for found, alike in ((packed, True), (leaky, False)):
        gaps = [abs(a - b) for a, b in zip(padded["trace"]["loss"], found["trace"]["loss"], strict=True)]
        learned = abs(padded["metrics"]["eval_loss_per_token"] - found["metrics"]["eval_loss_per_token"])
        assert (max(gaps) < 1e-4 and learned < 1e-4) if alike else (max(gaps) > 1e-2 and learned > 1e-3)
