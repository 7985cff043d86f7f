"""The interface of a grader.

A grader never invents a value. If it cannot grade a response, the result has an outcome other than OK, a reason, and no score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.models.interface import Result
from schemas.records import ChatMessage, FinishReason, ModelRef, Outcome, SuiteItem


@dataclass(frozen=True)
class GradedText:
    """A response that is graded, with its dialogue. `text` has no reasoning.

    `group` names the record of the response, for questions to a model (see GenerationRequest). `suite_item` is the place of the
    prompt in an evaluation suite, or None.
    """

    messages: tuple[ChatMessage, ...]
    text: str
    group: str = ""
    finish_reason: FinishReason = FinishReason.UNKNOWN
    tags: tuple[str, ...] = ()
    suite_item: SuiteItem | None = None

    @property
    def question(self) -> str:
        """The last message of the user."""
        return next((message.content for message in reversed(self.messages) if message.role == "user"), "")


@dataclass(frozen=True)
class GradeResult:
    """One grade of one response.

    `score` has the meaning that the grader documents; a higher score is not always better. `details` are named numbers behind
    the score. A grader that returns several grades for one response gives each its own `principle_id`.
    """

    label: str = ""
    score: float | None = None
    outcome: Outcome = Outcome.OK
    outcome_reason: str = ""
    details: Mapping[str, float] = field(default_factory=dict)
    principle_id: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Grader(Protocol):
    """Grades responses. `name` and `version` are part of the record id: a changed grader needs a new version.

    `model` is the model that the grader asks, or None.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def model(self) -> ModelRef | None: ...

    def grade(self, texts: Sequence[GradedText]) -> Sequence[Result[list[GradeResult]]]:
        """Return the grades of each text, in order, or the error of a text whose request to a model failed."""
        ...
