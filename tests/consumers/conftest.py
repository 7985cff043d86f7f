"""Records to feed the stages with."""

import pytest

from schemas import ids
from schemas.records import Candidate, FinishReason, ModelRef, Prompt, Response, Turn


@pytest.fixture(scope="session")
def make_prompt():
    def make(text="How do magnets work?", source="test", **more):
        turns = [Turn(role="user", content=text)]
        key = ids.prompt_id(turns)
        return Prompt(
            record_id=ids.record_id("produce", [key], ""), prompt_id=key, run_id="r", stage="produce", turns=turns,
            source=source, **more
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def make_response(make_prompt):
    def make(answers=("first answer", "second answer"), **more):
        prompt = make_prompt(**more)
        candidates = [Candidate(index=i, text=t, finish_reason=FinishReason.STOP) for i, t in enumerate(answers)]
        return Response(
            record_id=ids.record_id("respond", [prompt.record_id], "f"), prompt_id=prompt.prompt_id, run_id="r",
            stage="respond", turns=prompt.turns, source=prompt.source, candidates=candidates, policy_version=3,
            model=ModelRef(id="m", revision="v"),
        )  # fmt: skip

    return make
