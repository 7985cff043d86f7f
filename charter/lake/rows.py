"""Read the rows of the database for a lake, while the sink runs.

Each query holds the access lock of the database for at most a few seconds, so the sink never waits long. A first query selects the
commit sequence numbers of many rows, and then each query reads a page of these rows. A page has a limited number of bytes.

Rows that the database has twice, because the sink has read the log again, are read once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as compute

from charter.lake.positions import PartitionKey, Position, TableState
from engine.commit_history import CommitHistory, query_commit_history
from engine.errors import QueryTimeout, StoreMismatch
from engine.store import Store
from engine.tables import get_arrow_schema, list_columns
from schemas.records import DeadLetter, Record
from schemas.topics import TopicSpec

_SELECT_LIMIT_S = 10.0
_SELECTED_ROWS = 200_000
_FIRST_PAGE_ROWS = 200
_MAX_PAGE_ROWS = 5000
_PAGE_BYTES = 16 * 1024 * 1024
_CONTENT_HASH_TYPE = pa.decimal128(20)  # Iceberg has no unsigned integers
# These columns depend on the order in which the sink has read the partitions, and not on the record alone.
ORDER_DEPENDENT_COLUMNS = ("is_duplicate", "content_mismatch")
_RANGES = ", ".join(
    f"unnest(${name}::{sql_type}[]) AS {name}"
    for name, sql_type in {
        "topic": "VARCHAR", "topic_id": "VARCHAR", "part": "INTEGER", "start_offset": "BIGINT", "end_offset": "BIGINT",
        "first_seq": "BIGINT", "end_seq": "BIGINT",
    }.items()
)  # fmt: skip


@cache
def get_lake_schema(record_class: type[Record]) -> pa.Schema:
    """Return the columns of a table in the lake: those of the raw table, with the topic id and without the commit sequence."""
    fields = [field for field in get_arrow_schema(record_class) if field.name != "commit_seq"]
    fields = [pa.field(field.name, _CONTENT_HASH_TYPE) if field.name == "content_hash" else field for field in fields]
    flags = [pa.field(name, pa.bool_()) for name in ORDER_DEPENDENT_COLUMNS]
    return pa.schema([*fields, pa.field("_topic_id", pa.string()), *flags])


@dataclass(frozen=True)
class PartitionRange:
    """Rows of one partition of a topic: offsets from `start_offset` up to `end_offset`, both as in `range`.

    The rows of this topic have commit sequence numbers from `first_seq` up to `end_seq`. Other rows of a topic with the same name
    are from a topic that was deleted.
    """

    topic: str
    topic_id: str
    part: int
    start_offset: int
    end_offset: int
    first_seq: int
    end_seq: int

    @property
    def key(self) -> PartitionKey:
        return self.topic_id, self.part


@dataclass(frozen=True)
class Snapshot:
    """The state of the database at one time. The rows below `next_seq` are all rows of `ranges`."""

    history: CommitHistory
    ranges: Sequence[PartitionRange]

    @property
    def next_seq(self) -> int:
        return self.history.next_seq

    @property
    def session_id(self) -> str | None:
        return self.history.session_id

    def get_start_seq(self, state: TableState) -> int:
        """Return the commit sequence number from which rows can be missing in the lake. It is 0 after the database was rebuilt."""
        return state.next_seq if self.history.is_valid(state.session_id, state.next_seq - 1) else 0

    def list_ranges(self, spec: TopicSpec) -> list[PartitionRange]:
        """Return the partitions whose records can be rows of a table. The sink makes dead letters from records of all topics."""
        return [part for part in self.ranges if spec.record_class is DeadLetter or part.topic == spec.name]

    def list_new_ranges(self, spec: TopicSpec, state: TableState) -> list[PartitionRange]:
        """Return the ranges of a table that the lake does not have. Partitions without such offsets are left out."""
        parts = [
            replace(part, start_offset=state.positions[part.key].next_offset if part.key in state.positions else 0)
            for part in self.list_ranges(spec)
        ]
        return [part for part in parts if part.start_offset < part.end_offset]

    def list_exported_ranges(self, spec: TopicSpec, state: TableState) -> list[PartitionRange]:
        """Return the ranges of a table that the lake has, or all of its offsets that the database also has."""
        parts = [(part, state.positions[part.key]) for part in self.list_ranges(spec) if part.key in state.positions]
        return [replace(part, end_offset=position.next_offset) for part, position in parts]

    def list_ends(self, spec: TopicSpec) -> list[Position]:
        """Return the end of each partition that has records."""
        parts = [part for part in self.list_ranges(spec) if part.end_offset]
        return [Position(part.topic, part.topic_id, part.part, 0, part.end_offset) for part in parts]


def read_snapshot(store: Store) -> Snapshot:
    """Read the next offset of the sink in each partition, and the commit sequence at this time."""
    with store.open_read_session() as query:
        history = query_commit_history(query)
        sql = """
            SELECT topic, topic_id, partition, 0, next_offset, first_seq,
                   lead(first_seq, 1, $next_seq) OVER (PARTITION BY topic, partition ORDER BY first_seq)
            FROM raw.sink_offsets ORDER BY topic, partition, first_seq"""
        rows = query(sql, {"next_seq": history.next_seq}).rows
    return Snapshot(history, [PartitionRange(*row) for row in rows])


def read_pages(
    store: Store, spec: TopicSpec, snapshot: Snapshot, ranges: Sequence[PartitionRange], start_seq: int = 0
) -> Iterator[tuple[pa.Table, int]]:
    """Yield the rows of the ranges with commit sequence numbers from `start_seq`, in commit order, as pages.

    With each page, yield the next commit sequence number. Raise StoreMismatch if the database is replaced meanwhile, or if it has
    two different records at one position.
    """
    next_offsets = {part.key: part.start_offset for part in ranges}
    page_rows = _FIRST_PAGE_ROWS
    is_last = not ranges
    while not is_last:
        commit_seqs = _select_commits(store, spec, ranges, start_seq, snapshot.next_seq)
        is_last, first = len(commit_seqs) < _SELECTED_ROWS, 0
        while first < len(commit_seqs):
            page = commit_seqs[first : first + page_rows]
            try:
                rows = _read_page(store, spec, snapshot, ranges, page[0], page[-1])
            except QueryTimeout:
                if page_rows == 1:
                    raise
                page_rows = max(1, page_rows // 4)
                continue
            first += len(page)
            start_seq = page[-1] + 1
            yield _drop_repeated(spec, rows, next_offsets), start_seq
            fitting = len(page) * _PAGE_BYTES // max(rows.nbytes, 1)
            page_rows = max(1, min(fitting, 4 * page_rows, _MAX_PAGE_ROWS))


def count_rows(store: Store, spec: TopicSpec, snapshot: Snapshot, ranges: Sequence[PartitionRange], start_seq: int) -> int:
    """Return the number of rows of the ranges with commit sequence numbers from `start_seq`."""
    parameters = _make_parameters(ranges, start_seq, snapshot.next_seq - 1)
    return int(store.query(_build_query(spec, "count(*)"), parameters, limit_s=_SELECT_LIMIT_S).rows[0][0])


def _make_parameters(ranges: Iterable[PartitionRange], first: int, last: int) -> dict[str, Any]:
    ranges = list(ranges)
    columns = {name: [getattr(part, name) for part in ranges] for name in PartitionRange.__dataclass_fields__}
    return columns | {"first": first, "last": last}


def _build_query(spec: TopicSpec, selected: str, offsets: str = ">= start_offset AND _offset < end_offset") -> str:
    """Return a query of the rows of the ranges whose commit sequence number is between `first` and `last`."""
    # The sink gives a dead letter that it makes the position of the record that it cannot decode.
    is_dead_letter = spec.record_class is DeadLetter
    topic = f"CASE WHEN stage = 'sink' THEN source_topic ELSE '{spec.name}' END" if is_dead_letter else f"'{spec.name}'"
    return f"""
        SELECT {selected} FROM raw.{spec.table} AS record JOIN (SELECT {_RANGES}) AS ranges
            ON ranges.topic = {topic} AND part = _partition AND commit_seq >= first_seq AND commit_seq < end_seq AND _offset {offsets}
        WHERE commit_seq BETWEEN $first AND $last"""


def _select_commits(
    store: Store, spec: TopicSpec, ranges: Sequence[PartitionRange], start_seq: int, next_seq: int
) -> list[int]:
    sql = f"{_build_query(spec, 'commit_seq')} ORDER BY commit_seq LIMIT {_SELECTED_ROWS}"
    parameters = _make_parameters(ranges, start_seq, next_seq - 1)
    with store.open_read_session(limit_s=_SELECT_LIMIT_S) as session:
        commits: list[int] = session.query_arrow(sql, parameters)["commit_seq"].to_pylist()
    return commits


def _read_page(
    store: Store, spec: TopicSpec, snapshot: Snapshot, ranges: Sequence[PartitionRange], first: int, last: int
) -> pa.Table:
    sql_types = dict(list_columns(spec)) | {"content_hash": "DECIMAL(20, 0)"}
    schema = get_lake_schema(spec.record_class)
    columns = [
        "topic_id AS _topic_id" if name == "_topic_id" else f'record."{name}"::{sql_types[name].replace("UUID", "VARCHAR")} AS "{name}"'
        for name in schema.names
    ]  # fmt: skip
    sql = f"{_build_query(spec, ', '.join(columns))} ORDER BY commit_seq"
    with store.open_read_session() as session:
        rows = session.query_arrow(sql, _make_parameters(ranges, first, last))
        if not query_commit_history(session).is_valid(snapshot.session_id, snapshot.next_seq - 1):
            raise StoreMismatch(
                f"the database {store.path} was replaced while it was read",
                "the rows have other commit sequence numbers now",
                "type the same command again; it continues after the rows that the lake has",
            )
    return rows.cast(schema)


def _drop_repeated(spec: TopicSpec, rows: pa.Table, next_offsets: dict[PartitionKey, int]) -> pa.Table:
    """Return the rows without those of a position that was read before. Update the next offset of each partition."""
    is_new = []
    columns = ("_topic_id", "_partition", "_offset", *ORDER_DEPENDENT_COLUMNS)
    for topic_id, partition, offset, *flags in zip(*(rows[name].to_pylist() for name in columns), strict=True):
        is_new.append(offset >= next_offsets[(topic_id, partition)])
        if is_new[-1]:
            next_offsets[(topic_id, partition)] = offset + 1
        elif flags != [True, False]:  # no repetition of the same record
            raise _make_replaced_log_error(spec, partition, offset)
    return rows if all(is_new) else rows.filter(pa.array(is_new))


def require_same_log(store: Store, spec: TopicSpec, snapshot: Snapshot, state: TableState, start_seq: int) -> None:
    """Raise StoreMismatch if the database has other records than the lake at positions that the lake has."""
    last_rows = [
        replace(part, start_offset=position.last_offset, end_offset=position.last_offset + 1)
        for part in snapshot.list_ranges(spec)
        if (position := state.positions.get(part.key)) and position.last_offset is not None
    ]
    # The rows that the sink has added since the last export, at positions that the lake has.
    exported = [replace(part, start_offset=part.end_offset) for part in snapshot.list_exported_ranges(spec, state)]
    added_sql = _build_query(spec, "part, _offset", "< start_offset AND (NOT is_duplicate OR content_mismatch)") + " LIMIT 1"
    last_seq = snapshot.next_seq - 1
    can_have_added = bool(start_seq and exported)
    if not last_rows and not can_have_added:
        return
    with store.open_read_session(limit_s=_SELECT_LIMIT_S) as session:
        last_sql = _build_query(spec, "topic_id, part, _offset, content_hash")
        rows = session(last_sql, _make_parameters(last_rows, 0, last_seq)).rows if last_rows else []
        added = session(added_sql, _make_parameters(exported, start_seq, last_seq)).rows if can_have_added else []
    differing = [
        (part, offset) for topic_id, part, offset, hash_ in rows if hash_ != state.positions[(topic_id, part)].last_hash
    ]
    for part, offset in [*differing, *added]:
        raise _make_replaced_log_error(spec, part, offset)


def _make_replaced_log_error(spec: TopicSpec, partition: int, offset: int) -> StoreMismatch:
    return StoreMismatch(
        f"two different records of the table {spec.table} have the position partition {partition}, offset {offset}",
        "the log has lost records or was replaced by an older copy, so positions do not identify records any more",
        "rebuild the database from the log (charter repair), then export to another URL",
    )


def select_erased(spec: TopicSpec, rows: pa.Table, prompt_ids: Sequence[str]) -> pa.BooleanArray:
    """Return which rows an erasure of the prompts deletes, as in `engine.tables.build_erasure_statements`.

    `rows` needs the column `prompt_id`, and for dead letters also `value` and `source_key`.
    """
    is_erased = compute.fill_null(compute.is_in(rows["prompt_id"], pa.array(prompt_ids, pa.string())), False)
    if spec.record_class is not DeadLetter:
        return is_erased
    texts = [prompt_id.encode() for prompt_id in prompt_ids]
    pairs = zip(rows["value"].to_pylist(), rows["source_key"].to_pylist(), strict=True)
    has_id = pa.array([any(text in (part or b"") for text in texts for part in pair) for pair in pairs], pa.bool_())
    return compute.or_(is_erased, has_id)
