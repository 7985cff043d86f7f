"""Read whole topics up to their current end, from any implementation of the bus."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

from engine.bus.port import Bus, ConsumerRecord, Offsets, TopicPartition
from engine.errors import BusUnreachable, OffsetsLost

logger = logging.getLogger("charter.bus")

_MAX_POLL_RECORDS = 500
_POLL_TIMEOUT_S = 1.0
STALL_TIMEOUT_S = 60.0  # longer than 10 s, after which the broker aborts an open transaction of Charter


def read_between(
    bus: Bus, start_offsets: Offsets, end_offsets: Offsets, *, skip_deleted: bool = False
) -> Iterator[ConsumerRecord]:
    """Yield every record from `start_offsets` up to `end_offsets`. The end offsets must not be higher than the end of the log.

    Raise BusUnreachable if the positions do not change for STALL_TIMEOUT_S. Raise OffsetsLost if retention has deleted records
    before they were read. With `skip_deleted`, continue after them, for callers that need only the records that still exist.
    """
    start_offsets = {tp: start for tp, start in start_offsets.items() if start < end_offsets.get(tp, 0)}
    reader = bus.open_reader(start_offsets)
    deadline = time.monotonic() + STALL_TIMEOUT_S
    previous = reader.positions()
    try:
        while incomplete := [tp for tp, position in previous.items() if position < end_offsets[tp]]:
            try:
                records = reader.poll(_POLL_TIMEOUT_S, _MAX_POLL_RECORDS)
            except OffsetsLost as error:
                remaining = _skip_to_beginnings(bus, previous)
                if not skip_deleted or remaining == previous:
                    raise
                logger.warning("records were deleted while they were read, and are skipped: %s", error.what)
                reader.close()
                reader, previous = bus.open_reader(remaining), remaining
                continue
            for record in records:
                if record.offset < end_offsets[record.topic_partition]:
                    yield record
            positions = reader.positions()
            if positions != previous:
                deadline = time.monotonic() + STALL_TIMEOUT_S
            elif time.monotonic() > deadline:
                tp = incomplete[0]
                raise _make_stalled_error(tp, positions[tp], end_offsets[tp])
            previous = positions
    finally:
        reader.close()


def _skip_to_beginnings(bus: Bus, positions: Offsets) -> Offsets:
    """Return the positions, but none below the beginning of its partition."""
    beginnings = bus.beginning_offsets(sorted({tp.topic for tp in positions}))
    return {tp: max(position, beginnings[tp]) for tp, position in positions.items()}


def _make_stalled_error(tp: TopicPartition, position: int, end: int) -> BusUnreachable:
    return BusUnreachable(
        f"{tp.topic}[{tp.partition}] cannot be read beyond offset {position}; the end offset is {end}",
        f"a transaction has been open for more than {STALL_TIMEOUT_S:.0f} s, or the broker of the partition is unreachable",
        "find the transaction: kafka-transactions.sh find-hanging (see docs/guarantees.md)",
    )


def read_topic(bus: Bus, topic: str) -> Iterator[ConsumerRecord]:
    """Yield every record of a topic, up to its end at the time of the call."""
    return read_between(bus, bus.beginning_offsets([topic]), bus.end_offsets([topic]), skip_deleted=True)


def read_values(bus: Bus, topic: str) -> list[bytes]:
    """Return the value of every record of a small topic."""
    return [record.value or b"" for record in read_topic(bus, topic)]


class TopicTail:
    """Reads small topics incrementally. The first call returns all records, and each later call returns the new records."""

    def __init__(self, bus: Bus, *topics: str) -> None:
        self.bus, self.topics = bus, topics
        self.next_offsets = bus.beginning_offsets(topics)

    def read_new(self) -> list[ConsumerRecord]:
        """Return the records that were written since the last call. The records of one partition are in order.

        One request reads the end offsets of all topics. If there are new records, one reader reads them from all topics.
        """
        end_offsets = self.bus.end_offsets(self.topics)
        if end_offsets == self.next_offsets:
            return []
        records = list(read_between(self.bus, self.next_offsets, end_offsets))
        self.next_offsets = end_offsets
        return records
