"""Record whether a server answers, and log it: one line at the first failure, then a status line at intervals."""

from __future__ import annotations

import logging
import threading
import time

from engine.text import format_count

logger = logging.getLogger("charter.endpoint")

STATUS_INTERVAL_S = 15.0
_QUIET_TIME_S = 30.0  # requests that wait for longer than this without any response are worth a line


class ServerHealth:
    """The health of one model on a server, as its requests show it. Times are in seconds, on the monotonic clock.

    `failing_since` is the time of the first failure after the last response, or None. `answered_at` is the time of the last
    usable response. `answered_start` is the latest start of a request with a usable response. The class is thread-safe.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.answered_at = self.answered_start = 0.0
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

    def log_status(self, waiting_since: float) -> None:
        """Log a status line if requests have waited since `waiting_since` and the last line is old enough."""
        with self.lock:
            now = time.monotonic()
            if now - self.logged_at < STATUS_INTERVAL_S:
                return
            if self.failing_since is not None:
                self._log_waiting(now)
            elif (
                quiet_s := now - max(waiting_since, self.answered_at)
            ) >= _QUIET_TIME_S and now - self.logged_at >= quiet_s / 2:
                self.logged_at = now
                logger.warning("waiting for %s: no response for %.0f s", self.name, quiet_s)

    def _log_waiting(self, now: float) -> None:
        assert self.failing_since is not None
        self.logged_at = now
        elapsed_s = now - self.failing_since
        self.has_long_outage |= elapsed_s > 1
        attempts = format_count(self.num_failures, "failed attempts") + (
            f" in {elapsed_s:.0f} s" if self.num_failures > 1 else ""
        )
        left_s = max(0.0, self.gives_up_at - now)
        logger.warning(
            "waiting for %s: %s; %s, the next in %.1f s; the stage pauses %s",
            self.name,
            self.reason,
            attempts,
            max(0.0, self.next_attempt_at - now),
            f"in {left_s:.0f} s" if left_s else "then",
        )

    def _end_outage(self) -> None:
        if self.failing_since is not None and self.has_long_outage:
            logger.warning("%s answers again, after %.0f s", self.name, time.monotonic() - self.failing_since)
            self.logged_kinds = set()
        self.failing_since, self.has_long_outage = None, False
