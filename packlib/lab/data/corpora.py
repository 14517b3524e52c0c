"""Corpora: names -> tokenized examples. Three built-in ones need no network and have the shapes of the paper's three.

`pydocs` (signature and docstring -> body) has FLAN's heavy tail, `arithmetic` (word problems with worked solutions)
OrcaMath's narrow spread, `pysource` (standard-library modules) The Stack's long files. JSON files, Hub names and
tokenized `.npz` files load the same way. Contents never depend on the seed: it only picks which `limit` examples are
kept. Prompt and response are tokenized apart, as at inference, so that the loss mask is exact; EOS ends every example.
A chat has the ids that its tokenizer's template gives it, and no others.
"""

import ast
import dataclasses
import functools
import hashlib
import json
import os
import sys
import sysconfig
import textwrap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa

from packlib.atomic import atomic_write
from packlib.collators import IGNORE_INDEX
from packlib.lab.data import sources, tokenizers
from packlib.lab.data.sources import Chat, Example, Tokens
from packlib.lab.parameters import unknown_name
from packlib.plans import packing
from packlib.plans.lengths import Overflow

DATA = "PACKLIB_DATA"  # folder of corpora, tokenizers and models that specs name without their path
EVAL_SHARE = 16  # one example in 16, chosen by its own hash, is for evaluation
HUB_EXAMPLES = 20_000  # the paper's subsets
KEPT_BYTES = 2**26  # parsed text is remembered up to this size of its file
FORMAT = 1  # part of the cache key: raise it when a builder at the end of this file changes
JSON = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
Unlabelled = Literal["error", "drop", "keep"]
UNLABELLED: tuple[Unlabelled, ...] = ("error", "drop", "keep")
METADATA = ("name", "split", "tokenizer_name", "vocab_size", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenized examples of one split. `lengths` and `loss_tokens`: int64 `[examples]`, in tokens.

    dataset: arrow-backed `input_ids` and `labels`, lists of int32; labels are -100 where no loss is wanted.
    loss_tokens: predicted positions (never an example's first one). sha256: of ids, labels and lengths.
    lost_tokens: what `fit` cut off and `labelled` dropped. unlabelled: examples without a label that `labelled` found.
    """

    name: str
    split: str
    dataset: datasets.Dataset
    lengths: np.ndarray
    loss_tokens: np.ndarray
    tokenizer_name: str
    vocab_size: int
    eos_token_id: int
    pad_token_id: int
    sha256: str
    lost_tokens: int = 0
    unlabelled: int = 0

    @classmethod
    def from_arrays(cls, input_ids: np.ndarray, labels: np.ndarray, lengths: np.ndarray, **metadata: Any) -> "Corpus":
        """From flat ids and labels, integers `[tokens]`, and the lengths of the examples; metadata: the other fields.

        >>> meta = dict(name="x", split="train", tokenizer_name="t", vocab_size=5, eos_token_id=0, pad_token_id=0)
        >>> corpus = Corpus.from_arrays(np.arange(5), np.array([0, 1, -100, -100, 4]), np.array([2, 3]), **meta)
        >>> corpus.loss_tokens.tolist(), corpus.dataset[1]["input_ids"]
        ([1, 1], [2, 3, 4])
        """
        ids, labels = (np.ascontiguousarray(values, np.int32) for values in (input_ids, labels))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        sha256 = hashlib.sha256(b"".join(array.tobytes() for array in (ids, labels, offsets))).hexdigest()
        loss_tokens = _predicted(labels, offsets[:-1], offsets[1:])
        bounds, columns = pa.array(offsets, pa.int32()), {"input_ids": ids, "labels": labels}
        table = pa.table({key: pa.ListArray.from_arrays(bounds, pa.array(flat)) for key, flat in columns.items()})
        arrays = {"dataset": datasets.Dataset(table), "lengths": np.diff(offsets), "loss_tokens": loss_tokens}
        return cls(**arrays, sha256=sha256, **metadata)

    def _flat(self, column: str) -> np.ndarray:
        return self.dataset.data.column(column).combine_chunks().flatten().to_numpy()

    def predicted(self, example: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Loss tokens of segments, int64 `[segments]`: of each example its tokens `start:stop`, but for the first."""
        offsets = np.cumsum(self.lengths) - self.lengths
        return _predicted(self._flat("labels"), offsets[example] + start, offsets[example] + stop)

    def subset(self, examples: np.ndarray) -> "Corpus":
        """The examples at these sorted indices."""
        kept = np.repeat(np.isin(np.arange(len(self.lengths)), examples), self.lengths)
        metadata = {key: getattr(self, key) for key in METADATA}
        ids, labels = (self._flat(key)[kept] for key in ("input_ids", "labels"))
        return Corpus.from_arrays(ids, labels, self.lengths[examples], **metadata)

    def fit(self, max_tokens: int, overflow: Overflow) -> "Corpus":
        """No example above `max_tokens`, so that every strategy sees the same data; counts `lost_tokens`.

        overflow: `error` names the first overlong example, `truncate` keeps its first `max_tokens` tokens, `split`
        makes several examples of it and loses nothing. Raises `ValueError`.
        """
        segments = packing.fit(self.lengths.astype(np.int32), max_tokens, overflow)
        example, start, stop = packing.gather(segments, np.arange(len(packing.sizes(segments))))
        lengths = stop.astype(np.int64) - start
        offsets, ends = np.cumsum(self.lengths) - self.lengths, np.cumsum(lengths)
        token = np.arange(ends[-1]) + np.repeat(offsets[example] + start - (ends - lengths), lengths)
        ids, labels = (self._flat(name)[token] for name in ("input_ids", "labels"))
        metadata = {key: getattr(self, key) for key in METADATA}
        fitted = Corpus.from_arrays(ids, labels, lengths, **metadata)
        return dataclasses.replace(fitted, lost_tokens=int(self.lengths.sum() - lengths.sum()))

    def labelled(self, unlabelled: Unlabelled) -> "Corpus":
        """Decide on examples that have nothing to learn, such as a prompt that fills `max_tokens`; counts them.

        unlabelled: `error` names the first one, `drop` leaves them out (and counts their tokens as lost), `keep` trains
        on steps that may have no loss. Raises `ValueError`, also where none would be left.
        """
        if unlabelled not in UNLABELLED:
            raise ValueError(f"unlabelled = {unlabelled!r}; expected one of {', '.join(UNLABELLED)}")
        bare = np.flatnonzero(self.loss_tokens == 0)
        count, of_all = len(bare), f"{len(bare)} of {len(self.lengths)} examples of {self.name} ({self.split})"
        if unlabelled == "keep" or not count:
            return dataclasses.replace(self, unlabelled=count)
        if unlabelled == "error":
            raise ValueError(
                f"{of_all} have no label to learn, the first is example {bare[0]} with {self.lengths[bare[0]]} tokens: "
                'a prompt fills max_tokens, or nothing follows it; pass unlabelled="drop" or "keep", or more max_tokens'
            )
        if count == len(self.lengths):
            raise ValueError(f"{of_all} have no label to learn: nothing is left")
        kept = self.subset(np.flatnonzero(self.loss_tokens))
        lost = self.lost_tokens + int(self.lengths[bare].sum())
        return dataclasses.replace(kept, lost_tokens=lost, unlabelled=count)

    def save(self, path: str | Path) -> None:
        """Write tokens, lengths and metadata (no text) as `.npz`, for hosts without network; fills in `{split}`."""
        metadata = np.array(json.dumps({key: getattr(self, key) for key in (*METADATA, "sha256")}))
        ids, labels = (self._flat(key) for key in ("input_ids", "labels"))
        path = str(path).replace("{split}", self.split)
        np.savez_compressed(path, input_ids=ids, labels=labels, lengths=self.lengths, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> "Corpus":
        """Read what `save` wrote. Raises ValueError when the tokens are not those that were saved."""
        with np.load(path, allow_pickle=False) as file:
            metadata = json.loads(str(file["metadata"]))
            saved, flat = metadata.pop("sha256"), [file[key] for key in ("input_ids", "labels", "lengths")]
        corpus = cls.from_arrays(*flat, **metadata)
        if corpus.sha256 != saved:
            raise ValueError(f"{path} is damaged: its tokens have sha256 {corpus.sha256[:12]}, saved were {saved[:12]}")
        return corpus


def _predicted(labels: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Labels in `starts:stops` that are not -100, without those at the start, which nothing predicts."""
    before = np.concatenate([[0], np.cumsum(labels != IGNORE_INDEX)])
    return before[stops] - before[np.minimum(starts + 1, stops)]


def located(name: str) -> str:
    """A corpus, tokenizer or model by name or path; those in `$PACKLIB_DATA` need no folder: specs stay short."""
    folder = os.environ.get(DATA)
    if not folder or name.startswith("hub:"):
        return name
    inside = Path(folder, name)
    return str(inside) if inside.exists() or Path(str(inside).replace("{split}", "train")).exists() else name


def load_corpus(
    name: str,
    *,
    split: str = "train",
    tokenizer: str = "bpe",
    loss: str = "full",
    limit: int | None = None,
    seed: int = 0,
    max_tokens: int | None = None,
    overflow: Overflow = "error",
    unlabelled: Unlabelled = "error",
) -> Corpus:
    """Tokenized examples of a corpus, in the order of the corpus.

    name: one of `CORPORA`, `hub:ORG/NAME`, or a path: JSON as `packlib.lab.data.sources` reads it (`.jsonl`, `.json`,
    also `.gz`) or `.npz` from `Corpus.save`; files may lie in the folder `$PACKLIB_DATA`. A path may contain
    `{split}`; JSON without it is split by each example's hash, so that train and eval stay disjoint whatever `limit`
    is. tokenizer: `bpe` or `bpe:SIZE` (trained on the train split), `mistral`, a Hugging Face name, a folder or a .gguf
    path. loss: `full`, or `response` (prompts labelled -100; a plain text is all response). limit: size of a seeded
    subset. max_tokens, overflow: as in `Corpus.fit`. unlabelled: as in `Corpus.labelled`.
    Raises ValueError (unknown name or option, broken line, a loss that the file cannot give, examples without a label,
    nothing left) and FileNotFoundError.
    """
    for key, value, known in (("split", split, ("train", "eval")), ("loss", loss, ("full", "response"))):
        if value not in known:
            raise ValueError(f"{key} = {value!r}; expected one of {', '.join(known)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit}; expected at least 1, or None for every example")
    name, tokenizer = located(name), located(tokenizer)
    if name.endswith(".npz"):
        corpus = _load_saved(name, split, loss)
    else:
        corpus = _tokenized(name, split, tokenizer, loss, limit, seed)
    if limit is not None and len(corpus.lengths) > limit:
        corpus = corpus.subset(_seeded_subset(len(corpus.lengths), limit, seed))
    return (corpus if max_tokens is None else corpus.fit(max_tokens, overflow)).labelled(unlabelled)


def _seeded_subset(count: int, limit: int | None, seed: int) -> np.ndarray:
    """Sorted indices of `limit` of `count` examples (None: all)."""
    return np.sort(np.random.Generator(np.random.PCG64(seed)).permutation(count)[:limit])


def _load_saved(name: str, split: str, loss: str) -> Corpus:
    corpus = Corpus.load(name.replace("{split}", split))
    if corpus.split != split:
        raise ValueError(f"{name} holds the split {corpus.split}, not {split}")
    masked = (corpus.loss_tokens < corpus.lengths - 1).any()
    if loss == "response" and not masked:
        raise ValueError(
            f"{name} has a label for every token, so that which are the response is not known; expected loss = 'full', "
            "or a file saved from load_corpus(…, loss='response')"
        )
    if loss == "full" and masked:
        ids, facts = corpus._flat("input_ids"), {key: getattr(corpus, key) for key in METADATA}
        return Corpus.from_arrays(ids, ids, corpus.lengths, **facts)
    return corpus


def _tokenized(name: str, split: str, tokenizer: str, loss: str, limit: int | None, seed: int) -> Corpus:
    examples = _examples(name, split)
    if not examples:
        raise ValueError(f"corpus {name!r} has no examples left in split {split!r}")
    tok = load_tokenizer(tokenizer, name)
    chosen = [examples[i] for i in _seeded_subset(len(examples), limit, seed)]
    ids, labels, lengths = _labelled_ids(chosen, tok, loss)
    short = Path(name.replace("_{split}", "")).name.split(".json")[0] if name.endswith(JSON) else name
    called = Path(tokenizer).name if Path(tokenizer).exists() else tokenizer  # no folder of this machine in records
    facts = (short, split, called, len(tok), tok.eos_token_id, tok.pad_token_id)
    return Corpus.from_arrays(ids, labels, lengths, **dict(zip(METADATA, facts, strict=True)))


def _labelled_ids(examples: Sequence[Example], tokenizer: Any, loss: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids and labels `[tokens]`, lengths `[examples]`; the examples of a file are of one kind."""
    if isinstance(examples[0], Tokens):
        given = [example for example in examples if isinstance(example, Tokens)]
        for example in given:
            _check_tokens(example, len(tokenizer), loss)
        columns = ([example.ids for example in given], [example.labels for example in given])
        return np.concatenate(columns[0]), np.concatenate(columns[1]), np.array([len(ids) for ids in columns[0]])
    chats = [example for example in examples if isinstance(example, Chat)]
    if chats and tokenizer.chat_template:
        ids, trained, lengths = tokenizers.tokenize_chats(chats, tokenizer, response=loss == "response")
    else:
        ids, trained, lengths = tokenizers.tokenize([_pieces(example) for example in examples], tokenizer)
    return ids, ids if loss == "full" else np.where(trained, ids, IGNORE_INDEX), lengths


def _check_tokens(example: Tokens, vocab_size: int, loss: str) -> None:
    """ValueError for tokens that the tokenizer does not have, and labels that are not those that are asked for."""
    if not 0 <= example.ids.min() <= example.ids.max() < vocab_size:
        raise ValueError(
            f"{example.where} has token ids from {example.ids.min()} to {example.ids.max()}, the tokenizer those below "
            f"{vocab_size}; expected the tokenizer that made them"
        )
    left_out = int((example.labels[1:] == IGNORE_INDEX).sum())
    if loss == "full" and left_out:
        raise ValueError(
            f"{example.where} leaves {left_out} of its {len(example.ids)} tokens without loss, and loss = 'full' would "
            "train on them; pass loss = 'response', or remove the column that says so"
        )
    if loss == "response" and not example.marked:
        raise ValueError(f"{example.where} has no labels and no mask that says which tokens are the response")


def content_sha256(name: str, tokenizer: str = "bpe") -> str | None:
    """Hash of what a corpus is made of: text or tokens of both splits, and the files of a local tokenizer.

    An edited file has another hash, wherever it lies and whatever it is called. None where the data are not here: a
    file that is missing, a Hub data set that was never read and cannot be reached.
    """
    digest = hashlib.sha256()
    name, folder = located(name), Path(located(tokenizer))
    try:
        for split in ("train", "eval") if "{split}" in name else ("",):
            digest.update(_content(name, split).encode())
    except (OSError, datasets.exceptions.DatasetNotFoundError):
        return None
    if folder.is_dir() and not name.endswith(".npz"):
        for path in sorted(folder.glob("*token*.json")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _content(name: str, split: str) -> str:
    path = Path(name.replace("{split}", split))
    if name.endswith(".npz"):
        with np.load(path, allow_pickle=False) as file:
            return json.loads(str(file["metadata"]))["sha256"]
    with sources.open_text(_text_file(name, split)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_tokenizer(name: str = "bpe", corpus: str | None = None) -> Any:
    """Tokenizer by name; `bpe` and `bpe:SIZE` are trained on the train split of `corpus`, named as for load_corpus."""
    kind, _, size = name.partition(":")
    if kind != "bpe":
        return tokenizers.open_tokenizer(name)
    if corpus is None or not (size or "0").isdigit():
        raise ValueError(f"tokenizer = {name!r}; expected bpe or bpe:SIZE, and a corpus to train it on")
    texts = ["".join(text for text, _ in _pieces(example)) for example in _examples(corpus, "train")]
    return tokenizers.train_bpe(texts, int(size or tokenizers.BPE_VOCAB))


def _pieces(example: Example) -> list[sources.Piece]:
    if isinstance(example, Tokens):
        raise ValueError(f"{example.where} is tokenized already; expected the tokenizer that made it, not bpe")
    return example.pieces


def _examples(name: str, split: str) -> list[Example]:
    path = _text_file(name, split)
    state = path.stat()
    # Tokenizer and examples, of both splits, come from one file: a run would read it four times.
    parse = _parsed if state.st_size < KEPT_BYTES else _parsed.__wrapped__
    rows = parse(path, state.st_mtime_ns, state.st_size)
    return [example for example, in_eval in rows if "{split}" in name or in_eval == (split == "eval")]


@functools.lru_cache(maxsize=2)
def _parsed(path: Path, modified: int, size: int) -> list[tuple[Example, bool]]:
    """Examples of a file as it was at that time, each with whether it is for evaluation."""
    return [(example, _in_eval(row)) for row, example in sources.read(path)]


def _text_file(name: str, split: str) -> Path:
    """The JSON lines of a corpus; those of built-in and Hub corpora are made once and kept in the cache."""
    if name not in CORPORA and not name.startswith("hub:"):
        if not name.endswith(JSON):
            raise unknown_name("corpus", name, CORPORA, also=("hub:ORG/NAME", *JSON, ".npz"))
        return Path(name.replace("{split}", split))
    key = hashlib.sha256(f"{name} {sys.version} {FORMAT}".encode()).hexdigest()[:12]
    path = tokenizers.cache_folder() / f"{name.replace(':', '-').replace('/', '-')}-{key}.jsonl"
    if not path.exists():
        build = CORPORA.get(name) or functools.partial(_hub, name.removeprefix("hub:"))
        lines = dict.fromkeys(json.dumps(row) + "\n" for row in build())  # each example once
        with atomic_write(path) as file:
            file.writelines(lines)
    return path


def _in_eval(row: dict[str, Any]) -> bool:
    asked = json.dumps(row.get("prompt") or row, sort_keys=True)  # one prompt with two responses stays in one split
    return int(hashlib.sha256(asked.encode()).hexdigest()[:8], 16) % EVAL_SHARE == 0


def _hub(path: str, **options: Any) -> list[dict[str, Any]]:
    """Rows of a Hub data set as this module reads them, at most HUB_EXAMPLES; what cannot be read is left out."""
    stream = datasets.load_dataset(path, **options, split="train", streaming=True).shuffle(seed=0, buffer_size=10_000)
    rows, problem = [], None
    for given in stream:
        renamed = {HUB_COLUMNS.get(name, name): value for name, value in given.items()}
        row = {name: value for name, value in renamed.items() if name in sources.CONSIDERED}
        try:
            sources.parse(row, "the first such row")
        except ValueError as error:
            problem = problem or error
            continue
        rows.append(row)
        if len(rows) == HUB_EXAMPLES:
            break
    if not rows:
        raise ValueError(f"hub:{path} has no example that can be read: {problem or 'it is empty'}")
    return rows


HUB_COLUMNS = {"content": "text", "inputs": "prompt", "targets": "response", "question": "prompt", "answer": "response"}

# Not read: tests, data tables, and what a distribution may leave out or the machine generates.
SKIPPED = {"test", "tests", "idle_test", "encodings", "pydoc_data", "idlelib", "turtledemo", "tkinter", "ensurepip"}
SKIPPED |= {"site-packages", "dist-packages", "sitecustomize.py"}


def _modules() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED.isdisjoint(parts) and "_sysconfigdata" not in path.name and "config-" not in parts[0]:
            yield path.read_text(encoding="utf-8")


def _functions(module: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions, outer ones first: `ast.walk` over statements alone, a tenth of the nodes."""
    left: deque[ast.AST] = deque([module])
    while left:
        node = left.popleft()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        for name in ("body", "handlers", "orelse", "finalbody", "cases"):
            left.extend(getattr(node, name, ()))


def _pydocs() -> Iterator[dict[str, str]]:
    for source in _modules():
        lines = source.splitlines()
        for node in _functions(ast.parse(source)):
            if ast.get_docstring(node) and node.body[1:]:
                code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).split("\n")
                cut = (node.body[0].end_lineno or node.lineno) - node.lineno + 1
                row = {"prompt": "\n".join(code[:cut]), "response": "\n".join(code[cut:]).strip("\n")}
                if row["response"].strip():  # empty where docstring and body share a line
                    yield row


def _arithmetic(count: int = 6000) -> Iterator[dict[str, str]]:
    rng = np.random.Generator(np.random.PCG64(240709105))
    for _ in range(count):
        who, other = rng.choice(PEOPLE, 2, replace=False)
        what, have = rng.choice(THINGS), int(rng.integers(5, 60))
        story, work = [f"{who} has {have} {what}."], []
        for _ in range(rng.integers(2, 7)):
            n = int(rng.integers(2, 10))
            after = {"+": have + n, "-": have - n, "*": have * n, "/": have // n}
            possible = [e for e in EVENTS if 0 < after[e[0]] < 999 and (e[0] != "/" or have % n == 0)]
            sign, event, step = possible[rng.integers(len(possible))]
            story.append(event.format(who=who, other=other, what=what, n=n))
            work.append(f"{step.format(who=who, what=what, n=n)}: {have} {sign} {n} = {after[sign]}.")
            have = after[sign]
        story.append(f"How many {what} does {who} have now?")
        yield {"prompt": " ".join(story), "response": "\n".join([*work, f"The answer is {have}."])}


PEOPLE = ["Ada", "Ben", "Chen", "Dina", "Emil", "Fatou", "Hana", "Ivo", "Jaya", "Kofi", "Lena", "Nils", "Olga", "Sami"]
THINGS = ["apples", "marbles", "stamps", "pencils", "shells", "coins", "books", "buttons", "candles", "beads", "cards"]
EVENTS = [  # sign, what happens, how it is worked out
    ("+", "{other} brings {n} more as a present.", "The present is added"),
    ("+", "While cleaning up, {who} finds {n} {what} that had rolled under the bed.", "{who} adds the {n} found"),
    ("-", "{who} sells {n} of the {what} to {other} at the market.", "Selling {n} leaves"),
    ("-", "On the way home {n} of them are lost.", "Without the {n} lost {what} there are"),
    ("*", "A week later {who} has {n} times as many {what}.", "{n} times as many {what} are"),
    ("/", "{who} shares all of them equally among {n} people and keeps one share.", "One of {n} equal shares is"),
]
CORPORA: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
    "pydocs": _pydocs,
    "arithmetic": _arithmetic,
    "pysource": lambda: ({"text": source} for source in _modules() if source.strip()),
    "flan": functools.partial(_hub, "Open-Orca/FLAN"),
    "orcamath": functools.partial(_hub, "microsoft/orca-math-word-problems-200k"),
    "stack": functools.partial(_hub, "bigcode/the-stack-smol", data_dir="data/python"),
}
