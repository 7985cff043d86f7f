"""The bus port: a durable, partitioned log with consumer groups and transactions.

Two implementations pass the same contract tests: `engine.bus.embedded` (one SQLite file) and `engine.bus.kafka` (Apache Kafka).
The two implementations guarantee:

* records with the same key are always written to the same partition;
* records of a partition are read in the order in which they were written;
* transactions are atomic;
* the offsets of a consumer group are committed only together with the outputs of all records before these offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from engine.errors import UsageError
from schemas.topics import TopicSpec

Headers = tuple[tuple[str, bytes], ...]


class TopicPartition(NamedTuple):
    """One partition of a topic."""

    topic: str
    partition: int


# A named tuple is created several times faster than a frozen dataclass, and a stage creates several for each record.
class ConsumerRecord(NamedTuple):
    """A record that was read from a topic. `value` is None if the record was erased."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int

    @property
    def topic_partition(self) -> TopicPartition:
        return TopicPartition(self.topic, self.partition)


class ProducerRecord(NamedTuple):
    """A record to be written to a topic. If `partition` is None, the log chooses the partition from the key."""

    topic: str
    key: bytes
    value: bytes | None
    headers: Headers = ()
    partition: int | None = None


Offsets = dict[TopicPartition, int]


class CommittedOffset(NamedTuple):
    """A committed offset of a group, and the id of the topic to which it belongs.

    `topic_id` is empty if another program has written the offset, for example `kafka-consumer-groups --reset-offsets`.
    """

    offset: int
    topic_id: str


@dataclass(frozen=True, slots=True)
class TopicDescription:
    """The configuration of an existing topic. `in_sync_replicas` is the number of in-sync replicas of the partition
    that has the fewest."""

    name: str
    topic_id: str
    partitions: int
    replicas: int
    in_sync_replicas: int
    configs: Mapping[str, str]


class Consumer(Protocol):
    """A member of a consumer group. `topic_ids` are the ids of its topics when it was opened.

    One thread uses it. Another thread may commit its offsets at the same time (`Writer.commit`).

    A partition without a committed offset starts at its beginning. If the consumer was opened with `hold_new`, it does not
    read a newly assigned partition until `start` is called.
    """

    topic_ids: Mapping[str, str]

    def poll(self, timeout_s: float, max_records: int) -> list[ConsumerRecord]:
        """Return new records. Wait up to `timeout_s` for the first record, or longer during a rebalance.

        Polling also renews the membership in the group, so call this method about once a second.
        """
        ...

    def assignment(self) -> Offsets:
        """Return the epoch of each assigned partition. A partition that was lost and assigned again has a new epoch."""
        ...

    def held(self) -> Offsets:
        """Return the epoch of each assigned partition that is not started yet. Without `hold_new`, the result is empty."""
        ...

    def start(self, partition: TopicPartition, offset: int) -> None:
        """Start a held partition at this offset. Raise PartitionLost if the partition is not assigned."""
        ...

    def pause(self, partitions: Iterable[TopicPartition]) -> None:
        """Do not read from these partitions until `resume` is called. A pause also ends when the partition gets a new epoch."""
        ...

    def resume(self, partitions: Iterable[TopicPartition]) -> None:
        """Read from these partitions again."""
        ...

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Continue reading at this offset. Raise PartitionLost if the partition is not assigned."""
        ...

    def positions(self) -> Offsets:
        """Return the next offset of each assigned partition.

        Positions can be compared with `Bus.end_offsets`, because positions and end offsets include the offsets of transaction
        markers.
        """
        ...

    def committed(self) -> dict[TopicPartition, CommittedOffset]:
        """Return the committed offsets of the assigned partitions, read from the log.

        Wait until no transaction with offsets of these partitions is open.
        """
        ...

    def close(self) -> None: ...


class Reader(Protocol):
    """Reads the committed records of given partitions, without a consumer group."""

    def poll(self, timeout_s: float, max_records: int) -> list[ConsumerRecord]: ...

    def positions(self) -> Offsets:
        """Return the next offset of each partition. Positions can be compared with `Bus.end_offsets`."""
        ...

    def add_partitions(self, positions: Mapping[TopicPartition, int]) -> None:
        """Also read these partitions, from these offsets."""
        ...

    def close(self) -> None: ...


class Writer(Protocol):
    """Writes transactions under one transactional id. A second writer with the same id fences the first writer."""

    def commit(
        self,
        outputs: Sequence[ProducerRecord],
        offsets: Mapping[TopicPartition, int] | None = None,
        *,
        consumer: Consumer | None = None,
        epochs: Mapping[TopicPartition, int] | None = None,
        before_commit: Callable[[], None] | None = None,
    ) -> None:
        """Write the outputs and the next offsets of the group in one transaction.

        `epochs` are the assignment epochs of the partitions when the inputs were read. `before_commit` is called before the commit,
        while the outputs are on their way. If it raises an error, nothing is written, and this function raises the error. Errors:

        * PartitionLost is raised if an epoch is no longer current, or if the group is rebalancing. Nothing was written. Poll,
          then commit the partitions that are still assigned in the same epoch.
        * WriterFenced is raised if another writer with this id was opened.
        * UsageError is raised if the log rejected a record. Nothing was written.
        * CommitUncertain is raised if the outcome is unknown. Close this writer, open a new writer with the same id, and read
          `committed`.
        """
        ...

    def end_hanging_transaction(self) -> None:
        """Write the end of the last committed transaction again, if the log may have lost it.

        A log can lose it when a broker ends. Then the records of the transaction cannot be read, and the committed offsets are not
        stable, until this writer commits to the same partitions again. `commit` and `Bus.open_writer` call this method. A caller
        that commits rarely should call it regularly. It costs nothing while the connections to the brokers last. The errors are
        those of `commit`, and BusUnreachable.
        """
        ...

    def close(self) -> None: ...


class Bus(Protocol):
    """The log. `cluster_id` identifies the log and never changes."""

    cluster_id: str

    def create_topics(self, specs: Sequence[TopicSpec]) -> list[str]:
        """Create the missing topics and return their names."""
        ...

    def topic_ids(self, topics: Sequence[str]) -> dict[str, str]:
        """Return the id of each existing topic. If a topic is deleted and created again, its id changes."""
        ...

    def count_partitions(self, topic: str) -> int: ...

    def beginning_offsets(self, topics: Sequence[str]) -> Offsets: ...

    def end_offsets(self, topics: Sequence[str]) -> Offsets: ...

    def offsets_for_time(self, topics: Sequence[str], timestamp_ms: int) -> Offsets:
        """Return, for each partition, the offset of the first record at or after a time in milliseconds since 1970.

        If a partition has no such record, return its end offset.
        """
        ...

    def describe_topics(self, topics: Sequence[str]) -> list[TopicDescription]:
        """Return the configuration of each topic. Unknown topics are omitted."""
        ...

    def committed(self, group: str, topics: Sequence[str]) -> Offsets:
        """Return the committed offsets of a group. Partitions without a committed offset are omitted.

        Offsets that belong to a deleted topic of the same name are omitted, too.
        """
        ...

    def list_committed(self, group: str, topics: Sequence[str]) -> dict[TopicPartition, CommittedOffset]:
        """Return all committed offsets of a group on these topics, with their topic ids."""
        ...

    def list_members(self, group_prefixes: Sequence[str]) -> dict[str, list[str]]:
        """Return the names of the members of each group whose name starts with one of these prefixes.

        Groups without members are omitted. A member whose heartbeats have ended is removed when its session expires, after about
        ten seconds.
        """
        ...

    def set_committed(self, group: str, offsets: Mapping[TopicPartition, int]) -> None:
        """Replace committed offsets of a group. Raise UsageError if the group has members."""
        ...

    def delete_committed(self, group: str, topics: Sequence[str]) -> None:
        """Delete the committed offsets of a group on these topics. Raise UsageError if the group has members."""
        ...

    def publish(self, records: Sequence[ProducerRecord]) -> None:
        """Write records without a transaction. Raise an error if a record is not durable."""
        ...

    def erase_values(self, topics: Sequence[str], identifiers: Collection[bytes]) -> int:
        """Delete the value of each record of these topics whose key or value contains one of the identifiers.

        Return the number of deleted values. The records keep their offsets and are then read with the value None. The embedded
        log also removes the deleted bytes from its files. Kafka cannot delete single records: the values stay until the
        retention of their topic deletes them, and the result is 0.
        """
        ...

    def open_writer(self, transactional_id: str, *, topics: Sequence[str] = (), group: str = "") -> Writer:
        """Open a writer. It commits to these topics, and commits offsets of this group (see `Writer.end_hanging_transaction`)."""
        ...

    def open_consumer(self, group: str, topics: Sequence[str], *, member: str, hold_new: bool = False) -> Consumer: ...

    def open_reader(self, positions: Mapping[TopicPartition, int]) -> Reader: ...

    def close(self) -> None: ...


def omit_old_topics(committed: Mapping[TopicPartition, CommittedOffset], topic_ids: Mapping[str, str]) -> Offsets:
    """Return the offsets without those of deleted topics."""
    return {tp: c.offset for tp, c in committed.items() if c.topic_id in ("", topic_ids[tp.topic])}


def make_group_active_error(group: str, why: str) -> UsageError:
    """Return the error for a change of offsets while the group has members."""
    return UsageError(
        f"the offsets of {group} cannot be changed", why, "stop the processes of this stage first, then type the command again"
    )
