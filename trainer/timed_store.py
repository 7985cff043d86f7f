"""Measure how long the trainer waits for the database."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from engine.store import Parameters, QueryFunction, QueryResult, Store
from trainer.consumed import QUERY_TIMEOUT_S


class TimedStore(Store):
    """A timed store measures the total time of its queries, including the wait for the database file.

    Opening the file takes tens of milliseconds. Most queries of the trainer are faster than that. `hold_open` therefore keeps
    the file open for several queries.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.total_query_s = 0.0
        self.open_query: QueryFunction | None = None

    def query(self, sql: str, parameters: Parameters = (), **limits: float) -> QueryResult:
        with self.record_time():
            return self.open_query(sql, parameters) if self.open_query else super().query(sql, parameters, **limits)

    @contextmanager
    def record_time(self) -> Iterator[None]:
        """Add the duration of the block to `total_query_s`."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.total_query_s += time.monotonic() - started

    @contextmanager
    def hold_open(self) -> Iterator[None]:
        """Send all queries inside the block to one connection. Keep the block short, because the sink cannot write during it."""
        with ExitStack() as stack:
            with self.record_time():
                self.open_query = stack.enter_context(self.open_read_session(limit_s=QUERY_TIMEOUT_S))
            try:
                yield
            finally:
                self.open_query = None


class QueryTimer:
    """A query timer measures the wall time since its creation, and the part of this time that was spent on queries."""

    def __init__(self, store: TimedStore) -> None:
        self.store = store
        self.started_at, self.initial_query_s = time.monotonic(), store.total_query_s

    def read(self) -> tuple[float, float, float]:
        """Return the wall time in seconds, the query time in seconds, and the query time as a fraction of the wall time."""
        wall_s = time.monotonic() - self.started_at
        query_s = self.store.total_query_s - self.initial_query_s
        return wall_s, query_s, query_s / max(wall_s, 1e-9)
