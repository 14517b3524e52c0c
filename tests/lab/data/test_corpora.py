"""Corpora: contents, splits, formats, loss masks, errors, caches. The Hub is mocked at datasets.load_dataset."""

import ast
import dataclasses
import functools
import gzip
import json
import re
from itertools import chain, islice

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packlib.lab.data import corpora, tokenizers
from packlib.lab.data.corpora import (
    CORPORA,
    IGNORE_INDEX,
    Corpus,
    content_sha256,
    load_corpus,
    load_tokenizer,
    located,
)
from packlib.lab.runs.spec import RunSpec
from packlib.lab.strategies import get_strategy


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of this module's own, of corpora a fifth as large: nothing comes from earlier runs."""
    folder, modules = tmp_path_factory.mktemp("cache"), corpora._modules
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACKLIB_CACHE", str(folder))
        patch.setattr(corpora, "_modules", lambda: islice(modules(), 0, None, 5))
        patch.setitem(CORPORA, "arithmetic", functools.partial(CORPORA["arithmetic"], 1200))
        yield folder


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return str(path)


def questions(count):
    return [{"prompt": f"What is {i} plus {i}?", "response": f"It is {2 * i}."} for i in range(count)]


def waste(lengths, batch_size=4):
    order = np.random.default_rng(0).permutation(len(lengths))[: len(lengths) // batch_size * batch_size]
    return lengths[order].reshape(-1, batch_size).max(1).sum() * batch_size / lengths[order].sum()


def examples(corpus):
    return [tuple(ids) for ids in corpus.dataset["input_ids"]]


# Built-in corpora


@pytest.mark.parametrize("name, low, high", [("pydocs", 1.8, 2.6), ("arithmetic", 1.1, 1.4)])
def test_built_in_corpora_have_their_shapes_and_disjoint_splits(name, low, high):
    train, held_out = load_corpus(name), load_corpus(name, split="eval")
    assert len(train.lengths) >= 800 and len(held_out.lengths) >= 40
    assert low < waste(train.lengths) < high
    assert not set(examples(train)) & set(examples(held_out))
    assert train.lengths.tolist() == [len(ids) for ids in train.dataset["input_ids"]]
    assert {ids[-1] for ids in examples(train)} == {train.eos_token_id}
    assert train.dataset["labels"] == train.dataset["input_ids"]
    assert (train.loss_tokens == train.lengths - 1).all()
    assert max(map(max, examples(held_out))) < train.vocab_size == held_out.vocab_size <= 4096


def test_pysource_holds_long_modules():
    corpus = load_corpus("pysource", limit=20)
    assert len(corpus.lengths) == 20
    assert np.median(corpus.lengths) > 1000
    assert len(load_corpus("pysource", split="eval", limit=10**6).lengths) > 2


def test_pydocs_examples_are_functions_again():
    corpus = load_corpus("pydocs", limit=50, loss="response")
    tokenizer = load_tokenizer("bpe", "pydocs")
    for ids, labels in zip(corpus.dataset["input_ids"], corpus.dataset["labels"]):
        source = tokenizer.decode(ids, skip_special_tokens=True)
        body = tokenizer.decode([i for i in labels if i != IGNORE_INDEX], skip_special_tokens=True)
        (function,) = ast.parse(source).body
        assert ast.get_docstring(function) and source.endswith(body)
        assert "\n".join(source.split("\n")[function.body[0].end_lineno :]).strip("\n") == body


def test_arithmetic_is_right():
    for row in corpora._arithmetic(200):
        *steps, last = row["response"].split("\n")
        have = int(re.search(r"has (\d+)", row["prompt"])[1])
        for step in steps:
            left, sign, right, result = re.search(r": (\d+) ([-+*/]) (\d+) = (\d+)\.$", step).groups()
            assert int(left) == have
            n = int(right)
            have = {"+": have + n, "-": have - n, "*": have * n, "/": have / n}[sign]
            assert have == int(result) > 0
        assert last == f"The answer is {have:.0f}."


def test_same_seed_same_subset_and_another_seed_another_one():
    whole = load_corpus("arithmetic", split="eval")
    first, again, other = (load_corpus("arithmetic", split="eval", limit=40, seed=seed) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256 != other.sha256
    assert set(examples(first)) | set(examples(other)) < set(examples(whole))
    assert set(examples(load_corpus("arithmetic", split="eval", limit=20))) < set(examples(first))


# Local files


def test_plain_and_gzip_give_the_same_tokens_and_split_by_hash_stays_stable(tmp_path):
    plain, packed = (write(tmp_path / f"sums.jsonl{suffix}", questions(200)) for suffix in ("", ".gz"))
    train, held_out = load_corpus(plain), load_corpus(plain, split="eval")
    assert train.name == "sums" and train.sha256 == load_corpus(packed).sha256
    assert len(train.lengths) + len(held_out.lengths) == 200
    assert not set(examples(train)) & set(examples(held_out))
    shorter = write(tmp_path / "half.jsonl", questions(100))
    sizes = [len(load_corpus(path, split="eval", tokenizer="bpe:258").lengths) for path in (plain, shorter)]
    assert 0 < sizes[1] < sizes[0]


def test_split_in_the_path_names_two_files(tmp_path):
    write(tmp_path / "sums_train.jsonl", questions(20))
    write(tmp_path / "sums_eval.jsonl", questions(3))
    path = str(tmp_path / "sums_{split}.jsonl")
    assert [len(load_corpus(path, split=split).lengths) for split in ("train", "eval")] == [20, 3]
    assert load_corpus(path).name == "sums"


def test_response_loss_masks_the_prompt_and_keeps_the_end(tmp_path):
    path = write(tmp_path / "a_{split}.jsonl".replace("{split}", "train"), questions(5))
    path = path.replace("_train", "_{split}")
    tokenizer = load_tokenizer("bpe", path)
    corpus = load_corpus(path, loss="response")
    for i, row in enumerate(questions(5)):
        labels = corpus.dataset[i]["labels"]
        trained = [label for label in labels if label != IGNORE_INDEX]
        assert tokenizer.decode(trained) == row["response"] + "<|end|>"
        assert labels[-len(trained) :] == trained and corpus.loss_tokens[i] == len(trained)
        assert tokenizer.decode(corpus.dataset[i]["input_ids"]) == f"{row['prompt']}\n{row['response']}<|end|>"
    assert (load_corpus(path).loss_tokens > corpus.loss_tokens).all()


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_rows_of_tokens_keep_their_labels_or_are_refused(tmp_path, suffix):
    tokenizers.train_bpe(["some text"], 262).save_pretrained(tmp_path / "tokenizer")

    def load(rows, **options):
        text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
        (tmp_path / f"x_train{suffix}").write_text(text, encoding="utf-8")
        options = {"tokenizer": str(tmp_path / "tokenizer")} | options
        return load_corpus(str(tmp_path / f"x_{{split}}{suffix}"), **options)

    bare, marked = {"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}
    assert tokens(load([bare, bare]), "labels") == [[5, 6, 7], [5, 6, 7]] and load([bare]).name == "x"
    assert tokens(load([marked, marked], loss="response"), "labels") == [[-100, -100, 7]] * 2
    for rows, options, message in (
        ([marked], {}, "line 1 leaves 1 of its 3 tokens without loss, and loss = 'full' would train on them"),
        ([bare], {"loss": "response"}, "line 1 has no labels and no mask"),
        ([{"input_ids": [5, 999]}], {}, "line 1 has token ids from 5 to 999, the tokenizer those below 262"),
        ([bare], {"tokenizer": "bpe"}, "line 1 is tokenized already; expected the tokenizer that made it, not bpe"),
    ):
        with pytest.raises(ValueError, match=message):
            load(rows, **options)


CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello you"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Good night"},
]
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize(
    "template, whole, trained",
    [
        (
            TEMPLATE,
            "[user]Hi<|end|>\n[assistant]Hello you<|end|>\n[user]Bye<|end|>\n[assistant]Good night<|end|>\n",
            "Hello you<|end|>\nGood night<|end|>\n",
        ),
        (
            None,
            "user: Hi\nassistant: Hello you\nuser: Bye\nassistant: Good night\n<|end|>",
            "assistant: Hello you\nassistant: Good night\n<|end|>",
        ),
    ],
)
def test_chats_are_trained_on_the_assistants_turns(tmp_path, template, whole, trained):
    tokenizer = tokenizers.train_bpe(["Hello you, good night"], 280)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write(tmp_path / "chat_train.jsonl", [{"messages": CHAT}])
    path = str(tmp_path / "chat_{split}.jsonl")
    corpus = load_corpus(path, tokenizer=str(tmp_path / "tokenizer"), loss="response")
    assert (corpus.name, corpus.tokenizer_name) == ("chat", "tokenizer")  # records name no folder of a machine
    assert tokenizer.decode(corpus.dataset[0]["input_ids"]) == whole
    assert tokenizer.decode([i for i in corpus.dataset[0]["labels"] if i != IGNORE_INDEX]) == trained


def test_a_tokenizer_with_bos_puts_it_once_in_front(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizers.train_bpe(["some text"], 300)
    tokenizer.bos_token = "<|pad|>"
    bos = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", bos)])
    ids, trained, lengths = tokenizers.tokenize([[("some\n", False), ("text", True)], [("t", True)]], tokenizer)
    assert [list(part).count(bos) for part in np.split(ids, np.cumsum(lengths)[:-1])] == [1, 1]
    assert ids[0] == bos == ids[lengths[0]] and not trained[0] and trained[lengths[0] - 1]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "a", "resp', r"line 3: not JSON"),
        ('{"prompt": "a", "answer": "b"}', r"line 3: expected prompt and response, .*; found .*answer"),
        ('{"prompt": "a", "response": null}', r"line 3: expected prompt and response"),
        ("[1]", r"line 3: expected prompt .*\[1\]"),
        ('{"messages": ["hello"]}', r"line 3: expected prompt and response, messages"),
        ('{"prompt": "a", "response": " "}', r"line 3: empty example"),
        ('{"text": ""}', r"line 3: empty example"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', r"line 3: empty example"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_corpus(str(path))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"name": "pydoc"},
            r"unknown corpus 'pydoc' \(did you mean 'pydocs'\?\); known: arithmetic, flan, .*, hub:ORG/NAME, .jsonl",
        ),
        ({"name": "pydocs", "split": "test"}, r"split = 'test'; expected one of train, eval"),
        ({"name": "pydocs", "loss": "prompt"}, r"loss = 'prompt'; expected one of full, response"),
        ({"name": "pydocs", "limit": 0}, r"limit = 0; expected at least 1"),
        (
            {"name": "arithmetic", "limit": 1, "unlabelled": "all"},
            r"unlabelled = 'all'; expected one of error, drop, keep",
        ),
        ({"name": "arithmetic", "tokenizer": "bpe:many"}, r"tokenizer = 'bpe:many'; expected bpe or bpe:SIZE"),
        ({"name": "arithmetic", "tokenizer": "bpe:100"}, r"vocab_size = 100 is below 258"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(**options)


def test_nothing_left_is_an_error(tmp_path):
    path = write(tmp_path / "one.jsonl", questions(1))
    splits = ["train", "eval"] if not _loads(path, "train") else ["eval"]
    with pytest.raises(ValueError, match=f"has no examples left in split '{splits[0]}'"):
        load_corpus(path, split=splits[0])


def _loads(path, split):
    try:
        return load_corpus(path, split=split)
    except ValueError:
        return None


# Tokenized files


def test_npz_round_trip_subset_and_refusals(tmp_path):
    corpus = load_corpus("arithmetic", split="eval", loss="response")
    corpus.save(tmp_path / "sums_{split}.npz")
    path = str(tmp_path / "sums_{split}.npz")
    again = load_corpus(path, split="eval", loss="response")
    assert again.sha256 == corpus.sha256 and again.name == "arithmetic" and again.vocab_size == corpus.vocab_size
    assert again.dataset["labels"] == corpus.dataset["labels"]
    assert again.lengths.dtype == np.int64 and again.dataset.features == corpus.dataset.features
    part = load_corpus(path, split="eval", loss="response", limit=7, seed=3)
    assert part.sha256 == load_corpus("arithmetic", split="eval", loss="response", limit=7, seed=3).sha256
    with pytest.raises(ValueError, match="holds the split eval, not train"):
        load_corpus(str(tmp_path / "sums_eval.npz"))
    with np.load(tmp_path / "sums_eval.npz") as file:
        arrays = dict(file)
    assert not any("apples" in str(value) for value in arrays.values())
    arrays["input_ids"][0] += 1
    np.savez(tmp_path / "bad_eval.npz", **arrays)
    with pytest.raises(ValueError, match="is damaged"):
        Corpus.load(tmp_path / "bad_eval.npz")


def test_a_saved_mask_is_taken_left_out_or_missed_as_loss_says(tmp_path):
    def loaded(saved, asked):
        corpus = load_corpus("arithmetic", split="eval", loss=saved)
        corpus.save(tmp_path / f"{saved}.npz")
        return load_corpus(str(tmp_path / f"{saved}.npz"), split="eval", loss=asked), corpus

    for saved, asked in (("full", "full"), ("response", "response")):
        again, corpus = loaded(saved, asked)
        assert again.sha256 == corpus.sha256
    whole, masked = loaded("response", "full")
    assert whole.sha256 == load_corpus("arithmetic", split="eval").sha256 != masked.sha256
    assert whole.loss_tokens.sum() > masked.loss_tokens.sum()
    with pytest.raises(ValueError, match="has a label for every token, so that which are the response is not known"):
        loaded("full", "response")


# Examples without a label


def long_prompts(tmp_path):
    """Every other prompt is longer than 24 tokens."""
    rows = [{"prompt": "why " * (30 if i % 2 else 3) + str(i), "response": "because"} for i in range(40)]
    write(tmp_path / "asked_train.jsonl", rows)
    return str(tmp_path / "asked_{split}.jsonl")


def test_examples_without_a_label_are_refused_dropped_or_kept_and_counted(tmp_path):
    path, cut = long_prompts(tmp_path), {"tokenizer": "bpe:258", "max_tokens": 60, "overflow": "truncate"}
    with pytest.raises(ValueError, match=r'20 of 40 examples of asked \(train\) .* is example 1 with 60 .*"drop"'):
        load_corpus(path, loss="response", **cut)
    kept = load_corpus(path, loss="response", unlabelled="keep", **cut)
    dropped = load_corpus(path, loss="response", unlabelled="drop", **cut)
    assert (kept.unlabelled, len(kept.lengths), (kept.loss_tokens == 0).sum()) == (20, 40, 20)
    assert (dropped.unlabelled, len(dropped.lengths), (dropped.loss_tokens == 0).sum()) == (20, 20, 0)
    assert dropped.lost_tokens - kept.lost_tokens == kept.lengths[1::2].sum() == 20 * 60
    assert examples(dropped) == examples(kept)[::2] and dropped.loss_tokens.tolist() == kept.loss_tokens[::2].tolist()
    assert load_corpus(path, **cut).unlabelled == 0, "the negative control: with full loss all have labels"
    with pytest.raises(ValueError, match=r"40 of 40 examples .*: nothing is left"):
        load_corpus(path, loss="response", unlabelled="drop", **cut | {"max_tokens": 5})


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_loss_tokens_of_segments_are_those_of_the_mask(data):
    corpus = made_corpus(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6)))
    example = np.array(data.draw(st.lists(st.integers(0, len(corpus.lengths) - 1), min_size=1, max_size=8)))
    start = np.array([data.draw(st.integers(0, corpus.lengths[i] - 1)) for i in example])
    stop = np.array([data.draw(st.integers(first + 1, corpus.lengths[i])) for i, first in zip(example, start)])
    labels = tokens(corpus, "labels")
    expected = [sum(label != IGNORE_INDEX for label in labels[i][a + 1 : b]) for i, a, b in zip(example, start, stop)]
    assert corpus.predicted(example, start, stop).tolist() == expected


@pytest.mark.parametrize("strategy", ["padding", "minibatch_packing", "fixed_length_packing", "multipack_posid"])
def test_a_records_loss_tokens_are_what_the_collator_keeps(tmp_path, strategy):
    from packlib.lab.runs import worker

    spec = RunSpec(
        corpus=long_prompts(tmp_path),
        tokenizer="bpe:258",
        strategy=strategy,
        max_tokens=60,
        batch_size=4,
        gradient_accumulation=40,
        loss="response",
        unlabelled="keep",
    )
    corpus, table = load_corpus(spec.corpus, **spec.corpus_options), get_strategy(strategy)
    dataset, report = worker.planned(spec, table, corpus)
    kept = sum(int((table.collator(0)([row])["labels"] != IGNORE_INDEX).sum()) for row in dataset)
    assert report["loss_tokens"] == kept > 0 and report["unlabelled_examples"] == 20
    if strategy != "fixed_length_packing":  # which loses the labels of examples that it cuts, too
        assert kept == corpus.loss_tokens.sum()


def test_a_step_without_a_label_is_called_that_before_training(tmp_path):
    from packlib.lab.runs import worker

    asked = {"corpus": long_prompts(tmp_path), "tokenizer": "bpe:258", "max_tokens": 60, "loss": "response"}
    spec = RunSpec(**asked, strategy="padding", batch_size=1, unlabelled="keep")
    corpus = load_corpus(spec.corpus, **spec.corpus_options)
    with pytest.raises(ValueError, match=r"20 of 40 optimiser steps have no loss token, .* max_tokens = 60 is prompt"):
        worker.planned(spec, get_strategy("padding"), corpus)
    together = dataclasses.replace(spec, gradient_accumulation=40)
    worker.planned(together, get_strategy("padding"), corpus)  # the negative control: one step holds them all
    dropped = dataclasses.replace(spec, unlabelled="drop")
    worker.planned(dropped, get_strategy("padding"), load_corpus(spec.corpus, **dropped.corpus_options))


# Capacity


FACTS = {
    "name": "made",
    "split": "train",
    "tokenizer_name": "none",
    "vocab_size": 10_000,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def made_corpus(lengths) -> Corpus:
    """Token i of the corpus is i; every third has no label."""
    ids = np.arange(sum(lengths))
    return Corpus.from_arrays(ids, np.where(ids % 3 == 1, IGNORE_INDEX, ids), np.array(lengths), **FACTS)


def tokens(corpus: Corpus, column: str = "input_ids") -> list[list[int]]:
    return [list(example) for example in corpus.dataset[column]]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 45))
@settings(max_examples=30, deadline=None)
def test_no_token_is_lost_uncounted(lengths, max_tokens):
    corpus = made_corpus(lengths)
    for overflow in ("truncate", "split"):
        fitted = corpus.fit(max_tokens, overflow)
        assert fitted.lengths.max() <= max_tokens and (fitted.lengths > 0).all()
        assert fitted.lengths.sum() + fitted.lost_tokens == corpus.lengths.sum()
        assert [len(ids) for ids in tokens(fitted)] == fitted.lengths.tolist()
        predicted = [label for labels in tokens(fitted, "labels") for label in labels[1:] if label != IGNORE_INDEX]
        assert fitted.loss_tokens.sum() == len(predicted)
        for ids, labels in zip(tokens(fitted), tokens(fitted, "labels")):
            assert labels == [IGNORE_INDEX if i % 3 == 1 else i for i in ids], "labels stay with their tokens"
        if overflow == "truncate":
            assert tokens(fitted) == [ids[:max_tokens] for ids in tokens(corpus)]
        else:
            assert fitted.lost_tokens == 0
            assert list(chain(*tokens(fitted))) == list(range(sum(lengths))), "the same tokens in the same order"
            assert len(fitted.lengths) == sum(-(-n // max_tokens) for n in lengths), "as few pieces as there can be"
        assert (fitted.sha256 == corpus.sha256) == (max(lengths) <= max_tokens), "other data has another hash"


@pytest.mark.parametrize("overflow", ["error", "truncate", "split"])
def test_an_exact_fit_is_left_alone(overflow):
    corpus = made_corpus([4, 7, 7])
    fitted = corpus.fit(7, overflow)
    assert (fitted.sha256, fitted.lost_tokens, fitted.name) == (corpus.sha256, 0, corpus.name)


def test_a_sliced_data_set_is_cut_where_it_is():
    whole = made_corpus([3, 9, 4, 8])
    corpus = dataclasses.replace(whole, dataset=whole.dataset.select(range(1, 4)), lengths=whole.lengths[1:])
    assert tokens(corpus.fit(6, "truncate")) == [ids[:6] for ids in tokens(whole)[1:]]


def test_overlong_examples_are_an_error_unless_a_policy_is_given():
    with pytest.raises(
        ValueError, match=r'lengths\[1\] = 9 exceeds max_tokens = 6; pass overflow="split" or "truncate"'
    ):
        made_corpus([3, 9, 4, 8]).fit(6, "error")
    with pytest.raises(ValueError, match=r"overflow = 'drop'; expected 'error', 'truncate' or 'split'"):
        made_corpus([3]).fit(6, "drop")


def test_a_corpus_is_fitted_as_it_is_loaded():
    whole = load_corpus("arithmetic", split="eval")
    assert whole.lost_tokens == 0 and whole.lengths.max() > 60, "without a capacity nothing is cut"
    with pytest.raises(ValueError, match="exceeds max_tokens = 60"):
        load_corpus("arithmetic", split="eval", max_tokens=60)
    fitted = load_corpus("arithmetic", split="eval", max_tokens=60, overflow="truncate")
    assert fitted.lengths.max() == 60 and fitted.lost_tokens == whole.lengths.sum() - fitted.lengths.sum() > 0


# Content


def test_content_is_that_of_both_splits_wherever_they_lie(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path, tmp_path / "elsewhere"):
        write(folder / "sums_train.jsonl", questions(20))
        write(folder / "sums_eval.jsonl", questions(3))
    first = content_sha256(str(tmp_path / "sums_{split}.jsonl"))
    moved = str(tmp_path / "elsewhere" / "sums_{split}.jsonl")
    assert content_sha256(moved) == first, "it does not matter where"
    write(tmp_path / "elsewhere" / "sums_eval.jsonl", questions(4))
    assert content_sha256(moved) != first, "an edited held-out set is other data"


def test_content_of_built_in_and_tokenized_corpora(tmp_path):
    assert content_sha256("arithmetic") == content_sha256("arithmetic") != content_sha256("pydocs")
    load_corpus("arithmetic", split="eval", limit=5).save(tmp_path / "a.npz")
    load_corpus("arithmetic", split="eval", limit=6).save(tmp_path / "b.npz")
    assert content_sha256(str(tmp_path / "a.npz")) != content_sha256(str(tmp_path / "b.npz"))


def test_a_local_tokenizer_is_part_of_the_content(tmp_path):
    path = write(tmp_path / "sums.jsonl", questions(20))
    for name, text in (("one", "some text"), ("two", "other words")):
        tokenizers.train_bpe([text], 262).save_pretrained(tmp_path / name)
    contents = [content_sha256(path, str(tmp_path / name)) for name in ("one", "two")] + [content_sha256(path, "bpe")]
    assert len(set(contents)) == 3 and content_sha256(path, "bpe:300") == contents[2], "bpe follows from the text"


def test_data_that_are_not_here_have_no_content(tmp_path, monkeypatch):
    def unknown(path, **options):
        raise datasets.exceptions.DatasetNotFoundError("no such data set")

    monkeypatch.setattr(datasets, "load_dataset", unknown)
    for name in (str(tmp_path / "no.jsonl"), str(tmp_path / "no_{split}.npz"), "hub:no/such"):
        assert content_sha256(name) is None
    with pytest.raises(ValueError, match="unknown corpus 'arithmetik'"):
        content_sha256("arithmetik")


def test_specs_name_no_folder(tmp_path, monkeypatch):
    write(tmp_path / "sums.jsonl", questions(20))
    write(tmp_path / "both_train.jsonl", questions(20))
    assert located("sums.jsonl") == "sums.jsonl", "without a folder of data a name is a name"
    monkeypatch.setenv("PACKLIB_DATA", str(tmp_path))
    assert located("sums.jsonl") == str(tmp_path / "sums.jsonl")
    assert located("both_{split}.jsonl") == str(tmp_path / "both_{split}.jsonl")
    assert [located(name) for name in ("arithmetic", "hub:a/b", "bpe:512")] == ["arithmetic", "hub:a/b", "bpe:512"]
    assert load_corpus("sums.jsonl").name == "sums"
    assert content_sha256("sums.jsonl") == content_sha256(str(tmp_path / "sums.jsonl"))


# The Hub


@pytest.fixture
def hub(monkeypatch):
    calls = []

    def install(rows):
        def load_dataset(path, **options):
            assert options.pop("streaming") and options.pop("split") == "train"
            calls.append((path, options))
            return datasets.IterableDataset.from_generator(lambda: iter(rows))

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return install


@pytest.mark.parametrize(
    "name, columns, call",
    [
        ("flan", ("inputs", "targets"), ("Open-Orca/FLAN", {})),
        ("orcamath", ("question", "answer"), ("microsoft/orca-math-word-problems-200k", {})),
        ("stack", ("content",), ("bigcode/the-stack-smol", {"data_dir": "data/python"})),
        ("hub:some/chat", ("messages",), ("some/chat", {})),
    ],
)
def test_hub_presets_stream_once_and_are_cached(hub, name, columns, call):
    values = [[CHAT] if columns == ("messages",) else [f"{column} number {i}" for column in columns] for i in range(64)]
    if columns == ("messages",):
        values = [[[{**turn, "content": f"{turn['content']} {i}"} for turn in CHAT]] for i in range(64)]
    calls = hub([{**dict(zip(columns, value)), "other": 1} for value in values] + [dict.fromkeys(columns, "")])
    sizes = [len(load_corpus(name, split=split, tokenizer="bpe:300").lengths) for split in ("train", "eval", "train")]
    assert sizes[0] + sizes[1] == 64 and sizes[0] == sizes[2]
    assert calls == [call]


def test_hub_subset_is_bounded(hub, monkeypatch):
    monkeypatch.setattr("packlib.lab.data.corpora.HUB_EXAMPLES", 10)
    hub([{"text": f"line {i}"} for i in range(50)])
    assert len(load_corpus("hub:some/lines", tokenizer="bpe:300").lengths) <= 10


def test_hub_without_known_columns_is_an_error_and_not_cached(hub, cache):
    hub([{"audio": "x"}])
    with pytest.raises(ValueError, match=r"hub:some/audio has no example that can be read: .* expected prompt and"):
        load_corpus("hub:some/audio")
    assert not list(cache.glob("hub-some-audio*"))
