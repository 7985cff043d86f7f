"""Provide the access lock of the database file. The lock allows one writer or many readers, and the writer has priority.

DuckDB locks its file, and the sink opens the file for each flush. Two alternating readers could keep the file locked all the
time, and the sink could never open it. So Charter's processes acquire this access lock before they open the file. The access
lock consists of three `flock` locks in one folder:

* `turn`   Every process acquires this lock before `file`. A waiting writer holds it, so new readers must wait.
* `file`   Readers hold it shared and the writer holds it exclusively while the database is open.
* `queue`  Waiting readers hold it shared. A writer tests it to detect waiting readers.

The operating system releases the locks when a process ends, so a killed process never blocks other processes. `file` contains
the process id of the last writer, for error messages.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from engine.errors import StoreBusy

_POLL_INTERVAL_S = 0.005


class AccessLock:
    """The access lock in `folder`. Each use opens new file descriptors, so the lock also works between threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def read_lock(self, timeout_s: float) -> Iterator[None]:
        """Hold the lock for reading. Raise StoreBusy if it cannot be acquired within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        with (
            self.open_lock_file_for_reading("queue") as queue,
            self.open_lock_file_for_reading("turn") as turn,
            self.open_lock_file_for_reading("file") as file,
        ):
            self.acquire_flock(queue, fcntl.LOCK_SH, deadline)
            self.acquire_flock(turn, fcntl.LOCK_SH, deadline)
            self.acquire_flock(file, fcntl.LOCK_SH, deadline)
            fcntl.flock(turn, fcntl.LOCK_UN)
            fcntl.flock(queue, fcntl.LOCK_UN)
            yield

    @contextmanager
    def write_lock(self, timeout_s: float) -> Iterator[None]:
        """Hold the lock for writing. Readers that do not hold it yet must wait.

        Raise StoreBusy if the lock cannot be acquired within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        with self.open_lock_file("turn") as turn, self.open_lock_file("file") as file:
            self.acquire_flock(turn, fcntl.LOCK_EX, deadline)
            self.acquire_flock(file, fcntl.LOCK_EX, deadline)
            fcntl.flock(turn, fcntl.LOCK_UN)
            os.ftruncate(file, 0)
            os.pwrite(file, str(os.getpid()).encode(), 0)
            yield

    def has_waiting_readers(self) -> bool:
        """Return whether a reader is waiting."""
        with self.open_lock_file("queue") as queue:
            with suppress(BlockingIOError):
                fcntl.flock(queue, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return False
            return True

    def get_holder_pid(self) -> str:
        """Return the process id of the last writer, for error messages."""
        try:
            return (self.folder / "file").read_text().strip() or "unknown"
        except FileNotFoundError:
            return "unknown"

    @contextmanager
    def open_lock_file_for_reading(self, name: str) -> Iterator[int]:
        """Open a lock file. If it is not writable, open it read-only. `flock` does not need write permission."""
        if os.access(self.folder / name, os.R_OK) and not os.access(self.folder / name, os.W_OK):
            descriptor = os.open(self.folder / name, os.O_RDONLY)
            try:
                yield descriptor
            finally:
                os.close(descriptor)
            return
        with self.open_lock_file(name) as descriptor:
            yield descriptor

    @contextmanager
    def open_lock_file(self, name: str) -> Iterator[int]:
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def acquire_flock(self, descriptor: int, kind: int, deadline: float) -> None:
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                return
            if time.monotonic() >= deadline:
                raise StoreBusy(
                    f"the database next to {self.folder} is busy",
                    f"process {self.get_holder_pid()} is writing to it, or a long query is running",
                    "wait a moment, then type the same command again",
                )
            time.sleep(_POLL_INTERVAL_S)
