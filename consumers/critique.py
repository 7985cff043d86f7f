"""Critique: responses and revisions -> critiques. Is the newest text in order, and if not, what is wrong with it?

For a first answer a principle is drawn (seeded from the chain), and the critic says by next-token probabilities whether the
text breaks it. Clean: the chain ends here. Else the critique in words goes on to `revise`.

For a revision the earlier principles are asked again, and the next one while rounds are left, and the revision is compared
with its predecessor in both orders:

* it loses (p <= lose): the predecessor is the final text (LOST);
* all verdicts are clean and it wins (p >= win) or hardly differs: it is the final text (SATISFIED);
* no rounds are left: it is the final text (LAST_ROUND);
* else the critique under the next principle.

That is `early_stop = "verdict"`. With "phrases" no verdict is asked, and a critique that says it finds nothing ends the chain
(SATISFIED); with "none" every chain goes through all rounds (Bai et al. 2022, section 3.1). Verdicts ask with the options in
both orders, because small models favour a slot.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from constitutions.loader import Constitution, CritiquePrinciple
from consumers import templates
from consumers.chain import compute_similarity, get_carried_fields, make_initial_chain_fields
from consumers.compare import AnswerMode, Comparison, compare_in_both_orders
from consumers.judge import make_constitution_ref
from engine.models.interface import NO_USAGE, Generation, GenerationRequest, Model, Usage
from schemas import ids
from schemas.records import (
    ChatMessage,
    Critique,
    EndReason,
    FinishReason,
    ModelRef,
    Outcome,
    PrincipleVerdict,
    Record,
    Response,
    Revision,
    Sampling,
    Verdict,
)

_QuestionPair = tuple[tuple[ChatMessage, ...], tuple[ChatMessage, ...]]

# What a critique says that finds nothing (the course's two phrases, and others for the same), and what takes it back.
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
    """Whether a critique says, without taking it back, that the answer has no problem."""
    return bool(_NO_PROBLEM_PATTERN.search(critique)) and not _RETRACTION_PATTERN.search(critique.replace("\u2019", "'"))


@dataclass(frozen=True)
class ChainState:
    """A text that waits for its critique: the chain so far, the principles already used, and the one of the next round."""

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

    @property
    def checked_principles(self) -> list[CritiquePrinciple]:
        return [*self.used_principles, *([self.next_principle] if self.next_principle else [])]


@dataclass(frozen=True)
class CritiqueStage:
    """The critique stage."""

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

    def __call__(self, records: Sequence[Record]) -> list[list[Critique]]:
        # An unusable revision has ended its chain; what it says is neither criticised nor trained on.
        links = [self.make_state(record) for record in records if not _has_ended(record)]
        if not links:
            return [[] for _ in records]
        started = time.monotonic()
        if self.early_stop == "verdict":
            links = self.assess_states(links)
        links = [replace(link, end_reason=self.decide_end_reason(link)) for link in links]
        criticised = iter(self.write_critiques([link for link in links if link.end_reason is EndReason.NONE]))
        links = [next(criticised) if link.end_reason is EndReason.NONE else link for link in links]
        latency = 1000 * (time.monotonic() - started) / len(links)
        made = iter([self.make_record(link, latency) for link in links])
        return [[] if _has_ended(record) else [next(made)] for record in records]

    # Where each chain stands

    def make_state(self, record: Record) -> ChainState:
        """The chain up to this record, with the principles it used and the one of the round to come."""
        assert isinstance(record, Response | Revision)
        fields = make_initial_chain_fields(record) if isinstance(record, Response) else get_carried_fields(record)
        by_id = {principle.id: principle for principle in self.constitution.critique}
        used = tuple(by_id[done.principle_id] for done in fields.get("rounds", []) if done.principle_id in by_id)
        upcoming = None
        if fields["round"] < self.rounds:
            seed = ids.compute_stage_seed("principle", fields["response_id"], fields["round"])
            upcoming = self.constitution.select_critique_principle(
                seed, fields["round"], fields["tags"], self.selection_override
            )
        return ChainState(record, fields, used, upcoming)

    @property
    def selection_override(self) -> str:
        return "" if self.selection == "constitution" else self.selection

    def compute_seed(self, state: ChainState) -> int:
        return ids.compute_stage_seed("critique", state.fields["response_id"], state.fields["round"])

    def is_skipped(self, state: ChainState) -> bool:
        return state.fields["source"] in self.skip_sources

    # What the critic's probabilities say

    def assess_states(self, states: Sequence[ChainState]) -> list[ChainState]:
        """Ask every verdict and every comparison of a batch in one go."""
        asked = [self.make_questions(link) for link in states]
        form = AnswerMode(min_option_mass=self.min_option_mass)
        answers = iter(compare_in_both_orders(self.model, [wordings for of_one in asked for wordings in of_one], form))
        return [
            self.apply_comparisons(link, [next(answers) for _ in of_one]) for link, of_one in zip(states, asked, strict=True)
        ]

    def make_questions(self, state: ChainState) -> list[_QuestionPair]:
        """One verdict for each principle, and for a revision the comparison with its predecessor first."""
        fields = state.fields
        if self.is_skipped(state) or not fields["response"].strip() or _is_withheld(state.parent):
            return []
        messages, text = fields["messages"], fields["response"]
        verdicts = [
            (
                templates.make_verdict_messages(messages, text, principle.critique_prompt, "Yes", "No"),
                templates.make_verdict_messages(messages, text, principle.critique_prompt, "No", "Yes"),
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
                templates.make_comparison_messages(messages, text, previous, question),
                templates.make_comparison_messages(messages, previous, text, question),
            ),
            *verdicts,
        ]

    def apply_comparisons(self, state: ChainState, comparisons: list[Comparison]) -> ChainState:
        """The verdict over all principles asked (the worst one counts), and the comparison with the predecessor."""
        if not comparisons:
            return state
        state = replace(state, usage=sum((answer.usage for answer in comparisons), NO_USAGE))
        if isinstance(state.parent, Revision):
            better, *comparisons = comparisons
            alike = compute_similarity(state.fields["response"], state.fields["previous_response"] or "")
            state = replace(state, p_better=better.p_mean if better.outcome is Outcome.OK else None, similarity=alike)
        if not comparisons:
            return state
        asked = [_make_verdict(p.id, answer) for p, answer in zip(state.checked_principles, comparisons, strict=True)]
        said = [verdict.verdict for verdict in asked]
        worst = next((v for v in (Verdict.LOW_MASS, Verdict.FLAWED) if v in said), Verdict.CLEAN)
        flawed = [verdict.p_flawed for verdict in asked if verdict.p_flawed is not None]
        return replace(
            state,
            verdict=worst,
            verdicts=tuple(asked),
            p_flawed=max(flawed, default=None),
            option_mass=min(answer.option_mass for answer in comparisons),
        )

    def decide_end_reason(self, state: ChainState) -> EndReason:
        """Whether the chain is over, and why."""
        if self.is_skipped(state):
            return EndReason.SKIPPED
        if not state.fields["response"].strip() or _is_withheld(state.parent):
            return EndReason.UNUSABLE
        clean = state.verdict is Verdict.CLEAN
        if isinstance(state.parent, Response):
            return EndReason.SATISFIED if clean else EndReason.NONE
        if state.p_better is not None and state.p_better <= self.reject_threshold:
            return EndReason.LOST
        wins = state.p_better is not None and state.p_better >= self.accept_threshold
        if clean and (wins or (state.similarity or 0.0) > self.similarity_threshold):
            return EndReason.SATISFIED
        return EndReason.NONE if state.next_principle else EndReason.LAST_ROUND

    # The critique in words

    def write_critiques(self, states: Sequence[ChainState]) -> list[ChainState]:
        """The links with the critique under their upcoming principle; one that finds nothing may end its chain."""
        examples = self.constitution.examples if self.few_shot else ()
        asks = [
            GenerationRequest(
                templates.make_critique_messages(
                    link.fields["messages"], link.fields["response"], principle.critique_prompt, examples
                ),
                seed=self.compute_seed(link),
            )
            for link in states
            if (principle := link.next_principle)
        ]
        if not asks:
            return []
        answers = self.model.generate(
            asks,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            max_tokens=self.sampling.max_tokens,
        )
        return [
            replace(
                link,
                critique=answer.text.strip(),
                usage=link.usage + answer.usage,
                end_reason=EndReason.SATISFIED if self.is_satisfied(answer) else EndReason.NONE,
            )
            for link, (answer,) in zip(states, answers, strict=True)
        ]

    def is_satisfied(self, generation: Generation) -> bool:
        """Whether a critique ends its chain by what it says."""
        return self.early_stop == "phrases" and generation.finish_reason != "refused" and _finds_no_problem(generation.text)

    def compute_record_id(self, state: ChainState) -> str:
        configuration = ids.compute_fingerprint(
            "critique",
            model=[self.model.id, self.model.revision],
            template=templates.TEMPLATE_HASHES["critique"],
            verdict=templates.get_template_hash("verdict", self.model.capabilities),
            constitution=self.constitution.hash,
            sampling=self.sampling.model_dump(),
            rounds=self.rounds,
            selection=self.selection_override or self.constitution.selection,
            early_stop=self.early_stop,
            few_shot=self.few_shot,
            thresholds=[self.min_option_mass, self.accept_threshold, self.reject_threshold, self.similarity_threshold],
            skip_sources=sorted(self.skip_sources),
        )
        return ids.compute_record_id("critique", [state.parent.record_id], configuration)

    def make_record(self, state: ChainState, latency_ms: float) -> Critique:
        fields, over, usage = state.fields, state.end_reason is not EndReason.NONE, state.usage
        before = state.end_reason is EndReason.LOST
        final = ("previous_response", "previous_finish_reason") if before else ("response", "finish_reason")
        principle = state.next_principle or (state.used_principles[-1] if state.used_principles else None)
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
            final=over,
            end_reason=state.end_reason,
            final_response=fields[final[0]] if over else None,
            final_finish_reason=fields[final[1]] if over else FinishReason.UNKNOWN,
            **fields,
        )


def _is_withheld(record: Response | Revision) -> bool:
    """Whether a server's filter kept the answer that a chain starts from, or the rest of it, back."""
    return isinstance(record, Response) and record.completions[0].finish_reason is FinishReason.REFUSED


def _has_ended(record: Record) -> bool:
    return isinstance(record, Revision) and record.final


def _make_verdict(principle_id: str, comparison: Comparison) -> PrincipleVerdict:
    """What the critic says under one principle; what could not be read is LOW_MASS and never CLEAN."""
    readable = comparison.outcome is Outcome.OK
    verdict = Verdict.LOW_MASS if not readable else Verdict.FLAWED if comparison.p_mean > 0.5 else Verdict.CLEAN
    p_flawed = None if math.isnan(comparison.p_mean) else comparison.p_mean
    return PrincipleVerdict(principle_id=principle_id, verdict=verdict, p_flawed=p_flawed, option_mass=comparison.option_mass)
