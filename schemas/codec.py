"""Encode and decode records: Avro single-object encoding, or the Confluent wire format.

In single-object encoding, a record consists of the bytes C3 01, the 8-byte CRC-64-AVRO fingerprint of the writer's schema, and
the Avro body. A reader can read all released schema versions. Invalid bytes raise one of the errors below.
Source: Avro specification 1.12, "Single-object encoding".

In the Confluent wire format, a record consists of a zero byte, a 4-byte schema id, and the Avro body. Tools of the Confluent
ecosystem use this format. `configure_framing` selects the framing that a process writes. A process can always read
single-object records. It can read Confluent records only with a schema registry. An unreachable registry does not raise a
RecordError, because a RecordError turns the record into a dead letter (see `schemas.confluent`).

    RecordError
    +-- NotARecord          the first bytes do not match a framing
    +-- UnknownFingerprint  written with a schema that this version does not have
    +-- UnknownSchemaId     the registry has no schema with this id
    +-- ForeignSchema       the schema with this id is not the schema of a Charter record
    +-- Truncated           the body is too short or too long
    +-- Malformed           the body does not match its schema
    +-- WrongRecord         a valid record of another type than expected
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, TypeVar

import fastavro
from fastavro.read import SchemaResolutionError
from fastavro.schema import SchemaParseException, parse_schema
from pydantic import ValidationError

from schemas.avro import compute_schema_fingerprint, get_schema, load_released_schemas
from schemas.records import RECORDS, Record

SINGLE_OBJECT_MARKER = b"\xc3\x01"
_HEADER_BYTES = len(SINGLE_OBJECT_MARKER) + 8
CONFLUENT_MAGIC = b"\x00"  # the first byte of the Confluent wire format
_CONFLUENT_HEADER_BYTES = len(CONFLUENT_MAGIC) + 4
FRAMINGS = ("single-object", "confluent")
_DECODING_ERRORS = (  # fastavro and pydantic raise these for an invalid body or an incompatible writer's schema
    ValidationError,
    SchemaParseException,
    SchemaResolutionError,
    ValueError,
    TypeError,
    ArithmeticError,
)
R = TypeVar("R", bound=Record)


class RecordError(ValueError):
    """The error for bytes that are not a valid Charter record.

    The message has three lines: what happened, why, and what to do.
    """

    def __init__(self, what: str, why: str, fix: str = "") -> None:
        super().__init__(what, why, fix)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, self.why, self.fix) if line)


class NotARecord(RecordError):
    pass


class UnknownFingerprint(RecordError):
    pass


class UnknownSchemaId(RecordError):
    pass


class ForeignSchema(RecordError):
    pass


class Truncated(RecordError):
    pass


class Malformed(RecordError):
    pass


class WrongRecord(RecordError):
    pass


@cache
def load_writer_schemas() -> dict[bytes, tuple[type[Record], Any]]:
    """Return a dictionary from the fingerprint of each schema version to its record class and its parsed schema."""
    by_name = {model.__name__: model for model in RECORDS}
    schemas = {}
    for name, versions in load_released_schemas().items():
        for schema in versions:
            schemas[compute_schema_fingerprint(schema)] = (by_name[name], parse_schema(schema, {}))
    # Add the current classes last, so that they replace a released version with the same fingerprint. (Fingerprints ignore
    # defaults, so two versions can have the same fingerprint.)
    for model in RECORDS:
        schemas[compute_schema_fingerprint(get_schema(model))] = (model, get_parsed_schema(model))
    return schemas


@cache
def get_parsed_schema(model: type[Record]) -> Any:
    """Return the schema of a record class, parsed by fastavro."""
    return parse_schema(get_schema(model), {})


@cache
def _make_single_object_header(model: type[Record]) -> bytes:
    return SINGLE_OBJECT_MARKER + compute_schema_fingerprint(get_schema(model))


class SchemaRegistry(Protocol):
    """A schema registry maps Confluent schema ids to schemas. `schemas.confluent` implements this protocol."""

    def get_header(self, model: type[Record]) -> bytes:
        """Return the first five bytes of every encoded record of a class. The first call for a class registers the schema."""
        ...

    def get_writer_schema(self, schema_id: int) -> tuple[type[Record], Any]:
        """Return the record class and the parsed schema of a schema id. Raise UnknownSchemaId or ForeignSchema."""
        ...


class _FramingState:
    """The framing that this process writes, and the schema registry that it uses for Confluent records."""

    def __init__(self) -> None:
        self.make_header: Callable[[type[Record]], bytes] = _make_single_object_header
        self.registry: SchemaRegistry | None = None


_FRAMING = _FramingState()


def configure_framing(framing: str = "single-object", registry: SchemaRegistry | None = None) -> None:
    """Set the framing that this process writes. Call this function once, at the start of the process.

    With "confluent", the function registers the schemas of all records. The function therefore raises an error at the start if
    the registry is unreachable or rejects a schema. Later calls of `encode_record` send no request to the registry.
    """
    if framing not in FRAMINGS:
        raise ValueError(f"framing {framing!r} is not one of {', '.join(FRAMINGS)}")
    if framing == "single-object":
        _FRAMING.make_header, _FRAMING.registry = _make_single_object_header, registry
        return
    if registry is None:
        raise ValueError("the framing confluent requires a schema registry")
    for model in RECORDS:
        registry.get_header(model)
    _FRAMING.make_header, _FRAMING.registry = registry.get_header, registry


def encode_record(record: Record) -> bytes:
    """Encode a record. The first bytes identify the schema."""
    buffer = io.BytesIO()
    buffer.write(_FRAMING.make_header(type(record)))
    fastavro.schemaless_writer(buffer, get_parsed_schema(type(record)), record.model_dump())
    return buffer.getvalue()


def decode_record(data: bytes, expected: type[R]) -> R:
    """Decode a record of the class `expected`. Raise a RecordError if the bytes are invalid or contain another record."""
    record = decode_any_record(data)
    if not isinstance(record, expected):
        raise WrongRecord(
            f"expected a {expected.__name__}, found a {type(record).__name__}",
            "the record is valid, but it was published to the wrong topic",
        )
    return record


def decode_any_record(data: bytes) -> Record:
    """Decode a record of any class. Raise a RecordError if the bytes are invalid."""
    if data[:2] != SINGLE_OBJECT_MARKER:
        return _decode_confluent(data)
    if len(data) < _HEADER_BYTES:
        raise Truncated("the header is truncated", f"it has {len(data)} bytes instead of {_HEADER_BYTES}")
    entry = load_writer_schemas().get(data[2:_HEADER_BYTES])
    if entry is None:
        raise UnknownFingerprint(
            f"unknown schema fingerprint {data[2:_HEADER_BYTES].hex()}",
            "the record was written by a newer version of Charter, or by another program",
            "upgrade this process, or inspect the record with `charter tail --raw`",
        )
    model, schema = entry
    return _decode_body(memoryview(data)[_HEADER_BYTES:], model, schema)


def _decode_confluent(data: bytes) -> Record:
    """Decode a record in the Confluent wire format, with its schema from the registry."""
    if data[:1] != CONFLUENT_MAGIC:
        raise NotARecord("the bytes are not a Charter record", f"they start with {data[:2].hex() or 'nothing'}, not c301")
    if len(data) < _CONFLUENT_HEADER_BYTES:
        raise Truncated("the header is truncated", f"it has {len(data)} bytes instead of {_CONFLUENT_HEADER_BYTES}")
    schema_id = int.from_bytes(data[1:_CONFLUENT_HEADER_BYTES], "big")
    if _FRAMING.registry is None:
        raise NotARecord(
            "the bytes are not a Charter record that this process can read",
            f"they start with 00, as in the Confluent wire format (schema id {schema_id}), not with c301",
            "to read Confluent records, set bus.schema_registry to the URL of the registry (bus.framing affects only writing)",
        )
    model, schema = _FRAMING.registry.get_writer_schema(schema_id)
    return _decode_body(memoryview(data)[_CONFLUENT_HEADER_BYTES:], model, schema)


def _decode_body(body: memoryview, model: type[R], schema: Any) -> R:
    buffer = io.BytesIO(body)
    name = model.__name__
    try:
        values = fastavro.schemaless_reader(buffer, schema, get_parsed_schema(model))
        num_extra_bytes = len(body) - buffer.tell()
        if num_extra_bytes:
            raise Truncated(f"{num_extra_bytes} extra bytes follow the {name}", "the record is damaged")
        return model.model_validate(values)
    except (EOFError, IndexError, struct.error) as error:
        raise Truncated(f"the {name} is truncated", f"its body ends after {len(body)} bytes") from error
    except _DECODING_ERRORS as error:
        if isinstance(error, RecordError):
            raise
        raise Malformed(f"the body is not a {name}", f"{type(error).__name__}: {str(error)[:200]}") from error
    except MemoryError as error:
        raise Malformed(f"the body is not a {name}", "it contains a length that is larger than the memory") from error
