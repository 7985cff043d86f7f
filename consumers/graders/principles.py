"""Grade responses under the critique principles of the constitution. Each principle gives one grade: a vector of violations.

The score is the probability that the response violates the principle. It is computed from the next-token log-probabilities of
the options "Yes" and "No", as the mean of both orders of the options, because small models prefer one position. All questions
about a response have a common prefix, which a local model computes once. The label is `violates` (above 0.5) or `respects`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from constitutions.loader import Constitution, CritiquePrinciple, filter_by_tags
from consumers import templates
from consumers.compare import AnswerMode, Comparison, Question, compare_in_both_orders
from consumers.graders.interface import GradedText, GradeResult
from engine.eligibility import find_rejection_reason
from engine.errors import CharterError
from engine.models.interface import Model, Result, combine_results
from schemas import ids
from schemas.records import ModelRef, Outcome, RejectionReason

VIOLATES, RESPECTS = "violates", "respects"


@dataclass(frozen=True)
class PrinciplesGrader:
    """Asks `judge` about each critique principle that applies to the tags of the prompt.

    If `num_principles` is above 0, it asks only about this number of these principles. They are sampled uniformly for each
    response record, so all completions of a prompt are asked about the same principles.
    """

    judge: Model
    constitution: Constitution
    min_option_mass: float = 0.5
    num_principles: int = 0

    name = "principles"
    version = "1"

    @property
    def model(self) -> ModelRef:
        return ModelRef(id=self.judge.id, revision=self.judge.revision)

    @property
    def template_hash(self) -> str:
        return templates.get_template_hash("verdict", self.judge.capabilities)

    def select_principles(self, text: GradedText) -> Sequence[CritiquePrinciple]:
        """Return the principles that a response is graded under."""
        if not self.num_principles:
            return filter_by_tags(self.constitution.critique, text.tags)
        seed = ids.compute_seed(text.group)
        return self.constitution.sample_critique_principles(seed, text.tags, self.num_principles)

    def grade(self, texts: Sequence[GradedText]) -> list[Result[list[GradeResult]]]:
        """Return one grade for each text and principle. A response without text has the outcome EMPTY under each principle."""
        principles_by_text = [self.select_principles(text) for text in texts]
        asked = [find_rejection_reason(text.text, text.finish_reason) is RejectionReason.NONE for text in texts]
        questions = [
            (_make_question(text, principle, "Yes", "No"), _make_question(text, principle, "No", "Yes"))
            for text, principles, is_asked in zip(texts, principles_by_text, asked, strict=True)
            if is_asked
            for principle in principles
        ]
        mode = AnswerMode(min_option_mass=self.min_option_mass)
        comparisons = iter(compare_in_both_orders(self.judge, questions, mode) if questions else [])
        return [
            combine_results(
                [
                    _make_result(principle.id, next(comparisons)) if is_asked else _make_unasked_result(principle.id, text)
                    for principle in principles
                ]
            )
            for text, principles, is_asked in zip(texts, principles_by_text, asked, strict=True)
        ]


def _make_question(text: GradedText, principle: CritiquePrinciple, option_a: str, option_b: str) -> Question:
    messages = templates.make_verdict_messages(text.messages, text.text, principle.critique_prompt, option_a, option_b)
    return Question(messages, group=f"grade {text.group}")


def _make_result(principle_id: str, comparison: Result[Comparison]) -> Result[GradeResult]:
    if isinstance(comparison, CharterError):
        return comparison
    usage, score = comparison.usage, comparison.p_mean
    if comparison.outcome is not Outcome.OK or score is None:
        reason = "the judge's reply to the question about this principle cannot be read"
        return GradeResult(
            outcome=comparison.outcome,
            outcome_reason=reason,
            details={"option_mass": comparison.option_mass},
            principle_id=principle_id,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
        )
    return GradeResult(
        label=VIOLATES if score > 0.5 else RESPECTS,
        score=score,
        details={
            "option_mass": comparison.option_mass,
            "position_gap": comparison.position_gap or 0.0,
            "p_forward": comparison.p_forward or 0.0,
            "p_backward": comparison.p_backward or 0.0,
        },
        principle_id=principle_id,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
    )


def _make_unasked_result(principle_id: str, text: GradedText) -> GradeResult:
    reason = find_rejection_reason(text.text, text.finish_reason)
    outcome = Outcome.WITHHELD if reason is RejectionReason.REFUSED else Outcome.EMPTY
    return GradeResult(outcome=outcome, outcome_reason="the response has no text to grade", principle_id=principle_id)
