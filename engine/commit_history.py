"""Find out which commit sequence numbers of an earlier time are still valid in the database.

The sink numbers the rows in the order in which it reads the records (`commit_seq`). A database can lose rows: its write-ahead
log may be cut, a snapshot may replace it, or it may be rebuilt from the log. The sink then reads the records again, possibly in
another order, and numbers them again. Each start of the sink is a session with a random id. The database stores the sessions and
the first number of each session. A number that was read in an earlier session is valid only if this session is in the database,
and if the next session began at a higher number.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import duckdb

from engine.bus.port import Bus, Offsets, TopicPartition
from engine.errors import StoreMismatch
from engine.store import QueryResult, Store
from schemas.topics import TOPICS


@dataclass(frozen=True)
class CommitHistory:
    """The history of the commit sequence.

    `first_seqs` maps the id of each session to its first number, from the oldest session to the newest. `next_seq` is the next
    number. The rows below `complete_seq` include every record that was on the log when the sink last compared its positions with
    the log. `complete_seq` is None until the sink has read the whole log once. `cluster_ids` are the logs of the rows.
    """

    first_seqs: dict[str, int]
    next_seq: int
    complete_seq: int | None
    cluster_ids: frozenset[str]

    @property
    def session_id(self) -> str | None:
        """The id of the newest session. None if no sink has written to the database."""
        return next(reversed(self.first_seqs), None)

    @cached_property
    def end_seqs(self) -> dict[str, int]:
        """The first number after each session."""
        return dict(zip(self.first_seqs, [*list(self.first_seqs.values())[1:], self.next_seq], strict=True))

    def is_valid(self, session_id: str | None, commit_seq: int) -> bool:
        """Return whether the rows up to this number still have the numbers that they had in the session."""
        return session_id is not None and commit_seq < self.end_seqs.get(session_id, 0)


def read_commit_history(store: Store) -> CommitHistory:
    """Read the sessions and the state of the sink."""
    return query_commit_history(store.query)


def query_commit_history(query: Callable[[str], QueryResult]) -> CommitHistory:
    """Read the sessions and the state of the sink with the query function of a store or of a read session."""
    sql = """
        SELECT (SELECT list({id: session_id, seq: first_seq} ORDER BY number) FROM raw.sink_sessions), next_seq, complete_seq,
               (SELECT list(DISTINCT cluster_id) FROM raw.sink_offsets)
        FROM raw.sink_state"""
    ((sessions, next_seq, complete_seq, cluster_ids),) = query(sql).rows
    first_seqs = {session["id"]: session["seq"] for session in sessions or ()}
    return CommitHistory(first_seqs, next_seq, complete_seq, frozenset(cluster_ids or ()))


def begin_session(connection: duckdb.DuckDBPyConnection) -> str:
    """Add a session to the database and return its id. The next row is the first row of the session."""
    session_id = str(uuid.uuid4())
    connection.execute(
        "INSERT INTO raw.sink_sessions SELECT (SELECT count(*) FROM raw.sink_sessions), ?, next_seq FROM raw.sink_state",
        [session_id],
    )
    return session_id


def read_matching_offsets(connection: duckdb.DuckDBPyConnection, bus: Bus, path: Path) -> Offsets:
    """Return the next offset of each partition of this log that the sink has read.

    Raise StoreMismatch if the database belongs to another log, or if an offset is above the end of the log.
    """
    rows = connection.execute("SELECT cluster_id, topic_id, partition, next_offset FROM raw.sink_offsets").fetchall()
    require_same_log(frozenset(row[0] for row in rows), bus.cluster_id, path)
    topics = {topic_id: topic for topic, topic_id in bus.topic_ids(list(TOPICS)).items()}
    offsets = {
        TopicPartition(topics[topic_id], partition): offset
        for cluster_id, topic_id, partition, offset in rows
        if cluster_id == bus.cluster_id and topic_id in topics  # the rows of a deleted topic stay in the database
    }
    ends = bus.end_offsets(list(TOPICS))
    for topic_partition, offset in offsets.items():
        if offset > ends[topic_partition]:
            raise StoreMismatch(
                f"{path} has read {topic_partition.topic}[{topic_partition.partition}] up to offset {offset}, but the log ends at"
                f" {ends[topic_partition]}",
                "the log has lost records or was replaced by an older copy, so the sink would skip the next records",
                "restore the log, or type: charter repair    (moves the database away; the sink reads the log again)",
            )
    return offsets


def require_same_log(cluster_ids: frozenset[str], cluster_id: str, path: Path) -> None:
    """Raise StoreMismatch if the database has rows of logs, but not of this log."""
    if cluster_ids and cluster_id not in cluster_ids:
        raise StoreMismatch(
            f"{path} has the records of another log",
            f"its records come from log {', '.join(sorted(cluster_ids))}, but this log is {cluster_id}",
            "use the data folder of this log (--data FOLDER), or type: charter repair",
        )
