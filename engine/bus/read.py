"""Reading a whole topic up to its present end, on any bus."""

from __future__ import annotations

import time
from collections.abc import Iterator

from engine.bus.port import Bus, ConsumerRecord, Offsets, TopicPartition
from engine.errors import BusUnreachable

_MAX_POLL_RECORDS = 500
_POLL_TIMEOUT_S = 1.0
STALL_TIMEOUT_S = 60.0  # our own transactions are over, one way or the other, within 10 s


def read_between(bus: Bus, start_offsets: Offsets, end_offsets: Offsets) -> Iterator[ConsumerRecord]:
    """Every message from `begins` up to `ends`, which must not lie beyond the log's."""
    wanted = {place: begin for place, begin in start_offsets.items() if begin < end_offsets.get(place, 0)}
    reader = bus.open_reader(wanted)
    deadline = time.monotonic() + STALL_TIMEOUT_S
    before = reader.positions()
    try:
        while left := [place for place, position in before.items() if position < end_offsets[place]]:
            for message in reader.poll(_POLL_TIMEOUT_S, _MAX_POLL_RECORDS):
                if message.offset < end_offsets[TopicPartition(message.topic, message.partition)]:
                    yield message
            positions = reader.positions()
            if positions != before:
                deadline = time.monotonic() + STALL_TIMEOUT_S
            elif time.monotonic() > deadline:
                raise _make_stalled_error(left[0], positions[left[0]], end_offsets[left[0]])
            before = positions
    finally:
        reader.close()


def _make_stalled_error(place: TopicPartition, position: int, end: int) -> BusUnreachable:
    return BusUnreachable(
        f"{place.topic}[{place.partition}] cannot be read beyond {position}, and goes on to {end}",
        f"a transaction has stood open there for more than {STALL_TIMEOUT_S:.0f} s, or the partition's broker is away",
        "find it with Kafka's own tool: kafka-transactions.sh find-hanging (see docs/guarantees.md)",
    )


def read_topic(bus: Bus, topic: str) -> Iterator[ConsumerRecord]:
    """Every message of a topic, up to the end that it had at the start."""
    return read_between(bus, bus.beginning_offsets([topic]), bus.end_offsets([topic]))


def read_values(bus: Bus, topic: str) -> list[bytes]:
    """Every message value of a small topic."""
    return [message.value or b"" for message in read_topic(bus, topic)]


class TopicTail:
    """The messages of a small topic: all of them at the first look, and then each time those that are new."""

    def __init__(self, bus: Bus, topic: str) -> None:
        self.bus, self.topic = bus, topic
        self.next_offsets = bus.beginning_offsets([topic])

    def read_new(self) -> list[ConsumerRecord]:
        """What was written since the last look."""
        ends = self.bus.end_offsets([self.topic])
        if ends == self.next_offsets:
            return []
        found = list(read_between(self.bus, self.next_offsets, ends))
        self.next_offsets = ends
        return found
