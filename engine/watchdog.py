"""A watchdog: it ends the process when a call to the log hangs.

Some calls of the Kafka client can block without a timeout (`commit_transaction`, `init_transactions`). A worker that hangs in
one still heartbeats, so the group keeps its partitions with it and nothing moves. Ended, its successor settles the open
transaction and goes on; nothing is lost.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

log = logging.getLogger("charter.watchdog")

LOOK_EVERY_S = 1.0
EXIT_CODE = 3  # a dependency is unreachable


class Calls:
    """The call to the log that a thread is in, if it is in one."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.current: tuple[str, float] | None = None

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        self.current = (name, time.monotonic())
        try:
            yield
        finally:
            self.current = None


class Watchdog:
    """Looks at `watched` every second; a call longer than `limit_s` ends the process by `end`."""

    def __init__(self, watched: Sequence[Calls], limit_s: float, end: Callable[[int], object] = os._exit) -> None:
        self.watched, self.limit_s, self.end = list(watched), limit_s, end

    def run(self, stop: threading.Event) -> None:
        while not stop.wait(min(LOOK_EVERY_S, self.limit_s / 2)):
            for calls in self.watched:
                if (current := calls.current) and time.monotonic() - current[1] > self.limit_s:
                    log.critical(
                        "%s has hung in %s for more than %.0f s: this process ends, and its successor goes on; nothing is lost",
                        calls.owner,
                        current[0],
                        self.limit_s,
                    )
                    self.end(EXIT_CODE)
                    return
