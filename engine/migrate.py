"""Bringing a data folder that an older version of Charter wrote to this version's format: the database and the embedded log.

Each is copied first, beside itself; a migration that fails leaves the copy, and the original as it was (one transaction).
"""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import duckdb

from engine.bus import embedded
from engine.errors import CharterError, DataFolderVersion
from engine.store import Store, connected, found_version
from engine.tables import VERSION, columns_of, create_statements
from schemas.topics import TOPICS


def migrate_database(store: Store) -> list[str]:
    """Bring the database to this version; returns what was done, nothing if it was there already."""
    path = store.path
    if not path.exists():
        return []
    with store.gate.write(30.0):
        with connected(path, read_only=True) as connection:
            version = found_version(connection)
        if version == VERSION:
            return []
        if version is None or version > VERSION:
            raise newer(path, version, VERSION)
        copy = kept(path, version)
        with connected(path, read_only=False) as connection:
            connection.begin()
            done = add_what_is_missing(connection)
            connection.execute("UPDATE raw.sink_state SET version = ?", [VERSION])
            connection.commit()
    return [f"{path}: format {version} -> {VERSION} (the old one is kept as {copy.name})", *done]


def add_what_is_missing(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """Tables, columns and parts of them that this version's records have more; a row of the old version has NULL there."""
    done = []
    described = connection.execute(
        "SELECT table_name, column_name, data_type FROM duckdb_columns() WHERE schema_name = 'raw'"
    ).fetchall()
    there: dict[str, dict[str, str]] = {}
    for table, column, kind in described:
        there.setdefault(table, {})[column] = kind
    for spec in TOPICS.values():
        if spec.table not in there:
            done.append(f"  new table {spec.table}")
            continue
        for name, kind in columns_of(spec):
            if name not in there[spec.table]:
                connection.execute(f'ALTER TABLE raw.{spec.table} ADD COLUMN "{name}" {kind}')
                done.append(f"  new column {spec.table}.{name}")
            elif without_quotes(there[spec.table][name]) != without_quotes(kind):
                connection.execute(f'ALTER TABLE raw.{spec.table} ALTER COLUMN "{name}" TYPE {kind}')
                done.append(f"  new parts in {spec.table}.{name}")
    for statement in create_statements():
        connection.execute(statement)
    return done


def without_quotes(kind: str) -> str:
    """A type without the quotes around its fields: DuckDB names only some of them so."""
    return kind.replace('"', "")


def migrate_log(folder: Path) -> list[str]:
    """Bring the embedded log to this version; returns what was done."""
    path = folder / embedded.FILE
    if not path.exists():
        return []
    with embedded.translated(path), closing(sqlite3.connect(path, timeout=embedded.BUSY_S, isolation_level=None)) as db:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version == embedded.VERSION:
            return []
        if version > embedded.VERSION or any(step not in embedded.MIGRATIONS for step in range(version, embedded.VERSION)):
            raise newer(path, version, embedded.VERSION)
        copy = path.with_name(f"{path.name}.format-{version}")
        with closing(sqlite3.connect(copy)) as target:
            db.backup(target)
        db.execute("BEGIN IMMEDIATE")
        for step in range(version, embedded.VERSION):
            for statement in embedded.MIGRATIONS[step]:
                db.execute(statement)
        db.execute(f"PRAGMA user_version = {embedded.VERSION}")
        db.execute("COMMIT")
    return [f"{path}: format {version} -> {embedded.VERSION} (the old one is kept as {copy.name})"]


def kept(path: Path, version: int) -> Path:
    """A copy of the file beside it."""
    copy = path.with_name(f"{path.name}.format-{version}")
    if copy.exists():
        raise CharterError(f"{copy} is there already", "an earlier migration has left it", "move it away and try again")
    shutil.copy2(path, copy)
    return copy


def newer(path: Path, found: int | None, ours: int) -> DataFolderVersion:
    return DataFolderVersion(
        f"{path} cannot be migrated: its format is {found if found is not None else 'unknown'}, ours is {ours}",
        "a newer version of Charter, or another program, has made it",
        "use that version, or another folder: --data FOLDER",
    )
