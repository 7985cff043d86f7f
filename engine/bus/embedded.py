"""The embedded log: one SQLite file for a laptop, a demo and a test.

Durable (WAL, synchronous FULL: what was acknowledged survives a killed process and a power cut), shared by several processes
on one machine, with the topics, partitions, offsets and transactions of Kafka. A lease with an epoch per partition stands for
Kafka's group protocol: members renew theirs while they poll, share the partitions evenly, and a member that dies is replaced
when its lease ends. Every write is one `BEGIN IMMEDIATE` transaction, which is all the locking there is.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from engine.bus.port import Headers, Message, Offsets, Outgoing, TopicDescription, TopicPartition
from engine.errors import BusUnreachable, CommitInDoubt, DataFolderVersion, Fenced, PartitionLost, UsageError
from schemas.topics import TopicSpec

VERSION = 1
FILE = "log.sqlite"
LEASE_S = 10.0
BUSY_S = 30.0
LOOK_EVERY_S = 0.005

TABLES = """
CREATE TABLE meta (cluster_id TEXT NOT NULL);
CREATE TABLE topics (id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, uuid TEXT NOT NULL, partitions INTEGER NOT NULL);
CREATE TABLE messages (topic INTEGER, partition INTEGER, offset INTEGER, key BLOB, value BLOB, headers TEXT,
                       timestamp_ms INTEGER, PRIMARY KEY (topic, partition, offset)) WITHOUT ROWID;
CREATE TABLE offsets (grp TEXT, topic INTEGER, partition INTEGER, next_offset INTEGER,
                      PRIMARY KEY (grp, topic, partition)) WITHOUT ROWID;
CREATE TABLE writers (id TEXT PRIMARY KEY, epoch INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE groups (name TEXT PRIMARY KEY, generation INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE members (grp TEXT, member TEXT, expires REAL NOT NULL, PRIMARY KEY (grp, member)) WITHOUT ROWID;
CREATE TABLE leases (grp TEXT, topic INTEGER, partition INTEGER, member TEXT, epoch INTEGER NOT NULL,
                     PRIMARY KEY (grp, topic, partition)) WITHOUT ROWID;
"""


def murmur2(key: bytes) -> int:
    """Kafka's hash of a key, so that both buses place keys alike (Austin Appleby's MurmurHash2, seed 0x9747b28c)."""
    mask, m = 0xFFFFFFFF, 0x5BD1E995
    h = (0x9747B28C ^ len(key)) & mask
    whole = len(key) - len(key) % 4
    for i in range(0, whole, 4):
        k = int.from_bytes(key[i : i + 4], "little") * m & mask
        h = (h * m & mask) ^ ((k ^ k >> 24) * m & mask)
    if whole < len(key):
        h = (h ^ int.from_bytes(key[whole:], "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    return h ^ h >> 15


def partition_of(key: bytes, partitions: int) -> int:
    return (murmur2(key) & 0x7FFFFFFF) % partitions


# Mistakes of this file, not the disk's.
MISUSED = (sqlite3.ProgrammingError, sqlite3.IntegrityError, sqlite3.DataError, sqlite3.NotSupportedError)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """SQLite's errors in our words."""
    try:
        yield
    except MISUSED:
        raise
    except sqlite3.DatabaseError as error:
        raise BusUnreachable(f"the embedded log {path} does not answer", str(error), advice(error)) from error


def advice(error: sqlite3.DatabaseError) -> str:
    if "locked" in str(error):
        return f"another process has been writing to it for {BUSY_S:.0f} s: is one stopped or stuck?"
    if getattr(error, "sqlite_errorcode", 0) in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return "it is damaged, or another program's: move it away, or take a backup: charter restore"
    if "readonly" in str(error):
        return "you may not write there: mend its permissions, or ask its owner for a copy (charter backup)"
    return "look at the disk and its free space: df -h"


class Connection:
    """A connection to the file; `write` is one transaction, whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with translated(path):
            self.db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            self.db.execute("PRAGMA synchronous = FULL")

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        with translated(self.path):
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield self.db
            except BaseException:
                if self.db.in_transaction:  # a full disk has rolled it back already
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
                raise  # nothing was written, and it can be tried again
            raise CommitInDoubt("a commit to the embedded log failed", str(error)) from error

    def rows(self, sql: str, parameters: Sequence[object] = ()) -> list[tuple]:
        with translated(self.path):
            return self.db.execute(sql, parameters).fetchall()

    def close(self) -> None:
        self.db.close()


class EmbeddedBus:
    """The log in `folder`. `lease_s` is how long a silent group member keeps its partitions."""

    def __init__(self, folder: Path, *, prefix: str = "", lease_s: float = LEASE_S) -> None:
        self.folder, self.prefix, self.lease_s = folder, prefix, lease_s
        self.path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"cannot use {folder} as a data folder", error.strerror or str(error), "give another: --data FOLDER"
            ) from error
        self.lock = threading.Lock()
        self.connection = Connection(self.path)
        self.cluster_id = self.prepare()
        self.known: dict[str, tuple[int, int]] = {}

    def prepare(self) -> str:
        """Create the tables of a new file, or check that ours made them; returns the log's id."""
        db = self.connection.db
        self.share()
        with self.connection.write():
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in TABLES.split(";"):
                    db.execute(statement)
                db.execute("INSERT INTO meta VALUES (?)", [str(uuid.uuid4())])
                db.execute(f"PRAGMA user_version = {VERSION}")
            elif version != VERSION:
                raise DataFolderVersion(
                    f"{self.path} was made by another version of Charter (its format: {version}, ours: {VERSION})",
                    "reading or writing it could damage it",
                    "use another folder: --data FOLDER, or the version of Charter that made it",
                )
        return str(self.connection.rows("SELECT cluster_id FROM meta")[0][0])

    def share(self) -> None:
        """Let readers and a writer work at once (write-ahead log). Whoever does this second meanwhile must try again."""
        deadline = time.monotonic() + BUSY_S
        while True:
            try:
                self.connection.db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.DatabaseError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    with translated(self.path):
                        raise
            time.sleep(LOOK_EVERY_S)

    # Topics

    def create_topics(self, specs: Sequence[TopicSpec]) -> list[str]:
        created = []
        with self.lock, self.connection.write() as db:
            for spec in specs:
                row = (self.prefix + spec.name, str(uuid.uuid4()), spec.partitions)
                sql = "INSERT INTO topics (name, uuid, partitions) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
                if db.execute(sql, row).rowcount:
                    created.append(spec.name)
        return created

    def topic(self, name: str) -> tuple[int, int]:
        """(id in the file, partitions) of a topic."""
        if name not in self.known:
            with self.lock:
                rows = self.connection.rows("SELECT id, partitions FROM topics WHERE name = ?", [self.prefix + name])
            if not rows:
                raise UsageError(
                    f"there is no topic {name} in {self.path}", "nobody has created it yet", "type: charter topics create"
                )
            self.known[name] = rows[0]
        return self.known[name]

    def topic_ids(self, topics: Sequence[str]) -> dict[str, str]:
        with self.lock:
            known = dict(self.connection.rows("SELECT name, uuid FROM topics"))
        return {topic: known[self.prefix + topic] for topic in topics if self.prefix + topic in known}

    def partitions(self, topic: str) -> int:
        return self.topic(topic)[1]

    def places(self, topics: Iterable[str]) -> list[TopicPartition]:
        return [TopicPartition(topic, number) for topic in topics for number in range(self.partitions(topic))]

    def begin_offsets(self, topics: Sequence[str]) -> Offsets:
        return dict.fromkeys(self.places(topics), 0)

    def end_offsets(self, topics: Sequence[str]) -> Offsets:
        places = self.places(topics)
        with self.lock:
            return {p: next_offset(self.connection, self.known[p.topic][0], p.partition) for p in places}

    def offsets_at(self, topics: Sequence[str], timestamp_ms: int) -> Offsets:
        found = self.end_offsets(topics)
        sql = "SELECT min(offset) FROM messages WHERE topic = ? AND partition = ? AND timestamp_ms >= ?"
        with self.lock:
            for place in found:
                (offset,) = self.connection.rows(sql, [self.known[place.topic][0], place.partition, timestamp_ms])[0]
                found[place] = found[place] if offset is None else offset
        return found

    def describe(self, topics: Sequence[str]) -> list[TopicDescription]:
        known = self.topic_ids(topics)
        return [TopicDescription(name, known[name], self.partitions(name), 1, 1, {}) for name in topics if name in known]

    def committed(self, group: str, topics: Sequence[str]) -> Offsets:
        names = {self.topic(topic)[0]: topic for topic in topics}
        with self.lock:
            rows = self.connection.rows(
                "SELECT topic, partition, next_offset FROM offsets WHERE grp = ?", [self.prefix + group]
            )
        return {TopicPartition(names[topic], partition): offset for topic, partition, offset in rows if topic in names}

    def seed(self, group: str, offsets: Mapping[TopicPartition, int]) -> None:
        rows = [(self.prefix + group, self.topic(place.topic)[0], place.partition, o) for place, o in offsets.items()]
        with self.lock, self.connection.write() as db:
            db.executemany("INSERT OR IGNORE INTO offsets VALUES (?, ?, ?, ?)", rows)

    # Writing and reading

    def publish(self, outgoing: Sequence[Outgoing]) -> None:
        placed = self.place(outgoing)
        with self.lock, self.connection.write() as db:
            append(db, placed)

    def place(self, outgoing: Sequence[Outgoing]) -> dict[tuple[int, int], list[Outgoing]]:
        """Messages by (topic id, partition)."""
        placed: dict[tuple[int, int], list[Outgoing]] = {}
        for message in outgoing:
            topic, partitions = self.topic(message.topic)
            placed.setdefault((topic, partition_of(message.key, partitions)), []).append(message)
        return placed

    def writer(self, transactional_id: str) -> EmbeddedWriter:
        return EmbeddedWriter(self, self.prefix + transactional_id)

    def consumer(self, group: str, topics: Sequence[str], *, member: str) -> EmbeddedConsumer:
        return EmbeddedConsumer(self, self.prefix + group, topics, member)

    def reader(self, positions: Mapping[TopicPartition, int]) -> EmbeddedReader:
        return EmbeddedReader(self, positions)

    def close(self) -> None:
        self.connection.close()


def next_offset(connection: Connection, topic: int, partition: int) -> int:
    sql = "SELECT coalesce(max(offset) + 1, 0) FROM messages WHERE topic = ? AND partition = ?"
    return int(connection.rows(sql, [topic, partition])[0][0])


def append(db: sqlite3.Connection, placed: Mapping[tuple[int, int], Sequence[Outgoing]]) -> None:
    """Append messages inside a transaction, at contiguous offsets."""
    now = int(time.time() * 1000)
    for (topic, partition), messages in placed.items():
        sql = "SELECT coalesce(max(offset) + 1, 0) FROM messages WHERE topic = ? AND partition = ?"
        (first,) = db.execute(sql, [topic, partition]).fetchone()
        db.executemany(
            "INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (topic, partition, first + i, message.key, message.value, pack(message.headers), now)
                for i, message in enumerate(messages)
            ],
        )


def pack(headers: Headers) -> str | None:
    return json.dumps([[key, value.decode("latin-1")] for key, value in headers]) if headers else None


@lru_cache(maxsize=256)  # nearly all messages have one of a few
def unpack(text: str | None) -> Headers:
    return tuple((key, value.encode("latin-1")) for key, value in json.loads(text)) if text else ()


class EmbeddedWriter:
    """Transactions under one id. Opening it fences the writer that had the id before."""

    def __init__(self, bus: EmbeddedBus, transactional_id: str) -> None:
        self.bus, self.id = bus, transactional_id
        self.connection = Connection(bus.path)
        with self.connection.write() as db:
            sql = "INSERT INTO writers VALUES (?, 1) ON CONFLICT (id) DO UPDATE SET epoch = epoch + 1 RETURNING epoch"
            (self.epoch,) = db.execute(sql, [transactional_id]).fetchone()

    def commit(
        self,
        outputs: Sequence[Outgoing],
        offsets: Mapping[TopicPartition, int] | None = None,
        *,
        consumer: object = None,
        epochs: Mapping[TopicPartition, int] | None = None,
    ) -> None:
        placed = self.bus.place(outputs)
        with self.connection.write() as db:
            self.check_fence(db)
            if offsets:
                assert isinstance(consumer, EmbeddedConsumer), "offsets are a consumer group's"
                self.check_leases(db, consumer, {place: consumer.epochs.get(place) for place in offsets} | dict(epochs or {}))
                self.store_offsets(db, consumer.group, offsets)
            append(db, placed)

    def check_fence(self, db: sqlite3.Connection) -> None:
        (epoch,) = db.execute("SELECT epoch FROM writers WHERE id = ?", [self.id]).fetchone()
        if epoch != self.epoch:
            raise Fenced(
                f"another process has taken over as {self.id}",
                "two processes ran in the same slot",
                "stop one of them, or give each its own: --slot NAME",
            )

    def check_leases(
        self, db: sqlite3.Connection, consumer: EmbeddedConsumer, epochs: Mapping[TopicPartition, int | None]
    ) -> None:
        for place, epoch in epochs.items():
            topic, _ = self.bus.topic(place.topic)
            sql = "SELECT member, epoch FROM leases WHERE grp = ? AND topic = ? AND partition = ?"
            if db.execute(sql, [consumer.group, topic, place.partition]).fetchone() != (consumer.member, epoch):
                consumer.renew_at = 0.0  # its next poll looks at what it still holds
                raise PartitionLost(f"{place.topic}[{place.partition}] has moved to another member")

    def store_offsets(self, db: sqlite3.Connection, group: str, offsets: Mapping[TopicPartition, int]) -> None:
        rows = [(group, self.bus.topic(place.topic)[0], place.partition, offset) for place, offset in offsets.items()]
        db.executemany("INSERT OR REPLACE INTO offsets VALUES (?, ?, ?, ?)", rows)

    def close(self) -> None:
        self.connection.close()


class EmbeddedReader:
    """Reads given partitions from given offsets."""

    def __init__(self, bus: EmbeddedBus, positions: Mapping[TopicPartition, int]) -> None:
        self.bus = bus
        self.connection = Connection(bus.path)
        self.next: Offsets = dict(positions)
        self.turn = 0

    def positions(self) -> Offsets:
        return dict(self.next)

    def add(self, positions: Mapping[TopicPartition, int]) -> None:
        self.next |= positions

    def poll(self, timeout_s: float, max_records: int) -> list[Message]:
        return wait_for(self.connection, timeout_s, lambda: self.fetch(list(self.next), max_records))

    def fetch(self, places: Sequence[TopicPartition], max_records: int) -> list[Message]:
        """What is there now, each call beginning with another partition so that none is starved."""
        self.turn += 1
        found: list[Message] = []
        for i in range(len(places)):
            place = places[(self.turn + i) % len(places)]
            messages = self.fetch_one(place, max_records - len(found))
            if messages:
                self.next[place] = messages[-1].offset + 1
                found += messages
            if len(found) >= max_records:
                break
        return found

    def fetch_one(self, place: TopicPartition, limit: int) -> list[Message]:
        topic, _ = self.bus.topic(place.topic)
        rows = self.connection.rows(
            "SELECT offset, key, value, headers, timestamp_ms FROM messages"
            " WHERE topic = ? AND partition = ? AND offset >= ? ORDER BY offset LIMIT ?",
            [topic, place.partition, self.next[place], limit],
        )
        return [
            Message(place.topic, place.partition, offset, key, value, unpack(headers), timestamp)
            for offset, key, value, headers, timestamp in rows
        ]

    def close(self) -> None:
        self.connection.close()


def wait_for(connection: Connection, timeout_s: float, fetch) -> list[Message]:  # type: ignore[no-untyped-def]
    """`fetch()` until it finds something or time is up, looking again only when someone else has written."""
    deadline = time.monotonic() + timeout_s
    while True:
        seen = connection.rows("PRAGMA data_version")
        messages: list[Message] = fetch()
        if messages:
            return messages
        while connection.rows("PRAGMA data_version") == seen:
            left = deadline - time.monotonic()
            if left <= 0:
                return []
            time.sleep(min(LOOK_EVERY_S, left))


class EmbeddedConsumer(EmbeddedReader):
    """A group member: a reader whose partitions are leased."""

    def __init__(self, bus: EmbeddedBus, group: str, topics: Sequence[str], member: str) -> None:
        super().__init__(bus, {})
        self.group, self.topics, self.member = group, list(topics), member
        self.epochs: Offsets = {}
        self.held_back: set[TopicPartition] = set()
        self.generation = -1
        self.renew_at = 0.0
        bus.places(self.topics)  # an unknown topic is an error now, not at the first poll

    def assignment(self) -> Offsets:
        return dict(self.epochs)

    def poll(self, timeout_s: float, max_records: int) -> list[Message]:
        deadline = time.monotonic() + timeout_s
        while True:
            self.keep_membership()
            left = max(0.0, min(deadline, self.renew_at) - time.monotonic())
            messages = wait_for(self.connection, left, lambda: self.fetch_assigned(max_records))
            if messages or time.monotonic() >= deadline:
                return messages

    def fetch_assigned(self, max_records: int) -> list[Message]:
        if self.current_generation() != self.generation:
            self.rebalance()
        places = [place for place in self.epochs if place not in self.held_back]
        return self.fetch(places, max_records) if places else []

    def keep_membership(self) -> None:
        if time.monotonic() >= self.renew_at or self.current_generation() != self.generation:
            self.rebalance()

    def current_generation(self) -> int:
        rows = self.connection.rows("SELECT generation FROM groups WHERE name = ?", [self.group])
        return int(rows[0][0]) if rows else 0

    def rebalance(self) -> None:
        """Renew the membership, bury the dead, give away what is not ours to hold and take what is free."""
        with self.connection.write() as db:
            now = time.time()
            joined = not db.execute("SELECT 1 FROM members WHERE grp = ? AND member = ?", [self.group, self.member]).fetchone()
            db.execute("INSERT OR REPLACE INTO members VALUES (?, ?, ?)", [self.group, self.member, now + self.bus.lease_s])
            dead = db.execute("DELETE FROM members WHERE grp = ? AND expires < ?", [self.group, now]).rowcount
            released, taken = self.share_out(db)
            if joined or dead or released:
                bump(db, self.group)
            (self.generation,) = db.execute("SELECT generation FROM groups WHERE name = ?", [self.group]).fetchone()
        self.adopt(taken)
        self.renew_at = time.monotonic() + self.bus.lease_s / 3

    def share_out(self, db: sqlite3.Connection) -> tuple[int, Offsets]:
        """Release and take leases in the file; returns how many were released, and all that we hold with their epochs."""
        members = [m for (m,) in db.execute("SELECT member FROM members WHERE grp = ? ORDER BY member", [self.group])]
        held = {
            (topic, partition): (member, epoch)
            for topic, partition, member, epoch in db.execute(
                "SELECT topic, partition, member, epoch FROM leases WHERE grp = ?", [self.group]
            )
        }
        released, ours = 0, {}
        for place in self.bus.places(self.topics):
            topic, _ = self.bus.topic(place.topic)
            member, epoch = held.get((topic, place.partition), (None, 0))
            fair = members[place.partition % len(members)] == self.member
            if member == self.member and self.epochs.get(place) == epoch and fair:
                ours[place] = epoch
            elif fair and (member not in members or member == self.member):
                # A lease in our name that we do not remember is another life's: it gets a new epoch.
                self.lease(db, topic, place.partition, self.member, epoch + 1)
                ours[place] = epoch + 1
            elif member == self.member:
                self.lease(db, topic, place.partition, None, epoch)
                released += 1
        return released, ours

    def lease(self, db: sqlite3.Connection, topic: int, partition: int, member: str | None, epoch: int) -> None:
        row = (self.group, topic, partition, member, epoch)
        db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?)", row)

    def adopt(self, leases: Offsets) -> None:
        """Go on at the committed offsets of partitions that are newly ours; forget those that are not."""
        new = {place for place, epoch in leases.items() if self.epochs.get(place) != epoch}
        committed = self.committed() if new else {}
        self.next = {place: committed.get(place, 0) if place in new else self.next[place] for place in leases}
        self.held_back &= set(leases) - new
        self.epochs = leases

    def committed(self) -> Offsets:
        names = {self.bus.topic(topic)[0]: topic for topic in self.topics}
        rows = self.connection.rows("SELECT topic, partition, next_offset FROM offsets WHERE grp = ?", [self.group])
        return {TopicPartition(names[topic], partition): offset for topic, partition, offset in rows if topic in names}

    def pause(self, partitions: Iterable[TopicPartition]) -> None:
        self.held_back |= set(partitions) & set(self.epochs)

    def resume(self, partitions: Iterable[TopicPartition]) -> None:
        self.held_back -= set(partitions)

    def seek(self, partition: TopicPartition, offset: int) -> None:
        if partition not in self.epochs:
            raise PartitionLost(f"{partition.topic}[{partition.partition}] is not assigned to this member")
        self.next[partition] = offset

    def close(self) -> None:
        """Leave the group at once, so that the others need not wait for the lease to end."""
        with self.connection.write() as db:
            db.execute("DELETE FROM members WHERE grp = ? AND member = ?", [self.group, self.member])
            db.execute("UPDATE leases SET member = NULL WHERE grp = ? AND member = ?", [self.group, self.member])
            bump(db, self.group)
        super().close()


def bump(db: sqlite3.Connection, group: str) -> None:
    """Tell every member to look at its share again."""
    sql = "INSERT INTO groups VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET generation = generation + 1"
    db.execute(sql, [group])
