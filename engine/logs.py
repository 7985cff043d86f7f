"""What a process logs: lines for a person, or one JSON object a line for a machine (`--log-json`).

An object has the time (UTC), the level, the logger and the message, the traceback where there is one, and what the line is
about: the run and stage, and of a record its topic, partition, offset and prompt id.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from engine.bus.port import Message

ABOUT = ("run", "stage", "topic", "partition", "offset", "prompt_id", "phase", "step", "metrics")
LINE = "%(levelname)s %(name)s %(message)s"


def written(message: Message) -> str:
    """Where a message is, as people write it."""
    return f"{message.topic}[{message.partition}]@{message.offset}"


def place_of(message: Message) -> dict[str, object]:
    """What identifies a message, for `extra`; the key of a record is its prompt's id."""
    prompt = (message.key or b"").decode("utf-8", "replace")
    return {"topic": message.topic, "partition": message.partition, "offset": message.offset, "prompt_id": prompt}


class JsonLines(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        said |= {name: getattr(record, name) for name in ABOUT if hasattr(record, name)}
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=True, default=str)
