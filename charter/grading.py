"""Use graders outside of the stage grade."""

from __future__ import annotations

from collections.abc import Sequence

from consumers.graders.interface import GradedText
from consumers.graders.refusal import REFUSES, RefusalGrader
from engine.models.interface import require_results
from schemas.records import ChatMessage


def detect_refusals(responses: Sequence[tuple[tuple[ChatMessage, ...], str]]) -> list[bool]:
    """Return, for each (dialogue, response), whether the grader "refusal" grades it as a refusal."""
    texts = [GradedText(messages, text) for messages, text in responses]
    return [grade.label == REFUSES for (grade,) in require_results(RefusalGrader().grade(texts))]
