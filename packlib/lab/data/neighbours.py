"""Examples of like words: which lie near each other by TF-IDF, over token ids, so that tokenized corpora have them too.

Like a search engine: a token counts the more often an example has it and the fewer examples do, and nearness is the
cosine. Similarities are dense, 4 bytes for each pair of examples (10,000: 0.4 GB).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from packlib.collators import IGNORE_INDEX
from packlib.lab.data.corpora import METADATA, Corpus


def _counts(corpus: Corpus, *, shown: bool = False) -> csr_matrix:
    """How often each example has each token id, [examples, vocabulary]. shown: count tokens without a label only."""
    ids, splits = corpus._flat("input_ids").copy(), np.concatenate([[0], np.cumsum(corpus.lengths)])
    counted = corpus._flat("labels") == IGNORE_INDEX if shown else np.ones(len(ids))
    counts = csr_matrix((counted.astype(np.float32), ids, splits), shape=(len(corpus.lengths), corpus.vocab_size))
    counts.sum_duplicates()
    counts.eliminate_zeros()
    return counts


def _weights(counts: csr_matrix) -> Any:
    from sklearn.feature_extraction.text import TfidfTransformer  # a second to import, for the few runs that need it

    return TfidfTransformer(sublinear_tf=True).fit(counts)


def chain(corpus: Corpus, *, seed: int = 0) -> np.ndarray:
    """All examples once, each behind the one that it is nearest to, of those that are left; int64 [examples].

    Begins with an example drawn from `seed`. O(examples²).
    """
    counts = _counts(corpus)
    vectors = _weights(counts).transform(counts).astype(np.float32)
    near = (vectors @ vectors.T).toarray()
    here = int(np.random.default_rng(seed).integers(len(near)))
    order = [here]
    for _ in range(len(near) - 1):
        near[:, here] = -1.0  # it is taken
        here = int(near[here].argmax())
        order.append(here)
    return np.array(order)


def nearest(train: Corpus, held_out: Corpus, count: int) -> np.ndarray:
    """The `count` training examples nearest to each held-out one, the nearest last, int64 [held out, count].

    Nearness counts what a held-out example shows before its answer: the tokens without a label.
    """
    counts = _counts(train)
    weights = _weights(counts)
    near = (weights.transform(_counts(held_out, shown=True)) @ weights.transform(counts).T).toarray()
    return np.argsort(near, axis=1, kind="stable")[:, -count:]


def behind(train: Corpus, held_out: Corpus, shown: np.ndarray) -> Corpus:
    """Held-out examples, each behind the training examples `shown` to it; only its own labels count.

    shown: int64 [held out or more, count], of `nearest`. Raises `ValueError` for fewer.
    """
    if len(shown) < len(held_out.lengths):
        raise ValueError(f"shown has {len(shown)} rows; expected one for each of {len(held_out.lengths)} examples")
    ids, labels, lengths = [], [], []
    for example, those in zip(held_out.dataset, shown):
        before = np.concatenate([train.dataset[int(i)]["input_ids"] for i in those])
        ids += [before, example["input_ids"]]
        labels += [np.full(len(before), IGNORE_INDEX), example["labels"]]
        lengths.append(len(before) + len(example["input_ids"]))
    facts = {name: getattr(held_out, name) for name in METADATA}
    return Corpus.from_arrays(np.concatenate(ids), np.concatenate(labels), np.array(lengths), **facts)
