"""Examples of like words stand beside each other, and held-out ones behind those that are like them."""

import numpy as np
import pytest

from packlib.collators import IGNORE_INDEX
from packlib.lab.data import neighbours
from packlib.lab.data.corpora import Corpus

FACTS = {"name": "made", "tokenizer_name": "none", "vocab_size": 40, "eos_token_id": 0, "pad_token_id": 0}
TOPICS, EACH, SHOWN = 3, 6, 4  # examples of a topic share its ten words; the first four tokens have no label


def made(split: str, each: int) -> Corpus:
    """Examples of topics in turn; 0 ends each, so that one word is in all of them."""
    rng = np.random.default_rng(len(split))
    ids = [[*rng.integers(1, 11, 9) + 10 * (i % TOPICS), 0] for i in range(TOPICS * each)]
    labels = [[IGNORE_INDEX] * SHOWN + tokens[SHOWN:] for tokens in ids]
    lengths = np.full(len(ids), 10)
    return Corpus.from_arrays(np.concatenate(ids), np.concatenate(labels), lengths, split=split, **FACTS)


TRAIN, HELD_OUT = made("train", EACH), made("eval", 2)


def test_a_chain_visits_everyone_once_and_one_topic_after_the_other():
    order = neighbours.chain(TRAIN, seed=3)
    assert sorted(order.tolist()) == list(range(TOPICS * EACH))
    topics = order % TOPICS
    assert (np.diff(topics) != 0).sum() == TOPICS - 1
    as_they_come = np.random.default_rng(3).permutation(TOPICS * EACH) % TOPICS
    assert (np.diff(as_they_come) != 0).sum() > TOPICS - 1, "the negative control: a random order mixes them"
    assert {int(neighbours.chain(TRAIN, seed=seed)[0]) for seed in range(9)} != {int(order[0])}


def test_the_nearest_are_of_the_same_topic_by_what_is_shown():
    near = neighbours.nearest(TRAIN, HELD_OUT, 3)
    assert near.shape == (len(HELD_OUT.lengths), 3)
    assert (near % TOPICS == np.arange(len(near))[:, None] % TOPICS).all()
    # An example whose answer, which is not shown, is of another topic, still goes by its question.
    ids = np.concatenate([TRAIN.dataset[0]["input_ids"][:SHOWN], TRAIN.dataset[1]["input_ids"][SHOWN:]])
    labels = np.where(np.arange(10) < SHOWN, IGNORE_INDEX, ids)
    mixed = Corpus.from_arrays(ids, labels, np.array([10]), split="eval", **FACTS)
    assert neighbours.nearest(TRAIN, mixed, 1)[0, -1] % TOPICS == 0
    all_shown = Corpus.from_arrays(ids, np.full(10, IGNORE_INDEX), np.array([10]), split="eval", **FACTS)
    assert neighbours.nearest(TRAIN, all_shown, 1)[0, -1] % TOPICS == 1, "the negative control: its answer is longer"


def test_behind_others_only_its_own_labels_count():
    shown = neighbours.nearest(TRAIN, HELD_OUT, 2)
    found = neighbours.behind(TRAIN, HELD_OUT, shown)
    assert found.lengths.tolist() == [30] * len(HELD_OUT.lengths)
    for example, own, before in zip(found.dataset, HELD_OUT.dataset, shown):
        expected = [*TRAIN.dataset[int(before[0])]["input_ids"], *TRAIN.dataset[int(before[1])]["input_ids"]]
        assert list(example["input_ids"]) == [*expected, *own["input_ids"]]
        assert list(example["labels"]) == [IGNORE_INDEX] * 20 + list(own["labels"])
    assert found.loss_tokens.sum() == HELD_OUT.loss_tokens.sum()
    with pytest.raises(ValueError, match="shown has 2 rows; expected one for each of 6 examples"):
        neighbours.behind(TRAIN, HELD_OUT, shown[:2])
