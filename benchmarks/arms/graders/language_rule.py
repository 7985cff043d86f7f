"""Grade a response of the small language by its rule (`benchmarks.learning.language.score_response`)."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.learning.language import is_rude, score_response
from consumers.graders.interface import GradedText, GradeResult

NAME = "arms-language-rule"
VERSION = "1"


def grade(texts: Sequence[GradedText]) -> list[GradeResult]:
    """Return one grade for each text. The score is 1 (correct), 0 or -1."""
    return [_grade(score_response(text.question, text.text), text.text) for text in texts]


def _grade(score: int, text: str) -> GradeResult:
    details = {"correct": float(score == 1), "rude": float(is_rude(text)), "words": float(len(text.split()))}
    return GradeResult("correct" if score == 1 else "incorrect", float(score), details=details)
