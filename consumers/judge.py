"""The judge stage: responses or finished chains -> preferences.

The judge decides which of two responses the constitution prefers. engine/settings.py defines the presets (PRESETS).
consumers/compare.py describes the answer modes.

lee2023      one sampled principle, logprobs, mean of both orders (Lee et al. 2023)
bai2022      one sampled principle, logprobs, the label of one order that the seed selects (Bai et al. 2022, section 4.1)
bai2022-cot  one sampled principle, logprobs after reasoning, the mean clamped to 0.40-0.60 (section 4.2)
ensemble-k   k different principles, logprobs, the weighted mean of their votes (section 4.1, "ensembled over 16 principles")
course       all principles in one question, a written letter and explanation; both orders must prefer the same response

A judgment that cannot be read has no label, and `outcome` contains the reason. No label is guessed. If a pair has several
principles, only the votes that can be read count. The pair gets a label if the votes that can be read have at least half of the
total weight. A pair that cannot be compared (engine/eligibility.py) is not judged: its record has the outcome EMPTY, WITHHELD,
REASONING or IDENTICAL and the reason. A pair whose label nobody needs is not judged either, because its prompt is for RL. Its
outcome is NOT_NEEDED. If `reject_position_flips` is set, POSITION_FLIP means that the judge prefers the same position in both orders.
Only preferences with the outcome OK are used for training. consumers/contrast.py makes the labels of contrast pairs.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from constitutions.loader import Constitution
from consumers import templates
from consumers.chain import skips_suite
from consumers.compare import AnswerMode, Comparison, Question, compare_in_both_orders, get_temperature
from engine.eligibility import find_pair_problem
from engine.errors import CharterError
from engine.models.interface import NO_USAGE, Model, Result, combine_results
from engine.notices import NOTICES
from engine.pairing import compute_pair_index, list_pairs
from schemas import ids
from schemas.records import (
    Chain,
    Completion,
    ConstitutionRef,
    EndReason,
    FinishReason,
    ModelRef,
    Outcome,
    Preference,
    PrincipleVote,
    Purpose,
    Record,
    Response,
    Sampling,
    Split,
)

_ALL_PRINCIPLES = "all"
_LABEL_ORDERS = ("forward", "backward")


@dataclass(frozen=True)
class ResponsePair:
    """Two responses to one prompt, before a judge compares them.

    The final response of a chain and a contrast completion have no completion index. `names` are the names of the responses in the
    reason why they cannot be compared.
    """

    parent: Response | Chain
    response_id: str
    response_a: str
    response_b: str
    completion_index_a: int | None
    completion_index_b: int | None
    finish_reason_a: FinishReason
    finish_reason_b: FinishReason
    sample_index: int
    names: tuple[str, str] = ("response A", "response B")

    @property
    def seed(self) -> int:
        """The seed of the pair. The seed does not depend on the constitution."""
        return ids.compute_stage_seed("judge", self.response_id, self.sample_index)

    @cached_property
    def problem(self) -> tuple[Outcome, str] | None:
        """The outcome and the reason if the responses cannot be compared. None if they can be compared."""
        return find_pair_problem(self.response_a, self.response_b, self.finish_reason_a, self.finish_reason_b, self.names)


def _make_completion_pair(response: Response, a: Completion, b: Completion) -> ResponsePair:
    return ResponsePair(
        parent=response,
        response_id=response.record_id,
        response_a=a.text,
        response_b=b.text,
        completion_index_a=a.index,
        completion_index_b=b.index,
        finish_reason_a=a.finish_reason,
        finish_reason_b=b.finish_reason,
        sample_index=compute_pair_index(a.index, b.index),
    )


def _find_reason_to_skip(pair: ResponsePair) -> tuple[Outcome, str] | None:
    """Return the outcome and the reason if nobody needs the label of a pair."""
    if pair.parent.purpose is Purpose.RL and pair.parent.split is Split.TRAIN:
        return Outcome.NOT_NEEDED, "its prompt is for RL (prompts.rl_fraction)"
    return None


def _make_pairs(record: Record, pairs: str) -> list[ResponsePair]:
    """Return the pairs of a record.

    `pairs` states which completions of a response are compared (`engine.pairing`). A finished chain has one pair, which consists
    of the final and the initial response.
    """
    if isinstance(record, Response):
        completions = record.completions
        positions = list_pairs(pairs, len(completions))
        return [_make_completion_pair(record, completions[a], completions[b]) for a, b in positions]
    assert isinstance(record, Chain)
    if not record.final or record.end_reason in (EndReason.UNUSABLE, EndReason.NO_CRITIQUE, EndReason.SKIPPED):
        return []
    if record.final_response is None or record.final_response == record.initial_response:
        return []
    return [
        ResponsePair(
            parent=record,
            response_id=record.response_id,
            response_a=record.final_response,
            response_b=record.initial_response,
            completion_index_a=None,
            completion_index_b=0,
            finish_reason_a=record.final_finish_reason,
            finish_reason_b=record.initial_finish_reason,
            sample_index=0,
        )
    ]


@dataclass(frozen=True)
class JudgeQuestion:
    """A question about a pair: the id of its principle (or "all"), the judge prompt, and the weight of the vote."""

    principle_id: str
    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class PrincipleComparison:
    """The result of one question."""

    question: JudgeQuestion
    comparison: Comparison
    outcome: Outcome

    def to_vote(self) -> PrincipleVote:
        return PrincipleVote(
            principle_id=self.question.principle_id,
            p_forward=self.comparison.p_forward,
            p_backward=self.comparison.p_backward,
            option_mass_forward=self.comparison.option_mass_forward,
            option_mass_backward=self.comparison.option_mass_backward,
            weight=self.question.weight,
            outcome=self.outcome,
            explanation=self.comparison.explanation_forward,
            explanation_backward=self.comparison.explanation_backward,
            reasoning=self.comparison.reasoning_forward,
            reasoning_backward=self.comparison.reasoning_backward,
        )


@dataclass(frozen=True)
class JudgeStage:
    """The judge stage.

    `pairing` is the value of that column in records, and `pairs` states which completions of a response are compared. The label
    is limited to the range from `clamp` to 1 - `clamp`. If `label_order` is "both", the label is the mean of both orders. If it
    is "seeded", the label is from one order, and the pair's seed selects this order. `max_tokens` and `timeout_s` (in seconds)
    limit a written reply. While `skips_rl_prompts` returns true, pairs of prompts with the purpose RL are not judged.
    """

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
    max_thinking_tokens: int = 0
    pairs: str = "neighbors"
    skips_rl_prompts: Callable[[], bool] = lambda: False

    def __call__(self, records: Sequence[Record]) -> list[Result[list[Preference]]]:
        pairs_by_record = [[] if skips_suite("judge", record) else _make_pairs(record, self.pairs) for record in records]
        pairs = [pair for record_pairs in pairs_by_record for pair in record_pairs]
        if not pairs:
            return [[] for _ in records]
        started = time.monotonic()
        skips_rl_prompts = self.skips_rl_prompts()
        problems = [pair.problem or (_find_reason_to_skip(pair) if skips_rl_prompts else None) for pair in pairs]
        comparable = [pair for pair, problem in zip(pairs, problems, strict=True) if problem is None]
        comparisons = iter(self.compare_pairs(comparable) if comparable else [])
        latency_ms = 1000 * (time.monotonic() - started) / max(1, len(comparable))
        preferences = iter(
            [
                self.make_judged_preference(pair, next(comparisons), latency_ms)
                if problem is None
                else self.make_unjudged_preference(pair, *problem)
                for pair, problem in zip(pairs, problems, strict=True)
            ]
        )
        return [combine_results([next(preferences) for _ in record_pairs]) for record_pairs in pairs_by_record]

    # Questions

    @property
    def mode(self) -> AnswerMode:
        return AnswerMode(self.answer_mode, self.min_option_mass, self.max_tokens, self.timeout_s, self.max_thinking_tokens)

    @property
    def asks_all_principles(self) -> bool:
        """True if one question contains all principles."""
        return self.principles == _ALL_PRINCIPLES or (
            self.principles == "constitution" and self.constitution.judge_with == _ALL_PRINCIPLES
        )

    def make_questions(self, pair: ResponsePair) -> list[JudgeQuestion]:
        """Return the questions for a pair.

        These are one question with all principles, one question with a principle that is sampled by weight, or one question for
        each of k different principles. The k principles are sampled uniformly, because the mean of
        their votes already applies the weights.
        Sampling by weight with an unweighted mean has the same expected label.
        """
        if self.asks_all_principles:
            return [JudgeQuestion(_ALL_PRINCIPLES, self.constitution.combined_judge_prompt)]
        principles = self.constitution.sample_judge_principles(pair.seed, pair.parent.tags, self.num_principles)
        return [JudgeQuestion(p.id, p.judge_prompt, p.weight if self.num_principles > 1 else 1.0) for p in principles]

    def compare_pairs(self, pairs: Sequence[ResponsePair]) -> list[Result[list[PrincipleComparison]]]:
        """Ask the questions about all pairs in one batch. Return the comparisons of each pair, one for each question.

        If a request about a pair fails, the pair has an error instead.
        """
        questions_by_pair, mode = [self.make_questions(pair) for pair in pairs], self.mode
        question_pairs = [
            (
                self.ask_about(pair, pair.response_a, pair.response_b, question),
                self.ask_about(pair, pair.response_b, pair.response_a, question),
            )
            for pair, questions in zip(pairs, questions_by_pair, strict=True)
            for question in questions
        ]
        results = iter(compare_in_both_orders(self.model, question_pairs, mode))
        return [
            combine_results([self.make_principle_comparison(question, next(results)) for question in questions])
            for questions in questions_by_pair
        ]

    def ask_about(self, pair: ResponsePair, first: str, second: str, question: JudgeQuestion) -> Question:
        """Return the question which of the two responses is better, with the first response as option A."""
        messages = templates.make_comparison_messages(pair.parent.messages, first, second, question.text, self.mode.template)
        return Question(messages, group=f"judge {pair.parent.record_id}")

    def make_principle_comparison(self, question: JudgeQuestion, result: Result[Comparison]) -> Result[PrincipleComparison]:
        if isinstance(result, CharterError):
            return result
        return PrincipleComparison(question, result, self.decide_outcome(result))

    def decide_outcome(self, comparison: Comparison) -> Outcome:
        if comparison.outcome is Outcome.OK and self.reject_position_flips and comparison.position_flip:
            return Outcome.POSITION_FLIP
        return comparison.outcome

    # Preferences

    def compute_label(self, order: str, comparison: Comparison) -> float | None:
        """Return the clamped soft label: the probability that A is better. Return None if this probability is unknown."""
        p = {"both": comparison.p_mean, "forward": comparison.p_forward, "backward": comparison.p_backward}[order]
        return None if p is None else min(max(p, self.clamp), 1 - self.clamp)

    def make_judged_preference(
        self, pair: ResponsePair, result: Result[list[PrincipleComparison]], latency_ms: float
    ) -> Result[Preference]:
        return result if isinstance(result, CharterError) else self.make_preference(pair, result, latency_ms)

    def make_preference(self, pair: ResponsePair, comparisons: Sequence[PrincipleComparison], latency_ms: float) -> Preference:
        total = _aggregate_comparisons(comparisons)
        label_order = _LABEL_ORDERS[pair.seed % 2] if self.label_order == "seeded" else "both"
        outcome = self.decide_outcome(total)
        has_label = outcome in (Outcome.OK, Outcome.POSITION_FLIP)
        sampling = None
        if self.answer_mode != "logprobs":
            sampling = Sampling(
                temperature=get_temperature(self.model.capabilities),
                top_p=1.0,
                max_tokens=self.max_tokens,
                max_thinking_tokens=self.max_thinking_tokens,
            )
        return Preference(
            **self.make_pair_fields(pair),
            principle_id=comparisons[0].question.principle_id if len(comparisons) == 1 else None,
            model=ModelRef(id=self.model.id, revision=self.model.revision),
            template_hash=self.mode.get_template_hash(self.model.capabilities),
            sampling=sampling,
            prompt_tokens=total.usage.prompt_tokens,
            completion_tokens=total.usage.completion_tokens,
            cached_tokens=total.usage.cached_tokens,
            latency_ms=latency_ms,
            p_a=self.compute_label(label_order, total) if has_label else None,
            p_forward=total.p_forward,
            p_backward=total.p_backward,
            position_gap=total.position_gap,
            option_mass=total.option_mass,
            position_flip=total.position_flip,
            votes=[comparison.to_vote() for comparison in comparisons],
            explanation=total.explanation_forward,
            outcome=outcome,
            label_order=label_order,
        )

    def make_unjudged_preference(self, pair: ResponsePair, outcome: Outcome, reason: str) -> Preference:
        """Return the record of a pair that cannot be compared. It has no label, no model and no principle."""
        report_unjudged_pair(outcome, reason)
        fields = self.make_pair_fields(pair)
        if outcome is Outcome.NOT_NEEDED:  # another id, so that the pair can still get a label
            fingerprint = ids.compute_fingerprint("not_needed")
            fields["record_id"] = ids.compute_record_id("judge", [pair.parent.record_id], fingerprint, pair.sample_index)
        return Preference(**fields, outcome=outcome, outcome_reason=reason)

    def make_pair_fields(self, pair: ResponsePair) -> dict[str, Any]:
        """Return the fields that do not depend on the judge's replies."""
        constitution = make_constitution_ref(self.constitution)
        return make_pair_fields(pair, self.pairing, constitution) | {
            "record_id": self.compute_record_id(pair),
            "preset": self.preset,
        }

    def compute_token_limits(self) -> int | list[int]:
        """Return the token limits for the fingerprint. Without thinking it is one number, so that ids do not change."""
        return [self.max_tokens, self.max_thinking_tokens] if self.max_thinking_tokens else self.max_tokens

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
            max_tokens=self.compute_token_limits() if self.answer_mode != "logprobs" else None,
        )
        return ids.compute_record_id("judge", [pair.parent.record_id], configuration, pair.sample_index)


def _aggregate_comparisons(comparisons: Sequence[PrincipleComparison]) -> Comparison:
    """Combine the votes into one comparison. Its values are the weighted means of the votes with the outcome OK.

    If these votes have less than half of the total weight, the result has the outcome with the largest weight among all
    outcomes except OK. Its values are then the weighted means of the votes with this outcome. These values are
    recorded, but they are not a label.
    """
    weights: dict[Outcome, float] = defaultdict(float)
    for vote in comparisons:
        weights[vote.outcome] += vote.question.weight
    if 2 * weights[Outcome.OK] >= math.fsum(weights.values()):
        outcome = Outcome.OK
    else:
        outcome = max((o for o in weights if o is not Outcome.OK), key=weights.__getitem__)
    counted = [vote for vote in comparisons if vote.outcome is outcome] or comparisons
    vote_weights = [vote.question.weight for vote in counted]
    first = comparisons[0].comparison
    return Comparison(
        p_forward=_compute_weighted_mean([vote.comparison.p_forward for vote in counted], vote_weights),
        p_backward=_compute_weighted_mean([vote.comparison.p_backward for vote in counted], vote_weights),
        option_mass_forward=min(vote.comparison.option_mass_forward for vote in counted),
        option_mass_backward=min(vote.comparison.option_mass_backward for vote in counted),
        usage=sum((vote.comparison.usage for vote in comparisons), NO_USAGE),
        outcome=outcome,
        explanation_forward=first.explanation_forward if len(comparisons) == 1 else "",
        explanation_backward=first.explanation_backward if len(comparisons) == 1 else "",
    )


def _compute_weighted_mean(values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """Return the weighted mean, or None if any value is unknown."""
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return None
    return math.fsum(weight * number for weight, number in zip(weights, numbers, strict=True)) / math.fsum(weights)


def make_pair_fields(pair: ResponsePair, pairing: str, constitution: ConstitutionRef | None) -> dict[str, Any]:
    """Return the fields of a Preference that come from its pair."""
    parent = pair.parent
    return {
        "parent_ids": [parent.record_id],
        "prompt_id": parent.prompt_id,
        "run_id": parent.run_id,
        "stage": "judge",
        "constitution": constitution,
        "policy_version": parent.policy_version,
        "seed": pair.seed,
        "response_id": pair.response_id,
        "messages": parent.messages,
        "source": parent.source,
        "tags": parent.tags,
        "split": parent.split,
        "epoch": parent.epoch,
        "purpose": parent.purpose,
        "pairing": pairing,
        "response_a": pair.response_a,
        "response_b": pair.response_b,
        "completion_index_a": pair.completion_index_a,
        "completion_index_b": pair.completion_index_b,
        "finish_reason_a": pair.finish_reason_a,
        "finish_reason_b": pair.finish_reason_b,
    }


def report_unjudged_pair(outcome: Outcome, reason: str) -> None:
    NOTICES.report("pair", outcome.value, f"a pair is not judged and gets no label: {reason} (outcome {outcome.value})")


def make_constitution_ref(constitution: Constitution) -> ConstitutionRef:
    """Return the name, version and hash of a constitution, as they are stored in records."""
    return ConstitutionRef(name=constitution.name, version=constitution.version, hash=constitution.hash)
