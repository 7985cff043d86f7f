"""Load the data of the dead letters view, and retry dead letters. The view groups dead letters by stage, kind and error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from charter.connect import connect_bus
from charter.dead_letters import decode_value, publish_retries
from engine.errors import CharterError, UsageError
from engine.settings import Settings
from engine.store import QueryFunction

_MAX_SHOWN = 20
_MAX_RETRIES = 5_000
_GROUP_COLUMNS = ("stage", "kind", "error")
_OPEN_CONDITION = "record_id NOT IN (SELECT dead_letter_id FROM dead_letter_retries)"


def load_dead_letters(query: QueryFunction, run: str, filters: Mapping[str, str]) -> dict[str, Any]:
    """Return the groups of dead letters (same stage, kind and error class), and the newest dead letters of the selected group."""
    sql = f"""SELECT stage, kind, error_class AS error, count(*) AS count, count(*) FILTER ({_OPEN_CONDITION}) AS open,
                     min(created_at) AS first_at, max(created_at) AS last_at, arg_max(error_message, commit_seq) AS message,
                     list(DISTINCT source_topic ORDER BY source_topic) AS topics
              FROM dead_letters WHERE $run = '' OR run_id = $run GROUP BY ALL ORDER BY open DESC, last_at DESC"""
    groups = query(sql, {"run": run}, 200).to_dicts()
    selected = {name: filters.get(name, "") for name in _GROUP_COLUMNS}
    dead_letters = _load_newest(query, run, filters) if all(selected.values()) else []
    return {"run": run, "groups": groups, "selected_group": selected, "dead_letters": dead_letters}


def _load_newest(query: QueryFunction, run: str, filters: Mapping[str, str]) -> list[dict[str, Any]]:

    sql = f"""SELECT record_id, run_id, stage, kind, error_class AS error, error_message AS message, attempts, created_at, {_OPEN_CONDITION} AS open,
                     source_topic, source_partition, source_offset, source_key, value, headers
              FROM dead_letters WHERE stage = $stage AND kind = $kind AND error_class = $error AND ($run = '' OR run_id = $run)
              ORDER BY commit_seq DESC"""
    dead_letters = query(sql, {name: filters[name] for name in _GROUP_COLUMNS} | {"run": run}, _MAX_SHOWN).to_dicts()
    for dead_letter in dead_letters:
        value = bytes(dead_letter.pop("value") or b"")
        dead_letter["num_bytes"] = len(value)
        try:
            dead_letter["content"] = decode_value(value)
        except CharterError as error:  # the schema registry is unreachable
            dead_letter["content"] = error.what
        dead_letter["key"] = bytes(dead_letter.pop("source_key") or b"").decode("utf-8", "replace")
        headers = dead_letter["headers"] or []
        dead_letter["headers"] = {h["key"]: bytes(h["value"]).decode("utf-8", "replace") for h in headers}
    return dead_letters


def load_selected(query: QueryFunction, form: Mapping[str, str]) -> dict[str, Any]:
    """Return the open dead letters that a form selects. A form selects one dead letter by its id, or a group."""
    if form.get("id"):
        where, values = "record_id = TRY_CAST($id AS UUID)", {"id": form["id"]}
    elif all(form.get(name) for name in _GROUP_COLUMNS):
        where = "stage = $stage AND kind = $kind AND error_class = $error"
        values = {name: form[name] for name in _GROUP_COLUMNS}
        if form.get("run"):
            where, values = f"{where} AND run_id = $run", values | {"run": form["run"]}
    else:
        raise UsageError(
            "the form selects no dead letters",
            "the form must have an id, or a stage, a kind and an error",
            "press Retry on the page of dead letters",
        )
    result = query(f"SELECT * FROM dead_letters WHERE {where} AND {_OPEN_CONDITION} ORDER BY commit_seq", values, _MAX_RETRIES)
    return {"dead_letters": result.to_dicts()}


def retry_dead_letters(settings: Settings, dead_letters: list[dict[str, Any]]) -> int:
    """Publish the records of dead letters to their source topics. Skip retried dead letters. Return the number of records."""

    bus = connect_bus(settings)
    try:
        return publish_retries(bus, dead_letters)
    finally:
        bus.close()
