"""The sink: every topic into DuckDB, exactly once.

Rows, the offsets they bring the sink to, and the commit sequence are one DuckDB transaction, so a crash at any moment loses
nothing and doubles nothing: on start the sink goes on from the offsets in the database. Each offset update is guarded
(`WHERE next_offset = :old`, one row or it stops), so two sinks can never both write. Offsets are kept by cluster id, topic id
and partition: a recreated topic is not taken for the old one. What cannot be decoded becomes a row of `dead_letters` in the
same transaction. An Erasure deletes everything of its prompt in the same transaction, and what comes later is not written.
While there is backlog the database stays open; once a second waiting readers are let in.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress

import duckdb
import pyarrow as pa
from pydantic_core import to_json

from engine.bus.port import Bus, Message, Reader, TopicPartition
from engine.dead_letters import dead_letter
from engine.errors import BusUnreachable, CharterError, DependencyUnreachable, OffsetsLost
from engine.store import Store, raise_if_full
from engine.tables import arrow_schema, forget_statements, insert_statement
from engine.watchdog import Calls
from engine.worker import backoff
from schemas.codec import RecordError, decode
from schemas.records import DeadLetter, DeadLetterKind, Erasure, Record
from schemas.topics import TOPICS

log = logging.getLogger("charter.sink")

YIELD_AFTER_S = 1.0
LOOK_FOR_PARTITIONS_S = 60.0
BUSY_WAIT_S = 5.0
BACKOFF_S = (0.05, 2.0)  # first and longest wait while someone else holds the file
# What differs each time the same work is done: not part of a record's content.
VOLATILE = {"created_at", "latency_ms", "run_id"}
Row = tuple[Record, Message]


class Sink:
    """The only writer of `store`. `step` reads once and writes once; `run` does so until told to stop."""

    def __init__(self, bus: Bus, store: Store, *, max_rows: int = 2000, max_wait_s: float = 0.5) -> None:
        self.bus, self.store = bus, store
        self.max_rows, self.max_wait_s = max_rows, max_wait_s
        self.topic_ids = bus.topic_ids(list(TOPICS))
        self.store.prepare()
        self.next_offsets = self.stored_offsets()
        self.looked_at = time.monotonic()
        self.calls = Calls("the sink")
        self.forgotten = self.stored_forgotten()
        self.reader: Reader = bus.reader(self.next_offsets)
        self.open = ExitStack()
        self.connection: duckdb.DuckDBPyConnection | None = None
        self.opened_at = 0.0
        self.written = self.flushes = self.pauses = 0
        self.flush_s = 0.0
        self.stopping = threading.Event()

    def run(self, stop: threading.Event) -> None:
        """Until `stop` is set; what was read by then is written."""
        self.stopping = stop
        failures = 0
        try:
            while not stop.is_set():
                try:
                    self.step()
                    failures = 0
                except BusUnreachable as error:
                    self.release()
                    log.warning("the sink waits: %s", error.what)
                    stop.wait(backoff(failures))
                    failures += 1
        finally:
            self.close()

    def step(self) -> int:
        """Read what has arrived, write it, and return the number of messages; wait at most `max_wait_s` for the first."""
        self.look_for_partitions()
        with self.calls.call("poll"):
            messages = self.reader.poll(self.max_wait_s, self.max_rows)
        if messages and not self.write_when_free(messages):
            return 0
        if len(messages) < self.max_rows:
            self.release()
        elif time.monotonic() - self.opened_at > YIELD_AFTER_S:
            self.let_readers_in()
        return len(messages)

    def write_when_free(self, messages: Sequence[Message]) -> bool:
        """Write, waiting while the file is held, its disk full or the registry away; False when told to stop first.

        Nothing is lost while it waits: the log keeps what comes, and the lag grows.
        """
        wait = BACKOFF_S[0]
        while True:
            try:
                self.write(messages)
                return True
            except DependencyUnreachable as error:
                self.release()
                self.pauses += 1
                log.warning("the sink waits: %s: %s", error.what, error.why)
                if self.stopping.wait(wait):
                    return False
                wait = min(BACKOFF_S[1], 2 * wait)

    def close(self) -> None:
        self.release()
        self.reader.close()

    # The database is opened when there is something to write and given back when there is no more.

    def acquire(self) -> duckdb.DuckDBPyConnection:
        if self.connection is None:
            self.connection = self.open.enter_context(self.store.writing(BUSY_WAIT_S))
            self.opened_at = time.monotonic()
        return self.connection

    def release(self) -> None:
        self.connection = None
        self.open.close()

    def let_readers_in(self) -> None:
        """Give the file to the readers that queue now; those that come after the sink has asked again wait."""
        if self.store.gate.readers_wait():
            self.release()
            deadline = time.monotonic() + YIELD_AFTER_S
            while self.store.gate.readers_wait() and time.monotonic() < deadline:
                time.sleep(0.001)  # they pass the gate one by one, within microseconds each
        self.opened_at = time.monotonic()

    # Offsets

    def stored_offsets(self) -> dict[TopicPartition, int]:
        """Where to go on: the offsets in the database; the first start of a partition is its beginning."""
        sql = "SELECT topic_id, partition, next_offset FROM raw.sink_offsets WHERE cluster_id = ?"
        with self.store.writing() as connection:
            rows = connection.execute(sql, [self.bus.cluster_id]).fetchall()
            stored = {(topic_id, partition): offset for topic_id, partition, offset in rows}
            begins = self.bus.begin_offsets(list(TOPICS))
            offsets = {}
            for place, begin in begins.items():
                offset = stored.get((self.topic_ids[place.topic], place.partition))
                if offset is None:
                    offset = begin
                    row = [self.bus.cluster_id, self.topic_ids[place.topic], place.topic, place.partition, begin]
                    connection.execute("INSERT INTO raw.sink_offsets VALUES (?, ?, ?, ?, ?)", row)
                elif offset < begin:
                    raise retention_passed(place, offset, begin)
                offsets[place] = offset
        return offsets

    def stored_forgotten(self) -> set[str]:
        with self.store.writing() as connection:
            return {str(prompt) for (prompt,) in connection.execute("SELECT prompt_id FROM raw.erasures").fetchall()}

    def look_for_partitions(self) -> None:
        """Once a minute: partitions that were added since are read from their beginning."""
        if time.monotonic() - self.looked_at < LOOK_FOR_PARTITIONS_S:
            return
        self.looked_at = time.monotonic()
        if set(self.bus.begin_offsets(list(TOPICS))) > set(self.next_offsets):
            self.release()
            new = {k: v for k, v in self.stored_offsets().items() if k not in self.next_offsets}
            self.next_offsets |= new
            self.reader.add(new)

    # Rows

    def write(self, messages: Sequence[Message]) -> None:
        """One transaction: rows, offsets and the commit sequence."""
        found = [row_of(message) for message in messages]
        forgets = {str(record.prompt_id) for record, _ in found if isinstance(record, Erasure)}
        rows = [row for row in found if is_forget(row) or prompt_of(row) not in self.forgotten | forgets]
        connection = self.acquire()
        started = time.monotonic()
        offsets = next_offsets(messages)
        connection.begin()
        try:
            seq = connection.execute("SELECT next_seq FROM raw.sink_state").fetchall()[0][0]
            for topic, table in tables_of(rows, seq).items():
                connection.register("batch", table)
                connection.execute(insert_statement(TOPICS[topic]))
                connection.unregister("batch")
            for statement in forget_statements() if forgets else []:
                connection.execute(statement, [sorted(forgets)])
            connection.execute("UPDATE raw.sink_state SET next_seq = ?", [seq + len(rows)])
            for place, offset in offsets.items():
                self.advance(connection, place, offset)
            connection.commit()
        except BaseException as error:
            with suppress(duckdb.TransactionException):  # a commit that failed has rolled back already
                connection.rollback()
            self.release()
            raise_if_full(error, self.store.path)
            raise
        self.next_offsets |= offsets
        self.forgotten |= forgets
        self.written += len(rows)
        self.flushes += 1
        self.flush_s += time.monotonic() - started

    def advance(self, connection: duckdb.DuckDBPyConnection, place: TopicPartition, offset: int) -> None:
        changed = connection.execute(
            "UPDATE raw.sink_offsets SET next_offset = ?"
            " WHERE cluster_id = ? AND topic_id = ? AND partition = ? AND next_offset = ?",
            [offset, self.bus.cluster_id, self.topic_ids[place.topic], place.partition, self.next_offsets[place]],
        ).fetchall()
        if changed != [(1,)]:
            raise CharterError(
                f"another sink writes to {self.store.path}",
                f"{place.topic}[{place.partition}] is no longer at offset {self.next_offsets[place]}",
                "stop one of them; a second sink needs a database of its own: --data FOLDER",
            )


def retention_passed(place: TopicPartition, offset: int, begin: int) -> OffsetsLost:
    return OffsetsLost(
        f"{place.topic}[{place.partition}]@{offset} is gone: the topic now begins at {begin}",
        f"its retention passed {begin - offset} records that this database does not have",
        "raise bus.retention_ms; to go on without them, use a new data folder",
    )


def next_offsets(messages: Iterable[Message]) -> dict[TopicPartition, int]:
    offsets: dict[TopicPartition, int] = {}
    for message in messages:
        place = TopicPartition(message.topic, message.partition)
        offsets[place] = max(offsets.get(place, 0), message.offset + 1)
    return offsets


def row_of(message: Message) -> Row:
    """The record in a message, or the dead letter that says why there is none."""
    try:
        return decode(message.value or b"", TOPICS[message.topic].record), message
    except RecordError as error:
        return dead_letter(message, DeadLetterKind.DECODE, error, stage="sink", run_id="unknown"), message


def is_forget(row: Row) -> bool:
    return isinstance(row[0], Erasure)


def prompt_of(row: Row) -> str | None:
    """The prompt that a row is about; a dead letter's is its message's key."""
    record, _ = row
    if isinstance(record, DeadLetter):
        return (record.source_key or b"").decode("utf-8", "replace")
    return record.prompt_id


def tables_of(rows: Sequence[Row], seq: int) -> dict[str, pa.Table]:
    """Arrow tables by topic; each row gets its place in the commit sequence, in the order of arrival."""
    columns: dict[str, list[dict[str, object]]] = defaultdict(list)
    for number, (record, message) in enumerate(rows):
        values = record.model_dump()
        values["created_at"] = record.created_at.replace(tzinfo=None)
        extra = {"_partition": message.partition, "_offset": message.offset}
        columns[record.topic].append(values | extra | {"commit_seq": seq + number, "content_hash": content_hash(record)})
    return {topic: pa.Table.from_pylist(values, arrow_schema(TOPICS[topic].record)) for topic, values in columns.items()}


def content_hash(record: Record) -> int:
    """64 bits of a record's content, without what differs each time the same work is done."""
    text = to_json(record, exclude=VOLATILE)
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
