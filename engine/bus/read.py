"""Reading a whole topic up to its present end, on any bus."""

from __future__ import annotations

import time
from collections.abc import Iterator

from engine.bus.port import Bus, Message, Offsets, TopicPartition
from engine.errors import BusUnreachable

BATCH = 500
WAIT_S = 1.0
STUCK_S = 60.0  # our own transactions are over, one way or the other, within 10 s


def read_between(bus: Bus, begins: Offsets, ends: Offsets) -> Iterator[Message]:
    """Every message from `begins` up to `ends`, which must not lie beyond the log's."""
    wanted = {place: begin for place, begin in begins.items() if begin < ends.get(place, 0)}
    reader = bus.reader(wanted)
    deadline = time.monotonic() + STUCK_S
    before = reader.positions()
    try:
        while left := [place for place, position in before.items() if position < ends[place]]:
            for message in reader.poll(WAIT_S, BATCH):
                if message.offset < ends[TopicPartition(message.topic, message.partition)]:
                    yield message
            positions = reader.positions()
            if positions != before:
                deadline = time.monotonic() + STUCK_S
            elif time.monotonic() > deadline:
                raise stuck(left[0], positions[left[0]], ends[left[0]])
            before = positions
    finally:
        reader.close()


def stuck(place: TopicPartition, position: int, end: int) -> BusUnreachable:
    return BusUnreachable(
        f"{place.topic}[{place.partition}] cannot be read beyond {position}, and goes on to {end}",
        f"a transaction has stood open there for more than {STUCK_S:.0f} s, or the partition's broker is away",
        "find it with Kafka's own tool: kafka-transactions.sh find-hanging (see docs/guarantees.md)",
    )


def read_messages(bus: Bus, topic: str) -> Iterator[Message]:
    """Every message of a topic, up to the end that it had at the start."""
    return read_between(bus, bus.begin_offsets([topic]), bus.end_offsets([topic]))


def read_values(bus: Bus, topic: str) -> list[bytes]:
    """Every message value of a small topic."""
    return [message.value or b"" for message in read_messages(bus, topic)]


class Growing:
    """The messages of a small topic: all of them at the first look, and then each time those that are new."""

    def __init__(self, bus: Bus, topic: str) -> None:
        self.bus, self.topic = bus, topic
        self.stands = bus.begin_offsets([topic])

    def new(self) -> list[Message]:
        """What was written since the last look."""
        ends = self.bus.end_offsets([self.topic])
        if ends == self.stands:
            return []
        found = list(read_between(self.bus, self.stands, ends))
        self.stands = ends
        return found
