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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress

import duckdb
import pyarrow as pa
from pydantic_core import to_json

from engine.bus.port import Bus, ConsumerRecord, Reader, TopicPartition
from engine.dead_letters import make_dead_letter
from engine.errors import BusUnreachable, CharterError, DependencyUnreachable, OffsetsLost
from engine.metrics import MetricSample
from engine.store import Store, raise_if_disk_full
from engine.tables import build_erasure_statements, build_insert_statement, get_arrow_schema
from engine.watchdog import CallTracker
from engine.worker import compute_backoff
from schemas.codec import RecordError, decode_record
from schemas.records import DeadLetter, DeadLetterKind, Erasure, Record
from schemas.topics import TOPICS

logger = logging.getLogger("charter.sink")

_READER_YIELD_INTERVAL_S = 1.0
_PARTITION_POLL_INTERVAL_S = 60.0
LOCK_TIMEOUT_S = 5.0
_BACKOFF_RANGE_S = (0.05, 2.0)  # first and longest wait while someone else holds the file
# What differs each time the same work is done: not part of a record's content.
_VOLATILE_FIELDS = {"created_at", "latency_ms", "run_id"}
_ConsumedRow = tuple[Record, ConsumerRecord]


class Sink:
    """The only writer of `store`. `step` reads once and writes once; `run` does so until told to stop."""

    def __init__(self, bus: Bus, store: Store, *, max_rows: int = 2000, max_wait_s: float = 0.5) -> None:
        self.bus, self.store = bus, store
        self.max_rows, self.max_wait_s = max_rows, max_wait_s
        self.topic_ids = bus.topic_ids(list(TOPICS))
        self.store.create_schema()
        self.next_offsets = self.load_offsets()
        self.partitions_checked_at = time.monotonic()
        self.call_tracker = CallTracker("the sink")
        self.erased_prompt_ids = self.load_erased_prompt_ids()
        self.reader: Reader = bus.open_reader(self.next_offsets)
        self.connection_stack = ExitStack()
        self.connection: duckdb.DuckDBPyConnection | None = None
        self.opened_at = 0.0
        self.num_written = self.num_flushes = self.num_pauses = 0
        self.flush_seconds = 0.0
        self.stop_event = threading.Event()

    def run(self, stop: threading.Event) -> None:
        """Until `stop` is set; what was read by then is written."""
        self.stop_event = stop
        failures = 0
        try:
            while not stop.is_set():
                try:
                    self.step()
                    failures = 0
                except BusUnreachable as error:
                    self.release_connection()
                    logger.warning("the sink waits: %s", error.what)
                    stop.wait(compute_backoff(failures))
                    failures += 1
        finally:
            self.close()

    def step(self) -> int:
        """Read what has arrived, write it, and return the number of messages; wait at most `max_wait_s` for the first."""
        self.discover_partitions()
        with self.call_tracker.track("poll"):
            messages = self.reader.poll(self.max_wait_s, self.max_rows)
        if messages and not self.write_with_retry(messages):
            return 0
        if len(messages) < self.max_rows:
            self.release_connection()
        elif time.monotonic() - self.opened_at > _READER_YIELD_INTERVAL_S:
            self.yield_to_readers()
        return len(messages)

    def write_with_retry(self, consumer_records: Sequence[ConsumerRecord]) -> bool:
        """Write, waiting while the file is held, its disk full or the registry away; False when told to stop first.

        Nothing is lost while it waits: the log keeps what comes, and the lag grows.
        """
        wait = _BACKOFF_RANGE_S[0]
        while True:
            try:
                self.write_batch(consumer_records)
                return True
            except DependencyUnreachable as error:
                self.release_connection()
                self.num_pauses += 1
                logger.warning("the sink waits: %s: %s", error.what, error.why)
                if self.stop_event.wait(wait):
                    return False
                wait = min(_BACKOFF_RANGE_S[1], 2 * wait)

    def close(self) -> None:
        self.release_connection()
        self.reader.close()

    # The database is opened when there is something to write and given back when there is no more.

    def acquire_connection(self) -> duckdb.DuckDBPyConnection:
        if self.connection is None:
            self.connection = self.connection_stack.enter_context(self.store.open_write_session(LOCK_TIMEOUT_S))
            self.opened_at = time.monotonic()
        return self.connection

    def release_connection(self) -> None:
        self.connection = None
        self.connection_stack.close()

    def yield_to_readers(self) -> None:
        """Give the file to the readers that queue now; those that come after the sink has asked again wait."""
        if self.store.access_lock.has_waiting_readers():
            self.release_connection()
            deadline = time.monotonic() + _READER_YIELD_INTERVAL_S
            while self.store.access_lock.has_waiting_readers() and time.monotonic() < deadline:
                time.sleep(0.001)  # they pass the gate one by one, within microseconds each
        self.opened_at = time.monotonic()

    # Offsets

    def load_offsets(self) -> dict[TopicPartition, int]:
        """Where to go on: the offsets in the database; the first start of a partition is its beginning."""
        sql = "SELECT topic_id, partition, next_offset FROM raw.sink_offsets WHERE cluster_id = ?"
        with self.store.open_write_session() as connection:
            rows = connection.execute(sql, [self.bus.cluster_id]).fetchall()
            stored = {(topic_id, partition): offset for topic_id, partition, offset in rows}
            begins = self.bus.beginning_offsets(list(TOPICS))
            offsets = {}
            for place, begin in begins.items():
                offset = stored.get((self.topic_ids[place.topic], place.partition))
                if offset is None:
                    offset = begin
                    row = [self.bus.cluster_id, self.topic_ids[place.topic], place.topic, place.partition, begin]
                    connection.execute("INSERT INTO raw.sink_offsets VALUES (?, ?, ?, ?, ?)", row)
                elif offset < begin:
                    raise _make_offsets_lost_error(place, offset, begin)
                offsets[place] = offset
        return offsets

    def load_erased_prompt_ids(self) -> set[str]:
        with self.store.open_write_session() as connection:
            return {str(prompt) for (prompt,) in connection.execute("SELECT prompt_id FROM raw.erasures").fetchall()}

    def discover_partitions(self) -> None:
        """Once a minute: partitions that were added since are read from their beginning."""
        if time.monotonic() - self.partitions_checked_at < _PARTITION_POLL_INTERVAL_S:
            return
        self.partitions_checked_at = time.monotonic()
        if set(self.bus.beginning_offsets(list(TOPICS))) > set(self.next_offsets):
            self.release_connection()
            new = {k: v for k, v in self.load_offsets().items() if k not in self.next_offsets}
            self.next_offsets |= new
            self.reader.add_partitions(new)

    # Rows

    def write_batch(self, consumer_records: Sequence[ConsumerRecord]) -> None:
        """One transaction: rows, offsets and the commit sequence."""
        found = [_decode_row(message) for message in consumer_records]
        forgets = {str(record.prompt_id) for record, _ in found if isinstance(record, Erasure)}
        rows = [row for row in found if _is_erasure(row) or _get_prompt_id(row) not in self.erased_prompt_ids | forgets]
        connection = self.acquire_connection()
        started = time.monotonic()
        offsets = _compute_next_offsets(consumer_records)
        connection.begin()
        try:
            seq = connection.execute("SELECT next_seq FROM raw.sink_state").fetchall()[0][0]
            for topic, table in to_arrow_tables(rows, seq).items():
                connection.register("batch", table)
                connection.execute(build_insert_statement(TOPICS[topic]))
                connection.unregister("batch")
            for statement in build_erasure_statements() if forgets else []:
                connection.execute(statement, [sorted(forgets)])
            connection.execute("UPDATE raw.sink_state SET next_seq = ?", [seq + len(rows)])
            for place, offset in offsets.items():
                self.advance_offset(connection, place, offset)
            connection.commit()
        except BaseException as error:
            with suppress(duckdb.TransactionException):  # a commit that failed has rolled back already
                connection.rollback()
            self.release_connection()
            raise_if_disk_full(error, self.store.path)
            raise
        self.next_offsets |= offsets
        self.erased_prompt_ids |= forgets
        self.num_written += len(rows)
        self.num_flushes += 1
        self.flush_seconds += time.monotonic() - started

    def advance_offset(self, connection: duckdb.DuckDBPyConnection, topic_partition: TopicPartition, offset: int) -> None:
        changed = connection.execute(
            "UPDATE raw.sink_offsets SET next_offset = ?"
            " WHERE cluster_id = ? AND topic_id = ? AND partition = ? AND next_offset = ?",
            [
                offset,
                self.bus.cluster_id,
                self.topic_ids[topic_partition.topic],
                topic_partition.partition,
                self.next_offsets[topic_partition],
            ],
        ).fetchall()
        if changed != [(1,)]:
            raise CharterError(
                f"another sink writes to {self.store.path}",
                f"{topic_partition.topic}[{topic_partition.partition}] is no longer at offset {self.next_offsets[topic_partition]}",
                "stop one of them; a second sink needs a database of its own: --data FOLDER",
            )


def _make_offsets_lost_error(topic_partition: TopicPartition, offset: int, beginning_offset: int) -> OffsetsLost:
    return OffsetsLost(
        f"{topic_partition.topic}[{topic_partition.partition}]@{offset} is gone: the topic now begins at {beginning_offset}",
        f"its retention passed {beginning_offset - offset} records that this database does not have",
        "raise bus.retention_ms; to go on without them, use a new data folder",
    )


def _compute_next_offsets(consumer_records: Iterable[ConsumerRecord]) -> dict[TopicPartition, int]:
    offsets: dict[TopicPartition, int] = {}
    for message in consumer_records:
        place = TopicPartition(message.topic, message.partition)
        offsets[place] = max(offsets.get(place, 0), message.offset + 1)
    return offsets


def _decode_row(consumer_record: ConsumerRecord) -> _ConsumedRow:
    """The record in a message, or the dead letter that says why there is none."""
    try:
        return decode_record(consumer_record.value or b"", TOPICS[consumer_record.topic].record_class), consumer_record
    except RecordError as error:
        return make_dead_letter(consumer_record, DeadLetterKind.DECODE, error, stage="sink", run_id="unknown"), consumer_record


def _is_erasure(row: _ConsumedRow) -> bool:
    return isinstance(row[0], Erasure)


def _get_prompt_id(row: _ConsumedRow) -> str | None:
    """The prompt that a row is about; a dead letter's is its message's key."""
    record, _ = row
    if isinstance(record, DeadLetter):
        return (record.source_key or b"").decode("utf-8", "replace")
    return record.prompt_id


def to_arrow_tables(rows: Sequence[_ConsumedRow], seq: int) -> dict[str, pa.Table]:
    """Arrow tables by topic; each row gets its place in the commit sequence, in the order of arrival."""
    columns: dict[str, list[dict[str, object]]] = defaultdict(list)
    for number, (record, message) in enumerate(rows):
        values = record.model_dump()
        values["created_at"] = record.created_at.replace(tzinfo=None)
        extra = {"_partition": message.partition, "_offset": message.offset}
        columns[record.topic].append(
            values | extra | {"commit_seq": seq + number, "content_hash": _compute_content_hash(record)}
        )
    return {
        topic: pa.Table.from_pylist(values, get_arrow_schema(TOPICS[topic].record_class)) for topic, values in columns.items()
    }


def _compute_content_hash(record: Record) -> int:
    """64 bits of a record's content, without what differs each time the same work is done."""
    text = to_json(record, exclude=_VOLATILE_FIELDS)
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def collect_sink_metrics(sink: Sink) -> Iterator[MetricSample]:
    """The sink's figures."""
    labels = (("run", "all"), ("stage", "sink"))
    yield MetricSample(
        "charter_records_read_total", "Records that the stage has finished and committed.", sink.num_written, labels
    )
    yield MetricSample("charter_pauses_total", "Pauses because a dependency was away.", sink.num_pauses, labels)
    yield MetricSample("charter_batches_total", "Batches that the stage has worked on.", sink.num_flushes, labels)
    yield MetricSample("charter_batch_seconds_total", "Seconds spent working on batches.", sink.flush_seconds, labels)
