"""The bus port: a durable, partitioned log with consumer groups and transactions.

Two implementations pass one contract suite: `engine.bus.embedded` (one SQLite file) and `engine.bus.kafka` (Apache Kafka).
What is guaranteed by both: a key always goes to the same partition, order within a partition, a transaction is written whole
or not at all, and the offsets of a consumer group move only together with the outputs made from the records below them.
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
    """A message as it was read."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int


@dataclass(frozen=True, slots=True)
class ProducerRecord:
    """A message to be written."""

    topic: str
    key: bytes
    value: bytes | None
    headers: Headers = ()


Offsets = dict[TopicPartition, int]


@dataclass(frozen=True, slots=True)
class TopicDescription:
    """A topic as the log has it. `in_sync` is the smallest number of replicas in step that a partition has."""

    name: str
    topic_id: str
    partitions: int
    replicas: int
    in_sync_replicas: int
    configs: Mapping[str, str]


class Consumer(Protocol):
    """A member of a consumer group, used by one thread. The first start of a group is at the beginning of its topics."""

    def poll(self, timeout_s: float, max_records: int) -> list[ConsumerRecord]:
        """What has arrived, waiting up to `timeout_s` for the first (longer while the group shares out its partitions).

        It also keeps the membership alive: poll every second or so.
        """
        ...

    def assignment(self) -> Offsets:
        """Partition -> epoch. A partition that was lost and came back has another epoch."""
        ...

    def pause(self, partitions: Iterable[TopicPartition]) -> None:
        """Read nothing of these partitions until they are resumed. It lasts as long as their epoch."""
        ...

    def resume(self, partitions: Iterable[TopicPartition]) -> None: ...

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Read on from this offset; raises PartitionLost if the partition is not assigned."""
        ...

    def positions(self) -> Offsets:
        """The next offset of each assigned partition; comparable with `end_offsets` (transaction markers take offsets too)."""
        ...

    def committed(self) -> Offsets:
        """The group's committed offsets, as the log has them now."""
        ...

    def close(self) -> None: ...


class Reader(Protocol):
    """Reads given partitions without a group, committed records only."""

    def poll(self, timeout_s: float, max_records: int) -> list[ConsumerRecord]: ...

    def positions(self) -> Offsets:
        """The next offset of each partition; comparable with `end_offsets` (transaction markers take offsets too)."""
        ...

    def add_partitions(self, positions: Mapping[TopicPartition, int]) -> None:
        """Read these partitions too."""
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
        """Write the outputs and the group's next offsets in one short transaction.

        `epochs` are the assignment epochs under which the inputs were read. Raises PartitionLost (nothing was written) when
        one is no longer current or the group is sharing its partitions out anew: then poll, and what is still assigned in
        the same epoch can be committed. Raises Fenced when another writer took over, UsageError (nothing was written) when
        the log refuses a message, and CommitInDoubt when the outcome is not known: then close this writer, make a new one
        with the same id, and ask `committed` how far the group came.
        """
        ...

    def close(self) -> None: ...


class Bus(Protocol):
    """The log. `cluster_id` stays for the life of the log."""

    cluster_id: str

    def create_topics(self, specs: Sequence[TopicSpec]) -> list[str]:
        """Create the topics that are missing; returns their names."""
        ...

    def topic_ids(self, topics: Sequence[str]) -> dict[str, str]:
        """Ids that change when a topic is deleted and created anew."""
        ...

    def count_partitions(self, topic: str) -> int: ...

    def beginning_offsets(self, topics: Sequence[str]) -> Offsets: ...

    def end_offsets(self, topics: Sequence[str]) -> Offsets: ...

    def offsets_for_time(self, topics: Sequence[str], timestamp_ms: int) -> Offsets:
        """For each partition the offset of the first message at or after a time (milliseconds since 1970); its end if none."""
        ...

    def describe_topics(self, topics: Sequence[str]) -> list[TopicDescription]:
        """What the log keeps of each topic, and how."""
        ...

    def committed(self, group: str, topics: Sequence[str]) -> Offsets:
        """The committed offsets of a group; partitions without one are left out."""
        ...

    def initialize_group_offsets(self, group: str, offsets: Mapping[TopicPartition, int]) -> None:
        """Say where a group begins, where it has not committed yet. The group must have no members."""
        ...

    def publish(self, records: Sequence[ProducerRecord]) -> None:
        """Write messages, all of them or an error; they are durable when it returns."""
        ...

    def open_writer(self, transactional_id: str) -> Writer: ...

    def open_consumer(self, group: str, topics: Sequence[str], *, member: str) -> Consumer: ...

    def open_reader(self, positions: Mapping[TopicPartition, int]) -> Reader: ...

    def close(self) -> None: ...
