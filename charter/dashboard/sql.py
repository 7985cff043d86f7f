"""SQL, read-only: the store's sandbox, with documented queries to begin with.

A visitor's query runs in a process of its own (`python -m charter.dashboard.sql DATABASE`, the statement on standard input, a
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

from charter.dashboard.desk import WAIT_S, Look
from charter.dashboard.page import plain
from engine.errors import CharterError, DependencyUnreachable, UsageError
from engine.store import QUERY_LIMIT_S, Ask, Store

QUERIES = Path(__file__).with_name("queries.toml")
MOST_ROWS = 200
MOST_BYTES = 4_000_000  # of an answer
GRACE_S = 0.2  # between DuckDB's interruption and the end of the process
TURN = threading.Lock()  # one visitor's query at a time: each may take much memory


@cache
def documented() -> list[dict[str, str]]:
    """{name, sql}: the queries of the pick list."""
    queries: list[dict[str, str]] = tomllib.loads(QUERIES.read_text(encoding="utf-8"))["query"]
    return queries


def tables(ask: Ask) -> dict[str, Any]:
    """The tables and views with their columns."""
    sql = """SELECT table_name AS name, list(column_name ORDER BY ordinal_position) AS columns
             FROM information_schema.columns WHERE table_schema = 'main' GROUP BY 1 ORDER BY 1"""
    return {"tables": ask(sql).records()}


def run(ask: Ask, statement: str) -> dict[str, Any]:
    """The first rows of one statement."""
    started = time.monotonic()
    found = ask(statement, (), MOST_ROWS + 1)
    return {
        "columns": found.columns,
        "rows": found.rows[:MOST_ROWS],
        "more": len(found.rows) > MOST_ROWS,
        "seconds": time.monotonic() - started,
    }


def answered(store: Store, statement: str) -> Look:
    """`run` in a process of its own, which ends with the read limit whatever it does."""
    command = [sys.executable, "-m", "charter.dashboard.sql", str(store.path)]
    with TURN:
        done = subprocess.run(command, input=statement.encode("utf-8", "replace"), capture_output=True, check=False)
    if done.returncode == -signal.SIGALRM:
        why = "a long query would keep the sink waiting"
        return Look(
            None, UsageError(f"the query took longer than {QUERY_LIMIT_S:g} s and was ended", why, "ask for less at once")
        )
    if done.returncode != 0:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or [f"its process ended with {done.returncode}"]
        return Look(None, UsageError("the query could not be run", last[0][:300], "ask for less at once"))
    answer = json.loads(done.stdout)
    if trouble := answer.get("trouble"):
        kind = DependencyUnreachable if answer["exit_code"] == DependencyUnreachable.exit_code else UsageError
        return Look(None, kind(*trouble))
    return Look(answer)


def main(path: str) -> None:
    """Answer the statement on standard input; killed by the alarm `GRACE_S` after the read limit."""
    statement = sys.stdin.buffer.read().decode("utf-8")
    try:
        with Store(Path(path)).reading(wait_s=WAIT_S) as ask:
            signal.setitimer(signal.ITIMER_REAL, QUERY_LIMIT_S + GRACE_S)
            answer = json.dumps(plain(run(ask, statement)), allow_nan=False)
        if len(answer) > MOST_BYTES:
            why = f"it has {len(answer) / 1e6:,.0f} MB, and a page takes {MOST_BYTES / 1e6:.0f}"
            raise UsageError(
                "the answer is too long for a page", why, "choose fewer columns, or type: charter sql --json '...'"
            )
    except CharterError as error:
        answer = json.dumps({"trouble": [error.what, error.why, error.fix], "exit_code": error.exit_code})
    sys.stdout.write(answer)


if __name__ == "__main__":
    main(sys.argv[1])
