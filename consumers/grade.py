"""The grade stage: grade responses with one or more graders (consumers/graders/).

A Grade is a separate record, so any number of graders can grade the same responses, at any time, also in a replay. The grader
and its version are part of the record id.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from constitutions.loader import Constitution
from consumers.graders.interface import GradedText, Grader, GradeResult
from consumers.judge import make_constitution_ref
from engine.errors import CharterError
from engine.models.interface import Result, combine_results
from schemas import ids
from schemas.records import Chain, EndReason, Grade, Record, Response

COMPLETION, FINAL_RESPONSE, CONTRAST_COMPLETION = "completion", "final_response", "contrast_completion"


@dataclass(frozen=True)
class _Subject:
    """A response that is graded, and the record that contains it."""

    parent: Response | Chain
    name: str
    text: GradedText
    completion_index: int | None
    policy_version: int | None

    @property
    def response_id(self) -> str:
        return self.parent.record_id if isinstance(self.parent, Response) else self.parent.response_id


def _make_subjects(record: Record, subjects: Sequence[str]) -> list[_Subject]:
    if isinstance(record, Response):
        messages, tags, contrast = tuple(record.messages), tuple(record.tags), record.contrast_completion
        completions = record.completions if COMPLETION in subjects else []
        made = [
            _Subject(
                record,
                COMPLETION,
                GradedText(messages, c.text, record.record_id, c.finish_reason, tags, record.suite_item),
                c.index,
                c.policy_version,
            )
            for c in completions
        ]
        if contrast and CONTRAST_COMPLETION in subjects:  # no policy version: it is no response of the policy to this prompt
            text = GradedText(messages, contrast.text, record.record_id, contrast.finish_reason, tags)
            made.append(_Subject(record, CONTRAST_COMPLETION, text, None, None))
        return made
    assert isinstance(record, Chain)
    has_result = record.final and record.final_response is not None and record.end_reason is not EndReason.UNUSABLE
    if FINAL_RESPONSE not in subjects or not has_result:
        return []
    messages, tags = tuple(record.messages), tuple(record.tags)
    text = GradedText(messages, record.final_response or "", record.record_id, record.final_finish_reason, tags)
    return [_Subject(record, FINAL_RESPONSE, text, None, record.policy_version)]


@dataclass(frozen=True)
class GradeStage:
    """The grade stage. `subjects` contains one or more of "completion", "final_response" and "contrast_completion"."""

    graders: Sequence[Grader]
    subjects: Sequence[str]
    constitution: Constitution

    def __call__(self, records: Sequence[Record]) -> list[Result[list[Grade]]]:
        subjects_by_record = [_make_subjects(record, self.subjects) for record in records]
        subjects = [subject for record_subjects in subjects_by_record for subject in record_subjects]
        results = [self.grade_subjects(grader, subjects) for grader in self.graders] if subjects else []
        # For each subject, the grades of all graders, or the first error among them.
        by_subject = iter([combine_results(of_subject) for of_subject in zip(*results, strict=True)])
        by_record = [combine_results([next(by_subject) for _ in subjects if results]) for subjects in subjects_by_record]
        return [
            result if isinstance(result, CharterError) else [g for subject in result for grades in subject for g in grades]
            for result in by_record
        ]

    def grade_subjects(self, grader: Grader, subjects: Sequence[_Subject]) -> list[Result[list[Grade]]]:
        """Return the grades of each subject by one grader."""
        started = time.monotonic()
        results = grader.grade([subject.text for subject in subjects])
        latency_ms = 1000 * (time.monotonic() - started) / len(subjects)
        return [
            result
            if isinstance(result, CharterError)
            else [self.make_grade(subject, grader, grade, latency_ms) for grade in result]
            for subject, result in zip(subjects, results, strict=True)
        ]

    def make_grade(self, subject: _Subject, grader: Grader, result: GradeResult, latency_ms: float) -> Grade:
        parent, asks_principle = subject.parent, result.principle_id is not None
        lineage: dict[str, Any] = {"constitution": make_constitution_ref(self.constitution)} if asks_principle else {}
        return Grade(
            record_id=self.compute_record_id(subject, grader, result.principle_id),
            parent_ids=[parent.record_id],
            prompt_id=parent.prompt_id,
            run_id=parent.run_id,
            stage="grade",
            principle_id=result.principle_id,
            model=grader.model,
            policy_version=subject.policy_version,
            template_hash=getattr(grader, "template_hash", None),
            prompt_tokens=result.prompt_tokens,
            completion_tokens=result.completion_tokens,
            latency_ms=latency_ms,
            response_id=subject.response_id,
            source=parent.source,
            split=parent.split,
            epoch=parent.epoch,
            subject=subject.name,
            completion_index=subject.completion_index,
            grader=grader.name,
            grader_version=grader.version,
            label=result.label,
            score=result.score,
            outcome=result.outcome,
            outcome_reason=result.outcome_reason,
            details=dict(result.details),
            **lineage,
        )

    def compute_record_id(self, subject: _Subject, grader: Grader, principle_id: str | None) -> str:
        configuration = ids.compute_fingerprint(
            "grade",
            subject=subject.name,
            grader=grader.name,
            grader_version=grader.version,
            principle=principle_id,
            model=[grader.model.id, grader.model.revision] if grader.model else None,
            template=getattr(grader, "template_hash", None),
            constitution=self.constitution.hash if principle_id is not None else None,
        )
        return ids.compute_record_id("grade", [subject.parent.record_id], configuration, subject.completion_index or 0)
