"""Compare two responses with a judge. The judge sees both orders of the responses. There are three answer modes.

logprobs    The probability is computed from the next-token log-probabilities of the option letters: p = e^lA / (e^lA + e^lB).
            No letter is sampled (Bai et al. 2022, section 4.1). The option mass is the total probability of the two letters. A
            small option mass means that the model would probably write something else. If a server does not return
            log-probabilities, it samples several replies, and the letters in these replies are counted instead.
reasoning   The judge first writes its reasoning with greedy decoding. Then the option probabilities are read (section 4.2).
letter      The judge writes a letter and an explanation. The letter must be at the beginning of the reply. p is 1 or 0.

Both orders are judged, because judges prefer one position (Lee et al. 2023, section 2.3). A reply that cannot be read has the
outcome REFUSED, UNPARSEABLE, LOW_MASS, TRUNCATED (the judge reached its token limit while it was thinking) or TIMEOUT. Its
probability is not usable and is not guessed. An unknown probability is None, never NaN.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from consumers import templates
from consumers.templates import OPTION_LETTERS
from engine.errors import CharterError
from engine.models.interface import (
    NO_USAGE,
    Generation,
    GenerationRequest,
    Model,
    ModelCapabilities,
    OptionScores,
    Result,
    Usage,
    combine_results,
)
from schemas.records import ChatMessage, Outcome

_Messages = tuple[ChatMessage, ...]

# Log-probabilities and option masses are sums of floats. Rounding can make them slightly larger than their upper limit.
_ROUNDING_TOLERANCE = 1e-3
# Matches the beginning of a reply in which the judge refuses. (Refusals in responses are counted by engine/monitor_views.sql.)
REFUSAL_PATTERN = re.compile(
    r"\W*(?:answer\W+)?(?:(?:i'm|i am|we're|we are)?\s*(?:very |so |truly )?(?:sorry|afraid)\b|(?:my )?apologies|i apologi[sz]e"
    r"|(?:unfortunately\W+)?(?:i|we) (?:can(?:'t|not| not)|won't|will not|must decline|refuse|decline"
    r"|(?:am|are) (?:un|not )able|don't feel comfortable|do not feel comfortable)|(?:i'm|we're) (?:un|not )able"
    r"|as an? (?:ai|artificial|language model)\b)",
    re.IGNORECASE,
)
# Matches a reply that begins with one complete letter. A reply that begins with several letters ("(A) or (B)") does not match.
_LETTER_PATTERN = re.compile(r"\s*Answer: \(([AB])\)(?!\w)(?!\s*(?:or|and|/|,|&)\s*(?:Answer: )?\(?[AB]\b)")


@dataclass(frozen=True)
class Question:
    """A question to a judge. `group` names the record that needs the reply (see GenerationRequest)."""

    messages: _Messages
    group: str = ""


@dataclass(frozen=True)
class SingleOrderComparison:
    """A judge's reply for one order of a pair.

    `p_first` is the probability that the response shown first is better, or None if the reply cannot be read. This probability
    is used only if `outcome` is OK. `explanation` is the judge's reply, and `reasoning` is what it thought before that.
    """

    p_first: float | None
    option_mass: float
    outcome: Outcome
    usage: Usage = NO_USAGE
    explanation: str = ""
    reasoning: str = ""


@dataclass(frozen=True)
class Comparison:
    """A judge's replies for both orders of a pair. Forward: A is shown first. Backward: B is shown first.

    `p_forward` and `p_backward` are the probabilities that A is better, in the forward and the backward order. A value is None
    if the reply cannot be read. Values that are computed from None are also None. The outcome OK means that the forward reply
    and the backward reply could be read.
    """

    p_forward: float | None
    p_backward: float | None
    option_mass_forward: float
    option_mass_backward: float
    usage: Usage = NO_USAGE
    outcome: Outcome = Outcome.OK
    explanation_forward: str = ""
    explanation_backward: str = ""
    reasoning_forward: str = ""
    reasoning_backward: str = ""

    @property
    def p_mean(self) -> float | None:
        if self.p_forward is None or self.p_backward is None:
            return None
        return (self.p_forward + self.p_backward) / 2

    @property
    def option_mass(self) -> float:
        return min(self.option_mass_forward, self.option_mass_backward)

    @property
    def position_gap(self) -> float | None:
        if self.p_forward is None or self.p_backward is None:
            return None
        return abs(self.p_forward - self.p_backward)

    @property
    def position_flip(self) -> bool:
        """True if the judge prefers the same position in both orders."""
        if self.p_forward is None or self.p_backward is None:
            return False
        return (self.p_forward - 0.5) * (self.p_backward - 0.5) < 0


@dataclass(frozen=True)
class AnswerMode:
    """The answer mode of a judge. `max_tokens` and `timeout_s` (in seconds) limit a written reply.

    `max_thinking_tokens` limits the reasoning before a written reply; 0 turns thinking off. Option probabilities are always read
    without thinking, because a judge that thinks begins with its reasoning.
    """

    name: str = "logprobs"
    min_option_mass: float = 0.5
    max_tokens: int = 256
    timeout_s: float | None = None
    max_thinking_tokens: int = 0

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

    def judge_questions(self, model: Model, questions: Sequence[Question]) -> list[Result[SingleOrderComparison]]:
        """Return the judge's reply to each question, in order. If a request fails, its question has an error instead."""
        methods = {"logprobs": self.judge_by_logprobs, "reasoning": self.judge_by_reasoning, "letter": self.judge_by_letter}
        return methods[self.name](model, questions) if questions else []

    def judge_by_logprobs(self, model: Model, questions: Sequence[Question]) -> list[Result[SingleOrderComparison]]:
        requests = [
            replace(templates.make_choice_request(question.messages, model.capabilities), group=question.group)
            for question in questions
        ]
        results = model.score_options(requests, OPTION_LETTERS)
        return [result if isinstance(result, CharterError) else self.read_scores(result) for result in results]

    def read_scores(self, scores: OptionScores) -> SingleOrderComparison:
        option_mass = scores.option_mass if math.isfinite(scores.option_mass) else 0.0
        return SingleOrderComparison(compute_p_a(scores), option_mass, self.classify_scores(scores), scores.usage)

    def judge_by_reasoning(self, model: Model, questions: Sequence[Question]) -> list[Result[SingleOrderComparison]]:
        requests = [GenerationRequest(q.messages, timeout_s=self.timeout_s, group=q.group) for q in questions]
        results = self.generate_texts(model, requests)
        choice_questions = [
            Question(templates.append_choice_question(question.messages, result.text.strip()), question.group)
            for question, result in zip(questions, results, strict=True)
            if isinstance(result, Generation) and _classify_generation(result) is Outcome.OK
        ]
        # The option scores of the questions with usable reasoning, in order.
        choices = iter(self.judge_by_logprobs(model, choice_questions) if choice_questions else [])
        return [
            result if isinstance(result, CharterError) else _combine_reasoning_and_choice(result, choices) for result in results
        ]

    def judge_by_letter(self, model: Model, questions: Sequence[Question]) -> list[Result[SingleOrderComparison]]:
        # A judge that thinks begins with its reasoning, and not with a prefill.
        prefill = templates.ANSWER_PREFILL if model.capabilities.prefill and not self.max_thinking_tokens else ""
        requests = [GenerationRequest(q.messages, prefill=prefill, timeout_s=self.timeout_s, group=q.group) for q in questions]
        results = self.generate_texts(model, requests)
        return [result if isinstance(result, CharterError) else parse_letter(result, prefill) for result in results]

    def generate_texts(self, model: Model, requests: Sequence[GenerationRequest]) -> list[Result[Generation]]:
        results = model.generate(
            requests,
            temperature=get_temperature(model.capabilities),
            max_tokens=self.max_tokens,
            max_thinking_tokens=self.max_thinking_tokens,
        )
        return [result if isinstance(result, CharterError) else result[0] for result in results]

    def classify_scores(self, scores: OptionScores) -> Outcome:
        """Return OK if the option scores are usable. If not, return the outcome that states the reason."""
        if compute_p_a(scores) is None or not scores.option_mass <= 1 + _ROUNDING_TOLERANCE:  # a mass of NaN is unusable
            return Outcome.UNPARSEABLE
        if scores.option_mass >= self.min_option_mass and scores.option_mass > 0:
            return Outcome.OK
        if not scores.unparsed_replies:
            return Outcome.LOW_MASS
        if 2 * scores.num_cut_replies >= len(scores.unparsed_replies):
            return Outcome.TRUNCATED
        num_refusals = sum(bool(REFUSAL_PATTERN.match(reply)) for reply in scores.unparsed_replies)
        return Outcome.REFUSED if 2 * num_refusals >= len(scores.unparsed_replies) else Outcome.UNPARSEABLE


_LOGPROBS_MODE = AnswerMode()


def get_temperature(capabilities: ModelCapabilities) -> float:
    """Return the temperature of a written reply: 0 (greedy decoding), or 1 if the model has no other temperature."""
    return 0.0 if capabilities.any_temperature else 1.0


def compute_p_a(scores: OptionScores) -> float | None:
    """Return the probability of option A divided by the probability of both options.

    Return None if the sum of the probabilities is 0. Also return None if a score is not a log-probability.
    """
    a, b = scores.logprobs
    if math.isnan(a) or math.isnan(b) or max(a, b) == -math.inf or max(a, b) > _ROUNDING_TOLERANCE:
        return None
    return 1.0 / (1.0 + math.exp(min(700.0, b - a)))  # exp overflows a double above 709


def _classify_generation(generation: Generation) -> Outcome:
    """Return OK if a written reply is usable. If not, return the outcome that states the reason."""
    if generation.finish_reason == "timeout":
        return Outcome.TIMEOUT
    if generation.finish_reason == "refused" or REFUSAL_PATTERN.match(generation.text.replace("\u2019", "'")):
        return Outcome.REFUSED
    if generation.ends_in_reasoning:
        return Outcome.TRUNCATED
    return Outcome.OK if generation.text.strip() else Outcome.UNPARSEABLE


def _combine_reasoning_and_choice(
    reasoning: Generation, choices: Iterator[Result[SingleOrderComparison]]
) -> Result[SingleOrderComparison]:
    """Return the reply that consists of a reasoning and the next choice. Unusable reasoning has no choice."""
    outcome = _classify_generation(reasoning)
    choice = next(choices) if outcome is Outcome.OK else SingleOrderComparison(None, 0.0, outcome)
    if isinstance(choice, CharterError):
        return choice
    usage, explanation = reasoning.usage + choice.usage, reasoning.text.strip()
    return replace(choice, usage=usage, explanation=explanation, reasoning=reasoning.reasoning)


def parse_letter(generation: Generation, prefill: str) -> SingleOrderComparison:
    """Parse the letter at the beginning of a judge's reply. The explanation is the whole reply."""
    reply, outcome = prefill + generation.text, _classify_generation(generation)
    match = _LETTER_PATTERN.match(reply) if outcome is Outcome.OK else None
    if match:
        p_first = 1.0 if match[1] == "A" else 0.0
        return SingleOrderComparison(p_first, 1.0, Outcome.OK, generation.usage, reply.strip(), generation.reasoning)
    outcome = Outcome.UNPARSEABLE if outcome is Outcome.OK else outcome
    return SingleOrderComparison(None, 0.0, outcome, generation.usage, reply.strip(), generation.reasoning)


def compare_in_both_orders(
    model: Model, pairs: Sequence[tuple[Question, Question]], answer_mode: AnswerMode = _LOGPROBS_MODE
) -> list[Result[Comparison]]:
    """Judge pairs of responses in both orders.

    An item of `pairs` has two questions. In the first question, the first response is option A. In the second question, the
    first response is option B. If a request for one of the orders fails, the comparison is an error.
    """
    replies = answer_mode.judge_questions(model, [question for pair in pairs for question in pair])
    orders = [combine_results(pair) for pair in zip(replies[::2], replies[1::2], strict=True)]
    return [result if isinstance(result, CharterError) else _combine_orders(*result) for result in orders]


def _combine_orders(forward: SingleOrderComparison, backward: SingleOrderComparison) -> Comparison:
    """Combine the forward and the backward reply. If no reply is usable, use the outcome of the forward order."""
    return Comparison(
        p_forward=forward.p_first,
        p_backward=None if backward.p_first is None else 1.0 - backward.p_first,
        option_mass_forward=forward.option_mass,
        option_mass_backward=backward.option_mass,
        usage=forward.usage + backward.usage,
        outcome=forward.outcome if forward.outcome is not Outcome.OK else backward.outcome,
        explanation_forward=forward.explanation,
        explanation_backward=backward.explanation,
        reasoning_forward=forward.reasoning,
        reasoning_backward=backward.reasoning,
    )
