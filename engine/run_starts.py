"""Find where a run begins on each topic. A stage that has no other position starts there.

The first process that publishes or processes records of a run publishes a RunStart, before it does anything else. If two
processes publish one at the same time, the first record on the log counts. No record of the run is below its offsets, because
each process reads the end offsets before it publishes a RunStart, and publishes other records only after that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.bus.partitioner import choose_partition
from engine.bus.port import Bus, ConsumerRecord, Offsets, ProducerRecord, TopicPartition
from engine.bus.read import read_between, read_values
from schemas import ids
from schemas.codec import RecordError, decode_record, encode_record
from schemas.records import RunManifest, RunStart, TopicStart
from schemas.topics import TOPICS

# Another program may publish records of a run to these topics before the first process of Charter starts.
_WORK_TOPICS = ("prompts", "responses", "critiques", "revisions")


@dataclass(frozen=True)
class StartPositions:
    """The start offsets of a run and the partition counts for its keys. A topic that was created again starts at offset 0."""

    run_id: str
    offsets: Offsets
    partition_counts: Mapping[str, int]

    def get_offset(self, tp: TopicPartition) -> int:
        return self.offsets.get(tp, 0)

    def get_offsets(self, bus: Bus, topics: Sequence[str]) -> Offsets:
        """Return the first readable offset of the run in each partition of these topics."""
        return {tp: max(beginning, self.get_offset(tp)) for tp, beginning in bus.beginning_offsets(topics).items()}

    def choose_partition(self, topic: str, key: bytes, source: ConsumerRecord | None = None) -> int | None:
        """Return the partition of a key. It does not change if partitions are added to the topic during the run.

        An output with the key of its input `source` gets the partition of the input, if their topics have equal partition counts. So
        the outputs of an external producer's prompt are in one partition, too, also if it has another partitioner. Return None if the log
        chooses the partition, because the topic did not exist when the run started.
        """
        count = self.partition_counts.get(topic)
        if count is None:
            return None
        if source and source.key == key and source.partition < count == self.partition_counts.get(source.topic):
            return source.partition
        return choose_partition(key, count)

    def assign_partition(self, record: ProducerRecord) -> ProducerRecord:
        """Set the partition of a record."""
        return record._replace(partition=self.choose_partition(record.topic, record.key))


def read_start_positions(bus: Bus, run_id: str) -> StartPositions | None:
    """Return the start positions of a run. Return None if the run has no RunStart."""
    if RunStart.topic not in bus.topic_ids([RunStart.topic]):
        return None
    for value in read_values(bus, RunStart.topic):
        start = decode_record(value, RunStart)
        if start.run_id == run_id:
            return _to_start_positions(bus, start)
    return None


def ensure_run_start(bus: Bus, run_id: str, *, may_have_records: bool = True) -> StartPositions:
    """Return the start positions of a run. If the run has none yet, publish them.

    `may_have_records` is false if the caller knows that no record of this run is on the log. Then the work topics are not
    searched for records of the run.
    """
    found = read_start_positions(bus, run_id)
    if found is None:
        start = _make_run_start(bus, run_id, may_have_records)
        bus.publish([ProducerRecord(start.topic, start.key, encode_record(start), (("run", run_id.encode()),))])
        found = read_start_positions(bus, run_id)
        assert found is not None, "the record that was just published is on the log"
    return found


def _to_start_positions(bus: Bus, start: RunStart) -> StartPositions:
    topic_ids = bus.topic_ids([topic.name for topic in start.topics])
    unchanged = [topic for topic in start.topics if topic_ids.get(topic.name) == topic.topic_id]
    return StartPositions(
        start.run_id,
        {TopicPartition(topic.name, number): offset for topic in unchanged for number, offset in enumerate(topic.offsets)},
        {topic.name: len(topic.offsets) for topic in unchanged},
    )


def _make_run_start(bus: Bus, run_id: str, may_have_records: bool) -> RunStart:
    topic_ids = bus.topic_ids(list(TOPICS))
    beginnings, ends = bus.beginning_offsets(list(topic_ids)), bus.end_offsets(list(topic_ids))
    if _has_manifest(bus, run_id, topic_ids):
        offsets = beginnings  # an earlier version of Charter has begun this run and has stored no offsets
    elif may_have_records:
        offsets = ends | _find_first_offsets(bus, run_id, beginnings, ends)
    else:
        offsets = ends
    by_topic: dict[str, list[int]] = defaultdict(list)
    for tp in sorted(offsets):
        by_topic[tp.topic].append(offsets[tp])
    return RunStart(
        record_id=ids.compute_record_id("run-start", [], ids.compute_fingerprint("run_start", run=run_id)),
        run_id=run_id,
        stage="run",
        topics=[TopicStart(name=name, topic_id=topic_ids[name], offsets=found) for name, found in by_topic.items()],
    )


def _has_manifest(bus: Bus, run_id: str, topic_ids: Mapping[str, str]) -> bool:
    values = read_values(bus, RunManifest.topic) if RunManifest.topic in topic_ids else []
    return any(decode_record(value, RunManifest).run_id == run_id for value in values)


def _find_first_offsets(bus: Bus, run_id: str, beginnings: Offsets, ends: Offsets) -> Offsets:
    """Return the offset of the run's first record in each partition of the work topics. Omit partitions without one."""
    found: Offsets = {}
    work_offsets = {tp: offset for tp, offset in beginnings.items() if tp.topic in _WORK_TOPICS}
    for record in read_between(bus, work_offsets, ends):
        tp = record.topic_partition
        if tp not in found and _may_belong_to(record, run_id):
            found[tp] = record.offset
    return found


def _may_belong_to(record: ConsumerRecord, run_id: str) -> bool:
    """Return whether a record is of this run. A record that does not name its run may be of any run."""
    runs: Sequence[bytes] = [value for name, value in record.headers if name == "run"]
    if runs:
        return run_id.encode() in runs
    try:
        return decode_record(record.value or b"", TOPICS[record.topic].record_class).run_id == run_id
    except RecordError:
        return True  # the stage makes a dead letter of it
