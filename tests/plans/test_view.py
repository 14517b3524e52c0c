"""`Plan.view`: the rows of `Plan.apply`, gathered when asked for, from arrow or anything with `[i]`."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler
from transformers import Trainer
from trl import SFTTrainer

from packlib.collators import FlatteningCollator
from packlib.plans import best_fit_decreasing, fixed_length, stream
from packlib.plans.view import PackedView
from tests.plans.training import losses

LENGTHS = np.random.default_rng(0).integers(1, 60, 300)


def examples(lengths, **columns):
    """Token t of example i is 1000 · i + t, so that a misplaced token shows."""
    return Dataset.from_dict(
        {"input_ids": [[1000 * i + t for t in range(n)] for i, n in enumerate(lengths)], **columns}
    )


def lists(row):
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()}


@settings(max_examples=40, deadline=None)
@given(data=st.data(), capacity=st.integers(1, 70), seed=st.integers(0, 99))
def test_a_view_has_the_rows_of_the_table(data, capacity, seed):
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=20))
    columns = {
        "task": [f"task {i}" for i in range(len(lengths))],
        "weight": [[i] * n for i, n in enumerate(lengths)],
        "completion_mask": [[t % 3 > 0 for t in range(n)] for n in lengths],
    }
    if data.draw(st.booleans()):
        columns["labels"] = [[-100 if t % 4 < 2 else t for t in range(n)] for n in lengths]
    full = examples(lengths, **columns)
    dataset = concatenate_datasets([full.select(range(1)), full.select(range(1, len(lengths)))])  # several chunks
    if data.draw(st.booleans()):
        dataset = dataset.shuffle(seed=seed)
    sizes = [len(ids) for ids in dataset["input_ids"]]
    planner = data.draw(st.sampled_from([fixed_length, lambda n, c: best_fit_decreasing(n, c, overflow="truncate")]))
    plan = planner(sizes, capacity)
    table, view = plan.apply(dataset), plan.view(dataset)
    assert view.column_names == table.column_names
    assert [lists(row) for row in view] == list(table)
    rows = view[1:3] if len(view) > 2 else view[:]
    assert rows["seq_lengths"][0].tolist() == table[1 if len(view) > 2 else 0]["seq_lengths"]


def test_a_piece_is_not_suspected_of_lost_boundaries():
    """Labels that leave out a piece's first token and single ones inside look packed; the whole example does not."""
    left_out = {0, 1, 4, 6}
    dataset = examples([8], labels=[[-100 if t in left_out else t for t in range(8)]])
    plan = fixed_length([8], 4)
    assert [lists(row) for row in plan.view(dataset)] == list(plan.apply(dataset))
    packed = examples([8], labels=[[-100 if t in {0, 4, 6} else t for t in range(8)]])
    with pytest.raises(ValueError, match="example of 8 tokens: it was packed and has lost its boundaries"):
        plan.view(packed)[0]
    said = packed[0] | {"seq_lengths": [8]}
    assert [row["seq_lengths"] for row in stream([said], 4, overflow="split", buffer=1)] == [[4], [4]]


def test_a_view_is_a_data_set():
    dataset, plan = (
        examples(LENGTHS, task=[str(n) for n in LENGTHS]),
        best_fit_decreasing(LENGTHS, 97, overflow="error"),
    )
    table, view = plan.apply(dataset), plan.view(dataset)
    # Selections touch no token and agree with those of the table.
    for choose in (
        lambda rows: rows.shuffle(seed=3),
        lambda rows: rows.select([5, 3, 3]),
        lambda rows: rows.shard(4, 1).shuffle(seed=1),
        lambda rows: rows.train_test_split(0.5, seed=2)["test"],
    ):
        assert [lists(row) for row in choose(view)] == list(choose(table))
        assert [lists(row) for row in pickle.loads(pickle.dumps(choose(view)))] == list(choose(table))
    # Formats and columns, with the boundaries in any case.
    assert list(view.with_format("torch", columns=["labels"])[0]) == ["labels", "seq_lengths"]
    assert isinstance(view.with_format("torch")[0]["input_ids"], torch.Tensor)
    assert isinstance(view[0]["input_ids"], np.ndarray)
    assert "seq_lengths" in view.remove_columns(["seq_lengths", "task"]).column_names
    assert plan.view(dataset, columns=["input_ids"]).column_names == ["input_ids", "seq_lengths"]
    assert view["task"][0] == table["task"][0]
    with pytest.raises(IndexError):
        view[len(view)]
    with pytest.raises(ValueError, match=r"columns \['nothing'\] are not in the view"):
        view.select_columns("nothing")
    with pytest.raises(ValueError, match="format 'pandas' of a view"):
        view.with_format("pandas")
    view.set_format("torch", columns=["labels"])
    assert list(view[0]) == ["labels", "seq_lengths"] == list(view[:2]) and view.column_names == table.column_names
    view.reset_format()
    assert list(view[0]) == table.column_names and isinstance(view[0]["labels"], np.ndarray)


# Methods of a data set that a view has as they are: none of them reads or makes rows, but for those through `select`.
AS_THEY_ARE = {"shard", "shuffle", "skip", "take", "train_test_split", "reset_format", "cleanup_cache_files"}


def test_what_would_rewrite_or_export_rows_is_an_error():
    view = best_fit_decreasing(LENGTHS, 97, overflow="error").view(examples(LENGTHS))
    methods = {name for name in vars(Dataset) if not name.startswith("_") and callable(getattr(view, name))}
    made = {name for name in methods if name.startswith(("from_", "load_", "add_faiss", "add_elastic", "save_faiss"))}
    own = methods & {name for name, value in vars(PackedView).items() if value is not PackedView.map}
    refused = methods - made - own - AS_THEY_ARE
    assert {"filter", "sort", "to_parquet", "to_iterable_dataset", "iter", "unique"} <= refused
    for name in sorted(refused):
        with pytest.raises(TypeError, match=r"Plan.apply makes a table"):
            getattr(view, name)()


def test_masks_and_lists_that_are_null_are_read_where_they_lie():
    """Bits and nulls, which numpy cannot share, in several chunks and behind a slice."""
    masks = pa.chunked_array([[[True] * n for n in LENGTHS[:9]], [[n % 2 == 0] * n for n in LENGTHS[9:30]]])
    notes = pa.array([None if n % 3 else [int(n)] for n in LENGTHS[:30]])
    ids = pa.array([list(range(n)) for n in LENGTHS[:30]])
    dataset = Dataset(pa.table({"input_ids": ids, "completion_mask": masks, "notes": notes}).slice(4))
    plan = best_fit_decreasing(LENGTHS[4:30], 97, overflow="error")
    assert [lists(row) for row in plan.view(dataset)] == list(plan.apply(dataset))


def test_ranks_have_equal_work():
    lengths = np.random.default_rng(2).lognormal(np.log(16) - 0.5, 1, 6000).clip(1, 128).astype(int)
    tokens = [np.broadcast_to(np.int64(1), n) for n in lengths]
    plan = best_fit_decreasing(lengths, 128, overflow="error")

    def unevenness(view):
        ranks = [DistributedSampler(view, num_replicas=8, rank=rank, shuffle=False) for rank in range(8)]
        costs = np.array([[(view[row]["seq_lengths"] ** 2).sum() for row in sampler] for sampler in ranks])
        return costs.max(axis=0).sum() / costs.mean(axis=0).sum()

    assert unevenness(plan.balance(8).view(tokens)) <= 1.05 < 1.5 < unevenness(plan.view(tokens))


@pytest.mark.parametrize("as_mappings", [False, True])
def test_any_indexable_is_viewed(as_mappings):
    arrays = [np.arange(n) + 1000 * i for i, n in enumerate(LENGTHS)]
    source = [{"input_ids": ids, "task": str(i)} for i, ids in enumerate(arrays)] if as_mappings else arrays
    columns = {"task": [str(i) for i in range(len(arrays))]} if as_mappings else {}
    plan = fixed_length(LENGTHS, 50)
    assert [lists(row) for row in plan.view(source)] == list(plan.apply(examples(LENGTHS, **columns)))
    assert lists(plan.view(source, lengths=LENGTHS)[3]) == lists(plan.view(source)[3])


def test_wrong_data_is_an_error():
    plan = best_fit_decreasing([3, 2], 5, overflow="error")
    for wrong in ([[1, 2], [3, 4, 5]], [[1, 2, 3]]):
        with pytest.raises(ValueError, match="those that were planned"):
            plan.view(wrong)
    with pytest.raises(ValueError, match="2 lengths for 3 examples"):
        plan.view([[1], [2], [3]], lengths=[3, 2])
    with pytest.raises(ValueError, match="example 0 has 1 tokens; the plan takes 3: planned for other data"):
        plan.view([[1], [2, 3]], lengths=[3, 2])[0]
    with pytest.raises(ValueError, match="the data set has 'pixel_values'"):
        plan.view(examples([3, 2], pixel_values=[[1.0], [2.0]]))
    with pytest.raises(ValueError, match="packed already"):
        plan.view(examples([3, 2], seq_lengths=[[3], [2]]))
    with pytest.raises(ValueError, match=r"'attention_mask'\] has 1 zeros"):
        plan.view(examples([3, 2], attention_mask=[[1, 1, 0], [1, 1]]))[0]
    packed = [{"input_ids": [1, 2, 3], "position_ids": [0, 1, 0]}, {"input_ids": [4, 5], "position_ids": [0, 1]}]
    with pytest.raises(ValueError, match="packed already"):
        plan.view(packed)[0]


def test_shards_on_disk_are_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr("packlib.plans.rows.SHARD", 500)
    dataset, plan = examples(LENGTHS), best_fit_decreasing(LENGTHS, 97, overflow="error")
    written = plan.apply(dataset, tmp_path / "rows")
    assert len(list((tmp_path / "rows").glob("*.arrow"))) > 10
    assert list(written) == list(load_from_disk(tmp_path / "rows")) == list(plan.apply(dataset))
    assert "seq_lengths" in written.remove_columns("seq_lengths").column_names
    with pytest.raises(ValueError, match="is not empty"):
        plan.apply(dataset, tmp_path / "rows")


def test_a_plan_names_its_data(tmp_path):
    path = best_fit_decreasing([3, 2], 5, overflow="error").save(tmp_path / "plan.npz", data="org/corpus@3f2a")
    loaded = type(best_fit_decreasing([3, 2], 5, overflow="error")).load(path, data="org/corpus@3f2a")
    assert loaded.data == "org/corpus@3f2a"
    assert loaded.shuffle(1).data == "org/corpus@3f2a"
    with pytest.raises(ValueError, match="planned for data = 'org/corpus@3f2a'; expected 'org/corpus@0000'"):
        type(loaded).load(path, data="org/corpus@0000")


@pytest.mark.parametrize("trainer", [Trainer, SFTTrainer])
@pytest.mark.parametrize("workers", [0, 2])
def test_trainers_read_a_view_as_they_read_the_table(trainer, workers, tmp_path):
    rng = np.random.default_rng(1)
    dataset = Dataset.from_dict({"input_ids": [rng.integers(1, 64, n).tolist() for n in LENGTHS[:60]]})
    plan = best_fit_decreasing(LENGTHS[:60], 97, overflow="error")
    seen = losses(plan.view(dataset), trainer, tmp_path, dataloader_num_workers=workers)
    assert seen == losses(plan.apply(dataset), trainer, tmp_path)
    assert len(set(seen)) == 5
    balanced = losses(plan.shuffle(5).view(dataset), trainer, tmp_path, train_sampling_strategy="sequential")
    assert balanced != seen


def test_rows_reach_workers_in_order():
    plan = best_fit_decreasing(LENGTHS, 97, overflow="error")
    view = plan.view(examples(LENGTHS))
    loader = DataLoader(view, batch_size=4, collate_fn=FlatteningCollator(), num_workers=2)
    tokens = torch.cat([batch["input_ids"][0] for batch in loader]).tolist()
    assert tokens == [token for row in plan.apply(examples(LENGTHS)) for token in row["input_ids"]]


MEMORY = """
import json, sys
from pathlib import Path
import numpy as np, pyarrow as pa
from datasets import Dataset
from packlib.plans import next_fit, rows

folder, tokens, grown = Path(sys.argv[1]), 1024, {}
peak = 0

def anonymous():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) * 1024

class Corpus:  # one sparse file of int32
    def __init__(self, examples):
        with open(folder / "tokens", "wb") as file:
            file.truncate(examples * tokens * 4)
        self.tokens = np.memmap(folder / "tokens", dtype=np.int32, mode="r", shape=(examples, tokens))
    def __len__(self):
        return len(self.tokens)
    def __getitem__(self, example):
        return self.tokens[example]

def planned(examples):
    lengths = np.full(examples, tokens, dtype=np.int32)
    return next_fit(lengths, 4 * tokens, overflow="error"), lengths

def read(name, view, every):
    before = anonymous()
    view = view()
    seen = sum(len(view[row]["input_ids"]) for row in range(0, len(view), every))
    grown[name] = [anonymous() - before, seen * 4]
    return view

for name, examples, every in (("warm", 2**10, 1), ("small", 2**15, 16), ("large", 10 * 2**15, 160)):
    plan, lengths = planned(examples)
    view = read(name, lambda: plan.view(Corpus(examples), lengths=lengths), every)

# Arrow: 16 MB, mapped, and all rows written again in shards.
examples = 2**12
with pa.OSFile(str(folder / "examples.arrow"), "wb") as file:
    part = pa.ListArray.from_arrays(np.arange(0, 1025 * tokens, tokens, dtype=np.int32), np.ones(2**20, np.int32))
    table = pa.table({"input_ids": part})
    with pa.ipc.new_stream(file, table.schema) as writer:
        for _ in range(4):
            writer.write_table(table)
del table, part
plan, _ = planned(examples)
dataset = Dataset.from_file(str(folder / "examples.arrow"))
view = read("arrow", lambda: plan.view(dataset), 1)

rows.SHARD, gather, before = 2**18, rows._gather, anonymous()
def watched(*arguments):
    global peak
    made = gather(*arguments)
    peak = max(peak, anonymous() - before)
    return made
rows._gather = watched
plan.apply(dataset, folder / "rows")
grown["apply"] = [peak, sum(path.stat().st_size for path in (folder / "rows").glob("*.arrow"))]

before = anonymous()
kept = [row["input_ids"] for row in view]
grown["kept"] = [anonymous() - before, examples * tokens * 4]
print(json.dumps(grown))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """A sparse file of 128 MB and of 1.3 GB, 16 MB of arrow: the process's own memory is that of a few rows."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    grown = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown["small"][1] == grown["large"][1] == 512 * 4096 * 4, "as many rows are read"
    for name in ("small", "large", "arrow"):
        assert grown[name][0] < 12 * 2**20, grown
    assert grown["arrow"][1] == 16 * 2**20, "all rows are read"
    assert grown["apply"][0] < grown["apply"][1] / 3, grown
    assert grown["kept"][0] > grown["kept"][1], "rows that are kept are noticed"
