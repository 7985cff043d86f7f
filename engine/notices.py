"""Report events that change or exclude data: log the first event of each kind, and count all of them.

An event has a kind (`finish_reason`) and a value (`foo`). Its message is logged once per process and value. The counts are the
metric `charter_notices_total` (engine/metrics.py). Values can come from a server or a file, so each kind keeps a limited number
of them; the rest are counted together.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("charter.notices")

_MAX_VALUES_PER_KIND = 50
_MAX_VALUE_LENGTH = 60
_OTHER_VALUES = "(other values)"


class Notices:
    """Counts events by kind and value. It is thread-safe."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._thread = threading.local()

    def report(self, kind: str, value: str, message: str, count: int = 1) -> None:
        """Count `count` events. If the value is new, log the message as a warning."""
        if getattr(self._thread, "is_muted", False):
            return
        key = (kind, value[:_MAX_VALUE_LENGTH])
        with self._lock:
            num_values = sum(known_kind == kind for known_kind, _ in self._counts)
            if key not in self._counts and num_values >= _MAX_VALUES_PER_KIND:
                key = (kind, _OTHER_VALUES)
            is_new = key not in self._counts
            self._counts[key] += count
        if is_new:
            logger.warning("%s (further cases are only counted: charter_notices_total, kind %s)", message, kind)

    @contextmanager
    def mute(self) -> Iterator[None]:
        """Ignore events of this thread in the block, because they repeat events of stored records."""
        self._thread.is_muted = True
        try:
            yield
        finally:
            self._thread.is_muted = False

    def get_counts(self) -> dict[tuple[str, str], int]:
        """Return the number of events by kind and value."""
        with self._lock:
            return dict(self._counts)

    def clear(self) -> None:
        """Forget all events, so that the next event of each value is logged again."""
        with self._lock:
            self._counts.clear()


NOTICES = Notices()  # the events of this process
