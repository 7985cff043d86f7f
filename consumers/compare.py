"""Comparing two texts: what a judge says of them, in both orders and in one of three forms.

options     the next-token probabilities of the letters, p = e^lA / (e^lA + e^lB), never a sampled letter (Bai et al. 2022,
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
from consumers.templates import OPTIONS
from engine.models.port import NOTHING, Ask, Capabilities, Generation, Model, OptionScores, Usage
from schemas.records import ChatMessage, Outcome

Turns = tuple[ChatMessage, ...]

NAN = float("nan")
# At the beginning of what a judge wrote: it will not judge. (Answers' refusals are counted by engine/watch.sql.)
REFUSAL = re.compile(
    r"\W*(?:answer\W+)?(?:(?:i'm|i am|we're|we are)?\s*(?:very |so |truly )?(?:sorry|afraid)\b|(?:my )?apologies|i apologi[sz]e"
    r"|(?:unfortunately\W+)?(?:i|we) (?:can(?:'t|not| not)|won't|will not|must decline|refuse|decline"
    r"|(?:am|are) (?:un|not )able|don't feel comfortable|do not feel comfortable)|(?:i'm|we're) (?:un|not )able"
    r"|as an? (?:ai|artificial|language model)\b)",
    re.IGNORECASE,
)
# The letter stands first, closed, and is not one of several.
LETTER = re.compile(r"\s*Answer: \(([AB])\)(?!\w)(?!\s*(?:or|and|/|,|&)\s*(?:Answer: )?\(?[AB]\b)")


@dataclass(frozen=True)
class Reading:
    """What a judge says with the texts in one order: the probability that the one shown first is better.

    `p` is NaN where there is nothing to read; it counts only with outcome OK. `text` is what the judge wrote.
    """

    p: float
    mass: float
    outcome: Outcome
    usage: Usage = NOTHING
    text: str = ""


@dataclass(frozen=True)
class Comparison:
    """The probability that the first text is better when shown first (`forward`) and when shown second (`backward`).

    Only with outcome OK could it be read in both orders.
    """

    forward: float
    backward: float
    option_mass_forward: float
    option_mass_backward: float
    usage: Usage = NOTHING
    outcome: Outcome = Outcome.OK
    text_forward: str = ""
    text_backward: str = ""

    @property
    def p(self) -> float:
        return (self.forward + self.backward) / 2

    @property
    def mass(self) -> float:
        return min(self.option_mass_forward, self.option_mass_backward)

    @property
    def gap(self) -> float:
        return abs(self.forward - self.backward)

    @property
    def position_flip(self) -> bool:
        """Whether the same slot won twice."""
        return (self.forward - 0.5) * (self.backward - 0.5) < 0


@dataclass(frozen=True)
class Form:
    """How a judge is asked. `max_tokens` and `deadline_s` (seconds) bound what it writes."""

    name: str = "options"
    min_mass: float = 0.5
    max_tokens: int = 256
    deadline_s: float | None = None

    @property
    def template(self) -> str:
        return {"options": templates.COMPARISON, "reasoning": templates.REASONING, "letter": templates.LETTER}[self.name]

    def hash(self, capabilities: Capabilities) -> str:
        name = {"options": "comparison"}.get(self.name, self.name)
        return templates.hash_of(name, capabilities)

    def read(self, model: Model, questions: Sequence[Turns]) -> list[Reading]:
        """What the judge says to each question."""
        forms = {"options": self.options, "reasoning": self.reasoning, "letter": self.letter}
        return forms[self.name](model, questions) if questions else []

    def options(self, model: Model, questions: Sequence[Turns]) -> list[Reading]:
        scores = model.option_logprobs([templates.choice(messages, model.capabilities) for messages in questions], OPTIONS)
        return [Reading(share_of_a(one), one.mass, self.outcome(one), one.usage) for one in scores]

    def reasoning(self, model: Model, questions: Sequence[Turns]) -> list[Reading]:
        thoughts = self.written(model, [Ask(messages, deadline_s=self.deadline_s) for messages in questions])
        outcomes = [unwritten(thought) for thought in thoughts]
        begun = [
            templates.after_reasoning(messages, thought.text.strip())
            for messages, thought, outcome in zip(questions, thoughts, outcomes, strict=True)
            if outcome is Outcome.OK
        ]
        scored = iter(self.options(model, begun) if begun else [])
        readings = [next(scored) if outcome is Outcome.OK else Reading(NAN, 0.0, outcome) for outcome in outcomes]
        return [
            Reading(reading.p, reading.mass, reading.outcome, thought.usage + reading.usage, thought.text.strip())
            for reading, thought in zip(readings, thoughts, strict=True)
        ]

    def letter(self, model: Model, questions: Sequence[Turns]) -> list[Reading]:
        prefill = templates.ANSWER if model.capabilities.prefill else ""
        written = self.written(model, [Ask(messages, prefill=prefill, deadline_s=self.deadline_s) for messages in questions])
        return [letter_of(answer, prefill) for answer in written]

    def written(self, model: Model, asks: Sequence[Ask]) -> list[Generation]:
        return [generation for (generation,) in model.generate(asks, temperature=0.0, max_tokens=self.max_tokens)]

    def outcome(self, scores: OptionScores) -> Outcome:
        """Whether option scores may be read, and if not, why."""
        if math.isnan(share_of_a(scores)) or not scores.mass <= 1 + 1e-3:
            return Outcome.UNPARSEABLE
        if scores.mass >= self.min_mass and scores.mass > 0:
            return Outcome.OK
        if not scores.replies:
            return Outcome.LOW_MASS
        refused = sum(bool(REFUSAL.match(reply)) for reply in scores.replies)
        return Outcome.REFUSED if 2 * refused >= len(scores.replies) else Outcome.UNPARSEABLE


OPTIONS_FORM = Form()


def share_of_a(scores: OptionScores) -> float:
    """The probability of option A among A and B; NaN when neither caught anything, or a score is no log-probability."""
    a, b = scores.logprobs
    if math.isnan(a) or math.isnan(b) or max(a, b) == -math.inf or max(a, b) > 1e-3:
        return NAN
    return 1.0 / (1.0 + math.exp(min(700.0, b - a)))


def unwritten(answer: Generation) -> Outcome:
    """Why what a judge wrote is nothing to go by; OK where it is."""
    if answer.finish_reason == "timeout":
        return Outcome.TIMEOUT
    if answer.finish_reason == "refused" or REFUSAL.match(answer.text.replace("\u2019", "'")):
        return Outcome.REFUSED
    return Outcome.OK if answer.text.strip() else Outcome.UNPARSEABLE


def letter_of(answer: Generation, prefill: str) -> Reading:
    """The letter that a judge's answer begins with, and all of its words as the explanation."""
    text, outcome = (prefill + answer.text).strip(), unwritten(answer)
    found = LETTER.match(prefill + answer.text) if outcome is Outcome.OK else None
    if not found:
        return Reading(NAN, 0.0, Outcome.UNPARSEABLE if outcome is Outcome.OK else outcome, answer.usage, text)
    return Reading(1.0 if found[1] == "A" else 0.0, 1.0, Outcome.OK, answer.usage, text)


def both_orders(model: Model, pairs: Sequence[tuple[Turns, Turns]], form: Form = OPTIONS_FORM) -> list[Comparison]:
    """Ask each question in both orders: `pairs` holds the wording with the first text as A, and as B."""
    readings = form.read(model, [messages for pair in pairs for messages in pair])
    return [compared(*readings[i : i + 2]) for i in range(0, len(readings), 2)]


def compared(first: Reading, second: Reading) -> Comparison:
    """Two readings as one comparison; where both failed, the first of them says why."""
    failed = [reading.outcome for reading in (first, second) if reading.outcome is not Outcome.OK]
    return Comparison(
        forward=first.p,
        backward=1.0 - second.p,
        option_mass_forward=first.mass,
        option_mass_backward=second.mass,
        usage=first.usage + second.usage,
        outcome=failed[0] if failed else Outcome.OK,
        text_forward=first.text,
        text_backward=second.text,
    )
