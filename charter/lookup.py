"""Find the run or the prompts that a command names."""

from __future__ import annotations

from collections.abc import Mapping

from engine.settings import BusSettings as BusSettings
from engine.settings import Settings
from engine.store import Store


def resolve_run_id(settings: Settings, origins: Mapping[str, str], store: Store) -> str:
    """The run that a reading verb is about: the one that was named, else the newest of the database."""
    if origins["run.id"] != "default" or not store.path.exists():
        return settings.run.id
    newest = store.query("SELECT run_id FROM runs ORDER BY commit_seq DESC LIMIT 1").rows
    return newest[0][0] if newest else settings.run.id


def make_id_pattern(identifier: str) -> str:
    """The LIKE pattern of ids that begin so; what no id begins with finds none."""
    given = identifier.strip().lower()
    return f"{given}%" if given and set(given) <= set("0123456789abcdef-") else ""


def find_prompt_ids(store: Store, identifier: str) -> list[str]:
    """The prompts that an id, or its beginning, belongs to: of a prompt or of any record made from one."""
    tables = ("prompts", "responses", "critiques", "revisions", "preferences", "demonstrations")
    parts = [f"SELECT prompt_id FROM {name} WHERE record_id::VARCHAR LIKE $1 OR prompt_id::VARCHAR LIKE $1" for name in tables]
    rows = store.query(" UNION ".join(parts), [make_id_pattern(identifier)], limit_s=10.0).rows
    return [str(prompt) for (prompt,) in rows]
