import json
import logging

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from packlib import plans
from packlib.collators import FlatteningCollator
from packlib.plans import Plan, Segment, best_fit_decreasing, fixed_length, next_fit, shuffled_batches

LENGTHS = np.random.default_rng(0).integers(1, 60, 300)


def examples(lengths, **columns):
    """Token t of example i is 1000 · i + t, so that a misplaced token shows."""
    ids = [[1000 * i + t for t in range(n)] for i, n in enumerate(lengths)]
    return Dataset.from_dict({"input_ids": ids, **columns})


def test_rows_are_lists_of_segments():
    plan = fixed_length([3, 4], max_tokens=5)
    assert list(plan) == [[Segment(0, 0, 3), Segment(1, 0, 2)], [Segment(1, 2, 4)]]
    assert plan[-1] == [Segment(1, 2, 4)]
    assert plan.row_examples.tolist() == [2, 1]
    assert plan.row_costs().tolist() == [13, 4]
    with pytest.raises(IndexError, match="row 2 of a plan with 2 rows"):
        plan[2]


def test_arrays_are_compact_and_read_only():
    plan = best_fit_decreasing(LENGTHS, 100, overflow="error")
    assert [a.dtype for a in (plan.row_splits, plan.example, plan.start, plan.stop)] == [np.int64, np.int32, np.int32, np.int32]
    with pytest.raises(ValueError, match="read-only"):
        plan.example[0] = 1


def test_a_plan_without_its_segments_is_refused():
    plan = fixed_length([3, 4], max_tokens=5)
    for splits in ([0, 2], [1, 3], [0, 2, 2, 3]):
        with pytest.raises(ValueError, match="row_splits must rise from 0"):
            Plan(np.array(splits), plan.example, plan.start, plan.stop, 5, "by hand", plan.lengths_sha256)


def test_report_counts_apart_slots_real_and_loss_tokens():
    lengths = [4, 8, 5, 11]
    plan = shuffled_batches(lengths, 2, seed=0)
    rows = [[lengths[s.example] for s in row] for row in plan]
    report = plan.report(lengths, layout="padded")
    assert (report.examples, report.rows, report.real_tokens, report.loss_tokens, report.lost_tokens) == (4, 2, 28, 24, 0)
    assert report.slots == sum(len(row) * max(row) for row in rows)
    assert report.fill * report.waste == pytest.approx(1)
    assert report.capacity_fill is None
    assert plan.report(lengths).slots == 28
    assert report.examples_per_row == {"p5": 2.0, "p50": 2.0, "p95": 2.0}
    costs = [sum(n * n for n in row) for row in rows]
    assert report.attention_cost == sum(costs)
    assert report.attention_spread == pytest.approx(max(costs) * 2 / sum(costs))
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


@settings(max_examples=200, deadline=None)
@given(data=st.data(), size=st.integers(1, 50), atom=st.none() | st.integers(1, 20))
def test_loss_tokens_are_exact_where_examples_are_cut(data, size, atom):
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=15))
    loss = [data.draw(st.integers(0, n - 1)) for n in lengths]
    labels = [[-100] * (n - k) + [1] * k for n, k in zip(lengths, loss)]
    plan = fixed_length(lengths, size, atom_size=atom)
    packed = plan.apply(examples(lengths, labels=labels))
    assert plan.report(lengths, loss_tokens=loss).loss_tokens == sum(label != -100 for row in packed["labels"] for label in row)


def test_report_refuses_what_was_not_planned():
    plan = next_fit([3, 4], 5, overflow="error")
    with pytest.raises(ValueError, match=r"lengths of 2 examples have hash .*; expected those that were planned"):
        plan.report([4, 3])
    with pytest.raises(ValueError, match="layout = 'ragged'"):
        plan.report([3, 4], layout="ragged")
    with pytest.raises(ValueError, match=r"loss_tokens\[1\] = 4; expected 0 to 3"):
        plan.report([3, 4], loss_tokens=[1, 4])
    with pytest.raises(ValueError, match=r"loss_tokens has shape \[1\]; expected \[2\]"):
        plan.report([3, 4], loss_tokens=[1])


def test_shuffle_keeps_the_rows():
    plan = best_fit_decreasing(LENGTHS, 97, overflow="error")
    shuffled = plan.shuffle(5)
    assert sorted(map(tuple, shuffled)) == sorted(map(tuple, plan))
    assert list(shuffled) != list(plan)
    assert shuffled.sha256 == plan.shuffle(5).sha256 != plan.shuffle(6).sha256


def test_what_is_not_taken_is_lost():
    plan = best_fit_decreasing(LENGTHS, 97, overflow="error")
    part = plan.take(range(10))
    assert list(part) == [plan[i] for i in range(10)]
    assert part.report(LENGTHS).lost_tokens == LENGTHS.sum() - plan.row_lengths[:10].sum()


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), world=st.integers(1, 9),
    cost=st.sampled_from(["quadratic", "linear"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_balance_loses_nothing_and_gives_every_rank_as_many_rows(lengths, world, cost, seed):
    plan = best_fit_decreasing(lengths, 40, overflow="error")
    if len(plan) < world or len(lengths) < -(-len(plan) // world) * world:
        with pytest.raises(ValueError, match="world_size"):
            plan.balance(world, cost, seed)
        return
    balanced = plan.balance(world, cost, seed)
    assert len(balanced) % world == 0
    assert len(plan) <= len(balanced) < len(plan) + world
    assert sorted(balanced.example) == list(range(len(lengths)))
    assert balanced.report(lengths).lost_tokens == 0
    assert balanced.row_lengths.max() <= 40


def spread(plan, world):
    """Σ over steps of the slowest rank's Σ n², over the mean rank's."""
    costs = plan.row_costs()[: len(plan) // world * world].reshape(-1, world)
    return costs.max(axis=1).sum() / costs.mean(axis=1).sum()


def test_balanced_ranks_wait_for_each_other_less_than_five_percent():
    lengths = np.random.default_rng(0).lognormal(np.log(500) - 0.72, 1.2, 20_000).clip(1, 4096).astype(int)
    plan = best_fit_decreasing(lengths, 4096, overflow="error")
    assert spread(plan, 8) > 1.3
    balanced = plan.balance(8)
    assert spread(balanced, 8) < 1.05
    per_rank = balanced.row_costs().reshape(-1, 8).sum(axis=0)
    assert per_rank.max() < 1.05 * per_rank.mean()


def test_balance_refuses_more_ranks_than_rows():
    plan = next_fit([4, 4, 4], 4, overflow="error")
    with pytest.raises(ValueError, match="world_size = 4; expected 1 to 3, the rows of the plan"):
        plan.balance(4)
    with pytest.raises(ValueError, match="3 rows do not divide by world_size = 2; none has two examples to part"):
        plan.balance(2)
    with pytest.raises(ValueError, match="cost = 'cubic'"):
        plan.balance(3, cost="cubic")


def test_constant_examples_fills_steps_exactly():
    lengths = np.random.default_rng(0).lognormal(np.log(500) - 0.72, 1.2, 5_000).clip(1, 4096).astype(int)
    plan = best_fit_decreasing(lengths, 4096, overflow="error", max_examples=32)
    grouped, steps = plans.constant_examples(plan, 32, seed=1)
    per_step = np.add.reduceat(grouped.row_examples, steps[:-1])
    assert sorted(grouped.example) == list(range(len(lengths)))
    assert (per_step == 32).mean() > 0.98
    assert per_step.max() == 32
    rows = len(plan) // len(per_step)
    same_rows = np.add.reduceat(plan.row_examples, np.arange(0, len(plan), rows))
    assert (same_rows == 32).mean() < 0.1
    assert plans.constant_examples(plan, 32, seed=2)[0].sha256 != grouped.sha256
    for bad in (0, len(lengths) + 1):
        with pytest.raises(ValueError, match=f"examples = {bad}; expected"):
            plans.constant_examples(plan, bad)


def test_a_row_above_the_step_is_a_step():
    plan, steps = plans.constant_examples(next_fit([1] * 6 + [6] * 3, 6, overflow="error", order="sorted"), 2)
    assert sorted(np.add.reduceat(plan.row_examples, steps[:-1]).tolist()) == [1, 2, 6]


def test_save_and_load_round_trip(tmp_path):
    plan = next_fit(LENGTHS, 75, overflow="error", seed=3)
    path = plan.save(tmp_path / "plan.npz")
    again = Plan.load(path, lengths=LENGTHS, max_tokens=75)
    assert again.sha256 == plan.sha256
    assert list(again) == list(plan)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.npz"]
    with pytest.raises(ValueError, match="max_tokens = 75; expected 80"):
        Plan.load(path, max_tokens=80)
    with pytest.raises(ValueError, match="expected those that were planned"):
        Plan.load(path, lengths=LENGTHS[::-1])
    with np.load(path) as file:
        arrays = dict(file)
    arrays["stop"][0] -= 1
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="was changed"):
        Plan.load(path)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), capacity=st.integers(1, 70), seed=st.integers(0, 99))
def test_apply_moves_every_token_of_sliced_and_shuffled_data(data, capacity, seed):
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=20))
    labels = [[-100 if t % 3 else t for t in range(n)] for n in lengths]
    full = examples(lengths, labels=labels, task=[f"task {i}" for i in range(len(lengths))], weight=[[i] * n for i, n in enumerate(lengths)])
    first = data.draw(st.integers(0, len(lengths) - 1))
    dataset = full.shuffle(seed=seed).select(range(first, len(lengths)))
    if data.draw(st.booleans()):
        dataset = dataset.select(range(len(dataset))[::-1])
    sizes = [len(ids) for ids in dataset["input_ids"]]
    plan = best_fit_decreasing(sizes, capacity, overflow="split", seed=seed)
    packed = plan.apply(dataset)
    assert packed.column_names == ["input_ids", "labels", "task", "weight", "seq_lengths"]
    source, rows = dataset[:], packed[:]
    for i, row in enumerate(plan):
        for column in ("input_ids", "weight"):
            assert rows[column][i] == [t for s in row for t in source[column][s.example][s.start : s.stop]]
        assert rows["labels"][i] == [t for s in row for t in [-100, *source["labels"][s.example][s.start + 1 : s.stop]]]
        assert rows["task"][i] == [source["task"][s.example] for s in row]
        assert rows["seq_lengths"][i] == [s.stop - s.start for s in row]


def test_apply_in_several_pieces(monkeypatch):
    from packlib import gather

    dataset, plan = examples(LENGTHS), best_fit_decreasing(LENGTHS, 97, overflow="error")
    whole = plan.apply(dataset)
    monkeypatch.setattr(gather, "PIECE", 500)
    pieces = plan.apply(dataset)
    assert pieces.data.num_rows == len(plan)
    assert len(pieces.data.column("input_ids").chunks) > 10
    assert pieces[:] == whole[:]


def test_apply_accepts_large_lists_and_keeps_other_dtypes():
    import pyarrow as pa

    table = pa.table({"input_ids": pa.array([[1, 2, 3], [4, 5]], pa.large_list(pa.int32())), "score": pa.array([0.5, 1.5])})
    packed = best_fit_decreasing([3, 2], 5, overflow="error").apply(Dataset(table))
    assert packed[:] == {"input_ids": [[1, 2, 3, 4, 5]], "score": [[0.5, 1.5]], "labels": [[-100, 2, 3, -100, 5]], "seq_lengths": [[3, 2]]}
    assert packed.features["input_ids"].feature.dtype == "int32"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"labels": [[1, 2, 3], [1]]}, "labels of example 1 covers 1 tokens; expected 2"),
        ({"attention_mask": [[1, 1, 1], [1, 0]]}, "attention_mask of example 1 has zeros"),
        ({"attention_mask": [[1, 1], [1, 1]]}, "attention_mask of example 0 covers 2 tokens; expected 3"),
        ({"seq_lengths": [[3], [2]]}, "packed already"),
    ],
)
def test_apply_names_the_example_that_does_not_fit(columns, message):
    with pytest.raises(ValueError, match=message):
        best_fit_decreasing([3, 2], 5, overflow="error").apply(examples([3, 2], **columns))


def test_apply_refuses_other_data():
    plan = best_fit_decreasing([3, 2], 5, overflow="error")
    with pytest.raises(ValueError, match="expected those that were planned"):
        plan.apply(examples([2, 3]))
    with pytest.raises(ValueError, match=r"dataset has columns \['text'\]"):
        plan.apply(Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(ValueError, match=r"lengths\[1\] = 0"):
        plan.apply(examples([3, 0]))
    assert plan.apply(examples([3, 2], attention_mask=[[1, 1, 1], [1, 1]])).column_names == ["input_ids", "labels", "seq_lengths"]


def test_packed_rows_go_through_our_collator():
    plan = best_fit_decreasing(LENGTHS, 97, overflow="error")
    row = plan.apply(examples(LENGTHS))[0]
    batch = FlatteningCollator()([row])
    assert batch["cu_seq_lens_q"].tolist() == [0, *np.cumsum(row["seq_lengths"])]
    assert batch["labels"][0].tolist() == row["labels"]


def test_a_packed_data_set_trains_in_plain_trl(tmp_path):
    """TRL's own collator and trainer; the first step's loss is the loss of the same examples one at a time."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    logging.disable(logging.WARNING)
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 20, 24)
    ids = [rng.integers(3, 50, n).tolist() for n in lengths]
    dataset = Dataset.from_dict({"input_ids": ids, "labels": ids})
    plan = best_fit_decreasing(lengths, 40, overflow="error")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2))
    with torch.no_grad():
        outputs = [model(input_ids=torch.tensor([ids[s.example]]), labels=torch.tensor([ids[s.example]])).loss * (s.stop - 1) for s in plan[0]]
        row = torch.tensor([[t for s in plan[0] for t in ids[s.example]]])
        labels = torch.tensor([plan.apply(dataset)[0]["labels"]])
        contaminated = float(model(input_ids=row, labels=labels).loss)
    alone = float(sum(outputs) / sum(s.stop - 1 for s in plan[0]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")), pad_token="a", eos_token="a")
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=str(tmp_path), padding_free=True, per_device_train_batch_size=1, max_steps=3, train_sampling_strategy="sequential",
            max_length=None, logging_steps=1, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no",
        ),
        train_dataset=plan.apply(dataset),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    logging.disable(logging.NOTSET)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert losses[0] == pytest.approx(alone, abs=1e-4)
    assert contaminated != pytest.approx(alone, abs=1e-4)
