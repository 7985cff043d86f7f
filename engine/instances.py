"""Lease instance names to the processes of one host. A restarted process gets the name of the process that it replaces.

The group membership and the transactional id of a worker contain its instance name. A restarted worker with the same name
aborts the open transaction of the previous worker. The restarted worker gets the partitions of the previous worker at once,
without waiting for a timeout. A lease is a file lock, so it ends when its process ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
from contextlib import suppress
from itertools import count
from pathlib import Path


class FileLock:
    """A file lock that one process at a time can hold. The lock is released when the process ends."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def try_acquire(self) -> bool:
        """Try to acquire the lock without waiting. Return whether this process has acquired it."""
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
    """The lowest free instance number of a data folder on this host, held until `close` or the end of the process."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # The instance numbers of each data folder start at 0. Several data folders may use one Kafka, so the names must differ.
        folder_id = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=3).hexdigest()
        for number in count():
            self.descriptor = os.open(folder / f"{number}.lock", os.O_RDWR | os.O_CREAT, 0o644)
            with suppress(BlockingIOError):
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.name = f"{socket.gethostname()}-{folder_id}-{number}"
                return
            os.close(self.descriptor)

    def close(self) -> None:
        os.close(self.descriptor)
