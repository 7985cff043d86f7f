"""Plain data as HTML. Every text is escaped; characters that cannot be seen, or that change the direction of others, are shown
by their numbers; a text of unknown direction is set apart from what surrounds it. `charter report` uses the same pages."""

from __future__ import annotations

import difflib
import json
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from charter.dashboard import charts, pipeline_diagram
from charter.dashboard.training_view import select_main_metrics

_MAX_TEXT_LENGTH = 20_000  # characters of one text on a page; its JSON twin has all
_MAX_DIFF_WORDS = 2_000  # words of one text that a comparison looks at
_WORD_PATTERN = re.compile(r"\s*\S+\s*")


def to_json_value(value: Any) -> Any:
    """A value of the database as JSON has it: ids and times as text, bytes as their number, no infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds") + ("Z" if value.tzinfo is None else "")
    if isinstance(value, bytes | bytearray | memoryview):
        return f"{len(bytes(value))} bytes"
    if isinstance(value, Mapping):
        return {str(key): to_json_value(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(each) for each in value]
    if isinstance(value, Decimal):
        return float(value)
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def escape_text(value: Any, max_length: int = _MAX_TEXT_LENGTH) -> Markup:
    """A text as it is, except that invisible and direction characters are shown, and that no more than `most` are."""
    text = value if isinstance(value, str) else str(value)
    parts = [
        escape(text[:max_length]) if text[:max_length].isprintable() else Markup("").join(_escape_invisible(text[:max_length]))
    ]
    if len(text) > max_length:
        parts.append(Markup('<span class="cut"> … {:,} more characters</span>').format(len(text) - max_length))
    return Markup("").join(parts)


def _escape_invisible(text: str) -> Iterator[Markup]:
    start = 0
    for at, character in enumerate(text):
        if not character.isprintable() and character not in "\n\t":
            yield escape(text[start:at])
            name = unicodedata.name(character, "control character")
            yield Markup('<span class="unseen" title="{}">U+{:04X}</span>').format(name.lower(), ord(character))
            start = at + 1
    yield escape(text[start:])


def diff_words(before: str, after: str) -> list[tuple[str, str]] | None:
    """(same | removed | added, text) that lead from one text to the other, word by word; None when they are too long."""
    old, new = _WORD_PATTERN.findall(before), _WORD_PATTERN.findall(after)
    if len(old) > _MAX_DIFF_WORDS or len(new) > _MAX_DIFF_WORDS:
        return None
    matcher = difflib.SequenceMatcher(None, [word.strip() for word in old], [word.strip() for word in new], autojunk=False)
    found: list[tuple[str, str]] = []
    for kind, a, b, c, d in matcher.get_opcodes():
        found += [("same", "".join(new[c:d]))] if kind == "equal" else []
        found += [("removed", "".join(old[a:b]))] if kind in ("replace", "delete") else []
        found += [("added", "".join(new[c:d]))] if kind in ("replace", "insert") else []
    return found


def render_diff(before: str, after: str) -> Markup:
    """The later text with what was added and what was removed marked, word by word."""
    changes = diff_words(before[:_MAX_TEXT_LENGTH], after[:_MAX_TEXT_LENGTH])
    if changes is None:
        return Markup('<p class="hint">too long to compare word by word</p>') + escape_text(after)
    tags = {"same": Markup("{}"), "removed": Markup("<del>{}</del>"), "added": Markup("<ins>{}</ins>")}
    return Markup("").join(tags[kind].format(escape_text(text)) for kind, text in changes)


def _format_number(value: float | int | None, digits: int = 3) -> str:
    """A figure for people: thousands apart, `digits` significant digits."""
    if value is None:
        return "–"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if abs(value) < 1e-3 else f"{round(value, digits - 1 - math.floor(math.log10(abs(value)))):g}"


def _format_percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def _format_duration(value: float | None) -> str:
    """A span of time in its two largest units."""
    if value is None:
        return "–"
    if value < 90:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    units = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    parts, left = [], round(value)
    for name, size in units:
        if left >= size:
            parts.append(f"{left // size} {name}")
            left %= size
    return " ".join(parts[:2])


def _format_timestamp(value: str | None) -> Markup:
    """A time of the database (UTC) to the second."""
    if not value:
        return Markup("–")
    return Markup('<time datetime="{}">{} {}</time>').format(value, value[:10], value[11:19])


def _format_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False)


def _format_symbol(value: str | None) -> str:
    """An enum's symbol as words."""
    return (value or "–").lower().replace("_", " ")


def create_template_environment() -> Environment:
    """The pages: everything is escaped, and a name that does not exist is an error."""
    pages = Environment(
        loader=PackageLoader("charter.dashboard"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {
        "inert": escape_text,
        "number": _format_number,
        "percent": _format_percent,
        "seconds": _format_duration,
        "moment": _format_timestamp,
        "symbol": _format_symbol,
        "pretty": _format_json,
    }
    pages.globals |= {
        "compared": render_diff,
        "charts": charts,
        "picture": pipeline_diagram,
        "main_figures": select_main_metrics,
    }
    return pages
