"""Let one process at a time write to a lake, and remember the lakes of a data folder.

1. Exports from one data folder use a file lock.
2. Then the process writes a claim into the lake, with a new name, and lists all claims. If there is another claim, it deletes its
   own claim and stops. Files that were written are listed at once, so of two processes at least one sees the claim of the other.
   This needs no operation that an object store lacks.

A killed process leaves its claim. The next export from the same data folder deletes it, because it holds the file lock. An export
from another data folder is refused until the claim is deleted with `--take-over`.

The data folder remembers each lake that it was exported to, so that `charter erase` also rewrites the lakes.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from charter.lake.storage import LakeStorage
from engine.checkpoints import fsync_path
from engine.errors import LakeBusy, UsageError
from engine.instances import FileLock

LAKES_FOLDER = "lakes"
_CLAIMS_FOLDER = "_charter/claims"


@dataclass(frozen=True)
class LakeAddress:
    """Where a lake is. If `is_iceberg`, its tables are in a namespace of a catalog; without a name, the catalog is in the lake."""

    url: str
    is_iceberg: bool = False
    catalog: str = ""
    namespace: str = "charter"

    @property
    def file_name(self) -> str:
        """The name of the files of this lake in the data folder."""
        return hashlib.sha256(self.url.encode()).hexdigest()[:16]

    def make_command(self) -> str:
        """Return the command that exports to this lake."""
        options = [f"--catalog {self.catalog}"] if self.catalog else ["--iceberg"] if self.is_iceberg else []
        options += [f"--namespace {self.namespace}"] if self.namespace != LakeAddress.namespace else []
        return " ".join([f"charter export lake '{self.url}'", *options])


def normalize_url(url: str) -> str:
    """Return the URL of a lake. A local folder becomes an absolute path."""
    return url.rstrip("/") if "://" in url else str(Path(url).resolve())


def list_lakes(data_folder: Path) -> list[LakeAddress]:
    """Return the lakes that this data folder was exported to."""
    paths = sorted((data_folder / LAKES_FOLDER).glob("*.json"))
    return [LakeAddress(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def require_one_lake(data_folder: Path, address: LakeAddress) -> None:
    """Raise UsageError if this data folder has a lake of another kind, catalog or namespace at the same URL.

    The data folder remembers one lake for each URL, so an erasure would not reach the other lake.
    """
    for other in list_lakes(data_folder):
        if other.url == address.url and other != address:
            raise UsageError(
                f"{address.url} already has another lake of {data_folder}, made by: {other.make_command()}",
                "a URL can have one lake; with two, charter erase would not reach one of them",
                f"give another URL; if the other lake is deleted, type: {other.make_command()} --forget",
            )


def remember_lake(data_folder: Path, address: LakeAddress) -> None:
    """Note a lake in the data folder. After this, `charter erase` never leaves out the lake."""
    path = data_folder / LAKES_FOLDER / f"{address.file_name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(asdict(address), indent=1), encoding="utf-8")
    fsync_path(temporary)
    temporary.rename(path)
    fsync_path(path.parent)


def forget_lake(data_folder: Path, address: LakeAddress) -> bool:
    """Remove a lake from the data folder. Return whether the data folder had it."""
    path = data_folder / LAKES_FOLDER / f"{address.file_name}.json"
    is_known = path.exists()
    path.unlink(missing_ok=True)
    return is_known


@dataclass
class LakeClaim:
    """The right of this process to write to a lake. `was_interrupted` is true if a killed process had it before."""

    storage: LakeStorage
    writer: str = field(default_factory=lambda: uuid.uuid4().hex)
    was_interrupted: bool = False

    @property
    def name(self) -> str:
        return f"{_CLAIMS_FOLDER}/{self.writer}.json"

    def require_valid(self) -> None:
        """Raise LakeBusy if another process has deleted this claim (`--take-over`)."""
        if self.name not in self.storage.list_names(_CLAIMS_FOLDER):
            raise LakeBusy(
                f"this process may no longer write to {self.storage.url}",
                "another export has taken over the lake (--take-over)",
                "type the same command again when the other export has ended",
            )


@contextmanager
def claim_lake(
    storage: LakeStorage, data_folder: Path, address: LakeAddress, *, take_over: bool = False
) -> Iterator[LakeClaim]:
    """Hold the right to write to a lake. Raise LakeBusy if another process has it."""
    lock = FileLock(data_folder / LAKES_FOLDER / f"{address.file_name}.lock")
    try:
        if not lock.try_acquire():
            raise LakeBusy(
                f"process {lock.get_holder_pid()} writes to {address.url}",
                "one process at a time may write to a lake",
                "wait until it has ended, then type the same command again",
            )
        claim = LakeClaim(storage)
        owner = _read_owner(data_folder, lock)
        values = {
            "owner": owner, "host": socket.gethostname(), "pid": os.getpid(), "data_folder": str(data_folder.resolve()),
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        storage.write(claim.name, json.dumps(values, indent=1).encode())
        try:
            _remove_other_claims(claim, owner, take_over)
            yield claim
        finally:
            storage.delete(claim.name)
    finally:
        lock.close()


def _read_owner(data_folder: Path, lock: FileLock) -> str:
    """Return an id of this data folder. A copy of the folder has another id, because its lock is another file."""
    path = data_folder / LAKES_FOLDER / "owner"
    if not path.exists():
        path.write_text(uuid.uuid4().hex, encoding="utf-8")
    return f"{path.read_text(encoding='utf-8')}-{os.fstat(lock.descriptor).st_ino}"


def _remove_other_claims(claim: LakeClaim, owner: str, take_over: bool) -> None:
    """Delete the claims of killed processes. Raise LakeBusy if another data folder has a claim."""
    for name in claim.storage.list_names(_CLAIMS_FOLDER):
        if name == claim.name or not name.endswith(".json"):  # a local claim that is not completely written has another name
            continue
        other = json.loads(claim.storage.read(name).to_pybytes())
        if other["owner"] != owner and not take_over:
            raise LakeBusy(
                f"another export writes to {claim.storage.url}: process {other['pid']} on {other['host']},"
                f" data folder {other['data_folder']}, since {other['started_at']}",
                "one process at a time may write to a lake",
                "wait until it has ended; if it was killed, type the same command with --take-over",
            )
        claim.storage.delete(name)
        claim.was_interrupted = True
