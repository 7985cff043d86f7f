r"""Decide which responses and which pairs may be compared, trained on and exported.

This module is the only place with these rules. The critique, revise and judge stages, imports, `charter label` and the monitor
use the functions. The views of the database, and so batches and exports, use the macros in `ELIGIBILITY_MACROS`, which apply the
same rules in SQL.

A response is unusable if it has no visible text, if a filter of the server withheld it or its end, or if it contains what looks
like the reasoning of a model. A pair cannot be compared if one of its responses is unusable, or if both responses are the same
text apart from blank characters at their ends.
"""

from __future__ import annotations

import re

from engine.models.reasoning import REASONING_MACROS, contains_reasoning
from schemas.records import FinishReason, Outcome, RejectionReason

# Blank characters: white space, control and format characters (such as U+200B and U+FEFF), and letters without a glyph.
_BLANK_RANGES = (
    "\x01-\x20\x7f-\xa0\xad\u034f\u061c\u115f\u1160\u1680\u17b4\u17b5\u180b-\u180f\u2000-\u200f\u2028-\u202f\u205f-\u206f"
    "\u2800\u3000\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff"
)
_VISIBLE_PATTERN = re.compile(f"[^{_BLANK_RANGES}]")
_OUTCOMES = {
    RejectionReason.EMPTY: Outcome.EMPTY,
    RejectionReason.REFUSED: Outcome.WITHHELD,
    RejectionReason.REASONING: Outcome.REASONING,
}
_DESCRIPTIONS = {
    RejectionReason.EMPTY: "has no visible text",
    RejectionReason.REFUSED: "was withheld by a content filter of the server",
    RejectionReason.REASONING: "contains what looks like the reasoning of a model, such as <think>",
}
# The outcomes of pairs that cannot be compared. No judge is asked about them.
INCOMPARABLE_OUTCOMES = (Outcome.EMPTY, Outcome.WITHHELD, Outcome.REASONING, Outcome.IDENTICAL)


def is_blank(text: str) -> bool:
    """Return whether a text has no visible character."""
    return _VISIBLE_PATTERN.search(text) is None


def strip_blanks(text: str) -> str:
    """Return the text without the blank characters at its beginning and its end."""
    start = _VISIBLE_PATTERN.search(text)
    if start is None:
        return ""
    end = len(text)
    while _VISIBLE_PATTERN.match(text, end - 1) is None:
        end -= 1
    return text[start.start() : end]


def find_rejection_reason(text: str, finish_reason: FinishReason) -> RejectionReason:
    """Return the reason why a response is unusable: REFUSED, EMPTY or REASONING. Return NONE if it is usable."""
    if finish_reason is FinishReason.REFUSED:
        return RejectionReason.REFUSED
    if is_blank(text):
        return RejectionReason.EMPTY
    return RejectionReason.REASONING if contains_reasoning(text) else RejectionReason.NONE


def find_response_problem(text: str, finish_reason: FinishReason, name: str) -> tuple[Outcome, str] | None:
    """Return the outcome and the reason if a response is unusable. `name` is its name in the reason. Return None if it is usable."""
    reason = find_rejection_reason(text, finish_reason)
    return None if reason is RejectionReason.NONE else (_OUTCOMES[reason], f"{name} {_DESCRIPTIONS[reason]}")


def find_pair_problem(
    response_a: str,
    response_b: str,
    finish_reason_a: FinishReason = FinishReason.UNKNOWN,
    finish_reason_b: FinishReason = FinishReason.UNKNOWN,
    names: tuple[str, str] = ("response A", "response B"),
) -> tuple[Outcome, str] | None:
    """Return the outcome and the reason if two responses cannot be compared. Return None if they can be compared."""
    for name, text, finish_reason in zip(names, (response_a, response_b), (finish_reason_a, finish_reason_b), strict=True):
        if problem := find_response_problem(text, finish_reason, name):
            return problem
    if strip_blanks(response_a) == strip_blanks(response_b):
        return Outcome.IDENTICAL, "both responses are the same"
    return None


# find_pair_outcome(...) is the outcome of a pair that cannot be compared, or null. The regular expressions are constants, so
# DuckDB compiles them once. `=` decides most pairs, and only texts with blanks at an end are stripped.
ELIGIBILITY_MACROS = (
    *REASONING_MACROS,
    f"CREATE OR REPLACE MACRO is_blank(text) AS NOT regexp_matches(coalesce(text, ''), '[^{_BLANK_RANGES}]')",
    f"CREATE OR REPLACE MACRO has_blank_ends(text) AS regexp_matches(text, '^[{_BLANK_RANGES}]|[{_BLANK_RANGES}]$')",
    f"CREATE OR REPLACE MACRO strip_blanks(text) AS regexp_replace(text, '^[{_BLANK_RANGES}]+|[{_BLANK_RANGES}]+$', '', 'g')",
    """CREATE OR REPLACE MACRO find_rejection_reason(text, finish_reason) AS
       CASE WHEN finish_reason = 'REFUSED' THEN 'REFUSED' WHEN is_blank(text) THEN 'EMPTY'
            WHEN contains_reasoning(text) THEN 'REASONING' ELSE 'NONE' END""",
    """CREATE OR REPLACE MACRO is_same_text(a, b) AS
       a = b OR ((has_blank_ends(a) OR has_blank_ends(b)) AND strip_blanks(a) = strip_blanks(b))""",
    """CREATE OR REPLACE MACRO find_pair_outcome(response_a, response_b, finish_reason_a, finish_reason_b) AS
       CASE WHEN finish_reason_a = 'REFUSED' THEN 'WITHHELD' WHEN is_blank(response_a) THEN 'EMPTY'
            WHEN contains_reasoning(response_a) THEN 'REASONING'
            WHEN finish_reason_b = 'REFUSED' THEN 'WITHHELD' WHEN is_blank(response_b) THEN 'EMPTY'
            WHEN contains_reasoning(response_b) THEN 'REASONING'
            WHEN is_same_text(response_a, response_b) THEN 'IDENTICAL' END""",
)
