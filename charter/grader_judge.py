"""A judge that is a program: it compares two responses by the scores of a grader, and asks no model.

`charter demo` labels with it, because a model as small as SmolLM2 judges almost at random. The stage judge sends its usual
question, and the judge reads the two responses from the question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from consumers.graders.interface import GradedText, Grader
from consumers.templates import COMPARISON_TEMPLATE, parse_template
from engine.models.interface import (
    LOCAL_CAPABILITIES,
    Generation,
    GenerationRequest,
    ModelCapabilities,
    OptionScores,
    require_results,
)

_SHARPNESS = 6.0  # log-odds in nats for a difference of the scores of 1
_OPTION_MASS = 0.99  # probability of both options together


class GraderJudge:
    """Prefers the response with the higher score. The probability is a logistic function of the difference of the scores.

    A text that ended at the token limit is not marked in a question, so the grader sees no finish reason.
    """

    capabilities: ModelCapabilities = LOCAL_CAPABILITIES

    def __init__(self, grader: Grader) -> None:
        self.grader = grader
        self.id, self.revision = f"grader-{grader.name}", grader.version

    def generate(
        self,
        batch: Sequence[GenerationRequest],
        *,
        num_completions: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 256,
        max_thinking_tokens: int = 0,
    ) -> list[list[Generation]]:
        # The interface of a model has this method. The stage judge does not call it with answer_mode = logprobs.
        raise NotImplementedError("a grader writes no text; judge.answer_mode must be logprobs")

    def score_options(self, batch: Sequence[GenerationRequest], options: Sequence[str]) -> list[OptionScores]:
        """Return the scores of the two options of each question. Raise ValueError for a question that compares nothing."""
        return [self.compare_responses(request) for request in batch]

    def compare_responses(self, request: GenerationRequest) -> OptionScores:
        fields = parse_template(COMPARISON_TEMPLATE, request.messages[-1].content)
        if fields is None:
            raise ValueError(f"not a comparison: {request.messages[-1].content[:200]!r}")
        first, second = require_results(self.grader.grade([GradedText((), fields[name]) for name in ("first", "second")]))
        margin = (first[0].score or 0.0) - (second[0].score or 0.0)
        p_first = 1.0 / (1.0 + math.exp(-_SHARPNESS * margin))
        return OptionScores(tuple(math.log(_OPTION_MASS * p) for p in (p_first, 1 - p_first)), _OPTION_MASS)
