"""Validation loss is Σ loss / Σ tokens on isolated examples; the exact match reads the last number of an answer."""

import numpy as np
import pytest
import torch

from packlib.attention import register_attention
from packlib.collators import IGNORE_INDEX, FlatteningCollator
from packlib.lab.data.corpora import Corpus, load_corpus, load_tokenizer
from packlib.lab.models import build_model
from packlib.lab.runs.evaluation import evaluate, exact_match, final_number

LENGTHS = np.array([3, 9, 2, 17, 5, 11])
FACTS = {
    "name": "made",
    "split": "eval",
    "tokenizer_name": "none",
    "vocab_size": 50,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def made_corpus(masked: tuple[int, ...] = ()) -> Corpus:
    ids = np.random.default_rng(0).integers(1, 50, LENGTHS.sum())
    owner = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    return Corpus.from_arrays(ids, np.where(np.isin(owner, masked), IGNORE_INDEX, ids), LENGTHS, **FACTS)


def model(attention: str = "sdpa"):
    return build_model("tiny-llama", attn_implementation=attention, vocab_size=50, layers=2)


def one_at_a_time(llama, corpus: Corpus) -> list[torch.Tensor]:
    """Loss of every predicted token, example by example: the slow obvious version."""
    found = []
    for example in corpus.dataset:
        ids = torch.tensor([example["input_ids"]])
        with torch.no_grad():
            logits = llama.eval()(input_ids=ids, use_cache=False).logits[0, :-1]
        found.append(torch.nn.functional.cross_entropy(logits.double(), ids[0, 1:], reduction="none"))
    return found


@pytest.mark.parametrize("max_slots", [1, 20, 8192])
@pytest.mark.parametrize("attention", ["sdpa", "packlib_varlen"])
def test_both_losses_are_those_of_one_example_at_a_time(max_slots, attention):
    if attention == "packlib_varlen":
        register_attention("sdpa", attention)
    corpus, llama = made_corpus(), model(attention)
    expected = one_at_a_time(model(), corpus)
    result = evaluate(llama.train(), corpus, max_slots=max_slots)
    assert result["eval_loss_per_token"] == pytest.approx(float(torch.cat(expected).mean()), abs=1e-5)
    assert result["eval_loss_per_example"] == pytest.approx(
        float(torch.stack([e.mean() for e in expected]).mean()), abs=1e-5
    )
    assert result["eval_loss_per_token"] != pytest.approx(result["eval_loss_per_example"], abs=1e-4)
    assert (result["eval_tokens"], result["eval_examples"]) == ((LENGTHS - 1).sum(), len(LENGTHS))
    assert llama.training and "eval_loss_by_position" not in result


@pytest.mark.parametrize("max_slots", [20, 8192])
def test_loss_by_position_is_that_of_the_tokens_there(max_slots):
    """Octaves from the first predicted token on, whatever else is in the batch; and the longest examples alone."""
    corpus, llama = made_corpus(masked=(1,)), model()
    expected = [losses for i, losses in enumerate(one_at_a_time(llama, corpus)) if i != 1]
    result = evaluate(llama, corpus, max_slots=max_slots, by_position=True)
    octaves = {1: (1, 2), 2: (2, 4), 4: (4, 8), 8: (8, 16), 16: (16, 32)}
    assert [first for first, *_ in result["eval_loss_by_position"]] == list(octaves)
    for first, loss, tokens in result["eval_loss_by_position"]:
        begin, end = octaves[first]
        there = torch.cat([losses[begin - 1 : end - 1] for losses in expected])
        assert tokens == len(there) and loss == pytest.approx(float(there.mean()), abs=1e-5)
        shifted = torch.cat([losses[begin:end] for losses in expected])
        assert first == 1 or loss != pytest.approx(float(shifted.mean()), abs=1e-4), "the negative control"
    assert result["eval_loss_longest"] == pytest.approx(float(expected[2].mean()), abs=1e-5)
    assert evaluate(llama, made_corpus(masked=(3,)), by_position=True)["eval_loss_longest"] is None


def test_examples_that_see_each_other_have_another_loss():
    corpus, llama = made_corpus(), model(register_attention("sdpa"))
    batch = FlatteningCollator(boundary="row")(
        [{"input_ids": [i for e in corpus.dataset for i in e["input_ids"]], "seq_lengths": LENGTHS.tolist()}]
    )
    leaky = llama(**batch | {"use_cache": False}).loss.item()
    assert abs(leaky - evaluate(llama, corpus)["eval_loss_per_token"]) > 1e-4


def test_an_example_without_loss_tokens_counts_nowhere():
    llama, whole, masked = model(), made_corpus(), made_corpus(masked=(1, 3))
    expected = one_at_a_time(llama, whole)
    result = evaluate(llama, masked)
    assert (result["eval_examples"], result["eval_tokens"]) == (4, int((LENGTHS - 1).sum() - 8 - 16))
    assert result["eval_loss_per_token"] == pytest.approx(
        float(torch.cat([expected[i] for i in (0, 2, 4, 5)]).mean()), abs=1e-5
    )


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7", 7),
        ("#### 1,007", 1007),
        ("it is -2.50.", -2.5),
        ("18 apples, 2 left", 2),
        ("no answer", None),
        ("The answer is 5.", 5),
    ],
)
def test_the_answer_is_the_last_number(text, number):
    assert final_number(text) == number


def arithmetic(limit: int = 6, loss: str = "response"):
    return load_corpus("arithmetic", split="eval", tokenizer="bpe:512", loss=loss, limit=limit), load_tokenizer(
        "bpe:512", "arithmetic"
    )


def test_exact_match_counts_right_answers(monkeypatch):
    corpus, tokenizer = arithmetic()
    llama = build_model("tiny-llama", vocab_size=corpus.vocab_size, layers=1)
    answers = [[i for i, label in zip(e["input_ids"], e["labels"]) if label != IGNORE_INDEX] for e in corpus.dataset]
    wrong = tokenizer("The answer is 0.")["input_ids"]

    def generate(input_ids, attention_mask, **_):
        first = generate.calls * 4
        generate.calls += 1
        rows = []
        for i, (ids, mask) in enumerate(zip(input_ids, attention_mask), first):
            prompt = ids[mask.bool()].tolist()
            assert prompt == corpus.dataset[i]["input_ids"][: len(prompt)] and mask[-1] == 1  # padded on the left
            answer = answers[i] if i % 2 == 0 else wrong
            rows.append(torch.tensor(ids.tolist() + answer + [corpus.pad_token_id] * (200 - len(answer))))
        return torch.stack(rows)

    generate.calls = 0
    monkeypatch.setattr(llama, "generate", generate)
    assert exact_match(llama, corpus, tokenizer, batch_size=4) == {"exact_match": 0.5, "generated_examples": 6}


def test_exact_match_generates_from_a_model_that_trains_on_varlen_kernels():
    corpus, tokenizer = arithmetic(2)
    llama = build_model(
        "tiny-llama", attn_implementation=register_attention("sdpa"), vocab_size=corpus.vocab_size, layers=1
    )
    result = exact_match(llama, corpus, tokenizer, max_new_tokens=3)
    assert result == {"exact_match": 0.0, "generated_examples": 2}
    assert (llama.config._attn_implementation, llama.config.use_cache, llama.training) == (
        "packlib_varlen",
        False,
        True,
    )


def test_exact_match_wants_prompts():
    corpus, tokenizer = arithmetic(2, loss="full")
    with pytest.raises(
        ValueError, match=r'example 0 of arithmetic has loss from its first token on; .*loss="response"'
    ):
        exact_match(build_model("tiny-llama", vocab_size=corpus.vocab_size, layers=1), corpus, tokenizer)
