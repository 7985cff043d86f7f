"""Export the database to a lake, verify a lake against the database, and erase prompts from a lake.

An export reads the database in pages and commits to the lake when enough rows have been read for a large file, and at the end of each
table. Each commit contains rows and positions. So a killed export loses at most the rows after its last commit, and the next export
reads these again.

The table `erasures` is exported first and last. Before its new rows are added, the rows of their prompts are deleted from all
tables of the lake. So the lake never has an erasure whose prompt it still has, and an erasure that could not reach the lake is done
by the next export.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import pyarrow as pa

from charter.lake.claims import LakeAddress, claim_lake, remember_lake, require_one_lake
from charter.lake.evolution import to_current_schema
from charter.lake.iceberg_lake import IcebergLake
from charter.lake.parquet_lake import ParquetLake
from charter.lake.positions import PartitionKey, Position, TableState, summarize_rows
from charter.lake.rows import (
    ORDER_DEPENDENT_COLUMNS,
    Snapshot,
    count_rows,
    read_pages,
    read_snapshot,
    require_same_log,
)
from charter.lake.storage import LakeStorage
from engine.errors import CharterError, DependencyUnreachable, StoreMismatch, UsageError
from engine.progress import WorkProgress
from engine.store import Store
from engine.text import format_count
from schemas.records import Erasure
from schemas.topics import TOPICS, TopicSpec

COMMIT_BYTES = 256 * 1024 * 1024  # of rows in memory; the file is several times smaller
Lake = ParquetLake | IcebergLake
_ERASURES = TOPICS[Erasure.topic]


@dataclass
class LakeReport:
    """What an export did. `behind` has lines about partitions of which the lake has more records than the database."""

    num_rows: Counter[str] = field(default_factory=Counter)
    num_files: int = 0
    num_erased_rows: int = 0
    behind: list[str] = field(default_factory=list)


@contextmanager
def open_lake(data_folder: Path, address: LakeAddress, *, take_over: bool = False) -> Iterator[Lake]:
    """Open a lake for writing. Raise LakeBusy if another process writes to it, UsageError if another kind of lake is there."""
    require_one_lake(data_folder, address)
    storage = LakeStorage(address.url)
    with claim_lake(storage, data_folder, address, take_over=take_over) as claim:
        yield IcebergLake(storage, address, claim) if address.is_iceberg else ParquetLake(storage, claim)


def export_lake(
    store: Store, data_folder: Path, address: LakeAddress, progress: WorkProgress, *, take_over: bool = False
) -> LakeReport:
    """Add the rows that the lake does not have. Return what was done.

    Raise LakeBusy if another process writes to the lake, StoreMismatch if the lake belongs to another log, LakeUnreachable if the
    lake cannot be read or written.
    """
    snapshot = read_snapshot(store)  # without a database, raise the error before the lake is created
    report = LakeReport()
    with open_lake(data_folder, address, take_over=take_over) as lake:
        _require_own_lake(lake, address, snapshot)
        remember_lake(data_folder, address)
        others = [spec for spec in TOPICS.values() if spec is not _ERASURES]
        ends = [_export_table(store, lake, spec, snapshot, report, progress) for spec in (_ERASURES, *others)]
        # An erasure can have deleted rows in the database after they were read.
        ends.append(_export_table(store, lake, _ERASURES, read_snapshot(store), report, progress))
        states = {
            end.spec.table: lake.read_state(end.spec).reach(end.positions, end.session_id, end.next_seq) for end in ends if end
        }
        lake.finish(states, snapshot.history.cluster_ids)
    return report


@dataclass(frozen=True)
class _TableEnd:
    """Where the export of a table ended. See `TableState`."""

    spec: TopicSpec
    positions: Sequence[Position]
    session_id: str | None
    next_seq: int


def _export_table(
    store: Store, lake: Lake, spec: TopicSpec, snapshot: Snapshot, report: LakeReport, progress: WorkProgress
) -> _TableEnd | None:
    """Add the new rows of a table. Return where it ended, or None if there was nothing new."""
    progress.start_step(f"exporting {spec.table}")
    state, ranges = lake.read_state(spec), snapshot.list_new_ranges(spec, lake.read_state(spec))
    start_seq = snapshot.get_start_seq(state)
    behind = _describe_lag_behind_lake(spec, snapshot, state)
    report.behind += behind
    if not ranges and (start_seq or not state.positions):
        return None
    require_same_log(store, spec, snapshot, state, start_seq)
    # While the database is rebuilt, further rows can have positions that the lake has, so the next export must read all of them.
    session_id = None if behind else snapshot.session_id
    topics = {part.topic_id: part.topic for part in snapshot.ranges}
    pages: list[pa.Table] = []

    def commit() -> None:
        rows = pa.concat_tables(pages)
        pages.clear()
        if spec is _ERASURES:
            report.num_erased_rows += _erase(lake, rows["prompt_id"].to_pylist(), progress)
        report.num_files += lake.append(spec, rows, state, snapshot.history.cluster_ids)
        report.num_rows[spec.table] += len(rows)

    for rows, next_seq in read_pages(store, spec, snapshot, ranges, start_seq):
        pages.append(rows)
        state = state.add_rows(rows, topics, session_id, next_seq)
        progress.num_done += len(rows)
        if sum(page.nbytes for page in pages) >= COMMIT_BYTES:
            commit()
    end = _TableEnd(spec, snapshot.list_ends(spec), session_id, snapshot.next_seq)
    if any(map(len, pages)):
        state = state.reach(end.positions, end.session_id, end.next_seq)
        commit()
    return end


def _erase(lake: Lake, prompt_ids: Sequence[str], progress: WorkProgress) -> int:
    """Delete the rows of prompts from all tables except `erasures`. Return the number of deleted rows."""
    num_rows = 0
    for spec in TOPICS.values():
        if spec is not _ERASURES:
            progress.start_step(f"erasing from {spec.table}")
            num_rows += lake.erase(spec, prompt_ids)
    return num_rows


def erase_from_lake(data_folder: Path, address: LakeAddress, prompt_ids: Sequence[str], progress: WorkProgress) -> int:
    """Delete the rows of prompts from a lake and their bytes from its files. Return the number of deleted rows."""
    with open_lake(data_folder, address) as lake:
        if not lake.exists:
            raise UsageError(
                f"there is no lake at {address.url} any more",
                "its manifest or its tables do not exist, so it is unknown whether it still has the text",
                f"if the lake is deleted, type: {address.make_command()} --forget",
            )
        return _erase(lake, prompt_ids, progress)


def _require_own_lake(lake: Lake, address: LakeAddress, snapshot: Snapshot) -> None:
    """Raise StoreMismatch if the lake has rows of other logs only."""
    if lake.cluster_ids and lake.cluster_ids.isdisjoint(snapshot.history.cluster_ids):
        raise StoreMismatch(
            f"{address.url} has the records of another log",
            f"its records come from log {', '.join(sorted(lake.cluster_ids))},"
            f" and those of the database from log {', '.join(sorted(snapshot.history.cluster_ids)) or '(none)'}",
            "give another URL, or the data folder of this log: --data FOLDER",
        )


def _describe_lag_behind_lake(spec: TopicSpec, snapshot: Snapshot, state: TableState) -> list[str]:
    ends = {part.key: part.end_offset for part in snapshot.list_ranges(spec)}
    return [
        f"{spec.table}: the database ends at {position.topic}[{position.partition}]@{ends.get(key, 0)} and the lake at"
        f" {position.next_offset}"
        for key, position in state.positions.items()
        if key in ends and ends[key] < position.next_offset
    ]


# Verification


@dataclass
class LakeVerification:
    """The result of a comparison. `problems` are differences; `num_newer` is the number of newer rows in the database."""

    num_rows: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    num_newer: int = 0


@dataclass(frozen=True)
class _Digest:
    """The number of some rows, and the sums of their hashes: of their content, and of all columns."""

    num_rows: int = 0
    content_sum: int = 0
    row_sum: int = 0

    def __add__(self, other: _Digest) -> _Digest:
        return _Digest(
            self.num_rows + other.num_rows,
            (self.content_sum + other.content_sum) % 2**64,
            (self.row_sum + other.row_sum) % 2**64,
        )


def verify_lake(store: Store, address: LakeAddress, progress: WorkProgress) -> LakeVerification:
    """Compare every row of the lake with the database, and the lake with its recorded counts and hashes.

    The comparison covers the positions that the lake has, and every column except those that change when a sink reads the log
    again: the marks of duplicates, and the time of a dead letter that the sink made. Newer rows of the database are counted.
    """
    storage = LakeStorage(address.url)
    lake = IcebergLake(storage, address) if address.is_iceberg else ParquetLake(storage)
    if not lake.exists:
        raise UsageError(f"there is no lake at {address.url}", "no export has written there", f"type: {address.make_command()}")
    snapshot, result = read_snapshot(store), LakeVerification()
    _require_own_lake(lake, address, snapshot)
    if not lake.is_complete:
        result.problems.append(f"the last export did not finish; to continue it, type: {address.make_command()}")
    with duckdb.connect() as connection:
        for spec in TOPICS.values():
            progress.start_step(f"verifying {spec.table}")
            _verify_table(store, lake, spec, snapshot, connection, result, progress)
    return result


def _verify_table(
    store: Store,
    lake: Lake,
    spec: TopicSpec,
    snapshot: Snapshot,
    connection: duckdb.DuckDBPyConnection,
    result: LakeVerification,
    progress: WorkProgress,
) -> None:
    state = lake.read_state(spec)
    in_lake: dict[PartitionKey, _Digest] = {}
    in_database: dict[PartitionKey, _Digest] = {}
    try:
        for rows in lake.iter_data(spec):
            _add_digests(connection, to_current_schema(spec, rows), in_lake)
            progress.num_done += len(rows)
    except DependencyUnreachable:
        raise
    except CharterError as error:  # a damaged or missing file
        result.problems.append(f"{spec.table}: {error.what}: {error.why}")
        return
    exported, new = snapshot.list_exported_ranges(spec, state), snapshot.list_new_ranges(spec, state)
    for rows, _ in read_pages(store, spec, snapshot, exported) if exported else ():
        _add_digests(connection, rows, in_database)
        progress.num_done += len(rows)
    result.num_newer += count_rows(store, spec, snapshot, new, snapshot.get_start_seq(state)) if new else 0
    for key in sorted({*state.positions, *in_lake, *in_database}):
        result.problems += _compare(spec, key, state, in_lake.get(key, _Digest()), in_database.get(key, _Digest()))
    result.num_rows[spec.table] = sum(digest.num_rows for digest in in_lake.values())


def _compare(spec: TopicSpec, key: PartitionKey, state: TableState, lake: _Digest, database: _Digest) -> Iterator[str]:
    position = state.positions.get(key)
    name = f"{spec.table}, {position.topic if position else key[0]}[{key[1]}]"
    if position is None or (lake.num_rows, lake.content_sum) != (position.num_rows, position.content_sum):
        recorded = format_count(position.num_rows if position else 0, "rows")
        yield f"{name}: the files have {format_count(lake.num_rows, 'rows')}, but the lake records {recorded} or other content"
    if lake != database:
        difference = "other content" if lake.num_rows == database.num_rows else format_count(database.num_rows, "rows")
        yield f"{name}: the lake has {format_count(lake.num_rows, 'rows')}, the database {difference}"


def _add_digests(connection: duckdb.DuckDBPyConnection, rows: pa.Table, digests: dict[PartitionKey, _Digest]) -> None:
    connection.register("all_rows", rows)
    # A sink that reads the log again makes its dead letters again, at another time.
    columns = f"* EXCLUDE ({', '.join(ORDER_DEPENDENT_COLUMNS)}) REPLACE (CASE WHEN stage <> 'sink' THEN created_at END AS created_at)"
    sql = f"""SELECT _topic_id, _partition, sum(hash(compared))::HUGEINT FROM (SELECT {columns} FROM all_rows) AS compared
              GROUP BY ALL"""
    row_sums = {(topic_id, partition): row_sum for topic_id, partition, row_sum in connection.execute(sql).fetchall()}
    connection.unregister("all_rows")
    for summary in summarize_rows(rows):
        key = (summary.topic_id, summary.partition)
        digest = _Digest(summary.num_rows, summary.content_sum, int(row_sums[key]) % 2**64)
        digests[key] = digests.get(key, _Digest()) + digest
