"""Replay: publish the records of an earlier run again, with the run id of a new run.

The stages of the new run process these records like all other records. When a replay starts for the first time, its manifest
stores the end offsets of the topics, and the replay does not read records after these offsets. If the replay is started again,
it therefore reads the same records. Each record is copied exactly once: a record that the new run already has is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from pydantic import TypeAdapter

from engine.bus.port import Bus, ConsumerRecord, Offsets
from engine.bus.read import read_between
from engine.erasures import ErasedPrompts
from engine.errors import UsageError
from engine.run_starts import ensure_run_start
from engine.store import Store
from engine.worker import to_producer_record
from schemas.codec import RecordError, decode_record
from schemas.records import Chain, EndReason, Record, Response
from schemas.topics import TOPICS

_BATCH_SIZE = 500
EARLIEST = "earliest"
LATEST = "latest"
R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class ReplayBound:
    """One bound of a replay, as the user typed it.

    A bound is `earliest`, `latest`, an offset (in every partition) or a time.
    """

    text: str

    def resolve_offsets(self, bus: Bus, topics: Sequence[str]) -> Offsets:
        """Return the offset of this bound in each partition."""
        beginnings, ends = bus.beginning_offsets(topics), bus.end_offsets(topics)
        if self.text == EARLIEST:
            return beginnings
        if self.text == LATEST:
            return ends
        if self.text.isdecimal():
            return {key: min(max(int(self.text), beginnings[key]), end) for key, end in ends.items()}
        return bus.offsets_for_time(topics, _parse_timestamp_ms(self.text))


def _parse_timestamp_ms(text: str) -> int:
    try:
        timestamp = datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError(
            f"{text} is not a replay bound",
            str(error),
            "give earliest, latest, an offset such as 1200, a time such as 2026-11-24T10:00, or run:NAME",
        ) from error
    return int(timestamp.timestamp() * 1000)  # a time without a zone is local time


@dataclass
class LogSelection:
    """The records of the log that a replay publishes: records of `run_id` between two offsets that satisfy `predicate`.

    `num_erased` is the number of records without a value that the last call of `read_records` skipped.
    """

    run_id: str
    topics: tuple[str, ...]
    start_offsets: Offsets
    end_offsets: Offsets
    predicate: Callable[[Record], bool]
    num_erased: int = field(default=0, init=False)

    def read_records(self, bus: Bus) -> Iterator[Record]:
        """Yield the records. Skip records that cannot be decoded, because they are already dead letters."""
        self.num_erased = 0
        run_header = ("run", self.run_id.encode())
        for topic in self.topics:
            starts = {key: offset for key, offset in self.start_offsets.items() if key.topic == topic}
            ends = {key: offset for key, offset in self.end_offsets.items() if key.topic == topic}
            for raw in read_between(bus, starts, ends):
                if run_header not in raw.headers:
                    continue
                if raw.value is None:
                    self.num_erased += 1
                elif (record := decode_or_none(raw)) and self.predicate(record):
                    yield record


@dataclass(frozen=True)
class ArchiveSelection:
    """The records of the database that a replay publishes. The database also has records that the log has deleted.

    `start` and `end` are bounds as the user typed them. `before_seq` is the commit sequence number at the start of the replay.
    """

    run_id: str
    topics: tuple[str, ...]
    start: str
    end: str
    before_seq: int
    predicate: Callable[[Record], bool]
    num_erased: int = field(default=0, init=False)  # the database has no rows of erased prompts

    def read_records(self, store: Store) -> Iterator[Record]:
        """Yield the records in the order of the commit sequence."""
        for topic in self.topics:
            spec = TOPICS[topic]
            fields = ", ".join(f'"{name}"' for name in spec.record_class.model_fields)
            bounds = f"{_build_bound_condition('>=', self.start)} AND {_build_bound_condition('<', self.end)}"
            sql = f"""SELECT {fields} FROM raw.{spec.table}
                      WHERE run_id = ? AND commit_seq < ? AND {bounds} ORDER BY commit_seq"""
            for row in store.query_dicts(sql, [self.run_id, self.before_seq], limit_s=600.0):
                record = record_from_row(spec.record_class, row)
                if self.predicate(record):
                    yield record


def _build_bound_condition(operator: str, bound: str) -> str:
    """Return the SQL condition that compares a row of the database with a bound."""
    if bound in (EARLIEST, LATEST):
        return "TRUE"
    if bound.isdecimal():
        return f"_offset {operator} {int(bound)}"
    return f"epoch_ms(created_at) {operator} {_parse_timestamp_ms(bound)}"


def record_from_row(record_class: type[R], row: Mapping[str, Any]) -> R:
    """Return the record of a database row. Ids become strings, and times get the time zone UTC. Other columns are ignored."""
    values = {name: row[name] for name in record_class.model_fields}
    values = TypeAdapter(dict[str, Any]).dump_python(values, mode="json")
    return record_class.model_validate(values | {"created_at": row["created_at"].replace(tzinfo=UTC)})


def decode_or_none(consumer_record: ConsumerRecord) -> Record | None:
    """Decode a record; return None if this fails."""
    try:
        return decode_record(consumer_record.value or b"", TOPICS[consumer_record.topic].record_class)
    except RecordError:
        return None


def is_chain_start(record: Record) -> bool:
    """Return whether the stages can continue from this record. They cannot continue a chain that has ended."""
    return not isinstance(record, Chain) or not record.final


def is_chain_end(record: Record) -> bool:
    """Return whether the record ends a chain."""
    return isinstance(record, Chain) and record.final and record.end_reason not in (EndReason.NONE, EndReason.UNKNOWN)


def is_response_or_chain_end(record: Record) -> bool:
    """Return whether the record has completions or the result of a chain."""
    return isinstance(record, Response) or is_chain_end(record)


@dataclass
class RepublishCounts:
    """Two counts of records: published now, and already published by an earlier start.

    `erased_ids` are the ids of the records that were skipped, because their prompts were erased.
    """

    published: int = 0
    from_earlier_start: int = 0
    erased_ids: set[str] = field(default_factory=set)


def republish_records(bus: Bus, records: Iterable[Record], run_id: str) -> RepublishCounts:
    """Publish each record once, with the run id `run_id`."""
    # Open the writer first. This fences an earlier replay of this run, which then cannot publish after the ids are read.
    writer, erased_prompt_ids = bus.open_writer(f"replay.{run_id}"), ErasedPrompts(bus).prompt_ids
    run_start = ensure_run_start(bus, run_id)
    counts, batch = RepublishCounts(), list[Record]()
    ids_by_topic: dict[str, set[str]] = {}
    try:
        for record in records:
            if record.topic not in ids_by_topic:
                ids_by_topic[record.topic] = _read_record_ids(bus, record.topic, run_id)
            record_ids = ids_by_topic[record.topic]
            if record.prompt_id in erased_prompt_ids:
                counts.erased_ids.add(record.record_id)
                continue
            if record.record_id in record_ids:
                counts.from_earlier_start += 1
                continue
            record_ids.add(record.record_id)
            batch.append(record.model_copy(update={"run_id": run_id}))
            if len(batch) >= _BATCH_SIZE:
                writer.commit([run_start.assign_partition(to_producer_record(copy)) for copy in batch])
                counts.published, batch = counts.published + len(batch), []
        if batch:
            writer.commit([run_start.assign_partition(to_producer_record(copy)) for copy in batch])
    finally:
        writer.close()
    counts.published += len(batch)
    return counts


def _read_record_ids(bus: Bus, topic: str, run_id: str) -> set[str]:
    """Return the ids of a run's records in a topic."""
    run_header = ("run", run_id.encode())
    raw_records = read_between(bus, bus.beginning_offsets([topic]), bus.end_offsets([topic]))
    return {record.record_id for raw in raw_records if run_header in raw.headers and (record := decode_or_none(raw))}
