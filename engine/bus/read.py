"""Reading a whole topic up to its present end, on any bus."""

from __future__ import annotations

from collections.abc import Iterator

from engine.bus.port import Bus, Message, Offsets, TopicPartition

BATCH = 500
WAIT_S = 1.0


def read_between(bus: Bus, begins: Offsets, ends: Offsets) -> Iterator[Message]:
    """Every message from `begins` up to `ends`, which must not lie beyond the log's."""
    wanted = {place: begin for place, begin in begins.items() if begin < ends.get(place, 0)}
    reader = bus.reader(wanted)
    try:
        while any(position < ends[place] for place, position in reader.positions().items()):
            for message in reader.poll(WAIT_S, BATCH):
                if message.offset < ends[TopicPartition(message.topic, message.partition)]:
                    yield message
    finally:
        reader.close()


def read_messages(bus: Bus, topic: str) -> Iterator[Message]:
    """Every message of a topic, up to the end that it had at the start."""
    return read_between(bus, bus.begin_offsets([topic]), bus.end_offsets([topic]))


def read_values(bus: Bus, topic: str) -> list[bytes]:
    """Every message value of a small topic."""
    return [message.value or b"" for message in read_messages(bus, topic)]
