"""`charter dlq`: list, show and retry dead letters."""

from __future__ import annotations

from typing import Any

import click

from charter.connect import connect_bus, open_store
from charter.console import common_options, output_options, print_rows
from charter.dead_letters import decode_value, find_dead_letter, publish_retries
from engine.settings import Settings

_DEAD_LETTER_KINDS = ("DECODE", "PERMANENT", "EXHAUSTED", "TOO_LARGE", "CRASH")
_IS_RETRIED_SQL = "record_id IN (SELECT dead_letter_id FROM dead_letter_retries)"


@click.group(invoke_without_command=True)
@output_options
@common_options
def dlq(settings: Settings, output: str) -> None:
    """List, show and retry dead letters.

    A dead letter contains a record that a stage or the sink could not process, and the error. The bytes of the record are
    unchanged. Without a verb, print the list.

    \b
    Examples:
      charter dlq
      charter dlq show 3f2a
      charter dlq retry --kind EXHAUSTED
    """
    if click.get_current_context().invoked_subcommand is None:
        _print_dead_letters(settings, output, None, None, 50)


def _add_filter_options(function: Any) -> Any:
    """Add the options that select dead letters."""
    for option in (
        click.option("--stage", help="Only dead letters of this stage (respond, critique, revise, judge, sink)."),
        click.option(
            "--kind", type=click.Choice(_DEAD_LETTER_KINDS, case_sensitive=False), help="Only dead letters of this kind."
        ),
    ):
        function = option(function)
    return function


@dlq.command("list")
@_add_filter_options
@click.option("-n", "count", type=click.IntRange(1), default=50, show_default=True, help="Number of dead letters.")
@output_options
@common_options
def list_dead_letters(settings: Settings, output: str, stage: str | None, kind: str | None, count: int) -> None:
    """List the newest dead letters.

    Print the source offset, the error, the number of attempts, and whether the record was retried.

    \b
    Examples:
      charter dlq list --stage judge -n 5
      charter dlq list --json
    """
    _print_dead_letters(settings, output, stage, kind, count)


def _build_where_clause(stage: str | None, kind: str | None) -> tuple[str, list[Any]]:
    """Return an SQL condition and its parameters."""
    pairs = [("stage = ?", stage), ("kind = ?", kind)]
    clauses = [clause for clause, value in pairs if value is not None]
    return " AND ".join(["TRUE", *clauses]), [value for _, value in pairs if value is not None]


def _print_dead_letters(settings: Settings, output: str, stage: str | None, kind: str | None, count: int) -> None:
    where, values = _build_where_clause(stage, kind)
    sql = f"""SELECT record_id AS id, stage, kind, error_class AS error, error_message AS message,
                     source_topic || '[' || source_partition || ']@' || source_offset AS came_from, attempts, created_at,
                     CASE WHEN {_IS_RETRIED_SQL} THEN 'retried' ELSE 'open' END AS state
              FROM dead_letters WHERE {where} ORDER BY commit_seq DESC LIMIT {int(count)}"""
    result = open_store(settings).query(sql, values, limit_s=10.0)
    if output or result.rows:
        print_rows(result.columns, result.rows, output)
    else:
        click.echo("no dead letters")


@dlq.command()
@click.argument("identifier", metavar="ID")
@output_options
@common_options
def show(settings: Settings, identifier: str, output: str) -> None:
    """Show one dead letter with its error, headers and value.

    A value that cannot be decoded is printed in hexadecimal. ID is the id of a dead letter or a unique prefix of the id.

    \b
    Examples:
      charter dlq show 3f2a
    """
    row = find_dead_letter(open_store(settings), identifier)
    value = bytes(row.pop("value") or b"")
    row |= {
        "value_bytes": len(value),
        "value": decode_value(value),
        "source_key": bytes(row["source_key"] or b"").decode("utf-8", "replace"),
    }
    row["headers"] = {h["key"]: bytes(h["value"]).decode("utf-8", "replace") for h in row["headers"] or []}
    print_rows(list(row), [tuple(row.values())], output)


@dlq.command()
@click.argument("identifiers", metavar="[ID...]", nargs=-1)
@_add_filter_options
@click.option("--all", "everything", is_flag=True, help="Retry all dead letters.")
@common_options
def retry(settings: Settings, identifiers: tuple[str, ...], everything: bool, stage: str | None, kind: str | None) -> None:
    """Publish the records of dead letters to their topics again.

    Each record is published unchanged, with a header that names the failed stage. Other stages skip this record. A dead letter can
    be retried only once. If the record fails again, it becomes a new dead letter.

    \b
    Examples:
      charter dlq retry 3f2a
      charter dlq retry --stage judge --kind EXHAUSTED
      charter dlq retry --all
    """
    if not (identifiers or everything or stage or kind):
        raise click.UsageError("select dead letters: give IDs, --stage, --kind or --all", click.get_current_context())
    store = open_store(settings)
    if identifiers:
        dead_letters = [find_dead_letter(store, identifier) for identifier in identifiers]
    else:
        where, values = _build_where_clause(stage, kind)
        sql = f"SELECT * FROM dead_letters WHERE {where} ORDER BY commit_seq"
        dead_letters = store.query_dicts(sql, values, limit_s=60.0)
    bus = connect_bus(settings)
    num_published = publish_retries(bus, dead_letters)
    bus.close()
    num_skipped = len(dead_letters) - num_published
    click.echo(f"published again: {num_published}" + (f"; already retried: {num_skipped}" if num_skipped else ""))


COMMAND = dlq
