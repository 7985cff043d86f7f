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

from schemas.avro import fingerprint_of, released, schema_of
from schemas.records import RECORDS, Record

MARKER = b"\xc3\x01"
HEADER_BYTES = len(MARKER) + 8
MAGIC = b"\x00"  # Confluent's first byte
CONFLUENT_HEADER_BYTES = len(MAGIC) + 4
FRAMINGS = ("single-object", "confluent")
UNREADABLE = (  # what fastavro and pydantic raise of a body, or of a writer's schema, that does not fit
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


class Registry(Protocol):
    """Who gives Confluent's schema ids their meaning (`schemas.confluent`)."""

    def header(self, model: type[Record]) -> bytes:
        """The first five bytes of a message with this record; registers its schema when first asked."""
        ...

    def writer(self, schema_id: int) -> tuple[type[Record], Any]:
        """The record class and the writer's parsed schema of an id; UnknownSchemaId or ForeignSchema if there is none."""
        ...


class Framing:
    """How this process frames what it writes, and whom it asks about Confluent's ids."""

    def __init__(self) -> None:
        self.header: Callable[[type[Record]], bytes] = header
        self.registry: Registry | None = None


CHOSEN = Framing()


def use(framing: str = "single-object", registry: Registry | None = None) -> None:
    """Choose the framing of this process, once, at its start.

    With "confluent" all schemas are registered here, so that an absent or unwilling registry is met before any work is done
    and `encode` never waits for one.
    """
    if framing not in FRAMINGS:
        raise ValueError(f"framing {framing!r} is none of {', '.join(FRAMINGS)}")
    if framing == "single-object":
        CHOSEN.header, CHOSEN.registry = header, registry
        return
    if registry is None:
        raise ValueError("the framing confluent needs a schema registry")
    for model in RECORDS:
        registry.header(model)
    CHOSEN.header, CHOSEN.registry = registry.header, registry


def encode(record: Record) -> bytes:
    """A record as one self-describing message."""
    buffer = io.BytesIO()
    buffer.write(CHOSEN.header(type(record)))
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
        return read_confluent(data)
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


def read_confluent(data: bytes) -> Record:
    """The record in a message of Confluent's framing, if it has that framing and there is a registry to ask."""
    if data[:1] != MAGIC:
        raise NotARecord("the message is not a Charter record", f"it starts with {data[:2].hex() or 'nothing'}, not c301")
    if len(data) < CONFLUENT_HEADER_BYTES:
        raise Truncated("the message is cut in its header", f"{len(data)} bytes where Confluent's has {CONFLUENT_HEADER_BYTES}")
    schema_id = int.from_bytes(data[1:CONFLUENT_HEADER_BYTES], "big")
    if CHOSEN.registry is None:
        raise NotARecord(
            "the message is not a Charter record as this process reads them",
            f"it starts with 00, like Confluent's wire format (then with schema id {schema_id}), not with c301",
            "if it is one: set bus.schema_registry to the registry's URL (bus.framing is about writing only)",
        )
    model, schema = CHOSEN.registry.writer(schema_id)
    return read_body(memoryview(data)[CONFLUENT_HEADER_BYTES:], model, schema)


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
    except UNREADABLE as error:
        if isinstance(error, RecordError):
            raise
        raise Malformed(f"the body is not a {name}", f"{type(error).__name__}: {str(error)[:200]}") from error
    except MemoryError as error:
        raise Malformed(f"the body is not a {name}", "a length in it is larger than memory") from error
