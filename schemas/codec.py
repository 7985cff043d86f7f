"""Records to bytes and back: Avro single-object encoding.

A message is C3 01, the 8-byte CRC-64-AVRO fingerprint of the writer's schema, and the Avro body. A reader resolves every
schema version ever released to its own. Whatever is wrong with the bytes is one of the named errors below, never a crash.
Source: Avro specification 1.12, "Single-object encoding".

    RecordError
    +-- NotARecord          no C3 01 at the start
    +-- UnknownFingerprint  written with a schema that this version has never seen
    +-- Truncated           the body ends too early, or bytes are left over
    +-- Malformed           the body is no value of its schema
    +-- WrongRecord         a good record of another type than expected
"""

from __future__ import annotations

import io
import struct
from functools import cache
from typing import Any, TypeVar

import fastavro
from fastavro.schema import SchemaParseException, parse_schema
from pydantic import ValidationError

from schemas.avro import fingerprint_of, released, schema_of
from schemas.records import RECORDS, Record

MARKER = b"\xc3\x01"
HEADER_BYTES = len(MARKER) + 8
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


class Truncated(RecordError):
    pass


class Malformed(RecordError):
    pass


class WrongRecord(RecordError):
    pass


@cache
def writer_schemas() -> dict[bytes, tuple[type[Record], Any]]:
    """Fingerprint -> (record class, parsed schema) of every version that can be read."""
    by_name = {model.__name__: model for model in RECORDS}
    known = {}
    for name, versions in released().items():
        for schema in versions:
            known[fingerprint_of(schema)] = (by_name[name], parse_schema(schema, {}))
    # The current classes come last: fingerprints ignore defaults, so an older file may share one.
    for model in RECORDS:
        known[fingerprint_of(schema_of(model))] = (model, current_schema(model))
    return known


@cache
def current_schema(model: type[Record]) -> Any:
    return parse_schema(schema_of(model), {})


@cache
def header(model: type[Record]) -> bytes:
    return MARKER + fingerprint_of(schema_of(model))


def encode(record: Record) -> bytes:
    """A record as one self-describing message."""
    buffer = io.BytesIO()
    buffer.write(header(type(record)))
    fastavro.schemaless_writer(buffer, current_schema(type(record)), record.model_dump())
    return buffer.getvalue()


def decode(data: bytes, expected: type[R]) -> R:
    """The record in a message; raises a RecordError when it is not one of type `expected`."""
    record = decode_any(data)
    if not isinstance(record, expected):
        raise WrongRecord(
            f"expected a {expected.__name__}, found a {type(record).__name__}",
            "the message is a good record of another type: it was published to the wrong topic",
        )
    return record


def decode_any(data: bytes) -> Record:
    """The record in a message, of whatever type."""
    if data[:2] != MARKER:
        raise NotARecord("the message is not a Charter record", f"it starts with {data[:2].hex() or 'nothing'}, not c301")
    if len(data) < HEADER_BYTES:
        raise Truncated("the message is cut in its header", f"{len(data)} bytes where the header alone has {HEADER_BYTES}")
    known = writer_schemas().get(data[2:HEADER_BYTES])
    if known is None:
        raise UnknownFingerprint(
            f"unknown schema fingerprint {data[2:HEADER_BYTES].hex()}",
            "the message was written by a newer version of Charter, or by another program",
            "upgrade this process, or look at the message with `charter tail --raw`",
        )
    model, schema = known
    return read_body(memoryview(data)[HEADER_BYTES:], model, schema)


def read_body(body: memoryview, model: type[R], schema: Any) -> R:
    buffer = io.BytesIO(body)
    name = model.__name__
    try:
        values = fastavro.schemaless_reader(buffer, schema, current_schema(model))
        left_over = len(body) - buffer.tell()
        if left_over:
            raise Truncated(f"{left_over} bytes are left over after a {name}", "the message is damaged")
        return model.model_validate(values)
    except (EOFError, IndexError, struct.error) as error:
        raise Truncated(f"the {name} is cut short", f"its body ends after {len(body)} bytes") from error
    except (ValidationError, UnicodeDecodeError, SchemaParseException, ValueError, TypeError, OverflowError) as error:
        if isinstance(error, RecordError):
            raise
        raise Malformed(f"the body is not a {name}", f"{type(error).__name__}: {str(error)[:200]}") from error
    except MemoryError as error:
        raise Malformed(f"the body is not a {name}", "a length in it is larger than memory") from error
