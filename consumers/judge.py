"""Judge: responses (or finished chains) -> preferences. Which of two answers does the constitution prefer?

The label is soft, from next-token probabilities in both orders. A judgement that cannot be read is an outcome without a
label, never a guess: LOW_MASS when the two letters caught too little probability, POSITION_FLIP (if `reject_flips`) when the
same slot won twice. Only OK trains.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from constitutions.loader import Constitution
from consumers import templates
from consumers.chain import seed_for
from consumers.compare import Comparison, both_orders
from engine.models.port import Model
from schemas import ids
from schemas.records import (
    Candidate,
    Chain,
    ChainEnd,
    ConstitutionRef,
    FinishReason,
    ModelRef,
    Outcome,
    Preference,
    Record,
    Response,
    Turn,
    Vote,
)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, waiting for a judgement."""

    parent: Response | Chain
    response_id: str
    a: str
    b: str
    a_candidate: int | None
    b_candidate: int | None
    a_stopped: bool
    b_stopped: bool
    sample: int

    @property
    def seed(self) -> int:
        """The same for the same pair under every constitution."""
        return seed_for("judge", self.response_id, self.sample)


def pairs_of(record: Record) -> list[Pair]:
    """The pairs in a record: neighbouring candidates of a response; the final text and the first answer of a chain."""
    if isinstance(record, Response):
        candidates = record.candidates
        return [
            Pair(record, record.record_id, a.text, b.text, a.index, b.index, stopped(a), stopped(b), a.index)
            for a, b in pairwise(candidates)
        ]
    assert isinstance(record, Chain)
    if not record.final or record.ended in (ChainEnd.UNUSABLE, ChainEnd.SKIPPED):
        return []
    if record.final_text is None or record.final_text == record.first_answer:
        return []
    return [
        Pair(
            record,
            record.response_id,
            record.final_text,
            record.first_answer,
            None,
            0,
            record.final_stopped,
            record.first_stopped,
            0,
        )
    ]


def stopped(candidate: Candidate) -> bool:
    return candidate.finish_reason is FinishReason.STOP


@dataclass(frozen=True)
class Judge:
    """The judging stage."""

    model: Model
    constitution: Constitution
    pairing: str
    min_mass: float
    reject_flips: bool

    def __call__(self, records: Sequence[Record]) -> list[list[Preference]]:
        pairs = [pairs_of(record) for record in records]
        flat = [pair for of_one in pairs for pair in of_one]
        if not flat:
            return [[] for _ in records]
        record_ids = [self.record_id(pair) for pair in flat]
        questions = [self.question(pair) for pair in flat]
        started = time.monotonic()
        comparisons = both_orders(
            self.model, [self.wording(pair, text) for pair, (_, text) in zip(flat, questions, strict=True)]
        )
        latency = 1000 * (time.monotonic() - started) / len(flat)
        made = iter(
            [
                self.preference(pair, rid, principle, comparison, latency)
                for pair, rid, (principle, _), comparison in zip(flat, record_ids, questions, comparisons, strict=True)
            ]
        )
        return [[next(made) for _ in of_one] for of_one in pairs]

    def record_id(self, pair: Pair) -> str:
        configuration = ids.fingerprint(
            model=[self.model.id, self.model.revision],
            template=templates.hash_of("comparison", self.model.capabilities),
            constitution=self.constitution.hash,
            pairing=self.pairing,
            min_mass=self.min_mass,
            reject_flips=self.reject_flips,
        )
        return ids.record_id("judge", [pair.parent.record_id], configuration, pair.sample)

    def question(self, pair: Pair) -> tuple[str, str]:
        """The principle's id and the question: one principle drawn from the pair's seed, or all of them at once."""
        if self.constitution.judge_with == "all":
            return "all", self.constitution.whole_question
        principle = self.constitution.judging_principle(pair.seed, pair.parent.tags)
        return principle.id, principle.question

    def wording(self, pair: Pair, question: str) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
        turns = pair.parent.turns
        return (
            templates.comparison(turns, pair.a, pair.b, question),
            templates.comparison(turns, pair.b, pair.a, question),
        )

    def outcome(self, comparison: Comparison) -> Outcome:
        if comparison.mass < self.min_mass:
            return Outcome.LOW_MASS
        if self.reject_flips and comparison.flipped:
            return Outcome.POSITION_FLIP
        return Outcome.OK

    def preference(
        self, pair: Pair, record_id: str, principle_id: str, comparison: Comparison, latency_ms: float
    ) -> Preference:
        parent, outcome = pair.parent, self.outcome(comparison)
        vote = Vote(
            principle_id=principle_id,
            p_forward=comparison.forward,
            p_backward=comparison.backward,
            mass_forward=comparison.mass_forward,
            mass_backward=comparison.mass_backward,
        )
        return Preference(
            record_id=record_id,
            parent_ids=[parent.record_id],
            prompt_id=parent.prompt_id,
            run_id=parent.run_id,
            stage="judge",
            constitution=reference(self.constitution),
            principle_id=principle_id,
            model=ModelRef(id=self.model.id, revision=self.model.revision),
            policy_version=parent.policy_version,
            template_hash=templates.hash_of("comparison", self.model.capabilities),
            seed=pair.seed,
            prompt_tokens=comparison.usage.prompt,
            completion_tokens=comparison.usage.completion,
            latency_ms=latency_ms,
            response_id=pair.response_id,
            turns=parent.turns,
            source=parent.source,
            tags=parent.tags,
            split=parent.split,
            epoch=parent.epoch,
            pairing=self.pairing,
            a=pair.a,
            b=pair.b,
            a_candidate=pair.a_candidate,
            b_candidate=pair.b_candidate,
            a_stopped=pair.a_stopped,
            b_stopped=pair.b_stopped,
            p_a=None if outcome is Outcome.LOW_MASS else comparison.p,
            p_forward=comparison.forward,
            p_backward=comparison.backward,
            gap=comparison.gap,
            mass=comparison.mass,
            flipped=comparison.flipped,
            votes=[vote],
            outcome=outcome,
        )


def reference(constitution: Constitution) -> ConstitutionRef:
    return ConstitutionRef(name=constitution.name, version=constitution.version, hash=constitution.hash)
