"""End the process when a call to the log hangs.

Some calls of the Kafka client can block without a timeout (`commit_transaction`, `init_transactions`). A worker in such a call
still sends heartbeats, so it keeps its partitions but does not process records. After the watchdog has ended the process, a
restarted process aborts the open transaction and continues. No record is lost.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

logger = logging.getLogger("charter.watchdog")

_POLL_INTERVAL_S = 1.0
_EXIT_CODE = 3  # a dependency is unreachable


class CallTracker:
    """Stores which call to the log a thread is in, and when the call started."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.current_call: tuple[str, float] | None = None

    @contextmanager
    def track(self, name: str) -> Iterator[None]:
        self.current_call = (name, time.monotonic())
        try:
            yield
        finally:
            self.current_call = None


class Watchdog:
    """Checks `trackers` at least every second. If a call takes longer than `call_timeout_s`, it calls `exit_process`."""

    def __init__(
        self, trackers: Sequence[CallTracker], call_timeout_s: float, exit_process: Callable[[int], object] = os._exit
    ) -> None:
        self.trackers, self.call_timeout_s, self.exit_process = list(trackers), call_timeout_s, exit_process

    def run(self, stop: threading.Event) -> None:
        while not stop.wait(min(_POLL_INTERVAL_S, self.call_timeout_s / 2)):
            for tracker in self.trackers:
                if (current := tracker.current_call) and time.monotonic() - current[1] > self.call_timeout_s:
                    logger.critical(
                        "%s has hung in %s for more than %.0f s: the process ends; restart it to continue, nothing is lost",
                        tracker.owner,
                        current[0],
                        self.call_timeout_s,
                    )
                    self.exit_process(_EXIT_CODE)
                    return
