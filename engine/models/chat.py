"""From a dialogue to token ids: one way for generation and for training, so that both mean the same text.

A tokenizer with a chat template is used as its template says. One without (a base model) gets the plain format

    Human: <content>\n\nAssistant: <content>\n\nHuman: ...\n\nAssistant:

A control token's text inside a turn (`<|im_end|>`) is data that someone wrote; it is broken up so that it never becomes the
control token and ends the turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from schemas.records import Turn

PLAIN = {"user": "Human: ", "assistant": "Assistant: ", "system": ""}


def inert(text: str, control: Sequence[str]) -> str:
    """The text with every control token in it broken up by a space after its first character."""
    for token in control:
        if token and token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def prompt_text(tokenizer: Any, turns: Sequence[Turn], prefill: str = "") -> str:
    """The prompt up to where the assistant goes on."""
    control = tokenizer.all_special_tokens
    contents = [{"role": turn.role, "content": inert(turn.content, control)} for turn in turns]
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(contents, add_generation_prompt=True, tokenize=False)
        return str(text) + prefill
    parts = [PLAIN.get(turn["role"], "") + turn["content"] for turn in contents]
    return "\n\n".join([*parts, "Assistant:"]) + (f" {prefill}" if prefill else "")


def prompt_ids(tokenizer: Any, turns: Sequence[Turn], prefill: str = "") -> list[int]:
    """The prompt's token ids."""
    # A template writes the special tokens that it wants; the plain format leaves them to the tokenizer.
    special = not tokenizer.chat_template
    return list(tokenizer(prompt_text(tokenizer, turns, prefill), add_special_tokens=special)["input_ids"])


def completion_ids(tokenizer: Any, text: str, *, stopped: bool) -> list[int]:
    """A completion's token ids; the end token is appended when the text ended by itself."""
    ids = list(tokenizer(inert(text, tokenizer.all_special_tokens), add_special_tokens=False)["input_ids"])
    return [*ids, tokenizer.eos_token_id] if stopped else ids
