"""Run read-only queries for the SQL view, in the sandbox of the store. The view also offers example queries.

A query of a user runs in a subprocess (`python -m charter.dashboard.sql_view DATABASE`). The subprocess reads the statement from
standard input and writes JSON to standard output. A subprocess is necessary because DuckDB cannot interrupt a query while
DuckDB builds one value: `SELECT range(100000000)` takes 20 s and 7 GB of memory for one value. At the limit, the operating
system kills the subprocess. The end of the subprocess releases the database file and the memory.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from charter.dashboard.query_cache import LOCK_TIMEOUT_S, CachedResult
from charter.dashboard.rendering import to_json_value
from engine.errors import CharterError, DependencyUnreachable, UsageError
from engine.store import QUERY_LIMIT_S, QueryFunction, Store

_QUERIES_FILE = Path(__file__).with_name("queries.toml")
_MAX_ROWS = 200
_MAX_RESULT_BYTES = 4_000_000  # maximum size of the JSON output
_KILL_GRACE_S = 0.2  # DuckDB interrupts a query at QUERY_LIMIT_S; after this additional time, the alarm kills the process
_QUERY_LOCK = threading.Lock()  # only one subprocess at a time, because a query can use much memory


@cache
def load_example_queries() -> list[dict[str, str]]:
    """Return the example queries as {name, sql}."""
    queries: list[dict[str, str]] = tomllib.loads(_QUERIES_FILE.read_text(encoding="utf-8"))["query"]
    return queries


def load_tables(query: QueryFunction) -> dict[str, Any]:
    """Return the tables and views with their columns."""
    sql = """SELECT table_name AS name, list(column_name ORDER BY ordinal_position) AS columns
             FROM information_schema.columns WHERE table_schema = 'main' GROUP BY 1 ORDER BY 1"""
    return {"tables": query(sql).to_dicts()}


def run_statement(query: QueryFunction, statement: str) -> dict[str, Any]:
    """Run one statement and return its first rows."""
    started = time.monotonic()
    result = query(statement, (), _MAX_ROWS + 1)
    return {
        "columns": result.columns,
        "rows": result.rows[:_MAX_ROWS],
        "truncated": len(result.rows) > _MAX_ROWS,
        "duration_s": time.monotonic() - started,
    }


def run_in_subprocess(store: Store, statement: str) -> CachedResult:
    """Run a statement in a subprocess. The subprocess is killed at the read limit."""
    command = [sys.executable, "-m", "charter.dashboard.sql_view", str(store.path)]
    with _QUERY_LOCK:
        process = subprocess.run(command, input=statement.encode("utf-8", "replace"), capture_output=True, check=False)
    if process.returncode == -signal.SIGALRM:
        error = UsageError(
            f"the query took longer than {QUERY_LIMIT_S:g} s and was stopped",
            "a long query blocks the writes of the sink",
            "add a LIMIT or a WHERE clause, or type: charter sql '...'",
        )
        return CachedResult(None, error)
    if process.returncode != 0:
        last_line = process.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or [
            f"the process exited with code {process.returncode}"
        ]
        return CachedResult(None, UsageError("the query failed", last_line[0][:300], "reduce the size of the result"))
    output = json.loads(process.stdout)
    if error_lines := output.get("error"):
        error_class = DependencyUnreachable if output["exit_code"] == DependencyUnreachable.exit_code else UsageError
        return CachedResult(None, error_class(*error_lines))
    return CachedResult(output)


def main(path: str) -> None:
    """Run the statement from standard input and print JSON. SIGALRM kills the process at the read limit plus `_KILL_GRACE_S`."""
    statement = sys.stdin.buffer.read().decode("utf-8")
    try:
        with Store(Path(path)).open_read_session(lock_timeout_s=LOCK_TIMEOUT_S) as query:
            signal.setitimer(signal.ITIMER_REAL, QUERY_LIMIT_S + _KILL_GRACE_S)
            output = json.dumps(to_json_value(run_statement(query, statement)), allow_nan=False)
        if len(output) > _MAX_RESULT_BYTES:
            why = f"it has {len(output) / 1e6:,.0f} MB; the limit is {_MAX_RESULT_BYTES / 1e6:.0f} MB"
            raise UsageError(
                "the result is too long for a page", why, "select fewer columns, or type: charter sql --json '...'"
            )
    except CharterError as error:
        output = json.dumps({"error": [error.what, error.why, error.fix], "exit_code": error.exit_code})
    sys.stdout.write(output)


if __name__ == "__main__":
    main(sys.argv[1])
