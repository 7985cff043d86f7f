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

POLL_S = 0.005


class Gate:
    """The gate in `folder`. Each use opens its own file descriptors, so threads of one process exclude each other too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def read(self, wait_s: float) -> Iterator[None]:
        """Hold the file for reading; raises StoreBusy when it is not free within `wait_s` seconds."""
        deadline = time.monotonic() + wait_s
        with self.seen("queue") as queue, self.seen("turn") as turn, self.seen("file") as file:
            self.lock(queue, fcntl.LOCK_SH, deadline)
            self.lock(turn, fcntl.LOCK_SH, deadline)
            self.lock(file, fcntl.LOCK_SH, deadline)
            fcntl.flock(turn, fcntl.LOCK_UN)
            fcntl.flock(queue, fcntl.LOCK_UN)
            yield

    @contextmanager
    def write(self, wait_s: float) -> Iterator[None]:
        """Hold the file for writing, ahead of every reader that is not in yet."""
        deadline = time.monotonic() + wait_s
        with self.opened("turn") as turn, self.opened("file") as file:
            self.lock(turn, fcntl.LOCK_EX, deadline)
            self.lock(file, fcntl.LOCK_EX, deadline)
            fcntl.flock(turn, fcntl.LOCK_UN)
            os.ftruncate(file, 0)
            os.pwrite(file, str(os.getpid()).encode(), 0)
            yield

    def readers_wait(self) -> bool:
        """Whether a reader is queueing now."""
        with self.opened("queue") as queue:
            with suppress(BlockingIOError):
                fcntl.flock(queue, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return False
            return True

    def holder(self) -> str:
        """The process id of the last writer, for messages."""
        try:
            return (self.folder / "file").read_text().strip() or "unknown"
        except FileNotFoundError:
            return "unknown"

    @contextmanager
    def seen(self, name: str) -> Iterator[int]:
        """As `opened`; who may only read can take a turn too, once a writer has made the gate: a lock asks for no more."""
        if os.access(self.folder / name, os.R_OK) and not os.access(self.folder / name, os.W_OK):
            descriptor = os.open(self.folder / name, os.O_RDONLY)
            try:
                yield descriptor
            finally:
                os.close(descriptor)
            return
        with self.opened(name) as descriptor:
            yield descriptor

    @contextmanager
    def opened(self, name: str) -> Iterator[int]:
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def lock(self, descriptor: int, kind: int, deadline: float) -> None:
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                return
            if time.monotonic() >= deadline:
                raise StoreBusy(
                    f"the database beside {self.folder} is busy",
                    f"process {self.holder()} writes to it, or a long query holds it",
                    "try again, or look with: charter status",
                )
            time.sleep(POLL_S)
