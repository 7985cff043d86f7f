"""Find the offsets at which a stage starts to read its partitions.

Normally these are the committed offsets of its group. Kafka deletes the offsets of an idle group after some days
(`offsets.retention.minutes`). A missing offset therefore does not mean that the stage has never run. Each output and each dead
letter of a stage names its input record in the header SOURCE_HEADER, and they are written in the transaction that commits the
offset of this record. So the position after the highest source offset of a stage's own outputs is equal to the lost offset, or
lower only by records without outputs. A stage without outputs starts where its run starts.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.bus.port import Bus, CommittedOffset, ConsumerRecord, Headers, Offsets, TopicPartition
from engine.bus.read import read_between
from engine.errors import OffsetsLost, UsageError
from engine.run_starts import StartPositions
from engine.text import format_count
from schemas.records import DeadLetter

logger = logging.getLogger("charter.positions")

SOURCE_HEADER = "source"
TARGET_STAGE_HEADER = "only-stage"  # a record with this header is processed only by the named stage (a retried dead letter)


class Source(NamedTuple):
    """The input record of an output: the stage that processed it, and its coordinates."""

    stage: str
    topic_id: str
    partition: int
    offset: int


def make_source_header(stage: str, topic_id: str, consumer_record: ConsumerRecord) -> tuple[str, bytes]:
    """Return the header of an output that names its input record."""
    return SOURCE_HEADER, f"{stage} {topic_id} {consumer_record.partition} {consumer_record.offset}".encode()


def parse_source(headers: Headers) -> Source | None:
    """Return the source of an output. Return None if the record has no valid source header."""
    for name, value in headers:
        parts = value.decode("utf-8", "replace").rsplit(" ", 3) if name == SOURCE_HEADER else []
        if len(parts) == 4 and parts[2].isdecimal() and parts[3].isdecimal():
            return Source(parts[0], parts[1], int(parts[2]), int(parts[3]))
    return None


@dataclass(frozen=True)
class PartitionStart:
    """Where a stage starts a partition. `seen_keys` are the keys of the run's records below this offset, if the stage needs them."""

    offset: int
    seen_keys: set[bytes] = field(default_factory=set)


@dataclass(frozen=True)
class PositionFinder:
    """Finds the start of partitions for one stage of a run. `topic_ids` are the ids of its input topics."""

    bus: Bus
    run_start: StartPositions
    stage: str
    topic_ids: Mapping[str, str]
    output_topics: Sequence[str]
    needs_keys: bool = False
    cancelled: threading.Event = field(default_factory=threading.Event)

    def find_in_background(self, committed: Mapping[TopicPartition, CommittedOffset | None]) -> Future[dict]:
        """Return a future of `find`. It is already done if no records must be read."""
        future: Future[dict] = Future()

        def run() -> None:
            try:
                future.set_result(self.find(committed))
            except BaseException as error:  # the thread that waits for the result raises the error
                future.set_exception(error)

        if self.needs_keys or any(not self._is_current(tp, offset) for tp, offset in committed.items()):
            threading.Thread(target=run, name=f"{self.stage}-positions", daemon=True).start()
        else:
            run()
        return future

    def find(self, committed: Mapping[TopicPartition, CommittedOffset | None]) -> dict[TopicPartition, PartitionStart]:
        """Return the start of each partition. `committed` has its committed offset, or None.

        Raise UsageError if another program has changed the offset, or if the position cannot be found. Raise OffsetsLost if the
        log no longer has the records at the position.
        """
        offsets: Offsets = {}
        for tp, entry in committed.items():
            if entry is not None and not entry.topic_id:
                raise self._make_foreign_offset_error(tp, entry.offset)
            if entry is not None and self._is_current(tp, entry):
                offsets[tp] = entry.offset
        missing = [tp for tp in committed if tp not in offsets]
        if missing:
            recovered = self.recover(missing)
            offsets |= recovered
            if continued := [tp for tp in missing if recovered[tp] > self.run_start.get_offset(tp)]:
                logger.warning(
                    "%s has no committed offsets (Kafka has deleted them, or the group); it continues after its own outputs: %s",
                    self.stage,
                    ", ".join(f"{tp.topic}[{tp.partition}]@{recovered[tp]}" for tp in continued),
                )
        keys = self._read_keys(offsets) if self.needs_keys else {}
        return {tp: PartitionStart(offset, keys.get(tp, set())) for tp, offset in offsets.items()}

    def _is_current(self, tp: TopicPartition, entry: CommittedOffset | None) -> bool:
        return entry is not None and entry.topic_id == self.topic_ids[tp.topic]

    def recover(self, partitions: Sequence[TopicPartition]) -> Offsets:
        """Return the positions of partitions without their committed offsets."""
        rebuilt, beginnings = self.rebuild_positions()
        input_beginnings = self.bus.beginning_offsets(sorted({tp.topic for tp in partitions}))
        positions: Offsets = {}
        for tp in partitions:
            self._require_outputs(tp, rebuilt, beginnings)
            positions[tp] = rebuilt.get(tp, self.run_start.get_offset(tp))
            if input_beginnings[tp] > positions[tp]:
                raise self._make_lost_error(tp, positions[tp], input_beginnings[tp])
        return positions

    def rebuild_positions(self) -> tuple[Offsets, Offsets]:
        """Return, for each input partition, the offset after the last record with an output of this stage.

        Also return the beginnings of the partitions that have the outputs.
        """
        output_topics = list(self.bus.topic_ids([*self.output_topics, DeadLetter.topic]))
        beginnings, ends = self.bus.beginning_offsets(output_topics), self.bus.end_offsets(output_topics)
        topics, run_header = {topic_id: name for name, topic_id in self.topic_ids.items()}, self._run_header
        starts = {tp: max(self.run_start.get_offset(tp), offset) for tp, offset in beginnings.items()}
        positions: Offsets = {}
        for record in read_between(self.bus, starts, ends):
            self._raise_if_cancelled()
            source = parse_source(record.headers) if run_header in record.headers else None
            if source is not None and source.stage == self.stage and source.topic_id in topics:
                tp = TopicPartition(topics[source.topic_id], source.partition)
                positions[tp] = max(positions.get(tp, 0), source.offset + 1)
        return positions, beginnings

    def _require_outputs(self, tp: TopicPartition, rebuilt: Offsets, beginnings: Offsets) -> None:
        """Raise UsageError if retention may have deleted the last output for an input partition.

        Outputs have the keys of their inputs. If the topics have equal partition counts, all outputs for partition N are in
        partition N. Retention deletes the oldest records first, so one remaining output there shows that the last one remains.
        """
        counts = self.run_start.partition_counts
        for output, beginning in beginnings.items():
            if output.topic not in self.output_topics or beginning <= self.run_start.get_offset(output):
                continue
            is_copartitioned = counts.get(output.topic) == counts.get(tp.topic)
            if not is_copartitioned or (output.partition == tp.partition and tp not in rebuilt):
                raise self._make_unknown_position_error(tp, output, beginning)

    def _read_keys(self, offsets: Offsets) -> dict[TopicPartition, set[bytes]]:
        keys: dict[TopicPartition, set[bytes]] = {tp: set() for tp in offsets}
        starts = self.run_start.get_offsets(self.bus, sorted({tp.topic for tp in offsets}))
        for record in read_between(self.bus, starts, offsets, skip_deleted=True):
            self._raise_if_cancelled()
            is_retry = any(name == TARGET_STAGE_HEADER for name, _ in record.headers)
            if record.key is not None and not is_retry and self._run_header in record.headers:
                keys[record.topic_partition].add(record.key)
        return keys

    @property
    def _run_header(self) -> tuple[str, bytes]:
        return "run", self.run_start.run_id.encode()

    def _raise_if_cancelled(self) -> None:
        if self.cancelled.is_set():
            raise InterruptedError("the stage stops")

    def _format_verb(self, verb: str) -> str:
        return f"charter offsets {verb} --run {self.run_start.run_id} --stage {self.stage}"

    def _make_foreign_offset_error(self, tp: TopicPartition, offset: int) -> UsageError:
        return UsageError(
            f"the committed offset {offset} of {self.stage} in {tp.topic}[{tp.partition}] was not written by Charter",
            f"another program has changed the offsets of the group {self.run_start.run_id}.{self.stage}",
            f"to continue after the stage's last output, type: {self._format_verb('restore')}; to continue at this offset,"
            f" type: {self._format_verb('accept')}",
        )

    def _make_unknown_position_error(self, tp: TopicPartition, output: TopicPartition, beginning: int) -> UsageError:
        return UsageError(
            f"the position of {self.stage} in {tp.topic}[{tp.partition}] is unknown",
            f"it has no committed offset, and {output.topic}[{output.partition}], from which the position could be rebuilt,"
            f" begins at {beginning}, after the start of run {self.run_start.run_id} at {self.run_start.get_offset(output)}",
            f"to skip what is on the log, type: {self._format_verb('set')} --to latest; to process it again, use --to earliest",
        )

    def _make_lost_error(self, tp: TopicPartition, position: int, beginning: int) -> OffsetsLost:
        return OffsetsLost(
            f"{tp.topic}[{tp.partition}]@{position} no longer exists: the log begins at {beginning}",
            f"retention or an operator has deleted up to {format_count(beginning - position, 'records')} that {self.stage} has not read",
            f"to continue without these records, type: {self._format_verb('set')} --to earliest",
        )
