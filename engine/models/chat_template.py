"""From a dialogue to token ids: one way for generation and for training, so that both mean the same text.

A tokenizer with a chat template is used as its template says. One without (a base model) gets the plain format

    Human: <content>\n\nAssistant: <content>\n\nHuman: ...\n\nAssistant:

and its answer is over where it begins a turn itself, since a base model goes on with the dialogue.

A control token's text inside a message (`<|im_end|>`) is data that someone wrote; it is broken up so that it never becomes the
control token and ends the message. In the plain format a paragraph that begins like a message loses the empty line before it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from engine.errors import PermanentRecordError
from schemas.records import ChatMessage

_PLAIN_ROLE_PREFIXES = {"user": "Human: ", "assistant": "Assistant: ", "system": ""}
_DIALOGUE_MARKER_LINE = re.compile(r"\n[ \t\r]*(?=(?:Human|Assistant):)")
DIALOGUE_MARKER = re.compile(r"\n[ \t\r]*\n[ \t\r]*(?=(?:Human|Assistant):)")


def escape_special_tokens(text: str, special_tokens: Sequence[str]) -> str:
    """The text with every control token in it broken up by a space after its first character."""
    for token in special_tokens:
        if token and token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def escape_dialogue_markers(text: str) -> str:
    """The text with no paragraph that begins like a message of the plain format."""
    *before, last = _DIALOGUE_MARKER_LINE.split(text)
    return "\n".join([*(part.rstrip() for part in before), last])


def _apply_chat_template(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    """The dialogue as the chat template writes it; raises PermanentRecordError where the template takes no such dialogue."""
    from jinja2.exceptions import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise PermanentRecordError(
            f"the model's chat template takes no dialogue of the messages {roles}",
            str(error),
            "put a system message's text into the first user message, or take a model whose template has such messages",
        ) from error


def format_prompt(tokenizer: Any, messages: Sequence[ChatMessage], prefill: str = "") -> str:
    """The prompt up to where the assistant goes on."""
    control = tokenizer.all_special_tokens
    contents = [{"role": message.role, "content": escape_special_tokens(message.content, control)} for message in messages]
    if tokenizer.chat_template:
        return _apply_chat_template(tokenizer, contents) + prefill
    parts = [
        _PLAIN_ROLE_PREFIXES.get(message["role"], "") + escape_dialogue_markers(message["content"]) for message in contents
    ]
    return "\n\n".join([*parts, "Assistant:"]) + (f" {prefill}" if prefill else "")


def encode_prompt(tokenizer: Any, messages: Sequence[ChatMessage], prefill: str = "") -> list[int]:
    """The prompt's token ids."""
    # A template writes the special tokens that it wants; the plain format leaves them to the tokenizer.
    special = not tokenizer.chat_template
    return list(tokenizer(format_prompt(tokenizer, messages, prefill), add_special_tokens=special)["input_ids"])


def encode_completion(tokenizer: Any, text: str, *, ends_with_eos: bool) -> list[int]:
    """A completion's token ids; the end token is appended when the text ended by itself."""
    if not tokenizer.chat_template:
        text = escape_dialogue_markers(text if text[:1].isspace() else f" {text}")  # after "Assistant:" comes a space
    ids = list(tokenizer(escape_special_tokens(text, tokenizer.all_special_tokens), add_special_tokens=False)["input_ids"])
    return [*ids, tokenizer.eos_token_id] if ends_with_eos else ids
