"""Convert plain data to HTML for the dashboard and `charter report`.

All text is escaped. Invisible characters and characters that change the text direction are shown as code points (U+202E).
The templates isolate each text of unknown direction (`<bdi>`, `dir="auto"`), so that it cannot reorder the text around it.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import unicodedata
from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from charter.dashboard import charts, pipeline_diagram
from charter.dashboard.training_view import select_main_metrics
from charter.text import replace_invisible
from engine.errors import CharterError
from engine.text import format_count

_MAX_TEXT_LENGTH = 20_000  # maximum characters of one text on a page; the JSON version has the whole text
_MAX_DIFF_WORDS = 2_000  # maximum words of each text; the run time of difflib is quadratic
_WORD_PATTERN = re.compile(r"\s*\S+\s*")


def to_json_value(value: Any) -> Any:
    """Convert a database value to JSON. Ids and times become strings, bytes become their length, NaN and infinities become None."""
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


def error_to_dict(error: CharterError | None) -> dict[str, str] | None:
    """Return a dictionary with the three lines of an error: what happened, why, and the fix."""
    return None if error is None else {"what": error.what, "why": error.why, "fix": error.fix}


def escape_text(value: Any, max_length: int = _MAX_TEXT_LENGTH) -> Markup:
    """Return at most `max_length` characters of a text as escaped HTML, with invisible characters made visible."""
    text = value if isinstance(value, str) else str(value)
    # The text is escaped first. Escaping adds and removes no invisible characters.
    parts = [Markup(replace_invisible(str(escape(text[:max_length])), _render_invisible))]
    if len(text) > max_length:
        parts.append(Markup('<span class="truncated"> … {:,} more characters</span>').format(len(text) - max_length))
    return Markup("").join(parts)


def _render_invisible(character: str) -> str:
    name = unicodedata.name(character, "control character")
    return Markup('<span class="invisible" title="{}">U+{:04X}</span>').format(name.lower(), ord(character))


def diff_words(before: str, after: str) -> list[tuple[str, str]] | None:
    """Return the word-level difference as (same | removed | added, text) pairs. Return None if a text is too long to compare."""
    old, new = _WORD_PATTERN.findall(before), _WORD_PATTERN.findall(after)
    if len(old) > _MAX_DIFF_WORDS or len(new) > _MAX_DIFF_WORDS:
        return None
    matcher = difflib.SequenceMatcher(None, [word.strip() for word in old], [word.strip() for word in new], autojunk=False)
    changes: list[tuple[str, str]] = []
    for kind, a, b, c, d in matcher.get_opcodes():
        changes += [("same", "".join(new[c:d]))] if kind == "equal" else []
        changes += [("removed", "".join(old[a:b]))] if kind in ("replace", "delete") else []
        changes += [("added", "".join(new[c:d]))] if kind in ("replace", "insert") else []
    return changes


def render_diff(before: str, after: str) -> Markup:
    """Return the word-level difference as HTML with <del> and <ins> elements."""
    changes = diff_words(before[:_MAX_TEXT_LENGTH], after[:_MAX_TEXT_LENGTH])
    if changes is None:
        return Markup('<p class="hint">too long to compare word by word</p>') + escape_text(after)
    tags = {"same": Markup("{}"), "removed": Markup("<del>{}</del>"), "added": Markup("<ins>{}</ins>")}
    return Markup("").join(tags[kind].format(escape_text(text)) for kind, text in changes)


def _format_number(value: float | int | None, digits: int = 3) -> str:
    """Return a number with thousands separators and `digits` significant digits."""
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
    """Format a duration in seconds with its two largest units, e.g. hours and minutes."""
    if value is None:
        return "–"
    if value < 90:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    units = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    parts, remaining = [], round(value)
    for name, size in units:
        if remaining >= size:
            parts.append(f"{remaining // size} {name}")
            remaining %= size
    return " ".join(parts[:2])


def _format_timestamp(value: str | None) -> Markup:
    """Return a database timestamp (UTC) as a <time> element without fractions of a second."""
    if not value:
        return Markup("–")
    return Markup('<time datetime="{}">{} {}</time>').format(value, value[:10], value[11:19])


def _format_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False)


def _format_symbol(value: str | None) -> str:
    """Return an enum symbol as words: `POSITION_FLIP` becomes `position flip`."""
    return (value or "–").lower().replace("_", " ")


def create_template_environment() -> Environment:
    """Return the template environment. The environment escapes all values and raises an error for an undefined name."""
    environment = Environment(
        loader=PackageLoader("charter.dashboard"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "escape_text": escape_text,
        "format_count": format_count,
        "format_number": _format_number,
        "format_percent": _format_percent,
        "format_duration": _format_duration,
        "format_timestamp": _format_timestamp,
        "format_symbol": _format_symbol,
        "format_json": _format_json,
    }
    environment.globals |= {
        "render_diff": render_diff,
        "charts": charts,
        "pipeline_diagram": pipeline_diagram,
        "select_main_metrics": select_main_metrics,
    }
    return environment
