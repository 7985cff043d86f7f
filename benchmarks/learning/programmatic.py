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

from benchmarks.learning.language import PLAIN_OPENINGS, RUDE_OPENINGS, is_rude, remove_sentences, score_response
from consumers.templates import COMPARISON_TEMPLATE, CRITIQUE_TEMPLATE, REVISION_TEMPLATE, VERDICT_TEMPLATE
from engine.models.interface import LOCAL_CAPABILITIES, Generation, GenerationRequest, ModelCapabilities, OptionScores

_SHARPNESS = 3.0  # nats of preference for one point of the rule's value
_OPTION_MASS = 0.98  # what the options catch


@cache
def _compile_template_pattern(template: str) -> re.Pattern[str]:
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


def _parse_template(template: str, request: GenerationRequest) -> dict[str, str] | None:
    found = _compile_template_pattern(template).match(request.messages[-1].content)
    return {name: _unquote(text) for name, text in found.groupdict().items()} if found else None


def _unquote(text: str) -> str:
    return re.sub("^> ?", "", text, flags=re.MULTILINE)


def _extract_question(dialogue: str) -> str:
    return dialogue.rsplit("Human:\n", 1)[-1].strip()


def compute_win_probability(margin: float) -> float:
    return 1.0 / (1.0 + math.exp(-_SHARPNESS * margin))


def _make_option_scores(first_share: float) -> OptionScores:
    """Option scores of which the first has this share."""
    return OptionScores((math.log(_OPTION_MASS * first_share), math.log(_OPTION_MASS * (1 - first_share))), _OPTION_MASS)


_MarginFunction = Callable[[str, str, str], float]  # question, a, b -> the points by which a is better


@dataclass(frozen=True)
class PreferenceRule:
    """What is known: the value of an answer to a question (1 is the target), and the fault that the critic finds and mends."""

    score_response: Callable[[str, str], int]
    fault_description: str
    is_faulty: Callable[[str], bool]
    fix_fault: Callable[[str, random.Random], str]

    def compute_margin(self, question: str, a: str, b: str) -> float:
        return float(self.score_response(question, a) - self.score_response(question, b))


def _remove_rudeness(text: str, rng: random.Random) -> str:
    return f"{rng.choice(PLAIN_OPENINGS)} {remove_sentences(text, RUDE_OPENINGS)}"


def _score_one_paragraph(question: str, text: str) -> int:
    return -1 if "\n" in text.strip() else 1


def _is_cut_off(text: str) -> bool:
    return bool(text.strip()) and text.strip()[-1] not in ".!?"


def _cut_to_last_sentence(text: str, rng: random.Random) -> str:
    """The text up to its last whole sentence; all of it where there is none."""
    whole = re.match(r"(.*[.!?])", text, re.DOTALL)
    return whole[1] if whole else text


# Of the small language: refuse what is harmful; else help, and politely.
LANGUAGE_RULE = PreferenceRule(score_response, "is rude", is_rude, _remove_rudeness)
# Of a model that was not trained here: write one paragraph, no lists. The critic mends what breaks off.
PARAGRAPH_RULE = PreferenceRule(_score_one_paragraph, "breaks off", _is_cut_off, _cut_to_last_sentence)


def _compute_length_margin(question: str, a: str, b: str) -> float:
    return max(-2.0, min(2.0, (len(a.split()) - len(b.split())) / 5))


@dataclass(frozen=True)
class ProgrammaticJudge:
    """Compares two answers by the points that `prefers` gives the first over the second."""

    compute_margin: _MarginFunction
    id: str = "programmatic-judge"
    revision: str = "1"
    capabilities: ModelCapabilities = LOCAL_CAPABILITIES

    def generate(
        self,
        batch: Sequence[GenerationRequest],
        *,
        num_completions: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 256,
    ) -> list[list[Generation]]:
        raise NotImplementedError("the programmatic judge only compares")

    def score_options(self, batch: Sequence[GenerationRequest], options: Sequence[str]) -> list[OptionScores]:
        return [self.compare_responses(ask) for ask in batch]

    def compare_responses(self, request: GenerationRequest) -> OptionScores:
        fields = _parse_template(COMPARISON_TEMPLATE, request)
        if fields is None:
            raise ValueError(f"no comparison: {request.messages[-1].content[:200]!r}")
        question = _extract_question(fields["dialogue"])
        return _make_option_scores(
            compute_win_probability(self.compute_margin(question, fields["first"].strip(), fields["second"].strip()))
        )


def make_judge(arm: str, rule: PreferenceRule, seed: int) -> ProgrammaticJudge:
    """The judge of an arm: by the rule, by length (the planted fault), or by the rule with random signs (the control)."""
    if arm == "hacked":
        return ProgrammaticJudge(_compute_length_margin, "programmatic-judge-length")
    if arm == "shuffled":
        return ProgrammaticJudge(_shuffle_margins(rule, seed), "programmatic-judge-shuffled", str(seed))
    return ProgrammaticJudge(rule.compute_margin)


def _shuffle_margins(rule: PreferenceRule, seed: int) -> _MarginFunction:
    """The rule's points with a sign drawn from a hash of the pair, the same in both orders."""

    def prefers(question: str, a: str, b: str) -> float:
        text = repr((seed, question, *sorted((a, b))))
        drawn = 1 if hashlib.blake2b(text.encode(), digest_size=1).digest()[0] % 2 else -1
        return drawn * rule.compute_margin(question, a, b)

    return prefers


@dataclass(frozen=True)
class ProgrammaticCritic:
    """Finds the rule's one fault, says so, and rewrites without it; of everything else it knows nothing."""

    rule: PreferenceRule
    id: str = "programmatic-critic"
    revision: str = "1"
    capabilities: ModelCapabilities = LOCAL_CAPABILITIES

    def generate(
        self,
        batch: Sequence[GenerationRequest],
        *,
        num_completions: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 256,
    ) -> list[list[Generation]]:
        return [[self.write_completion(ask)] for ask in batch]

    def score_options(self, batch: Sequence[GenerationRequest], options: Sequence[str]) -> list[OptionScores]:
        return [self._score_one(ask) for ask in batch]

    def write_completion(self, request: GenerationRequest) -> Generation:
        if fields := _parse_template(REVISION_TEMPLATE, request):
            text = fields["text"].strip()
            return Generation(
                self.rule.fix_fault(text, random.Random(request.seed)) if self.rule.is_faulty(text) else text, "stop"
            )
        if fields := _parse_template(CRITIQUE_TEMPLATE, request):
            return Generation(
                f"The answer {self.rule.fault_description}." if self.rule.is_faulty(fields["text"]) else "No fault.", "stop"
            )
        raise ValueError(f"neither critique nor revision: {request.messages[-1].content[:200]!r}")

    def _score_one(self, request: GenerationRequest) -> OptionScores:
        if fields := _parse_template(VERDICT_TEMPLATE, request):
            flawed = 0.95 if self.rule.is_faulty(fields["text"]) else 0.05
            return _make_option_scores(flawed if fields["first"] == "Yes" else 1 - flawed)
        if fields := _parse_template(COMPARISON_TEMPLATE, request):
            return _make_option_scores(
                compute_win_probability(self.rule.is_faulty(fields["second"]) - self.rule.is_faulty(fields["first"]))
            )
        raise ValueError(f"neither verdict nor comparison: {request.messages[-1].content[:200]!r}")
