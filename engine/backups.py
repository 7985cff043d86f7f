"""Create a snapshot of the database or a backup of the data folder, and restore a backup.

If a DuckDB file is copied while it is being written, the copy can miss rows. So the file is copied while the access lock is
held for reading. At that time the sink has closed the file, and the file contains all its commits. New records stay in the log.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
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
_MANIFEST_FILENAME = "backup.json"
_LOCK_TIMEOUT_S = 60.0


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
        for suffix in ("", ".wal"):  # if the sink was killed, the last transactions are in the WAL
            if (source := store.path.with_name(store.path.name + suffix)).exists():
                shutil.copyfile(source, temporary.with_name(temporary.name + suffix))
    progress.start_step("checking the copy")
    with open_connection(temporary, read_only=False) as connection:  # opening the copy verifies it and merges the WAL into it
        check_format_version(connection, temporary)
        ((records,),) = connection.execute("SELECT next_seq FROM raw.sink_state").fetchall()
    fsync_path(temporary)
    temporary.rename(target)
    return int(records)


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
            progress.start_step("copying the log")
            manifest["messages"] = _copy_log(bus_folder / embedded.LOG_FILENAME, temporary / embedded.LOG_FILENAME)
        manifest["checkpoints"] = _copy_checkpoints(folder / _CHECKPOINTS_FOLDER, temporary / _CHECKPOINTS_FOLDER, progress)
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
    progress.start_step("copying the checkpoints", len(names))
    for name in names:
        shutil.copytree(source / name, target / name, copy_function=_link_or_copy)
        progress.num_done += 1
    return names


def _link_or_copy(source: str, target: str) -> None:
    """Create a hard link to a file, or copy it if this fails. A link is safe, because checkpoints are never modified."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def restore_backup(source: Path, folder: Path, report: Callable[[str], None]) -> None:
    """Restore a backup into the new data folder `folder`."""
    if not (source / _MANIFEST_FILENAME).is_file():
        raise UsageError(
            f"{source} is not a backup", f"the folder has no {_MANIFEST_FILENAME}", "give a folder written by charter backup"
        )
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty", "a restore never overwrites data", "give a new folder: --data FOLDER")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    for path in source.iterdir():
        if path.is_dir():
            shutil.copytree(path, temporary / path.name)
        elif path.name != _MANIFEST_FILENAME:
            shutil.copy2(path, temporary / path.name)
        if path.name != _MANIFEST_FILENAME:
            report(f"restored {path.name}")
    if folder.exists():
        folder.rmdir()
    temporary.chmod(0o755)
    temporary.rename(folder)
