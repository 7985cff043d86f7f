"""Provide a FAKE model for tests. A hash of the request selects the words of a completion. The words have no meaning.

The model is deterministic and fast, and it does not need torch. So tests can run the whole pipeline. Tests can also make it
fail: each call raises the next error of `queued_errors`, and POISON_TEXT in a message gives a PermanentRecordError.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.errors import PermanentRecordError
from engine.models.interface import (
    LOCAL_CAPABILITIES,
    Generation,
    GenerationRequest,
    ModelCapabilities,
    OptionScores,
    Result,
    Usage,
)
from engine.models.reasoning import separate_reasoning

POISON_TEXT = "POISON-PILL"
_WORDS = ["river", "stone", "bread", "window", "garden", "letter", "winter", "music", "silver", "paper", "engine", "harbour"]


def _hash_request(request: GenerationRequest, *more: object) -> bytes:
    text = repr((request.prefill, [(t.role, t.content) for t in request.messages], *more))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=32).digest()


def _find_poison(request: GenerationRequest) -> PermanentRecordError | None:
    if any(POISON_TEXT in message.content for message in request.messages):
        return PermanentRecordError("a poisoned prompt", "it contains the text for failing tests", "")
    return None


@dataclass
class ScriptedModel:
    """A fake model for tests.

    `option_mass` is the total probability of the options. `option_rule` returns the share of `option_mass` that belongs to the
    first of two options.
    """

    id: str = "scripted"
    revision: str = "fake"
    option_mass: float = 0.9
    option_rule: Callable[[GenerationRequest], float] | None = None
    text_rule: Callable[[GenerationRequest, int], str] | None = None
    queued_errors: list[Exception] = field(default_factory=list)
    capabilities: ModelCapabilities = LOCAL_CAPABILITIES
    num_generated: int = 0
    num_scored: int = 0

    def generate(
        self,
        batch: Sequence[GenerationRequest],
        *,
        num_completions: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 256,
        max_thinking_tokens: int = 0,
    ) -> list[Result[list[Generation]]]:
        self.raise_queued_error()
        self.num_generated += len(batch) * num_completions
        return [
            _find_poison(request) or [self.generate_one(request, n, temperature, max_tokens) for n in range(num_completions)]
            for request in batch
        ]

    def score_options(self, batch: Sequence[GenerationRequest], options: Sequence[str]) -> list[Result[OptionScores]]:
        self.raise_queued_error()
        self.num_scored += len(batch)
        return [_find_poison(request) or self.score_one(request, options) for request in batch]

    def raise_queued_error(self) -> None:
        if self.queued_errors:
            raise self.queued_errors.pop(0)

    def generate_one(self, request: GenerationRequest, sample_index: int, temperature: float, max_tokens: int) -> Generation:
        noise = _hash_request(request, request.seed, sample_index, temperature)
        text = (
            self.text_rule(request, sample_index) if self.text_rule else " ".join(_WORDS[b % len(_WORDS)] for b in noise[:12])
        )
        words = text.split()[: max_tokens - 1]
        separated = separate_reasoning(" ".join(words))
        return Generation(
            text=separated.response,
            finish_reason="stop",
            token_ids=(*(10 + int(hashlib.md5(word.encode()).hexdigest()[:4], 16) % 1000 for word in words), 2),
            logprobs=tuple(-0.1 - noise[i % 32] / 100 for i in range(len(words) + 1)),
            prompt_token_ids=tuple(10 + b for b in _hash_request(request)[:8]),
            reasoning=separated.reasoning,
            ends_in_reasoning=separated.ends_in_reasoning,
        )

    def score_one(self, request: GenerationRequest, options: Sequence[str]) -> OptionScores:
        share = self.option_rule(request) if self.option_rule else (1 + _hash_request(request)[0]) / 257
        shares = [share, 1 - share] if len(options) == 2 else [1 / len(options)] * len(options)
        return OptionScores(tuple(math.log(max(1e-12, self.option_mass * s)) for s in shares), self.option_mass, Usage(8, 0))
