"""Format counts for messages."""

from __future__ import annotations

_SINGULAR_VERBS = {"are": "is", "were": "was", "have": "has", "belong": "belongs", "wait": "waits", "prefer": "prefers"}
_SINGULAR_ENDINGS = {"ies": "y", "sses": "ss", "ches": "ch"}  # of nouns; otherwise only the s is removed


def format_count(count: int, noun: str, verb: str = "") -> str:
    """Return a count with its noun and an optional verb, which are given as the plural: "1 row is", "1,200 rows are"."""
    if count == 1:
        plural, singular = next((e for e in _SINGULAR_ENDINGS.items() if noun.endswith(e[0])), ("s", ""))
        noun, verb = noun.removesuffix(plural) + singular, _SINGULAR_VERBS.get(verb, verb)
    return f"{count:,} {noun} {verb}".rstrip()
