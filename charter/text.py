"""Text for terminals: escaping of unprintable characters, JSON, wrapping, and the trace of one prompt."""

from __future__ import annotations

import json
import math
import shutil
import textwrap
from typing import Any


def escape_unprintable(text: str) -> str:
    """The text with control, format and direction characters shown as escapes: a terminal must not obey a prompt."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def to_one_line(text: str) -> str:
    """The text inert and on one line."""
    return escape_unprintable(" ".join(line.strip() for line in text.splitlines() if line.strip()))


def format_json(value: Any, indent: int | None = 2) -> str:
    """JSON for any parser (what is no number is null), with the characters that `inert` escapes written as JSON escapes."""
    text = json.dumps(_replace_non_finite(value), ensure_ascii=False, indent=indent, default=str, allow_nan=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def _replace_non_finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _replace_non_finite(each) for key, each in value.items()}
    return [_replace_non_finite(each) for each in value] if isinstance(value, list | tuple) else value


def get_terminal_width() -> int:
    """Return the width of the terminal in columns, or 100 without one."""
    return shutil.get_terminal_size((100, 40)).columns


def wrap_text(text: str, indent: str) -> str:
    """Paragraphs wrapped to the terminal, each line behind `indent`."""
    lines = escape_unprintable(text).splitlines() or [""]
    limit = max(40, min(get_terminal_width(), 110)) - len(indent)
    return "\n".join(indent + part for line in lines for part in (textwrap.wrap(line, limit) or [""]))


def format_trace(row: dict[str, Any]) -> str:
    """What became of one prompt (a row of the view `traces`), in the order in which it happened."""
    parts = [
        f"prompt {row['prompt_id']}  ({row['source']}, {row['split'].lower()})",
        wrap_text(row["prompt"], "  "),
    ]
    for response in row["responses"] or []:
        for number, answer in enumerate(response["answers"]):
            parts += [f"answer {number} by policy {response['policy_version']}", wrap_text(answer, "  ")]
    revisions = {r["round"]: r for r in row["revisions"] or []}
    for critique in row["critiques"] or []:
        parts += _format_critique(critique)
        following = revisions.get(critique["round"] + 1)
        if following and critique["end_reason"] == "NONE":
            fault = "" if following["rejection_reason"] == "NONE" else f", {following['rejection_reason'].lower()}"
            similar = f"similarity {following['similarity']:.2f}{fault}"
            parts += [f"revision {following['round']}  ({similar})", wrap_text(following["revision"], "  ")]
    for demonstration in row["demonstrations"] or []:
        parts += [f"demonstration  ({demonstration['source']})", wrap_text(demonstration["completion"], "  ")]
    for preference in row["preferences"] or []:
        parts += _format_preference(preference)
    if row["final_response"] is not None:
        parts += [f"final text  ({row['end_reason'].lower()})", wrap_text(row["final_response"], "  ")]
    return escape_unprintable("\n".join(parts))


def _format_critique(critique: dict[str, Any]) -> list[str]:
    figures = []
    if critique["p_flawed"] is not None:
        figures.append(f"p(flawed) {critique['p_flawed']:.3f}")
    if critique["p_better"] is not None:
        figures.append(f"p(better than before) {critique['p_better']:.3f}")
    verdict = critique["verdict"].lower().replace("_", " ")
    end = "" if critique["end_reason"] == "NONE" else f" -> {critique['end_reason'].lower().replace('_', ' ')}"
    head = f"critique by {critique['principle_id']}: {verdict}{end}" + (f"  ({', '.join(figures)})" if figures else "")
    return [head, wrap_text(critique["critique"], "  ")] if critique["critique"] else [head]


def _format_preference(preference: dict[str, Any]) -> list[str]:
    if preference["label_source"] == "HUMAN":
        return _format_human_label(preference)
    if preference["p_a"] is None:
        return [f"judged by {preference['principle_id']}: no label ({preference['outcome'].lower()})"]
    gap, mass = (f"{preference[name]:.2f}" if preference[name] is not None else "-" for name in ("position_gap", "option_mass"))
    return [
        f"judged by {preference['principle_id']}: p(first answer is better) {preference['p_a']:.3f}"
        f"  (orders differ by {gap}, mass {mass})"
    ]


def _format_human_label(preference: dict[str, Any]) -> list[str]:
    """A person's label: of a pair from a file, whose answers stand nowhere else, or in the place of another label."""
    head = f"labelled by a person: p(first answer is better) {preference['p_a']:.3f}"
    why = [wrap_text(preference["explanation"], "  ")] if preference["explanation"] else []
    if preference["parent_ids"]:
        return [f"{head}, instead of label {str(preference['parent_ids'][0])[:8]}", *why]
    return [head, wrap_text(preference["response_a"], "  A  "), wrap_text(preference["response_b"], "  B  "), *why]
