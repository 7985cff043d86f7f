"""This module has programmatic models: a critic and judges. They apply a known rule exactly.

These models implement the Model port in place of a language model. The stages send the usual prompts to these models. The
models parse the prompts with the templates of the stages. The judge prefers the response with the higher score by the rule. The
critic detects one fault and fixes it. The fault has little or no effect on the score. The shuffled judge is the control. The
margins of its labels have the same sizes, but the sign of a margin depends only on a hash of the pair.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.learning.language import PLAIN_OPENINGS, RUDE_OPENINGS, is_rude, remove_sentences, score_response
from consumers.templates import COMPARISON_TEMPLATE, CRITIQUE_TEMPLATE, REVISION_TEMPLATE, VERDICT_TEMPLATE, parse_template
from engine.models.interface import LOCAL_CAPABILITIES, Generation, GenerationRequest, ModelCapabilities, OptionScores

_SHARPNESS = 3.0  # log-odds per point of the rule's score, in nats
_OPTION_MASS = 0.98  # probability of all options together


def _extract_question(dialogue: str) -> str:
    return dialogue.rsplit("Human:\n", 1)[-1].strip()


def compute_win_probability(margin: float) -> float:
    """Return the probability that the first response is better, for a margin in points of the rule's score."""
    return 1.0 / (1.0 + math.exp(-_SHARPNESS * margin))


def _make_option_scores(first_probability: float) -> OptionScores:
    """Return the scores of two options. Of the probability of the two options, the first has `first_probability`."""
    probabilities = (first_probability, 1 - first_probability)
    return OptionScores(tuple(math.log(_OPTION_MASS * p) for p in probabilities), _OPTION_MASS)


_MarginFunction = Callable[[str, str, str], float]  # (question, a, b) -> score of a minus score of b


@dataclass(frozen=True)
class PreferenceRule:
    """The known rule scores a response to a question (1 is correct), and names the fault that the critic detects and fixes."""

    score_response: Callable[[str, str], float]
    fault_description: str
    is_faulty: Callable[[str], bool]
    fix_fault: Callable[[str, random.Random], str]

    def compute_margin(self, question: str, a: str, b: str) -> float:
        return float(self.score_response(question, a) - self.score_response(question, b))


def _remove_rudeness(text: str, rng: random.Random) -> str:
    return f"{rng.choice(PLAIN_OPENINGS)} {remove_sentences(text, RUDE_OPENINGS)}"


# For the small language: refuse harmful prompts; help with all others, and start politely.
LANGUAGE_RULE = PreferenceRule(score_response, "is rude", is_rude, _remove_rudeness)


def _compute_length_margin(question: str, a: str, b: str) -> float:
    return max(-2.0, min(2.0, (len(a.split()) - len(b.split())) / 5))


@dataclass(frozen=True)
class ProgrammaticJudge:
    """This judge compares two responses by `compute_margin`."""

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
        max_thinking_tokens: int = 0,
    ) -> list[list[Generation]]:
        raise NotImplementedError("The programmatic judge only compares responses.")

    def score_options(self, batch: Sequence[GenerationRequest], options: Sequence[str]) -> list[OptionScores]:
        return [self.compare_responses(request) for request in batch]

    def compare_responses(self, request: GenerationRequest) -> OptionScores:
        fields = parse_template(COMPARISON_TEMPLATE, request.messages[-1].content)
        if fields is None:
            raise ValueError(
                f"The programmatic judge only accepts comparison prompts, not {request.messages[-1].content[:200]!r}"
            )
        question = _extract_question(fields["dialogue"])
        return _make_option_scores(
            compute_win_probability(self.compute_margin(question, fields["first"].strip(), fields["second"].strip()))
        )


def make_judge(arm: str, rule: PreferenceRule, seed: int) -> ProgrammaticJudge:
    """Return the judge of an arm. It uses the rule, the length (planted fault), or the rule with random signs (control)."""
    if arm == "hacked":
        return ProgrammaticJudge(_compute_length_margin, "programmatic-judge-length")
    if arm == "shuffled":
        return ProgrammaticJudge(_shuffle_margins(rule, seed), "programmatic-judge-shuffled", str(seed))
    return ProgrammaticJudge(rule.compute_margin)


def _shuffle_margins(rule: PreferenceRule, seed: int) -> _MarginFunction:
    """Return the rule's margin with a random sign from a hash of the pair. Both orders prefer the same response."""

    def compute_margin(question: str, a: str, b: str) -> float:
        text = repr((seed, question, *sorted((a, b))))
        sign = 1 if hashlib.blake2b(text.encode(), digest_size=1).digest()[0] % 2 else -1
        return sign * rule.compute_margin(question, a, b)

    return compute_margin


@dataclass(frozen=True)
class ProgrammaticCritic:
    """This critic detects and fixes only the one fault of the rule."""

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
        max_thinking_tokens: int = 0,
    ) -> list[list[Generation]]:
        return [[self.write_completion(request)] for request in batch]

    def score_options(self, batch: Sequence[GenerationRequest], options: Sequence[str]) -> list[OptionScores]:
        return [self._score_one(request) for request in batch]

    def write_completion(self, request: GenerationRequest) -> Generation:
        if fields := parse_template(REVISION_TEMPLATE, request.messages[-1].content):
            text = fields["text"].strip()
            return Generation(
                self.rule.fix_fault(text, random.Random(request.seed)) if self.rule.is_faulty(text) else text, "stop"
            )
        if fields := parse_template(CRITIQUE_TEMPLATE, request.messages[-1].content):
            return Generation(
                f"The answer {self.rule.fault_description}." if self.rule.is_faulty(fields["text"]) else "No fault.", "stop"
            )
        raise ValueError(
            f"The programmatic critic only accepts critique and revision prompts, not {request.messages[-1].content[:200]!r}"
        )

    def _score_one(self, request: GenerationRequest) -> OptionScores:
        if fields := parse_template(VERDICT_TEMPLATE, request.messages[-1].content):
            fault_probability = 0.95 if self.rule.is_faulty(fields["text"]) else 0.05
            return _make_option_scores(fault_probability if fields["first"] == "Yes" else 1 - fault_probability)
        if fields := parse_template(COMPARISON_TEMPLATE, request.messages[-1].content):
            return _make_option_scores(
                compute_win_probability(self.rule.is_faulty(fields["second"]) - self.rule.is_faulty(fields["first"]))
            )
        raise ValueError(
            f"The programmatic critic only scores verdict and comparison prompts, not {request.messages[-1].content[:200]!r}"
        )
