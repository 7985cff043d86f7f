"""Which policy answers now: the newest PolicyUpdate on the `policies` topic, or the first model before there is one.

The weights change between batches, never within one, and every record carries the version of the weights that made it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from engine.bus.port import Bus
from engine.bus.read import read_values
from engine.models.port import Model
from schemas.codec import decode
from schemas.records import PolicyKind, PolicyUpdate

log = logging.getLogger("charter.policy")
TOPIC = PolicyUpdate.topic
BATCH = 500


class PolicyFollower:
    """Follows `policies`; `open_update` loads the weights of an update. `first` is policy version 0."""

    def __init__(self, bus: Bus, first: Model, open_update: Callable[[PolicyUpdate], Model]) -> None:
        self.model, self.version = first, 0
        self.open_update = open_update
        self.reader = bus.reader(bus.begin_offsets([TOPIC]))
        self.ends = bus.end_offsets

    def current(self) -> tuple[Model, int]:
        """The policy to answer with now, and its version. Loading a new one takes as long as it takes to read its weights."""
        update = self.newest()
        if update is not None and update.version > self.version:
            self.model, self.version = self.open_update(update), update.version
            log.info("answering with policy %d from now on", update.version)
        return self.model, self.version

    def newest(self) -> PolicyUpdate | None:
        """The newest policy among the updates that have arrived since the last look."""
        updates = []
        ends = self.ends([TOPIC])
        while any(self.reader.positions().get(place, 0) < end for place, end in ends.items()):
            for message in self.reader.poll(1.0, BATCH):
                update = decode(message.value or b"", PolicyUpdate)
                if update.kind is PolicyKind.POLICY:
                    updates.append(update)
        return max(updates, key=lambda update: update.version, default=None)

    def close(self) -> None:
        self.reader.close()


def updates(bus: Bus) -> list[PolicyUpdate]:
    """Every policy and reward update so far, in order."""
    return [decode(value, PolicyUpdate) for value in read_values(bus, TOPIC)]
