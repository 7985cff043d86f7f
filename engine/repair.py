"""Repair a damaged database: move the damaged files away, so that the sink reads the lost rows from the log again.

Nothing is deleted. The files are moved to a new folder `damaged-TIME` next to the database, with their names. If only the
write-ahead log (WAL) is damaged, only the WAL is moved. The database then has the rows and the offsets of its last checkpoint,
and the sink continues from these offsets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from engine.bus.port import Bus, TopicPartition
from engine.checkpoints import fsync_path
from engine.commit_history import read_matching_offsets
from engine.errors import CharterError, DataFolderVersionMismatch, StoreDamaged, StoreMismatch, WalDamaged
from engine.store import Store, check_format_version, open_connection
from schemas.topics import TOPICS

_LOCK_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Repair:
    """What a repair found. `problems` are the errors for which files were moved, or for which the log was accepted.

    `moved` are the new paths of the moved files. `missing` maps a partition to the number of its records that neither the
    repaired database nor the log has.
    """

    problems: Sequence[CharterError] = ()
    moved: Sequence[Path] = ()
    missing: Mapping[TopicPartition, int] = field(default_factory=dict)


def repair_database(store: Store, bus: Bus, *, keep_rows: bool = False) -> Repair:
    """Check the database and move its damaged files away. The sink can then open it, and restores its rows from the log.

    A database of another log, of another version, or ahead of the log is also moved away. If `keep_rows` is true, a database
    that does not belong to this log stays, and the sink adds the whole log to its rows. The caller must hold the sink's lock.
    Raise StoreBusy if another program has the database open.
    """
    problems: list[CharterError] = []
    moved: list[Path] = []
    with store.access_lock.write_lock(_LOCK_TIMEOUT_S):
        while problem := find_problem(store, bus):
            problems.append(problem)
            if keep_rows and isinstance(problem, StoreMismatch):
                _reset_offsets(store, bus)
                continue
            folder = moved[0].parent if moved else _create_folder(store.path.parent)
            wal_paths = store.list_wal_paths()
            only_wal = isinstance(problem, WalDamaged) and wal_paths
            moved += [path.rename(folder / path.name) for path in (wal_paths if only_wal else [store.path, *wal_paths])]
            fsync_path(store.path.parent)
        return Repair(problems, moved, _count_missing_records(store, bus) if moved else {})


def find_problem(store: Store, bus: Bus) -> CharterError | None:
    """Return why the sink cannot use the database. Return None if it can, or if there is no database.

    This reads every block, because DuckDB checks a block only when it reads the block. The caller must hold the access lock.
    """
    try:
        store.require_no_orphaned_wal()
        if not store.path.exists():
            return None
        with open_connection(store.path, read_only=True) as connection:
            check_format_version(connection, store.path)
            tables = connection.execute("SELECT schema_name, table_name FROM duckdb_tables()").fetchall()
            for schema, table in tables:
                connection.execute(f'SELECT bit_xor(hash(record)) FROM "{schema}"."{table}" AS record').fetchall()
            if tables:
                read_matching_offsets(connection, bus, store.path)
    except (StoreDamaged, DataFolderVersionMismatch, StoreMismatch) as error:
        return error
    return None


def _create_folder(parent: Path) -> Path:
    """Create a new folder for the moved files. Its name has the time, and a number if there is such a folder already."""
    name = f"damaged-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    folder = next(parent / name for name in names if not (parent / name).exists())
    folder.mkdir()
    return folder


def _reset_offsets(store: Store, bus: Bus) -> None:
    """Let the sink read every partition of this log from its beginning. Rows that the database already has become duplicates."""
    topic_ids, beginnings = bus.topic_ids(list(TOPICS)), bus.beginning_offsets(list(TOPICS))
    rows = [[bus.cluster_id, topic_ids[topic], topic, partition, offset] for (topic, partition), offset in beginnings.items()]
    with open_connection(store.path, read_only=False) as connection:
        connection.begin()
        sql = "DELETE FROM raw.sink_offsets WHERE cluster_id = ? RETURNING topic_id, partition, first_seq"
        first_seqs = {(topic_id, p): seq for topic_id, p, seq in connection.execute(sql, [bus.cluster_id]).fetchall()}
        ((next_seq,),) = connection.execute("SELECT next_seq FROM raw.sink_state").fetchall()
        # The rows that the database already has of the same topic stay rows of this topic.
        rows = [[*row, first_seqs.get((row[1], row[3]), next_seq)] for row in rows]
        connection.executemany("INSERT INTO raw.sink_offsets VALUES (?, ?, ?, ?, ?, ?)", rows)
        connection.execute("UPDATE raw.sink_state SET complete_seq = NULL")
        connection.commit()


def _count_missing_records(store: Store, bus: Bus) -> dict[TopicPartition, int]:
    """Return, for each partition, the number of records below the beginning of the log that the database does not have."""
    offsets = {}
    if store.path.exists():
        with open_connection(store.path, read_only=True) as connection:
            if connection.execute("SELECT count(*) FROM duckdb_tables()").fetchall() != [(0,)]:
                offsets = read_matching_offsets(connection, bus, store.path)
    counts = {key: beginning - offsets.get(key, 0) for key, beginning in bus.beginning_offsets(list(TOPICS)).items()}
    return {key: number for key, number in counts.items() if number > 0}
