"""`charter sql`: run a read-only query on the database."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import click

from charter.connect import open_store
from charter.console import common_options, output_options, print_rows
from engine.settings import Settings
from engine.store import QueryResult

_SIGNAL_POLL_INTERVAL_S = 0.2


@click.command()
@click.argument("statement", metavar="[SQL]", required=False)
@click.option(
    "--timeout-s",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="Stop the query after this number of seconds.",
)
@click.option("--tables", is_flag=True, help="List the tables and views with their columns.")
@output_options
@common_options
def sql(settings: Settings, statement: str | None, timeout_s: float, tables: bool, output: str) -> None:
    """Query the database, read-only.

    SQL is one DuckDB statement, or - to read it from standard input.

    \b
    Examples:
      charter sql "select * from traces limit 1"
      charter sql "select policy_version, count(*) from responses group by 1"
      charter sql --tables
    """
    if tables and statement:
        raise click.UsageError("--tables cannot be used with a query", click.get_current_context())
    if tables:
        statement = TABLES_SQL
    elif statement == "-":
        statement = sys.stdin.read()
    if not statement:
        raise click.UsageError('give a query, e.g. charter sql "select * from traces limit 1"', click.get_current_context())
    result = _run_interruptible(lambda: open_store(settings).query(statement, limit_s=timeout_s))
    print_rows(result.columns, result.rows, output)


def _run_interruptible(run_query: Callable[[], QueryResult]) -> QueryResult:
    """Run the query in a separate thread. In this way, Ctrl-C ends the process even if DuckDB ignores SIGINT during the
    query."""

    def stop(*_: object) -> None:
        os.write(2, b"\n")
        os._exit(130)  # a read-only query has nothing to clean up

    previous_handler = signal.signal(signal.SIGINT, stop)
    try:
        future = ThreadPoolExecutor(1).submit(run_query)
        # Python runs signal handlers in this thread only between waits. A wait without a timeout could delay Ctrl-C.
        while not wait([future], _SIGNAL_POLL_INTERVAL_S).done:
            pass
        return future.result()
    finally:
        signal.signal(signal.SIGINT, previous_handler)


TABLES_SQL = """SELECT table_name AS name, string_agg(column_name, ', ' ORDER BY ordinal_position) AS columns
            FROM information_schema.columns WHERE table_schema = 'main' GROUP BY 1 ORDER BY 1"""


COMMAND = sql
