"""Read dead letters, and publish their records again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from charter.lookup import make_id_pattern
from engine.bus.port import Bus, ProducerRecord
from engine.bus.read import read_values
from engine.errors import UsageError
from engine.store import Store
from engine.worker import TARGET_STAGE_HEADER, to_producer_record
from schemas import ids
from schemas.codec import RecordError, decode_any_record, decode_record
from schemas.records import DeadLetterRetry, Record

_BATCH_SIZE = 200


def decode_value(value: bytes) -> Any:
    """A message as its record or, where it is none, as hexadecimal digits."""

    try:
        return decode_any_record(value).model_dump(mode="json")
    except RecordError:
        return value[:2000].hex(" ")


def find_dead_letter(store: Store, identifier: str) -> dict[str, Any]:

    found = store.query_dicts(
        "SELECT * FROM dead_letters WHERE record_id::VARCHAR LIKE ?", [make_id_pattern(identifier)], limit_s=10.0
    )
    if len(found) != 1:
        raise UsageError(
            f"{identifier!r} is the beginning of {len(found) or 'no'} dead letters",
            "it must name one",
            "type: charter dlq list",
        )
    return found[0]


def publish_retries(bus: Bus, letters: Sequence[dict[str, Any]]) -> int:
    """Publish those that were not tried again yet, each with the record that says so, in transactions."""

    writer = bus.open_writer("dlq.retry")  # two of these at once fence each other instead of doubling
    try:
        done = {decode_record(value, DeadLetterRetry).dead_letter_id for value in read_values(bus, DeadLetterRetry.topic)}
        fresh = [letter for letter in letters if str(letter["record_id"]) not in done]
        for start in range(0, len(fresh), _BATCH_SIZE):
            writer.commit(
                [message for letter in fresh[start : start + _BATCH_SIZE] for message in _to_producer_records(letter)]
            )
    finally:
        writer.close()
    return len(fresh)


def _to_producer_records(letter: dict[str, Any]) -> list[ProducerRecord]:
    """The original message, meant for the stage that gave up on it alone, and the record of the retry."""

    headers = tuple((h["key"], bytes(h["value"])) for h in letter["headers"] or [] if h["key"] != TARGET_STAGE_HEADER)
    key = bytes(letter["source_key"]) if letter["source_key"] is not None else b""
    value = bytes(letter["value"]) if letter["value"] is not None else None
    message = ProducerRecord(letter["source_topic"], key, value, (*headers, (TARGET_STAGE_HEADER, letter["stage"].encode())))
    return [message, to_producer_record(_make_retry_record(letter))]


def _make_retry_record(letter: dict[str, Any]) -> Record:

    letter_id = str(letter["record_id"])
    return DeadLetterRetry(
        record_id=ids.compute_record_id("retry", [letter_id], ""),
        parent_ids=[letter_id],
        run_id=letter["run_id"],
        stage="retry",
        dead_letter_id=letter_id,
        source_topic=letter["source_topic"],
    )
