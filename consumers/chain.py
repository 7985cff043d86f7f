"""Helpers that the stages share: the fields of a revision chain, and the similarity of two responses."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import Any

from engine.models.interface import Generation
from engine.notices import NOTICES
from schemas.records import Chain, FinishReason, PromptFields, Record, Response, Split


def skips_suite(stage: str, record: Record) -> bool:
    """Return whether a record belongs to a prompt of an evaluation suite. Report the first such record of the stage.

    Responses to these prompts are only graded: they are not criticized, revised or judged, so they cost nothing and never train. Only
    `charter eval principles` revises them, to measure the constitution.
    """
    if not isinstance(record, PromptFields) or record.split is not Split.SUITE:
        return False
    NOTICES.report(
        "suite_prompt", stage, f"{stage} skips responses to prompts of evaluation suites, because they are only graded"
    )
    return True


def make_initial_chain_fields(response: Response) -> dict[str, Any]:
    """Return the chain fields for a response. Every chain starts with the first completion of a response."""
    completion = response.completions[0]
    return {
        "prompt_id": response.prompt_id,
        "run_id": response.run_id,
        "policy_version": response.policy_version,
        "response_id": response.record_id,
        "messages": response.messages,
        "source": response.source,
        "tags": response.tags,
        "split": response.split,
        "epoch": response.epoch,
        "purpose": response.purpose,
        "initial_response": completion.text,
        "initial_finish_reason": completion.finish_reason,
        "response_model": response.model,
        "round": 0,
        "response": completion.text,
        "finish_reason": completion.finish_reason,
    }


def read_finish_reason(generation: Generation) -> FinishReason:
    """Return the finish reason of a generation, or UNKNOWN if Charter does not define the server's finish reason."""
    return FinishReason.__members__.get(generation.finish_reason.upper(), FinishReason.UNKNOWN)


_CARRIED_FIELDS = (
    "prompt_id",
    "run_id",
    "policy_version",
    "response_id",
    "messages",
    "source",
    "tags",
    "split",
    "epoch",
    "purpose",
    "initial_response",
    "initial_finish_reason",
    "response_model",
    "rounds",
    "round",
    "response",
    "finish_reason",
    "previous_response",
    "previous_finish_reason",
)


def get_carried_fields(record: Chain) -> dict[str, Any]:
    """Return the fields of a record that the next record of the chain copies."""
    return {name: getattr(record, name) for name in _CARRIED_FIELDS}


def compute_similarity(a: str, b: str) -> float:
    """Return the word-level similarity of two strings, from 0 to 1 (Ratcliff-Obershelp)."""
    return SequenceMatcher(None, a.split(), b.split(), autojunk=False).ratio()
