"""The revise stage: critiques -> revisions. The model rewrites the response according to its critique.

A revision is rejected if it is empty, copies the response that it should improve, repeats a part of its prompt, or was withheld
by a server's content filter. The record then has a rejection reason, and its chain ends with UNUSABLE. A rejected revision is
never used for training. Copied formatting, such as quotation marks, is removed (consumers/leaks.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from constitutions.loader import Constitution, FewShotExample
from consumers import templates
from consumers.chain import compute_similarity, get_carried_fields, read_finish_reason, skips_suite
from consumers.judge import make_constitution_ref
from consumers.leaks import CheckedText, check_revision, report_leaks
from engine.eligibility import find_rejection_reason
from engine.errors import CharterError
from engine.models.interface import Generation, GenerationRequest, Model, Result
from schemas import ids
from schemas.records import Critique, EndReason, FinishReason, ModelRef, RejectionReason, Revision, Round, Sampling


@dataclass(frozen=True)
class ReviseStage:
    """The revise stage. If `revises_suites` is true, it also revises responses to prompts of evaluation suites."""

    model: Model
    constitution: Constitution
    sampling: Sampling
    few_shot: bool
    preset: str = "charter"
    revises_suites: bool = False

    def __call__(self, critiques: Sequence[Critique]) -> list[Result[list[Revision]]]:
        is_skipped = [c.final or (not self.revises_suites and skips_suite("revise", c)) for c in critiques]
        pending = [critique for critique, skipped in zip(critiques, is_skipped, strict=True) if not skipped]
        if not pending:
            return [[] for _ in critiques]
        started = time.monotonic()
        results = self.model.generate(
            [self.make_request(critique) for critique in pending],
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            max_tokens=self.sampling.max_tokens,
            max_thinking_tokens=self.sampling.max_thinking_tokens,
        )
        latency_ms = 1000 * (time.monotonic() - started) / len(pending)
        revisions = iter(
            [
                result if isinstance(result, CharterError) else [self.make_record(critique, result[0], latency_ms)]
                for critique, result in zip(pending, results, strict=True)
            ]
        )
        return [[] if skipped else next(revisions) for skipped in is_skipped]

    @property
    def examples(self) -> Sequence[FewShotExample]:
        return self.constitution.examples if self.few_shot else ()

    def get_revision_prompt(self, critique: Critique) -> str:
        principle = next((p for p in self.constitution.critique if p.id == critique.principle_id), None)
        return principle.revision_prompt if principle else "Rewrite the answer so that the problem is gone."

    def make_request(self, critique: Critique) -> GenerationRequest:
        messages = templates.make_revision_messages(
            critique.messages, critique.response, critique.critique, self.get_revision_prompt(critique), self.examples
        )
        seed = ids.compute_stage_seed("revise", critique.response_id, critique.round)
        return GenerationRequest(messages, seed=seed, group=f"revise {critique.record_id}")

    def check_revision(self, critique: Critique, generation: Generation) -> CheckedText:
        """Return the revision without copied formatting, and the reason why it is unusable, or NONE if it is usable."""
        checked = check_revision(
            generation.text,
            critique.messages,
            critique.response,
            critique.critique,
            self.get_revision_prompt(critique),
            self.examples,
        )
        reason = find_rejection_reason(checked.text, read_finish_reason(generation))
        if reason is RejectionReason.NONE and checked.text.split() == critique.response.split():
            reason = RejectionReason.COPY
        return checked if reason is RejectionReason.NONE else replace(checked, rejection_reason=reason)

    def compute_record_id(self, critique: Critique) -> str:
        configuration = ids.compute_fingerprint(
            "revise",
            model=[self.model.id, self.model.revision],
            template=templates.TEMPLATE_HASHES["revision"],
            constitution=self.constitution.hash,
            sampling=self.sampling.to_fingerprint(),
            few_shot=self.few_shot,
        )
        return ids.compute_record_id("revise", [critique.record_id], configuration)

    def make_record(self, critique: Critique, generation: Generation, latency_ms: float) -> Revision:
        checked = self.check_revision(critique, generation)
        report_leaks("revise", self.model.id, checked)
        response, rejection_reason = checked.text, checked.rejection_reason
        unusable = rejection_reason is not RejectionReason.NONE
        finished_round = Round(
            round=critique.round + 1,
            principle_id=critique.principle_id or "",
            critique=critique.critique,
            revision=response,
        )
        chain = get_carried_fields(critique) | {
            "rounds": [*critique.rounds, finished_round],
            "round": critique.round + 1,
            "response": response,
            "finish_reason": read_finish_reason(generation),
            "previous_response": critique.response,
            "previous_finish_reason": critique.finish_reason,
        }
        return Revision(
            record_id=self.compute_record_id(critique),
            parent_ids=[critique.record_id],
            stage="revise",
            constitution=make_constitution_ref(self.constitution),
            principle_id=critique.principle_id,
            model=ModelRef(id=self.model.id, revision=self.model.revision),
            template_hash=templates.TEMPLATE_HASHES["revision"],
            sampling=self.sampling,
            seed=ids.compute_stage_seed("revise", critique.response_id, critique.round),
            prompt_tokens=generation.usage.prompt_tokens,
            completion_tokens=generation.usage.completion_tokens,
            latency_ms=latency_ms,
            preset=self.preset,
            critique=critique.critique,
            similarity=compute_similarity(critique.response, response),
            rejection_reason=rejection_reason,
            reasoning=generation.reasoning,
            leaks=list(checked.leaks),
            final=unusable,
            end_reason=EndReason.UNUSABLE if unusable else EndReason.NONE,
            final_response=critique.response if unusable else None,
            final_finish_reason=critique.finish_reason if unusable else FinishReason.UNKNOWN,
            **chain,
        )
