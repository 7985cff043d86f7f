"""Record whether a server answers, and log it: one line at the first failure, then a status line at intervals.

`ServerHealth.get_wait` returns the same state for `charter status`, the dashboard and the metrics (engine/server_waits.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from engine.text import format_count

logger = logging.getLogger("charter.endpoint")

STATUS_INTERVAL_S = 15.0
_QUIET_TIME_S = 30.0  # requests that wait for longer than this without any response are worth a line


@dataclass(frozen=True)
class ServerWait:
    """Requests to a model on a server wait. `name` is the address and the model. Times are in seconds.

    `reason` is the last failure, or empty if the server only does not respond. `num_failures` is the number of failed attempts of
    all requests since the last response.
    """

    name: str
    waiting_s: float
    reason: str = ""
    num_failures: int = 0
    next_attempt_s: float = 0.0
    pauses_in_s: float = 0.0

    def __str__(self) -> str:
        if not self.num_failures:
            return f"waiting for {self.name}: no response for {self.waiting_s:.0f} s"
        duration = f" in {self.waiting_s:.0f} s" if self.num_failures > 1 else ""
        pause = f"in {self.pauses_in_s:.0f} s" if self.pauses_in_s else "then"
        return (
            f"waiting for {self.name}: {self.reason}; {format_count(self.num_failures, 'failed attempts')}{duration},"
            f" the next in {self.next_attempt_s:.1f} s; the stage pauses {pause}"
        )


class ServerHealth:
    """The health of one model on a server, as its requests show it. Times are in seconds, on the monotonic clock.

    `failing_since` is the time of the first failure after the last response, or None. `answered_at` is the time of the last
    usable response. `answered_start` is the latest start of a request with a usable response. `received_at` is the time of the last
    token of a streamed response. `num_waiting` is the number of requests that wait for their responses, and `waiting_since` is the
    time at which the first of them began to wait. `failure_counts` are the failed attempts by kind. `weight_load_counts` are the
    weights that this process has loaded into the server, by outcome (engine/reloaded_weights.py). The class is thread-safe.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.answered_at = self.answered_start = self.received_at = 0.0
        self.num_waiting = 0
        self.waiting_since = 0.0
        self.failure_counts: Counter[str] = Counter()
        self.weight_load_counts: Counter[str] = Counter()
        self.failing_since: float | None = None
        self.num_failures = 0  # since `failing_since`
        self.reason = ""
        self.next_attempt_at = self.gives_up_at = self.logged_at = 0.0
        self.logged_kinds: set[str] = set()
        self.has_long_outage = False  # whether a status line was logged since `failing_since`
        self.lock = threading.Lock()

    def note_failure(self, kind: str, reason: str, pause_s: float, retry_timeout_s: float) -> None:
        """Record a failed attempt whose next attempt is in `pause_s`. Log the first failure of a kind at once.

        `kind` is a short name of the failure (a status or the class of an error), `reason` describes it.
        """
        with self.lock:
            now = time.monotonic()
            if self.failing_since is None:
                self.failing_since, self.num_failures = now, 0
            self.num_failures += 1
            self.failure_counts[kind] += 1
            self.reason, self.next_attempt_at, self.gives_up_at = reason, now + pause_s, self.failing_since + retry_timeout_s
            if kind not in self.logged_kinds or now - self.logged_at >= STATUS_INTERVAL_S:
                self.logged_kinds.add(kind)
                self._log_waiting(now)

    def note_answer(self, started_at: float) -> None:
        """Record a usable response to a request that was sent at `started_at`."""
        with self.lock:
            self.answered_at, self.answered_start = time.monotonic(), max(self.answered_start, started_at)
            self._end_outage()

    def note_alive(self) -> None:
        """Record that the server answers, although it did not answer a request of a record."""
        with self.lock:
            self._end_outage()

    def note_token(self) -> None:
        """Record that the server has sent a part of a streamed response."""
        self.received_at = time.monotonic()

    @contextmanager
    def track_requests(self, count: int) -> Iterator[None]:
        """Count requests that wait for their responses while the block runs."""
        with self.lock:
            self.waiting_since = self.waiting_since if self.num_waiting else time.monotonic()
            self.num_waiting += count
        try:
            yield
        finally:
            with self.lock:
                self.num_waiting -= count

    def get_wait(self) -> ServerWait | None:
        """Return what the requests wait for: the end of a failure, or any response for a long time. Return None if nothing waits."""
        with self.lock:
            return self._get_wait(time.monotonic())

    def log_status(self) -> None:
        """Log a status line if requests wait and the last line is old enough."""
        with self.lock:
            now = time.monotonic()
            wait = self._get_wait(now)
            if wait is None or now - self.logged_at < STATUS_INTERVAL_S:
                return
            if wait.num_failures:
                self._log_waiting(now)
            elif now - self.logged_at >= wait.waiting_s / 2:
                self.logged_at = now
                logger.warning("%s", wait)

    def _get_wait(self, now: float) -> ServerWait | None:
        if self.failing_since is not None:
            return ServerWait(
                self.name,
                now - self.failing_since,
                self.reason,
                self.num_failures,
                max(0.0, self.next_attempt_at - now),
                max(0.0, self.gives_up_at - now),
            )
        quiet_s = now - max(self.waiting_since, self.answered_at, self.received_at)
        return ServerWait(self.name, quiet_s) if self.num_waiting and quiet_s >= _QUIET_TIME_S else None

    def _log_waiting(self, now: float) -> None:
        wait = self._get_wait(now)
        assert wait is not None
        self.logged_at = now
        self.has_long_outage |= wait.waiting_s > 1
        logger.warning("%s", wait)

    def _end_outage(self) -> None:
        if self.failing_since is not None and self.has_long_outage:
            logger.warning("%s answers again, after %.0f s", self.name, time.monotonic() - self.failing_since)
            self.logged_kinds = set()
        self.failing_since, self.has_long_outage = None, False
