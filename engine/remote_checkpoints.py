"""Copy checkpoints to and from a URL (train.checkpoint_url): s3://, gs://, or any other file system of fsspec.

The trainer copies a checkpoint before it publishes the policy. The manifest is copied last, so a URL with a manifest is complete. A
process that needs the weights downloads them into the folder `downloads` of its data folder, and compares their hash with that of the
PolicyUpdate before it uses them. So the machines need no shared disk.

fsspec is imported only if a URL is used. Its packages for s3:// and gs:// are s3fs and gcsfs.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from engine.checkpoints import (
    MANIFEST_FILENAME,
    Checkpoint,
    is_disk_full_error,
    is_pickle,
    make_disk_full_error,
    read_checkpoint,
)
from engine.errors import CharterError, CheckpointsUnreachable, UsageError

logger = logging.getLogger("charter.models")

_DOWNLOADS_FOLDER = "downloads"
_MAX_DOWNLOADS = 6  # more than an update of the trainer or a responder uses at the same time
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
# Errors of the libraries of fsspec that are not OSError: their modules and classes.
_ERROR_CLASSES = (("botocore.exceptions", "BotoCoreError"), ("gcsfs.retry", "HttpError"), ("aiohttp", "ClientError"))


def is_url(uri: str) -> bool:
    """Return whether the URI of a checkpoint is a URL and not a folder on this machine."""
    return "://" in uri


def join_url(url: str, name: str) -> str:
    return f"{url.rstrip('/')}/{name}"


def upload_checkpoint(checkpoint: Checkpoint, url: str) -> str:
    """Copy a checkpoint to a folder with its name at `url`. Return the URL of the copy. A complete copy is not repeated.

    Raise CheckpointsUnreachable if the storage fails, and UsageError if there is a checkpoint of another log.
    """
    target = join_url(url, checkpoint.folder.name)
    with _open_filesystem(target) as (files, path):
        if files.exists(f"{path}/{MANIFEST_FILENAME}"):
            copied = json.loads(files.cat_file(f"{path}/{MANIFEST_FILENAME}")).get("content_hash")
            if copied == checkpoint.content_hash:
                return target
            raise UsageError(
                f"{target} has a checkpoint of another data folder",
                f"the hash of its files is {str(copied)[:16]}, that of {checkpoint.folder} is {checkpoint.content_hash[:16]}",
                "set train.checkpoint_url to another URL, one for each data folder",
            )
        names = [name.relative_to(checkpoint.folder) for name in checkpoint.folder.rglob("*") if name.is_file()]
        for name in sorted(names, key=lambda name: (name.name == MANIFEST_FILENAME, name)):
            files.makedirs(f"{path}/{name.as_posix()}".rpartition("/")[0], exist_ok=True)
            files.put_file(str(checkpoint.folder / name), f"{path}/{name.as_posix()}")
    logger.info("copied %s to %s", checkpoint.folder.name, target)
    return target


def remove_remote_checkpoint(url: str) -> None:
    """Remove the copy of a checkpoint, its manifest first. If it does not exist, do nothing."""
    with _open_filesystem(url) as (files, path):
        for part in (f"{path}/{MANIFEST_FILENAME}", path):
            with suppress(FileNotFoundError):
                files.rm(part, recursive=part == path)


def locate_checkpoint(uri: str, checkpoints: Path) -> Path:
    """Return the folder of a checkpoint on this machine. It may not exist.

    The folder is the URI, or, if the data folder was moved, a folder in `checkpoints`. A checkpoint at a URL is in `checkpoints` on
    the machine of the trainer, and otherwise in the folder of the downloads.
    """
    name = uri.rstrip("/").rpartition("/")[2]
    if not is_url(uri):
        original, moved = Path(uri), checkpoints / name
        return moved if not original.exists() and moved.exists() else original
    return checkpoints / name if (checkpoints / name).exists() else checkpoints.parent / _DOWNLOADS_FOLDER / name


def has_checkpoint(uri: str, checkpoints: Path) -> bool:
    """Return whether a checkpoint is on this machine, or can be downloaded."""
    if locate_checkpoint(uri, checkpoints).exists():
        return True
    if not is_url(uri):
        return False
    with _open_filesystem(uri) as (files, path):
        return bool(files.exists(f"{path}/{MANIFEST_FILENAME}"))


def fetch_checkpoint(uri: str, checkpoints: Path, content_hash: str) -> Checkpoint:
    """Return a checkpoint whose files have this hash. Download it if it is at a URL and not on this machine.

    Raise CharterError if its hash differs, CheckpointsUnreachable if it cannot be downloaded, and UsageError if it is no checkpoint.
    """
    folder = locate_checkpoint(uri, checkpoints)
    if is_url(uri) and not folder.exists():
        _download(uri, folder, content_hash)
    checkpoint = read_checkpoint(folder, content_hash)
    if folder.parent.name == _DOWNLOADS_FOLDER:
        with suppress(PermissionError):
            os.utime(folder)
        _remove_old_downloads(folder.parent)
    return checkpoint


def _download(url: str, folder: Path, content_hash: str) -> None:
    """Download a checkpoint. The folder appears only when it is complete and its hash is verified."""
    logger.info("downloading %s", url)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with _open_filesystem(url) as (files, path):
            for name in files.find(path):
                relative = PurePosixPath(name).relative_to(path)
                if is_pickle(relative) or ".." in relative.parts:
                    raise UsageError(
                        f"{url} has the file {relative}, which is not downloaded",
                        "a checkpoint contains safetensors, the tokenizer and the configuration",
                        "remove the file, or publish the checkpoint again",
                    )
                target = temporary / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                files.get_file(name, str(target))
        try:
            read_checkpoint(temporary, content_hash)
        except CharterError as error:
            raise CheckpointsUnreachable(
                f"the checkpoint at {url} is incomplete, or another one",
                error.why,
                "copy it again from the trainer's data folder",
            ) from error
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # another process may have downloaded it in the meantime
                raise
    except OSError as error:
        if is_disk_full_error(error):
            raise make_disk_full_error(folder.parent, str(error)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_old_downloads(downloads: Path) -> None:
    """Remove all downloaded checkpoints except the ones that were used last."""
    used = sorted(
        (path for path in downloads.iterdir() if not path.name.startswith(".")), key=lambda path: path.stat().st_mtime
    )
    for folder in used[:-_MAX_DOWNLOADS]:
        logger.info("removed the download %s", folder.name)
        shutil.rmtree(folder, ignore_errors=True)  # another process may remove it, too


@contextmanager
def _open_filesystem(url: str) -> Iterator[tuple[Any, str]]:
    """Open the file system of a URL. Yield it and the path of the URL in it. Translate its errors to CheckpointsUnreachable."""
    protocol = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs

        files, path = url_to_fs(url)
    except ImportError as error:
        raise UsageError(
            f"the checkpoint URL {url} cannot be used",
            f"a Python package is missing: {error}",
            f"type: pip install fsspec {_PACKAGES.get(protocol, '')}".rstrip(),
        ) from error
    except ValueError as error:
        raise UsageError(
            f"the checkpoint URL {url} cannot be used",
            str(error),
            "set train.checkpoint_url to s3://BUCKET/FOLDER, gs:// or file://",
        ) from error
    try:
        yield files, path
    except _get_error_classes() as error:
        if is_disk_full_error(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointsUnreachable(
            f"the checkpoint URL {url} cannot be used now",
            reason,
            "check the storage, its credentials and train.checkpoint_url; this is tried again",
        ) from error


def _get_error_classes() -> tuple[type[Exception], ...]:
    """Return the errors of a file system: OSError, and those of the libraries that are in use."""
    classes = [getattr(sys.modules[module], name) for module, name in _ERROR_CLASSES if module in sys.modules]
    return (OSError, *classes)
