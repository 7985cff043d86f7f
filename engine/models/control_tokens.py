r"""Find control tokens in texts and break them up, and find the token that ends an assistant message.

A control token, such as `<|im_end|>`, structures a dialogue. If a text of a user or a model contained one, the text could end its
message and start another one. A space is therefore inserted after the first character of each control token in a text. The
characters are then encoded as ordinary text. Records keep the original text. Only what models read and learn has the space.

Local models: the control tokens are those of the tokenizer (`list_control_tokens`).

Servers: the tokenizer is unknown, and a server encodes control tokens in a message like its own. So the markers of all known chat
formats are broken up (`MARKER_PATTERN`). A text that is about such markers loses little: a model reads `< |im_end|>`. Each marker
is reported once and counted (engine/notices.py). The views for training have the column `has_control_markers`, because other
programs that train on such a row may encode the marker as a control token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import groupby
from typing import Any

from engine.notices import NOTICES

_NAME = r"[^\s<>|｜\[\]]{1,64}"
# RE2, the engine of DuckDB, must also support this pattern, so it has no lookahead.
MARKER_PATTERN = "|".join(
    [
        rf"<[|｜]{_NAME}[|｜]?>",  # ChatML, Llama 3, Phi, Command, DeepSeek, GLM, Kimi, harmony: <|im_start|>, <｜User｜>
        rf"<{_NAME}[|｜]>",
        rf"\[[|]{_NAME}[|]\]",  # EXAONE: [|assistant|]
        r"</?(?:start|end|begin)_of_[a-z_]{1,32}>",  # Gemma, SmolVLM: <start_of_turn>
        r"\[/?(?:INST|SYSTEM_PROMPT|MODEL_SETTINGS|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|THINK)\]",  # Mistral
        r"<</?SYS>>",  # Llama 2
        r"</?s>|<(?:bos|eos|pad|unk|sop|eop|eot|eod)>|\[(?:BOS|EOS|gMASK|sMASK)\]",
        r"</?seed:[a-z_]{1,32}>|<(?:unused|reserved|extra_id|ctrl|SPECIAL)_?[0-9]{1,5}>",
        r"\]~!?b[\]\[]|\[e~\[",  # MiniMax
    ]
)
_MARKERS = re.compile(MARKER_PATTERN)
_BRACKETED = re.compile(r"[<\[{]\S+[>\]}]")
_CONTENT = "CHARTER-RESPONSE"  # a placeholder for the content of an assistant message in a rendered chat template
MARKER_MACRO = f"CREATE OR REPLACE MACRO has_control_markers(text) AS regexp_matches(coalesce(text, ''), '{MARKER_PATTERN}')"


def _report_and_break_up(match: re.Match[str]) -> str:
    token = match[0]
    broken = f"{token[0]} {token[1:]}"
    NOTICES.report(
        "control_token",
        token,
        f"a text contains the control token {token}: models read and learn {broken}, records keep the text",
    )
    return broken


def _break_up(pattern: re.Pattern[str], text: str) -> str:
    """Insert a space after the first character of every match. Repeat this, because matches can overlap."""
    while pattern.search(text):
        text = pattern.sub(_report_and_break_up, text)
    return text


def break_up_markers(text: str) -> str:
    """Return a text in which no known marker of a chat format is left, for a server with an unknown tokenizer."""
    return _break_up(_MARKERS, text)


def break_up_control_tokens(tokenizer: Any, text: str) -> str:
    """Return a text in which no control token of the tokenizer is left."""
    pattern = _cache_by_tokenizer(_compile_pattern, tokenizer)
    return text if pattern is None else _break_up(pattern, text)


def list_control_tokens(tokenizer: Any) -> list[str]:
    """Return the control tokens of a tokenizer.

    These are its special tokens, all added tokens that are marked as special or look like a marker, and all bracketed added
    tokens (`<think>`) and markers (`[INST]`) that its chat template contains. Many control tokens are not in the map of special
    tokens, and some markers of a template are not tokens. Other added tokens, such as the HTML tags of Gemma, are ordinary text.
    """
    template = str(tokenizer.chat_template or "")
    tokens = {*tokenizer.all_special_tokens, *_MARKERS.findall(template)}
    for token in tokenizer.added_tokens_decoder.values():
        in_template = _BRACKETED.fullmatch(token.content) and token.content in template
        if token.special or _MARKERS.fullmatch(token.content) or in_template:
            tokens.add(token.content)
    # A token of one character cannot be broken up, and white space is ordinary text.
    return sorted({token.strip() for token in tokens if len(token.strip()) > 1})


def _compile_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Return a pattern that matches each control token, or None if the tokenizer has no control token."""
    groups = groupby(list_control_tokens(tokenizer), key=lambda token: token[0])
    return _compile_alternatives((first, [token[1:] for token in tokens]) for first, tokens in groups)


def _compile_alternatives(groups: Iterable[tuple[str, list[str]]]) -> re.Pattern[str] | None:
    parts = [f"{re.escape(first)}(?:{'|'.join(map(re.escape, rest))})" for first, rest in groups]
    return re.compile("|".join(parts)) if parts else None


def find_end_token_id(tokenizer: Any) -> int | None:
    """Return the id of the token that ends an assistant message in the tokenizer's chat template.

    It can differ from `eos_token`: ChatML ends a message with `<|im_end|>` and Gemma with `<end_of_turn>`. Some templates (GLM) end
    a message with the marker of the next one. Without a chat template, or if the template has no such token, return the id of
    `eos_token`, or None if the tokenizer has no `eos_token`.
    """
    return _cache_by_tokenizer(_find_end_token_id, tokenizer)


def _find_end_token_id(tokenizer: Any) -> int | None:
    if not tokenizer.chat_template:
        return tokenizer.eos_token_id
    control_tokens = set(list_control_tokens(tokenizer))
    control_ids = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.content.strip() in control_tokens}
    question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": _CONTENT}
    for messages in ([question, answer], [question, answer, question]):
        for token_id in tokenizer(_render_after_content(tokenizer, messages), add_special_tokens=False)["input_ids"]:
            if token_id in control_ids:
                return int(token_id)
    NOTICES.report(
        "end_token",
        str(tokenizer.name_or_path),
        f"the chat template of {tokenizer.name_or_path} ends an assistant message without a control token: "
        f"training uses {tokenizer.eos_token} as the end",
    )
    return tokenizer.eos_token_id


def _render_after_content(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Return what a chat template writes after the content of the assistant message, or "" if it rejects the dialogue."""
    from jinja2.exceptions import TemplateError

    try:
        text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=False))
    except TemplateError:
        return ""
    return text.rpartition(_CONTENT)[2] if _CONTENT in text else ""


@lru_cache(maxsize=32)
def _cached(
    compute: Callable[[Any], Any], tokenizer: Any, num_tokens: int, template: str, special_tokens: tuple[str, ...]
) -> Any:
    return compute(tokenizer)


def _cache_by_tokenizer(compute: Callable[[Any], Any], tokenizer: Any) -> Any:
    """Return `compute(tokenizer)`. It is computed again only if the tokens or the template of the tokenizer have changed."""
    return _cached(compute, tokenizer, len(tokenizer), str(tokenizer.chat_template), tuple(tokenizer.all_special_tokens))
