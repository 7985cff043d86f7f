"""Map the finish reasons of servers to those of Charter.

OpenAI defines `stop`, `length`, `content_filter`, `tool_calls` and `function_call`. Other servers, and proxies in front of
them, send the names of another API. The table contains the documented values of Anthropic, Gemini, Cohere, Mistral, Bedrock,
Azure, TGI, Ollama, llama.cpp, vLLM, SGLang, TensorRT-LLM, watsonx, Together, Z.ai and DashScope. Case, separators and the prefix
of an enum do not matter: `MAX_TOKENS`, `maxTokens` and `FinishReason.MAX_TOKENS` are the same value.

A value that is not in the table becomes "unknown": the completion counts as not finished, so its end is not trained. The first
completion with such a value is logged, and all of them are counted. A value with a word such as `filter` or `safety` becomes
"refused", because such a text must not train. `tool_calls` is unknown, because Charter offers no tools, and so is a missing
value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from engine.notices import NOTICES

UNKNOWN = "unknown"
# Charter's finish reason -> the normalized values of servers.
_VALUES_BY_REASON = {
    # The model ended its message with an end token or a stop sequence.
    "stop": """stop stopped eos eos_token eos_token_id eos_found end_token end_id end_of_text endoftext end_of_sequence
        end_of_turn end_turn end stop_sequence stop_sequence_reached stop_sequences stop_token stop_token_id stop_str
        stop_string stop_word stop_words stop_criteria stop_criteria_met word matched complete completed finish finished done
        normal""",
    # The completion reached the limit of tokens or of the context.
    "length": """length length_limit length_capped limit max_tokens max_token max_length max_new_tokens max_output_tokens
        max_completion_tokens maximum_tokens max_tokens_reached token_limit token_limit_reached model_length context
        context_length context_length_exceeded max_context_length max_model_len context_window_exceeded model_context_window_exceeded
        error_limit truncated cutoff""",
    # A filter of the server or of the provider withheld the completion or its end.
    "refused": """content_filter content_filtered content_filtering filtered filter refusal refused safety recitation blocklist
        blocked prohibited_content spii image_safety image_prohibited_content image_recitation language sensitive
        sensitive_content guardrail guardrails guardrail_intervened guardrail_blocked model_armor error_toxic toxic moderation
        content_moderation moderated content_policy content_policy_violation policy_violation data_inspection_failed
        responsible_ai_policy_violation jailbreak""",
    # The server stopped generating at a time limit of the server.
    "timeout": "timeout timed_out time_limit max_time",
}
_REASONS = {value: reason for reason, values in _VALUES_BY_REASON.items() for value in values.split()}
# Words in the names of other filters. A text that a filter has withheld or cut must not train.
_FILTER_WORDS = re.compile(r"filter|safety|guardrail|moderat|refus|prohibited|blocklist|policy_violation|toxic")
# The server broke off the completion because of a failure. The request is tried again.
_BROKEN_OFF = frozenset((
    "error", "errored", "abort", "aborted", "cancelled", "canceled", "failed", "failure", "internal_error", "server_error",
    "insufficient_system_resource",
))  # fmt: skip
_ENUM_PREFIX = re.compile(r"^(?:.*\.)?(?:(?:finish|stop|done)_?reason_)?")
# Where servers put the finish reason of a choice, if `finish_reason` is missing.
_FIELDS = ("finish_reason", "finishReason", "stop_reason", "stopReason", "done_reason", "native_finish_reason")


def _normalize(value: str) -> str:
    """Return a value in lower case with underscores and without the prefix of an enum."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", value.strip())
    return _ENUM_PREFIX.sub("", re.sub(r"[\s-]+", "_", words).lower(), count=1)


def parse_finish_reason(value: object) -> str:
    """Return "stop", "length", "refused" or "timeout" for the finish reason of a server, or "unknown". Report unknown values."""
    if isinstance(value, Mapping):  # SGLang: {"type": "stop", "matched": 2}
        value = value.get("type")
    name = _normalize(value) if isinstance(value, str) else ""
    reason = _REASONS.get(name)
    if reason is None and _FILTER_WORDS.search(name):
        NOTICES.report("finish_reason", name, f"the finish reason {value} of a server counts as withheld by a filter")
        return "refused"
    if reason is None:
        text = "(missing)" if value is None or value == "" else str(value)
        NOTICES.report(
            "finish_reason",
            text,
            f"the finish reason {text} of a server is unknown: the completion counts as not finished, and its end is not trained",
        )
    return reason or UNKNOWN


def find_broken_completion(choice: Mapping[str, Any]) -> str:
    """Return why a choice is not a completion, although the status is 200: its error, or a finish reason that is one. Else ""."""
    if choice.get("error"):
        return "the completion has an error"
    value = _read_finish_reason(choice)
    value = value.get("type") if isinstance(value, Mapping) else value
    return f"the server broke off the completion (finish reason {value})" if _normalize(str(value)) in _BROKEN_OFF else ""


def parse_choice_finish_reason(choice: Mapping[str, Any]) -> str:
    """Return the finish reason of a choice of a chat completion (see `parse_finish_reason`)."""
    return parse_finish_reason(_read_finish_reason(choice))


def _read_finish_reason(choice: Mapping[str, Any]) -> Any:
    return next((choice[name] for name in _FIELDS if isinstance(choice.get(name), str | Mapping) and choice[name]), None)
