"""The dead letters: grouped by what happened to them, looked into, and tried again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engine.errors import CharterError, UsageError
from engine.store import QueryFunction

if TYPE_CHECKING:
    from engine.settings import Settings

_MAX_SHOWN = 20
_MAX_RETRIES = 5_000
_GROUP_COLUMNS = ("stage", "kind", "error")
_OPEN_CONDITION = "record_id NOT IN (SELECT dead_letter_id FROM dead_letter_retries)"


def load_dead_letters(query: QueryFunction, run: str, filters: Mapping[str, str]) -> dict[str, Any]:
    """Groups of letters that failed alike and, of the group that is asked for, its newest letters whole."""
    sql = f"""SELECT stage, kind, error_class AS error, count(*) AS letters, count(*) FILTER ({_OPEN_CONDITION}) AS open,
                     min(created_at) AS first, max(created_at) AS last, arg_max(error_message, commit_seq) AS message,
                     list(DISTINCT source_topic ORDER BY source_topic) AS topics
              FROM dead_letters WHERE $run = '' OR run_id = $run GROUP BY ALL ORDER BY open DESC, last DESC"""
    groups = query(sql, {"run": run}, 200).to_dicts()
    shown = [] if not all(filters.get(name) for name in _GROUP_COLUMNS) else _load_newest(query, run, filters)
    return {"run": run, "groups": groups, "group": {name: filters.get(name, "") for name in _GROUP_COLUMNS}, "letters": shown}


def _load_newest(query: QueryFunction, run: str, filters: Mapping[str, str]) -> list[dict[str, Any]]:
    from charter.dead_letters import decode_value

    sql = f"""SELECT record_id, run_id, stage, kind, error_class AS error, error_message AS message, attempts, created_at, {_OPEN_CONDITION} AS open,
                     source_topic, source_partition, source_offset, source_key, value, headers
              FROM dead_letters WHERE stage = $stage AND kind = $kind AND error_class = $error AND ($run = '' OR run_id = $run)
              ORDER BY commit_seq DESC"""
    letters = query(sql, {name: filters[name] for name in _GROUP_COLUMNS} | {"run": run}, _MAX_SHOWN).to_dicts()
    for letter in letters:
        value = bytes(letter.pop("value") or b"")
        letter["bytes"] = len(value)
        try:
            letter["content"] = decode_value(value)
        except CharterError as error:  # the schema registry is away
            letter["content"] = error.what
        letter["key"] = bytes(letter.pop("source_key") or b"").decode("utf-8", "replace")
        letter["headers"] = {h["key"]: bytes(h["value"]).decode("utf-8", "replace") for h in letter["headers"] or []}
    return letters


def load_selected(query: QueryFunction, form: Mapping[str, str]) -> dict[str, Any]:
    """The open letters of a form: one by its id, or a group."""
    if form.get("id"):
        where, values = "record_id = TRY_CAST($id AS UUID)", {"id": form["id"]}
    elif all(form.get(name) for name in _GROUP_COLUMNS):
        where = "stage = $stage AND kind = $kind AND error_class = $error"
        values = {name: form[name] for name in _GROUP_COLUMNS}
        if form.get("run"):
            where, values = f"{where} AND run_id = $run", values | {"run": form["run"]}
    else:
        raise UsageError("the form names no dead letters", "nothing was chosen", "press a button on the page of dead letters")
    found = query(f"SELECT * FROM dead_letters WHERE {where} AND {_OPEN_CONDITION} ORDER BY commit_seq", values, _MAX_RETRIES)
    return {"letters": found.to_dicts()}


def retry_dead_letters(settings: Settings, letters: list[dict[str, Any]]) -> int:
    """Put letters back on their topics; returns how many were not tried again before."""
    from charter.connect import connect_bus
    from charter.dead_letters import publish_retries

    bus = connect_bus(settings)
    try:
        return publish_retries(bus, letters)
    finally:
        bus.close()
