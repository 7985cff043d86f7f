"""The positions of a lake: which records of the log it has, by topic id, partition and offset.

The commit sequence of the database changes when the database is rebuilt from the log. The topic id, the partition and the offset
of a record never change, so a lake continues from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa

_HASH_MODULUS = 2**64
PartitionKey = tuple[str, int]  # topic id and partition


@dataclass(frozen=True)
class Position:
    """The rows of one table from one partition of a topic that the lake has: the offsets from `first_offset` to `next_offset`.

    `content_sum` is the sum of their content hashes modulo 2**64. `last_offset` and `last_hash` are the offset and the content
    hash of the newest row that was exported. They show whether the log was replaced by another log.
    """

    topic: str
    topic_id: str
    partition: int
    first_offset: int
    next_offset: int
    num_rows: int = 0
    content_sum: int = 0
    last_offset: int | None = None
    last_hash: int | None = None

    @property
    def key(self) -> PartitionKey:
        return self.topic_id, self.partition

    def to_json(self) -> dict[str, Any]:
        """Return the fields. Hashes are text, because many JSON readers lose the last digits of large integers."""
        last_hash = None if self.last_hash is None else f"{self.last_hash:016x}"
        return asdict(self) | {"content_sum": f"{self.content_sum:016x}", "last_hash": last_hash}


def parse_position(values: Mapping[str, Any]) -> Position:
    """Return the position of which `to_json` has written the fields."""
    last_hash = None if values["last_hash"] is None else int(values["last_hash"], 16)
    return Position(**{**values, "content_sum": int(values["content_sum"], 16), "last_hash": last_hash})


@dataclass(frozen=True)
class TableState:
    """What the lake has of one table.

    `session_id` and `next_seq` are a hint: in a database with this session, the rows below `next_seq` are in the lake.
    """

    positions: Mapping[PartitionKey, Position] = field(default_factory=dict)
    session_id: str | None = None
    next_seq: int = 0

    def to_json(self) -> dict[str, Any]:
        positions = [position.to_json() for position in self.positions.values()]
        return {"positions": positions, "session_id": self.session_id, "next_seq": self.next_seq}

    def add_rows(self, rows: pa.Table, topics: Mapping[str, str], session_id: str | None, next_seq: int) -> TableState:
        """Return the state after these rows, in the order of their commits. `topics` maps topic ids to topics."""
        positions = dict(self.positions)
        for summary in summarize_rows(rows):
            key = (summary.topic_id, summary.partition)
            old = positions.get(key) or Position(
                topics[summary.topic_id], summary.topic_id, summary.partition, summary.first_offset, summary.first_offset
            )
            positions[key] = replace(
                old,
                next_offset=summary.last_offset + 1,
                num_rows=old.num_rows + summary.num_rows,
                content_sum=(old.content_sum + summary.content_sum) % _HASH_MODULUS,
                last_offset=summary.last_offset,
                last_hash=summary.last_hash,
            )
        return TableState(positions, session_id, next_seq)

    def remove_rows(self, rows: pa.Table) -> TableState:
        """Return the state after an erasure of these rows."""
        positions = dict(self.positions)
        for summary in summarize_rows(rows):
            old = positions[(summary.topic_id, summary.partition)]
            positions[old.key] = replace(
                old,
                num_rows=old.num_rows - summary.num_rows,
                content_sum=(old.content_sum - summary.content_sum) % _HASH_MODULUS,
            )
        return replace(self, positions=positions)

    def reach(self, ends: Iterable[Position], session_id: str | None, next_seq: int) -> TableState:
        """Return the state after all rows below these ends. Offsets without a row are transaction markers or erased records."""
        positions = dict(self.positions)
        for end in ends:
            old = positions.get(end.key, replace(end, first_offset=end.next_offset))
            positions[end.key] = replace(old, next_offset=max(old.next_offset, end.next_offset))
        return TableState(positions, session_id, next_seq)


def parse_state(values: Mapping[str, Any]) -> TableState:
    """Return the state of which `TableState.to_json` has written the fields."""
    positions = [parse_position(position) for position in values["positions"]]
    return TableState({position.key: position for position in positions}, values["session_id"], values["next_seq"])


@dataclass(frozen=True)
class RowSummary:
    """Some rows of one partition of a topic: their number, offsets, and the sum of their content hashes modulo 2**64."""

    topic_id: str
    partition: int
    first_offset: int
    last_offset: int
    last_hash: int
    num_rows: int
    content_sum: int


def summarize_rows(rows: pa.Table) -> list[RowSummary]:
    """Return a summary of the rows of each partition."""
    columns = ["_topic_id", "_partition", "_offset", "content_hash"]
    groups: dict[PartitionKey, list[tuple[int, int]]] = {}
    for topic_id, partition, offset, content_hash in zip(*(rows[name].to_pylist() for name in columns), strict=True):
        groups.setdefault((topic_id, partition), []).append((offset, int(content_hash)))
    return [
        RowSummary(*key, min(group)[0], *max(group), len(group), sum(hash_ for _, hash_ in group) % _HASH_MODULUS)
        for key, group in groups.items()
    ]
