"""The newest records of a topic, as lines of JSON."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from charter.text import format_json
from engine.bus.port import Bus, ConsumerRecord
from engine.errors import UsageError
from schemas.codec import RecordError, decode_any_record
from schemas.topics import TOPICS


def tail_topic(bus: Bus, topic: str, count: int, stop: threading.Event | None, *, raw: bool) -> Iterator[str]:
    """The last `count` records in order of time, then (with `stop`) what arrives until it is set."""
    if topic not in TOPICS:
        raise UsageError(f"there is no topic {topic}", f"the topics are {', '.join(TOPICS)}", "type: charter topics")
    ends = bus.end_offsets([topic])
    begins = bus.beginning_offsets([topic])
    reader = bus.open_reader({place: max(begins[place], end - count) for place, end in ends.items()})
    try:
        found: list[ConsumerRecord] = []
        while any(reader.positions()[place] < end for place, end in ends.items()):
            found += reader.poll(1.0, 500)
        newest = sorted(found, key=lambda message: message.timestamp_ms)[-count:] if count else []
        yield from (_format_record(message, raw) for message in newest)
        while stop is not None and not stop.is_set():
            yield from (_format_record(message, raw) for message in reader.poll(0.5, 500))
    finally:
        reader.close()


def _format_record(record: ConsumerRecord, raw: bool) -> str:
    """One message as a JSON object, with where it is."""
    place = {"topic": record.topic, "partition": record.partition, "offset": record.offset}
    value = record.value or b""
    if not raw:
        try:
            return format_json(place | decode_any_record(value).model_dump(mode="json"), indent=None)
        except RecordError as error:
            place |= {"error": error.what, "why": error.why}
    return format_json(place | {"bytes": value.hex()}, indent=None)
