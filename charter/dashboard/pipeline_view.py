"""The pipeline view: how many records each topic has, how fast they come, and (from `log.py`) what waits where."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from engine.store import QueryFunction
from schemas.topics import TOPICS

_RATE_WINDOW_S = 60.0
_NUM_BUCKETS = 60
_STREAM_TOPICS = ("prompts", "responses", "critiques", "revisions", "preferences", "policies")


def load_pipeline(query: QueryFunction, run: str) -> dict[str, Any]:
    """Counts, rates and history of every topic; of one run, or of all when `run` is empty."""
    now = datetime.now(UTC).replace(tzinfo=None)
    topics = _count_records(query, run, now - timedelta(seconds=_RATE_WINDOW_S))
    spans = [topic for topic in topics if topic["oldest"] is not None and topic["topic"] in _STREAM_TOPICS]
    start, end = (min(t["oldest"] for t in spans), max(t["newest"] for t in spans)) if spans else (None, None)
    bucket_s = max(1.0, (end - start).total_seconds() / _NUM_BUCKETS) if start is not None else None
    past = _load_history(query, run, start, bucket_s) if start is not None else {}
    for topic in topics:
        topic["history"] = past.get(topic["topic"])
    return {
        "run": run,
        "rate_over_s": _RATE_WINDOW_S,
        "topics": topics,
        "history": {"start": start, "end": end, "bucket_s": bucket_s},
        "dead_letters": _count_dead_letters(query, run),
        "policy": _load_newest_policy(query, run),
    }


def _count_records(query: QueryFunction, run: str, since: datetime) -> list[dict[str, Any]]:
    """One row a topic. A run's records are those that it made, those too that another run had made before."""
    records = "count(DISTINCT record_id)" if run else "count(*) FILTER (NOT is_duplicate)"
    parts = [
        f"""SELECT '{name}' AS topic, {records} AS records, count(*) FILTER (is_duplicate) AS duplicates,
                   count(*) FILTER (content_mismatch) AS content_mismatches, count(*) FILTER (created_at > $since) / {_RATE_WINDOW_S} AS per_second,
                   min(created_at) AS oldest, max(created_at) AS newest
            FROM raw.{spec.table} WHERE $run = '' OR run_id = $run"""
        for name, spec in TOPICS.items()
    ]
    found = {row["topic"]: row for row in query(" UNION ALL ".join(parts), {"run": run, "since": since}).to_dicts()}
    return [found[name] for name in TOPICS]


def _load_history(query: QueryFunction, run: str, start: datetime, bucket_s: float | None) -> dict[str, list[int]]:
    """Records in each of BUCKETS spans of time, from the first record to the last."""
    parts = [
        f"""SELECT '{topic}' AS topic, least({_NUM_BUCKETS - 1}, floor(epoch(created_at - $start) / $step))::INTEGER AS bucket,
                   count(*) AS n
            FROM raw.{topic} WHERE NOT is_duplicate AND created_at >= $start AND ($run = '' OR run_id = $run) GROUP BY ALL"""
        for topic in _STREAM_TOPICS
    ]
    past = {topic: [0] * _NUM_BUCKETS for topic in _STREAM_TOPICS}
    for topic, bucket, n in query(" UNION ALL ".join(parts), {"run": run, "start": start, "step": bucket_s}).rows:
        past[topic][bucket] = n
    return past


def _count_dead_letters(query: QueryFunction, run: str) -> list[dict[str, Any]]:
    """How many letters each stage has, and how many of them were not tried again."""
    return query(
        """SELECT stage, count(*) AS letters, count(*) FILTER (record_id NOT IN (SELECT dead_letter_id FROM dead_letter_retries)) AS open
           FROM dead_letters WHERE $run = '' OR run_id = $run GROUP BY 1 ORDER BY 1""",
        {"run": run},
    ).to_dicts()


def _load_newest_policy(query: QueryFunction, run: str) -> int | None:
    sql = "SELECT max(version) FROM policies WHERE kind = 'POLICY' AND ($run = '' OR run_id = $run)"
    found: int | None = query(sql, {"run": run}).rows[0][0]
    return found


def group_lags_by_stage(rows: list[dict[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """For each reader what waits before it: messages, and the age of the oldest in seconds."""
    stages: dict[str, dict[str, Any]] = {}
    for row in rows or []:
        stage = stages.setdefault(row["reader"], {"behind": 0, "seconds": None, "reads": []})
        stage["behind"] += row["behind"]
        stage["reads"].append(row["topic"])
        if row["seconds"] is not None:
            stage["seconds"] = max(row["seconds"], stage["seconds"] or 0.0)
    return stages
