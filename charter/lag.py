"""Compute the consumer lag, which is the number of records that the stages and the sink have not processed yet."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charter.stages import STAGE_OUTPUTS, get_stage_inputs
from engine.bus.port import Bus, ConsumerRecord, Offsets, TopicPartition
from engine.commit_history import read_commit_history
from engine.instances import list_running_services
from engine.positions import PositionFinder
from engine.progress import WorkProgress
from engine.run_starts import read_start_positions
from engine.settings import Settings
from engine.store import Store
from schemas.topics import TOPICS

# The records that people and stages make. Training and exports read them from the database.
_DATA_TOPICS = ("prompts", "responses", "critiques", "revisions", "preferences", "grades", "demonstrations", "erasures")
_SCAN_TIMEOUT_S = 2.0  # `charter status` must return quickly, even if a broker is slow


def compute_lag_rows(
    bus: Bus, reader: str, topic_names: Sequence[str], committed_offsets: Offsets, run_id: str | None = None
) -> list[tuple[Any, ...]]:
    """Return (reader, topic, committed offset, end offset, lag in records, age of the oldest in seconds) for each topic.

    Offsets and lag are sums over the partitions. The age is the age of the oldest unread record. If all records are read,
    the age is None. With `run_id`, a partition in which all unread records belong to other runs has no lag. Unread records that were
    deleted count as lag, because the reader stops at them.
    """
    ends = bus.end_offsets(topic_names)
    next_offsets = {tp: committed_offsets.get(tp, beginning) for tp, beginning in bus.beginning_offsets(topic_names).items()}
    oldest, deleted = _find_unread(bus, next_offsets, ends, run_id)
    rows: list[tuple[Any, ...]] = []
    for topic in topic_names:
        partitions = [partition for partition in ends if partition.topic == topic]
        lag = sum(ends[partition] - next_offsets[partition] for partition in partitions if partition in oldest.keys() | deleted)
        timestamps = [oldest[partition] for partition in partitions if partition in oldest]
        age = round(time.time() - min(timestamps) / 1000, 1) if timestamps else None
        committed, end = (sum(offsets[partition] for partition in partitions) for offsets in (next_offsets, ends))
        rows.append((reader, topic, committed, end, lag, age))
    return rows


def find_oldest_unread(
    bus: Bus, next_offsets: Offsets, end_offsets: Offsets, run_id: str | None = None
) -> dict[TopicPartition, int]:
    """Return, for each partition with an unread record, the timestamp of its first unread record (ms since 1970).

    With `run_id`, ignore the records of other runs: the stages of this run only skip them.

    The scan must read the records, because on Kafka some offsets are transaction markers and not records. The scan ends after
    2 seconds. The result omits partitions that the scan has not reached.
    """
    return _scan_unread(bus, next_offsets, end_offsets, run_id)[0]


def _find_unread(
    bus: Bus, next_offsets: Offsets, end_offsets: Offsets, run_id: str | None
) -> tuple[dict[TopicPartition, int], set[TopicPartition]]:
    """Return the result of `find_oldest_unread`, and the partitions whose next record was deleted."""
    beginnings = bus.beginning_offsets(sorted({tp.topic for tp in next_offsets}))
    readable = {tp: max(offset, beginnings[tp]) for tp, offset in next_offsets.items()}
    return find_oldest_unread(bus, readable, end_offsets, run_id), {
        tp for tp, offset in next_offsets.items() if offset < beginnings[tp]
    }


def _scan_unread(
    bus: Bus, next_offsets: Offsets, end_offsets: Offsets, run_id: str | None = None
) -> tuple[dict[TopicPartition, int], bool]:
    """Return the timestamps of `find_oldest_unread`, and whether the scan of all partitions was completed."""
    timestamps: dict[TopicPartition, int] = {}
    pending = {partition: offset for partition, offset in next_offsets.items() if offset < end_offsets[partition]}
    if not pending:
        return {}, True
    reader, deadline = bus.open_reader(pending), time.monotonic() + _SCAN_TIMEOUT_S
    try:
        while time.monotonic() < deadline:
            for message in reader.poll(0.1, 1000):
                if run_id is None or _may_belong_to(message, run_id):
                    timestamps.setdefault(message.topic_partition, message.timestamp_ms)
            positions = reader.positions()
            if all(offset >= end_offsets[partition] for partition, offset in positions.items() if partition not in timestamps):
                return timestamps, True
    finally:
        reader.close()
    return timestamps, False


def _may_belong_to(message: ConsumerRecord, run_id: str) -> bool:
    """Return whether a record belongs to a run. A record of an external producer may name its run only in its value."""
    runs = [value for name, value in message.headers if name == "run"]
    return not runs or run_id.encode() in runs


def has_unread(bus: Bus, next_offsets: Offsets, end_offsets: Offsets) -> bool:
    """Return whether there is a record between the offsets. If the scan is not completed in time, return True."""
    timestamps, is_complete = _scan_unread(bus, next_offsets, end_offsets)
    return bool(timestamps) or not is_complete


def read_positions(bus: Bus, run_id: str, stage: str, topics: Sequence[str]) -> Offsets:
    """Return the next offset of a stage in each partition. It is the committed offset, or the offset where a start would begin."""
    committed, run_start = bus.committed(f"{run_id}.{stage}", topics), read_start_positions(bus, run_id)
    if run_start is None:
        return bus.beginning_offsets(topics) | committed
    starts = run_start.get_offsets(bus, topics)
    if len(committed) < len(starts):
        finder = PositionFinder(bus, run_start, stage, bus.topic_ids(topics), (STAGE_OUTPUTS[stage],))
        starts |= finder.rebuild_positions()[0]
    return starts | committed


@dataclass
class CompletionCheck:
    """Checks whether consumer groups have processed every record on their topics. With `store`, also checks the sink.

    The check reads the committed offsets from the log. The state of the workers is not sufficient: during a rebalance,
    a worker has no partitions, so it is idle even if there are unread records. `inputs` maps a group to its topics. A
    group without committed offsets starts at `start_offsets`. A partition without an entry in `start_offsets` starts at
    its beginning.
    """

    bus: Bus
    inputs: Mapping[str, Sequence[str]]
    store: Store | None = None
    start_offsets: Mapping[TopicPartition, int] | None = None
    previous: tuple[Offsets, dict[str, Offsets]] | None = None

    def is_done(self) -> bool:
        """Return whether this call and the previous call found the same offsets and no unread records.

        One call is not sufficient, because a stage can publish a record to a topic that the call has already checked. A stage
        commits its input offsets together with its outputs. Therefore equal offsets mean that nothing was written between the calls.
        """
        topics = sorted({topic for names in self.inputs.values() for topic in names})
        ends = self.bus.end_offsets(topics)
        beginnings, run_starts = self.bus.beginning_offsets(topics), self.start_offsets or {}
        starts = {tp: max(beginning, run_starts.get(tp, 0)) for tp, beginning in beginnings.items()}
        committed = {group: self.bus.committed(group, names) for group, names in self.inputs.items()}
        for group, names in self.inputs.items():
            next_offsets = {tp: offset for tp, offset in starts.items() if tp.topic in names} | committed[group]
            if has_unread(self.bus, next_offsets, ends):
                self.previous = None
                return False
        is_repeated = self.previous == (ends, committed)
        self.previous = (ends, committed)
        return is_repeated and (self.store is None or self.is_archived(self.store))

    def count_unread(self) -> int:
        """Return the number of records that the consumer groups have not processed yet. On Kafka, it includes transaction markers."""
        num_unread = 0
        for group, names in self.inputs.items():
            beginnings, run_starts = self.bus.beginning_offsets(names), self.start_offsets or {}
            next_offsets = {tp: max(start, run_starts.get(tp, 0)) for tp, start in beginnings.items()}
            next_offsets |= self.bus.committed(group, names)
            num_unread += sum(max(0, end - next_offsets[tp]) for tp, end in self.bus.end_offsets(names).items())
        return num_unread

    def update_progress(self, progress: WorkProgress, num_done: int) -> None:
        """Set the finished records of this process, and add the unread ones to the total. The stages can still publish more."""
        progress.num_done, progress.num_total = num_done, num_done + self.count_unread()

    def is_archived(self, store: Store) -> bool:
        """Return whether the sink has written every record on the log to the database, and has noted that it read the log."""
        if not store.path.exists() or read_commit_history(store).complete_seq is None:
            return False  # the sink has not created the database yet, or it restores a database
        all_topics = list(TOPICS)
        next_offsets = self.bus.beginning_offsets(all_topics) | read_sink_offsets(store, self.bus)
        return not has_unread(self.bus, next_offsets, self.bus.end_offsets(all_topics))


def compute_lags(bus: Bus, run_id: str, settings: Settings) -> dict[str, int]:
    """Return the lag of each topic in records, as the maximum over the stages that read the topic.

    A partition in which all unread records belong to other runs, such as evaluations, has no lag. In other partitions, the records
    of other runs are counted too, and unread records that were deleted.
    """
    lags: dict[str, int] = {}
    inputs = get_stage_inputs(settings)
    committed = {stage: bus.committed(f"{run_id}.{stage}", topics) for stage, topics in inputs.items()}
    started = [stage for stage in inputs if committed[stage]] or list(inputs)  # a replay may run only some of the stages
    for stage in started:
        topics = inputs[stage]
        ends = bus.end_offsets(topics)
        next_offsets = read_positions(bus, run_id, stage, topics)
        oldest, deleted = _find_unread(bus, next_offsets, ends, run_id)
        for topic in topics:
            unread = [partition for partition in oldest.keys() | deleted if partition.topic == topic]
            lag = sum(ends[partition] - next_offsets[partition] for partition in unread)
            lags[topic] = max(lags.get(topic, 0), lag)
    return lags


def describe_unarchived(bus: Bus, store: Store, data_folder: Path) -> str:
    """Return one line if data on the log is not in the database and no sink runs on the data folder. Otherwise return "".

    Commands that read only the database would silently leave out these records, such as new human labels.
    """
    if list_running_services(data_folder)["sink"]:
        return ""
    sink_offsets = read_sink_offsets(store, bus) if store.path.exists() else {}
    next_offsets = {tp: max(start, sink_offsets.get(tp, 0)) for tp, start in bus.beginning_offsets(_DATA_TOPICS).items()}
    unread = find_oldest_unread(bus, next_offsets, bus.end_offsets(_DATA_TOPICS))
    if not unread:
        return ""
    names = ", ".join(name for name in _DATA_TOPICS if name in {partition.topic for partition in unread})
    return f"some records are on the log, but not in the database yet ({names}); a sink adds them: charter run --until-done"


def read_sink_offsets(store: Store, bus: Bus) -> Offsets:
    """Return the next offset of each partition that the sink will read from this log. The database stores these offsets."""
    return select_sink_offsets(store.query(SINK_OFFSETS_SQL, [bus.cluster_id]).rows, bus)


SINK_OFFSETS_SQL = "SELECT topic, partition, topic_id, next_offset FROM raw.sink_offsets WHERE cluster_id = ?"


def select_sink_offsets(rows: Iterable[tuple[Any, ...]], bus: Bus) -> Offsets:
    """Return the offsets in the rows of SINK_OFFSETS_SQL, without those of deleted topics."""
    topic_ids = bus.topic_ids(list(TOPICS))
    return {
        TopicPartition(topic, partition): offset
        for topic, partition, topic_id, offset in rows
        if topic_ids.get(topic) == topic_id
    }
