"""Read dead letters, and publish their records again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from charter.lookup import describe_matches, make_id_pattern
from engine.bus.port import Bus, ProducerRecord
from engine.bus.read import read_values
from engine.errors import UsageError
from engine.positions import TARGET_STAGE_HEADER
from engine.run_starts import StartPositions, read_start_positions
from engine.store import Store
from engine.worker import to_producer_record
from schemas import ids
from schemas.codec import RecordError, decode_any_record, decode_record
from schemas.records import DeadLetterRetry, Record

_BATCH_SIZE = 200


def decode_value(value: bytes) -> Any:
    """Return the decoded record, or the first 2,000 bytes in hexadecimal if the value cannot be decoded."""
    try:
        return decode_any_record(value).model_dump(mode="json")
    except RecordError:
        return value[:2000].hex(" ")


def find_dead_letter(store: Store, identifier: str) -> dict[str, Any]:
    """Return the row of the dead letter with this id or id prefix.

    Raises UsageError if no dead letter or several dead letters match.
    """
    rows = store.query_dicts(
        "SELECT * FROM dead_letters WHERE record_id::VARCHAR LIKE ?", [make_id_pattern(identifier)], limit_s=10.0
    )
    if len(rows) != 1:
        matches = [(str(row["record_id"]), f"{row['stage']}: {row['error_message']}") for row in rows]
        raise UsageError(
            f"{identifier!r} matches {len(rows) or 'no'} dead letters",
            "the ID must match exactly one dead letter" + (f"; {describe_matches(len(rows), matches)}" if rows else ""),
            "type: charter dlq list",
        )
    return rows[0]


def publish_retries(bus: Bus, dead_letters: Sequence[dict[str, Any]]) -> int:
    """Publish the original messages of dead letters again. Return the number of published messages.

    One transaction contains a message and its DeadLetterRetry record. Dead letters that already have such a record are skipped.
    """
    # If two processes retry at the same time, the second process fences the first, because the transactional id is the same.
    # Therefore no message is published twice.
    writer = bus.open_writer("dlq.retry")
    try:
        retried = {decode_record(value, DeadLetterRetry).dead_letter_id for value in read_values(bus, DeadLetterRetry.topic)}
        pending = [dead_letter for dead_letter in dead_letters if str(dead_letter["record_id"]) not in retried]
        for start in range(0, len(pending), _BATCH_SIZE):
            batch = pending[start : start + _BATCH_SIZE]
            starts = {run_id: read_start_positions(bus, run_id) for run_id in {letter["run_id"] for letter in batch}}
            writer.commit([message for letter in batch for message in _to_producer_records(letter, starts[letter["run_id"]])])
    finally:
        writer.close()
    return len(pending)


def _to_producer_records(dead_letter: dict[str, Any], run_start: StartPositions | None) -> list[ProducerRecord]:
    """Return the original message with a header that names the failed stage, and the DeadLetterRetry record."""
    headers = tuple((h["key"], bytes(h["value"])) for h in dead_letter["headers"] or [] if h["key"] != TARGET_STAGE_HEADER)
    key = bytes(dead_letter["source_key"]) if dead_letter["source_key"] is not None else b""
    value = bytes(dead_letter["value"]) if dead_letter["value"] is not None else None
    message = ProducerRecord(
        dead_letter["source_topic"], key, value, (*headers, (TARGET_STAGE_HEADER, dead_letter["stage"].encode()))
    )
    if run_start is not None:
        message = run_start.assign_partition(message)
    return [message, to_producer_record(_make_retry_record(dead_letter))]


def _make_retry_record(dead_letter: dict[str, Any]) -> Record:
    dead_letter_id = str(dead_letter["record_id"])
    return DeadLetterRetry(
        record_id=ids.compute_record_id("retry", [dead_letter_id], ""),
        parent_ids=[dead_letter_id],
        run_id=dead_letter["run_id"],
        stage="retry",
        dead_letter_id=dead_letter_id,
        source_topic=dead_letter["source_topic"],
    )
