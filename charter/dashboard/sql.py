"""SQL, read-only: the store's sandbox, with documented queries to begin with."""

from __future__ import annotations

import time
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from engine.store import Ask

QUERIES = Path(__file__).with_name("queries.toml")
MOST_ROWS = 200


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
