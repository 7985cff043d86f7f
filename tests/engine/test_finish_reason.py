"""Finish reasons of servers: every documented value has a meaning; an unknown value is reported and counts as not finished."""

import logging

import pytest

from engine.models.chat_api import parse_generation
from engine.models.finish_reason import parse_choice_finish_reason, parse_finish_reason
from engine.models.interface import NO_USAGE
from engine.notices import NOTICES

STOPPED = [
    "stop", "STOP", "eos", "eos_token", "stop_sequence", "end_turn", "endTurn", "COMPLETE", "FINISH_REASON_STOP", "FinishReason.STOP",
    "stop-sequence", "endoftext", "stop_token", "end_id", "STOP_CRITERIA_MET", "completed", "normal", {"type": "stop", "matched": 7},
]  # fmt: skip
CUT = [
    "length", "LENGTH", "max_tokens", "MAX_TOKENS", "maxTokens", "model_length", "max_output_tokens", "token_limit", "max_model_len", "ERROR_LIMIT",
    "model_context_window_exceeded", {"type": "length", "length": 8},
]  # fmt: skip
WITHHELD = [
    "content_filter", "content_filtered", "guardrail_intervened", "refusal", "SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT",
    "SPII", "IMAGE_SAFETY", "ERROR_TOXIC", "sensitive", "contentFilter", "FinishReason.SAFETY",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _clear_notices():
    NOTICES.clear()
    yield
    NOTICES.clear()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        *((v, "stop") for v in STOPPED),
        *((v, "length") for v in CUT),
        *((v, "refused") for v in WITHHELD),
        ("TIMEOUT", "timeout"),
    ],
)
def test_documented_value_is_known(value, reason):
    assert parse_finish_reason(value) == reason and NOTICES.get_counts() == {}


@pytest.mark.parametrize("value", ["tool_calls", "pause_turn", "abort", "error", "OTHER", "brand_new", None, "", 3, {}])
def test_unknown_value_is_reported_once_and_counted(value, caplog):
    with caplog.at_level(logging.WARNING):
        assert [parse_finish_reason(value) for _ in range(3)] == ["unknown"] * 3
    assert len(caplog.records) == 1 and "not finished" in caplog.text
    ((kind, _), count), = NOTICES.get_counts().items()  # fmt: skip
    assert (kind, count) == ("finish_reason", 3)


def test_reason_is_found_in_the_fields_of_other_apis():
    assert parse_choice_finish_reason({"finish_reason": None, "stop_reason": "max_tokens"}) == "length"
    assert parse_choice_finish_reason({"finishReason": "STOP"}) == "stop"
    # vLLM reports the matched stop token in stop_reason. finish_reason has precedence.
    assert parse_choice_finish_reason({"finish_reason": "stop", "stop_reason": 128009}) == "stop"
    assert parse_choice_finish_reason({"finish_reason": "stop", "stop_reason": "</answer>"}) == "stop"


def test_generation_has_the_finish_reason():
    choice = {"message": {"content": "yes"}, "finish_reason": "eos_token"}
    assert parse_generation({"choices": [choice]}, NO_USAGE).finish_reason == "stop"


def test_number_of_reported_values_is_limited(caplog):
    for number in range(200):
        parse_finish_reason(f"value {number}")
    counts = NOTICES.get_counts()
    assert len(counts) == 51 and sum(counts.values()) == 200 and counts["finish_reason", "(other values)"] == 150
    assert len(caplog.records) == 51


@pytest.mark.parametrize("value", ["safety_filter", "ResponsibleAIFilter", "AZURE_MODERATION"])
def test_name_of_an_unknown_filter_counts_as_withheld_and_is_reported(value, caplog):
    assert parse_finish_reason(value) == "refused"
    assert f"{value} of a server counts as withheld" in caplog.text
