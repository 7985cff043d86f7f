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

_ROLES = ("system", "user", "assistant")
_DIALOGUE_COLUMNS = ("prompt", "messages")
ROW_COLUMNS = frozenset(
    (
        *_DIALOGUE_COLUMNS,
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
SPEAKER_PATTERN = re.compile(r"(?:\A\s*|\n[ \t\r]*\n[ \t\r]*)(Human|Assistant):")  # linear, however many blank lines there are
_ROLES_BY_SPEAKER = {"Human": "user", "Assistant": "assistant"}


class RowError(ValueError):
    """A row that is not what it should be, and why."""


@dataclass(frozen=True)
class PromptRow:
    """A prompt: a dialogue that ends with the user."""

    messages: tuple[ChatMessage, ...]
    source: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class PreferenceRow(PromptRow):
    """Two answers to a prompt; `p_a` is the probability that `a` is better. `ordered`: the row itself said which is `a`."""

    response_a: str
    response_b: str
    p_a: float
    has_fixed_order: bool


@dataclass(frozen=True)
class DemonstrationRow(PromptRow):
    """A prompt with an answer to learn; `stopped`: the answer ended by itself."""

    completion: str
    is_complete: bool


def _extract_fields(row: bytes | dict[str, Any] | RowError) -> dict[str, Any]:
    """The fields of a row that are there: null is the same as absent, as columns have it."""
    if isinstance(row, RowError):
        raise row
    value = _parse_json(row) if isinstance(row, bytes) else row
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise RowError("neither a JSON string nor an object")
    return {name: field for name, field in value.items() if field is not None}


def _parse_json(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(f"byte {error.start + 1} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise RowError("not a prompt: nested too deeply") from error
    except ValueError as error:  # a number with more digits than Python converts
        raise RowError(f"not JSON that can be read: {error}") from error


def parse_prompt(row: bytes | dict[str, Any] | RowError, *, source: str, max_chars: int) -> PromptRow:
    """The prompt in a row; raises BadRow."""
    fields = _extract_fields(row)
    if not any(name in fields for name in _DIALOGUE_COLUMNS) and "chosen" in fields:
        messages, _ = _split_dialogue(_parse_dialogue(fields["chosen"]))
    else:
        messages = _get_prompt(fields)
    named, tags = _parse_metadata(fields, source, messages, max_chars)
    return PromptRow(messages, named, tags)


def parse_preference(row: bytes | dict[str, Any] | RowError, *, source: str, max_chars: int) -> PreferenceRow:
    """Two answers to one prompt, and which is better; raises BadRow."""
    fields = _extract_fields(row)
    ordered = "response_a" in fields
    first, second, p = ("response_a", "response_b", "p_a") if ordered else ("chosen", "rejected", "p_chosen")
    if first not in fields or second not in fields or (ordered and p not in fields):
        raise RowError('neither "chosen" and "rejected" nor "response_a", "response_b" and "p_a" in it')
    messages, a, b = _get_responses(fields, first, second)
    if a == b:
        raise RowError("both answers are the same")
    named, tags = _parse_metadata(fields, source, messages, max_chars, a, b)
    return PreferenceRow(messages, named, tags, a, b, _parse_probability(fields.get(p, 1.0), p), ordered)


def parse_demonstration(row: bytes | dict[str, Any] | RowError, *, source: str, max_chars: int) -> DemonstrationRow:
    """A prompt and its answer; raises BadRow."""
    fields = _extract_fields(row)
    given = next((name for name in ("completion", "chosen") if name in fields), None)
    there = any(name in fields for name in _DIALOGUE_COLUMNS)
    if given and there:
        messages = _get_prompt(fields)
        completion = _parse_response(fields[given], given, messages)
    elif given or there:
        messages, last = _split_dialogue(_parse_dialogue(fields[given]) if given else _get_dialogue(fields))
        completion = _parse_response(last, "the dialogue", messages)
    else:
        raise RowError('no dialogue ("prompt", "messages") and "completion" in it')
    reason = fields.get("finish_reason", "stop")
    if reason not in ("stop", "length"):
        raise RowError('"finish_reason" is neither "stop" nor "length"')
    named, tags = _parse_metadata(fields, source, messages, max_chars, completion)
    return DemonstrationRow(messages, named, tags, completion, reason == "stop")


ROW_PARSERS = {"prompts": parse_prompt, "preferences": parse_preference, "demonstrations": parse_demonstration}


# Dialogues


def _get_dialogue(fields: dict[str, Any]) -> tuple[ChatMessage, ...]:
    """The dialogue under one of its names."""
    return _parse_dialogue(next((fields[name] for name in ("messages", "prompt") if name in fields), None))


def _parse_dialogue(value: Any) -> tuple[ChatMessage, ...]:
    """A transcript, or a list of messages."""
    if isinstance(value, str):
        return _parse_transcript(value)
    if not isinstance(value, list) or not value:
        raise RowError("the dialogue is not a list of messages")
    return tuple(_parse_message(message) for message in value)


def _parse_transcript(text: str) -> tuple[ChatMessage, ...]:
    """The messages of a text in which paragraphs begin with who speaks; all of it is the user's when none does."""
    before, *marked = SPEAKER_PATTERN.split(text)
    if not marked:
        return (_parse_message({"role": "user", "content": text}),)
    if before.strip():
        raise RowError("text before the first Human: or Assistant:")
    spoken = [(_ROLES_BY_SPEAKER[who], said.strip()) for who, said in zip(marked[::2], marked[1::2], strict=True)]
    joined = [
        (role, "\n\n".join(said for _, said in messages))
        for role, messages in groupby([message for message in spoken if message[1]], key=lambda message: message[0])
    ]
    if not joined:
        raise RowError("an empty prompt")
    return tuple(_parse_message({"role": role, "content": said}) for role, said in joined)


def _parse_message(value: Any) -> ChatMessage:
    if not isinstance(value, dict) or value.get("role") not in _ROLES or not isinstance(value.get("content"), str):
        raise RowError(f"a message needs a role ({', '.join(_ROLES)}) and a content")
    if not value["content"].strip():
        raise RowError("an empty prompt")
    return ChatMessage(role=value["role"], content=_reject_surrogates(value["content"]))


def _reject_surrogates(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RowError("a lone surrogate, which no text can hold")
    return text


def _split_dialogue(messages: Sequence[ChatMessage]) -> tuple[tuple[ChatMessage, ...], str]:
    """The prompt, which ends with the last message of the user, and what the assistant said after it."""
    asked = max((place for place, message in enumerate(messages) if message.role == "user"), default=None)
    if asked is None:
        raise RowError("no message of the user")
    return tuple(messages[: asked + 1]), "\n\n".join(message.content for message in messages[asked + 1 :])


def _get_prompt(fields: dict[str, Any]) -> tuple[ChatMessage, ...]:
    """The dialogue beside an answer, or alone."""
    if not any(name in fields for name in _DIALOGUE_COLUMNS):
        raise RowError('no "prompt" or "messages" in it')
    if "messages" in fields or isinstance(fields["prompt"], list):
        messages = _get_dialogue(fields)
    else:
        # A prompt is a transcript only if it begins as one does in HH-RLHF: "Human: ..." alone may be what someone asks.
        text = fields["prompt"]
        spoken = isinstance(text, str) and text.startswith("\n\nHuman:")
        messages = _parse_transcript(text) if spoken else (_parse_message({"role": "user", "content": text}),)
    if messages[-1].role != "user":
        raise RowError("the last message is not the user's")
    return messages


# Answers


def _get_responses(fields: dict[str, Any], first: str, second: str) -> tuple[tuple[ChatMessage, ...], str, str]:
    """The prompt and both answers: beside each other, or two dialogues that begin with the same prompt."""
    if any(name in fields for name in _DIALOGUE_COLUMNS):
        messages = _get_prompt(fields)
        return messages, _parse_response(fields[first], first, messages), _parse_response(fields[second], second, messages)
    (messages, a), (other, b) = (_split_dialogue(_parse_dialogue(fields[name])) for name in (first, second))
    if messages != other:
        raise RowError(f"{first} and {second} do not answer the same prompt")
    return messages, _parse_response(a, first, messages), _parse_response(b, second, messages)


def _parse_response(value: Any, name: str, prompt_messages: tuple[ChatMessage, ...]) -> str:
    """An answer: a string, or a list of messages that has the prompt before it or only the assistant's own."""
    if isinstance(value, list):
        messages = _parse_dialogue(value)
        before, value = (
            _split_dialogue(messages) if messages[0].role != "assistant" else (prompt_messages, messages[-1].content)
        )
        if before != prompt_messages or (messages[0].role == "assistant" and len(messages) > 1):
            raise RowError(f"{name} answers another prompt")
    if not isinstance(value, str):
        raise RowError(f"{name} is neither a string nor a list of messages")
    if not value.strip():
        raise RowError(f"{name} has an empty answer")
    return _reject_surrogates(value)


def _parse_probability(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= 1:
        raise RowError(f'"{name}" is not a probability from 0 to 1')
    return float(value)


def _parse_metadata(
    fields: dict[str, Any], source: str, messages: Sequence[ChatMessage], max_chars: int, *texts: str
) -> tuple[str, tuple[str, ...]]:
    """Source and tags, of a row that is not too long."""
    length = sum(len(message.content) for message in messages) + sum(map(len, texts))
    if length > max_chars:
        raise RowError(f"{length} characters, more than prompts.max_chars = {max_chars}")
    tags = fields.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise RowError('"tags" is not a list of strings')
    named = fields.get("source", source)
    if not isinstance(named, str) or not named:
        raise RowError('"source" is not a string')
    return _reject_surrogates(named), tuple(_reject_surrogates(tag) for tag in tags)
