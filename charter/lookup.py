"""Find the run id and the record ids for the arguments of a command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.settings import Settings
from engine.store import Store

_MAX_LISTED_MATCHES = 5
_MAX_TITLE_CHARS = 40


def resolve_run_id(settings: Settings, origins: Mapping[str, str], store: Store) -> str:
    """Return the run that the user set. If the user set no run, return the newest run of the database that is no evaluation."""
    if origins["run.id"] != "default" or not store.path.exists():
        return settings.run.id
    newest = store.query(
        "SELECT run_id FROM runs WHERE settings ->> '$.evaluation_run.name' IS NULL ORDER BY commit_seq DESC LIMIT 1"
    ).rows
    return newest[0][0] if newest else settings.run.id


def make_id_pattern(identifier: str) -> str:
    """Return the LIKE pattern for ids with this prefix. For an invalid prefix, return a pattern that does not match any id."""
    prefix = identifier.strip().lower()
    return f"{prefix}%" if prefix and set(prefix) <= set("0123456789abcdef-") else ""


def find_erased_prompt_ids(store: Store, identifier: str) -> list[str]:
    """Return the ids of erased prompts for an id or id prefix."""
    sql = "SELECT DISTINCT prompt_id::VARCHAR FROM erasures WHERE prompt_id::VARCHAR LIKE ?"
    return [prompt_id for (prompt_id,) in store.query(sql, [make_id_pattern(identifier)], limit_s=10.0).rows]


def find_prompt_ids(store: Store, identifier: str) -> list[str]:
    """Return the ids of the prompts for an id or id prefix, which can belong to a prompt or to a record made from a prompt."""
    tables = ("prompts", "responses", "critiques", "revisions", "preferences", "demonstrations")
    parts = [f"SELECT prompt_id FROM {name} WHERE record_id::VARCHAR LIKE $1 OR prompt_id::VARCHAR LIKE $1" for name in tables]
    rows = store.query(" UNION ".join(parts), [make_id_pattern(identifier)], limit_s=10.0).rows
    return [str(prompt_id) for (prompt_id,) in rows]


def find_prompt_titles(store: Store, prompt_ids: Sequence[str]) -> list[tuple[str, str]]:
    """Return the id and the text of the first few of these prompts, for `describe_matches`."""
    sql = "SELECT prompt_id::VARCHAR, prompt FROM traces WHERE prompt_id::VARCHAR IN (SELECT unnest(?)) ORDER BY 1"
    return [tuple(row) for row in store.query(sql, [sorted(prompt_ids)[:_MAX_LISTED_MATCHES]], limit_s=10.0).rows]


def describe_matches(num_matches: int, matches: Sequence[tuple[str, str]]) -> str:
    """Return a sentence with the ids and titles of the first few matches, such as `the first 2 of 9 are 1a2b (Why?), ...`."""
    listed = matches[:_MAX_LISTED_MATCHES]
    texts = [f"{identifier} ({_shorten(title)})" for identifier, title in listed]
    start = "they are" if len(listed) == num_matches else f"the first {len(listed)} of {num_matches} are"
    return f"{start} {', '.join(texts)}"


def _shorten(title: str) -> str:
    line = " ".join(title.split())
    return line if len(line) <= _MAX_TITLE_CHARS else f"{line[: _MAX_TITLE_CHARS - 3]}..."
