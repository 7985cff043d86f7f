"""Format text for terminals: escape unprintable characters, write JSON, wrap paragraphs, and show the trace of one prompt."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from typing import Any

# The parts of an emoji: the symbol, then an optional skin tone or variation selector (UTS #51).
_EMOJI = "[\u00a9\u00ae\u2190-\u21ff\u2300-\u27bf\u2900-\u297f\u2b00-\u2bff\u3030-\u303d\u3297-\u3299\U0001f000-\U0001faff]"
_MODIFIER = "[\ufe0f\U0001f3fb-\U0001f3ff]"
# Scripts that spell words with U+200C and U+200D: Arabic (Persian), Syriac to Mongolian, with the scripts of India and Khmer.
_JOINING_LETTER = "[\u0620-\u06ff\u0710-\u1a1f\u1b00-\u1c4f\ua880-\uaadf\uabc0-\uabff\U00010a00-\U00011fff]"
# Characters without a glyph that are part of a visible sequence: a joiner between emoji (a family), a joiner in a word, and the
# tags of the flag of a region. All other characters without a glyph can hide text or change its direction.
_VISIBLE_SEQUENCE = re.compile(
    rf"{_EMOJI}{_MODIFIER}*(?:\u200d{_EMOJI}{_MODIFIER}*)+"
    rf"|(?<={_JOINING_LETTER})[\u200c\u200d](?={_JOINING_LETTER})"
    r"|(?<=[\u094d\u09cd\u0a4d\u0acd\u0b4d\u0bcd\u0c4d\u0ccd\u0d4d\u0dca])\u200d"  # after a virama, a joiner can end a word
    r"|\U0001f3f4[\U000e0061-\U000e007a]{2}[\U000e0030-\U000e0039\U000e0061-\U000e007a]{1,3}\U000e007f"
)


def replace_invisible(text: str, replace: Callable[[str], str]) -> str:
    """Replace each control, format and direction character. Line ends, tabs, and emoji and letters with joiners stay."""
    if text.isprintable():
        return text
    parts, position = [], 0
    for match in _VISIBLE_SEQUENCE.finditer(text):
        parts += [*(_replace_character(c, replace) for c in text[position : match.start()]), match[0]]
        position = match.end()
    return "".join([*parts, *(_replace_character(c, replace) for c in text[position:])])


def _replace_character(character: str, replace: Callable[[str], str]) -> str:
    return character if character.isprintable() or character in "\n\t" else replace(character)


def escape_unprintable(text: str) -> str:
    """Replace control, format and direction characters by escapes, so that a terminal does not execute them."""
    return replace_invisible(text, lambda character: character.encode("unicode_escape").decode())


def to_one_line(text: str) -> str:
    """Return the text on one line, with unprintable characters as escapes."""
    return escape_unprintable(" ".join(line.strip() for line in text.splitlines() if line.strip()))


def format_json(value: Any, indent: int | None = 2) -> str:
    """Return strict JSON: NaN and infinity become null, and unprintable characters become JSON escapes (see replace_invisible)."""
    text = json.dumps(_replace_non_finite(value), ensure_ascii=False, indent=indent, default=str, allow_nan=False)
    return replace_invisible(text, lambda character: json.dumps(character)[1:-1])


def _replace_non_finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _replace_non_finite(item) for key, item in value.items()}
    return [_replace_non_finite(item) for item in value] if isinstance(value, list | tuple) else value


def get_terminal_width() -> int:
    """Return the width of the terminal in columns, or 100 if there is no terminal."""
    return shutil.get_terminal_size((100, 40)).columns


def wrap_text(text: str, indent: str) -> str:
    """Wrap paragraphs between words to the terminal width (at most 110 columns), with `indent` before each line.

    Only a word that is longer than a line is divided. The blanks at the beginning of a line stay.
    """
    from rich.console import Console
    from rich.text import Text

    limit = max(20, min(get_terminal_width(), 110) - len(indent))
    console = Console(width=limit, color_system=None)
    lines = [
        part for line in escape_unprintable(text).splitlines() or [""] for part in Text(line).wrap(console, limit, tab_size=4)
    ]
    return "\n".join(f"{indent}{line.plain.rstrip()}" for line in lines)


def format_trace(row: dict[str, Any]) -> str:
    """Format the trace of one prompt, with its records in pipeline order. `row` is a row of the view `traces`."""
    parts = [
        f"prompt {row['prompt_id']}  ({row['source']}, {row['split'].lower()})",
        wrap_text(row["prompt"], "  "),
    ]
    for response in row["responses"] or []:
        for index, (completion, reasoning) in enumerate(zip(response["answers"], response["reasoning"], strict=True)):
            thought = f"  (after {len(reasoning)} characters of reasoning)" if reasoning else ""
            parts += [f"completion {index} by policy {response['policy_version']}{thought}", wrap_text(completion, "  ")]
    revisions = {r["round"]: r for r in row["revisions"] or []}
    for critique in row["critiques"] or []:
        parts += _format_critique(critique)
        revision = revisions.get(critique["round"] + 1)
        if revision and critique["end_reason"] == "NONE":
            rejection = "" if revision["rejection_reason"] == "NONE" else f", {revision['rejection_reason'].lower()}"
            details = f"similarity {revision['similarity']:.2f}{rejection}"
            parts += [f"revision, round {revision['round']}  ({details})", wrap_text(revision["revision"], "  ")]
    for demonstration in row["demonstrations"] or []:
        parts += [f"demonstration  ({demonstration['source']})", wrap_text(demonstration["completion"], "  ")]
    for preference in row["preferences"] or []:
        parts += _format_preference(preference)
    if row["final_response"] is not None:
        parts += [f"final response  ({row['end_reason'].lower()})", wrap_text(row["final_response"], "  ")]
    return escape_unprintable("\n".join(parts))


def _format_critique(critique: dict[str, Any]) -> list[str]:
    probabilities = []
    if critique["p_flawed"] is not None:
        probabilities.append(f"p(flawed) {critique['p_flawed']:.3f}")
    if critique["p_better"] is not None:
        probabilities.append(f"p(better than previous) {critique['p_better']:.3f}")
    verdict = critique["verdict"].lower().replace("_", " ")
    end = "" if critique["end_reason"] == "NONE" else f" -> {critique['end_reason'].lower().replace('_', ' ')}"
    if critique["rejection_reason"] not in (None, "NONE", "UNKNOWN"):
        end += f", {critique['rejection_reason'].lower()}"
    details = f"  ({', '.join(probabilities)})" if probabilities else ""
    # The verdict is the worst one of all checked principles. The critique is written under one of them.
    verdicts, round_ = critique["verdicts"] or [], f"round {critique['round']}"
    if [v["principle_id"] for v in verdicts] in ([], [critique["principle_id"]]):
        head = [f"critique, {round_}, by {critique['principle_id']}: {verdict}{end}{details}"]
    else:
        head = [f"verdict, {round_}: {verdict}{end}{details}", *map(_format_verdict, verdicts)]
        head += [f"critique, {round_}, by {critique['principle_id']}"] if critique["critique"] else []
    return [*head, wrap_text(critique["critique"], "  ")] if critique["critique"] else head


def _format_verdict(verdict: dict[str, Any]) -> str:
    p_flawed = "" if verdict["p_flawed"] is None else f"  (p(flawed) {verdict['p_flawed']:.3f})"
    return f"  by {verdict['principle_id']}: {verdict['verdict'].lower().replace('_', ' ')}{p_flawed}"


def _format_preference(preference: dict[str, Any]) -> list[str]:
    if preference["label_source"] == "HUMAN":
        return _format_human_label(preference)
    if preference["p_a"] is None:
        if preference["outcome_reason"]:
            return [f"not judged: {preference['outcome_reason']} ({preference['outcome'].lower()})"]
        return [f"judged by {preference['principle_id']}: no label ({preference['outcome'].lower()})"]
    if preference["label_source"] == "CONTRAST":
        return _format_contrast_label(preference)
    gap, mass = (f"{preference[name]:.2f}" if preference[name] is not None else "-" for name in ("position_gap", "option_mass"))
    return [
        f"judged by {preference['principle_id']}: p(A is better) {preference['p_a']:.3f}"
        f"  (position gap {gap}, option mass {mass})"
    ]


def _format_contrast_label(preference: dict[str, Any]) -> list[str]:
    """Format the label of a contrast pair, and both responses, because the other records do not contain them."""
    head = "contrast pair: A was sampled with the constitution in its prompt, and is chosen"
    if preference["p_forward"] is not None and preference["p_backward"] is not None:
        head += f"  (judge: p(A is better) {(preference['p_forward'] + preference['p_backward']) / 2:.3f})"
    return [head, wrap_text(preference["response_a"], "  A  "), wrap_text(preference["response_b"], "  B  ")]


def _format_human_label(preference: dict[str, Any]) -> list[str]:
    """Format a human label. For a pair from a file, include both responses, because the other records do not contain them."""
    labeler = preference["labeler"] or "a person"
    if preference["p_a"] is None:
        head = f"marked as {preference['outcome'].lower().replace('_', ' ')} by {labeler}"
    else:
        head = f"labeled by {labeler}: p(A is better) {preference['p_a']:.3f}"
    explanation = [wrap_text(preference["explanation"], "  ")] if preference["explanation"] else []
    if preference["parent_ids"]:
        return [f"{head}, replaces label {str(preference['parent_ids'][0])[:8]}", *explanation]
    return [head, wrap_text(preference["response_a"], "  A  "), wrap_text(preference["response_b"], "  B  "), *explanation]
