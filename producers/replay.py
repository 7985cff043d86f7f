"""Replaying: records of an earlier run put on their topic again, under the run id of a new one.

The stages of the new run then work on them like on any others, and its own records beyond them. What is read is bounded by the
ends that the topics had when the replay first started (its manifest keeps them), so a replay that is started again reads the
same. Everything is copied exactly once: what the topic already has of the new run is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import TypeAdapter

from engine.bus.port import Bus, ConsumerRecord, Offsets
from engine.bus.read import read_between
from engine.errors import UsageError
from engine.store import Store
from engine.worker import to_producer_record
from schemas.codec import RecordError, decode_record
from schemas.records import Chain, EndReason, Erasure, Record
from schemas.topics import TOPICS

_BATCH_SIZE = 500
EARLIEST = "earliest"
LATEST = "latest"


@dataclass(frozen=True)
class ReplayBound:
    """One end of a replay as it was typed: `earliest`, `latest`, an offset (in every partition) or a point in time."""

    text: str

    def resolve_offsets(self, bus: Bus, topics: Sequence[str]) -> Offsets:
        """The offset that it means in each partition."""
        begins, ends = bus.beginning_offsets(topics), bus.end_offsets(topics)
        if self.text == EARLIEST:
            return begins
        if self.text == LATEST:
            return ends
        if self.text.isdecimal():
            return {place: min(max(int(self.text), begins[place]), end) for place, end in ends.items()}
        return bus.offsets_for_time(topics, _parse_timestamp_ms(self.text))


def _parse_timestamp_ms(text: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError(
            f"{text} says neither where nor when",
            str(error),
            "give earliest, latest, an offset such as 1200, a time such as 2026-11-24T10:00, or run:NAME",
        ) from error
    return int(moment.timestamp() * 1000)  # without a zone it is this machine's time


@dataclass(frozen=True)
class LogSelection:
    """What a replay reads: the records of `run` between two offsets of each partition of `topics` that `wanted` takes."""

    run_id: str
    topics: tuple[str, ...]
    start_offsets: Offsets
    end_offsets: Offsets
    predicate: Callable[[Record], bool]

    def read_records(self, bus: Bus) -> Iterator[Record]:
        """What cannot be decoded is a dead letter already."""
        run = ("run", self.run_id.encode())
        for topic in self.topics:
            begins = {place: offset for place, offset in self.start_offsets.items() if place.topic == topic}
            ends = {place: offset for place, offset in self.end_offsets.items() if place.topic == topic}
            for message in read_between(bus, begins, ends):
                if run in message.headers and (record := decode_or_none(message)) and self.predicate(record):
                    yield record


@dataclass(frozen=True)
class ArchiveSelection:
    """The same from the database, which also has what the log keeps no more (or an earlier log had).

    `start` and `end` are bounds as they were typed; `before_seq` is the commit sequence at which the replay began.
    """

    run_id: str
    topics: tuple[str, ...]
    start: str
    end: str
    before_seq: int
    predicate: Callable[[Record], bool]

    def read_records(self, store: Store) -> Iterator[Record]:
        for topic in self.topics:
            spec = TOPICS[topic]
            fields = ", ".join(f'"{name}"' for name in spec.record_class.model_fields)
            where = f"run_id = ? AND commit_seq < ? AND {_build_bound_condition('>=', self.start)} AND {_build_bound_condition('<', self.end)}"
            sql = f"SELECT {fields} FROM raw.{spec.table} WHERE {where} ORDER BY commit_seq"
            for row in store.query_dicts(sql, [self.run_id, self.before_seq], limit_s=600.0):
                record = spec.record_class.model_validate(_to_record_values(row))
                if self.predicate(record):
                    yield record


def _build_bound_condition(operator: str, bound: str) -> str:
    """A bound as a condition on an archived row."""
    if bound in (EARLIEST, LATEST):
        return "TRUE"
    if bound.isdecimal():
        return f"_offset {operator} {int(bound)}"
    return f"epoch_ms(created_at) {operator} {_parse_timestamp_ms(bound)}"


def _to_record_values(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the record's own values: ids are text there."""
    values: dict[str, Any] = TypeAdapter(dict[str, Any]).dump_python(row, mode="json")
    return values | {"created_at": row["created_at"].replace(tzinfo=UTC)}


def decode_or_none(consumer_record: ConsumerRecord) -> Record | None:
    try:
        return decode_record(consumer_record.value or b"", TOPICS[consumer_record.topic].record_class)
    except RecordError:
        return None


def is_chain_start(record: Record) -> bool:
    """Whether the stages may begin with this record: a chain that is over has nothing left to revise."""
    return not isinstance(record, Chain) or not record.final


def is_chain_end(record: Record) -> bool:
    return isinstance(record, Chain) and record.final and record.end_reason not in (EndReason.NONE, EndReason.UNKNOWN)


def _read_erased_prompt_ids(bus: Bus) -> set[str]:
    """The prompts that are not to be worked on any more."""
    begins, ends = bus.beginning_offsets([Erasure.topic]), bus.end_offsets([Erasure.topic])
    return {(message.key or b"").decode() for message in read_between(bus, begins, ends)}


def republish_records(bus: Bus, records: Iterable[Record], run_id: str) -> tuple[int, int]:
    """Publish records under the run `run_id`; returns how many were published now, and how many were there already."""
    writer, left_out = bus.open_writer(f"replay.{run_id}"), _read_erased_prompt_ids(bus)
    published, earlier, batch = 0, 0, []
    seen: dict[str, set[str]] = {}
    try:
        for record in records:
            there = seen.get(record.topic)
            if there is None:
                there = seen[record.topic] = _read_record_ids(bus, record.topic, run_id)
            if record.record_id in there or record.prompt_id in left_out:
                earlier += 1
                continue
            there.add(record.record_id)
            batch.append(record.model_copy(update={"run_id": run_id}))
            if len(batch) >= _BATCH_SIZE:
                writer.commit([to_producer_record(copy) for copy in batch])
                published, batch = published + len(batch), []
        if batch:
            writer.commit([to_producer_record(copy) for copy in batch])
    finally:
        writer.close()
    return published + len(batch), earlier


def _read_record_ids(bus: Bus, topic: str, run_id: str) -> set[str]:
    """The ids of a run's records on a topic."""
    run = ("run", run_id.encode())
    messages = read_between(bus, bus.beginning_offsets([topic]), bus.end_offsets([topic]))
    return {record.record_id for message in messages if run in message.headers and (record := decode_or_none(message))}
