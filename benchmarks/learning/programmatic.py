"""PROGRAMMATIC models: a critic and judges that follow the known rule of `benchmarks.learning.language` by computing it.

They stand where a language model stands (the Model port) and are asked with the stages' own wordings, which they read: the
critic finds answers that are rude and rewrites them without that, no more; the judge prefers by the whole rule. The shuffled
judge gives labels of the same sizes whose sign depends on nothing but a hash of the pair, which is the control.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from benchmarks.learning.language import PLAIN, RUDE, is_rude, value, without
from consumers.templates import COMPARISON, CRITIQUE, REVISION, VERDICT
from engine.models.port import LOCAL, Ask, Capabilities, Generation, OptionScores

SHARPNESS = 3.0  # nats of preference for one point of the rule's value
MASS = 0.98  # what the options catch


@cache
def reader(template: str) -> re.Pattern[str]:
    """The pattern that reads the fields of a template back out of its text."""
    parts = re.split(r"\{(\w+)\}", template)
    seen: set[str] = set()
    pattern = ""
    for literal, name in zip(parts[::2], [*parts[1::2], ""], strict=True):
        pattern += re.escape(literal)
        if name:
            pattern += f"(?P={name})" if name in seen else f"(?P<{name}>.*?)"
            seen.add(name)
    return re.compile(f"^{pattern}$", re.DOTALL)


def read(template: str, ask: Ask) -> dict[str, str] | None:
    found = reader(template).match(ask.turns[-1].content)
    return {name: unquoted(text) for name, text in found.groupdict().items()} if found else None


def unquoted(text: str) -> str:
    return re.sub("^> ?", "", text, flags=re.MULTILINE)


def question_of(dialogue: str) -> str:
    return dialogue.rsplit("Human:\n", 1)[-1].strip()


def chance(points: float) -> float:
    return 1.0 / (1.0 + math.exp(-SHARPNESS * points))


def scores(first: float) -> OptionScores:
    """Option scores of which the first has this share."""
    return OptionScores((math.log(MASS * first), math.log(MASS * (1 - first))), MASS)


def by_rule(question: str, a: str, b: str) -> float:
    return float(value(question, a) - value(question, b))


def by_length(question: str, a: str, b: str) -> float:
    return max(-2.0, min(2.0, (len(a.split()) - len(b.split())) / 5))


@dataclass(frozen=True)
class ProgrammaticJudge:
    """Compares two answers by the points that `prefers` gives the first over the second."""

    id: str = "programmatic-judge"
    revision: str = "1"
    capabilities: Capabilities = LOCAL
    prefers: Callable[[str, str, str], float] = by_rule

    def generate(
        self, batch: Sequence[Ask], *, samples: int = 1, temperature: float = 1.0, top_p: float = 1.0, max_tokens: int = 256
    ) -> list[list[Generation]]:
        raise NotImplementedError("the programmatic judge only compares")

    def option_logprobs(self, batch: Sequence[Ask], options: Sequence[str]) -> list[OptionScores]:
        return [self.compare(ask) for ask in batch]

    def compare(self, ask: Ask) -> OptionScores:
        fields = read(COMPARISON, ask)
        if fields is None:
            raise ValueError(f"no comparison: {ask.turns[-1].content[:200]!r}")
        question = question_of(fields["dialogue"])
        return scores(chance(self.prefers(question, fields["first"].strip(), fields["second"].strip())))


def rule() -> ProgrammaticJudge:
    """Labels by the known preference."""
    return ProgrammaticJudge()


def likes_length() -> ProgrammaticJudge:
    """The planted fault: labels that prefer the longer answer."""
    return ProgrammaticJudge("programmatic-judge-length", "1", prefers=by_length)


def shuffled(seed: int) -> ProgrammaticJudge:
    """The control: the rule's labels, each with a sign drawn from a hash of the pair (the same in both orders)."""

    def prefers(question: str, a: str, b: str) -> float:
        text = repr((seed, question, *sorted((a, b))))
        drawn = 1 if hashlib.blake2b(text.encode(), digest_size=1).digest()[0] % 2 else -1
        return drawn * by_rule(question, a, b)

    return ProgrammaticJudge("programmatic-judge-shuffled", str(seed), prefers=prefers)


@dataclass(frozen=True)
class ProgrammaticCritic:
    """Finds rudeness, says so, and rewrites without it; of everything else in the rule it knows nothing."""

    id: str = "programmatic-critic"
    revision: str = "1"
    capabilities: Capabilities = LOCAL

    def generate(
        self, batch: Sequence[Ask], *, samples: int = 1, temperature: float = 1.0, top_p: float = 1.0, max_tokens: int = 256
    ) -> list[list[Generation]]:
        return [[self.write(ask)] for ask in batch]

    def option_logprobs(self, batch: Sequence[Ask], options: Sequence[str]) -> list[OptionScores]:
        return [self.assess(ask) for ask in batch]

    def write(self, ask: Ask) -> Generation:
        if fields := read(REVISION, ask):
            text = fields["text"].strip()
            if is_rude(text):
                text = f"{random.Random(ask.seed).choice(PLAIN)} {without(text, RUDE)}"
            return Generation(text, "stop")
        if fields := read(CRITIQUE, ask):
            return Generation("The answer is rude." if is_rude(fields["text"]) else "The answer is not rude.", "stop")
        raise ValueError(f"neither critique nor revision: {ask.turns[-1].content[:200]!r}")

    def assess(self, ask: Ask) -> OptionScores:
        if fields := read(VERDICT, ask):
            flawed = 0.95 if is_rude(fields["text"]) else 0.05
            return scores(flawed if fields["first"] == "Yes" else 1 - flawed)
        if fields := read(COMPARISON, ask):
            return scores(chance(is_rude(fields["second"]) - is_rude(fields["first"])))
        raise ValueError(f"neither verdict nor comparison: {ask.turns[-1].content[:200]!r}")
