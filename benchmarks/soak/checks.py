"""Count what was lost or doubled: on the log, in the database and in the lake. Every count must be 0.

The checks read the database file and the Parquet files with DuckDB, and not with the code of the sink or of the export. No other
process may have the database open.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import duckdb
import pyarrow as pa

from engine.bus.port import Bus
from engine.bus.read import read_topic
from engine.tables import list_columns
from schemas.codec import RecordError, decode_record
from schemas.records import DroppedRollout, Metric, ProducerOffset, Score
from schemas.topics import TOPICS, TopicSpec

# A killed generator repeats an index. For each index there must be one position and the prompts that the position counts.
_INDEX_QUERIES = {
    "indexes_lost": """
        SELECT coalesce(max(next_line) - count(DISTINCT next_line), 0) FROM raw.producer_offsets WHERE recipe_hash <> ''""",
    "indexes_doubled": """
        SELECT count(*) - count(DISTINCT next_line) FROM raw.producer_offsets WHERE recipe_hash <> ''""",
    "indexes_with_other_prompts": """
        WITH positions AS (
            SELECT DISTINCT next_line - 1 AS index, published FROM raw.producer_offsets WHERE recipe_hash <> ''
        ), expected AS (
            SELECT index, published - coalesce(lag(published) OVER (ORDER BY index), 0) AS num_prompts FROM positions
        ), found AS (
            SELECT recipe_item.index AS index, count(*) AS num_prompts FROM raw.prompts WHERE recipe_item IS NOT NULL GROUP BY 1
        )
        SELECT count(*) FROM expected FULL JOIN found USING (index)
        WHERE coalesce(expected.num_prompts, 0) <> coalesce(found.num_prompts, 0)""",
}
# A trainer that starts again after a kill publishes the metrics of its unfinished batch again, and the scores and dropped rollouts that
# the sink had not written. They have the same ids, so the sink marks them as duplicates, and the tables have each of them once.
_REPEATED_RECORDS = (Score, Metric, DroppedRollout)
# The records of which each prompt must have exactly one. With two completions, a prompt has one pair to judge.
_OUTCOMES = {
    "response": "SELECT prompt_id FROM raw.responses",
    "chain_end": "SELECT prompt_id FROM raw.critiques WHERE final UNION ALL SELECT prompt_id FROM raw.revisions WHERE final",
    "judgment": "SELECT prompt_id FROM raw.preferences",
}


def count_index_faults(connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """Count the indexes of the generator that have no outcome, two outcomes, or other prompts than their position counts."""
    return {name: _count(connection, sql) for name, sql in _INDEX_QUERIES.items()}


def count_prompt_faults(connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """Count the prompts that have no or several responses, ends of a chain, or judgments."""
    faults = {}
    for name, sql in _OUTCOMES.items():
        num_outcomes = f"(SELECT count(*) FROM ({sql}) AS outcomes WHERE outcomes.prompt_id = prompts.prompt_id)"
        for fault, condition in ((f"prompts_without_{name}", "= 0"), (f"prompts_with_several_{name}s", "> 1")):
            faults[fault] = _count(connection, f"SELECT count(*) FROM prompts WHERE {num_outcomes} {condition}")
    return faults


def compare_with_log(connection: duckdb.DuckDBPyConnection, bus: Bus) -> tuple[dict[str, int], dict[str, int]]:
    """Compare the records of all topics with the rows of their tables. Return the counts of faults, and of records.

    A record and its row have the same partition, offset and record id.
    """
    faults = {
        "records_missing_in_database": 0, "rows_not_on_the_log": 0, "record_ids_doubled_on_the_log": 0, "record_ids_doubled_in_tables": 0,
        "repeated_records_with_other_content": 0,
    }  # fmt: skip
    sizes = {"records": 0, "records_repeated_by_the_trainer": 0}
    for spec in TOPICS.values():
        log = _read_record_ids(bus, spec)
        sizes["records"] += len(log)
        connection.register("log", log)
        rows = f"SELECT _partition, _offset, record_id::VARCHAR AS record_id FROM raw.{spec.table}"
        records = "SELECT _partition, _offset, record_id FROM log"
        doubled = "SELECT count(*) - count(DISTINCT record_id) FROM"
        faults["records_missing_in_database"] += _count(connection, f"SELECT count(*) FROM ({records} EXCEPT ALL {rows})")
        faults["rows_not_on_the_log"] += _count(connection, f"SELECT count(*) FROM ({rows} EXCEPT ALL {records})")
        faults["record_ids_doubled_in_tables"] += _count(connection, f"{doubled} {spec.table}")
        if spec.record_class in _REPEATED_RECORDS:
            sizes["records_repeated_by_the_trainer"] += _count(connection, f"{doubled} log")
            mismatches = f"SELECT count(*) FROM raw.{spec.table} WHERE content_mismatch"
            faults["repeated_records_with_other_content"] += _count(connection, mismatches)
        elif spec.record_class is not ProducerOffset:  # all positions of a producer have the same id
            faults["record_ids_doubled_on_the_log"] += _count(connection, f"{doubled} log")
        connection.unregister("log")
    return faults, sizes


def _read_record_ids(bus: Bus, spec: TopicSpec) -> pa.Table:
    """Return the position and the id of each record of a topic. The id of a record that cannot be decoded is empty."""
    partitions, offsets, record_ids = [], [], []
    for record in read_topic(bus, spec.name):
        partitions.append(record.partition)
        offsets.append(record.offset)
        try:
            record_ids.append(str(decode_record(record.value or b"", spec.record_class).record_id))
        except RecordError:
            record_ids.append("")
    return pa.table(
        {
            "_partition": pa.array(partitions, pa.int32()),
            "_offset": pa.array(offsets, pa.int64()),
            "record_id": pa.array(record_ids, pa.string()),
        }
    )


def compare_with_lake(connection: duckdb.DuckDBPyConnection, lake: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Compare all columns of all rows of the lake with the database. Return the counts of faults, and of rows and files."""
    faults = {"rows_missing_in_lake": 0, "lake_rows_not_in_database": 0, "lake_columns_that_differ": 0}
    sizes = {"lake_rows": 0, "lake_files": 0}
    for spec in TOPICS.values():
        paths = sorted(map(str, (lake / spec.table).rglob("*.parquet")))
        sizes["lake_files"] += len(paths)
        if not paths:
            faults["rows_missing_in_lake"] += _count(connection, f"SELECT count(*) FROM raw.{spec.table}")
            continue
        files = f"read_parquet({paths!r}, hive_partitioning = false, union_by_name = true)"
        sizes["lake_rows"] += _count(connection, f"SELECT count(*) FROM {files}")
        types = dict(list_columns(spec))
        in_lake = {name for name, *_ in connection.execute(f"DESCRIBE SELECT * FROM {files}").fetchall()}
        # The commit sequence is the order of the rows in one database. The lake also has the id of the topic.
        faults["lake_columns_that_differ"] += len((types.keys() - {"commit_seq"}) ^ (in_lake - {"_topic_id"}))
        shared = sorted(types.keys() & in_lake)
        database_rows = f"SELECT {_build_casts(shared, types)} FROM raw.{spec.table}"
        lake_rows = f"SELECT {_build_casts(shared, types)} FROM {files}"
        faults["rows_missing_in_lake"] += _count(connection, f"SELECT count(*) FROM ({database_rows} EXCEPT ALL {lake_rows})")
        faults["lake_rows_not_in_database"] += _count(
            connection, f"SELECT count(*) FROM ({lake_rows} EXCEPT ALL {database_rows})"
        )
    return faults, sizes


def _build_casts(names: list[str], types: Mapping[str, str]) -> str:
    """Return columns with the types of the database. The lake has ids as texts, and hashes as decimal numbers."""
    return ", ".join(f'"{name}"::{types[name]} AS "{name}"' for name in names)


def _count(connection: duckdb.DuckDBPyConnection, sql: str) -> int:
    ((count,),) = connection.execute(sql).fetchall()
    return int(count)
