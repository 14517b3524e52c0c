"""Files of text -> examples: every format gives the same example, and what cannot be read names its line."""

import gzip
import json

import pytest

from packlib.lab.data import sources
from packlib.lab.data.sources import Chat, Text, Tokens

ASKED, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def parsed(row):
    return sources.parse(row, "x.jsonl, line 7")


def file(path, text, encoding="utf-8"):
    (gzip.open if path.suffix == ".gz" else open)(path, "wb").write(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("row", "pieces"),
    [
        ({"prompt": "a", "response": "b"}, [("a\n", False), ("b", True)]),
        ({"prompt": "a ", "completion": "b"}, [("a ", False), ("b", True)]),
        ({"instruction": "a", "output": "b"}, [("a\n", False), ("b", True)]),
        ({"instruction": "a", "input": "", "output": "b"}, [("a\n", False), ("b", True)]),
        ({"instruction": "a", "input": "i", "output": "b"}, [("a\ni\n", False), ("b", True)]),
        ({"text": "b", "prompt": None, "id": 3, "tools": []}, [("b", True)]),
    ],
)
def test_texts(row, pieces):
    example = parsed(row)
    assert isinstance(example, Text) and example.pieces == pieces


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, SAID]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                SAID,
            ]
        },
        {"messages": [ASKED | {"name": None}, SAID | {"tool_calls": None}], "tools": "null"},
        {"prompt": [ASKED], "completion": [SAID]},
        {"prompt": [ASKED], "response": [SAID]},
    ],
)
def test_chats_of_every_spelling_are_the_same_messages(row):
    example = parsed(row)
    assert isinstance(example, Chat) and example.messages == [ASKED, SAID] and not example.tools
    assert [example.trained(i) for i in range(2)] == [False, True]


def test_the_prompt_of_a_conversation_is_not_trained_on():
    row = {"prompt": [ASKED, SAID, ASKED], "completion": [SAID]}
    assert [parsed(row).trained(i) for i in range(4)] == [False, False, False, True]
    whole = {"messages": row["prompt"] + row["completion"]}
    assert [parsed(whole).trained(i) for i in range(4)] == [False, True, False, True], "the negative control"


def test_a_call_of_a_tool_says_something_without_content_and_needs_a_template():
    turns = [
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        SAID,
    ]
    example = parsed({"messages": turns, "system": "Be brief.", "tools": json.dumps([{"name": "add"}])})
    assert example.messages[0] == {"role": "system", "content": "Be brief."} and example.tools == [{"name": "add"}]
    assert "content" not in example.messages[2], "a template sees no None, as in apply_chat_template"
    with pytest.raises(ValueError, match="line 7 has tools, which need a chat template; the tokenizer has none"):
        _ = example.pieces
    assert [text for text, _ in parsed({"messages": [ASKED, SAID]}).pieces] == ["user: Hi\n", "assistant: Hello\n"]


def test_tokens_say_whether_they_are_marked():
    bare, marked = parsed({"input_ids": [1, 2, 3]}), parsed({"input_ids": [1, 2, 3], "completion_mask": [0, 0, 1]})
    assert isinstance(bare, Tokens) and not bare.marked and bare.labels.tolist() == [1, 2, 3]
    assert marked.marked and marked.labels.tolist() == [-100, -100, 3]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], r"expected prompt and response, messages, .*; found \[1\]"),
        ({"prompt": "a", "answer": "b"}, "expected prompt and response"),
        ({"prompt": "a", "response": 5}, "expected prompt and response"),
        ({"messages": None}, "expected prompt and response"),
        ({"text": " \n"}, "empty example: it has no response to learn"),
        ({"messages": []}, "empty example"),
        ({"messages": [ASKED]}, "empty example"),
        (
            {"messages": [ASKED, {"role": "assistant", "content": None}]},
            "message 2 has content = None; expected a string",
        ),
        ({"messages": [ASKED, {"role": "assistant"}]}, "message 2 has content = None"),
        (
            {"messages": [{"role": "narrator", "content": "x"}, SAID]},
            "message 1 has role = 'narrator'; expected one of",
        ),
        ({"messages": [{"content": "x"}, SAID]}, "message 1 has role = None"),
        ({"messages": ["Hi", SAID]}, "expected prompt and response, messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, SAID]},
            "message 1 has a part of type 'image'",
        ),
        ({"messages": [{"role": "user", "content": ["Hi"]}, SAID]}, "message 1 has a part Hi; expected type 'text'"),
        ({"messages": [ASKED, SAID | {"weight": 0}]}, "message 2 has weight = 0; all texts weigh 1"),
        ({"messages": [ASKED, SAID], "tools": "{"}, "has tools that are not JSON"),
        ({"text": "a", "labels": [1]}, "has 'labels', which belongs to tokens, and no input_ids"),
        ({"prompt": "a", "response": "b", "system_prompt": "c"}, "has 'system_prompt', which would be left out"),
        ({"text": "a", "pixel_values": [0.0]}, "has 'pixel_values', an input of another modality"),
        ({"text": "a\ud800"}, "has half a surrogate pair"),
        ({"input_ids": []}, r"row\['input_ids'\] is empty"),
        ({"input_ids": [1.5]}, "is not a flat sequence of integers"),
        ({"input_ids": [1, 2], "labels": [1]}, r"row\['labels'\] covers 1 tokens; expected 2"),
        ({"input_ids": [1, 2], "seq_lengths": [1, 1]}, "is 2 segments, packed already"),
    ],
)
def test_what_cannot_be_read_names_its_line(row, message):
    with pytest.raises(ValueError, match=f"^x.jsonl, line 7.*{message}"):
        parsed(row)


ROWS = [{"prompt": "ä", "response": "b"}, {"prompt": "c", "response": "d"}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)),
        ("x.jsonl", "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
        ("x.jsonl.gz", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)),
        ("x.json", json.dumps(ROWS, ensure_ascii=False)),
        ("x.json.gz", json.dumps({"version": {"a": 1}, "data": ROWS}, indent=1, ensure_ascii=False)),
    ],
)
def test_files_of_every_kind_hold_the_same_rows(tmp_path, name, text, encoding):
    read = list(sources.read(file(tmp_path / name, text, encoding)))
    assert [row for row, _ in read] == ROWS
    assert [example.pieces[0][0] for _, example in read] == ["ä\n", "c\n"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", '{"text": "a"}\n\n{"text": ', "line 3: not JSON"),
        ("x.jsonl", '{"text": "a"}\n\n{"text": ""}', "line 3: empty example"),
        (
            "x.jsonl",
            '{"text": "a"}\n{"prompt": "a", "response": "b"}',
            "line 2 has prompt and response, the rows .* text",
        ),
        (
            "x.jsonl",
            '{"prompt": "a", "completion": "b"}\n{"prompt": [], "completion": [{"role": "assistant", "content": "b"}]}',
            "line 2 has prompt and completion of messages",
        ),
        ("x.json", '[\n {"text": "a"},\n {"text": ""}\n]', "line 3: empty example"),
        ("x.json", '{"info": 1,\n "rows": [\n {"text": "a"},\n\n {"text": ""}]}', "line 5: empty example"),
        ("x.json", '[\n {"text": "a"},\n {"text": }\n]', "line 3: not JSON"),
        ("x.json", '{"a": [], "b": []}', r"an object with 2 lists \['a', 'b'\]"),
        ("x.json", '"text"', "found text; expected an array"),
    ],
)
def test_a_broken_file_names_the_line(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=rf"{name}(, |: ){message}"):
        list(sources.read(file(tmp_path / name, text)))


def test_bytes_that_are_no_text_and_half_a_gzip_file_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"x.jsonl, line 2: not UTF-8"):
        list(sources.read(file(tmp_path / "x.jsonl", '{"text": "a"}\n{"text": "ä"}', "latin-1")))
    whole = file(tmp_path / "x.jsonl.gz", '{"text": "a"}\n' * 1000)
    (tmp_path / "y.jsonl.gz").write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"y.jsonl.gz, after line \d+: not a whole gzip file"):
        list(sources.read(tmp_path / "y.jsonl.gz"))
