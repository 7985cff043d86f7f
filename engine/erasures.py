"""Read from the log which prompts were erased, so that no process uses their records again.

The topic `erasures` is kept for ever. A process reads it before it reads other topics, and then every few seconds. The records
of an erased prompt can still be on the log: on Kafka until the retention of their topic deletes them, and on the embedded log
without their values. Every reader skips and counts these records.
"""

from __future__ import annotations

import time

from engine.bus.port import Bus, ConsumerRecord
from engine.bus.read import TopicTail
from schemas.records import Erasure

_REFRESH_INTERVAL_S = 5.0


class ErasedPrompts:
    """The ids of the erased prompts of a log."""

    def __init__(self, bus: Bus) -> None:
        self.tail = TopicTail(bus, Erasure.topic)
        self.prompt_ids: set[str] = set()
        self.next_refresh_at = 0.0
        self.refresh()

    def refresh(self) -> None:
        """Read the new erasures. Do nothing if the last refresh was less than five seconds ago."""
        if time.monotonic() < self.next_refresh_at:
            return
        self.prompt_ids |= {(record.key or b"").decode() for record in self.tail.read_new()}
        self.next_refresh_at = time.monotonic() + _REFRESH_INTERVAL_S

    def covers(self, consumer_record: ConsumerRecord) -> bool:
        """Return whether a record has no value, or its key is the id of an erased prompt."""
        if consumer_record.value is None or not self.prompt_ids:
            return consumer_record.value is None
        return (consumer_record.key or b"").decode("utf-8", "replace") in self.prompt_ids
