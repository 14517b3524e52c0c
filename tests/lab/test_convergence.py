"""The arms share what they say they share; statistics and sentences follow from records; padding and MiniBatchPacking train alike."""

import math
from dataclasses import asdict, replace

import pytest
import torch

from packlib.lab import convergence, models, records, strategies, worker
from packlib.lab.convergence import EPOCHS, FIXED, MULTIPACK, POSID, STEPS
from packlib.lab.spec import RunSpec

BASE = RunSpec(corpus="arithmetic", limit=100, batch_size=4, gradient_accumulation=2, max_tokens=512, learning_rate=1e-3, generate_examples=5)


def test_arms_share_what_their_names_say():
    found = convergence.arms(BASE, rows_per_step=2, seeds=[0])
    by_name = {arm.label: arm.spec for arm in found}
    assert len(by_name) == len(found) == len({arm.spec.run_id for arm in found}) == 15
    for arm in found:
        same_steps = arm.spec.steps == 13  # ceil(100 / 8)
        assert same_steps == (arm.variant == STEPS or "atoms" in arm.variant)
        assert (arm.spec.batch_size, arm.spec.gradient_accumulation) == ((2, 1) if same_steps else (1, 1) if arm.spec.examples_per_step else (4, 2))
        assert (arm.spec.generate_examples == 5) == (arm.strategy == "padding" or (arm.variant == STEPS and arm.strategy != MULTIPACK))
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
    found = convergence.settings_arms([setting, setting | {"corpus": "pydocs", "seeds": [4]}], seeds=[0, 1], learning_rate=3e-3)
    assert [(arm.spec.corpus, arm.spec.seed) for arm in found[::2]] == [("arithmetic", 0), ("arithmetic", 1), ("pydocs", 4)]
    assert {arm.spec.learning_rate for arm in found} == {3e-3}
    with pytest.raises(ValueError, match="unknown field of a setting 'lenght'"):
        convergence.settings_arms([setting | {"lenght": 3}], seeds=[0])
    with pytest.raises(ValueError, match="setting 'arithmetic' has no limit"):
        convergence.settings_arms([{"corpus": "arithmetic", "rows_per_step": 1}], seeds=[0])


def write(folder, arm, loss, status="ok"):
    """A record with that validation loss, without training."""
    curve = [4.0, 3.0, loss]
    evaluations = [{"step": 2, "eval_loss_per_token": 3.0}]
    trace = {"step": [1, 2, 3], "tokens": [100, 200, 300], "seconds": [1.0, 2.0, 3.0], "loss": curve, "evaluations": evaluations}
    metrics = {"optimizer_steps": 3, "eval_loss_per_token": loss, "eval_loss_per_example": loss + 0.1}
    ok = status == "ok"
    record = {"run_id": arm.spec.run_id, "status": status, "error": None, "spec": asdict(arm.spec), "environment": {"created": "now"}, "plan": None}
    records.write_record(folder, record | {"metrics": metrics if ok else None, "trace": trace if ok else None})


LOSSES = {("padding", ""): 1.0, ("minibatch_packing", ""): 1.0, (FIXED, STEPS): 1.5, (POSID, STEPS): 1.1, (FIXED, EPOCHS): 2.5, (POSID, EPOCHS): 2.0,
          (MULTIPACK, STEPS): 1.0, (MULTIPACK, EPOCHS): 2.0, (MULTIPACK, convergence.EXAMPLES): 1.0}  # fmt: skip


@pytest.fixture
def measured(tmp_path):
    """Records of every arm but the atoms: a common effect of the seed, and noise of 0.01 of the arm."""
    groups = [group for group in convergence.GROUPS if group != "atoms"]
    planned = convergence.arms(BASE, rows_per_step=2, groups=convergence.GROUPS, seeds=[0, 1, 2])
    kept = {arm.spec.run_id for arm in convergence.arms(BASE, rows_per_step=2, groups=groups, seeds=[0, 1, 2])}
    for i, arm in enumerate(planned):
        if arm.spec.run_id in kept:
            loss = LOSSES.get((arm.strategy, arm.variant), 1.4 if "√" in arm.variant else 3.0)
            write(tmp_path, arm, loss + arm.spec.seed + 0.01 * math.sin(7 * i))
    return tmp_path, planned


def test_missing_arms_are_listed_and_never_invented(measured):
    folder, planned = measured
    found = convergence.results(folder, planned)
    assert (found["status"] == "missing").sum() == 12 and found.loc[found["status"] == "missing", "per_token"].isna().all()
    assert not any("atoms" in label for label in convergence.differences(found)["label"])
    nothing = convergence.results(folder / "empty", planned)
    assert len(convergence.causes(nothing)) == len(convergence.differences(nothing)) == len(convergence.traces(folder / "empty", planned)) == 0
    assert set(convergence.table_4(nothing)["source"]) == {"paper"}


def test_causes_are_paired_by_seed(measured):
    """Seeds differ by a whole nat, which the pairing takes out."""
    found = convergence.results(*measured)
    table = convergence.causes(found).set_index("label")
    contamination = table.loc["Contamination, at equal steps and tokens"]
    assert contamination["difference"] == pytest.approx(0.4, abs=0.02) and contamination["low"] > 0.3 and contamination["n"] == 3
    assert "a cost, +0.3" in contamination["advice"] and contamination["advice"].endswith("always pass boundaries.")
    assert table.loc["Fewer steps, fixed length", "difference"] == pytest.approx(0.9, abs=0.02)
    assert "no difference that shows" in table.loc["Flattening the same mini-batches", "advice"]
    assert abs(table.loc["Packing whole examples, constant examples", "standard_errors"]) < 4
    assert "lr × √4” is the best learning rate tried: it wins back 6" in convergence.best_rate(found)


def test_one_seed_has_no_interval(measured):
    found = convergence.results(*measured)
    rows = convergence.causes(found[found["seed"] == 0])
    assert rows["low"].isna().all() and rows["advice"].str.endswith("(one seed, no interval); measure more seeds.").all()
    assert not rows["advice"].str.contains("a cost|a gain").any()


def test_table_4_is_relative_to_each_sources_padding(measured):
    table = convergence.table_4(convergence.results(*measured)).set_index(["label", "source"])
    label = f"FixedLengthPacking + PosID, {STEPS}"
    assert table.loc[(label, "paper"), "difference"] == pytest.approx(1.170 - 1.117)
    assert table.loc[(label, "ours"), "difference"] == pytest.approx(0.1, abs=0.02)
    assert table.loc[("Padding", "ours"), "difference"] == 0 and len(table) == 10


def test_validation_traces_hold_the_last_evaluation(measured):
    curve = convergence.traces(*measured, validation=True)
    first = curve[curve["run_id"] == curve["run_id"].iloc[0]]
    assert first["step"].tolist() == [2, 3] and first["loss"].iloc[0] == 3.0 and first["loss"].iloc[1] == pytest.approx(1.0, abs=0.02)


def trained(strategy: str, boundary: str | None = None) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of 50 float32 steps on the CPU through the harness's trainer, and the weights afterwards."""
    spec = RunSpec(model="tiny-llama", corpus="arithmetic", tokenizer="bpe:512", loss="response", strategy=strategy, limit=200, batch_size=4,
                   max_tokens=512, layers=1, learning_rate=2e-3, kernel="sdpa")  # fmt: skip
    how = strategies.get_strategy(strategy)
    corpus, lost = worker._corpus(spec, "train")
    dataset, _ = worker.planned(spec, how, corpus, lost)
    _, attention = worker.route(spec, how, torch.device("cpu"))
    collator = how.collator(corpus.pad_token_id)
    if boundary:
        collator = replace(collator, boundary=boundary)
    model = models.build_model("tiny-llama", attn_implementation=attention, seed=0, layers=1, vocab_size=corpus.vocab_size)
    trainer = worker.LabTrainer(model, worker.trainer_config(spec, how, torch.device("cpu"), "unused"), train_dataset=dataset,
                                processing_class=worker.placeholder_tokenizer(corpus), data_collator=collator)  # fmt: skip
    trainer.remove_callback(worker.PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], dict(model.named_parameters())


@pytest.mark.slow
def test_padding_and_minibatch_packing_train_the_same_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    padded, padded_weights = trained("padding")
    packed, packed_weights = trained("minibatch_packing")
    assert len(padded) == len(packed) == 50
    assert max(abs(a - b) for a, b in zip(padded, packed)) < 1e-4
    for name, weight in padded_weights.items():
        assert float((weight - packed_weights[name]).norm() / weight.norm()) < 1e-3, name
    leaky, _ = trained("minibatch_packing", boundary="row")  # the negative control
    assert max(abs(a - b) for a, b in zip(padded, leaky)) > 1e-2
