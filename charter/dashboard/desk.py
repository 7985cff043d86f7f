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
from engine.store import Ask, Store

WAIT_S = 3.0  # for the sink to step aside
FRESH_S = 1.5  # an answer this young is given again whatever has happened
STANDS_S = 15.0  # an answer about a file that has not changed: rates are of the last minute, and time passes
MOST_KEPT = 64

Stamp = tuple[int, ...] | None
Gather = Callable[[Ask], dict[str, Any]]


@dataclass(frozen=True)
class Look:
    """What a view shows. `trouble` says why there is nothing (`data` is None), or why it is not newer."""

    data: dict[str, Any] | None
    trouble: CharterError | None = None
    stamp: Stamp = None
    at: float = 0.0


class Desk:
    """Answers views from `store`."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.lock = threading.Lock()
        self.kept: OrderedDict[Hashable, Look] = OrderedDict()

    def look(self, key: Hashable, gather: Gather) -> Look:
        """The view `key`: remembered, or gathered now."""
        with self.lock:
            kept, stamp = self.kept.get(key), self.stamp()
            age = time.monotonic() - kept.at if kept else STANDS_S
            if kept and (age < FRESH_S or (age < STANDS_S and stamp == kept.stamp)):
                return kept
            try:
                found = Look(self.ask(gather), None, stamp, time.monotonic())
            except CharterError as error:
                return replace(kept, trouble=error) if kept and stamp else Look(None, error)
            self.kept[key] = found
            self.kept.move_to_end(key)
            while len(self.kept) > MOST_KEPT:
                self.kept.popitem(last=False)
            return found

    def once(self, gather: Gather) -> Look:
        """Gathered now and not remembered: somebody's own query."""
        with self.lock:
            try:
                return Look(self.ask(gather))
            except CharterError as error:
                return Look(None, error)

    def ask(self, gather: Gather) -> dict[str, Any]:
        with self.store.reading(wait_s=WAIT_S) as ask:
            return gather(ask)

    def stamp(self) -> Stamp:
        """Which state of the file this is: times and sizes of the database and its write-ahead log. None: there is none."""
        parts: list[int] = []
        for path in (self.store.path, self.store.path.with_name(self.store.path.name + ".wal")):
            try:
                found = path.stat()
            except FileNotFoundError:
                continue
            parts += [found.st_ino, found.st_mtime_ns, found.st_size]
        return tuple(parts) or None
