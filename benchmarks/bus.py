"""Measure the throughput of the embedded log, and compare it with plain SQLite inserts.

If the environment variable CHARTER_TEST_BOOTSTRAP is set, the throughput of that Kafka broker is also measured.

python -m benchmarks.bus
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import time
from pathlib import Path

from engine.bus import open_bus
from engine.bus.port import Bus, Offsets, ProducerRecord, TopicPartition
from schemas.topics import TOPICS

_NUM_RECORDS, _BATCH_SIZE, _RECORD_BYTES = 20_000, 500, 1024


def _make_records() -> list[ProducerRecord]:
    return [ProducerRecord("prompts", str(n).encode(), b"x" * _RECORD_BYTES) for n in range(_NUM_RECORDS)]


def _measure_sqlite_inserts(folder: Path) -> float:
    db = sqlite3.connect(folder / "plain.sqlite", isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE m (id INTEGER PRIMARY KEY, key BLOB, value BLOB)")
    started, rows = time.monotonic(), [(n, record.key, record.value) for n, record in enumerate(_make_records())]
    for start in range(0, _NUM_RECORDS, _BATCH_SIZE):
        db.execute("BEGIN IMMEDIATE")
        db.executemany("INSERT INTO m VALUES (?, ?, ?)", rows[start : start + _BATCH_SIZE])
        db.execute("COMMIT")
    return _NUM_RECORDS / (time.monotonic() - started)


def _measure_publish(bus: Bus) -> float:
    started, records = time.monotonic(), _make_records()
    for start in range(0, _NUM_RECORDS, _BATCH_SIZE):
        bus.publish(records[start : start + _BATCH_SIZE])
    return _NUM_RECORDS / (time.monotonic() - started)


def _measure_hop(bus: Bus) -> float:
    """Consume records, produce records and commit offsets in one transaction, as a stage does. Return records per second."""
    consumer, writer = bus.open_consumer("bench", ["prompts"], member="a"), bus.open_writer("bench.a")
    num_moved, started = 0, time.monotonic()
    while num_moved < _NUM_RECORDS:
        records = consumer.poll(1.0, _BATCH_SIZE)
        offsets: Offsets = {}
        for record in records:
            offsets[TopicPartition(record.topic, record.partition)] = record.offset + 1
        if records:
            outputs = [ProducerRecord("responses", record.key or b"", record.value) for record in records]
            epochs = consumer.assignment()
            writer.commit(outputs, offsets, consumer=consumer, epochs={key: epochs[key] for key in offsets})
        num_moved += len(records)
    elapsed = time.monotonic() - started
    consumer.close()
    writer.close()
    return _NUM_RECORDS / elapsed


def _measure_read(bus: Bus) -> float:
    reader, num_read, started = bus.open_reader(bus.beginning_offsets(["prompts"])), 0, time.monotonic()
    while num_read < _NUM_RECORDS:
        num_read += len(reader.poll(1.0, 1000))
    elapsed = time.monotonic() - started
    reader.close()
    return _NUM_RECORDS / elapsed


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        sqlite_rate = _measure_sqlite_inserts(Path(folder))
        print(f"plain SQLite inserts {sqlite_rate:9.0f}/s, {_RECORD_BYTES} bytes each, {_BATCH_SIZE} per transaction")
        addresses = [folder]
        if bootstrap := os.environ.get("CHARTER_TEST_BOOTSTRAP"):
            addresses.append(f"kafka://{bootstrap}")
        for address in addresses:
            bus = open_bus(address, prefix=f"bench{time.time_ns()}.")
            bus.create_topics(list(TOPICS.values()))
            for name, measure in (("publish", _measure_publish), ("hop", _measure_hop), ("read", _measure_read)):
                rate = measure(bus)
                print(f"{address.split(':')[0]:10.10} {name:8} {rate:9.0f}/s, {rate / sqlite_rate:5.2f} of plain inserts")
            bus.close()


if __name__ == "__main__":
    main()
