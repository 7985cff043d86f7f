"""The topic table: which record flows where, and how each topic is kept.

The same word names topic, record class and table. Partitions are fixed when a topic is created; they bound how many copies
of a stage can share the work.
"""

from __future__ import annotations

from dataclasses import dataclass

from schemas.records import RECORDS, DeadLetter, PolicyUpdate, ProducerOffset, Record

PARTITIONS = 12
KEEP_FOR_EVER = -1
MAX_RECORD_BYTES = 4 * 1024 * 1024
ENVELOPE_BYTES = 64 * 1024  # what a dead letter adds around the original bytes


@dataclass(frozen=True)
class TopicSpec:
    """One topic: its record, partitions, retention in milliseconds (-1: for ever) and largest message in bytes."""

    name: str
    record: type[Record]
    compacted: bool = False
    partitions: int = PARTITIONS
    retention_ms: int = KEEP_FOR_EVER
    max_bytes: int = MAX_RECORD_BYTES
    replication: int = -1  # on Kafka; -1: the broker's default

    @property
    def table(self) -> str:
        """The DuckDB table: the topic's name with underscores."""
        return self.name.replace("-", "_")


# Topics whose order matters as a whole have one partition; they carry few records.
SINGLE = {
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
COMPACTED = {PolicyUpdate.topic, ProducerOffset.topic}


def topic_table(partitions: int = PARTITIONS, retention_ms: int = KEEP_FOR_EVER, replication: int = -1) -> dict[str, TopicSpec]:
    """Every topic of Charter by name."""
    specs = {}
    for record in RECORDS:
        extra = ENVELOPE_BYTES if record is DeadLetter else 0
        specs[record.topic] = TopicSpec(
            name=record.topic,
            record=record,
            compacted=record.topic in COMPACTED,
            partitions=1 if record.topic in SINGLE else partitions,
            retention_ms=KEEP_FOR_EVER if record.topic == "prompts" else retention_ms,
            max_bytes=MAX_RECORD_BYTES + extra,
            replication=replication,
        )
    return specs


TOPICS = topic_table()
