"""Records to bytes and back: Avro single-object encoding, or the Confluent wire format.

A message is C3 01, the 8-byte CRC-64-AVRO fingerprint of the writer's schema, and the Avro body. A reader resolves every
schema version ever released to its own. Whatever is wrong with the bytes is one of the named errors below, never a crash.
Source: Avro specification 1.12, "Single-object encoding".

The other framing is Confluent's (a zero byte, a 4-byte schema id, the body), for that ecosystem's tools; `use` chooses it once
for the process. Single-object messages are always read; Confluent's whenever there is a registry to ask for their schemas. A
registry that is away is no RecordError, which would bury good records: see `schemas.confluent`.

    RecordError
    +-- NotARecord          neither framing's first bytes
    +-- UnknownFingerprint  written with a schema that this version has never seen
    +-- UnknownSchemaId     the registry has no schema of this id
    +-- ForeignSchema       the registry's schema of this id is none of a record of ours
    +-- Truncated           the body ends too early, or bytes are left over
    +-- Malformed           the body is no value of its schema
    +-- WrongRecord         a good record of another type than expected
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
CONFLUENT_MAGIC = b"\x00"  # Confluent's first byte
_CONFLUENT_HEADER_BYTES = len(CONFLUENT_MAGIC) + 4
FRAMINGS = ("single-object", "confluent")
_DECODING_ERRORS = (  # what fastavro and pydantic raise of a body, or of a writer's schema, that does not fit
    ValidationError,
    SchemaParseException,
    SchemaResolutionError,
    ValueError,
    TypeError,
    ArithmeticError,
)
R = TypeVar("R", bound=Record)


class RecordError(ValueError):
    """Bytes that are no record of ours: what, why, and what to do."""

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
    """Fingerprint -> (record class, parsed schema) of every version that can be read."""
    by_name = {model.__name__: model for model in RECORDS}
    known = {}
    for name, versions in load_released_schemas().items():
        for schema in versions:
            known[compute_schema_fingerprint(schema)] = (by_name[name], parse_schema(schema, {}))
    # The current classes come last: fingerprints ignore defaults, so an older file may share one.
    for model in RECORDS:
        known[compute_schema_fingerprint(get_schema(model))] = (model, get_parsed_schema(model))
    return known


@cache
def get_parsed_schema(model: type[Record]) -> Any:
    return parse_schema(get_schema(model), {})


@cache
def _make_single_object_header(model: type[Record]) -> bytes:
    return SINGLE_OBJECT_MARKER + compute_schema_fingerprint(get_schema(model))


class SchemaRegistry(Protocol):
    """Who gives Confluent's schema ids their meaning (`schemas.confluent`)."""

    def get_header(self, model: type[Record]) -> bytes:
        """The first five bytes of a message with this record; registers its schema when first asked."""
        ...

    def get_writer_schema(self, schema_id: int) -> tuple[type[Record], Any]:
        """The record class and the writer's parsed schema of an id; UnknownSchemaId or ForeignSchema if there is none."""
        ...


class _FramingState:
    """How this process frames what it writes, and whom it asks about Confluent's ids."""

    def __init__(self) -> None:
        self.make_header: Callable[[type[Record]], bytes] = _make_single_object_header
        self.registry: SchemaRegistry | None = None


_FRAMING = _FramingState()


def configure_framing(framing: str = "single-object", registry: SchemaRegistry | None = None) -> None:
    """Choose the framing of this process, once, at its start.

    With "confluent" all schemas are registered here, so that an absent or unwilling registry is met before any work is done
    and `encode` never waits for one.
    """
    if framing not in FRAMINGS:
        raise ValueError(f"framing {framing!r} is none of {', '.join(FRAMINGS)}")
    if framing == "single-object":
        _FRAMING.make_header, _FRAMING.registry = _make_single_object_header, registry
        return
    if registry is None:
        raise ValueError("the framing confluent needs a schema registry")
    for model in RECORDS:
        registry.get_header(model)
    _FRAMING.make_header, _FRAMING.registry = registry.get_header, registry


def encode_record(record: Record) -> bytes:
    """A record as one self-describing message."""
    buffer = io.BytesIO()
    buffer.write(_FRAMING.make_header(type(record)))
    fastavro.schemaless_writer(buffer, get_parsed_schema(type(record)), record.model_dump())
    return buffer.getvalue()


def decode_record(data: bytes, expected: type[R]) -> R:
    """The record in a message; raises a RecordError when it is not one of type `expected`."""
    record = decode_any_record(data)
    if not isinstance(record, expected):
        raise WrongRecord(
            f"expected a {expected.__name__}, found a {type(record).__name__}",
            "the message is a good record of another type: it was published to the wrong topic",
        )
    return record


def decode_any_record(data: bytes) -> Record:
    """The record in a message, of whatever type."""
    if data[:2] != SINGLE_OBJECT_MARKER:
        return _decode_confluent(data)
    if len(data) < _HEADER_BYTES:
        raise Truncated("the message is cut in its header", f"{len(data)} bytes where the header alone has {_HEADER_BYTES}")
    known = load_writer_schemas().get(data[2:_HEADER_BYTES])
    if known is None:
        raise UnknownFingerprint(
            f"unknown schema fingerprint {data[2:_HEADER_BYTES].hex()}",
            "the message was written by a newer version of Charter, or by another program",
            "upgrade this process, or look at the message with `charter tail --raw`",
        )
    model, schema = known
    return _decode_body(memoryview(data)[_HEADER_BYTES:], model, schema)


def _decode_confluent(data: bytes) -> Record:
    """The record in a message of Confluent's framing, if it has that framing and there is a registry to ask."""
    if data[:1] != CONFLUENT_MAGIC:
        raise NotARecord("the message is not a Charter record", f"it starts with {data[:2].hex() or 'nothing'}, not c301")
    if len(data) < _CONFLUENT_HEADER_BYTES:
        raise Truncated(
            "the message is cut in its header", f"{len(data)} bytes where Confluent's has {_CONFLUENT_HEADER_BYTES}"
        )
    schema_id = int.from_bytes(data[1:_CONFLUENT_HEADER_BYTES], "big")
    if _FRAMING.registry is None:
        raise NotARecord(
            "the message is not a Charter record as this process reads them",
            f"it starts with 00, like Confluent's wire format (then with schema id {schema_id}), not with c301",
            "if it is one: set bus.schema_registry to the registry's URL (bus.framing is about writing only)",
        )
    model, schema = _FRAMING.registry.get_writer_schema(schema_id)
    return _decode_body(memoryview(data)[_CONFLUENT_HEADER_BYTES:], model, schema)


def _decode_body(body: memoryview, model: type[R], schema: Any) -> R:
    buffer = io.BytesIO(body)
    name = model.__name__
    try:
        values = fastavro.schemaless_reader(buffer, schema, get_parsed_schema(model))
        left_over = len(body) - buffer.tell()
        if left_over:
            raise Truncated(f"{left_over} bytes are left over after a {name}", "the message is damaged")
        return model.model_validate(values)
    except (EOFError, IndexError, struct.error) as error:
        raise Truncated(f"the {name} is cut short", f"its body ends after {len(body)} bytes") from error
    except _DECODING_ERRORS as error:
        if isinstance(error, RecordError):
            raise
        raise Malformed(f"the body is not a {name}", f"{type(error).__name__}: {str(error)[:200]}") from error
    except MemoryError as error:
        raise Malformed(f"the body is not a {name}", "a length in it is larger than memory") from error
