"""A limit on the tokens that a run may use: at the limit no new prompts are begun, and what is begun is finished.

What a run has used is read from the records themselves, so every copy of every stage sees the same sum, also after a restart.
"""

from __future__ import annotations

import logging
import time

from engine.bus.port import Bus, Message
from schemas.codec import RecordError, decode_any

log = logging.getLogger("charter.budget")

TOPICS = ("responses", "critiques", "revisions", "preferences")
LOOK_EVERY_S = 1.0
BATCH = 1000


class Budget:
    """Follows what the run `run_id` uses. `allows` says whether it may begin more; used by one thread."""

    def __init__(self, bus: Bus, run_id: str, limit: int) -> None:
        self.run_id, self.limit, self.used = run_id, limit, 0
        self.header = ("run", run_id.encode())
        ends = bus.end_offsets(list(TOPICS))
        self.reader = bus.reader(bus.begin_offsets(list(TOPICS)))
        self.look_at = 0.0
        self.told = False
        while any(self.reader.positions()[place] < end for place, end in ends.items()):
            self.read(1.0)

    def allows(self) -> bool:
        """Whether there are tokens left, as of at most a second ago."""
        if time.monotonic() >= self.look_at:
            while self.read(0.0):
                pass
            self.look_at = time.monotonic() + LOOK_EVERY_S
        if self.used >= self.limit and not self.told:
            self.told = True
            log.warning(
                "run %s has used %d tokens of limits.max_tokens = %d: it takes no new prompts, and finishes what it has begun."
                " To go on, raise the limit and start again; nothing is lost",
                self.run_id,
                self.used,
                self.limit,
            )
        return self.used < self.limit

    def read(self, timeout_s: float) -> int:
        messages = self.reader.poll(timeout_s, BATCH)
        self.used += sum(self.tokens(message) for message in messages)
        return len(messages)

    def tokens(self, message: Message) -> int:
        if self.header not in message.headers:
            return 0
        try:
            record = decode_any(message.value or b"")
        except RecordError:  # its reader makes a dead letter of it
            return 0
        return record.prompt_tokens + record.completion_tokens

    def close(self) -> None:
        self.reader.close()
