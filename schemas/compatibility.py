"""The evolution rule: every schema version of a record reads every other one (FULL_TRANSITIVE).

`breaks(old, new)` compares two versions in both directions by Avro's resolution rules (specification, "Schema Resolution"),
for the constructs that our records use. `python -m schemas.compatibility` checks the classes against all released versions.
"""

from __future__ import annotations

import sys
from typing import Any

from schemas.avro import get_schema, load_released_schemas
from schemas.records import RECORDS

_PROMOTIONS = {
    ("int", "long"),
    ("int", "double"),
    ("int", "float"),
    ("long", "double"),
    ("long", "float"),
    ("float", "double"),
}


def collect_named_types(schema: Any, found: dict[str, Any] | None = None) -> dict[str, Any]:
    """Every named type inside a schema, by full name."""
    found = {} if found is None else found
    if isinstance(schema, list):
        for branch in schema:
            collect_named_types(branch, found)
    elif isinstance(schema, dict):
        if schema["type"] in ("record", "enum"):
            found[f"charter.{schema['name']}"] = schema
        for inner in (schema.get("items"), schema.get("values"), *(f["type"] for f in schema.get("fields", []))):
            if inner is not None:
                collect_named_types(inner, found)
    return found


def _find_read_errors(writer: Any, reader: Any, writers: dict[str, Any], readers: dict[str, Any], path: str) -> list[str]:
    """Why `reader` cannot read what `writer` wrote; an empty list when it can."""
    writer, reader = (
        (writers.get(writer, writer) if isinstance(writer, str) else writer),
        (readers.get(reader, reader) if isinstance(reader, str) else reader),
    )
    if isinstance(writer, list):
        return [why for branch in writer for why in _find_read_errors(branch, reader, writers, readers, path)]
    if isinstance(reader, list):
        tried = [_find_read_errors(writer, branch, writers, readers, path) for branch in reader]
        return [] if any(not why for why in tried) else [f"{path}: no branch of the reader's union fits"]
    kind, wanted = (s["type"] if isinstance(s, dict) else s for s in (writer, reader))
    if kind != wanted:
        return [] if (kind, wanted) in _PROMOTIONS else [f"{path}: {kind} cannot be read as {wanted}"]
    if kind == "record":
        return _find_field_read_errors(writer, reader, writers, readers, path)
    if kind == "enum":
        lost = set(writer["symbols"]) - set(reader["symbols"])
        return (
            [f"{path}: symbols {sorted(lost)} are unknown and there is no default"] if lost and "default" not in reader else []
        )
    for inner in ("items", "values"):
        if isinstance(writer, dict) and inner in writer:
            return _find_read_errors(writer[inner], reader[inner], writers, readers, f"{path}[]")
    return []


def _find_field_read_errors(writer: Any, reader: Any, writers: dict[str, Any], readers: dict[str, Any], path: str) -> list[str]:
    written = {field["name"]: field for field in writer["fields"]}
    why = []
    for field in reader["fields"]:
        name = f"{path}.{field['name']}"
        if field["name"] in written:
            why += _find_read_errors(written[field["name"]]["type"], field["type"], writers, readers, name)
        elif "default" not in field:
            why.append(f"{name}: the writer has no such field and the reader has no default for it")
    return why


def find_incompatibilities(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Why two versions of a record are not fully compatible; an empty list when they are."""
    olds, news = collect_named_types(old), collect_named_types(new)
    backward = [f"new code, old record: {why}" for why in _find_read_errors(old, new, olds, news, new["name"])]
    forward = [f"old code, new record: {why}" for why in _find_read_errors(new, old, news, olds, new["name"])]
    return backward + forward


def check_released_schemas() -> list[str]:
    """Every break between the record classes and all released versions."""
    versions = load_released_schemas()
    return [
        why
        for model in RECORDS
        for old in versions.get(model.__name__, [])
        for why in find_incompatibilities(old, get_schema(model))
    ]


if __name__ == "__main__":
    problems = check_released_schemas()
    print("\n".join(problems) or "every record reads every released version, and the other way round")
    sys.exit(1 if problems else 0)
