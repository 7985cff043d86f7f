"""Limit the number of tokens of a run. If the models have prices, also limit the cost of the run.

At the token limit the run accepts and generates no new prompts and finishes the prompts in progress. At the cost limit every stage
and the generator pause.
Requests that are already in progress still cost money. No record is lost. After a limit is raised, the run continues.

The usage is computed from the records. So all instances of all stages compute the same total, even after a restart.
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
from schemas.records import ProducerOffset, Record

logger = logging.getLogger("charter.budget")

_METERED_TOPICS = ("responses", "critiques", "revisions", "preferences", "producer-offsets")
_ADMITTING = ("respond", "generate")  # the token limit stops these
_POLL_INTERVAL_S = 1.0
_MAX_POLL_RECORDS = 1000
_PRICE_UNIT_TOKENS = 1_000_000


@dataclass(frozen=True)
class Price:
    """The price of a model per million prompt tokens and per million completion tokens, in any currency."""

    prompt_per_million: float
    completion_per_million: float

    def compute_cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.prompt_per_million + completion_tokens * self.completion_per_million) / _PRICE_UNIT_TOKENS


def parse_prices(texts: Iterable[str]) -> dict[str, Price]:
    """Return the price of each model from entries such as `MODEL=0.15/0.60`. Raise UsageError for a malformed entry."""
    prices = {}
    for text in texts:
        model, _, numbers = text.rpartition("=")
        try:
            prompt, completion = (float(number) for number in numbers.split("/"))
        except ValueError:
            prompt = completion = math.nan
        if not model or not (0 <= prompt < math.inf and 0 <= completion < math.inf):
            raise UsageError(
                f"budget.prices cannot be {text!r}",
                "a price is a model name with the cost of a million prompt tokens and of a million completion tokens",
                'write it as MODEL=0.15/0.60, e.g. --set "budget.prices=MODEL=0.15/0.60"',
            )
        prices[model] = Price(prompt, completion)
    return prices


class Budget:
    """The usage of a run and its limits. A limit of 0 means no limit. All workers of a process share one thread-safe object."""

    def __init__(
        self, bus: Bus, run_id: str, *, max_tokens: int = 0, max_cost: float = 0.0, prices: Mapping[str, Price] | None = None
    ) -> None:
        self.run_id, self.max_tokens, self.max_cost, self.prices = run_id, max_tokens, max_cost, prices or {}
        self.tokens, self.cost = 0, 0.0
        self.generated: dict[str, tuple[int, int]] = {}  # the newest sums of each generator, by the id of its position
        self.num_erased = 0  # records without a value, whose tokens are unknown
        self.run_header = ("run", run_id.encode())
        ends = bus.end_offsets(list(_METERED_TOPICS))
        self.reader = bus.open_reader(bus.beginning_offsets(list(_METERED_TOPICS)))
        self.next_poll_at = 0.0
        self.warned_limits: set[str] = set()
        self.lock = threading.Lock()
        while any(self.reader.positions()[tp] < end for tp, end in ends.items()):
            self.read_usage(1.0)
        if self.num_erased:
            logger.warning(
                "the budget of run %s does not count the tokens of %d records, because their prompts were erased",
                run_id,
                self.num_erased,
            )

    def can_admit(self, stage: str) -> bool:
        """Return whether a stage may start new work. The usage can be one second old."""
        with self.lock:
            if time.monotonic() >= self.next_poll_at:
                while self.read_usage(0.0):
                    pass
                self.next_poll_at = time.monotonic() + _POLL_INTERVAL_S
            return self.is_within_cost_limit() and (stage not in _ADMITTING or self.is_within_token_limit())

    def is_within_token_limit(self) -> bool:
        if not self.max_tokens or self.tokens < self.max_tokens:
            return True
        usage = f"{self.tokens} tokens of budget.max_tokens = {self.max_tokens}"
        self.warn_once("tokens", f"{usage}: it accepts no new prompts and finishes those in progress")
        return False

    def is_within_cost_limit(self) -> bool:
        if not self.max_cost or self.cost < self.max_cost:
            return True
        self.warn_once("cost", f"{self.cost:.4f} of budget.max_cost = {self.max_cost:g}: every stage pauses")
        return False

    def warn_once(self, limit: str, usage: str) -> None:
        if limit not in self.warned_limits:
            self.warned_limits.add(limit)
            logger.warning("run %s has used %s. To continue, raise the limit and restart; nothing is lost", self.run_id, usage)

    def read_usage(self, timeout_s: float) -> int:
        """Add the usage of new records. Return the number of records."""
        records = self.reader.poll(timeout_s, _MAX_POLL_RECORDS)
        for record in records:
            self.add_usage(record)
        return len(records)

    def add_usage(self, consumer_record: ConsumerRecord) -> None:
        if self.run_header not in consumer_record.headers:
            return
        if consumer_record.value is None:
            self.num_erased += 1
            return
        try:
            record: Record = decode_any_record(consumer_record.value)
        except RecordError:  # the stage that reads this topic makes a dead letter of the record
            return
        prompt_tokens, completion_tokens = record.prompt_tokens, record.completion_tokens
        if isinstance(record, ProducerOffset):  # it has the sums over all indexes of the generator
            before = self.generated.get(record.record_id, (0, 0))
            self.generated[record.record_id] = (prompt_tokens, completion_tokens)
            prompt_tokens, completion_tokens = prompt_tokens - before[0], completion_tokens - before[1]
        self.tokens += prompt_tokens + completion_tokens
        if record.model and (price := self.prices.get(record.model.id)):
            self.cost += price.compute_cost(prompt_tokens, completion_tokens)

    def close(self) -> None:
        self.reader.close()
