"""Load the record counts and rates of each topic for the pipeline view. `lag_monitor.py` measures the consumer lag."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from engine.store import QueryFunction
from engine.tables import build_duplicate_count
from schemas.topics import TOPICS

_RATE_WINDOW_S = 60.0
_NUM_BUCKETS = 60
_STREAM_TOPICS = ("prompts", "responses", "critiques", "revisions", "preferences", "grades", "policies")


def load_pipeline(query: QueryFunction, run: str) -> dict[str, Any]:
    """Return counts, rates and history of every topic for one run. If `run` is empty, include all runs."""
    now = datetime.now(UTC).replace(tzinfo=None)
    topics = _count_records(query, run, now - timedelta(seconds=_RATE_WINDOW_S))
    non_empty = [topic for topic in topics if topic["oldest"] is not None and topic["topic"] in _STREAM_TOPICS]
    start, end = (min(t["oldest"] for t in non_empty), max(t["newest"] for t in non_empty)) if non_empty else (None, None)
    bucket_s = max(1.0, (end - start).total_seconds() / _NUM_BUCKETS) if start is not None else None
    histories = _load_history(query, run, start, bucket_s) if start is not None else {}
    for topic in topics:
        topic["history"] = histories.get(topic["topic"])
    return {
        "run": run,
        "rate_window_s": _RATE_WINDOW_S,
        "topics": topics,
        "history": {"start": start, "end": end, "bucket_s": bucket_s},
        "dead_letters": _count_dead_letters(query, run),
        "policy_version": _load_newest_policy(query, run),
    }


def _count_records(query: QueryFunction, run: str, since: datetime) -> list[dict[str, Any]]:
    """Return one row per topic. A record that two runs produced is counted for both runs."""
    records = "count(DISTINCT record_id)" if run else "count(*) FILTER (NOT is_duplicate)"
    parts = [
        f"""SELECT '{name}' AS topic, {records} AS records,
                   {f"count(*) - {records}" if run else build_duplicate_count(spec.table)} AS duplicates,
                   count(*) FILTER (content_mismatch) AS content_mismatches, count(*) FILTER (created_at > $since) / {_RATE_WINDOW_S} AS records_per_s,
                   min(created_at) AS oldest, max(created_at) AS newest
            FROM raw.{spec.table} WHERE $run = '' OR run_id = $run"""
        for name, spec in TOPICS.items()
    ]
    rows = {row["topic"]: row for row in query(" UNION ALL ".join(parts), {"run": run, "since": since}).to_dicts()}
    return [rows[name] for name in TOPICS]


def _load_history(query: QueryFunction, run: str, start: datetime, bucket_s: float | None) -> dict[str, list[int]]:
    """Return the number of records of each topic in each of _NUM_BUCKETS equal time buckets."""
    parts = [
        f"""SELECT '{topic}' AS topic, least({_NUM_BUCKETS - 1}, floor(epoch(created_at - $start) / $step))::INTEGER AS bucket,
                   count(*) AS n
            FROM raw.{topic} WHERE NOT is_duplicate AND created_at >= $start AND ($run = '' OR run_id = $run) GROUP BY ALL"""
        for topic in _STREAM_TOPICS
    ]
    histories = {topic: [0] * _NUM_BUCKETS for topic in _STREAM_TOPICS}
    for topic, bucket, n in query(" UNION ALL ".join(parts), {"run": run, "start": start, "step": bucket_s}).rows:
        histories[topic][bucket] = n
    return histories


def _count_dead_letters(query: QueryFunction, run: str) -> list[dict[str, Any]]:
    """Return two numbers for each stage: all dead letters, and open (not retried) dead letters."""
    return query(
        """SELECT stage, count(*) AS count, count(*) FILTER (record_id NOT IN (SELECT dead_letter_id FROM dead_letter_retries)) AS open
           FROM dead_letters WHERE $run = '' OR run_id = $run GROUP BY 1 ORDER BY 1""",
        {"run": run},
    ).to_dicts()


def _load_newest_policy(query: QueryFunction, run: str) -> int | None:
    sql = "SELECT max(version) FROM policies WHERE kind = 'POLICY' AND ($run = '' OR run_id = $run)"
    version: int | None = query(sql, {"run": run}).rows[0][0]
    return version


def group_lags_by_stage(rows: list[dict[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """Return the total consumer lag of each reader in records, and the age of its oldest unread record in seconds."""
    stages: dict[str, dict[str, Any]] = {}
    for row in rows or []:
        stage = stages.setdefault(row["reader"], {"behind": 0, "seconds": None, "topics": []})
        stage["behind"] += row["behind"]
        stage["topics"].append(row["topic"])
        if row["seconds"] is not None:
            stage["seconds"] = max(row["seconds"], stage["seconds"] or 0.0)
    return stages
