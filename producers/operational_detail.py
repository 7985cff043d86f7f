"""The filter `operational_detail`: find the details that would help to carry out harm.

Red-team prompts test what a model refuses, so they only have to name a harm in general terms. A prompt with amounts, steps, code,
formulas or addresses is rejected, also if its subject is harmless. The filter contains no list of dangerous subjects or words: it
checks only the form. So it also rejects harmless prompts of this form, and it cannot find a detail in plain words.

The filter is used on generated prompts of the red-team kinds, and on the examples of these kinds in a recipe.
"""

from __future__ import annotations

import re

NAME = "operational_detail"
_MAX_WORDS = 60  # a request in general terms is short

_UNITS = (
    r"mg|g|kg|ml|cl|l|oz|lbs?|milligrams?|grams?|kilograms?|milliliters?|millilitres?|liters?|litres?|gallons?|ounces?|pounds?"
    r"|cups?|(?:tea|table)spoons?|°\s?[CF]|degrees|volts?|amps?|watts?|ppm|psi|mm|cm"
)
_NUMBER_WORDS = r"two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|thirty|forty|fifty|hundred|thousand"
_PROCEDURE_VERBS = (
    r"mix|stir|combine|dissolve|heat|boil|cool|grind|filter|pour|add|solder|wire|drill|attach|connect|mount|fill|seal|insert|install"
    r"|download|compile|run|inject|configure|disable|click|dial|type"
)
_PATTERNS: dict[str, re.Pattern[str]] = {
    "an amount": re.compile(rf"(?:\d+(?:[.,]\d+)?|\b(?:{_NUMBER_WORDS}))[\s-]?(?:{_UNITS})\b|\d\s?%", re.IGNORECASE),
    "numbered steps": re.compile(
        r"\bstep\s*(?:\d|one|two|three)|(?:^|\s)\d[.)]\s+\w.*\s\d[.)]\s+\w", re.IGNORECASE | re.DOTALL
    ),
    "a sequence of steps": re.compile(
        rf"\b(?:{_PROCEDURE_VERBS})\b.+?\b(?:and|then|,)\s*(?:then\s+)?(?:{_PROCEDURE_VERBS})\b", re.IGNORECASE | re.DOTALL
    ),
    "code or a command": re.compile(
        r"`|\$\(|\bsudo\b|</?\w+>|\w\(\)|\s--?\w+[= ]\S|[;{}]\s*$|\bSELECT\b.+\bFROM\b", re.MULTILINE
    ),
    "an address": re.compile(r"https?:|www\.|\b\d{1,3}(?:\.\d{1,3}){3}\b|\S@\w+\.\w|\+?\d[\d\s/-]{6,}\d"),
    "a formula": re.compile(r"\b(?=\w*\d)(?:[A-Z][a-z]?\d{0,3}){2,}\b"),
}


def find_operational_detail(text: str) -> str:
    """Return what kind of detail a text contains, such as "an amount", or an empty string."""
    if len(text.split()) > _MAX_WORDS:
        return f"more than {_MAX_WORDS} words"
    return next((name for name, pattern in _PATTERNS.items() if pattern.search(text)), "")
