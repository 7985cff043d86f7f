"""The pipeline view: how many records each topic has, how fast they come, and (from `log.py`) what waits where."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from engine.store import Ask
from schemas.topics import TOPICS

RATE_OVER_S = 60.0
BUCKETS = 60
STREAM = ("prompts", "responses", "critiques", "revisions", "preferences", "policies")


def gather(ask: Ask, run: str) -> dict[str, Any]:
    """Counts, rates and history of every topic; of one run, or of all when `run` is empty."""
    now = datetime.now(UTC).replace(tzinfo=None)
    topics = counts(ask, run, now - timedelta(seconds=RATE_OVER_S))
    spans = [topic for topic in topics if topic["oldest"] is not None and topic["topic"] in STREAM]
    start, end = (min(t["oldest"] for t in spans), max(t["newest"] for t in spans)) if spans else (None, None)
    bucket_s = max(1.0, (end - start).total_seconds() / BUCKETS) if start is not None else None
    past = history(ask, run, start, bucket_s) if start is not None else {}
    for topic in topics:
        topic["history"] = past.get(topic["topic"])
    return {
        "run": run,
        "rate_over_s": RATE_OVER_S,
        "topics": topics,
        "history": {"start": start, "end": end, "bucket_s": bucket_s},
        "dead_letters": dead_letters(ask, run),
        "policy": newest_policy(ask, run),
    }


def counts(ask: Ask, run: str, since: datetime) -> list[dict[str, Any]]:
    """One row a topic. A run's records are those that it made, those too that another run had made before."""
    records = "count(DISTINCT record_id)" if run else "count(*) FILTER (NOT is_duplicate)"
    parts = [
        f"""SELECT '{name}' AS topic, {records} AS records, count(*) FILTER (is_duplicate) AS duplicates,
                   count(*) FILTER (content_mismatch) AS content_mismatches, count(*) FILTER (created_at > $since) / {RATE_OVER_S} AS per_second,
                   min(created_at) AS oldest, max(created_at) AS newest
            FROM raw.{spec.table} WHERE $run = '' OR run_id = $run"""
        for name, spec in TOPICS.items()
    ]
    found = {row["topic"]: row for row in ask(" UNION ALL ".join(parts), {"run": run, "since": since}).records()}
    return [found[name] for name in TOPICS]


def history(ask: Ask, run: str, start: datetime, bucket_s: float | None) -> dict[str, list[int]]:
    """Records in each of BUCKETS spans of time, from the first record to the last."""
    parts = [
        f"""SELECT '{topic}' AS topic, least({BUCKETS - 1}, floor(epoch(created_at - $start) / $step))::INTEGER AS bucket,
                   count(*) AS n
            FROM raw.{topic} WHERE NOT is_duplicate AND created_at >= $start AND ($run = '' OR run_id = $run) GROUP BY ALL"""
        for topic in STREAM
    ]
    past = {topic: [0] * BUCKETS for topic in STREAM}
    for topic, bucket, n in ask(" UNION ALL ".join(parts), {"run": run, "start": start, "step": bucket_s}).rows:
        past[topic][bucket] = n
    return past


def dead_letters(ask: Ask, run: str) -> list[dict[str, Any]]:
    """How many letters each stage has, and how many of them were not tried again."""
    return ask(
        """SELECT stage, count(*) AS letters, count(*) FILTER (record_id NOT IN (SELECT dead_letter_id FROM dead_letter_retries)) AS open
           FROM dead_letters WHERE $run = '' OR run_id = $run GROUP BY 1 ORDER BY 1""",
        {"run": run},
    ).records()


def newest_policy(ask: Ask, run: str) -> int | None:
    sql = "SELECT max(version) FROM policies WHERE kind = 'POLICY' AND ($run = '' OR run_id = $run)"
    found: int | None = ask(sql, {"run": run}).rows[0][0]
    return found


def stages_of(rows: list[dict[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """For each reader what waits before it: messages, and the age of the oldest in seconds."""
    stages: dict[str, dict[str, Any]] = {}
    for row in rows or []:
        stage = stages.setdefault(row["reader"], {"behind": 0, "seconds": None, "reads": []})
        stage["behind"] += row["behind"]
        stage["reads"].append(row["topic"])
        if row["seconds"] is not None:
            stage["seconds"] = max(row["seconds"], stage["seconds"] or 0.0)
    return stages
