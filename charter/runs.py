"""Define the SQL queries that list and compare runs, and a function that flattens settings."""

from __future__ import annotations

from typing import Any

RUNS_SQL = (
    """
WITH counted AS (SELECT run_id, topic, count(*) AS n FROM run_records GROUP BY ALL),
     named AS (SELECT run_id, min(created_at) AS started, arg_max(constitution.name, commit_seq) AS constitution,
                      arg_max(settings, commit_seq) AS settings FROM raw.runs GROUP BY 1)
SELECT run_id AS run, started, constitution,
       coalesce(settings ->> '$.replay.stage', '') AS replays_from, coalesce(settings ->> '$.replay.source', '') AS of_run,
       settings ->> '$.models.policy' AS policy, """
    + ", ".join(
        f"coalesce(sum(n) FILTER (topic = '{topic}'), 0)::BIGINT AS {topic}"
        for topic in ("prompts", "responses", "critiques", "revisions", "preferences")
    )
    + """
FROM named LEFT JOIN counted USING (run_id) GROUP BY ALL ORDER BY started"""
)


def flatten_settings(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one dictionary with dotted names as keys."""
    flattened: dict[str, Any] = {}
    for key, value in tree.items():
        flattened |= flatten_settings(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flattened


SHARED_RECORDS_SQL = """
SELECT topic, count(*) FILTER (one AND other) AS shared, count(*) FILTER (one AND NOT other) AS one_alone,
       count(*) FILTER (other AND NOT one) AS other_alone
FROM (SELECT topic, record_id, bool_or(run_id = $1) AS one, bool_or(run_id = $2) AS other FROM run_records
      WHERE run_id IN ($1, $2) GROUP BY ALL)
WHERE topic IN ('responses', 'critiques', 'revisions', 'preferences') GROUP BY topic ORDER BY topic"""

# Compares the labels of the pairs that both runs judged. The rows are grouped by the principle of the second run, because the
# constitutions of the runs may differ.
SHARED_LABELS_SQL = """
WITH judged AS (SELECT DISTINCT ON (run_id, record_id) run_id, response_id, response_a, response_b, p_a, principle_id
                FROM raw.preferences WHERE run_id IN ($1, $2) AND outcome = 'OK')
SELECT two.principle_id AS principle, count(*) AS pairs, avg(one.p_a) AS mean_first, avg(two.p_a) AS mean_second,
       count(*) FILTER ((one.p_a > 0.5) <> (two.p_a > 0.5)) AS flips
FROM judged one JOIN judged two ON one.response_id = two.response_id AND one.response_a = two.response_a AND one.response_b = two.response_b
WHERE one.run_id = $1 AND two.run_id = $2 GROUP BY 1 ORDER BY 1"""
