"""Avro schemas derived from the pydantic records.

`python -m schemas.avro` writes the schema of every record to `schemas/<topic>.avsc`. It also writes each new version of a
schema to `schemas/released/<Record>/<fingerprint>.avsc`, and keeps the files of earlier versions. A test fails if the committed
files do not match the classes.
"""

from __future__ import annotations

import json
import types
import typing
from datetime import datetime
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, Union

import fastavro.schema
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from schemas.records import RECORDS, Float32, Record

NAMESPACE = "charter"
SCHEMA_FOLDER = Path(__file__).parent
RELEASED_FOLDER = SCHEMA_FOLDER / "released"
_PRIMITIVE_TYPES: dict[Any, Any] = {
    str: "string",
    int: "long",
    float: "double",
    bool: "boolean",
    bytes: "bytes",
    datetime: {"type": "long", "logicalType": "timestamp-micros"},
}


def _to_avro_type(annotation: Any, seen_names: set[str]) -> Any:
    """Return the Avro type of a Python annotation. Define a record or an enum at its first use, and then refer to its name."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _PRIMITIVE_TYPES:
        return _PRIMITIVE_TYPES[annotation]
    if origin is typing.Annotated:
        is_float32 = any(isinstance(extra, Float32) for extra in arguments[1:])
        return "float" if is_float32 else _to_avro_type(arguments[0], seen_names)
    if origin in (Union, types.UnionType):
        return ["null", *(_to_avro_type(a, seen_names) for a in arguments if a is not types.NoneType)]
    if origin is list:
        return {"type": "array", "items": _to_avro_type(arguments[0], seen_names)}
    if origin is dict:
        return {"type": "map", "values": _to_avro_type(arguments[1], seen_names)}
    if annotation.__name__ in seen_names:
        return f"{NAMESPACE}.{annotation.__name__}"
    seen_names.add(annotation.__name__)
    if issubclass(annotation, StrEnum):
        return {"type": "enum", "name": annotation.__name__, "symbols": [*annotation], "default": "UNKNOWN"}
    return _to_avro_record(annotation, seen_names)


def _to_avro_record(model: type[BaseModel], seen_names: set[str]) -> dict[str, Any]:
    """Return the Avro record type of a pydantic class."""
    fields = [_to_avro_field(name, info, seen_names) for name, info in model.model_fields.items()]
    schema = {"type": "record", "name": model.__name__, "namespace": NAMESPACE, "fields": fields}
    if model.__doc__:
        schema["doc"] = " ".join(model.__doc__.split())
    return schema


def _to_avro_field(name: str, info: FieldInfo, seen_names: set[str]) -> dict[str, Any]:
    annotation = typing.Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
    field: dict[str, Any] = {"name": name, "type": _to_avro_type(annotation, seen_names)}
    if info.default is not PydanticUndefined:
        field["default"] = info.default
    elif info.default_factory in (list, dict):
        field["default"] = info.default_factory()
    elif info.default_factory is not None:  # the field `created_at`: every schema version has it, so no reader uses the default
        field["default"] = 0
    return field


@cache
def get_schema(model: type[Record]) -> dict[str, Any]:
    """Return the Avro schema of a record class as plain JSON."""
    schema = _to_avro_record(model, {model.__name__})
    return typing.cast(dict[str, Any], json.loads(json.dumps(schema)))


def compute_schema_fingerprint(schema: dict[str, Any]) -> bytes:
    """Return the CRC-64-AVRO fingerprint of a schema as 8 little-endian bytes (Avro specification, "Schema Fingerprints")."""
    canonical = fastavro.schema.to_parsing_canonical_form(schema)
    # fastavro returns a hexadecimal string, in the byte order that single-object encoding uses.
    return bytes.fromhex(fastavro.schema.fingerprint(canonical, "CRC-64-AVRO"))


def load_released_schemas() -> dict[str, list[dict[str, Any]]]:
    """Return all released schema versions of each record, by record name."""
    versions: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(RELEASED_FOLDER.glob("*/*.avsc")):
        versions.setdefault(path.parent.name, []).append(json.loads(path.read_text()))
    return versions


def _write_schema_files() -> None:
    """Write the `.avsc` file of every record to `schemas/` and to `schemas/released/`."""
    for model in RECORDS:
        schema = get_schema(model)
        text = json.dumps(schema, indent=2) + "\n"
        (SCHEMA_FOLDER / f"{model.topic}.avsc").write_text(text)
        version = RELEASED_FOLDER / model.__name__ / f"{compute_schema_fingerprint(schema).hex()}.avsc"
        version.parent.mkdir(parents=True, exist_ok=True)
        version.write_text(text)


if __name__ == "__main__":
    _write_schema_files()
