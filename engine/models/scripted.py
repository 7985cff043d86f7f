"""A FAKE model for tests: it answers by hashing what it is asked. Nothing that it says means anything.

Deterministic, instant, and without torch, so that the whole stream can be tested for what it delivers. It fails on request:
`faults` is a list of errors raised by the next calls, and a text that contains POISON can never be processed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.errors import PermanentRecordError
from engine.models.port import LOCAL, Ask, Capabilities, Generation, OptionScores, Usage

POISON = "POISON-PILL"
WORDS = ["river", "stone", "bread", "window", "garden", "letter", "winter", "music", "silver", "paper", "engine", "harbour"]


def points(ask: Ask, *more: object) -> bytes:
    text = repr((ask.prefill, [(t.role, t.content) for t in ask.messages], *more))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=32).digest()


@dataclass
class ScriptedModel:
    """A fake for tests. `option_rule` gives the probability of the first of two options; `mass` what both catch."""

    id: str = "scripted"
    revision: str = "fake"
    mass: float = 0.9
    option_rule: Callable[[Ask], float] | None = None
    text_rule: Callable[[Ask, int], str] | None = None
    faults: list[Exception] = field(default_factory=list)
    capabilities: Capabilities = LOCAL
    generated: int = 0
    scored: int = 0

    def generate(
        self,
        batch: Sequence[Ask],
        *,
        samples: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 256,
    ) -> list[list[Generation]]:
        self.fail_if_told(batch)
        self.generated += len(batch) * samples
        return [[self.answer(ask, n, temperature, max_tokens) for n in range(samples)] for ask in batch]

    def option_logprobs(self, batch: Sequence[Ask], options: Sequence[str]) -> list[OptionScores]:
        self.fail_if_told(batch)
        self.scored += len(batch)
        return [self.score(ask, options) for ask in batch]

    def fail_if_told(self, batch: Sequence[Ask]) -> None:
        if self.faults:
            raise self.faults.pop(0)
        if any(POISON in message.content for ask in batch for message in ask.messages):
            raise PermanentRecordError("a poisoned prompt", "the test put it there", "")

    def answer(self, ask: Ask, sample: int, temperature: float, max_tokens: int) -> Generation:
        noise = points(ask, ask.seed, sample, temperature)
        text = self.text_rule(ask, sample) if self.text_rule else " ".join(WORDS[b % len(WORDS)] for b in noise[:12])
        words = text.split()[: max_tokens - 1]
        return Generation(
            text=" ".join(words),
            finish_reason="stop",
            token_ids=(*(10 + int(hashlib.md5(word.encode()).hexdigest()[:4], 16) % 1000 for word in words), 2),
            logprobs=tuple(-0.1 - noise[i % 32] / 100 for i in range(len(words) + 1)),
            prompt_token_ids=tuple(10 + b for b in points(ask)[:8]),
        )

    def score(self, ask: Ask, options: Sequence[str]) -> OptionScores:
        share = self.option_rule(ask) if self.option_rule else (1 + points(ask)[0]) / 257
        shares = [share, 1 - share] if len(options) == 2 else [1 / len(options)] * len(options)
        return OptionScores(tuple(math.log(max(1e-12, self.mass * s)) for s in shares), self.mass, Usage(8, 0))
