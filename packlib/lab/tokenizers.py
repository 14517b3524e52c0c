"""Tokenizers by name: byte-level BPE trained on the corpus, a Hugging Face name or folder, a .gguf file, or Mistral's.

The corpus's own BPE needs no network, and its 4096 entries keep a tiny model's embedding small. It is trained once
(seconds) and cached by the hash of its text; the cache is written atomically, so that processes may share it.
"""

import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from packlib.atomic import atomic_write
from packlib.lab.chats import write_chat
from packlib.lab.sources import Chat, Piece

BPE_VOCAB = 4096


def cache_folder() -> Path:
    """Folder for trained tokenizers and parsed corpora: `$PACKLIB_CACHE`, or `~/.cache/packlib`."""
    return Path(os.environ.get("PACKLIB_CACHE") or Path.home() / ".cache" / "packlib")


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
        tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name!r} has no EOS token; set tokenizer.eos_token and save it to a folder")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenize(examples: Sequence[Sequence[Piece]], tokenizer: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Examples of pieces `(text, trained)` -> ids int32 and trained bool `[tokens]`, lengths int64 `[examples]`.

    The ids are those of the whole text where its tokens part as the pieces do. Where one would span two pieces, they
    are tokenized apart, as a response is at inference, without the space that some tokenizers put before a text. What
    the tokenizer puts around a text goes around each example that does not have it, and EOS behind it (trained).
    Raises ValueError where pieces cannot be tokenized apart: by a tokenizer that is not a fast one.

    >>> ids, trained, lengths = tokenize([[("ab", False), ("c", True)]], train_bpe(["abc"], 258))
    >>> len(ids), trained.tolist(), lengths.tolist()
    (4, [False, False, True, True], [4])
    """
    before, behind = _put_around(_joined(examples[0])[:100], tokenizer)
    alone = functools.cache(lambda: _without_prefix(tokenizer))
    rows = []
    for begin in range(0, len(examples), CHUNK):
        chunk = examples[begin : begin + CHUNK]
        for pieces, parts in zip(chunk, _parts(chunk, tokenizer, alone)):
            ids = np.concatenate(parts)
            head = before[: 0 if np.array_equal(ids[: len(before)], before) else None]
            tail = behind[: 0 if np.array_equal(ids[len(ids) - len(behind) :], behind) else None]
            if (*ids, *tail)[-1:] != (tokenizer.eos_token_id,):
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


def _joined(pieces: Sequence[Piece]) -> str:
    return "".join(text for text, _ in pieces)


def _parts(
    examples: Sequence[Sequence[Piece]], tokenizer: Any, alone: Callable[[], Tokenizer]
) -> Iterator[list[np.ndarray]]:
    """The ids of each example's pieces."""
    several = any(len(pieces) > 1 for pieces in examples)
    for pieces, encoded in zip(examples, _encode([_joined(p) for p in examples], tokenizer, offsets=several)):
        ends = np.cumsum([len(text) for text, _ in pieces[:-1]]).tolist()
        cuts = [cut for end in ends if (cut := encoded.cut(end)) is not None]
        if len(cuts) == len(ends):
            yield np.split(encoded.ids, cuts)
            continue
        first, *others = (text for text, _ in pieces)
        ids = [tokenizer(first, add_special_tokens=False)["input_ids"]]
        ids += [found.ids for found in alone().encode_batch_fast(others, add_special_tokens=False)]
        yield [np.array(part, np.int32) for part in ids]


def _put_around(text: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids that the tokenizer puts before and behind a text: BOS, two prefix tokens, EOS, or none."""
    bare, dressed = (tokenizer(f"{text}a", add_special_tokens=add)["input_ids"] for add in (False, True))
    for begin in range(len(dressed) - len(bare) + 1):
        if dressed[begin : begin + len(bare)] == bare:
            return np.array(dressed[:begin], np.int32), np.array(dressed[begin + len(bare) :], np.int32)
    raise ValueError(f"tokenizer {tokenizer.name_or_path!r} changes a text where it puts special tokens around it")


def _without_prefix(tokenizer: Any) -> Tokenizer:
    """The tokenizer for a text that goes on: it puts no space before it."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} joins the end of a prompt and its response into one token; expected a "
            "fast tokenizer, which can part them"
        )
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(state | {key: _bare(state[key]) for key in ("normalizer", "pre_tokenizer")}))


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
    """Mistral-7B-v0.1's: the SentencePiece model that mistral-common ships, as a fast tokenizer of equal ids."""
    package = importlib.util.find_spec("mistral_common")
    if package is None or package.origin is None or importlib.util.find_spec("sentencepiece") is None:
        raise ImportError('tokenizer "mistral" needs: pip install "mistral-common[sentencepiece]"')
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(Path(package.origin).parent / "data" / "tokenizer.model.v1"))
    ids = {model.id_to_piece(i): i for i in range(len(model))}
    words = [piece for piece, i in ids.items() if not (model.is_byte(i) or model.is_control(i))]
    words.sort(key=lambda piece: -model.get_score(ids[piece]))  # stable: equal scores stay in order of their ids
    merges = [(p[:k], p[k:]) for p in words for k in range(1, len(p)) if p[:k] in ids and p[k:] in ids]
    bpe = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(steps)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
