"""The bus port: a durable, partitioned log with consumer groups and transactions.

Two implementations pass the same contract tests: `engine.bus.embedded` (one SQLite file) and `engine.bus.kafka` (Apache Kafka).
Both guarantee:

* a key always goes to the same partition;
* records of a partition are read in the order of writing;
* transactions are atomic;
* the offsets of a consumer group are committed only together with the outputs of the records below them.
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
    """The configuration of an existing topic. `in_sync_replicas` is the minimum over its partitions."""

    name: str
    topic_id: str
    partitions: int
    replicas: int
    in_sync_replicas: int
    configs: Mapping[str, str]


class Consumer(Protocol):
    """A member of a consumer group, used by one thread. A new group starts at the beginning of its topics."""

    def poll(self, timeout_s: float, max_records: int) -> list[ConsumerRecord]:
        """Return new records; wait up to `timeout_s` for the first one (longer during a rebalance).

        Polling also keeps the membership alive: call it about every second.
        """
        ...

    def assignment(self) -> Offsets:
        """Return partition -> epoch. A partition that was lost and assigned again has a new epoch."""
        ...

    def pause(self, partitions: Iterable[TopicPartition]) -> None:
        """Read nothing from these partitions until `resume`. A new epoch of a partition also ends its pause."""
        ...

    def resume(self, partitions: Iterable[TopicPartition]) -> None:
        """Read from these partitions again."""
        ...

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Continue reading at this offset. Raise PartitionLost if the partition is not assigned."""
        ...

    def positions(self) -> Offsets:
        """Return the next offset of each assigned partition.

        Positions can be compared with `Bus.end_offsets`: both count transaction markers, which also take offsets.
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
    """Writes transactions under one transactional id; a second writer with the same id fences the first."""

    def commit(
        self,
        outputs: Sequence[ProducerRecord],
        offsets: Mapping[TopicPartition, int] | None = None,
        *,
        consumer: Consumer | None = None,
        epochs: Mapping[TopicPartition, int] | None = None,
    ) -> None:
        """Write the outputs and the next offsets of the group in one transaction.

        `epochs` are the assignment epochs under which the inputs were read. Errors:

        * PartitionLost: an epoch is no longer current, or the group is rebalancing; nothing was written. Poll, then commit
          the partitions that are still assigned in the same epoch.
        * WriterFenced: another writer with this id has taken over.
        * UsageError: the log rejected a record; nothing was written.
        * CommitUncertain: the outcome is unknown. Close this writer, open a new one with the same id, and read `committed`.
        """
        ...

    def close(self) -> None: ...


class Bus(Protocol):
    """The log. `cluster_id` never changes during the life of the log."""

    cluster_id: str

    def create_topics(self, specs: Sequence[TopicSpec]) -> list[str]:
        """Create the missing topics and return their names."""
        ...

    def topic_ids(self, topics: Sequence[str]) -> dict[str, str]:
        """Return topic -> id. The id changes when a topic is deleted and created again. Unknown topics are omitted."""
        ...

    def count_partitions(self, topic: str) -> int: ...

    def beginning_offsets(self, topics: Sequence[str]) -> Offsets: ...

    def end_offsets(self, topics: Sequence[str]) -> Offsets: ...

    def offsets_for_time(self, topics: Sequence[str], timestamp_ms: int) -> Offsets:
        """Return the offset of each partition's first record at or after a time (milliseconds since 1970), or its end."""
        ...

    def describe_topics(self, topics: Sequence[str]) -> list[TopicDescription]:
        """Return the configuration of each topic. Unknown topics are omitted."""
        ...

    def committed(self, group: str, topics: Sequence[str]) -> Offsets:
        """Return the committed offsets of a group. Partitions without one are omitted."""
        ...

    def initialize_group_offsets(self, group: str, offsets: Mapping[TopicPartition, int]) -> None:
        """Set the start offsets of partitions that the group has not committed yet. The group must have no members."""
        ...

    def publish(self, records: Sequence[ProducerRecord]) -> None:
        """Write records without a transaction. On return all of them are durable; otherwise an error is raised."""
        ...

    def open_writer(self, transactional_id: str) -> Writer: ...

    def open_consumer(self, group: str, topics: Sequence[str], *, member: str) -> Consumer: ...

    def open_reader(self, positions: Mapping[TopicPartition, int]) -> Reader: ...

    def close(self) -> None: ...
