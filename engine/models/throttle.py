"""Limit the load on a server: the number of concurrent requests, the timeout, and the delay that a `Retry-After` header asks for.

The number of concurrent requests adapts to the server (additive increase, multiplicative decrease). A timeout, 429 or 503 halves it.
Each response raises it again, up to the maximum. A timeout also doubles the timeout of later requests. Otherwise a server that is
too slow for the timeout would never finish a request: most servers discard a request whose client disconnects, and a repeated
request starts from the beginning.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

logger = logging.getLogger("charter.endpoint")

_MAX_TIMEOUT_FACTOR = 8.0


@dataclass(frozen=True)
class Slot:
    """The permission to send one request, with the limits at its start.

    `was_alone` means that no other request was in flight at its start.
    """

    started_at: float
    timeout_s: float
    was_alone: bool
    concurrency: int = 1


class Throttle:
    """The limits of one server. The class is thread-safe. Times are in seconds, on the monotonic clock."""

    def __init__(self, name: str, max_concurrency: int, timeout_s: float) -> None:
        self.name, self.max_concurrency, self.first_timeout_s = name, max_concurrency, timeout_s
        self.concurrency = float(max_concurrency)  # the current limit; its integer part is used
        self.timeout_s = timeout_s
        self.retry_at = 0.0
        self.num_active = 0
        self.decreased_at = 0.0
        self.condition = threading.Condition()

    @contextmanager
    def acquire_slot(self) -> Iterator[Slot]:
        """Wait until the server may get another request, and hold its slot."""
        with self.condition:
            while self.num_active >= int(self.concurrency):
                self.condition.wait()
            self.num_active += 1
            slot = Slot(time.monotonic(), self.timeout_s, self.num_active == 1, int(self.concurrency))
        try:
            yield slot
        finally:
            with self.condition:
                self.num_active -= 1
                self.condition.notify_all()

    @property
    def max_timeout_s(self) -> float:
        return _MAX_TIMEOUT_FACTOR * self.first_timeout_s

    @property
    def is_idle(self) -> bool:
        """Whether no request is in flight."""
        with self.condition:
            return self.num_active == 0

    def note_response(self) -> None:
        with self.condition:
            self.concurrency = min(self.max_concurrency, self.concurrency + 1 / self.concurrency)
            self.condition.notify_all()

    def note_overload(self, slot: Slot) -> None:
        """Halve the number of concurrent requests. Requests that started before the last decrease do not count again."""
        with self.condition:
            if slot.started_at < self.decreased_at:
                return
            previous, self.concurrency = int(self.concurrency), max(1.0, self.concurrency / 2)
            self.decreased_at = time.monotonic()
            if int(self.concurrency) < previous:
                logger.warning(
                    "%s is overloaded: the number of concurrent requests is %d now, and rises with each response",
                    self.name,
                    int(self.concurrency),
                )

    def note_timeout(self, slot: Slot) -> None:
        """Give later requests twice the time of this request, up to eight times the first timeout."""
        with self.condition:
            longer_s = min(2 * slot.timeout_s, self.max_timeout_s)
            if longer_s <= self.timeout_s:
                return
            self.timeout_s = longer_s
            logger.warning("%s did not respond within %g s: the timeout is %g s now", self.name, slot.timeout_s, longer_s)

    def delay(self, delay_s: float) -> None:
        """Send no request for this time."""
        with self.condition:
            self.retry_at = max(self.retry_at, time.monotonic() + delay_s)
