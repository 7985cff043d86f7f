"""Consistent copies of a data folder: a snapshot of the database for a notebook, a backup of everything, its restoration.

A plain copy of a DuckDB file that someone writes to can silently miss rows. Here the gate is held as a reader for as long as
the copying takes: the sink has then given the file back, everything that it has committed is in it, and the log keeps what
comes.
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
from engine.errors import UsageError
from engine.store import Store, check_format_version, open_connection

_DATABASE_FILENAME = "charter.duckdb"
_CHECKPOINTS_FOLDER = "checkpoints"
_MANIFEST_FILENAME = "backup.json"
_LOCK_TIMEOUT_S = 60.0


def create_snapshot(store: Store, target: Path) -> int:
    """Copy the database to `target`, which appears complete or not at all; returns how many records it has."""
    if target.exists():
        raise UsageError(f"{target} is there already", "a snapshot never overwrites", "give another name, or remove it")
    if not store.path.exists():
        raise UsageError(f"there is no database at {store.path} yet", "the sink makes it", "type: charter run")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    with store.access_lock.read_lock(_LOCK_TIMEOUT_S):
        with open_connection(store.path, read_only=True) as connection:  # no copy of what another program writes, or has made
            check_format_version(connection, store.path)
        for suffix in ("", ".wal"):  # a killed sink leaves its last transactions in the WAL
            if (source := store.path.with_name(store.path.name + suffix)).exists():
                shutil.copyfile(source, temporary.with_name(temporary.name + suffix))
    with open_connection(temporary, read_only=False) as connection:  # folds the WAL in, and shows that the copy can be read
        check_format_version(connection, temporary)
        ((records,),) = connection.execute("SELECT next_seq FROM raw.sink_state").fetchall()
    fsync_path(temporary)
    temporary.rename(target)
    return int(records)


def create_backup(folder: Path, target: Path, bus_folder: Path | None) -> dict[str, object]:
    """Copy a data folder (and its embedded log) to the new folder `target`; returns what is in it.

    The database goes first and the log after it: the log then has everything that the database has, and the sink goes on from
    there. A Kafka log is not copied; it is replicated by its own means.
    """
    if not (folder / _DATABASE_FILENAME).exists() and not (bus_folder and (bus_folder / embedded.LOG_FILENAME).exists()):
        raise UsageError(f"there is nothing to back up in {folder}", "it has no database and no log", "name it: --data FOLDER")
    if target.exists():
        raise UsageError(f"{target} is there already", "a backup never overwrites", "give another name, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        about: dict[str, object] = {"created_at": datetime.now(UTC).isoformat()}
        store = Store(folder / _DATABASE_FILENAME)
        if store.path.exists():
            about["records"] = create_snapshot(store, temporary / _DATABASE_FILENAME)
        if bus_folder is not None and (bus_folder / embedded.LOG_FILENAME).exists():
            about["messages"] = _copy_log(bus_folder / embedded.LOG_FILENAME, temporary / embedded.LOG_FILENAME)
        about["checkpoints"] = _copy_checkpoints(folder / _CHECKPOINTS_FOLDER, temporary / _CHECKPOINTS_FOLDER)
        (temporary / _MANIFEST_FILENAME).write_text(json.dumps(about, indent=2), encoding="utf-8")
        temporary.chmod(0o755)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(target.parent)
    return about


def _copy_log(source: Path, target: Path) -> int:
    """A consistent copy of the embedded log, also while others write to it."""
    with closing(sqlite3.connect(source, timeout=embedded.BUSY_TIMEOUT_S)) as db, closing(sqlite3.connect(target)) as copy:
        db.backup(copy)
        (messages,) = copy.execute("SELECT count(*) FROM messages").fetchone()
    return int(messages)


def _copy_checkpoints(source: Path, target: Path) -> list[str]:
    """Every complete checkpoint; one that is just being written is hidden, and left out."""
    names = sorted(p.name for p in source.iterdir() if not p.name.startswith(".")) if source.exists() else []
    for name in names:
        shutil.copytree(source / name, target / name, copy_function=_link_or_copy)
    return names


def _link_or_copy(source: str, target: str) -> None:
    """Checkpoints are never written to again, so on one disk a second name for the file is a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def restore_backup(source: Path, folder: Path, report: Callable[[str], None]) -> None:
    """Fill the new data folder `folder` from a backup."""
    if not (source / _MANIFEST_FILENAME).is_file():
        raise UsageError(
            f"{source} is no backup", f"it has no {_MANIFEST_FILENAME}", "give a folder that charter backup has made"
        )
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty", "a restoration never overwrites", "give a new one: --data FOLDER")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    for path in source.iterdir():
        if path.is_dir():
            shutil.copytree(path, temporary / path.name)
        elif path.name != _MANIFEST_FILENAME:
            shutil.copy2(path, temporary / path.name)
        if path.name != _MANIFEST_FILENAME:
            report(f"{path.name} is back")
    if folder.exists():
        folder.rmdir()
    temporary.chmod(0o755)
    temporary.rename(folder)
