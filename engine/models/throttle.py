"""Limit the load on a server: the number of concurrent requests, the timeout, and the delay that a `Retry-After` header asks for.

The number of concurrent requests adapts to the server (additive increase, multiplicative decrease, as in TCP):

1. It starts at `_START_CONCURRENCY`. Until the first overload, each response raises it by one. After that, a whole round of
   responses raises it by one.
2. It rises only while the latency holds: a response counts if its latency is below half of the timeout. The latency is the longest
   time without a token, or the duration of a response that is not streamed.
3. A timeout, 429 or 503 halves it. Requests that were sent before the last decrease do not halve it again.

A timeout also doubles the timeout of later requests. Otherwise a server that is too slow for the timeout would never finish a
request: most servers discard a request whose client disconnects, and a repeated request starts from the beginning. After many quick
responses the timeout is halved, down to the setting.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

logger = logging.getLogger("charter.endpoint")

_START_CONCURRENCY = 4
_MAX_TIMEOUT_FACTOR = 8.0
_HOLDING_FRACTION = 0.5  # of the timeout; the concurrency rises while the latency is below
_QUICK_FRACTION = 0.25  # of the timeout; a response is quick if its latency is below
_NUM_QUICK_RESPONSES = 64  # consecutive quick responses after which a raised timeout is halved


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
        self.concurrency = float(min(max_concurrency, _START_CONCURRENCY))  # the current limit; its integer part is used
        self.has_been_overloaded = False
        self.timeout_s = timeout_s
        self.num_quick_responses = 0
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

    def note_response(self, latency_s: float = 0.0) -> None:
        """Raise the number of concurrent requests if the latency is low enough. Lower a raised timeout after many quick responses."""
        with self.condition:
            if latency_s < _HOLDING_FRACTION * self.timeout_s:
                step = 1 / self.concurrency if self.has_been_overloaded else 1.0
                self.concurrency = min(self.max_concurrency, self.concurrency + step)
                self.condition.notify_all()
            self.num_quick_responses = self.num_quick_responses + 1 if latency_s < _QUICK_FRACTION * self.timeout_s else 0
            if self.timeout_s > self.first_timeout_s and self.num_quick_responses >= _NUM_QUICK_RESPONSES:
                self.timeout_s, self.num_quick_responses = max(self.first_timeout_s, self.timeout_s / 2), 0
                logger.warning("%s responds quickly again: the timeout is %g s now", self.name, self.timeout_s)

    def note_overload(self, slot: Slot) -> None:
        """Halve the number of concurrent requests. Requests that started before the last decrease do not count again."""
        with self.condition:
            if slot.started_at < self.decreased_at:
                return
            previous, self.concurrency = int(self.concurrency), max(1.0, self.concurrency / 2)
            self.has_been_overloaded = True
            self.decreased_at = time.monotonic()
            if int(self.concurrency) < previous:
                logger.warning(
                    "%s is overloaded: the number of concurrent requests is %d now, and rises with quick responses",
                    self.name,
                    int(self.concurrency),
                )

    def note_timeout(self, slot: Slot) -> None:
        """Give later requests twice the time of this request, up to eight times the first timeout."""
        with self.condition:
            longer_s = min(2 * slot.timeout_s, self.max_timeout_s)
            if longer_s <= self.timeout_s:
                return
            self.timeout_s, self.num_quick_responses = longer_s, 0
            logger.warning("%s did not respond within %g s: the timeout is %g s now", self.name, slot.timeout_s, longer_s)

    def delay(self, delay_s: float) -> None:
        """Send no request for this time."""
        with self.condition:
            self.retry_at = max(self.retry_at, time.monotonic() + delay_s)
