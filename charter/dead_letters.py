"""`charter dlq`: the dead letters, and how to try them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from charter.options import common_options, json_option, print_rows

if TYPE_CHECKING:
    from engine.bus.port import Bus, ProducerRecord
    from engine.settings import Settings
    from engine.store import Store
    from schemas.records import Record

_BATCH_SIZE = 200
_DEAD_LETTER_KINDS = ("DECODE", "PERMANENT", "EXHAUSTED", "TOO_LARGE", "CRASH")
_IS_RETRIED_SQL = "record_id IN (SELECT dead_letter_id FROM dead_letter_retries)"


@click.group(invoke_without_command=True)
@json_option
@common_options
def dlq(settings: Settings, as_json: bool) -> None:
    """Dead letters: what was given up on, and why.

    Messages that a stage or the sink gave up on, untouched, each with its reason.

    \b
    Examples:
      charter dlq
      charter dlq show 3f2a
      charter dlq retry --kind EXHAUSTED
    """
    if click.get_current_context().invoked_subcommand is None:
        _print_dead_letters(settings, as_json, None, None, 50)


def _add_filter_options(function: Any) -> Any:
    """The options that select dead letters."""
    for option in (
        click.option("--stage", help="Only of this stage (respond, critique, revise, judge, sink)."),
        click.option("--kind", type=click.Choice(_DEAD_LETTER_KINDS, case_sensitive=False), help="Only of this kind."),
    ):
        function = option(function)
    return function


@dlq.command("list")
@_add_filter_options
@click.option("-n", "count", type=click.IntRange(1), default=50, show_default=True, help="How many of the newest.")
@json_option
@common_options
def list_dead_letters(settings: Settings, as_json: bool, stage: str | None, kind: str | None, count: int) -> None:
    """The newest dead letters.

    Where they came from, why, after how many attempts, and whether they were tried again.

    \b
    Examples:
      charter dlq list --stage judge -n 5
      charter dlq list --json
    """
    _print_dead_letters(settings, as_json, stage, kind, count)


def _build_where_clause(stage: str | None, kind: str | None) -> tuple[str, list[Any]]:
    """A WHERE clause and its parameters."""
    pairs = [("stage = ?", stage), ("kind = ?", kind)]
    clauses = [clause for clause, value in pairs if value is not None]
    return " AND ".join(["TRUE", *clauses]), [value for _, value in pairs if value is not None]


def _print_dead_letters(settings: Settings, as_json: bool, stage: str | None, kind: str | None, count: int) -> None:
    from charter.pipeline import open_store

    where, values = _build_where_clause(stage, kind)
    sql = f"""SELECT record_id AS id, stage, kind, error_class AS error, error_message AS message,
                     source_topic || '[' || source_partition || ']@' || source_offset AS came_from, attempts, created_at,
                     CASE WHEN {_IS_RETRIED_SQL} THEN 'tried again' ELSE 'open' END AS state
              FROM dead_letters WHERE {where} ORDER BY commit_seq DESC LIMIT {int(count)}"""
    found = open_store(settings).query(sql, values, limit_s=10.0)
    if as_json or found.rows:
        print_rows(found.columns, found.rows, as_json)
    else:
        click.echo("no dead letters")


@dlq.command()
@click.argument("identifier", metavar="ID")
@json_option
@common_options
def show(settings: Settings, identifier: str, as_json: bool) -> None:
    """One dead letter, whole.

    Its reason, its headers, and its message, decoded where that is possible.

    ID is a dead letter's id, or the beginning of one.

    \b
    Examples:
      charter dlq show 3f2a
    """
    from charter.pipeline import open_store

    row = find_dead_letter(open_store(settings), identifier)
    value = bytes(row.pop("value") or b"")
    row |= {
        "value_bytes": len(value),
        "value": decode_value(value),
        "source_key": bytes(row["source_key"] or b"").decode("utf-8", "replace"),
    }
    row["headers"] = {h["key"]: bytes(h["value"]).decode("utf-8", "replace") for h in row["headers"] or []}
    print_rows(list(row), [tuple(row.values())], as_json)


def decode_value(value: bytes) -> Any:
    """A message as its record or, where it is none, as hexadecimal digits."""
    from schemas.codec import RecordError, decode_any_record

    try:
        return decode_any_record(value).model_dump(mode="json")
    except RecordError:
        return value[:2000].hex(" ")


def find_dead_letter(store: Store, identifier: str) -> dict[str, Any]:
    from charter.pipeline import make_id_pattern
    from engine.errors import UsageError

    found = store.query_dicts(
        "SELECT * FROM dead_letters WHERE record_id::VARCHAR LIKE ?", [make_id_pattern(identifier)], limit_s=10.0
    )
    if len(found) != 1:
        raise UsageError(
            f"{identifier!r} is the beginning of {len(found) or 'no'} dead letters",
            "it must name one",
            "type: charter dlq list",
        )
    return found[0]


@dlq.command()
@click.argument("identifiers", metavar="[ID...]", nargs=-1)
@_add_filter_options
@click.option("--all", "everything", is_flag=True, help="Every one that is open.")
@common_options
def retry(settings: Settings, identifiers: tuple[str, ...], everything: bool, stage: str | None, kind: str | None) -> None:
    """Put messages back for the stage that gave up on them.

    They go on their topic as they were; no other stage sees them again.

    Each is tried again once: a letter that fails again is a new dead letter.

    \b
    Examples:
      charter dlq retry 3f2a
      charter dlq retry --stage judge --kind EXHAUSTED
      charter dlq retry --all
    """
    from charter.pipeline import connect_bus, open_store

    if not (identifiers or everything or stage or kind):
        raise click.UsageError("say which: ids, --stage, --kind or --all", click.get_current_context())
    store = open_store(settings)
    if identifiers:
        letters = [find_dead_letter(store, identifier) for identifier in identifiers]
    else:
        where, values = _build_where_clause(stage, kind)
        letters = store.query_dicts(f"SELECT * FROM dead_letters WHERE {where} ORDER BY commit_seq", values, limit_s=60.0)
    bus = connect_bus(settings)
    again = publish_retries(bus, letters)
    bus.close()
    before = len(letters) - again
    click.echo(f"{again} messages are on their topics again" + (f"; {before} were tried again before" if before else ""))


def publish_retries(bus: Bus, letters: Sequence[dict[str, Any]]) -> int:
    """Publish those that were not tried again yet, each with the record that says so, in transactions."""
    from engine.bus.read import read_values
    from schemas.codec import decode_record
    from schemas.records import DeadLetterRetry

    writer = bus.open_writer("dlq.retry")  # two of these at once fence each other instead of doubling
    try:
        done = {decode_record(value, DeadLetterRetry).dead_letter_id for value in read_values(bus, DeadLetterRetry.topic)}
        fresh = [letter for letter in letters if str(letter["record_id"]) not in done]
        for start in range(0, len(fresh), _BATCH_SIZE):
            writer.commit(
                [message for letter in fresh[start : start + _BATCH_SIZE] for message in _to_producer_records(letter)]
            )
    finally:
        writer.close()
    return len(fresh)


def _to_producer_records(letter: dict[str, Any]) -> list[ProducerRecord]:
    """The original message, meant for the stage that gave up on it alone, and the record of the retry."""
    from engine.bus.port import ProducerRecord
    from engine.worker import TARGET_STAGE_HEADER, to_producer_record

    headers = tuple((h["key"], bytes(h["value"])) for h in letter["headers"] or [] if h["key"] != TARGET_STAGE_HEADER)
    key = bytes(letter["source_key"]) if letter["source_key"] is not None else b""
    value = bytes(letter["value"]) if letter["value"] is not None else None
    message = ProducerRecord(letter["source_topic"], key, value, (*headers, (TARGET_STAGE_HEADER, letter["stage"].encode())))
    return [message, to_producer_record(_make_retry_record(letter))]


def _make_retry_record(letter: dict[str, Any]) -> Record:
    from schemas import ids
    from schemas.records import DeadLetterRetry

    letter_id = str(letter["record_id"])
    return DeadLetterRetry(
        record_id=ids.compute_record_id("retry", [letter_id], ""),
        parent_ids=[letter_id],
        run_id=letter["run_id"],
        stage="retry",
        dead_letter_id=letter_id,
        source_topic=letter["source_topic"],
    )


VERBS = (dlq,)
