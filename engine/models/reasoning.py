r"""Separate the reasoning of a model from its response.

A model that thinks writes its reasoning before its response. The reasoning is kept in records, in its own field. It is never
compared, trained on or exported. There are three kinds of marks:

* a server puts the reasoning into its own field of the message (`reasoning_content`, `reasoning`, `thinking`,
  `reasoning_details`), or into parts of the content with the type `thinking`;
* the text contains marks: `<think>...</think>` and similar tags, `[THINK]...[/THINK]`, the channels of gpt-oss (harmony), and the
  marks of Cohere, Seed, Kimi-VL, MedGemma and Gemma 4, the sections of Granite and those of Open WebUI;
* the chat template has written the opening mark, so that the text has only the closing mark.

Reasoning is separated only where it begins the text. Up to `_MAX_OPENING_WORDS` words may precede it (`Okay. <think>`); they
belong to the reasoning, as in the parsers of SGLang and vLLM. A text that only mentions a mark stays unchanged:

* a mark in a code block, or next to a quotation mark, a bracket or punctuation, is part of a sentence;
* a mark between spaces is part of a sentence if a lower-case word follows.

What remains in a text has two degrees. `contains_reasoning` is true if a remaining mark stands where a model writes it, for
instance alone on a line: such a text is unusable (engine/eligibility.py). `has_reasoning_marks` is true if a mark occurs at all:
such a text is usable, and the views for training mark it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.models.interface import Generation
from engine.notices import NOTICES

_TAG_NAME = (
    r"(?i:(?:[a-z]{1,16}[:_]){0,2}(?:think|thinks|(?:ant)?thinking|thoughts?|reason|reasoning|reflection|scratchpad|monologue"
    r"|deepthink|cot)(?:_process)?)"
)
# RE2, the engine of DuckDB, must also support the patterns of marks, so they have no lookahead.
_OPEN = "|".join(
    [
        rf"<{_TAG_NAME}(?:[ \t]+[a-z_]+=[^<>\n]{{0,80}})?[ \t]*>",
        r"\[(?i:think(?:ing)?)\]",
        "◁think▷",
        r"<\|(?:begin_of_thought|START_THINKING|inner_prefix|think_start|think_begin|start_think(?:ing)?|begin_of_thinking|think"
        r"|thinking|reasoning)\|>",
        r"<start_working_out>",
        r"<unused94>(?:thought)?",
        r"<\|channel>(?:thought)?",
        r"<\|channel\|>(?:analysis|commentary)[^<]{0,80}<\|message\|>",
    ]
)
_CLOSE = "|".join(
    [
        rf"</{_TAG_NAME}[ \t]*>",
        r"\[/(?i:think(?:ing)?)\]",
        "◁/think▷",
        r"<\|(?:end_of_thought|END_THINKING|inner_suffix|think_end|end_think(?:ing)?|end_of_thinking|/think|/thinking|/reasoning)\|>",
        r"<end_working_out>",
        r"<unused95>",
        r"<channel\|>",
        r"<\|channel\|>final[^<]{0,80}<\|message\|>",
    ]
)
_FINAL_CHANNEL = re.compile(r"(?:<\|start\|>)?(?:assistant)?<\|channel\|>final[^<]{0,80}<\|message\|>")
_CHANNEL_END = re.compile(r"<\|(?:end|return|call)\|>")
# gpt-oss whose special tokens were left out: "analysisThe user asks ... assistantfinalParis."
_BARE_CHANNELS = re.compile(r"\s*analysis(?=[A-Z\"'])(?P<reasoning>.*?)(?:assistant\s*final(?P<response>.*)|\Z)", re.DOTALL)
# Granite 3.2: "Here is my thought process: ... Here is my response: Paris."
_GRANITE_SECTIONS = re.compile(
    r"\s*Here(?: i|'|’)s my thought process:(?P<reasoning>.*?)(?:Here(?: i|'|’)s my response:(?P<response>.*)|\Z)", re.DOTALL
)
# Open WebUI: <details type="reasoning" done="true"> <summary>Thought for 3 seconds</summary> ... </details> Paris.
_DETAILS_SECTION = re.compile(
    r"\s*<details[^<>\n]{0,80} type=.reasoning.[^<>]{0,200}>(?P<reasoning>.*?)(?:</details>(?P<response>.*)|\Z)", re.DOTALL
)
# Text that looks like reasoning, but is not separated from the response, because it has many other uses.
_HINT = (
    r"</?(?i:analysis|plan|planning|deliberation|internal)>|&lt;/?(?i:think|thinking|thought)&gt;|<details[^<>]* type=.reasoning"
    r"|^[ \t\r\n*#]*(?:Thinking|Reasoning|Thought)(?: [Pp]rocess)?:"
)
# Marks around the response that some models write after their reasoning.
_RESPONSE_WRAPPER = re.compile(
    r"\s*(?:<(?P<tag>(?i:answer|response|output|solution))>(?P<tagged>.*?)(?:</(?P=tag)>\s*|\Z)"
    r"|<\|(?:begin_of_solution|START_RESPONSE|START_TEXT|begin_of_box)\|>(?P<marked>.*?)(?:<\|(?:end_of_solution|END_RESPONSE|END_TEXT|end_of_box)\|>\s*|\Z))\Z",
    re.DOTALL,
)
_OPEN_PATTERN, _CLOSE_PATTERN = re.compile(_OPEN), re.compile(_CLOSE)
_OPEN_AT_START = re.compile(rf"[\s\ufeff\u200b]*(?:<\|start\|>assistant)?(?:{_OPEN})")
_OPEN_AT_END = re.compile(rf"(?P<mark>{_OPEN})\s*\Z")
_HARMONY_PROMPT_END = re.compile(r"<\|start\|>assistant\Z")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_MAX_OPENING_WORDS = 8
_QUOTES_BEFORE, _QUOTES_AFTER = "\"'`“‘«([{/|", "\"'`”’»)]}/|.,;:!?"
_PROSE_AFTER = re.compile(r"[ \t]+[a-z]")
_OPEN_CONTINUATION = re.compile(r"[ \t]*\n|[^\s<]|[ \t]+[^\sa-z]")
# Remaining marks where a model writes them: an opening mark at the start of the text, a mark alone on its line, and a mark
# between the end of a sentence and the end of its line.
REASONING_PATTERN = (
    rf"^[ \t\r\n]*(?:{_OPEN})(?:[ \t]*\n|[^ \t\n<.,;:!?]|[ \t]+[A-Z])"
    rf"|(?:^|\n)[ \t]*(?:{_OPEN}|{_CLOSE})[ \t]*(?:\r?\n|$)"
    rf"|[.!?…:][ \t]*(?:{_OPEN})[ \t]*\r?\n"
    rf"|[.!?…](?:{_CLOSE})[ \t]*(?:\r?\n|$)"
    r"|^[ \t\r\n]*<details[^<>]* type=.reasoning"
)
_REASONING_REGEX = re.compile(REASONING_PATTERN)
_MARK_PATTERN = f"{_OPEN}|{_CLOSE}|{_HINT}"
_MARK_REGEX = re.compile(_MARK_PATTERN)
_SEPARATOR_REGEX = re.compile(f"{_OPEN}|{_CLOSE}")
_SQL_CODE_PATTERN = "```.*?(?:```|$)|`[^`\n]*`"
REASONING_MACROS = (
    f"CREATE OR REPLACE MACRO has_reasoning_marks(text) AS regexp_matches(coalesce(text, ''), '{_MARK_PATTERN}')",
    f"""CREATE OR REPLACE MACRO contains_reasoning(text) AS has_reasoning_marks(text)
        AND regexp_matches(regexp_replace(text, '{_SQL_CODE_PATTERN}', '`code`', 'gs'), '{REASONING_PATTERN}')""",
)
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking", "reasoning_text", "thought")


@dataclass(frozen=True)
class SeparatedText:
    """A response and its reasoning.

    `ends_in_reasoning` is true if the text ended before the response began. `lacks_opening` is true if the reasoning has a closing
    mark but no opening mark, because the chat template of the server has written the opening mark.
    """

    response: str
    reasoning: str = ""
    ends_in_reasoning: bool = False
    lacks_opening: bool = False


def has_reasoning_marks(text: str) -> bool:
    """Return whether a mark of reasoning occurs anywhere in a text."""
    return _MARK_REGEX.search(text) is not None


def has_opening_mark(text: str) -> bool:
    """Return whether a text contains an opening mark of reasoning."""
    return _OPEN_PATTERN.search(text) is not None


def has_closing_mark(text: str) -> bool:
    """Return whether a text contains a closing mark of reasoning."""
    return _CLOSE_PATTERN.search(text) is not None


def contains_reasoning(text: str) -> bool:
    """Return whether a text contains a mark of reasoning where a model writes it, and not as a part of a sentence or of code."""
    return has_reasoning_marks(text) and _REASONING_REGEX.search(_CODE.sub("`code`", text)) is not None


def separate_reasoning(text: str, *, is_open: bool = False) -> SeparatedText:
    """Separate the reasoning at the beginning of a text from the response.

    `is_open` is true if the chat template has written the opening mark, so that the text begins inside the reasoning.
    """
    if not is_open and (bare := _BARE_CHANNELS.match(text) or _GRANITE_SECTIONS.match(text) or _DETAILS_SECTION.match(text)):
        response = bare["response"]
        return SeparatedText((response or "").strip(), bare["reasoning"].strip(), response is None)
    if (final := _find_final_channel(text)) is not None:
        return SeparatedText(_CHANNEL_END.split(text[final.end() :], 1)[0].strip(), _strip_marks(text[: final.start()]))
    position, max_words = 0, _MAX_OPENING_WORDS  # the response begins at `position` or later
    lacks_opening = not is_open and _find_opening_end(text, max_words) is None
    while True:
        rest = text[position:]
        if not is_open and (opening_end := _find_opening_end(rest, max_words)) is not None:
            position, is_open = position + opening_end, True
            continue
        close = _find_close(rest, is_open)
        if close is None:
            break
        position, is_open, max_words = position + close.end(), False, 0
    if is_open:
        return SeparatedText("", _strip_marks(text), ends_in_reasoning=True)
    if not position:
        return SeparatedText(text)
    return SeparatedText(_unwrap(text[position:]).strip(), _strip_marks(text[:position]), lacks_opening=lacks_opening)


def _find_final_channel(text: str) -> re.Match[str] | None:
    """Return the start of the final channel, if the text has channels and is not a text about them."""
    final = _FINAL_CHANNEL.search(_mask_code(text))
    if final is None or (final.start() and final[0].startswith("<|channel") and not _OPEN_AT_START.match(text)):
        return None
    return final


def _mask_code(text: str) -> str:
    """Return a text of the same length without the code in it."""
    return _CODE.sub(lambda match: " " * len(match[0]), text)


def _find_opening_end(text: str, max_words: int) -> int | None:
    """Return the end of an opening mark that begins a text, or None. At most `max_words` words may precede the mark."""
    if match := _OPEN_AT_START.match(text):
        return match.end()
    masked = _mask_code(text)
    mark = _OPEN_PATTERN.search(masked)
    if mark is None or len(masked[: mark.start()].split()) > max_words or _is_quoted(masked, mark):
        return None
    close = _CLOSE_PATTERN.search(masked, mark.end())
    if close is None:  # an unfinished thought, or a sentence about the mark
        return mark.end() if re.match(r"[ \t]*\r?\n", masked[mark.end() :]) else None
    is_written = _OPEN_CONTINUATION.match(masked, mark.end()) and _is_written_close(masked, close)
    return mark.end() if is_written else None


def _find_close(text: str, is_open: bool) -> re.Match[str] | None:
    """Return the closing mark of open reasoning. Without an opening mark, return one that stands where a model writes it."""
    masked = _mask_code(text) if not is_open else text
    for close in _CLOSE_PATTERN.finditer(masked):
        if is_open:
            if not _is_quoted(text, close) or _CLOSE_PATTERN.search(text, close.end()) is None:
                return close
        elif _OPEN_PATTERN.search(masked, 0, close.start()):
            return None
        elif _is_written_close(masked, close):
            return close
    return None


def _is_quoted(text: str, mark: re.Match[str]) -> bool:
    before, after = text[: mark.start()][-1:], text[mark.end() :][:1]
    return (bool(before) and before in _QUOTES_BEFORE) or (bool(after) and after in _QUOTES_AFTER)


def _is_written_close(text: str, close: re.Match[str]) -> bool:
    """Return whether a closing mark ends reasoning and is not a part of a sentence."""
    before, after = text[: close.start()], text[close.end() :]
    if _is_quoted(text, close) or _PROSE_AFTER.match(after):
        return False
    return not before.strip() or before[-1] not in " \t" or before.rstrip(" \t")[-1] in "\n.!?…。！？"


def _strip_marks(text: str) -> str:
    """Return the reasoning without its marks."""
    return _SEPARATOR_REGEX.sub("", re.sub(r"<\|(?:end|start|return)\|>(?:assistant)?", "\n", text)).strip()


def _unwrap(text: str) -> str:
    match = _RESPONSE_WRAPPER.match(text)
    return text if match is None else match["tagged"] or match["marked"] or ""


def read_message(message: Mapping[str, Any]) -> SeparatedText:
    """Return the response and the reasoning of a message of a chat completion. `content` is a string, and may be empty."""
    separated = separate_reasoning(message["content"])
    reasoning = read_reasoning_fields(message)
    if not reasoning:
        return separated
    parts = [reasoning, separated.reasoning] if separated.reasoning else [reasoning]
    ends_in_reasoning = separated.ends_in_reasoning or not separated.response.strip()
    return SeparatedText(separated.response, "\n\n".join(parts), ends_in_reasoning)


def read_reasoning_fields(message: Mapping[str, Any]) -> str:
    """Return the reasoning that a server sends in its own field: a string, or parts with a text."""
    for name in (*_REASONING_FIELDS, "reasoning_details"):
        if text := join_texts(message.get(name)):
            return text
    return ""


def join_texts(value: Any) -> str:
    """Return the text of a value that is a text, a part with a text, or a list of them. Other values have no text."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, Mapping):
        return next((text for name in ("text", "thinking", "summary", "content") if (text := join_texts(value.get(name)))), "")
    return "\n\n".join(filter(None, map(join_texts, value))) if isinstance(value, list) else ""


def report_reasoning(model_id: str, generation: Generation) -> None:
    """Report reasoning that was separated from a completion, and marks of reasoning that remain in its text."""
    if generation.reasoning:
        NOTICES.report(
            "reasoning",
            model_id,
            f"{model_id} thinks before it responds: the reasoning is kept in the record, and is not judged and not trained",
        )
    if generation.ends_in_reasoning:
        NOTICES.report(
            "reasoning_cut",
            model_id,
            f"{model_id} reached a token limit while it was thinking, so there is no response: "
            "raise max_thinking_tokens of the stage",
        )
    if has_reasoning_marks(generation.text):
        unusable = contains_reasoning(generation.text)
        effect = "it looks like reasoning, so the response is unusable" if unusable else "views mark the row"
        NOTICES.report(
            "reasoning_mark", model_id, f"a response of {model_id} contains a mark of reasoning, such as <think>: {effect}"
        )


# Prompts


def close_reasoning(prompt: str) -> str:
    """Return a rendered prompt after which the model writes its response at once: the reasoning is empty."""
    if _HARMONY_PROMPT_END.search(prompt):
        return f"{prompt}<|channel|>final<|message|>"
    if not is_reasoning_open(prompt):
        return prompt
    match = _OPEN_AT_END.search(prompt)
    assert match is not None
    return f"{prompt.rstrip()}\n\n{_get_closing_mark(match['mark'])}\n\n"


def is_reasoning_open(prompt: str) -> bool:
    """Return whether a rendered prompt ends with the opening mark of reasoning."""
    return _OPEN_AT_END.search(prompt) is not None


def _get_closing_mark(mark: str) -> str:
    """Return the mark that ends the reasoning that `mark` begins."""
    if mark.startswith("<unused"):
        return "<unused95>"
    if mark.startswith("<|channel>"):
        return "<channel|>"
    for old, new in (
        ("begin_of", "end_of"),
        ("START", "END"),
        ("prefix", "suffix"),
        ("start_", "end_"),
        ("_start", "_end"),
        ("_begin", "_end"),
        ("<|", "<|/"),
        ("[", "[/"),
        ("◁", "◁/"),
    ):
        if old in mark:
            return mark.replace(old, new)
    return mark.replace("<", "</")
