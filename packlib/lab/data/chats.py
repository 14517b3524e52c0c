"""Chats -> text, by a tokenizer's own template, and where in it the assistant's turns lie.

A turn is what the template puts into `{% generation %}` blocks. In a template without them it is found by writing the
chat up to that turn, with the generation prompt and with the answer: two texts a turn, each of which must be how the
whole chat begins. A template that writes earlier turns otherwise in longer chats has no such turns, and says so here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from packlib.lab.data.sources import Chat

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Written(NamedTuple):
    """A chat as text. turns: begin and end of what is trained on, in characters; blocks: the template says so."""

    text: str
    turns: list[tuple[int, int]]
    blocks: bool = False


def write_chat(chat: Chat, tokenizer: Any, *, turns: bool) -> Written:
    """What `tokenizer.apply_chat_template(messages, tokenize=False)` gives; with `turns`, where those to train on lie.

    Raises ValueError naming file and line: for what the template cannot write, for tools or calls of them that it
    leaves out, and for turns that cannot be told exactly.
    """
    write = functools.partial(_write, tokenizer, chat.where)
    text = write(chat.messages, chat.tools)
    _refuse_left_out(chat, text, write)
    if not turns:
        return Written(text, [])
    template = tokenizer.get_chat_template(tools=chat.tools)
    if GENERATION.search(template):
        return Written(text, _blocks(chat, text, template, tokenizer, write), blocks=True)
    found = []
    for i in filter(chat.trained, range(len(chat.messages))):
        prompt = write(chat.messages[:i], chat.tools, add_generation_prompt=True)
        answered = write(chat.messages[: i + 1], chat.tools)
        _check_begins(answered, prompt, chat.where)
        _check_begins(text, answered, chat.where)
        found.append((len(prompt), len(answered)))
    return Written(text, found)


def _write(
    tokenizer: Any,
    where: str,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    try:  # a list of one chat, since that one may be empty
        return tokenizer.apply_chat_template(
            [messages], tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )[0]
    except Exception as error:  # a template is a program: whatever it raises
        raise ValueError(f"{where}: the chat template cannot write it ({type(error).__name__}: {error})") from error


def _blocks(chat: Chat, text: str, template: str, tokenizer: Any, write: Callable[..., str]) -> list[tuple[int, int]]:
    """The template's generation blocks, without those of the prompt."""
    _, (blocks,) = render_jinja_template(
        [chat.messages],
        tools=chat.tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    prompt = chat.messages[: chat.prompt]
    if not any(turn["role"] == "assistant" for turn in prompt):
        return blocks
    begin = write(prompt, chat.tools, add_generation_prompt=True)
    _check_begins(text, begin, chat.where)
    return [block for block in blocks if block[0] >= len(begin)]


def _check_begins(text: str, begin: str, where: str) -> None:
    if not text.startswith(begin):
        raise ValueError(
            f"{where}: this chat template writes earlier turns otherwise in a longer chat, or an answer otherwise than "
            "after its generation prompt, so which tokens are the response cannot be told; expected loss = 'full', "
            "prompt and response, or a template with {% generation %} blocks (trl.get_training_chat_template has some)"
        )


def _refuse_left_out(chat: Chat, text: str, write: Callable[..., str]) -> None:
    """ValueError for tools, or calls of them, without which the text is the same."""
    calls = {"tool_calls", "function_call"}
    bare = [{"content": ""} | {k: v for k, v in turn.items() if k not in calls} for turn in chat.messages]
    if any(calls & turn.keys() for turn in chat.messages) and write(bare, chat.tools) == text:
        raise ValueError(f"{chat.where} has tool_calls, which the chat template leaves out")
    if chat.tools and write(chat.messages, None) == text:
        raise ValueError(f"{chat.where} has tools, which the chat template leaves out")
