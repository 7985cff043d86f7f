"""Judge: responses (or finished chains) -> preferences. Which of two answers does the constitution prefer?

The recipes, by their settings (engine/settings.py RECIPES; `form` as in consumers/compare.py):

lee2023      one drawn principle, options, both orders averaged (Lee et al. 2023)
bai2022      one drawn principle, options, the label of one order, which the seed picks (Bai et al. 2022, section 4.1)
bai2022-cot  one drawn principle, options after reasoning, the average clamped to 0.40-0.60 (section 4.2)
ensemble-k   k different principles, options, their votes averaged by weight (section 4.1, "ensembled over 16 principles")
course       all principles in one question, a written letter and its explanation, the same one in both orders

A judgement that cannot be read is an outcome without a label, never a guess. Votes of principles count where they could be
read; there is a label when these hold at least half of the weight. POSITION_FLIP (if `reject_flips`): the same slot won twice.
Only OK trains.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from constitutions.loader import Constitution
from consumers import templates
from consumers.chain import seed_for
from consumers.compare import Comparison, Form, both_orders
from engine.models.port import NOTHING, Model
from schemas import ids
from schemas.records import (
    Chain,
    ConstitutionRef,
    EndReason,
    FinishReason,
    ModelRef,
    Outcome,
    Preference,
    PrincipleVote,
    Record,
    Response,
    Sampling,
)

ALL = "all"
ORDERS = ("forward", "backward")


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, waiting for a judgement."""

    parent: Response | Chain
    response_id: str
    a: str
    b: str
    completion_index_a: int | None
    completion_index_b: int | None
    finish_reason_a: FinishReason
    finish_reason_b: FinishReason
    sample: int

    @property
    def seed(self) -> int:
        """The same for the same pair under every constitution."""
        return seed_for("judge", self.response_id, self.sample)


def pairs_of(record: Record) -> list[Pair]:
    """The pairs in a record: neighbouring completions of a response; the final text and the first answer of a chain."""
    if isinstance(record, Response):
        completions = record.completions
        return [
            Pair(record, record.record_id, a.text, b.text, a.index, b.index, a.finish_reason, b.finish_reason, a.index)
            for a, b in pairwise(completions)
        ]
    assert isinstance(record, Chain)
    if not record.final or record.end_reason in (EndReason.UNUSABLE, EndReason.SKIPPED):
        return []
    if record.final_response is None or record.final_response == record.initial_response:
        return []
    return [
        Pair(
            record,
            record.response_id,
            record.final_response,
            record.initial_response,
            None,
            0,
            record.final_finish_reason,
            record.initial_finish_reason,
            0,
        )
    ]


@dataclass(frozen=True)
class Question:
    """What a pair is judged by: one principle (or all), and what its vote weighs."""

    principle_id: str
    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Ballot:
    """What one question brought."""

    question: Question
    comparison: Comparison
    outcome: Outcome

    def vote(self) -> PrincipleVote:
        said = self.comparison
        return PrincipleVote(
            principle_id=self.question.principle_id,
            p_forward=said.forward,
            p_backward=said.backward,
            option_mass_forward=said.option_mass_forward,
            option_mass_backward=said.option_mass_backward,
            weight=self.question.weight,
            outcome=self.outcome,
            explanation=said.text_forward,
            explanation_backward=said.text_backward,
        )


@dataclass(frozen=True)
class Judge:
    """The judging stage."""

    model: Model
    constitution: Constitution
    pairing: str
    min_mass: float
    reject_flips: bool
    preset: str = "lee2023"
    form: str = "options"
    principles: str = "constitution"
    k: int = 1
    order: str = "both"
    clamp: float = 0.0
    max_tokens: int = 256
    deadline_s: float | None = None

    def __call__(self, records: Sequence[Record]) -> list[list[Preference]]:
        pairs = [pairs_of(record) for record in records]
        flat = [pair for of_one in pairs for pair in of_one]
        if not flat:
            return [[] for _ in records]
        started = time.monotonic()
        ballots = self.ballots(flat)
        latency = 1000 * (time.monotonic() - started) / len(flat)
        made = iter([self.preference(pair, votes, latency) for pair, votes in zip(flat, ballots, strict=True)])
        return [[next(made) for _ in of_one] for of_one in pairs]

    # Asking

    @property
    def asking(self) -> Form:
        return Form(self.form, self.min_mass, self.max_tokens, self.deadline_s)

    @property
    def together(self) -> bool:
        """Whether all principles are in one question."""
        return self.principles == ALL or (self.principles == "constitution" and self.constitution.judge_with == ALL)

    def questions(self, pair: Pair) -> list[Question]:
        """What this pair is judged by: all principles at once, one drawn by weight, or k different ones, drawn evenly.

        Several principles are drawn evenly because their weights count in the average: both ways of drawing have the same mean.
        """
        if self.together:
            return [Question(ALL, self.constitution.whole_question)]
        drawn = self.constitution.judging_principles(pair.seed, pair.parent.tags, self.k)
        return [Question(p.id, p.question, p.weight if self.k > 1 else 1.0) for p in drawn]

    def ballots(self, pairs: Sequence[Pair]) -> list[list[Ballot]]:
        """Every question of every pair, asked in one go."""
        asked, form = [self.questions(pair) for pair in pairs], self.asking
        wordings = [
            (
                templates.comparison(pair.parent.messages, pair.a, pair.b, question.text, form.template),
                templates.comparison(pair.parent.messages, pair.b, pair.a, question.text, form.template),
            )
            for pair, questions in zip(pairs, asked, strict=True)
            for question in questions
        ]
        answers = iter(both_orders(self.model, wordings, form))
        return [
            [Ballot(question, answer := next(answers), self.outcome(answer)) for question in questions] for questions in asked
        ]

    def outcome(self, comparison: Comparison) -> Outcome:
        if comparison.outcome is Outcome.OK and self.reject_flips and comparison.position_flip:
            return Outcome.POSITION_FLIP
        return comparison.outcome

    # Counting

    def label(self, order: str, comparison: Comparison) -> float:
        """The soft label of the answer called a."""
        p = {"both": comparison.p, "forward": comparison.forward, "backward": comparison.backward}[order]
        return min(max(p, self.clamp), 1 - self.clamp)

    def preference(self, pair: Pair, ballots: Sequence[Ballot], latency_ms: float) -> Preference:
        parent, said = pair.parent, counted(ballots)
        order = ORDERS[pair.seed % 2] if self.order == "seeded" else "both"
        outcome = self.outcome(said)
        labelled = outcome in (Outcome.OK, Outcome.POSITION_FLIP)
        written = None if self.form == "options" else Sampling(temperature=0.0, top_p=1.0, max_tokens=self.max_tokens)
        return Preference(
            record_id=self.record_id(pair),
            parent_ids=[parent.record_id],
            prompt_id=parent.prompt_id,
            run_id=parent.run_id,
            stage="judge",
            constitution=reference(self.constitution),
            principle_id=ballots[0].question.principle_id if len(ballots) == 1 else None,
            model=ModelRef(id=self.model.id, revision=self.model.revision),
            policy_version=parent.policy_version,
            template_hash=self.asking.hash(self.model.capabilities),
            sampling=written,
            seed=pair.seed,
            prompt_tokens=said.usage.prompt,
            completion_tokens=said.usage.completion,
            cached_tokens=said.usage.cached,
            latency_ms=latency_ms,
            response_id=pair.response_id,
            messages=parent.messages,
            source=parent.source,
            tags=parent.tags,
            split=parent.split,
            epoch=parent.epoch,
            pairing=self.pairing,
            response_a=pair.a,
            response_b=pair.b,
            completion_index_a=pair.completion_index_a,
            completion_index_b=pair.completion_index_b,
            finish_reason_a=pair.finish_reason_a,
            finish_reason_b=pair.finish_reason_b,
            p_a=self.label(order, said) if labelled else None,
            p_forward=known(said.forward),
            p_backward=known(said.backward),
            position_gap=known(said.gap),
            option_mass=said.mass,
            position_flip=said.position_flip,
            votes=[ballot.vote() for ballot in ballots],
            explanation=said.text_forward,
            outcome=outcome,
            preset=self.preset,
            label_order=order,
        )

    def record_id(self, pair: Pair) -> str:
        configuration = ids.fingerprint(
            model=[self.model.id, self.model.revision],
            template=self.asking.hash(self.model.capabilities),
            constitution=self.constitution.hash,
            pairing=self.pairing,
            form=self.form,
            principles=ALL if self.together else self.k,
            order=self.order,
            clamp=self.clamp,
            min_mass=self.min_mass,
            reject_flips=self.reject_flips,
            max_tokens=self.max_tokens if self.form != "options" else None,
        )
        return ids.record_id("judge", [pair.parent.record_id], configuration, pair.sample)


def counted(ballots: Sequence[Ballot]) -> Comparison:
    """All ballots as one comparison: the mean of those that count, by weight.

    Of several outcomes that bar a label the one with the most weight is told. Where no ballot counts the mean is of what could
    be read, for the record; it is no label.
    """
    weights: dict[Outcome, float] = defaultdict(float)
    for ballot in ballots:
        weights[ballot.outcome] += ballot.question.weight
    enough = 2 * weights[Outcome.OK] >= math.fsum(weights.values())
    outcome = Outcome.OK if enough else max((o for o in weights if o is not Outcome.OK), key=weights.__getitem__)
    counting = [b for b in ballots if b.outcome is outcome] or ballots
    first = ballots[0].comparison
    return Comparison(
        forward=mean(counting, [b.comparison.forward for b in counting]),
        backward=mean(counting, [b.comparison.backward for b in counting]),
        option_mass_forward=min(b.comparison.option_mass_forward for b in counting),
        option_mass_backward=min(b.comparison.option_mass_backward for b in counting),
        usage=sum((b.comparison.usage for b in ballots), NOTHING),
        outcome=outcome,
        text_forward=first.text_forward if len(ballots) == 1 else "",
        text_backward=first.text_backward if len(ballots) == 1 else "",
    )


def mean(ballots: Sequence[Ballot], values: Sequence[float]) -> float:
    """The weighted mean; of one value that value itself."""
    total = math.fsum(b.question.weight for b in ballots)
    return math.fsum(b.question.weight * value for b, value in zip(ballots, values, strict=True)) / total


def known(value: float) -> float | None:
    return None if math.isnan(value) else value


def reference(constitution: Constitution) -> ConstitutionRef:
    return ConstitutionRef(name=constitution.name, version=constitution.version, hash=constitution.hash)
