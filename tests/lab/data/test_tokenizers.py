"""Tokenizers of every kind: chats get the ids of their template, prompt and response those that follow each other."""

import importlib.util
import json
import os
import struct

import numpy as np
import pytest
from tokenizers import pre_tokenizers
from tokenizers.processors import TemplateProcessing

from packlib.lab.data import tokenizers
from packlib.lab.data.corpora import CORPORA, IGNORE_INDEX, load_corpus


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACKLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


WORDS = ["Hello", "you", "Good", "night", "Hi", "Bye", "kind", "user", "assistant", "system"]


def sentencepiece_model():
    """A model of kind BPE as SentencePiece writes it: three special pieces, all bytes, and the beginnings of WORDS."""

    def piece(text, score, kind):
        name = text.encode()
        body = bytes([0x0A, len(name)]) + name + b"\x15" + struct.pack("<f", score) + bytes([0x18, kind])
        return bytes([0x0A, len(body)]) + body

    kinds = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{i:02X}>", 6) for i in range(256))]
    words = [f"▁{word}" for word in WORDS] + WORDS
    parts = dict.fromkeys(word[:k] for word in words for k in range(2, len(word) + 1))
    pieces = [piece(text, 0.0, kind) for text, kind in kinds]
    pieces += [piece(text, -float(i), 1) for i, text in enumerate([*parts, *sorted(set("".join(words)))])]
    return b"".join(pieces) + b"\x12\x02\x18\x02"  # another field: how it was trained


def prepend():
    return tokenizers.from_sentencepiece(sentencepiece_model())


def metaspace():
    tokenizer = prepend()
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def two_prefix_tokens():
    tokenizer = tokenizers.train_bpe(WORDS, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[gMASK]", "<sop>"]})
    ids = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    prefix = list(zip(["[gMASK]", "<sop>"], ids))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=prefix)
    return tokenizer


def without_bos():
    return tokenizers.train_bpe(WORDS, 300)


KINDS = {
    "prepend": (prepend, "{{ bos_token }}"),
    "metaspace": (metaspace, "{{ bos_token }}"),
    "no BOS in the template": (prepend, ""),
    "two prefix tokens": (two_prefix_tokens, "[gMASK]<sop>"),
    "no BOS": (without_bos, ""),
}
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
BLOCKS = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
USER, ASSISTANT = {"role": "user", "content": " Hi you"}, {"role": "assistant", "content": "Hello you"}
CHATS = {
    "two turns": [
        USER,
        ASSISTANT,
        {"role": "user", "content": "Bye\n"},
        {"role": "assistant", "content": "Good night"},
    ],
    "a system turn first": [{"role": "system", "content": "kind"}, USER, ASSISTANT],
    "an assistant turn first": [ASSISTANT, USER, {"role": "assistant", "content": " Hi"}],
}


def saved(tokenizer, folder, template):
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path).replace("_train", "_{split}")


def trained_text(corpus, i, tokenizer):
    return tokenizer.decode([label for label in corpus.dataset[i]["labels"] if label != IGNORE_INDEX])


@pytest.mark.parametrize("kind", KINDS)
def test_chats_have_the_ids_of_their_template(tmp_path, kind):
    make, head = KINDS[kind]
    tokenizer = make()
    folder = saved(tokenizer, tmp_path / "tokenizer", head + TEMPLATE)
    path = written(tmp_path / "chats_train.jsonl", [{"messages": chat} for chat in CHATS.values()])
    for loss in ("full", "response"):
        corpus = load_corpus(path, tokenizer=folder, loss=loss)
        for i, chat in enumerate(CHATS.values()):
            ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
            assert corpus.dataset[i]["input_ids"] == ids
            if loss == "response":
                text = "".join(f"{m['content']}{tokenizer.eos_token}\n" for m in chat if m["role"] == "assistant")
                assert trained_text(corpus, i, tokenizer).replace(" ", "") == text.replace(" ", "")
    first, second, whole = tokenizer(["[user]", "Hi", "[user]Hi"], add_special_tokens=False)["input_ids"]
    assert (first + second != whole) == (make in (prepend, metaspace)), "piece by piece they get a space too many"


def test_the_templates_own_blocks_say_what_is_trained_on(tmp_path):
    tokenizer = without_bos()
    folder = saved(tokenizer, tmp_path / "tokenizer", BLOCKS)
    path = written(tmp_path / "chats_train.jsonl", [{"messages": CHATS["two turns"]}])
    corpus = load_corpus(path, tokenizer=folder, loss="response")
    assert trained_text(corpus, 0, tokenizer) == "Hello you<|end|>Good night<|end|>"
    assert corpus.loss_tokens[0] < load_corpus(path, tokenizer=folder).loss_tokens[0]


CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add"}}]}


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("{{ raise_exception('alternate!') }}", [USER, ASSISTANT], "cannot write it .*alternate!"),
        (TEMPLATE, [USER, CALL, ASSISTANT], "has tool_calls, which the chat template leaves out"),
        (
            "{% for m in messages %}{% if loop.last %}!{% endif %}{{ m['content'] }}{% endfor %}",
            [USER, ASSISTANT],
            "which tokens are the response cannot be told; expected loss = 'full'",
        ),
        (
            "{% for m in messages %}{% endfor %}{% if false %}{% generation %}{% endgeneration %}{% endif %}",
            [USER, ASSISTANT],
            "empty example: the chat template writes nothing",
        ),
    ],
)
def test_a_chat_that_a_template_cannot_write_is_named_by_its_line(tmp_path, template, messages, message):
    folder = saved(without_bos(), tmp_path / "tokenizer", template)
    path = written(tmp_path / "chats_train.jsonl", [{"messages": messages}])
    with pytest.raises(ValueError, match=f"chats_train.jsonl, line 1.*{message}"):
        load_corpus(path, tokenizer=folder, loss="response")


def test_a_template_that_writes_calls_is_given_them(tmp_path):
    calls = (
        "{% for m in messages %}{{ m['content'] }}{% for c in m.tool_calls or [] %}<{{ c.function.name }}>{% endfor %}"
    )
    tokenizer = without_bos()
    folder = saved(tokenizer, tmp_path / "tokenizer", calls + "{% endfor %}")
    path = written(tmp_path / "chats_train.jsonl", [{"messages": [USER, CALL, ASSISTANT]}])
    assert "<add>" in tokenizer.decode(load_corpus(path, tokenizer=folder).dataset[0]["input_ids"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_goes_on_where_its_prompt_ends(kind):
    tokenizer = KINDS[kind][0]()
    ids, trained, lengths = tokenizers.tokenize([[("Hi you\n", False), ("Hello", True)]], tokenizer)
    whole = tokenizer("Hi you\nHello")["input_ids"] + [tokenizer.eos_token_id]
    assert ids.tolist() == whole and lengths.tolist() == [len(whole)]
    assert tokenizer.decode(ids[trained]) == f"Hello{tokenizer.eos_token}"
    apart = tokenizer("Hello", add_special_tokens=False)["input_ids"]
    assert (apart == ids[trained][:-1].tolist()) == (kind in ("two prefix tokens", "no BOS")), "the negative control"


@pytest.mark.parametrize("order", [1, -1])
def test_what_goes_around_a_text_is_decided_text_by_text(order):
    tokenizer = prepend()
    texts = ["<s>Hi", "Hello", "you</s>"][::order]
    ids, _, lengths = tokenizers.tokenize([[(text, True)] for text in texts], tokenizer)
    for text, part in zip(texts, np.split(ids, np.cumsum(lengths)[:-1])):
        assert [part.tolist().count(i) for i in (1, 2)] == [1, 1] and part[0] == 1 and part[-1] == 2, text


def test_a_slow_tokenizer_that_begins_texts_otherwise_is_refused():
    class Slow:
        is_fast, name_or_path, eos_token_id = False, "slow", 9

        def __init__(self, prefix):
            self.prefix = prefix

        def __call__(self, texts, add_special_tokens):
            one = isinstance(texts, str)
            ids = [[*self.prefix, *text.encode()] for text in ([texts] if one else texts)]
            return {"input_ids": ids[0] if one else ids}

    examples = [[("ab", False), ("c", True)]]
    assert tokenizers.tokenize(examples, Slow([]))[0].tolist() == [97, 98, 99, 9]
    with pytest.raises(ValueError, match="tokenizer 'slow' begins every text otherwise than it goes on"):
        tokenizers.tokenize(examples, Slow([1]))


def test_bpe_is_trained_once_and_written_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("PACKLIB_CACHE", str(tmp_path))
    replace, texts = os.replace, ["a short text about packing"] * 3

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        tokenizers.train_bpe(texts, 270)
    assert not list(tmp_path.glob("*.json"))
    monkeypatch.setattr(os, "replace", replace)
    first = tokenizers.train_bpe(texts, 270)
    monkeypatch.setattr(tokenizers, "Tokenizer", None)  # training again would fail
    assert tokenizers.train_bpe(texts, 270)("packing")["input_ids"] == first("packing")["input_ids"]
    with pytest.raises(TypeError):
        tokenizers.train_bpe([*texts, "more"], 270)
    assert len(first) == 270


def test_tokenizers_without_eos_or_package_say_so(monkeypatch, tmp_path):
    bare = tokenizers.train_bpe(["x"], 258)
    bare.eos_token = None
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"tokenizer '.*bare' has no EOS token"):
        tokenizers.open_tokenizer(str(tmp_path / "bare"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps mistral-common"):
        tokenizers.open_tokenizer("mistral")


def test_gguf_tokenizer_is_asked_for_by_folder_and_file(monkeypatch):
    asked = []

    def from_pretrained(folder, gguf_file):
        asked.append((folder, gguf_file))
        return tokenizers.train_bpe(["x"], 258)

    monkeypatch.setattr(tokenizers.AutoTokenizer, "from_pretrained", from_pretrained)
    tokenizers.open_tokenizer("/models/small.gguf")
    assert asked == [("/models", "small.gguf")]


def test_a_sentencepiece_model_gives_the_ids_of_sentencepiece():
    tokenizer = prepend()
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<0x00>"]) == [0, 1, 2, 3]
    texts = ["Hello you", "  Hi\n\tyou é ☃ 😀", "nightnight", " Good", "Hello</s>"]
    pieces = ["▁Hello", "▁you"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("Hello you", add_special_tokens=False)["input_ids"]) == pieces
    for text in texts:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    with pytest.raises(ValueError, match="no SentencePiece model: it has no pieces"):
        tokenizers.from_sentencepiece(b"")


def test_mistral_tokenizer_gives_the_ids_of_sentencepiece():
    sentencepiece = pytest.importorskip("sentencepiece")
    package = importlib.util.find_spec("mistral_common")
    if package is None:
        pytest.skip("mistral-common is not installed")
    file = os.path.join(os.path.dirname(package.origin), "data/tokenizer.model.v1")
    model = sentencepiece.SentencePieceProcessor(model_file=file)
    tokenizer = tokenizers.open_tokenizer("mistral")
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) == (32000, 1, 2)
    texts = ["One.  Two", "  def f(x):\n\treturn x ** 2  # é ☃ 😀", " lead", "3.14159", "a\n\n\nb", "x" * 50]
    texts += [row["prompt"] + row["response"] for row in CORPORA["arithmetic"](50)]
    for text in texts:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == model.encode(text)
        assert tokenizer.decode(model.encode(text)) == text
    assert tokenizer("a")["input_ids"][0] == 1
