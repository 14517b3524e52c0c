"""What a run is handed: exactly constant examples, rows in an order that is asked for, examples cut by the plan."""

from dataclasses import replace

import numpy as np
import pytest

from packlib.lab.data import neighbours
from packlib.lab.data.corpora import load_corpus
from packlib.lab.runs import worker
from packlib.lab.runs.spec import RunSpec
from packlib.lab.strategies import get_strategy

BASE = RunSpec(corpus="arithmetic", tokenizer="bpe:512", limit=50, batch_size=2, max_tokens=512, loss="response")


def planned(**changes):
    """(lengths of the examples in each row, the report, the corpus)."""
    spec = replace(BASE, **changes)
    corpus = load_corpus(spec.corpus, **spec.corpus_options)
    dataset, report = worker.planned(spec, get_strategy(spec.strategy), corpus)
    return [list(map(int, row["seq_lengths"])) for row in dataset], report, corpus


def test_steps_hold_exactly_as_many_examples_as_paddings():
    per_step = {"strategy": "multipack_posid", "batch_size": 1, "examples_per_step": 8}
    exact, report, corpus = planned(**per_step, split_rows=True)
    counts = sorted(map(len, exact))
    assert counts == [2] + [8] * 6, "as many steps as padding takes of 50 examples"
    assert sorted(n for row in exact for n in row) == sorted(corpus.lengths.tolist()) and not report["lost_tokens"]
    about, *_ = planned(**per_step | {"examples_per_step": 3})
    assert not set(map(len, about)) <= {2, 3}, "the negative control: rows that stay whole hold more"


def test_rows_come_in_the_order_that_is_asked_for():
    means = {}
    for order in ("planned", "long_first", "long_last"):
        rows, *_ = planned(strategy="multipack_posid", batch_size=1, order=order)
        means[order] = [np.mean(row) for row in rows]
    assert means["long_first"] == sorted(means["planned"], reverse=True)
    assert means["long_last"] == sorted(means["planned"])
    assert means["planned"] not in (means["long_first"], means["long_last"]), "the negative control"


def test_a_stream_of_neighbours_is_their_chain():
    spec = replace(BASE, strategy="fixed_length_packing_posid", order="neighbours", max_tokens=10**6, seed=3)
    corpus = load_corpus(spec.corpus, **spec.corpus_options)
    (row,), _ = worker.planned(spec, get_strategy(spec.strategy), corpus)
    order = neighbours.chain(corpus, seed=3)
    assert list(row["seq_lengths"]) == corpus.lengths[order].tolist() != corpus.lengths.tolist()
    with pytest.raises(TypeError, match="order"):
        planned(strategy="multipack_posid", order="neighbours")


@pytest.mark.parametrize("strategy", ["fixed_length_packing_posid", "best_fit_crop_posid"])
def test_a_strategy_that_cuts_gets_long_examples_whole(strategy):
    short = {"strategy": strategy, "max_tokens": 40, "unlabelled": "keep", "gradient_accumulation": 50}
    rows, report, corpus = planned(**short, overflow="cut")
    assert corpus.lengths.max() > 40 and max(map(sum, rows)) == 40
    assert (report["lost_tokens"] == 0) == (strategy == "fixed_length_packing_posid")
    assert sum(map(sum, rows)) + report["lost_tokens"] == corpus.lengths.sum()
    truncated = planned(**short, overflow="truncate")
    assert truncated[2].lengths.max() == 40 and truncated[1]["lost_tokens"] > 0, "the negative control"
    with pytest.raises(ValueError, match=r"exceeds max_tokens = 40; cut it first"):
        planned(**short | {"strategy": "multipack_posid"}, overflow="cut")


def test_longaligns_denominator_is_the_mean_of_a_step():
    rows, report, _ = planned(strategy="multipack_posid", batch_size=1, weighting="longalign")
    assert report["labelled_examples_per_step"] == pytest.approx(50 / len(rows))


def test_ranks_have_equal_work_unless_rows_shall_come_as_they_are():
    def uneven(**changes):
        rows, *_ = planned(strategy="minibatch_packing", limit=48, **changes)
        work = np.array([sum(n * n for n in row) for row in rows])
        pairs = work[: len(work) // 2 * 2].reshape(-1, 2)
        return float(np.abs(pairs[:, 0] - pairs[:, 1]).mean()), sorted(map(tuple, rows))

    (balanced, rows), (dealt, same) = uneven(world_size=2), uneven(world_size=2, balance=False)
    assert rows == same and balanced < dealt == uneven()[0]
