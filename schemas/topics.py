"""The topic table: which record flows where, and how each topic is kept.

The same word names topic, record class and table. Partitions are fixed when a topic is created; they bound how many copies
of a stage can share the work.
"""

from __future__ import annotations

from dataclasses import dataclass

from schemas.records import RECORDS, DeadLetter, PolicyUpdate, ProducerOffset, Record

DEFAULT_PARTITIONS = 12
_RETAIN_FOREVER = -1
MAX_RECORD_BYTES = 4 * 1024 * 1024
DEAD_LETTER_OVERHEAD_BYTES = 64 * 1024  # what a dead letter adds around the original bytes


@dataclass(frozen=True)
class TopicSpec:
    """One topic: its record, partitions, retention in milliseconds (-1: for ever) and largest message in bytes."""

    name: str
    record_class: type[Record]
    is_compacted: bool = False
    num_partitions: int = DEFAULT_PARTITIONS
    retention_ms: int = _RETAIN_FOREVER
    max_message_bytes: int = MAX_RECORD_BYTES
    replication_factor: int = -1  # on Kafka; -1: the broker's default

    @property
    def table(self) -> str:
        """The DuckDB table: the topic's name with underscores."""
        return self.name.replace("-", "_")


# Topics whose order matters as a whole have one partition; they carry few records.
_SINGLE_PARTITION_TOPICS = {
    "batches",
    "policies",
    "runs",
    "metrics",
    "incidents",
    "pauses",
    "dropped-rollouts",
    "producer-offsets",
    "dead-letter-retries",
    "erasures",
}
_COMPACTED_TOPICS = {PolicyUpdate.topic, ProducerOffset.topic}


def make_topic_table(
    num_partitions: int = DEFAULT_PARTITIONS, retention_ms: int = _RETAIN_FOREVER, replication_factor: int = -1
) -> dict[str, TopicSpec]:
    """Every topic of Charter by name."""
    specs = {}
    for record in RECORDS:
        extra = DEAD_LETTER_OVERHEAD_BYTES if record is DeadLetter else 0
        specs[record.topic] = TopicSpec(
            name=record.topic,
            record_class=record,
            is_compacted=record.topic in _COMPACTED_TOPICS,
            num_partitions=1 if record.topic in _SINGLE_PARTITION_TOPICS else num_partitions,
            retention_ms=_RETAIN_FOREVER if record.topic == "prompts" else retention_ms,
            max_message_bytes=MAX_RECORD_BYTES + extra,
            replication_factor=replication_factor,
        )
    return specs


TOPICS = make_topic_table()
