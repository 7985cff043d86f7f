"""Write and read checkpoints. A checkpoint is a folder with safetensors and a manifest.

`write_checkpoint` saves the files in a temporary folder next to the target, writes the manifest with a hash over all files,
syncs everything to disk and renames the folder. `read_checkpoint` verifies this hash, so only the weights that the PolicyUpdate
names are loaded. Pickled weights are rejected.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from engine.errors import CharterError, CheckpointsFull, UsageError

MANIFEST_FILENAME = "checkpoint.json"
_DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    manifest: dict[str, Any]
    content_hash: str


def write_checkpoint(folder: Path, save: Callable[[Path], None], manifest: dict[str, Any]) -> Checkpoint:
    """Write a checkpoint at `folder`. The function `save` writes the files. The folder appears only when it is complete.

    Raise CheckpointsFull if the disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp allows only the owner to read, but workers of other users read checkpoints
        save(temporary)
        _reject_pickles(temporary)
        content_hash = hash_files(temporary)
        text = json.dumps(manifest | {"content_hash": content_hash}, indent=2)
        (temporary / MANIFEST_FILENAME).write_text(text, encoding="utf-8")
        for path in [*temporary.rglob("*"), temporary]:
            fsync_path(path)
        temporary.rename(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_disk_full_error(error):
            raise make_disk_full_error(folder.parent, str(error)) from error
        raise
    fsync_path(folder.parent)
    return Checkpoint(folder, manifest, content_hash)


def is_disk_full_error(error: BaseException) -> bool:
    """Return whether the cause of an error is a full disk. Libraries in Rust and C++ report only a message, not an errno."""
    if isinstance(error, OSError) and error.errno in _DISK_FULL_ERRNOS:
        return True
    return any(os.strerror(code) in str(error) for code in _DISK_FULL_ERRNOS)


def make_disk_full_error(checkpoints: Path, why: str) -> CheckpointsFull:
    return CheckpointsFull(
        f"there is not enough disk space for a checkpoint in {checkpoints}",
        why.splitlines()[0][:300] if why else "",
        "free disk space (train.save_total_limit limits the kept checkpoints); nothing was published, and the batch is retried",
    )


def require_disk_space(checkpoints: Path, model_folder: Path) -> None:
    """Raise CheckpointsFull if the free disk space is smaller than the size of `model_folder`. Call this before
    training starts."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    needed, free = _get_folder_size(model_folder), shutil.disk_usage(checkpoints).free
    if free < needed:
        raise make_disk_full_error(
            checkpoints, f"the checkpoint needs about {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free"
        )


def _get_folder_size(folder: Path) -> int:
    """Return the total size of the files in a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def remove_incomplete(checkpoints: Path) -> list[Path]:
    """Remove and return incomplete checkpoints of killed trainers. Their folder names start with a dot."""
    incomplete = [path for path in checkpoints.glob(".*-*") if path.is_dir()] if checkpoints.exists() else []
    for path in incomplete:
        shutil.rmtree(path)
    return incomplete


def compute_revision(folder: Path) -> str:
    """Return the content hash of the weights of a model. Records contain it as the revision of the model."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def read_checkpoint(folder: Path, content_hash: str | None = None) -> Checkpoint:
    """Verify and return a checkpoint. Its hash must be `content_hash`. If `content_hash` is None, use the hash in the manifest.

    Raise CharterError if the hashes differ, and UsageError if the folder is not a checkpoint.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILENAME).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(
            f"{folder} is not a Charter checkpoint",
            f"the file {MANIFEST_FILENAME} cannot be read: {error}",
            "type: charter status",
        ) from error
    _reject_pickles(folder)
    actual = hash_files(folder)
    expected = content_hash or manifest.get("content_hash")
    if actual != expected:
        raise CharterError(
            f"the checkpoint {folder} is damaged",
            f"the hash of its files is {actual[:16]}, expected {str(expected)[:16]}",
            "restore the folder from a copy; to continue from an earlier policy, type: charter policy rollback",
        )
    return Checkpoint(folder, manifest, actual)


def hash_files(folder: Path) -> str:
    """Return the SHA-256 over the names and contents of all files except the manifest."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_FILENAME):
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def is_pickle(path: PurePath) -> bool:
    """Return whether a file has a name of a pickle."""
    return path.suffix in _PICKLE_SUFFIXES


def _reject_pickles(folder: Path) -> None:
    for path in folder.rglob("*"):
        if is_pickle(path):
            raise UsageError(
                f"{path} is a pickle file",
                "a pickle file can run arbitrary code when it is loaded",
                "save the weights as safetensors and try again",
            )


def fsync_path(path: Path) -> None:
    """Sync a file, or the entries of a folder, to disk. Synced data survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
