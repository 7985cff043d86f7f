"""The database, for a page that asks often: by one at a time, briefly remembered, and cut at the read limit.

A view asks all its questions in one hold of the file, which together take at most the store's limit; so a flush of the sink
is never delayed by more. While the file has not changed its last answer stands. When the database cannot be read now, the
last answer is shown with the reason.
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

LOCK_TIMEOUT_S = 3.0  # for the sink to step aside
MIN_REFRESH_INTERVAL_S = 1.5  # an answer this young is given again whatever has happened
MAX_AGE_S = 15.0  # an answer about a file that has not changed: rates are of the last minute, and time passes
_MAX_ENTRIES = 64

_FileStamp = tuple[int, ...] | None
_QueryFunction = Callable[[QueryFunction], dict[str, Any]]


@dataclass(frozen=True)
class CachedResult:
    """What a view shows. `trouble` says why there is nothing (`data` is None), or why it is not newer."""

    data: dict[str, Any] | None
    error: CharterError | None = None
    file_stamp: _FileStamp = None
    loaded_at: float = 0.0


class QueryCache:
    """Answers views from `store`."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.lock = threading.Lock()
        self.entries: OrderedDict[Hashable, CachedResult] = OrderedDict()

    def get_or_run(self, key: Hashable, load: _QueryFunction) -> CachedResult:
        """The view `key`: remembered, or gathered now."""
        with self.lock:
            kept, stamp = self.entries.get(key), self.read_file_stamp()
            age = time.monotonic() - kept.loaded_at if kept else MAX_AGE_S
            if kept and (age < MIN_REFRESH_INTERVAL_S or (age < MAX_AGE_S and stamp == kept.file_stamp)):
                return kept
            try:
                found = CachedResult(self.run_query(load), None, stamp, time.monotonic())
            except CharterError as error:
                return replace(kept, error=error) if kept and stamp else CachedResult(None, error)
            self.entries[key] = found
            self.entries.move_to_end(key)
            while len(self.entries) > _MAX_ENTRIES:
                self.entries.popitem(last=False)
            return found

    def run_once(self, load: _QueryFunction) -> CachedResult:
        """Gathered now and not remembered: somebody's own query."""
        with self.lock:
            try:
                return CachedResult(self.run_query(load))
            except CharterError as error:
                return CachedResult(None, error)

    def run_query(self, load: _QueryFunction) -> dict[str, Any]:
        with self.store.open_read_session(lock_timeout_s=LOCK_TIMEOUT_S) as ask:
            return load(ask)

    def read_file_stamp(self) -> _FileStamp:
        """Which state of the file this is: times and sizes of the database and its write-ahead log. None: there is none."""
        parts: list[int] = []
        for path in (self.store.path, self.store.path.with_name(self.store.path.name + ".wal")):
            try:
                found = path.stat()
            except FileNotFoundError:
                continue
            parts += [found.st_ino, found.st_mtime_ns, found.st_size]
        return tuple(parts) or None
