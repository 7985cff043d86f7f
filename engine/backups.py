"""Create a snapshot of the database or a backup of the data folder, and restore a backup.

If a DuckDB file is copied while it is being written, the copy can miss rows. So the file is copied while the access lock is
held for reading. At that time the sink has closed the file, and the file contains all its commits. New records stay in the log.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from engine.bus import embedded
from engine.checkpoints import fsync_path
from engine.database_paths import require_supported_path
from engine.errors import UsageError
from engine.progress import WorkProgress
from engine.store import Store, check_format_version, open_connection

_DATABASE_FILENAME = "charter.duckdb"
_CHECKPOINTS_FOLDER = "checkpoints"
_LAKES_FOLDER = "lakes"  # charter/lake/claims.py
_MANIFEST_FILENAME = "backup.json"
_LOCK_TIMEOUT_S = 60.0
_BYTES_PER_MEGABYTE = 1_000_000
_COPY_BLOCK_MEGABYTES = 16


def create_snapshot(store: Store, target: Path, progress: WorkProgress) -> int:
    """Copy the database to `target`. The file appears at `target` only when it is complete. Return the number of records."""
    require_supported_path(target)
    if target.exists():
        raise UsageError(
            f"{target} already exists", "a snapshot never overwrites a file", "give another name, or remove the file"
        )
    if not store.path.exists():
        raise UsageError(f"there is no database at {store.path} yet", "the sink creates the database", "type: charter run")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    progress.start_step("copying the database")
    with store.access_lock.read_lock(_LOCK_TIMEOUT_S):
        with open_connection(
            store.path, read_only=True
        ) as connection:  # raises an error if another program or version created the file
            check_format_version(connection, store.path)
        # If the sink was killed, the last transactions are in the WAL.
        sources = [path for suffix in ("", ".wal") if (path := store.path.with_name(store.path.name + suffix)).exists()]
        progress.start_step("copying the database", sum(_get_megabytes(source) for source in sources))
        for source in sources:
            _copy_file(source, temporary.with_name(temporary.name + source.name.removeprefix(store.path.name)), progress)
    progress.start_step("verifying the copy")
    with open_connection(temporary, read_only=False) as connection:  # opening the copy verifies it and merges the WAL into it
        check_format_version(connection, temporary)
        ((records,),) = connection.execute("SELECT next_seq FROM raw.sink_state").fetchall()
    fsync_path(temporary)
    temporary.rename(target)
    return int(records)


def _get_megabytes(path: Path) -> int:
    return math.ceil(path.stat().st_size / _BYTES_PER_MEGABYTE)


def _copy_file(source: Path, target: Path, progress: WorkProgress) -> None:
    """Copy the content of a file. `progress` counts the megabytes."""
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(_COPY_BLOCK_MEGABYTES * _BYTES_PER_MEGABYTE):
            writer.write(block)
            progress.num_done += math.ceil(len(block) / _BYTES_PER_MEGABYTE)


def create_backup(folder: Path, target: Path, bus_folder: Path | None, progress: WorkProgress) -> dict[str, object]:
    """Copy a data folder and its embedded log to the new folder `target`. Return the manifest of the backup.

    The database is copied before the log. So the log contains every record of the database, and the sink can continue after a
    restore. A log on Kafka is not copied; use Kafka's replication.
    """
    if not (folder / _DATABASE_FILENAME).exists() and not (bus_folder and (bus_folder / embedded.LOG_FILENAME).exists()):
        raise UsageError(
            f"there is nothing to back up in {folder}",
            "the folder has no database and no log",
            "give the data folder: --data FOLDER",
        )
    if target.exists():
        raise UsageError(
            f"{target} already exists", "a backup never overwrites a folder", "give another name, or remove the folder"
        )
    require_supported_path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        manifest: dict[str, object] = {"created_at": datetime.now(UTC).isoformat()}
        store = Store(folder / _DATABASE_FILENAME)
        if store.path.exists():
            manifest["records"] = create_snapshot(store, temporary / _DATABASE_FILENAME, progress)
        if bus_folder is not None and (bus_folder / embedded.LOG_FILENAME).exists():
            progress.start_step("copying the log")  # in one step, so that writers cannot make SQLite start again
            manifest["messages"] = _copy_log(bus_folder / embedded.LOG_FILENAME, temporary / embedded.LOG_FILENAME)
        # `charter erase` on the restored folder also rewrites the lakes.
        for path in (folder / _LAKES_FOLDER).glob("*.json"):
            (temporary / _LAKES_FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(path, temporary / _LAKES_FOLDER / path.name)
        checkpoints = folder / _CHECKPOINTS_FOLDER
        manifest["checkpoints"] = _copy_checkpoints(checkpoints, temporary / _CHECKPOINTS_FOLDER, progress)
        (temporary / _MANIFEST_FILENAME).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        temporary.chmod(0o755)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(target.parent)
    return manifest


def _copy_log(source: Path, target: Path) -> int:
    """Copy the embedded log. The copy is consistent even if other processes write to the log. Return the number of messages."""
    with closing(sqlite3.connect(source, timeout=embedded.BUSY_TIMEOUT_S)) as db, closing(sqlite3.connect(target)) as copy:
        db.backup(copy)
        (messages,) = copy.execute("SELECT count(*) FROM messages").fetchone()
    return int(messages)


def _copy_checkpoints(source: Path, target: Path, progress: WorkProgress) -> list[str]:
    """Copy every complete checkpoint. Return their names. The name of an incomplete checkpoint starts with a dot."""
    names = sorted(p.name for p in source.iterdir() if not p.name.startswith(".")) if source.exists() else []
    folders = [source / name for name in names]
    progress.start_step("copying the checkpoints", sum(map(_get_megabytes, _list_files(folders))))

    def link_or_copy(file: str, copy: str) -> None:
        """Create a hard link to a file, or copy it if this fails. A link is safe, because checkpoints are never modified."""
        try:
            os.link(file, copy)
            progress.num_done += _get_megabytes(Path(file))
        except OSError:
            _copy_file(Path(file), Path(copy), progress)
            shutil.copystat(file, copy)

    for folder in folders:
        shutil.copytree(folder, target / folder.name, copy_function=link_or_copy)
    return names


def _list_files(folders: Iterable[Path]) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def restore_backup(source: Path, folder: Path, report: Callable[[str], None], progress: WorkProgress) -> None:
    """Restore a backup into the new data folder `folder`."""
    if not (source / _MANIFEST_FILENAME).is_file():
        raise UsageError(
            f"{source} is not a backup", f"the folder has no {_MANIFEST_FILENAME}", "give a folder written by charter backup"
        )
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty", "a restore never overwrites data", "give a new folder: --data FOLDER")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    files = [path for path in _list_files([source]) if path != source / _MANIFEST_FILENAME]
    progress.start_step("copying", sum(map(_get_megabytes, files)))

    def copy(file: str, target: str) -> None:
        _copy_file(Path(file), Path(target), progress)
        shutil.copystat(file, target)

    for path in source.iterdir():
        if path.is_dir():
            shutil.copytree(path, temporary / path.name, copy_function=copy)
        elif path.name != _MANIFEST_FILENAME:
            copy(str(path), str(temporary / path.name))
        if path.name != _MANIFEST_FILENAME:
            report(f"restored {path.name}")
    if folder.exists():
        folder.rmdir()
    temporary.chmod(0o755)
    temporary.rename(folder)
