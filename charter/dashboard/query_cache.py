"""Cache the results of database queries, because pages refresh often.

* Only one read session is open at a time. A view runs all its queries in one session. The store interrupts a session at its read
  limit (`QUERY_LIMIT_S`), so the dashboard delays a flush of the sink by at most `QUERY_LIMIT_S`.
* A result is valid while the database file does not change, but for at most `MAX_AGE_S`.
* If the database cannot be read, the cache returns the last result and the error.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

from engine.errors import CharterError
from engine.store import QueryFunction, Store

LOCK_TIMEOUT_S = 3.0  # maximum wait while the sink writes
MIN_REFRESH_INTERVAL_S = 1.5  # the cache uses a result newer than this even if the file has changed
MAX_AGE_S = 15.0  # also for an unchanged file, because rates over the last minute change with time
_MAX_ENTRIES = 64

_FileStamp = tuple[int, ...] | None
_QueryFunction = Callable[[QueryFunction], dict[str, Any]]


@dataclass(frozen=True)
class CachedResult:
    """Holds a query result. If `error` is set, `data` is the last earlier result, or None without such a result."""

    data: dict[str, Any] | None
    error: CharterError | None = None
    file_stamp: _FileStamp = None
    loaded_at: float = 0.0


class QueryCache:
    """Runs queries on `store` and caches their results by key."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.lock = threading.Lock()
        self.entries: OrderedDict[Hashable, CachedResult] = OrderedDict()

    def get_or_run(self, key: Hashable, load: _QueryFunction) -> CachedResult:
        """Return the cached result for `key`, or run `load` and cache its result."""
        with self.lock:
            cached, stamp = self.entries.get(key), self.read_file_stamp()
            age = time.monotonic() - cached.loaded_at if cached else MAX_AGE_S
            if cached and (age < MIN_REFRESH_INTERVAL_S or (age < MAX_AGE_S and stamp == cached.file_stamp)):
                return cached
            try:
                result = CachedResult(self.run_query(load), None, stamp, time.monotonic())
            except CharterError as error:
                return replace(cached, error=error) if cached and stamp else CachedResult(None, error)
            self.entries[key] = result
            self.entries.move_to_end(key)
            while len(self.entries) > _MAX_ENTRIES:
                self.entries.popitem(last=False)
            return result

    def run_once(self, load: _QueryFunction) -> CachedResult:
        """Run `load`. Do not read or write the cache."""
        with self.lock:
            try:
                return CachedResult(self.run_query(load))
            except CharterError as error:
                return CachedResult(None, error)

    def run_query(self, load: _QueryFunction) -> dict[str, Any]:
        with self.store.open_read_session(lock_timeout_s=LOCK_TIMEOUT_S) as query:
            return load(query)

    def read_file_stamp(self) -> _FileStamp:
        """Return inode, modification time and size of the database and its write-ahead log. Return None if there is no
        database."""
        parts: list[int] = []
        for path in (self.store.path, self.store.path.with_name(self.store.path.name + ".wal")):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            parts += [status.st_ino, status.st_mtime_ns, status.st_size]
        return tuple(parts) or None
