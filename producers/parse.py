r"""Rows to what they say: a prompt, a comparison of two answers, or a demonstration. Anything else is a BadRow with a reason.

A dialogue is written in one of these forms:

* `prompt`: a string, or a list of messages {role, content}; `messages`: such a list;
* a transcript as in HH-RLHF (Bai et al. 2022, arXiv 2204.05862): a string in which "Human:" and "Assistant:" begin paragraphs.
  Only there do they mark a message; ": " and the two words inside a sentence are text. The last human message ends the prompt.
  Turns of one role in a row are joined as paragraphs.

A comparison has `chosen` and `rejected` (answers beside a dialogue, or whole transcripts or lists of messages with the same
prompt) and optionally `p_chosen`; or `a`, `b` and `p_a`, the probability that `a` is better. A demonstration has a dialogue and
a `completion`, or one dialogue that ends with the assistant; of a comparison's row it is the chosen answer. `source` and `tags`
are optional everywhere.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from schemas.records import ChatMessage

ROLES = ("system", "user", "assistant")
LISTS = ("prompt", "messages")
COLUMNS = frozenset(
    (
        *LISTS,
        "source",
        "tags",
        "chosen",
        "rejected",
        "p_chosen",
        "response_a",
        "response_b",
        "p_a",
        "completion",
        "finish_reason",
    )
)
MARKER = re.compile(r"(?:\A\s*|\n[ \t\r]*\n[ \t\r]*)(Human|Assistant):")  # linear, however many blank lines there are
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


class BadRow(ValueError):
    """A row that is not what it should be, and why."""


@dataclass(frozen=True)
class Asked:
    """A prompt: a dialogue that ends with the user."""

    messages: tuple[ChatMessage, ...]
    source: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Compared(Asked):
    """Two answers to a prompt; `p_a` is the probability that `a` is better. `ordered`: the row itself said which is `a`."""

    a: str
    b: str
    p_a: float
    ordered: bool


@dataclass(frozen=True)
class Shown(Asked):
    """A prompt with an answer to learn; `stopped`: the answer ended by itself."""

    completion: str
    stopped: bool


def fields_of(row: bytes | dict[str, Any] | BadRow) -> dict[str, Any]:
    """The fields of a row that are there: null is the same as absent, as columns have it."""
    if isinstance(row, BadRow):
        raise row
    value = json_of(row) if isinstance(row, bytes) else row
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise BadRow("neither a JSON string nor an object")
    return {name: field for name, field in value.items() if field is not None}


def json_of(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"byte {error.start + 1} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise BadRow("not a prompt: nested too deeply") from error
    except ValueError as error:  # a number with more digits than Python converts
        raise BadRow(f"not JSON that can be read: {error}") from error


def parse_prompt(row: bytes | dict[str, Any] | BadRow, *, source: str, max_chars: int) -> Asked:
    """The prompt in a row; raises BadRow."""
    fields = fields_of(row)
    if not any(name in fields for name in LISTS) and "chosen" in fields:
        messages, _ = split_dialogue(dialogue(fields["chosen"]))
    else:
        messages = prompt_of(fields)
    named, tags = about(fields, source, messages, max_chars)
    return Asked(messages, named, tags)


def parse_comparison(row: bytes | dict[str, Any] | BadRow, *, source: str, max_chars: int) -> Compared:
    """Two answers to one prompt, and which is better; raises BadRow."""
    fields = fields_of(row)
    ordered = "response_a" in fields
    first, second, p = ("response_a", "response_b", "p_a") if ordered else ("chosen", "rejected", "p_chosen")
    if first not in fields or second not in fields or (ordered and p not in fields):
        raise BadRow('neither "chosen" and "rejected" nor "response_a", "response_b" and "p_a" in it')
    messages, a, b = answers(fields, first, second)
    if a == b:
        raise BadRow("both answers are the same")
    named, tags = about(fields, source, messages, max_chars, a, b)
    return Compared(messages, named, tags, a, b, probability(fields.get(p, 1.0), p), ordered)


def parse_demonstration(row: bytes | dict[str, Any] | BadRow, *, source: str, max_chars: int) -> Shown:
    """A prompt and its answer; raises BadRow."""
    fields = fields_of(row)
    given = next((name for name in ("completion", "chosen") if name in fields), None)
    there = any(name in fields for name in LISTS)
    if given and there:
        messages = prompt_of(fields)
        completion = answer(fields[given], given, messages)
    elif given or there:
        messages, last = split_dialogue(dialogue(fields[given]) if given else listed(fields))
        completion = answer(last, "the dialogue", messages)
    else:
        raise BadRow('no dialogue ("prompt", "messages") and "completion" in it')
    reason = fields.get("finish_reason", "stop")
    if reason not in ("stop", "length"):
        raise BadRow('"finish_reason" is neither "stop" nor "length"')
    named, tags = about(fields, source, messages, max_chars, completion)
    return Shown(messages, named, tags, completion, reason == "stop")


PARSERS = {"prompts": parse_prompt, "preferences": parse_comparison, "demonstrations": parse_demonstration}


# Dialogues


def listed(fields: dict[str, Any]) -> tuple[ChatMessage, ...]:
    """The dialogue under one of its names."""
    return dialogue(next((fields[name] for name in ("messages", "prompt") if name in fields), None))


def dialogue(value: Any) -> tuple[ChatMessage, ...]:
    """A transcript, or a list of messages."""
    if isinstance(value, str):
        return transcript(value)
    if not isinstance(value, list) or not value:
        raise BadRow("the dialogue is not a list of messages")
    return tuple(turn_of(message) for message in value)


def transcript(text: str) -> tuple[ChatMessage, ...]:
    """The messages of a text in which paragraphs begin with who speaks; all of it is the user's when none does."""
    before, *marked = MARKER.split(text)
    if not marked:
        return (turn_of({"role": "user", "content": text}),)
    if before.strip():
        raise BadRow("text before the first Human: or Assistant:")
    spoken = [(SPEAKERS[who], said.strip()) for who, said in zip(marked[::2], marked[1::2], strict=True)]
    joined = [
        (role, "\n\n".join(said for _, said in messages))
        for role, messages in groupby([message for message in spoken if message[1]], key=lambda message: message[0])
    ]
    if not joined:
        raise BadRow("an empty prompt")
    return tuple(turn_of({"role": role, "content": said}) for role, said in joined)


def turn_of(value: Any) -> ChatMessage:
    if not isinstance(value, dict) or value.get("role") not in ROLES or not isinstance(value.get("content"), str):
        raise BadRow(f"a message needs a role ({', '.join(ROLES)}) and a content")
    if not value["content"].strip():
        raise BadRow("an empty prompt")
    return ChatMessage(role=value["role"], content=clean(value["content"]))


def clean(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise BadRow("a lone surrogate, which no text can hold")
    return text


def split_dialogue(messages: Sequence[ChatMessage]) -> tuple[tuple[ChatMessage, ...], str]:
    """The prompt, which ends with the last message of the user, and what the assistant said after it."""
    asked = max((place for place, message in enumerate(messages) if message.role == "user"), default=None)
    if asked is None:
        raise BadRow("no message of the user")
    return tuple(messages[: asked + 1]), "\n\n".join(message.content for message in messages[asked + 1 :])


def prompt_of(fields: dict[str, Any]) -> tuple[ChatMessage, ...]:
    """The dialogue beside an answer, or alone."""
    if not any(name in fields for name in LISTS):
        raise BadRow('no "prompt" or "messages" in it')
    if "messages" in fields or isinstance(fields["prompt"], list):
        messages = listed(fields)
    else:
        # A prompt is a transcript only if it begins as one does in HH-RLHF: "Human: ..." alone may be what someone asks.
        text = fields["prompt"]
        spoken = isinstance(text, str) and text.startswith("\n\nHuman:")
        messages = transcript(text) if spoken else (turn_of({"role": "user", "content": text}),)
    if messages[-1].role != "user":
        raise BadRow("the last message is not the user's")
    return messages


# Answers


def answers(fields: dict[str, Any], first: str, second: str) -> tuple[tuple[ChatMessage, ...], str, str]:
    """The prompt and both answers: beside each other, or two dialogues that begin with the same prompt."""
    if any(name in fields for name in LISTS):
        messages = prompt_of(fields)
        return messages, answer(fields[first], first, messages), answer(fields[second], second, messages)
    (messages, a), (other, b) = (split_dialogue(dialogue(fields[name])) for name in (first, second))
    if messages != other:
        raise BadRow(f"{first} and {second} do not answer the same prompt")
    return messages, answer(a, first, messages), answer(b, second, messages)


def answer(value: Any, name: str, asked: tuple[ChatMessage, ...]) -> str:
    """An answer: a string, or a list of messages that has the prompt before it or only the assistant's own."""
    if isinstance(value, list):
        messages = dialogue(value)
        before, value = split_dialogue(messages) if messages[0].role != "assistant" else (asked, messages[-1].content)
        if before != asked or (messages[0].role == "assistant" and len(messages) > 1):
            raise BadRow(f"{name} answers another prompt")
    if not isinstance(value, str):
        raise BadRow(f"{name} is neither a string nor a list of messages")
    if not value.strip():
        raise BadRow(f"{name} has an empty answer")
    return clean(value)


def probability(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= 1:
        raise BadRow(f'"{name}" is not a probability from 0 to 1')
    return float(value)


def about(
    fields: dict[str, Any], source: str, messages: Sequence[ChatMessage], max_chars: int, *texts: str
) -> tuple[str, tuple[str, ...]]:
    """Source and tags, of a row that is not too long."""
    length = sum(len(message.content) for message in messages) + sum(map(len, texts))
    if length > max_chars:
        raise BadRow(f"{length} characters, more than prompts.max_chars = {max_chars}")
    tags = fields.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise BadRow('"tags" is not a list of strings')
    named = fields.get("source", source)
    if not isinstance(named, str) or not named:
        raise BadRow('"source" is not a string')
    return clean(named), tuple(clean(tag) for tag in tags)
