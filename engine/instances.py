"""Slots: small numbers that processes on one host lease, so that a restarted one gets the name of the one that died.

A worker's group membership and transactional id carry its slot. The successor of a killed worker, under the same name, ends its
open transaction and takes its partitions at once, instead of waiting until they time out. A lease is a file lock: it ends with
its process.
"""

from __future__ import annotations

import fcntl
import os
import socket
from contextlib import suppress
from itertools import count
from pathlib import Path


class FileLock:
    """A file lock that one process at a time holds; it ends with the process."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def try_acquire(self) -> bool:
        """Whether it is ours now."""
        with suppress(BlockingIOError):
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, str(os.getpid()).encode(), 0)
            return True
        return False

    def get_holder_pid(self) -> str:
        return os.pread(self.descriptor, 20, 0).decode() or "unknown"

    def close(self) -> None:
        os.close(self.descriptor)


class InstanceLease:
    """The lowest free slot of this host, held until `close` or the end of the process."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for number in count():
            self.descriptor = os.open(folder / f"{number}.lock", os.O_RDWR | os.O_CREAT, 0o644)
            with suppress(BlockingIOError):
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.name = f"{socket.gethostname()}-{number}"
                return
            os.close(self.descriptor)

    def close(self) -> None:
        os.close(self.descriptor)
