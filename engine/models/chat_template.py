"""Convert a dialogue to token ids, and the token ids of a completion to text. Generation and training use the same conversion.

If the tokenizer has a chat template, the template is used. Without a chat template (a base model), the dialogue has this plain
format:

    Human: <content>\n\nAssistant: <content>\n\nHuman: ...\n\nAssistant:

A base model continues the dialogue. So its response ends at the point where the model starts the next message.

Thinking is turned off, unless the caller turns it on. A prompt that trains always has thinking turned off, because completions that
train contain no reasoning (engine/models/reasoning.py).

A message can contain the characters of a control token (`<|im_end|>`). A space is inserted into these characters. The
characters are then not encoded as the control token, so they do not end the message (engine/models/control_tokens.py). In the
plain format, a paragraph can look like the start of a message. The empty line before such a paragraph is removed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engine.errors import PermanentRecordError, UsageError
from engine.models.control_tokens import break_up_control_tokens, find_end_token_id
from engine.models.reasoning import SeparatedText, close_reasoning, is_reasoning_open, separate_reasoning
from schemas.records import ChatMessage

MAX_MARKER_TOKENS = 16  # a dialogue marker of the plain format has fewer tokens than this with any tokenizer
_PLAIN_ROLE_PREFIXES = {"user": "Human: ", "assistant": "Assistant: ", "system": ""}
_DIALOGUE_MARKER_LINE = re.compile(r"\n[ \t\r]*(?=(?:Human|Assistant):)")
DIALOGUE_MARKER = re.compile(r"\n[ \t\r]*\n[ \t\r]*(?=(?:Human|Assistant):)")


def escape_dialogue_markers(text: str) -> str:
    """Remove the empty line before each paragraph that looks like the start of a message in the plain format."""
    *before, last = _DIALOGUE_MARKER_LINE.split(text)
    return "\n".join([*(part.rstrip() for part in before), last])


def _apply_chat_template(tokenizer: Any, messages: Sequence[dict[str, str]], thinking: bool) -> str:
    """Return the dialogue in the format of the chat template. Raise PermanentRecordError if the template rejects it.

    Templates that can turn thinking on and off read `enable_thinking` or `thinking`.
    """
    from jinja2.exceptions import TemplateError

    try:
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, enable_thinking=thinking, thinking=thinking
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise PermanentRecordError(
            f"the chat template of the model rejects a dialogue with the roles {roles}",
            str(error),
            "put the system message into the first user message, or use a model whose template supports these roles",
        ) from error
    return str(prompt) if thinking else close_reasoning(str(prompt))


def format_prompt(tokenizer: Any, messages: Sequence[ChatMessage], prefill: str = "", *, thinking: bool = False) -> str:
    """Return the formatted prompt. The prompt ends where the assistant message starts, or with the prefill.

    If `thinking` is false, or if there is a prefill, the model writes its response at once: thinking is turned off in the chat
    template, and reasoning that the template has opened is closed.
    """
    contents = [{"role": message.role, "content": break_up_control_tokens(tokenizer, message.content)} for message in messages]
    if tokenizer.chat_template:
        return _apply_chat_template(tokenizer, contents, thinking and not prefill) + prefill
    parts = [
        _PLAIN_ROLE_PREFIXES.get(message["role"], "") + escape_dialogue_markers(message["content"]) for message in contents
    ]
    return "\n\n".join([*parts, "Assistant:"]) + (f" {prefill}" if prefill else "")


def encode_prompt(tokenizer: Any, messages: Sequence[ChatMessage], prefill: str = "", *, thinking: bool = False) -> list[int]:
    """Return the token ids of the prompt (see `format_prompt`)."""
    # A chat template already contains the special tokens. In the plain format, the tokenizer adds the special tokens.
    add_special_tokens = not tokenizer.chat_template
    prompt = format_prompt(tokenizer, messages, prefill, thinking=thinking)
    return list(tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"])


def encode_completion(tokenizer: Any, text: str, *, ends_with_eos: bool) -> list[int]:
    """Return the token ids of a completion.

    If `ends_with_eos` is true, append the token that ends an assistant message in the chat template. Raise UsageError if the
    tokenizer has none.
    """
    if not tokenizer.chat_template:
        text = escape_dialogue_markers(text if text[:1].isspace() else f" {text}")  # a space follows "Assistant:"
    ids = list(tokenizer(break_up_control_tokens(tokenizer, text), add_special_tokens=False)["input_ids"])
    if not ends_with_eos:
        return ids
    end_token_id = find_end_token_id(tokenizer)
    if end_token_id is None:
        raise UsageError(
            f"the tokenizer {tokenizer.name_or_path} has no end token",
            "it has no eos_token, and its chat template ends a message without a control token",
            "set eos_token in tokenizer_config.json of the model",
        )
    return [*ids, end_token_id]


def find_stop_token_ids(tokenizer: Any) -> set[int]:
    """Return the end tokens of the tokenizer and of its chat template."""
    return {int(token_id) for token_id in (tokenizer.eos_token_id, find_end_token_id(tokenizer)) if token_id is not None}


def opens_reasoning(tokenizer: Any, prompt_token_ids: Sequence[int]) -> bool:
    """Return whether the prompt ends with an opening mark of reasoning, so that a completion begins inside the reasoning."""
    return is_reasoning_open(tokenizer.decode(prompt_token_ids[-MAX_MARKER_TOKENS:]))


def decode_completion(tokenizer: Any, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> SeparatedText:
    """Decode a completion without its end token, and separate its reasoning from its response.

    The marks of reasoning are special tokens in some models (gpt-oss, Magistral), so they are decoded first and removed later.
    """
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    if not tokenizer.chat_template:
        return SeparatedText(DIALOGUE_MARKER.split(text, 1)[0])
    marked_text = tokenizer.decode(token_ids)
    separated = separate_reasoning(marked_text, is_open=opens_reasoning(tokenizer, prompt_token_ids))
    if separated.response == marked_text:
        return SeparatedText(text)
    response = separated.response
    for token in tokenizer.all_special_tokens:
        response = response.replace(token, "")
    return replace(separated, response=response)
