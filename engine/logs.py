"""What a process logs: lines for a person, or one JSON object a line for a machine (`--log-json`).

An object has the time (UTC), the level, the logger and the message, the traceback where there is one, and what the line is
about: the run and stage, and of a record its topic, partition, offset and prompt id.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from engine.bus.port import ConsumerRecord

_EXTRA_FIELDS = ("run", "stage", "topic", "partition", "offset", "prompt_id", "phase", "step", "metrics")
LOG_FORMAT = "%(levelname)s %(name)s %(message)s"


def format_coordinates(consumer_record: ConsumerRecord) -> str:
    """Where a message is, as people write it."""
    return f"{consumer_record.topic}[{consumer_record.partition}]@{consumer_record.offset}"


def get_coordinates(consumer_record: ConsumerRecord) -> dict[str, object]:
    """What identifies a message, for `extra`; the key of a record is its prompt's id."""
    prompt = (consumer_record.key or b"").decode("utf-8", "replace")
    return {
        "topic": consumer_record.topic,
        "partition": consumer_record.partition,
        "offset": consumer_record.offset,
        "prompt_id": prompt,
    }


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        said |= {name: getattr(record, name) for name in _EXTRA_FIELDS if hasattr(record, name)}
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=True, default=str)
