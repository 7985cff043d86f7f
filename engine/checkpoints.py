"""Checkpoints: folders of safetensors with a manifest, written whole or not at all.

`write` saves into a temporary folder beside the target, writes the manifest with a hash over every file, flushes all of it to
disk and renames. `read` verifies the hash, so that what a PolicyUpdate names is what is loaded, and refuses pickled weights.
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
from pathlib import Path
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
    """Let `save` fill a folder, and make it appear at `folder` complete with its manifest."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp's folder is its owner's alone; other workers read checkpoints
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
    """Whether it is the disk's fault. Writers in Rust and C++ give the system's words, not its number."""
    if isinstance(error, OSError) and error.errno in _DISK_FULL_ERRNOS:
        return True
    return any(os.strerror(code) in str(error) for code in _DISK_FULL_ERRNOS)


def make_disk_full_error(checkpoints: Path, why: str) -> CheckpointsFull:
    return CheckpointsFull(
        f"there is no room for a checkpoint in {checkpoints}",
        why.splitlines()[0][:300] if why else "",
        "make room on that disk (train.save_total_limit says how many are kept); nothing was published, and the batch is tried again",
    )


def require_disk_space(checkpoints: Path, model_folder: Path) -> None:
    """Raise CheckpointsFull when the disk has not room for a folder as large as `model`, before hours are spent on it."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    needed, free = _get_folder_size(model_folder), shutil.disk_usage(checkpoints).free
    if free < needed:
        raise make_disk_full_error(checkpoints, f"it takes about {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free")


def _get_folder_size(folder: Path) -> int:
    """The bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def remove_incomplete(checkpoints: Path) -> list[Path]:
    """Remove what killed trainers left half-written; the temporary folders of `write` begin with a dot."""
    left = [path for path in checkpoints.glob(".*-*") if path.is_dir()] if checkpoints.exists() else []
    for path in left:
        shutil.rmtree(path)
    return left


def compute_revision(folder: Path) -> str:
    """The content hash of a model's weights: what every answer of theirs is stamped with."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def locate_checkpoint(uri: str, checkpoints: Path) -> Path:
    """Where the checkpoint of an update is: where it was written or, in a folder that was moved or restored, among ours."""
    written = Path(uri)
    beside = checkpoints / written.name
    return beside if not written.exists() and beside.exists() else written


def read_checkpoint(folder: Path, content_hash: str | None = None) -> Checkpoint:
    """A checkpoint whose files are what its manifest (and `content_hash`, when given) says; raises CharterError."""
    try:
        manifest = json.loads((folder / MANIFEST_FILENAME).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(
            f"{folder} is no checkpoint of ours", f"its {MANIFEST_FILENAME} cannot be read: {error}", "type: charter status"
        ) from error
    _reject_pickles(folder)
    hashed = hash_files(folder)
    wanted = content_hash or manifest.get("content_hash")
    if hashed != wanted:
        raise CharterError(
            f"the checkpoint {folder} is damaged",
            f"its files hash to {hashed[:16]}, not to {str(wanted)[:16]}",
            "restore the folder from a copy; to go on from an earlier policy, type: charter policy rollback",
        )
    return Checkpoint(folder, manifest, hashed)


def hash_files(folder: Path) -> str:
    """SHA-256 over the names and contents of every file but the manifest."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_FILENAME):
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def _reject_pickles(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.suffix in _PICKLE_SUFFIXES:
            raise UsageError(
                f"{path} is a pickle", "loading one can run any code", "save the weights as safetensors and try again"
            )


def fsync_path(path: Path) -> None:
    """Make a file, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
