"""Revise: critiques -> revisions. The text is written anew in the light of its critique.

A revision that is empty, that copies the text it should improve, that repeats a worked example, or that a server's filter kept
back is recorded as such and ends its chain as UNUSABLE: it never trains.
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
from engine.models.interface import Generation, GenerationRequest, Model
from schemas import ids
from schemas.records import Critique, EndReason, FinishReason, ModelRef, RejectionReason, Revision, Round, Sampling

_ECHO_NGRAM_SIZE = 5  # so many words of a worked example in a row are no coincidence


def _extract_ngrams(text: str) -> set[tuple[str, ...]]:
    """Every run of ECHO_WORDS words of a text, in lower case and without punctuation."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + _ECHO_NGRAM_SIZE]) for i in range(len(words) - _ECHO_NGRAM_SIZE + 1)}


@dataclass(frozen=True)
class ReviseStage:
    """The revision stage."""

    model: Model
    constitution: Constitution
    sampling: Sampling
    few_shot: bool
    preset: str = "charter"

    def __call__(self, critiques: Sequence[Critique]) -> list[list[Revision]]:
        waiting = [critique for critique in critiques if not critique.final]
        if not waiting:
            return [[] for _ in critiques]
        started = time.monotonic()
        answers = self.model.generate(
            [self.make_request(critique) for critique in waiting],
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            max_tokens=self.sampling.max_tokens,
        )
        latency = 1000 * (time.monotonic() - started) / len(waiting)
        made = iter([self.make_record(critique, answer, latency) for critique, (answer,) in zip(waiting, answers, strict=True)])
        return [[] if critique.final else [next(made)] for critique in critiques]

    def make_request(self, critique: Critique) -> GenerationRequest:
        principle = next((p for p in self.constitution.critique if p.id == critique.principle_id), None)
        request = principle.revision_prompt if principle else "Rewrite the answer so that the problem is gone."
        examples = self.constitution.examples if self.few_shot else ()
        messages = templates.make_revision_messages(critique.messages, critique.response, critique.critique, request, examples)
        return GenerationRequest(messages, seed=ids.compute_stage_seed("revise", critique.response_id, critique.round))

    def find_rejection_reason(self, previous_response: str, generation: Generation) -> RejectionReason:
        after = generation.text
        if generation.finish_reason == "refused":
            return RejectionReason.REFUSED
        if not after.strip():
            return RejectionReason.EMPTY
        if after.split() == previous_response.split():
            return RejectionReason.COPY
        shown = [text for example in self.constitution.examples for text in (example.revision, example.answer)]
        if self.few_shot and any(
            _extract_ngrams(text) & _extract_ngrams(after) - _extract_ngrams(previous_response) for text in shown
        ):
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
        text = generation.text.strip()
        fault = self.find_rejection_reason(critique.response, generation)
        unusable = fault is not RejectionReason.NONE
        done = Round(
            round=critique.round + 1,
            principle_id=critique.principle_id or "",
            critique=critique.critique,
            revision=text,
        )
        chain = get_carried_fields(critique) | {
            "rounds": [*critique.rounds, done],
            "round": critique.round + 1,
            "response": text,
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
            similarity=compute_similarity(critique.response, text),
            rejection_reason=fault,
            final=unusable,
            end_reason=EndReason.UNUSABLE if unusable else EndReason.NONE,
            final_response=critique.response if unusable else None,
            final_finish_reason=critique.finish_reason if unusable else FinishReason.UNKNOWN,
            **chain,
        )
