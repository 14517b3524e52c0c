"""Files of text -> examples, row by row: what a row says is read whole, or refused with its file and line.

JSON lines (`.jsonl`, `.jsonl.gz`) and JSON arrays (`.json`; an object's only list is as good), UTF-8 with or without a
byte-order mark, in the formats that people have: chats (`messages`, ShareGPT's `conversations`), a prompt with its
`response` or `completion` (texts or chats), Alpaca's columns, plain `text`, and tokens (`input_ids`). A file has one of
them. Columns that change what is learned and cannot be honoured are errors; any other is left alone.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from packlib.columns import BOUNDARIES, LOSS_MASKS, refuse
from packlib.features import concatenate

# The columns that make an example: the first of these that a row has.
FORMATS = (
    ("input_ids",),
    ("messages",),
    ("conversations",),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("text",),
)
EXPECTED = (
    "prompt and response, messages, conversations, prompt and completion, instruction and output, text, input_ids"
)
OF_TOKENS = ("labels", "attention_mask", *LOSS_MASKS, *BOUNDARIES)  # a value for each token
READ = {"input", "system", "tools", *OF_TOKENS}.union(*FORMATS)
UNREAD = ("system_prompt", "history", "chat_template_kwargs", "documents")  # text that would be left out
CONSIDERED = READ.union(UNREAD)  # any other column of a row is metadata

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
SAID = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")  # what a message says but content

Piece = tuple[str, bool]  # text, and whether it is a response


@dataclass(frozen=True, slots=True)
class Text:
    """An example of texts, its pieces in order. where: file and line, for errors."""

    where: str
    pieces: list[Piece]


@dataclass(frozen=True, slots=True)
class Chat:
    """An example of messages: `role`, `content` (a string, or absent) and whatever else a template may write.

    prompt: so many messages at the beginning are never trained on. tools: what a template is given besides.
    """

    where: str
    messages: list[dict[str, Any]]
    prompt: int = 0
    tools: list[Any] | None = None

    def trained(self, i: int) -> bool:
        """Whether message i is a response to learn."""
        return i >= self.prompt and self.messages[i]["role"] == "assistant"

    @property
    def pieces(self) -> list[Piece]:
        """A line `role: content` for each message: how a chat is written without a template.

        Raises ValueError for what only a template can write.
        """
        unsaid = ["tools"] if self.tools else [name for name in SAID if any(name in turn for turn in self.messages)]
        if unsaid:
            raise ValueError(f"{self.where} has {unsaid[0]}, which need a chat template; the tokenizer has none")
        return [(f"{turn['role']}: {turn['content']}\n", self.trained(i)) for i, turn in enumerate(self.messages)]


@dataclass(frozen=True, slots=True)
class Tokens:
    """An example that is tokenized already. ids, labels: int64 `[tokens]`; labels are -100 where no loss is wanted.

    marked: whether the row says which tokens carry loss.
    """

    where: str
    ids: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    marked: bool


Example = Text | Chat | Tokens


def read(path: Path) -> Iterator[tuple[dict[str, Any], Example]]:
    """The rows of a file, each with the example that it is. Raises ValueError naming file and line."""
    first = ""
    for line, row in _rows(path):
        where = f"{path}, line {line}"
        example = parse(row, where)
        found = " and ".join(_format(row)) + (" of messages" if isinstance(example, Chat) else "")
        first = first or found
        if found != first:
            raise ValueError(f"{where} has {found}, the rows before it {first}; expected one format in a file")
        yield row, example


def open_text(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """The bytes of a file, unpacked."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def parse(row: Any, where: str) -> Example:
    """The example that a row is; other columns than those of its format are metadata, or refused.

    Raises ValueError beginning with `where`: for a row of no known format, what is not text, an unknown role, an
    example without a response, and columns and parts of messages that change what is learned and cannot be honoured.

    >>> parse({"instruction": "Add.", "input": "1 + 1", "output": "2", "id": 7}, "sums.json, line 3").pieces
    [('Add.\\n1 + 1\\n', False), ('2', True)]
    >>> parse({"text": "Two.", "weight": 0.5}, "sums.json, line 4")
    Traceback (most recent call last):
    ValueError: sums.json, line 4 has weight = 0.5; all texts weigh 1: leave out what is not to be learned
    """
    columns = _format(row)
    # An empty list is a column that this row has no use for, unless the row is read from it.
    given = {k: v for k, v in row.items() if v is not None and (v != [] or k in columns)} if columns else {}
    match [given[name] for name in columns]:
        case [list()] if columns == ("input_ids",):
            return _tokens(given, where)
        case [list(turns)]:
            return _chat([], turns, given, where)
        case [list(prompt), list(turns)]:
            return _chat(prompt, turns, given, where)
        case [str(text)] if columns == ("text",):
            return _text([(text, True)], given, where)
        case [str(prompt), str(response)] if isinstance(given.get("input", ""), str):
            if columns == ("instruction", "output") and given.get("input"):
                prompt = f"{prompt}\n{given['input']}"
            prompt += "" if columns == ("prompt", "completion") else "\n"  # a completion goes on where its prompt ends
            return _text([(prompt, False), (response, True)], given, where)
    raise ValueError(f"{where}: expected {EXPECTED}; found {str(row)[:80]}")


def _format(row: Any) -> tuple[str, ...]:
    """The columns of FORMATS that a row is read from; none for a row of no known format."""
    given = {name for name, value in row.items() if value is not None} if isinstance(row, Mapping) else set()
    return next((columns for columns in FORMATS if given.issuperset(columns)), ())


def _tokens(given: dict[str, Any], where: str) -> Tokens:
    try:
        found = concatenate([given])
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{where}: {str(error).replace('features[0]', 'row')}") from None
    if len(found.segments) > 1:
        raise ValueError(f"{where} is {len(found.segments)} segments, packed already; expected one example")
    return Tokens(where, found.tokens, found.labels, not {"labels", *LOSS_MASKS}.isdisjoint(given))


def _text(pieces: list[Piece], given: Mapping[str, Any], where: str) -> Text:
    _refuse_unread(given, ("system", "tools", *UNREAD), where)
    _check_learned([text for text, trained in pieces if trained], where)
    _check_unicode([text for text, _ in pieces], where)
    return Text(where, pieces)


def _chat(prompt: list[Any], turns: list[Any], given: Mapping[str, Any], where: str) -> Chat:
    _refuse_unread(given, UNREAD, where)
    system, tools = given.get("system"), given.get("tools")
    if isinstance(tools, str):  # as a column of one type has to hold them
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"{where} has tools that are not JSON ({error})") from None
    said = [*([{"role": "system", "content": system}] if system else []), *prompt, *turns]
    if not all(isinstance(turn, dict) for turn in said) or not isinstance(tools or [], list):
        raise ValueError(f"{where}: expected {EXPECTED}; found {str(dict(given))[:80]}")
    messages = [_message(turn, f"{where}: message {i}") for i, turn in enumerate(said, 1)]
    chat = Chat(where, messages, len(said) - len(turns), tools or None)
    learned = [turn for i, turn in enumerate(messages) if chat.trained(i)]
    _check_learned([str(turn[name]) for turn in learned for name in ("content", *SAID) if turn.get(name)], where)
    _check_unicode([messages, tools], where)
    return chat


def _message(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message as chat templates take it: `role` and `content` under these names, content as one string or absent."""
    turn = {name: value for name, value in turn.items() if value is not None}  # as apply_chat_template does
    _refuse_unread({name: value for name, value in turn.items() if value != []}, UNREAD, where)
    for name, sharegpt in {"role": "from", "content": "value"}.items():
        if name not in turn and sharegpt in turn:
            turn[name] = turn.pop(sharegpt)
    role, content = turn.get("role"), turn.get("content")
    turn["role"] = SPEAKERS.get(role, role) if isinstance(role, str) else role
    if turn["role"] not in ROLES:
        raise ValueError(f"{where} has role = {role!r}; expected one of {', '.join((*ROLES, *SPEAKERS))}")
    if isinstance(content, list):
        turn["content"] = content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str) and (content is not None or not any(turn.get(name) for name in SAID)):
        raise ValueError(f"{where} has content = {str(content)[:80]}; expected a string or parts of text")
    return turn


def _part(part: Any, where: str) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": kind} if kind != "text":
            raise ValueError(f"{where} has a part of type {kind!r}; expected parts of type 'text': no other is read")
    raise ValueError(f"{where} has a part {str(part)[:80]}; expected type 'text' and a string as its text")


def _refuse_unread(given: Mapping[str, Any], unread: Sequence[str], where: str) -> None:
    """ValueError for columns of a text, or keys of a message, that cannot be honoured."""
    refuse(given, where)
    for name, value in given.items():
        if name in OF_TOKENS:
            raise ValueError(f"{where} has {name!r}, which belongs to tokens, and no input_ids; remove the column")
        if name in unread and value:
            raise ValueError(f"{where} has {name!r}, which would be left out; make it part of the prompt or a message")
        if value != {"weight": 1, "train": True}.get(name, value):
            raise ValueError(f"{where} has {name} = {value!r}; all texts weigh 1: leave out what is not to be learned")


def _check_learned(texts: list[str], where: str) -> None:
    if not any(text.strip() for text in texts):
        raise ValueError(f"{where}: empty example: it has no response to learn")


def _check_unicode(value: Any, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} has half a surrogate pair (\\ud800 to \\udfff alone), which is no text") from None


# Files


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a file, each with the number of the line on which it begins."""
    number = 0
    with open_text(path) as file:
        try:
            if path.name.removesuffix(".gz").endswith(".json"):
                yield from _items(_decoded(file.read(), path, 1), path)
                return
            for number, line in enumerate(file, 1):
                if text := _decoded(line, path, number).strip():
                    yield number, _loaded(text, path, number)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}, after line {number}: not a whole gzip file ({error})") from None


def _decoded(raw: bytes, path: Path, line: int) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason})") from None


def _loaded(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise ValueError(f"{path}, line {line}: not JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, brackets 5,000 deep
        raise ValueError(f"{path}, line {line}: not JSON that can be read ({error})") from None


def _items(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Line and value of the items of an array, or of the only list of an object."""
    whole, at = _loaded(text, path, 1), _skip(text, 0)
    if isinstance(whole, dict):
        lists = [name for name, value in whole.items() if isinstance(value, list)]
        if len(lists) != 1:
            raise ValueError(f"{path}: an object with {len(lists)} lists {lists}; expected an array or one list")
        at = next(begin for begin, name, _ in _members(text, at) if name == lists[0])
    elif not isinstance(whole, list):
        raise ValueError(f"{path}: found {str(whole)[:80]}; expected an array, or an object with one list")
    line, counted = 1, 0
    for begin, _, value in _members(text, at):
        line, counted = line + text.count("\n", counted, begin), begin
        yield line, value


def _members(text: str, at: int) -> Iterator[tuple[int, str | None, Any]]:
    """Where each member of the array or object that opens at `at` begins, its name and its value. Of valid JSON."""
    named, at = text[at] == "{", _skip(text, at + 1)
    while text[at] not in "]}":
        name = None
        if named:
            name, at = _DECODE(text, at)
            at = _skip(text, _skip(text, at) + 1)  # behind the colon
        begin = at
        value, at = _DECODE(text, begin)
        yield begin, name, value
        at = _skip(text, at)
        at = _skip(text, at + 1) if text[at] == "," else at


_DECODE = json.JSONDecoder().raw_decode
_SPACE = re.compile(r"[ \t\r\n]*")


def _skip(text: str, at: int) -> int:
    """The next position that is not white space."""
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing as well
