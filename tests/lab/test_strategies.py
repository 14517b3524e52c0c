"""Every row of the table plans each example exactly once; the capacity is applied once, before planning, and what it costs is counted."""

import argparse
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packlib.collators import IGNORE_INDEX, FlatteningCollator, PaddingCollator
from packlib.lab import figures, strategies
from packlib.lab.corpora import Corpus
from packlib.lab.strategies import STRATEGIES, fit_examples, get_strategy, plan_for

FACTS = {"name": "made", "split": "train", "tokenizer_name": "none", "vocab_size": 10_000, "eos_token_id": 0, "pad_token_id": 0}
WHOLE = [name for name in STRATEGIES if not name.startswith("fixed_length")]  # strategies that never cut an example


def made_corpus(lengths) -> Corpus:
    """Token i of the corpus is i; every third has no label."""
    ids = np.arange(sum(lengths))
    return Corpus.from_arrays(ids, np.where(ids % 3 == 1, IGNORE_INDEX, ids), np.array(lengths), **FACTS)


def tokens(corpus: Corpus, column: str = "input_ids") -> list[list[int]]:
    return [list(example) for example in corpus.dataset[column]]


# capacity


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 45))
@settings(max_examples=60, deadline=None)
def test_no_token_is_lost_uncounted(lengths, max_tokens):
    corpus = made_corpus(lengths)
    for overflow in ("truncate", "split"):
        fitted, lost = fit_examples(corpus, max_tokens, overflow)
        assert fitted.lengths.max() <= max_tokens and (fitted.lengths > 0).all()
        assert fitted.lengths.sum() + lost == corpus.lengths.sum()
        assert [len(ids) for ids in tokens(fitted)] == fitted.lengths.tolist()
        assert fitted.loss_tokens.sum() == sum(label != IGNORE_INDEX for labels in tokens(fitted, "labels") for label in labels[1:])
        for ids, labels in zip(tokens(fitted), tokens(fitted, "labels")):
            assert labels == [IGNORE_INDEX if i % 3 == 1 else i for i in ids], "labels stay with their tokens"
        if overflow == "truncate":
            assert tokens(fitted) == [ids[:max_tokens] for ids in tokens(corpus)]
        else:
            assert lost == 0 and list(chain(*tokens(fitted))) == list(range(sum(lengths))), "the same tokens in the same order"
            assert len(fitted.lengths) == sum(-(-n // max_tokens) for n in lengths), "as few pieces as there can be"
        assert (fitted.sha256 == corpus.sha256) == (max(lengths) <= max_tokens), "other data has another hash"


def test_an_exact_fit_is_left_alone():
    corpus = made_corpus([4, 7, 7])
    for overflow in strategies.OVERFLOW:
        assert fit_examples(corpus, 7, overflow) == (corpus, 0)


def test_a_sliced_data_set_is_cut_where_it_is():
    whole = made_corpus([3, 9, 4, 8])
    corpus = replace(whole, dataset=whole.dataset.select(range(1, 4)), lengths=whole.lengths[1:])
    assert tokens(fit_examples(corpus, 6, "truncate")[0]) == [ids[:6] for ids in tokens(whole)[1:]]


def test_overlong_examples_are_an_error_unless_a_policy_is_given():
    with pytest.raises(ValueError, match=r'lengths\[1\] = 9 exceeds max_tokens = 6 \(2 of 4 examples do\); pass overflow="split" or "truncate"'):
        fit_examples(made_corpus([3, 9, 4, 8]), 6, "error")
    with pytest.raises(ValueError, match=r"unknown overflow policy 'drop'; known: error, split, truncate"):
        fit_examples(made_corpus([3]), 6, "drop")


# plans


@pytest.mark.parametrize("name", STRATEGIES)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 7), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_every_strategy_plans_every_token_once(name, lengths, batch_size, seed):
    strategy, max_tokens = get_strategy(name), 100
    plan = plan_for(strategy, lengths, batch_size=batch_size, max_tokens=max_tokens, seed=seed)
    planned = sorted((segment.example, segment.start, segment.stop) for row in plan for segment in row)
    covered = {example: 0 for example in range(len(lengths))}
    for example, start, stop in planned:  # the pieces of an example join without gap or overlap
        assert start == covered[example] < stop
        covered[example] = stop
    assert list(covered.values()) == lengths
    assert name not in WHOLE or len(planned) == len(lengths), "no example is cut"
    report = plan.report(lengths, strategy.layout)
    assert (report.lost_tokens, report.real_tokens) == (0, sum(lengths))
    assert report.slots == report.real_tokens or strategy.layout == "padded"
    capacity = batch_size * max_tokens if strategy.batched or strategy.trl is not None else max_tokens
    sizes = [[segment.stop - segment.start for segment in row] for row in plan]
    assert max(len(row) * max(row) if strategy.layout == "padded" else sum(row) for row in sizes) <= capacity


@pytest.mark.parametrize("name", STRATEGIES)
def test_plans_follow_the_seed(name):
    lengths = np.random.default_rng(0).integers(1, 100, 200)
    first, again, other = (plan_for(get_strategy(name), lengths, batch_size=4, max_tokens=100, seed=seed) for seed in (1, 1, 2))
    assert first.sha256 == again.sha256 and list(first) != list(other)


@pytest.mark.parametrize(("left", "right"), [("padding", "minibatch_packing"), ("fixed_length_packing", "fixed_length_packing_posid")])
def test_arms_that_differ_in_one_thing_share_their_rows(left, right):
    lengths = np.random.default_rng(0).integers(1, 100, 200)
    left_plan, right_plan, grouped = (
        plan_for(get_strategy(name), lengths, batch_size=4, max_tokens=100, seed=1) for name in (left, right, "group_by_length")
    )
    assert left_plan.sha256 == right_plan.sha256 != grouped.sha256
    assert (STRATEGIES[left].layout, STRATEGIES[left].boundary) != (STRATEGIES[right].layout, STRATEGIES[right].boundary)


def test_only_fixed_length_packing_is_contaminated_on_purpose():
    assert [name for name, strategy in STRATEGIES.items() if strategy.contaminated] == ["fixed_length_packing"]
    for strategy in STRATEGIES.values():
        collator = strategy.collator(pad_token_id=9)
        assert isinstance(collator, PaddingCollator if strategy.layout == "padded" else FlatteningCollator)
    features = [{"input_ids": [1, 2, 3, 4], "seq_lengths": [3, 1]}]
    for name, ends in (("fixed_length_packing", [0, 4]), ("fixed_length_packing_posid", [0, 3, 4])):
        assert get_strategy(name).collator(0)(features)["cu_seq_lens_q"].tolist() == ends


def test_a_row_of_the_table_is_a_micro_batch_or_a_row():
    rows = {name: strategy.rows_per_batch(4) for name, strategy in STRATEGIES.items()}
    assert {name for name, n in rows.items() if n == 4} == {name for name in STRATEGIES if name.startswith(("fixed_length", "trl"))}
    assert set(rows.values()) == {1, 4}


def test_overlong_examples_are_not_planned():
    for name in STRATEGIES:
        with pytest.raises(ValueError, match=r"lengths\[1\] = 101 exceeds max_tokens = 100"):
            plan_for(get_strategy(name), [5, 101, 300], batch_size=4, max_tokens=100, seed=0)


def test_unknown_strategies_are_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown strategy 'multipack' \(did you mean 'multipack_posid'\?\); known: dynapipe, .*trl_padding_free"):
        get_strategy("multipack")


def test_every_strategy_is_listed_and_has_a_look_of_its_own():
    lines = strategies.command(argparse.Namespace()).splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(STRATEGIES)
    assert [line.split()[0] for line in lines if line.endswith("contaminated on purpose")] == ["fixed_length_packing"]
    assert len({figures.style(name) for name in STRATEGIES}) == len(STRATEGIES)
    assert len({strategy.label for strategy in STRATEGIES.values()}) == len(STRATEGIES)
