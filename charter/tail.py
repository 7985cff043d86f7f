"""Read the newest records of a topic, and format them as JSON lines."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from charter.text import format_json
from engine.bus.port import Bus, ConsumerRecord
from engine.errors import UsageError
from schemas.codec import RecordError, decode_any_record
from schemas.topics import TOPICS


def tail_topic(bus: Bus, topic: str, count: int, stop: threading.Event | None, *, raw: bool) -> Iterator[str]:
    """Yield the last `count` records in the order of their timestamps. If `stop` is given, continue until `stop` is set.

    If `raw` is true, yield the bytes in hexadecimal instead of the decoded record.
    """
    if topic not in TOPICS:
        raise UsageError(f"there is no topic {topic}", f"the topics are {', '.join(TOPICS)}", "type: charter topics")
    ends = bus.end_offsets([topic])
    begins = bus.beginning_offsets([topic])
    reader = bus.open_reader({partition: max(begins[partition], end - count) for partition, end in ends.items()})
    try:
        messages: list[ConsumerRecord] = []
        while any(reader.positions()[partition] < end for partition, end in ends.items()):
            messages += reader.poll(1.0, 500)
        newest = sorted(messages, key=lambda message: message.timestamp_ms)[-count:] if count else []
        yield from (_format_record(message, raw) for message in newest)
        while stop is not None and not stop.is_set():
            yield from (_format_record(message, raw) for message in reader.poll(0.5, 500))
    finally:
        reader.close()


def _format_record(record: ConsumerRecord, raw: bool) -> str:
    """Return a record as a JSON object with its topic, partition and offset."""
    fields: dict[str, Any] = {"topic": record.topic, "partition": record.partition, "offset": record.offset}
    if record.value is None:
        return format_json(fields | {"error": "the record has no value", "why": "its prompt was erased"}, indent=None)
    value = record.value
    if not raw:
        try:
            return format_json(fields | decode_any_record(value).model_dump(mode="json"), indent=None)
        except RecordError as error:
            fields |= {"error": error.what, "why": error.why}
    return format_json(fields | {"bytes": value.hex()}, indent=None)
