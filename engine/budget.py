"""Limits on what a run may use: tokens, and money for models that have a price.

At the limit of tokens no new prompts are begun, and what is begun is finished. At the limit of cost every stage pauses: only
the requests that are under way are still paid for. Nothing is lost by either; with a higher limit the run goes on.

What a run has used is read from the records themselves, so every copy of every stage sees the same sum, also after a restart.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from engine.bus.port import Bus, ConsumerRecord
from engine.errors import UsageError
from schemas.codec import RecordError, decode_any_record
from schemas.records import Record

logger = logging.getLogger("charter.budget")

_METERED_TOPICS = ("responses", "critiques", "revisions", "preferences")
_POLL_INTERVAL_S = 1.0
_MAX_POLL_RECORDS = 1000
_PRICE_UNIT_TOKENS = 1_000_000


@dataclass(frozen=True)
class Price:
    """What a model costs, in whatever currency, for a million tokens that it reads and for a million that it writes."""

    prompt_per_million: float
    completion_per_million: float

    def compute_cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.prompt_per_million + completion_tokens * self.completion_per_million) / _PRICE_UNIT_TOKENS


def parse_prices(texts: Iterable[str]) -> dict[str, Price]:
    """Prices by model from texts such as `MODEL=0.15/0.60`."""
    prices = {}
    for text in texts:
        model, _, figures = text.rpartition("=")
        try:
            prompt, completion = (float(figure) for figure in figures.split("/"))
        except ValueError:
            prompt = completion = math.nan
        if not model or not (0 <= prompt < math.inf and 0 <= completion < math.inf):
            raise UsageError(
                f"budget.prices cannot be {text!r}",
                "a price is a model's name and what a million tokens cost: those it reads, and those it writes",
                'write it as MODEL=0.15/0.60, e.g. --set "budget.prices=MODEL=0.15/0.60"',
            )
        prices[model] = Price(prompt, completion)
    return prices


class Budget:
    """Follows what the run `run_id` uses; a limit of 0 is none. Workers' threads share it."""

    def __init__(
        self, bus: Bus, run_id: str, *, max_tokens: int = 0, max_cost: float = 0.0, prices: Mapping[str, Price] | None = None
    ) -> None:
        self.run_id, self.max_tokens, self.max_cost, self.prices = run_id, max_tokens, max_cost, prices or {}
        self.tokens, self.cost = 0, 0.0
        self.run_header = ("run", run_id.encode())
        ends = bus.end_offsets(list(_METERED_TOPICS))
        self.reader = bus.open_reader(bus.beginning_offsets(list(_METERED_TOPICS)))
        self.next_poll_at = 0.0
        self.warned_limits: set[str] = set()
        self.lock = threading.Lock()
        while any(self.reader.positions()[place] < end for place, end in ends.items()):
            self.read_usage(1.0)

    def can_admit(self, stage: str) -> bool:
        """Whether a stage may begin more, as of at most a second ago."""
        with self.lock:
            if time.monotonic() >= self.next_poll_at:
                while self.read_usage(0.0):
                    pass
                self.next_poll_at = time.monotonic() + _POLL_INTERVAL_S
            return self.is_within_cost_limit() and (stage != "respond" or self.is_within_token_limit())

    def is_within_token_limit(self) -> bool:
        if not self.max_tokens or self.tokens < self.max_tokens:
            return True
        used = f"{self.tokens} tokens of budget.max_tokens = {self.max_tokens}"
        self.warn_once("tokens", f"{used}: it takes no new prompts, and finishes what it has begun")
        return False

    def is_within_cost_limit(self) -> bool:
        if not self.max_cost or self.cost < self.max_cost:
            return True
        self.warn_once("cost", f"{self.cost:.4f} of budget.max_cost = {self.max_cost:g}: every stage pauses")
        return False

    def warn_once(self, limit: str, usage: str) -> None:
        if limit not in self.warned_limits:
            self.warned_limits.add(limit)
            logger.warning("run %s has used %s. To go on, raise the limit and start again; nothing is lost", self.run_id, usage)

    def read_usage(self, timeout_s: float) -> int:
        messages = self.reader.poll(timeout_s, _MAX_POLL_RECORDS)
        for message in messages:
            self.add_usage(message)
        return len(messages)

    def add_usage(self, consumer_record: ConsumerRecord) -> None:
        if self.run_header not in consumer_record.headers:
            return
        try:
            record: Record = decode_any_record(consumer_record.value or b"")
        except RecordError:  # its reader makes a dead letter of it
            return
        self.tokens += record.prompt_tokens + record.completion_tokens
        if record.model and (price := self.prices.get(record.model.id)):
            self.cost += price.compute_cost(record.prompt_tokens, record.completion_tokens)

    def close(self) -> None:
        self.reader.close()
