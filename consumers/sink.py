"""The sink writes the records of every topic to DuckDB, exactly once.

Each DuckDB transaction contains the rows, the next offset of each partition, and the commit sequence number. When the sink
starts, it continues from the offsets in the database. After a crash, no record is lost or duplicated. Each offset
update checks the old offset (`WHERE next_offset = :old` must change exactly one row), so only one sink can write to a database.
Offsets are stored by cluster id, topic id and partition, so a topic that was deleted and created again is read from its
beginning. The sink refuses a database with records of another log, and a database that is ahead of the log.

A database can lose rows (`engine.commit_history`). The sink reads these records again. It notes in the database when it has read
everything that was on the log, because the trainer must not train on a database that is being rebuilt.

A record that cannot be decoded becomes a row of `dead_letters` in the same transaction.

An Erasure deletes all rows of its prompt in the same transaction. The deleted bytes stay in the files. So the sink then deletes
the values on the embedded log and rewrites both files (`Sink.finish_erasures`). If the sink ends before that, the next sink
continues, because the database contains the list of unfinished erasures. When the sink starts, it reads all erasures from the
log. So a sink with an empty database never writes the records of an erased prompt.

While there is a backlog, the sink keeps the database file open. Once per second, it closes the file if readers are waiting.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial

import duckdb
import pyarrow as pa
from pydantic_core import to_json

from engine.backoff import compute_backoff
from engine.bus.port import Bus, ConsumerRecord, Offsets, Reader, TopicPartition
from engine.commit_history import begin_session, read_matching_offsets
from engine.dead_letters import make_dead_letter
from engine.erasures import ErasedPrompts
from engine.errors import BusUnreachable, CharterError, DependencyUnreachable, OffsetsLost, StoreDamaged
from engine.metrics import MetricSample
from engine.store import Store, raise_if_damaged, raise_if_disk_full
from engine.tables import build_erasure_statements, build_insert_statement, get_arrow_schema
from engine.text import format_count
from engine.topic_guard import TopicGuard
from engine.watchdog import CallTracker
from schemas.codec import RecordError, decode_record
from schemas.records import DeadLetter, DeadLetterKind, Erasure, Record
from schemas.topics import PROMPT_TOPICS, TOPICS

logger = logging.getLogger("charter.sink")

_READER_YIELD_INTERVAL_S = 1.0
_PARTITION_POLL_INTERVAL_S = 60.0
LOCK_TIMEOUT_S = 5.0
_LOST_OFFSETS_REMEDY = "raise bus.retention_ms; to continue without these records, use a new data folder: --data FOLDER"
# The first number is the upper limit of the first wait between two attempts to write. The second is the limit of every wait.
_BACKOFF_RANGE_S = (0.05, 2.0)
# The content hash does not cover these fields, because their values change if the same work is repeated.
_VOLATILE_FIELDS = {"created_at", "latency_ms", "run_id", "configuration"}
_ConsumedRow = tuple[Record, ConsumerRecord]


class Sink:
    """The only writer of the database. `step` reads and writes one batch. `run` repeats `step` until it is stopped."""

    def __init__(self, bus: Bus, store: Store, *, max_rows: int = 2000, max_wait_s: float = 0.5) -> None:
        self.bus, self.store = bus, store
        self.max_rows, self.max_wait_s = max_rows, max_wait_s
        self.topic_ids = bus.topic_ids(list(TOPICS))
        self.topic_guard = TopicGuard(bus, self.topic_ids)
        self.num_deleted_offsets = 0
        self.erased_prompts = ErasedPrompts(bus)
        with self.store.open_complete_database() as connection:
            self.next_offsets = self.load_offsets(connection)
            self.session_id = begin_session(connection)
            self.erased_prompts.prompt_ids |= _load_prompt_ids(connection, "raw.erasures")
            self.unfinished_erasures = _load_prompt_ids(connection, "raw.unfinished_erasures")
        self.unreached_ends: Offsets = bus.end_offsets(list(TOPICS))
        self.partitions_checked_at = time.monotonic()
        self.call_tracker = CallTracker("the sink")
        self.erasure_failures = 0
        self.next_erasure_attempt_at = 0.0
        self.num_erased = 0
        self.reader: Reader = bus.open_reader(self.next_offsets)
        self.connection_stack = ExitStack()
        self.connection: duckdb.DuckDBPyConnection | None = None
        self.opened_at = 0.0
        self.num_written = self.num_flushes = self.num_pauses = 0
        self.flush_seconds = 0.0
        self.stop_event = threading.Event()

    def run(self, stop: threading.Event) -> None:
        """Read and write batches until `stop` is set. A batch that was already read is still written."""
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
            self.try_last_step()
        finally:
            self.close()

    def try_last_step(self) -> None:
        """Run `step` once more, so that the sink notes that it has read the whole log.

        On Kafka, transaction markers follow the last record, so only the next poll reaches the end of the log.
        """
        try:
            self.unreached_ends = self.bus.end_offsets(list(TOPICS))
            self.step()
        except BusUnreachable as error:
            logger.warning("the sink stops before it has read the whole log: %s", error.what)

    def step(self) -> int:
        """Read and write a batch. Return the number of records. Wait at most `max_wait_s` seconds for the first record."""
        self.discover_partitions()
        with self.call_tracker.track("poll"):
            self.topic_guard.verify_at_interval()
            try:
                consumer_records = self.reader.poll(self.max_wait_s, self.max_rows)
            except OffsetsLost as error:
                self.topic_guard.verify()  # offsets of a deleted topic do not exist in the new topic
                raise OffsetsLost(error.what, error.why, _LOST_OFFSETS_REMEDY) from error
        if consumer_records and not self.write_with_retry(partial(self.write_batch, consumer_records)):
            return 0
        if self.unfinished_erasures and time.monotonic() >= self.next_erasure_attempt_at:
            self.finish_erasures()
        is_backlog = len(consumer_records) == self.max_rows
        if is_backlog and time.monotonic() - self.opened_at <= _READER_YIELD_INTERVAL_S:
            return len(consumer_records)
        if self.has_reached_ends():
            self.write_with_retry(self.write_completeness)
        if is_backlog:
            self.yield_to_readers()
        else:
            self.release_connection()
        return len(consumer_records)

    def write_with_retry(self, write: Callable[[], None]) -> bool:
        """Call `write`. Retry while the file is locked, the disk is full or the schema registry is unreachable.

        Return False if the sink is stopped before `write` succeeds. No record is lost, because the log keeps the records.
        """
        for failures in itertools.count():
            try:
                # The ids are compared after the records were read, so the rows are stored under the id of their topic.
                self.topic_guard.verify()
                write()
                return True
            except DependencyUnreachable as error:
                self.release_connection()
                self.num_pauses += 1
                logger.warning("the sink waits: %s: %s", error.what, error.why)
                if self.stop_event.wait(compute_backoff(failures, _BACKOFF_RANGE_S)):
                    break
        return False

    def finish_erasures(self) -> None:
        """Delete the values of erased prompts on the log, and the bytes of deleted rows in the file of the database.

        If a file is in use or a disk is full, the sink tries again later.
        """
        self.release_connection()
        try:
            identifiers = [prompt_id.encode() for prompt_id in sorted(self.unfinished_erasures)]
            num_values = self.bus.erase_values(PROMPT_TOPICS, identifiers)
            self.store.rewrite(LOCK_TIMEOUT_S)
        except DependencyUnreachable as error:
            wait_s = compute_backoff(self.erasure_failures)
            logger.warning("the sink finishes an erasure in %.0f s: %s: %s", wait_s, error.what, error.why)
            self.num_pauses += 1
            self.erasure_failures += 1
            self.next_erasure_attempt_at = time.monotonic() + wait_s
            return
        logger.info("erased %d prompts from %s and %d values from the log", len(identifiers), self.store.path, num_values)
        self.unfinished_erasures, self.erasure_failures = set(), 0

    def close(self) -> None:
        self.release_connection()
        self.reader.close()

    # The database connection is open only while there are rows to write.

    def acquire_connection(self) -> duckdb.DuckDBPyConnection:
        if self.connection is None:
            connection = self.connection_stack.enter_context(self.store.open_write_session(LOCK_TIMEOUT_S))
            self.require_own_session(connection)
            self.connection, self.opened_at = connection, time.monotonic()
        return self.connection

    def require_own_session(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Raise StoreDamaged if the database is not the one that this sink opened at its start."""
        try:
            sql = "SELECT count(*) FROM raw.sink_sessions WHERE session_id = ?"
            is_own = connection.execute(sql, [self.session_id]).fetchall() == [(1,)]
        except duckdb.CatalogException:  # the file is a new database without tables
            is_own = False
        if not is_own:
            self.release_connection()
            raise StoreDamaged(
                f"the database {self.store.path} was replaced while the sink was running",
                "the file does not have the session of this sink",
                "start the sink again; it continues from the offsets in the new file",
            )

    def release_connection(self) -> None:
        self.connection = None
        self.connection_stack.close()

    def yield_to_readers(self) -> None:
        """Close the database file so that waiting readers can open it. Wait for the readers for at most one second."""
        if self.store.access_lock.has_waiting_readers():
            self.release_connection()
            deadline = time.monotonic() + _READER_YIELD_INTERVAL_S
            while self.store.access_lock.has_waiting_readers() and time.monotonic() < deadline:
                time.sleep(0.001)  # the lock admits one reader at a time, within microseconds
        self.opened_at = time.monotonic()

    # Offsets

    def load_offsets(self, connection: duckdb.DuckDBPyConnection) -> dict[TopicPartition, int]:
        """Return the next offset of each partition from the database. A new partition starts at its beginning.

        Warn about the offsets that were deleted from a new partition before this database. Raise StoreMismatch if the rows are of
        another log, or if an offset is above the end of the log.
        """
        stored = read_matching_offsets(connection, self.bus, self.store.path)
        beginning_offsets = self.bus.beginning_offsets(list(TOPICS))
        for topic_partition, beginning_offset in beginning_offsets.items():
            if (offset := stored.get(topic_partition, beginning_offset)) < beginning_offset:
                raise _make_offsets_lost_error(topic_partition, offset, beginning_offset)
        new = {key: offset for key, offset in beginning_offsets.items() if key not in stored}
        if new:
            connection.execute(
                "INSERT INTO raw.sink_offsets SELECT ?, new.*, next_seq"
                " FROM (SELECT unnest(?), unnest(?), unnest(?), unnest(?)) AS new, raw.sink_state",
                [
                    self.bus.cluster_id,
                    [self.topic_ids[topic] for topic, _ in new],
                    [topic for topic, _ in new],
                    [partition for _, partition in new],
                    list(new.values()),
                ],
            )
        self.warn_about_deleted_offsets({key: offset for key, offset in new.items() if offset})
        return {key: stored.get(key, offset) for key, offset in beginning_offsets.items()}

    def warn_about_deleted_offsets(self, deleted: Offsets) -> None:
        """Log and count the offsets that do not exist on the log any more, and whose records this database has never had."""
        if not deleted:
            return
        self.num_deleted_offsets += sum(deleted.values())
        logger.warning(
            "the log begins later than its first offset, so %s does not get the records that retention or an operator has deleted:"
            " %s",
            self.store.path,
            ", ".join(
                f"{topic}[{partition}]: {format_count(count, 'offsets')}"
                for (topic, partition), count in sorted(deleted.items())
            ),
        )

    def discover_partitions(self) -> None:
        """Check for new partitions once a minute. Read new partitions from their beginning."""
        if time.monotonic() - self.partitions_checked_at < _PARTITION_POLL_INTERVAL_S:
            return
        self.partitions_checked_at = time.monotonic()
        self.unreached_ends = self.bus.end_offsets(list(TOPICS))
        if set(self.bus.beginning_offsets(list(TOPICS))) > set(self.next_offsets):
            self.release_connection()
            with self.store.open_write_session() as connection:
                offsets = self.load_offsets(connection)
            new_offsets = {key: offset for key, offset in offsets.items() if key not in self.next_offsets}
            self.next_offsets |= new_offsets
            self.reader.add_partitions(new_offsets)

    def has_reached_ends(self) -> bool:
        """Return whether the sink has read every record that was on the log when the sink last compared (once a minute)."""
        positions = self.reader.positions() if self.unreached_ends else {}
        return bool(positions) and all(positions.get(key, 0) >= end for key, end in self.unreached_ends.items())

    def write_completeness(self) -> None:
        """Note in the database that it has every record that was on the log at the last comparison.

        The offsets then include the transaction markers after the last record. Otherwise the markers would seem to be records
        that the sink has not read, when retention has deleted them.
        """
        connection = self.acquire_connection()
        connection.execute("UPDATE raw.sink_state SET complete_seq = next_seq WHERE complete_seq IS DISTINCT FROM next_seq")
        for topic_partition, position in self.reader.positions().items():
            if position > self.next_offsets[topic_partition]:
                self.advance_offset(connection, topic_partition, position)
                self.next_offsets[topic_partition] = position
        self.unreached_ends = {}

    # Rows

    def write_batch(self, consumer_records: Sequence[ConsumerRecord]) -> None:
        """Write the rows, the offsets and the commit sequence in one transaction."""
        decoded_rows = [_decode_row(record) for record in consumer_records if record.value is not None]
        new_erasures = {str(record.prompt_id) for record, _ in decoded_rows if isinstance(record, Erasure)}
        erased = self.erased_prompts.prompt_ids | new_erasures
        rows = [row for row in decoded_rows if isinstance(row[0], Erasure) or _get_prompt_id(row) not in erased]
        num_erased = len(consumer_records) - len(rows)
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
            for statement in build_erasure_statements() if new_erasures else []:
                connection.execute(statement, [sorted(new_erasures)])
            connection.execute("UPDATE raw.sink_state SET next_seq = ?", [seq + len(rows)])
            for topic_partition, offset in offsets.items():
                self.advance_offset(connection, topic_partition, offset)
            connection.commit()
        except BaseException as error:
            with suppress(duckdb.TransactionException):  # a failed commit has already been rolled back
                connection.rollback()
            self.release_connection()
            raise_if_disk_full(error, self.store.path)
            raise_if_damaged(error, self.store.path)
            raise
        self.next_offsets |= offsets
        self.erased_prompts.prompt_ids |= new_erasures
        self.unfinished_erasures |= new_erasures
        if num_erased and not self.num_erased:
            logger.warning("the sink skips the records of erased prompts, %d of them in this batch", num_erased)
        self.num_erased += num_erased
        self.num_written += len(rows)
        self.num_flushes += 1
        self.flush_seconds += time.monotonic() - started

    def advance_offset(self, connection: duckdb.DuckDBPyConnection, topic_partition: TopicPartition, offset: int) -> None:
        num_changed = connection.execute(
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
        if num_changed != [(1,)]:
            raise CharterError(
                f"another sink writes to {self.store.path}",
                f"{topic_partition.topic}[{topic_partition.partition}] is no longer at offset {self.next_offsets[topic_partition]}",
                "stop one of the sinks, or give the second one a separate database: --data FOLDER",
            )


def _load_prompt_ids(connection: duckdb.DuckDBPyConnection, table: str) -> set[str]:
    return {str(prompt_id) for (prompt_id,) in connection.execute(f"SELECT prompt_id FROM {table}").fetchall()}


def _make_offsets_lost_error(topic_partition: TopicPartition, offset: int, beginning_offset: int) -> OffsetsLost:
    return OffsetsLost(
        f"{topic_partition.topic}[{topic_partition.partition}]@{offset} no longer exists: the log begins at {beginning_offset}",
        f"retention deleted {format_count(beginning_offset - offset, 'records')} that the sink had not read",
        _LOST_OFFSETS_REMEDY,
    )


def _compute_next_offsets(consumer_records: Iterable[ConsumerRecord]) -> dict[TopicPartition, int]:
    offsets: dict[TopicPartition, int] = {}
    for consumer_record in consumer_records:
        topic_partition = consumer_record.topic_partition
        offsets[topic_partition] = max(offsets.get(topic_partition, 0), consumer_record.offset + 1)
    return offsets


def _decode_row(consumer_record: ConsumerRecord) -> _ConsumedRow:
    """Decode a record. If this fails, return a dead letter with the error."""
    try:
        return decode_record(consumer_record.value or b"", TOPICS[consumer_record.topic].record_class), consumer_record
    except RecordError as error:
        return make_dead_letter(consumer_record, DeadLetterKind.DECODE, error, stage="sink", run_id="unknown"), consumer_record


def _get_prompt_id(row: _ConsumedRow) -> str | None:
    """Return the prompt id of a row. The prompt id of a dead letter is the key of its source record."""
    record, _ = row
    if isinstance(record, DeadLetter):
        return (record.source_key or b"").decode("utf-8", "replace")
    return record.prompt_id


def to_arrow_tables(rows: Sequence[_ConsumedRow], seq: int) -> dict[str, pa.Table]:
    """Return the rows as Arrow tables, by topic. Commit sequence numbers start at `seq` and follow the order of the rows."""
    rows_by_topic: dict[str, list[dict[str, object]]] = defaultdict(list)
    for index, (record, consumer_record) in enumerate(rows):
        values = record.model_dump()
        values["created_at"] = record.created_at.replace(tzinfo=None)
        values |= {"_partition": consumer_record.partition, "_offset": consumer_record.offset}
        values |= {"commit_seq": seq + index, "content_hash": _compute_content_hash(record)}
        rows_by_topic[record.topic].append(values)
    return {
        topic: pa.Table.from_pylist(values, get_arrow_schema(TOPICS[topic].record_class))
        for topic, values in rows_by_topic.items()
    }


def _compute_content_hash(record: Record) -> int:
    """Return a 64-bit hash of a record's content without its volatile fields."""
    content = to_json(record, exclude=_VOLATILE_FIELDS)
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def collect_sink_metrics(sink: Sink) -> Iterator[MetricSample]:
    """Yield the metrics of the sink."""
    labels = (("run", "all"), ("stage", "sink"))
    yield MetricSample(
        "charter_records_read_total", "Records that the stage has processed and committed.", sink.num_written, labels
    )
    yield MetricSample("charter_erased_records_total", "Records of erased prompts that were skipped.", sink.num_erased, labels)
    yield MetricSample(
        "charter_deleted_offsets_total",
        "Offsets that were deleted from the log before the database was created.",
        sink.num_deleted_offsets,
        labels,
    )
    yield MetricSample("charter_pauses_total", "Pauses because a dependency was unavailable.", sink.num_pauses, labels)
    yield MetricSample("charter_batches_total", "Batches that the stage has processed.", sink.num_flushes, labels)
    yield MetricSample("charter_batch_seconds_total", "Seconds spent processing batches.", sink.flush_seconds, labels)
