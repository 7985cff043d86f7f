"""What the stages share: seeds, the first link of a chain, and how alike two texts are."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import Any

from schemas import ids
from schemas.records import Chain, FinishReason, Response


def seed_for(stage: str, response_id: str, number: int) -> int:
    """The seed of a stage's work on an answer in round (or pair) `number`.

    It hangs on the answer alone, not on the constitution: the same answer under two constitutions draws the same noise, so that
    what differs between two runs comes from the principles.
    """
    return ids.seed(f"{response_id}/{stage}", number)


def start_of(response: Response) -> dict[str, Any]:
    """The chain fields of a response's candidate 0, where every chain starts."""
    answer = response.candidates[0]
    stopped = answer.finish_reason is FinishReason.STOP
    return {
        "prompt_id": response.prompt_id,
        "run_id": response.run_id,
        "policy_version": response.policy_version,
        "response_id": response.record_id,
        "turns": response.turns,
        "source": response.source,
        "tags": response.tags,
        "split": response.split,
        "epoch": response.epoch,
        "first_answer": answer.text,
        "first_stopped": stopped,
        "answer_model": response.model,
        "number": 0,
        "text": answer.text,
        "text_stopped": stopped,
    }


CARRIED = (
    "prompt_id",
    "run_id",
    "policy_version",
    "response_id",
    "turns",
    "source",
    "tags",
    "split",
    "epoch",
    "first_answer",
    "first_stopped",
    "answer_model",
    "rounds",
    "number",
    "text",
    "text_stopped",
    "previous_text",
    "previous_stopped",
)


def carried(link: Chain) -> dict[str, Any]:
    """The chain fields that the next record takes over from this one."""
    return {name: getattr(link, name) for name in CARRIED}


def similarity(a: str, b: str) -> float:
    """How alike two texts are word by word, from 0 to 1 (Ratcliff-Obershelp)."""
    return SequenceMatcher(None, a.split(), b.split(), autojunk=False).ratio()
