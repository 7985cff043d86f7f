"""Check that every schema version of a record can read data of every other version (FULL_TRANSITIVE compatibility).

`find_incompatibilities(old, new)` checks in both directions whether one version can read data of the other. It applies the
rules of the Avro specification ("Schema Resolution") to the constructs that the records use. `python -m schemas.compatibility`
compares the record classes with all released versions.
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


def collect_named_types(schema: Any, named_types: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a dictionary from full name to definition for every record and enum in a schema."""
    named_types = {} if named_types is None else named_types
    if isinstance(schema, list):
        for branch in schema:
            collect_named_types(branch, named_types)
    elif isinstance(schema, dict):
        if schema["type"] in ("record", "enum"):
            named_types[f"charter.{schema['name']}"] = schema
        for inner in (schema.get("items"), schema.get("values"), *(f["type"] for f in schema.get("fields", []))):
            if inner is not None:
                collect_named_types(inner, named_types)
    return named_types


def _find_read_errors(writer: Any, reader: Any, writers: dict[str, Any], readers: dict[str, Any], path: str) -> list[str]:
    """Return the reasons why the schema `reader` cannot read data of `writer`. If it can read them, return an empty list."""
    writer, reader = (
        (writers.get(writer, writer) if isinstance(writer, str) else writer),
        (readers.get(reader, reader) if isinstance(reader, str) else reader),
    )
    if isinstance(writer, list):
        return [error for branch in writer for error in _find_read_errors(branch, reader, writers, readers, path)]
    if isinstance(reader, list):
        errors_by_branch = [_find_read_errors(writer, branch, writers, readers, path) for branch in reader]
        return [] if any(not errors for errors in errors_by_branch) else [f"{path}: no branch of the reader's union matches"]
    writer_type, reader_type = (s["type"] if isinstance(s, dict) else s for s in (writer, reader))
    if writer_type != reader_type:
        is_promotion = (writer_type, reader_type) in _PROMOTIONS
        return [] if is_promotion else [f"{path}: {writer_type} cannot be read as {reader_type}"]
    if writer_type == "record":
        return _find_field_read_errors(writer, reader, writers, readers, path)
    if writer_type == "enum":
        unknown = set(writer["symbols"]) - set(reader["symbols"])
        is_error = unknown and "default" not in reader
        return [f"{path}: symbols {sorted(unknown)} are unknown and there is no default"] if is_error else []
    for inner in ("items", "values"):
        if isinstance(writer, dict) and inner in writer:
            return _find_read_errors(writer[inner], reader[inner], writers, readers, f"{path}[]")
    return []


def _find_field_read_errors(writer: Any, reader: Any, writers: dict[str, Any], readers: dict[str, Any], path: str) -> list[str]:
    writer_fields = {field["name"]: field for field in writer["fields"]}
    errors = []
    for field in reader["fields"]:
        name = f"{path}.{field['name']}"
        if field["name"] in writer_fields:
            errors += _find_read_errors(writer_fields[field["name"]]["type"], field["type"], writers, readers, name)
        elif "default" not in field:
            errors.append(f"{name}: the writer has no such field and the reader has no default for it")
    return errors


def find_incompatibilities(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the incompatibilities of two versions of a record in both directions. The list is empty if they are compatible."""
    old_types, new_types = collect_named_types(old), collect_named_types(new)
    backward = _find_read_errors(old, new, old_types, new_types, new["name"])
    forward = _find_read_errors(new, old, new_types, old_types, new["name"])
    return [f"new code cannot read old records: {error}" for error in backward] + [
        f"old code cannot read new records: {error}" for error in forward
    ]


def check_released_schemas() -> list[str]:
    """Return the incompatibilities between the record classes and all released versions."""
    versions = load_released_schemas()
    return [
        error
        for model in RECORDS
        for old in versions.get(model.__name__, [])
        for error in find_incompatibilities(old, get_schema(model))
    ]


if __name__ == "__main__":
    incompatibilities = check_released_schemas()
    print("\n".join(incompatibilities) or "every record class is compatible with every released version, in both directions")
    sys.exit(1 if incompatibilities else 0)
