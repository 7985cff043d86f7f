"""The embedded log against plain SQLite inserts in the same run; Kafka too, where CHARTER_TEST_BOOTSTRAP is set.

python -m benchmarks.bus
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import time
from pathlib import Path

from engine.bus import open_bus
from engine.bus.port import Bus, Offsets, Outgoing, TopicPartition
from schemas.topics import TOPICS

RECORDS, BATCH, SIZE = 20_000, 500, 1024


def messages() -> list[Outgoing]:
    return [Outgoing("prompts", str(n).encode(), b"x" * SIZE) for n in range(RECORDS)]


def plain_sqlite(folder: Path) -> float:
    db = sqlite3.connect(folder / "plain.sqlite", isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE m (id INTEGER PRIMARY KEY, key BLOB, value BLOB)")
    started, rows = time.monotonic(), [(n, m.key, m.value) for n, m in enumerate(messages())]
    for start in range(0, RECORDS, BATCH):
        db.execute("BEGIN IMMEDIATE")
        db.executemany("INSERT INTO m VALUES (?, ?, ?)", rows[start : start + BATCH])
        db.execute("COMMIT")
    return RECORDS / (time.monotonic() - started)


def publish(bus: Bus) -> float:
    started, wanted = time.monotonic(), messages()
    for start in range(0, RECORDS, BATCH):
        bus.publish(wanted[start : start + BATCH])
    return RECORDS / (time.monotonic() - started)


def hop(bus: Bus) -> float:
    """Read, write and move the offsets in one transaction: what every stage does."""
    consumer, writer = bus.consumer("bench", ["prompts"], member="a"), bus.writer("bench.a")
    moved, started = 0, time.monotonic()
    while moved < RECORDS:
        found = consumer.poll(1.0, BATCH)
        offsets: Offsets = {}
        for message in found:
            offsets[TopicPartition(message.topic, message.partition)] = message.offset + 1
        if found:
            outputs = [Outgoing("responses", m.key or b"", m.value) for m in found]
            epochs = consumer.assignment()
            writer.commit(outputs, offsets, consumer=consumer, epochs={place: epochs[place] for place in offsets})
        moved += len(found)
    taken = time.monotonic() - started
    consumer.close()
    writer.close()
    return RECORDS / taken


def read(bus: Bus) -> float:
    reader, found, started = bus.reader(bus.begin_offsets(["prompts"])), 0, time.monotonic()
    while found < RECORDS:
        found += len(reader.poll(1.0, 1000))
    taken = time.monotonic() - started
    reader.close()
    return RECORDS / taken


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        floor = plain_sqlite(Path(folder))
        print(f"plain SQLite inserts {floor:9.0f}/s, {SIZE} bytes each, {BATCH} a transaction")
        addresses = [folder]
        if bootstrap := os.environ.get("CHARTER_TEST_BOOTSTRAP"):
            addresses.append(f"kafka://{bootstrap}")
        for address in addresses:
            bus = open_bus(address, prefix=f"bench{time.time_ns()}.")
            bus.create_topics(list(TOPICS.values()))
            for name, measure in (("publish", publish), ("hop", hop), ("read", read)):
                speed = measure(bus)
                print(f"{address.split(':')[0]:10.10} {name:8} {speed:9.0f}/s, {speed / floor:5.2f} of plain inserts")
            bus.close()


if __name__ == "__main__":
    main()
