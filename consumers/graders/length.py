"""Grade the length of a response. The score is the number of words; `characters` is in the details."""

from __future__ import annotations

from collections.abc import Sequence

from consumers.graders.interface import GradedText, GradeResult
from engine.models.interface import Result
from schemas.records import FinishReason, ModelRef


class LengthGrader:
    """Counts words, which are separated by white space. The label is `cut` if generation ended at the token limit."""

    name = "length"
    version = "1"
    model: ModelRef | None = None

    def grade(self, texts: Sequence[GradedText]) -> list[Result[list[GradeResult]]]:
        """Return one grade for each text."""
        return [
            [
                GradeResult(
                    label="cut" if text.finish_reason is FinishReason.LENGTH else "complete",
                    score=float(len(text.text.split())),
                    details={"characters": float(len(text.text))},
                )
            ]
            for text in texts
        ]
