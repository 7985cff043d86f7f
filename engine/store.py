"""The DuckDB file: written by the sink alone, read by everyone, always through the gate.

Readers hold the file for one query and give it back; a query that runs longer than its limit is cut, so that the sink is
never kept waiting for long. Read connections are read-only, cannot reach files or the network, and cannot change that.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import duckdb

from engine.access_lock import AccessLock
from engine.errors import DataFolderVersionMismatch, StoreBusy, StoreFull, UsageError
from engine.tables import FORMAT_VERSION, build_create_statements

QUERY_LIMIT_S = 2.0
_LOCK_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class QueryResult:
    """The answer to a query."""

    columns: list[str]
    rows: list[tuple[Any, ...]]

    def to_dicts(self) -> list[dict[str, Any]]:
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


Parameters = Sequence[Any] | Mapping[str, Any]


class QueryFunction(Protocol):
    """Runs one statement of a `reading`, and takes at most `most` of its rows."""

    def __call__(self, sql: str, parameters: Parameters = (), most: int | None = None) -> QueryResult: ...


class Store:
    """The database at `path` (its gate lies beside it)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.access_lock = AccessLock(path.with_suffix(".gate"))

    def query(
        self, sql: str, parameters: Parameters = (), *, limit_s: float = QUERY_LIMIT_S, lock_timeout_s: float = _LOCK_TIMEOUT_S
    ) -> QueryResult:
        """Run one read-only statement.

        Raises UsageError for a statement that is wrong, not a read, or longer than `limit_s` seconds, and StoreBusy when the
        file is not free within `lock_timeout_s` seconds.
        """
        with self.open_read_session(limit_s=limit_s, lock_timeout_s=lock_timeout_s) as ask:
            return ask(sql, parameters)

    @contextmanager
    def open_read_session(
        self, *, limit_s: float = QUERY_LIMIT_S, lock_timeout_s: float = _LOCK_TIMEOUT_S
    ) -> Iterator[QueryFunction]:
        """One hold of the file for several read-only statements, which are cut after `limit_s` seconds together.

        Raises what `query` does; a statement that fails leaves the others to be asked.
        """
        if not self.path.exists():
            raise UsageError(
                f"there is no database at {self.path} yet",
                "the sink makes it when the first records arrive",
                "type: charter demo    or: charter produce FILE, then charter run",
            )
        with self.access_lock.read_lock(lock_timeout_s), open_connection(self.path, read_only=True) as connection:
            check_format_version(connection, self.path)
            _disable_external_access(connection)
            ends = time.monotonic() + limit_s

            def ask(sql: str, parameters: Parameters = (), most: int | None = None) -> QueryResult:
                return _run_query(connection, sql, parameters, limit_s, ends, most)

            yield ask

    def query_dicts(self, sql: str, parameters: Parameters = (), **limits: float) -> list[dict[str, Any]]:
        """`query`, as a list of dictionaries."""
        return self.query(sql, parameters, **limits).to_dicts()

    @contextmanager
    def open_write_session(self, lock_timeout_s: float = _LOCK_TIMEOUT_S) -> Iterator[duckdb.DuckDBPyConnection]:
        """The sink's connection; the database is created when it is not there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.access_lock.write_lock(lock_timeout_s), open_connection(self.path, read_only=False) as connection:
            yield connection

    def create_schema(self) -> None:
        """Create what is missing in the database; raises DataFolderVersion when another version made it."""
        with self.open_write_session() as connection:
            check_format_version(connection, self.path)
            connection.begin()
            for statement in build_create_statements():
                connection.execute(statement)
            if connection.execute("SELECT count(*) FROM raw.sink_state").fetchall() == [(0,)]:
                connection.execute("INSERT INTO raw.sink_state VALUES (?, 0)", [FORMAT_VERSION])
            connection.commit()


@contextmanager
def open_connection(path: Path, *, read_only: bool) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection to the file; raises StoreBusy, naming the holder, when another program has it open."""
    try:
        connection = duckdb.connect(str(path), read_only=read_only)
    except (duckdb.IOException, duckdb.ConnectionException) as error:
        raise_if_disk_full(error, path)
        if isinstance(error, duckdb.IOException) and "lock" not in str(error).lower():
            raise DataFolderVersionMismatch(
                f"{path} cannot be opened",
                str(error).splitlines()[0][:300],
                "move the file away to start a new one: the log still has its records",
            ) from error
        raise StoreBusy(
            f"another program has {path} open", _parse_lock_holder(str(error)), "close it there, then try again"
        ) from error
    try:
        yield connection
    finally:
        connection.close()


def raise_if_disk_full(error: BaseException, path: Path) -> None:
    """Raise StoreFull when DuckDB's error is the disk's."""
    if isinstance(error, duckdb.Error) and any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
        raise StoreFull(
            f"the disk of {path} is full",
            str(error).splitlines()[0][:300],
            "make room; the sink then goes on by itself, and the log has kept what came",
        ) from error


def _parse_lock_holder(error_message: str) -> str:
    """DuckDB's own words on who holds the lock, without its advice."""
    start = error_message.find("Conflicting lock")
    return error_message[start:].split(". See also")[0] if start >= 0 else error_message.splitlines()[0]


def read_format_version(connection: duckdb.DuckDBPyConnection) -> int | None:
    """The format of a database of ours; None if it is none."""
    tables = connection.execute("SELECT table_schema || '.' || table_name FROM information_schema.tables").fetchall()
    rows = connection.execute("SELECT version FROM raw.sink_state").fetchall() if ("raw.sink_state",) in tables else []
    return int(rows[0][0]) if rows else None


def _is_empty_database(connection: duckdb.DuckDBPyConnection) -> bool:
    return connection.execute("SELECT count(*) FROM information_schema.tables").fetchall() == [(0,)]


def check_format_version(connection: duckdb.DuckDBPyConnection, path: Path) -> None:
    found = read_format_version(connection)
    if found == FORMAT_VERSION or (found is None and _is_empty_database(connection)):
        return
    raise DataFolderVersionMismatch(
        f"{path} was made by another version of Charter (its format: {found or 'unknown'}, ours: {FORMAT_VERSION})",
        "reading or writing it could damage it",
        "use another folder: --data FOLDER, or the version of Charter that made it",
    )


def _disable_external_access(connection: duckdb.DuckDBPyConnection) -> None:
    """Tables and views only: no files, no network, no extensions, and no way to allow them again."""
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def _run_query(
    connection: duckdb.DuckDBPyConnection,
    sql: str,
    parameters: Parameters,
    limit_s: float,
    deadline: float,
    max_rows: int | None,
) -> QueryResult:
    """Run one statement, cut at the time `ends` (of the monotonic clock), and take `most` of its rows, None for all."""
    started = time.monotonic()
    timer = threading.Timer(max(0.0, deadline - started), connection.interrupt)
    timer.start()
    try:
        cursor = connection.execute(sql, parameters)
        columns = [column[0] for column in cursor.description or []]
        rows = [] if not columns else cursor.fetchall() if max_rows is None else cursor.fetchmany(max_rows)
        return QueryResult(columns, rows)
    except duckdb.InterruptException as error:
        raise UsageError(
            f"the query took longer than {limit_s:g} s and was cut",
            f"after {time.monotonic() - started:.1f} s; a long query would keep the sink waiting",
            "narrow it, or allow more: charter sql --limit-s 60 '...'",
        ) from error
    except RuntimeError as error:  # DuckDB's own word for a Ctrl-C
        if "interrupted" in str(error):
            raise KeyboardInterrupt from error
        raise
    except duckdb.Error as error:
        why = str(error).rstrip("\n ^")  # without the mark below the place, which is nowhere in one line
        raise UsageError("the query does not work", why, "type: charter sql --tables    (tables and columns)") from error
    finally:
        timer.cancel()
