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
import uuid
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


SERVICES = ("sink", "trainer", "generator")
_SERVICES_FOLDER = "services"


class ServiceLease:
    """Shows that a service (sink, trainer, generator) of a data folder runs, until `close` or the end of the process.

    It is a locked file. Its name has the service, the host and the process id. The lock is taken before the file gets this name.
    """

    def __init__(self, data_folder: Path, service: str) -> None:
        folder = data_folder / _SERVICES_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        name = uuid.uuid4().hex
        self.path = folder / f"{service}@{socket.gethostname()}@{os.getpid()}@{name}.lock"
        temporary = folder / f".{name}"
        self.descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        temporary.rename(self.path)

    def close(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


def list_running_services(data_folder: Path) -> dict[str, list[str]]:
    """Return the processes of each service that runs on this data folder, such as {"sink": ["myhost, process 4711"]}.

    The files of processes that have ended are removed.
    """
    running: dict[str, list[str]] = {service: [] for service in SERVICES}
    for path in sorted((data_folder / _SERVICES_FOLDER).glob("*.lock")):
        service, host, process, _ = path.stem.split("@")
        if _is_locked(path):
            running[service].append(f"{host}, process {process}")
        else:
            with suppress(PermissionError):  # a user without write permission can also ask
                path.unlink(missing_ok=True)
    return running


def _is_locked(path: Path) -> bool:
    """Return whether a process holds the lock of a file. A shared lock is tried, so that two such tests do not see each other."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
