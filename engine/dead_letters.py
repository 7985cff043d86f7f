"""Dead letters: a message that could not be processed, untouched, with the reason."""

from __future__ import annotations

from engine.bus.port import Message
from engine.logs import written
from schemas import ids
from schemas.records import DeadLetter, DeadLetterKind, Header


def dead_letter(
    message: Message, kind: DeadLetterKind, error: Exception, *, stage: str, run_id: str, attempts: int = 1
) -> DeadLetter:
    """The message with its bytes and headers as they came, where it was, and why it could not be processed."""
    return DeadLetter(
        record_id=ids.record_id(f"dead-letter/{stage}", [], written(message)),
        run_id=run_id,
        stage=stage,
        kind=kind,
        source_topic=message.topic,
        source_partition=message.partition,
        source_offset=message.offset,
        source_key=message.key,
        value=message.value,
        headers=[Header(key=key, value=value) for key, value in message.headers],
        error_class=type(error).__name__,
        error_message=str(error),
        attempts=attempts,
    )
