"""Consumer lag: the records that the stages and the sink have not processed yet."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from charter.stages import get_stage_inputs
from engine.bus.port import Bus, Offsets, TopicPartition
from engine.store import Store
from schemas.topics import TOPICS

_SCAN_TIMEOUT_S = 2.0  # `charter status` must return quickly, also with a slow broker


def compute_lag_rows(bus: Bus, reader: str, topic_names: Sequence[str], committed_offsets: Offsets) -> list[tuple[Any, ...]]:
    """Return a row for each topic: reader, topic, committed offset, end offset, lag in records, age of the oldest in seconds.

    Offsets and lag are sums over the partitions. The age is None without unread records.
    """
    beginnings, ends = bus.beginning_offsets(topic_names), bus.end_offsets(topic_names)
    # Retention may have removed records below a committed offset that is older than the beginning.
    next_offsets = {partition: max(committed_offsets.get(partition, 0), start) for partition, start in beginnings.items()}
    oldest = find_oldest_unread(bus, next_offsets, ends)
    rows: list[tuple[Any, ...]] = []
    for topic in topic_names:
        partitions = [partition for partition in ends if partition.topic == topic]
        unread = [partition for partition in partitions if partition in oldest]
        lag = sum(ends[partition] - next_offsets[partition] for partition in unread)
        age = round(time.time() - min(oldest[partition] for partition in unread) / 1000, 1) if unread else None
        committed, end = (sum(offsets[partition] for partition in partitions) for offsets in (next_offsets, ends))
        rows.append((reader, topic, committed, end, lag, age))
    return rows


def find_oldest_unread(bus: Bus, next_offsets: Offsets, end_offsets: Offsets) -> dict[TopicPartition, int]:
    """Return, for each partition with an unread record, the timestamp of its first unread record (ms since 1970).

    The records are read, because offsets alone are not enough: on Kafka, transaction markers take offsets too.
    The scan ends after 2 seconds; partitions that were not reached by then are missing from the result.
    """
    return _scan_unread(bus, next_offsets, end_offsets)[0]


def _scan_unread(bus: Bus, next_offsets: Offsets, end_offsets: Offsets) -> tuple[dict[TopicPartition, int], bool]:
    """Return the timestamps of `find_oldest_unread`, and whether every partition was read as far as its first record."""
    timestamps: dict[TopicPartition, int] = {}
    pending = {partition: offset for partition, offset in next_offsets.items() if offset < end_offsets[partition]}
    if not pending:
        return {}, True
    reader, deadline = bus.open_reader(pending), time.monotonic() + _SCAN_TIMEOUT_S
    try:
        while time.monotonic() < deadline:
            for message in reader.poll(0.1, 1000):
                timestamps.setdefault(TopicPartition(message.topic, message.partition), message.timestamp_ms)
            positions = reader.positions()
            if all(offset >= end_offsets[partition] for partition, offset in positions.items() if partition not in timestamps):
                return timestamps, True
    finally:
        reader.close()
    return timestamps, False


def has_unread(bus: Bus, next_offsets: Offsets, end_offsets: Offsets) -> bool:
    """Return whether a record lies between the offsets. A scan that does not end in time counts as an unread record."""
    timestamps, is_complete = _scan_unread(bus, next_offsets, end_offsets)
    return bool(timestamps) or not is_complete


@dataclass
class CompletionCheck:
    """Decides whether consumer groups, and the sink of `store` if it is given, have processed every record on their topics.

    The log decides, and not the state of this process: a worker that has no partitions yet, because its group is still
    rebalancing, has processed nothing. `inputs` maps a group to its topics. `start_offsets` is where a group starts that has
    committed nothing; without an entry that is the beginning of the partition.
    """

    bus: Bus
    inputs: Mapping[str, Sequence[str]]
    store: Store | None = None
    start_offsets: Mapping[TopicPartition, int] | None = None
    previous: tuple[Offsets, dict[str, Offsets]] | None = None

    def is_done(self) -> bool:
        """Return whether two calls in a row found the same offsets, both times without an unread record.

        One observation is not enough: a stage may publish a record for a stage that was observed before it. A stage commits
        its input offsets together with its outputs, so equal offsets mean that nothing was written in between.
        """
        topics = sorted({topic for names in self.inputs.values() for topic in names})
        ends = self.bus.end_offsets(topics)
        starts = self.bus.beginning_offsets(topics) | dict(self.start_offsets or {})
        committed = {group: self.bus.committed(group, names) for group, names in self.inputs.items()}
        for group, names in self.inputs.items():
            next_offsets = {tp: offset for tp, offset in starts.items() if tp.topic in names} | committed[group]
            if has_unread(self.bus, next_offsets, ends):
                self.previous = None
                return False
        is_repeated = self.previous == (ends, committed)
        self.previous = (ends, committed)
        return is_repeated and (self.store is None or self.is_archived(self.store))

    def is_archived(self, store: Store) -> bool:
        """Return whether the sink has written every record on the log to the database."""
        if not store.path.exists():
            return False  # the sink has not created it yet
        all_topics = list(TOPICS)
        next_offsets = self.bus.beginning_offsets(all_topics) | read_sink_offsets(store, self.bus.cluster_id)
        return not has_unread(self.bus, next_offsets, self.bus.end_offsets(all_topics))


def compute_lags(bus: Bus, run_id: str, pairing: str) -> dict[str, int]:
    """Return the lag of each topic in records: the maximum over the stages that read it. Records of other runs count too."""
    lags: dict[str, int] = {}
    inputs = get_stage_inputs(pairing)
    committed = {stage: bus.committed(f"{run_id}.{stage}", topics) for stage, topics in inputs.items()}
    started = [stage for stage in inputs if committed[stage]] or list(inputs)  # a replay may run only some of the stages
    for stage in started:
        topics = inputs[stage]
        ends = bus.end_offsets(topics)
        next_offsets = bus.beginning_offsets(topics) | committed[stage]
        unread = find_oldest_unread(bus, next_offsets, ends)
        for topic in topics:
            lag = sum(ends[partition] - next_offsets[partition] for partition in unread if partition.topic == topic)
            lags[topic] = max(lags.get(topic, 0), lag)
    return lags


def read_sink_offsets(store: Store, cluster_id: str) -> Offsets:
    """Return the next offset to write for each partition of this log, as the database has it."""
    sql = "SELECT topic, partition, next_offset FROM raw.sink_offsets WHERE cluster_id = ?"
    return {TopicPartition(topic, partition): offset for topic, partition, offset in store.query(sql, [cluster_id]).rows}
