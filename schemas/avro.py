"""Avro schemas derived from the pydantic records.

`python -m schemas.avro` writes `schemas/<topic>.avsc` for every record, and adds each schema that is not there yet to
`schemas/released/<Record>/<fingerprint>.avsc`, where every version that was ever released stays. A test fails when the
committed files and the classes disagree.
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
FOLDER = Path(__file__).parent
RELEASED = FOLDER / "released"
PRIMITIVES: dict[Any, Any] = {
    str: "string",
    int: "long",
    float: "double",
    bool: "boolean",
    bytes: "bytes",
    datetime: {"type": "long", "logicalType": "timestamp-micros"},
}


def avro_type(annotation: Any, seen: set[str]) -> Any:
    """The Avro type of a Python annotation; a named type is spelled out once and referred to by name after that."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in PRIMITIVES:
        return PRIMITIVES[annotation]
    if origin is typing.Annotated:
        return "float" if any(isinstance(extra, Float32) for extra in arguments[1:]) else avro_type(arguments[0], seen)
    if origin in (Union, types.UnionType):
        return ["null", *(avro_type(a, seen) for a in arguments if a is not types.NoneType)]
    if origin is list:
        return {"type": "array", "items": avro_type(arguments[0], seen)}
    if origin is dict:
        return {"type": "map", "values": avro_type(arguments[1], seen)}
    if annotation.__name__ in seen:
        return f"{NAMESPACE}.{annotation.__name__}"
    seen.add(annotation.__name__)
    if issubclass(annotation, StrEnum):
        return {"type": "enum", "name": annotation.__name__, "symbols": [*annotation], "default": "UNKNOWN"}
    return record_type(annotation, seen)


def record_type(model: type[BaseModel], seen: set[str]) -> dict[str, Any]:
    """The Avro record of a pydantic class."""
    fields = [avro_field(name, info, seen) for name, info in model.model_fields.items()]
    schema = {"type": "record", "name": model.__name__, "namespace": NAMESPACE, "fields": fields}
    if model.__doc__:
        schema["doc"] = " ".join(model.__doc__.split())
    return schema


def avro_field(name: str, info: FieldInfo, seen: set[str]) -> dict[str, Any]:
    annotation = typing.Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
    field: dict[str, Any] = {"name": name, "type": avro_type(annotation, seen)}
    if info.default is not PydanticUndefined:
        field["default"] = info.default
    elif info.default_factory in (list, dict):
        field["default"] = info.default_factory()
    elif info.default_factory is not None:  # created_at: an old writer always wrote it
        field["default"] = 0
    return field


@cache
def schema_of(model: type[Record]) -> dict[str, Any]:
    """The Avro schema of a record class, as plain JSON."""
    schema = record_type(model, {model.__name__})
    return typing.cast(dict[str, Any], json.loads(json.dumps(schema)))


def fingerprint_of(schema: dict[str, Any]) -> bytes:
    """CRC-64-AVRO of the parsing canonical form: 8 bytes, little-endian (Avro specification, "Schema Fingerprints")."""
    canonical = fastavro.schema.to_parsing_canonical_form(schema)
    # fastavro prints the 8 bytes in the order in which single-object encoding wants them.
    return bytes.fromhex(fastavro.schema.fingerprint(canonical, "CRC-64-AVRO"))


def released() -> dict[str, list[dict[str, Any]]]:
    """Every schema version that was ever released, by record name."""
    versions: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(RELEASED.glob("*/*.avsc")):
        versions.setdefault(path.parent.name, []).append(json.loads(path.read_text()))
    return versions


def write_files() -> None:
    """Write the `.avsc` of every record, and its released version when it is new."""
    for model in RECORDS:
        schema = schema_of(model)
        text = json.dumps(schema, indent=2) + "\n"
        (FOLDER / f"{model.topic}.avsc").write_text(text)
        version = RELEASED / model.__name__ / f"{fingerprint_of(schema).hex()}.avsc"
        version.parent.mkdir(parents=True, exist_ok=True)
        version.write_text(text)


if __name__ == "__main__":
    write_files()
