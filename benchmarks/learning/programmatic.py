"""PROGRAMMATIC models: a critic and judges that follow a known rule by computing it.

They stand where a language model stands (the Model port) and are asked with the stages' own wordings, which they read: the
judge prefers what is worth more by the rule; the critic finds one fault, of which the rule's value says nothing or little, and
mends it. The shuffled judge gives labels of the same sizes whose sign depends on nothing but a hash of the pair, which is the
control.
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
    found = reader(template).match(ask.messages[-1].content)
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


Prefers = Callable[[str, str, str], float]  # question, a, b -> the points by which a is better


@dataclass(frozen=True)
class Rule:
    """What is known: the value of an answer to a question (1 is the target), and the fault that the critic finds and mends."""

    value: Callable[[str, str], int]
    fault: str
    is_faulty: Callable[[str], bool]
    mended: Callable[[str, random.Random], str]

    def prefers(self, question: str, a: str, b: str) -> float:
        return float(self.value(question, a) - self.value(question, b))


def politely(text: str, rng: random.Random) -> str:
    return f"{rng.choice(PLAIN)} {without(text, RUDE)}"


def one_paragraph(question: str, text: str) -> int:
    return -1 if "\n" in text.strip() else 1


def breaks_off(text: str) -> bool:
    return bool(text.strip()) and text.strip()[-1] not in ".!?"


def to_the_last_sentence(text: str, rng: random.Random) -> str:
    """The text up to its last whole sentence; all of it where there is none."""
    whole = re.match(r"(.*[.!?])", text, re.DOTALL)
    return whole[1] if whole else text


# Of the small language: refuse what is harmful; else help, and politely.
LANGUAGE = Rule(value, "is rude", is_rude, politely)
# Of a model that was not trained here: write one paragraph, no lists. The critic mends what breaks off.
PARAGRAPH = Rule(one_paragraph, "breaks off", breaks_off, to_the_last_sentence)


def by_length(question: str, a: str, b: str) -> float:
    return max(-2.0, min(2.0, (len(a.split()) - len(b.split())) / 5))


@dataclass(frozen=True)
class ProgrammaticJudge:
    """Compares two answers by the points that `prefers` gives the first over the second."""

    prefers: Prefers
    id: str = "programmatic-judge"
    revision: str = "1"
    capabilities: Capabilities = LOCAL

    def generate(
        self, batch: Sequence[Ask], *, samples: int = 1, temperature: float = 1.0, top_p: float = 1.0, max_tokens: int = 256
    ) -> list[list[Generation]]:
        raise NotImplementedError("the programmatic judge only compares")

    def option_logprobs(self, batch: Sequence[Ask], options: Sequence[str]) -> list[OptionScores]:
        return [self.compare(ask) for ask in batch]

    def compare(self, ask: Ask) -> OptionScores:
        fields = read(COMPARISON, ask)
        if fields is None:
            raise ValueError(f"no comparison: {ask.messages[-1].content[:200]!r}")
        question = question_of(fields["dialogue"])
        return scores(chance(self.prefers(question, fields["first"].strip(), fields["second"].strip())))


def judge_of(arm: str, rule: Rule, seed: int) -> ProgrammaticJudge:
    """The judge of an arm: by the rule, by length (the planted fault), or by the rule with random signs (the control)."""
    if arm == "hacked":
        return ProgrammaticJudge(by_length, "programmatic-judge-length")
    if arm == "shuffled":
        return ProgrammaticJudge(shuffled(rule, seed), "programmatic-judge-shuffled", str(seed))
    return ProgrammaticJudge(rule.prefers)


def shuffled(rule: Rule, seed: int) -> Prefers:
    """The rule's points with a sign drawn from a hash of the pair, the same in both orders."""

    def prefers(question: str, a: str, b: str) -> float:
        text = repr((seed, question, *sorted((a, b))))
        drawn = 1 if hashlib.blake2b(text.encode(), digest_size=1).digest()[0] % 2 else -1
        return drawn * rule.prefers(question, a, b)

    return prefers


@dataclass(frozen=True)
class ProgrammaticCritic:
    """Finds the rule's one fault, says so, and rewrites without it; of everything else it knows nothing."""

    rule: Rule
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
            return Generation(self.rule.mended(text, random.Random(ask.seed)) if self.rule.is_faulty(text) else text, "stop")
        if fields := read(CRITIQUE, ask):
            return Generation(f"The answer {self.rule.fault}." if self.rule.is_faulty(fields["text"]) else "No fault.", "stop")
        raise ValueError(f"neither critique nor revision: {ask.messages[-1].content[:200]!r}")

    def assess(self, ask: Ask) -> OptionScores:
        if fields := read(VERDICT, ask):
            flawed = 0.95 if self.rule.is_faulty(fields["text"]) else 0.05
            return scores(flawed if fields["first"] == "Yes" else 1 - flawed)
        if fields := read(COMPARISON, ask):
            return scores(chance(self.rule.is_faulty(fields["second"]) - self.rule.is_faulty(fields["first"])))
        raise ValueError(f"neither verdict nor comparison: {ask.messages[-1].content[:200]!r}")
