"""Tokenizers by name: byte-level BPE trained on the corpus, a Hugging Face name or folder, a .gguf file, or Mistral's.

The corpus's own BPE needs no network, and its 4096 entries keep a tiny model's embedding small. It is trained once
(seconds) and cached by the hash of its text; the cache is written atomically, so that processes may share it.
"""

import hashlib
import importlib.util
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from packlib.atomic import atomic_write
from packlib.lab.data.chats import write_chat
from packlib.lab.data.sources import Chat, Piece
from packlib.lab.parameters import check_pretrained
from packlib.lab.records import cache_folder

BPE_VOCAB = 4096


def train_bpe(texts: Sequence[str], vocab_size: int = BPE_VOCAB) -> PreTrainedTokenizerFast:
    """Byte-level BPE of these texts with EOS `<|end|>` and pad `<|pad|>`: vocab_size entries, fewer for little text.

    Raises ValueError for a vocab_size below the 256 bytes and 2 special tokens.

    >>> tokenizer = train_bpe(["one two one two"], 260)
    >>> tokenizer.decode(tokenizer("one ö")["input_ids"])
    'one ö'
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size = {vocab_size} is below 258 (256 bytes and 2 special tokens)")
    digest = hashlib.sha256(str(vocab_size).encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    path = cache_folder() / f"bpe-{digest.hexdigest()[:24]}.json"
    if not path.exists():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|end|>", "<|pad|>"],
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        with atomic_write(path) as file:
            file.write(bpe.to_str())
    return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|end|>", pad_token="<|pad|>")


def open_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """An existing tokenizer: Hugging Face name, folder, path of a .gguf file, or `mistral`; pad falls back to EOS.

    Raises ValueError when it has no EOS token, with which every example ends.
    """
    if name == "mistral":
        tokenizer: PreTrainedTokenizerBase = _mistral()
    elif name.endswith(".gguf"):
        tokenizer = AutoTokenizer.from_pretrained(str(Path(name).parent), gguf_file=Path(name).name)
    else:
        check_pretrained("tokenizer", name, ("bpe", "bpe:SIZE", "mistral"))
        tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name!r} has no EOS token; set tokenizer.eos_token and save it to a folder")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenize(examples: Sequence[Sequence[Piece]], tokenizer: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Examples of pieces `(text, trained)` -> ids int32 and trained bool `[tokens]`, lengths int64 `[examples]`.

    Pieces are tokenized apart, as a prompt and what follows it are at inference, and only the first with the space that
    some tokenizers put before a text. What the tokenizer puts around a text goes around each example that does not have
    it, and EOS behind it (trained).
    Raises ValueError for several pieces and a tokenizer that cannot leave out that space.

    >>> ids, trained, lengths = tokenize([[("ab", False), ("c", True)]], train_bpe(["abc"], 258))
    >>> len(ids), trained.tolist(), lengths.tolist()
    (4, [False, False, True, True], [4])
    """
    before, behind = _put_around("".join(text for text, _ in examples[0])[:100], tokenizer)
    continued = _without_prefix(tokenizer) if any(len(pieces) > 1 for pieces in examples) else None
    rows = []
    for begin in range(0, len(examples), CHUNK):
        chunk = examples[begin : begin + CHUNK]
        firsts = tokenizer([pieces[0][0] for pieces in chunk], add_special_tokens=False)["input_ids"]
        others = iter(continued([text for pieces in chunk for text, _ in pieces[1:]]) if continued else ())
        for pieces, first in zip(chunk, firsts):
            parts = [first, *(next(others) for _ in pieces[1:])]
            ids = np.concatenate([np.array(part, np.int32) for part in parts])
            head = before[: 0 if np.array_equal(ids[: len(before)], before) else None]
            tail = behind[: 0 if np.array_equal(ids[len(ids) - len(behind) :], behind) else None]
            if not np.array_equal(np.concatenate([ids, tail])[-1:], [tokenizer.eos_token_id]):
                tail = np.append(tail, tokenizer.eos_token_id)
            kinds = [False, *(trained for _, trained in pieces), True]
            mask = np.repeat(kinds, [len(head), *map(len, parts), len(tail)])
            rows.append((np.concatenate([head, ids, tail]), mask))
    return _arrays(rows)


def tokenize_chats(
    chats: Sequence[Chat], tokenizer: Any, *, response: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chats -> what `tokenize` returns: the ids of `tokenizer.apply_chat_template(messages, tokenize=True)`, no others.

    response: only the assistant's turns are trained; otherwise all is, and no turn is looked for. A turn is what the
    template puts into `{% generation %}` blocks; in a template without them, what a chat up to this turn has behind its
    generation prompt.
    Raises ValueError naming file and line: for what the template cannot write, and what it leaves out (tools, their
    calls); and where turns cannot be told exactly, since the template writes them otherwise in a longer chat, or a
    token spans the begin or end of one. Of blocks, every token is trained that holds a character.
    """
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        raise ValueError(
            f"{type(tokenizer).__name__} writes chats without a template; expected a tokenizer that has one"
        )
    rows = []
    for begin in range(0, len(chats), CHUNK):
        chunk = chats[begin : begin + CHUNK]
        written = [write_chat(chat, tokenizer, turns=response) for chat in chunk]
        for chat, (text, turns, blocks), encoded in zip(
            chunk, written, _encode([text for text, *_ in written], tokenizer, offsets=response)
        ):
            trained = np.full(len(encoded.ids), not response)
            for turn in turns:
                span = encoded.span(*turn, touching=blocks)
                if span is None:
                    raise ValueError(
                        f"{chat.where}: a token spans the begin or end of the turn {text[slice(*turn)][:60]!r}, so "
                        "which tokens are the response cannot be told; expected loss = 'full', or another template"
                    )
                trained[span] = True
            if not len(trained):
                raise ValueError(f"{chat.where}: empty example: the chat template writes nothing")
            rows.append((encoded.ids, trained))
    return _arrays(rows)


CHUNK = 1024  # texts that the tokenizer is given at a time: their offsets are Python objects


def _arrays(rows: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids, masks = zip(*rows, strict=True)
    return np.concatenate(ids).astype(np.int32), np.concatenate(masks), np.array([len(row) for row in ids])


@dataclass(frozen=True)
class _Encoded:
    """A text and its tokens. ids: int32 `[tokens]`; offsets: int64 `[tokens, 2]`, characters, where they were asked for
    and the tokenizer knows them.
    """

    text: str
    ids: np.ndarray
    offsets: np.ndarray | None
    tokenizer: Any

    def cut(self, position: int) -> int | None:
        """How many tokens the text up to `position` is; None where one spans it."""
        if position in (0, len(self.text)):
            return len(self.ids) if position else 0
        if self.offsets is not None:
            begins, ends = self.offsets.T
            count = int(np.searchsorted(np.minimum.accumulate(begins[::-1])[::-1], position))
            if count and ends[:count].max() == position:
                return count
        # Some characters have no token, or offsets leave them out: what the text is on its own tells.
        alone = self.tokenizer(self.text[:position], add_special_tokens=False)["input_ids"]
        return len(alone) if np.array_equal(self.ids[: len(alone)], alone) else None

    def span(self, begin: int, end: int, *, touching: bool) -> slice | None:
        """The tokens of these characters; None where one spans their begin or end, unless it may (`touching`)."""
        first, last = self.cut(begin), self.cut(end)
        if touching and self.offsets is not None and (first is None or last is None):
            holding = np.flatnonzero((self.offsets[:, 0] < end) & (self.offsets[:, 1] > begin))
            first, last = (holding[0], holding[-1] + 1) if len(holding) else (0, 0)
        return None if first is None or last is None else slice(first, last)


def _encode(texts: list[str], tokenizer: Any, *, offsets: bool) -> Iterator[_Encoded]:
    offsets = offsets and tokenizer.is_fast
    found = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=offsets)
    for i, text in enumerate(texts):
        known = np.array(found["offset_mapping"][i], np.int64).reshape(-1, 2) if offsets else None
        yield _Encoded(text, np.array(found["input_ids"][i], np.int32), known, tokenizer)


def _put_around(text: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids that the tokenizer puts before and behind a text: BOS, two prefix tokens, EOS, or none."""
    bare, dressed = (tokenizer(f"{text}a", add_special_tokens=add)["input_ids"] for add in (False, True))
    for begin in range(len(dressed) - len(bare) + 1):
        if dressed[begin : begin + len(bare)] == bare:
            return np.array(dressed[:begin], np.int32), np.array(dressed[begin + len(bare) :], np.int32)
    raise ValueError(f"tokenizer {tokenizer.name_or_path!r} changes a text where it puts special tokens around it")


def _without_prefix(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """Texts -> their ids as those of texts that go on: without a space before them."""
    if not tokenizer.is_fast:
        whole, first, second = tokenizer(["a\na", "a\n", "a"], add_special_tokens=False)["input_ids"]
        if whole != first + second:
            raise ValueError(
                f"tokenizer {tokenizer.name_or_path!r} begins every text otherwise than it goes on, so a response "
                "cannot be tokenized apart from its prompt; expected a fast tokenizer"
            )
        return lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"]
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    bare = Tokenizer.from_str(json.dumps(state | {key: _bare(state[key]) for key in ("normalizer", "pre_tokenizer")}))
    return lambda texts: [found.ids for found in bare.encode_batch_fast(texts, add_special_tokens=False)]


def _bare(step: Any) -> Any:
    """A normalizer or pre-tokenizer, as JSON, that puts no space before a text; None where that is all it does."""
    match step:
        case {"type": "Prepend"}:
            return None
        case {"prepend_scheme": _}:
            return step | {"prepend_scheme": "never"}
        case {"add_prefix_space": _}:
            return step | {"add_prefix_space": False}
        case {"normalizers": list(steps)}:
            return step | {"normalizers": [bare for inner in steps if (bare := _bare(inner))]}
        case {"pretokenizers": list(steps)}:
            return step | {"pretokenizers": [bare for inner in steps if (bare := _bare(inner))]}
    return step


def _mistral() -> PreTrainedTokenizerFast:
    """Mistral-7B-v0.1's: the SentencePiece model that mistral-common ships."""
    package = importlib.util.find_spec("mistral_common")
    if package is None or package.origin is None:
        raise ImportError('tokenizer "mistral" needs: pip install --no-deps mistral-common')
    return from_sentencepiece((Path(package.origin).parent / "data" / "tokenizer.model.v1").read_bytes())


def from_sentencepiece(model: bytes) -> PreTrainedTokenizerFast:
    """A SentencePiece model of kind BPE with byte fallback (Llama 2's, Mistral's) as a fast tokenizer of equal ids.

    model: the file's content, a protobuf message whose field 1 is repeated: a piece, its score and its type.
    Raises ValueError where it has no pieces.
    """
    pieces = [dict(_fields(value)) for number, value in _fields(model) if number == 1]
    names = [piece[1].decode() for piece in pieces]
    if not names:
        raise ValueError("no SentencePiece model: it has no pieces")
    ids = {name: i for i, name in enumerate(names)}
    scores = [struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces]
    words = [i for i, piece in enumerate(pieces) if piece.get(3, NORMAL) not in (CONTROL, BYTE)]
    words.sort(key=lambda i: -scores[i])  # stable: equal scores stay in order of their ids
    merges = [
        (name[:k], name[k:])
        for name in (names[i] for i in words)
        for k in range(1, len(name))
        if name[:k] in ids and name[k:] in ids
    ]
    bpe = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(steps)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


NORMAL, CONTROL, BYTE = 1, 3, 6  # types of SentencePiece's pieces


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message: int, or bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        size, at = _varint(message, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while True:
        value |= (message[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if message[at - 1] < 0x80:
            return value, at
