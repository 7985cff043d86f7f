"""The dead letters: grouped by what happened to them, looked into, and tried again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engine.errors import CharterError, UsageError
from engine.store import Ask

if TYPE_CHECKING:
    from engine.settings import Settings

NEWEST = 20
MOST_AT_ONCE = 5_000
GROUP = ("stage", "kind", "error")
OPEN = "record_id NOT IN (SELECT dead_letter_id FROM dead_letter_retries)"


def gather(ask: Ask, run: str, wanted: Mapping[str, str]) -> dict[str, Any]:
    """Groups of letters that failed alike and, of the group that is asked for, its newest letters whole."""
    sql = f"""SELECT stage, kind, error_class AS error, count(*) AS letters, count(*) FILTER ({OPEN}) AS open,
                     min(created_at) AS first, max(created_at) AS last, arg_max(error_message, commit_seq) AS message,
                     list(DISTINCT source_topic ORDER BY source_topic) AS topics
              FROM dead_letters WHERE $run = '' OR run_id = $run GROUP BY ALL ORDER BY open DESC, last DESC"""
    groups = ask(sql, {"run": run}, 200).records()
    shown = [] if not all(wanted.get(name) for name in GROUP) else newest(ask, run, wanted)
    return {"run": run, "groups": groups, "group": {name: wanted.get(name, "") for name in GROUP}, "letters": shown}


def newest(ask: Ask, run: str, wanted: Mapping[str, str]) -> list[dict[str, Any]]:
    from charter.dead_letters import readable

    sql = f"""SELECT record_id, run_id, stage, kind, error_class AS error, error_message AS message, attempts, created_at, {OPEN} AS open,
                     source_topic, source_partition, source_offset, source_key, value, headers
              FROM dead_letters WHERE stage = $stage AND kind = $kind AND error_class = $error AND ($run = '' OR run_id = $run)
              ORDER BY commit_seq DESC"""
    letters = ask(sql, {name: wanted[name] for name in GROUP} | {"run": run}, NEWEST).records()
    for letter in letters:
        value = bytes(letter.pop("value") or b"")
        letter["bytes"] = len(value)
        try:
            letter["content"] = readable(value)
        except CharterError as error:  # the schema registry is away
            letter["content"] = error.what
        letter["key"] = bytes(letter.pop("source_key") or b"").decode("utf-8", "replace")
        letter["headers"] = {h["key"]: bytes(h["value"]).decode("utf-8", "replace") for h in letter["headers"] or []}
    return letters


def chosen(ask: Ask, wanted: Mapping[str, str]) -> dict[str, Any]:
    """The open letters of a form: one by its id, or a group."""
    if wanted.get("id"):
        where, values = "record_id = TRY_CAST($id AS UUID)", {"id": wanted["id"]}
    elif all(wanted.get(name) for name in GROUP):
        where = "stage = $stage AND kind = $kind AND error_class = $error"
        values = {name: wanted[name] for name in GROUP}
        if wanted.get("run"):
            where, values = f"{where} AND run_id = $run", values | {"run": wanted["run"]}
    else:
        raise UsageError("the form names no dead letters", "nothing was chosen", "press a button on the page of dead letters")
    found = ask(f"SELECT * FROM dead_letters WHERE {where} AND {OPEN} ORDER BY commit_seq", values, MOST_AT_ONCE)
    return {"letters": found.records()}


def retry(settings: Settings, letters: list[dict[str, Any]]) -> int:
    """Put letters back on their topics; returns how many were not tried again before."""
    from charter.dead_letters import try_again
    from charter.pipeline import connect

    bus = connect(settings)
    try:
        return try_again(bus, letters)
    finally:
        bus.close()
