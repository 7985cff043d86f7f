"""List and compare runs: the SQL queries, and functions that prepare their rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from charter.configurations import describe_changes, parse_configuration
from charter.manifests import parse_manifest_settings

RUN_COLUMNS = (
    *("run", "configuration", "started", "constitution", "replays_from", "of_run", "policy"),
    *("prompts", "responses", "critiques", "revisions", "preferences", "grades", "changes"),
)
_STAGE_TABLES = ("responses", "critiques", "revisions", "preferences")

# A record without a configuration was not made by a stage, or by an older version of Charter. It counts for the first one.
_MADE_SQL = " UNION ALL ".join(
    f"SELECT DISTINCT run_id, coalesce(configuration, 1) AS configuration, '{table}' AS topic, record_id FROM raw.{table}"
    for table in _STAGE_TABLES
)
_COUNTS_SQL = ", ".join(f"count(*) FILTER (topic = '{table}') AS {table}" for table in _STAGE_TABLES)
_RUNS_SQL = f"""
WITH made AS (SELECT run_id, configuration, {_COUNTS_SQL} FROM ({_MADE_SQL}) GROUP BY ALL),
     published AS (SELECT run_id, count(DISTINCT record_id) AS prompts FROM raw.prompts GROUP BY ALL),
     graded AS (SELECT run_id, count(DISTINCT record_id) AS grades FROM raw.grades GROUP BY ALL),
     named AS (SELECT run_id, coalesce((settings ->> '$.configuration.number')::BIGINT, 1) AS configuration,
                      min(created_at) AS started, arg_max(constitution.name, commit_seq) AS constitution,
                      arg_max(settings, commit_seq) AS settings FROM raw.runs GROUP BY ALL)
SELECT run_id AS run, configuration, started, constitution,
       coalesce(settings ->> '$.replay.stage', '') AS replays_from, coalesce(settings ->> '$.replay.source', '') AS of_run,
       coalesce(settings ->> '$.configuration.stages.respond."models.policy"', settings ->> '$.models.policy') AS policy,
       {", ".join(f"coalesce({topic}, 0) AS {topic}" for topic in ("prompts", *_STAGE_TABLES, "grades"))}, settings
FROM named LEFT JOIN made USING (run_id, configuration) LEFT JOIN published USING (run_id) LEFT JOIN graded USING (run_id)
ORDER BY min(started) OVER (PARTITION BY run_id), run, configuration"""


def load_runs(query_dicts: Callable[[str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return one row per configuration of each run, oldest run first.

    `prompts` and `grades` are the numbers of the whole run. `changes` has the settings that differ from the previous configuration.
    """
    rows = query_dicts(_RUNS_SQL)
    previous = None
    for row in rows:
        current = parse_configuration(row.pop("settings"))
        is_further = previous is not None and previous[0] == row["run"]
        row["changes"] = describe_changes(previous[1], current) if previous and is_further and previous[1] and current else ""
        previous = (row["run"], current)
    return rows


def parse_settings(text: str) -> dict[str, Any]:
    """Return the settings of a manifest with dotted names as keys.

    The other fields of a manifest (`replay`, `configuration`) are omitted.
    """
    return _flatten_settings(parse_manifest_settings(text))


def _flatten_settings(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one dictionary with dotted names as keys."""
    flattened: dict[str, Any] = {}
    for key, value in tree.items():
        flattened |= _flatten_settings(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flattened


SHARED_RECORDS_SQL = """
SELECT topic, count(*) FILTER (one AND other) AS shared, count(*) FILTER (one AND NOT other) AS one_alone,
       count(*) FILTER (other AND NOT one) AS other_alone
FROM (SELECT topic, record_id, bool_or(run_id = $1) AS one, bool_or(run_id = $2) AS other FROM run_records
      WHERE run_id IN ($1, $2) GROUP BY ALL)
WHERE topic IN ('responses', 'critiques', 'revisions', 'preferences', 'grades') GROUP BY topic ORDER BY topic"""

# Compares the judge's labels of the pairs that both runs judged. Human labels are not part of a judge's mean and flips. The rows
# are grouped by the principle of the second run, because the constitutions of the runs may differ.
SHARED_LABELS_SQL = """
WITH judged AS (SELECT DISTINCT ON (run_id, record_id) run_id, response_id, response_a, response_b, p_a, principle_id
                FROM raw.preferences WHERE run_id IN ($1, $2) AND outcome = 'OK' AND label_source = 'AI')
SELECT two.principle_id AS principle, count(*) AS pairs, avg(one.p_a) AS mean_first, avg(two.p_a) AS mean_second,
       count(*) FILTER ((one.p_a > 0.5) <> (two.p_a > 0.5)) AS flips
FROM judged one JOIN judged two ON one.response_id = two.response_id AND one.response_a = two.response_a AND one.response_b = two.response_b
WHERE one.run_id = $1 AND two.run_id = $2 GROUP BY 1 ORDER BY 1"""
