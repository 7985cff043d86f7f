"""The topics of Charter, with the record class, the number of partitions and the retention of each topic.

Each topic has one record class and one table. The number of partitions is set when a topic is created. At most this number of
instances of a stage can share the work.
"""

from __future__ import annotations

from dataclasses import dataclass

from schemas.records import (
    RECORDS,
    DeadLetter,
    DroppedRollout,
    Grade,
    PolicyUpdate,
    ProducerOffset,
    Prompt,
    PromptFields,
    Record,
    Score,
)

DEFAULT_PARTITIONS = 12
_RETAIN_FOREVER = -1
MAX_RECORD_BYTES = 4 * 1024 * 1024
DEAD_LETTER_OVERHEAD_BYTES = 64 * 1024  # maximum size of the fields that a dead letter adds to the original bytes


@dataclass(frozen=True)
class TopicSpec:
    """The configuration of a topic. A retention of -1 means that records are kept forever."""

    name: str
    record_class: type[Record]
    is_compacted: bool = False
    num_partitions: int = DEFAULT_PARTITIONS
    retention_ms: int = _RETAIN_FOREVER
    max_message_bytes: int = MAX_RECORD_BYTES
    replication_factor: int = -1  # used only on Kafka; -1 selects the broker's default

    @property
    def table(self) -> str:
        """The name of the DuckDB table: the name of the topic with underscores."""
        return self.name.replace("-", "_")


# These topics have one partition, because they have few records and the order of all their records matters.
_SINGLE_PARTITION_TOPICS = {
    "batches",
    "policies",
    "runs",
    "run-starts",
    "metrics",
    "incidents",
    "pauses",
    "allowances",
    "dropped-rollouts",
    "producer-offsets",
    "dead-letter-retries",
    "erasures",
}
# The records of these topics are needed for as long as any record of their run exists. Without the manifests of its batches, the
# trainer could train a row twice after the database was restored. A sink that is rebuilt from the log must know all erasures.
PERMANENT_TOPICS = {"runs", "run-starts", "erasures", "batches"}
_COMPACTED_TOPICS = {PolicyUpdate.topic, ProducerOffset.topic}
# The topics whose records belong to a prompt. An erasure of the prompt deletes the values of these records.
PROMPT_TOPICS = tuple(
    record.topic
    for record in RECORDS
    if issubclass(record, PromptFields) or record in (Grade, Score, DroppedRollout, DeadLetter)
)


def make_topic_table(
    num_partitions: int = DEFAULT_PARTITIONS,
    retention_ms: int = _RETAIN_FOREVER,
    replication_factor: int = -1,
    prompts_retention_ms: int = _RETAIN_FOREVER,
) -> dict[str, TopicSpec]:
    """Return the configuration of all topics, by name."""
    retention_by_topic = dict.fromkeys(PERMANENT_TOPICS, _RETAIN_FOREVER) | {Prompt.topic: prompts_retention_ms}
    specs = {}
    for record in RECORDS:
        extra = DEAD_LETTER_OVERHEAD_BYTES if record is DeadLetter else 0
        specs[record.topic] = TopicSpec(
            name=record.topic,
            record_class=record,
            is_compacted=record.topic in _COMPACTED_TOPICS,
            num_partitions=1 if record.topic in _SINGLE_PARTITION_TOPICS else num_partitions,
            retention_ms=retention_by_topic.get(record.topic, retention_ms),
            max_message_bytes=MAX_RECORD_BYTES + extra,
            replication_factor=replication_factor,
        )
    return specs


TOPICS = make_topic_table()
