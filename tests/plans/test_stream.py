"""`plans.stream`: every example once, whole, in an order that a state resumes; as full as a plan of everything."""

import json
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets
from datasets.distributed import split_dataset_by_node
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import Trainer
from trl import SFTTrainer

from packlib.plans import best_fit_decreasing, estimate_rows, stream
from packlib.plans.iterable import PackedStream
from tests.plans.training import losses

LENGTHS = np.random.default_rng(0).integers(1, 20, 300)


def examples(lengths):
    """Token t of example i is 1000 · i + t, so that a misplaced token shows."""
    return [np.arange(n) + 1000 * i for i, n in enumerate(lengths)]


def arrow(lengths, shards=1):
    ids = [ids.tolist() for ids in examples(lengths)]
    return Dataset.from_dict({"input_ids": ids}).to_iterable_dataset(num_shards=shards)


def tokens(rows):
    return [row["input_ids"].tolist() for row in rows]


def segments(rows):
    """Every segment of the rows, sorted; whole examples sort by their number."""
    parts = [part.tolist() for row in rows for part in np.split(row["input_ids"], np.cumsum(row["seq_lengths"])[:-1])]
    return sorted(parts)


# Nothing is lost, nothing comes twice


def with_kills(make, kills):
    """Rows of a stream that is killed after so many rows, again and again, and resumed from its state as JSON.

    Also the block that each row is of, and the last of the streams.
    """
    rows, blocks, state = [], [], None
    for kill in [*kills, None]:
        packed = make()
        if state is not None:
            packed.load_state_dict(json.loads(state))
        for count, row in enumerate(packed):
            if count == kill:
                break
            rows.append(row)
            state = json.dumps(packed.state_dict())
            blocks.append(packed.state_dict()["examples_iterable"]["block"])
    return rows, np.array(blocks), packed


def check_conservation(data):
    lengths = np.array(data.draw(st.lists(st.integers(1, 30), max_size=60)), dtype=int)
    most, overflow = data.draw(st.integers(1, 40)), data.draw(st.sampled_from(["truncate", "split"]))
    ranks = data.draw(st.integers(1, 4))
    own = {"buffer": data.draw(st.integers(1, 25)), "seed": data.draw(st.integers(-3, 3)), "world_size": ranks}
    source = data.draw(st.sampled_from([list, iter_anew, generated]))(examples(lengths))
    kills = data.draw(st.lists(st.integers(0, 12), max_size=4))

    def make():
        return stream(source, most, overflow=overflow, **own)

    rows, blocks, last = with_kills(make, kills)
    assert tokens(rows) == tokens(make()), "killed and resumed, the same rows"
    kept = [ids[:most] if overflow == "truncate" else ids for ids in examples(lengths)]
    assert segments(rows) == sorted(ids[at : at + most].tolist() for ids in kept for at in range(0, len(ids), most))
    assert all(len(row["input_ids"]) <= most for row in rows)
    assert last.rows == len(rows) and last.lost_tokens == lengths.sum() - sum(map(len, kept))
    for block in set(blocks.tolist()):
        here = [row for row, own in zip(rows, blocks == block) if own]
        pieces = sum(len(row["seq_lengths"]) for row in here)
        assert len(here) % ranks == 0 or (block == blocks[-1] and pieces < len(here) + -len(here) % ranks)


def iter_anew(items):
    class Again:
        def __iter__(self):
            return iter(items)

    return Again()


def generated(items):
    def make():
        for ids in items:
            yield {"input_ids": ids.tolist()}

    return IterableDataset.from_generator(make) if len(items) else items


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_nothing_is_lost_and_nothing_comes_twice(data):
    check_conservation(data)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=10_000, deadline=None)
@given(data=st.data())
def test_nothing_is_lost_in_ten_thousand_streams(data):
    check_conservation(data)


def test_without_its_state_a_stream_begins_again():
    make = lambda: stream(examples(LENGTHS), 40, overflow="error", buffer=50)  # noqa: E731
    rows, _, _ = with_kills(make, [20])
    first = [row for _, row in zip(range(20), make())]
    assert segments(rows) == segments(make()) != segments([*first, *make()])


SOURCES = {
    "shards": lambda source: source,
    "mapped in batches": lambda source: source.map(lambda batch: batch, batched=True, batch_size=7),
    "arrow in batches": lambda source: source.with_format("arrow").map(lambda batch: batch, batched=True, batch_size=7),
    "filtered": lambda source: source.filter(lambda example: len(example["input_ids"]) > 3),
    "parted": lambda source: source.skip(5).take(200),
    "concatenated": lambda source: concatenate_datasets([source, source.take(10)]),
    "interleaved": lambda source: interleave_datasets([source, source.take(90)], probabilities=[0.3, 0.7], seed=3),
    "shuffled": lambda source: source.shuffle(seed=1, buffer_size=20).map(lambda example: example),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_resumes_at_every_row(name):
    source = SOURCES[name](arrow(LENGTHS, shards=4))
    packed, rows, states = stream(source, 40, overflow="error", buffer=30), [], []
    for row in packed:
        rows.append(row)
        states.append(json.dumps(packed.state_dict()))
    assert segments(rows) == sorted(example["input_ids"] for example in source.with_format(None))
    for seen in range(1, len(rows) + 1, 9):
        resumed = stream(source, 40, overflow="error", buffer=30)
        resumed.load_state_dict(json.loads(states[seen - 1]))
        assert tokens(resumed) == tokens(rows[seen:])
        assert resumed.rows == len(rows)


def test_streams_of_one_source_have_states_of_their_own():
    source = arrow(LENGTHS, shards=4)
    train, other = (stream(source, 40, overflow="error", buffer=30) for _ in range(2))
    rows = iter(train)
    seen = [next(rows) for _ in range(25)]
    assert len(list(other)) == len(tokens(stream(source, 40, overflow="error", buffer=30)))
    seen += [next(rows) for _ in range(25)]
    resumed = stream(source, 40, overflow="error", buffer=30)
    resumed.load_state_dict(train.state_dict())
    assert segments([*seen, *resumed]) == segments(
        resumed_anew := list(stream(source, 40, overflow="error", buffer=30))
    )
    assert len(resumed_anew) > 60


def test_a_state_belongs_to_its_arguments():
    packed = stream(examples(LENGTHS), 40, overflow="error", buffer=50)
    next(iter(packed))
    other = stream(examples(LENGTHS), 40, overflow="error", buffer=60)
    other.load_state_dict(packed.state_dict())
    with pytest.raises(ValueError, match="the state was saved with buffer = 50; this stream has 60"):
        next(iter(other))
    # That of a beginning is anyone's: torchdata's loader takes a worker's before the worker knows its number.
    unread = stream(examples(LENGTHS), 40, overflow="error", buffer=50, seed=1)
    other.load_state_dict(unread.state_dict())
    assert segments(other) == segments(unread)
    assert other.state_dict()["examples_iterable"]["settings"]["buffer"] == 60


# How full, in which order


def distributions(count, most):
    rng = np.random.default_rng(1)
    return {
        "lognormal": rng.lognormal(np.log(most / 20) - 0.5, 1, count).clip(1, most).astype(int),
        "uniform": rng.integers(1, most + 1, count),
        "long": (rng.beta(4, 2, count) * most).clip(1, most).astype(int),
        "two modes": np.where(rng.random(count) < 0.5, rng.integers(1, most // 40, count), most // 2 + count % 7),
        "normal": rng.normal(most / 4, most / 20, count).clip(1, most).astype(int),
    }


@pytest.mark.parametrize("name", distributions(1, 512))
def test_a_buffer_of_ten_thousand_is_as_full_as_a_plan(name):
    lengths = distributions(15_000, 512)[name]
    offline = len(best_fit_decreasing(lengths, 512, overflow="error"))
    source = [np.broadcast_to(np.int64(1), n) for n in lengths]
    rows = sum(1 for _ in stream(source, 512, overflow="error"))
    assert lengths.sum() / 512 <= rows <= 1.005 * offline
    if name == "lognormal":
        assert sum(1 for _ in stream(source, 512, overflow="error", buffer=100)) > 1.005 * offline


def test_order_is_drawn_from_seed_epoch_and_block():
    def rows(seed=0, epoch=0):
        packed = stream(examples(LENGTHS), 40, overflow="error", buffer=100, seed=seed)
        packed.set_epoch(epoch)
        return list(packed)

    assert tokens(rows()) == tokens(rows())
    for other in (rows(seed=1), rows(epoch=1)):
        assert tokens(other) != tokens(rows())
        assert segments(other) == segments(rows())
    # A source that cannot be shuffled gets other rows in another epoch, too.
    packed = stream(arrow(LENGTHS).take(100), 40, overflow="error")
    first = tokens(packed)
    packed.set_epoch(1)
    assert tokens(packed) != first
    # Packed long to short, rows come in random order.
    longest = [row["seq_lengths"].max() for row in stream(examples(LENGTHS), 40, overflow="error")]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3
    assert np.corrcoef(np.sort(longest), np.arange(len(longest)))[0, 1] > 0.8


def test_an_example_comes_with_its_buffer_or_the_next():
    packed, begin, held = stream(examples(LENGTHS), 40, overflow="error", buffer=40), [0], 0
    for row in packed:
        state = packed.state_dict()["examples_iterable"]
        if state["read"] > begin[-1]:
            begin.append(state["read"])
        oldest = int(row["input_ids"].min()) // 1000
        assert oldest >= (begin[-2] if len(begin) > 1 else 0)
        held += oldest < begin[-1]
    assert len(begin) > 5 and held > 5, "some wait"


# Ranks and workers


def unevenness(rows, ranks):
    costs = np.array([(row["seq_lengths"].astype(np.int64) ** 2).sum() for row in rows]).reshape(-1, ranks)
    return costs.max(axis=1).sum() / costs.mean(axis=1).sum()


@pytest.mark.parametrize("shards", [1, 8])
def test_ranks_have_equal_work(shards):
    lengths = np.random.default_rng(2).lognormal(np.log(16) - 0.5, 1, 9000).clip(1, 128).astype(int)
    source = arrow(lengths, shards)

    def packed(ranks):
        return stream(source, 128, overflow="error", buffer=6000, world_size=ranks)

    rows = list(packed(8))
    assert len(rows) % 8 == 0 and segments(rows) == sorted(ids.tolist() for ids in examples(lengths))
    for rank in (0, 7):
        assert tokens(split_dataset_by_node(packed(8), rank, 8)) == tokens(rows[rank::8])
    assert unevenness(rows, 8) <= 1.05
    alone = list(packed(1))
    assert unevenness(alone[: len(alone) // 8 * 8], 8) > 1.5


def test_ranks_take_the_shards_of_a_stream_that_names_no_ranks():
    rows = [split_dataset_by_node(stream(arrow(LENGTHS, 4), 40, overflow="error"), rank, 2) for rank in range(2)]
    assert segments([row for own in rows for row in own]) == segments(stream(arrow(LENGTHS), 40, overflow="error"))


def loaded(packed, workers):
    return [row for batch in DataLoader(packed, batch_size=3, collate_fn=list, num_workers=workers) for row in batch]


@pytest.mark.parametrize("ranks", [1, 2])
def test_loader_workers(ranks):
    own = {"overflow": "error", "buffer": 50, "world_size": ranks}
    packed = stream(examples(LENGTHS), 40, **own)
    assert tokens(loaded(packed, 2)) == tokens(loaded(packed, 0)) == tokens(packed)
    sharded = stream(arrow(LENGTHS, 4), 40, **own)
    assert segments(loaded(sharded, 2)) == segments(packed)
    assert (tokens(loaded(sharded, 2)) == tokens(loaded(sharded, 0))) == (ranks > 1), "ranks share one stream"


def test_a_stream_is_an_iterable_data_set():
    packed = stream(arrow(LENGTHS), 40, overflow="error", buffer=50)
    assert isinstance(packed, IterableDataset) and isinstance(pickle.loads(pickle.dumps(packed)), PackedStream)
    assert tokens(pickle.loads(pickle.dumps(packed))) == tokens(packed)
    assert packed.column_names == ["input_ids", "labels", "position_ids", "seq_lengths"] == list(next(iter(packed)))
    assert tokens(packed.skip(3).take(2)) == tokens(packed)[3:5]
    assert isinstance(next(iter(packed.with_format("torch")))["input_ids"], torch.Tensor)
    assert segments(packed.shuffle(seed=0, buffer_size=10)) == segments(packed)
    assert sum(1 for _ in packed.filter(lambda row: len(row["seq_lengths"]) > 3)) < len(tokens(packed))
    assert split_dataset_by_node(packed, 0, 2).column_names == packed.column_names


# What a row has, and what is an error


def test_rows_are_those_of_a_table():
    lengths = [5, 3, 4]
    masks = [[t % 3 > 0 for t in range(n)] for n in lengths]
    table = Dataset.from_dict({"input_ids": [ids.tolist() for ids in examples(lengths)], "completion_mask": masks})
    (row,) = stream(table.to_iterable_dataset(), 12, overflow="error")
    order = row["input_ids"][np.cumsum(row["seq_lengths"]) - row["seq_lengths"]] // 1000
    (expected,) = (
        best_fit_decreasing(np.take(lengths, order), 12, overflow="error").take([0]).apply(table.select(order))
    )
    by_example = {name: np.array(values) for name, values in expected.items()}
    assert (by_example["labels"] == -100).sum() > 3
    for name, values in row.items():
        assert sorted(values.tolist()) == sorted(by_example[name].tolist()), name
    plain = next(iter(stream(examples([5]), 12, overflow="error")))
    assert plain["labels"].tolist() == [-100, 1, 2, 3, 4] and plain["position_ids"].dtype == np.int32
    given = {
        "input_ids": [1, 2, 3],
        "labels": [7, 8, 9],
        "completion_mask": [1, 1, 0],
        "task": "x",
        "pixel_values": None,
    }
    assert next(iter(stream([given], 12, overflow="error")))["labels"].tolist() == [-100, 8, 9]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 0}, "max_tokens = 0; expected an integer of at least 1"),
        ({"overflow": "drop"}, "overflow = 'drop'; expected 'error', 'truncate' or 'split'"),
        ({"buffer": 0}, "buffer = 0; expected an integer of at least 1"),
        ({"world_size": 0}, "world_size = 0; expected an integer of at least 1"),
        ({"cost": "cubic"}, "cost = 'cubic'; expected 'quadratic' or 'linear'"),
    ],
)
def test_wrong_arguments_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        stream([[1]], **{"max_tokens": 4, "overflow": "error", **arguments})


@pytest.mark.parametrize(
    ("third", "message"),
    [
        ([1] * 5, r"example 2 of the stream has 5 tokens, more than max_tokens = 4; pass overflow="),
        ([], "example 2 of the stream has no tokens"),
        ({"text": "a"}, r"example 2 of the stream has no tokens: \['text'\]"),
        ({"input_ids": [1], "pixel_values": [0.5]}, "example 2 of the stream has 'pixel_values'"),
        ({"input_ids": [1, 2, 3, 4], "attention_mask": [1, 0, 1, 1]}, r"examples 2 .*'attention_mask'\] has 1 zeros"),
        ({"input_ids": [1, 2, 3, 4], "labels": [1]}, r"examples 2 .*'labels'\] covers 1 tokens; expected 4"),
        ({"input_ids": [1, 2, 3, 4], "seq_lengths": [2, 2]}, "examples 2 .*packed already"),
    ],
)
def test_an_example_that_cannot_be_packed_is_named(third, message):
    packed = stream([[1, 2, 3], [4, 5, 6], third, [7]], 4, overflow="error", buffer=1)
    with pytest.raises(ValueError, match=message):
        list(packed)


def test_an_iterator_serves_for_one_pass():
    packed = stream(iter(examples(LENGTHS)), 40, overflow="error")
    assert len(list(packed)) == packed.rows
    with pytest.raises(ValueError, match="an earlier pass has used up"):
        list(packed)


# How many


def test_the_number_of_rows_is_estimated_within_its_bounds():
    inside = []
    for seed in range(25):
        rng = np.random.default_rng(seed)
        lengths = rng.lognormal(np.log(30) - 0.5, 1, 12_000).clip(1, 256).astype(int)
        found = estimate_rows(rng.choice(lengths, 1000, replace=False), 12_000, 256, overflow="error", resamples=25)
        rows = len(best_fit_decreasing(lengths, 256, overflow="error"))
        inside.append(found.low <= rows <= found.high)
        assert found.high - found.low < 0.3 * rows
    assert np.mean(inside) >= 0.9
    packed = stream([np.broadcast_to(np.int64(1), n) for n in lengths], 256, overflow="error", buffer=10_000)
    exact = sum(1 for _ in packed)
    assert packed.rows == exact and found.low <= exact <= found.high
    biased = estimate_rows(np.sort(lengths)[-1000:], 12_000, 256, overflow="error")
    assert biased.low > exact, "a sample that is not random is noticed by what it says"
    with pytest.raises(ValueError, match="examples = 10; expected at least the 1000 of the sample"):
        estimate_rows(lengths[:1000], 10, 256, overflow="error")


# Trainers


def words(count=60):
    rng = np.random.default_rng(1)
    return [rng.integers(1, 64, n) for n in LENGTHS[:count]]


STEPS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}


@pytest.mark.parametrize("trainer", [Trainer, SFTTrainer])
def test_trainers_read_a_stream_and_resume_it(trainer, tmp_path):
    packed = stream(words(), 40, overflow="error", buffer=20)
    own = {} if trainer is SFTTrainer else {"accelerator_config": {"dispatch_batches": False}}
    seen = losses(packed, trainer, tmp_path, **STEPS, **own)
    assert len(set(seen)) == 6
    table = Dataset.from_list(list(packed))
    assert seen == losses(table, trainer, tmp_path / "table", max_steps=6, train_sampling_strategy="sequential")
    assert losses(packed, trainer, tmp_path, str(tmp_path / "checkpoint-3"), **STEPS, **own) == seen
    other = stream(words(), 40, overflow="error", buffer=20, seed=1)
    assert losses(other, trainer, tmp_path / "other", max_steps=6, **own) != seen


def test_the_dispatcher_of_accelerate_is_noticed(tmp_path):
    with pytest.raises(ValueError, match=r"dispatch_batches\": False"):
        losses(stream(words(), 40, overflow="error"), Trainer, tmp_path)
