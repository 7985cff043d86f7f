"""How fast the bus is: records published, read and moved exactly once in a second.

The embedded log is measured beside what it is made of, a plain SQLite table filled with `executemany` and as durable, in the
same run on the same disk; the share of it that is left is what the log costs. With KAFKA_HOME (a folder with libs/*.jar, and
Java 17) or CHARTER_TEST_BOOTSTRAP (HOST:PORT) Apache Kafka is measured too.

    python benchmarks/bus.py [--records 20000] [--repeat 3] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from engine.bus import open_bus
from engine.bus.port import Bus, Outgoing, TopicPartition
from schemas.records import Prompt, Response
from schemas.topics import TopicSpec

BATCH = 500
VALUE_BYTES = 1024
Rates = dict[str, float]


def batches(records: int) -> list[list[Outgoing]]:
    """Messages of 1 KB whose bytes do not compress, in batches, keyed as prompts are."""
    values = [os.urandom(VALUE_BYTES) for _ in range(BATCH)]
    rounds = range(records // BATCH)
    return [[Outgoing("in", str(uuid.uuid4()).encode(), value) for value in values] for _ in rounds]


def rate(records: int, work: Callable[[], None]) -> float:
    """Records per second."""
    began = time.perf_counter()
    work()
    return records / (time.perf_counter() - began)


def raw_sqlite(folder: Path, sent: Sequence[Sequence[Outgoing]]) -> Rates:
    """The yardstick: one table, one durable transaction for each batch, and one sequential scan."""
    records = BATCH * len(sent)
    db = sqlite3.connect(folder / "raw.sqlite", isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE messages (offset INTEGER PRIMARY KEY, key BLOB, value BLOB)")

    def publish() -> None:
        for batch in sent:
            db.execute("BEGIN IMMEDIATE")
            db.executemany("INSERT INTO messages (key, value) VALUES (?, ?)", [(m.key, m.value) for m in batch])
            db.execute("COMMIT")

    def read() -> None:
        for first in range(0, records, BATCH):
            sql = "SELECT * FROM messages WHERE offset > ? ORDER BY offset LIMIT ?"
            assert len(db.execute(sql, [first, BATCH]).fetchall()) == BATCH

    rates = {"publish": rate(records, publish), "read": rate(records, read)}
    db.close()
    return rates


def bus_rates(bus: Bus, sent: Sequence[Sequence[Outgoing]]) -> Rates:
    """Publish, read back, and a hop that reads, writes and commits its offsets in transactions."""
    records = BATCH * len(sent)
    bus.create_topics([TopicSpec("in", Prompt), TopicSpec("out", Response)])

    def publish() -> None:
        for batch in sent:
            bus.publish(batch)

    def read() -> None:
        reader, left = bus.reader(bus.begin_offsets(["in"])), records
        while left:
            left -= len(reader.poll(1.0, BATCH))
        reader.close()

    return {"publish": rate(records, publish), "read": rate(records, read), "transact": hop_rate(bus, records)}


def hop_rate(bus: Bus, records: int) -> float:
    """Records per second through a stage that does nothing but copy, from the moment it has its partitions."""
    consumer, writer = bus.consumer("bench", ["in"], member="one"), bus.writer("bench.one")
    messages = []
    while not messages:
        messages = consumer.poll(1.0, BATCH)
    moved, began = 0, time.perf_counter()
    while True:
        offsets = {TopicPartition(m.topic, m.partition): m.offset + 1 for m in messages}
        epochs = {place: epoch for place, epoch in consumer.assignment().items() if place in offsets}
        writer.commit([Outgoing("out", m.key or b"", m.value) for m in messages], offsets, consumer=consumer, epochs=epochs)
        moved += len(messages)
        if moved == records:
            break
        messages = consumer.poll(1.0, BATCH)
    took = time.perf_counter() - began
    consumer.close()
    writer.close()
    return records / took


@contextmanager
def kafka_address(folder: Path) -> Iterator[str | None]:
    """A broker that was named, one of our own, or none."""
    if bootstrap := os.environ.get("CHARTER_TEST_BOOTSTRAP"):
        yield f"kafka://{bootstrap}"
    elif home := os.environ.get("KAFKA_HOME"):
        from tests_kafka import Broker

        with Broker(Path(home), folder) as broker:
            yield f"kafka://{broker.address}"
    else:
        yield None


def measure(address: str, sent: Sequence[Sequence[Outgoing]]) -> Rates:
    bus = open_bus(address, prefix=f"bench-{uuid.uuid4().hex[:8]}.")
    try:
        return bus_rates(bus, sent)
    finally:
        bus.close()


def medians(runs: Sequence[Rates]) -> Rates:
    return {name: median(run[name] for run in runs) for name in runs[0]}


def run(records: int, repeat: int) -> dict[str, Rates]:
    """Medians over `repeat` rounds; in each round the logs are measured one after another."""
    sent = batches(records)
    found: dict[str, list[Rates]] = {"sqlite3": [], "embedded": [], "kafka": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "kafka").mkdir()
        with kafka_address(folder / "kafka") as kafka:
            for number in range(repeat):
                (folder / str(number)).mkdir()
                found["sqlite3"].append(raw_sqlite(folder / str(number), sent))
                found["embedded"].append(measure(str(folder / str(number)), sent))
                if kafka:
                    found["kafka"].append(measure(kafka, sent))
    return {name: medians(runs) for name, runs in found.items() if runs}


def table(found: dict[str, Rates]) -> Iterator[str]:
    yield f"{'records/s':<10}" + "".join(f"{name:>20}" for name in ("publish", "read", "transact"))
    raw = found["sqlite3"]
    for name, rates in found.items():
        cells = []
        for what in ("publish", "read", "transact"):
            share = f" ({rates[what] / raw[what]:.0%})" if what in rates and what in raw and name != "sqlite3" else ""
            cells.append(f"{rates[what]:,.0f}{share}" if what in rates else "-")
        yield f"{name:<10}" + "".join(f"{cell:>20}" for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--records", type=int, default=20_000, help=f"rounded down to a multiple of {BATCH}")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; the medians are shown")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = run(arguments.records, arguments.repeat)
    print(json.dumps(found) if arguments.json else "\n".join(table(found)))


if __name__ == "__main__":
    main()
