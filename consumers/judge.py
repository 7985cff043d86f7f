"""Judge: responses (or finished chains) -> preferences. Which of two answers does the constitution prefer?

The recipes, by their settings (engine/settings.py RECIPES; `form` as in consumers/compare.py):

lee2023      one drawn principle, logprobs, both orders averaged (Lee et al. 2023)
bai2022      one drawn principle, logprobs, the label of one order, which the seed picks (Bai et al. 2022, section 4.1)
bai2022-cot  one drawn principle, logprobs after reasoning, the average clamped to 0.40-0.60 (section 4.2)
ensemble-k   k different principles, options, their votes averaged by weight (section 4.1, "ensembled over 16 principles")
course       all principles in one question, a written letter and its explanation, the same one in both orders

A judgement that cannot be read is an outcome without a label, never a guess. Votes of principles count where they could be
read; there is a label when these hold at least half of the weight. POSITION_FLIP (if `reject_position_flips`): the same slot won twice.
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
from consumers.compare import AnswerMode, Comparison, compare_in_both_orders
from engine.models.interface import NO_USAGE, Model
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

_ALL_PRINCIPLES = "all"
_LABEL_ORDERS = ("forward", "backward")


@dataclass(frozen=True)
class ResponsePair:
    """Two answers to one prompt, waiting for a judgement."""

    parent: Response | Chain
    response_id: str
    response_a: str
    response_b: str
    completion_index_a: int | None
    completion_index_b: int | None
    finish_reason_a: FinishReason
    finish_reason_b: FinishReason
    sample_index: int

    @property
    def seed(self) -> int:
        """The same for the same pair under every constitution."""
        return ids.compute_stage_seed("judge", self.response_id, self.sample_index)


def _make_pairs(record: Record) -> list[ResponsePair]:
    """The pairs in a record: neighbouring completions of a response; the final text and the first answer of a chain."""
    if isinstance(record, Response):
        completions = record.completions
        return [
            ResponsePair(record, record.record_id, a.text, b.text, a.index, b.index, a.finish_reason, b.finish_reason, a.index)
            for a, b in pairwise(completions)
        ]
    assert isinstance(record, Chain)
    if not record.final or record.end_reason in (EndReason.UNUSABLE, EndReason.SKIPPED):
        return []
    if record.final_response is None or record.final_response == record.initial_response:
        return []
    return [
        ResponsePair(
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
class JudgeQuestion:
    """What a pair is judged by: one principle (or all), and what its vote weighs."""

    principle_id: str
    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class PrincipleComparison:
    """What one question brought."""

    question: JudgeQuestion
    comparison: Comparison
    outcome: Outcome

    def to_vote(self) -> PrincipleVote:
        said = self.comparison
        return PrincipleVote(
            principle_id=self.question.principle_id,
            p_forward=said.p_forward,
            p_backward=said.p_backward,
            option_mass_forward=said.option_mass_forward,
            option_mass_backward=said.option_mass_backward,
            weight=self.question.weight,
            outcome=self.outcome,
            explanation=said.explanation_forward,
            explanation_backward=said.explanation_backward,
        )


@dataclass(frozen=True)
class JudgeStage:
    """The judging stage."""

    model: Model
    constitution: Constitution
    pairing: str
    min_option_mass: float
    reject_position_flips: bool
    preset: str = "lee2023"
    answer_mode: str = "logprobs"
    principles: str = "constitution"
    num_principles: int = 1
    label_order: str = "both"
    clamp: float = 0.0
    max_tokens: int = 256
    timeout_s: float | None = None

    def __call__(self, records: Sequence[Record]) -> list[list[Preference]]:
        pairs = [_make_pairs(record) for record in records]
        flat = [pair for of_one in pairs for pair in of_one]
        if not flat:
            return [[] for _ in records]
        started = time.monotonic()
        ballots = self.compare_pairs(flat)
        latency = 1000 * (time.monotonic() - started) / len(flat)
        made = iter([self.make_preference(pair, votes, latency) for pair, votes in zip(flat, ballots, strict=True)])
        return [[next(made) for _ in of_one] for of_one in pairs]

    # Asking

    @property
    def mode(self) -> AnswerMode:
        return AnswerMode(self.answer_mode, self.min_option_mass, self.max_tokens, self.timeout_s)

    @property
    def asks_all_principles(self) -> bool:
        """Whether all principles are in one question."""
        return self.principles == _ALL_PRINCIPLES or (
            self.principles == "constitution" and self.constitution.judge_with == _ALL_PRINCIPLES
        )

    def make_questions(self, pair: ResponsePair) -> list[JudgeQuestion]:
        """What this pair is judged by: all principles at once, one drawn by weight, or k different ones, drawn evenly.

        Several principles are drawn evenly because their weights count in the average: both ways of drawing have the same mean.
        """
        if self.asks_all_principles:
            return [JudgeQuestion(_ALL_PRINCIPLES, self.constitution.combined_judge_prompt)]
        drawn = self.constitution.sample_judge_principles(pair.seed, pair.parent.tags, self.num_principles)
        return [JudgeQuestion(p.id, p.judge_prompt, p.weight if self.num_principles > 1 else 1.0) for p in drawn]

    def compare_pairs(self, pairs: Sequence[ResponsePair]) -> list[list[PrincipleComparison]]:
        """Every question of every pair, asked in one go."""
        asked, form = [self.make_questions(pair) for pair in pairs], self.mode
        wordings = [
            (
                templates.make_comparison_messages(
                    pair.parent.messages, pair.response_a, pair.response_b, question.text, form.template
                ),
                templates.make_comparison_messages(
                    pair.parent.messages, pair.response_b, pair.response_a, question.text, form.template
                ),
            )
            for pair, questions in zip(pairs, asked, strict=True)
            for question in questions
        ]
        answers = iter(compare_in_both_orders(self.model, wordings, form))
        return [
            [PrincipleComparison(question, answer := next(answers), self.decide_outcome(answer)) for question in questions]
            for questions in asked
        ]

    def decide_outcome(self, comparison: Comparison) -> Outcome:
        if comparison.outcome is Outcome.OK and self.reject_position_flips and comparison.position_flip:
            return Outcome.POSITION_FLIP
        return comparison.outcome

    # Counting

    def compute_label(self, order: str, comparison: Comparison) -> float:
        """The soft label of the answer called a."""
        p = {"both": comparison.p_mean, "forward": comparison.p_forward, "backward": comparison.p_backward}[order]
        return min(max(p, self.clamp), 1 - self.clamp)

    def make_preference(self, pair: ResponsePair, comparisons: Sequence[PrincipleComparison], latency_ms: float) -> Preference:
        parent, said = pair.parent, _aggregate_comparisons(comparisons)
        order = _LABEL_ORDERS[pair.seed % 2] if self.label_order == "seeded" else "both"
        outcome = self.decide_outcome(said)
        labelled = outcome in (Outcome.OK, Outcome.POSITION_FLIP)
        written = None if self.answer_mode == "logprobs" else Sampling(temperature=0.0, top_p=1.0, max_tokens=self.max_tokens)
        return Preference(
            record_id=self.compute_record_id(pair),
            parent_ids=[parent.record_id],
            prompt_id=parent.prompt_id,
            run_id=parent.run_id,
            stage="judge",
            constitution=make_constitution_ref(self.constitution),
            principle_id=comparisons[0].question.principle_id if len(comparisons) == 1 else None,
            model=ModelRef(id=self.model.id, revision=self.model.revision),
            policy_version=parent.policy_version,
            template_hash=self.mode.get_template_hash(self.model.capabilities),
            sampling=written,
            seed=pair.seed,
            prompt_tokens=said.usage.prompt_tokens,
            completion_tokens=said.usage.completion_tokens,
            cached_tokens=said.usage.cached_tokens,
            latency_ms=latency_ms,
            response_id=pair.response_id,
            messages=parent.messages,
            source=parent.source,
            tags=parent.tags,
            split=parent.split,
            epoch=parent.epoch,
            pairing=self.pairing,
            response_a=pair.response_a,
            response_b=pair.response_b,
            completion_index_a=pair.completion_index_a,
            completion_index_b=pair.completion_index_b,
            finish_reason_a=pair.finish_reason_a,
            finish_reason_b=pair.finish_reason_b,
            p_a=self.compute_label(order, said) if labelled else None,
            p_forward=_nan_to_none(said.p_forward),
            p_backward=_nan_to_none(said.p_backward),
            position_gap=_nan_to_none(said.position_gap),
            option_mass=said.option_mass,
            position_flip=said.position_flip,
            votes=[ballot.to_vote() for ballot in comparisons],
            explanation=said.explanation_forward,
            outcome=outcome,
            preset=self.preset,
            label_order=order,
        )

    def compute_record_id(self, pair: ResponsePair) -> str:
        configuration = ids.compute_fingerprint(
            "judge",
            model=[self.model.id, self.model.revision],
            template=self.mode.get_template_hash(self.model.capabilities),
            constitution=self.constitution.hash,
            pairing=self.pairing,
            answer_mode=self.answer_mode,
            principles=_ALL_PRINCIPLES if self.asks_all_principles else self.num_principles,
            label_order=self.label_order,
            clamp=self.clamp,
            min_option_mass=self.min_option_mass,
            reject_position_flips=self.reject_position_flips,
            max_tokens=self.max_tokens if self.answer_mode != "logprobs" else None,
        )
        return ids.compute_record_id("judge", [pair.parent.record_id], configuration, pair.sample_index)


def _aggregate_comparisons(comparisons: Sequence[PrincipleComparison]) -> Comparison:
    """All ballots as one comparison: the mean of those that count, by weight.

    Of several outcomes that bar a label the one with the most weight is told. Where no ballot counts the mean is of what could
    be read, for the record; it is no label.
    """
    weights: dict[Outcome, float] = defaultdict(float)
    for ballot in comparisons:
        weights[ballot.outcome] += ballot.question.weight
    enough = 2 * weights[Outcome.OK] >= math.fsum(weights.values())
    outcome = Outcome.OK if enough else max((o for o in weights if o is not Outcome.OK), key=weights.__getitem__)
    counting = [b for b in comparisons if b.outcome is outcome] or comparisons
    first = comparisons[0].comparison
    return Comparison(
        p_forward=_weighted_mean(counting, [b.comparison.p_forward for b in counting]),
        p_backward=_weighted_mean(counting, [b.comparison.p_backward for b in counting]),
        option_mass_forward=min(b.comparison.option_mass_forward for b in counting),
        option_mass_backward=min(b.comparison.option_mass_backward for b in counting),
        usage=sum((b.comparison.usage for b in comparisons), NO_USAGE),
        outcome=outcome,
        explanation_forward=first.explanation_forward if len(comparisons) == 1 else "",
        explanation_backward=first.explanation_backward if len(comparisons) == 1 else "",
    )


def _weighted_mean(comparisons: Sequence[PrincipleComparison], values: Sequence[float]) -> float:
    """The weighted mean; of one value that value itself."""
    total = math.fsum(b.question.weight for b in comparisons)
    return math.fsum(b.question.weight * value for b, value in zip(comparisons, values, strict=True)) / total


def _nan_to_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def make_constitution_ref(constitution: Constitution) -> ConstitutionRef:
    return ConstitutionRef(name=constitution.name, version=constitution.version, hash=constitution.hash)
