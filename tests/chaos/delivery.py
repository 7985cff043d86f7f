"""Check that every prompt has exactly one response, one chain end and one judgment, on the topics and in the raw tables.

The topics are read with `tests.support.raw_log` and the tables with DuckDB, so no code of Charter reads or decodes the records.
The prompts are recognized by their texts. Every scenario samples two completions per prompt, so a prompt has one pair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import duckdb

from tests.chaos.system import SystemUnderTest, require
from tests.support.raw_log import RawRecord, find_repeated_inputs, read_raw_topic

_OUTPUT_TOPICS = ("responses", "critiques", "revisions", "preferences")
_FIRST_USER_MESSAGE = "list_filter(messages, lambda m: m.role = 'user')[1].content"
_TABLE_SQL = {
    "responses": "SELECT messages FROM raw.responses WHERE run_id = $run",
    "chain ends": """SELECT messages FROM raw.critiques WHERE final AND run_id = $run
                     UNION ALL SELECT messages FROM raw.revisions WHERE final AND run_id = $run""",
    "judgments": "SELECT messages FROM raw.preferences WHERE run_id = $run",
}


def read_topic(system: SystemUnderTest, topic: str) -> list[RawRecord]:
    """Return the committed records of a topic."""
    address = system.bus_address or str(system.folder / "data" / "log.sqlite")
    return read_raw_topic(address, system.bus_prefix, topic)


def check_delivery(
    system: SystemUnderTest,
    texts: Iterable[str],
    *,
    texts_on_topics: Iterable[str] | None = None,
    other_texts: Iterable[str] = (),
    run_id: str = "live",
) -> None:
    """Check all outputs of a run. All processes must have ended, because a process may hold the database.

    `texts` are the prompts that must be finished. `texts_on_topics` are those whose outputs must be on the topics; by default,
    all of them. The prompts in `other_texts` may be unfinished, but they must not have an output twice.
    """
    required = set(texts)
    check_topics(system, required if texts_on_topics is None else set(texts_on_topics), required | set(other_texts), run_id)
    check_tables(system, required, required | set(other_texts), run_id)


def check_topics(system: SystemUnderTest, required: set[str], allowed: set[str], run_id: str) -> None:
    records = {topic: [record for record in read_topic(system, topic) if record.belongs_to(run_id)] for topic in _OUTPUT_TOPICS}
    chain_ends = [record for topic in ("critiques", "revisions") for record in records[topic] if record.fields["final"]]
    outputs = {"responses": records["responses"], "chain ends": chain_ends, "judgments": records["preferences"]}
    for name, found in outputs.items():
        _check_counts(f"{name} on the topics", Counter(record.prompt_text for record in found), required, allowed)
    for topic, found in records.items():
        repeated = find_repeated_inputs(found)
        require(not repeated, f"inputs were processed twice; {topic} has two outputs of {repeated[:3]}")
    letters = [record.fields for record in read_topic(system, "dead-letters")]
    require(not letters, f"there are {len(letters)} dead letters, such as {letters[:1]}")


def check_tables(system: SystemUnderTest, required: set[str], allowed: set[str], run_id: str) -> None:
    with duckdb.connect(str(system.open_store().path), read_only=True) as db:
        for name, sql in _TABLE_SQL.items():
            counts = f"SELECT {_FIRST_USER_MESSAGE}, count(*) FROM ({sql}) GROUP BY 1"
            found = dict(db.execute(counts, {"run": run_id}).fetchall())
            _check_counts(f"{name} in the raw tables", found, required, allowed)
        sql = "SELECT count(*) FROM raw.dead_letters"
        (num_letters,) = db.execute(sql).fetchall()[0]
    require(num_letters == 0, f"there are {num_letters} dead letters in the raw tables")


def _check_counts(name: str, counts: Mapping[str, int], required: set[str], allowed: set[str]) -> None:
    """Require that each required text has one output, and that no text has several outputs or is unknown."""
    missing, unknown = required - counts.keys(), counts.keys() - allowed
    repeated = {text: count for text, count in counts.items() if count > 1}
    require(not missing, f"{name}: {len(missing)} of {len(required)} prompts have none, such as {sorted(missing)[:2]}")
    require(not repeated, f"{name}: {len(repeated)} prompts have several, such as {list(repeated.items())[:2]}")
    require(not unknown, f"{name}: {len(unknown)} belong to no prompt of this scenario, such as {sorted(unknown)[:2]}")
