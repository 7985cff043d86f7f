"""The bus port: a durable, partitioned log with consumer groups and transactions.

Two implementations pass the same contract tests: `engine.bus.embedded` (one SQLite file) and `engine.bus.kafka` (Apache Kafka).
The two implementations guarantee:

* records with the same key are always written to the same partition;
* records of a partition are read in the order in which they were written;
* transactions are atomic;
* the offsets of a consumer group are committed only together with the outputs of all records before these offsets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from schemas.topics import TopicSpec

Headers = tuple[tuple[str, bytes], ...]


class TopicPartition(NamedTuple):
    """One partition of a topic."""

    topic: str
    partition: int


@dataclass(frozen=True, slots=True)
class ConsumerRecord:
    """A record that was read from a topic."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int


@dataclass(frozen=True, slots=True)
class ProducerRecord:
    """A record to be written to a topic."""

    topic: str
    key: bytes
    value: bytes | None
    headers: Headers = ()


Offsets = dict[TopicPartition, int]


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
    """A member of a consumer group, used by one thread. A new group starts at the beginning of its topics."""

    def poll(self, timeout_s: float, max_records: int) -> list[ConsumerRecord]:
        """Return new records. Wait up to `timeout_s` for the first record, or longer during a rebalance.

        Polling also renews the membership in the group, so call this method about once a second.
        """
        ...

    def assignment(self) -> Offsets:
        """Return the epoch of each assigned partition. A partition that was lost and assigned again has a new epoch."""
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

    def committed(self) -> Offsets:
        """Return the committed offsets of the group, read from the log."""
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
    ) -> None:
        """Write the outputs and the next offsets of the group in one transaction.

        `epochs` are the assignment epochs of the partitions when the inputs were read. Errors:

        * PartitionLost is raised if an epoch is no longer current, or if the group is rebalancing. Nothing was written. Poll,
          then commit the partitions that are still assigned in the same epoch.
        * WriterFenced is raised if another writer with this id was opened.
        * UsageError is raised if the log rejected a record. Nothing was written.
        * CommitUncertain is raised if the outcome is unknown. Close this writer, open a new writer with the same id, and read
          `committed`.
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
        """Return the committed offsets of a group. Partitions without a committed offset are omitted."""
        ...

    def initialize_group_offsets(self, group: str, offsets: Mapping[TopicPartition, int]) -> None:
        """Set the start offsets of partitions that the group has not committed yet. The group must have no members."""
        ...

    def publish(self, records: Sequence[ProducerRecord]) -> None:
        """Write records without a transaction. Raise an error if a record is not durable."""
        ...

    def open_writer(self, transactional_id: str) -> Writer: ...

    def open_consumer(self, group: str, topics: Sequence[str], *, member: str) -> Consumer: ...

    def open_reader(self, positions: Mapping[TopicPartition, int]) -> Reader: ...

    def close(self) -> None: ...
