"""Detect that a topic was deleted or created again while a process uses it.

Offsets of a deleted topic are meaningless in a new topic of the same name. So a process ends when the id of one of its topics
changes, and starts again with the positions of the new topic.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from engine.bus.port import Bus
from engine.errors import BusUnreachable, TopicChanged

_CHECK_INTERVAL_S = 2.0
_MISSING_TIMEOUT_S = 5.0  # after a broker restarts, its metadata may lack topics for a moment


class TopicGuard:
    """Compares the ids of topics with their ids at the start of the process. Times are monotonic seconds."""

    def __init__(self, bus: Bus, topic_ids: Mapping[str, str]) -> None:
        self.bus, self.topic_ids = bus, dict(topic_ids)
        self.verified_at = 0.0  # all records that were read before this time belong to these topics
        self.missing_since = 0.0

    def verify(self) -> None:
        """Read the ids. Raise TopicChanged if an id has changed, or if a topic is missing for some time.

        Raise BusUnreachable if a topic is missing for a shorter time.
        """
        started = time.monotonic()
        current = self.bus.topic_ids(list(self.topic_ids))
        for topic, topic_id in self.topic_ids.items():
            if topic in current and current[topic] != topic_id:
                raise TopicChanged(
                    f"the topic {topic} was deleted and created again while this process used it",
                    f"its id was {topic_id} and is {current[topic]}, so the offsets of this process are no longer valid",
                    "start the process again: it reads the new topic from its beginning",
                )
        missing = [topic for topic in self.topic_ids if topic not in current]
        if not missing:
            self.verified_at, self.missing_since = started, 0.0
            return
        self.missing_since = self.missing_since or started
        if started - self.missing_since > _MISSING_TIMEOUT_S:
            raise TopicChanged(
                f"the topic {missing[0]} was deleted while this process used it",
                f"it is missing since {started - self.missing_since:.0f} s",
                "start the process again: it creates the topic, and reads it from its beginning",
            )
        raise BusUnreachable(
            f"the topic {missing[0]} is missing",
            "it was deleted, or the broker has just started and does not know it yet",
            "type: charter topics create",
        )

    def verify_since(self, read_at: float) -> None:
        """Verify the ids unless this was done after `read_at`."""
        if self.verified_at <= read_at:
            self.verify()

    def verify_at_interval(self) -> None:
        """Verify the ids every few seconds."""
        self.verify_since(time.monotonic() - _CHECK_INTERVAL_S)
