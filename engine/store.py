"""Open and query the DuckDB file. Only the sink writes the file. All access requires the access lock.

A reader holds the lock for one query or one session. A query that exceeds its time limit is interrupted, so that the sink does
not wait long. Read connections are read-only and have no access to files or the network. SQL statements cannot change this.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import duckdb

from engine.access_lock import AccessLock
from engine.checkpoints import fsync_path
from engine.database_paths import require_supported_path, to_database_path
from engine.errors import DataFolderVersionMismatch, QueryTimeout, StoreBusy, StoreDamaged, StoreFull, UsageError, WalDamaged

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = 14  # of the tables and their meaning; a database with another format is refused
QUERY_LIMIT_S = 2.0
# Queries have no access to files, the network and extensions, and SQL cannot change that. This is set when the file is opened, because
# simultaneous readers of a process share one instance of the database, whose configuration is locked.
_READ_CONFIG = {"enable_external_access": "false", "lock_configuration": "true"}
_LOCK_TIMEOUT_S = 30.0
# The write-ahead log and the files into which DuckDB splits it during a checkpoint. DuckDB reads them when it opens the database.
WAL_SUFFIXES = (".wal", ".wal.checkpoint", ".wal.recovery")
# Parts of DuckDB's error messages about damaged files. DuckDB's Python client has no error class for them.
_WAL_DAMAGE_MESSAGES = ("while replaying", "This WAL was created", "Corrupt WAL")
_FILE_DAMAGE_MESSAGES = ("orrupt", "not a valid DuckDB database file", "Could not read", "Failed to decode")


@dataclass(frozen=True)
class QueryResult:
    """The columns and rows of a query."""

    columns: list[str]
    rows: list[tuple[Any, ...]]

    def to_dicts(self) -> list[dict[str, Any]]:
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


Parameters = Sequence[Any] | Mapping[str, Any]
_Result = TypeVar("_Result")


class QueryFunction(Protocol):
    """Runs one statement in a read session. The result has at most `most` rows, or all rows if `most` is None."""

    def __call__(self, sql: str, parameters: Parameters = (), most: int | None = None) -> QueryResult: ...


class ReadSession:
    """Runs read-only statements on an open connection. `limit_s` limits their total time."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, path: Path, limit_s: float) -> None:
        self.connection, self.path, self.limit_s = connection, path, limit_s
        self.deadline = time.monotonic() + limit_s

    def __call__(self, sql: str, parameters: Parameters = (), most: int | None = None) -> QueryResult:
        def fetch() -> QueryResult:
            cursor = self.connection.execute(sql, parameters)
            columns = [column[0] for column in cursor.description or []]
            rows = [] if not columns else cursor.fetchall() if most is None else cursor.fetchmany(most)
            return QueryResult(columns, rows)

        return self.run(sql, fetch)

    def query_arrow(self, sql: str, parameters: Parameters = ()) -> pa.Table:
        """Run one SELECT and return its rows as an Arrow table."""
        return self.run(sql, lambda: self.connection.sql(sql, params=parameters).to_arrow_table())

    def run(self, sql: str, fetch: Callable[[], _Result]) -> _Result:
        return _run_query(self.connection, self.path, sql, fetch, self.limit_s, self.deadline)


class Store:
    """The database at `path`. Its access lock is a folder next to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.access_lock = AccessLock(path.with_suffix(".lock"))

    def query(
        self, sql: str, parameters: Parameters = (), *, limit_s: float = QUERY_LIMIT_S, lock_timeout_s: float = _LOCK_TIMEOUT_S
    ) -> QueryResult:
        """Run one read-only statement.

        Raise UsageError if the statement is invalid, if it writes, or if it runs longer than `limit_s`. Raise StoreBusy if the
        lock cannot be acquired within `lock_timeout_s`.
        """
        with self.open_read_session(limit_s=limit_s, lock_timeout_s=lock_timeout_s) as query:
            return query(sql, parameters)

    @contextmanager
    def open_read_session(
        self, *, limit_s: float = QUERY_LIMIT_S, lock_timeout_s: float = _LOCK_TIMEOUT_S
    ) -> Iterator[ReadSession]:
        """Hold the lock for several read-only statements. `limit_s` limits their total time.

        Raise the same errors as `query`. After a failed statement the session can still be used.
        """
        with self._open_read_connection(lock_timeout_s) as connection:
            yield ReadSession(connection, self.path, limit_s)

    @contextmanager
    def _open_read_connection(self, lock_timeout_s: float) -> Iterator[duckdb.DuckDBPyConnection]:
        missing = UsageError(
            f"there is no database at {self.path} yet",
            "the sink creates the database when the first records arrive",
            "type: charter demo    or: charter produce FILE, then charter run",
        )
        if not self.path.exists():
            raise missing
        with (
            self.access_lock.read_lock(lock_timeout_s),
            open_connection(self.path, read_only=True, config=_READ_CONFIG) as connection,
        ):
            if not check_format_version(connection, self.path):
                raise missing  # the process that created the file was stopped before it created the tables
            yield connection

    def query_dicts(self, sql: str, parameters: Parameters = (), **limits: float) -> list[dict[str, Any]]:
        """Run `query` and return its rows as dictionaries."""
        return self.query(sql, parameters, **limits).to_dicts()

    @contextmanager
    def open_write_session(
        self, lock_timeout_s: float = _LOCK_TIMEOUT_S, *, create: bool = False
    ) -> Iterator[duckdb.DuckDBPyConnection]:
        """Hold the write lock and open a writable connection.

        If there is no database, create it if `create` is true, otherwise raise StoreDamaged.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.access_lock.write_lock(lock_timeout_s):
            self.require_no_orphaned_wal()
            if not create and not self.path.exists():
                raise StoreDamaged(
                    f"the database {self.path} has disappeared",
                    "the file was deleted or moved after the sink had opened it",
                    "start the sink again; it creates a new database from the records in the log",
                )
            with open_connection(self.path, read_only=False) as connection:
                yield connection

    def create_schema(self) -> None:
        """Create the database, and the missing tables and views. Raise the errors of `open_complete_database`."""
        with self.open_complete_database():
            pass

    @contextmanager
    def open_complete_database(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """Open a write session. Create the database, and the tables and views that are missing in it, if necessary.

        Raise DataFolderVersionMismatch if another version created the database. Raise StoreDamaged if it is damaged.
        """
        from engine.tables import build_create_statements  # slow, and a process that only reads does not need it

        statements = build_create_statements()
        definition_hash = hashlib.sha256("\n".join(statements).encode()).hexdigest()
        with self.open_write_session(create=True) as connection:
            check_format_version(connection, self.path)
            if _read_schema_label(connection) != _build_schema_label(connection, definition_hash):
                _create_tables_and_views(connection, statements, definition_hash)
            yield connection

    def require_no_orphaned_wal(self) -> None:
        """Raise WalDamaged if there is a write-ahead log without a database. DuckDB would delete the write-ahead log."""
        if not self.path.exists() and (wal_paths := self.list_wal_paths()):
            raise WalDamaged(
                f"{wal_paths[0]} exists, but its database {self.path} does not",
                "the database was deleted or moved without its write-ahead log (WAL)",
                f"move the database back, or type: {_make_repair_command(self.path)}",
            )

    def list_wal_paths(self) -> list[Path]:
        """Return the files of the write-ahead log. They exist only if the writer was killed or is writing."""
        paths = (self.path.with_name(self.path.name + suffix) for suffix in WAL_SUFFIXES)
        return [path for path in paths if path.exists()]

    def rewrite(self, lock_timeout_s: float = _LOCK_TIMEOUT_S) -> None:
        """Copy the database to a new file, and replace the old file. Then no erasure is unfinished in this database.

        A deleted row leaves its bytes in free blocks of the file. The new file contains only the rows that still exist. Readers
        wait during the copy. If the process ends during the copy, the old file is unchanged.
        """
        path = self.path.resolve()  # replace the file and not a link to it
        copy = path.with_name(f".{path.name}.copy")
        with self.access_lock.write_lock(lock_timeout_s):
            _remove_database(copy)
            try:
                with open_connection(path, read_only=False) as connection:
                    connection.execute("CHECKPOINT")  # the write-ahead log becomes empty
                    _copy_database(connection, copy)
            except duckdb.Error as error:
                raise_if_disk_full(error, path)
                raise
            shutil.copymode(path, copy)
            fsync_path(copy)
            copy.replace(path)
            fsync_path(path.parent)


def _create_tables_and_views(connection: duckdb.DuckDBPyConnection, statements: Sequence[str], definition_hash: str) -> None:
    connection.begin()
    for statement in statements:
        connection.execute(statement)
    connection.execute(f"COMMENT ON TABLE raw.sink_state IS '{_build_schema_label(connection, definition_hash)}'")
    if connection.execute("SELECT count(*) FROM raw.sink_state").fetchall() == [(0,)]:
        connection.execute("INSERT INTO raw.sink_state VALUES (?, 0, NULL)", [FORMAT_VERSION])
    connection.commit()


def _build_schema_label(connection: duckdb.DuckDBPyConnection, definition_hash: str) -> str:
    """Return a text that changes with the definition of the tables and views, and when one of them is missing."""
    sql = "SELECT (SELECT count(*) FROM duckdb_tables()), (SELECT count(*) FROM duckdb_views() WHERE NOT internal)"
    ((num_tables, num_views),) = connection.execute(sql).fetchall()
    return f"schema {definition_hash}, {num_tables} tables, {num_views} views"


def _read_schema_label(connection: duckdb.DuckDBPyConnection) -> str | None:
    """Return the label that `create_schema` wrote, or None."""
    sql = "SELECT comment FROM duckdb_tables() WHERE schema_name = 'raw' AND table_name = 'sink_state'"
    row = connection.execute(sql).fetchone()
    return row[0] if row else None


def _copy_database(connection: duckdb.DuckDBPyConnection, copy: Path) -> None:
    ((name,),) = connection.execute("SELECT current_database()").fetchall()
    quoted_path = str(copy).replace("'", "''")
    connection.execute(f"ATTACH '{quoted_path}' AS rewritten")
    connection.execute(f'COPY FROM DATABASE "{name}" TO rewritten')
    connection.execute("DELETE FROM rewritten.raw.unfinished_erasures")
    connection.execute("DETACH rewritten")


def _remove_database(path: Path) -> None:
    """Remove a database file and its write-ahead log, if they exist."""
    for suffix in ("", *WAL_SUFFIXES):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


@contextmanager
def open_connection(
    path: Path, *, read_only: bool, config: Mapping[str, str] = MappingProxyType({})
) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a connection to the file. Create the file if it does not exist and `read_only` is false.

    If another program has opened the file, raise StoreBusy with the name of this program. If the file or its write-ahead log is
    damaged, raise StoreDamaged. If DuckDB does not support the path, raise UsageError.
    """
    require_supported_path(path)
    try:
        connection = duckdb.connect(to_database_path(path), read_only=read_only, config=dict(config))
    except duckdb.Error as error:
        raise_if_disk_full(error, path)
        raise_if_damaged(error, path)
        if not isinstance(error, (duckdb.IOException, duckdb.ConnectionException)):
            raise
        if isinstance(error, duckdb.ConnectionException) or "Conflicting lock" in str(error):
            raise StoreBusy(
                f"another program has {path} open",
                _parse_lock_holder(str(error)),
                "close the file in that program and try again",
            ) from error
        if "version number" in str(error):
            raise DataFolderVersionMismatch(
                f"{path} was written by another version of DuckDB",
                _get_first_line(error),
                f"install that version, or replace the file from the log: {_make_repair_command(path)}",
            ) from error
        raise UsageError(
            f"{path} cannot be opened", _get_first_line(error), "change its permissions, or use another folder: --data FOLDER"
        ) from error
    try:
        yield connection
    except duckdb.Error as error:
        raise_if_damaged(error, path)
        raise
    finally:
        connection.close()


def raise_if_damaged(error: BaseException, path: Path) -> None:
    """Raise StoreDamaged if the cause of DuckDB's error is a damaged database file or a damaged write-ahead log (WAL).

    DuckDB checks a block only when it reads the block, so a query can find the damage long after the file was opened.
    """
    message = str(error)
    # Other classes describe an invalid statement, and their messages quote the statement.
    storage_classes = (duckdb.OperationalError, duckdb.InternalError, duckdb.FatalException)
    is_storage_error = type(error) is duckdb.Error or isinstance(error, storage_classes)
    if not is_storage_error or os.strerror(errno.EACCES) in message:
        return
    why = _get_first_line(error)
    fix = f"stop the sink, then type: {_make_repair_command(path)}    (moves the damaged file away; the log has its records)"
    # During the replay of the WAL, DuckDB also reads the database file.
    is_file_error = re.search(rf'Corrupt database file|from file "[^"]*{re.escape(path.name)}"', message)
    if not is_file_error and any(part in message for part in _WAL_DAMAGE_MESSAGES):
        raise WalDamaged(f"the write-ahead log (WAL) of {path} is damaged", why, fix) from error
    if any(part in message for part in _FILE_DAMAGE_MESSAGES):
        raise StoreDamaged(f"the database {path} is damaged", why, fix) from error


def _make_repair_command(path: Path) -> str:
    return f"charter repair --data {path.parent}"


def _get_first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:300]


def raise_if_disk_full(error: BaseException, path: Path) -> None:
    """Raise StoreFull if the cause of DuckDB's error is a full disk."""
    if isinstance(error, duckdb.Error) and any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
        raise StoreFull(
            f"the disk of {path} is full",
            _get_first_line(error),
            "free disk space; the sink then continues automatically, and new records stay in the log until then",
        ) from error


def _parse_lock_holder(error_message: str) -> str:
    """Return the part of DuckDB's message that names the holder of the lock."""
    start = error_message.find("Conflicting lock")
    return error_message[start:].split(". See also")[0] if start >= 0 else error_message.splitlines()[0]


def read_format_version(connection: duckdb.DuckDBPyConnection) -> int | None:
    """Return the format version of a Charter database, or None if another program created the database."""
    try:
        rows = connection.execute("SELECT version FROM raw.sink_state").fetchall()
    except duckdb.CatalogException:  # there is no such table; to list the tables would take longer than to open the file
        return None
    return int(rows[0][0]) if rows else None


def _is_empty_database(connection: duckdb.DuckDBPyConnection) -> bool:
    return connection.execute("SELECT count(*) FROM information_schema.tables").fetchall() == [(0,)]


def check_format_version(connection: duckdb.DuckDBPyConnection, path: Path) -> bool:
    """Return whether the database has a format, and false if it is empty.

    Raise DataFolderVersionMismatch if the database is not empty and its format is not the current format.
    """
    version = read_format_version(connection)
    if version == FORMAT_VERSION or (version is None and _is_empty_database(connection)):
        return version is not None
    raise DataFolderVersionMismatch(
        f"{path} was created by another version of Charter (format {version or 'unknown'}, expected {FORMAT_VERSION})",
        "this version could damage the file",
        f"use another folder (--data FOLDER), or replace the file from the log: {_make_repair_command(path)}",
    )


def _run_query(
    connection: duckdb.DuckDBPyConnection,
    path: Path,
    sql: str,
    fetch: Callable[[], _Result],
    limit_s: float,
    deadline: float,
) -> _Result:
    """Run one statement with `fetch`, and return its result. Interrupt it at `deadline` (on the monotonic clock)."""
    started = time.monotonic()
    timer = threading.Timer(max(0.0, deadline - started), connection.interrupt)
    timer.start()
    try:
        _require_one_statement(connection, sql)
        return fetch()
    except duckdb.InterruptException as error:
        raise QueryTimeout(
            f"the query took longer than {limit_s:g} s and was interrupted",
            f"the query ran for {time.monotonic() - started:.1f} s; the sink must wait during a query",
            "restrict the query, or raise the limit: charter sql --timeout-s 60 '...'",
        ) from error
    except RuntimeError as error:  # DuckDB raises this for Ctrl-C
        if "interrupted" in str(error):
            raise KeyboardInterrupt from error
        raise
    except duckdb.Error as error:
        raise_if_damaged(error, path)
        why = str(error).rstrip("\n ^")  # remove the caret that marks the position of the error
        raise UsageError("the query failed", why, "type: charter sql --tables    (lists tables and columns)") from error
    finally:
        timer.cancel()


def _require_one_statement(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Raise UsageError if `sql` has no statement or several. DuckDB would run all of them and return only the last result."""
    statements = connection.extract_statements(sql)
    if len(statements) != 1:
        raise UsageError(
            f"the query has {len(statements) or 'no'} statements",
            "a query is exactly one statement, because there is one result",
            "run each statement separately: charter sql 'select 1'",
        )
