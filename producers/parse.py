"""Parse rows into prompts, comparisons of two responses, or demonstrations. An invalid row raises RowError with the reason.

A dialogue has one of these forms. `docs/sources.md` lists them with examples:

* The column `prompt` is a string or a list of messages. The column `messages` (in ShareGPT files `conversations`) is a list of
  messages. A message is {role, content} or, as in ShareGPT, {from, value}. A list may also be stored as a JSON string.
* A string is a transcript, as in HH-RLHF (Bai et al. 2022, arXiv 2204.05862). In it, "Human:" or "Assistant:" at the beginning
  of a paragraph starts a message. Elsewhere these words are content. The prompt ends with the last human message. Consecutive
  messages of one role are joined as paragraphs.
* The columns `instruction`, `input` and `history` as in Alpaca and LLaMA-Factory files. In Dolly's files `input` has the name
  `context`. The column `input` of OpenAI's files of comparisons is an object with `messages`.
* The column `system` (or `system_prompt`, `system_message`) is the system message of the dialogue.

A column that is often a part of the prompt (PROMPT_PART_COLUMNS) is an error if the dialogue does not contain its text.

A comparison has the columns `chosen` and `rejected`, and optionally `p_chosen`. Alternatively, it has the columns `response_a`,
`response_b` and `p_a`, the probability that A is better. Each of the two is a response or a whole dialogue that ends with the
response. If several columns contain the prompt, all of them must agree.

A demonstration has a dialogue and a `completion`, or one dialogue that ends with an assistant message. If the row is a
comparison, the demonstration is the chosen response. The columns `source` and `tags` are optional in every row.

A value with several possible meanings is an error. A column that is not read is named in `PromptRow.unread_columns`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NoReturn

from engine.eligibility import is_blank
from schemas.records import ChatMessage

_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "model": "assistant",
}  # fmt: skip
_TOOL_ROLES = (
    "tool", "tools", "tool_call", "tool_calls", "tool_response", "tool_result", "function", "function_call", "function_response",
    "observation", "ipython", "environment",
)  # fmt: skip
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
_TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id", "tool_responses")
# The marks with which chat templates write a tool call or the list of tools into a text of the assistant or the system.
_TOOL_MARK = re.compile(
    r"^[ \t]*(?:<(?:tools?|tool_calls?|tool_response|function_calls?|functions?)>|<function=|<\|python_tag\|>|<\|tool_call"
    r"|<｜tool▁calls?▁begin｜>|\[(?:TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS)\])",
    re.MULTILINE,
)
_TRAIN_KEYS = ("weight", "train", "training", "loss")  # 0 or false excludes a message from training
_TRAINED_VALUES = ("1", "1.0", "true")
_PARTIAL_KEYS = ("prefix", "partial")  # true: the message is only the beginning of a response (Mistral, DeepSeek, Qwen)

_DIALOGUE_COLUMNS = ("prompt", "messages", "instruction")
_PREFERENCE_FORMS = (("chosen", "rejected", "p_chosen"), ("response_a", "response_b", "p_a"))
_RESPONSE_COLUMNS = ("completion", "chosen", "rejected", "response_a", "response_b")
_LABEL_COLUMNS = ("label", "kto_tag")
_SYSTEM_ALIASES = dict.fromkeys(("system_prompt", "system_message", "system_instruction"), "system")
_TEXT_ALIASES = {
    "conversations": "messages", "conversation": "messages", "preferred_output": "chosen", "non_preferred_output": "rejected",
}  # fmt: skip
_INSTRUCTION_ALIASES = {
    "context": "input",
    "output": "completion",
    "response": "completion",
}  # in rows with `instruction` (Alpaca, Dolly)
# Columns that are often a part of the prompt. Without them, the response may answer another question.
PROMPT_PART_COLUMNS = frozenset((
    "context", "contexts", "document", "documents", "passage", "passages", "article", "background", "persona", "question", "query",
    "few_shot", "few_shot_examples", "dialogue", "dialog", "chat", "turns", "chat_history", "conversation_history", "transcript",
))  # fmt: skip
# Other names of the system message. `system` and its aliases are read under their exact names only.
_SYSTEM_LIKE_COLUMNS = frozenset((
    "system", *_SYSTEM_ALIASES, "system_instructions", "system_text", "system_content", "system_role", "sys", "sys_prompt",
    "sys_message", "developer", "developer_message", "developer_prompt", "preamble", "instructions",
))  # fmt: skip
# The scores of the two responses under the names of public files. They must not contradict the label.
_SCORE_COLUMNS = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"), ("rating_chosen", "rating_rejected"), ("reward_chosen", "reward_rejected"),
)  # fmt: skip
_NO_INPUT = "<noinput>"  # the mark of Self-Instruct for an instruction without input
_PLACEHOLDERS = ("none", "null", "nan", "n/a", "na")  # texts that programs write for a missing value
_UNSUPPORTED_COLUMNS = ("tools", "functions", "image", "images", "video", "videos", "audio", "audios")
_BASE_COLUMNS = ("prompt", "messages", "system", "instruction", "input", "history", "source", "tags", *_UNSUPPORTED_COLUMNS)
_COLUMNS_BY_KIND = {
    "prompts": frozenset(_BASE_COLUMNS),
    "preferences": frozenset((*_BASE_COLUMNS, *(name for form in _PREFERENCE_FORMS for name in form))),
    "demonstrations": frozenset((*_BASE_COLUMNS, "completion", "chosen", "finish_reason", *_LABEL_COLUMNS)),
}
_CHECKED_COLUMNS = PROMPT_PART_COLUMNS | {"margin"} | {name for names in _SCORE_COLUMNS for name in names}
COLUMN_NAMES = _CHECKED_COLUMNS.union(*_COLUMNS_BY_KIND.values())
ROW_COLUMNS = COLUMN_NAMES | frozenset((*_SYSTEM_ALIASES, *_TEXT_ALIASES, *_INSTRUCTION_ALIASES))
# A file without any of these columns has no prompt.
TEXT_COLUMNS = frozenset((*_DIALOGUE_COLUMNS, "input", *_RESPONSE_COLUMNS, *_TEXT_ALIASES))
UNREAD = "(not read)"  # the value of a column that a reader of a columnar format skips
NO_COLUMNS: Mapping[str, str] = {}

# The matching time of this pattern is linear in the number of blank lines.
SPEAKER_PATTERN = re.compile(r"(?:\A\s*|\n[ \t\r]*\n[ \t\r]*)(Human|Assistant):")
_ROLES_BY_SPEAKER = {"Human": "user", "Assistant": "assistant"}
_LAST_SPEAKER_LINE = re.compile(r"(?:\A|\n)[ \t]*(?:Human|Assistant):[ \t]*\Z")
# The end of a prompt that a chat template has rendered: the header of the response.
_RENDERED_PROMPT_END = re.compile(
    r"(?:<\|im_start\|>assistant|<\|start_header_id\|>assistant<\|end_header_id\|>|<start_of_turn>model|<\|turn>model|<\|assistant\|>"
    r"|<｜Assistant｜>|<\|CHATBOT_TOKEN\|>|<\|start_of_role\|>assistant<\|end_of_role\|>|<\|start\|>assistant"
    r"|\[/INST\]|### ?(?:Response|Assistant):|\bASSISTANT:|(?:\A|\n)[ \t]*Assistant:)\Z"
)
# The beginning of a text that a chat template has rendered: the header of a message.
_RENDERED_START = re.compile(
    r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<\|startoftext\|>|\[gMASK\](?:<sop>)?|<｜begin▁of▁sentence｜>|<BOS_TOKEN>)?\s*"
    r"(?:<\|im_start\|>(?:system|user|assistant)|<\|start_header_id\|>|<start_of_turn>|<\|turn>|\[INST\]|<｜(?:User|Assistant)｜>"
    r"|<\|(?:system|user|assistant)\|>|<\|START_OF_TURN_TOKEN\|>|<\|start_of_role\|>|<\|start\|>(?:system|developer|user|assistant))"
)
_RENDERED_RESPONSE_END = re.compile(
    r"(?:<\|(?:im_end|eot_id|eom_id|endoftext|end_of_text|end_of_turn|END_OF_TURN_TOKEN|end|return|eot|eos)\|>"
    r"|<end_of_turn>|<turn\|>|<｜end▁of▁sentence｜>|<end_of_utterance>|<eos>|</s>)\Z"
)
_MAX_END_CHARS = 80  # the ends of rendered texts are shorter
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_MAX_NAMES = 12  # column names in an error message
_MIN_ECHO_CHARS = 20  # shorter prompts, such as a greeting, also begin a real response


def is_prompt_part(name: str) -> bool:
    """Return whether a column that is not read may be a part of the prompt. Case and separators do not matter."""
    return _normalize_name(name) in PROMPT_PART_COLUMNS | _SYSTEM_LIKE_COLUMNS


def _normalize_name(name: str) -> str:
    return re.sub(r"[\s.-]+", "_", name.strip().lower())


class RowError(ValueError):
    """An invalid row; the message is the reason."""


@dataclass(frozen=True)
class PromptRow:
    """A prompt: a dialogue that ends with the user. `unread_columns` are the columns of the row that have no effect."""

    messages: tuple[ChatMessage, ...]
    source: str
    tags: tuple[str, ...]
    unread_columns: tuple[str, ...] = field(default=(), kw_only=True)


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


def parse_prompt(
    row: bytes | dict[str, Any] | RowError, *, source: str, max_chars: int, columns: Mapping[str, str] = NO_COLUMNS
) -> PromptRow:
    """Parse the prompt of a row. The row may also be a comparison or a demonstration. Raise RowError if the row is invalid.

    `columns` maps names of Charter's columns to the names in the row. An empty name means that the column is not read.
    """
    fields = _Fields(row, "prompts", columns)
    responses = [fields.parse_response(name) for name in _RESPONSE_COLUMNS if name in fields.values]
    messages, response = fields.merge_dialogues(responses)
    if response is not None and response not in [other.response for other in responses]:
        raise RowError('the last message is not from the user; "--as demonstrations" reads such a row')
    row_source, tags = _parse_metadata(fields.values, source, messages, max_chars)
    return PromptRow(messages, row_source, tags, unread_columns=fields.unread_columns)


def parse_preference(
    row: bytes | dict[str, Any] | RowError, *, source: str, max_chars: int, columns: Mapping[str, str] = NO_COLUMNS
) -> PreferenceRow:
    """Parse two responses to one prompt and their label. Raise RowError if the row is invalid."""
    fields = _Fields(row, "preferences", columns)
    forms = [form for form in _PREFERENCE_FORMS if any(name in fields.values for name in form)]
    first, second, p = forms[0] if forms else _PREFERENCE_FORMS[0]
    if len(forms) > 1:
        raise RowError(f'both "{forms[0][0]}" and "{forms[1][0]}" are responses; give --column {forms[1][0]}= to ignore one')
    has_fixed_order = first == "response_a"
    if first not in fields.values or second not in fields.values or (has_fixed_order and p not in fields.values):
        raise RowError(f'needs "chosen" and "rejected", or "response_a", "response_b" and "p_a"; {fields.describe()}')
    responses = [fields.parse_response(first), fields.parse_response(second)]
    messages, last = fields.merge_dialogues(responses)
    a, b = (_check_response(response) for response in responses)
    if a == b:
        raise RowError("both responses are the same")
    if last not in (None, a, b):
        raise RowError("the dialogue ends with a response that is neither of the two")
    if all(_repeats_prompt(response, messages) for response in responses):
        raise RowError("both responses begin with the prompt")
    p_a = _parse_probability(fields.values.get(p, 1.0), p)
    if not has_fixed_order and p not in fields.values:
        _require_higher_score(fields.values)
        _require_true_label(fields.values)
    row_source, tags = _parse_metadata(fields.values, source, messages, max_chars, a, b)
    return PreferenceRow(messages, row_source, tags, a, b, p_a, has_fixed_order, unread_columns=fields.unread_columns)


def parse_demonstration(
    row: bytes | dict[str, Any] | RowError, *, source: str, max_chars: int, columns: Mapping[str, str] = NO_COLUMNS
) -> DemonstrationRow:
    """Parse a prompt and its completion. Raise RowError if the row is invalid."""
    fields = _Fields(row, "demonstrations", columns)
    names = [name for name in ("completion", "chosen") if name in fields.values]
    if len(names) > 1:
        raise RowError('both "completion" and "chosen" are responses; give --column chosen= to ignore one')
    responses = [fields.parse_response(name) for name in names]
    messages, last = fields.merge_dialogues(responses)
    if not responses and last is None:
        raise RowError(f'no "completion", and the dialogue does not end with the assistant; {fields.describe()}')
    if responses and last not in (None, responses[0].response):
        raise RowError(f'the dialogue ends with another response than "{names[0]}"')
    response = responses[0] if responses else fields.response_dialogue
    completion = _check_response(response)
    if _repeats_prompt(response, messages):
        raise RowError("the response begins with the prompt")
    _require_desirable(fields.values)
    finish_reason = fields.values.get("finish_reason", "stop")
    if finish_reason not in ("stop", "length"):
        raise RowError('"finish_reason" is neither "stop" nor "length"')
    row_source, tags = _parse_metadata(fields.values, source, messages, max_chars, completion)
    is_complete = finish_reason == "stop"
    return DemonstrationRow(messages, row_source, tags, completion, is_complete, unread_columns=fields.unread_columns)


ROW_PARSERS = {"prompts": parse_prompt, "preferences": parse_preference, "demonstrations": parse_demonstration}


# Fields


def _reject_repeated_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object. Raise RowError if it has one name twice, because Python would keep only the last value."""
    if len(value := dict(pairs)) < len(pairs):
        repeated = next(name for index, (name, _) in enumerate(pairs) if name in dict(pairs[:index]))
        raise RowError(f'an object has the name "{repeated}" twice')
    return value


JSON_DECODER = json.JSONDecoder(object_pairs_hook=_reject_repeated_names)


def decode_row(row: bytes | dict[str, Any] | RowError, *, keep_null: bool = False) -> dict[str, Any]:
    """Return the fields of a row, by default without null fields. Columnar formats write null for an absent field.

    Raises RowError if the row is not an object.
    """
    if isinstance(row, RowError):
        raise row
    value = _parse_json(row) if isinstance(row, bytes) else row
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise RowError("neither a JSON string nor an object")
    return {name: value for name, value in value.items() if keep_null or value is not None}


def _parse_json(line: bytes) -> Any:
    try:
        return JSON_DECODER.decode(line.decode("utf-8"))
    except RowError:
        raise
    except UnicodeDecodeError as error:
        raise RowError(f"byte {error.start + 1} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise RowError("not a prompt: nested too deeply") from error
    except ValueError as error:  # the number has more digits than Python can convert
        raise RowError(f"not JSON that can be read: {error}") from error


@dataclass(frozen=True)
class _Dialogue:
    """The dialogue of one column.

    `messages` ends with the last user message and has no leading system message. It is empty for a column with only a response.
    `is_partial` is true for a plain string: one user message, perhaps of a longer dialogue, or only a response. `excluded_by` is
    the name of the field that excludes the response from training.
    """

    name: str
    messages: tuple[ChatMessage, ...] = ()
    system: str | None = None
    response: str | None = None
    is_partial: bool = False
    excluded_by: str = ""


class _Fields:
    """The fields of one row under the names of Charter's columns, and the names of the columns without effect."""

    def __init__(self, row: bytes | dict[str, Any] | RowError, kind: str, columns: Mapping[str, str]) -> None:
        raw = decode_row(row)
        self.names, self.columns = tuple(raw), columns
        self.values = {name: value for name, value in raw.items() if name not in columns and name not in columns.values()}
        self.values |= {name: raw[source] for name, source in columns.items() if source in raw}
        aliases = _SYSTEM_ALIASES | _TEXT_ALIASES | (_INSTRUCTION_ALIASES if "instruction" in self.values else {})
        aliases = {alias: name for alias, name in aliases.items() if alias in self.values and name not in columns}
        replaced = {name for name, source in columns.items() if name in raw and source} - set(columns.values())
        unknown = {name for name in self.values if aliases.get(name, name) not in _COLUMNS_BY_KIND[kind]}
        self._unread = replaced | unknown
        for alias, name in aliases.items():
            if name in self.values:
                raise RowError(f'both "{name}" and "{alias}"; give --column {name}={alias} to read only this one')
            self.values[name] = self.values.pop(alias)
        self._expand_openai_input()
        self.response_dialogue = _Dialogue("")
        for name, value in self.values.items():
            placeholders = _PLACEHOLDERS if name in ("system", "input") else ("nan",)
            if name in _COLUMNS_BY_KIND[kind] and isinstance(value, str) and value.strip().lower() in placeholders:
                raise RowError(f'"{name}" is {value!r}, as programs write a missing value; leave it empty')
        for name in _UNSUPPORTED_COLUMNS:
            if self.values.get(name) not in (None, "", "[]", "{}", "null", [], {}):
                raise RowError(f'"{name}" is not supported; give --column {name}= to publish the rows without it')

    @property
    def unread_columns(self) -> tuple[str, ...]:
        return tuple(sorted(self._unread))

    def describe(self) -> str:
        """Return a clause for error messages that names the columns of the row."""
        names = ", ".join(self.names[:_MAX_NAMES]) + (", ..." if len(self.names) > _MAX_NAMES else "")
        return f"the row has the columns {names or '(none)'} (see --column)"

    def _expand_openai_input(self) -> None:
        """Replace the object `input` of OpenAI's files of comparisons by its fields."""
        value = self.values.get("input")
        if isinstance(value, str) and value.lstrip().startswith("{") and "instruction" not in self.values:
            value = _try_parse_json(value)
        if not isinstance(value, dict):
            return
        if "messages" not in value or any(name in self.values for name in _DIALOGUE_COLUMNS):
            raise RowError('"input" is an object, but it is not the only column with messages')
        del self.values["input"]
        known = {
            name: value[name] for name in ("messages", "tools") if value.get(name) is not None and name not in self.columns
        }
        self._unread |= {f"input.{name}" for name in value if name not in known and value[name] is not None}
        self.values |= known

    def parse_response(self, name: str) -> _Dialogue:
        """Parse a column with a response: a text, an assistant message, or a whole dialogue that ends with the response."""
        value = self.values[name]
        if isinstance(value, str):
            value = _decode_messages(value)
        if isinstance(value, str) and not _is_transcript(value):
            prompt = self.values.get("prompt")
            is_continuation = isinstance(prompt, str) and _is_transcript(prompt)  # a blank separates it from "Assistant:"
            return _Dialogue(name, response=value.strip() if is_continuation else value, is_partial=True)
        if not isinstance(value, str | list | dict):
            raise RowError(f"{name} is neither a string nor a list of messages")
        return self._parse_dialogue(name, value)

    def merge_dialogues(self, responses: Sequence[_Dialogue]) -> tuple[tuple[ChatMessage, ...], str | None]:
        """Return the prompt of the row, and the response at the end of `prompt` or `messages`, or None.

        The prompt is in `prompt`, `messages` or `instruction`, or in every response. All of these must agree.
        """
        own = [dialogue for dialogue in (self._parse_prompt(), self._parse_messages(), self._parse_instruction()) if dialogue]
        dialogues = [*own, *(response for response in responses if response.messages or response.system)]
        if not own and not all(response.messages for response in responses):
            self._raise_without_prompt(responses)
        if not any(dialogue.messages for dialogue in dialogues):
            self._raise_without_prompt(own)
        messages = _merge_messages(dialogues)
        endings = [dialogue for dialogue in own if dialogue.response is not None]
        if len({dialogue.response for dialogue in endings}) > 1:
            raise RowError(f"{endings[0].name} and {endings[1].name} end with different responses")
        self.response_dialogue = endings[0] if endings else _Dialogue("")
        messages = (*self._merge_systems(dialogues), *messages)
        self._require_whole_prompt(messages)
        return messages, self.response_dialogue.response

    def _require_whole_prompt(self, messages: Sequence[ChatMessage]) -> None:
        """Raise RowError if a column that is not read may be a part of the prompt, and the dialogue does not contain its text."""
        for name in sorted(name for name in self._unread & self.values.keys() if is_prompt_part(name)):
            value = self.values[name]
            text = value.strip() if isinstance(value, str) else None
            if text is None and not (isinstance(value, list | dict) and value):
                continue  # a number, or an empty list
            if text is None or not any(text in message.content for message in messages):
                join = "--column instruction=NAME to join it with the question, or " if name == "context" else ""
                if _normalize_name(name) in _SYSTEM_LIKE_COLUMNS:
                    join = f"--column system={name} to read it as the system message, or "
                raise RowError(
                    f'"{name}" may be a part of the prompt; give {join}--column {name}= to publish the rows without it'
                )

    def _raise_without_prompt(self, dialogues: Sequence[_Dialogue]) -> NoReturn:
        for dialogue in dialogues:
            value = self.values.get(dialogue.name)
            preamble, *parts = SPEAKER_PATTERN.split(value if isinstance(value, str) else "")
            if parts and preamble.strip():
                raise RowError(f"{dialogue.name} has text before the first Human: or Assistant:")
            if parts or isinstance(value, list | dict):
                raise RowError(f"{dialogue.name} has no user message")
        raise RowError(f'no "prompt" and no "messages"; {self.describe()}')

    def _merge_systems(self, dialogues: Iterable[_Dialogue]) -> list[ChatMessage]:
        column = self.values.get("system", "")
        if not isinstance(column, str):
            raise RowError('"system" is not a string')
        texts = dict.fromkeys(text for text in (column, *(d.system for d in dialogues)) if text and text.strip())
        if len(texts) > 1:
            raise RowError("the row has several system messages, and they differ")
        return [_make_message("system", text) for text in texts]

    def _parse_prompt(self) -> _Dialogue | None:
        if "prompt" not in self.values:
            return None
        value = self.values["prompt"]
        if isinstance(value, str):
            value = _decode_messages(value)
        if isinstance(value, str) and not _is_transcript(value):
            return _Dialogue("prompt", (_make_message("user", value),), is_partial=True)
        if not isinstance(value, str | list | dict):
            raise RowError("the prompt is neither a string nor a list of messages")
        return self._parse_dialogue("prompt", value)

    def _parse_messages(self) -> _Dialogue | None:
        if "messages" not in self.values:
            return None
        value = self.values["messages"]
        if isinstance(value, str):
            value = _decode_messages(value)
        if isinstance(value, str) and not _is_transcript(value):
            raise RowError('"messages" is a text, not a list of messages')
        return self._parse_dialogue("messages", value)

    def _parse_instruction(self) -> _Dialogue | None:
        """Parse the columns of an Alpaca row. The user message is `instruction`, then `input` on a new line (LLaMA-Factory)."""
        if "instruction" not in self.values:
            for name in ("input", "history"):
                if self.values.get(name):
                    raise RowError(f'"{name}" without "instruction" is not understood; {self.describe()}')
            return None
        texts = [self.values["instruction"], self.values.get("input") or ""]
        if texts[1] == _NO_INPUT:
            texts[1] = ""
        if not all(isinstance(text, str) for text in texts):
            raise RowError('"instruction" or "input" is not a string')
        history = self.values.get("history") or []
        if isinstance(history, str):
            history = _try_parse_json(history)
        if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            raise RowError('"history" is not a list of pairs')
        rounds = [_make_message(role, text) for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]
        return _Dialogue("instruction", (*rounds, _make_message("user", "\n".join(text for text in texts if text))))

    def _parse_dialogue(self, name: str, value: Any) -> _Dialogue:
        """Parse a transcript, a message or a list of messages."""
        if isinstance(value, str):
            return _split_dialogue(name, _parse_transcript(value))
        messages, excluded_by = [], ""
        for number, message in enumerate(_to_message_list(value), 1):
            role, content = self._parse_message(message, f"{name}[{number}]")
            excluded_by = next(
                (key for key in _TRAIN_KEYS if str(message.get(key, 1)).lower() not in (*_TRAINED_VALUES, "none")), ""
            )
            if role != "system" or content.strip():
                messages.append(_make_message(role, content))
        return _split_dialogue(name, messages, excluded_by)

    def _parse_message(self, message: Any, place: str) -> tuple[str, str]:
        """Return the role and the content of a message. Record the keys that have no effect."""
        if not isinstance(message, dict):
            raise RowError(f"{place} is not a message with a role and a content")
        fields = {key: value for key, value in message.items() if value is not None}
        role_keys = [key for key in _ROLE_KEYS if key in fields]
        content_keys = [key for key in _CONTENT_KEYS if key in fields]
        role = fields[role_keys[0]] if role_keys else None
        if role in _TOOL_ROLES or any(fields.get(key) for key in _TOOL_KEYS):
            raise RowError(f"{place} uses a tool; tools are not supported")
        if len(role_keys) != 1 or len(content_keys) != 1 or not isinstance(role, str) or role not in _ROLES:
            raise RowError(f"{place}: a message needs a role ({', '.join(_ROLES)}) and a content")
        if media := next((key for key in _UNSUPPORTED_COLUMNS if fields.get(key)), None):
            raise RowError(f'{place} has "{media}"; only text is supported')
        if partial := next((key for key in _PARTIAL_KEYS if fields.get(key)), None):
            raise RowError(f'{place}: "{partial}" marks the beginning of a response, not a whole response')
        read = {*role_keys, *content_keys, *_TOOL_KEYS, *_TRAIN_KEYS}
        self._unread |= {f"{key} (in a message)" for key in fields if key not in read}
        return _ROLES[role], _parse_content(fields[content_keys[0]], place)


def _parse_content(value: Any, place: str) -> str:
    """Return the text of a content: a string, or a list with one part of type text."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and value[0].get("type") == "text":
        value = value[0].get("text")
    if isinstance(value, list):
        raise RowError(f"{place}: the content is not one text part; only text is supported")
    if not isinstance(value, str):
        raise RowError(f"{place}: the content is not a string")
    return value


def _to_message_list(value: Any) -> list[Any]:
    """Return the list of messages that a column contains. `datasets` stores a sequence of structs as one struct of lists."""
    if isinstance(value, dict):
        lists = {key: item for key, item in value.items() if isinstance(item, list) and key in (*_ROLE_KEYS, *_CONTENT_KEYS)}
        if len(lists) == 2 and len({len(item) for item in lists.values()}) == 1 and set(lists) & set(_ROLE_KEYS):
            return [dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)]
        return [value]
    if not isinstance(value, list) or not value:
        raise RowError("the dialogue is not a list of messages")
    return value


def _try_parse_json(text: str) -> Any:
    """Return the value of a JSON text, or None if the text is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _decode_messages(text: str) -> str | list[Any]:
    """Return the messages that a text contains as JSON. Return every other text unchanged.

    Raise RowError for a text that looks like messages and is not JSON, such as the text of a Python list.
    """
    if not text.lstrip().startswith(("[", "{")):
        return text
    value = _try_parse_json(text)
    messages = [value] if isinstance(value, dict) else value
    if isinstance(messages, list):
        return messages if messages and all(map(_looks_like_message, messages)) else text
    has_keys = [re.search(rf"""['"](?:{"|".join(keys)})['"]\s*:""", text) for keys in (_ROLE_KEYS, _CONTENT_KEYS)]
    if all(has_keys):
        raise RowError("a text that looks like messages and is not JSON; write a list, or the text that json.dumps returns")
    return text


def _looks_like_message(value: Any) -> bool:
    """Return whether a JSON value is a message. A {from, value} object is one only if the role has a known name."""
    if not isinstance(value, dict):
        return False
    if "role" in value:
        return any(key in value for key in ("content", *_TOOL_KEYS))
    return "value" in value and value.get("from") in (*_ROLES, *_TOOL_ROLES)


# Dialogues


def _is_transcript(text: str) -> bool:
    """Return whether a text is a transcript.

    A transcript begins with "Human:" or "Assistant:", and it has a blank line before this word or a second message. Raise
    RowError for a text that is neither clearly a transcript nor clearly one message.
    """
    text = _normalize_line_ends(text)
    start = SPEAKER_PATTERN.match(text)
    if start and ("\n" in start[0] or len(SPEAKER_PATTERN.findall(text)) > 1):
        return True
    if start:
        raise RowError(f'begins with "{start[1]}:" and has only one message; write it as a list of messages')
    if start := _RENDERED_START.match(text):
        raise RowError(
            f"begins with {start[0].strip()}, the header of a message; write the dialogue as a list of messages, without a chat template"
        )
    if _RENDERED_PROMPT_END.search(text.rstrip()[-_MAX_END_CHARS:]):
        raise RowError("ends with the header of a response; write the dialogue as a list of messages, without a chat template")
    return False


def _normalize_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n")


def _parse_transcript(text: str) -> list[ChatMessage]:
    """Parse a transcript. An empty message is omitted."""
    _, *parts = SPEAKER_PATTERN.split(_normalize_line_ends(text))  # the parts are: speaker, content, speaker, content, ...
    messages = [(_ROLES_BY_SPEAKER[who], content.strip()) for who, content in zip(parts[::2], parts[1::2], strict=True)]
    if any(_LAST_SPEAKER_LINE.search(content) for _, content in messages):
        raise RowError("a transcript in which Human: or Assistant: has no blank line before it")
    groups = groupby([message for message in messages if message[1]], key=lambda message: message[0])
    joined = [(role, "\n\n".join(content for _, content in group)) for role, group in groups]
    if not joined:
        raise RowError("an empty prompt")
    return [_make_message(role, content) for role, content in joined]


def _make_message(role: str, content: Any) -> ChatMessage:
    if not isinstance(content, str):
        raise RowError(f"the content of the {role} message is not a string")
    if is_blank(content):
        raise RowError("an empty prompt" if role == "user" else f"an empty message of the {role}")
    if role != "user" and (mark := _TOOL_MARK.search(content)):
        raise RowError(f"the {role} message contains {mark[0].strip()}, the mark of a tool; tools are not supported")
    return ChatMessage(role=role, content=reject_surrogates(content))


def reject_surrogates(text: str) -> str:
    """Return the text. Raise RowError if UTF-8 cannot encode it."""
    if _SURROGATE.search(text):
        raise RowError("a lone surrogate, which UTF-8 cannot encode")
    return text


def _split_dialogue(name: str, messages: Sequence[ChatMessage], excluded_by: str = "") -> _Dialogue:
    """Split a dialogue into the system message, the messages up to the last user message, and the response after them."""
    system = messages[0].content if messages and messages[0].role == "system" else None
    body = tuple(messages[system is not None :])
    if any(message.role == "system" for message in body):
        raise RowError(f"{name} has a system message that is not the first message")
    last_user = max((index for index, message in enumerate(body) if message.role == "user"), default=-1)
    rest = body[last_user + 1 :]
    if len(rest) > 1 or any(message.role != "assistant" for message in rest):
        raise RowError(f"{name} has more than one message after the last user message")
    return _Dialogue(name, body[: last_user + 1], system, rest[0].content if rest else None, excluded_by=excluded_by)


def _merge_messages(dialogues: Sequence[_Dialogue]) -> tuple[ChatMessage, ...]:
    """Return the messages on which all dialogues agree. A string may be one user message of a dialogue in another column."""
    with_messages = [dialogue for dialogue in dialogues if dialogue.messages]
    whole = [dialogue for dialogue in with_messages if not dialogue.is_partial] or with_messages[:1]
    for dialogue in with_messages:
        if dialogue.is_partial and not _contains_message(whole[0].messages, dialogue.messages[0]):
            raise RowError(f"{whole[0].name} has another prompt than {dialogue.name}")
        if not dialogue.is_partial and dialogue.messages != whole[0].messages:
            raise RowError(f"{whole[0].name} and {dialogue.name} have different prompts")
    return whole[0].messages


def _contains_message(messages: Sequence[ChatMessage], message: ChatMessage) -> bool:
    """Return whether one of the messages has the role and the content of `message`. Ignore white space around the content."""
    return any(other.role == message.role and other.content.strip() == message.content.strip() for other in messages)


# Responses


def _check_response(dialogue: _Dialogue) -> str:
    """Return the response of a dialogue. Raise RowError if it is empty or ends with the end token of a chat template."""
    name, text = dialogue.name, dialogue.response
    if text is None:
        raise RowError(f"{name} has no response")
    if is_blank(text):
        raise RowError(f"{name} has an empty response")
    if dialogue.excluded_by:
        raise RowError(f'"{dialogue.excluded_by}" excludes the response of {name} from training: it is not 1 or true')
    if mark := _TOOL_MARK.search(text):
        raise RowError(f"{name} contains {mark[0].strip()}, the mark of a tool; tools are not supported")
    if start := _RENDERED_START.match(text):
        raise RowError(f"{name} begins with {start[0].strip()}, the header of a message in a chat template")
    if (end := _RENDERED_RESPONSE_END.search(text.rstrip()[-_MAX_END_CHARS:])) and not ("</s>" in end[0] and "<s>" in text):
        raise RowError(f"{name} ends with {end[0]}, the end token of a chat template")
    return reject_surrogates(text)


def _repeats_prompt(response: _Dialogue, messages: Sequence[ChatMessage]) -> bool:
    """Return whether a plain string begins with the prompt. Some files write the prompt in front of each response."""
    prompt = messages[-1].content.strip()
    if not response.is_partial or len(prompt) < _MIN_ECHO_CHARS:
        return False
    return (response.response or "").strip().startswith(prompt)


def _require_desirable(fields: Mapping[str, Any]) -> None:
    """Raise RowError if a row of unpaired feedback (KTO) marks its completion as undesirable."""
    for name in _LABEL_COLUMNS:
        if str(fields.get(name, "true")).lower() in ("false", "0"):
            raise RowError(f'"{name}" is false: the completion is undesirable, so it is not a demonstration')
        if str(fields.get(name, "true")).lower() not in ("true", "1"):
            raise RowError(f'"{name}" is neither true nor false; give --column {name}= to ignore it')


def _require_higher_score(fields: Mapping[str, Any]) -> None:
    """Raise RowError if the row has scores of both responses, and the score of the chosen response is not the higher one."""
    for chosen, rejected in _SCORE_COLUMNS:
        a, b = (_try_parse_json(value) if isinstance(value := fields.get(name), str) else value for name in (chosen, rejected))
        if isinstance(a, int | float) and isinstance(b, int | float) and not a > b:
            raise RowError(
                f'"{chosen}" = {a:g} is not above "{rejected}" = {b:g}, so the label is uncertain;'
                f" give p_chosen, or --column {chosen}= to ignore the scores"
            )


def _require_true_label(fields: Mapping[str, Any]) -> None:
    """Raise RowError if another column of a comparison may say that the chosen response is not the better one."""
    margin = _try_parse_json(value) if isinstance(value := fields.get("margin"), str) else value
    if isinstance(margin, int | float) and margin < 0:
        raise RowError(f'"margin" = {margin:g} is below 0, so the label is uncertain; give --column margin= to ignore it')
    if str(fields.get("label", "true")).lower() in ("false", "0"):
        raise RowError('"label" is false, so the label is uncertain; give --column label= to ignore it')


def _parse_probability(value: Any, name: str) -> float:
    if isinstance(value, str):
        value = _try_parse_json(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= 1:
        raise RowError(f'"{name}" is not a probability from 0 to 1')
    return float(value)


def _parse_metadata(
    fields: Mapping[str, Any], source: str, messages: Sequence[ChatMessage], max_chars: int, *responses: str
) -> tuple[str, tuple[str, ...]]:
    """Return the source and the tags of a row. Raise RowError if the row has more than `max_chars` characters."""
    length = sum(len(message.content) for message in messages) + sum(map(len, responses))
    if length > max_chars:
        raise RowError(f"{length} characters, more than prompts.max_chars = {max_chars}")
    tags = fields.get("tags", [])
    if isinstance(tags, str):
        tags = _try_parse_json(tags)
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise RowError('"tags" is not a list of strings')
    row_source = fields.get("source", source)
    if not isinstance(row_source, str) or not row_source:
        raise RowError('"source" is not a non-empty string')
    return reject_surrogates(row_source), tuple(reject_surrogates(tag) for tag in tags)
