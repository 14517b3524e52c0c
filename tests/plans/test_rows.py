"""`Plan.apply`: every token, label and column of a data set ends where the plan says, and plain TRL trains on it."""

from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from packlib.collators import FlatteningCollator
from packlib.plans import best_fit_decreasing, fixed_length, rows

LENGTHS = np.random.default_rng(0).integers(1, 60, 300)


def examples(lengths, **columns):
    """Token t of example i is 1000 · i + t, so that a misplaced token shows."""
    ids = [[1000 * i + t for t in range(n)] for i, n in enumerate(lengths)]
    return Dataset.from_dict({"input_ids": ids, **columns})


@settings(max_examples=100, deadline=None)
@given(data=st.data(), size=st.integers(1, 50), atom=st.none() | st.integers(1, 20))
def test_loss_tokens_are_exact_where_examples_are_cut(data, size, atom):
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=15))
    loss = [data.draw(st.integers(0, n - 1)) for n in lengths]
    labels = [[-100] * (n - k) + [1] * k for n, k in zip(lengths, loss)]
    plan = fixed_length(lengths, size, atom_size=atom)
    packed = plan.apply(examples(lengths, labels=labels))
    assert plan.report(lengths, loss_tokens=loss).loss_tokens == sum(
        label != -100 for row in packed["labels"] for label in row
    )


@settings(max_examples=80, deadline=None)
@given(data=st.data(), capacity=st.integers(1, 70), seed=st.integers(0, 99))
def test_apply_moves_every_token_of_sliced_and_shuffled_data(data, capacity, seed):
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=20))
    labels = [[-100 if t % 3 else t for t in range(n)] for n in lengths]
    full = examples(
        lengths,
        labels=labels,
        task=[f"task {i}" for i in range(len(lengths))],
        weight=[[i] * n for i, n in enumerate(lengths)],
    )
    first = data.draw(st.integers(0, len(lengths) - 1))
    dataset = full.shuffle(seed=seed).select(range(first, len(lengths)))
    if data.draw(st.booleans()):
        dataset = dataset.select(range(len(dataset))[::-1])
    sizes = [len(ids) for ids in dataset["input_ids"]]
    plan = best_fit_decreasing(sizes, capacity, overflow="split", seed=seed)
    packed = plan.apply(dataset)
    assert packed.column_names == ["input_ids", "labels", "task", "weight", "position_ids", "seq_lengths"]
    source, table = dataset[:], packed[:]
    for i, row in enumerate(plan):
        for column in ("input_ids", "weight"):
            assert table[column][i] == [t for s in row for t in source[column][s.example][s.start : s.stop]]
        assert table["labels"][i] == [
            t for s in row for t in [-100, *source["labels"][s.example][s.start + 1 : s.stop]]
        ]
        assert table["task"][i] == [source["task"][s.example] for s in row]
        assert table["seq_lengths"][i] == [s.stop - s.start for s in row]
        assert table["position_ids"][i] == [t for s in row for t in range(s.stop - s.start)]


def test_apply_in_several_pieces(monkeypatch):
    dataset, plan = examples(LENGTHS), best_fit_decreasing(LENGTHS, 97, overflow="error")
    whole = plan.apply(dataset)
    monkeypatch.setattr(rows, "PIECE", 500)
    pieces = plan.apply(dataset)
    assert pieces.data.num_rows == len(plan)
    assert len(pieces.data.column("input_ids").chunks) > 10
    assert pieces[:] == whole[:]


def test_apply_accepts_large_lists_and_keeps_other_dtypes():
    table = pa.table(
        {"input_ids": pa.array([[1, 2, 3], [4, 5]], pa.large_list(pa.int32())), "score": pa.array([0.5, 1.5])}
    )
    packed = best_fit_decreasing([3, 2], 5, overflow="error").apply(Dataset(table))
    assert packed[:] == {
        "input_ids": [[1, 2, 3, 4, 5]],
        "score": [[0.5, 1.5]],
        "labels": [[-100, 2, 3, -100, 5]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "seq_lengths": [[3, 2]],
    }
    assert packed.features["input_ids"].feature.dtype == "int32"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"labels": [[1, 2, 3], [1]]}, "labels of example 1 covers 1 tokens; expected 2"),
        ({"attention_mask": [1, 1]}, "attention_mask is a column of int8; expected lists, one value per token"),
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
    assert plan.apply(examples([3, 2], attention_mask=[[1, 1, 1], [1, 1]])).column_names == [
        "input_ids",
        "labels",
        "position_ids",
        "seq_lengths",
    ]


def test_packed_rows_go_through_our_collator():
    plan = best_fit_decreasing(LENGTHS, 97, overflow="error")
    row = plan.apply(examples(LENGTHS))[0]
    batch = FlatteningCollator()([row])
    assert batch["cu_seq_lens_q"].tolist() == [0, *np.cumsum(row["seq_lengths"])]
    assert batch["labels"][0].tolist() == row["labels"]


def tiny_llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape)).eval()


@pytest.mark.parametrize("padding_free", [True, False])
def test_trls_own_collator_keeps_boundaries_if_it_is_padding_free_and_drops_them_else(padding_free):
    """Which is why `Plan.apply` names it: nothing in a row can tell which of the two will read it."""
    tokens = [[token % 50 for token in ids] for ids in examples(LENGTHS)["input_ids"]]
    packed = best_fit_decreasing(LENGTHS, 97, overflow="error").apply(Dataset.from_dict({"input_ids": tokens}))
    row = next(row for row in packed if len(row["seq_lengths"]) > 1)
    first, batch = row["seq_lengths"][0], DataCollatorForLanguageModeling(0, padding_free=padding_free)([row])
    edited = batch | {"input_ids": batch["input_ids"].clone()}
    edited["input_ids"][0, :first] = (edited["input_ids"][0, :first] + 1) % 50
    with torch.no_grad():
        before, after = (tiny_llama()(**b | {"use_cache": False}).logits[0, first:] for b in (batch, edited))
    assert torch.equal(before, after) == padding_free, "whether the second example sees the first"
    if padding_free:
        ours = FlatteningCollator()([row])
        assert all(ours[name].tolist() == batch[name].tolist() for name in ("labels", "position_ids", "cu_seq_lens_q"))
    else:
        assert batch.keys() == {"input_ids", "labels", "attention_mask"}


@pytest.mark.parametrize(("max_length", "cut"), [(39, True), (40, False), (None, False)])
def test_rows_that_a_trainer_would_cut_are_refused(tmp_path, max_length, cut):
    """SFTTrainer cuts tokens and labels, and leaves `seq_lengths` as they were."""
    packed = best_fit_decreasing([20, 20, 7], 40, overflow="error").apply(examples([20, 20, 7]))
    config = SFTConfig(str(tmp_path), max_length=max_length, use_cpu=True, bf16=False, report_to="none")
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")), eos_token="a")
    make = partial(SFTTrainer, tiny_llama(), config, train_dataset=packed, processing_class=words)
    if cut:
        with pytest.raises(ValueError, match=r"^row 0 has 39 tokens and seq_lengths of 40: .*padding_free=True"):
            make()
    else:
        assert make().train_dataset["seq_lengths"][:] == [[20, 20], [7]]


def test_a_function_that_changes_tokens_changes_their_boundaries():
    packed = best_fit_decreasing([3, 2, 4], 5, overflow="error").apply(examples([3, 2, 4])).shuffle(seed=0)

    def first_example(row):
        n = row["seq_lengths"][0]
        return {name: row[name][:n] for name in ("input_ids", "labels", "position_ids")} | {"seq_lengths": [n]}

    def cut(row):
        return {"input_ids": row["input_ids"][: 5 if len(row["seq_lengths"]) > 1 else 3]}

    assert sorted(map(len, packed.map(first_example)["input_ids"])) == [3, 4]
    assert sorted(packed.map(lambda row: {"tokens": len(row["input_ids"])})["tokens"]) == [4, 5]
    assert len(packed.filter(lambda row: len(row["input_ids"]) > 4)) == 1
    with pytest.raises(ValueError, match=r"^row \d has 3 tokens and seq_lengths of 4: packed, then mapped"):
        packed.map(cut)


def test_a_packed_data_set_trains_in_plain_trl(tmp_path):
    """TRL's own collator and trainer; the first step's loss is the loss of the same examples one at a time."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 20, 24)
    ids = [rng.integers(3, 50, n).tolist() for n in lengths]
    dataset = Dataset.from_dict({"input_ids": ids, "labels": ids})
    plan = best_fit_decreasing(lengths, 40, overflow="error")
    packed = plan.apply(dataset)
    model = tiny_llama()

    def loss(tokens, labels):
        with torch.no_grad():
            return float(model(input_ids=torch.tensor([tokens]), labels=torch.tensor([labels])).loss)

    predicted = [len(ids[segment.example]) - 1 for segment in plan[0]]
    losses = [loss(ids[segment.example], ids[segment.example]) for segment in plan[0]]
    alone = float(np.average(losses, weights=predicted))
    contaminated = loss(packed[0]["input_ids"], packed[0]["labels"])
    words = Tokenizer(WordLevel({"a": 0}, "a"))
    config = SFTConfig(
        output_dir=str(tmp_path),
        padding_free=True,
        per_device_train_batch_size=1,
        max_steps=3,
        train_sampling_strategy="sequential",
        max_length=None,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a", eos_token="a")
    trainer = SFTTrainer(model, config, train_dataset=packed, processing_class=tokenizer)
    trainer.train()
    trained = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(trained) == 3
    assert trained[0] == pytest.approx(alone, abs=1e-4)
    assert contaminated != pytest.approx(alone, abs=1e-4)
