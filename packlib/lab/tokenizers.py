"""Tokenizers by name: byte-level BPE trained on the corpus, a Hugging Face name or folder, a .gguf file, or Mistral's.

The corpus's own BPE needs no network, and its 4096 entries keep a tiny model's embedding small. It is trained once
(seconds) and cached by the hash of its text; the cache is written atomically, so that processes may share it.
"""

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from packlib.atomic import atomic_write

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


def tokenize(examples: list[list[tuple[str, bool]]], tokenizer: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Examples of pieces `(text, trained)` -> ids int32 and trained bool `[tokens]`, lengths int64 `[examples]`.

    4096 pieces go to the tokenizer at a time; its BOS, where it uses one, is put in front and EOS (trained) behind.

    >>> ids, trained, lengths = tokenize([[("ab", False), ("c", True)]], train_bpe(["abc"], 258))
    >>> len(ids), trained.tolist(), lengths.tolist()
    (4, [False, False, True, True], [4])
    """
    pieces = [piece for example in examples for piece in example]
    texts, kinds = zip(*pieces, strict=True)
    bos = tokenizer("a")["input_ids"][:1] != tokenizer("a", add_special_tokens=False)["input_ids"][:1]
    bos = bos and not texts[0].startswith(tokenizer.bos_token)  # a chat template wrote it already
    counts: list[int] = []
    flat: list[np.ndarray] = []
    for begin in range(0, len(texts), 4096):
        encoded = tokenizer(list(texts[begin : begin + 4096]), add_special_tokens=False)["input_ids"]
        counts += map(len, encoded)
        flat.append(pa.array(encoded, pa.list_(pa.int32())).flatten().to_numpy())
    owner = np.repeat(np.arange(len(examples)), [len(example) for example in examples])
    lengths = np.bincount(owner, counts, len(examples)).astype(np.int64) + bos + 1
    ends = np.cumsum(lengths)
    ids, trained, inside = np.empty(ends[-1], np.int32), np.zeros(ends[-1], bool), np.ones(ends[-1], bool)
    ids[ends - 1], trained[ends - 1], inside[ends - 1] = tokenizer.eos_token_id, True, False
    if bos:
        ids[ends - lengths], inside[ends - lengths] = tokenizer.bos_token_id, False
    ids[inside], trained[inside] = np.concatenate(flat), np.repeat(kinds, counts)
    return ids, trained, lengths


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
