"""SQL, read-only: the store's sandbox, with documented queries to begin with.

A visitor's query runs in a process of its own (`python -m charter.dashboard.sql_view DATABASE`, the statement on standard input, a
JSON answer on standard output). DuckDB cannot be interrupted while it builds one value, and `SELECT range(100000000)` builds
one for 20 s in 7 GB: the operating system ends such a process on time, and the hold of the file and the memory with it.
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
_MAX_RESULT_BYTES = 4_000_000  # of an answer
_KILL_GRACE_S = 0.2  # between DuckDB's interruption and the end of the process
_QUERY_LOCK = threading.Lock()  # one visitor's query at a time: each may take much memory


@cache
def load_example_queries() -> list[dict[str, str]]:
    """{name, sql}: the queries of the pick list."""
    queries: list[dict[str, str]] = tomllib.loads(_QUERIES_FILE.read_text(encoding="utf-8"))["query"]
    return queries


def load_tables(query: QueryFunction) -> dict[str, Any]:
    """The tables and views with their columns."""
    sql = """SELECT table_name AS name, list(column_name ORDER BY ordinal_position) AS columns
             FROM information_schema.columns WHERE table_schema = 'main' GROUP BY 1 ORDER BY 1"""
    return {"tables": query(sql).to_dicts()}


def run_statement(query: QueryFunction, statement: str) -> dict[str, Any]:
    """The first rows of one statement."""
    started = time.monotonic()
    found = query(statement, (), _MAX_ROWS + 1)
    return {
        "columns": found.columns,
        "rows": found.rows[:_MAX_ROWS],
        "more": len(found.rows) > _MAX_ROWS,
        "seconds": time.monotonic() - started,
    }


def run_in_subprocess(store: Store, statement: str) -> CachedResult:
    """`run` in a process of its own, which ends with the read limit whatever it does."""
    command = [sys.executable, "-m", "charter.dashboard.sql_view", str(store.path)]
    with _QUERY_LOCK:
        done = subprocess.run(command, input=statement.encode("utf-8", "replace"), capture_output=True, check=False)
    if done.returncode == -signal.SIGALRM:
        why = "a long query would keep the sink waiting"
        return CachedResult(
            None, UsageError(f"the query took longer than {QUERY_LIMIT_S:g} s and was ended", why, "ask for less at once")
        )
    if done.returncode != 0:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or [f"its process ended with {done.returncode}"]
        return CachedResult(None, UsageError("the query could not be run", last[0][:300], "ask for less at once"))
    answer = json.loads(done.stdout)
    if trouble := answer.get("trouble"):
        kind = DependencyUnreachable if answer["exit_code"] == DependencyUnreachable.exit_code else UsageError
        return CachedResult(None, kind(*trouble))
    return CachedResult(answer)


def main(path: str) -> None:
    """Answer the statement on standard input; killed by the alarm `GRACE_S` after the read limit."""
    statement = sys.stdin.buffer.read().decode("utf-8")
    try:
        with Store(Path(path)).open_read_session(lock_timeout_s=LOCK_TIMEOUT_S) as ask:
            signal.setitimer(signal.ITIMER_REAL, QUERY_LIMIT_S + _KILL_GRACE_S)
            answer = json.dumps(to_json_value(run_statement(ask, statement)), allow_nan=False)
        if len(answer) > _MAX_RESULT_BYTES:
            why = f"it has {len(answer) / 1e6:,.0f} MB, and a page takes {_MAX_RESULT_BYTES / 1e6:.0f}"
            raise UsageError(
                "the answer is too long for a page", why, "choose fewer columns, or type: charter sql --json '...'"
            )
    except CharterError as error:
        answer = json.dumps({"trouble": [error.what, error.why, error.fix], "exit_code": error.exit_code})
    sys.stdout.write(answer)


if __name__ == "__main__":
    main(sys.argv[1])
