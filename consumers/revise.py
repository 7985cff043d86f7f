"""The revise stage: critiques -> revisions. The model rewrites the response according to its critique.

A revision is rejected if it is empty, copies the response that it should improve, repeats a few-shot example, or was withheld
by a server's content filter. The record then has a rejection reason, and its chain ends with UNUSABLE. A rejected revision is
never used for training.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from constitutions.loader import Constitution
from consumers import templates
from consumers.chain import compute_similarity, get_carried_fields, read_finish_reason
from consumers.judge import make_constitution_ref
from engine.eligibility import find_rejection_reason
from engine.errors import CharterError
from engine.models.interface import Generation, GenerationRequest, Model, Result
from schemas import ids
from schemas.records import Critique, EndReason, FinishReason, ModelRef, RejectionReason, Revision, Round, Sampling

_ECHO_NGRAM_SIZE = 5  # a revision with this number of consecutive words from a few-shot example is rejected as an echo


def _extract_ngrams(text: str) -> set[tuple[str, ...]]:
    """Return the word n-grams of a response, in lower case and without punctuation."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + _ECHO_NGRAM_SIZE]) for i in range(len(words) - _ECHO_NGRAM_SIZE + 1)}


@dataclass(frozen=True)
class ReviseStage:
    """The revise stage."""

    model: Model
    constitution: Constitution
    sampling: Sampling
    few_shot: bool
    preset: str = "charter"

    def __call__(self, critiques: Sequence[Critique]) -> list[Result[list[Revision]]]:
        pending = [critique for critique in critiques if not critique.final]
        if not pending:
            return [[] for _ in critiques]
        started = time.monotonic()
        results = self.model.generate(
            [self.make_request(critique) for critique in pending],
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            max_tokens=self.sampling.max_tokens,
        )
        latency_ms = 1000 * (time.monotonic() - started) / len(pending)
        revisions = iter(
            [
                result if isinstance(result, CharterError) else [self.make_record(critique, result[0], latency_ms)]
                for critique, result in zip(pending, results, strict=True)
            ]
        )
        return [[] if critique.final else next(revisions) for critique in critiques]

    def make_request(self, critique: Critique) -> GenerationRequest:
        principle = next((p for p in self.constitution.critique if p.id == critique.principle_id), None)
        revision_prompt = principle.revision_prompt if principle else "Rewrite the answer so that the problem is gone."
        examples = self.constitution.examples if self.few_shot else ()
        messages = templates.make_revision_messages(
            critique.messages, critique.response, critique.critique, revision_prompt, examples
        )
        seed = ids.compute_stage_seed("revise", critique.response_id, critique.round)
        return GenerationRequest(messages, seed=seed, group=f"revise {critique.record_id}")

    def find_rejection_reason(self, previous_response: str, generation: Generation) -> RejectionReason:
        """Return the reason why a revision is unusable, or NONE if it is usable."""
        response = generation.text
        reason = find_rejection_reason(response, read_finish_reason(generation))
        if reason is not RejectionReason.NONE:
            return reason
        if response.split() == previous_response.split():
            return RejectionReason.COPY
        if self.few_shot:
            new_ngrams = _extract_ngrams(response) - _extract_ngrams(previous_response)
            for example in self.constitution.examples:
                if new_ngrams & (_extract_ngrams(example.revision) | _extract_ngrams(example.answer)):
                    return RejectionReason.ECHO
        return RejectionReason.NONE

    def compute_record_id(self, critique: Critique) -> str:
        configuration = ids.compute_fingerprint(
            "revise",
            model=[self.model.id, self.model.revision],
            template=templates.TEMPLATE_HASHES["revision"],
            constitution=self.constitution.hash,
            sampling=self.sampling.model_dump(),
            few_shot=self.few_shot,
        )
        return ids.compute_record_id("revise", [critique.record_id], configuration)

    def make_record(self, critique: Critique, generation: Generation, latency_ms: float) -> Revision:
        response = generation.text.strip()
        rejection_reason = self.find_rejection_reason(critique.response, generation)
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
            final=unusable,
            end_reason=EndReason.UNUSABLE if unusable else EndReason.NONE,
            final_response=critique.response if unusable else None,
            final_finish_reason=critique.finish_reason if unusable else FinishReason.UNKNOWN,
            **chain,
        )
