"""Grade whether a response is one short sentence, as the constitution one-sentence asks. The label is `follows` or `deviates`.

A response follows if it ended by itself, ends with a mark, has one line and one sentence, and has at most MAX_WORDS words. Sentences
are counted by the rules of the grader `instructions`. The content is not graded: a wrong or harmful sentence follows too.

The score is for comparing two responses: 0.5 to 1 for a response that follows, and at most 0.4 for other complete responses; fewer
words score more. A response that breaks off has at most 0.25, and fewer sentences score more.
"""

from __future__ import annotations

from collections.abc import Sequence

from consumers.graders.instruction_checks import count_sentences
from consumers.graders.interface import GradedText, GradeResult
from engine.models.interface import Result
from schemas.records import FinishReason, ModelRef

FOLLOWS, DEVIATES = "follows", "deviates"
MAX_WORDS = 30
_END_MARKS = (".", "!", "?", "…")
_CLOSING_MARKS = "\"'”’)*"


class OneSentenceGrader:
    """Checks the form of a response. `details` has the number of sentences, words and lines."""

    name = "one-sentence"
    version = "1"
    model: ModelRef | None = None

    def grade(self, texts: Sequence[GradedText]) -> list[Result[list[GradeResult]]]:
        """Return one grade for each text."""
        return [[grade_form(text.text, is_cut=text.finish_reason is FinishReason.LENGTH)] for text in texts]


def grade_form(text: str, *, is_cut: bool) -> GradeResult:
    """Return the grade of a text. `is_cut` is true if its generation ended at the token limit."""
    text = text.strip()
    words, sentences, lines = len(text.split()), count_sentences(text), len(text.splitlines())
    breaks_off = is_cut or not text.rstrip(_CLOSING_MARKS).endswith(_END_MARKS)
    details = {"sentences": float(sentences), "words": float(words), "lines": float(lines)}
    if sentences == lines == 1 and words <= MAX_WORDS and not breaks_off:
        return GradeResult(FOLLOWS, 1 - 0.5 * words / MAX_WORDS, details=details)
    if not words:
        return GradeResult(DEVIATES, 0.0, details=details)
    score = 0.25 / max(1, sentences) if breaks_off else 0.4 * min(1.0, MAX_WORDS / words)
    return GradeResult(DEVIATES, score, details=details)
