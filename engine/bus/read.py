"""Reading a whole topic up to its present end, on any bus."""

from __future__ import annotations

from collections.abc import Iterator

from engine.bus.port import Bus, Message

BATCH = 500
WAIT_S = 1.0


def read_messages(bus: Bus, topic: str) -> Iterator[Message]:
    """Every message of a topic, up to the end that it had at the start."""
    ends = bus.end_offsets([topic])
    reader = bus.reader(bus.begin_offsets([topic]))
    try:
        while any(reader.positions().get(place, 0) < end for place, end in ends.items()):
            yield from reader.poll(WAIT_S, BATCH)
    finally:
        reader.close()


def read_values(bus: Bus, topic: str) -> list[bytes]:
    """Every message value of a small topic."""
    return [message.value or b"" for message in read_messages(bus, topic)]
