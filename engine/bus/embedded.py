"""Implement the bus as an embedded log in one SQLite file, for laptops, the demo and tests.

The embedded log has topics, partitions, offsets and transactions, as Kafka has. Several processes on one machine can share it.
It uses WAL and `synchronous = FULL`, so acknowledged records survive a killed process and a power failure.

Leases replace Kafka's group protocol. Each lease on a partition has an epoch. Members share the partitions evenly and renew
their membership while they poll. If a process dies, its membership expires, and its partitions are reassigned. Every write is
one `BEGIN IMMEDIATE` transaction. Processes use only the locks of SQLite.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from engine.bus.partitioner import choose_partition
from engine.bus.port import (
    CommittedOffset,
    ConsumerRecord,
    Headers,
    Offsets,
    ProducerRecord,
    TopicDescription,
    TopicPartition,
    make_group_active_error,
)
from engine.errors import (
    BusUnreachable,
    CommitUncertain,
    DataFolderVersionMismatch,
    PartitionLost,
    TopicChanged,
    UsageError,
    WriterFenced,
)
from schemas.records import Erasure
from schemas.topics import TopicSpec

FORMAT_VERSION = 2
LOG_FILENAME = "log.sqlite"
_LEASE_TIMEOUT_S = 10.0
BUSY_TIMEOUT_S = 30.0
_POLL_INTERVAL_S = 0.005

_SCHEMA_SQL = """
CREATE TABLE meta (cluster_id TEXT NOT NULL);
CREATE TABLE topics (id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, uuid TEXT NOT NULL, partitions INTEGER NOT NULL);
CREATE TABLE messages (topic INTEGER, partition INTEGER, offset INTEGER, key BLOB, value BLOB, headers TEXT,
                       timestamp_ms INTEGER, PRIMARY KEY (topic, partition, offset)) WITHOUT ROWID;
CREATE TABLE offsets (grp TEXT, topic INTEGER, partition INTEGER, next_offset INTEGER,
                      PRIMARY KEY (grp, topic, partition)) WITHOUT ROWID;
CREATE TABLE writers (id TEXT PRIMARY KEY, epoch INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE groups (name TEXT PRIMARY KEY, generation INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE members (grp TEXT, member TEXT, boot TEXT NOT NULL, expires REAL NOT NULL, PRIMARY KEY (grp, member)) WITHOUT ROWID;
CREATE TABLE leases (grp TEXT, topic INTEGER, partition INTEGER, member TEXT, epoch INTEGER NOT NULL,
                     PRIMARY KEY (grp, topic, partition)) WITHOUT ROWID;
"""


def read_boot_clock() -> float:
    """Return the seconds since the machine started. Time during which the machine was suspended is included.

    Leases do not use the wall clock, because it can be set back. A lease would then seem valid for hours after its owner died.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


@lru_cache(maxsize=1)
def read_boot_id() -> str:
    """Return an id that changes when the machine starts again, or "" if the system has no such id."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="ascii").strip() if path.exists() else ""


# These errors indicate bugs in this module, not failures of the disk.
_PROGRAMMING_ERRORS = (sqlite3.ProgrammingError, sqlite3.IntegrityError, sqlite3.DataError, sqlite3.NotSupportedError)


@contextmanager
def translate_errors(path: Path) -> Iterator[None]:
    """Raise BusUnreachable instead of SQLite's errors."""
    try:
        yield
    except _PROGRAMMING_ERRORS:
        raise
    except sqlite3.DatabaseError as error:
        raise BusUnreachable(f"the embedded log {path} is unreachable", str(error), _suggest_fix(error)) from error


def _suggest_fix(error: sqlite3.DatabaseError) -> str:
    if "locked" in str(error):
        return f"another process has held the write lock for {BUSY_TIMEOUT_S:.0f} s: check for a stopped or stuck process"
    if getattr(error, "sqlite_errorcode", 0) in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return "the file is damaged or belongs to another program: move it away, or restore a backup: charter restore FOLDER"
    if "readonly" in str(error):
        return "the file is not writable: fix its permissions, or ask its owner for a copy (charter backup)"
    return "check the disk and its free space: df -h"


def _read_file_identity(path: Path) -> tuple[int, int] | None:
    """Return the device and the inode of a file. Return None if there is no file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


class LogConnection:
    """A connection to the SQLite file. `transaction` is atomic."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with translate_errors(path):
            self.db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
            self.db.execute("PRAGMA synchronous = FULL")

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        with translate_errors(self.path):
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield self.db
            except BaseException:
                if self.db.in_transaction:  # after a disk-full error SQLite has already rolled back
                    self.db.execute("ROLLBACK")
                raise
            self.commit()

    def commit(self) -> None:
        try:
            self.db.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise  # nothing was written, so a retry is safe
            raise CommitUncertain("a commit to the embedded log failed", str(error)) from error

    def fetch_rows(self, sql: str, parameters: Sequence[object] = ()) -> list[tuple]:
        with translate_errors(self.path):
            return self.db.execute(sql, parameters).fetchall()

    def close(self) -> None:
        self.db.close()


class EmbeddedBus:
    """The embedded log in `folder`. A group member that does not poll for `lease_timeout_s` seconds loses its partitions."""

    def __init__(self, folder: Path, *, prefix: str = "", lease_timeout_s: float = _LEASE_TIMEOUT_S) -> None:
        self.folder, self.prefix, self.lease_timeout_s = folder, prefix, lease_timeout_s
        self.path = folder / LOG_FILENAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"cannot use {folder} as a data folder", error.strerror or str(error), "use another folder: --data FOLDER"
            ) from error
        self.lock = threading.Lock()
        self.connection = LogConnection(self.path)
        self.cluster_id = self.create_schema()
        self.file_identity = _read_file_identity(self.path)
        self.topic_cache: dict[str, tuple[int, int]] = {}

    def create_schema(self) -> str:
        """Create the tables of a new file, or check the format of an existing one. Return the cluster id."""
        db = self.connection.db
        self.enable_wal()
        with self.connection.transaction():
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in _SCHEMA_SQL.split(";"):
                    db.execute(statement)
                db.execute("INSERT INTO meta VALUES (?)", [str(uuid.uuid4())])
                db.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
            elif version != FORMAT_VERSION:
                raise DataFolderVersionMismatch(
                    f"{self.path} was created by another version of Charter (format {version}, expected {FORMAT_VERSION})",
                    "this version could damage the file",
                    "use another folder: --data FOLDER, or the version of Charter that created it",
                )
        return str(self.connection.fetch_rows("SELECT cluster_id FROM meta")[0][0])

    def enable_wal(self) -> None:
        """Enable the write-ahead log, so that readers do not block the writer. Retry if another process enables it now."""
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        while True:
            try:
                self.connection.db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.DatabaseError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    with translate_errors(self.path):
                        raise
            time.sleep(_POLL_INTERVAL_S)

    # Topics

    def create_topics(self, specs: Sequence[TopicSpec]) -> list[str]:
        created = []
        with self.lock, self.connection.transaction() as db:
            for spec in specs:
                row = (self.prefix + spec.name, str(uuid.uuid4()), spec.num_partitions)
                sql = "INSERT INTO topics (name, uuid, partitions) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
                if db.execute(sql, row).rowcount:
                    created.append(spec.name)
        return created

    def get_topic(self, name: str) -> tuple[int, int]:
        """Return the id of a topic in the file, and its number of partitions."""
        if name not in self.topic_cache:
            with self.lock:
                rows = self.connection.fetch_rows("SELECT id, partitions FROM topics WHERE name = ?", [self.prefix + name])
            if not rows:
                raise UsageError(
                    f"there is no topic {name} in {self.path}",
                    "the topic has not been created yet",
                    "type: charter topics create",
                )
            self.topic_cache[name] = rows[0]
        return self.topic_cache[name]

    def topic_ids(self, topics: Sequence[str]) -> dict[str, str]:
        if _read_file_identity(self.path) != self.file_identity:
            raise TopicChanged(
                f"the embedded log {self.path} was deleted or replaced while this process used it",
                "this process still has the old file open, and no other process can read what it writes there",
                "start the process again: it uses the file that is there now; to get a deleted log back, type: charter restore FOLDER",
            )
        with self.lock:
            ids = dict(self.connection.fetch_rows("SELECT name, uuid FROM topics"))
        return {topic: ids[self.prefix + topic] for topic in topics if self.prefix + topic in ids}

    def count_partitions(self, topic: str) -> int:
        return self.get_topic(topic)[1]

    def list_partitions(self, topics: Iterable[str]) -> list[TopicPartition]:
        return [TopicPartition(topic, number) for topic in topics for number in range(self.count_partitions(topic))]

    def beginning_offsets(self, topics: Sequence[str]) -> Offsets:
        return dict.fromkeys(self.list_partitions(topics), 0)

    def end_offsets(self, topics: Sequence[str]) -> Offsets:
        partitions = self.list_partitions(topics)
        with self.lock:
            return {tp: _read_end_offset(self.connection, self.topic_cache[tp.topic][0], tp.partition) for tp in partitions}

    def offsets_for_time(self, topics: Sequence[str], timestamp_ms: int) -> Offsets:
        offsets = self.end_offsets(topics)
        sql = "SELECT min(offset) FROM messages WHERE topic = ? AND partition = ? AND timestamp_ms >= ?"
        with self.lock:
            for tp, end in offsets.items():
                rows = self.connection.fetch_rows(sql, [self.topic_cache[tp.topic][0], tp.partition, timestamp_ms])
                offsets[tp] = end if rows[0][0] is None else rows[0][0]
        return offsets

    def describe_topics(self, topics: Sequence[str]) -> list[TopicDescription]:
        ids = self.topic_ids(topics)
        return [TopicDescription(name, ids[name], self.count_partitions(name), 1, 1, {}) for name in topics if name in ids]

    def committed(self, group: str, topics: Sequence[str]) -> Offsets:
        return {tp: committed.offset for tp, committed in self.list_committed(group, topics).items()}

    def list_committed(self, group: str, topics: Sequence[str]) -> dict[TopicPartition, CommittedOffset]:
        with self.lock:
            return _read_committed(self.connection, self.prefix, self.prefix + group, topics)

    def list_members(self, group_prefixes: Sequence[str]) -> dict[str, list[str]]:
        sql = "SELECT grp, member FROM members WHERE boot = ? AND expires >= ? ORDER BY grp, member"
        with self.lock:
            rows = self.connection.fetch_rows(sql, [read_boot_id(), read_boot_clock()])
        members: dict[str, list[str]] = {}
        for group, member in rows:
            if group.startswith(tuple(self.prefix + prefix for prefix in group_prefixes)):
                members.setdefault(group.removeprefix(self.prefix), []).append(member)
        return members

    def set_committed(self, group: str, offsets: Mapping[TopicPartition, int]) -> None:
        name = self.prefix + group
        rows = [(name, self.get_topic(tp.topic)[0], tp.partition, offset) for tp, offset in offsets.items()]
        with self.lock, self.connection.transaction() as db:
            self.require_inactive(db, group)
            db.executemany("INSERT OR REPLACE INTO offsets VALUES (?, ?, ?, ?)", rows)

    def delete_committed(self, group: str, topics: Sequence[str]) -> None:
        rows = [(self.prefix + group, self.get_topic(topic)[0]) for topic in topics]
        with self.lock, self.connection.transaction() as db:
            self.require_inactive(db, group)
            db.executemany("DELETE FROM offsets WHERE grp = ? AND topic = ?", rows)

    def require_inactive(self, db: sqlite3.Connection, group: str) -> None:
        sql = "SELECT member FROM members WHERE grp = ? AND boot = ? AND expires >= ?"
        members = [member for (member,) in db.execute(sql, [self.prefix + group, read_boot_id(), read_boot_clock()])]
        if members:
            raise make_group_active_error(group, f"the group has members: {', '.join(members)}")

    # Writing and reading

    def publish(self, records: Sequence[ProducerRecord]) -> None:
        records_by_partition = self.group_by_partition(records)
        with self.lock, self.connection.transaction() as db:
            self.append_records(db, records_by_partition)

    def append_records(
        self, db: sqlite3.Connection, records_by_partition: Mapping[tuple[int, int], Sequence[ProducerRecord]]
    ) -> None:
        """Append records at contiguous offsets. The caller must have started a transaction.

        A record whose key is an erased prompt is stored without its value. A stage may write such a record, if it read the
        prompt before the erasure.
        """
        now_ms = int(time.time() * 1000)
        sql = "SELECT key FROM messages JOIN topics ON topics.id = messages.topic WHERE topics.name = ?"
        erased_keys = {key for (key,) in db.execute(sql, [self.prefix + Erasure.topic])}
        for (topic, partition), records in records_by_partition.items():
            sql = "SELECT coalesce(max(offset) + 1, 0) FROM messages WHERE topic = ? AND partition = ?"
            (first,) = db.execute(sql, [topic, partition]).fetchone()
            rows = []
            for i, record in enumerate(records):
                is_erased = record.key in erased_keys and record.topic != Erasure.topic
                value = None if is_erased else record.value
                rows.append((topic, partition, first + i, record.key, value, _encode_headers(record.headers), now_ms))
            db.executemany("INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def erase_values(self, topics: Sequence[str], identifiers: Collection[bytes]) -> int:
        """Set values to null, and then remove the old bytes from the file and its write-ahead log.

        The rows stay, so that their offsets are not used again. VACUUM is necessary, because a page of the file can contain
        copies of values that were moved to another page.
        """
        topic_ids = [self.get_topic(topic)[0] for topic in topics]
        sql = f"""UPDATE messages SET value = NULL
                  WHERE topic IN ({", ".join("?" for _ in topic_ids)}) AND value IS NOT NULL
                  AND (key = ? OR instr(value, ?))"""
        connection = LogConnection(self.path)
        try:
            connection.fetch_rows("PRAGMA secure_delete = ON")
            with connection.transaction() as db:
                num_erased = sum(db.execute(sql, [*topic_ids, text, text]).rowcount for text in identifiers)
            connection.fetch_rows("VACUUM")
            ((is_busy, _, _),) = connection.fetch_rows("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            connection.close()
        if is_busy:
            raise BusUnreachable(
                f"the write-ahead log of {self.path} still contains erased text",
                f"another process has been reading the log for {BUSY_TIMEOUT_S:.0f} s",
                "wait until the reader ends; the sink tries again",
            )
        return num_erased

    def group_by_partition(self, records: Sequence[ProducerRecord]) -> dict[tuple[int, int], list[ProducerRecord]]:
        """Group records by (topic id, partition)."""
        groups: dict[tuple[int, int], list[ProducerRecord]] = {}
        for record in records:
            topic, partitions = self.get_topic(record.topic)
            partition = choose_partition(record.key, partitions) if record.partition is None else record.partition
            groups.setdefault((topic, partition), []).append(record)
        return groups

    def open_writer(self, transactional_id: str, *, topics: Sequence[str] = (), group: str = "") -> EmbeddedWriter:
        return EmbeddedWriter(self, self.prefix + transactional_id)

    def open_consumer(self, group: str, topics: Sequence[str], *, member: str, hold_new: bool = False) -> EmbeddedConsumer:
        return EmbeddedConsumer(self, self.prefix + group, topics, member, hold_new)

    def open_reader(self, positions: Mapping[TopicPartition, int]) -> EmbeddedReader:
        return EmbeddedReader(self, positions)

    def close(self) -> None:
        self.connection.close()


def _read_end_offset(connection: LogConnection, topic: int, partition: int) -> int:
    sql = "SELECT coalesce(max(offset) + 1, 0) FROM messages WHERE topic = ? AND partition = ?"
    return int(connection.fetch_rows(sql, [topic, partition])[0][0])


def _read_committed(
    connection: LogConnection, prefix: str, group: str, topics: Sequence[str]
) -> dict[TopicPartition, CommittedOffset]:
    """Return the committed offsets of a group. `group` includes the prefix."""
    names = {prefix + topic: topic for topic in topics}
    rows = connection.fetch_rows(
        "SELECT name, uuid, partition, next_offset FROM offsets JOIN topics ON topics.id = topic WHERE grp = ?", [group]
    )
    return {
        TopicPartition(names[name], partition): CommittedOffset(o, uid) for name, uid, partition, o in rows if name in names
    }


def _encode_headers(headers: Headers) -> str | None:
    return json.dumps([[key, value.decode("latin-1")] for key, value in headers]) if headers else None


@lru_cache(maxsize=256)  # almost all records have one of a few distinct header values
def _decode_headers(text: str | None) -> Headers:
    return tuple((key, value.encode("latin-1")) for key, value in json.loads(text)) if text else ()


class EmbeddedWriter:
    """Writes transactions under one transactional id. A new writer fences the previous writers with the same id."""

    def __init__(self, bus: EmbeddedBus, transactional_id: str) -> None:
        self.bus, self.transactional_id = bus, transactional_id
        self.connection = LogConnection(bus.path)
        with self.connection.transaction() as db:
            sql = "INSERT INTO writers VALUES (?, 1) ON CONFLICT (id) DO UPDATE SET epoch = epoch + 1 RETURNING epoch"
            (self.epoch,) = db.execute(sql, [transactional_id]).fetchone()

    def commit(
        self,
        outputs: Sequence[ProducerRecord],
        offsets: Mapping[TopicPartition, int] | None = None,
        *,
        consumer: object = None,
        epochs: Mapping[TopicPartition, int] | None = None,
        before_commit: Callable[[], None] | None = None,
    ) -> None:
        if before_commit:
            before_commit()
        records_by_partition = self.bus.group_by_partition(outputs)
        with self.connection.transaction() as db:
            self.check_fence(db)
            if offsets:
                assert isinstance(consumer, EmbeddedConsumer), "offsets need the consumer of their group"
                self.check_leases(db, consumer, {tp: consumer.epochs.get(tp) for tp in offsets} | dict(epochs or {}))
                self.store_offsets(db, consumer.group, offsets)
            self.bus.append_records(db, records_by_partition)

    def end_hanging_transaction(self) -> None:
        """Do nothing: a transaction of SQLite is written as a whole."""

    def check_fence(self, db: sqlite3.Connection) -> None:
        (epoch,) = db.execute("SELECT epoch FROM writers WHERE id = ?", [self.transactional_id]).fetchone()
        if epoch != self.epoch:
            raise WriterFenced(
                f"another process has opened a writer with the transactional id {self.transactional_id}",
                "two processes have the same instance name",
                "stop one of the processes, or give each process a different name: --instance NAME",
            )

    def check_leases(
        self, db: sqlite3.Connection, consumer: EmbeddedConsumer, epochs: Mapping[TopicPartition, int | None]
    ) -> None:
        for tp, epoch in epochs.items():
            topic, _ = self.bus.get_topic(tp.topic)
            sql = "SELECT member, epoch FROM leases WHERE grp = ? AND topic = ? AND partition = ?"
            if db.execute(sql, [consumer.group, topic, tp.partition]).fetchone() != (consumer.member, epoch):
                consumer.next_renewal_at = 0.0  # so that the next poll reads the leases again
                raise PartitionLost(f"{tp.topic}[{tp.partition}] has moved to another member")

    def store_offsets(self, db: sqlite3.Connection, group: str, offsets: Mapping[TopicPartition, int]) -> None:
        rows = [(group, self.bus.get_topic(tp.topic)[0], tp.partition, offset) for tp, offset in offsets.items()]
        db.executemany("INSERT OR REPLACE INTO offsets VALUES (?, ?, ?, ?)", rows)

    def close(self) -> None:
        self.connection.close()


class EmbeddedReader:
    """Reads given partitions from given offsets, without a consumer group."""

    def __init__(self, bus: EmbeddedBus, positions: Mapping[TopicPartition, int]) -> None:
        self.bus = bus
        self.connection = LogConnection(bus.path)
        self.next_offsets: Offsets = dict(positions)
        self.round_robin_index = 0

    def positions(self) -> Offsets:
        return dict(self.next_offsets)

    def add_partitions(self, positions: Mapping[TopicPartition, int]) -> None:
        self.next_offsets |= positions

    def poll(self, timeout_s: float, max_records: int) -> list[ConsumerRecord]:
        return _wait_for_records(self.connection, timeout_s, lambda: self.fetch_records(list(self.next_offsets), max_records))

    def fetch_records(self, partitions: Sequence[TopicPartition], max_records: int) -> list[ConsumerRecord]:
        """Return the available records. Each call starts with a different partition, so that every partition is read."""
        self.round_robin_index += 1
        records: list[ConsumerRecord] = []
        for i in range(len(partitions)):
            tp = partitions[(self.round_robin_index + i) % len(partitions)]
            fetched = self.fetch_partition(tp, max_records - len(records))
            if fetched:
                self.next_offsets[tp] = fetched[-1].offset + 1
                records += fetched
            if len(records) >= max_records:
                break
        return records

    def fetch_partition(self, partition: TopicPartition, limit: int) -> list[ConsumerRecord]:
        topic, _ = self.bus.get_topic(partition.topic)
        rows = self.connection.fetch_rows(
            "SELECT offset, key, value, headers, timestamp_ms FROM messages"
            " WHERE topic = ? AND partition = ? AND offset >= ? ORDER BY offset LIMIT ?",
            [topic, partition.partition, self.next_offsets[partition], limit],
        )
        return [
            ConsumerRecord(partition.topic, partition.partition, offset, key, value, _decode_headers(headers), timestamp)
            for offset, key, value, headers, timestamp in rows
        ]

    def close(self) -> None:
        self.connection.close()


def _wait_for_records(
    connection: LogConnection, timeout_s: float, fetch: Callable[[], list[ConsumerRecord]]
) -> list[ConsumerRecord]:
    """Call `fetch` until it returns records or the timeout expires.

    `PRAGMA data_version` changes when another connection writes. Reading this value is faster than `fetch`, so `fetch` is
    called again only after a change.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        data_version = connection.fetch_rows("PRAGMA data_version")
        records = fetch()
        if records:
            return records
        while connection.fetch_rows("PRAGMA data_version") == data_version:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                return []
            time.sleep(min(_POLL_INTERVAL_S, remaining_s))


class EmbeddedConsumer(EmbeddedReader):
    """A member of a consumer group. The member reads the partitions that it has leased."""

    def __init__(self, bus: EmbeddedBus, group: str, topics: Sequence[str], member: str, hold_new: bool = False) -> None:
        super().__init__(bus, {})
        self.group, self.topics, self.member, self.hold_new = group, list(topics), member, hold_new
        self.epochs: Offsets = {}
        self.started_epochs: Offsets = {}  # the epoch in which each partition was started
        self.paused_partitions: set[TopicPartition] = set()
        self.generation = -1
        self.next_renewal_at = 0.0
        bus.list_partitions(self.topics)  # raise the error for an unknown topic now, not at the first poll
        self.topic_ids: Mapping[str, str] = bus.topic_ids(self.topics)

    def assignment(self) -> Offsets:
        return dict(self.epochs)

    def held(self) -> Offsets:
        return {tp: epoch for tp, epoch in self.epochs.items() if self.hold_new and self.started_epochs.get(tp) != epoch}

    def start(self, partition: TopicPartition, offset: int) -> None:
        self.seek(partition, offset)
        self.started_epochs[partition] = self.epochs[partition]

    def poll(self, timeout_s: float, max_records: int) -> list[ConsumerRecord]:
        deadline = time.monotonic() + timeout_s
        while True:
            self.renew_membership()
            wait_s = max(0.0, min(deadline, self.next_renewal_at) - time.monotonic())
            records = _wait_for_records(self.connection, wait_s, lambda: self.fetch_assigned(max_records))
            if records or time.monotonic() >= deadline:
                return records

    def fetch_assigned(self, max_records: int) -> list[ConsumerRecord]:
        if self.read_generation() != self.generation:
            self.rebalance()
        held = self.held()
        active = [tp for tp in self.epochs if tp not in self.paused_partitions and tp not in held]
        return self.fetch_records(active, max_records) if active else []

    def renew_membership(self) -> None:
        if time.monotonic() >= self.next_renewal_at or self.read_generation() != self.generation:
            self.rebalance()

    def read_generation(self) -> int:
        rows = self.connection.fetch_rows("SELECT generation FROM groups WHERE name = ?", [self.group])
        return int(rows[0][0]) if rows else 0

    def rebalance(self) -> None:
        """Renew the membership, remove expired members, and update the leases to this member's share of the partitions."""
        with self.connection.transaction() as db:
            now, boot = read_boot_clock(), read_boot_id()
            is_new = not db.execute("SELECT 1 FROM members WHERE grp = ? AND member = ?", [self.group, self.member]).fetchone()
            row = [self.group, self.member, boot, now + self.bus.lease_timeout_s]
            db.execute("INSERT OR REPLACE INTO members VALUES (?, ?, ?, ?)", row)
            # Members from an earlier boot are dead, and their times are from another clock.
            expired = "DELETE FROM members WHERE grp = ? AND (boot <> ? OR expires < ?)"
            num_expired = db.execute(expired, [self.group, boot, now]).rowcount
            num_released, leases = self.assign_leases(db)
            if is_new or num_expired or num_released:
                _increment_generation(db, self.group)
            (self.generation,) = db.execute("SELECT generation FROM groups WHERE name = ?", [self.group]).fetchone()
        self.adopt_leases(leases)
        self.next_renewal_at = time.monotonic() + self.bus.lease_timeout_s / 3

    def assign_leases(self, db: sqlite3.Connection) -> tuple[int, Offsets]:
        """Release and take leases in the file.

        Return the number of released leases, and the epoch of each partition that this member holds.
        """
        members = [m for (m,) in db.execute("SELECT member FROM members WHERE grp = ? ORDER BY member", [self.group])]
        leases = {
            (topic, partition): (member, epoch)
            for topic, partition, member, epoch in db.execute(
                "SELECT topic, partition, member, epoch FROM leases WHERE grp = ?", [self.group]
            )
        }
        num_released, held = 0, {}
        for tp in self.bus.list_partitions(self.topics):
            topic, _ = self.bus.get_topic(tp.topic)
            member, epoch = leases.get((topic, tp.partition), (None, 0))
            in_our_share = members[tp.partition % len(members)] == self.member
            if member == self.member and self.epochs.get(tp) == epoch and in_our_share:
                held[tp] = epoch
            elif in_our_share and (member not in members or member == self.member):
                # A previous process of the same name took a lease with a different epoch. The lease gets a new epoch.
                self.write_lease(db, topic, tp.partition, self.member, epoch + 1)
                held[tp] = epoch + 1
            elif member == self.member:
                self.write_lease(db, topic, tp.partition, None, epoch)
                num_released += 1
        return num_released, held

    def write_lease(self, db: sqlite3.Connection, topic: int, partition: int, member: str | None, epoch: int) -> None:
        row = (self.group, topic, partition, member, epoch)
        db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?)", row)

    def adopt_leases(self, leases: Offsets) -> None:
        """Start newly assigned partitions at their committed offsets, and remove partitions that are no longer held."""
        new = {tp for tp, epoch in leases.items() if self.epochs.get(tp) != epoch}
        committed = _read_committed(self.connection, self.bus.prefix, self.group, self.topics) if new else {}
        beginning = CommittedOffset(0, "")
        self.next_offsets = {tp: committed.get(tp, beginning).offset if tp in new else self.next_offsets[tp] for tp in leases}
        self.paused_partitions &= set(leases) - new
        self.epochs = leases

    def committed(self) -> dict[TopicPartition, CommittedOffset]:
        committed = _read_committed(self.connection, self.bus.prefix, self.group, self.topics)
        return {tp: offset for tp, offset in committed.items() if tp in self.epochs}

    def pause(self, partitions: Iterable[TopicPartition]) -> None:
        self.paused_partitions |= set(partitions) & set(self.epochs)

    def resume(self, partitions: Iterable[TopicPartition]) -> None:
        self.paused_partitions -= set(partitions)

    def seek(self, partition: TopicPartition, offset: int) -> None:
        if partition not in self.epochs:
            raise PartitionLost(f"{partition.topic}[{partition.partition}] is not assigned to this member")
        self.next_offsets[partition] = offset

    def close(self) -> None:
        """Leave the group. The other members get its partitions at once and do not wait until the lease expires."""
        with self.connection.transaction() as db:
            db.execute("DELETE FROM members WHERE grp = ? AND member = ?", [self.group, self.member])
            db.execute("UPDATE leases SET member = NULL WHERE grp = ? AND member = ?", [self.group, self.member])
            _increment_generation(db, self.group)
        super().close()


def _increment_generation(db: sqlite3.Connection, group: str) -> None:
    """Start a new generation of the group. Every member then reads its assignment again."""
    sql = "INSERT INTO groups VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET generation = generation + 1"
    db.execute(sql, [group])
