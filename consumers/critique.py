"""The critique stage: responses and revisions -> critiques.

The stage decides whether a chain has ended. If the chain continues, the stage criticizes the newest response.

For an initial response, one principle is sampled with a seed that depends on the chain. The probability that the response
violates the principle is computed from the critic's next-token log-probabilities. If the verdict is CLEAN, the chain ends.
If not, the critic writes a critique for `revise`.

For a revision, the critic gives a new verdict under each principle of the earlier rounds. If rounds remain, the critic also
gives a verdict under the next principle. The critic compares the revision with the previous response in both orders. The rules
are checked in this order, and the first rule that applies decides:

* If the revision loses (p <= reject_threshold), the previous response is the final response (LOST).
* If all verdicts are CLEAN and the revision wins (p >= accept_threshold) or is very similar to the previous response, the
  revision is the final response (SATISFIED).
* If no rounds remain, the revision is the final response (LAST_ROUND).
* In all other cases, the critic writes a critique under the next principle.

A critique that is empty, that a filter withheld, or that repeats its prompt is not revised: the chain ends (NO_CRITIQUE).

These rules apply if `early_stop` is "verdict". With "phrases", the critic gives no verdicts. The chain ends (SATISFIED) if a
critique states that the response has no problem. With "none" every chain has all rounds (Bai et al. 2022, section 3.1). Each
verdict question is asked with its two options in both orders, because small models prefer one position.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from constitutions.loader import Constitution, CritiquePrinciple, FewShotExample
from consumers import templates
from consumers.chain import compute_similarity, get_carried_fields, make_initial_chain_fields, read_finish_reason, skips_suite
from consumers.compare import AnswerMode, Comparison, Question, compare_in_both_orders
from consumers.judge import make_constitution_ref
from consumers.leaks import CheckedText, check_critique, report_leaks
from engine.eligibility import find_rejection_reason
from engine.errors import CharterError
from engine.models.interface import NO_USAGE, Generation, GenerationRequest, Model, Result, Usage, combine_results
from engine.notices import NOTICES
from schemas import ids
from schemas.records import (
    Critique,
    EndReason,
    FinishReason,
    ModelRef,
    Outcome,
    PrincipleVerdict,
    Record,
    RejectionReason,
    Response,
    Revision,
    Sampling,
    Verdict,
)

_QuestionPair = tuple[Question, Question]

# The first pattern matches statements that there is no problem: the course's two phrases and variants of them. The second
# pattern matches words that qualify or retract such a statement.
_NO_PROBLEM_PATTERN = re.compile(
    r"\bno (?:\w+ )?(?:issues?|problems?|concerns?)\b"
    r"|\b(?:response|answer) (?:is|seems|appears) (?:\w+ )?(?:appropriate|acceptable|fine|harmless)\b"
    r"|\bnothing (?:is )?(?:wrong|problematic|harmful|to (?:criticis|criticiz|improv|chang)e)\b",
    re.IGNORECASE,
)
_RETRACTION_PATTERN = re.compile(
    r"\b(?:but|however|although|though|except|yet|still|not sure|not say|not think|not that)\b|n't (?:say|think|believe)\b",
    re.IGNORECASE,
)


def _finds_no_problem(critique: str) -> bool:
    """Return whether a critique states, without qualification, that the response has no problem."""
    return bool(_NO_PROBLEM_PATTERN.search(critique)) and not _RETRACTION_PATTERN.search(critique.replace("\u2019", "'"))


@dataclass(frozen=True)
class ChainState:
    """The state of a revision chain at its newest response.

    `used_principles` are the principles of the finished rounds. `next_principle` is the principle of the next round. `usage` is
    the number of tokens of all questions about this response. `p_flawed` is the highest probability of all verdicts.
    """

    parent: Response | Revision
    fields: dict[str, Any]
    used_principles: tuple[CritiquePrinciple, ...]
    next_principle: CritiquePrinciple | None
    verdict: Verdict = Verdict.NOT_ASKED
    p_flawed: float | None = None
    option_mass: float | None = None
    p_better: float | None = None
    verdicts: tuple[PrincipleVerdict, ...] = ()
    similarity: float | None = None
    end_reason: EndReason = EndReason.NONE
    usage: Usage = NO_USAGE
    critique: str = ""
    critique_problem: RejectionReason = RejectionReason.NONE
    reasoning: str = ""
    leaks: tuple[str, ...] = ()

    @property
    def group(self) -> str:
        """The group of all requests about this response."""
        return f"critique {self.parent.record_id}"

    @property
    def checked_principles(self) -> list[CritiquePrinciple]:
        """The principles under which the response is checked. A principle that was drawn in several rounds is checked once."""
        principles = [*self.used_principles, *([self.next_principle] if self.next_principle else [])]
        return list({principle.id: principle for principle in principles}.values())

    @property
    def rejection_reason(self) -> RejectionReason:
        """The reason why the response is unusable, or why its critique is unusable."""
        if self.critique_problem is not RejectionReason.NONE:
            return self.critique_problem
        return find_rejection_reason(self.fields["response"], self.fields["finish_reason"])

    @property
    def principle(self) -> CritiquePrinciple | None:
        """The principle of the written critique, or, if the chain has ended without one, that of the response."""
        ends_without_critique = self.end_reason not in (EndReason.NONE, EndReason.NO_CRITIQUE) and not self.critique
        if self.used_principles and (ends_without_critique or self.next_principle is None):
            return self.used_principles[-1]
        return self.next_principle


@dataclass(frozen=True)
class CritiqueStage:
    """The critique stage. `rounds` is the maximum number of revisions. The two thresholds are probabilities.

    If `revises_suites` is true, it also criticizes responses to prompts of evaluation suites.
    """

    model: Model
    constitution: Constitution
    sampling: Sampling
    rounds: int
    early_stop: str
    few_shot: bool
    min_option_mass: float
    accept_threshold: float
    reject_threshold: float
    similarity_threshold: float
    skip_sources: tuple[str, ...]
    preset: str = "charter"
    selection: str = "constitution"
    revises_suites: bool = False

    def __call__(self, records: Sequence[Record]) -> list[Result[list[Critique]]]:
        is_skipped = [_has_ended(r) or (not self.revises_suites and skips_suite("critique", r)) for r in records]
        states = [self.make_state(record) for record, skipped in zip(records, is_skipped, strict=True) if not skipped]
        if not states:
            return [[] for _ in records]
        started = time.monotonic()
        assessed = self.assess_states(states) if self.early_stop == "verdict" else list(states)
        decided = [self.decide_state(result) for result in assessed]
        criticized = iter(self.write_critiques([result for result in decided if _continues(result)]))
        results = [next(criticized) if _continues(result) else result for result in decided]
        latency_ms = 1000 * (time.monotonic() - started) / len(states)
        critiques = iter(
            [result if isinstance(result, CharterError) else [self.make_record(result, latency_ms)] for result in results]
        )
        return [[] if skipped else next(critiques) for skipped in is_skipped]

    # Chain states

    def make_state(self, record: Record) -> ChainState:
        """Return the state of the record's chain, with its used principles and the principle of the next round."""
        assert isinstance(record, Response | Revision)
        fields = make_initial_chain_fields(record) if isinstance(record, Response) else get_carried_fields(record)
        by_id = {principle.id: principle for principle in self.constitution.critique}
        used_principles = tuple(by_id[r.principle_id] for r in fields.get("rounds", []) if r.principle_id in by_id)
        next_principle = None
        if fields["round"] < self.rounds:
            seed = ids.compute_stage_seed("principle", fields["response_id"], fields["round"])
            next_principle = self.constitution.select_critique_principle(
                seed, fields["round"], fields["tags"], self.selection_override
            )
        return ChainState(record, fields, used_principles, next_principle)

    @property
    def selection_override(self) -> str:
        return "" if self.selection == "constitution" else self.selection

    def compute_seed(self, state: ChainState) -> int:
        return ids.compute_stage_seed("critique", state.fields["response_id"], state.fields["round"])

    def is_skipped(self, state: ChainState) -> bool:
        return state.fields["source"] in self.skip_sources

    # Verdicts

    def assess_states(self, states: Sequence[ChainState]) -> list[Result[ChainState]]:
        """Ask the questions about all states in one batch. Return the states with their verdicts and comparisons.

        If a request about a state fails, the state has an error instead.
        """
        questions = [self.make_questions(state) for state in states]
        answer_mode = AnswerMode(min_option_mass=self.min_option_mass)
        flat = [pair for question_pairs in questions for pair in question_pairs]
        comparisons = iter(compare_in_both_orders(self.model, flat, answer_mode))
        results = [combine_results([next(comparisons) for _ in question_pairs]) for question_pairs in questions]
        return [
            result if isinstance(result, CharterError) else self.apply_comparisons(state, result)
            for state, result in zip(states, results, strict=True)
        ]

    def make_questions(self, state: ChainState) -> list[_QuestionPair]:
        """Return the verdict question of each principle, in both orders.

        For a revision, the first question is the comparison with the previous response.
        """
        fields = state.fields
        if self.is_skipped(state) or state.rejection_reason is not RejectionReason.NONE:
            return []
        messages, response, group = fields["messages"], fields["response"], state.group
        verdicts = [
            (
                Question(templates.make_verdict_messages(messages, response, principle.critique_prompt, "Yes", "No"), group),
                Question(templates.make_verdict_messages(messages, response, principle.critique_prompt, "No", "Yes"), group),
            )
            for principle in state.checked_principles
        ]
        if not isinstance(state.parent, Revision):
            return verdicts
        question = (
            f"{state.used_principles[-1].revision_prompt} Which answer does this better?"
            if state.used_principles
            else "Which answer is better?"
        )
        previous = fields["previous_response"] or ""
        return [
            (
                Question(templates.make_comparison_messages(messages, response, previous, question), group),
                Question(templates.make_comparison_messages(messages, previous, response, question), group),
            ),
            *verdicts,
        ]

    def apply_comparisons(self, state: ChainState, comparisons: list[Comparison]) -> ChainState:
        """Return the state with its verdicts and with the comparison to the previous response.

        The verdict of the state is the worst of its verdicts.
        """
        if not comparisons:
            return state
        state = replace(state, usage=sum((comparison.usage for comparison in comparisons), NO_USAGE))
        if isinstance(state.parent, Revision):
            improvement, *comparisons = comparisons
            similarity = compute_similarity(state.fields["response"], state.fields["previous_response"] or "")
            p_better = improvement.p_mean if improvement.outcome is Outcome.OK else None
            state = replace(state, p_better=p_better, similarity=similarity)
        if not comparisons:
            return state
        verdicts = [
            _make_verdict(principle.id, comparison)
            for principle, comparison in zip(state.checked_principles, comparisons, strict=True)
        ]
        labels = [verdict.verdict for verdict in verdicts]
        return replace(
            state,
            verdict=next((label for label in (Verdict.LOW_MASS, Verdict.FLAWED) if label in labels), Verdict.CLEAN),
            verdicts=tuple(verdicts),
            p_flawed=max((verdict.p_flawed for verdict in verdicts if verdict.p_flawed is not None), default=None),
            option_mass=min(comparison.option_mass for comparison in comparisons),
        )

    def decide_end_reason(self, state: ChainState) -> EndReason:
        """Return the reason why the chain ends with this response, or NONE if the chain continues."""
        if state.rejection_reason is not RejectionReason.NONE:
            return EndReason.UNUSABLE
        if self.is_skipped(state):
            return EndReason.SKIPPED
        clean = state.verdict is Verdict.CLEAN
        if isinstance(state.parent, Response):
            return EndReason.SATISFIED if clean else EndReason.NONE
        if state.p_better is not None and state.p_better <= self.reject_threshold:
            return EndReason.LOST
        wins = state.p_better is not None and state.p_better >= self.accept_threshold
        if clean and (wins or (state.similarity or 0.0) > self.similarity_threshold):
            return EndReason.SATISFIED
        return EndReason.NONE if state.next_principle else EndReason.LAST_ROUND

    def decide_state(self, result: Result[ChainState]) -> Result[ChainState]:
        return result if isinstance(result, CharterError) else replace(result, end_reason=self.decide_end_reason(result))

    # Critiques

    def write_critiques(self, states: Sequence[ChainState]) -> list[Result[ChainState]]:
        """Write a critique under the next principle of each state. Return the states with their critiques, or errors."""
        requests = [
            GenerationRequest(
                templates.make_critique_messages(
                    state.fields["messages"], state.fields["response"], principle.critique_prompt, self.examples
                ),
                seed=self.compute_seed(state),
                group=state.group,
            )
            for state in states
            if (principle := state.next_principle)
        ]
        if not requests:
            return []
        results = self.model.generate(
            requests,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            max_tokens=self.sampling.max_tokens,
            max_thinking_tokens=self.sampling.max_thinking_tokens,
        )
        return [
            result if isinstance(result, CharterError) else self.add_critique(state, result[0])
            for state, result in zip(states, results, strict=True)
        ]

    @property
    def examples(self) -> Sequence[FewShotExample]:
        return self.constitution.examples if self.few_shot else ()

    def add_critique(self, state: ChainState, generation: Generation) -> ChainState:
        """Return the state with its critique. If the critique is unusable, the chain ends."""
        checked = self.check_critique(state, generation)
        report_leaks("critique", self.model.id, checked)
        end_reason = EndReason.SATISFIED if self.is_satisfied(generation) else EndReason.NONE
        if checked.rejection_reason is not RejectionReason.NONE:
            end_reason = EndReason.NO_CRITIQUE
            NOTICES.report(
                "critique",
                checked.rejection_reason.value,
                f"a critique by {self.model.id} is unusable ({checked.rejection_reason.value}): the response is not revised and "
                "not trained (end reason NO_CRITIQUE)",
            )
        return replace(
            state,
            critique=checked.text,
            critique_problem=checked.rejection_reason,
            reasoning=generation.reasoning,
            leaks=checked.leaks,
            usage=state.usage + generation.usage,
            end_reason=end_reason,
        )

    def check_critique(self, state: ChainState, generation: Generation) -> CheckedText:
        """Return the critique without copied formatting, and the reason why it is unusable, or NONE if it is usable."""
        assert state.next_principle is not None
        checked = check_critique(
            generation.text,
            state.fields["messages"],
            state.fields["response"],
            state.next_principle.critique_prompt,
            self.examples,
        )
        reason = find_rejection_reason(checked.text, read_finish_reason(generation))
        return checked if reason is RejectionReason.NONE else replace(checked, rejection_reason=reason)

    def is_satisfied(self, generation: Generation) -> bool:
        """Return whether a written critique ends the chain, because it states that there is no problem."""
        return self.early_stop == "phrases" and generation.finish_reason != "refused" and _finds_no_problem(generation.text)

    def compute_record_id(self, state: ChainState) -> str:
        configuration = ids.compute_fingerprint(
            "critique",
            model=[self.model.id, self.model.revision],
            template=templates.TEMPLATE_HASHES["critique"],
            verdict=templates.get_template_hash("verdict", self.model.capabilities),
            constitution=self.constitution.hash,
            sampling=self.sampling.to_fingerprint(),
            rounds=self.rounds,
            selection=self.selection_override or self.constitution.selection,
            early_stop=self.early_stop,
            few_shot=self.few_shot,
            thresholds=[self.min_option_mass, self.accept_threshold, self.reject_threshold, self.similarity_threshold],
            skip_sources=sorted(self.skip_sources),
        )
        return ids.compute_record_id("critique", [state.parent.record_id], configuration)

    def make_record(self, state: ChainState, latency_ms: float) -> Critique:
        fields, usage = state.fields, state.usage
        final = state.end_reason is not EndReason.NONE
        prefix = "previous_" if state.end_reason is EndReason.LOST else ""  # the final response is not the revision that lost
        principle = state.principle
        return Critique(
            record_id=self.compute_record_id(state),
            parent_ids=[state.parent.record_id],
            stage="critique",
            constitution=make_constitution_ref(self.constitution),
            principle_id=principle.id if principle else None,
            model=ModelRef(id=self.model.id, revision=self.model.revision),
            template_hash=templates.TEMPLATE_HASHES["critique"],
            sampling=self.sampling,
            seed=self.compute_seed(state),
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            latency_ms=latency_ms,
            cached_tokens=usage.cached_tokens,
            preset=self.preset,
            critique=state.critique,
            verdict=state.verdict,
            verdicts=list(state.verdicts),
            p_flawed=state.p_flawed,
            option_mass=state.option_mass,
            p_better=state.p_better,
            similarity=state.similarity,
            rejection_reason=state.rejection_reason,
            reasoning=state.reasoning,
            leaks=list(state.leaks),
            final=final,
            end_reason=state.end_reason,
            final_response=fields[f"{prefix}response"] if final else None,
            final_finish_reason=fields[f"{prefix}finish_reason"] if final else FinishReason.UNKNOWN,
            **fields,
        )


def _continues(result: Result[ChainState]) -> TypeGuard[ChainState]:
    return isinstance(result, ChainState) and result.end_reason is EndReason.NONE


def _has_ended(record: Record) -> bool:
    return isinstance(record, Revision) and record.final


def _make_verdict(principle_id: str, comparison: Comparison) -> PrincipleVerdict:
    """Return the verdict under one principle. If the critic's replies cannot be read, the verdict is LOW_MASS."""
    p_flawed, verdict = comparison.p_mean, Verdict.LOW_MASS
    if comparison.outcome is Outcome.OK and p_flawed is not None:
        verdict = Verdict.FLAWED if p_flawed > 0.5 else Verdict.CLEAN
    return PrincipleVerdict(
        principle_id=principle_id,
        verdict=verdict,
        p_flawed=p_flawed,
        option_mass=comparison.option_mass,
        p_flawed_forward=comparison.p_forward,
        p_flawed_backward=comparison.p_backward,
        option_mass_forward=comparison.option_mass_forward,
        option_mass_backward=comparison.option_mass_backward,
    )
