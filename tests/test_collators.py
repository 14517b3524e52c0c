"""Both collators: the paper's worked example, transformers' tensors, boundaries, and every bad input."""

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

from packlib.attention import varlen_attention
from packlib.collators import IGNORE_INDEX, FlatteningCollator, PaddingCollator
from packlib.lab.small_models import small_model

WORKED = [[10, 11, 12, 13], [*range(20, 28)], [*range(30, 35)], [*range(40, 50), 410]]  # PAPER.md, §3.5


@pytest.fixture(params=["lists", "arrays"])
def worked(request):
    make = list if request.param == "lists" else np.array
    return [{"input_ids": make(ids)} for ids in WORKED]


def test_worked_example_to_the_letter(worked):
    batch = FlatteningCollator()(worked)
    assert batch["input_ids"].tolist() == [[t for ids in WORKED for t in ids]]
    assert batch["labels"].tolist() == [[t for ids in WORKED for t in [IGNORE_INDEX, *ids[1:]]]]
    assert batch["position_ids"].tolist() == [[t for ids in WORKED for t in range(len(ids))]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 4, 12, 17, 28]
    assert batch["max_length_q"] == batch["max_length_k"] == 11
    assert batch["seq_idx"].tolist() == [[i for i, ids in enumerate(WORKED) for _ in ids]]
    assert "attention_mask" not in batch


def test_dtypes_and_types(worked):
    batch = FlatteningCollator()(worked)
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "labels", "position_ids"))
    assert batch["seq_idx"].dtype == batch["cu_seq_lens_q"].dtype == torch.int32
    assert type(batch["max_length_q"]) is int


def test_same_tensors_as_transformers(worked):
    features = [{"input_ids": list(map(int, f["input_ids"])), "labels": list(map(int, f["input_ids"]))} for f in worked]
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(features)
    ours = FlatteningCollator()(features)
    assert set(ours) == {*theirs, "use_cache"}
    for name, value in theirs.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(ours[name])), name


def test_row_boundary_is_where_features_end():
    rows = [{"input_ids": [1, 2, 3, 4], "seq_lengths": [1, 3]}, {"input_ids": [5, 6], "seq_lengths": [2]}]
    contaminated, isolated = FlatteningCollator(boundary="row")(rows), FlatteningCollator()(rows)
    assert contaminated["cu_seq_lens_q"].tolist() == [0, 4, 6]
    assert isolated["cu_seq_lens_q"].tolist() == [0, 1, 4, 6]
    assert contaminated["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1]]
    assert torch.equal(contaminated["labels"], isolated["labels"]), (
        "both train on the same tokens: the first of every example is masked"
    )
    assert isolated["labels"].tolist() == [[-100, -100, 3, 4, -100, 6]]


def test_tail_is_one_explicit_segment():
    batch = FlatteningCollator(pad_to_multiple_of=8, pad_token_id=7)([{"input_ids": [1, 2, 3]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 7, 7, 7, 7, 7]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 8]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, -100, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    full = FlatteningCollator(pad_to_multiple_of=3)([{"input_ids": [1, 2, 3]}])
    assert full["cu_seq_lens_q"].tolist() == [0, 3]


@pytest.mark.parametrize("collator", [FlatteningCollator(pad_to_multiple_of=4), PaddingCollator()])
def test_inputs_are_not_changed_nor_shared(collator):
    ids, labels = np.arange(5), np.arange(5)
    batch = collator([{"input_ids": ids, "labels": labels}])
    batch["input_ids"].zero_()
    batch["labels"].zero_()
    assert ids.tolist() == labels.tolist() == [0, 1, 2, 3, 4]


def test_padding_lays_packed_rows_out_again():
    batch = PaddingCollator(pad_token_id=9)([{"input_ids": [1, 2, 3], "seq_lengths": [1, 2]}, {"input_ids": [4, 5, 6]}])
    assert batch["input_ids"].tolist() == [[1, 9, 9], [2, 3, 9], [4, 5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, -100], [-100, 3, -100], [-100, 5, 6]]
    assert PaddingCollator(pad_to_multiple_of=8)([{"input_ids": [1]}])["input_ids"].shape == (1, 8)


def test_both_layouts_hold_the_same_tokens_and_loss():
    rng = np.random.default_rng(0)
    features = [{"input_ids": rng.integers(0, 99, n), "labels": rng.integers(-1, 99, n)} for n in (1, 7, 3)]
    flat, padded = FlatteningCollator()(features), PaddingCollator()(features)
    mask = padded["attention_mask"].bool()
    assert torch.equal(padded["input_ids"][mask], flat["input_ids"][0])
    assert torch.equal(padded["labels"][mask], flat["labels"][0])


GOOD = {"input_ids": [1, 2, 3]}
BAD = {
    "empty example": ({"input_ids": []}, r"features\[1\]\['input_ids'\] is empty"),
    "empty array": ({"input_ids": np.array([], dtype=np.int64)}, r"features\[1\]\['input_ids'\] is empty"),
    "no ids": ({"tokens": [1]}, r"features\[1\] has no 'input_ids'; it has \['tokens'\]"),
    "mask with zeros": (
        {"input_ids": [1, 0, 0], "attention_mask": [1, 0, 0]},
        r"features\[1\]\['attention_mask'\] has 2 zeros over 3 tokens",
    ),
    "mask of another length": ({"input_ids": [1, 2], "attention_mask": [1]}, r"features\[1\]\['attention_mask'\]"),
    "nested ids": ({"input_ids": [[1, 2], [3, 4]]}, r"features\[1\]\['input_ids'\] is not a flat sequence of integers"),
    "two-dimensional array": ({"input_ids": np.ones((2, 2), dtype=int)}, r"features\[1\]\['input_ids'\] is not a flat"),
    "float ids": (
        {"input_ids": np.array([1.0, 2.0])},
        r"features\[1\]\['input_ids'\] is not a flat sequence of integers",
    ),
    "float list": ({"input_ids": [1, 2.5]}, r"features\[1\]\['input_ids'\] is not a flat sequence of integers"),
    "one id": ({"input_ids": torch.tensor(1)}, r"features\[1\]\['input_ids'\] = tensor\(1\) is one value"),
    "text": ({"input_ids": ["a", "b"]}, r"features\[1\]\['input_ids'\] is not a flat sequence of integers"),
    "segments too short": (
        {"input_ids": [1, 2], "seq_lengths": [1]},
        r"features\[1\]\['seq_lengths'\] covers 1 tokens; expected 2",
    ),
    "segment of nothing": (
        {"input_ids": [1, 2], "seq_lengths": [0, 2]},
        r"features\[1\]\['seq_lengths'\] = \[0, 2\]; expected integers",
    ),
}


@pytest.mark.parametrize(
    "collator",
    [FlatteningCollator(), FlatteningCollator(boundary="row"), PaddingCollator()],
    ids=["flat", "row", "padded"],
)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_example(collator, case):
    feature, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        collator([GOOD, feature])
    collator([GOOD, GOOD])


@pytest.mark.parametrize("collator", [FlatteningCollator(), PaddingCollator()])
def test_bad_labels_name_the_example(collator):
    with pytest.raises(ValueError, match=r"features\[1\]\['labels'\] covers 2 tokens; expected 3"):
        collator([GOOD | {"labels": [1, 2, 3]}, GOOD | {"labels": [1, 2]}])
    for number in (1, np.int64(1), torch.tensor(1)):  # a class label
        with pytest.raises(ValueError, match=r"features\[1\]\['labels'\] = .*1\)? is one value; expected one for each"):
            collator([GOOD | {"labels": [1, 2, 3]}, GOOD | {"labels": number}])
        with pytest.raises(ValueError, match=r"features\[0\] has 'label', a class or span of the example"):
            collator([GOOD | {"label": number}, GOOD])
    with pytest.raises(ValueError, match=r"features\[1\] has no labels but others have"):
        collator([GOOD | {"labels": [1, 2, 3]}, GOOD])
    with pytest.raises(ValueError, match="features is empty"):
        collator([])


def test_bad_settings():
    with pytest.raises(ValueError, match=r"boundary = 'example'; expected 'segment' or 'row'"):
        FlatteningCollator(boundary="example")
    with pytest.raises(ValueError, match="pad_to_multiple_of = 0"):
        FlatteningCollator(pad_to_multiple_of=0)


# collator and kernel together


def _nothing_lost_nothing_shared(rows):
    """Flatten rows of segments; every token's value is its example's number, all scores are equal.

    Attention must then return that number.
    """
    tokens = [[100 * (i + 1) + t for t in range(sum(row))] for i, row in enumerate(rows)]
    batch = FlatteningCollator()([{"input_ids": t, "seq_lengths": list(row)} for t, row in zip(tokens, rows)])
    assert batch["input_ids"][0].tolist() == list(chain(*tokens))
    lengths = [n for row in rows for n in row]
    assert batch["cu_seq_lens_q"].diff().tolist() == lengths and batch["max_length_q"] == max(lengths)
    assert batch["position_ids"][0].tolist() == [p for n in lengths for p in range(n)]
    first = batch["position_ids"] == 0
    assert (batch["labels"] == batch["input_ids"].masked_fill(first, -100)).all() and int(first.sum()) == len(lengths)
    number = batch["seq_idx"][0].float()[:, None, None]
    zero = torch.zeros_like(number)
    seen = varlen_attention(zero, zero, number, batch["cu_seq_lens_q"], batch["max_length_q"], kernel="sdpa")
    assert torch.allclose(seen, number, atol=1e-4)


ROWS = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(ROWS)
def test_random_batches(rows):
    _nothing_lost_nothing_shared(rows)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(ROWS)
def test_ten_thousand_random_batches(rows):
    _nothing_lost_nothing_shared(rows)


SPOILED = [
    (lambda f: f.update(input_ids=[]), "is empty"),
    (lambda f: f.update(labels=[1] * 99), "covers 99 tokens"),
    (lambda f: f.update(attention_mask=[0] * len(f["input_ids"])), "zeros over"),
    (lambda f: f.update(seq_lengths=[99]), "covers 99 tokens"),
    (lambda f: f.update(seq_lengths=[0, len(f["input_ids"])]), "integers of at least 1"),
    (lambda f: f.pop("input_ids"), "has no 'input_ids'"),
]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_fuzzed_bad_input_names_the_example(lengths, data):
    examples = [{"input_ids": list(range(n)), "labels": list(range(n))} for n in lengths]
    index, (spoil, match) = data.draw(st.integers(0, len(lengths) - 1)), data.draw(st.sampled_from(SPOILED))
    spoil(examples[index])
    with pytest.raises(ValueError, match=rf"features\[{index}\].*{match}"):
        FlatteningCollator()(examples)


@pytest.mark.parametrize("feature", [torch.tensor([1, 2]), [1, 2], "input_ids"])
def test_a_feature_that_is_no_mapping_is_named(feature):
    expected = rf"features\[1\] is a {type(feature).__name__}; expected a mapping that has 'input_ids'"
    with pytest.raises(ValueError, match=expected):
        FlatteningCollator()([{"input_ids": [1, 2]}, feature])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_loop_of_ones_own_keeps_no_cache_and_so_drops_no_boundaries(attention):
    """`model(**batch)` as anybody writes it, on a model whose config asks for a cache; and what a cache would do."""
    model, features = small_model("llama", attention), [{"input_ids": list(range(3, 3 + n))} for n in (5, 9)]
    model.config.use_cache = True
    batch = FlatteningCollator()(features)
    apart = model(**batch).loss
    alone = [model(**FlatteningCollator()([one])).loss * (len(one["input_ids"]) - 1) for one in features]
    assert torch.allclose(apart, sum(alone) / 12, atol=1e-6)
    assert not torch.allclose(apart, model(**batch | {"use_cache": True}).loss, atol=1e-4)
