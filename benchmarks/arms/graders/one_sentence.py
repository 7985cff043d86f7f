"""Grade whether a response is one short sentence: `grade.graders = ["benchmarks/arms/graders/one_sentence.py"]`.

The score is the mean of four parts: the response ended by itself, it is one paragraph, it has no list, and it is short. The last
part is 1 up to 15 words and falls to 0 at 45 words. An empty response has the score 0. The details have the four parts, the number
of words, and `all` (1 if the parts `ended`, `paragraph` and `no_list` are 1 and there are at most 25 words).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

from consumers.graders.interface import GradedText, GradeResult
from schemas.records import FinishReason

NAME = "arms-one-sentence"
VERSION = "1"
_MAX_WORDS = 25
_SHORT_WORDS, _LONG_WORDS = 15, 45
_LIST_PATTERN = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S", re.MULTILINE)


def grade(texts: Sequence[GradedText]) -> list[GradeResult]:
    """Return one grade for each text."""
    return [grade_one_sentence(text.text, ended=text.finish_reason is FinishReason.STOP) for text in texts]


def grade_one_sentence(text: str, *, ended: bool) -> GradeResult:
    """Return the grade of one response. `ended` is true if the policy ended it, and false at the token limit."""
    words = len(text.split())
    parts = {
        "ended": float(ended),
        "paragraph": float("\n" not in text.strip()),
        "no_list": float(_LIST_PATTERN.search(text) is None),
        "short": min(1.0, max(0.0, (_LONG_WORDS - words) / (_LONG_WORDS - _SHORT_WORDS))),
    }
    if not words:
        parts = dict.fromkeys(parts, 0.0)
    follows = parts["ended"] and parts["paragraph"] and parts["no_list"] and words <= _MAX_WORDS
    details = parts | {"words": float(words), "all": float(bool(follows))}
    return GradeResult("follows" if follows else "fails", fmean(parts.values()), details=details)
