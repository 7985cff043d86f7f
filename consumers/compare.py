"""Comparing two texts: what a judge says of them, in both orders and in one of three forms.

logprobs    the next-token probabilities of the letters, p = e^lA / (e^lA + e^lB), never a sampled letter (Bai et al. 2022,
            section 4.1). The mass is how much probability the two letters caught; where it is small the model meant to say
            something else. A server that shows no probabilities is asked several times, and its replies are counted.
reasoning   the same after reasoning that the model writes, greedily (Bai et al. 2022, section 4.2).
letter      a written letter with its explanation, read strictly from the beginning: 1 or 0.

Both orders are asked, because judges favour a slot (Lee et al. 2023, section 2.3). What cannot be read in one of them is an
outcome (REFUSED, UNPARSEABLE, LOW_MASS, TIMEOUT) without a probability that anybody may use; nothing is guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from consumers import templates
from consumers.templates import OPTION_LETTERS
from engine.models.interface import NO_USAGE, Generation, GenerationRequest, Model, ModelCapabilities, OptionScores, Usage
from schemas.records import ChatMessage, Outcome

_Messages = tuple[ChatMessage, ...]

_NAN = float("nan")
# At the beginning of what a judge wrote: it will not judge. (Answers' refusals are counted by engine/monitor_views.sql.)
REFUSAL_PATTERN = re.compile(
    r"\W*(?:answer\W+)?(?:(?:i'm|i am|we're|we are)?\s*(?:very |so |truly )?(?:sorry|afraid)\b|(?:my )?apologies|i apologi[sz]e"
    r"|(?:unfortunately\W+)?(?:i|we) (?:can(?:'t|not| not)|won't|will not|must decline|refuse|decline"
    r"|(?:am|are) (?:un|not )able|don't feel comfortable|do not feel comfortable)|(?:i'm|we're) (?:un|not )able"
    r"|as an? (?:ai|artificial|language model)\b)",
    re.IGNORECASE,
)
# The letter stands first, closed, and is not one of several.
_LETTER_PATTERN = re.compile(r"\s*Answer: \(([AB])\)(?!\w)(?!\s*(?:or|and|/|,|&)\s*(?:Answer: )?\(?[AB]\b)")


@dataclass(frozen=True)
class SingleOrderComparison:
    """What a judge says with the texts in one order: the probability that the one shown first is better.

    `p` is NaN where there is nothing to read; it counts only with outcome OK. `text` is what the judge wrote.
    """

    p_first: float
    option_mass: float
    outcome: Outcome
    usage: Usage = NO_USAGE
    explanation: str = ""


@dataclass(frozen=True)
class Comparison:
    """The probability that the first text is better when shown first (`forward`) and when shown second (`backward`).

    Only with outcome OK could it be read in both orders.
    """

    p_forward: float
    p_backward: float
    option_mass_forward: float
    option_mass_backward: float
    usage: Usage = NO_USAGE
    outcome: Outcome = Outcome.OK
    explanation_forward: str = ""
    explanation_backward: str = ""

    @property
    def p_mean(self) -> float:
        return (self.p_forward + self.p_backward) / 2

    @property
    def option_mass(self) -> float:
        return min(self.option_mass_forward, self.option_mass_backward)

    @property
    def position_gap(self) -> float:
        return abs(self.p_forward - self.p_backward)

    @property
    def position_flip(self) -> bool:
        """Whether the same slot won twice."""
        return (self.p_forward - 0.5) * (self.p_backward - 0.5) < 0


@dataclass(frozen=True)
class AnswerMode:
    """How a judge is asked. `max_tokens` and `timeout_s` (seconds) bound what it writes."""

    name: str = "logprobs"
    min_option_mass: float = 0.5
    max_tokens: int = 256
    timeout_s: float | None = None

    @property
    def template(self) -> str:
        return {
            "logprobs": templates.COMPARISON_TEMPLATE,
            "reasoning": templates.REASONING_TEMPLATE,
            "letter": templates.LETTER_TEMPLATE,
        }[self.name]

    def get_template_hash(self, capabilities: ModelCapabilities) -> str:
        name = {"logprobs": "comparison"}.get(self.name, self.name)
        return templates.get_template_hash(name, capabilities)

    def judge_questions(self, model: Model, questions: Sequence[_Messages]) -> list[SingleOrderComparison]:
        """What the judge says to each question."""
        forms = {"logprobs": self.judge_by_logprobs, "reasoning": self.judge_by_reasoning, "letter": self.judge_by_letter}
        return forms[self.name](model, questions) if questions else []

    def judge_by_logprobs(self, model: Model, questions: Sequence[_Messages]) -> list[SingleOrderComparison]:
        scores = model.score_options(
            [templates.make_choice_request(messages, model.capabilities) for messages in questions], OPTION_LETTERS
        )
        return [
            SingleOrderComparison(compute_p_a(one), one.option_mass, self.classify_scores(one), one.usage) for one in scores
        ]

    def judge_by_reasoning(self, model: Model, questions: Sequence[_Messages]) -> list[SingleOrderComparison]:
        thoughts = self.generate_texts(model, [GenerationRequest(messages, timeout_s=self.timeout_s) for messages in questions])
        outcomes = [_classify_generation(thought) for thought in thoughts]
        begun = [
            templates.append_choice_question(messages, thought.text.strip())
            for messages, thought, outcome in zip(questions, thoughts, outcomes, strict=True)
            if outcome is Outcome.OK
        ]
        scored = iter(self.judge_by_logprobs(model, begun) if begun else [])
        readings = [
            next(scored) if outcome is Outcome.OK else SingleOrderComparison(_NAN, 0.0, outcome) for outcome in outcomes
        ]
        return [
            SingleOrderComparison(
                reading.p_first, reading.option_mass, reading.outcome, thought.usage + reading.usage, thought.text.strip()
            )
            for reading, thought in zip(readings, thoughts, strict=True)
        ]

    def judge_by_letter(self, model: Model, questions: Sequence[_Messages]) -> list[SingleOrderComparison]:
        prefill = templates.ANSWER_PREFILL if model.capabilities.prefill else ""
        written = self.generate_texts(
            model, [GenerationRequest(messages, prefill=prefill, timeout_s=self.timeout_s) for messages in questions]
        )
        return [parse_letter(answer, prefill) for answer in written]

    def generate_texts(self, model: Model, requests: Sequence[GenerationRequest]) -> list[Generation]:
        return [generation for (generation,) in model.generate(requests, temperature=0.0, max_tokens=self.max_tokens)]

    def classify_scores(self, scores: OptionScores) -> Outcome:
        """Whether option scores may be read, and if not, why."""
        if math.isnan(compute_p_a(scores)) or not scores.option_mass <= 1 + 1e-3:
            return Outcome.UNPARSEABLE
        if scores.option_mass >= self.min_option_mass and scores.option_mass > 0:
            return Outcome.OK
        if not scores.unparsed_replies:
            return Outcome.LOW_MASS
        refused = sum(bool(REFUSAL_PATTERN.match(reply)) for reply in scores.unparsed_replies)
        return Outcome.REFUSED if 2 * refused >= len(scores.unparsed_replies) else Outcome.UNPARSEABLE


_LOGPROBS_MODE = AnswerMode()


def compute_p_a(scores: OptionScores) -> float:
    """The probability of option A among A and B; NaN when neither caught anything, or a score is no log-probability."""
    a, b = scores.logprobs
    if math.isnan(a) or math.isnan(b) or max(a, b) == -math.inf or max(a, b) > 1e-3:
        return _NAN
    return 1.0 / (1.0 + math.exp(min(700.0, b - a)))


def _classify_generation(generation: Generation) -> Outcome:
    """Why what a judge wrote is nothing to go by; OK where it is."""
    if generation.finish_reason == "timeout":
        return Outcome.TIMEOUT
    if generation.finish_reason == "refused" or REFUSAL_PATTERN.match(generation.text.replace("\u2019", "'")):
        return Outcome.REFUSED
    return Outcome.OK if generation.text.strip() else Outcome.UNPARSEABLE


def parse_letter(generation: Generation, prefill: str) -> SingleOrderComparison:
    """The letter that a judge's answer begins with, and all of its words as the explanation."""
    text, outcome = (prefill + generation.text).strip(), _classify_generation(generation)
    found = _LETTER_PATTERN.match(prefill + generation.text) if outcome is Outcome.OK else None
    if not found:
        return SingleOrderComparison(
            _NAN, 0.0, Outcome.UNPARSEABLE if outcome is Outcome.OK else outcome, generation.usage, text
        )
    return SingleOrderComparison(1.0 if found[1] == "A" else 0.0, 1.0, Outcome.OK, generation.usage, text)


def compare_in_both_orders(
    model: Model, pairs: Sequence[tuple[_Messages, _Messages]], answer_mode: AnswerMode = _LOGPROBS_MODE
) -> list[Comparison]:
    """Ask each question in both orders: `pairs` holds the wording with the first text as A, and as B."""
    readings = answer_mode.judge_questions(model, [messages for pair in pairs for messages in pair])
    return [_combine_orders(*readings[i : i + 2]) for i in range(0, len(readings), 2)]


def _combine_orders(first: SingleOrderComparison, second: SingleOrderComparison) -> Comparison:
    """Two readings as one comparison; where both failed, the first of them says why."""
    failed = [reading.outcome for reading in (first, second) if reading.outcome is not Outcome.OK]
    return Comparison(
        p_forward=first.p_first,
        p_backward=1.0 - second.p_first,
        option_mass_forward=first.option_mass,
        option_mass_backward=second.option_mass,
        usage=first.usage + second.usage,
        outcome=failed[0] if failed else Outcome.OK,
        explanation_forward=first.explanation,
        explanation_backward=second.explanation,
    )
