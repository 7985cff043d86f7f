"""Format the messages of Python's logging as JSON, with one object per line (`--log-json`).

A JSON object has the time (UTC), the level, the logger and the message. If there is a traceback, the object contains it.
Messages of a stage also have the fields run and stage. Messages about a record also have its topic, partition, offset and
prompt id.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from engine.bus.port import ConsumerRecord

_EXTRA_FIELDS = ("run", "stage", "topic", "partition", "offset", "prompt_id", "phase", "step", "metrics")
LOG_FORMAT = "%(levelname)s %(name)s %(message)s"


def format_coordinates(consumer_record: ConsumerRecord) -> str:
    """Return the coordinates of a record in the form topic[partition]@offset."""
    return f"{consumer_record.topic}[{consumer_record.partition}]@{consumer_record.offset}"


def get_coordinates(consumer_record: ConsumerRecord) -> dict[str, object]:
    """Return the coordinates of a record for `extra` of a logging call. The key of a record is its prompt id."""
    prompt = (consumer_record.key or b"").decode("utf-8", "replace")
    return {
        "topic": consumer_record.topic,
        "partition": consumer_record.partition,
        "offset": consumer_record.offset,
        "prompt_id": prompt,
    }


class JsonFormatter(logging.Formatter):
    """Formats a message as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {name: getattr(record, name) for name in _EXTRA_FIELDS if hasattr(record, name)}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=True, default=str)
