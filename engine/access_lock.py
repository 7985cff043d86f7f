"""The gate of the database file: one writer, many readers, and the writer first.

DuckDB locks its file across processes, and two plain readers starve a writer that opens per flush. So Charter's own processes
pass this gate before they open the file. It is three `flock` locks in one folder:

* `turn`   everyone queues here; a writer keeps it while it waits, so that no new reader gets past it;
* `file`   shared by readers, exclusive to the writer, for as long as the database is open;
* `queue`  shared by readers that wait; a writer that yields looks here whether anyone does.

Locks end with their process, so a killed holder never blocks the others. The holder's process id stands in `file`, for
messages.
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
    """The gate in `folder`. Each use opens its own file descriptors, so threads of one process exclude each other too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def read_lock(self, timeout_s: float) -> Iterator[None]:
        """Hold the file for reading; raises StoreBusy when it is not free within `wait_s` seconds."""
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
        """Hold the file for writing, ahead of every reader that is not in yet."""
        deadline = time.monotonic() + timeout_s
        with self.open_lock_file("turn") as turn, self.open_lock_file("file") as file:
            self.acquire_flock(turn, fcntl.LOCK_EX, deadline)
            self.acquire_flock(file, fcntl.LOCK_EX, deadline)
            fcntl.flock(turn, fcntl.LOCK_UN)
            os.ftruncate(file, 0)
            os.pwrite(file, str(os.getpid()).encode(), 0)
            yield

    def has_waiting_readers(self) -> bool:
        """Whether a reader is queueing now."""
        with self.open_lock_file("queue") as queue:
            with suppress(BlockingIOError):
                fcntl.flock(queue, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return False
            return True

    def get_holder_pid(self) -> str:
        """The process id of the last writer, for messages."""
        try:
            return (self.folder / "file").read_text().strip() or "unknown"
        except FileNotFoundError:
            return "unknown"

    @contextmanager
    def open_lock_file_for_reading(self, name: str) -> Iterator[int]:
        """As `opened`; who may only read can take a turn too, once a writer has made the gate: a lock asks for no more."""
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
                    f"the database beside {self.folder} is busy",
                    f"process {self.get_holder_pid()} writes to it, or a long query holds it",
                    "try again, or look with: charter status",
                )
            time.sleep(_POLL_INTERVAL_S)
