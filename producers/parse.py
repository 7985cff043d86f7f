"""Parse rows into prompts, comparisons of two responses, or demonstrations. An invalid row raises RowError with the reason.

A dialogue has one of these forms:

* The column `prompt` is a string or a list of messages {role, content}, or the column `messages` is a list of messages.
* The column of the dialogue is a transcript as in HH-RLHF (Bai et al. 2022, arXiv 2204.05862). A transcript is a string. In it,
  "Human:" or "Assistant:" at the beginning of a paragraph starts a message. Elsewhere these words are content. The prompt ends
  with the last human message. Consecutive messages of one role are joined as paragraphs.

A comparison has the columns `chosen` and `rejected`, and optionally `p_chosen`. Alternatively, it has the columns `response_a`,
`response_b` and `p_a`, the probability that A is better. If the row has a dialogue, the two columns contain only the responses.
If not, each column contains a whole dialogue. The two dialogues have the same prompt.

A demonstration has a dialogue and a `completion`, or one dialogue that ends with an assistant message. If the row is a
comparison, the demonstration is the chosen response. The columns `source` and `tags` are optional in every row.
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
# The matching time of this pattern is linear in the number of blank lines.
SPEAKER_PATTERN = re.compile(r"(?:\A\s*|\n[ \t\r]*\n[ \t\r]*)(Human|Assistant):")
_ROLES_BY_SPEAKER = {"Human": "user", "Assistant": "assistant"}


class RowError(ValueError):
    """An invalid row; the message is the reason."""


@dataclass(frozen=True)
class PromptRow:
    """A prompt: a dialogue that ends with the user."""

    messages: tuple[ChatMessage, ...]
    source: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class PreferenceRow(PromptRow):
    """Two responses to a prompt. `p_a` is the probability that A is better.

    If `has_fixed_order` is true, the row itself defines which response is A.
    """

    response_a: str
    response_b: str
    p_a: float
    has_fixed_order: bool


@dataclass(frozen=True)
class DemonstrationRow(PromptRow):
    """A prompt with a completion to learn. If `is_complete` is true, the completion ended with the end token."""

    completion: str
    is_complete: bool


def _extract_fields(row: bytes | dict[str, Any] | RowError) -> dict[str, Any]:
    """Return the fields of a row without null fields. Columnar formats write null for an absent field."""
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
    except ValueError as error:  # the number has more digits than Python can convert
        raise RowError(f"not JSON that can be read: {error}") from error


def parse_prompt(row: bytes | dict[str, Any] | RowError, *, source: str, max_chars: int) -> PromptRow:
    """Parse the prompt of a row. The row may also be a comparison. Raise RowError if the row is invalid."""
    fields = _extract_fields(row)
    if not any(name in fields for name in _DIALOGUE_COLUMNS) and "chosen" in fields:
        messages, _ = _split_dialogue(_parse_dialogue(fields["chosen"]))
    else:
        messages = _get_prompt(fields)
    row_source, tags = _parse_metadata(fields, source, messages, max_chars)
    return PromptRow(messages, row_source, tags)


def parse_preference(row: bytes | dict[str, Any] | RowError, *, source: str, max_chars: int) -> PreferenceRow:
    """Parse two responses to one prompt and their label. Raise RowError if the row is invalid."""
    fields = _extract_fields(row)
    has_fixed_order = "response_a" in fields
    first, second, p = ("response_a", "response_b", "p_a") if has_fixed_order else ("chosen", "rejected", "p_chosen")
    if first not in fields or second not in fields or (has_fixed_order and p not in fields):
        raise RowError('needs "chosen" and "rejected", or "response_a", "response_b" and "p_a"')
    messages, a, b = _get_responses(fields, first, second)
    if a == b:
        raise RowError("both responses are the same")
    row_source, tags = _parse_metadata(fields, source, messages, max_chars, a, b)
    return PreferenceRow(messages, row_source, tags, a, b, _parse_probability(fields.get(p, 1.0), p), has_fixed_order)


def parse_demonstration(row: bytes | dict[str, Any] | RowError, *, source: str, max_chars: int) -> DemonstrationRow:
    """Parse a prompt and its completion. Raise RowError if the row is invalid."""
    fields = _extract_fields(row)
    column = next((name for name in ("completion", "chosen") if name in fields), None)
    has_dialogue = any(name in fields for name in _DIALOGUE_COLUMNS)
    if column and has_dialogue:
        messages = _get_prompt(fields)
        completion = _parse_response(fields[column], column, messages)
    elif column or has_dialogue:
        messages, last = _split_dialogue(_parse_dialogue(fields[column]) if column else _get_dialogue(fields))
        completion = _parse_response(last, "the dialogue", messages)
    else:
        raise RowError('no dialogue ("prompt" or "messages") and no "completion"')
    finish_reason = fields.get("finish_reason", "stop")
    if finish_reason not in ("stop", "length"):
        raise RowError('"finish_reason" is neither "stop" nor "length"')
    row_source, tags = _parse_metadata(fields, source, messages, max_chars, completion)
    return DemonstrationRow(messages, row_source, tags, completion, finish_reason == "stop")


ROW_PARSERS = {"prompts": parse_prompt, "preferences": parse_preference, "demonstrations": parse_demonstration}


# Dialogues


def _get_dialogue(fields: dict[str, Any]) -> tuple[ChatMessage, ...]:
    """Return the dialogue from the column `messages` or, if the row does not have it, from the column `prompt`."""
    return _parse_dialogue(next((fields[name] for name in ("messages", "prompt") if name in fields), None))


def _parse_dialogue(value: Any) -> tuple[ChatMessage, ...]:
    """Parse a transcript or a list of messages."""
    if isinstance(value, str):
        return _parse_transcript(value)
    if not isinstance(value, list) or not value:
        raise RowError("the dialogue is not a list of messages")
    return tuple(_parse_message(message) for message in value)


def _parse_transcript(text: str) -> tuple[ChatMessage, ...]:
    """Parse a transcript. A text without "Human:" and "Assistant:" is one user message."""
    preamble, *parts = SPEAKER_PATTERN.split(text)  # the parts are: speaker, content, speaker, content, ...
    if not parts:
        return (_parse_message({"role": "user", "content": text}),)
    if preamble.strip():
        raise RowError("text before the first Human: or Assistant:")
    messages = [(_ROLES_BY_SPEAKER[who], content.strip()) for who, content in zip(parts[::2], parts[1::2], strict=True)]
    groups = groupby([message for message in messages if message[1]], key=lambda message: message[0])
    joined = [(role, "\n\n".join(content for _, content in group)) for role, group in groups]
    if not joined:
        raise RowError("an empty prompt")
    return tuple(_parse_message({"role": role, "content": content}) for role, content in joined)


def _parse_message(value: Any) -> ChatMessage:
    if not isinstance(value, dict) or value.get("role") not in _ROLES or not isinstance(value.get("content"), str):
        raise RowError(f"a message needs a role ({', '.join(_ROLES)}) and a content")
    if not value["content"].strip():
        raise RowError("an empty prompt")
    return ChatMessage(role=value["role"], content=_reject_surrogates(value["content"]))


def _reject_surrogates(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RowError("a lone surrogate, which UTF-8 cannot encode")
    return text


def _split_dialogue(messages: Sequence[ChatMessage]) -> tuple[tuple[ChatMessage, ...], str]:
    """Split a dialogue after its last user message. Return the prompt, and the assistant's messages after it as one string."""
    last_user = max((index for index, message in enumerate(messages) if message.role == "user"), default=None)
    if last_user is None:
        raise RowError("no user message")
    return tuple(messages[: last_user + 1]), "\n\n".join(message.content for message in messages[last_user + 1 :])


def _get_prompt(fields: dict[str, Any]) -> tuple[ChatMessage, ...]:
    """Return the prompt of a row: a dialogue that ends with the user."""
    if not any(name in fields for name in _DIALOGUE_COLUMNS):
        raise RowError('no "prompt" and no "messages"')
    if "messages" in fields or isinstance(fields["prompt"], list):
        messages = _get_dialogue(fields)
    else:
        # A string is a transcript only if it begins with two line ends, as in HH-RLHF. A plain prompt may begin with "Human:".
        text = fields["prompt"]
        is_transcript = isinstance(text, str) and text.startswith("\n\nHuman:")
        messages = _parse_transcript(text) if is_transcript else (_parse_message({"role": "user", "content": text}),)
    if messages[-1].role != "user":
        raise RowError("the last message is not from the user")
    return messages


# Responses


def _get_responses(fields: dict[str, Any], first: str, second: str) -> tuple[tuple[ChatMessage, ...], str, str]:
    """Return the prompt and the two responses. The texts are in separate columns or in two dialogues with the same prompt."""
    if any(name in fields for name in _DIALOGUE_COLUMNS):
        messages = _get_prompt(fields)
        return messages, _parse_response(fields[first], first, messages), _parse_response(fields[second], second, messages)
    (messages, a), (other_messages, b) = (_split_dialogue(_parse_dialogue(fields[name])) for name in (first, second))
    if messages != other_messages:
        raise RowError(f"{first} and {second} have different prompts")
    return messages, _parse_response(a, first, messages), _parse_response(b, second, messages)


def _parse_response(value: Any, name: str, prompt_messages: tuple[ChatMessage, ...]) -> str:
    """Parse a response: a string, or a list of messages that begins with the prompt or has only an assistant message."""
    if isinstance(value, list):
        messages = _parse_dialogue(value)
        if messages[0].role == "assistant":
            row_prompt, value = prompt_messages if len(messages) == 1 else (), messages[-1].content
        else:
            row_prompt, value = _split_dialogue(messages)
        if row_prompt != prompt_messages:
            raise RowError(f"{name} has another prompt")
    if not isinstance(value, str):
        raise RowError(f"{name} is neither a string nor a list of messages")
    if not value.strip():
        raise RowError(f"{name} has an empty response")
    return _reject_surrogates(value)


def _parse_probability(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= 1:
        raise RowError(f'"{name}" is not a probability from 0 to 1')
    return float(value)


def _parse_metadata(
    fields: dict[str, Any], source: str, messages: Sequence[ChatMessage], max_chars: int, *responses: str
) -> tuple[str, tuple[str, ...]]:
    """Return the source and the tags of a row. Raise RowError if the row has more than `max_chars` characters."""
    length = sum(len(message.content) for message in messages) + sum(map(len, responses))
    if length > max_chars:
        raise RowError(f"{length} characters, more than prompts.max_chars = {max_chars}")
    tags = fields.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise RowError('"tags" is not a list of strings')
    row_source = fields.get("source", source)
    if not isinstance(row_source, str) or not row_source:
        raise RowError('"source" is not a non-empty string')
    return _reject_surrogates(row_source), tuple(_reject_surrogates(tag) for tag in tags)
