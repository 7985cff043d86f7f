"""Derive DuckDB tables and Arrow schemas from the record classes.

Raw tables are in the schema `raw`. They are append-only and have no primary key. In addition to the fields of the record, each
row has these columns:

* `_partition`, `_offset`: the position of the record in the log;
* `commit_seq`: the position of the row in the insertion order of all rows of this database;
* `content_hash`: a hash of the content of the record;
* `is_duplicate`: true if an earlier row has the same record id;
* `content_mismatch`: true if the row is a duplicate with different content.

For each raw table, a view of the same name in `main` selects the rows that are not duplicates. All other views use these views. The
view `producer_offsets` selects the newest position of each producer instead.
They are defined in `views.sql` (training data and traces), `stats_views.sql` (statistics), `monitor_views.sql` (reward hacking),
`training_views.sql` (training progress), `suite_views.sql` and `suite_result_views.sql` (evaluation suites).
"""

from __future__ import annotations

import types
import typing
from datetime import datetime
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, Union

import pyarrow as pa
from pydantic import BaseModel

from engine.eligibility import ELIGIBILITY_MACROS
from engine.models.control_tokens import MARKER_MACRO
from schemas.records import Erasure, Float32, Identifier, ProducerOffset, Record
from schemas.topics import TOPICS, TopicSpec

_VIEW_FILES = tuple(
    Path(__file__).with_name(f"{name}.sql")
    for name in ("views", "stats_views", "monitor_views", "training_views", "suite_views", "suite_result_views")
)
_PRIMITIVE_TYPES: dict[Any, tuple[str, pa.DataType]] = {
    str: ("VARCHAR", pa.string()),
    int: ("BIGINT", pa.int64()),
    float: ("DOUBLE", pa.float64()),
    bool: ("BOOLEAN", pa.bool_()),
    bytes: ("BLOB", pa.binary()),
    datetime: ("TIMESTAMP", pa.timestamp("us")),
}
_SINK_COLUMNS = {
    "_partition": ("INTEGER", pa.int32()),
    "_offset": ("BIGINT", pa.int64()),
    "commit_seq": ("BIGINT", pa.int64()),
    "content_hash": ("UBIGINT", pa.uint64()),
}
_DUPLICATE_FLAGS = (("is_duplicate", "BOOLEAN"), ("content_mismatch", "BOOLEAN"))


def _get_column_type(annotation: Any) -> tuple[str, pa.DataType]:
    """Return the DuckDB type and the Arrow type of a record field."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _PRIMITIVE_TYPES:
        return _PRIMITIVE_TYPES[annotation]
    if origin is typing.Annotated:
        if any(isinstance(extra, Identifier) for extra in arguments[1:]):
            return "UUID", pa.string()
        is_float32 = any(isinstance(extra, Float32) for extra in arguments[1:])
        return ("FLOAT", pa.float32()) if is_float32 else _get_column_type(arguments[0])
    if origin in (Union, types.UnionType):
        return _get_column_type(next(a for a in arguments if a is not types.NoneType))
    if origin is list:
        sql, arrow = _get_column_type(arguments[0])
        return f"{sql}[]", pa.list_(arrow)
    if origin is dict:
        sql, arrow = _get_column_type(arguments[1])
        return f"MAP(VARCHAR, {sql})", pa.map_(pa.string(), arrow)
    if issubclass(annotation, StrEnum):
        return _PRIMITIVE_TYPES[str]
    fields = _get_columns(annotation)
    sql = ", ".join(f'"{name}" {sql_type}' for name, (sql_type, _) in fields.items())
    return f"STRUCT({sql})", pa.struct([(name, arrow) for name, (_, arrow) in fields.items()])


@cache
def _get_columns(model: type[BaseModel]) -> dict[str, tuple[str, pa.DataType]]:
    """Return a mapping of each field to its DuckDB type and Arrow type."""
    return {
        name: _get_column_type(typing.Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation)
        for name, info in model.model_fields.items()
    }


@cache
def get_arrow_schema(model: type[Record]) -> pa.Schema:
    """Return the Arrow schema of the rows that the sink inserts for a record class."""
    return pa.schema([(name, arrow) for name, (_, arrow) in (_get_columns(model) | _SINK_COLUMNS).items()])


def build_create_statements() -> list[str]:
    """Return the statements that create all tables and views of a database."""
    statements = [
        *ELIGIBILITY_MACROS,
        MARKER_MACRO,
        "CREATE SCHEMA IF NOT EXISTS raw",
        # `first_seq` is the first commit sequence number with which a row of this partition can be from this topic. A topic that is
        # deleted and created again has the same name and another id.
        "CREATE TABLE IF NOT EXISTS raw.sink_offsets"
        " (cluster_id VARCHAR, topic_id VARCHAR, topic VARCHAR, partition INTEGER, next_offset BIGINT, first_seq BIGINT)",
        "CREATE TABLE IF NOT EXISTS raw.sink_state (version INTEGER, next_seq BIGINT, complete_seq BIGINT)",
        "CREATE TABLE IF NOT EXISTS raw.sink_sessions (number BIGINT, session_id VARCHAR, first_seq BIGINT)",
        # The prompts whose rows are deleted, but whose text can still be in the files of the log and of the database.
        "CREATE TABLE IF NOT EXISTS raw.unfinished_erasures (prompt_id UUID)",
    ]
    for spec in TOPICS.values():
        statements += [_build_create_table(spec), f"CREATE OR REPLACE VIEW {spec.table} AS {_build_deduplication_query(spec)}"]
    return [*statements, _build_status_view(), _build_run_view(), *(path.read_text(encoding="utf-8") for path in _VIEW_FILES)]


def list_columns(spec: TopicSpec) -> list[tuple[str, str]]:
    """Return the name and the DuckDB type of every column of a raw table."""
    return [*((name, sql) for name, (sql, _) in (_get_columns(spec.record_class) | _SINK_COLUMNS).items()), *_DUPLICATE_FLAGS]


def _is_position(spec: TopicSpec) -> bool:
    """Return whether a record of the topic replaces the earlier records with its id, as the position of a producer does."""
    return spec.record_class is ProducerOffset


def _build_create_table(spec: TopicSpec) -> str:
    fields = ", ".join(f'"{name}" {sql}' for name, sql in list_columns(spec))
    return f"CREATE TABLE IF NOT EXISTS raw.{spec.table} ({fields})"


def _build_deduplication_query(spec: TopicSpec) -> str:
    sink_columns = "_partition, _offset, content_hash, is_duplicate, content_mismatch"
    if _is_position(spec):
        newest = "QUALIFY row_number() OVER (PARTITION BY record_id ORDER BY next_line DESC, commit_seq) = 1"
        return f"SELECT * EXCLUDE ({sink_columns}) FROM raw.{spec.table} {newest}"
    return f"SELECT * EXCLUDE ({sink_columns}) FROM raw.{spec.table} WHERE NOT is_duplicate"


def build_insert_statement(spec: TopicSpec) -> str:
    """Return the statement that inserts the Arrow table `batch` and marks duplicates.

    A row is a duplicate if its record id is already in the table or earlier in the batch.
    """
    return f"""
        INSERT INTO raw.{spec.table} BY NAME
        WITH incoming AS (
            SELECT * REPLACE (record_id::UUID AS record_id),
                   row_number() OVER same_id AS nth, first_value(content_hash) OVER same_id AS first_hash
            FROM batch WINDOW same_id AS (PARTITION BY record_id ORDER BY commit_seq)
        ), present AS (
            SELECT record_id, content_hash FROM raw.{spec.table}
            WHERE NOT is_duplicate AND record_id IN (SELECT record_id FROM incoming)
        )
        SELECT incoming.* EXCLUDE (nth, first_hash),
               nth > 1 OR present.record_id IS NOT NULL AS is_duplicate,
               is_duplicate AND incoming.content_hash <> coalesce(present.content_hash, first_hash) AS content_mismatch
        FROM incoming LEFT JOIN present USING (record_id)
        ORDER BY commit_seq"""


@cache
def build_erasure_statements() -> list[str]:
    """Return the statements that delete all rows of given prompts. Each statement has the list of prompt ids as a parameter.

    A dead letter belongs to a prompt if its bytes contain the id of the prompt.
    """
    specs = [spec for spec in TOPICS.values() if spec.record_class is not Erasure]
    by_prompt = [f"DELETE FROM raw.{spec.table} WHERE prompt_id IN (SELECT unnest(?::UUID[]))" for spec in specs]
    dead_letters = """
        DELETE FROM raw.dead_letters WHERE EXISTS (
            SELECT 1 FROM (SELECT hex(encode(unnest(?::VARCHAR[]))) AS id)
            WHERE contains(hex(value), id) OR contains(hex(source_key), id))"""
    return [*by_prompt, dead_letters, "INSERT INTO raw.unfinished_erasures SELECT unnest(?::UUID[])"]


def _build_run_view() -> str:
    """Return the view `run_records`. It lists the records of each run, including records that an earlier run also wrote."""
    topics = ("prompts", "responses", "critiques", "revisions", "preferences", "grades", "demonstrations")
    parts = [f"SELECT DISTINCT run_id, '{topic}' AS topic, record_id FROM raw.{topic}" for topic in topics]
    return f"CREATE OR REPLACE VIEW run_records AS {' UNION ALL '.join(parts)}"


def build_duplicate_count(table: str) -> str:
    """Return an expression: the number of rows of a raw table that repeat a record of their own run."""
    return f"""(count(*) FILTER (is_duplicate) - (
        SELECT count(*) FROM (SELECT DISTINCT record_id, run_id FROM raw.{table} WHERE is_duplicate) again
        JOIN raw.{table} one ON one.record_id = again.record_id AND NOT one.is_duplicate
        WHERE one.run_id IS DISTINCT FROM again.run_id))"""


def _build_duplicate_counts(spec: TopicSpec) -> str:
    """Return the columns `duplicates` and `content_mismatches` of a topic. A later position of a producer is no duplicate."""
    if _is_position(spec):
        return "count(*) - count(DISTINCT (record_id, next_line)) AS duplicates, 0 AS content_mismatches"
    duplicates = build_duplicate_count(spec.table)
    return f"{duplicates} AS duplicates, count(*) FILTER (content_mismatch) AS content_mismatches"


def _build_status_view() -> str:
    """Return the view `pipeline_status`. For each topic it has the number of records, duplicates and content mismatches, and
    the time of the newest row. A record that several runs publish is a record of each of them (`run_records`), not a duplicate.
    """
    parts = [
        f"SELECT {number} AS position, '{spec.name}' AS topic, count(*) FILTER (NOT is_duplicate) AS records,"
        f" {_build_duplicate_counts(spec)}, max(created_at) AS newest FROM raw.{spec.table}"
        for number, spec in enumerate(TOPICS.values())
    ]
    union = " UNION ALL ".join(parts)
    return f"CREATE OR REPLACE VIEW pipeline_status AS SELECT * EXCLUDE (position) FROM ({union}) ORDER BY position"
