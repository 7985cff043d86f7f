"""Make dead letters. A dead letter contains the unchanged bytes of a record that could not be processed, and the reason."""

from __future__ import annotations

import uuid

from engine.bus.port import ConsumerRecord
from engine.logs import format_coordinates
from schemas import ids
from schemas.records import DeadLetter, DeadLetterKind, Header
from schemas.topics import PROMPT_TOPICS


def make_dead_letter(
    consumer_record: ConsumerRecord, kind: DeadLetterKind, error: Exception, *, stage: str, run_id: str, attempts: int = 1
) -> DeadLetter:
    """Return the dead letter of a record.

    The dead letter contains the bytes and headers of the record, the coordinates, and the error. Its prompt is the prompt of the
    record, so that an erasure of the prompt finds it.
    """
    return DeadLetter(
        record_id=ids.compute_record_id(f"dead-letter/{stage}", [], format_coordinates(consumer_record)),
        prompt_id=_parse_prompt_id(consumer_record),
        run_id=run_id,
        stage=stage,
        kind=kind,
        source_topic=consumer_record.topic,
        source_partition=consumer_record.partition,
        source_offset=consumer_record.offset,
        source_key=consumer_record.key,
        value=consumer_record.value,
        headers=[Header(key=key, value=value) for key, value in consumer_record.headers],
        error_class=type(error).__name__,
        error_message=str(error),
        attempts=attempts,
    )


def _parse_prompt_id(consumer_record: ConsumerRecord) -> str | None:
    """Return the prompt id from the key of a record. Return None if the key is not a prompt id."""
    try:
        text = (consumer_record.key or b"").decode("ascii")
        return text if consumer_record.topic in PROMPT_TOPICS and text == str(uuid.UUID(text)) else None
    except ValueError:
        return None
