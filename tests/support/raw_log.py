"""Read the log without Charter's code: topics with kafka-python or SQLite, records with fastavro and the .avsc files.

This module must not import Charter's packages, so that it cannot repeat their errors.
"""

import io
import json
import sqlite3
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import fastavro
import kafka

_SCHEMA_FOLDER = Path(__file__).parents[2] / "schemas"
_SINGLE_OBJECT_MARKER = b"\xc3\x01"
_POLL_TIMEOUT_MS = 500
_STALL_TIMEOUT_S = 60


@dataclass(frozen=True)
class RawRecord:
    """A record of a topic. `fields` is the decoded value, or None if the value is empty."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    headers: dict[str, bytes]
    fields: dict[str, Any] | None

    @property
    def prompt_text(self) -> str:
        """The first user message of the prompt."""
        return next(message["content"] for message in self.fields["messages"] if message["role"] == "user")

    def belongs_to(self, run_id: str) -> bool:
        return self.fields is not None and self.fields["run_id"] == run_id


@cache
def load_schema(topic: str) -> tuple[bytes, Any]:
    """Return the Rabin fingerprint (8 bytes, little-endian) and the parsed schema of a topic's records."""
    schema = json.loads((_SCHEMA_FOLDER / f"{topic}.avsc").read_text(encoding="utf-8"))
    canonical = fastavro.schema.to_parsing_canonical_form(schema)
    fingerprint = bytes.fromhex(fastavro.schema.fingerprint(canonical, "CRC-64-AVRO"))
    return fingerprint, fastavro.parse_schema(schema, {})


def decode_value(topic: str, value: bytes) -> dict[str, Any]:
    """Decode a value in Avro single-object encoding. Raise ValueError if it is not exactly one record of the topic's schema."""
    fingerprint, schema = load_schema(topic)
    if value[:2] != _SINGLE_OBJECT_MARKER or value[2:10] != fingerprint:
        raise ValueError(f"a record of {topic} begins with {value[:10].hex()}, not with c301{fingerprint.hex()}")
    buffer = io.BytesIO(value[10:])
    fields = fastavro.schemaless_reader(buffer, schema)
    if rest := buffer.read():
        raise ValueError(f"{len(rest)} bytes follow a record of {topic}")
    return fields


def read_raw_topic(address: str, prefix: str, topic: str) -> list[RawRecord]:
    """Return the committed records of a topic. `address` is kafka://HOST:PORT or the SQLite file of an embedded log."""
    is_kafka = address.startswith("kafka://")
    rows = _read_kafka(address.removeprefix("kafka://"), prefix + topic) if is_kafka else _read_sqlite(address, topic)
    return [
        RawRecord(topic, partition, offset, key, headers, decode_value(topic, value) if value else None)
        for partition, offset, key, value, headers in rows
    ]


def _read_kafka(servers: str, topic: str) -> list[tuple[int, int, bytes | None, bytes | None, dict[str, bytes]]]:
    consumer = kafka.KafkaConsumer(
        bootstrap_servers=servers.split(","), isolation_level="read_committed", auto_offset_reset="earliest",
        enable_auto_commit=False, allow_auto_create_topics=False,
    )  # fmt: skip
    try:
        partitions = [kafka.TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic) or ())]
        ends = consumer.end_offsets(partitions)  # the last stable offsets, because of `read_committed`
        consumer.assign(partitions)
        consumer.seek_to_beginning(*partitions)
        rows, num_empty_polls = [], 0
        while any(consumer.position(partition) < end for partition, end in ends.items()):
            polled = consumer.poll(timeout_ms=_POLL_TIMEOUT_MS)
            num_empty_polls = 0 if polled else num_empty_polls + 1
            if num_empty_polls * _POLL_TIMEOUT_MS > _STALL_TIMEOUT_S * 1000:
                raise TimeoutError(f"{topic} cannot be read up to its end")
            rows += [(r.partition, r.offset, r.key, r.value, dict(r.headers)) for batch in polled.values() for r in batch]
        return rows
    finally:
        consumer.close()


def _read_sqlite(path: str, topic: str) -> list[tuple[int, int, bytes | None, bytes | None, dict[str, bytes]]]:
    sql = """SELECT partition, offset, key, value, headers FROM messages
             WHERE topic = (SELECT id FROM topics WHERE name = ?) ORDER BY partition, offset"""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
        rows = db.execute(sql, [topic]).fetchall()
    db.close()
    return [(*row, _decode_sqlite_headers(headers)) for *row, headers in rows]


def _decode_sqlite_headers(text: str | None) -> dict[str, bytes]:
    return {name: value.encode("latin-1") for name, value in json.loads(text)} if text else {}


def find_repeated_inputs(records: list[RawRecord]) -> list[bytes]:
    """Return the `source` headers that several outputs have. A source is an input record: its topic, partition and offset."""
    counts = Counter(record.headers["source"] for record in records if "source" in record.headers)
    return [source for source, count in counts.items() if count > 1]
