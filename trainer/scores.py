"""Publish each score of a reward model once.

The monitor and RL score some of the same completions. The scores of one completion in two batches differ by rounding (up to 2e-7
in fp32), because the batches have different shapes. The first published score therefore counts, and both use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.store import Store
from schemas import ids
from schemas.records import Record, Score
from trainer.consumed import QUERY_TIMEOUT_S


class ScorePublisher:
    """Publish the scores that are not on the log yet.

    A published score reaches the database only after the sink writes it. Until then, this object remembers it.
    """

    def __init__(self, store: Store, publish: Callable[[Sequence[Record]], None]) -> None:
        self._store, self._publish = store, publish
        self._unwritten: dict[str, float] = {}  # from a record id to the normalized score

    def publish(self, scores: Sequence[Score]) -> list[float]:
        """Publish the new scores in one transaction. Return the normalized score on the log for each of `scores`."""
        sql = "SELECT record_id::VARCHAR, normalized_score FROM scores WHERE record_id IN (SELECT unnest(?::UUID[]))"
        record_ids = [score.record_id for score in scores]
        written: dict[str, float] = dict(self._store.query(sql, [record_ids], limit_s=QUERY_TIMEOUT_S).rows)
        for record_id in written:
            self._unwritten.pop(record_id, None)
        known = written | self._unwritten
        if new := [score for score in scores if score.record_id not in known]:
            self._publish(new)
            self._unwritten |= {score.record_id: score.normalized_score for score in new}
        return [known.get(score.record_id, score.normalized_score) for score in scores]


def make_score(row: Mapping[str, Any], run_id: str, reward_version: int, score: float, normalized_score: float) -> Score:
    """Return the record of a reward model's score for the completion in `row`."""
    response_id = str(row["response_id"])
    fingerprint = ids.compute_fingerprint("score", reward_version=reward_version)
    return Score(
        record_id=ids.compute_record_id("score", [response_id], fingerprint, row["completion_index"]),
        parent_ids=[response_id],
        prompt_id=str(row["prompt_id"]),
        run_id=run_id,
        stage="train",
        policy_version=row["policy_version"],
        response_id=response_id,
        completion_index=row["completion_index"],
        reward_version=reward_version,
        score=score,
        normalized_score=normalized_score,
    )
